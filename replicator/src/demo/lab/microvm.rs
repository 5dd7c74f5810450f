//! The laboratory's VM as a microVM: the pilot guest, in a process of host A's agent.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{BOOT, COMMAND, END, GUEST, Host, Lab, MAC, REDIS, VM};
use crate::demo::process::Daemon;
use crate::demo::wait::now_ns;

/// What the microVM is made of.
#[derive(Debug, Clone)]
pub struct Microvm {
    /// The pilot's image.
    pub pilot: PathBuf,
    /// Its memory.
    pub memory_mib: u64,
    /// Its vCPUs.
    pub cpus: u64,
    /// Size of a disk on which it keeps every write before it says that it is done.
    pub disk_mib: Option<u64>,
}

impl Microvm {
    /// One of 128 MiB, two vCPUs and a disk.
    #[must_use]
    pub fn new(pilot: &Path) -> Self {
        Self { pilot: pilot.to_path_buf(), memory_mib: 128, cpus: 2, disk_mib: Some(64) }
    }

    /// What is missing on this machine to run one, if anything is.
    #[must_use]
    pub fn missing(pilot: &Path) -> Option<String> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            return Some(format!("/dev/kvm cannot be used: {error}"));
        }
        (!pilot.is_file()).then(|| format!("{} is missing: run `cargo xtask setup`", pilot.display()))
    }
}

impl Lab {
    /// Starts the microVM on host A, whose agent runs, and waits until it answers. Returns how long that took.
    ///
    /// # Errors
    /// If it does not within a bound.
    pub async fn run_microvm(&mut self, microvm: &Microvm) -> Result<Duration> {
        let dir = self.part("vm")?;
        let kernel = microvm.pilot.canonicalize().context("there is no pilot")?.display().to_string();
        let (address, memory, cpus) =
            (format!("{GUEST}/24"), format!("{}MiB", microvm.memory_mib), microvm.cpus.to_string());
        let mut words = vec!["run", VM, "--kernel", &kernel, "--tap", "tap0", "--bridge", "br0", "--mac", MAC];
        words.extend(["--address", &address, "--memory", &memory, "--cpus", &cpus]);
        let image = dir.join("disk.raw");
        let shown = image.display().to_string();
        if let Some(mib) = microvm.disk_mib {
            let file = File::create(&image).with_context(|| format!("cannot create {shown}"))?;
            file.set_len(mib << 20).with_context(|| format!("cannot size {shown}"))?;
            words.extend(["--disk", &shown]);
        }
        let begun = now_ns();
        self.understudy(Host::A, &words, COMMAND).await?;
        self.microvm = true;
        let (to, seconds) = (REDIS.to_string(), BOOT.as_secs().to_string());
        let mut ping = self.helper("the first PING", &["ping", "--to", &to, "--seconds", &seconds])?;
        ping.answer::<String>(BOOT + COMMAND).await.context("the pilot did not answer")?;
        Ok(Duration::from_nanos(now_ns() - begun))
    }

    /// Whether the VM is a microVM.
    #[must_use]
    pub fn is_microvm(&self) -> bool {
        self.microvm
    }

    /// The process of the microVM on a host, whose agent started it.
    ///
    /// # Errors
    /// If there is not one.
    pub fn microvm_pid(&self, host: Host) -> Result<u32> {
        let agent = self.agent_pid(host)?;
        let is_it = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The second word after the name in parentheses.
            let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
            parent == Some(agent) && words.get(1..3) == Some(&[b"microvm", VM.as_bytes()][..])
        };
        let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let found: Vec<u32> = pids.filter(is_it).collect();
        ensure!(found.len() == 1, "{} has {found:?} as processes of the microVM", host.name());
        Ok(found[0])
    }

    /// Waits until the agent of a host has ended, which was killed.
    pub(super) async fn agent_ended(&mut self, host: Host) -> Result<()> {
        let agent: Option<&mut Daemon> = self.agents.iter_mut().find(|(its, _)| *its == host).map(|(_, agent)| agent);
        agent.with_context(|| format!("{} runs no agent", host.name()))?.ended(END).await.map(drop)
    }

    /// The texts in the pilot's log on that image of the VM on a host which was written last.
    ///
    /// # Errors
    /// If there is none, or a record is damaged.
    pub fn log_on(&self, host: Host) -> Result<Vec<Vec<u8>>> {
        let mut dirs = vec![self.state_dir(host).join("images")];
        let mut found = None;
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
                let path = entry?.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|extension| extension == "raw") {
                    found = found.max(Some((path.metadata()?.modified()?, path)));
                }
            }
        }
        let (_, image) = found.with_context(|| format!("{} has no image of the VM", host.name()))?;
        let disk = fs::read(&image).with_context(|| format!("cannot read {}", image.display()))?;
        vmm_hooks::kvm::pilot::records(&disk).map_err(anyhow::Error::msg)
    }
}
