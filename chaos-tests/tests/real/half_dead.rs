//! Hosts that are half dead: the disk hangs, and everything else goes on.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use chaos_tests::chaos::storage::Storage;
use replicator::control::api::{FailoverCause, ProtectionState};
use replicator::demo::lab::{GUEST, Host, Machine};
use replicator::demo::wait::until;

use crate::stage::{SOON, Stage, play_long};

/// How often the witness granted host A something.
fn granted(stage: &Stage) -> Result<f64> {
    let series = "understudy_witness_request_seconds_count{outcome=\"granted\",witness=\"witness\"} ";
    let metrics = stage.metrics(Host::A)?;
    let count = metrics.lines().find_map(|line| line.strip_prefix(series)).context("no count of grants")?;
    Ok(count.parse()?)
}

/// A disk for the guest, where host A's agent has its state.
fn make_image(stage: &Stage) -> Result<PathBuf> {
    let image = stage.lab.state_dir(Host::A).join("guest.raw");
    File::create(&image)?.set_len(64 << 20)?;
    let mkfs = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"].into_iter().find(|path| Path::new(path).exists());
    let made = Command::new(mkfs.context("no mkfs.ext4")?).args(["-q", "-F"]).arg(&image).status()?;
    ensure!(made.success(), "mkfs.ext4 ended with {made}");
    Ok(image)
}

#[test]
fn a_primary_whose_disk_hangs_is_succeeded() {
    play_long("the primary's disk hangs", async |stage: &mut Stage| {
        let storage = Storage::make(&stage.lab)?;
        let image = make_image(stage)?;
        let drive = format!("file={},if=virtio,format=raw,cache=none", image.display());
        let more = vec!["-drive".to_owned(), drive];
        stage.lab.boot_as(&Machine { kernel: "us.disk=/dev/vda".to_owned(), more, ..Machine::default() }).await?;
        stage.lab.start_daemons().await?;
        stage.lab.pair().await?;
        stage.protect().await?;
        let mut client = stage.writer("hung").await?;

        // The guest's image and the agent's state alike: network, processes and memory are well.
        let frozen = storage.freeze(Host::A)?;
        let survivor = stage.until_survivor().await?;
        let cause = survivor.failover.as_ref().map(|report| report.cause);
        ensure!(
            cause == Some(FailoverCause::GuestDied),
            "its own host tells of it, nobody waits for a silence: {survivor:?}"
        );
        let (heard, _) = stage.frames()?;
        client.goes_on().await?;
        // Its agent cannot write down who owns the VM, and answers all the same.
        stage.until(Host::A, "that it is not heard", |status| status.state != ProtectionState::Protected).await?;
        let (now, _) = stage.frames()?;
        ensure!(now == heard, "the old copy said {} frames more", now - heard);
        frozen.thaw()?;
        stage.lab.vm_ended(SOON).await?;
        stage.until_state(Host::A, "fenced").await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_primary_whose_state_directory_hangs_goes_on_and_goes_alone_only_when_it_can_remember_it() {
    play_long("the primary's state directory hangs", async |stage: &mut Stage| {
        let storage = Storage::make(&stage.lab)?;
        stage.set_protected().await?;
        let mut client = stage.writer("state").await?;
        let before = stage.status(Host::A).await?;
        let frozen = storage.freeze(Host::A)?;
        client.goes_on().await?;
        stage.until(Host::A, "that it commits", |status| status.epoch_committed > before.epoch_committed + 20).await?;
        let now = stage.status(Host::A).await?;
        ensure!(now.state == ProtectionState::Protected && now.generation == before.generation, "{now:?}");

        // The standby dies, and what has to be durable before this host goes alone cannot be.
        let grants = granted(stage)?;
        stage.lab.kill_agent(Host::B).await?;
        until("the witness to grant host-a the VM", SOON, async || {
            let now = granted(stage)?;
            Ok(if now > grants { Ok(()) } else { Err(format!("{now} grants")) })
        })
        .await?;
        let (heard, _) = stage.frames()?;
        // One question after the other goes unanswered.
        let _prober = stage.lab.helper("the prober", &["probe", "--to", &GUEST.to_string()])?;
        let (_, before) = stage.frames()?;
        until("questions to reach host-a", SOON, async || {
            let (_, now) = stage.frames()?;
            Ok(if now >= before + 100 { Ok(()) } else { Err(format!("{} of them", now - before)) })
        })
        .await?;
        let (now, _) = stage.frames()?;
        ensure!(now == heard, "it said {} frames more before its generation was durable", now - heard);
        frozen.thaw()?;
        stage.until_state(Host::A, "degraded").await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}
