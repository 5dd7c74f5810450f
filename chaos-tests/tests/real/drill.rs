//! Drills: an operator breaks a real pair on purpose.

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::{EventKind, VmEvent};
use replicator::demo::lab::{COMMAND, GUEST, Host, VM};
use replicator::demo::process::Ended;
use tokio::time::sleep;

use crate::stage::{SOON, Stage, play, play_long};

/// The words of a drill that is confirmed.
fn words<'a>(fault: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [["chaos", "drill", VM, "--fault", fault, "--confirm", VM].as_slice(), more].concat()
}

/// What a drill that must begin said, and what its report has.
fn passed(ended: &Ended, json: &str) -> Result<serde_json::Value> {
    ensure!(ended.code == Some(0) && ended.out.contains("\npassed: "), "{ended:?}");
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    ensure!(report["passed"] == true && report["protected_ms"].as_f64().is_some(), "{report}");
    ensure!(report["first_reply_ms"].as_f64() <= report["protected_ms"].as_f64(), "{report}");
    Ok(report)
}

/// Nothing is broken: the agent and its VM are the same, and nobody noted a drill.
async fn unbroken(stage: &Stage, args: &[&str], host: Host, code: i32, says: &str) -> Result<()> {
    let ended = stage.lab.try_understudy(host, args, COMMAND).await?;
    ensure!(ended.code == Some(code) && ended.err.contains(says), "{args:?}: {ended:?}");
    ensure!(drills(stage, host).await? == 0, "{args:?} was noted");
    Ok(())
}

async fn drills(stage: &Stage, host: Host) -> Result<usize> {
    let said = stage.lab.understudy(host, &["events", VM, "--json"], COMMAND).await?;
    let events: Vec<VmEvent> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(events.iter().filter(|event| event.kind == EventKind::Drill).count())
}

#[test]
fn a_drill_is_confirmed_kills_and_ends_when_the_vm_is_protected_again() {
    play_long("drill", async |stage| {
        stage.set_protected().await?;
        unbroken(stage, &words("kill-vm", &[]), Host::A, 3, "is protected once").await?;
        stage.lab.understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        stage.until_b_is_clean().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("r").await?;
        unbroken(stage, &["chaos", "drill", VM, "--fault", "kill-vm"], Host::A, 3, "--confirm web-1").await?;
        let other = ["chaos", "drill", VM, "--fault", "kill-vm", "--confirm", "web-2"];
        unbroken(stage, &other, Host::A, 3, "`web-2` is not web-1").await?;
        unbroken(stage, &words("kill-vm", &[]), Host::B, 3, "begin the drill on host-a").await?;
        unbroken(stage, &words("kill-vm", &["--probe", "10.77.0.99"]), Host::A, 1, "answers no echo").await?;
        client.goes_on().await?;

        let (guest, json) = (GUEST.to_string(), stage.lab.path("drill.json").display().to_string());
        let more = ["--probe", &guest, "--json", &json];
        let said = stage.lab.try_understudy(Host::A, &words("kill-vm", &more), SOON).await?;
        let report = passed(&said, &json)?;
        ensure!(report["generation_after"].as_u64() > report["generation_before"].as_u64(), "{report}");
        ensure!(drills(stage, Host::A).await? == 1, "it is not among the events");
        stage.lab.vm_ended(SOON).await?;
        stage.until_survivor().await?;
        client.goes_on().await?;

        // Now it runs on B. Whoever kills an agent there has to start it again, as systemd would.
        let drill = stage.lab.beside(Host::B, &words("kill-primary", &more), SOON);
        let again = async {
            stage.lab.lose_agent(Host::B, SOON).await?;
            stage.lab.start_agent(Host::B).await
        };
        let (said, again) = tokio::join!(drill, again);
        again.context("the agent that was to be killed")?;
        let report = passed(&said?, &json)?;
        ensure!(report["agent_back_ms"].as_f64().is_some(), "{report}");
        client.goes_on().await?;

        let more = [more.as_slice(), &["--for", "2s"]].concat();
        let said = stage.lab.try_understudy(Host::A, &words("stop-agent", &more), SOON).await?;
        passed(&said, &json)?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_drill_that_kills_the_agent_alone_leaves_its_guest_mute() {
    play("drill that kills the agent alone", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("k").await?;
        let json = stage.lab.path("drill.json").display().to_string();
        let drill = stage.lab.beside(Host::A, &words("kill-agent", &["--json", &json]), SOON);
        let watch = async {
            stage.lab.lose_agent(Host::A, SOON).await?;
            stage.until_survivor().await?;
            stage.lab.check(&[Host::A]).context("the guest was to be left running")?;
            let (heard, _) = stage.frames()?;
            client.goes_on().await?;
            stage.ask_on_host_a().await?;
            let (now, _) = stage.frames()?;
            ensure!(now == heard, "the guest said {} frames beside its survivor", now - heard);
            // As systemd would, later.
            stage.lab.set_link(Host::A, true)?;
            stage.lab.start_agent(Host::A).await?;
            stage.lab.vm_ended(SOON).await.context("the guest that was left")
        };
        let (said, watched) = tokio::join!(drill, watch);
        watched?;
        let report = passed(&said?, &json)?;
        ensure!(report["generation_after"].as_u64() > report["generation_before"].as_u64(), "{report}");
        ensure!(report["agent_back_ms"].as_f64().is_some(), "{report}");
        ensure!(drills(stage, Host::A).await? == 1, "it is not among the events");
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn an_interrupted_drill_lets_the_agent_go_on() {
    play("interrupted drill", async |stage| {
        stage.set().await?;
        stage.protect_for_good().await?;
        let pid = stage.lab.agent_pid(Host::A)?;
        let stands = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            Ok::<_, anyhow::Error>(stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T")))
        };
        // Dropped in the middle: the program gets SIGKILL from the laboratory only after it was sent SIGTERM here.
        let drill = stage.lab.beside(Host::A, &words("stop-agent", &["--for", "60s"]), SOON);
        let interrupt = async {
            while !stands()? {
                sleep(std::time::Duration::from_millis(5)).await;
            }
            let namespace = stage.lab.namespace(Host::A.role());
            for process in replicator::demo::netns::processes_in(&namespace) {
                let words = std::fs::read(format!("/proc/{}/cmdline", process.as_raw_nonzero()))?;
                if words.windows(6).any(|part| part == b"\0drill") {
                    rustix::process::kill_process(process, rustix::process::Signal::TERM)?;
                }
            }
            Ok::<_, anyhow::Error>(())
        };
        let (said, sent) = tokio::join!(drill, interrupt);
        sent?;
        let said = said?;
        ensure!(said.code == Some(1) && said.err.contains("was told to end"), "{said:?}");
        ensure!(!stands()?, "the agent still stands");
        stage.until_state(Host::A, "protected").await.map(drop)
    });
}
