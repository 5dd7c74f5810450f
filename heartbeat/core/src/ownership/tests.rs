//! Two nodes, one witness and a network that loses, doubles and reorders, in every order that proptest thinks of.

extern crate std;

use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::ids::{Incarnation, NodeId};
use crate::witness::{Witness, WitnessOutput};

const VM: VmId = VmId([1; 16]);
const STORE: StoreId = StoreId([2; 16]);

fn party(node: u8) -> Party {
    Party { node: NodeId([node; 16]), incarnation: Incarnation(1) }
}

fn machine(node: u8) -> Ownership {
    Ownership::new(OwnershipConfig::new(VM, party(node)))
}

#[derive(Clone, Copy, Debug)]
enum Packet {
    Request(StoreRequest),
    Answer { to: usize, answer: StoreAnswer },
}

struct Model {
    now: Time,
    nodes: [Ownership; 2],
    witness: Witness,
    packets: Vec<Packet>,
    writes: Vec<u64>,
    generations: Vec<(usize, Generation)>,
}

impl Model {
    fn new() -> Self {
        Self {
            now: Time::ZERO,
            nodes: [machine(1), machine(2)],
            witness: Witness::new(STORE, []),
            packets: Vec::new(),
            writes: Vec::new(),
            generations: Vec::new(),
        }
    }

    fn collect(&mut self) {
        for (index, node) in self.nodes.iter_mut().enumerate() {
            while let Some(output) = node.poll_output() {
                match output {
                    OwnershipOutput::Ask(request) => self.packets.push(Packet::Request(request)),
                    OwnershipOutput::PersistGeneration(generation) => self.generations.push((index, generation)),
                }
            }
        }
        while let Some(output) = self.witness.poll_output() {
            match output {
                WitnessOutput::Persist { token, .. } => self.writes.push(token),
                WitnessOutput::Answer { to, answer, .. } => {
                    let to = usize::from(to == party(2).node);
                    self.packets.push(Packet::Answer { to, answer });
                }
            }
        }
    }

    fn deliver(&mut self, index: usize, keep: bool) {
        if self.packets.is_empty() {
            return;
        }
        let index = index % self.packets.len();
        let packet = if keep { self.packets[index] } else { self.packets.swap_remove(index) };
        match packet {
            Packet::Request(request) => self.witness.handle_request(request.asker.node, 0, request),
            Packet::Answer { to, answer } => self.nodes[to].handle_answer(self.now, &answer),
        }
    }

    /// What a node may want, by the rules of its side: only a party that the record names asks to own alone.
    fn want(&mut self, index: usize, choice: u8) {
        let node = &mut self.nodes[index];
        let me = party(if index == 0 { 1 } else { 2 });
        let peer = party(if index == 0 { 2 } else { 1 });
        let may_own = index == 0 || matches!(node.verdict(), Verdict::Paired { .. } | Verdict::SoloMe { .. });
        let want = match choice {
            0 if node.may_run_alone() || (index == 0 && node.verdict() == Verdict::Absent) => {
                Want::Pair { standby: peer }
            }
            1 if may_own => Want::Solo { activated: false },
            2 if node.may_run_alone() => Want::Activated,
            3 if matches!(node.record().map(|record| record.owner), Some(Owner::Solo { node, .. }) if node == me) => {
                Want::GiveBack
            }
            4 => Want::Nothing,
            _ => Want::Follow,
        };
        node.want(self.now, want);
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for (index, node) in self.nodes.iter().enumerate() {
            if node.may_run_alone() {
                let owner = self.witness.record(VM).map(|record| record.owner);
                let me = party(if index == 0 { 1 } else { 2 });
                let owned = matches!(owner, Some(Owner::Solo { node, .. }) if node == me);
                prop_assert!(owned, "node {} believes that it may run alone, and the record says {:?}", index, owner);
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// P3, P6: whoever believes that it may run alone is the durable owner, whatever the network does, at every step.
    #[test]
    fn nobody_believes_wrongly_that_it_may_run_alone(
        steps in prop::collection::vec((0_u8..12, any::<usize>()), 0..250)
    ) {
        let mut model = Model::new();
        for (kind, number) in steps {
            match kind {
                0..=4 => model.deliver(number, number % 3 == 0),
                5 => if !model.packets.is_empty() {
                    let index = number % model.packets.len();
                    model.packets.swap_remove(index);
                },
                6 | 7 => if let Some(token) = model.writes.pop() { model.witness.handle_persisted(token) },
                8 => if let Some((index, generation)) = model.generations.pop() {
                    model.nodes[index].handle_generation_persisted(model.now, generation);
                },
                9 | 10 => model.want(number % 2, u8::try_from(number / 2 % 6).expect("below 6")),
                _ => {
                    model.now = model.now + Duration::from_millis(60);
                    for node in &mut model.nodes { node.handle_timeout(model.now); }
                }
            }
            model.collect();
            model.check()?;
        }
        // When the network is kind at last, who follows knows.
        model.nodes[1].want(model.now, Want::Nothing);
        model.nodes[0].want(model.now, Want::Follow);
        for _ in 0..200 {
            model.now = model.now + Duration::from_millis(60);
            model.nodes[0].handle_timeout(model.now);
            for _ in 0..4 {
                model.collect();
                while !model.packets.is_empty() { model.deliver(0, false); model.collect(); }
                while let Some(token) = model.writes.pop() { model.witness.handle_persisted(token); }
                while let Some((index, generation)) = model.generations.pop() {
                    model.nodes[index].handle_generation_persisted(model.now, generation);
                }
            }
            model.check()?;
        }
        prop_assert_eq!(model.nodes[0].record(), model.witness.record(VM));
    }
}

fn answer(id: u64, record: Option<Record>) -> StoreAnswer {
    StoreAnswer { id, vm: VM, store: STORE, record, applied: false }
}

fn solo(node: u8, revision: u64, generation: u64) -> Record {
    let owner = Owner::Solo { node: party(node), activated: false, other: Some(party(3 - node)) };
    Record { store: STORE, revision: Revision(revision), generation: Generation(generation), owner }
}

fn confirm(machine: &mut Ownership) {
    while let Some(output) = machine.poll_output() {
        if let OwnershipOutput::PersistGeneration(generation) = output {
            machine.handle_generation_persisted(Time::ZERO, generation);
        }
    }
}

/// P6: reading the old record again does not withdraw an ask; only another revision does.
#[test]
fn an_open_ask_for_a_pair_forbids_to_run_alone_until_the_revision_moves() {
    let mut machine = machine(1);
    machine.want(Time::ZERO, Want::Follow);
    machine.handle_answer(Time::ZERO, &answer(1, Some(solo(1, 4, 3))));
    confirm(&mut machine);
    assert!(machine.may_run_alone());
    machine.want(Time::ZERO, Want::Pair { standby: party(2) });
    assert!(!machine.may_run_alone() && machine.is_exposed());
    machine.want(Time::ZERO, Want::Solo { activated: true });
    for _ in 0..5 {
        machine.handle_answer(Time::ZERO, &answer(2, Some(solo(1, 4, 3))));
        assert!(!machine.may_run_alone());
    }
    machine.handle_answer(Time::ZERO, &answer(2, Some(solo(1, 5, 3))));
    assert!(machine.may_run_alone() && machine.is_fulfilled());
}

/// P8: nothing is done about a generation before it is durable here.
#[test]
fn a_generation_is_durable_before_the_verdict_shows_it() {
    let mut machine = machine(1);
    machine.want(Time::ZERO, Want::Follow);
    machine.handle_answer(Time::ZERO, &answer(1, Some(solo(1, 1, 1))));
    assert_eq!(machine.verdict(), Verdict::Unknown);
    assert!(!machine.may_run_alone());
    confirm(&mut machine);
    assert_eq!(machine.verdict(), Verdict::SoloMe { generation: Generation(1), activated: false });
}

/// P6: answers of another store, of an older revision, of a store that forgot, and to nobody's request are ignored.
#[test]
fn answers_that_prove_nothing_are_ignored() {
    let mut machine =
        Ownership::new(OwnershipConfig { generation: Generation(5), ..OwnershipConfig::new(VM, party(1)) });
    machine.want(Time::ZERO, Want::Follow);
    machine.handle_answer(Time::ZERO, &answer(1, None));
    machine.handle_answer(Time::ZERO, &answer(1, Some(solo(1, 9, 4))));
    assert_eq!((machine.verdict(), machine.stats().rejected), (Verdict::Unknown, 2));
    machine.handle_answer(Time::ZERO, &answer(77, Some(solo(1, 9, 5))));
    assert_eq!(machine.verdict(), Verdict::Unknown);
    machine.handle_answer(Time::ZERO, &answer(1, Some(solo(2, 9, 5))));
    assert!(matches!(machine.verdict(), Verdict::SoloOther { .. }));
    machine.handle_answer(Time::ZERO, &answer(1, Some(solo(1, 8, 5))));
    assert!(matches!(machine.verdict(), Verdict::SoloOther { .. }));
    let other_store = StoreAnswer { store: StoreId([8; 16]), ..answer(1, None) };
    machine.handle_answer(Time::ZERO, &other_store);
    assert!(matches!(machine.verdict(), Verdict::SoloOther { .. }));
}
