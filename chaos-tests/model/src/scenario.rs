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
    /// Hosts that lose power.
    pub kills: u8,
    /// Hosts that have it again.
    pub returns: u8,
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
    /// Dead hosts that an operator forces out.
    pub forces: u8,
    /// VMs that an operator starts from their disk.
    pub boots: u8,
    /// Fence commands that end, by which the other host is off or not. Unless 0, a winner must have it switched off first.
    pub fences: u8,
    /// Copies that wait for a fence and become durable.
    pub keeps: u8,
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
            "returns" => self.returns = times,
            "restarts" => self.restarts = times,
            "deaths" => self.deaths = times,
            "shutdowns" => self.shutdowns = times,
            "failures" => self.failures = times,
            "planned" => self.planned = times,
            "takeovers" => self.takeovers = times,
            "unprotects" => self.unprotects = times,
            "protects" => self.protects = times,
            "forces" => self.forces = times,
            "boots" => self.boots = times,
            "fences" => self.fences = times,
            "keeps" => self.keeps = times,
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
    /// Host 0 runs a guest that host 1 protects, and keeps the record itself: there is no third host.
    TwoHosts,
    /// The same after host 1 took over: it runs the guest, and host 0 protects it and still keeps the record.
    TwoHostsAgain,
    /// There is no third host; host 0 keeps the record and went alone, and host 1 read that and keeps its copy.
    TwoHostsAlone,
}

impl Start {
    pub(crate) fn has_third(self) -> bool {
        !matches!(self, Self::TwoHosts | Self::TwoHostsAgain | Self::TwoHostsAlone)
    }
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
    returns: 0,
    restarts: 0,
    deaths: 0,
    shutdowns: 0,
    failures: 0,
    planned: 0,
    takeovers: 0,
    unprotects: 0,
    protects: 0,
    forces: 0,
    boots: 0,
    fences: 0,
    keeps: 0,
};

const fn faithful(name: &'static str, start: Start, bounds: Bounds) -> Scenario {
    Scenario { name, start, bounds, wiring: Wiring::Faithful }
}

/// What runs each time: seconds.
pub const SMALL: [Scenario; 15] = [
    faithful("pairing", Start::Pairing, Bounds { steps: 1, captures: 2, breaks: 1, ..NONE }),
    faithful("contest", Start::Protected, Bounds { steps: 2, captures: 1, breaks: 1, failures: 1, ..NONE }),
    faithful("votes", Start::Protected, Bounds { steps: 1, breaks: 1, witness_crashes: 1, doubled: 1, ..NONE }),
    faithful("suspicions", Start::Protected, Bounds { steps: 1, captures: 1, suspicions: 1, ..NONE }),
    faithful("restart", Start::Protected, Bounds { steps: 1, breaks: 1, restarts: 1, ..NONE }),
    faithful("operators", Start::Protected, Bounds { planned: 1, takeovers: 1, ..NONE }),
    faithful("ends", Start::Protected, Bounds { breaks: 1, deaths: 1, shutdowns: 1, ..NONE }),
    faithful("again", Start::PairingAgain, Bounds { steps: 1, captures: 2, breaks: 1, ..NONE }),
    faithful("power", Start::Protected, Bounds { steps: 1, kills: 1, returns: 1, ..NONE }),
    faithful("two hosts", Start::TwoHosts, Bounds { steps: 1, kills: 1, returns: 1, forces: 1, ..NONE }),
    faithful(
        "two hosts, alone",
        Start::TwoHostsAlone,
        Bounds { steps: 1, kills: 1, returns: 1, forces: 1, boots: 1, ..NONE },
    ),
    faithful(
        "two hosts, again",
        Start::TwoHostsAgain,
        Bounds { steps: 1, breaks: 1, kills: 1, returns: 1, forces: 1, ..NONE },
    ),
    faithful("fence", Start::Protected, Bounds { steps: 1, breaks: 1, suspicions: 1, fences: 1, ..NONE }),
    faithful(
        "fence, again",
        Start::Protected,
        Bounds { steps: 1, breaks: 1, ticks: [0, 1], fences: 2, failures: 1, returns: 1, ..NONE },
    ),
    faithful(
        "fence, another life",
        Start::Protected,
        Bounds { steps: 1, breaks: 1, fences: 1, keeps: 1, restarts: 1, ..NONE },
    ),
];

/// What runs with `cargo xtask test --all`: minutes.
pub const LARGE: [Scenario; 19] = [
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
    faithful("two lives", Start::Protected, Bounds { steps: 1, breaks: 1, restarts: 2, ..NONE }),
    faithful("power", Start::Protected, Bounds { steps: 1, breaks: 1, kills: 1, returns: 1, restarts: 1, ..NONE }),
    faithful(
        "two hosts",
        Start::TwoHosts,
        Bounds { steps: 2, breaks: 1, kills: 1, returns: 1, forces: 1, boots: 1, ..NONE },
    ),
    faithful(
        "two hosts, two lives",
        Start::TwoHosts,
        Bounds { steps: 1, breaks: 1, kills: 1, forces: 1, restarts: 1, ..NONE },
    ),
    faithful(
        "two hosts, alone",
        Start::TwoHostsAlone,
        Bounds { steps: 2, kills: 1, returns: 1, forces: 1, boots: 1, restarts: 1, ..NONE },
    ),
    faithful(
        "two hosts, again",
        Start::TwoHostsAgain,
        Bounds { steps: 1, breaks: 1, kills: 2, returns: 2, forces: 1, restarts: 1, ..NONE },
    ),
    faithful("fence", Start::Protected, Bounds { steps: 1, breaks: 1, suspicions: 1, deaths: 1, fences: 1, ..NONE }),
    faithful(
        "fence, two lives",
        Start::Protected,
        Bounds { steps: 1, breaks: 1, restarts: 1, returns: 1, ticks: [0, 1], fences: 2, ..NONE },
    ),
    faithful(
        "fence, more lives",
        Start::Protected,
        Bounds { steps: 1, breaks: 1, restarts: 2, fences: 1, keeps: 1, ..NONE },
    ),
    // Found that a late ask of an earlier life made a node destroy its own guest.
    faithful("second life", Start::Pairing, Bounds { steps: 1, captures: 4, restarts: 1, protects: 1, ..NONE }),
];

const fn mistake(start: Start, bounds: Bounds) -> Scenario {
    faithful("mistake", start, bounds)
}

/// Each mistake, where it is found, and as what.
pub const MISTAKES: [(Wiring, Scenario, Violation); 20] = [
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
    (Wiring::FreeUnread, mistake(Start::Protected, Bounds { steps: 1, restarts: 1, ..NONE }), Violation::BeforeCommit),
    (
        Wiring::FreeFormerLife,
        mistake(Start::Pairing, Bounds { steps: 1, captures: 2, restarts: 1, ..NONE }),
        Violation::BeforeCommit,
    ),
    (
        Wiring::ForgetMark,
        mistake(Start::Protected, Bounds { steps: 2, breaks: 1, restarts: 1, ..NONE }),
        Violation::TwoAudible,
    ),
    (
        Wiring::ForceUnconfirmed,
        mistake(Start::TwoHosts, Bounds { steps: 1, breaks: 1, forces: 1, ..NONE }),
        Violation::BeforeCommit,
    ),
    (Wiring::AnswerUnconfirmed, forced_out(), Violation::BeforeCommit),
    (Wiring::ShowWhileForcing, forced_out(), Violation::BeforeCommit),
    (Wiring::ShowWhileFencing, forced_out(), Violation::BeforeCommit),
    (Wiring::ActivateUnfenced, mistake(Start::Protected, Bounds { breaks: 1, fences: 1, ..NONE }), Violation::Unfenced),
    (
        Wiring::KeptIsEnough,
        mistake(Start::Protected, Bounds { steps: 1, breaks: 1, fences: 2, keeps: 1, restarts: 1, ..NONE }),
        Violation::Forgets,
    ),
];

/// A host that was alone dies, is forced out, and comes back.
const fn forced_out() -> Scenario {
    mistake(Start::TwoHostsAlone, Bounds { steps: 1, kills: 1, returns: 1, forces: 1, boots: 1, ..NONE })
}
