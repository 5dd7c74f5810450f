//! `understudy demo`: all of it on one machine, with real programs, and measured.
//!
//! Two hosts, a client and a witness as network namespaces ([`lab`]); a VM with Redis that knows nothing of this; the
//! agents and the command line of this very program. Each round kills host A at a random moment and compares what the
//! client was promised with what the survivor holds (`round`). All instants are `CLOCK_MONOTONIC` of this machine.
//!
//! The laboratory and its tools are public: the tests of whole scenarios are played in it too.
//!
//! Promise: it cleans up after itself, also when interrupted and when it panics, and at its start after one that was killed.

mod bank;
mod figures;
pub mod image;
pub mod lab;
pub mod netns;
pub mod postgres;
pub mod process;
mod round;
pub mod wait;
pub mod worker;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

pub use figures::Figures;
pub use worker::Worker;

/// `understudy demo`
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    /// How often: each round boots, protects and kills anew
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rounds: u32,
    /// Write the figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory of the guest image, built by `cargo xtask setup`
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    pub guest: PathBuf,
    /// What the VM is: a QEMU with Linux and Redis, or a microVM with the pilot, a small guest that speaks as Redis does
    #[arg(long, value_enum, default_value_t = Backend::Qemu)]
    pub backend: Backend,
    /// The pilot's image, built by `cargo xtask setup`
    #[arg(long, value_name = "FILE", default_value = "target/pilot/pilot")]
    pub pilot: PathBuf,
    /// When an epoch ends: `auto` or a length such as `25ms`
    #[arg(long, value_name = "auto|TIME", default_value = "auto")]
    pub epoch: String,
    /// Length of each throughput measurement, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub load_seconds: u64,
    /// Size of the VM's disk in MiB, on which Redis keeps every write before it says that it is done; 0: it has none. A microVM has one in any
    /// case
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = disk_mib)]
    pub disk: u64,
    /// What the VM serves: `redis`, or `postgres` on a disk
    #[arg(long, value_enum, default_value_t = Workload::Redis)]
    pub workload: Workload,
    /// Directory of the database's disk, built by `cargo xtask demo --workload postgres`
    #[arg(long, value_name = "DIR", default_value = "target/guest-postgres", hide = true)]
    pub database: PathBuf,
    /// When the standby acknowledges disk writes: `disk` or `memory`
    #[arg(long, value_name = "disk|memory", default_value = "disk")]
    pub durability: String,
    /// Leave the logs where they are
    #[arg(long)]
    pub keep: bool,
    /// Where the directory for state, sockets and logs is made [default: the directory for temporary files]
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// What this program starts itself as.
    #[command(subcommand)]
    pub inner: Option<Inner>,
}

fn disk_mib(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(mib @ (0 | 64..=1_048_576)) => Ok(mib),
        _ => Err("a disk has 64 to 1048576 MiB; 0 is none".to_owned()),
    }
}

/// What the demo's VM serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// Keys, in memory or on a disk.
    Redis,
    /// Transactions of a bank, always on a disk.
    Postgres,
}

/// What runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// An unmodified QEMU.
    Qemu,
    /// Our own microVM on KVM.
    Kvm,
}

/// Not for operators.
#[derive(Debug, Clone, Subcommand)]
pub enum Inner {
    /// Runs in the client's namespace
    #[command(subcommand, hide = true)]
    Worker(Worker),
}

/// Runs the demo, or the worker that it is. Success only if no write was lost and no connection broke.
#[must_use]
pub fn run(args: DemoArgs) -> ExitCode {
    let outcome = match args.inner {
        Some(Inner::Worker(worker)) => worker::run(worker).map(|()| true),
        None => demo(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &DemoArgs) -> Result<bool> {
    check_means(args)?;
    for pid in netns::sweep_leftovers().context("looking for what an earlier demo left")? {
        println!("removed what the demo of process {pid} had left");
        // It is there only if that demo was given the same place, and was killed before it could remove it.
        let _ = fs::remove_dir_all(work_dir(args, pid));
    }
    let dir = make_work_dir(args)?;
    // A release build aborts at a panic: no destructor runs, so the hook cleans up.
    let report = std::panic::take_hook();
    let (panic_dir, keep) = (dir.clone(), args.keep);
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        netns::sweep(std::process::id());
        if !keep {
            let _ = fs::remove_dir_all(&panic_dir);
        }
    }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        // Dropping the rounds' future drops the laboratory, which cleans up.
        tokio::select! {
            figures = rounds(args, &dir) => figures,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("told to end"),
            _ = hangup.recv() => bail!("the terminal is gone"),
        }
    });
    if args.keep {
        println!("state and logs are in {}", dir.display());
    } else {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    let figures = outcome?;
    println!("\n{}", figures.table());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&figures)?;
        fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(figures.good())
}

/// Runs all rounds; each in a laboratory of its own, in a directory of its own.
async fn rounds(args: &DemoArgs, dir: &Path) -> Result<Figures> {
    let mut all: Option<Figures> = None;
    for number in 1..=args.rounds {
        println!("round {number} of {}", args.rounds);
        let dir = dir.join(number.to_string());
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let own = std::env::current_exe().context("cannot find this program's own file")?;
        let mut lab = lab::Lab::build(&dir, &args.guest, &own)?;
        let plan = round::Plan {
            number,
            load_seconds: args.load_seconds,
            epoch: args.epoch.clone(),
            disk: args.disk > 0 || args.workload == Workload::Postgres || args.backend == Backend::Kvm,
            disk_mib: (args.disk > 0).then_some(args.disk),
            microvm: (args.backend == Backend::Kvm).then(|| lab::Microvm::new(&args.pilot)),
            durability: args.durability.clone(),
        };
        let outcome = match args.workload {
            Workload::Redis => round::run(&mut lab, &plan).await,
            Workload::Postgres => bank::run(&mut lab, &plan, &args.database).await,
        };
        let figures = match outcome {
            Ok(figures) => figures,
            Err(error) => {
                let statuses = lab.statuses().await;
                eprint!("{}{statuses}", process::log_tails(&dir));
                return Err(error.context(format!("round {number}")));
            }
        };
        drop(lab);
        if !args.keep {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        all = Some(all.map_or(figures, |all| all.and(figures)));
    }
    all.context("no round was asked for")
}

/// An error if this machine or this user cannot run the demo.
fn check_means(args: &DemoArgs) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the demo makes network namespaces: run it as root");
    }
    if args.backend == Backend::Kvm {
        return lab::Microvm::missing(&args.pilot)
            .map_or(Ok(()), |missing| bail!("no microVM can run here: {missing}"));
    }
    for file in ["vmlinuz", "initrd.img", "cmdline"] {
        if !args.guest.join(file).is_file() {
            bail!("there is no guest image in {}: build it with `cargo xtask setup`", args.guest.display());
        }
    }
    Ok(())
}

fn work_dir(args: &DemoArgs, maker: u32) -> PathBuf {
    args.work_dir.clone().unwrap_or_else(std::env::temp_dir).join(format!("us-demo-{maker}"))
}

/// A directory that only root can enter. Its path is short: sockets below it must fit in 107 bytes.
fn make_work_dir(args: &DemoArgs) -> Result<PathBuf> {
    let dir = work_dir(args, std::process::id());
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
    dir.canonicalize().with_context(|| format!("cannot resolve {}", dir.display()))
}
