//! Unlucky moments: what is no VM, what a VM's owner does to it behind our back, and agents that freeze or die at any moment.

use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::{DurabilityPolicy, PairOpenRequest, ProtectRequest, ProtectionState, VmStatus};
use replicator::demo::lab::{COMMAND, Host, REDIS, VM};
use replicator::demo::netns::ip;
use replicator::demo::wait::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::refuses::refused;
use crate::stage::{SOON, Stage, play, play_long};

#[test]
fn what_is_no_vm_is_refused_and_late_codes_too() {
    play("strangers", async |stage| {
        stage.set().await?;
        let found = stage.appearance().await?;
        let agent = stage.lab.agent_pid(Host::A)?.to_string();
        let protect = |vm: &str| ["protect", vm, "--to", "host-b"].map(str::to_owned);
        let no_vm = |words: Vec<String>, code: i32, says: &'static str| {
            let stage = &*stage;
            async move {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                refused(stage, Host::A, &words, code, says).await
            }
        };
        no_vm(protect(&agent).into(), 3, "is no QEMU but").await?;
        no_vm(protect("1").into(), 3, "is no QEMU but").await?;
        no_vm(protect("4194304").into(), 3, "no process").await?;
        no_vm(protect("no-such-vm").into(), 3, "no-such-vm").await?;

        // Somebody raves on a socket.
        let socket = stage.lab.run_dir(Host::A).join("raves.sock");
        let listener = UnixListener::bind(&socket)?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = (&stream).write_all(b"* OK IMAP4rev1 ready\r\n");
            }
        });
        no_vm(protect(&socket.display().to_string()).into(), 1, "not QMP").await?;

        // Somebody else holds the VM's monitor.
        let control = stage.lab.vm_control();
        let held = UnixStream::connect(&control)?;
        no_vm(protect(&control.display().to_string()).into(), 3, "another program is connected").await?;
        no_vm(protect(&stage.vm()?).into(), 3, "another program is connected").await?;
        drop(held);

        // A code that is right, too late.
        let window = stage.lab.client(Host::B).pair_open(&PairOpenRequest { ttl_s: 1 }).await?;
        until("the pairing window to close", SOON, async || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
            Ok(if now > u128::from(window.expires_unix_ms) { Ok(()) } else { Err("it is open".to_owned()) })
        })
        .await?;
        refused(stage, Host::A, &["pair", Host::B.address(), "--code", &window.code], 6, "pairing").await?;

        let left = stage.appearance().await?;
        ensure!(left == found, "a refusal changed the VM: found {found:?}, left {left:?}");
        let known = stage.lab.client(Host::A).status().await?.vms;
        ensure!(known.is_empty(), "the agent believes in {known:?}");
        stage.until_b_is_clean().await?;
        // The agent that refused all that still protects what is a VM.
        stage.protect().await
    });
}

/// How often an owner asks for a pause: each time it is one of our own with a chance of one in four at the most.
const PAUSES: u32 = 12;

/// Waits until the guest's Redis answers to a new connection.
async fn guest_is_up(stage: &Stage) -> Result<()> {
    let (to, seconds) = (REDIS.to_string(), SOON.as_secs().to_string());
    let mut ping = stage.lab.helper("a PING", &["ping", "--to", &to, "--seconds", &seconds])?;
    ping.answer::<String>(SOON + COMMAND).await.context("the guest does not answer").map(drop)
}

#[test]
fn an_owner_pauses_resets_and_extends_a_protected_vm() {
    play_long("the owner's doings", async |stage| {
        stage.set_with_owner().await?;
        stage.protect().await?;
        let mut client = stage.writer("o").await?;
        let mut owner = stage.owner()?;

        // One that comes in the middle of a pause of ours changes nothing in QEMU, and nobody learns of it: owners look, and ask again.
        let mut asked = 0;
        while asked == 0 || owner.status()? != "paused" {
            ensure!(asked < PAUSES, "it runs against its owner's will, who asked {asked} times");
            owner.ask("stop", &json!({}))?;
            asked += 1;
            let said = stage.lab.understudy(Host::A, &["rehearse", VM], COMMAND).await?;
            ensure!(said.contains("loads"), "{said}");
        }
        let status = stage.status(Host::A).await?;
        ensure!(status.state == ProtectionState::Protected, "a pause ended the protection: {status:?}");
        owner.ask("cont", &json!({}))?;
        client.goes_on().await?;
        stage.nothing_lost(client).await?;

        owner.ask("system_reset", &json!({}))?;
        guest_is_up(stage).await?;
        let status = stage.status(Host::A).await?;
        ensure!(status.state == ProtectionState::Protected, "a reset ended the protection: {status:?}");
        let said = stage.lab.understudy(Host::A, &["rehearse", VM], COMMAND).await?;
        ensure!(said.contains("loads"), "{said}");

        let mut client = stage.writer("n").await?;
        owner.ask("netdev_add", &json!({ "type": "hubport", "id": "late", "hubid": 7 }))?;
        owner.ask("device_add", &json!({ "driver": "virtio-net-pci", "netdev": "late", "id": "late" }))?;
        let ended = stage.until_state(Host::A, "degraded").await?;
        ensure!(ended.reason.contains("when it was attached"), "it does not say why: {ended:?}");
        client.goes_on().await?;
        drop(owner);
        stage.appearance().await?.has_nothing_of_ours()?;
        // With its new card it is another machine than it was started as.
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

/// Bounds what host A may send, so that the guest's memory takes minutes; or no more.
fn slow(stage: &Stage, on: bool) -> Result<()> {
    let namespace = stage.lab.namespace(Host::A.role());
    let words = if on { "add dev uplink root tbf rate 20mbit burst 64kb latency 1s" } else { "del dev uplink root" };
    ip(&format!("netns exec {namespace} tc qdisc {words}"))
}

/// To protect the VM on host A with host B, and never again by itself.
fn request(stage: &Stage) -> Result<ProtectRequest> {
    Ok(ProtectRequest {
        vm: stage.vm()?,
        to: Host::B.name().to_owned(),
        epoch: None,
        shadow: None,
        durability: DurabilityPolicy::Disk,
        witness: None,
        standbys: Vec::new(),
        once: true,
        without_witness: None,
    })
}

/// Begins to protect, and returns when pages are copied.
async fn begin_sync(stage: &Stage) -> Result<()> {
    stage.lab.client(Host::A).protect(&request(stage)?).await?;
    let copies =
        |status: &VmStatus| matches!(status.state, ProtectionState::Syncing(progress) if progress.done_pages > 0);
    stage.until(Host::A, "that pages are copied", copies).await.map(drop)
}

/// Waits until a protection has ended by itself.
async fn given_up(stage: &Stage) -> Result<VmStatus> {
    let over = |status: &VmStatus| !matches!(status.state.word(), "pairing" | "syncing" | "protected");
    stage.until(Host::A, "that it gave up", over).await
}

#[test]
fn what_happens_to_a_vm_while_it_is_synced() {
    play_long("the owner's doings during the sync", async |stage| {
        stage.set_with_owner().await?;
        let mut owner = stage.owner()?;
        slow(stage, true)?;
        begin_sync(stage).await?;
        owner.ask("stop", &json!({}))?;
        owner.ask("cont", &json!({}))?;
        owner.ask("system_reset", &json!({}))?;
        owner.ask("netdev_add", &json!({ "type": "hubport", "id": "late", "hubid": 7 }))?;
        owner.ask("device_add", &json!({ "driver": "virtio-net-pci", "netdev": "late", "id": "late" }))?;
        slow(stage, false)?;
        let ended = given_up(stage).await?;
        // Whichever comes first: the comparison with what was attached, or a rehearsal of the twin, which lacks the card.
        let reasons = ["when it was attached", "could not load the device state"];
        ensure!(reasons.iter().any(|reason| ended.reason.contains(reason)), "it does not say why: {ended:?}");
        ensure!(owner.status()? == "running", "the VM stands");
        guest_is_up(stage).await?;
        stage.appearance().await?.has_nothing_of_ours()
    });
}

#[test]
fn a_vm_that_dies_while_it_is_synced() {
    play_long("QEMU killed during the sync", async |stage| {
        stage.set().await?;
        slow(stage, true)?;
        begin_sync(stage).await?;
        stage.lab.kill_vm().await?;
        let ended = given_up(stage).await?;
        ensure!(ended.reason.contains("ended"), "it does not say why: {ended:?}");
        stage.until_b_is_clean().await
    });
}

#[test]
fn an_agent_that_freezes_is_succeeded_and_ends_its_copy_when_it_wakes() {
    play_long("agent A frozen", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("f").await?;
        let agent = Pid::from_raw(i32::try_from(stage.lab.agent_pid(Host::A)?)?).context("a pid")?;
        kill_process(agent, Signal::STOP)?;
        // Nobody reads the guest's frames now, until the standby has taken over.
        stage.until_survivor().await?;
        let (heard, _) = stage.frames()?;
        client.goes_on().await?;
        kill_process(agent, Signal::CONT)?;
        stage.lab.vm_ended(SOON).await?;
        stage.until_state(Host::A, "fenced").await?;
        let (now, _) = stage.frames()?;
        ensure!(now == heard, "the frozen agent's copy said {} frames more", now - heard);
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

/// When an agent is killed, counted from its order to protect; between them the steps are passed at different paces.
const MOMENTS_MS: [u64; 10] = [0, 10, 30, 60, 120, 250, 500, 1000, 1500, 2500];

#[test]
fn an_agent_killed_at_any_moment_of_protecting_and_unprotecting() {
    play_long("agent A killed at any moment", async |stage| {
        stage.set().await?;
        let mut client = stage.writer("m").await?;
        for moment in MOMENTS_MS {
            let request = request(stage)?;
            let client_of_a = stage.lab.client(Host::A);
            // The order itself may be what is cut off.
            let _ = tokio::time::timeout(Duration::from_millis(moment), async {
                let _ = client_of_a.protect(&request).await;
                std::future::pending::<()>().await;
            })
            .await;
            stage.lab.kill_agent(Host::A).await?;
            if freed(stage).await.with_context(|| format!("killed after {moment} ms"))? == Freed::Succeeded {
                client.goes_on().await?;
                return stage.nothing_lost(client).await.map(drop);
            }
            client.goes_on().await.with_context(|| format!("killed after {moment} ms"))?;
        }
        // In the middle of leaving it.
        for moment in [0, 5, 20] {
            stage.protect().await?;
            let client_of_a = stage.lab.client(Host::A);
            let request = replicator::control::api::VmRequest { vm: VM.to_owned() };
            let _ = tokio::time::timeout(Duration::from_millis(moment), client_of_a.unprotect(&request)).await;
            stage.lab.kill_agent(Host::A).await?;
            if freed(stage).await.with_context(|| format!("killed {moment} ms into unprotecting"))? == Freed::Succeeded
            {
                break;
            }
            client.goes_on().await.with_context(|| format!("killed {moment} ms into unprotecting"))?;
        }
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

/// How it went on after an agent's death.
#[derive(Debug, PartialEq)]
enum Freed {
    /// The VM runs where it was, with nothing of ours in it.
    Here,
    /// The standby had a whole copy and goes on with it.
    Succeeded,
}

/// Starts host A's agent again, and does what an operator would: unprotect, unless the standby has taken over.
async fn freed(stage: &mut Stage) -> Result<Freed> {
    stage.lab.start_agent(Host::A).await?;
    let stage = &*stage;
    let freed = until("the VM to be free or taken over", SOON, async || {
        if stage.status(Host::B).await.is_ok_and(|status| status.survivor.is_some()) {
            return Ok(Ok(Freed::Succeeded));
        }
        let ended = stage.lab.try_understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        // One that was never begun is not known. Neither is one that was ended because the standby has it.
        let here = matches!(ended.code, Some(0 | 5)) && stage.run_state().is_ok();
        Ok(if here { Ok(Freed::Here) } else { Err(ended.err) })
    })
    .await?;
    if freed == Freed::Here {
        stage.appearance().await?.has_nothing_of_ours()?;
        ensure!(stage.run_state()? == "running", "the VM stands");
        // A standby that learns that the primary owns the VM alone keeps its copy until it is told otherwise.
        until("host-b to let go of its copy", SOON, async || {
            let ended = stage.lab.try_understudy(Host::B, &["unprotect", VM], COMMAND).await?;
            Ok(if matches!(ended.code, Some(0 | 5)) { Ok(()) } else { Err(ended.err) })
        })
        .await?;
        stage.until_b_is_clean().await?;
    }
    Ok(freed)
}
