//! `cargo xtask ...`: everything a newcomer or a build machine is told to call.
//!
//! Promise: each task says what it does, needs nothing but Rust to start, and where a machine lacks the means for
//! something it says `skipped` with the reason instead of passing silently.

mod fuzz;
mod lanes;
mod setup;
mod shell;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Tasks of the Understudy workspace")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing (Debian, as root) and build the guest image under target/guest.
    Setup {
        /// Build the guest image anew, from the packages of today.
        #[arg(long)]
        refresh: bool,
    },
    /// Set up, build and run `understudy demo` with the same arguments.
    Demo {
        /// Given to `understudy demo` as they are.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Set up, then check everything: format, lints, house rules, tests, a short real demo.
    Test {
        /// Also what takes long: rare machines, unlucky moments, 20 rounds of the demo, 20000 seeds of the simulator.
        #[arg(long)]
        all: bool,
        /// Nothing but what meets a real QEMU, with a newer one than that which is installed (a part of --all).
        #[arg(long, conflicts_with = "all")]
        newer_qemu: bool,
    },
    /// Run the simulator: `--seeds N`, `--seed S`.
    Sim {
        /// Given to the simulator as they are.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Set up, build and break real processes around a real VM: `--rounds N`, `--seed N`, `--fault NAME`, `--store etcd`, `--backend kvm`, `--json FILE`, `--html FILE`.
    Chaos {
        /// Given to the chaos suite as they are.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Set up, build and measure the promised numbers: `--quick`, `--json FILE`, `--only PART`.
    Bench {
        /// Given to the benchmark as they are.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fuzz what reads the words of others, guided by coverage (`docs/testing.md`).
    Fuzz(fuzz::Args),
    /// Generate dashboards, alert rules and docs/metrics.md anew; tests hold the committed files to it.
    Dashboards,
    /// Check the house rules alone: who imports whom, pure cores, unsafe code, file lengths, cited clauses.
    Tidy,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup { refresh } => {
            setup::run(refresh)?.print();
            Ok(ExitCode::SUCCESS)
        }
        Task::Demo { args } => lanes::demo(&args),
        Task::Test { newer_qemu: true, .. } => lanes::test_newer(),
        Task::Test { all, .. } => lanes::test(all),
        Task::Sim { args } => lanes::sim(&args),
        Task::Chaos { args } => lanes::chaos(&args),
        Task::Bench { args } => lanes::bench(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Dashboards => {
            shell::run(shell::cargo().args(["run", "--quiet", "--package", "dashboards"]))?;
            Ok(ExitCode::SUCCESS)
        }
        Task::Tidy => {
            tidy::run()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
