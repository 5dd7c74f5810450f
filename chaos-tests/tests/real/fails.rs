//! One part fails, the rest lives.

use anyhow::{Result, ensure};
use replicator::control::api::FailoverCause;
use replicator::demo::lab::Host;
use replicator::demo::netns::ip;
use replicator::demo::wait::now_ns;

use crate::stage::{SOON, Stage, play, play_long};

#[test]
fn the_primarys_qemu_is_killed_and_its_agent_lives() {
    play("QEMU killed", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("q").await?;
        stage.lab.kill_vm().await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        let cause = survivor.failover.as_ref().map(|report| report.cause);
        ensure!(cause == Some(FailoverCause::GuestDied), "{survivor:?}");
        stage.until_state(Host::A, "fenced").await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn the_primarys_qemu_stands_still_and_its_agent_lives() {
    play("QEMU frozen", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("z").await?;
        stage.freeze_the_vm()?;
        let survivor = stage.until_survivor().await?;
        let cause = survivor.failover.as_ref().map(|report| report.cause);
        ensure!(cause == Some(FailoverCause::GuestDied), "{survivor:?}");
        client.goes_on().await?;
        // It would have gone on some time.
        stage.lab.vm_ended(SOON).await?;
        stage.until_state(Host::A, "fenced").await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn the_primarys_agent_is_killed_and_its_qemu_lives() {
    play("agent A killed", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("a").await?;
        stage.lab.kill_agent(Host::A).await?;
        // What had been released before may still be on its way until here.
        stage.until_survivor().await?;
        let (heard, _) = stage.frames()?;
        client.goes_on().await?;
        stage.ask_on_host_a().await?;
        client.goes_on().await?;
        let (now, _) = stage.frames()?;
        ensure!(now == heard, "the old copy said {} frames more after its agent's death", now - heard);
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn the_standbys_agent_is_killed() {
    play("agent B killed", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("b").await?;
        stage.lab.kill_agent(Host::B).await?;
        client.goes_on().await?;
        stage.until_state(Host::A, "degraded").await?;
        client.goes_on().await?;
        stage.appearance().await?.has_nothing_of_ours()?;

        stage.lab.start_agent(Host::B).await?;
        stage.protect().await?;
        stage.outlives_host_a(client).await.map(drop)
    });
}

#[test]
fn without_standby_and_witness_the_vm_stalls_and_loses_nothing() {
    play("agent B and witness killed", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("w").await?;
        stage.lab.kill_witness().await?;
        client.goes_on().await?;
        stage.lab.kill_agent(Host::B).await?;
        let says_so = |reason: &str| reason.contains("stalls");
        let stalled = stage.until(Host::A, "that it stalls", |status| says_so(&status.reason)).await?;
        ensure!(stalled.state.word() == "failing-over", "{stalled:?}");
        let from = now_ns();
        let still = stage.status(Host::A).await?;
        ensure!(still.held.is_some_and(|held| held.frames > 0), "nothing waits while it stalls: {still:?}");
        let to = now_ns();
        stage.lab.start_witness().await?;
        client.goes_on().await?;
        stage.until_state(Host::A, "degraded").await?;
        let written = stage.nothing_lost(client).await?;
        let stood = written.gaps_ns.iter().any(|gap| gap.0 <= from && gap.1 >= to);
        ensure!(stood, "the client was answered while the VM stalled: {written:?}");
        Ok(())
    });
}

#[test]
fn a_partitioned_primary_is_mute_and_ends_when_it_learns() {
    play("partition", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("n").await?;
        stage.lab.set_link(Host::A, false)?;
        stage.until_survivor().await?;
        client.goes_on().await?;
        stage.until_state(Host::A, "failing-over").await?;
        let (heard, _) = stage.frames()?;
        client.goes_on().await?;
        stage.lab.check(&[Host::A, Host::B])?;
        stage.lab.set_link(Host::A, true)?;
        stage.lab.vm_ended(SOON).await?;
        stage.until_state(Host::A, "fenced").await?;
        let (now, _) = stage.frames()?;
        ensure!(now == heard, "the partitioned copy said {} frames more", now - heard);
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn an_agent_killed_during_the_initial_sync_leaves_the_vm_running() {
    play_long("agent A killed during the sync", async |stage| {
        stage.set().await?;
        let mut client = stage.writer("s").await?;
        // The guest's memory takes minutes at this rate.
        let namespace = stage.lab.namespace(Host::A.role());
        ip(&format!("netns exec {namespace} tc qdisc add dev uplink root tbf rate 20mbit burst 64kb latency 1s"))?;
        let vm = stage.vm()?;
        let accepted = stage.lab.client(Host::A).protect(&request(&vm)).await?;
        ensure!(accepted.vm == replicator::demo::lab::VM, "{accepted:?}");
        stage.until(Host::A, "that pages are copied", is_copying).await?;
        stage.until_state(Host::B, "syncing").await?;
        stage.lab.kill_agent(Host::A).await?;
        ip(&format!("netns exec {namespace} tc qdisc del dev uplink root"))?;
        client.goes_on().await?;
        stage.until_b_is_clean().await?;
        client.goes_on().await?;
        protect_after_restart(stage).await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

fn request(vm: &str) -> replicator::control::api::ProtectRequest {
    let (vm, to) = (vm.to_owned(), Host::B.name().to_owned());
    replicator::control::api::ProtectRequest {
        vm,
        to,
        epoch: None,
        shadow: None,
        durability: replicator::control::api::DurabilityPolicy::Disk,
        witness: None,
        standbys: Vec::new(),
        once: true,
        without_witness: None,
    }
}

fn is_copying(status: &replicator::control::api::VmStatus) -> bool {
    use replicator::control::api::ProtectionState;
    matches!(status.state, ProtectionState::Syncing(progress) if progress.done_pages > 0)
}

/// A new life of host A's agent protects the VM that the old one left.
async fn protect_after_restart(stage: &mut Stage) -> Result<()> {
    stage.lab.start_agent(Host::A).await?;
    stage.protect().await
}
