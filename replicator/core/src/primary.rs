//! The primary's machine.

use alloc::string::String;
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Incarnation, Party, VmId};
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::store::{StoreAnswer, StoreRequest};
use heartbeat_core::time::Time;

use crate::message::{CloseCode, PeerMessage, RehearsalResult};
use crate::pacing::{Pacing, Window};
use crate::state::ProtectionState;
use crate::stats::PrimaryStats;

/// How a [`Primary`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrimaryConfig {
    /// The VM, this node, and how the store is asked.
    pub ownership: OwnershipConfig,
    /// The standby, in the life that the hello showed.
    pub standby: Party,
    /// The first epoch's number. Higher than any this agent ever used for this VM; at least 1.
    pub first_epoch: Epoch,
    /// How long epochs last.
    pub pacing: Pacing,
    /// Bound on epochs captured and not acknowledged.
    pub pipeline: usize,
    /// An epoch that is not acknowledged this long after its capture is a suspicion; longer by its size, see `bytes_per_second`.
    pub acknowledge_within: Duration,
    /// The slowest link that is not a suspicion.
    pub bytes_per_second: u64,
    /// Bound on the time from the capture of the first held epoch to the record that names the standby.
    pub pair_within: Duration,
    /// Bound on the time the store may be silent at the start.
    pub start_within: Duration,
    /// How long a planned failover waits for the standby before it takes the VM back.
    pub planned_within: Duration,
    /// How often a failed capture is tried again before protection degrades.
    pub capture_retries: u32,
}

impl PrimaryConfig {
    /// The defaults for a VM.
    #[must_use]
    pub fn new(vm: VmId, me: Party, standby: Party) -> Self {
        Self {
            ownership: OwnershipConfig::new(vm, me),
            standby,
            first_epoch: Epoch(1),
            pacing: Pacing::Auto(crate::pacing::AutoPacing::default()),
            pipeline: 2,
            acknowledge_within: Duration::from_millis(200),
            bytes_per_second: 50_000_000,
            pair_within: Duration::from_secs(5),
            start_within: Duration::from_secs(10),
            planned_within: Duration::from_secs(5),
            capture_retries: 3,
        }
    }
}

/// What a capture brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureReport {
    /// Which epoch was captured.
    pub epoch: Epoch,
    /// When the guest was paused.
    pub paused_at: Time,
    /// The whole pause. `paused_at + pause` is when the guest ran again (or would have, if it stays paused).
    pub pause: Duration,
    /// Dirty pages.
    pub pages: u64,
    /// Bytes of pages and device state, before encoding.
    pub bytes: u64,
    /// Frames that were emitted in this epoch and are held.
    pub held_frames: u64,
    /// When the first of them was emitted.
    pub first_output: Option<Time>,
}

/// What the guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// It shut itself down. `gone`: its process has ended too, nothing can be captured.
    Shutdown {
        /// Whether its process has ended.
        gone: bool,
    },
    /// It rebooted.
    Reset,
    /// Its process has ended without a shutdown.
    Died {
        /// How, in words.
        how: String,
    },
    /// Somebody else paused it.
    Paused,
    /// Somebody else resumed it.
    Resumed,
    /// Its devices or memory are not what they were.
    Changed {
        /// What, in words.
        what: String,
    },
}

/// What an operator asks of a protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// End the protection and leave the guest as it was found.
    Unprotect,
    /// Move the VM to the standby without losing anything.
    Failover,
}

/// What the driver must do, in order. An output is done before the next one is begun, but for what says that it goes on by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send [`PeerMessage::Prepare`] with this generation and the recipe, layout and name that the driver knows.
    Prepare {
        /// The generation that the session's epochs carry.
        generation: Generation,
    },
    /// Begin the initial sync (stop, arm, run, send everything, then rounds), in the background; then [`Primary::handle_synced`].
    Sync,
    /// Wait for the window, pause, capture, and resume unless `stay_paused`; in the background; then
    /// [`Primary::handle_captured`] or [`Primary::handle_capture_failed`]. At most one is under way.
    ///
    /// While paused: if `hold`, `Guest::hold_output(epoch + 1)`, else, if output is being held, `Gate::seal(epoch + 1)`.
    Capture {
        /// The epoch that ends with this capture.
        epoch: Epoch,
        /// Begin to hold output at this capture: what is emitted after it is held.
        hold: bool,
        /// Leave the guest paused: this is its last epoch here.
        stay_paused: bool,
        /// When.
        window: Window,
    },
    /// Encode and send this captured epoch, in the background; then [`Primary::handle_sent`].
    Send {
        /// Which.
        epoch: Epoch,
    },
    /// The captured epoch was not committed and never will be: its pages are dirty again; forget it.
    PutBack {
        /// Which.
        epoch: Epoch,
    },
    /// Output emitted up to the capture of this epoch may leave, in order.
    Release {
        /// Up to which epoch.
        through: Epoch,
    },
    /// All held output may leave, and whatever comes.
    OpenOutput,
    /// Pause the guest and release nothing more: another node may run it. What is held may be dropped.
    Mute,
    /// Let the paused guest run again.
    Resume,
    /// Destroy this guest: it runs elsewhere.
    Fence,
    /// Ask the store; the answer comes by [`Primary::handle_answer`], or never.
    Ask(StoreRequest),
    /// Tell the peer, on the control stream.
    Peer(PeerMessage),
    /// Make this generation durable, then call [`Primary::handle_generation_persisted`].
    PersistGeneration(Generation),
    /// Close the replication connection.
    Close(CloseCode),
    /// Leave the guest as it was found: no gate, no tracking.
    Detach,
    /// Show the operator.
    State {
        /// The state.
        state: ProtectionState,
        /// Why, in words. Empty if there is nothing to say.
        reason: String,
    },
    /// Nothing more comes. The machine may be dropped.
    Finished,
}

/// The machine of one protection on the primary.
#[derive(Debug)]
pub struct Primary {
    config: PrimaryConfig,
    stats: PrimaryStats,
    state: ProtectionState,
}

impl Primary {
    /// A machine that did nothing yet.
    #[must_use]
    pub fn new(config: PrimaryConfig) -> Self {
        Self { config, stats: PrimaryStats::default(), state: ProtectionState::Unprotected }
    }

    /// Begin: the replication connection stands and the standby's hello showed `config.standby`.
    pub fn handle_start(&mut self, _now: Time) {}
    /// Any message of the control stream; calls the `handle_` function that it is for.
    pub fn handle_peer(&mut self, _now: Time, _message: PeerMessage) {}
    /// The standby's twin waits.
    pub fn handle_prepared(&mut self, _now: Time) {}
    /// The standby cannot.
    pub fn handle_refused(&mut self, _now: Time, _reason: &str) {}
    /// Everything was sent once and the rounds are over: epochs can begin.
    pub fn handle_synced(&mut self, _now: Time) {}
    /// The initial sync cannot go on.
    pub fn handle_sync_failed(&mut self, _now: Time, _reason: &str) {}
    /// The capture that was asked for is done.
    pub fn handle_captured(&mut self, _now: Time, _report: CaptureReport) {}
    /// The capture that was asked for failed, and the guest runs; what was harvested has been put back.
    pub fn handle_capture_failed(&mut self, _now: Time, _epoch: Epoch, _retryable: bool, _reason: &str) {}
    /// The whole epoch was handed to the transport.
    pub fn handle_sent(&mut self, _now: Time, _epoch: Epoch) {}
    /// The standby holds all epochs up to this one.
    pub fn handle_acknowledged(&mut self, _now: Time, _g: Generation, _i: Incarnation, _epoch: Epoch) {}
    /// How the rehearsal went.
    pub fn handle_rehearsed(&mut self, _now: Time, _epoch: Epoch, _result: RehearsalResult) {}
    /// An answer of the store.
    pub fn handle_answer(&mut self, _now: Time, _answer: &StoreAnswer) {}
    /// A generation that was output is durable.
    pub fn handle_generation_persisted(&mut self, _now: Time, _generation: Generation) {}
    /// The failure detector suspects the standby's node.
    pub fn handle_peer_suspected(&mut self, _now: Time) {}
    /// The failure detector hears the standby's node again, in the same life.
    pub fn handle_peer_heard(&mut self, _now: Time) {}
    /// The standby's node is in another life: what it held is gone.
    pub fn handle_peer_restarted(&mut self, _now: Time, _incarnation: Incarnation) {}
    /// The replication connection is lost.
    pub fn handle_connection_lost(&mut self, _now: Time, _reason: &str) {}
    /// Something happened to the guest.
    pub fn handle_guest_event(&mut self, _now: Time, _event: GuestEvent) {}
    /// The operator asks. `Err` says why not, and then nothing changed.
    ///
    /// # Errors
    /// One sentence for the operator.
    pub fn handle_operator(&mut self, _now: Time, _ask: Operator) -> Result<(), String> {
        Ok(())
    }
    /// Time has come.
    pub fn handle_timeout(&mut self, _now: Time) {}
    /// When [`Primary::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        None
    }
    /// What to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        None
    }
    /// The state an operator sees.
    #[must_use]
    pub fn state(&self) -> ProtectionState {
        self.state
    }
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> PrimaryStats {
        self.stats
    }
    /// How it works.
    #[must_use]
    pub fn config(&self) -> &PrimaryConfig {
        &self.config
    }
    /// Changes how long epochs last, from the next capture on.
    pub fn set_pacing(&mut self, pacing: Pacing) {
        self.config.pacing = pacing;
    }
}
