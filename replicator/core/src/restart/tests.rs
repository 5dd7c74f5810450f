//! Each thing that the record can say, for each thing that can be found.

extern crate std;

use alloc::vec::Vec;
use heartbeat_core::ids::{Incarnation, Party, StoreId, VmId};
use heartbeat_core::record::Record;
use heartbeat_core::store::StoreOp;
use heartbeat_core::witness::{Witness, WitnessOutput};

use super::*;

const VM: VmId = VmId([7; 16]);

fn party(node: u8, life: u64) -> Party {
    Party { node: NodeId([node; 16]), incarnation: Incarnation(life) }
}

/// A record that was changed to each of these owners in turn.
fn record(owners: &[Owner]) -> Option<Record> {
    owners.iter().fold(None, |old, owner| Some(Record::changed(StoreId([1; 16]), old.as_ref(), *owner)))
}

/// Runs a restart of node 1 in its second life against a witness that keeps `before`; returns what it did, and the record.
fn restart(before: Option<Record>, here: Here) -> (Vec<Output>, Option<Record>) {
    let mut witness = Witness::new(StoreId([1; 16]), before.map(|record| (VM, record)));
    let mut machine = Restart::new(OwnershipConfig::new(VM, party(1, 2)), here);
    let mut now = Time::ZERO;
    machine.handle_start(now);
    let mut done = Vec::new();
    for _ in 0..100 {
        while let Some(output) = machine.poll_output() {
            match output {
                Output::Ask(request) => {
                    witness.handle_request(party(1, 2).node, 0, request);
                    while let Some(output) = witness.poll_output() {
                        match output {
                            WitnessOutput::Persist { token, .. } => witness.handle_persisted(token),
                            WitnessOutput::Answer { answer, .. } => machine.handle_answer(now, &answer),
                        }
                    }
                }
                Output::PersistGeneration(generation) => machine.handle_generation_persisted(now, generation),
                Output::State { .. } => {}
                Output::Keep(grant) => {
                    machine.handle_kept(now, grant);
                    done.push(Output::Keep(grant));
                }
                output => done.push(output),
            }
        }
        let Some(at) = machine.poll_timeout() else { break };
        now = now.max(at);
        machine.handle_timeout(now);
    }
    (done, witness.record(VM).copied())
}

fn solo(node: Party, activated: bool, other: Option<Party>) -> Owner {
    Owner::Solo { node, activated, other }
}

#[test]
fn a_guest_that_is_this_nodes_is_taken_over_before_it_is_freed() {
    let (a, b) = (party(1, 1), party(2, 1));
    for before in [
        record(&[]),
        record(&[solo(a, true, None)]),
        record(&[Owner::Paired { primary: a, standby: b }]),
        record(&[Owner::Paired { primary: a, standby: b }, solo(a, false, Some(b))]),
        record(&[Owner::Paired { primary: b, standby: a }, solo(a, false, Some(b)), solo(a, true, Some(b))]),
    ] {
        let (done, after) = restart(before, Here::Guest);
        assert_eq!(done, [Output::Free, Output::Finished(End::Ours)], "{before:?}");
        assert!(
            matches!(after.expect("a record").owner, Owner::Solo { node, activated: true, .. } if node == party(1, 2))
        );
    }
}

#[test]
fn a_guest_whose_standby_has_won_is_neither_freed_nor_ended_until_that_runs() {
    let (a, b) = (party(1, 1), party(2, 1));
    let before = record(&[Owner::Paired { primary: a, standby: b }, solo(b, false, Some(a))]);
    assert_eq!(restart(before, Here::Guest), (Vec::new(), before));
}

#[test]
fn a_guest_that_runs_elsewhere_is_ended() {
    let (a, b, c) = (party(1, 1), party(2, 1), party(3, 1));
    let lost = [Owner::Paired { primary: a, standby: b }, solo(b, false, Some(a)), solo(b, true, Some(a))];
    let again = [lost.as_slice(), &[Owner::Paired { primary: b, standby: c }]].concat();
    let stopped = [lost.as_slice(), &[Owner::Stopped { node: b }]].concat();
    for before in [record(&lost), record(&again), record(&stopped)] {
        assert_eq!(restart(before, Here::Guest), ([Output::Fence, Output::Finished(End::Theirs)].into(), before));
    }
    // One that this node itself stopped has shut down.
    let before = record(&[Owner::Stopped { node: a }]);
    assert_eq!(restart(before, Here::Guest), ([Output::Finished(End::Stopped)].into(), before));
}

#[test]
fn a_grant_that_nobody_ran_by_is_given_back_and_no_other() {
    let (a, b) = (party(1, 1), party(2, 1));
    let won = record(&[Owner::Paired { primary: b, standby: a }, solo(a, false, Some(b))]);
    let generation = won.expect("a record").generation;
    let earlier = Some(Generation(generation.0 - 1));
    for marked in [None, earlier] {
        let (done, after) = restart(won, Here::Copy { marked });
        assert_eq!(done, [Output::Finished(End::GaveBack)]);
        assert_eq!(after.expect("a record").owner, solo(b, false, Some(party(1, 2))));
    }
    let left = ([Output::Finished(End::Theirs)].into(), won);
    assert_eq!(restart(won, Here::Copy { marked: Some(generation) }), left, "it may have run");
    assert_eq!(restart(won, Here::Gone), left, "it was heard");
    let ran = record(&[Owner::Paired { primary: b, standby: a }, solo(a, false, Some(b)), solo(a, true, Some(b))]);
    assert_eq!(restart(ran, Here::Copy { marked: None }), ([Output::Finished(End::Theirs)].into(), ran));
}

/// P62: a copy that was kept is gone on with by the grant that it was kept of, or by what a later life of this node made of that, and nobody else's since.
#[test]
fn a_kept_copy_is_gone_on_with_by_its_own_grant_alone() {
    let (a, a1, b, c) = (party(1, 0), party(1, 1), party(2, 1), party(3, 1));
    let won = [Owner::Paired { primary: b, standby: a }, solo(a, false, Some(b))];
    let kept = |grant, marked: Option<u64>| Here::Kept {
        grant: Generation(grant),
        marked: marked.map(Generation),
        off_since: true,
    };
    let goes_on = |grant| Output::Finished(End::Kept { grant: Generation(grant), forced: false });
    let (done, after) = restart(record(&won), kept(2, Some(1)));
    assert_eq!(done, [goes_on(3)]);
    assert_eq!(after.expect("a record").owner, solo(party(1, 2), false, Some(b)), "by a grant of this life's");

    // A life before this one had made the record its own, and nothing more.
    let taken_over = [won.as_slice(), &[solo(a1, false, Some(b))]].concat();
    assert_eq!(restart(record(&taken_over), kept(2, None)).0, [Output::Keep(Generation(3)), goes_on(4)]);
    assert_eq!(restart(record(&taken_over), kept(3, None)).0, [goes_on(4)]);

    // It was given back, and came here once more; or this node won it again, with another copy.
    let returned = [won.as_slice(), &[solo(b, false, Some(a)), solo(a, false, Some(b))]].concat();
    let again = [won.as_slice(), &[solo(b, false, Some(a)), won[0], won[1]]].concat();
    for later in [&returned, &again] {
        let (done, after) = restart(record(later), kept(2, None));
        assert_eq!(done, [Output::Finished(End::GaveBack)]);
        assert_eq!(after.expect("a record").owner, solo(b, false, Some(party(1, 2))));
    }
    // Somebody may have run by it; or does elsewhere; or is about to.
    let ran = [won.as_slice(), &[solo(a, true, Some(b))]].concat();
    let theirs = [won.as_slice(), &[solo(b, false, Some(a))]].concat();
    let others = [theirs.as_slice(), &[Owner::Paired { primary: b, standby: c }]].concat();
    for (later, marked) in [(&won.to_vec(), Some(2)), (&ran, None), (&theirs, None), (&others, None)] {
        let before = record(later);
        assert_eq!(restart(before, kept(2, marked)), ([Output::Finished(End::Theirs)].into(), before), "{later:?}");
    }
}

/// P13: without the store only what was kept of the newest grant that this node knows of.
#[test]
fn a_kept_copy_may_be_forced_unless_more_was_seen() {
    let me = party(1, 2);
    let ran = Some(Generation(2));
    for (seen, marked, off_since, may) in [
        (2, None, false, true),
        (3, None, false, true),
        (4, None, false, false),
        (2, ran, false, false),
        (2, None, true, false),
    ] {
        let config = OwnershipConfig { generation: Generation(seen), ..OwnershipConfig::new(VM, me) };
        let mut machine = Restart::new(config, Here::Kept { grant: Generation(2), marked, off_since });
        machine.handle_start(Time::ZERO);
        assert_eq!(machine.may_be_forced().is_ok(), may, "{seen} {marked:?}");
        let store = StoreId([4; 16]);
        machine.handle_forced(Time::ZERO, store);
        let asked = core::iter::from_fn(|| machine.poll_output()).filter_map(|output| match output {
            Output::Ask(request) => Some(request.id),
            _ => None,
        });
        let id = asked.last().expect("it asks");
        let forced = Record { store, ..record(&[solo(me, false, None)]).expect("a record") };
        let forced = Record { generation: Generation(100), ..forced };
        let answer = StoreAnswer { id, vm: VM, store, record: Some(forced), applied: false };
        machine.handle_answer(Time::ZERO, &answer);
        machine.handle_generation_persisted(Time::ZERO, Generation(100));
        let end = Output::Finished(End::Kept { grant: Generation(100), forced: true });
        assert_eq!(core::iter::from_fn(|| machine.poll_output()).any(|output| output == end), may);
    }
}

#[test]
fn a_lost_answer_frees_nothing() {
    let a = party(1, 1);
    let before = record(&[solo(a, true, None)]).expect("a record");
    let mut machine = Restart::new(OwnershipConfig::new(VM, party(1, 2)), Here::Guest);
    machine.handle_start(Time::ZERO);
    let mut asked = Vec::new();
    let mut outputs = |machine: &mut Restart| {
        while let Some(output) = machine.poll_output() {
            match output {
                Output::Ask(request) => asked.push(request),
                Output::PersistGeneration(generation) => machine.handle_generation_persisted(Time::ZERO, generation),
                Output::State { .. } => {}
                output => panic!("{output:?} without an answer"),
            }
        }
    };
    outputs(&mut machine);
    let id = machine.ownership().config().first_request;
    let answer = StoreAnswer { id, vm: VM, store: before.store, record: Some(before), applied: false };
    machine.handle_answer(Time::ZERO, &answer);
    outputs(&mut machine);
    // What was read is not this life's; the change was asked for and never answered.
    assert!(matches!(asked.last().expect("asked").op, StoreOp::Change { .. }), "{asked:?}");
    assert!(machine.poll_output().is_none());
}
