//! The program `understudy`: its command line, configuration, and how it ends.
//!
//! [`main`] is all of it. `agent` and `witness` run until they are told to stop (SIGTERM, SIGINT); the other commands are
//! clients of the control API and return soon, or show progress.

mod args;
mod commands;
pub mod config;
pub mod dashboards;
mod drill;
mod exit;
mod latch;
mod logging;
mod microvm;
mod progress;
mod screen;
mod units;
mod witness;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;

pub use args::{
    AgentArgs, AskCommand, Cli, Command, DoctorArgs, FailoverArgs, MAX_PAIRING, PairArgs, ProtectArgs, StatusArgs,
    VmArgs, WitnessArgs,
};
pub use drill::{ChaosCommand, DrillArgs};
pub use exit::{CliError, EXIT_CODES, Exit};
pub use units::{HostPort, HostPortError, Listen, ListenError, Span};

use crate::control::client::Client;

/// Reads the command line, does what it says, prints an error once, and says how it went.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            // Nothing is left to tell it to if the terminal is gone.
            let _ = std::io::stderr().write_all(error.render().as_bytes());
            error.exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, CliError> {
    let exit = match cli.command {
        Command::Agent(args) => run_agent(args),
        Command::Witness(args) => run_witness(args),
        Command::Microvm { name } => {
            logging::start("info");
            tracing::debug!(vm = name, "the process of a microVM begins");
            return Ok(vmm_hooks::kvm::process::child::main());
        }
        Command::Demo(args) => {
            logging::start("warn");
            return Ok(crate::demo::run(args));
        }
        Command::Dashboards(command) => {
            commands::print(&dashboards::run(&command)?)?;
            Ok(Exit::Ok)
        }
        Command::Ask(command) => {
            logging::start("warn");
            block_on(commands::run(command, cli.control))
        }
    }?;
    Ok(exit.into())
}

fn run_agent(args: AgentArgs) -> Result<Exit, CliError> {
    let flags = config::AgentOverrides {
        name: args.name,
        listen: args.listen,
        heartbeat_listen: args.heartbeat_listen,
        pair_listen: args.pair_listen,
        state_dir: args.state_dir,
        run_dir: args.run_dir,
        metrics: args.metrics,
    };
    let config = config::agent(args.config.as_deref(), flags)?;
    logging::start("info");
    block_on(async move { crate::agent::run(config).await.map_err(|error| CliError::of(Exit::Failed, &error)) })?;
    Ok(Exit::Ok)
}

fn run_witness(args: WitnessArgs) -> Result<Exit, CliError> {
    let flags = config::WitnessOverrides {
        name: args.name,
        listen: args.listen,
        pair_listen: args.pair_listen,
        state_dir: args.state_dir,
        run_dir: args.run_dir,
    };
    let config = config::witness(args.config.as_deref(), flags)?;
    logging::start("info");
    block_on(async move { witness::run(config).await.map_err(CliError::from) })?;
    Ok(Exit::Ok)
}

/// Threads for what an agent or a witness does beside its pauses: half of the processors, for the guests need them, too. Where there are two, waking another
/// thread for each step of a commit costs more than a second one is worth.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get() / 2).max(1)
}

fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // Tokio's own setting, if somebody knows better.
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        runtime.worker_threads(workers());
    }
    let runtime = runtime.enable_all().build().map_err(|error| CliError::of(Exit::Failed, &error))?;
    runtime.block_on(work)
}

/// The control socket that commands talk to.
fn client(control: Option<PathBuf>) -> Client {
    Client::new(control.unwrap_or_else(|| config::agent_socket(config::DEFAULT_RUN_DIR.as_ref())))
}
