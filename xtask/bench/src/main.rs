//! `bench`: the promised numbers, measured. Called by `cargo xtask bench`, imported by nobody.
//!
//! Promise: every row is a ratio to a baseline of the same run, measured in turn with it, so that a slow or busy machine
//! hits both. Nothing is taken from another run or made up: what this machine cannot measure is listed as skipped with the
//! reason. It ends with success if all else could be measured, and with `--strict` only if every row is within its budget.
//!
//! | module | what it measures |
//! | --- | --- |
//! | `throughput` | Redis SETs, unprotected and with each policy |
//! | `pause`, `monitor` | the pause of an attached QEMU, and its floor; records epochs |
//! | `pages` | the page pipeline on what was recorded |
//! | `path`, `ends` | the commit and the transport, against raw quinn and TCP |
//! | `failover` | its parts |
//! | `costs` | a guest that computes, the initial sync, memory |
//! | `disks` | a guest's disk: alone, mirrored, protected |
//! | `kvm`, `kvm_pause` | the microVM: a client's latency and throughput, its failover; its pause, its epochs |
//! | `growth` | pause and commit against memory and dirty pages |

mod costs;
mod disks;
mod ends;
mod failover;
mod growth;
mod kvm;
mod kvm_pause;
mod monitor;
mod pages;
mod path;
mod pause;
mod row;
mod stage;
mod stats;
mod throughput;

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use replicator::demo::{lab, netns};
use tokio::signal::unix::{SignalKind, signal};

use ends::{Kind, Questions};
use row::{Machine, Report};
use stage::{Means, Stage};
use throughput::Plan;

#[derive(Debug, Parser)]
#[command(name = "bench", about = "Measures the promised numbers, as ratios", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    worker: Option<Inner>,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Less of everything: two to three minutes
    #[arg(long)]
    quick: bool,
    /// Write the rows to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this part alone; may be given more than once
    #[arg(long, value_name = "PART", value_enum)]
    only: Vec<Part>,
    /// Rounds of the throughput measurement, at 50 connections with `auto` alone: to compare two builds
    #[arg(long, value_name = "ROUNDS")]
    rounds: Option<u32>,
    /// Fail if a row is out of its budget
    #[arg(long)]
    strict: bool,
    /// Directory of the guest image, built by `cargo xtask setup`
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    guest: PathBuf,
    /// Directory of the database's disk, built by `cargo xtask demo --workload postgres`
    #[arg(long, value_name = "DIR", default_value = "target/guest-postgres")]
    database: PathBuf,
    /// The pilot's image, built by `cargo xtask setup`
    #[arg(long, value_name = "FILE", default_value = "target/pilot/pilot")]
    pilot: PathBuf,
    /// The product, in its release build
    #[arg(long, value_name = "FILE", default_value = "target/release/understudy")]
    understudy: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Throughput,
    Pause,
    Path,
    Costs,
    Failover,
    Disks,
    Growth,
    KvmPause,
    KvmClients,
    KvmFailover,
}

#[derive(Debug, Subcommand)]
enum Inner {
    /// Runs in a namespace of the laboratory
    #[command(subcommand, hide = true)]
    Worker(Worker),
}

#[derive(Debug, Subcommand)]
enum Worker {
    /// Answers
    Serve {
        #[arg(long)]
        kind: Kind,
        #[arg(long)]
        bind: SocketAddr,
        #[arg(long)]
        dir: PathBuf,
    },
    /// Asks
    Ask {
        #[arg(long)]
        kind: Kind,
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        bytes: usize,
        #[arg(long)]
        count: u32,
        #[arg(long)]
        gap_ms: u64,
    },
    /// Has Redis compute
    Compute {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        count: u32,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.worker {
        Some(Inner::Worker(worker)) => work(worker).map(|()| true),
        None => bench(&cli.run),
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

fn work(worker: Worker) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let took = match worker {
        Worker::Serve { kind, bind, dir } => return runtime.block_on(ends::serve(kind, bind, &dir)),
        Worker::Ask { kind, to, dir, bytes, count, gap_ms } => {
            let questions = Questions { bytes, count, gap: Duration::from_millis(gap_ms) };
            runtime.block_on(ends::ask(kind, to, &dir, questions))?
        }
        Worker::Compute { to, count } => costs::run_compute(to, count)?,
    };
    println!("{}", serde_json::to_string(&took)?);
    Ok(())
}

fn bench(args: &RunArgs) -> Result<bool> {
    let mut report = Report::new(machine());
    let mut measured = Ok(());
    match lacking(args) {
        Some(reason) => report.skip("everything", reason),
        None => {
            netns::sweep_leftovers().context("looking for what an earlier laboratory left")?;
            let dir = std::env::temp_dir().join(format!("us-bench-{}", std::process::id()));
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
            // A release build aborts at a panic: no destructor runs, so the hook cleans up.
            let before = std::panic::take_hook();
            let panic_dir = dir.clone();
            std::panic::set_hook(Box::new(move |info| {
                before(info);
                netns::sweep(std::process::id());
                let _ = fs::remove_dir_all(&panic_dir);
            }));
            measured = measure_all(args, &dir, &mut report);
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    // What was measured before something failed is told all the same.
    println!("\n{}", report.table());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    measured?;
    let broken = report.broken().count();
    println!("{} rows, {broken} out of budget, {} skipped", report.rows.len(), report.skipped.len());
    Ok(broken == 0 || !args.strict)
}

fn measure_all(args: &RunArgs, dir: &Path, report: &mut Report) -> Result<()> {
    let absolute = |path: &Path| path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()));
    let means = Means {
        guest: absolute(&args.guest)?,
        understudy: absolute(&args.understudy)?,
        pilot: args.pilot.clone(),
        database: args.database.join("disk.raw").is_file().then(|| absolute(&args.database)).transpose()?,
        dir: absolute(dir)?,
        quick: args.quick,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // Dropping the measurements' future drops the laboratory, which cleans up.
        tokio::select! {
            measured = parts(args, &means, report) => measured,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("told to end"),
        }
    })
}

async fn parts(args: &RunArgs, means: &Means, report: &mut Report) -> Result<()> {
    let wanted = |part| args.only.is_empty() && args.rounds.is_none() || args.only.contains(&part);
    let quick = means.quick;
    let usual = lab::Machine::default();
    let throughput = wanted(Part::Throughput) || args.rounds.is_some();
    if throughput || wanted(Part::Path) || wanted(Part::Costs) || wanted(Part::Failover) {
        let stage = Stage::full(means, "main", &usual).await?;
        let mut raw = None;
        let measured = async {
            if throughput {
                let plan = match args.rounds {
                    Some(rounds) => Plan { rounds, seconds: 4, many_only: true },
                    None if quick => Plan { rounds: 2, seconds: 2, many_only: false },
                    None => Plan { rounds: 6, seconds: 4, many_only: false },
                };
                throughput::measure(&stage, plan, quick, report).await.context("throughput")?;
            }
            if wanted(Part::Path) || wanted(Part::Costs) {
                let speeds = path::bulk(&stage, quick, report).await.context("transport")?;
                raw = Some(speeds);
                if wanted(Part::Costs) {
                    let rounds = if quick { 1 } else { 4 };
                    costs::sync(&stage, costs::GUEST_MIB, rounds, speeds, report).await.context("initial sync")?;
                    costs::compute(&stage, quick, report).await.context("a guest that computes")?;
                }
            }
            if wanted(Part::Path) {
                path::commit(&stage, quick, report).await.context("commit")?;
            } else if wanted(Part::Costs) || wanted(Part::Failover) {
                stage.protect("auto").await?;
            }
            if wanted(Part::Costs) {
                costs::memory(&stage, report).context("memory")?;
            }
            anyhow::Ok(())
        };
        let measured = measured.await;
        stage.explained(measured).await?;
        if wanted(Part::Failover) {
            if !wanted(Part::Path) && !wanted(Part::Costs) && throughput {
                stage.protect("auto").await.context("before the failover")?;
            }
            failover::measure(stage, means, report).await.context("failover")?;
        } else {
            drop(stage);
        }
        if let Some(speeds) = raw.filter(|_| wanted(Part::Costs) && !quick) {
            growth::sync(means, speeds, report).await.context("initial sync of a large guest")?;
        }
    }
    if wanted(Part::Pause) {
        let recording = pause::measure(means, report).await.context("pause")?;
        pages::measure(&recording, quick, report).context("page pipeline")?;
    }
    if wanted(Part::Disks) {
        disks::measure(means, report).await.context("disks")?;
    }
    if wanted(Part::Growth) {
        growth::with_memory(means, report).await.context("growth with memory")?;
        growth::with_pages(means, report).await.context("growth with dirty pages")?;
    }
    if [Part::KvmPause, Part::KvmClients, Part::KvmFailover].into_iter().any(wanted) {
        if let Some(reason) = kvm::lacking(means) {
            report.skip("the microVM", reason);
            return Ok(());
        }
        if wanted(Part::KvmPause) {
            kvm::pause(means, report).await.context("a microVM's pause")?;
        }
        if wanted(Part::KvmClients) {
            kvm::clients(means, report).await.context("a microVM's clients")?;
        }
        if wanted(Part::KvmFailover) {
            kvm::failover(means, report).await.context("a microVM's failover")?;
        }
    }
    Ok(())
}

/// What this machine lacks, if anything.
fn lacking(args: &RunArgs) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root, for network namespaces".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in ["qemu-system-x86_64", "ip"] {
        if !std::env::split_paths(&path).any(|dir| dir.join(program).is_file()) {
            return Some(format!("{program} is not installed"));
        }
    }
    let files = ["vmlinuz", "initrd.img", "cmdline"].map(|file| args.guest.join(file));
    let absent = files.iter().chain([&args.understudy]).find(|file| !file.is_file())?;
    Some(format!("{} is missing: `cargo xtask bench` builds it", absent.display()))
}

fn machine() -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    let qemu = qemu.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    Machine {
        processor: model.trim_start_matches(['\t', ' ', ':']).to_owned(),
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        kernel: kernel.trim().to_owned(),
        qemu: qemu.lines().next().unwrap_or_default().to_owned(),
    }
}
