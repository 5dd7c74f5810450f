//! The step between the grant and the activation, where one is required: the primary's host is off (`docs/protocol.md` P15).
//!
//! Promise: a standby that requires it outputs no mark, and so no activation, before the fence command confirmed that the primary's host is
//! off, an operator said so, or the primary itself said that its guest stands for good. It never takes the place of the grant.
//! Meanwhile the copy is kept for a new life of the agent, which goes on waiting with it ([`Standby::resume`]); if it could not be kept that life gives
//! the grant back. What was confirmed is not kept: it is asked for anew.

use alloc::format;
use alloc::string::String;
use core::time::Duration;

use heartbeat_core::ids::{Epoch, Generation};
use heartbeat_core::ownership::Want;
use heartbeat_core::time::Time;

use super::{Output, Phase, Standby, StandbyConfig, SwitchedOff};
use crate::state::ProtectionState;

/// The first wait before something is tried again. It doubles with each try that fails.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
/// The longest. It is never given up: whoever mends the fence device finds the VM running.
const AGAIN_LONGEST: Duration = Duration::from_secs(60);

/// When something is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Again {
    at: Time,
}

/// Why the primary's guest does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Safe {
    /// The primary said so in this session: it paused its guest for good, or its process has ended.
    PrimarySays,
    /// Its host is off: so what it had of the VM is gone, too.
    HostIsOff,
}

/// Whether the copy would outlive this life of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kept {
    No,
    /// It is being written, to be noted with this grant.
    UnderWay(Generation),
    Durable,
}

impl Standby {
    /// A machine that goes on with the copy that a former life of this agent kept: [`crate::restart::End::Kept`], of that grant. It waits for the
    /// primary's host to be off, as that life did. `config` is the session's that the copy came by, but for who asks.
    ///
    /// # Panics
    /// If the primary is this node.
    #[must_use]
    pub fn resume(config: StandbyConfig, now: Time, grant: Generation, epoch: Epoch, forced: bool) -> Self {
        let mut standby = Self::new(config);
        (standby.connected, standby.lost_at, standby.asked) = (false, Some(now), true);
        (standby.binding, standby.acknowledged, standby.kept) = (Some(epoch), Some(epoch), Kept::Durable);
        standby.safe = forced.then_some(Safe::HostIsOff);
        standby.fence_or_mark(grant, epoch);
        standby
    }

    /// Whether the [`Output::Keep`] of this grant was done.
    pub fn handle_kept(&mut self, now: Time, grant: Generation, kept: bool) {
        if self.kept == Kept::UnderWay(grant) {
            self.kept = if kept { Kept::Durable } else { Kept::No };
        }
        self.advance(now);
    }

    /// Whether this life may end while it waits for the primary's host to be off, and the copy is not lost by it. `None`: that is being seen to.
    #[must_use]
    pub fn is_kept(&self) -> Option<bool> {
        (!matches!(self.kept, Kept::UnderWay(_))).then_some(self.kept == Kept::Durable)
    }

    /// What came of [`Output::SwitchOff`].
    pub fn handle_switched_off(&mut self, now: Time, result: SwitchedOff) {
        // Whatever the phase: a host that is off is off.
        let confirmed = result == SwitchedOff::Confirmed;
        if confirmed {
            self.safe = Some(Safe::HostIsOff);
        }
        match (&self.phase, result) {
            (Phase::Fencing { generation, again: None }, SwitchedOff::Unconfirmed { reason }) => {
                let generation = *generation;
                if !self.silent && self.heard_since_grant {
                    self.give_back_unfenced(now);
                } else {
                    let again = self.later(now);
                    self.phase = Phase::Fencing { generation, again: Some(again) };
                    let wait = again.at.since(now);
                    self.show(
                        ProtectionState::FailingOver,
                        &format!("{reason}. The VM is this host's and does not run before that is confirmed; it is tried again in {wait:?}"),
                    );
                }
            }
            _ => self.go_on_if_safe(),
        }
        self.advance(now);
    }

    /// The operator says that the primary's host is off.
    ///
    /// # Errors
    /// One sentence for the operator: why that is not asked. Then nothing changed.
    pub fn handle_operator_confirmed(&mut self, now: Time) -> Result<(), &'static str> {
        if !self.is_fencing() {
            return Err("this host does not wait for another one to be off");
        }
        self.handle_switched_off(now, SwitchedOff::Confirmed);
        Ok(())
    }

    /// The operator asks to have the primary's host switched off now, not only when it is time.
    ///
    /// # Errors
    /// As for [`Standby::handle_operator_confirmed`].
    pub fn handle_operator_fence(&mut self, now: Time) -> Result<(), &'static str> {
        match self.phase {
            Phase::Fencing { generation, again } => {
                if again.is_some() {
                    self.fence(generation);
                }
                self.advance(now);
                Ok(())
            }
            _ => Err("this host does not wait for another one to be off"),
        }
    }

    /// The operator gives the VM back to its primary, whose host is well and is not switched off. This copy is kept.
    ///
    /// # Errors
    /// One sentence for the operator: why not. Then nothing changed.
    pub fn handle_operator_give_back(&mut self, now: Time) -> Result<(), &'static str> {
        match self.phase {
            Phase::Fencing { again: Some(_), .. } => {
                self.give_back_unfenced(now);
                self.advance(now);
                Ok(())
            }
            // It may still succeed, and then the primary has nothing left.
            Phase::Fencing { again: None, .. } => {
                Err("the primary's host is being switched off just now; ask again when the fence command has ended")
            }
            _ => Err("only a VM that waits for its other host to be off is given back"),
        }
    }

    /// Whether the VM is this node's, and waits for the primary's host to be off.
    #[must_use]
    pub fn is_fencing(&self) -> bool {
        matches!(self.phase, Phase::Fencing { .. })
    }

    pub(super) fn fence(&mut self, generation: Generation) {
        self.phase = Phase::Fencing { generation, again: None };
        self.show(
            ProtectionState::FailingOver,
            "the VM is this host's; the other host is switched off before it runs here",
        );
        // One that found no room finds some later.
        if let (Kept::No, Some(epoch)) = (self.kept, self.acknowledged) {
            self.kept = Kept::UnderWay(generation);
            self.outputs.push_back(Output::Keep { generation, epoch });
        }
        self.outputs.push_back(Output::SwitchOff);
    }

    /// The primary says, in this session, that its guest does not run and will not: nobody needs to be switched off for it.
    pub(super) fn primary_stands(&mut self) {
        self.safe = self.safe.or(Some(Safe::PrimarySays));
        self.go_on_if_safe();
    }

    /// The primary goes on alone, or may.
    pub(super) fn primary_goes_on(&mut self) {
        (self.safe, self.heard_since_grant, self.tries, self.kept) = (None, false, 0, Kept::No);
    }

    /// The primary's node is heard, in the life that the session is with, though it was silent: it may have the VM back rather than
    /// that nobody runs it.
    pub(super) fn primary_lives(&mut self, now: Time) {
        if self.is_fencing() && !self.restarted {
            self.heard_since_grant = true;
            // One that is being switched off is not given anything.
            if matches!(self.phase, Phase::Fencing { again: Some(_), .. }) {
                self.give_back_unfenced(now);
            }
        }
    }

    /// The host of the primary is off, and what this one has is all there is.
    pub(super) fn activation_failed(&mut self, now: Time, generation: Generation, reason: &str) {
        let again = self.later(now);
        self.phase = Phase::Failed { generation, again };
        let wait = again.at.since(now);
        self.show(
            ProtectionState::Error,
            &format!("the activation failed: {reason}. The other host is off, so that this is the only copy: it is kept, and tried again in {wait:?}"),
        );
    }

    pub(super) fn tries_again_at(&self) -> Option<Time> {
        match self.phase {
            Phase::Fencing { again: Some(again), .. } | Phase::Failed { again, .. } => Some(again.at),
            _ => None,
        }
    }

    pub(super) fn try_again(&mut self, now: Time) {
        if self.tries_again_at().is_none_or(|at| now < at) {
            return;
        }
        match self.phase {
            Phase::Fencing { generation, .. } => self.fence(generation),
            Phase::Failed { generation, .. } => {
                self.show(ProtectionState::FailingOver, "the activation is tried again");
                self.activate(generation);
            }
            _ => {}
        }
    }

    fn go_on_if_safe(&mut self) {
        if let (Phase::Fencing { generation, .. }, Some(_), Some(epoch)) = (&self.phase, self.safe, self.acknowledged) {
            let generation = *generation;
            self.tries = 0;
            self.mark(generation, epoch);
        }
    }

    fn give_back_unfenced(&mut self, now: Time) {
        self.phase = Phase::GivingBack;
        self.show(
            ProtectionState::Degraded,
            "the other host could not be switched off and is there: the VM is given back to it. This copy is kept",
        );
        self.ownership.want(now, Want::GiveBack);
    }

    fn later(&mut self, now: Time) -> Again {
        let wait = AGAIN_FIRST.saturating_mul(1 << self.tries.min(16)).min(AGAIN_LONGEST);
        self.tries += 1;
        Again { at: now + wait }
    }
}

impl SwitchedOff {
    /// It is not known to be off, because of this.
    #[must_use]
    pub fn unconfirmed(reason: impl Into<String>) -> Self {
        Self::Unconfirmed { reason: reason.into() }
    }
}
