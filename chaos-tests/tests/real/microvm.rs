//! The VM is a microVM: a process of host A's agent, with the pilot in it and a log on its disk.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::{FailoverCause, Role};
use replicator::demo::lab::{COMMAND, Host, VM};
use replicator::demo::worker::logged;
use rustix::process::{Pid, Signal, kill_process};

use crate::stage::{Stage, play_microvm};

/// Every acknowledged write of the client `tag` is in the log on host B's disk.
fn is_logged(stage: &Stage, tag: &str, acked: u64) -> Result<()> {
    let records = stage.lab.log_on(Host::B)?;
    let there: BTreeSet<&[u8]> = records.iter().map(Vec::as_slice).collect();
    let missing = (0..acked).find(|&number| !there.contains(logged(tag, number).as_bytes()));
    ensure!(missing.is_none(), "of {acked} acknowledged writes {missing:?} is not in the log on the survivor's disk");
    Ok(())
}

#[test]
fn a_microvm_is_protected_left_protected_again_and_survives_the_death_of_its_host() {
    play_microvm("microVM killed", async |stage| {
        stage.set_microvm().await?;
        let alone = stage.status(Host::A).await?;
        ensure!(alone.state.word() == "unprotected" && alone.role == Role::Primary, "{alone:?}");
        let mut client = stage.writer("m").await?;
        stage.protect().await?;
        client.goes_on().await?;
        for host in [Host::A, Host::B] {
            let said = stage.lab.understudy(host, &["rehearse", VM], COMMAND).await?;
            ensure!(said.contains("loads"), "{said}");
        }
        let refused = stage.lab.try_understudy(Host::A, &["end", VM], COMMAND).await?;
        ensure!(refused.code == Some(3) && refused.err.contains("is protected"), "{refused:?}");
        stage.lab.understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        let left = stage.status(Host::A).await?;
        ensure!(left.state.word() == "unprotected" && left.reason.is_empty(), "{left:?}");
        client.goes_on().await?;
        stage.until_b_is_clean().await?;

        stage.protect().await?;
        client.goes_on().await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        ensure!(survivor.failover.is_some(), "{survivor:?}");
        let written = stage.nothing_lost(client).await?;
        is_logged(stage, "m", written.acked)?;

        // It is not begun anew beside the survivor, and what happened is remembered.
        stage.lab.raise_host_a().await?;
        let microvm = stage.microvm();
        let Err(refused) = stage.lab.run_microvm(&microvm).await else {
            anyhow::bail!("a VM was begun anew that runs on host-b");
        };
        ensure!(refused.to_string().contains("belongs to host-b"), "{refused:#}");
        let said = stage.lab.understudy(Host::B, &["events", VM], COMMAND).await?;
        ensure!(said.contains("goes on here"), "{said}");
        Ok(())
    });
}

#[test]
fn a_microvm_is_protected_again_goes_home_and_is_handed_over_when_its_agent_stops() {
    play_microvm("microVM there and back", async |stage| {
        stage.set_microvm().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("h").await?;
        // Its process alone: the agent lives, says so, and stands by from then on.
        let microvm = Pid::from_raw(i32::try_from(stage.lab.microvm_pid(Host::A)?)?).context("a pid")?;
        kill_process(microvm, Signal::KILL)?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        let cause = survivor.failover.as_ref().map(|report| report.cause);
        ensure!(cause == Some(FailoverCause::GuestDied), "{survivor:?}");
        let again = stage.until_state(Host::B, "protected").await?;
        ensure!(again.role == Role::Primary && again.survivor.is_some(), "{again:?}");
        client.goes_on().await?;

        stage.goes_home(&mut client).await?;

        // It would end with the agent.
        stage.lab.stop_agent(Host::A).await?;
        client.goes_on().await?;
        stage.until(Host::B, "that it runs there", |status| status.role != Role::Standby).await?;
        let written = stage.nothing_lost(client).await?;
        is_logged(stage, "h", written.acked)
    });
}
