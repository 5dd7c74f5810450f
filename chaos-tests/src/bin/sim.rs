//! `sim --seeds N [--seed S] [--trace]`: runs the simulator. Standard output is the same for the same arguments, on any machine.

use std::process::ExitCode;

use chaos_tests::sim::options::Wiring;
use chaos_tests::sim::{run, run_many};
use clap::Parser;

/// What continuous integration runs.
const DEFAULT_SEEDS: u64 = 500;

/// Runs the cores on virtual time through random trouble.
#[derive(Parser)]
struct Arguments {
    /// How many seeds to run; 500 if no seed is given, 1 if one is.
    #[arg(long)]
    seeds: Option<u64>,
    /// The first seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Print every event of a single seed.
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.seed.filter(|_| arguments.seeds.is_none_or(|seeds| seeds == 1)) {
        let outcome = run(seed, Wiring::Faithful, arguments.trace);
        for line in &outcome.trace {
            println!("{line}");
        }
        println!("{outcome}");
        return if outcome.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let (first, seeds) = (arguments.seed.unwrap_or(1), arguments.seeds.unwrap_or(DEFAULT_SEEDS));
    let (sums, failed) = run_many(first, seeds, Wiring::Faithful);
    if let Some(outcome) = failed {
        for line in &outcome.trace {
            println!("{line}");
        }
        println!("{outcome}");
        println!("again: cargo run -p chaos-tests --bin sim -- --seed {} --trace", outcome.seed);
        return ExitCode::FAILURE;
    }
    println!("{seeds} seeds from {first}: ok, {sums:?}");
    ExitCode::SUCCESS
}
