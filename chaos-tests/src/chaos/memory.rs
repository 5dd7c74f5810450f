//! Memory that a host is short of: a control group that its processes are born in, a limit on it, and swap for what has to go.
//!
//! What a process has taken stays with the group in which it took it, so whoever is to run short is born there ([`Lab::set_group`]).
//! Either version of control groups will do. Promise: a group that is dropped sends its processes home, swap that is dropped is no
//! swap any more.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use replicator::demo::lab::{Host, Lab};

use super::storage::run;

/// Where control groups are.
const ROOT: &str = "/sys/fs/cgroup";
/// Size of a swap file: what one guest and its copy could need.
const SWAP_BYTES: u64 = 1 << 30;
/// The name of a swap file in its directory.
const SWAP: &str = "swap";
/// What the kernel says when it found less to take away than it was asked for: EAGAIN, EBUSY.
const LESS: [Option<i32>; 2] = [Some(11), Some(16)];
/// How often a limit is tried: what is used while it is taken away comes back.
const TRIES: usize = 10;
/// One that cannot be had is raised by this part of it until it can.
const RAISE: u64 = 8;

/// A control group for memory.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    /// Where this process was born.
    home: PathBuf,
    second: bool,
}

/// What a group's limit has done since the group was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Felt {
    /// How often somebody met it, and something had to go first.
    pub met: u64,
    /// How many processes were killed since nothing could go.
    pub killed: u64,
}

impl Group {
    /// Makes a group.
    ///
    /// # Errors
    /// If the memory controller is not to be had.
    pub fn make(name: &str) -> Result<Self> {
        let root = Path::new(ROOT);
        let (parent, second) = parent();
        let ours = fs::read_to_string("/proc/self/cgroup")?;
        let mark = if second { "0::/" } else { ":memory:/" };
        let ours =
            ours.lines().find_map(|line| Some(line.split_once(mark)?.1)).context("this process is in no group")?;
        let home = parent.join(ours);
        if second {
            fs::write(root.join("cgroup.subtree_control"), "+memory").context("the memory controller is not free")?;
        }
        let dir = parent.join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir, home, second })
    }

    /// The file to which one writes who is to belong to it.
    #[must_use]
    pub fn processes(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Takes a process in.
    ///
    /// # Errors
    /// If there is none.
    pub fn add(&self, pid: u32) -> Result<()> {
        fs::write(self.processes(), pid.to_string()).with_context(|| format!("cannot move process {pid}"))
    }

    /// This process goes home; its children stay.
    ///
    /// # Errors
    /// If its home is no more.
    pub fn leave(&self) -> Result<()> {
        let home = self.home.join("cgroup.procs");
        fs::write(&home, std::process::id().to_string()).with_context(|| format!("cannot write {}", home.display()))
    }

    /// Everything that can be is given back once.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn take_away(&self) -> Result<()> {
        let (file, word) = if self.second { ("memory.reclaim", "8G") } else { ("memory.force_empty", "0") };
        match fs::write(self.dir.join(file), word) {
            Err(error) if !LESS.contains(&error.raw_os_error()) => Err(error).context("memory is not given back"),
            _ => Ok(()),
        }
    }

    /// Bytes of memory that it has.
    ///
    /// # Errors
    /// If the kernel does not count them.
    pub fn has(&self) -> Result<u64> {
        self.number(if self.second { "memory.current" } else { "memory.usage_in_bytes" })
    }

    /// Bytes in swap.
    ///
    /// # Errors
    /// If the kernel does not count them.
    pub fn swapped(&self) -> Result<u64> {
        if self.second { self.number("memory.swap.current") } else { self.line("memory.stat", "swap") }
    }

    /// It may have no more than so many bytes from now on; where that much cannot go, a little more, or the kernel kills. Returns what was set.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn limit(&self, bytes: u64) -> Result<u64> {
        let mut limit = bytes;
        loop {
            for _ in 0..TRIES {
                match self.set_limit(&limit.to_string()) {
                    Err(error) if LESS.contains(&error.raw_os_error()) => self.take_away()?,
                    done => return done.map(|()| limit).context("memory cannot be limited"),
                }
            }
            limit += limit / RAISE;
        }
    }

    /// It may have as much as there is again.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn lift(&self) -> Result<()> {
        self.set_limit(if self.second { "max" } else { "-1" }).context("the limit stays")
    }

    fn set_limit(&self, word: &str) -> std::io::Result<()> {
        fs::write(self.dir.join(if self.second { "memory.max" } else { "memory.limit_in_bytes" }), word)
    }

    /// What its limit has done.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn felt(&self) -> Result<Felt> {
        let (met, kills) = if self.second {
            (self.line("memory.events", "max")?, "memory.events")
        } else {
            (self.number("memory.failcnt")?, "memory.oom_control")
        };
        Ok(Felt { met, killed: self.line(kills, "oom_kill")? })
    }

    fn number(&self, file: &str) -> Result<u64> {
        let text = fs::read_to_string(self.dir.join(file)).with_context(|| format!("the kernel has no {file}"))?;
        text.trim().parse().with_context(|| format!("{file} is no number"))
    }

    fn line(&self, file: &str, name: &str) -> Result<u64> {
        let text = fs::read_to_string(self.dir.join(file)).with_context(|| format!("the kernel has no {file}"))?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("the kernel counts no {name} in {file}"))?.parse().context("it is no number")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.lift();
        empty(&self.dir, &self.home);
    }
}

/// Where groups are made, and whether they are of the second version.
fn parent() -> (PathBuf, bool) {
    let root = Path::new(ROOT);
    let second = fs::read_to_string(root.join("cgroup.controllers")).is_ok_and(|text| text.contains("memory"));
    (if second { root.to_owned() } else { root.join("memory") }, second)
}

fn empty(dir: &Path, home: &Path) {
    for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        let _ = fs::write(home.join("cgroup.procs"), pid);
    }
    let _ = fs::remove_dir(dir);
}

/// A swap file, in use until it is dropped.
#[derive(Debug)]
pub struct Swap(PathBuf);

impl Swap {
    /// Begins to use one in `dir`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn begin(dir: &Path) -> Result<Self> {
        let path = dir.join(SWAP);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        let swap = Self(path);
        // Holes are not taken for swap.
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, SWAP_BYTES)?;
        drop(file);
        fs::set_permissions(&swap.0, fs::Permissions::from_mode(0o600))?;
        run("mkswap", &["-q", &swap.0.display().to_string()])?;
        run("swapon", &[&swap.0.display().to_string()])?;
        Ok(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = run("swapoff", &[&self.0.display().to_string()]);
        let _ = fs::remove_file(&self.0);
    }
}

/// Control groups of the hosts, and a place for swap.
#[derive(Debug)]
pub struct Memory {
    groups: [Group; 2],
    dir: PathBuf,
}

impl Memory {
    /// Lets whatever the laboratory starts on a host be born in a group of that host's own. Nothing was started yet.
    ///
    /// # Errors
    /// If this kernel has no memory controller that is free, or does not count what is in swap.
    pub fn make(lab: &mut Lab) -> Result<Self> {
        let make = |host: Host| Group::make(&lab.namespace(host.role()));
        let groups = [make(Host::A)?, make(Host::B)?];
        for (host, group) in [Host::A, Host::B].into_iter().zip(&groups) {
            lab.set_group(host.role(), group.processes());
        }
        fs::create_dir_all(lab.dir())?;
        Ok(Self { groups, dir: lab.dir().to_owned() })
    }

    /// A host's group.
    #[must_use]
    pub fn of(&self, host: Host) -> &Group {
        let [a, b] = &self.groups;
        if host == Host::A { a } else { b }
    }

    /// Swap, for as long as it is needed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn swap(&self) -> Result<Swap> {
        Swap::begin(&self.dir)
    }
}

/// Why no host can be made short of memory on this machine, if that is so. Swap would be in `dir`.
#[must_use]
pub fn missing(dir: &Path) -> Option<String> {
    let tried = || -> Result<()> {
        let group = Group::make(&format!("us-{}-try", std::process::id())).context("no control group for memory")?;
        group.felt().and(group.swapped()).and(group.has()).context("no account of memory")?;
        Swap::begin(dir).context("no swap can be had").map(drop)
    };
    tried().err().map(|error| format!("{error:#}"))
}

/// Removes what a run that was killed left: its swap below `dir`, the groups whose names begin with `prefix`.
pub fn sweep(dir: &Path, prefix: &str) {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for path in swaps.lines().filter_map(|line| line.split_whitespace().next()) {
        if Path::new(path).starts_with(dir) {
            let _ = run("swapoff", &[path]);
        }
    }
    let (parent, _) = parent();
    for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            empty(&entry.path(), &parent);
        }
    }
}
