//! What the guest does itself, and what its owner does about it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::control::api::ProtectionState;
use replicator::demo::lab::{COMMAND, GUEST, Host, Lab, Machine, REDIS, VM};
use replicator::demo::wait::until;
use vmm_hooks::disk::DiskSpec;

use super::field::vms;
use super::storage::run;

/// Size of the guest's disk, and of a microVM's ([`Microvm::new`]).
const DISK_MIB: u64 = 128;
const MICROVM_DISK_MIB: u64 = 64;
/// Bound on the end of a guest that was told to shut down, and of its twin.
const END: Duration = Duration::from_secs(60);
/// Bound on becoming protected.
const PROTECT: Duration = Duration::from_secs(300);

/// Boots the guest with a disk on host A.
///
/// # Errors
/// If its Redis does not answer within a bound.
pub(super) async fn boot(lab: &mut Lab) -> Result<()> {
    let more = owner(lab);
    lab.boot_as(&Machine { disk_mib: Some(DISK_MIB), more, ..Machine::default() }).await.map(drop)
}

/// A monitor of its owner's own.
fn owner(lab: &Lab) -> Vec<String> {
    vec!["-qmp".to_owned(), format!("unix:{},server=on,wait=off", lab.vm_second().display())]
}

/// Asks for the protection of the VM that was begun on host A, and waits for it.
///
/// # Errors
/// If it cannot be had within a bound.
pub(super) async fn protect(lab: &Lab) -> Result<()> {
    let vm = if lab.is_microvm() { VM.to_owned() } else { lab.vm_pid()?.to_string() };
    lab.understudy(Host::A, &["protect", &vm, "--to", Host::B.name()], PROTECT).await.map(drop)
}

/// Tells Redis to end, upon which the guest powers itself off; waits until it is gone everywhere and looks at its disk, where it
/// ran last. Returns the image.
///
/// # Errors
/// If it does not end within a bound, or its file system is not clean.
pub(super) async fn shut_down(lab: &Lab) -> Result<PathBuf> {
    let (_, image) = disk(lab).await?;
    tell_redis(lab, "SHUTDOWN NOSAVE", "").context("Redis did not take its leave")?;
    let spaces = [Host::A, Host::B].map(|host| lab.namespace(host.role()));
    until("the guest to shut down, and its twin with it", END, async || {
        let left: Vec<u32> = spaces.iter().flat_map(|space| vms(space)).collect();
        Ok(if left.is_empty() { Ok(()) } else { Err(format!("the processes {left:?}")) })
    })
    .await?;
    run("e2fsck", &["-f", "-n", &image.display().to_string()]).context("the guest's file system is broken")?;
    Ok(image)
}

/// Says something to Redis; what a line of the answer says after `want`.
fn tell_redis(lab: &Lab, what: &str, want: &str) -> Result<String> {
    let read = format!(
        "while read -r -u 3 line; do [[ $line == {want}* ]] && echo \"${{line#{want}}}\" && exit; done; exit 1"
    );
    let read = if want.is_empty() { "" } else { &read };
    let say = format!("exec 3<>/dev/tcp/{GUEST}/{} || exit; echo {what} >&3; {read}", REDIS.port());
    let bound = COMMAND.as_secs().to_string();
    let said = Command::new("ip")
        .args(["netns", "exec", &lab.namespace("c"), "timeout", &bound, "bash", "-c", &say])
        .output()?;
    ensure!(said.status.success(), "{}: {}", said.status, String::from_utf8_lossy(&said.stderr).trim());
    Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

/// Which life of Redis answers.
///
/// # Errors
/// If none does.
pub(super) async fn redis_life(lab: &Lab) -> Result<String> {
    tell_redis(lab, "INFO server", "run_id:").context("Redis says nothing of itself")
}

/// Has the guest reboot. Its init takes a snapshot, which nothing needs, as a sign for that.
///
/// # Errors
/// If Redis cannot be reached.
pub(super) fn ask_to_reboot(lab: &Lab) -> Result<()> {
    tell_redis(lab, "SHUTDOWN SAVE", "").map(drop).context("Redis did not take its leave")
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
    let mut more = owner(lab);
    more.extend(["-drive".to_owned(), drive]);
    lab.boot_as(&Machine { kernel, more, ..Machine::default() }).await?;
    protect(lab).await
}

/// The VM's one disk, by the name that it has in its hypervisor.
pub(super) fn disk_of(lab: &Lab) -> DiskSpec {
    let (name, mib) = if lab.is_microvm() { ("disk0", MICROVM_DISK_MIB) } else { ("virtio0", DISK_MIB) };
    DiskSpec { name: name.to_owned(), bytes: mib << 20 }
}

/// Where the VM runs, and the image of its disk there: what its process has open.
///
/// # Errors
/// If it is protected nowhere, or has no disk.
pub(super) async fn disk(lab: &Lab) -> Result<(Host, PathBuf)> {
    let bytes = disk_of(lab).bytes;
    for host in [Host::A, Host::B] {
        let status = lab.client(host).vm_status(VM).await?;
        if !(status.state == ProtectionState::Protected && status.role.word() == "primary") {
            continue;
        }
        let mut images = BTreeSet::new();
        for pid in vms(&lab.namespace(host.role())) {
            for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
                let Ok(file) = fs::read_link(entry?.path()) else { continue };
                let is_image = fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.len() == bytes);
                if is_image && file.starts_with(lab.dir()) {
                    images.insert(file);
                }
            }
        }
        ensure!(images.len() == 1, "the VM on {} has the disks {images:?}", host.name());
        return images.pop_first().map(|image| (host, image)).context("one");
    }
    bail!("the VM is protected nowhere")
}
