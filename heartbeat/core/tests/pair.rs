//! Two hosts without a third one (`docs/protocol.md` P13): what their stores answer, and when.

use heartbeat_core::ids::{Generation, Incarnation, NodeId, Party, Revision, StoreId, VmId};
use heartbeat_core::ownership::{Ownership, OwnershipConfig, OwnershipOutput, Verdict, Want};
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};
use heartbeat_core::time::Time;
use heartbeat_core::witness::{FORCED, Witness, WitnessOutput};

const VM: VmId = VmId([9; 16]);
const HERE: StoreId = StoreId([1; 16]);
const THERE: StoreId = StoreId([2; 16]);

fn party(node: u8, life: u64) -> Party {
    Party { node: NodeId([node; 16]), incarnation: Incarnation(life) }
}

fn record(owner: Owner, revision: u64, generation: u64) -> Record {
    Record { store: HERE, revision: Revision(revision), generation: Generation(generation), owner }
}

fn paired() -> Record {
    record(Owner::Paired { primary: party(1, 1), standby: party(2, 1) }, 5, 3)
}

fn ask(witness: &mut Witness, asker: Party, op: StoreOp) -> Vec<WitnessOutput> {
    witness.handle_request(asker.node, 0, StoreRequest { id: 7, vm: VM, asker, op });
    outputs(witness)
}

fn outputs(witness: &mut Witness) -> Vec<WitnessOutput> {
    std::iter::from_fn(|| witness.poll_output()).collect()
}

fn answer(outputs: &[WitnessOutput]) -> StoreAnswer {
    let [WitnessOutput::Answer { answer, .. }] = outputs else { panic!("one answer was expected: {outputs:?}") };
    *answer
}

fn persist(witness: &mut Witness) -> Record {
    let outputs = outputs(witness);
    let [WitnessOutput::Persist { record, token, .. }] = outputs[..] else { panic!("one write: {outputs:?}") };
    witness.handle_persisted(token);
    record
}

#[test]
fn a_new_life_answers_nothing_before_the_other_host_was_asked() {
    let me = party(1, 2);
    let solo = |other| record(Owner::Solo { node: party(1, 1), activated: true, other }, 5, 3);
    let stopped = record(Owner::Stopped { node: party(1, 1) }, 5, 3);
    for kept in [paired(), solo(Some(party(2, 1))), stopped] {
        let mut witness = Witness::of_pair(HERE, [(VM, kept)], me.node);
        assert_eq!(ask(&mut witness, me, StoreOp::Read), [], "{kept:?}");
        let owner = Owner::Solo { node: me, activated: false, other: Some(party(2, 1)) };
        let change = StoreOp::Change { expect: Some((HERE, kept.revision)), owner };
        assert_eq!(ask(&mut witness, me, change), [], "{kept:?}");
        witness.handle_others_record(VM, None);
        assert_eq!(answer(&ask(&mut witness, me, StoreOp::Read)).record, Some(kept), "nobody was forced out");
    }
    // Nobody else has a copy; and a third host's store has nobody to ask.
    let mut alone = Witness::of_pair(HERE, [(VM, solo(None))], me.node);
    assert_eq!(answer(&ask(&mut alone, me, StoreOp::Read)).record, Some(solo(None)));
    let mut third = Witness::new(HERE, [(VM, paired())]);
    assert_eq!(answer(&ask(&mut third, me, StoreOp::Read)).record, Some(paired()));
}

#[test]
fn a_host_that_was_forced_out_learns_it_and_says_so() {
    let (me, other) = (party(1, 2), party(2, 1));
    let mut theirs = Witness::of_pair(THERE, [], other.node);
    assert!(!theirs.handle_force(VM, other, Generation(2)), "nobody was told to show nothing");
    assert_eq!(theirs.shown(VM), Some(None));
    assert!(theirs.handle_forcing(VM) && !theirs.handle_forcing(VM), "one at a time");
    assert_eq!(theirs.shown(VM), None, "that host may be back before it is forced out");
    let owner = Owner::Paired { primary: me, standby: other };
    assert_eq!(ask(&mut theirs, me, StoreOp::Read), [], "nor is it answered");
    assert_eq!(ask(&mut theirs, me, StoreOp::Change { expect: None, owner }), []);
    assert_eq!(answer(&ask(&mut theirs, other, StoreOp::Read)).record, None, "who forces it out is");
    assert!(theirs.handle_force(VM, other, Generation(2)));
    assert!(!theirs.handle_force(VM, other, Generation(2)), "one at a time");
    assert_eq!(theirs.record(VM), None, "it counts when it is durable");
    assert_eq!(
        theirs.shown(VM),
        None,
        "the dead host may be back already: it must not be told that it was not forced out"
    );
    let forced = persist(&mut theirs);
    assert_eq!(theirs.shown(VM), None, "not yet");
    theirs.handle_force_over(VM);
    let alone = Owner::Solo { node: other, activated: false, other: None };
    assert_eq!((forced.owner, forced.generation), (alone, Generation(2 + FORCED)));
    assert_eq!((theirs.shown(VM), theirs.shown(VmId([8; 16]))), (Some(Some(forced)), Some(None)));
    assert_eq!(answer(&ask(&mut theirs, other, StoreOp::Read)).record, Some(forced));

    let mut mine = Witness::of_pair(HERE, [(VM, paired())], me.node);
    mine.handle_others_record(VM, Some(&forced));
    let learnt = persist(&mut mine);
    assert_eq!((learnt.store, learnt.revision, learnt.owner), (HERE, Revision(6), alone));
    assert_eq!(answer(&ask(&mut mine, me, StoreOp::Read)).record, Some(learnt));
    // What was asked for before cannot be applied any more.
    let owner = Owner::Solo { node: me, activated: true, other: Some(other) };
    let late = ask(&mut mine, me, StoreOp::Change { expect: Some((HERE, paired().revision)), owner });
    assert!(!answer(&late).applied && mine.record(VM) == Some(&learnt));

    // That it runs there is learnt, too, and an older record is not.
    let runs = Record { owner: Owner::Solo { node: other, activated: true, other: None }, ..forced };
    mine.handle_others_record(VM, Some(&runs));
    assert_eq!(persist(&mut mine).owner, runs.owner);
    mine.handle_others_record(VM, Some(&forced));
    mine.handle_others_record(VM, Some(&paired()));
    assert_eq!(outputs(&mut mine), []);
}

#[test]
fn what_was_asked_before_a_force_says_nothing() {
    let me = party(2, 1);
    let mut ownership = Ownership::new(OwnershipConfig { store: Some(HERE), ..OwnershipConfig::new(VM, me) });
    let sent = |ownership: &mut Ownership| {
        let mut asked = None;
        while let Some(output) = ownership.poll_output() {
            match output {
                OwnershipOutput::Ask(request) => asked = Some(request),
                OwnershipOutput::PersistGeneration(generation) => {
                    ownership.handle_generation_persisted(Time::ZERO, generation);
                }
            }
        }
        asked.expect("it asks")
    };
    let said =
        |request: StoreRequest, store, record| StoreAnswer { id: request.id, vm: VM, store, record, applied: false };
    ownership.want(Time::ZERO, Want::Solo { activated: false });
    let before = sent(&mut ownership);
    ownership.handle_answer(Time::ZERO, &said(before, HERE, Some(paired())));
    let change = sent(&mut ownership);
    assert!(matches!(change.op, StoreOp::Change { .. }));

    ownership.handle_forced(Time::ZERO, THERE);
    assert!(!ownership.may_run_alone(), "it is read first");
    let after = sent(&mut ownership);
    assert_eq!(after.op, StoreOp::Read);
    let alone = Owner::Solo { node: me, activated: false, other: None };
    let forced = Record { store: THERE, ..record(alone, 1, 3 + FORCED) };
    // The dead host's store, and an answer that a question of before the force got: neither counts.
    ownership.handle_answer(Time::ZERO, &said(after, HERE, Some(record(alone, 9, 9))));
    ownership.handle_answer(Time::ZERO, &said(change, THERE, Some(forced)));
    assert_eq!(ownership.verdict(), Verdict::Unknown);
    ownership.handle_answer(Time::ZERO, &said(after, THERE, Some(forced)));
    while let Some(output) = ownership.poll_output() {
        if let OwnershipOutput::PersistGeneration(generation) = output {
            ownership.handle_generation_persisted(Time::ZERO, generation);
        }
    }
    assert!(ownership.may_run_alone());
    assert_eq!(ownership.verdict(), Verdict::SoloMe { generation: Generation(3 + FORCED), activated: false });
}
