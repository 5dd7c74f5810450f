//! The standby's machine: from the twin to the grant.
//!
//! It commits and acknowledges whole epochs, in order, until it has read its grant, and never after; then it goes on from the last
//! epoch that it acknowledged (`docs/protocol.md` P4). It asks for the grant only when the record names it in this very
//! session, which happens only after it acknowledged the first epoch that the primary held (P10).

mod fencing;
mod io;
#[cfg(test)]
mod tests;

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use core::hash::{Hash, Hasher};

use heartbeat_core::ids::{Epoch, Generation, Incarnation, Party, StoreId};
use heartbeat_core::ownership::{Ownership, OwnershipOutput, Verdict, Want};
use heartbeat_core::store::StoreAnswer;
use heartbeat_core::time::Time;

pub use self::io::{ActivationResult, Output, StandbyConfig, Suspicion, SwitchedOff};

use self::fencing::{Again, Kept, Safe};

use crate::message::{CloseCode, PeerMessage, RehearsalResult, clip};
use crate::state::ProtectionState;
use crate::stats::StandbyStats;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// The driver builds the twin.
    Preparing,
    /// Pages and epochs come in.
    Receiving,
    /// Asks for the grant, or for what the record says. Goes back to receiving if `recoverable` and the peer is heard again.
    Asking {
        recoverable: bool,
    },
    /// The grant was read; the primary's host must be off before anything else.
    Fencing {
        generation: Generation,
        /// When it is tried again; `None` while it is being switched off.
        again: Option<Again>,
    },
    /// The grant was read; the mark is being made durable.
    Marking {
        generation: Generation,
    },
    Activating {
        generation: Generation,
    },
    /// The activation failed, and nobody else has a copy: it is tried again.
    Failed {
        generation: Generation,
        again: Again,
    },
    /// The guest runs here; the record shall say so.
    Announcing,
    /// The activation failed; the record shall name the primary again.
    GivingBack,
    /// The primary owns the VM alone: the copy is kept as it is.
    Frozen,
    Finished,
}

/// The machine of one protection on the standby.
///
/// Order of calls: the driver builds the twin and reports [`Standby::handle_prepared`]; then any `handle_*` as things happen, each with a `now`
/// that never goes back; after each, [`Standby::poll_output`] until it is `None`, doing what it says in order; then arrange for
/// [`Standby::handle_timeout`] at [`Standby::poll_timeout`]. After [`Output::Finished`] inputs are ignored.
#[derive(Clone, Debug)]
pub struct Standby {
    config: StandbyConfig,
    ownership: Ownership,
    phase: Phase,
    /// The first epoch that the primary holds output for, once it said so.
    binding: Option<Epoch>,
    acknowledged: Option<Epoch>,
    connected: bool,
    /// Since when it is not.
    lost_at: Option<Time>,
    silent: bool,
    /// Why the primary's guest does not run, once that is known for good.
    safe: Option<Safe>,
    /// The primary's agent is in another life.
    restarted: bool,
    /// It was heard, in this life, since the grant.
    heard_since_grant: bool,
    /// What is tried again and again failed so often.
    tries: u32,
    /// Whether the copy would be there for another life of this agent.
    kept: Kept,
    /// The primary said that its protection ends.
    told_unprotect: bool,
    /// This host can hold no further epoch.
    failed: bool,
    /// An ask for the grant was sent and may still be applied.
    asked: bool,
    /// [`Output::Finished`] was output.
    finished: bool,
    rehearsing: Option<Rehearsing>,
    /// The first epoch that was rehearsed well.
    rehearsed: Option<Epoch>,
    outputs: VecDeque<Output>,
    /// [`Output::Finished`] was taken: nothing is said any more.
    over: bool,
    shown: (ProtectionState, String),
    stats: StandbyStats,
}

#[derive(Clone, Copy, Debug, Hash)]
struct Rehearsing {
    /// What the primary calls it.
    epoch: Epoch,
}

/// What decides how it goes on; counters and what is shown are left out. For checkers that explore states.
impl Hash for Standby {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { config, ownership, phase, binding, acknowledged, connected, lost_at, silent, .. } = self;
        (config, ownership, phase, binding, acknowledged, connected, lost_at, silent).hash(state);
        let Self { safe, restarted, heard_since_grant, tries, kept, .. } = self;
        (safe, restarted, heard_since_grant, tries, kept).hash(state);
        let Self { told_unprotect, failed, asked, finished, rehearsing, rehearsed, outputs, over, .. } = self;
        (told_unprotect, failed, asked, finished, rehearsing, rehearsed, outputs, over).hash(state);
    }
}

impl Standby {
    /// A machine that did nothing yet; the driver builds the twin.
    ///
    /// # Panics
    /// If the primary is this node.
    #[must_use]
    pub fn new(config: StandbyConfig) -> Self {
        assert!(config.primary.node != config.ownership.me.node, "a node cannot stand by for itself");
        Self {
            config,
            ownership: Ownership::new(config.ownership),
            phase: Phase::Preparing,
            binding: None,
            acknowledged: None,
            connected: true,
            lost_at: None,
            silent: false,
            safe: None,
            restarted: false,
            heard_since_grant: false,
            tries: 0,
            kept: Kept::No,
            told_unprotect: false,
            failed: false,
            asked: false,
            finished: false,
            rehearsing: None,
            rehearsed: None,
            outputs: VecDeque::new(),
            over: false,
            shown: (ProtectionState::Pairing, String::new()),
            stats: StandbyStats::default(),
        }
    }

    /// The twin waits.
    pub fn handle_prepared(&mut self, now: Time) {
        if self.phase == Phase::Preparing {
            self.phase = Phase::Receiving;
            self.show(ProtectionState::Syncing, "receives the memory");
            self.tell(PeerMessage::Prepared);
        }
        self.advance(now);
    }

    /// The twin cannot be built, and nothing was left behind.
    pub fn handle_prepare_failed(&mut self, now: Time, reason: &str) {
        if self.phase == Phase::Preparing {
            self.tell(PeerMessage::Refused { reason: clip(reason) });
            self.show(ProtectionState::Error, reason);
            self.phase = Phase::Finished;
        }
        self.advance(now);
    }

    /// Any message of the control stream.
    pub fn handle_peer(&mut self, now: Time, message: PeerMessage) {
        match message {
            PeerMessage::Rehearse { epoch } => {
                if self.rehearsing.is_none() && self.acknowledged.is_some() && self.may_acknowledge() {
                    self.rehearse(epoch);
                } else {
                    self.tell(PeerMessage::Rehearsed { epoch, result: RehearsalResult::Busy });
                }
            }
            PeerMessage::Binding { epoch } => self.binding = self.binding.or(Some(epoch)),
            PeerMessage::GuestDied { how, ended } => {
                if ended {
                    self.primary_stands();
                }
                self.suspect(now, false, &how);
            }
            PeerMessage::Planned { epoch } => {
                self.primary_stands();
                // Only a copy of exactly the state in which the guest stands loses nothing.
                if self.acknowledged == Some(epoch) {
                    self.suspect(now, false, "a planned failover");
                }
            }
            PeerMessage::Unprotect => {
                self.told_unprotect = true;
                if matches!(self.phase, Phase::Preparing | Phase::Receiving | Phase::Asking { .. } | Phase::Frozen) {
                    self.ownership.want(now, Want::Follow);
                }
            }
            PeerMessage::Status { .. } => {}
            PeerMessage::Hello { .. }
            | PeerMessage::Prepare { .. }
            | PeerMessage::Prepared
            | PeerMessage::Refused { .. }
            | PeerMessage::Acknowledge { .. }
            | PeerMessage::Rehearsed { .. }
            | PeerMessage::Rehearsing { .. } => self.peer_fault(now, "the primary sent what only a standby sends"),
        }
        self.advance(now);
    }

    /// A whole epoch was received, checked and staged. `generation` and `incarnation` are the session's and the primary's, from
    /// the epoch's header.
    pub fn handle_staged(&mut self, now: Time, generation: Generation, incarnation: Incarnation, epoch: Epoch) {
        let of_this_session = generation == self.config.generation && incarnation == self.config.primary.incarnation;
        let in_order = epoch < Epoch::BOUND && self.acknowledged.is_none_or(|last| epoch == last.next());
        if !of_this_session || self.failed || !self.may_acknowledge() || !in_order {
            self.stats.discarded += 1;
            self.outputs.push_back(Output::Discard { epoch });
            if of_this_session && !self.failed && !in_order {
                self.peer_fault(now, "the primary sent an epoch out of order");
            }
        } else {
            self.acknowledged = Some(epoch);
            self.stats.committed += 1;
            self.stats.acknowledged += 1;
            self.outputs.push_back(Output::Commit { epoch });
            let incarnation = self.config.ownership.me.incarnation;
            self.outputs.push_back(Output::Acknowledge { generation, incarnation, epoch });
            if self.is_bound() && self.ownership.wanted() == Want::Nothing && !self.is_named() {
                // Knowing the record beforehand saves a round trip at the failover.
                self.ownership.want(now, Want::Follow);
            }
        }
        self.advance(now);
    }

    /// This host can hold no further epoch, such as when a disk is full: nothing more is acknowledged and the primary is told, so
    /// that it goes on alone. What was acknowledged is still held; if the primary is lost all the same, it is activated.
    pub fn handle_failed(&mut self, now: Time, reason: &str) {
        if !core::mem::replace(&mut self.failed, true) {
            self.tell(PeerMessage::Refused { reason: clip(reason) });
            self.show(ProtectionState::Error, reason);
        }
        self.advance(now);
    }

    /// How the rehearsal went.
    pub fn handle_rehearsed(&mut self, now: Time, result: RehearsalResult) {
        if let Some(rehearsing) = self.rehearsing.take() {
            if matches!(result, RehearsalResult::Loads { .. }) {
                self.stats.rehearsals += 1;
                self.rehearsed = self.rehearsed.or(self.acknowledged);
            }
            // The primary decides what a failed one means; it gets the operator's too.
            self.tell(PeerMessage::Rehearsed { epoch: rehearsing.epoch, result });
        }
        self.advance(now);
    }

    /// An answer of the store.
    pub fn handle_answer(&mut self, now: Time, answer: &StoreAnswer) {
        self.ownership.handle_answer(now, answer);
        self.advance(now);
    }

    /// A generation that was output is durable.
    pub fn handle_generation_persisted(&mut self, now: Time, generation: Generation) {
        self.ownership.handle_generation_persisted(now, generation);
        self.advance(now);
    }

    /// The mark is durable (`docs/protocol.md` P8).
    pub fn handle_marked(&mut self, now: Time, generation: Generation) {
        if self.phase == (Phase::Marking { generation }) {
            self.ownership.handle_generation_persisted(now, generation);
            self.activate(generation);
        }
        self.advance(now);
    }

    /// How the activation went.
    pub fn handle_activated(&mut self, now: Time, result: ActivationResult) {
        if let Phase::Activating { generation } = self.phase {
            match result {
                ActivationResult::Runs { .. } => {
                    self.phase = Phase::Announcing;
                    self.show(ProtectionState::Degraded, "the VM runs here, alone");
                    self.ownership.want(now, Want::Activated);
                }
                ActivationResult::Fails { reason } if self.safe == Some(Safe::HostIsOff) => {
                    self.activation_failed(now, generation, &reason);
                }
                ActivationResult::Fails { reason } => {
                    self.phase = Phase::GivingBack;
                    let reason = format!(
                        "the activation failed: {reason}. The copy is kept and the VM is given back to the primary"
                    );
                    self.show(ProtectionState::Error, &reason);
                    self.ownership.want(now, Want::GiveBack);
                }
            }
        }
        self.advance(now);
    }

    /// The primary is suspected.
    pub fn handle_suspected(&mut self, now: Time, why: Suspicion) {
        match why {
            Suspicion::Silent => {
                self.silent = true;
                self.suspect(now, true, "the primary is silent");
            }
            Suspicion::ConnectionLost => {
                self.disconnect(now);
                self.suspect(now, false, "the replication connection is lost");
            }
            Suspicion::GuestLost => self.suspect(now, false, "the primary reports that its guest is lost"),
            Suspicion::Restarted => {
                self.disconnect(now);
                self.restarted = true;
                self.suspect(now, false, "the primary's agent restarted");
            }
        }
        self.advance(now);
    }

    /// The failure detector hears the primary's node again, in the same life.
    pub fn handle_peer_heard(&mut self, now: Time) {
        self.silent = false;
        if self.phase == (Phase::Asking { recoverable: true }) && self.connected {
            // The ask may still be applied: the record is followed until it is another one (P6).
            self.phase = Phase::Receiving;
            self.ownership.want(now, Want::Follow);
            if self.is_named() {
                self.show(ProtectionState::Protected, "the primary is heard again");
            }
        }
        self.primary_lives(now);
        self.advance(now);
    }

    /// The operator asks to fail over to this node now. What the primary emitted is never lost by it; what it still holds is.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_failover(&mut self, now: Time) -> Result<(), String> {
        if !self.may_acknowledge() || !self.is_bound() {
            return Err("this host holds no whole copy that it may activate".into());
        }
        self.suspect(now, false, "the operator asked for it");
        self.advance(now);
        Ok(())
    }

    /// Whether this copy could be the VM's if the primary's host were known to be dead (`docs/protocol.md` P13).
    ///
    /// # Errors
    /// One sentence for the operator: why not.
    pub fn may_be_forced(&self) -> Result<(), &'static str> {
        match self.phase {
            _ if self.told_unprotect => Err("the primary ended this protection: this copy is of no use"),
            Phase::Asking { .. } if self.is_named() && self.is_bound() => Ok(()),
            Phase::Frozen if self.is_bound() => Ok(()),
            Phase::Preparing | Phase::Asking { .. } | Phase::Frozen => {
                Err("this host holds no copy of which it knows that the VM was protected by it")
            }
            Phase::Receiving => Err("the primary answers: move the VM with --planned"),
            // It waits for just that.
            Phase::Fencing { .. } => Ok(()),
            Phase::Failed { .. } => Err("the primary's host is off already, and this copy could not be activated yet"),
            Phase::Marking { .. } | Phase::Activating { .. } | Phase::Announcing => Err("this copy is the VM already"),
            Phase::GivingBack => Err("this copy could not be activated"),
            Phase::Finished => Err("this copy is gone"),
        }
    }

    /// The primary's host is dead, as was confirmed, and the record names this node alone, durably, in `store`: see
    /// [`Ownership::handle_forced`].
    pub fn handle_forced(&mut self, now: Time, store: StoreId) {
        // A last word of the dead host may have come after its operator was told that it may be forced: what is durable goes on all the same.
        let heard_again = self.phase == Phase::Receiving && self.is_named() && self.is_bound() && !self.told_unprotect;
        self.safe = Some(Safe::HostIsOff);
        if heard_again || self.may_be_forced().is_ok() {
            self.disconnect(now);
            if self.phase != Phase::Frozen {
                self.phase = Phase::Asking { recoverable: false };
            }
            self.asked = true;
            self.show(ProtectionState::FailingOver, "the operator forced it: the primary's host is confirmed dead");
            self.ownership.handle_forced(now, store);
            self.ownership.want(now, Want::Solo { activated: false });
        } else if matches!(
            self.phase,
            Phase::Marking { .. } | Phase::Activating { .. } | Phase::Failed { .. } | Phase::Announcing
        ) {
            // It had won already when that became durable. Where the record goes on is where it says that the VM runs here.
            self.ownership.handle_forced(now, store);
        }
        self.advance(now);
    }

    /// The operator asks to prove that the copy loads; the primary hears how it went.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_rehearse(&mut self, now: Time) -> Result<(), String> {
        if self.rehearsing.is_some() {
            return Err("a rehearsal is under way already".into());
        }
        let Some(epoch) = self.acknowledged.filter(|_| self.may_acknowledge()) else {
            return Err("this host holds no whole copy that could be rehearsed".into());
        };
        self.tell(PeerMessage::Rehearsing { epoch });
        self.rehearse(epoch);
        self.advance(now);
        Ok(())
    }

    /// The operator asks to throw a copy away that is kept for nobody.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_discard(&mut self, now: Time) -> Result<(), String> {
        // What was read while the primary was still there may be older than its ask for the pair.
        let read_since = self.lost_at.is_some_and(|lost| self.ownership.stats().last_answer > Some(lost));
        let never_named = !self.connected && self.may_acknowledge() && !self.is_named() && !self.asked;
        if self.phase != Phase::Frozen && !never_named {
            return Err("this copy may be needed: end the protection on the primary instead".into());
        }
        if self.phase != Phase::Frozen && self.may_be_named() && !read_since {
            return Err(
                "the record may name this copy, and the witness did not answer since the primary was lost: bring the witness back first"
                    .into(),
            );
        }
        self.destroy("the operator threw the copy away");
        self.advance(now);
        Ok(())
    }

    /// Time has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.ownership.handle_timeout(now);
        self.try_again(now);
        self.advance(now);
    }

    /// When [`Standby::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if self.phase == Phase::Finished {
            return None;
        }
        [self.ownership.poll_timeout(), self.tries_again_at()].into_iter().flatten().min()
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        let output = self.outputs.pop_front().filter(|_| !self.over)?;
        self.over = output == Output::Finished;
        Some(output)
    }

    /// The state an operator sees, and why.
    #[must_use]
    pub fn state(&self) -> (ProtectionState, &str) {
        (self.shown.0, &self.shown.1)
    }

    /// The last epoch that was acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> Option<Epoch> {
        self.acknowledged
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

    /// This node's side of the record.
    #[must_use]
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// The primary said that the protection ends: its silence is no failure any more.
    #[must_use]
    pub fn is_told_to_end(&self) -> bool {
        self.told_unprotect
    }

    /// Whether the grant, or that the primary goes alone, was not read yet (P4).
    fn may_acknowledge(&self) -> bool {
        matches!(self.phase, Phase::Receiving | Phase::Asking { .. })
    }

    /// A whole copy is here that the primary counts on: a suspicion may lead to asking for the VM, also before the record was read that names it.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.binding.is_some_and(|binding| self.acknowledged >= Some(binding))
    }

    /// The primary may have asked for the pair, or may have it, even if what it said of it got lost: it asks only after a rehearsal
    /// that went well and for an epoch after that. What was read of the record may be older.
    fn may_be_named(&self) -> bool {
        self.is_bound() || (self.binding.is_none() && self.rehearsed.is_some() && self.acknowledged > self.rehearsed)
    }

    /// The record names this session's pair. Its generation says so: no older or newer pairing of these two has the same.
    fn is_named(&self) -> bool {
        self.ownership.verdict()
            == Verdict::Paired {
                generation: self.config.generation,
                primary: self.config.primary,
                standby: self.config.ownership.me,
            }
    }

    fn suspect(&mut self, now: Time, recoverable: bool, why: &str) {
        match &mut self.phase {
            // The primary said so after it had read that it is alone, or that the VM is stopped: the record is followed to that.
            Phase::Receiving if self.told_unprotect => {}
            Phase::Receiving => {
                self.stats.suspicions += 1;
                self.phase = Phase::Asking { recoverable };
                if self.is_bound() {
                    self.show(ProtectionState::FailingOver, why);
                }
                // What was read before may be old; a change that expects it is refused then. It is read first only if unknown.
                let named = self.is_named();
                self.asked |= named;
                self.ownership.want(now, if named { Want::Solo { activated: false } } else { Want::Follow });
            }
            Phase::Asking { recoverable: known } => *known &= recoverable,
            Phase::Preparing if !recoverable => self.destroy(why),
            _ => {}
        }
    }

    /// `called`: what the primary calls it.
    fn rehearse(&mut self, called: Epoch) {
        let epoch = self.acknowledged.expect("checked by the callers");
        self.rehearsing = Some(Rehearsing { epoch: called });
        self.outputs.push_back(Output::Rehearse { epoch });
    }

    fn tell(&mut self, message: PeerMessage) {
        if self.connected {
            self.outputs.push_back(Output::Peer(message));
        }
    }

    fn show(&mut self, state: ProtectionState, reason: &str) {
        if self.shown.0 != state || self.shown.1 != reason {
            self.shown = (state, reason.to_string());
            self.outputs.push_back(Output::State { state, reason: reason.to_string() });
        }
    }

    fn peer_fault(&mut self, now: Time, reason: &str) {
        if self.disconnect(now) {
            self.outputs.push_back(Output::Close(CloseCode::Unexpected));
        }
        self.suspect(now, false, reason);
    }

    /// Whether it was connected.
    fn disconnect(&mut self, now: Time) -> bool {
        let was = core::mem::replace(&mut self.connected, false);
        if was {
            self.lost_at = Some(now);
        }
        was
    }

    fn advance(&mut self, now: Time) {
        if self.finished {
            return;
        }
        self.follow_record(now);
        while let Some(output) = self.ownership.poll_output() {
            match output {
                OwnershipOutput::Ask(request) => self.outputs.push_back(Output::Ask(request)),
                OwnershipOutput::PersistGeneration(generation) => {
                    if !self.granted_and_marked(now, generation) {
                        self.outputs.push_back(Output::PersistGeneration(generation));
                    }
                }
            }
        }
        if self.phase == Phase::Finished {
            self.finished = true;
            self.outputs.push_back(Output::Finished);
        }
    }

    fn follow_record(&mut self, now: Time) {
        let verdict = self.ownership.verdict();
        match self.phase {
            Phase::Receiving | Phase::Asking { .. } | Phase::Frozen => self.follow_owner(now, verdict),
            Phase::Announcing if self.ownership.is_fulfilled() => {
                self.outputs.push_back(Output::Release);
                if self.connected {
                    self.outputs.push_back(Output::Close(CloseCode::Done));
                }
                self.phase = Phase::Finished;
            }
            Phase::GivingBack if matches!(verdict, Verdict::SoloOther { .. }) => {
                self.phase = Phase::Frozen;
                self.primary_goes_on();
                self.ownership.want(now, Want::Follow);
            }
            _ => {}
        }
    }

    fn follow_owner(&mut self, now: Time, verdict: Verdict) {
        let session = self.config.generation;
        match verdict {
            Verdict::SoloMe { generation, .. } if self.ownership.may_run_alone() => self.granted(now, generation),
            Verdict::Stopped { generation } if generation >= session => self.destroy("the VM was stopped"),
            Verdict::Stopped { .. } | Verdict::Absent if self.told_unprotect => {
                self.destroy("the protection was ended")
            }
            // Protected again, by another session: this copy is of no use any more.
            Verdict::Paired { generation, .. } if generation > session => {
                self.destroy("the VM is protected again without this copy")
            }
            Verdict::SoloOther { .. } if self.told_unprotect => self.destroy("the protection was ended"),
            Verdict::SoloOther { generation, node, .. } if generation >= session => self.freeze(now, node),
            Verdict::SoloOther { .. } | Verdict::Absent | Verdict::Stopped { .. }
                if !self.connected && !self.may_be_named() =>
            {
                self.destroy("the connection was lost before the copy was whole");
            }
            Verdict::Paired { .. } if self.is_named() => match self.phase {
                Phase::Asking { .. } if self.acknowledged.is_some() => {
                    self.asked = true;
                    self.ownership.want(now, Want::Solo { activated: false });
                }
                Phase::Receiving if self.is_bound() => {
                    if !matches!(self.shown.0, ProtectionState::Protected) {
                        self.show(ProtectionState::Protected, "");
                    }
                    if !self.asked && !self.told_unprotect {
                        self.ownership.want(now, Want::Nothing);
                    }
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// The grant was read: nothing is acknowledged from here on (P4).
    fn granted(&mut self, now: Time, generation: Generation) {
        let Some(epoch) = self.acknowledged else { return };
        self.ownership.want(now, Want::Nothing);
        self.fence_or_mark(generation, epoch);
    }

    /// The same where the mark comes next: it makes the generation durable, too, and nothing is done by the grant before. Whether it was so.
    fn granted_and_marked(&mut self, now: Time, generation: Generation) -> bool {
        let waits = matches!(self.phase, Phase::Receiving | Phase::Asking { .. } | Phase::Frozen);
        let marks = waits && self.ownership.is_being_granted(generation) && !self.must_fence();
        if marks {
            self.granted(now, generation);
        }
        marks && self.phase == (Phase::Marking { generation })
    }

    fn must_fence(&self) -> bool {
        self.config.fence_required && self.safe.is_none()
    }

    fn fence_or_mark(&mut self, generation: Generation, epoch: Epoch) {
        if self.must_fence() {
            self.fence(generation);
        } else {
            self.mark(generation, epoch);
        }
    }

    fn mark(&mut self, generation: Generation, epoch: Epoch) {
        self.phase = Phase::Marking { generation };
        self.show(ProtectionState::FailingOver, &format!("activates the copy as of epoch {epoch}"));
        self.outputs.push_back(Output::Mark { generation, epoch });
    }

    fn activate(&mut self, generation: Generation) {
        let epoch = self.acknowledged.expect("the grant was taken with a whole epoch");
        self.phase = Phase::Activating { generation };
        self.outputs.push_back(Output::Activate { epoch });
    }

    fn freeze(&mut self, now: Time, owner: Party) {
        if self.phase != Phase::Frozen {
            self.phase = Phase::Frozen;
            self.primary_goes_on();
            let reason =
                format!("host {} runs the VM alone; this copy is kept as it was and is not up to date", owner.node);
            self.show(ProtectionState::Degraded, &reason);
        }
        // It may be given back to us, protected again, or stopped.
        self.ownership.want(now, Want::Follow);
    }

    fn destroy(&mut self, reason: &str) {
        self.outputs.push_back(Output::Destroy);
        self.show(ProtectionState::Unprotected, reason);
        if self.connected {
            self.outputs.push_back(Output::Close(CloseCode::Done));
        }
        self.phase = Phase::Finished;
    }
}
