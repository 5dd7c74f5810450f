//! Where a run begins and how often each thing may happen in it.

use crate::check::Violation;
use crate::wiring::Wiring;
use crate::world::World;

/// How often each thing may happen. What is not here (deliveries, disks that finish, captures that end) may happen whenever there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Steps of guests; each emits a frame.
    pub steps: u8,
    /// Captures of running guests, besides the first held one and a last one.
    pub captures: u8,
    /// Messages to or from the witness that arrive twice.
    pub doubled: u8,
    /// Times that a host's clock reaches its next deadline, so that lost requests are sent again; for each host.
    pub ticks: [u8; 2],
    /// Breaks of the replication connection; each side learns of it when it does.
    pub breaks: u8,
    /// Suspicions by a failure detector; each may end.
    pub suspicions: u8,
    /// Crashes of the witness. A write under way is kept by its disk, or not.
    pub witness_crashes: u8,
    /// Hosts that lose power for good.
    pub kills: u8,
    /// Agents that restart while their host and their QEMUs go on.
    pub restarts: u8,
    /// Guests whose process dies.
    pub deaths: u8,
    /// Guests that shut down.
    pub shutdowns: u8,
    /// Activations that fail.
    pub failures: u8,
    /// Planned failovers.
    pub planned: u8,
    /// Failovers that the standby's operator asks for.
    pub takeovers: u8,
    /// Protections that an operator ends.
    pub unprotects: u8,
    /// Protections that begin after the first.
    pub protects: u8,
}

impl Bounds {
    /// Sets one by its name; `ticks` for both hosts. `None` if there is none of that name.
    #[must_use]
    pub fn set(mut self, name: &str, times: u8) -> Option<Self> {
        match name {
            "steps" => self.steps = times,
            "captures" => self.captures = times,
            "doubled" => self.doubled = times,
            "ticks" => self.ticks = [times; 2],
            "breaks" => self.breaks = times,
            "suspicions" => self.suspicions = times,
            "witness_crashes" => self.witness_crashes = times,
            "kills" => self.kills = times,
            "restarts" => self.restarts = times,
            "deaths" => self.deaths = times,
            "shutdowns" => self.shutdowns = times,
            "failures" => self.failures = times,
            "planned" => self.planned = times,
            "takeovers" => self.takeovers = times,
            "unprotects" => self.unprotects = times,
            "protects" => self.protects = times,
            _ => return None,
        }
        Some(self)
    }
}

/// Where a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// Host 0 has asked host 1 to be its standby; nothing has arrived yet.
    Pairing,
    /// Host 0 runs a guest that host 1 protects.
    Protected,
    /// Host 1 took over and runs the guest alone, host 0's copy is gone, and host 1 has asked host 0 to be its standby.
    PairingAgain,
}

/// One thing to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// Where it begins.
    pub start: Start,
    /// What may happen.
    pub bounds: Bounds,
    /// As it should be, or a mistake.
    pub wiring: Wiring,
}

impl Scenario {
    /// The first state.
    #[must_use]
    pub fn begin(&self) -> World {
        World::begin(self)
    }

    /// The same with a mistake.
    #[must_use]
    pub fn with(self, wiring: Wiring) -> Self {
        Self { wiring, ..self }
    }
}

const NONE: Bounds = Bounds {
    steps: 0,
    captures: 0,
    doubled: 0,
    ticks: [0, 0],
    breaks: 0,
    suspicions: 0,
    witness_crashes: 0,
    kills: 0,
    restarts: 0,
    deaths: 0,
    shutdowns: 0,
    failures: 0,
    planned: 0,
    takeovers: 0,
    unprotects: 0,
    protects: 0,
};

const fn faithful(name: &'static str, start: Start, bounds: Bounds) -> Scenario {
    Scenario { name, start, bounds, wiring: Wiring::Faithful }
}

/// What runs each time: seconds.
pub const SMALL: [Scenario; 8] = [
    faithful("pairing", Start::Pairing, Bounds { steps: 1, captures: 2, breaks: 1, ..NONE }),
    faithful("contest", Start::Protected, Bounds { steps: 2, captures: 1, breaks: 1, failures: 1, ..NONE }),
    faithful("votes", Start::Protected, Bounds { steps: 1, breaks: 1, witness_crashes: 1, doubled: 1, ..NONE }),
    faithful("suspicions", Start::Protected, Bounds { steps: 1, captures: 1, suspicions: 1, ..NONE }),
    faithful("restart", Start::Protected, Bounds { steps: 1, breaks: 1, restarts: 1, ..NONE }),
    faithful("operators", Start::Protected, Bounds { planned: 1, takeovers: 1, ..NONE }),
    faithful("ends", Start::Protected, Bounds { breaks: 1, deaths: 1, shutdowns: 1, ..NONE }),
    faithful("again", Start::PairingAgain, Bounds { steps: 1, captures: 2, breaks: 1, ..NONE }),
];

/// What runs with `cargo xtask test --all`: minutes.
pub const LARGE: [Scenario; 10] = [
    faithful("pairing", Start::Pairing, Bounds { steps: 2, captures: 3, breaks: 1, ..NONE }),
    faithful("contest", Start::Protected, Bounds { steps: 2, captures: 1, breaks: 1, failures: 1, doubled: 1, ..NONE }),
    faithful(
        "votes",
        Start::Protected,
        Bounds { steps: 1, breaks: 1, witness_crashes: 1, planned: 1, takeovers: 1, ..NONE },
    ),
    faithful("late asks", Start::Protected, Bounds { steps: 1, breaks: 1, ticks: [1, 1], ..NONE }),
    faithful("suspicions", Start::Protected, Bounds { steps: 1, captures: 1, suspicions: 2, takeovers: 1, ..NONE }),
    faithful(
        "restart",
        Start::Protected,
        Bounds { steps: 2, captures: 1, breaks: 1, restarts: 1, protects: 1, ..NONE },
    ),
    faithful("operators", Start::Protected, Bounds { breaks: 1, planned: 1, takeovers: 1, unprotects: 1, ..NONE }),
    faithful(
        "ends",
        Start::Protected,
        Bounds { steps: 1, captures: 1, breaks: 1, deaths: 1, shutdowns: 1, kills: 1, failures: 1, ..NONE },
    ),
    faithful(
        "again",
        Start::PairingAgain,
        Bounds { steps: 1, captures: 2, breaks: 1, failures: 1, restarts: 1, ..NONE },
    ),
    // Found that a late ask of an earlier life made a node destroy its own guest.
    faithful("second life", Start::Pairing, Bounds { steps: 1, captures: 4, restarts: 1, protects: 1, ..NONE }),
];

const fn mistake(start: Start, bounds: Bounds) -> Scenario {
    faithful("mistake", start, bounds)
}

/// Each mistake, where it is found, and as what.
pub const MISTAKES: [(Wiring, Scenario, Violation); 11] = [
    (
        Wiring::ReleaseOnSent,
        mistake(Start::Protected, Bounds { steps: 1, captures: 1, ..NONE }),
        Violation::BeforeCommit,
    ),
    (
        Wiring::AcknowledgeAfterGrant,
        mistake(Start::Protected, Bounds { steps: 1, captures: 1, suspicions: 1, ..NONE }),
        Violation::BeforeCommit,
    ),
    (
        Wiring::AloneWithoutGrant,
        mistake(Start::Protected, Bounds { steps: 1, breaks: 1, ..NONE }),
        Violation::BeforeCommit,
    ),
    (
        Wiring::WitnessForgets,
        mistake(Start::Protected, Bounds { breaks: 1, witness_crashes: 1, ..NONE }),
        Violation::VoteForgotten,
    ),
    (
        Wiring::ReadUndurable,
        mistake(Start::Protected, Bounds { planned: 1, witness_crashes: 1, ..NONE }),
        Violation::VoteForgotten,
    ),
    (
        Wiring::RefusalIsDefeat,
        mistake(Start::Protected, Bounds { breaks: 1, doubled: 1, ..NONE }),
        Violation::Destroyed,
    ),
    (Wiring::DestroyEarly, mistake(Start::Protected, Bounds { breaks: 1, failures: 1, ..NONE }), Violation::NoCopy),
    (Wiring::HoldLate, mistake(Start::PairingAgain, Bounds { steps: 1, captures: 2, ..NONE }), Violation::BeforeCommit),
    (
        Wiring::ActivateTwice,
        mistake(Start::Protected, Bounds { steps: 1, breaks: 1, restarts: 1, ..NONE }),
        Violation::Forgets,
    ),
    (
        Wiring::ActivateOlder,
        mistake(Start::Protected, Bounds { steps: 1, captures: 1, breaks: 1, ..NONE }),
        Violation::Forgets,
    ),
    (Wiring::SealEarly, mistake(Start::Protected, Bounds { steps: 1, captures: 1, ..NONE }), Violation::BeforeCommit),
];
