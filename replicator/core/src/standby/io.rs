//! What goes into a [`super::Standby`] and what comes out.

use alloc::string::String;
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Incarnation, Party, VmId};
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::store::StoreRequest;

use crate::message::{CloseCode, PeerMessage};
use crate::state::ProtectionState;

/// How a [`Standby`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StandbyConfig {
    /// The VM, this node, and how the store is asked.
    pub ownership: OwnershipConfig,
    /// The primary, in the life that the hello showed.
    pub primary: Party,
    /// The session's generation, from the prepare message.
    pub generation: Generation,
    /// A grant is not enough: the copy runs only once the primary's host is confirmed to be off (`docs/protocol.md` P15).
    pub fence_required: bool,
}

impl StandbyConfig {
    /// The defaults for a VM.
    #[must_use]
    pub fn new(vm: VmId, me: Party, primary: Party, generation: Generation) -> Self {
        Self { ownership: OwnershipConfig::new(vm, me), primary, generation, fence_required: false }
    }
}

/// What the driver must do, in order. An output is done before the next one is begun, but for what says that it goes on by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Mark the staged epoch as committed; applying it goes on in the background, in order, and waits while a rehearsal runs.
    Commit {
        /// Which.
        epoch: Epoch,
    },
    /// Tell the primary that this epoch and all before are held ([`PeerMessage::Acknowledge`]).
    Acknowledge {
        /// The session's generation.
        generation: Generation,
        /// This node's life.
        incarnation: Incarnation,
        /// Which epoch.
        epoch: Epoch,
    },
    /// Throw this staged epoch away.
    Discard {
        /// Which.
        epoch: Epoch,
    },
    /// Prove that the state as of this committed epoch loads, in the background; then [`Standby::handle_rehearsed`].
    Rehearse {
        /// Which.
        epoch: Epoch,
    },
    /// Ask the store; the answer comes by [`Standby::handle_answer`], or never.
    Ask(StoreRequest),
    /// Tell the peer, on the control stream, if it still stands.
    Peer(PeerMessage),
    /// Make this generation durable, then call [`Standby::handle_generation_persisted`].
    PersistGeneration(Generation),
    /// Make durable "activating this generation at this epoch", and with it that this generation was seen, then call [`Standby::handle_marked`].
    Mark {
        /// The generation of the grant.
        generation: Generation,
        /// The epoch to go on from.
        epoch: Epoch,
    },
    /// Finish applying up to this epoch, throw away what was staged after it, load and run, in the background; then [`Standby::handle_activated`].
    Activate {
        /// The last epoch that was acknowledged.
        epoch: Epoch,
    },
    /// Have the primary's host switched off, in the background; then [`Standby::handle_switched_off`].
    SwitchOff,
    /// Make the copy as of this epoch durable and note it with this grant, in the background; then [`Standby::handle_kept`]. Whatever comes
    /// of it, and whenever, is safe: who finds it goes by the record ([`crate::restart::Here::Kept`]).
    Keep {
        /// The grant's.
        generation: Generation,
        /// The last epoch that was acknowledged.
        epoch: Epoch,
    },
    /// Let the running twin go on as an ordinary guest.
    Release,
    /// Destroy the twin and everything staged.
    Destroy,
    /// Close the replication connection.
    Close(CloseCode),
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

/// How an activation went, as the driver reports it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ActivationResult {
    /// The guest runs here.
    Runs {
        /// Loading the device state.
        load: Duration,
        /// From there until the guest ran.
        resume: Duration,
    },
    /// It does not, it is confirmed that it does not, and the copy is unharmed.
    Fails {
        /// Why, in words.
        reason: String,
    },
}

/// What came of [`Output::SwitchOff`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SwitchedOff {
    /// The primary's host is off.
    Confirmed,
    /// It is not known to be off. Nothing that was begun for it can switch it off any more.
    Unconfirmed {
        /// Why, in words.
        reason: String,
    },
}

/// Why the standby suspects its primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suspicion {
    /// No heartbeats.
    Silent,
    /// The replication connection is lost.
    ConnectionLost,
    /// Its node is in another life.
    Restarted,
    /// Its node says that the guest died or does not answer.
    GuestLost,
}
