//! `model [--large] [NAME]`: explores the scenarios and prints how many states each has. `model --start pairing|protected|again|two-hosts|two-hosts-again|two-hosts-alone BOUND=N ...
//! [wiring=MISTAKE]`: one of your own.

use std::process::ExitCode;
use std::time::Instant;

use chaos_model::check::PROPERTIES;
use chaos_model::scenario::{Bounds, LARGE, SMALL, Scenario, Start};
use chaos_model::wiring::Wiring;
use stateright::{Checker as _, HasDiscoveries, Model as _};

/// Explores all of it. A mistake is looked for breadth first, so that what is shown is short.
fn explore(scenario: Scenario) -> bool {
    let started = Instant::now();
    let builder = scenario.checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
    let (states, transitions, depth, found) = if scenario.wiring == Wiring::Faithful {
        let checker = builder.spawn_dfs().join();
        (checker.unique_state_count(), checker.state_count(), checker.max_depth(), checker.discoveries())
    } else {
        let checker = builder.spawn_bfs().join();
        (checker.unique_state_count(), checker.state_count(), checker.max_depth(), checker.discoveries())
    };
    let seconds = started.elapsed().as_secs_f64();
    println!("{}: {states} states, {transitions} transitions, longest path {depth}, {seconds:.1} s", scenario.name);
    let broken = |property: &str| PROPERTIES.iter().any(|(_, name)| *name == property);
    let mut holds = true;
    for (property, path) in found.iter().filter(|(property, _)| broken(property)) {
        holds = false;
        println!("BROKEN: {property}");
        let actions: Vec<_> = path.clone().into_actions().iter().map(|action| format!("{action:?}")).collect();
        println!("{}\n", actions.join(" "));
        for (state, action) in path.clone().into_vec() {
            println!("{state}");
            if let Some(action) = action {
                println!("{action:?}");
            }
        }
    }
    holds
}

/// A scenario from the command line.
fn own(arguments: &[String]) -> Option<Scenario> {
    let start = match arguments.first()?.as_str() {
        "pairing" => Start::Pairing,
        "protected" => Start::Protected,
        "again" => Start::PairingAgain,
        "two-hosts" => Start::TwoHosts,
        "two-hosts-again" => Start::TwoHostsAgain,
        "two-hosts-alone" => Start::TwoHostsAlone,
        _ => return None,
    };
    let mut scenario = Scenario { name: "own", start, bounds: Bounds::default(), wiring: Wiring::Faithful };
    for argument in &arguments[1..] {
        let (name, value) = argument.split_once('=')?;
        if name == "wiring" {
            scenario.wiring = Wiring::MUTANTS.into_iter().find(|mutant| format!("{mutant:?}") == value)?;
        } else {
            scenario.bounds = scenario.bounds.set(name, value.parse().ok()?)?;
        }
    }
    Some(scenario)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == "--start") {
        let Some(scenario) = own(&arguments[1..]) else {
            eprintln!(
                "model --start pairing|protected|again|two-hosts|two-hosts-again|two-hosts-alone BOUND=N ... [wiring=MISTAKE]; names are in chaos-tests/model/src"
            );
            return ExitCode::FAILURE;
        };
        return if explore(scenario) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let large = arguments.iter().any(|argument| argument == "--large");
    let name = arguments.iter().find(|argument| !argument.starts_with("--"));
    let scenarios: &[Scenario] = if large { &LARGE } else { &SMALL };
    let mut holds = true;
    for scenario in scenarios.iter().filter(|scenario| name.is_none_or(|name| name == scenario.name)) {
        holds &= explore(*scenario);
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
