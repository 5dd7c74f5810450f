//! A VM with a disk: Redis keeps every write on it before it says that it is done, and the disk follows the memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::{EventKind, VmStatus};
use replicator::demo::image::{self, tool};
use replicator::demo::lab::{Host, Machine, VM};
use replicator::demo::wait::until;
use replicator::demo::worker::Written;
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::stage::{SOON, Stage, play, play_long};

/// Size of the disk.
const DISK_MIB: u64 = 256;
/// Size of a disk full of bytes that nobody changes.
const BALLAST_MIB: u64 = 16;
/// A guest with ext4 brings what it has in memory to its disk every five seconds.
const STILL: Duration = Duration::from_secs(6);
/// Size of a standby's journal.
const JOURNAL_MIB: u64 = replicator::disk::open::DEFAULT_JOURNAL_BYTES >> 20;

#[test]
fn a_vm_with_a_disk_survives_the_death_of_its_host() {
    play("host A killed, with a disk", async |stage| {
        stage.set_with_disk(DISK_MIB).await?;
        stage.protect().await?;
        let mut client = stage.writer("k").await?;
        client.goes_on().await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        let written = stage.nothing_lost(client).await?;
        let copies = stage.power_off(&survivor).await?;
        ensure!(copies.len() == 1, "{copies:?}");
        is_whole(&copies[0], "k", &written)
    });
}

#[test]
fn a_vm_with_a_disk_moves_and_its_old_disk_is_left_alone() {
    play_long("planned failover with a disk", async |stage| {
        stage.set_with_disk(DISK_MIB).await?;
        stage.protect().await?;
        let mut client = stage.writer("o").await?;
        client.goes_on().await?;
        let before = stage.nothing_lost(client).await?;
        // Nobody writes any more, so that what is on both hosts can be compared after the move.
        let old = stage.lab.vm_dir().join("disk.raw");
        let mut seen = fs::read(&old)?;
        until("the disk to be still", SOON, async || {
            tokio::time::sleep(STILL).await;
            let now = fs::read(&old)?;
            let still = now == seen;
            seen = now;
            Ok(if still { Ok(()) } else { Err("the guest writes".to_owned()) })
        })
        .await?;
        stage.lab.understudy(Host::A, &["failover", "web-1", "--planned"], SOON).await?;
        let survivor = stage.until_survivor().await?;
        let moved = images(&stage.lab.state_dir(Host::B));
        ensure!(moved.len() == 1 && fs::read(&moved[0])? == seen, "the disk that moved is not the disk that was left");
        ensure!(fs::read(&old)? == seen, "somebody wrote to the disk that was left");
        let mut client = stage.writer("p").await?;
        client.goes_on().await?;
        stage.lab.vm_ended(SOON).await?;
        let written = stage.nothing_lost(client).await?;
        let copies = stage.power_off(&survivor).await?;
        ensure!(copies.len() == 1, "{copies:?}");
        is_whole(&copies[0], "o", &before)?;
        is_whole(&copies[0], "p", &written)
    });
}

#[test]
fn a_vm_with_a_disk_goes_back_to_its_first_host() {
    play_long("failover, protected again, failback, with a disk", async |stage| {
        // A second disk, that nobody writes to, of another format: host A has to compare with it, too.
        let dir = stage.lab.vm_dir();
        fs::create_dir_all(&dir)?;
        let ballast: Vec<u8> = (0..u32::try_from(BALLAST_MIB << 20)?).map(|at| (at % 251) as u8 | 1).collect();
        let qcow2 = dir.join("ballast.qcow2");
        to_qcow2(&ballast, &qcow2)?;
        let more = ["-drive", &format!("file={},format=qcow2,if=virtio", qcow2.display())];
        let more = more.map(str::to_owned).into();
        stage.set_with(&Machine { disk_mib: Some(DISK_MIB), more, ..Machine::default() }).await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("h").await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let old = stage.lab.vm_dir().join("disk.raw");
        let left = fs::read(&old)?;
        stage.lab.raise_host_a().await?;
        stage.until_state(Host::B, "protected").await?;
        stage.little_was_sent(Host::B).await?;
        client.goes_on().await?;
        let survivors = images(&stage.lab.state_dir(Host::B));
        stage.lab.understudy(Host::B, &["failback", VM], SOON).await?;
        let home = stage.until_state(Host::A, "protected").await?;
        stage.little_was_sent(Host::A).await?;
        let copies = images(&stage.lab.state_dir(Host::B));
        ensure!(copies.len() == 2 && copies != survivors, "the disks that the VM left are still on host-b: {copies:?}");
        client.goes_on().await?;
        // A standby that was away begins with what it has.
        stage.lab.kill_agent(Host::B).await?;
        stage.until(Host::A, "that it looks for a standby", |status| status.reason.contains("looking")).await?;
        client.goes_on().await?;
        stage.lab.start_agent(Host::B).await?;
        stage.until_state(Host::A, "protected").await?;
        stage.little_was_sent(Host::A).await?;
        let written = stage.nothing_lost(client).await?;
        let pid = home.survivor.as_ref().context("it runs from its copy")?.pid;
        stage.lab.shut_redis_down().await?;
        stage.lab.process_ended(pid, SOON).await?;
        let copies = images(&stage.lab.state_dir(Host::A));
        let with_size =
            |mib: u64| copies.iter().find(|copy| fs::metadata(copy).is_ok_and(|data| data.len() == mib << 20));
        let (Some(kept), Some(same), 2) = (with_size(DISK_MIB), with_size(BALLAST_MIB), copies.len()) else {
            anyhow::bail!("{copies:?}");
        };
        is_whole(kept, "h", &written)?;
        ensure!(fs::read(same)? == ballast, "a disk that nobody wrote to has changed");
        ensure!(fs::read(&old)? == left, "somebody wrote to the image that the VM left behind");
        Ok(())
    });
}

#[test]
fn disks_of_all_kinds_follow_their_vm() {
    play_long("host A killed, with several disks", async |stage| {
        let dir = stage.lab.vm_dir();
        fs::create_dir_all(&dir)?;
        // IDE by the short way, SCSI as libvirt writes it: a node of JSON for the file, one for its format.
        let (ide, scsi) = (dir.join("ide.qcow2"), dir.join("scsi, with a comma.qcow2"));
        let patterns = [make_image(&ide, 5)?, make_image(&scsi, 11)?];
        let file = serde_json::json!({ "driver": "file", "filename": scsi, "node-name": "s0-storage", "auto-read-only": true });
        let format = serde_json::json!({ "driver": "qcow2", "file": "s0-storage", "node-name": "s0-format", "discard": "unmap" });
        let more = [
            "-drive",
            &format!("file={},if=ide,index=1,cache=writeback,lazy-refcounts=on", ide.display()),
            "-device",
            "virtio-scsi-pci,id=scsi0",
            "-blockdev",
            &file.to_string(),
            "-blockdev",
            &format.to_string(),
            "-device",
            "scsi-hd,bus=scsi0.0,drive=s0-format",
        ]
        .map(str::to_owned);
        stage.set_with(&Machine { disk_mib: Some(DISK_MIB), more: more.into(), ..Machine::default() }).await?;
        stage.protect().await?;
        let mut client = stage.writer("d").await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        let written = stage.nothing_lost(client).await?;
        let copies = stage.power_off(&survivor).await?;
        ensure!(copies.len() == 3, "{copies:?}");
        for pattern in &patterns {
            let mut same = false;
            for copy in &copies {
                same |= fs::read(copy)? == *pattern;
            }
            ensure!(same, "no copy on host-b is one of the disks that nobody wrote to");
        }
        let kept = copies.iter().find(|copy| fs::metadata(copy).is_ok_and(|data| data.len() == DISK_MIB << 20));
        let kept = kept.context("no copy of the disk with the file system")?;
        is_whole(kept, "d", &written)
    });
}

#[test]
fn an_ended_protection_leaves_the_disk_to_its_guest() {
    play_long("unprotect with a disk", async |stage| {
        stage.set_with_disk(DISK_MIB).await?;
        let before = stage.appearance().await?;
        stage.protect().await?;
        let mut client = stage.writer("u").await?;
        stage.lab.understudy(Host::A, &["unprotect", "web-1"], SOON).await?;
        client.goes_on().await?;
        stage.until_b_is_clean().await?;
        ensure!(images(&stage.lab.state_dir(Host::B)).is_empty(), "the standby's copy is still there");
        let after = stage.appearance().await?;
        ensure!(after == before, "{before:?} became {after:?}");
        let written = stage.nothing_lost(client).await?;
        let disk = stage.shut_host_a_down().await?;
        is_whole(&disk, "u", &written)
    });
}

#[test]
fn a_standby_whose_disk_is_full_is_left_behind() {
    play("the standby's disk is full", async |stage| {
        let _small = stage.small_disk_on_b(64)?;
        stage.set_with_disk(DISK_MIB).await?;
        let refused = stage.protect().await;
        // The journal alone does not fit: told before anything was copied.
        let error = refused.expect_err("there is no room").to_string();
        ensure!(error.contains("no space left"), "{error}");
        stage.until_b_is_clean().await?;
        let mut client = stage.writer("f").await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

#[test]
fn a_standby_whose_disk_fills_up_is_left_behind_and_nothing_is_lost() {
    play("the standby's disk fills up", async |stage| {
        // Room for the journal and the first copy; of what is written later there is room for a little.
        let small = stage.small_disk_on_b(JOURNAL_MIB + 8)?;
        stage.set_with_disk(DISK_MIB).await?;
        stage.protect().await?;
        small.leave(256 << 10)?;
        let mut client = stage.writer("g").await?;
        let ended = stage.until_state(Host::A, "degraded").await?;
        ensure!(ended.reason.contains("no space left"), "it does not say why: {ended:?}");
        client.goes_on().await?;
        stage.appearance().await?.has_nothing_of_ours()?;
        client.goes_on().await?;
        let written = stage.nothing_lost(client).await?;
        let disk = stage.shut_host_a_down().await?;
        is_whole(&disk, "g", &written)
    });
}

/// A file system in memory, until it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Takes all of it but so many bytes.
    fn leave(&self, bytes: u64) -> Result<()> {
        let now = statvfs(&self.0)?;
        let taken = (now.f_bavail * now.f_frsize).saturating_sub(bytes);
        Ok(fallocate(fs::File::create(self.0.join("filler"))?, FallocateFlags::empty(), 0, taken)?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: an agent may have files open in it.
        let _ = tool("umount", &["-l", &self.0.display().to_string()]);
    }
}

/// A qcow2 image with something in it and holes; what a guest reads from it.
fn make_image(path: &Path, seed: u8) -> Result<Vec<u8>> {
    let mut content = vec![0; 6 << 20];
    for (at, byte) in content.iter_mut().enumerate() {
        // Every other 64 KiB is a hole.
        if at >> 16 & 1 == 0 {
            *byte = u8::try_from(((at * 31) ^ (at >> 9)) & 0xFF)?.wrapping_mul(seed);
        }
    }
    to_qcow2(&content, path)?;
    Ok(content)
}

fn to_qcow2(content: &[u8], path: &Path) -> Result<()> {
    let raw = path.with_extension("raw");
    fs::write(&raw, content)?;
    let (from, to) = (raw.display().to_string(), path.display().to_string());
    let made = tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    ensure!(made.success, "{made:?}");
    Ok(fs::remove_file(&raw)?)
}

/// The images of a host that stands by, or stood by.
fn images(state: &Path) -> Vec<PathBuf> {
    image::below(&state.join("images"))
}

/// What a client was told is on the disk: a file system without a flaw that holds every acknowledged write.
fn is_whole(image: &Path, tag: &str, written: &Written) -> Result<()> {
    image::is_sound(image)?;
    image::redis_holds(image, tag, written.acked)
}

impl Stage {
    /// A VM with a disk that runs on host A, two agents and a witness, all paired.
    pub(crate) async fn set_with_disk(&mut self, mib: u64) -> Result<()> {
        self.set_with(&Machine { disk_mib: Some(mib), ..Machine::default() }).await
    }

    async fn set_with(&mut self, machine: &Machine) -> Result<()> {
        self.lab.boot_as(machine).await?;
        self.lab.start_daemons().await?;
        self.lab.pair().await
    }

    /// Ends the survivor's guest in good order; the images that it leaves.
    async fn power_off(&self, survivor: &VmStatus) -> Result<Vec<PathBuf>> {
        let pid = survivor.survivor.as_ref().context("a survivor")?.pid;
        self.lab.shut_redis_down().await?;
        self.lab.process_ended(pid, SOON).await?;
        Ok(images(&self.lab.state_dir(Host::B)))
    }

    /// Ends the guest on host A in good order; its disk.
    async fn shut_host_a_down(&mut self) -> Result<PathBuf> {
        self.lab.shut_redis_down().await?;
        let status = self.lab.vm_ended(SOON).await?;
        ensure!(status.success(), "the VM did not end in good order: {status}");
        Ok(self.lab.vm_dir().join("disk.raw"))
    }

    /// The last first copy that this host sent left out what its standby had, which was most of it.
    async fn little_was_sent(&self, host: Host) -> Result<()> {
        let events = self.lab.client(host).vm_events(VM, 20).await?;
        let last = events.iter().rev().find(|event| event.kind == EventKind::Sync).context("no first copy was made")?;
        let text = last.text.as_str();
        let mib = text.split_whitespace().nth(3).and_then(|number| number.parse::<f64>().ok());
        ensure!(text.contains("MiB of the disks already") && mib.is_some_and(|mib| mib > BALLAST_MIB as f64), "{text}");
        Ok(())
    }

    /// What host B keeps is on a file system of this size.
    fn small_disk_on_b(&self, mib: u64) -> Result<SmallDisk> {
        let dir = self.lab.state_dir(Host::B);
        fs::create_dir_all(&dir)?;
        let options = format!("size={mib}M");
        let mounted = tool("mount", &["-t", "tmpfs", "-o", &options, "us-real", &dir.display().to_string()])?;
        ensure!(mounted.success, "{mounted:?}");
        Ok(SmallDisk(dir))
    }
}
