//! What was protected is protected again: after a failover, after a planned one, and when agents restart.

use anyhow::{Context as _, ensure};
use chaos_tests::chaos::field::vms;
use replicator::control::api::{Role, VmStatus};
use replicator::demo::lab::{COMMAND, Host, VM};
use rustix::process::{Pid, Signal, kill_process};

use crate::stage::{SOON, play, play_long};

#[test]
fn a_survivor_is_protected_by_its_old_host_and_goes_back_there() {
    play("failover, protected again, failback", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("a").await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let looking = |status: &VmStatus| status.reason == "looking for a standby: host-a cannot be reached";
        stage.until(Host::B, "that it looks for a standby", looking).await?;
        let early = stage.lab.try_understudy(Host::B, &["failback", VM], COMMAND).await?;
        ensure!(early.code == Some(3) && early.err.contains("cannot go back to host-a now"), "{early:?}");
        stage.stands_by_again(&mut client).await?;

        stage.goes_home(&mut client).await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_standby_whose_agent_restarts_is_a_standby_again() {
    play_long("agent B killed and started again", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("s").await?;
        for _ in 0..2 {
            stage.lab.kill_agent(Host::B).await?;
            stage.until(Host::A, "that it looks for a standby", |status| status.reason.contains("looking")).await?;
            client.goes_on().await?;
            stage.lab.start_agent(Host::B).await?;
            stage.until_state(Host::A, "protected").await?;
            stage.until_state(Host::B, "protected").await?;
            client.goes_on().await?;
        }
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn an_agent_is_upgraded_while_its_vm_runs() {
    play_long("agent A stopped and started again", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("u").await?;
        stage.lab.stop_agent(Host::A).await?;
        // Without an agent it is an ordinary VM.
        stage.appearance().await?.has_nothing_of_ours()?;
        client.goes_on().await?;
        stage.lab.start_agent(Host::A).await?;
        stage.until_state(Host::A, "protected").await?;
        stage.outlives_host_a(client).await.map(drop)
    });
}

#[test]
fn an_agent_that_dies_leaves_its_vm_mute_and_ends_it_once_another_host_runs_it() {
    play_long("agent A killed and started again", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("d").await?;
        stage.lab.kill_agent(Host::A).await?;
        let survivor = stage.until_survivor().await?;
        let (heard, _) = stage.frames()?;
        client.goes_on().await?;
        stage.lab.start_agent(Host::A).await?;
        stage.lab.vm_ended(SOON).await?;
        let (now, _) = stage.frames()?;
        ensure!(now == heard, "the old copy said {} frames more", now - heard);
        let again = stage.until_state(Host::B, "protected").await?;
        ensure!(again.survivor == survivor.survivor && again.role == Role::Primary, "{again:?}");
        stage.until_state(Host::A, "protected").await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_survivors_agent_that_restarts_goes_on_looking_until_it_is_told_to_stop() {
    play_long("survivor's agent restarts", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("r").await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        stage.until_survivor().await?;
        stage
            .until(Host::B, "that it looks for a standby", |status| status.reason.contains("cannot be reached"))
            .await?;
        stage.lab.kill_agent(Host::B).await?;
        client.goes_on().await?;
        stage.lab.start_agent(Host::B).await?;
        stage
            .until(Host::B, "that it looks for a standby", |status| status.reason.contains("cannot be reached"))
            .await?;
        let said = stage.lab.understudy(Host::B, &["unprotect", VM], COMMAND).await?;
        ensure!(said.contains("unprotected and runs on"), "{said}");
        stage.lab.raise_host_a().await?;
        client.goes_on().await?;
        let known = stage.lab.client(Host::B).status().await?.vms;
        ensure!(known.is_empty(), "it is still known: {known:?}");
        // Neither does a later life of the agent take it up.
        stage.lab.kill_agent(Host::B).await?;
        stage.lab.start_agent(Host::B).await?;
        let known = stage.lab.client(Host::B).status().await?.vms;
        ensure!(known.is_empty(), "it was taken up again: {known:?}");
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn both_agents_die_and_the_vm_is_heard_again() {
    play_long("both agents killed and started again", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("b").await?;
        stage.lab.kill_agents().await?;
        stage.lab.kill_witness().await?;
        stage.lab.start_agent(Host::A).await?;
        // As long as nobody says whose the VM is, it is not heard.
        let (heard, _) = stage.frames()?;
        let refused = stage.lab.try_understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        ensure!(refused.err.contains("not known yet who runs"), "{refused:?}");
        let (still, _) = stage.frames()?;
        ensure!(still == heard, "the VM said {} frames while its owner was not known", still - heard);
        stage.lab.start_witness().await?;
        client.goes_on().await?;
        stage
            .until(Host::A, "that it looks for a standby", |status| status.reason.contains("cannot be reached"))
            .await?;
        stage.lab.start_agent(Host::B).await?;
        stage.until_state(Host::A, "protected").await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_winner_that_dies_before_its_copy_ran_gives_the_vm_back() {
    play("agent B killed after its grant, before its copy runs", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("g").await?;
        let twin = vms(&stage.lab.namespace(Host::B.role())).first().copied().context("no twin")?;
        let twin = Pid::from_raw(i32::try_from(twin)?).context("a pid")?;
        // It does not get to run: it does not even load.
        kill_process(twin, Signal::STOP)?;
        stage.lab.kill_agent(Host::A).await?;
        stage.until(Host::B, "that it activates", |status| status.reason.contains("activates the copy")).await?;
        stage.lab.kill_agent(Host::B).await?;
        kill_process(twin, Signal::CONT)?;
        stage.lab.start_agent(Host::B).await?;
        stage.lab.start_agent(Host::A).await?;
        let home = stage.until_state(Host::A, "protected").await?;
        ensure!(home.role == Role::Primary && home.survivor.is_none(), "{home:?}");
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}
