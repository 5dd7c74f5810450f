//! The phases of a primary and how it goes from one to the next.

use alloc::format;
use alloc::string::String;
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Party};
use heartbeat_core::ownership::{Verdict, Want};
use heartbeat_core::record::Owner;
use heartbeat_core::time::Time;

use super::Primary;
use super::io::Output;
use crate::message::{CloseCode, PeerMessage, clip};
use crate::pacing::Window;
use crate::state::ProtectionState;

/// How long the store may be silent before the operator is told that the VM stalls.
const STALL_SHOWN_AFTER: Duration = Duration::from_secs(1);

/// How long after a standby was busy it is asked again for the first rehearsal.
const REHEARSE_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// How often it is asked again: with the wait above, 10 s of being busy with another rehearsal.
const REHEARSE_AGAIN_AT_MOST: u32 = 50;

/// What follows once this node owns the VM alone.
#[derive(Clone, Debug, Hash)]
pub(super) enum After {
    /// Go on without protection, for this reason.
    Degrade(String),
    /// The operator ended the protection.
    Unprotect,
}

/// The last steps.
#[derive(Clone, Debug, Hash)]
pub(super) struct Leaving {
    pub(super) state: ProtectionState,
    pub(super) reason: String,
    /// Tell the standby that its copy may go.
    pub(super) tell: bool,
    /// The record is ours alone and shall say that the VM runs here.
    pub(super) owned: bool,
}

#[derive(Clone, Debug, Hash)]
pub(super) enum Stopping {
    /// The last epoch is captured (then `last` is known) and waits for its acknowledgement.
    Draining { last: Option<Epoch> },
    /// The record shall say stopped.
    Marking,
}

#[derive(Clone, Debug, Hash)]
pub(super) enum Planned {
    /// As for [`Stopping::Draining`].
    Draining { last: Option<Epoch> },
    /// The standby was told to ask.
    Told { until: Time },
}

#[derive(Clone, Debug, Hash)]
pub(super) enum Phase {
    Idle,
    /// Who owns the VM?
    Reading {
        until: Time,
    },
    /// The standby builds the twin.
    Preparing,
    Syncing,
    /// The first whole epoch, not held.
    FirstEpoch {
        epoch: Epoch,
    },
    Rehearsing {
        epoch: Epoch,
        /// How often the standby was busy.
        busy: u32,
        /// When to ask again, if it was.
        again_at: Option<Time>,
    },
    /// What was written during the rehearsal, so that the first held epoch is small.
    CatchUp {
        epoch: Epoch,
    },
    /// The first held epoch. No ask was sent yet: no record can name the standby.
    Binding {
        epoch: Epoch,
        until: Option<Time>,
    },
    /// The ask is open: from here on only solo(me) or stopped opens the output.
    Pairing {
        until: Time,
    },
    Protected,
    /// Asks to own alone. Goes back to protected if `recoverable` and the peer is heard again before an answer.
    Contesting {
        after: After,
        recoverable: bool,
        since: Time,
        stalled_at: Option<Time>,
    },
    Stopping(Stopping),
    Planned(Planned),
    /// The guest is gone, this agent lives: never contests.
    Dead {
        gave_back: bool,
    },
    /// The guest's process lives and does not answer: the standby was told to take over. If it answers after all this node asks, too.
    Frozen,
    /// Another node may run the VM: mute.
    Lost,
    Leaving(Leaving),
    Finished,
}

impl Phase {
    /// Whether a captured epoch is of use.
    pub(super) fn takes_epochs(&self) -> bool {
        matches!(
            self,
            Self::FirstEpoch { .. }
                | Self::CatchUp { .. }
                | Self::Binding { .. }
                | Self::Pairing { .. }
                | Self::Protected
                | Self::Contesting { .. }
                | Self::Stopping(Stopping::Draining { .. })
                | Self::Planned(Planned::Draining { .. })
        )
    }

    /// Whether an epoch that is not acknowledged for long is a suspicion.
    pub(super) fn minds_lateness(&self) -> bool {
        matches!(
            self,
            Self::Pairing { .. }
                | Self::Protected
                | Self::Contesting { .. }
                | Self::Stopping(Stopping::Draining { .. })
                | Self::Planned(Planned::Draining { .. })
        )
    }

    /// Whether a guest that does not answer is to be saved, or no longer waited for.
    pub(super) fn minds_freezing(&self) -> bool {
        matches!(
            self,
            Self::Pairing { .. }
                | Self::Protected
                | Self::Stopping(Stopping::Draining { .. })
                | Self::Planned(Planned::Draining { .. })
        )
    }

    /// Whether no pair was ever asked for: no record can name the standby.
    fn is_before_asking(&self) -> bool {
        matches!(
            self,
            Self::Idle
                | Self::Reading { .. }
                | Self::Preparing
                | Self::Syncing
                | Self::FirstEpoch { .. }
                | Self::Rehearsing { .. }
                | Self::CatchUp { .. }
                | Self::Binding { .. }
        )
    }
}

impl Primary {
    /// Ends a protection that was never asked for at the store (`docs/protocol.md` P10). Anywhere else it does nothing.
    pub(super) fn give_up(&mut self, now: Time, state: ProtectionState, reason: &str) {
        if self.phase.is_before_asking() {
            assert!(!self.ownership.is_exposed(), "gave up while a pair may be recorded");
            self.ownership.want(now, Want::Nothing);
            let (reason, tell) = (reason.into(), self.prepared);
            self.leaving(Leaving { state, reason, tell, owned: false });
        }
    }

    /// Asks to own alone (P2, P3). Nothing is opened before the record was read.
    pub(super) fn contest(&mut self, now: Time, after: After, recoverable: bool) {
        self.stats.suspicions += 1;
        match &after {
            After::Degrade(reason) => {
                let reason = format!("asks the witness to go on alone: {reason}");
                self.show(ProtectionState::FailingOver, &reason);
            }
            After::Unprotect => self.show(self.shown.0, "asks the witness to end the protection"),
        }
        let stalled_at = Some(now + STALL_SHOWN_AFTER);
        self.phase = Phase::Contesting { after, recoverable, since: now, stalled_at };
        self.ownership.want(now, Want::Solo { activated: false });
    }

    /// Captures cannot go on.
    pub(super) fn capture_broken(&mut self, now: Time, reason: &str) {
        self.broken = true;
        match &mut self.phase {
            Phase::Pairing { .. } | Phase::Protected | Phase::Planned(Planned::Draining { .. }) => {
                self.contest(now, After::Degrade(reason.into()), false);
            }
            Phase::Contesting { recoverable, .. } => *recoverable = false,
            Phase::Stopping(Stopping::Draining { .. }) => self.mark_stopped(now),
            _ => self.give_up(now, ProtectionState::Unprotected, reason),
        }
    }

    /// It has devices or memory that no copy has, and maybe a card that no gate holds: while the record may name another node it must
    /// not run.
    pub(super) fn guest_changed(&mut self, now: Time, what: &str) {
        self.capture_broken(now, what);
        if matches!(self.phase, Phase::Contesting { .. } | Phase::Frozen) && !self.paused && !self.ended {
            self.paused = true;
            self.outputs.push_back(Output::Mute);
        }
    }

    pub(super) fn disconnected(&mut self, now: Time, reason: &str) {
        let reason = clip(reason);
        match &mut self.phase {
            Phase::Pairing { .. } | Phase::Protected | Phase::Frozen | Phase::Planned(Planned::Draining { .. }) => {
                self.contest(now, After::Degrade(reason), false);
            }
            Phase::Contesting { recoverable, .. } => *recoverable = false,
            Phase::Stopping(Stopping::Draining { .. }) => self.mark_stopped(now),
            _ => self.give_up(now, ProtectionState::Unprotected, &reason),
        }
    }

    fn mark_stopped(&mut self, now: Time) {
        self.phase = Phase::Stopping(Stopping::Marking);
        self.ownership.want(now, Want::Stopped);
    }

    pub(super) fn guest_shut_down(&mut self, now: Time, gone: bool) {
        (self.ended, self.shut_down) = (true, true);
        if gone {
            self.epochs.forget_capture();
        }
        match &self.phase {
            Phase::Pairing { .. } | Phase::Protected | Phase::Contesting { .. } | Phase::Planned(_)
                if !gone && self.connected && !self.paused =>
            {
                self.phase = Phase::Stopping(Stopping::Draining { last: None });
                self.cancel_capture();
            }
            Phase::Pairing { .. } | Phase::Protected | Phase::Contesting { .. } | Phase::Planned(_) | Phase::Frozen => {
                self.mark_stopped(now)
            }
            Phase::Stopping(Stopping::Draining { .. }) if gone => self.mark_stopped(now),
            _ => self.give_up(now, ProtectionState::Unprotected, "the guest shut down"),
        }
    }

    /// A guest that died never contests; what another node may hold is told to that node. The end of a process whose guest shut
    /// down is no death: it is stopped, and nobody revives it.
    pub(super) fn guest_died(&mut self, now: Time, how: &str) {
        self.ended = true;
        self.epochs.forget_capture();
        let can_be_saved = match &self.phase {
            Phase::Idle | Phase::Finished | Phase::Lost | Phase::Dead { .. } => return,
            Phase::Stopping(Stopping::Draining { .. }) => return self.mark_stopped(now),
            Phase::Stopping(Stopping::Marking) => return,
            Phase::Leaving(_) if self.shut_down => return,
            Phase::Leaving(leaving) => leaving.owned,
            phase => !phase.is_before_asking(),
        };
        if !can_be_saved {
            self.ownership.want(now, Want::Nothing);
            let (reason, tell) = (format!("the guest died: {how}"), self.prepared);
            self.leaving(Leaving { state: ProtectionState::Error, reason, tell, owned: false });
            return;
        }
        self.phase = Phase::Dead { gave_back: false };
        self.call_standby(now, &format!("the guest died: {how}"), true);
    }

    /// A guest that does not answer its agent is of no use to anybody: the standby shall take over. It may answer again, so it is
    /// neither ended nor forgotten; the record decides (P23).
    pub(super) fn guest_froze(&mut self, now: Time) {
        if let Phase::Stopping(_) = self.phase {
            return self.mark_stopped(now);
        }
        if !self.connected || self.silent {
            return;
        }
        self.phase = Phase::Frozen;
        self.call_standby(now, &format!("the guest does not answer since {:?}", self.config.frozen_after), false);
    }

    /// Tells the standby that it may have the VM. `ended`: the guest cannot run again.
    fn call_standby(&mut self, now: Time, why: &str, ended: bool) {
        if self.connected {
            self.outputs.push_back(Output::Peer(PeerMessage::GuestDied { how: clip(why), ended }));
        }
        self.show(ProtectionState::FailingOver, &format!("{why}; the standby may take over"));
        // An ask for the pair goes on: the standby holds a whole copy and needs the record to take over.
        if !matches!(self.ownership.wanted(), Want::Pair { .. }) {
            self.ownership.want(now, Want::Follow);
        }
    }

    pub(super) fn unprotect(&mut self, now: Time) -> Result<(), &'static str> {
        match &mut self.phase {
            Phase::Pairing { .. } | Phase::Protected | Phase::Frozen | Phase::Planned(Planned::Draining { .. }) => {
                self.contest(now, After::Unprotect, false);
            }
            Phase::Contesting { after, recoverable, .. } => (*after, *recoverable) = (After::Unprotect, false),
            Phase::Planned(Planned::Told { .. }) => {
                return Err(
                    "a planned failover is under way: the standby may have the VM already; try again when it is over",
                );
            }
            Phase::Stopping(_) => return Err("the guest is shutting down; the protection ends by itself"),
            Phase::Dead { .. } => return Err("the guest died here; only the standby has a copy now"),
            Phase::Lost => return Err("the VM belongs to the other host; unprotect it there"),
            Phase::Leaving(_) | Phase::Finished => {}
            _ => self.give_up(now, ProtectionState::Unprotected, ""),
        }
        Ok(())
    }

    pub(super) fn planned_failover(&mut self, now: Time) -> Result<(), &'static str> {
        match &self.phase {
            Phase::Protected if self.connected => {
                self.phase = Phase::Planned(Planned::Draining { last: None });
                self.show(ProtectionState::FailingOver, "planned: sends the last epoch");
                self.cancel_capture();
                // An older ask of ours to go alone may still be applied.
                self.ownership.want(now, Want::Follow);
                Ok(())
            }
            _ => Err("the VM is not protected now; a planned failover needs a standby that holds everything"),
        }
    }

    pub(super) fn rehearse_again(&mut self, now: Time) -> Result<(), &'static str> {
        match &self.phase {
            Phase::Protected if self.rehearsal.is_some() => {
                Err("a rehearsal is under way already; ask again when it is over")
            }
            Phase::Protected if self.connected => {
                let epoch = self.epochs.next();
                self.rehearsal_begins(now, epoch);
                self.outputs.push_back(Output::Peer(PeerMessage::Rehearse { epoch }));
                Ok(())
            }
            _ => Err("the VM is not protected now; there is nothing to rehearse"),
        }
    }

    /// The standby's copy does not load: it is nothing to count on.
    pub(super) fn copy_fails(&mut self, now: Time, reason: &str) {
        match &mut self.phase {
            Phase::Pairing { .. } | Phase::Protected | Phase::Frozen | Phase::Planned(Planned::Draining { .. }) => {
                self.contest(now, After::Degrade(reason.into()), false);
            }
            Phase::Contesting { recoverable, .. } => *recoverable = false,
            _ => self.give_up(now, ProtectionState::Unprotected, reason),
        }
    }

    /// The standby was busy with another rehearsal. Only the first one is waited for: nothing goes on without it.
    pub(super) fn rehearse_later(&mut self, now: Time, epoch: Epoch) {
        match &mut self.phase {
            Phase::Rehearsing { epoch: asked, busy, again_at } if *asked == epoch => {
                *busy += 1;
                *again_at = Some(now + REHEARSE_AGAIN_AFTER);
                if *busy > REHEARSE_AGAIN_AT_MOST {
                    let reason = "the standby was too long busy with another rehearsal; protect again when it is over";
                    self.give_up(now, ProtectionState::Unprotected, reason);
                }
            }
            _ => {}
        }
    }

    pub(super) fn after_acknowledgement(&mut self, now: Time, epoch: Epoch) {
        match &self.phase {
            Phase::FirstEpoch { epoch: first } if epoch >= *first => {
                self.phase = Phase::Rehearsing { epoch, busy: 0, again_at: None };
                self.show(ProtectionState::Syncing, "the standby proves that its copy loads");
                self.outputs.push_back(Output::Peer(PeerMessage::Rehearse { epoch }));
            }
            Phase::CatchUp { epoch: first } if epoch >= *first => {
                self.phase = Phase::Binding { epoch: self.epochs.next(), until: None };
                self.show(ProtectionState::Syncing, "sends the first held epoch");
            }
            Phase::Binding { epoch: first, until: Some(until) } if epoch >= *first => {
                self.phase = Phase::Pairing { until: *until };
                self.show(ProtectionState::Syncing, "asks the witness for the pair");
                self.ownership.want(now, Want::Pair { standby: self.config.standby });
            }
            Phase::Stopping(Stopping::Draining { last: Some(last) }) if epoch >= *last => self.mark_stopped(now),
            Phase::Planned(Planned::Draining { last: Some(last) }) if epoch >= *last => {
                let last = *last;
                self.phase = Phase::Planned(Planned::Told { until: now + self.config.planned_within });
                self.show(ProtectionState::FailingOver, "planned: waits for the standby");
                self.outputs.push_back(Output::Peer(PeerMessage::Planned { epoch: last }));
                self.ownership.want(now, Want::Follow);
            }
            _ => {}
        }
    }

    /// What the record says decides who may run (P3, P5).
    pub(super) fn follow_record(&mut self, now: Time) {
        let me = self.config.ownership.me;
        let verdict = self.ownership.verdict();
        match &self.phase {
            Phase::Reading { .. } => self.follow_first_reading(now, verdict),
            Phase::Pairing { .. }
            | Phase::Protected
            | Phase::Contesting { .. }
            | Phase::Stopping(_)
            | Phase::Planned(_)
            | Phase::Dead { .. }
            | Phase::Frozen
            | Phase::Lost => match verdict {
                Verdict::SoloOther { node, activated, .. } => self.lose(now, node, activated),
                // Only who runs the VM pairs it again.
                Verdict::Paired { primary, .. } if primary != me => self.lose(now, primary, true),
                Verdict::Stopped { generation } if generation > self.base => self.stopped(now),
                Verdict::SoloMe { .. } if self.ownership.may_run_alone() => self.own_alone(now),
                Verdict::Paired { .. } if matches!(self.phase, Phase::Pairing { .. }) && self.is_paired() => {
                    self.phase = Phase::Protected;
                    self.was_protected = true;
                    self.show(ProtectionState::Protected, "");
                    self.ownership.want(now, Want::Nothing);
                }
                Verdict::Paired { .. }
                    if matches!(self.phase, Phase::Dead { .. } | Phase::Frozen) && self.is_paired() =>
                {
                    self.ownership.want(now, Want::Follow);
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn follow_first_reading(&mut self, now: Time, verdict: Verdict) {
        let me = self.config.ownership.me;
        let proceed = match verdict {
            Verdict::Unknown => return,
            Verdict::Absent => Ok(Generation(0)),
            Verdict::SoloMe { generation, .. } if self.ownership.may_run_alone() => Ok(generation),
            Verdict::SoloOther { node, .. } if node.node == me.node => {
                // An earlier life of this agent owned it: take it over, so that nothing it asked can still be applied.
                self.ownership.want(now, Want::Solo { activated: true });
                return;
            }
            Verdict::SoloMe { .. } => return,
            Verdict::Stopped { generation } => match self.ownership.record().map(|record| record.owner) {
                Some(Owner::Stopped { node }) if node.node == me.node => Ok(generation),
                _ => Err(
                    "the record says that the VM was stopped on another host: start it there, or give this copy a new identity",
                ),
            },
            Verdict::SoloOther { .. } => Err(
                "the record says that the VM belongs to another host: this copy must not run; protect it from there",
            ),
            Verdict::Paired { .. } => {
                Err("the record says that the VM is protected already: end that protection first")
            }
        };
        match proceed {
            Ok(base) => {
                self.base = base;
                self.phase = Phase::Preparing;
                self.prepared = true;
                self.show(ProtectionState::Pairing, "the standby builds the twin");
                self.ownership.want(now, Want::Nothing);
                self.outputs.push_back(Output::Prepare { generation: self.session() });
            }
            Err(reason) => self.give_up(now, ProtectionState::Error, reason),
        }
    }

    fn own_alone(&mut self, now: Time) {
        let (state, reason, tell) = match &self.phase {
            // The base record, before the ask went out; or what a stop goes on from.
            Phase::Pairing { .. } | Phase::Stopping(_) => return,
            Phase::Frozen if !self.was_paired() => return,
            Phase::Frozen => {
                let reason = "the guest does not answer, and the standby gave the VM back";
                (ProtectionState::Degraded, reason.into(), false)
            }
            Phase::Dead { gave_back: false } if self.was_paired() => {
                self.phase = Phase::Dead { gave_back: true };
                self.ownership.want(now, Want::GiveBack);
                return;
            }
            Phase::Dead { gave_back: true } if self.ownership.wanted() == Want::GiveBack => return,
            Phase::Dead { .. } => (ProtectionState::Error, "the guest died, and the standby gave up".into(), false),
            Phase::Contesting { after: After::Unprotect, .. } => (ProtectionState::Unprotected, String::new(), true),
            // A copy that was never counted on is of no use; one that was is kept until the VM is protected again (P9).
            Phase::Contesting { after: After::Degrade(reason), .. } => {
                (ProtectionState::Degraded, reason.clone(), !self.was_protected)
            }
            Phase::Lost if self.ended => (
                ProtectionState::Error,
                "the guest died here, and the standby could not activate its copy".into(),
                false,
            ),
            Phase::Lost => {
                (ProtectionState::Degraded, "the standby could not activate and gave the VM back".into(), false)
            }
            _ => (ProtectionState::Degraded, "an earlier ask to go alone was granted".into(), false),
        };
        self.leaving(Leaving { state, reason, tell, owned: !self.ended });
        self.cancel_capture();
    }

    /// The record is ours alone and came from this session's pair: it can be given back. One from before this session says
    /// nothing: output was open since, whether or not the record says that the VM ran here.
    fn was_paired(&self) -> bool {
        self.ownership.record().is_some_and(|record| {
            let from_pair = matches!(record.owner, Owner::Solo { activated: false, other: Some(_), .. });
            from_pair && record.generation > self.session()
        })
    }

    /// Another node owns the VM, or may (P5): mute at once, destroyed only when the record says that it runs there.
    ///
    /// It may also be an earlier life of this node, whose ask was applied late. Then nobody runs it elsewhere: the guest is kept, and
    /// this life takes the record over, unless the standby that it names wins.
    fn lose(&mut self, now: Time, winner: Party, activated: bool) {
        let elsewhere = winner.node != self.config.ownership.me.node;
        if !matches!(self.phase, Phase::Lost) {
            // A guest that is gone is mute. It is confirmed by the fence below.
            if !matches!(self.phase, Phase::Dead { .. }) {
                self.outputs.push_back(Output::Mute);
            }
            self.rule.shut();
            self.paused = true;
            self.cancel_capture();
            self.put_back_all();
            self.phase = Phase::Lost;
            let reason = if elsewhere {
                format!("host {} owns the VM; this copy is mute", winner.node)
            } else {
                "the record names an earlier life of this agent, whose ask was granted late; this copy is mute and kept until the record says who runs the VM".into()
            };
            self.show(ProtectionState::FailingOver, &reason);
        }
        self.ownership.want(now, if elsewhere { Want::Follow } else { Want::Solo { activated: false } });
        if activated && elsewhere {
            self.fence(&format!("the VM runs on host {}", winner.node));
        }
    }

    fn stopped(&mut self, now: Time) {
        if let Phase::Stopping(_) = self.phase {
            // Nobody can run it any more: what it still said may be heard.
            self.ownership.want(now, Want::Nothing);
            let reason = "the guest shut down".into();
            self.leaving(Leaving { state: ProtectionState::Unprotected, reason, tell: true, owned: false });
        } else {
            self.outputs.push_back(Output::Mute);
            self.rule.shut();
            self.fence("the record says that the VM was stopped");
        }
    }

    fn fence(&mut self, reason: &str) {
        self.outputs.push_back(Output::Fence);
        self.show(ProtectionState::Fenced, reason);
        if self.connected {
            self.outputs.push_back(Output::Close(CloseCode::Done));
        }
        self.phase = Phase::Finished;
    }

    /// Deadlines, and suspicions that came or went.
    pub(super) fn follow_time(&mut self, now: Time) {
        let suspected = self.silent || self.late;
        let paired = self.is_paired();
        let why = if self.silent { "the standby is silent" } else { "the standby does not acknowledge" };
        match &mut self.phase {
            Phase::Reading { until } if now >= *until => {
                self.give_up(now, ProtectionState::Unprotected, "the witness does not answer");
            }
            Phase::Rehearsing { epoch, again_at, .. } if again_at.is_some_and(|at| now >= at) => {
                *again_at = None;
                let epoch = *epoch;
                self.outputs.push_back(Output::Peer(PeerMessage::Rehearse { epoch }));
            }
            Phase::Binding { until, .. } if self.silent || until.is_some_and(|until| now >= until) => {
                self.give_up(now, ProtectionState::Unprotected, "the standby did not acknowledge the first held epoch");
            }
            Phase::Pairing { until } if now >= *until => {
                let reason = "the witness did not confirm the pair".into();
                self.contest(now, After::Degrade(reason), false);
            }
            Phase::Pairing { .. } | Phase::Protected if suspected => {
                self.contest(now, After::Degrade(why.into()), true);
            }
            Phase::Planned(Planned::Draining { .. }) if suspected => {
                self.contest(now, After::Degrade(why.into()), true)
            }
            // Nobody else can save it now.
            Phase::Frozen if self.silent => self.contest(now, After::Degrade(why.into()), false),
            Phase::Planned(Planned::Told { until }) if now >= *until => {
                self.contest(now, After::Degrade("the standby did not take over".into()), false);
            }
            Phase::Stopping(Stopping::Draining { .. }) if suspected => self.mark_stopped(now),
            Phase::Contesting { recoverable: true, .. } if !suspected && paired => {
                // The ask may still be applied: the record is followed (P6).
                self.phase = Phase::Protected;
                self.was_protected = true;
                self.show(ProtectionState::Protected, "the standby is heard again");
                self.ownership.want(now, Want::Follow);
                self.resume();
            }
            Phase::Contesting { stalled_at, since, .. } if stalled_at.is_some_and(|at| now >= at) => {
                *stalled_at = None;
                if self.ownership.stats().last_answer.is_none_or(|at| at <= *since) {
                    self.show(
                        ProtectionState::FailingOver,
                        "the VM stalls: neither the standby nor the witness answers. Its output is held and nothing is lost; bring one of them back",
                    );
                }
            }
            _ => {}
        }
    }

    fn cancel_capture(&mut self) {
        if self.epochs.cancel() {
            self.outputs.push_back(Output::Cancel);
        }
    }

    fn put_back_all(&mut self) {
        for epoch in self.epochs.take_unacknowledged() {
            self.stats.put_back += 1;
            self.outputs.push_back(Output::PutBack { epoch });
        }
    }

    /// The last steps, once no capture is under way (it would begin to hold again what is opened here).
    ///
    /// They wait for nobody. That the VM runs here is written once, and its loss costs nothing: a copy elsewhere is destroyed
    /// for other reasons (P9), and a later session gives nothing back that is older than its own pair.
    pub(super) fn leave(&mut self, now: Time) {
        self.cancel_capture_if_leaving();
        let Phase::Leaving(leaving) = &self.phase else { return };
        if self.epochs.is_capturing() {
            return;
        }
        let Leaving { state, reason, tell, owned } = leaving.clone();
        self.put_back_all();
        self.resume();
        if self.rule.is_holding() {
            self.rule.open();
            self.outputs.push_back(Output::OpenOutput);
        }
        if tell && self.connected {
            self.outputs.push_back(Output::Peer(PeerMessage::Unprotect));
        }
        self.show(state, &reason);
        if owned {
            self.ownership.want(now, Want::Activated);
        }
        if self.connected {
            self.outputs.push_back(Output::Close(CloseCode::Done));
        }
        self.outputs.push_back(Output::Detach);
        self.phase = Phase::Finished;
    }

    fn cancel_capture_if_leaving(&mut self) {
        if matches!(self.phase, Phase::Leaving(_)) {
            self.cancel_capture();
        }
    }

    /// Asks for the next capture, if one is of use and the pipeline has room (back-pressure: none, then the epoch grows).
    pub(super) fn capture(&mut self, now: Time) {
        let next = self.epochs.next();
        let (hold, stay_paused, at_once) = match &self.phase {
            Phase::FirstEpoch { epoch } | Phase::CatchUp { epoch } if next == *epoch => (false, false, true),
            Phase::Binding { epoch, .. } => (next == *epoch, false, next == *epoch),
            Phase::Pairing { .. } | Phase::Protected => (false, false, false),
            // Until the record is read the standby's acknowledgements are what keeps the VM heard.
            Phase::Contesting { .. } if !self.broken => (false, false, false),
            Phase::Stopping(Stopping::Draining { last: None }) | Phase::Planned(Planned::Draining { last: None }) => {
                (false, true, true)
            }
            // To see whether it answers again.
            Phase::Frozen => (false, false, true),
            _ => return,
        };
        let full = self.epochs.in_flight() >= self.config.pipeline;
        // A guest that stands by somebody else's will emits nothing; its last epoch is taken all the same.
        let stands = self.paused || (self.paused_by_other && !stay_paused);
        if self.epochs.is_capturing() || full || stands || !self.connected {
            return;
        }
        let window = if at_once {
            let at = now.max(self.epochs.retry_at());
            Window { earliest: at, latest: at, on_output: None }
        } else {
            let window = self.pacer.window(self.epochs.resumed());
            let retry = self.epochs.retry_at();
            Window { earliest: window.earliest.max(retry), latest: window.latest.max(retry), ..window }
        };
        let epoch = self.epochs.begin_capture(hold, stay_paused, window.latest.max(window.earliest));
        if hold {
            self.rule.hold_after(epoch);
        }
        self.outputs.push_back(Output::Capture { epoch, hold, stay_paused, window });
    }
}
