//! `sim --seeds N [--seed S] [--trace]`: runs the simulator. Standard output is the same for the same arguments, on any machine.

use std::process::ExitCode;

use chaos_tests::sim::options::Wiring;
use chaos_tests::sim::{run, run_many};
use clap::Parser;

/// Runs the cores on virtual time through random trouble.
#[derive(Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first seed; alone, only this one is run.
    #[arg(long)]
    seed: Option<u64>,
    /// Print every event of a single seed.
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.seed.filter(|_| arguments.trace || arguments.seeds == 500) {
        let outcome = run(seed, Wiring::Faithful, arguments.trace);
        for line in &outcome.trace {
            println!("{line}");
        }
        println!("{outcome}");
        return if outcome.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let first = arguments.seed.unwrap_or(1);
    let (sums, failed) = run_many(first, arguments.seeds, Wiring::Faithful);
    if let Some(outcome) = failed {
        for line in &outcome.trace {
            println!("{line}");
        }
        println!("{outcome}");
        println!("again: cargo run -p chaos-tests --bin sim -- --seed {} --trace", outcome.seed);
        return ExitCode::FAILURE;
    }
    println!("{} seeds from {first}: ok, {sums:?}", arguments.seeds);
    ExitCode::SUCCESS
}
