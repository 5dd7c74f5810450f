//! What `stateright` explores: a scenario is a model, a world its state, and the checks its properties.

use std::fmt;

use heartbeat_core::record::Owner;
use heartbeat_core::witness::FORCED;
use replicator_core::restart::End;
use stateright::{Model, Property};

use crate::check::{PROPERTIES, Violation};
use crate::scenario::Scenario;
use crate::world::{Action, World};

impl fmt::Display for World {
    /// What an engineer wants to see between two actions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  record {:?} packets {:?}", self.owner(), self.packets)?;
        for (index, host) in self.hosts.iter().enumerate() {
            let primary = host.primary.as_ref().map(|primary| (primary.state(), primary.ownership().verdict()));
            let standby = host.standby.as_ref().map(|standby| (standby.state(), standby.ownership().verdict()));
            let restart = host.restart.as_ref().map(|restart| restart.ownership().verdict());
            writeln!(f, "  host {index} guest {:?} gate {:?} copy {:?}", host.guest, host.gate, host.copy)?;
            writeln!(f, "    primary {primary:?}\n    standby {standby:?}\n    restart {restart:?} {:?}", host.ended)?;
        }
        Ok(())
    }
}

/// What some state of some scenario must be: a checker that never gets there proves nothing.
pub const REACHED: [&str; 13] = [
    "a VM is protected",
    "a standby takes over",
    "a primary goes on alone",
    "a loser is destroyed",
    "a VM is given back and runs",
    "a VM is stopped on purpose",
    "a new life frees its guest",
    "a new life gives a grant back",
    "a host is forced out, and the VM runs",
    "a host learns that it was forced out",
    "a host is switched off, and the VM runs on the other one",
    "a VM is given back because its other host cannot be switched off",
    "a new life goes on with a copy that was kept while its fence was waited for, and the VM runs",
];

fn was_forced(world: &World, store: usize) -> bool {
    world.stores[store].disk.is_some_and(|record| record.generation.0 >= FORCED)
}

fn is(world: &World, what: Violation) -> bool {
    world.checker.violation == Some(what)
}

impl Model for Scenario {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin()]
    }

    fn actions(&self, state: &World, actions: &mut Vec<Action>) {
        if state.checker.violation.is_none() {
            state.actions(actions);
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut next = last.clone();
        next.happens(action);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let always: [fn(&Self, &World) -> bool; 7] = [
            |_, world| !is(world, PROPERTIES[0].0),
            |_, world| !is(world, PROPERTIES[1].0),
            |_, world| !is(world, PROPERTIES[2].0),
            |_, world| !is(world, PROPERTIES[3].0),
            |_, world| !is(world, PROPERTIES[4].0),
            |_, world| !is(world, PROPERTIES[5].0),
            |_, world| !is(world, PROPERTIES[6].0),
        ];
        let reached: [fn(&Self, &World) -> bool; 13] = [
            |_, world| (0..2).any(|host| world.is_protected(host)),
            |_, world| world.hosts.iter().any(|host| host.guest.is_some() && host.mark.is_some()),
            |_, world| {
                let alone = |host: &usize| {
                    world.hosts[*host].guest.is_some_and(|guest| guest.running) && !world.hosts[*host].gate.holding
                };
                let of = |host: usize| matches!(world.owner(), Some(Owner::Solo { node: owner, .. }) if *owner == world.party(host));
                (0..2).filter(alone).any(|host| of(host) && world.hosts[host].mark.is_none())
            },
            |_, world| {
                world.hosts.iter().any(|host| host.alive && host.muted && host.guest.is_none() && !host.lost_by_fault)
            },
            |_, world| {
                world.hosts[1].copy.is_some_and(|copy| copy.failed)
                    && world.hosts[0].guest.is_some_and(|guest| guest.running)
            },
            |_, world| matches!(world.owner(), Some(Owner::Stopped { .. })),
            |_, world| world.hosts.iter().any(|host| host.ended == Some(End::Ours)),
            |_, world| world.hosts.iter().any(|host| host.ended == Some(End::GaveBack)),
            |_, world| was_forced(world, world.keeper) && world.hosts[world.keeper].guest.is_some(),
            |_, world| world.is_pair() && was_forced(world, 1 - world.keeper),
            |_, world| world.fences && !world.hosts[0].alive && world.hosts[1].guest.is_some(),
            |_, world| {
                let whole = world.hosts[1].copy.is_some_and(|copy| !copy.failed && !copy.gone);
                let back = matches!(world.owner(), Some(Owner::Solo { node: owner, activated: false, other: Some(from) })
                    if *owner == world.party(0) && *from == world.party(1));
                world.fences && whole && back && world.hosts[1].unconfirmed
            },
            |_, world| world.hosts[1].resumed && world.hosts[1].guest.is_some_and(|guest| guest.running),
        ];
        let always = PROPERTIES.into_iter().zip(always).map(|((_, name), holds)| Property::always(name, holds));
        always.chain(REACHED.into_iter().zip(reached).map(|(name, seen)| Property::sometimes(name, seen))).collect()
    }
}
