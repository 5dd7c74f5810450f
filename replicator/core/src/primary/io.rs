//! What goes into a [`super::Primary`] and what comes out.

use alloc::string::String;
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Party, VmId};
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::store::StoreRequest;
use heartbeat_core::time::Time;

use crate::message::{CloseCode, PeerMessage};
use crate::pacing::{Pacing, Window};
use crate::state::ProtectionState;

/// How a [`Primary`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// The slowest way of an epoch that is not a suspicion: it is encoded, sent, checked and staged.
    pub bytes_per_second: u64,
    /// Bound on the time from the capture of the first held epoch to the record that names the standby.
    pub pair_within: Duration,
    /// Bound on the time the store may be silent at the start.
    pub start_within: Duration,
    /// How long a planned failover waits for the standby before it takes the VM back.
    pub planned_within: Duration,
    /// How often a failed capture is tried again before protection degrades.
    pub capture_retries: u32,
    /// A guest whose capture is not over this long after its moment is frozen.
    pub frozen_after: Duration,
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
            frozen_after: Duration::from_secs(3),
        }
    }
}

/// What a capture brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// End the protection and leave the guest as it was found.
    Unprotect,
    /// Move the VM to the standby without losing anything.
    Failover,
    /// Prove again that the standby's copy loads.
    Rehearse,
}

/// What the driver must do, in order. An output is done before the next one is begun, but for what says that it goes on by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
    /// A capture under way that did not pause the guest yet is not wanted: report it as failed and retryable. One that did, ends as
    /// always.
    Cancel,
    /// Encode and send this captured epoch, in the background.
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
    /// Pause the guest, and let it stay paused at the end of a capture under way; release nothing more: another node may run it.
    /// What is held may be dropped. [`Output::Resume`] and [`Output::OpenOutput`] may follow if it is given back.
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
