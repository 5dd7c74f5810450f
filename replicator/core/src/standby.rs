//! The standby's machine.

use alloc::string::String;
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Incarnation, Party, VmId};
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::store::{StoreAnswer, StoreRequest};
use heartbeat_core::time::Time;

use crate::message::{CloseCode, PeerMessage, RehearsalResult};
use crate::state::ProtectionState;
use crate::stats::StandbyStats;

/// How a [`Standby`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyConfig {
    /// The VM, this node, and how the store is asked.
    pub ownership: OwnershipConfig,
    /// The primary, in the life that the hello showed.
    pub primary: Party,
    /// The session's generation, from the prepare message.
    pub generation: Generation,
}

impl StandbyConfig {
    /// The defaults for a VM.
    #[must_use]
    pub fn new(vm: VmId, me: Party, primary: Party, generation: Generation) -> Self {
        Self { ownership: OwnershipConfig::new(vm, me), primary, generation }
    }
}

/// What the driver must do, in order. An output is done before the next one is begun, but for what says that it goes on by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Make durable "activating this generation at this epoch", then call [`Standby::handle_marked`].
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
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Why the standby suspects its primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// No heartbeats.
    Silent,
    /// The replication connection is lost.
    ConnectionLost,
    /// Its node is in another life.
    Restarted,
}

/// The machine of one protection on the standby.
#[derive(Debug)]
pub struct Standby {
    config: StandbyConfig,
    stats: StandbyStats,
    state: ProtectionState,
}

impl Standby {
    /// A machine that did nothing yet; the driver builds the twin.
    #[must_use]
    pub fn new(config: StandbyConfig) -> Self {
        Self { config, stats: StandbyStats::default(), state: ProtectionState::Pairing }
    }
    /// The twin waits.
    pub fn handle_prepared(&mut self, _now: Time) {}
    /// The twin cannot be built.
    pub fn handle_prepare_failed(&mut self, _now: Time, _reason: &str) {}
    /// Any message of the control stream.
    pub fn handle_peer(&mut self, _now: Time, _message: PeerMessage) {}
    /// A whole epoch was received, checked and staged. `incarnation` is the primary's, from the epoch's header.
    pub fn handle_staged(&mut self, _now: Time, _g: Generation, _i: Incarnation, _epoch: Epoch) {}
    /// How the rehearsal went.
    pub fn handle_rehearsed(&mut self, _now: Time, _result: RehearsalResult) {}
    /// An answer of the store.
    pub fn handle_answer(&mut self, _now: Time, _answer: &StoreAnswer) {}
    /// A generation that was output is durable.
    pub fn handle_generation_persisted(&mut self, _now: Time, _generation: Generation) {}
    /// The mark is durable.
    pub fn handle_marked(&mut self, _now: Time, _generation: Generation) {}
    /// How the activation went.
    pub fn handle_activated(&mut self, _now: Time, _result: ActivationResult) {}
    /// The primary is suspected.
    pub fn handle_suspected(&mut self, _now: Time, _why: Suspicion) {}
    /// The failure detector hears the primary's node again, in the same life.
    pub fn handle_peer_heard(&mut self, _now: Time) {}
    /// The twin has ended before it was activated. It is launched again by the activation; only shown.
    pub fn handle_twin_died(&mut self, _now: Time) {}
    /// The operator asks to fail over to this node now.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_failover(&mut self, _now: Time) -> Result<(), String> {
        Ok(())
    }
    /// The operator asks to prove that the copy loads.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_rehearse(&mut self, _now: Time) -> Result<(), String> {
        Ok(())
    }
    /// The operator asks to throw a copy away that is kept for nobody.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_discard(&mut self, _now: Time) -> Result<(), String> {
        Ok(())
    }
    /// Time has come.
    pub fn handle_timeout(&mut self, _now: Time) {}
    /// When [`Standby::handle_timeout`] wants to be called.
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
    /// The last epoch that was acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> Option<Epoch> {
        None
    }
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> StandbyStats {
        self.stats
    }
    /// How it works.
    #[must_use]
    pub fn config(&self) -> &StandbyConfig {
        &self.config
    }
}
