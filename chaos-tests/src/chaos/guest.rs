//! What the guest does itself, and what its owner does about it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::control::api::ProtectionState;
use replicator::demo::lab::{COMMAND, GUEST, Host, Lab, Machine, REDIS, VM};
use replicator::demo::wait::until;

use super::fault::qemus;
use super::storage::run;

/// Size of the guest's disk.
const DISK_MIB: u64 = 128;
/// Bound on the end of a guest that was told to shut down, and of its twin.
const END: Duration = Duration::from_secs(60);
/// Bound on becoming protected.
const PROTECT: Duration = Duration::from_secs(300);

/// Boots the guest with a disk on host A.
///
/// # Errors
/// If its Redis does not answer within a bound.
pub(super) async fn boot(lab: &mut Lab) -> Result<()> {
    lab.boot_as(&Machine { disk_mib: Some(DISK_MIB), ..Machine::default() }).await.map(drop)
}

/// Asks for the protection of the guest that was booted on host A, and waits for it.
///
/// # Errors
/// If it cannot be had within a bound.
pub(super) async fn protect(lab: &Lab) -> Result<()> {
    let vm = lab.vm_pid()?.to_string();
    lab.understudy(Host::A, &["protect", &vm, "--to", Host::B.name()], PROTECT).await.map(drop)
}

/// Tells Redis to end, upon which the guest powers itself off; waits until it is gone everywhere and looks at its disk, where it
/// ran last. Returns the image.
///
/// # Errors
/// If it does not end within a bound, or its file system is not clean.
pub(super) async fn shut_down(lab: &Lab) -> Result<PathBuf> {
    let image = disk(lab).await?;
    let say = format!("exec 3<>/dev/tcp/{GUEST}/{}; echo SHUTDOWN NOSAVE >&3", REDIS.port());
    let bound = COMMAND.as_secs().to_string();
    let status = Command::new("ip")
        .args(["netns", "exec", &lab.namespace("c"), "timeout", &bound, "bash", "-c", &say])
        .status()?;
    ensure!(status.success(), "Redis did not take its leave: {status}");
    let spaces = [Host::A, Host::B].map(|host| lab.namespace(host.role()));
    until("the guest to shut down, and its twin with it", END, async || {
        let left: Vec<u32> = spaces.iter().flat_map(|space| qemus(space)).collect();
        Ok(if left.is_empty() { Ok(()) } else { Err(format!("QEMUs {left:?}")) })
    })
    .await?;
    run("e2fsck", &["-f", "-n", &image.display().to_string()]).context("the guest's file system is broken")?;
    Ok(image)
}

/// Boots the guest on host A from `image`, as its owner would, and has it protected again.
///
/// # Errors
/// If that does not work.
pub(super) async fn boot_again(lab: &mut Lab, image: &Path) -> Result<()> {
    // The image may be a former standby's; what is booted is a copy in a place of its own.
    let copy = lab.vm_dir().join("again.raw");
    let new = lab.vm_dir().join("again.new");
    fs::copy(image, &new)?;
    fs::rename(&new, &copy)?;
    let drive = format!("file={},if=virtio,format=raw,cache=none", copy.display());
    let kernel = "us.disk=/dev/vda".to_owned();
    lab.boot_as(&Machine { kernel, more: vec!["-drive".to_owned(), drive], ..Machine::default() }).await?;
    protect(lab).await
}

/// The image of the VM's disk where it runs: what its QEMU has open.
async fn disk(lab: &Lab) -> Result<PathBuf> {
    for host in [Host::A, Host::B] {
        let status = lab.client(host).vm_status(VM).await?;
        if !(status.state == ProtectionState::Protected && status.role.word() == "primary") {
            continue;
        }
        for pid in qemus(&lab.namespace(host.role())) {
            for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
                let Ok(file) = fs::read_link(entry?.path()) else { continue };
                let is_image = fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.len() == DISK_MIB << 20);
                if is_image && file.starts_with(lab.dir()) {
                    return Ok(file);
                }
            }
        }
        bail!("the VM on {} has no disk", host.name());
    }
    bail!("the VM is protected nowhere")
}
