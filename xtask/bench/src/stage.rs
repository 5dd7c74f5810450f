//! The laboratory as the benchmark uses it: a VM, two agents and a witness, all paired, and questions with bounds.
//!
//! Promise: one laboratory at a time; dropping it removes everything that it made.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use replicator::control::api::{EpochSummary, VmStatus};
use replicator::demo::lab::{COMMAND, Host, Lab, Machine, Microvm, REDIS, VM};
use replicator::demo::process::{Daemon, log_tails, outcome};
use replicator::demo::wait::{ms_between, now_ns};
use replicator::demo::worker::Loaded;
use serde::de::DeserializeOwned;

/// Bound on becoming protected.
const PROTECT: Duration = Duration::from_secs(180);
/// Bound on what a measurement takes beyond its length.
const SLACK: Duration = Duration::from_secs(60);

/// The programs and the guest that are measured.
#[derive(Debug, Clone)]
pub(crate) struct Means {
    pub(crate) guest: PathBuf,
    pub(crate) understudy: PathBuf,
    /// The database's disk, if it was built.
    pub(crate) database: Option<PathBuf>,
    /// The microVM's pilot, which may not be built.
    pub(crate) pilot: PathBuf,
    /// Where each laboratory gets a directory.
    pub(crate) dir: PathBuf,
    pub(crate) quick: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    dir: PathBuf,
    understudy: PathBuf,
}

impl Stage {
    /// A laboratory with a VM that runs, and nothing else.
    pub(crate) async fn boot(means: &Means, name: &str, machine: &Machine) -> Result<Self> {
        let dir = means.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let lab = Lab::build(&dir, &means.guest, &means.understudy)?;
        let mut stage = Self { lab, dir, understudy: means.understudy.clone() };
        let booted = stage.lab.boot_as(machine).await;
        stage.explained(booted).await?;
        Ok(stage)
    }

    /// The agents and the witness too, all paired.
    pub(crate) async fn full(means: &Means, name: &str, machine: &Machine) -> Result<Self> {
        let mut stage = Self::boot(means, name, machine).await?;
        let started = async {
            stage.lab.start_daemons().await?;
            stage.lab.pair().await
        };
        let started = started.await;
        stage.explained(started).await?;
        Ok(stage)
    }

    /// A laboratory with a microVM in place of QEMU, without a disk, and all else.
    pub(crate) async fn microvm(means: &Means, name: &str) -> Result<Self> {
        let dir = means.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let lab = Lab::build(&dir, &means.guest, &means.understudy)?;
        let mut stage = Self { lab, dir, understudy: means.understudy.clone() };
        let started = async {
            stage.lab.start_daemons().await?;
            stage.lab.pair().await?;
            stage.lab.run_microvm(&Microvm { disk_mib: None, ..Microvm::new(&means.pilot) }).await
        };
        let started = started.await;
        stage.explained(started).await?;
        Ok(stage)
    }

    /// What the logs say is shown with an error.
    pub(crate) async fn explained<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            eprint!("{}{}", log_tails(&self.dir), self.lab.statuses().await);
        }
        result
    }

    /// Protects the VM. Returns how long that took.
    pub(crate) async fn protect(&self, epoch: &str) -> Result<Duration> {
        let pid = if self.lab.is_microvm() { VM.to_owned() } else { self.lab.vm_pid()?.to_string() };
        let begun = now_ns();
        self.lab.understudy(Host::A, &["protect", &pid, "--to", Host::B.name(), "--epoch", epoch], PROTECT).await?;
        let took = Duration::from_nanos(now_ns() - begun);
        let status = self.status().await?;
        if status.state.word() != "protected" {
            bail!("`understudy protect` returned while the VM is {}: {}", status.state, status.reason);
        }
        Ok(took)
    }

    /// Ends the protection.
    pub(crate) async fn unprotect(&self) -> Result<()> {
        self.lab.understudy(Host::A, &["unprotect", VM], COMMAND).await.map(drop)
    }

    /// What host A's agent says of the VM.
    pub(crate) async fn status(&self) -> Result<VmStatus> {
        self.lab.client(Host::A).vm_status(VM).await.context("asking host-a about the VM")
    }

    /// Its figures of this protection's epochs.
    pub(crate) async fn epochs(&self) -> Result<EpochSummary> {
        self.status().await?.epochs.context("host-a has committed no epoch")
    }

    /// SET throughput over `connections` for `seconds`.
    pub(crate) async fn load(&self, connections: u32, seconds: u64) -> Result<Loaded> {
        self.pipelined(connections, 1, seconds).await
    }

    /// The same with so many requests in flight on each connection.
    pub(crate) async fn pipelined(&self, connections: u32, pipeline: u32, seconds: u64) -> Result<Loaded> {
        let [connections, pipeline, text] = [connections.into(), pipeline.into(), seconds].map(|n: u64| n.to_string());
        let to = REDIS.to_string();
        let mut args = vec!["load", "--to", &to, "--connections", &connections, "--seconds", &text];
        args.extend(["--pipeline", &pipeline]);
        let mut helper = self.lab.helper("the throughput measurement", &args)?;
        helper.answer(Duration::from_secs(seconds) + SLACK).await
    }

    /// SETs over `connections` until the returned is dropped.
    pub(crate) fn load_until_dropped(&self, connections: u32) -> Result<Daemon> {
        let (to, connections) = (REDIS.to_string(), connections.to_string());
        let args = ["demo", "worker", "load", "--to", &to, "--connections", &connections, "--seconds", "3600"];
        let log = self.dir.join("load.log");
        Daemon::start("the load", &self.lab.namespace("c"), &self.understudy, &args.map(str::to_owned), &[], &log)
    }

    /// This program again, in a namespace: runs to its end and answers in JSON.
    pub(crate) async fn worker<T: DeserializeOwned>(&self, role: &str, args: &[&str]) -> Result<T> {
        let (own, args) = worker_command(args)?;
        let what = args.join(" ");
        let ended = outcome(&what, &self.lab.namespace(role), &own, &args, &[], SLACK).await?;
        if ended.code != Some(0) {
            bail!("`bench {what}` failed: {}{}", ended.out, ended.err.trim());
        }
        serde_json::from_str(ended.out.trim()).with_context(|| format!("`bench {what}` answered `{}`", ended.out))
    }

    /// This program again, in a namespace: runs until it is let go.
    pub(crate) fn server(&self, role: &str, args: &[&str]) -> Result<Daemon> {
        let (own, args) = worker_command(args)?;
        let log = self.dir.join(format!("{}.log", args.join("-").replace('/', "_")));
        Daemon::start(&args.join(" "), &self.lab.namespace(role), &own, &args, &[], &log)
    }

    /// A host's address.
    pub(crate) fn address(host: Host) -> Result<Ipv4Addr> {
        host.address().parse().context("an address of the laboratory")
    }

    /// Where files of this laboratory may be put.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

fn worker_command(args: &[&str]) -> Result<(PathBuf, Vec<String>)> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    Ok((own, std::iter::once("worker").chain(args.iter().copied()).map(str::to_owned).collect()))
}

/// Runs the guest for so long: time itself is the condition here.
pub(crate) async fn let_run(time: Duration) {
    tokio::time::sleep(time).await;
}

/// Milliseconds between two instants, negative if they are the other way round.
pub(crate) fn signed_ms(from_ns: u64, to_ns: u64) -> f64 {
    ms_between(from_ns, to_ns) - ms_between(to_ns, from_ns)
}
