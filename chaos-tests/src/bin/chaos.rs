//! `chaos [--seed N] [--rounds N] [--fault NAME] [--json FILE]`: real processes, real faults, and judges (`docs/testing.md`).

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use chaos_tests::chaos::engine::{Plan, run, was_lost};
use chaos_tests::chaos::fault::Fault;
use chaos_tests::chaos::memory;
use chaos_tests::chaos::page::html;
use chaos_tests::chaos::report::{Report, Round};
use chaos_tests::chaos::schedule::deal;
use chaos_tests::chaos::setting::{Backend, Setting, Store};
use chaos_tests::chaos::storage::sweep;
use chaos_tests::etcd;
use clap::Parser;
use replicator::demo::lab::Microvm;
use replicator::demo::netns;
use tokio::signal::unix::{SignalKind, signal};

/// Breaks agents, hosts and links around a real VM, and judges what its clients see.
#[derive(Parser)]
#[command(name = "cargo xtask chaos")]
struct Arguments {
    /// What faults and moments are drawn from [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// How many faults, one after the other
    #[arg(long, default_value_t = 20)]
    rounds: u64,
    /// Only faults of this name, or that begin with it; may be given more than once
    #[arg(long = "fault", value_name = "NAME")]
    faults: Vec<String>,
    /// What runs the VM [default: some rounds of each, unless --store is given: then qemu]
    #[arg(long)]
    backend: Option<Backend>,
    /// Who is asked who may run it [default: some rounds of each, unless --backend is given: then the witness]
    #[arg(long)]
    store: Option<Store>,
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report to this file, as a page for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Make a mistake on purpose, while the VM is on host A: what the guest says is heard before it is acknowledged. The run
    /// succeeds if the judges of what clients were told find that, and fails if they do not
    #[arg(long)]
    leak_output: bool,
    /// List the faults and do nothing
    #[arg(long)]
    list: bool,
    /// Leave the logs where they are also if nothing broke
    #[arg(long)]
    keep: bool,
    /// Directory of the guest image, built by `cargo xtask setup`
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    guest: PathBuf,
    /// The image of the microVM's guest, built by `cargo xtask setup`
    #[arg(long, value_name = "FILE", default_value = "target/pilot/pilot")]
    pilot: PathBuf,
    /// The program `understudy`
    #[arg(long, value_name = "FILE", default_value = "target/debug/understudy")]
    understudy: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for fault in Fault::ALL {
            println!("{}", fault.name());
        }
        return ExitCode::SUCCESS;
    }
    match chaos(&arguments) {
        Ok(report) => {
            println!("\n{}", report.text());
            if arguments.leak_output {
                let found = report.failure.as_ref().is_some_and(|failure| was_lost(failure));
                println!("{}", if found { "the mistake was found" } else { "the mistake was NOT found" });
                return if found { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            }
            if report.failure.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn chaos(arguments: &Arguments) -> Result<Report> {
    let plan = plan(arguments)?;
    println!("seed {}, {} rounds", plan.seed, arguments.rounds);
    let mut report = play(&plan)?;
    let failed = report.failure.is_some();
    if failed || arguments.keep {
        report.kept = Some(plan.dir.display().to_string());
    } else {
        fs::remove_dir_all(&plan.dir).with_context(|| format!("cannot remove {}", plan.dir.display()))?;
    }
    let json = serde_json::to_string_pretty(&report)? + "\n";
    if failed {
        write(&plan.dir.join("report.json"), &json)?;
        write(&plan.dir.join("report.html"), &html(&report))?;
    }
    if let Some(file) = &arguments.html {
        write(file, &html(&report))?;
    }
    if let Some(file) = &arguments.json {
        write(file, &json)?;
    }
    Ok(report)
}

fn plan(arguments: &Arguments) -> Result<Plan> {
    if !rustix::process::geteuid().is_root() {
        bail!("the laboratory is made of network namespaces: run this as root");
    }
    let dir = work_dir()?;
    let plan = plan_in(arguments, &dir);
    if plan.is_err() {
        let _ = fs::remove_dir_all(&dir);
    }
    plan
}

fn plan_in(arguments: &Arguments, dir: &Path) -> Result<Plan> {
    let mut left_out = Vec::new();
    let settings = settings(arguments, &mut left_out);
    let wanted = |fault: &Fault| {
        arguments.faults.is_empty() || arguments.faults.iter().any(|name| fault.name().starts_with(name.as_str()))
    };
    let mut faults: Vec<Fault> = Fault::ALL.into_iter().filter(wanted).collect();
    if faults.is_empty() {
        bail!("there is no fault called {:?}: see --list", arguments.faults);
    }
    faults.retain(|fault| settings.iter().any(|setting| setting.plays(*fault)));
    let limits = |fault: &Fault| matches!(fault, Fault::ShortOfMemory(_));
    if faults.iter().any(limits)
        && let Some(why) = memory::missing(dir)
    {
        faults.retain(|fault| !limits(fault));
        left_out.push(format!("short-of-memory: {why}"));
    }
    if faults.is_empty() {
        bail!("nothing of that can be played here, or with that store and backend: {}", left_out.join("; "));
    }
    let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let seed = arguments.seed.unwrap_or(u64::try_from(time)? % 1_000_000);
    let understudy = &arguments.understudy;
    Ok(Plan {
        seed,
        dealt: deal(seed, arguments.rounds, &faults, &settings),
        left_out,
        guest: absolute(&arguments.guest),
        pilot: absolute(&arguments.pilot),
        leak: arguments.leak_output,
        understudy: understudy.canonicalize().with_context(|| format!("{} is missing", understudy.display()))?,
        dir: dir.to_owned(),
    })
}

/// Of the settings that are asked for those that can be had; why the others cannot.
fn settings(arguments: &Arguments, left_out: &mut Vec<String>) -> Vec<Setting> {
    let wanted = match (arguments.backend, arguments.store) {
        (None, None) if !arguments.leak_output => Setting::MIX.to_vec(),
        (backend, store) => {
            vec![Setting { backend: backend.unwrap_or(Backend::Qemu), store: store.unwrap_or(Store::Witness) }]
        }
    };
    let guest = absolute(&arguments.guest);
    let no_guest = || {
        let absent = ["vmlinuz", "initrd.img", "cmdline"].into_iter().find(|file| !guest.join(file).is_file())?;
        Some(format!("{} is missing: run `cargo xtask setup`", guest.join(absent).display()))
    };
    let missing = |setting: &Setting| {
        let backend = match setting.backend {
            Backend::Qemu => no_guest(),
            Backend::Kvm => Microvm::missing(&absolute(&arguments.pilot)),
        };
        backend.or_else(|| if setting.store == Store::Etcd { etcd::missing() } else { None })
    };
    let mut can = Vec::new();
    for setting in wanted {
        match missing(&setting) {
            None => can.push(setting),
            Some(why) => left_out.push(format!("{setting}: {why}")),
        }
    }
    can
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// Plays the plan, and cleans up whatever comes.
fn play(plan: &Plan) -> Result<Report> {
    for maker in netns::sweep_leftovers().context("looking for what an earlier run left")? {
        let dir = std::env::temp_dir().join(format!("us-chaos-{maker}"));
        memory::sweep(&dir, &format!("us-{maker}-"));
        sweep(&dir);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // Dropping the run's future drops the laboratory, which cleans up.
        tokio::select! {
            report = run(plan, |round: &Round| println!("{}", round.line())) => report,
            _ = interrupt.recv() => bail!("interrupted; logs are in {}", plan.dir.display()),
            _ = terminate.recv() => bail!("told to end; logs are in {}", plan.dir.display()),
        }
    })
}

/// A directory that only root can enter. Its path is short: sockets below it must fit in 107 bytes.
fn work_dir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("us-chaos-{}", std::process::id()));
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
    dir.canonicalize().with_context(|| format!("cannot resolve {}", dir.display()))
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
