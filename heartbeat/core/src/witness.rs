//! The witness's machine: one record per VM, changed by compare-and-set, durable before any answer.
//!
//! Promise (`docs/protocol.md` P6, P8): an answer, of a read too, shows durable state only. A request that arrives while a
//! persist of its VM is in flight waits for it. A failed persist latches: that VM answers nothing more until restart, since nobody
//! knows which of two records a restart will find.
//!
//! One of a VM's two hosts may keep the record itself ([`Witness::of_pair`]) where there is no third one. Then a host that is known to be
//! dead can be *forced* out (`docs/protocol.md` P13): the record goes on in the other host's store. A later life of the dead host's store answers nothing of a
//! VM before the other host has said whether that happened.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::hash::{Hash, Hasher};

use crate::ids::{Generation, NodeId, Party, Revision, StoreId, VmId};
use crate::record::{Owner, Record, Refusal, permitted};
use crate::store::{StoreAnswer, StoreOp, StoreRequest};

/// Bound on the VMs of one witness. A request that would make one more gets the answer "absent, not applied".
pub const MAX_VMS: usize = 4096;

/// A forced record's generation is this much higher than any that its node has seen: more than the other host can have made alone.
pub const FORCED: u64 = 1 << 32;

/// Bound on requests that wait for one VM's persist. One more is dropped, as a network would drop it.
pub const MAX_WAITING: usize = 64;

/// What the driver must do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WitnessOutput {
    /// Make the record durable (write, fsync, fsync of the directory where it is new), then call
    /// [`Witness::handle_persisted`] or [`Witness::handle_persist_failed`] with the token.
    Persist {
        /// Which VM's.
        vm: VmId,
        /// What to write.
        record: Record,
        /// Names this persist.
        token: u64,
    },
    /// Send the answer on the connection that `tag` names.
    Answer {
        /// Who asked.
        to: NodeId,
        /// As given with the request.
        tag: u64,
        /// What to send.
        answer: StoreAnswer,
    },
}

/// What a witness counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WitnessStats {
    /// Reads answered.
    pub reads: u64,
    /// Changes applied.
    pub applied: u64,
    /// Changes refused because the record was another one.
    pub refused_expectation: u64,
    /// Changes refused because they were not the asker's to make.
    pub refused_cause: u64,
    /// Requests dropped: at a bound, of a latched VM, or under a false name.
    pub dropped: u64,
}

#[derive(Clone, Copy, Debug, Hash)]
struct Waiting {
    from: NodeId,
    tag: u64,
    request: StoreRequest,
}

/// What is being made durable, and for whom, if somebody asked.
#[derive(Clone, Debug, Hash)]
struct Write {
    next: Record,
    asker: Option<Waiting>,
}

#[derive(Clone, Debug, Hash)]
enum Disk {
    Idle,
    Writing { token: u64, write: Box<Write> },
    Failed,
}

#[derive(Clone, Debug, Hash)]
struct Slot {
    durable: Option<Record>,
    disk: Disk,
    waiting: VecDeque<Waiting>,
}

/// The machine. Call `handle_*` as things happen, then [`Witness::poll_output`] until it is `None`.
#[derive(Clone, Debug)]
pub struct Witness {
    store: StoreId,
    slots: BTreeMap<VmId, Slot>,
    /// The host of the pair that keeps it, if no third one does.
    me: Option<NodeId>,
    /// Kept by a host of the pair, and the other one did not say yet that it was not forced out of it.
    unconfirmed: BTreeSet<VmId>,
    /// Kept by a host of the pair, which is having the other one confirmed dead, to force it out.
    forcing: BTreeSet<VmId>,
    outputs: VecDeque<WitnessOutput>,
    next_token: u64,
    stats: WitnessStats,
}

/// What decides how it goes on; counters are left out. For checkers that explore states.
impl Hash for Witness {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { store, me, slots, unconfirmed, forcing, outputs, next_token, stats: _ } = self;
        (store, me, slots, unconfirmed, forcing, outputs, next_token).hash(state);
    }
}

impl Witness {
    /// A witness that found `records` durable when it started. `store` is durable too.
    pub fn new(store: StoreId, records: impl IntoIterator<Item = (VmId, Record)>) -> Self {
        let slot = |record| Slot { durable: Some(record), disk: Disk::Idle, waiting: VecDeque::new() };
        Self {
            store,
            me: None,
            slots: records.into_iter().map(|(vm, record)| (vm, slot(record))).collect(),
            unconfirmed: BTreeSet::new(),
            forcing: BTreeSet::new(),
            outputs: VecDeque::new(),
            next_token: 1,
            stats: WitnessStats::default(),
        }
    }

    /// A witness in a new life of the agent of `me`, which may be a host of the VMs themselves. Of each VM that another host may have a
    /// copy of it answers nothing before [`Witness::handle_others_record`]: this host may have been forced out meanwhile.
    pub fn of_pair(store: StoreId, records: impl IntoIterator<Item = (VmId, Record)>, me: NodeId) -> Self {
        let mut witness = Self { me: Some(me), ..Self::new(store, records) };
        let names_another = |owner: &Owner| match *owner {
            Owner::Paired { .. } => true,
            Owner::Solo { node, other, .. } => node.node != me || other.is_some(),
            // Who stood by is not said.
            Owner::Stopped { .. } => true,
        };
        witness.unconfirmed =
            witness.records().filter(|(_, record)| names_another(&record.owner)).map(|(vm, _)| vm).collect();
        witness
    }

    /// Whether the other host of this VM has still to say that this one was not forced out.
    #[must_use]
    pub fn is_unconfirmed(&self, vm: VmId) -> bool {
        self.unconfirmed.contains(&vm)
    }

    /// What the other host may be shown of this VM, for its [`Witness::handle_others_record`]. `None`: nothing now. Of a record that is being written, or that may have been, or that
    /// is about to be forced, nobody may hear what it was before: that this host forces the other one out must not be missed by a new life of that.
    #[must_use]
    pub fn shown(&self, vm: VmId) -> Option<Option<Record>> {
        if self.forcing.contains(&vm) {
            return None;
        }
        let Some(slot) = self.slots.get(&vm) else { return Some(None) };
        matches!(slot.disk, Disk::Idle).then_some(slot.durable)
    }

    /// The other host's own record of this VM, or that it has none. One of a higher generation, or of what it became, was forced there: it is taken over.
    /// While a record is being written nothing happens; ask again.
    pub fn handle_others_record(&mut self, vm: VmId, theirs: Option<&Record>) {
        let Some(slot) = self.slots.get_mut(&vm).filter(|slot| matches!(slot.disk, Disk::Idle)) else { return };
        let Some(own) = slot.durable else { return };
        let runs = |owner: &Owner| matches!(owner, Owner::Solo { activated: true, .. });
        match theirs {
            Some(theirs)
                if theirs.generation > own.generation
                    || theirs.generation == own.generation && runs(&theirs.owner) && !runs(&own.owner) =>
            {
                let revision = own.revision.next();
                self.write(vm, Record { store: self.store, revision, ..*theirs }, None);
            }
            _ => drop(self.unconfirmed.remove(&vm)),
        }
    }

    /// Somebody is about to have the other host of this VM confirmed dead, to force it out. From before that is asked for until
    /// [`Witness::handle_force_over`] that host is shown nothing, and answered nothing: whichever life of it was is dead then.
    ///
    /// `false`: somebody else is.
    pub fn handle_forcing(&mut self, vm: VmId) -> bool {
        self.forcing.insert(vm)
    }

    /// It was forced out, or not.
    pub fn handle_force_over(&mut self, vm: VmId) {
        self.forcing.remove(&vm);
    }

    /// The other host of this VM is dead, as a fence or an operator confirmed after [`Witness::handle_forcing`]: the record names `me` alone from now on, in this
    /// store. `seen`: the highest generation that `me` knows of. It counts when the persist is done ([`Witness::record`] shows it).
    ///
    /// `false`: not now, a record is being written or is damaged; or nobody said before that it was about to come.
    pub fn handle_force(&mut self, vm: VmId, me: Party, seen: Generation) -> bool {
        let fresh = Slot { durable: None, disk: Disk::Idle, waiting: VecDeque::new() };
        let slot = self.slots.entry(vm).or_insert(fresh);
        if !matches!(slot.disk, Disk::Idle) || !self.forcing.contains(&vm) {
            return false;
        }
        let (revision, known) =
            slot.durable.map_or((Revision(1), seen), |old| (old.revision.next(), old.generation.max(seen)));
        let owner = Owner::Solo { node: me, activated: false, other: None };
        let generation = Generation(known.0.saturating_add(FORCED));
        self.write(vm, Record { store: self.store, revision, generation, owner }, None);
        true
    }

    fn write(&mut self, vm: VmId, next: Record, asker: Option<Waiting>) {
        let token = self.next_token;
        self.next_token += 1;
        let slot = self.slots.get_mut(&vm).expect("written only when there");
        slot.disk = Disk::Writing { token, write: Box::new(Write { next, asker }) };
        self.outputs.push_back(WitnessOutput::Persist { vm, record: next, token });
    }

    /// The store's id.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// The durable record of a VM.
    #[must_use]
    pub fn record(&self, vm: VmId) -> Option<&Record> {
        self.slots.get(&vm)?.durable.as_ref()
    }

    /// Every VM that has a durable record.
    pub fn records(&self) -> impl Iterator<Item = (VmId, &Record)> {
        self.slots.iter().filter_map(|(&vm, slot)| Some((vm, slot.durable.as_ref()?)))
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> WitnessStats {
        self.stats
    }

    /// A request from `from`, as the connection proved it. `tag` names where the answer goes.
    pub fn handle_request(&mut self, from: NodeId, tag: u64, request: StoreRequest) {
        // A life of the other host that began after it was confirmed dead may have a copy that an earlier one kept.
        let forced = self.forcing.contains(&request.vm) && self.me != Some(from);
        if request.asker.node != from || self.unconfirmed.contains(&request.vm) || forced {
            self.stats.dropped += 1;
            return;
        }
        if !self.slots.contains_key(&request.vm) {
            if self.slots.len() >= MAX_VMS || request.op == StoreOp::Read {
                // Nothing can be in flight for a VM that nobody ever wrote.
                self.answer(from, tag, &request, None, false);
                return;
            }
            let slot = Slot { durable: None, disk: Disk::Idle, waiting: VecDeque::new() };
            self.slots.insert(request.vm, slot);
        }
        let slot = self.slots.get_mut(&request.vm).expect("made above");
        match slot.disk {
            Disk::Idle => self.serve(Waiting { from, tag, request }),
            Disk::Writing { .. } if slot.waiting.len() < MAX_WAITING => {
                slot.waiting.push_back(Waiting { from, tag, request });
            }
            Disk::Writing { .. } | Disk::Failed => self.stats.dropped += 1,
        }
    }

    /// The record of `token` is durable. Unknown tokens are ignored.
    pub fn handle_persisted(&mut self, token: u64) {
        let Some((&vm, slot)) = self.slots.iter_mut().find(|(_, slot)| slot.writes(token)) else {
            return;
        };
        let Disk::Writing { write, .. } = core::mem::replace(&mut slot.disk, Disk::Idle) else {
            unreachable!("found by its token");
        };
        let Write { next, asker } = *write;
        slot.durable = Some(next);
        match asker {
            Some(asker) => {
                self.stats.applied += 1;
                self.answer(asker.from, asker.tag, &asker.request, Some(next), true);
            }
            // Forced here, or there and learnt of.
            None => drop(self.unconfirmed.remove(&vm)),
        }
        // Serve who waited, until one of them starts a persist of its own.
        while let Some(slot) = self.slots.get_mut(&vm) {
            if !matches!(slot.disk, Disk::Idle) {
                break;
            }
            let Some(waiting) = slot.waiting.pop_front() else { break };
            self.serve(waiting);
        }
    }

    /// The record of `token` may or may not be durable: its VM answers nothing more.
    pub fn handle_persist_failed(&mut self, token: u64) {
        if let Some(slot) = self.slots.values_mut().find(|slot| slot.writes(token)) {
            slot.disk = Disk::Failed;
            self.stats.dropped += 1 + slot.waiting.len() as u64;
            slot.waiting.clear();
        }
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<WitnessOutput> {
        self.outputs.pop_front()
    }

    fn serve(&mut self, asked: Waiting) {
        let slot = self.slots.get_mut(&asked.request.vm).expect("served only when there");
        let StoreOp::Change { expect, owner } = asked.request.op else {
            let record = slot.durable;
            self.stats.reads += 1;
            self.answer(asked.from, asked.tag, &asked.request, record, false);
            return;
        };
        let old = slot.durable;
        let verdict = if expect == old.map(|record| (record.store, record.revision)) {
            permitted(asked.request.asker, old.as_ref().map(|record| &record.owner), &owner)
        } else {
            Err(Refusal::Expectation)
        };
        match verdict {
            Ok(()) => {
                let next = Record::changed(self.store, old.as_ref(), owner);
                self.write(asked.request.vm, next, Some(asked));
            }
            Err(refusal) => {
                match refusal {
                    Refusal::Expectation => self.stats.refused_expectation += 1,
                    _ => self.stats.refused_cause += 1,
                }
                self.answer(asked.from, asked.tag, &asked.request, old, false);
                if old.is_none() {
                    // Nobody fills the table with names of VMs that were never recorded.
                    self.slots.remove(&asked.request.vm);
                }
            }
        }
    }

    fn answer(&mut self, to: NodeId, tag: u64, request: &StoreRequest, record: Option<Record>, applied: bool) {
        let answer = StoreAnswer { id: request.id, vm: request.vm, store: self.store, record, applied };
        self.outputs.push_back(WitnessOutput::Answer { to, tag, answer });
    }
}

impl Slot {
    fn writes(&self, token: u64) -> bool {
        matches!(self.disk, Disk::Writing { token: mine, .. } if mine == token)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::ids::{Incarnation, Party, Revision};
    use crate::record::Owner;
    use proptest::prelude::*;
    use std::collections::BTreeMap as Map;
    use std::vec::Vec;

    const STORE: StoreId = StoreId([7; 16]);

    fn party(node: u8) -> Party {
        Party { node: NodeId([node; 16]), incarnation: Incarnation(1) }
    }

    fn request(id: u64, vm: u8, node: u8, op: StoreOp) -> StoreRequest {
        StoreRequest { id, vm: VmId([vm; 16]), asker: party(node), op }
    }

    fn pair() -> Owner {
        Owner::Paired { primary: party(1), standby: party(2) }
    }

    fn outputs(witness: &mut Witness) -> Vec<WitnessOutput> {
        core::iter::from_fn(|| witness.poll_output()).collect()
    }

    /// P8: a read that arrives while a write is under way waits for it; a failed write latches.
    #[test]
    fn reads_wait_for_the_write_and_a_failed_write_latches() {
        let mut witness = Witness::new(STORE, []);
        witness.handle_request(party(1).node, 0, request(1, 9, 1, StoreOp::Change { expect: None, owner: pair() }));
        witness.handle_request(party(2).node, 0, request(2, 9, 2, StoreOp::Read));
        let token = match outputs(&mut witness)[..] {
            [WitnessOutput::Persist { token, .. }] => token,
            ref other => panic!("{other:?}"),
        };
        witness.handle_persisted(token);
        let answers = outputs(&mut witness);
        assert!(
            matches!(
                answers[..],
                [
                    WitnessOutput::Answer { answer: StoreAnswer { id: 1, applied: true, record: Some(_), .. }, .. },
                    WitnessOutput::Answer { answer: StoreAnswer { id: 2, applied: false, record: Some(_), .. }, .. }
                ]
            ),
            "{answers:?}"
        );

        let expect = Some((STORE, Revision(1)));
        let solo = Owner::Solo { node: party(2), activated: false, other: Some(party(1)) };
        witness.handle_request(party(2).node, 0, request(3, 9, 2, StoreOp::Change { expect, owner: solo }));
        witness.handle_request(party(1).node, 0, request(4, 9, 1, StoreOp::Read));
        let [WitnessOutput::Persist { token, .. }] = outputs(&mut witness)[..] else { panic!("no write") };
        witness.handle_persist_failed(token);
        witness.handle_request(party(1).node, 0, request(5, 9, 1, StoreOp::Read));
        assert_eq!(outputs(&mut witness), []);
        // Another VM is served all the same.
        witness.handle_request(party(1).node, 0, request(6, 8, 1, StoreOp::Read));
        assert!(matches!(outputs(&mut witness)[..], [WitnessOutput::Answer { .. }]));
    }

    /// P33.
    #[test]
    fn a_false_name_gets_no_answer() {
        let mut witness = Witness::new(STORE, []);
        witness.handle_request(party(2).node, 0, request(1, 9, 1, StoreOp::Change { expect: None, owner: pair() }));
        assert_eq!(outputs(&mut witness), []);
        assert_eq!(witness.stats().dropped, 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask { node: u8, change: Option<(u8, bool)> },
        Persisted,
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (1_u8..=2, proptest::option::of((0_u8..6, any::<bool>()))).prop_map(|(node, change)| Step::Ask { node, change }),
            4 => Just(Step::Persisted),
            1 => Just(Step::Restart),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        /// P8 and P2: every answer shows what is on disk, each applied change follows the one before, and a restart loses nothing that
        /// was answered.
        #[test]
        fn answers_show_durable_records_in_one_order(steps in steps()) {
            let vm = VmId([9; 16]);
            let mut disk: Map<VmId, Record> = Map::new();
            let mut witness = Witness::new(STORE, []);
            let mut writing: Option<(u64, Record)> = None;
            let mut newest_answered = Revision(0);
            let mut id = 0;
            for step in steps {
                match step {
                    Step::Ask { node, change } => {
                        id += 1;
                        let (me, other) = (party(node), party(3 - node));
                        let op = change.map_or(StoreOp::Read, |(kind, stale)| {
                            let known = if stale { None } else { disk.get(&vm) };
                            let owner = match kind {
                                0 => Owner::Paired { primary: me, standby: other },
                                1 => Owner::Solo { node: me, activated: false, other: Some(other) },
                                2 => Owner::Solo { node: me, activated: true, other: Some(other) },
                                3 => Owner::Solo { node: other, activated: false, other: Some(me) },
                                4 => Owner::Stopped { node: me },
                                _ => Owner::Solo { node: me, activated: false, other: None },
                            };
                            StoreOp::Change { expect: known.map(|record| (record.store, record.revision)), owner }
                        });
                        witness.handle_request(me.node, 0, request(id, 9, node, op));
                    }
                    Step::Persisted => if let Some((token, record)) = writing.take() {
                        disk.insert(vm, record);
                        witness.handle_persisted(token);
                    },
                    Step::Restart => {
                        witness = Witness::new(STORE, disk.clone());
                        writing = None;
                    }
                }
                while let Some(output) = witness.poll_output() {
                    match output {
                        WitnessOutput::Persist { record, token, .. } => {
                            prop_assert!(writing.is_none(), "two writes of one VM at once");
                            let before = disk.get(&vm).map_or(Revision(0), |record| record.revision);
                            prop_assert_eq!(record.revision, before.next());
                            writing = Some((token, record));
                        }
                        WitnessOutput::Answer { answer, .. } => {
                            prop_assert_eq!(answer.record, disk.get(&vm).copied());
                            let revision = answer.record.map_or(Revision(0), |record| record.revision);
                            prop_assert!(revision >= newest_answered);
                            newest_answered = revision;
                        }
                    }
                }
            }
        }
    }
}
