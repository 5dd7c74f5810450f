//! Who keeps the record, and the messages to and from there: a witness, or, where there is no third host, the two hosts (`docs/protocol.md` P13).

use heartbeat_core::ids::StoreId;
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};
use heartbeat_core::witness::{Witness, WitnessOutput};

use crate::check::{State, Violation};
use crate::trouble::Memory;
use crate::wiring::Wiring;
use crate::world::{Action, Guest, VM, World, host_of, node, spend};

/// A store and its disk.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Store {
    pub(crate) machine: Witness,
    /// What is being made durable; its token is 0 if it was answered already (by mistake).
    pub(crate) writing: Option<(u64, Record)>,
    /// What its disk has.
    pub(crate) disk: Option<Record>,
    /// Of a host that forces the other one out: the write that makes it so, and whether that one had gone alone.
    forcing: Option<(u64, bool)>,
    /// The same, while that one was confirmed dead and nothing is written yet.
    pub(crate) confirmed: bool,
}

impl Store {
    /// The witness's alone, or one for each host.
    pub(crate) fn all(third: bool) -> Vec<Self> {
        let store = |index| {
            let machine = Witness::new(id(index), []);
            Self { machine, writing: None, disk: None, forcing: None, confirmed: false }
        };
        (0..if third { 1 } else { 2 }).map(store).collect()
    }
}

fn id(store: usize) -> StoreId {
    StoreId([0x50 + u8::try_from(store).expect("at most two"); 16])
}

/// A message of a store, or to it.
#[derive(Clone, Debug, Hash)]
pub(crate) enum Packet {
    /// To this store.
    Request(usize, StoreRequest),
    /// To this host.
    Answer(usize, StoreAnswer),
    /// To this host: what the other one keeps.
    Kept(usize, Option<Record>),
}

impl Packet {
    /// An order that does not depend on how they came to be under way.
    fn key(&self) -> (u8, usize, u64, u64, bool) {
        let revision = |record: Option<Record>| record.map_or(0, |record| record.revision.0);
        match self {
            Self::Request(store, request) => (0, host_of(request.asker.node), request.id, *store as u64, false),
            Self::Answer(to, answer) => (1, *to, answer.id, revision(answer.record), answer.applied),
            Self::Kept(to, record) => (2, *to, 0, revision(*record), false),
        }
    }
}

impl World {
    pub(crate) fn is_pair(&self) -> bool {
        self.stores.len() == 2
    }

    /// The durable record that counts.
    pub(crate) fn record(&self) -> Option<&Record> {
        self.stores[self.keeper].disk.as_ref()
    }

    /// The store that a host asks, where it knows that from the beginning.
    pub(crate) fn store_of(&self, host: usize) -> Option<StoreId> {
        self.is_pair().then(|| id(self.hosts[host].asks))
    }

    pub(crate) fn store_actions(&self, actions: &mut Vec<Action>) {
        for (index, packet) in self.packets.iter().enumerate() {
            let to = match packet {
                Packet::Request(store, _) => Some(*store).filter(|_| self.is_pair()),
                Packet::Answer(to, _) | Packet::Kept(to, _) => Some(*to),
            };
            if to.is_some_and(|to| !self.hosts[to].alive) {
                continue;
            }
            actions.push(Action::Arrives(index, false));
            if self.left.doubled > 0 {
                actions.push(Action::Arrives(index, true));
            }
        }
        for (index, store) in self.stores.iter().enumerate() {
            if store.writing.is_some() {
                actions.push(Action::Durable(index));
            }
        }
        if !self.is_pair() && self.left.witness_crashes > 0 {
            actions.push(Action::WitnessCrash(false));
            if self.stores[0].writing.is_some() {
                actions.push(Action::WitnessCrash(true));
            }
        }
    }

    pub(crate) fn send(&mut self, packet: Packet) {
        let at = self.packets.partition_point(|known| known.key() <= packet.key());
        self.packets.insert(at, packet);
    }

    pub(crate) fn arrives(&mut self, index: usize, again: bool) {
        let packet = if again {
            spend(&mut self.left.doubled);
            self.packets[index].clone()
        } else {
            self.packets.remove(index)
        };
        match packet {
            Packet::Request(store, request) => self.asked(store, request),
            Packet::Answer(to, answer) => {
                let now = self.hosts[to].now;
                let refused = !answer.applied && answer.id == self.hosts[to].asked;
                if self.wiring == Wiring::RefusalIsDefeat && refused && self.hosts[to].primary.is_some() {
                    self.fence(to);
                }
                if self.wiring == Wiring::FreeFormerLife {
                    self.freed_by_mistake(to, &answer);
                }
                self.input_any(
                    to,
                    |primary| primary.handle_answer(now, &answer),
                    |standby| standby.handle_answer(now, &answer),
                    |restart| restart.handle_answer(now, &answer),
                );
            }
            Packet::Kept(to, record) => {
                self.stores[to].machine.handle_others_record(VM, record.as_ref());
                self.pump_store(to);
            }
        }
    }

    fn asked(&mut self, store: usize, request: StoreRequest) {
        let kept = &mut self.stores[store];
        let undurable = kept.writing.filter(|_| self.wiring == Wiring::ReadUndurable);
        if let (Some((_, record)), StoreOp::Read) = (undurable, request.op) {
            let answer =
                StoreAnswer { id: request.id, vm: request.vm, store: id(store), record: Some(record), applied: false };
            self.answer(host_of(request.asker.node), answer);
            return;
        }
        // One write at a time: a mistaken early answer must not lose the one before.
        if kept.writing.is_some_and(|(token, _)| token == 0) {
            self.durable(store);
        }
        self.stores[store].machine.handle_request(request.asker.node, 0, request);
        self.pump_store(store);
    }

    fn pump_store(&mut self, store: usize) {
        while let Some(output) = self.stores[store].machine.poll_output() {
            match output {
                WitnessOutput::Persist { record, token, .. } => {
                    let forgets = self.wiring == Wiring::WitnessForgets;
                    self.stores[store].writing = Some((if forgets { 0 } else { token }, record));
                    if forgets {
                        self.stores[store].machine.handle_persisted(token);
                    }
                }
                WitnessOutput::Answer { to, answer, .. } => self.answer(host_of(to), answer),
            }
        }
    }

    fn answer(&mut self, to: usize, answer: StoreAnswer) {
        // Revisions are of one store. What one of the hosts keeps is never lost with a restart here: its disk is what it said.
        if !self.is_pair() {
            self.checker.shows(answer.record);
        }
        self.send(Packet::Answer(to, answer));
    }

    pub(crate) fn durable(&mut self, store: usize) {
        let kept = &mut self.stores[store];
        let (token, record) = kept.writing.take().expect("offered only if there is one");
        kept.disk = Some(record);
        if token == 0 {
            return;
        }
        kept.machine.handle_persisted(token);
        if let Some((_, alone)) = kept.forcing.take_if(|(forcing, _)| *forcing == token) {
            self.stores[store].machine.handle_force_over(VM);
            self.forced(store, alone);
        }
        self.pump_store(store);
    }

    pub(crate) fn witness_crashes(&mut self, kept: bool) {
        spend(&mut self.left.witness_crashes);
        let store = &mut self.stores[0];
        let writing = store.writing.take();
        if let Some((_, record)) = writing.filter(|_| kept) {
            store.disk = Some(record);
        }
        store.machine = Witness::new(id(0), store.disk.map(|record| (VM, record)));
        self.checker.found(store.disk);
    }

    // --- two hosts without a third ---

    /// The agent of this host has ended: its store with it. What it was writing was kept, or not.
    pub(crate) fn store_ends(&mut self, host: usize, kept: bool) {
        let pair = self.is_pair();
        self.packets.retain(|packet| match packet {
            Packet::Request(store, request) => !pair || *store != host || host_of(request.asker.node) != host,
            Packet::Answer(to, _) | Packet::Kept(to, _) => *to != host,
        });
        if !self.is_pair() {
            return;
        }
        let store = &mut self.stores[host];
        let forcing = store.forcing.take();
        store.confirmed = false;
        if let Some((token, record)) = store.writing.take().filter(|_| kept) {
            store.disk = Some(record);
            if let Some((_, alone)) = forcing.filter(|(forcing, _)| *forcing == token) {
                self.begins_from(host, alone);
            }
        }
    }

    /// A new life of it.
    pub(crate) fn store_begins(&mut self, host: usize) {
        if self.is_pair() {
            let store = &mut self.stores[host];
            let records = store.disk.map(|record| (VM, record));
            store.machine = if self.wiring == Wiring::AnswerUnconfirmed {
                Witness::new(id(host), records)
            } else {
                Witness::of_pair(id(host), records, node(host))
            };
        }
    }

    /// Whether this host's store must hear of the other's, and has no word of it under way.
    pub(crate) fn wants_to_be_shown(&self, host: usize) -> bool {
        let owner = self.stores[host].disk.map(|record| record.owner);
        let waits =
            matches!(owner, Some(Owner::Solo { node: winner, activated: false, .. }) if winner.node != node(host));
        self.hosts.iter().all(|host| host.alive)
            && (waits || self.stores[host].machine.is_unconfirmed(VM))
            && !self.packets.iter().any(|packet| matches!(packet, Packet::Kept(to, _) if *to == host))
            && self.shown_by(1 - host).is_some()
    }

    /// What this host shows the other one of its store, if anything.
    fn shown_by(&self, host: usize) -> Option<Option<Record>> {
        let store = &self.stores[host];
        if self.wiring == Wiring::ShowWhileForcing { Some(store.disk) } else { store.machine.shown(VM) }
    }

    pub(crate) fn show(&mut self, host: usize) {
        let record = self.shown_by(1 - host).expect("offered only then");
        self.send(Packet::Kept(host, record));
    }

    /// A standby asks where its primary does; it leaves its own store for that only if that says that the VM is its primary's.
    ///
    /// `false`: not this one.
    pub(crate) fn follow_keeper(&mut self, host: usize) -> bool {
        let theirs = self.hosts[1 - host].asks;
        let own = &self.stores[host.min(self.stores.len() - 1)];
        let lost = !own.machine.is_unconfirmed(VM)
            && matches!(own.disk.map(|record| record.owner),
                Some(Owner::Solo { node: winner, .. } | Owner::Paired { primary: winner, .. }) if winner.node == node(1 - host));
        let known = &mut self.hosts[host].asks;
        if self.stores.len() == 2 && *known == host && theirs != host && !lost {
            return false;
        }
        *known = theirs;
        true
    }

    pub(crate) fn may_be_forced(&self, host: usize) -> bool {
        let state = &self.hosts[host];
        state.primary.as_ref().is_some_and(|primary| primary.may_be_forced().is_ok())
            || state.standby.as_ref().is_some_and(|standby| standby.may_be_forced().is_ok())
            || state.restart.as_ref().is_some_and(|restart| restart.may_be_forced().is_ok())
    }

    /// Whether the operator may force the other host out.
    pub(crate) fn is_forceable(&self, host: usize) -> bool {
        let dead = !self.hosts[1 - host].alive || self.wiring == Wiring::ForceUnconfirmed;
        self.is_pair() && dead && !self.stores[host].confirmed && self.may_be_forced(host)
    }

    pub(crate) fn confirm(&mut self, host: usize) {
        spend(&mut self.left.forces);
        let store = &mut self.stores[host];
        store.confirmed = true;
        if self.wiring != Wiring::ShowWhileFencing {
            store.machine.handle_forcing(VM);
        }
    }

    pub(crate) fn force(&mut self, host: usize) {
        self.stores[host].confirmed = false;
        if self.wiring == Wiring::ShowWhileFencing {
            self.stores[host].machine.handle_forcing(VM);
        }
        let alone = matches!(self.owner(), Some(Owner::Solo { node: owner, .. } | Owner::Stopped { node: owner }) if owner.node != node(host));
        let (me, seen) = (self.party(host), self.hosts[host].generation);
        if self.may_be_forced(host) && self.stores[host].machine.handle_force(VM, me, seen) {
            self.pump_store(host);
            let store = &mut self.stores[host];
            store.forcing = store.writing.map(|(token, _)| (token, alone));
        } else {
            self.stores[host].machine.handle_force_over(VM);
        }
    }

    /// The force is durable.
    fn forced(&mut self, host: usize, alone: bool) {
        self.begins_from(host, alone);
        let (now, at) = (self.hosts[host].now, id(host));
        self.input_any(
            host,
            |primary| primary.handle_forced(now, at),
            |standby| standby.handle_forced(now, at),
            |restart| restart.handle_forced(now, at),
        );
    }

    /// The record is this host's from here on, and the VM goes on from what it has. Only what the dead host said `alone` may be lost by it.
    fn begins_from(&mut self, host: usize, alone: bool) {
        let state = &self.hosts[host];
        // A copy that was activated is not gone on from a second time, whatever became of its guest.
        let copy = state.copy.filter(|copy| !copy.gone && state.memory == Memory::Standby);
        let kept = state.kept.filter(|_| state.restart.is_some() && state.memory == Memory::Standby);
        let has = copy.map(|copy| copy.state).or(kept.map(|kept| kept.state));
        let has = state.guest.map(|guest| guest.state).or(has);
        (self.keeper, self.hosts[host].asks) = (host, host);
        if let Some(has) = has
            && self.checker.goes_on_from(has)
            && !alone
        {
            self.checker.broken(Violation::Forgets);
        }
    }

    /// Whether this host's own store lets its operator start the VM from its disk.
    pub(crate) fn may_boot(&self, host: usize) -> bool {
        self.is_pair()
            && self.is_idle(host)
            && self.hosts[host].guest.is_none()
            && !self.shut_down
            && !self.stores[host].machine.is_unconfirmed(VM)
            && matches!(self.stores[host].disk.map(|record| record.owner), Some(Owner::Solo { node: owner, .. }) if owner.node == node(host))
    }

    pub(crate) fn boot(&mut self, host: usize) {
        spend(&mut self.left.boots);
        let state = State::default();
        // What it was is gone with its host, unless somebody else has been forced to go on.
        if self.keeper == host {
            self.checker.goes_on_from(state);
        }
        let host = &mut self.hosts[host];
        (host.guest, host.muted, host.memory) = (Some(Guest { state, running: true }), false, Memory::Guest);
    }
}
