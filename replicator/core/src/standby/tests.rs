//! The standby by itself: what it acknowledges until when, when it asks, and what it keeps.

extern crate std;

use std::vec::Vec;

use core::time::Duration;
use heartbeat_core::ids::{NodeId, StoreId, VmId};
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreOp, StoreRequest};
use proptest::prelude::*;

use super::*;

const VM: VmId = VmId([1; 16]);
const STORE: StoreId = StoreId([2; 16]);

fn party(node: u8) -> Party {
    Party { node: NodeId([node; 16]), incarnation: Incarnation(1) }
}

fn pair() -> Owner {
    Owner::Paired { primary: party(1), standby: party(2) }
}

fn solo(node: u8, activated: bool) -> Owner {
    Owner::Solo { node: party(node), activated, other: Some(party(3 - node)) }
}

/// The copy as of epoch 3, by this grant.
fn keep(grant: u64) -> Output {
    Output::Keep { generation: Generation(grant), epoch: Epoch(3) }
}

struct Bench {
    now: Time,
    standby: Standby,
    store: StoreId,
    record: Option<Record>,
    asks: Vec<StoreRequest>,
    outputs: Vec<Output>,
}

impl Bench {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(fence_required: bool) -> Self {
        let config = StandbyConfig::new(VM, party(2), party(1), Generation(1));
        let standby = Standby::new(StandbyConfig { fence_required, ..config });
        let (asks, outputs) = (Vec::new(), Vec::new());
        let mut bench = Self { now: Time::ZERO, standby, store: STORE, record: None, asks, outputs };
        bench.standby.handle_prepared(bench.now);
        bench.collect();
        bench
    }

    /// Holds epochs 1 to 3, of which 3 binds, and the record names it.
    fn paired() -> Self {
        Self::paired_with(false)
    }

    fn paired_with(fence_required: bool) -> Self {
        let mut bench = Self::with(fence_required);
        bench.standby.handle_peer(bench.now, PeerMessage::Binding { epoch: Epoch(3) });
        for epoch in 1..=3 {
            bench.stage(epoch);
        }
        bench.becomes(pair());
        bench.answer();
        bench.take();
        bench
    }

    /// Has the grant, and must have the primary's host switched off first.
    fn fencing() -> Self {
        let mut bench = Self::paired_with(true);
        bench.standby.handle_suspected(bench.now, Suspicion::Silent);
        bench.collect();
        bench.answer();
        assert_eq!(bench.take(), [keep(2), Output::SwitchOff], "the grant alone lets nothing run");
        assert_eq!(bench.record.map(|record| record.owner), Some(solo(2, false)));
        bench
    }

    fn fence_fails(&mut self) {
        self.standby.handle_switched_off(self.now, SwitchedOff::unconfirmed("the switch is stuck"));
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(output) = self.standby.poll_output() {
            match output {
                Output::Ask(request) => self.asks.push(request),
                Output::PersistGeneration(generation) => self.standby.handle_generation_persisted(self.now, generation),
                Output::State { .. } => {}
                output => self.outputs.push(output),
            }
        }
    }

    fn take(&mut self) -> Vec<Output> {
        self.collect();
        core::mem::take(&mut self.outputs)
    }

    fn stage(&mut self, epoch: u64) {
        self.standby.handle_staged(self.now, Generation(1), Incarnation(1), Epoch(epoch));
        self.collect();
    }

    fn becomes(&mut self, owner: Owner) {
        self.record = Some(Record::changed(self.store, self.record.as_ref(), owner));
    }

    fn answer(&mut self) {
        self.collect();
        while let Some(request) = self.asks.pop() {
            let mut applied = false;
            if let StoreOp::Change { expect, owner } = request.op {
                assert!(expect.is_some(), "an absent record grants nothing");
                if expect == self.record.map(|record| (record.store, record.revision)) {
                    self.becomes(owner);
                    applied = true;
                }
            }
            let answer = StoreAnswer { id: request.id, vm: VM, store: self.store, record: self.record, applied };
            self.standby.handle_answer(self.now, &answer);
            self.collect();
        }
    }

    fn wait(&mut self, wait: Duration) {
        self.now = self.now + wait;
        self.standby.handle_timeout(self.now);
        self.collect();
    }
}

fn acknowledges(outputs: &[Output], wanted: u64) -> bool {
    outputs.iter().any(|output| matches!(output, Output::Acknowledge { epoch, .. } if *epoch == Epoch(wanted)))
}

/// P8: one record makes both durable, the generation and the mark, and nothing is done by the grant before.
#[test]
fn a_grant_is_durable_by_its_mark_and_not_used_before() {
    let grant = Generation(2);
    let mut bench = Bench::paired();
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.collect();
    let ask = bench.asks.pop().expect("it asks");
    bench.becomes(solo(2, false));
    let answer = StoreAnswer { id: ask.id, vm: VM, store: bench.store, record: bench.record, applied: true };
    bench.standby.handle_answer(bench.now, &answer);
    // Not by the bench, which makes a generation durable at once.
    let said: Vec<_> = core::iter::from_fn(|| bench.standby.poll_output()).collect();
    let said: Vec<_> = said.into_iter().filter(|output| !matches!(output, Output::State { .. })).collect();
    assert_eq!(said, [Output::Mark { generation: grant, epoch: Epoch(3) }]);
    assert!(!bench.standby.ownership().may_run_alone(), "it is not durable");
    bench.stage(4);
    bench.wait(Duration::from_secs(1));
    assert_eq!(bench.take(), [Output::Discard { epoch: Epoch(4) }], "it is read all the same");
    assert!(bench.asks.is_empty(), "nothing is asked by it: {:?}", bench.asks);
    bench.standby.handle_marked(bench.now, grant);
    assert!(bench.standby.ownership().may_run_alone());
    assert_eq!(bench.take(), [Output::Activate { epoch: Epoch(3) }]);
}

/// P4: until the grant was read, never after; and it activates the last acknowledged one.
#[test]
fn acknowledges_until_the_grant_is_read_and_activates_the_last() {
    let mut bench = Bench::paired();
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.collect();
    assert!(matches!(bench.asks[..], [StoreRequest { op: StoreOp::Change { .. }, .. }]), "{:?}", bench.asks);
    bench.stage(4);
    assert!(acknowledges(&bench.take(), 4), "the grant was not read yet");
    bench.answer();
    assert_eq!(bench.take(), [Output::Mark { generation: Generation(2), epoch: Epoch(4) }]);
    bench.stage(5);
    assert_eq!(bench.take(), [Output::Discard { epoch: Epoch(5) }]);
    bench.standby.handle_marked(bench.now, Generation(2));
    assert_eq!(bench.take(), [Output::Activate { epoch: Epoch(4) }]);
    bench.standby.handle_activated(bench.now, ActivationResult::Runs { load: Duration::ZERO, resume: Duration::ZERO });
    bench.answer();
    assert_eq!(bench.take(), [Output::Release, Output::Close(CloseCode::Done), Output::Finished]);
    assert_eq!(bench.record.map(|record| record.owner), Some(solo(2, true)));
}

/// P13: the dead host's store had granted it the VM while its operator forced that host out. It says in its own store that the VM runs.
#[test]
fn a_winner_goes_by_its_own_store_once_a_force_is_durable() {
    let runs = ActivationResult::Runs { load: Duration::ZERO, resume: Duration::ZERO };
    for early in [true, false] {
        let mut bench = Bench::paired();
        bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
        bench.answer();
        bench.standby.handle_marked(bench.now, Generation(2));
        if !early {
            bench.standby.handle_activated(bench.now, runs.clone());
        }
        // What it asked of the dead host gets no answer.
        bench.collect();
        bench.asks.clear();
        bench.take();
        bench.store = StoreId([3; 16]);
        let owner = Owner::Solo { node: party(2), activated: false, other: None };
        bench.record = Some(Record { generation: Generation(1 << 32), ..Record::changed(bench.store, None, owner) });
        bench.standby.handle_forced(bench.now, bench.store);
        if early {
            bench.standby.handle_activated(bench.now, runs.clone());
        }
        bench.answer();
        assert_eq!(bench.take(), [Output::Release, Output::Finished], "not activated twice");
        let runs = Owner::Solo { node: party(2), activated: true, other: None };
        assert_eq!(bench.record.map(|record| record.owner), Some(runs));
    }
}

/// P13: a heartbeat that was long under way comes between the force and the moment that it is durable.
#[test]
fn a_force_counts_though_the_dead_host_was_heard_again() {
    let mut bench = Bench::paired();
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.collect();
    assert_eq!(bench.standby.may_be_forced(), Ok(()));
    bench.standby.handle_peer_heard(bench.now);
    assert!(bench.standby.may_be_forced().is_err(), "nobody would force it now");
    bench.collect();
    bench.asks.clear();
    bench.store = StoreId([3; 16]);
    let owner = Owner::Solo { node: party(2), activated: false, other: None };
    bench.record = Some(Record { generation: Generation(1 << 32), ..Record::changed(bench.store, None, owner) });
    bench.standby.handle_forced(bench.now, bench.store);
    bench.answer();
    assert_eq!(bench.take(), [Output::Mark { generation: Generation(1 << 32), epoch: Epoch(3) }]);
}

/// P5: a failed activation gives the VM back, and the copy is kept.
#[test]
fn a_failed_activation_gives_back_and_keeps_the_copy() {
    let mut bench = Bench::paired();
    bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
    bench.answer();
    bench.standby.handle_marked(bench.now, Generation(2));
    bench.standby.handle_activated(bench.now, ActivationResult::Fails { reason: "no such tap".into() });
    bench.answer();
    assert_eq!(bench.record.map(|record| record.owner), Some(solo(1, false)));
    assert!(!bench.take().contains(&Output::Destroy));
    bench.stage(4);
    assert_eq!(bench.take(), [Output::Discard { epoch: Epoch(4) }]);
}

/// P15: beside the grant, never in its place; and tried again, less and less often, for as long as it takes.
#[test]
fn a_winner_that_must_fence_runs_nothing_before_that_is_confirmed() {
    let mut bench = Bench::fencing();
    for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
        bench.fence_fails();
        bench.wait(Duration::from_secs(seconds) - Duration::from_millis(1));
        assert_eq!(bench.take(), [], "too early");
        assert!(bench.standby.is_fencing() && bench.standby.state().1.contains("the switch is stuck"));
        bench.wait(Duration::from_millis(1));
        assert_eq!(bench.take(), [Output::SwitchOff]);
    }
    bench.stage(4);
    assert_eq!(bench.take(), [Output::Discard { epoch: Epoch(4) }], "the grant was read");
    bench.standby.handle_switched_off(bench.now, SwitchedOff::Confirmed);
    assert_eq!(bench.take(), [Output::Mark { generation: Generation(2), epoch: Epoch(3) }]);

    // Without a grant nobody is switched off, and one that is off is no grant.
    let mut bench = Bench::paired_with(true);
    bench.standby.handle_switched_off(bench.now, SwitchedOff::Confirmed);
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    assert_eq!(bench.take(), []);
    assert!(bench.standby.handle_operator_confirmed(bench.now).is_err());
}

/// P15: an operator's word, or a try at once.
#[test]
fn an_operator_confirms_by_hand_or_has_it_tried_at_once() {
    let mut bench = Bench::fencing();
    assert_eq!(bench.standby.handle_operator_fence(bench.now), Ok(()));
    assert_eq!(bench.take(), [], "it is under way");
    bench.fence_fails();
    assert_eq!(bench.standby.handle_operator_fence(bench.now), Ok(()));
    assert_eq!(bench.take(), [Output::SwitchOff]);
    assert_eq!(bench.standby.handle_operator_confirmed(bench.now), Ok(()));
    assert_eq!(bench.take(), [Output::Mark { generation: Generation(2), epoch: Epoch(3) }]);
    bench.fence_fails();
    assert_eq!(bench.take(), [], "what comes late changes nothing");
}

/// P15: no host is switched off for a guest that its own agent says to stand for good. A frozen one may go on.
#[test]
fn a_primary_that_says_that_its_guest_stands_is_not_switched_off() {
    let died = |ended| PeerMessage::GuestDied { how: "died".into(), ended };
    for (message, fences) in
        [(PeerMessage::Planned { epoch: Epoch(3) }, false), (died(true), false), (died(false), true)]
    {
        let mut bench = Bench::paired_with(true);
        bench.standby.handle_peer(bench.now, message.clone());
        bench.collect();
        bench.answer();
        let outputs = bench.take();
        assert_eq!(outputs.contains(&Output::SwitchOff), fences, "{message:?}: {outputs:?}");
        assert_eq!(outputs.iter().any(|output| matches!(output, Output::Mark { .. })), !fences, "{outputs:?}");
        // It comes after the grant.
        let mut bench = Bench::fencing();
        bench.fence_fails();
        bench.standby.handle_peer(bench.now, message);
        assert_eq!(bench.take().iter().any(|output| matches!(output, Output::Mark { .. })), !fences);
    }
}

/// P5, P15: a winner that cannot fence and hears its primary gives the VM back to it; not while it is being switched off, and not to
/// another life, which may have no guest.
#[test]
fn a_winner_that_cannot_fence_gives_back_to_a_primary_that_lives() {
    for under_way in [false, true] {
        let mut bench = Bench::fencing();
        if !under_way {
            bench.fence_fails();
        }
        bench.standby.handle_peer_heard(bench.now);
        bench.collect();
        if under_way {
            assert!(bench.asks.is_empty() && bench.standby.is_fencing(), "it may be off in a moment");
            assert!(bench.standby.handle_operator_give_back(bench.now).is_err());
            bench.fence_fails();
        }
        bench.answer();
        assert_eq!(bench.record.map(|record| record.owner), Some(solo(1, false)));
        assert!(!bench.take().contains(&Output::Destroy), "the copy is kept");
        assert!(!bench.standby.is_fencing());
    }
    let mut bench = Bench::fencing();
    bench.standby.handle_suspected(bench.now, Suspicion::Restarted);
    bench.fence_fails();
    bench.standby.handle_peer_heard(bench.now);
    assert!(bench.standby.is_fencing(), "another life may have nothing");
    assert_eq!(bench.standby.handle_operator_give_back(bench.now), Ok(()));
    bench.answer();
    assert_eq!(bench.record.map(|record| record.owner), Some(solo(1, false)));
    // What was said of the primary's guest before is of no worth when the VM comes back once more.
    bench.becomes(solo(2, false));
    bench.wait(Duration::from_secs(2));
    bench.answer();
    assert_eq!(bench.take(), [keep(4), Output::SwitchOff], "what was kept is of a grant that was given back");
}

/// P15: what waits for the fence is kept, and tried again if there was no room; what an earlier grant's try says is of no worth.
#[test]
fn a_copy_that_waits_for_the_fence_is_kept() {
    let mut bench = Bench::fencing();
    assert_eq!(bench.standby.is_kept(), None, "it is being written");
    for (grant, kept, is) in [(7, true, None), (2, false, Some(false))] {
        bench.standby.handle_kept(bench.now, Generation(grant), kept);
        assert_eq!(bench.standby.is_kept(), is, "{grant}");
    }
    bench.fence_fails();
    bench.wait(Duration::from_secs(1));
    assert_eq!(bench.take(), [keep(2), Output::SwitchOff]);
    bench.standby.handle_kept(bench.now, Generation(2), true);
    assert_eq!(bench.standby.is_kept(), Some(true));
    bench.fence_fails();
    bench.wait(Duration::from_secs(2));
    assert_eq!(bench.take(), [Output::SwitchOff]);
}

/// P15: another life goes on waiting, with the copy as it was kept and by its own grant; and gives back as the one before.
#[test]
fn another_life_waits_for_the_fence_with_the_copy_that_was_kept() {
    for (required, forced) in [(true, false), (true, true), (false, false)] {
        let me = Party { incarnation: Incarnation(2), ..party(2) };
        let config = StandbyConfig::new(VM, me, party(1), Generation(1));
        let config = StandbyConfig { fence_required: required, ..config };
        let mut bench = Bench::new();
        bench.take();
        bench.becomes(pair());
        bench.becomes(Owner::Solo { node: me, activated: false, other: Some(party(1)) });
        bench.standby = Standby::resume(config, bench.now, Generation(2), Epoch(9), forced);
        if required && !forced {
            assert_eq!(bench.take(), [Output::SwitchOff]);
            assert_eq!(bench.standby.is_kept(), Some(true));
            bench.fence_fails();
            bench.standby.handle_switched_off(bench.now, SwitchedOff::Confirmed);
        }
        assert_eq!(bench.take(), [Output::Mark { generation: Generation(2), epoch: Epoch(9) }]);
        bench.standby.handle_marked(bench.now, Generation(2));
        assert_eq!(bench.take(), [Output::Activate { epoch: Epoch(9) }]);
        let runs = ActivationResult::Runs { load: Duration::ZERO, resume: Duration::ZERO };
        bench.standby.handle_activated(bench.now, runs);
        bench.answer();
        assert_eq!(bench.take(), [Output::Release, Output::Finished]);
        let runs = Owner::Solo { node: me, activated: true, other: Some(party(1)) };
        assert_eq!(bench.record.map(|record| record.owner), Some(runs));
        if !required {
            continue;
        }
        bench.record = None;
        bench.becomes(pair());
        bench.becomes(Owner::Solo { node: me, activated: false, other: Some(party(1)) });
        bench.standby = Standby::resume(config, bench.now, Generation(2), Epoch(9), false);
        bench.fence_fails();
        bench.standby.handle_peer_heard(bench.now);
        bench.answer();
        let back = Owner::Solo { node: party(1), activated: false, other: Some(me) };
        assert_eq!(bench.record.map(|record| record.owner), Some(back));
    }
}

/// P5, P15: who is off has no copy any more, and is given nothing back.
#[test]
fn what_cannot_run_is_tried_again_if_the_other_host_is_off() {
    let mut bench = Bench::fencing();
    bench.standby.handle_switched_off(bench.now, SwitchedOff::Confirmed);
    bench.standby.handle_marked(bench.now, Generation(2));
    bench.take();
    bench.standby.handle_activated(bench.now, ActivationResult::Fails { reason: "no such tap".into() });
    bench.answer();
    assert_eq!(bench.take(), []);
    assert_eq!(bench.record.map(|record| record.owner), Some(solo(2, false)), "it is not given back");
    assert!(bench.standby.state().1.contains("no such tap"), "{:?}", bench.standby.state());
    bench.wait(Duration::from_secs(1));
    assert_eq!(bench.take(), [Output::Activate { epoch: Epoch(3) }]);
    bench.standby.handle_activated(bench.now, ActivationResult::Runs { load: Duration::ZERO, resume: Duration::ZERO });
    bench.answer();
    assert_eq!(bench.record.map(|record| record.owner), Some(solo(2, true)));
}

/// P9.
#[test]
fn a_copy_is_kept_while_the_primary_runs_alone_and_goes_when_it_is_of_no_use() {
    for (then, goes) in [(pair(), true), (Owner::Stopped { node: party(1) }, true), (solo(1, true), false)] {
        let mut bench = Bench::paired();
        bench.standby.handle_suspected(bench.now, Suspicion::Silent);
        bench.becomes(solo(1, true));
        bench.answer();
        assert!(!bench.take().contains(&Output::Destroy));
        bench.becomes(then);
        bench.wait(Duration::from_secs(1));
        bench.answer();
        assert_eq!(bench.take().contains(&Output::Destroy), goes, "{then:?}");
    }
}

/// P26: the silence of a primary that ended the protection is no failure.
#[test]
fn a_primary_that_ended_the_protection_is_not_suspected() {
    let mut bench = Bench::paired();
    bench.standby.handle_peer(bench.now, PeerMessage::Unprotect);
    bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
    bench.collect();
    assert!(bench.asks.iter().all(|ask| ask.op == StoreOp::Read), "{:?}", bench.asks);
    assert_ne!(bench.standby.state().0, ProtectionState::FailingOver);
    assert!(!bench.take().contains(&Output::Destroy), "the record was not read yet");
    bench.becomes(solo(1, true));
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert!(bench.take().contains(&Output::Destroy));
}

/// P10, P2: not whole, or not named, is not asked.
#[test]
fn asks_only_when_the_record_names_this_session() {
    let mut bench = Bench::new();
    bench.stage(1);
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert!(bench.asks.iter().all(|ask| ask.op == StoreOp::Read));
    assert!(!bench.take().contains(&Output::Destroy), "the primary is only silent");
    bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert!(bench.take().contains(&Output::Destroy), "the copy is not whole and will never be");
}

/// P9: the word that the copy counts got lost with the connection, and what was read of the record is old.
#[test]
fn a_copy_that_may_be_named_is_kept() {
    let mut bench = Bench::new();
    bench.stage(1);
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.answer();
    bench.standby.handle_peer_heard(bench.now);
    bench.standby.handle_peer(bench.now, PeerMessage::Rehearse { epoch: Epoch(1) });
    bench.standby.handle_rehearsed(bench.now, RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO });
    bench.stage(2);
    bench.stage(3);
    bench.becomes(pair());
    bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
    assert!(!bench.take().contains(&Output::Destroy));
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert_eq!(bench.take(), [Output::Mark { generation: Generation(2), epoch: Epoch(3) }]);
}

/// P26: told is not enough, the record must agree.
#[test]
fn unprotect_needs_the_record() {
    let mut bench = Bench::paired();
    bench.standby.handle_peer(bench.now, PeerMessage::Unprotect);
    bench.answer();
    assert!(!bench.take().contains(&Output::Destroy), "the record still names this copy");
    bench.becomes(solo(1, true));
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert!(bench.take().contains(&Output::Destroy));
}

/// P6: heard again, the ask may win all the same, and then it counts.
#[test]
fn an_ask_that_wins_late_is_acted_on() {
    let mut bench = Bench::paired();
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.collect();
    let late = bench.asks.pop().expect("it asked");
    bench.standby.handle_peer_heard(bench.now);
    bench.answer();
    bench.stage(4);
    assert!(acknowledges(&bench.take(), 4));
    bench.asks.push(late);
    bench.answer();
    assert_eq!(bench.take(), [Output::Mark { generation: Generation(2), epoch: Epoch(4) }]);
}

/// P25: exactly the state in which the guest stands.
#[test]
fn a_planned_failover_needs_the_very_last_epoch() {
    for (planned, asks) in [(3, true), (4, false)] {
        let mut bench = Bench::paired();
        bench.standby.handle_peer(bench.now, PeerMessage::Planned { epoch: Epoch(planned) });
        bench.collect();
        assert_eq!(!bench.asks.is_empty(), asks);
    }
}

/// P32.
#[test]
fn an_epoch_out_of_order_is_the_peers_fault() {
    let mut bench = Bench::paired();
    bench.stage(5);
    assert_eq!(bench.take()[..2], [Output::Discard { epoch: Epoch(5) }, Output::Close(CloseCode::Unexpected)]);
    assert_eq!(bench.standby.acknowledged(), Some(Epoch(3)));
}

/// P27.
#[test]
fn a_second_rehearsal_is_not_tried_and_fails_nothing() {
    let mut bench = Bench::paired();
    bench.standby.handle_operator_rehearse(bench.now).expect("it holds a copy");
    assert_eq!(
        bench.take(),
        [Output::Peer(PeerMessage::Rehearsing { epoch: Epoch(3) }), Output::Rehearse { epoch: Epoch(3) }]
    );
    bench.standby.handle_peer(bench.now, PeerMessage::Rehearse { epoch: Epoch(4) });
    let busy = PeerMessage::Rehearsed { epoch: Epoch(4), result: RehearsalResult::Busy };
    assert_eq!(bench.take(), [Output::Peer(busy)]);
    let loads = RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO };
    bench.stage(4);
    bench.take();
    bench.standby.handle_rehearsed(bench.now, loads.clone());
    let done = PeerMessage::Rehearsed { epoch: Epoch(3), result: loads };
    assert_eq!(bench.take(), [Output::Peer(done)], "under the name that was announced");
}

/// P11: no number of the peer's makes ours overflow.
#[test]
fn an_epoch_over_the_bound_is_the_peers_fault() {
    for high in [u64::MAX, Epoch::BOUND.0] {
        let mut bench = Bench::new();
        bench.stage(high);
        let outputs = bench.take();
        assert!(outputs.contains(&Output::Close(CloseCode::Unexpected)), "{outputs:?}");
        assert_eq!(bench.standby.acknowledged(), None);
    }
    let mut bench = Bench::new();
    bench.stage(Epoch::BOUND.0 - 1);
    bench.take();
    bench.stage(Epoch::BOUND.0);
    assert!(bench.take().contains(&Output::Close(CloseCode::Unexpected)));
}

/// P9: nobody throws away what the record may name, as long as it cannot be read.
#[test]
fn a_copy_that_may_be_named_is_not_discarded_while_the_store_is_silent() {
    let whole = || {
        let mut bench = Bench::new();
        bench.standby.handle_peer(bench.now, PeerMessage::Binding { epoch: Epoch(2) });
        bench.stage(1);
        bench.stage(2);
        bench.answer();
        bench.wait(Duration::from_millis(1));
        bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
        bench.collect();
        bench
    };
    let mut bench = whole();
    assert!(bench.standby.handle_operator_discard(bench.now).is_err(), "what was read is older than the loss");
    bench.wait(Duration::from_secs(1));
    bench.answer();
    bench.standby.handle_operator_discard(bench.now).expect("the record names nobody");
    assert!(bench.take().contains(&Output::Destroy));

    let mut bench = whole();
    bench.becomes(pair());
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert!(bench.standby.handle_operator_discard(bench.now).is_err(), "it names this copy");
    assert!(!bench.take().contains(&Output::Destroy));

    let mut bench = Bench::new();
    bench.standby.handle_suspected(bench.now, Suspicion::ConnectionLost);
    bench.standby.handle_operator_discard(bench.now).expect("it was never whole");
}

proptest! {
    /// P4: whatever happens, acknowledgements are in order and none follows the mark; the mark names the last one; nothing is
    /// said after the end, and a copy that may have to run is not destroyed.
    #[test]
    fn any_order_of_inputs_is_safe(
        paired in any::<bool>(), fence in any::<bool>(), steps in prop::collection::vec((0_u8..18, any::<u8>()), 0..100)
    ) {
        let mut bench = if paired { Bench::paired_with(fence) } else { Bench::with(fence) };
        // The primary's guest is known to stand.
        let mut safe = !fence;
        let (mut last, mut bound, mut marked, mut finished) = (if paired { 3 } else { 0 }, paired, false, false);
        for (kind, number) in steps {
            match kind {
                0..=4 => bench.stage(last + u64::from(number % 8 != 0)),
                5 => {
                    bound = true;
                    bench.standby.handle_peer(bench.now, PeerMessage::Binding { epoch: Epoch(2) });
                }
                6 => if bound && last >= 2 && bench.record.is_none() { bench.becomes(pair()) },
                7 => bench.answer(),
                8 => bench.wait(Duration::from_millis(u64::from(number) * 5)),
                9 => {
                    let why = [Suspicion::Silent, Suspicion::Silent, Suspicion::ConnectionLost, Suspicion::Restarted];
                    bench.standby.handle_suspected(bench.now, why[usize::from(number % 4)]);
                }
                10 => bench.standby.handle_peer_heard(bench.now),
                11 => bench.standby.handle_marked(bench.now, Generation(u64::from(number % 5))),
                12 => {
                    let runs = ActivationResult::Runs { load: Duration::ZERO, resume: Duration::ZERO };
                    let fails = ActivationResult::Fails { reason: "failed".into() };
                    bench.standby.handle_activated(bench.now, if number % 2 == 0 { runs } else { fails });
                }
                13 => match bench.record.map(|record| record.owner) {
                    Some(Owner::Paired { .. }) if number % 3 == 0 => bench.becomes(solo(1, number % 2 == 0)),
                    Some(Owner::Solo { node, activated: false, .. }) if node == party(1) => bench.becomes(solo(2, false)),
                    _ => {}
                },
                14 => {
                    let message = [
                        PeerMessage::Rehearse { epoch: Epoch(1) },
                        PeerMessage::Planned { epoch: Epoch(last) },
                        PeerMessage::GuestDied { how: "died".into(), ended: true },
                    ];
                    safe |= number % 3 != 0;
                    bench.standby.handle_peer(bench.now, message[usize::from(number % 3)].clone());
                }
                15 => bench.standby.handle_switched_off(bench.now, SwitchedOff::unconfirmed("stuck")),
                16 => match number % 8 {
                    0 => {
                        safe = true;
                        bench.standby.handle_switched_off(bench.now, SwitchedOff::Confirmed);
                    }
                    1 => safe |= bench.standby.handle_operator_confirmed(bench.now).is_ok(),
                    2 => drop(bench.standby.handle_operator_give_back(bench.now)),
                    _ => drop(bench.standby.handle_operator_fence(bench.now)),
                },
                _ => {
                    let loads = RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO };
                    bench.standby.handle_rehearsed(bench.now, loads);
                    let _ = bench.standby.handle_operator_failover(bench.now);
                }
            }
            if let Some(at) = bench.standby.poll_timeout()
                && at <= bench.now
            {
                bench.standby.handle_timeout(bench.now);
                prop_assert!(bench.standby.poll_timeout().is_none_or(|at| at > bench.now), "it spins");
            }
            for output in bench.take() {
                prop_assert!(!finished, "{output:?} after the end");
                match output {
                    Output::Acknowledge { epoch, .. } => {
                        prop_assert!(!marked, "acknowledged after the grant was read");
                        prop_assert!(last == 0 || epoch.0 == last + 1, "out of order");
                        last = epoch.0;
                    }
                    Output::Mark { epoch, .. } => {
                        marked = true;
                        prop_assert!(safe, "marked before the primary's host was off");
                        prop_assert_eq!(epoch.0, last);
                        let owner = bench.record.map(|record| record.owner);
                        prop_assert!(matches!(owner, Some(Owner::Solo { node, .. }) if node == party(2)), "{:?}", owner);
                    }
                    Output::Activate { epoch } => prop_assert!(marked && epoch.0 == last),
                    Output::Destroy => {
                        let owner = bench.record.map(|record| record.owner);
                        prop_assert!(owner != Some(pair()) && owner != Some(solo(2, false)), "destroyed: {:?}", owner);
                    }
                    Output::Finished => finished = true,
                    _ => {}
                }
            }
        }
    }
}

/// P28.
#[test]
fn a_standby_that_can_hold_no_more_says_so_and_keeps_what_it_acknowledged() {
    let mut bench = Bench::paired();
    bench.standby.handle_failed(bench.now, "the disk is full");
    let refused = PeerMessage::Refused { reason: "the disk is full".into() };
    assert_eq!(bench.take(), [Output::Peer(refused)]);
    bench.stage(4);
    assert_eq!(bench.take(), [Output::Discard { epoch: Epoch(4) }]);
    assert!(bench.asks.is_empty(), "its own trouble is no suspicion");
    // The primary is lost before it went alone: what was acknowledged lives on.
    bench.standby.handle_suspected(bench.now, Suspicion::Silent);
    bench.answer();
    let outputs = bench.take();
    assert!(outputs.iter().any(|output| matches!(output, Output::Mark { epoch: Epoch(3), .. })), "{outputs:?}");
}
