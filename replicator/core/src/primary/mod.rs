//! The primary's machine: from pairing to the last epoch.
//!
//! Life: pairing, syncing, one whole epoch that is not held and is rehearsed, one more that catches up, and then epoch K, from
//! whose capture on output is held (`docs/protocol.md` P10). When K is acknowledged the store is asked for the pair; when
//! the record is read back the VM is protected. Output leaves on acknowledgement from K on, whatever else is going on, and without one only
//! when the record was read as solo(me) and nothing that we asked can still change that (P1, P3, P6).

mod epochs;
mod io;
mod steps;
#[cfg(test)]
mod tests;

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use core::hash::{Hash, Hasher};
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Incarnation, StoreId};
use heartbeat_core::ownership::{Ownership, OwnershipOutput, Verdict, Want};
use heartbeat_core::store::StoreAnswer;
use heartbeat_core::time::Time;

pub use self::io::{CaptureReport, GuestEvent, Operator, Output, PrimaryConfig};

use self::epochs::Epochs;
use self::steps::{After, Leaving, Phase, Planned, Stopping};
use crate::message::{CloseCode, PeerMessage, RehearsalResult};
use crate::pacing::{Pacer, Pacing};
use crate::release::ReleaseRule;
use crate::state::ProtectionState;
use crate::stats::PrimaryStats;

/// How long a rehearsal on demand excuses late acknowledgements: the standby may be busy with it.
const REHEARSAL_EXCUSES: Duration = Duration::from_secs(5);

/// A rehearsal on demand, from the word that it begins until its result.
#[derive(Clone, Copy, Debug, Hash)]
struct Rehearsal {
    /// What it is called between us and the standby.
    epoch: Epoch,
    excused_until: Time,
}

/// The machine of one protection on the primary.
///
/// Order of calls: [`Primary::handle_start`] first; then any `handle_*` as things happen, each with a `now` that never goes back; after each,
/// [`Primary::poll_output`] until it is `None`, doing what it says in order; then arrange for [`Primary::handle_timeout`] at
/// [`Primary::poll_timeout`]. After [`Output::Finished`] inputs are ignored.
#[derive(Clone, Debug)]
pub struct Primary {
    config: PrimaryConfig,
    ownership: Ownership,
    phase: Phase,
    epochs: Epochs,
    pacer: Pacer,
    rule: ReleaseRule,
    /// The generation of the record before this session, 0 if absent.
    base: Generation,
    connected: bool,
    /// A prepare was sent, so the standby has something to undo.
    prepared: bool,
    /// The detector suspects the peer.
    silent: bool,
    /// The oldest epoch is too old.
    late: bool,
    /// A rehearsal on demand that is under way on the standby.
    rehearsal: Option<Rehearsal>,
    /// We left the guest paused.
    paused: bool,
    /// Somebody else did.
    paused_by_other: bool,
    /// The guest shut down or died; it does not run again here.
    ended: bool,
    /// It shut down: nobody may revive it.
    shut_down: bool,
    /// The record named this pair once.
    was_protected: bool,
    /// It cannot be captured any more.
    broken: bool,
    outputs: VecDeque<Output>,
    /// [`Output::Finished`] was taken: nothing is said any more.
    over: bool,
    shown: (ProtectionState, String),
    stats: PrimaryStats,
}

/// What decides how it goes on; counters and what is shown are left out. For checkers that explore states.
impl Hash for Primary {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self {
            config,
            ownership,
            phase,
            epochs,
            pacer,
            rule,
            base,
            connected,
            prepared,
            silent,
            late,
            rehearsal,
            ..
        } = self;
        (config, ownership, phase, epochs, pacer, rule, base).hash(state);
        (connected, prepared, silent, late, rehearsal).hash(state);
        let Self { paused, paused_by_other, ended, shut_down, was_protected, broken, outputs, over, .. } = self;
        (paused, paused_by_other, ended, shut_down, was_protected, broken, outputs, over).hash(state);
    }
}

impl Primary {
    /// A machine that did nothing yet.
    ///
    /// # Panics
    /// If the pipeline is empty, the first epoch is 0 or the standby is this node.
    #[must_use]
    pub fn new(config: PrimaryConfig) -> Self {
        assert!(config.pipeline > 0 && config.first_epoch > Epoch(0), "a configuration that cannot work");
        assert!(config.standby.node != config.ownership.me.node, "a node cannot stand by for itself");
        Self {
            config,
            ownership: Ownership::new(config.ownership),
            phase: Phase::Idle,
            epochs: Epochs::new(config.first_epoch),
            pacer: Pacer::new(config.pacing),
            rule: ReleaseRule::new(),
            base: Generation(0),
            connected: true,
            prepared: false,
            silent: false,
            late: false,
            paused: false,
            paused_by_other: false,
            ended: false,
            shut_down: false,
            rehearsal: None,
            was_protected: false,
            broken: false,
            outputs: VecDeque::new(),
            over: false,
            shown: (ProtectionState::Unprotected, String::new()),
            stats: PrimaryStats::default(),
        }
    }

    /// Begin: the replication connection stands and the standby's hello showed `config.standby`.
    pub fn handle_start(&mut self, now: Time) {
        if let Phase::Idle = self.phase {
            self.phase = Phase::Reading { until: now + self.config.start_within };
            self.show(ProtectionState::Pairing, "asks the witness who owns the VM");
            self.ownership.want(now, Want::Follow);
        }
        self.advance(now);
    }

    /// Any message of the control stream; calls the `handle_` function that it is for.
    pub fn handle_peer(&mut self, now: Time, message: PeerMessage) {
        match message {
            PeerMessage::Prepared => self.handle_prepared(now),
            PeerMessage::Refused { reason } => self.handle_refused(now, &reason),
            PeerMessage::Acknowledge { generation, incarnation, epoch } => {
                self.handle_acknowledged(now, generation, incarnation, epoch);
            }
            PeerMessage::Rehearsed { epoch, result } => self.handle_rehearsed(now, epoch, result),
            PeerMessage::Rehearsing { epoch } => self.handle_rehearsing(now, epoch),
            PeerMessage::Status { .. } => {}
            PeerMessage::Hello { .. }
            | PeerMessage::Prepare { .. }
            | PeerMessage::Rehearse { .. }
            | PeerMessage::Binding { .. }
            | PeerMessage::GuestDied { .. }
            | PeerMessage::Unprotect
            | PeerMessage::Planned { .. } => self.peer_fault(now, "the standby sent what only a primary sends"),
        }
    }

    /// The standby's twin waits.
    pub fn handle_prepared(&mut self, now: Time) {
        if let Phase::Preparing = self.phase {
            self.phase = Phase::Syncing;
            self.show(ProtectionState::Syncing, "sends the memory");
            self.outputs.push_back(Output::Sync);
        }
        self.advance(now);
    }

    /// The standby cannot.
    ///
    /// A standby that was paired may still hold a whole copy, and its connection stays: this node asks first.
    pub fn handle_refused(&mut self, now: Time, reason: &str) {
        self.disconnected(now, reason);
        self.advance(now);
    }

    /// Everything was sent once and the rounds are over: epochs can begin.
    pub fn handle_synced(&mut self, now: Time) {
        if let Phase::Syncing = self.phase {
            self.phase = Phase::FirstEpoch { epoch: self.epochs.next() };
        }
        self.advance(now);
    }

    /// The initial sync cannot go on.
    pub fn handle_sync_failed(&mut self, now: Time, reason: &str) {
        self.give_up(now, ProtectionState::Unprotected, reason);
        self.advance(now);
    }

    /// The capture that was asked for is done.
    ///
    /// One that the guest's end overtook is put back.
    ///
    /// # Panics
    /// If no capture of this epoch was asked for.
    pub fn handle_captured(&mut self, now: Time, report: CaptureReport) {
        if let Phase::Finished = self.phase {
            return;
        }
        let Some(capture) = self.epochs.end_capture(report.epoch) else {
            self.epochs.skip(&report);
            self.stats.put_back += 1;
            self.outputs.push_back(Output::PutBack { epoch: report.epoch });
            self.advance(now);
            return;
        };
        self.paused |= capture.stay_paused;
        self.stats.captured += 1;
        self.stats.pages += report.pages;
        self.stats.bytes += report.bytes;
        self.stats.pause += report.pause;
        self.pacer.captured(report.pause, report.held_frames);
        if self.connected && self.phase.takes_epochs() {
            self.epochs.captured(&report, now);
            if capture.hold {
                self.outputs.push_back(Output::Peer(PeerMessage::Binding { epoch: report.epoch }));
            }
            self.outputs.push_back(Output::Send { epoch: report.epoch });
        } else {
            self.epochs.skip(&report);
            self.stats.put_back += 1;
            self.outputs.push_back(Output::PutBack { epoch: report.epoch });
        }
        match &mut self.phase {
            Phase::Binding { epoch, until } if *epoch == report.epoch => *until = Some(now + self.config.pair_within),
            Phase::Stopping(Stopping::Draining { last }) | Phase::Planned(Planned::Draining { last })
                if capture.stay_paused =>
            {
                *last = Some(report.epoch);
            }
            Phase::Protected => self.resume(),
            Phase::Frozen => {
                let reason = "the guest was frozen and answers again".to_string();
                self.contest(now, After::Degrade(reason), false);
            }
            _ => {}
        }
        self.advance(now);
    }

    /// The capture that was asked for failed, and the guest runs; what was harvested has been put back.
    ///
    /// One that the guest's end overtook is ignored.
    ///
    /// # Panics
    /// If no capture of this epoch was asked for.
    pub fn handle_capture_failed(&mut self, now: Time, epoch: Epoch, retryable: bool, reason: &str) {
        if let Phase::Finished = self.phase {
            return;
        }
        self.stats.capture_failures += 1;
        let Some(failures) = self.epochs.capture_failed(epoch, now) else { return };
        if !retryable || failures > self.config.capture_retries {
            self.capture_broken(now, reason);
        }
        self.advance(now);
    }

    /// The standby holds all epochs up to this one (`docs/protocol.md` P1, P11).
    pub fn handle_acknowledged(&mut self, now: Time, generation: Generation, incarnation: Incarnation, epoch: Epoch) {
        if generation != self.session() || incarnation != self.config.standby.incarnation {
            self.stats.stale_acknowledgements += 1;
            return;
        }
        if epoch >= self.epochs.next() {
            self.peer_fault(now, "the standby acknowledged an epoch that was never sent");
            return;
        }
        let Some(acknowledged) = self.epochs.acknowledged(now, epoch) else {
            self.stats.stale_acknowledgements += 1;
            return;
        };
        self.late = false;
        self.stats.acknowledged += acknowledged.epochs;
        self.stats.last_commit = acknowledged.commit;
        if let Some(through) = self.rule.acknowledged(epoch) {
            self.outputs.push_back(Output::Release { through });
        }
        self.after_acknowledgement(now, epoch);
        self.advance(now);
    }

    /// The standby's operator asked for a rehearsal, and it begins.
    pub fn handle_rehearsing(&mut self, now: Time, epoch: Epoch) {
        // If we asked meanwhile, ours was not tried. The time that is excused does not grow.
        self.rehearsal_begins(now, epoch);
        self.advance(now);
    }

    /// How the rehearsal went. One that was not tried says nothing about the copy.
    pub fn handle_rehearsed(&mut self, now: Time, epoch: Epoch, result: RehearsalResult) {
        if self.rehearsal.is_some_and(|rehearsal| rehearsal.epoch == epoch) {
            self.rehearsal = None;
            // What piled up behind it may take as long as ever, counted from here.
            self.epochs.excuse(now);
        }
        match result {
            RehearsalResult::Loads { .. } => {
                if matches!(self.phase, Phase::Rehearsing { epoch: asked, .. } if asked == epoch) {
                    self.phase = Phase::CatchUp { epoch: self.epochs.next() };
                }
            }
            RehearsalResult::Fails { reason } => self.copy_fails(now, &reason),
            RehearsalResult::Busy => self.rehearse_later(now, epoch),
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

    /// The failure detector suspects the standby's node.
    pub fn handle_peer_suspected(&mut self, now: Time) {
        self.silent = true;
        self.advance(now);
    }

    /// The failure detector hears the standby's node again, in the same life.
    pub fn handle_peer_heard(&mut self, now: Time) {
        self.silent = false;
        self.advance(now);
    }

    /// The standby's node is in another life: what it held is gone.
    pub fn handle_peer_restarted(&mut self, now: Time, incarnation: Incarnation) {
        if incarnation > self.config.standby.incarnation {
            self.handle_connection_lost(now, "the standby's agent restarted and holds nothing any more");
        }
    }

    /// The replication connection is lost.
    pub fn handle_connection_lost(&mut self, now: Time, reason: &str) {
        if core::mem::replace(&mut self.connected, false) {
            self.disconnected(now, reason);
        }
        self.advance(now);
    }

    /// Something happened to the guest.
    pub fn handle_guest_event(&mut self, now: Time, event: GuestEvent) {
        match event {
            GuestEvent::Shutdown { gone } => self.guest_shut_down(now, gone),
            GuestEvent::Died { how } => self.guest_died(now, &how),
            GuestEvent::Changed { what } => self.guest_changed(now, &what),
            GuestEvent::Reset => {}
            GuestEvent::Paused => self.paused_by_other = true,
            GuestEvent::Resumed => self.paused_by_other = false,
        }
        self.advance(now);
    }

    /// The operator asks. `Err` says why not, and then nothing changed.
    ///
    /// # Errors
    /// One sentence for the operator.
    pub fn handle_operator(&mut self, now: Time, ask: Operator) -> Result<(), String> {
        let done = match ask {
            Operator::Unprotect => self.unprotect(now),
            Operator::Failover => self.planned_failover(now),
            Operator::Rehearse => self.rehearse_again(now),
        };
        self.advance(now);
        done.map_err(ToString::to_string)
    }

    /// Whether this guest could go on alone if the standby's host were known to be dead (`docs/protocol.md` P13). If that had the VM, what was
    /// heard of it is lost.
    ///
    /// # Errors
    /// One sentence for the operator: why not.
    pub fn may_be_forced(&self) -> Result<(), &'static str> {
        match &self.phase {
            Phase::Contesting { .. } | Phase::Lost if !self.ended => Ok(()),
            Phase::Contesting { .. } | Phase::Lost | Phase::Dead { .. } => Err("the guest has ended here"),
            _ => Err("the VM does not wait for anybody here"),
        }
    }

    /// The standby's host is dead, as was confirmed, and the record names this node alone, durably, in `store`: see
    /// [`Ownership::handle_forced`].
    pub fn handle_forced(&mut self, now: Time, store: StoreId) {
        if self.may_be_forced().is_ok() {
            self.ownership.handle_forced(now, store);
            self.contest(now, After::Degrade("the operator forced it: the other host is confirmed dead".into()), false);
        }
        self.advance(now);
    }

    /// Time has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.ownership.handle_timeout(now);
        self.advance(now);
    }

    /// When [`Primary::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let own = match &self.phase {
            Phase::Finished => return None,
            Phase::Reading { until } | Phase::Pairing { until } | Phase::Planned(Planned::Told { until }) => {
                Some(*until)
            }
            Phase::Binding { until, .. } => *until,
            Phase::Rehearsing { again_at, .. } => *again_at,
            Phase::Contesting { stalled_at, .. } => *stalled_at,
            _ => None,
        };
        let late = if self.late || !self.phase.minds_lateness() { None } else { self.deadline() };
        let frozen = if self.phase.minds_freezing() { self.frozen_at() } else { None };
        [own, late, frozen, self.ownership.poll_timeout()].into_iter().flatten().min()
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

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> PrimaryStats {
        PrimaryStats { in_flight: self.epochs.in_flight() as u64, ..self.stats }
    }

    /// How it works.
    #[must_use]
    pub fn config(&self) -> &PrimaryConfig {
        &self.config
    }

    /// This node's side of the record.
    #[must_use]
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// The release rule as it stands.
    #[must_use]
    pub fn release_rule(&self) -> &ReleaseRule {
        &self.rule
    }

    /// The first epoch that was not used: where a later session of this agent may begin.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        self.epochs.next()
    }

    /// Changes how long epochs last, from the next capture on.
    pub fn set_pacing(&mut self, pacing: Pacing) {
        self.config.pacing = pacing;
        self.pacer.set_policy(pacing);
    }

    /// The generation that this session's epochs and acknowledgements carry.
    #[must_use]
    pub fn session(&self) -> Generation {
        self.base.next()
    }

    fn show(&mut self, state: ProtectionState, reason: &str) {
        if self.shown.0 != state || self.shown.1 != reason {
            self.shown = (state, reason.to_string());
            self.outputs.push_back(Output::State { state, reason: reason.to_string() });
        }
    }

    fn resume(&mut self) {
        if core::mem::replace(&mut self.paused, false) && !self.ended {
            self.outputs.push_back(Output::Resume);
        }
    }

    /// When the oldest epoch is too old. A rehearsal excuses it for a bounded time.
    fn deadline(&self) -> Option<Time> {
        let at = self.epochs.deadline(self.config.acknowledge_within, self.config.bytes_per_second)?;
        Some(self.rehearsal.map_or(at, |rehearsal| at.max(rehearsal.excused_until)))
    }

    /// When the capture that is under way tells of a frozen guest.
    fn frozen_at(&self) -> Option<Time> {
        Some(self.epochs.capture_due()? + self.config.frozen_after)
    }

    /// Everything that follows by itself from what was put in.
    fn advance(&mut self, now: Time) {
        if let Phase::Finished = self.phase {
            return;
        }
        if self.phase.minds_lateness() && self.deadline().is_some_and(|at| now >= at) {
            self.late = true;
        }
        if self.phase.minds_freezing() && self.frozen_at().is_some_and(|at| now >= at) {
            self.guest_froze(now);
        }
        self.follow_record(now);
        self.follow_time(now);
        self.leave(now);
        self.capture(now);
        while let Some(output) = self.ownership.poll_output() {
            self.outputs.push_back(match output {
                OwnershipOutput::Ask(request) => Output::Ask(request),
                OwnershipOutput::PersistGeneration(generation) => Output::PersistGeneration(generation),
            });
        }
        if let Phase::Finished = self.phase {
            self.outputs.push_back(Output::Finished);
        }
    }

    fn rehearsal_begins(&mut self, now: Time, epoch: Epoch) {
        let excused_until = self.rehearsal.map_or(now + REHEARSAL_EXCUSES, |rehearsal| rehearsal.excused_until);
        self.rehearsal = Some(Rehearsal { epoch, excused_until });
    }

    fn peer_fault(&mut self, now: Time, reason: &str) {
        if self.connected {
            self.outputs.push_back(Output::Close(CloseCode::Unexpected));
        }
        self.handle_connection_lost(now, reason);
    }

    /// The record names this session's pair.
    fn is_paired(&self) -> bool {
        matches!(self.ownership.verdict(), Verdict::Paired { primary, standby, .. }
            if primary == self.config.ownership.me && standby == self.config.standby)
    }

    fn leaving(&mut self, leaving: Leaving) {
        self.phase = Phase::Leaving(leaving);
    }
}
