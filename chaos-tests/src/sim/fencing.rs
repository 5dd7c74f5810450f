//! Fencing as a step between the grant and the activation (`docs/protocol.md` P15).

use heartbeat_core::ids::{Epoch, Generation};
use heartbeat_core::record::Owner;
use replicator_core::standby::{Standby, StandbyConfig, Suspicion, SwitchedOff};

use super::host::{Kept, party};
use super::world::{Event, VM, World};

impl World {
    /// The fence command of `host` has ended.
    pub(super) fn switched_off(&mut self, host: usize, confirmed: bool) {
        if confirmed {
            self.counts.switched_off += 1;
            self.lose_power_by_fence(host);
        } else {
            self.counts.unconfirmed += 1;
        }
        self.fenced(host, confirmed);
    }

    /// The other host is switched off, and has power again after a while.
    pub(super) fn lose_power_by_fence(&mut self, host: usize) {
        let long = self.rng.micros(10_000, 1_200_000);
        self.power_off(1 - host, long);
    }

    /// What the standby of `host` is told.
    pub(super) fn fenced(&mut self, host: usize, confirmed: bool) {
        let now = self.now;
        let result =
            if confirmed { SwitchedOff::Confirmed } else { SwitchedOff::unconfirmed("the fence command failed") };
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_switched_off(now, result);
        }
        self.pump(host);
    }

    /// The copy of `host` that waits for the fence is to be made durable.
    pub(super) fn keep(&mut self, host: usize, grant: Generation, epoch: Epoch) {
        let state = self.hosts[host].staged[&epoch];
        let config = self.hosts[host].standby.as_ref().expect("it said so").config();
        let (session, primary, boot) = (config.generation, config.primary, self.hosts[host].boots);
        let kept = Kept { grant, epoch, state, session, primary, boot };
        // All of its memory is written; and there may be no room for it.
        let wait = self.rng.micros(1_000, 400_000);
        let durable = !self.rng.chance(100);
        self.after(wait, Event::Kept(host, kept, durable));
    }

    pub(super) fn kept(&mut self, host: usize, kept: Kept, durable: bool) {
        if durable {
            self.hosts[host].kept = Some(kept);
        }
        let now = self.now;
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_kept(now, kept.grant, durable);
        }
        self.pump(host);
    }

    pub(super) fn kept_noted(&mut self, host: usize, grant: Generation) {
        let boot = self.hosts[host].boots;
        let kept = self.hosts[host].kept.as_mut().expect("it was found");
        (kept.grant, kept.boot) = (grant, boot);
        let now = self.now;
        if let Some(restart) = &mut self.hosts[host].restart {
            restart.handle_kept(now, grant);
        }
        self.pump(host);
    }

    /// A new life of the agent of `host` goes on with what a former one kept.
    pub(super) fn resume(&mut self, host: usize, grant: Generation, forced: bool) {
        self.counts.resumed += 1;
        let Kept { epoch, state, session, primary, .. } = self.hosts[host].kept.expect("it was found");
        let me = party(host, self.hosts[host].incarnation);
        let mut config = StandbyConfig::new(VM, me, primary, session);
        config.fence_required = self.options.fence;
        config.ownership.generation = self.hosts[host].generation;
        config.ownership.first_request = self.hosts[host].take_requests();
        config.ownership.store = self.options.pair.then(|| self.pair.store_of(host));
        self.hosts[host].staged = [(epoch, state)].into();
        self.checker.holds(host, Some(state));
        self.hosts[host].resumed = true;
        self.hosts[host].standby = Some(Standby::resume(config, self.now, grant, epoch, forced));
        self.lives(host);
        self.pump(host);
    }

    /// The standby of `host` learns of a primary's node that is in another life than the session was with.
    pub(super) fn lives(&mut self, host: usize) {
        let now = self.now;
        let life = self.hosts[host].detector.incarnation();
        if let Some(standby) = &mut self.hosts[host].standby
            && life > Some(standby.config().primary.incarnation)
        {
            standby.handle_suspected(now, Suspicion::Restarted);
        }
    }

    /// `host` has yet to read whether what it kept is the VM, and it is.
    pub(super) fn waits_with_kept(&self, host: usize) -> bool {
        let Some(kept) = self.hosts[host].kept.filter(|_| self.hosts[host].restart.is_some()) else { return false };
        self.record().is_some_and(|record| {
            matches!(record.owner, Owner::Solo { activated: false, .. })
                && (record.generation == kept.grant || record.generation == kept.grant.next())
                && self.hosts[host].marked < Some(kept.grant)
        })
    }

    /// A copy begins to run on `host`: where fencing is required the other one's must stand, heard or not.
    pub(super) fn runs_unfenced(&mut self, host: usize) {
        let runs = self.hosts[1 - host].guest.as_ref().is_some_and(|guest| guest.running);
        if self.options.fence && runs {
            self.checker.broken(|| format!("unfenced: host {host} runs its copy while that of host {} runs", 1 - host));
        }
    }
}
