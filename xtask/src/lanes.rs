//! `cargo xtask demo | test | sim | chaos | bench`: what they call, in which order.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::{setup, shell, tidy};

/// Builds the product and runs the demo with `args`.
///
/// # Errors
/// If this machine cannot run it, or it does not build.
pub(crate) fn demo(args: &[String]) -> Result<ExitCode> {
    let means = setup::run(false)?;
    let microvm =
        args.iter().any(|word| word == "--backend=kvm") || args.windows(2).any(|two| two == ["--backend", "kvm"]);
    let guest = match means.demo() {
        Ok(guest) => guest,
        // A microVM needs neither QEMU nor its guest; what it lacks the demo says itself.
        Err(_) if microvm => shell::target().join("guest"),
        Err(reasons) => bail!("the demo cannot run here: {reasons}"),
    };
    let mut database = None;
    if args.iter().any(|arg| arg == "postgres" || arg == "--workload=postgres") {
        match setup::postgres::build(false)? {
            Ok(dir) => database = Some(dir),
            Err(reason) => bail!("the demo with a database cannot run here: {reason}"),
        }
    }
    shell::run(shell::cargo().args(["build", "--release", "--package", "replicator"]))?;
    let mut command = Command::new(shell::target().join("release/understudy"));
    command.arg("demo").arg("--guest").arg(guest).args(args);
    if let Some(dir) = database {
        command.arg("--database").arg(dir);
    }
    // The demo takes our place, so that signals reach it and its exit code is ours.
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    bail!("cannot run {}: {error}", shell::target().join("release/understudy").display())
}

/// Runs the simulator with `args`; its exit code is ours.
///
/// # Errors
/// If cargo cannot be started.
pub(crate) fn sim(args: &[String]) -> Result<ExitCode> {
    let mut command = shell::cargo();
    command.args(["run", "--quiet", "--package", "chaos-tests", "--bin", "sim", "--"]).args(args);
    let status = command.status()?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// A short run of the chaos suite, in one laboratory.
const SHORT_CHAOS: [&str; 8] = ["--rounds", "8", "--seed", "1", "--backend", "qemu", "--store", "witness"];

/// The chaos suite with a mistake that it must find.
const LEAK: [&str; 7] = ["--leak-output", "--rounds", "1", "--fault", "kill-severed-by-silence", "--seed", "1"];

/// Builds the product and the chaos suite, with their assertions on, and runs it with `args`.
///
/// # Errors
/// If this machine cannot run it, or it does not build.
pub(crate) fn chaos(args: &[String]) -> Result<ExitCode> {
    let means = setup::run(false)?;
    let guest = match means.demo() {
        Ok(guest) => guest,
        Err(reasons) => bail!("the chaos suite cannot run here: {reasons}"),
    };
    shell::run(shell::cargo().args(["build", "--package", "replicator"]))?;
    shell::run(shell::cargo().args(["build", "--package", "chaos-tests", "--bin", "chaos"]))?;
    let mut command = chaos_command(&guest);
    command.args(args);
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    bail!("cannot run {}: {error}", command.get_program().display())
}

fn chaos_command(guest: &Path) -> Command {
    let debug = shell::target().join("debug");
    let mut command = Command::new(debug.join("chaos"));
    command.arg("--guest").arg(guest).arg("--understudy").arg(debug.join("understudy")).stdin(Stdio::null());
    command.arg("--pilot").arg(shell::target().join("pilot/pilot"));
    command
}

/// Builds the product and the benchmark, and measures with `args`. What this machine lacks the benchmark itself skips.
///
/// # Errors
/// If it does not build.
pub(crate) fn bench(args: &[String]) -> Result<ExitCode> {
    let means = setup::run(false)?;
    let all = !args.iter().any(|arg| arg.starts_with("--only") || arg.starts_with("--rounds"));
    if (all || args.iter().any(|arg| arg.contains("disks")))
        && let Err(reasons) = setup::postgres::build(false)?
    {
        println!("bench: what needs a database's disk will be skipped here: {reasons}");
    }
    if let Err(reasons) = means.demo() {
        println!("bench: what needs a real VM will be skipped here: {reasons}");
    }
    shell::run(shell::cargo().args(["build", "--release", "--package", "replicator", "--package", "bench"]))?;
    let release = shell::target().join("release");
    let mut command = Command::new(release.join("bench"));
    command.arg("--guest").arg(shell::target().join("guest")).arg("--understudy").arg(release.join("understudy"));
    command.arg("--database").arg(shell::target().join("guest-postgres"));
    command.args(args);
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    bail!("cannot run {}: {error}", release.join("bench").display())
}

/// Holds the dashboards to the types that Grafana publishes. They come from npm's registry.
fn grafana_types() -> Outcome {
    if shell::find("npm").is_none() {
        return Outcome::Skipped("npm is not installed".to_owned());
    }
    let npm =
        |args: &[&str]| shell::run(Command::new("npm").args(args).current_dir(shell::root().join("dashboards/schema")));
    if let Err(error) = npm(&["install", "--no-audit", "--no-fund", "--no-package-lock"]) {
        return Outcome::Skipped(format!("Grafana's types cannot be had here: {error:#}"));
    }
    outcome(npm(&["run", "check"]))
}

/// How a lane ended.
enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

/// Runs every lane, also after one failed, and sums up.
///
/// # Errors
/// If the set-up cannot write.
pub(crate) fn test(all: bool) -> Result<ExitCode> {
    let means = setup::run(false)?;
    if all {
        setup::for_long_tests();
    }
    means.print();
    let mut summary = Vec::new();
    let mut lane = |name: &str, run: &dyn Fn() -> Outcome| {
        println!("\n== {name}");
        let started = Instant::now();
        let outcome = run();
        let seconds = started.elapsed().as_secs();
        let (failed, line) = match outcome {
            Outcome::Passed => (false, format!("passed   {name} ({seconds} s)")),
            Outcome::Skipped(why) => (false, format!("skipped  {name}: {why}")),
            Outcome::Failed(why) => (true, format!("FAILED   {name}: {why}")),
        };
        println!("{line}");
        summary.push((failed, line));
    };
    lane("house rules", &|| outcome(tidy::run()));
    lane("format", &|| match component("fmt") {
        Ok(()) => outcome(shell::run(shell::cargo().args(["fmt", "--all", "--check"]))),
        Err(why) => Outcome::Skipped(why),
    });
    lane("lints", &|| match component("clippy") {
        Ok(()) => {
            outcome(shell::run(shell::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])))
        }
        Err(why) => Outcome::Skipped(why),
    });
    lane("pure cores build alone", &|| {
        outcome(shell::run(shell::cargo().args([
            "check",
            "--lib",
            "--package",
            "heartbeat-core",
            "--package",
            "replicator-core",
        ])))
    });
    lane("tests", &|| outcome(shell::run(shell::cargo().args(["test", "--workspace", "--no-fail-fast"]))));
    lane("long tests: rare machines, unlucky moments", &|| {
        if !all {
            return Outcome::Skipped("only with --all".to_owned());
        }
        outcome(shell::run(shell::cargo().env("UNDERSTUDY_LONG", "1").args([
            "test",
            "--workspace",
            "--no-fail-fast",
            "--test",
            "matrix",
            "--test",
            "kvm_pause",
            "--test",
            "kvm_pilot",
            "--test",
            "real",
        ])))
    });
    lane("demo on a real VM", &|| match means.demo() {
        Ok(guest) => outcome(demo_lane(&guest, if all { "20" } else { "1" })),
        Err(why) => Outcome::Skipped(why),
    });
    lane("demo on a microVM", &|| match means.microvm() {
        Ok(pilot) => outcome(microvm_lane(&pilot, if all { "20" } else { "1" })),
        Err(why) => Outcome::Skipped(why),
    });
    lane("chaos on a real VM", &|| match means.demo() {
        // What each seed does is the same in every run, as far as a real machine lets it.
        Ok(guest) if all => outcome(shell::run(chaos_command(&guest).args(["--rounds", "100"]))),
        // With agents of a larger host (`workers` in replicator/src/cli): all others' are those of this one.
        Ok(guest) => outcome(shell::run(chaos_command(&guest).args(SHORT_CHAOS).env("TOKIO_WORKER_THREADS", "4"))),
        Err(why) => Outcome::Skipped(why),
    });
    lane("nested: Linux under KVM, on emulated hosts", &|| match means.demo() {
        Ok(_) => outcome(nested_lane(all)),
        Err(why) => Outcome::Skipped(why),
    });
    if all {
        lane("the chaos suite finds output before its commit", &|| match means.demo() {
            Ok(guest) => outcome(shell::run(chaos_command(&guest).args(LEAK))),
            Err(why) => Outcome::Skipped(why),
        });
        lane("demo with a database, 5 rounds", &|| match (means.demo(), setup::postgres::build(false)) {
            (Ok(guest), Ok(Ok(database))) => outcome(database_lane(&guest, &database)),
            (Err(why), _) | (_, Ok(Err(why))) => Outcome::Skipped(why),
            (_, Err(error)) => Outcome::Failed(format!("{error:#}")),
        });
        lane("what meets QEMU, with a newer one", &|| newer_lane(&means));
        lane("model checker, large bounds", &|| {
            let mut command = shell::cargo();
            outcome(shell::run(command.args(["run", "--release", "--quiet", "-p", "chaos-model", "--", "--large"])))
        });
        lane("simulator, 20000 seeds", &|| {
            let mut command = shell::cargo();
            command.args(["run", "--release", "--quiet", "--package", "chaos-tests", "--bin", "sim", "--"]);
            outcome(shell::run(command.args(["--seeds", "20000"])))
        });
    }
    lane("dashboards as Grafana's types say", &|| {
        if !all {
            return Outcome::Skipped("only with --all".to_owned());
        }
        grafana_types()
    });
    println!("\n== summary");
    for (_, line) in &summary {
        println!("{line}");
    }
    let failed = summary.iter().any(|&(failed, _)| failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn outcome(result: Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// Whether `cargo NAME` is installed.
fn component(name: &str) -> Result<(), String> {
    let mut command = shell::cargo();
    command.args([name, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("`cargo {name}` is not installed: rustup component add {name}")),
    }
}

/// What one emulated host shows.
const NESTED: &str = "linux_under_kvm_and_a_failover_between_agents";

/// Builds what is to run on emulated hosts, and runs it there: all of it, or what one such host can show.
fn nested_lane(all: bool) -> Result<()> {
    let mut build = shell::cargo();
    // All of the workspace, so that nothing is built with other features than before.
    build.args(["test", "--workspace", "--no-run", "--lib", "--test", "kvm_linux"]);
    let built = shell::output(build.args(["--quiet", "--message-format", "json"]))?;
    let messages = built.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut programs: Vec<PathBuf> =
        messages.filter_map(|message| Some(message["executable"].as_str()?.into())).collect();
    programs.push(shell::target().join("debug/understudy"));
    let mut test = shell::cargo();
    test.env("UNDERSTUDY_NESTED_PROGRAMS", std::env::join_paths(programs)?);
    test.args(["test", "--workspace", "--test", "nested", "--", "--test-threads", "1", "--nocapture"]);
    if !all {
        test.args(["--exact", NESTED]);
    }
    shell::run(&mut test)
}

/// Rounds with PostgreSQL on a disk, by the build that was just tested.
fn database_lane(guest: &Path, database: &Path) -> Result<()> {
    let mut command = Command::new(shell::target().join("debug/understudy"));
    command.arg("demo").arg("--guest").arg(guest).arg("--database").arg(database);
    command.args(["--workload", "postgres", "--rounds", "5", "--load-seconds", "3"]);
    shell::run(command.stdin(Stdio::null()))
}

/// That lane alone.
///
/// # Errors
/// If the set-up cannot write.
pub(crate) fn test_newer() -> Result<ExitCode> {
    let means = setup::run(false)?;
    match newer_lane(&means) {
        Outcome::Passed => Ok(ExitCode::SUCCESS),
        Outcome::Skipped(why) => {
            println!("skipped: {why}");
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Failed(why) => bail!("{why}"),
    }
}

fn newer_lane(means: &setup::Means) -> Outcome {
    match (means.demo(), setup::newer::make()) {
        (Ok(guest), Ok(newer)) => outcome(with_newer(&guest, &newer)),
        (Err(why), _) => Outcome::Skipped(why),
        (_, Err(why)) => Outcome::Skipped(format!("there is no newer QEMU: {why:#}")),
    }
}

/// What meets a real QEMU, with another one than that which is installed.
fn with_newer(guest: &Path, newer: &setup::newer::Newer) -> Result<()> {
    println!("{}", newer.version);
    let mut tests = shell::cargo();
    // All of the workspace, so that nothing is built with other features than before.
    tests.args(["test", "--workspace", "--no-fail-fast", "--test", "contract", "--test", "qemu_real"]);
    tests.args(["--test", "matrix", "--test", "real"]);
    let tested = shell::run(&mut newer.command(&tests));
    let mut demo = Command::new(shell::target().join("debug/understudy"));
    demo.arg("demo").arg("--guest").arg(guest).args(["--load-seconds", "3"]);
    tested.and(shell::run(newer.command(&demo).stdin(Stdio::null())))
}

/// The demo of the build that was just tested, with its assertions on, and short throughput measurements.
fn demo_lane(guest: &Path, rounds: &str) -> Result<()> {
    tested_demo(rounds, |command| command.arg("--guest").arg(guest))
}

/// The same with a microVM in place of QEMU.
fn microvm_lane(pilot: &Path, rounds: &str) -> Result<()> {
    tested_demo(rounds, |command| command.args(["--backend", "kvm"]).arg("--pilot").arg(pilot))
}

fn tested_demo(rounds: &str, with: impl FnOnce(&mut Command) -> &mut Command) -> Result<()> {
    let program = shell::target().join("debug/understudy");
    if !program.exists() {
        bail!("the tests have not built {}", program.display());
    }
    let mut command = Command::new(program);
    with(command.arg("demo"));
    command.args(["--rounds", rounds, "--load-seconds", "3"]);
    shell::run(command.stdin(Stdio::null()))
}
