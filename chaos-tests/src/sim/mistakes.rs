//! Deliberate mistakes that need more than a line where they are made.

use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};

use super::network::{Datagram, WITNESS};
use super::options::Wiring;
use super::world::{VM, World};

impl World {
    /// Whether the witness answered in a way that it must not.
    pub(super) fn answered_by_mistake(&mut self, from: usize, request: &StoreRequest) -> bool {
        let (record, applied) = match (self.wiring, request.op) {
            // It says that it did what it did not do.
            (Wiring::WitnessForgets, op) if self.rng.chance(100) => {
                let StoreOp::Change { owner, .. } = op else { return true };
                (Record::changed(self.witness.store(), self.record(), owner), true)
            }
            (Wiring::ReadUndurable, StoreOp::Read) => {
                let Some(record) = self.writing else { return false };
                (record, false)
            }
            _ => return false,
        };
        let store = self.witness.store();
        let answer = StoreAnswer { id: request.id, vm: VM, store, record: Some(record), applied };
        if self.wiring == Wiring::ReadUndurable {
            self.checker.shows(answer.record);
        }
        self.datagram(WITNESS, from, Datagram::Answer(answer));
        true
    }

    /// [`Wiring::RefusalIsDefeat`].
    pub(super) fn defeated_by_mistake(&mut self, to: usize, answer: &StoreAnswer) {
        let refused = !answer.applied && answer.id == self.hosts[to].asked;
        if self.wiring == Wiring::RefusalIsDefeat && refused && self.hosts[to].primary.is_some() {
            self.fence(to);
        }
    }

    /// The guest of this host is destroyed because it runs elsewhere, as far as the host knows.
    pub(super) fn fence(&mut self, host: usize) {
        let owner = self.record().map(|record| record.owner);
        let elsewhere = match owner {
            Some(Owner::Solo { node: winner, activated: true, .. } | Owner::Paired { primary: winner, .. }) => {
                winner.node != super::host::node(host)
            }
            Some(Owner::Stopped { .. }) => true,
            _ => false,
        };
        // That one who is destroyed early was wrong is known when the winner cannot run.
        if !elsewhere && self.wiring != Wiring::DestroyEarly {
            self.checker.broken(|| format!("host {host} destroyed its guest, and the record says {owner:?}"));
        }
        self.counts.fenced += 1;
        self.hosts[host].destroyed |= self.hosts[host].guest.is_some();
        self.hosts[host].activated_from = None;
        self.end_guest(host);
    }

    /// The copy on this host cannot run: the other one must have its guest still, unless a fault took it.
    pub(super) fn cannot_run(&mut self, host: usize) {
        if self.hosts[1 - host].destroyed {
            self.checker.broken(|| {
                format!("no copy is left: host {} destroyed its guest and host {host} cannot run", 1 - host)
            });
        }
    }

    /// [`Wiring::ActivateTwice`]: the agent restarts and loads again what runs already (`docs/protocol.md` P62).
    pub(super) fn activated_twice_by_mistake(&mut self, host: usize) {
        let from = self.hosts[host].activated_from;
        if self.wiring == Wiring::ActivateTwice
            && let (Some(guest), Some(from)) = (&mut self.hosts[host].guest, from)
        {
            guest.state = from;
        }
    }
}
