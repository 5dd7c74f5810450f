//! Two hosts without a third one: each keeps a store of its own, and one of them the record.
//!
//! A host that loses power forgets what was not durable, and begins anew without a guest. A host that is forced out is fenced first; when it
//! has power again its store must ask the other one before it answers (`docs/protocol.md` P13).

use std::cmp::Reverse;
use std::time::Duration;

use heartbeat_core::ids::{Incarnation, StoreId};
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::StoreRequest;
use heartbeat_core::witness::{Witness, WitnessOutput};

use super::host::{Guest, node, party};
use super::network::Datagram;
use super::options::Wiring;
use super::world::{Event, VM, World};

/// How often a host asks the other one, while there is something to ask.
const ASK: Duration = Duration::from_millis(60);

/// What the two hosts keep.
#[derive(Debug)]
pub(super) struct Pair {
    stores: [Witness; 2],
    /// Whose store each host asks. Durable.
    asks: [usize; 2],
    /// Whose store the record is in: the host that forced last.
    keeper: usize,
    /// Whose operator wants to start the VM from its old disk, once the host's own store says that it may.
    boots: [bool; 2],
    /// Who is forcing: the write that makes it so, and whether the other one had gone alone.
    forcing: [Option<(u64, bool)>; 2],
}

fn store(host: usize) -> StoreId {
    StoreId([0x50 + u8::try_from(host).expect("two hosts"); 16])
}

impl Pair {
    pub(super) fn new() -> Self {
        let stores = [0, 1].map(|host| Witness::new(store(host), []));
        Self { stores, asks: [0; 2], keeper: 0, boots: [false; 2], forcing: [None; 2] }
    }

    pub(super) fn record(&self) -> Option<&Record> {
        self.stores[self.keeper].record(VM)
    }

    /// The store that a host asks.
    pub(super) fn store_of(&self, host: usize) -> StoreId {
        store(self.asks[host])
    }

    /// A standby asks where its primary does. What its own store keeps must say that it may.
    pub(super) fn follow(&mut self, host: usize) {
        if self.asks[host] != self.asks[1 - host] {
            let lost = self.stores[host].record(VM).is_some_and(|record| {
                matches!(record.owner, Owner::Solo { node: winner, .. } | Owner::Paired { primary: winner, .. } if winner.node == node(1 - host))
            });
            if self.asks[host] != host || lost {
                self.asks[host] = self.asks[1 - host];
            }
        }
    }
}

impl World {
    /// Whether there is a record that somebody may be told of.
    pub(super) fn is_kept(&self) -> bool {
        let keeper = self.pair.keeper;
        self.hosts[keeper].alive && !self.pair.stores[keeper].is_unconfirmed(VM)
    }

    pub(super) fn ask_pair(&mut self, host: usize, request: StoreRequest) {
        let keeper = self.pair.asks[host];
        let datagram = Datagram::Request { from: host, request };
        if keeper == host {
            self.after(Duration::from_micros(80), Event::Deliver { to: host, datagram });
        } else {
            self.datagram(host, keeper, datagram);
        }
    }

    pub(super) fn asked_of_host(&mut self, keeper: usize, from: usize, request: StoreRequest) {
        self.pair.stores[keeper].handle_request(node(from), from as u64, request);
        self.pump_kept(keeper);
    }

    fn pump_kept(&mut self, keeper: usize) {
        while let Some(output) = self.pair.stores[keeper].poll_output() {
            match output {
                WitnessOutput::Persist { record, token, .. } => {
                    self.note(|_| format!("host {keeper} keeps {:?}", record.owner));
                    if let Owner::Paired { .. } = record.owner {
                        self.counts.pairings += u64::from(keeper == self.pair.keeper);
                        self.was_protected = true;
                    }
                    let wait = self.rng.micros(50, 9_000);
                    self.after(wait, Event::KeptDurable(keeper, token));
                }
                WitnessOutput::Answer { tag, answer, .. } => {
                    let to = usize::try_from(tag).expect("a host");
                    let datagram = Datagram::Answer(answer);
                    if to == keeper {
                        self.after(Duration::from_micros(80), Event::Deliver { to, datagram });
                    } else {
                        self.datagram(keeper, to, datagram);
                    }
                }
            }
        }
    }

    pub(super) fn kept_durable(&mut self, keeper: usize, token: u64) {
        self.pair.stores[keeper].handle_persisted(token);
        if let Some((_, alone)) = self.pair.forcing[keeper].take_if(|(forcing, _)| *forcing == token) {
            self.forced(keeper, alone);
        }
        self.pump_kept(keeper);
    }

    /// Asks what the other host keeps, if that can be of use.
    pub(super) fn ask_other(&mut self, host: usize) {
        self.after(ASK, Event::AskOther(host));
        self.start_again(host);
        let kept = self.pair.stores[host].record(VM).copied();
        let waits = kept.is_some_and(
            |record| matches!(record.owner, Owner::Solo { node: other, activated: false, .. } if other.node != node(host)),
        );
        if self.pair.stores[host].is_unconfirmed(VM) || waits {
            let life = self.hosts[host].incarnation;
            self.datagram(host, 1 - host, Datagram::AskKept { life });
        }
    }

    pub(super) fn asked_of_kept(&mut self, host: usize, life: Incarnation) {
        if let Some(record) = self.pair.stores[host].shown(VM) {
            self.datagram(host, 1 - host, Datagram::Kept { life, record });
        }
    }

    pub(super) fn told_of_kept(&mut self, host: usize, life: Incarnation, record: Option<Record>) {
        if life != self.hosts[host].incarnation {
            return;
        }
        let before = self.pair.stores[host].record(VM).map(|record| record.generation);
        self.counts.learnt += u64::from(record.map(|record| record.generation) > before);
        self.pair.stores[host].handle_others_record(VM, record.as_ref());
        self.pump_kept(host);
    }

    /// The agent's new life reads what its store had made durable.
    pub(super) fn kept_restarts(&mut self, host: usize) {
        if !self.options.pair {
            return;
        }
        let mut writing = None;
        self.events.retain(|Reverse(queued)| match queued.event {
            Event::KeptDurable(of, token) if of == host => {
                writing = Some(token);
                false
            }
            Event::Force(of) => of != host,
            _ => true,
        });
        if let Some(token) = writing.filter(|_| self.rng.chance(500)) {
            self.kept_durable_silently(host, token);
        }
        self.pair.forcing[host] = None;
        let record = self.pair.stores[host].record(VM).map(|record| (VM, *record));
        self.pair.stores[host] = if self.wiring == Wiring::AnswerUnconfirmed {
            Witness::new(store(host), record)
        } else {
            Witness::of_pair(store(host), record, node(host))
        };
    }

    /// It was written a moment before the agent died, and nobody was told.
    fn kept_durable_silently(&mut self, host: usize, token: u64) {
        self.pair.stores[host].handle_persisted(token);
        if let Some((_, alone)) = self.pair.forcing[host].filter(|(forcing, _)| *forcing == token) {
            self.begins_from(host, alone);
        }
    }

    // --- power ---

    pub(super) fn power_off(&mut self, host: usize, long: Duration) {
        if !self.hosts[host].alive {
            return;
        }
        (self.hosts[host].alive, self.hosts[host].boots) = (false, self.hosts[host].boots + 1);
        self.end_guest(host);
        self.hosts[host].gate = super::host::Gate::default();
        // What was being activated runs nowhere, and is not heard when the power is back.
        self.events.retain(
            |Reverse(queued)| !matches!(queued.event, Event::Activated(of, ..) | Event::Marked(of, _) | Event::SwitchedOff(of, _) | Event::Kept(of, ..) | Event::KeptNoted(of, _) if of == host),
        );
        // Nobody sends again what was lost on its way.
        if let Some(connection) = &mut self.connection {
            connection.lost[host] = true;
            connection.queues[1 - host].iter_mut().for_each(std::collections::VecDeque::clear);
        }
        self.after(long, Event::PowerOn(host));
    }

    pub(super) fn power_on(&mut self, host: usize) {
        self.hosts[host].alive = true;
        // Nobody is told of what the host was about to do.
        self.events.retain(|Reverse(queued)| {
            !matches!(queued.event, Event::GuestRuns(of) | Event::Beat(of) | Event::AskOther(of) if of == host)
        });
        self.pair.boots[host] = self.rng.chance(500);
        self.restart(host);
        self.after(Duration::from_micros(7), Event::GuestRuns(host));
        self.after(Duration::from_millis(3), Event::Beat(host));
        self.after(Duration::from_millis(5), Event::AskOther(host));
    }

    /// A host that lost power while the VM was its own starts it from its disk. What was forced out meanwhile is not its own any more.
    fn start_again(&mut self, host: usize) {
        let state = &self.hosts[host];
        let idle = state.primary.is_none() && state.standby.is_none() && state.restart.is_none();
        let kept = &self.pair.stores[host];
        let owner = kept.record(VM).map(|record| record.owner).filter(|_| !kept.is_unconfirmed(VM));
        let mine = matches!(owner, Some(Owner::Solo { node: owner, .. }) if owner.node == node(host));
        if !self.pair.boots[host] || !mine || !idle || state.guest.is_some() || self.shut_down {
            return;
        }
        self.pair.boots[host] = false;
        self.note(|_| format!("host {host} starts the VM from its disk"));
        let state = self.histories.boot();
        if self.pair.keeper == host {
            self.checker.forced(&self.histories, state, true);
        }
        self.hosts[host].guest = Some(Guest::running(state));
        (self.hosts[host].had_guest, self.hosts[host].muted) = (true, false);
        self.protect_later(host, true);
    }

    // --- force ---

    /// The operator of `host` wants to go on without the other one. That is fenced for `long`, and only then.
    pub(super) fn force(&mut self, host: usize, long: Duration) {
        if self.acting(host).is_none() || !self.may_be_forced(host) || self.pair.forcing[host].is_some() {
            return;
        }
        if self.wiring != Wiring::ShowWhileFencing && !self.pair.stores[host].handle_forcing(VM) {
            return;
        }
        if self.wiring != Wiring::ForceUnconfirmed {
            self.power_off(1 - host, long);
        }
        // It may have power again before the first step.
        let wait = self.rng.micros(50, 300_000);
        let wait = if self.rng.chance(500) { wait } else { long + wait };
        self.after(wait, Event::Force(host));
    }

    fn may_be_forced(&self, host: usize) -> bool {
        let state = &self.hosts[host];
        state.primary.as_ref().is_some_and(|primary| primary.may_be_forced().is_ok())
            || state.standby.as_ref().is_some_and(|standby| standby.may_be_forced().is_ok())
            || state.restart.as_ref().is_some_and(|restart| restart.may_be_forced().is_ok())
    }

    /// The other host was confirmed dead, and is forced out unless the VM can go on without that.
    pub(super) fn is_confirmed(&mut self, host: usize) {
        if self.wiring == Wiring::ShowWhileFencing {
            self.pair.stores[host].handle_forcing(VM);
        }
        let alone = matches!(self.record().map(|record| record.owner), Some(Owner::Solo { node: owner, .. } | Owner::Stopped { node: owner }) if owner.node != node(host));
        let (me, seen) = (party(host, self.hosts[host].incarnation), self.hosts[host].generation);
        if !self.may_be_forced(host) || !self.pair.stores[host].handle_force(VM, me, seen) {
            self.pair.stores[host].handle_force_over(VM);
            return;
        }
        while let Some(output) = self.pair.stores[host].poll_output() {
            if let WitnessOutput::Persist { token, .. } = output {
                self.pair.forcing[host] = Some((token, alone));
                // A slow disk may need longer than the dead host needs to come back.
                let longest = if self.rng.chance(700) { 9_000 } else { 900_000 };
                let wait = self.rng.micros(50, longest);
                self.after(wait, Event::KeptDurable(host, token));
            }
        }
    }

    /// The force is durable.
    fn forced(&mut self, host: usize, alone: bool) {
        self.begins_from(host, alone);
        self.pair.stores[host].handle_force_over(VM);
        let (now, at) = (self.now, store(host));
        if let Some(primary) = &mut self.hosts[host].primary {
            primary.handle_forced(now, at);
        }
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_forced(now, at);
        }
        if let Some(restart) = &mut self.hosts[host].restart {
            restart.handle_forced(now, at);
        }
        self.pump(host);
    }

    /// The record is this host's from here on, and the VM goes on from what it has.
    fn begins_from(&mut self, host: usize, alone: bool) {
        self.counts.forced += 1;
        // A copy that was activated is not gone on from a second time, whatever became of its guest.
        let staged =
            self.hosts[host].standby.as_ref().filter(|_| !self.hosts[host].had_guest).and_then(|standby| {
                standby.acknowledged().and_then(|epoch| self.hosts[host].staged.get(&epoch).copied())
            });
        let kept = self.hosts[host].kept.filter(|_| self.hosts[host].restart.is_some() && !self.hosts[host].had_guest);
        let state = self.hosts[host].guest.as_ref().map(|guest| guest.state);
        let state = state.or(staged).or(kept.map(|kept| kept.state));
        (self.pair.keeper, self.pair.asks[host]) = (host, host);
        if let Some(state) = state {
            self.counts.rolled_back += u64::from(self.checker.forced(&self.histories, state, alone));
        }
        self.note(|_| format!("host {host} forced the other one out"));
    }
}
