//! Fencing as a step before the activation: the winner of the record runs nothing before the other host is confirmed to be off.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::{ProtectionState, Role, VmStatus};
use replicator::demo::lab::{COMMAND, Host, VM};
use replicator::demo::wait::until;

use crate::stage::{SOON, Stage, play, play_long, play_microvm_long};

/// What the fence device of host A is asked by host B's agent, and what it says.
struct Switch {
    /// A line for each time that it was asked.
    asked: PathBuf,
    /// Once it is there, host A is off.
    off: PathBuf,
}

impl Switch {
    /// One that is stuck the first times that it is asked, and then works when it is let to.
    fn stuck(stage: &Stage, times: u32) -> Result<Self> {
        let switch = Self { asked: stage.lab.path("asked"), off: stage.lab.path("off") };
        let (asked, off) = (switch.asked.display(), switch.off.display());
        let script = format!(
            "echo $UNDERSTUDY_FENCE_HOST >> {asked}; if [ $(wc -l < {asked}) -le {times} ]; then echo the switch is stuck >&2; exit 4; fi; until [ -e {off} ]; do sleep 0.05; done"
        );
        let config =
            format!("[fence]\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\ntimeout = \"240s\"\nrequired = true\n");
        fs::write(stage.lab.agent_config(Host::B)?, config)?;
        Ok(switch)
    }

    fn asked(&self) -> Result<Vec<String>> {
        match fs::read_to_string(&self.asked) {
            Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    async fn until_asked(&self, times: usize) -> Result<()> {
        until(&format!("the fence command to be asked {times} times"), SOON, async || {
            let asked = self.asked()?;
            Ok(if asked.len() >= times { Ok(()) } else { Err(format!("{asked:?}")) })
        })
        .await
    }
}

/// Host B's copy, which waits for its fence, is on its disk.
async fn until_kept(stage: &Stage) -> Result<()> {
    let says = |status: &VmStatus| status.advice.contains("the copy is on this host's disk");
    let status = stage.until(Host::B, "that its copy is on the disk", says).await?;
    ensure!(status.state == ProtectionState::FailingOver && status.role == Role::Standby, "{status:?}");
    ensure!(status.survivor.is_none(), "it runs unfenced: {status:?}");
    Ok(())
}

/// What host B's state directory has of copies that wait for a fence.
fn copies(stage: &Stage) -> Vec<PathBuf> {
    let dir = stage.lab.state_dir(Host::B).join("copies").join(VM);
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Host B owns the VM, says why it does not run it, and does not.
async fn until_it_cannot_fence(stage: &Stage) -> Result<()> {
    let says = |status: &VmStatus| status.reason.contains("host-a is not confirmed to be off: the fence command ended");
    let status = stage.until(Host::B, "that it cannot switch host-a off", says).await?;
    ensure!(status.state == ProtectionState::FailingOver && status.role == Role::Standby, "{status:?}");
    ensure!(status.reason.contains("the switch is stuck") && status.reason.contains("tried again in"), "{status:?}");
    ensure!(status.advice.contains("--confirm-dead host-a") && status.advice.contains("--give-back"), "{status:?}");
    ensure!(status.survivor.is_none(), "it runs unfenced: {status:?}");
    Ok(())
}

fn fences(stage: &Stage, outcome: &str) -> Result<u64> {
    let series = format!("understudy_fence_seconds_count{{outcome=\"{outcome}\"}} ");
    let metrics = stage.metrics(Host::B)?;
    let count = metrics.lines().find_map(|line| line.strip_prefix(&series)).context("no count of fences")?;
    Ok(count.parse()?)
}

#[test]
fn a_winner_that_must_fence_runs_the_vm_only_after_that_is_confirmed() {
    play("a required fence fails twice, then succeeds", async |stage| {
        let switch = Switch::stuck(stage, 2)?;
        stage.set_protected().await?;
        let mut client = stage.writer("f").await?;
        stage.lab.kill_host_a().await?;
        switch.until_asked(3).await?;
        // The third is under way, and two have failed: still nothing runs, and nothing is given away.
        let events = stage.lab.understudy(Host::B, &["events", VM], COMMAND).await?;
        let failed = events.matches("host-a is not confirmed to be off: the fence command ended").count();
        ensure!(failed == 2 && events.contains("the switch is stuck"), "{failed} are told: {events}");
        let refused = stage.lab.try_understudy(Host::B, &["failover", VM, "--give-back"], COMMAND).await?;
        ensure!(refused.code != Some(0) && refused.err.contains("is being switched off just now"), "{refused:?}");
        let still = stage.status(Host::B).await?;
        ensure!(still.survivor.is_none() && still.role == Role::Standby, "it runs unfenced: {still:?}");
        ensure!(still.state == ProtectionState::FailingOver, "{still:?}");
        ensure!(switch.asked()? == ["host-a"; 3], "{:?}", switch.asked());
        ensure!(fences(stage, "failed")? == 2 && fences(stage, "confirmed")? == 0);

        // Its agent is upgraded, and then dies: the copy is the only one, and each life goes on waiting with it.
        until_kept(stage).await?;
        stage.lab.stop_agent(Host::B).await?;
        ensure!(copies(stage).len() == 1, "{:?}", copies(stage));
        stage.lab.start_agent(Host::B).await?;
        switch.until_asked(4).await?;
        until_kept(stage).await?;
        stage.lab.kill_agent(Host::B).await?;
        stage.lab.start_agent(Host::B).await?;
        switch.until_asked(5).await?;
        until_kept(stage).await?;

        fs::write(&switch.off, "")?;
        client.goes_on().await?;
        stage.until_survivor().await?;
        ensure!(fences(stage, "failed")? == 0 && fences(stage, "confirmed")? == 1);
        until("what was kept to be removed", SOON, async || {
            let left = copies(stage);
            Ok(if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) })
        })
        .await?;
        let events = stage.lab.understudy(Host::B, &["events", VM], COMMAND).await?;
        let at = |what: &str| events.find(what).with_context(|| format!("{what:?} is not told: {events}"));
        ensure!(at("the fence command confirmed that host-a is off")? < at("activates the copy")?, "{events}");
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_vm_with_a_disk_that_waits_for_its_fence_outlives_the_agent() {
    play_long("a required fence, a disk, and agent B killed", async |stage| {
        let switch = Switch::stuck(stage, 1)?;
        stage.set_with_disk(256).await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("m").await?;
        stage.lab.kill_host_a().await?;
        switch.until_asked(2).await?;
        until_kept(stage).await?;
        stage.lab.kill_agent(Host::B).await?;
        stage.lab.start_agent(Host::B).await?;
        switch.until_asked(3).await?;
        fs::write(&switch.off, "")?;
        client.goes_on().await?;
        stage.until_survivor().await?;
        stage.stands_by_again(&mut client).await?;
        stage.goes_home(&mut client).await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_microvm_that_waits_for_its_fence_outlives_the_agent() {
    play_microvm_long("a required fence, a microVM, and agent B killed", async |stage| {
        let switch = Switch::stuck(stage, 1)?;
        stage.set_microvm().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("v").await?;
        stage.lab.kill_host_a().await?;
        switch.until_asked(2).await?;
        until_kept(stage).await?;
        stage.lab.kill_agent(Host::B).await?;
        stage.lab.start_agent(Host::B).await?;
        switch.until_asked(3).await?;
        fs::write(&switch.off, "")?;
        client.goes_on().await?;
        stage.until_survivor().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_host_that_lives_and_cannot_be_fenced_gets_its_vm_back_and_an_operator_confirms_a_dead_one() {
    play_long("a required fence never succeeds", async |stage| {
        let switch = Switch::stuck(stage, 1_000_000)?;
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("n").await?;
        stage.lab.set_link(Host::A, false)?;
        until_it_cannot_fence(stage).await?;
        stage.lab.set_link(Host::A, true)?;
        // Nobody confirmed anything, and host A is heard: the VM is its again, and was never anywhere else.
        client.goes_on().await?;
        ensure!(stage.status(Host::B).await?.survivor.is_none(), "it runs on host-b");
        let home = stage.until_state(Host::A, "protected").await?;
        ensure!(home.role == Role::Primary && home.survivor.is_none(), "{home:?}");
        stage.until_state(Host::B, "protected").await?;
        client.goes_on().await?;

        // A planned failover asks for no fence: host A says itself that its guest stands.
        let asked = switch.asked()?.len();
        stage.lab.understudy(Host::A, &["failover", VM, "--planned"], SOON).await?;
        client.goes_on().await?;
        stage.until_state(Host::B, "protected").await?;
        stage.goes_home(&mut client).await?;
        ensure!(switch.asked()?.len() == asked, "a healthy host was to be switched off");

        stage.lab.kill_host(Host::A)?;
        until_it_cannot_fence(stage).await?;
        let wrong = ["failover", VM, "--force", "--confirm-dead", "host-b"];
        let refused = stage.lab.try_understudy(Host::B, &wrong, COMMAND).await?;
        ensure!(refused.code != Some(0) && refused.err.contains("is host-a, not host-b"), "{refused:?}");
        stage.lab.understudy(Host::B, &["failover", VM, "--force", "--confirm-dead", "host-a"], SOON).await?;
        client.goes_on().await?;
        let events = stage.lab.understudy(Host::B, &["events", VM], COMMAND).await?;
        ensure!(events.contains("an operator, who typed its name, says that host-a is off"), "{events}");
        stage.nothing_lost(client).await.map(drop)
    });
}
