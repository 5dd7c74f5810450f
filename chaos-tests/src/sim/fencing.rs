//! Fencing as a step between the grant and the activation (`docs/protocol.md` P15).

use replicator_core::standby::SwitchedOff;

use super::world::World;

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

    /// A copy begins to run on `host`: where fencing is required the other one's must stand, heard or not.
    pub(super) fn runs_unfenced(&mut self, host: usize) {
        let runs = self.hosts[1 - host].guest.as_ref().is_some_and(|guest| guest.running);
        if self.options.fence && runs {
            self.checker.broken(|| format!("unfenced: host {host} runs its copy while that of host {} runs", 1 - host));
        }
    }
}
