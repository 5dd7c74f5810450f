//! A disk of its own for each host's state, journals and images, so that it can be full, hang or break without anybody else noticing.
//!
//! A file system in a file in memory, mounted where the host's agent keeps its state. The memory is a file system of its own, too: without
//! room there, what the upper one writes is lost, and who syncs it is told. Promise: dropping it unmounts it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use replicator::demo::lab::{Host, Lab, VM};
use replicator::demo::netns::processes_in;
use replicator::demo::wait::until;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Size of a host's disk. What is not written takes no memory.
const DISK: u64 = 4 << 30;
/// The memory that it may take.
const MEMORY: u64 = 3 << 30;
/// Its name there.
const IMAGE: &str = "disk";
/// What is written to see whether it is kept, and how much.
const PROBE: &str = "probe";
const PROBE_BYTES: usize = 4 << 20;
/// How often its size is looked at until it has not grown meanwhile.
const LOOKS: usize = 50;
/// Bound on its being let go by processes that were killed.
const LET_GO: Duration = Duration::from_secs(30);
/// Its blocks.
const BLOCK: u64 = 4096;
/// What lies beside what fills a disk.
const FILLER: &str = "filler";

/// See the module.
#[derive(Debug)]
pub struct Storage {
    /// Whose, where, and where its memory is.
    mounts: Vec<(Host, PathBuf, PathBuf)>,
}

impl Storage {
    /// Gives each host of the laboratory its disk. No agent has run yet.
    ///
    /// # Errors
    /// If this kernel has no loop devices, or refuses a mount.
    pub fn make(lab: &Lab) -> Result<Self> {
        let mut storage = Self { mounts: Vec::new() };
        for host in [Host::A, Host::B] {
            let below = lab.dir().join("disks").join(host.name());
            fs::create_dir_all(&below)?;
            run("mount", &["-t", "tmpfs", "-o", &room(MEMORY), "tmpfs", &shown(&below)])?;
            let at = lab.state_dir(host);
            fs::create_dir_all(&at)?;
            // Every process of the laboratory lives in a mount namespace of its own: what is unmounted here is to be unmounted there, too.
            let part = at.parent().context("the laboratory has a directory")?;
            run("mount", &["--bind", &shown(part), &shown(part)])?;
            run("mount", &["--make-shared", &shown(part)])?;
            let image = below.join(IMAGE);
            File::create(&image)?.set_len(DISK)?;
            run("mkfs.ext4", &["-q", "-F", &shown(&image)])?;
            run("mount", &["-o", "loop", &shown(&image), &shown(&at)])?;
            storage.mounts.push((host, at, below));
        }
        Ok(storage)
    }

    fn mount(&self, host: Host) -> Result<(&Path, &Path)> {
        let mount = self.mounts.iter().find(|(its, ..)| *its == host);
        mount
            .map(|(_, at, below)| (at.as_path(), below.as_path()))
            .with_context(|| format!("{} has no disk of its own", host.name()))
    }

    fn at(&self, host: Host) -> Result<&Path> {
        self.mount(host).map(|(at, _)| at)
    }

    /// Turns a host's disk read-only, as the kernel does with one whose journal it could not write.
    ///
    /// # Errors
    /// If it takes writes all the same.
    pub fn abort(&self, host: Host) -> Result<()> {
        let at = self.at(host)?;
        run("mount", &["-o", "remount,abort", &shown(at)])?;
        ensure!(!takes_writes(at), "the disk of {} takes writes", host.name());
        Ok(())
    }

    /// Lets what is written to a host's disk be lost, and who syncs it be told, until there is room below again.
    ///
    /// # Errors
    /// If it takes writes all the same.
    pub fn lose_writes(&self, host: Host) -> Result<Losing> {
        let (at, below) = self.mount(host)?;
        let leave_none = || -> Result<()> {
            let used = rustix::fs::statvfs(below)?;
            let used = (used.f_blocks - used.f_bfree) * used.f_frsize;
            run("mount", &["-o", &format!("remount,{}", room(used.max(BLOCK))), &shown(below)])
        };
        // It is refused if somebody has written between the look and the change.
        let mut left = Err(anyhow!("it was not tried"));
        for _ in 0..LOOKS {
            left = leave_none();
            if left.is_ok() {
                break;
            }
        }
        left.context("the disk always grows")?;
        let losing = Losing(Some(below.to_owned()));
        ensure!(!takes_writes(at), "the disk of {} takes writes", host.name());
        Ok(losing)
    }

    /// Whether a host's disk takes and keeps what is written to it.
    ///
    /// # Errors
    /// If it has none.
    pub fn takes_writes(&self, host: Host) -> Result<bool> {
        self.at(host).map(takes_writes)
    }

    /// What an operator does about a broken disk, while nothing runs on its host: has it checked, and mounts it again.
    ///
    /// # Errors
    /// If it cannot be repaired.
    pub async fn repair(&self, host: Host) -> Result<()> {
        let (at, below) = self.mount(host)?;
        until("the disk to be let go", LET_GO, async || {
            Ok(run("umount", &[&shown(at)]).map_err(|error| error.to_string()))
        })
        .await?;
        let image = shown(&below.join(IMAGE));
        // It says that it has repaired something by its exit status.
        let _ = run("e2fsck", &["-f", "-y", &image]);
        run("e2fsck", &["-f", "-n", &image]).context("the disk stays broken")?;
        run("mount", &["-o", "loop", &image, &shown(at)])?;
        ensure!(takes_writes(at), "the disk of {} takes no writes", host.name());
        Ok(())
    }

    /// Fills a host's disk to the last block, until the filler is dropped.
    ///
    /// # Errors
    /// If it cannot be filled.
    pub fn fill(&self, host: Host) -> Result<Filler> {
        let filler = Filler(self.at(host)?.join(FILLER));
        let file = File::create(&filler.0)?;
        // Reserved, not written: the memory below stays free.
        let (mut length, mut more) = (0, DISK);
        while more >= BLOCK {
            match fallocate(&file, FallocateFlags::empty(), length, more) {
                Ok(()) => length += more,
                Err(Errno::NOSPC) => more /= 2,
                Err(error) => return Err(error).context("cannot fill the disk"),
            }
        }
        Ok(filler)
    }

    /// Deletes, as operators are told to, the images of survivors that have moved on: those that no process on their host has open.
    ///
    /// # Errors
    /// If they cannot be seen or deleted.
    pub fn delete_old_images(&self, lab: &Lab, host: Host) -> Result<()> {
        let mut open = Vec::new();
        for pid in processes_in(&lab.namespace(host.role())) {
            // A process may end meanwhile.
            let all = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).into_iter().flatten().flatten();
            open.extend(all.filter_map(|entry| fs::read_link(entry.path()).ok()));
        }
        for entry in fs::read_dir(self.at(host)?.join("images").join(VM)).into_iter().flatten() {
            let path = entry?.path();
            if !open.iter().any(|file| file.starts_with(&path)) {
                fs::remove_dir_all(&path).with_context(|| format!("cannot delete {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Lets every write to a host's disk wait, until it is thawed.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn freeze(&self, host: Host) -> Result<Frozen> {
        let at = self.at(host)?.to_owned();
        run("fsfreeze", &["-f", &shown(&at)])?;
        Ok(Frozen(Some(at)))
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let part = |at: &PathBuf| at.parent().map(Path::to_owned).unwrap_or_default();
        for at in self.mounts.iter().flat_map(|(_, at, below)| [at.clone(), part(at), below.clone()]) {
            // Lazily: what still ends there may hold it for a moment.
            if let Err(error) = run("umount", &["-l", &shown(&at)]) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Unmounts what a run that was killed left below `dir`.
pub fn sweep(dir: &Path) {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let ours = mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| Path::new(at).starts_with(dir));
    for at in ours.collect::<Vec<_>>().into_iter().rev() {
        let _ = run("umount", &["-l", at]);
    }
}

/// A disk that loses what is written to it. Dropping it ends that, too.
#[derive(Debug)]
pub struct Losing(Option<PathBuf>);

impl Losing {
    /// Gives it room again.
    ///
    /// # Errors
    /// If the memory below refuses.
    pub fn end(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |below| give_room(&below))
    }
}

impl Drop for Losing {
    fn drop(&mut self) {
        if let Some(below) = self.0.take() {
            let _ = give_room(&below);
        }
    }
}

fn give_room(below: &Path) -> Result<()> {
    run("mount", &["-o", &format!("remount,{}", room(MEMORY)), &shown(below)])
}

fn room(bytes: u64) -> String {
    format!("size={bytes},mode=700")
}

/// Whether a file system takes and keeps what is written to it: more than its file has had room for.
fn takes_writes(at: &Path) -> bool {
    let path = at.join(PROBE);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&path)?;
        file.write_all(&vec![0x55; PROBE_BYTES])?;
        file.sync_all()
    };
    let taken = write().is_ok();
    let _ = fs::remove_file(&path);
    taken
}

/// What fills a disk.
#[derive(Debug)]
pub struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("a disk stays full: {error}");
        }
    }
}

/// A disk that takes no write. Dropping it thaws it, too.
#[derive(Debug)]
pub struct Frozen(Option<PathBuf>);

impl Frozen {
    /// Lets writes go on.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn thaw(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |at| run("fsfreeze", &["-u", &shown(&at)]))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(at) = self.0.take() {
            let _ = run("fsfreeze", &["-u", &shown(&at)]);
        }
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Runs a program, also one of the superuser's.
///
/// # Errors
/// With what it said.
pub(super) fn run(program: &str, args: &[&str]) -> Result<()> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).env("PATH", path).args(args).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = [output.stdout, output.stderr].concat();
    if !output.status.success() {
        bail!("`{program} {}` failed: {}", args.join(" "), String::from_utf8_lossy(&said).trim());
    }
    Ok(())
}
