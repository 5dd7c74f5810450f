//! Two hosts and no third one: one of them keeps the record.

use std::fs;

use anyhow::{Result, ensure};
use replicator::control::api::{FailoverCause, Role};
use replicator::demo::lab::{COMMAND, Host, VM};

use crate::stage::{SOON, Stage, play};

/// Two agents that know nobody else, and a VM on host A.
async fn set(stage: &mut Stage) -> Result<()> {
    stage.lab.boot().await?;
    stage.lab.start_agent(Host::A).await?;
    stage.lab.start_agent(Host::B).await?;
    stage.lab.pair_hosts().await
}

/// What a command on host B says that must be refused.
async fn refused(stage: &Stage, words: &[&str], says: &str) -> Result<()> {
    let ended = stage.lab.try_understudy(Host::B, words, COMMAND).await?;
    ensure!(ended.code != Some(0) && ended.err.contains(says), "{words:?}: {ended:?}");
    Ok(())
}

#[test]
fn without_a_third_host_the_other_one_is_forced_out_when_a_fence_says_that_it_is_dead() {
    play("two hosts: the primary's host is fenced and forced out", async |stage| {
        let (switch, config) = (stage.lab.path("switch"), stage.lab.agent_config(Host::B)?);
        let script = format!("[ -e {} ] && exit 0; echo the switch is stuck >&2; exit 4", switch.display());
        fs::write(config, format!("[fence]\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\n"))?;
        set(stage).await?;
        let vm = stage.vm()?;
        let alone = stage.lab.try_understudy(Host::A, &["protect", &vm, "--to", "host-b"], COMMAND).await?;
        ensure!(alone.code != Some(0) && alone.err.contains("--without-witness"), "{alone:?}");
        stage.protect_with(&["--once", "--without-witness=manual"]).await?;
        let mut client = stage.writer("p").await?;
        refused(stage, &["failover", VM, "--force", "--confirm-dead", "host-a"], "the primary answers").await?;

        stage.lab.kill_host_a().await?;
        stage.until_state(Host::B, "failing-over").await?;
        refused(stage, &["failover", VM, "--force", "--confirm-dead", "host-c"], "is host-a, not host-c").await?;
        refused(
            stage,
            &["failover", VM, "--force"],
            "host-a is not confirmed to be off: the fence command ended with exit status: 4: the switch is stuck",
        )
        .await?;
        let still = stage.status(Host::B).await?;
        ensure!(still.survivor.is_none() && still.role == Role::Standby, "it runs without a confirmation: {still:?}");
        fs::write(&switch, "off")?;
        stage.lab.understudy(Host::B, &["failover", VM, "--force"], SOON).await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        let cause = survivor.failover.as_ref().map(|report| report.cause);
        ensure!(
            cause.is_some_and(|cause| [FailoverCause::Forced, FailoverCause::Silence].contains(&cause)),
            "{survivor:?}"
        );
        let events = stage.lab.understudy(Host::B, &["events", VM], COMMAND).await?;
        ensure!(events.contains("forced: the fence command confirmed that host-a is off"), "{events}");

        // The dead host is back. Its record is old: it learns that, and stands by.
        stage.lab.raise_host_a().await?;
        let pid = survivor.survivor.as_ref().map(|at| at.pid.to_string()).unwrap_or_default();
        let words = ["protect", pid.as_str(), "--to", "host-a", "--once", "--without-witness=manual"];
        stage.lab.understudy(Host::B, &words, SOON).await?;
        stage.until_state(Host::A, "protected").await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn without_a_third_host_the_vm_stands_until_the_other_one_is_back() {
    play("two hosts: nobody goes on without the record", async |stage| {
        set(stage).await?;
        stage.protect_with(&["--once", "--without-witness"]).await?;
        let mut client = stage.writer("t").await?;
        // The host that keeps the record needs nobody.
        stage.lab.kill_agent(Host::B).await?;
        stage.until_state(Host::A, "degraded").await?;
        client.goes_on().await?;
        stage.lab.start_agent(Host::B).await?;
        stage.protect_with(&["--once", "--without-witness"]).await?;
        client.goes_on().await?;

        stage.lab.kill_host_a().await?;
        stage.until_state(Host::B, "failing-over").await?;
        refused(stage, &["failover", VM, "--force", "--confirm-dead", "host-a"], "--without-witness=stall").await?;
        let still = stage.status(Host::B).await?;
        ensure!(still.survivor.is_none(), "it runs, and nobody said that it may: {still:?}");
        stage.lab.raise_host_a().await?;
        stage.until_survivor().await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}
