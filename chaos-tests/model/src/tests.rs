//! The small bounds hold, reach what they should, and each mistake is found.

use std::collections::BTreeSet;

use stateright::{Checker as _, HasDiscoveries, Model as _};

use crate::check::{PROPERTIES, State, Violation};
use crate::explore::REACHED;
use crate::scenario::{MISTAKES, SMALL};

/// `docs/protocol.md` P1 to P6, P8 to P11: in every order of events within the small bounds.
#[test]
fn the_small_bounds_hold() {
    let mut reached = BTreeSet::new();
    for scenario in SMALL {
        let checker = scenario.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
        println!(
            "{}: {} states, {} transitions, longest path {}",
            scenario.name,
            checker.unique_state_count(),
            checker.state_count(),
            checker.max_depth()
        );
        for (_, property) in PROPERTIES {
            checker.assert_no_discovery(property);
        }
        reached.extend(checker.discoveries().into_keys());
    }
    let missed: Vec<_> = REACHED.iter().filter(|name| !reached.contains(*name)).collect();
    assert!(missed.is_empty(), "never reached: {missed:?}");
}

/// A checker that finds nothing when a rule is broken proves nothing.
#[test]
fn each_mistake_is_found() {
    for (wiring, scenario, violation) in MISTAKES {
        let property = PROPERTIES.into_iter().find(|(what, _)| *what == violation).expect("it has a name").1;
        let mistaken = scenario.with(wiring);
        let checker = mistaken.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found = checker.discoveries();
        let path = found.get(property).unwrap_or_else(|| panic!("{wiring:?} was not found: {:?}", found.keys()));
        // The same events harm nobody where all is as it should be, as far as they happen there.
        println!("{wiring:?}: {property}, after {} events", path.clone().into_actions().len());
        let faithful = scenario.checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
        for (_, property) in PROPERTIES {
            faithful.assert_no_discovery(property);
        }
    }
}

#[test]
fn a_state_remembers_its_own_history_alone() {
    let common = State::default().step(1);
    let (left, right) = (common.step(2), common.step(3));
    assert!(left.remembers(State::default()) && left.remembers(common) && left.remembers(left));
    assert!(!left.remembers(right) && !right.remembers(left) && !common.remembers(left));
}

#[test]
fn every_violation_has_a_name_and_every_mistake_a_scenario() {
    let all: BTreeSet<_> = MISTAKES.iter().map(|(wiring, ..)| format!("{wiring:?}")).collect();
    assert_eq!(all.len(), crate::wiring::Wiring::MUTANTS.len());
    assert!(PROPERTIES.iter().any(|(what, _)| *what == Violation::NoCopy));
}
