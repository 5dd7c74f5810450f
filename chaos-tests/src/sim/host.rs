//! A simulated host: its guest, gate and agent.

use std::collections::{BTreeMap, VecDeque};

use heartbeat_core::detector::{Detector, DetectorConfig};
use heartbeat_core::ids::{Epoch, Generation, Incarnation, NodeId, Party};
use heartbeat_core::time::Time;
use replicator_core::pacing::Window;
use replicator_core::primary::Primary;
use replicator_core::restart::Restart;
use replicator_core::standby::Standby;

use super::history::State;

/// The first wait before a guest is protected again, in milliseconds.
pub(super) const FIRST_WAIT: u64 = 50;

/// A virtual machine.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) state: State,
    /// Its vCPUs run, as far as the agent is concerned.
    pub(super) running: bool,
    /// Somebody else paused it.
    pub(super) stopped: bool,
    /// It stands still until then and answers nobody; its agent does not know.
    pub(super) frozen_until: Time,
}

impl Guest {
    pub(super) fn running(state: State) -> Self {
        Self { state, running: true, stopped: false, frozen_until: Time::ZERO }
    }

    /// Whether its vCPUs run.
    pub(super) fn runs(&self, now: Time) -> bool {
        self.running && !self.stopped && self.frozen_until <= now
    }
}

/// Frames that wait, with the epoch they are tagged with.
#[derive(Debug, Default)]
pub(super) struct Gate {
    pub(super) holding: bool,
    /// The tag of what comes.
    pub(super) epoch: Epoch,
    pub(super) held: VecDeque<(Epoch, State)>,
    /// Only [`super::options::Wiring::HoldLate`] looks at it.
    pub(super) begin_late: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Capture {
    pub(super) epoch: Epoch,
    pub(super) hold: bool,
    pub(super) stay_paused: bool,
    pub(super) window: Window,
    /// The state that was captured and when, once the guest was paused.
    pub(super) begun: Option<(State, Time)>,
}

/// A copy on the disk of a host that waits for its fence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) grant: Generation,
    pub(super) epoch: Epoch,
    pub(super) state: State,
    /// Of the session that it came by.
    pub(super) session: Generation,
    pub(super) primary: Party,
    /// When it was noted, by [`Host::boots`].
    pub(super) boot: u64,
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) alive: bool,
    /// How often it was off.
    pub(super) boots: u64,
    pub(super) incarnation: Incarnation,
    /// The whole host stands still until then.
    pub(super) frozen_until: Time,
    /// The agent stands still until then.
    pub(super) agent_frozen_until: Time,
    pub(super) guest: Option<Guest>,
    pub(super) gate: Gate,
    pub(super) primary: Option<Primary>,
    pub(super) standby: Option<Standby>,
    /// Of a new life of the agent, until it knows what it may do with what it found.
    pub(super) restart: Option<Restart>,
    /// Durable: the last grant by which a twin may have been let run.
    pub(super) marked: Option<Generation>,
    /// Durable. It goes when another one takes its place, and not before: nothing relies on that.
    pub(super) kept: Option<Kept>,
    /// It is gone on with.
    pub(super) resumed: bool,
    /// Durable: this host ran the VM last, or was its primary.
    pub(super) had_guest: bool,
    /// The operator ended the protection: it is not taken up again.
    pub(super) unprotected: bool,
    /// How long the next try to protect the guest again waits, in milliseconds.
    pub(super) patience: u64,
    /// The first request id of the next machine.
    pub(super) next_request: u64,
    pub(super) next_epoch: Epoch,
    pub(super) generation: Generation,
    pub(super) detector: Detector,
    pub(super) suspects: bool,
    pub(super) checks: bool,
    pub(super) capture: Option<Capture>,
    /// Captured and not acknowledged, by epoch.
    pub(super) captured: BTreeMap<Epoch, State>,
    /// As a standby: whole epochs.
    pub(super) staged: BTreeMap<Epoch, State>,
    /// Told to mute: a capture that ends leaves the guest paused.
    pub(super) muted: bool,
    /// The primary's machine was told that its guest shut down.
    pub(super) told_shutdown: bool,
    /// The state that its running copy began from.
    pub(super) activated_from: Option<State>,
    /// It destroyed its guest itself.
    pub(super) destroyed: bool,
    /// Only the wiring's mutants look at these.
    pub(super) asking_since: Option<Time>,
    pub(super) asked: u64,
}

impl Host {
    pub(super) fn new(guest: Option<Guest>) -> Self {
        Self {
            alive: true,
            boots: 0,
            incarnation: Incarnation(1),
            frozen_until: Time::ZERO,
            agent_frozen_until: Time::ZERO,
            guest,
            gate: Gate::default(),
            primary: None,
            standby: None,
            restart: None,
            marked: None,
            kept: None,
            resumed: false,
            had_guest: false,
            unprotected: false,
            patience: FIRST_WAIT,
            next_request: 1,
            next_epoch: Epoch(1),
            generation: Generation(0),
            detector: Detector::new(DetectorConfig::default()),
            suspects: false,
            checks: false,
            capture: None,
            captured: BTreeMap::new(),
            staged: BTreeMap::new(),
            muted: false,
            told_shutdown: false,
            activated_from: None,
            destroyed: false,
            asking_since: None,
            asked: 0,
        }
    }

    /// Ids for one more machine: none is used twice.
    pub(super) fn take_requests(&mut self) -> u64 {
        let first = self.next_request;
        self.next_request += 1 << 32;
        first
    }
}

/// The name of a host.
pub(super) fn node(host: usize) -> NodeId {
    NodeId([u8::try_from(host + 1).expect("two hosts"); 16])
}

pub(super) fn party(host: usize, incarnation: Incarnation) -> Party {
    Party { node: node(host), incarnation }
}
