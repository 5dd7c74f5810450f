//! What must hold in every state, said without epochs, acknowledgements or asks.
//!
//! Guests are histories: a state is the list of the steps that led to it, each with a number of its own, so that two copies which go on from
//! one state are never in the same one again. A frame is the state that it was emitted in.

use heartbeat_core::ids::NodeId;
use heartbeat_core::record::{Owner, Record};

/// Bits of one step in a [`State`].
const STEP_BITS: u32 = 4;
/// Bound on the steps of one run.
pub const MAX_STEPS: u8 = 15;

/// A state that some guest was in: its steps, the newest in the lowest bits. 0: as it was booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct State(u64);

impl State {
    /// The guest goes on by step `number` of the run.
    ///
    /// # Panics
    /// If it is none of 1 to [`MAX_STEPS`], or the history is full.
    #[must_use]
    pub fn step(self, number: u8) -> Self {
        assert!((1..=MAX_STEPS).contains(&number) && self.0.leading_zeros() >= STEP_BITS, "too many steps");
        Self(self.0 << STEP_BITS | u64::from(number))
    }

    /// Whether `earlier` is this state or in its history.
    #[must_use]
    pub fn remembers(self, earlier: Self) -> bool {
        let mut at = self.0;
        while at != earlier.0 && at != 0 {
            at >>= STEP_BITS;
        }
        at == earlier.0
    }
}

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    /// Two frames were heard of which neither remembers the other (`docs/protocol.md` P3).
    TwoAudible,
    /// A frame was heard that only its sender remembers, and the record may let another node run (P1).
    BeforeCommit,
    /// A copy was activated that does not remember what was heard (P4).
    Forgets,
    /// The store said something and after a restart knows nothing of it (P8).
    VoteForgotten,
    /// A node destroyed a copy and none is left, though no fault took the other (P5).
    NoCopy,
    /// A node destroyed a copy that the record may name (P5, P9).
    Destroyed,
    /// A copy was let run where fencing is required, and the other node's ran (P15).
    Unfenced,
}

/// Each violation and what it is called.
pub const PROPERTIES: [(Violation, &str); 7] = [
    (Violation::TwoAudible, "never two audible copies"),
    (Violation::BeforeCommit, "no output before commit"),
    (Violation::Forgets, "who takes over remembers every released output"),
    (Violation::VoteForgotten, "the witness never forgets a vote"),
    (Violation::NoCopy, "no step leaves the world without a copy"),
    (Violation::Destroyed, "no copy is destroyed that the record may name"),
    (Violation::Unfenced, "where fencing is required no copy runs beside one that runs"),
];

/// The checks of one run. They keep the first violation.
#[derive(Clone, Debug, Default, Hash)]
pub struct Checker {
    /// The newest state that was heard; every heard state is in its history.
    newest: Option<State>,
    /// The newest record that the store showed anybody.
    shown: Option<Record>,
    /// What was broken first.
    pub violation: Option<Violation>,
}

impl Checker {
    /// Keeps a violation, if it is the first.
    pub fn broken(&mut self, what: Violation) {
        self.violation = self.violation.or(Some(what));
    }

    /// A frame emitted in `state` is heard. `alone`: the durable record lets no other node run. `other`: what the other node holds.
    pub fn heard(&mut self, state: State, alone: bool, other: Option<State>) {
        if !alone && !other.is_some_and(|held| held.remembers(state)) {
            self.broken(Violation::BeforeCommit);
        }
        match self.newest {
            Some(newest) if newest.remembers(state) => {}
            Some(newest) if !state.remembers(newest) => self.broken(Violation::TwoAudible),
            _ => self.newest = Some(state),
        }
    }

    /// A copy begins to run in `state`.
    pub fn runs(&mut self, state: State) {
        if self.newest.is_some_and(|newest| !state.remembers(newest)) {
            self.broken(Violation::Forgets);
        }
    }

    /// The VM goes on from here, whatever was heard of it. Whether something is lost by that.
    pub fn goes_on_from(&mut self, state: State) -> bool {
        let lost = self.newest.is_some_and(|newest| !state.remembers(newest));
        if lost {
            self.newest = None;
        }
        lost
    }

    /// The store tells somebody of this record.
    pub fn shows(&mut self, record: Option<Record>) {
        if record.map(|record| record.revision) > self.shown.map(|record| record.revision) {
            self.shown = record;
        }
    }

    /// The store restarted and found this record.
    pub fn found(&mut self, record: Option<Record>) {
        let newer = record.map(|record| record.revision) > self.shown.map(|record| record.revision);
        if !newer && record != self.shown {
            self.broken(Violation::VoteForgotten);
        }
    }
}

/// Whether the durable record lets no other node run than the one that `is_node` knows.
#[must_use]
pub fn may_only_run_on(owner: Option<&Owner>, is_node: impl Fn(NodeId) -> bool) -> bool {
    match owner {
        None => true,
        Some(Owner::Solo { node, .. } | Owner::Stopped { node }) => is_node(node.node),
        Some(Owner::Paired { .. }) => false,
    }
}
