//! A disk of its own for each host's state, journals and images, so that it can be full or hang without anybody else noticing.
//!
//! A file system in a file in memory, mounted where the host's agent keeps its state. Promise: dropping it unmounts it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use replicator::demo::lab::{Host, Lab, VM};
use replicator::demo::netns::processes_in;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Size of a host's disk. What is not written takes no memory.
const DISK: u64 = 4 << 30;
/// Its blocks.
const BLOCK: u64 = 4096;
/// What lies beside what fills a disk.
const FILLER: &str = "filler";

/// See the module.
#[derive(Debug)]
pub struct Storage {
    mounts: Vec<(Host, PathBuf)>,
    below: PathBuf,
}

impl Storage {
    /// Gives each host of the laboratory its disk. No agent has run yet.
    ///
    /// # Errors
    /// If this kernel has no loop devices, or refuses a mount.
    pub fn make(lab: &Lab) -> Result<Self> {
        let below = lab.dir().join("disks");
        fs::create_dir_all(&below)?;
        run("mount", &["-t", "tmpfs", "-o", "size=3g,mode=700", "tmpfs", &shown(&below)])?;
        let mut storage = Self { mounts: Vec::new(), below };
        for host in [Host::A, Host::B] {
            let image = storage.below.join(host.name());
            File::create(&image)?.set_len(DISK)?;
            run("mkfs.ext4", &["-q", "-F", &shown(&image)])?;
            let at = lab.state_dir(host);
            fs::create_dir_all(&at)?;
            run("mount", &["-o", "loop", &shown(&image), &shown(&at)])?;
            storage.mounts.push((host, at));
        }
        Ok(storage)
    }

    fn at(&self, host: Host) -> Result<&Path> {
        let mount = self.mounts.iter().find(|(its, _)| *its == host);
        mount.map(|(_, at)| at.as_path()).with_context(|| format!("{} has no disk of its own", host.name()))
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
        let disks = self.mounts.iter().map(|(_, at)| at).chain([&self.below]);
        for at in disks {
            // Lazily: what still ends there may hold it for a moment.
            if let Err(error) = run("umount", &["-l", &shown(at)]) {
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
