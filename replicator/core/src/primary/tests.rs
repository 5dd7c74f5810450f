//! The primary by itself: its life in order, what it may open when, and that no order of inputs breaks it. The two sides together
//! are the simulator's.

extern crate std;

use std::vec::Vec;

use core::time::Duration;
use heartbeat_core::ids::{NodeId, Party, StoreId, VmId};
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreOp, StoreRequest};
use proptest::prelude::*;

use super::*;

const VM: VmId = VmId([1; 16]);
const STORE: StoreId = StoreId([2; 16]);

fn party(node: u8) -> Party {
    Party { node: NodeId([node; 16]), incarnation: Incarnation(1) }
}

/// A primary, and a store that does what it is asked at once.
struct Bench {
    now: Time,
    primary: Primary,
    record: Option<Record>,
    /// Asks that were not answered yet.
    asks: Vec<StoreRequest>,
    outputs: Vec<Output>,
}

impl Bench {
    fn new() -> Self {
        let mut bench = Self {
            now: Time::ZERO,
            primary: Primary::new(PrimaryConfig::new(VM, party(1), party(2))),
            record: None,
            asks: Vec::new(),
            outputs: Vec::new(),
        };
        bench.primary.handle_start(bench.now);
        bench.collect();
        bench
    }

    fn collect(&mut self) {
        while let Some(output) = self.primary.poll_output() {
            match output {
                Output::Ask(request) => self.asks.push(request),
                Output::PersistGeneration(generation) => {
                    self.primary.handle_generation_persisted(self.now, generation);
                }
                Output::State { .. } => {}
                output => self.outputs.push(output),
            }
        }
    }

    fn take(&mut self) -> Vec<Output> {
        self.collect();
        core::mem::take(&mut self.outputs)
    }

    /// The store answers every ask.
    fn answer(&mut self) {
        self.collect();
        while let Some(request) = self.asks.pop() {
            let mut applied = false;
            if let StoreOp::Change { expect, owner } = request.op
                && expect == self.record.map(|record| (record.store, record.revision))
            {
                self.record = Some(Record::changed(STORE, self.record.as_ref(), owner));
                applied = true;
            }
            let answer = StoreAnswer { id: request.id, vm: VM, store: STORE, record: self.record, applied };
            self.primary.handle_answer(self.now, &answer);
            self.collect();
        }
    }

    /// The other side wins or gives back.
    fn record_becomes(&mut self, owner: Owner) {
        self.record = Some(Record::changed(STORE, self.record.as_ref(), owner));
    }

    fn wait(&mut self, wait: Duration) {
        self.now = self.now + wait;
        self.primary.handle_timeout(self.now);
        self.collect();
    }

    fn captured(&mut self) -> Epoch {
        let position = self.outputs.iter().position(|output| matches!(output, Output::Capture { .. }));
        let Output::Capture { epoch, .. } = self.outputs.remove(position.expect("a capture is asked for")) else {
            unreachable!("found as one");
        };
        let report = CaptureReport { epoch, paused_at: self.now, ..CaptureReport::default() };
        self.primary.handle_captured(self.now, report);
        self.collect();
        epoch
    }

    fn acknowledged(&mut self, epoch: Epoch) {
        self.primary.handle_acknowledged(self.now, self.primary.session(), Incarnation(1), epoch);
        self.collect();
    }

    /// Captures the epoch that was asked for, wherever the request is.
    fn captured_now(&mut self) {
        let epoch = self.primary.next_epoch();
        self.primary
            .handle_captured(self.now, CaptureReport { epoch, paused_at: self.now, ..CaptureReport::default() });
        self.collect();
    }

    /// The standby was just asked for the first rehearsal, of the epoch that is returned.
    fn rehearsing() -> (Self, Epoch) {
        Self::rehearsing_after(None)
    }

    /// As [`Bench::rehearsing`], and an earlier session left this record.
    fn rehearsing_after(owner: Option<Owner>) -> (Self, Epoch) {
        let mut bench = Self::new();
        if let Some(owner) = owner {
            bench.record_becomes(owner);
        }
        let base = bench.record.map_or(Generation(0), |record| record.generation);
        bench.answer();
        assert_eq!(bench.take(), [Output::Prepare { generation: base.next() }]);
        bench.primary.handle_prepared(bench.now);
        assert_eq!(bench.take(), [Output::Sync]);
        bench.primary.handle_synced(bench.now);
        bench.collect();
        let first = bench.captured();
        bench.acknowledged(first);
        (bench, first)
    }

    /// Up to the acknowledgement of the first held epoch; the ask for the pair is open.
    fn pairing() -> Self {
        Self::pairing_after(None)
    }

    /// As [`Bench::pairing`], and an earlier session left this record.
    fn pairing_after(owner: Option<Owner>) -> Self {
        let (mut bench, first) = Self::rehearsing_after(owner);
        let loads = RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO };
        bench.primary.handle_rehearsed(bench.now, first, loads);
        bench.collect();
        let second = bench.captured();
        bench.acknowledged(second);
        assert!(bench.outputs.iter().any(|output| matches!(output, Output::Capture { hold: true, .. })));
        assert!(bench.asks.is_empty(), "the store was asked before the first held epoch was acknowledged");
        let third = bench.captured();
        bench.acknowledged(third);
        assert!(matches!(
            bench.asks[..],
            [StoreRequest { op: StoreOp::Change { owner: Owner::Paired { .. }, .. }, .. }]
        ));
        bench
    }

    fn protected() -> Self {
        let mut bench = Self::pairing();
        bench.answer();
        assert_eq!(bench.primary.state().0, ProtectionState::Protected);
        bench.take();
        bench
    }

    fn opened(&mut self) -> bool {
        self.take().contains(&Output::OpenOutput)
    }

    fn cancel_capture(&mut self) {
        let next = self.primary.next_epoch();
        if self.primary.epochs.is_capturing() {
            self.primary.handle_capture_failed(self.now, next, true, "cancelled");
            self.collect();
        }
    }
}

/// P10, P1.
#[test]
fn lives_in_order_and_releases_on_acknowledgement_only() {
    let mut bench = Bench::pairing();
    bench.answer();
    assert_eq!(bench.primary.state().0, ProtectionState::Protected);
    let epoch = bench.captured();
    assert!(!bench.take().iter().any(|output| matches!(output, Output::Release { .. })));
    bench.primary.handle_acknowledged(bench.now, Generation(9), Incarnation(1), epoch);
    bench.primary.handle_acknowledged(bench.now, Generation(1), Incarnation(9), epoch);
    assert!(!bench.take().iter().any(|output| matches!(output, Output::Release { .. })), "of another session");
    bench.acknowledged(epoch);
    assert!(bench.take().contains(&Output::Release { through: epoch }));
}

/// P20: no more than the pipeline holds.
#[test]
fn a_lagging_standby_stops_the_captures() {
    let mut bench = Bench::protected();
    bench.outputs.clear();
    // The capture that is under way was asked for before.
    let mut captures = 0;
    while bench.primary.epochs.is_capturing() {
        let epoch = bench.primary.next_epoch();
        bench.primary.handle_captured(bench.now, CaptureReport { epoch, ..CaptureReport::default() });
        bench.collect();
        captures += 1;
        assert!(captures <= 2, "more epochs than the pipeline holds");
    }
    assert_eq!((captures, bench.primary.stats().in_flight), (2, 2));
}

/// P3, P12: silence of everybody opens nothing, however long.
#[test]
fn stalls_without_the_store_and_opens_when_it_grants() {
    let mut bench = Bench::protected();
    bench.primary.handle_peer_suspected(bench.now);
    for _ in 0..100 {
        bench.wait(Duration::from_millis(500));
    }
    bench.cancel_capture();
    assert!(!bench.opened());
    assert!(bench.primary.state().1.contains("stalls"), "{:?}", bench.primary.state());
    bench.answer();
    bench.cancel_capture();
    assert!(bench.opened());
    assert_eq!(bench.primary.state().0, ProtectionState::Degraded);
}

/// P6: while the ask for the pair may still be applied, giving up takes a change of one's own.
#[test]
fn giving_up_a_pairing_writes_the_record_first() {
    let mut bench = Bench::pairing();
    bench.primary.handle_connection_lost(bench.now, "broke");
    bench.cancel_capture();
    bench.wait(Duration::from_secs(20));
    assert!(!bench.opened());
    // The store shows that nothing was applied yet: that proves nothing.
    let id = bench.asks.last().expect("it asks again").id;
    let absent = StoreAnswer { id, vm: VM, store: STORE, record: None, applied: false };
    bench.primary.handle_answer(bench.now, &absent);
    assert!(!bench.opened());
    bench.wait(Duration::from_secs(1));
    bench.answer();
    assert!(bench.opened());
    assert!(matches!(bench.record.map(|record| record.owner), Some(Owner::Solo { node, .. }) if node == party(1)));
}

/// P10: before the ask, trouble ends in open output and no record.
#[test]
fn trouble_before_the_ask_needs_no_store() {
    let mut bench = Bench::new();
    bench.answer();
    bench.primary.handle_refused(bench.now, "no tap device");
    let outputs = bench.take();
    assert!(outputs.ends_with(&[Output::Close(CloseCode::Done), Output::Detach, Output::Finished]), "{outputs:?}");
    assert!(bench.asks.is_empty() && bench.record.is_none());
    assert_eq!(bench.primary.state(), (ProtectionState::Unprotected, "no tap device"));
}

/// P5: mute at once, destroyed when the winner runs, resumed when it gives back.
#[test]
fn the_loser_is_mute_and_is_destroyed_only_when_the_winner_runs() {
    for gives_back in [false, true] {
        let mut bench = Bench::protected();
        bench.primary.handle_peer_suspected(bench.now);
        bench.collect();
        bench.record_becomes(Owner::Solo { node: party(2), activated: false, other: Some(party(1)) });
        bench.answer();
        bench.cancel_capture();
        let outputs = bench.take();
        assert!(outputs.contains(&Output::Mute) && !outputs.contains(&Output::Fence), "{outputs:?}");
        let epoch = bench.primary.next_epoch();
        bench.acknowledged(Epoch(epoch.0 - 1));
        assert!(!bench.take().iter().any(|output| matches!(output, Output::Release { .. } | Output::OpenOutput)));
        bench.record_becomes(if gives_back {
            Owner::Solo { node: party(1), activated: false, other: Some(party(2)) }
        } else {
            Owner::Solo { node: party(2), activated: true, other: Some(party(1)) }
        });
        bench.wait(Duration::from_secs(1));
        bench.answer();
        let outputs = bench.take();
        assert_eq!(outputs.contains(&Output::Fence), !gives_back, "{outputs:?}");
        assert_eq!(
            outputs.contains(&Output::Resume) && outputs.contains(&Output::OpenOutput),
            gives_back,
            "{outputs:?}"
        );
    }
}

/// P26.
#[test]
fn unprotect_owns_the_record_before_it_opens() {
    let mut bench = Bench::protected();
    bench.primary.handle_operator(bench.now, Operator::Unprotect).expect("it may");
    bench.cancel_capture();
    let outputs = bench.take();
    assert!(!outputs.contains(&Output::OpenOutput) && !outputs.contains(&Output::Peer(PeerMessage::Unprotect)));
    bench.answer();
    bench.cancel_capture();
    bench.answer();
    let outputs = bench.take();
    let place = |wanted: &Output| outputs.iter().position(|output| output == wanted).expect("it is there");
    assert!(place(&Output::OpenOutput) < place(&Output::Peer(PeerMessage::Unprotect)));
    assert!(place(&Output::Detach) < place(&Output::Finished));
}

/// P24.
#[test]
fn a_shutdown_is_stopped_in_the_store_before_the_rest_is_heard() {
    let mut bench = Bench::protected();
    bench.primary.handle_guest_event(bench.now, GuestEvent::Shutdown { gone: true });
    assert!(!bench.opened());
    bench.answer();
    assert!(bench.opened());
    assert!(matches!(bench.record.map(|record| record.owner), Some(Owner::Stopped { .. })));
}

/// P5: a guest that died is nobody's to contest for; the standby is told.
#[test]
fn a_died_guest_never_contests() {
    let mut bench = Bench::protected();
    bench.primary.handle_guest_event(bench.now, GuestEvent::Died { how: "signal 9".into() });
    assert!(
        bench
            .take()
            .contains(&Output::Peer(PeerMessage::GuestDied { how: "the guest died: signal 9".into(), ended: true }))
    );
    bench.primary.handle_peer_suspected(bench.now);
    for _ in 0..20 {
        bench.wait(Duration::from_secs(1));
        assert!(bench.asks.iter().all(|ask| ask.op == StoreOp::Read), "{:?}", bench.asks);
        bench.answer();
    }
}

/// P21: a failed capture is tried again under its number, a bounded number of times.
/// P23: a guest that does not answer is for the standby to save; nothing of it is ended or heard before the record says who has it.
#[test]
fn a_frozen_guest_is_offered_to_the_standby_and_may_come_back() {
    let told = |output: &Output| matches!(output, Output::Peer(PeerMessage::GuestDied { .. }));
    let freeze = || {
        let mut bench = Bench::protected();
        assert!(bench.primary.epochs.is_capturing());
        bench.wait(bench.primary.config().frozen_after);
        assert!(!bench.outputs.iter().any(told), "its moment was not long enough ago");
        bench.wait(Duration::from_secs(1));
        assert!(bench.take().iter().any(told));
        assert!(bench.asks.iter().all(|ask| ask.op == StoreOp::Read), "it does not contest");
        bench
    };
    // The standby wins.
    let mut bench = freeze();
    bench.record_becomes(Owner::Solo { node: party(2), activated: false, other: Some(party(1)) });
    bench.answer();
    bench.wait(Duration::from_secs(1));
    bench.answer();
    let outputs = bench.take();
    assert!(outputs.contains(&Output::Mute) && !outputs.contains(&Output::Fence), "{outputs:?}");
    // The guest answers again before anybody has won: from here on it asks, too, and what it did meanwhile comes again.
    let mut bench = freeze();
    let epoch = bench.primary.next_epoch();
    bench.captured_now();
    let outputs = bench.take();
    assert!(outputs.contains(&Output::PutBack { epoch }) && !outputs.contains(&Output::OpenOutput), "{outputs:?}");
    bench.answer();
    bench.cancel_capture();
    assert!(bench.opened());
    assert_eq!(bench.primary.state().0, ProtectionState::Degraded);
}

/// P24: what nobody copies, or no gate holds, does not run while another node may own the VM.
#[test]
fn a_changed_guest_stands_until_the_record_is_read() {
    let mut bench = Bench::protected();
    bench.primary.handle_guest_event(bench.now, GuestEvent::Changed { what: "a card".into() });
    bench.collect();
    let outputs = bench.take();
    assert!(outputs.contains(&Output::Mute) && !outputs.contains(&Output::OpenOutput), "{outputs:?}");
    bench.cancel_capture();
    bench.answer();
    let outputs = bench.take();
    assert!(outputs.contains(&Output::Resume) && outputs.contains(&Output::OpenOutput), "{outputs:?}");
}

/// P28.
#[test]
fn a_standby_that_can_hold_no_more_is_left_behind() {
    let mut bench = Bench::protected();
    let reason = "its disk is full".to_string();
    bench.primary.handle_peer(bench.now, PeerMessage::Refused { reason });
    bench.collect();
    assert_eq!(bench.primary.state().0, ProtectionState::FailingOver);
    assert!(!bench.opened(), "nothing is opened before the record was read");
    bench.answer();
    bench.cancel_capture();
    assert!(bench.opened());
    let (state, why) = bench.primary.state();
    assert!(state == ProtectionState::Degraded && why.contains("its disk is full"), "{why}");
}

#[test]
fn failed_captures_are_tried_again_and_then_degrade() {
    let mut bench = Bench::protected();
    let epoch = bench.primary.next_epoch();
    for _ in 0..3 {
        bench.primary.handle_capture_failed(bench.now, epoch, true, "it would not stop");
        assert_eq!(bench.primary.state().0, ProtectionState::Protected);
        assert!(
            bench.take().iter().any(|output| matches!(output, Output::Capture { epoch: again, .. } if *again == epoch))
        );
    }
    bench.primary.handle_capture_failed(bench.now, epoch, true, "it would not stop");
    assert_eq!(bench.primary.state().0, ProtectionState::FailingOver);
    bench.answer();
    assert!(bench.opened());
}

/// P21: the driver learns that the guest is gone and that its last capture ended, in either order.
#[test]
fn a_capture_that_the_guests_end_overtook_is_put_back() {
    for failed in [false, true] {
        for event in [GuestEvent::Died { how: "signal 9".into() }, GuestEvent::Shutdown { gone: true }] {
            let mut bench = Bench::protected();
            let epoch = bench.primary.next_epoch();
            bench.primary.handle_guest_event(bench.now, event);
            bench.take();
            if failed {
                bench.primary.handle_capture_failed(bench.now, epoch, false, "it is gone");
                assert_eq!(bench.primary.stats().put_back, 0);
            } else {
                let report = CaptureReport { epoch, paused_at: bench.now, ..CaptureReport::default() };
                bench.primary.handle_captured(bench.now, report);
                assert_eq!(bench.take(), [Output::PutBack { epoch }]);
                assert_eq!(bench.primary.next_epoch(), epoch.next(), "a number is never used twice");
            }
        }
    }
}

#[test]
#[should_panic(expected = "not asked for")]
fn a_report_of_a_capture_that_was_never_asked_for_is_our_bug() {
    let mut bench = Bench::protected();
    let epoch = bench.primary.next_epoch().next();
    bench.primary.handle_capture_failed(bench.now, epoch, true, "it would not stop");
}

/// P24: a process that ends after its guest shut down is no death.
#[test]
fn a_guest_that_shut_down_and_then_died_is_stopped_and_not_revived() {
    for answered in [false, true] {
        let mut bench = Bench::protected();
        if answered {
            // It owns alone already, and only its capture keeps it from leaving.
            bench.primary.handle_operator(bench.now, Operator::Unprotect).expect("it may");
            bench.answer();
        }
        bench.primary.handle_guest_event(bench.now, GuestEvent::Shutdown { gone: false });
        bench.primary.handle_guest_event(bench.now, GuestEvent::Died { how: "it ended".into() });
        bench.answer();
        let outputs = bench.take();
        let told = |output: &Output| matches!(output, Output::Peer(PeerMessage::GuestDied { .. }));
        assert!(!outputs.iter().any(told), "{outputs:?}");
        assert!(outputs.contains(&Output::OpenOutput) && outputs.contains(&Output::Finished), "{outputs:?}");
        let owner = bench.record.map(|record| record.owner);
        if answered {
            assert!(matches!(owner, Some(Owner::Solo { node, .. }) if node == party(1)), "{owner:?}");
        } else {
            assert!(matches!(owner, Some(Owner::Stopped { .. })), "{owner:?}");
        }
    }
}

/// P26: once the record was read, nothing waits for the store any more.
#[test]
fn unprotect_ends_without_the_store_once_it_owns_alone() {
    let mut bench = Bench::protected();
    bench.primary.handle_operator(bench.now, Operator::Unprotect).expect("it may");
    bench.answer();
    // The store is down from here on: what is asked stays without an answer.
    bench.cancel_capture();
    let outputs = bench.take();
    let place = |wanted: &Output| outputs.iter().position(|output| output == wanted).expect("it is there");
    assert!(place(&Output::OpenOutput) < place(&Output::Peer(PeerMessage::Unprotect)));
    assert!(place(&Output::Detach) < place(&Output::Finished));
    let marks =
        |ask: &StoreRequest| matches!(ask.op, StoreOp::Change { owner: Owner::Solo { activated: true, .. }, .. });
    assert!(bench.asks.iter().any(marks), "the mark is asked for all the same: {:?}", bench.asks);
}

/// P5: the word "it runs here" may have been lost; a copy from before this session is older than what was heard.
#[test]
fn what_an_earlier_session_left_is_not_given_back() {
    for pair_was_written in [false, true] {
        let mut bench =
            Bench::pairing_after(Some(Owner::Solo { node: party(1), activated: false, other: Some(party(2)) }));
        if pair_was_written {
            bench.answer();
            bench.take();
            bench.primary.handle_peer_suspected(bench.now);
        } else {
            bench.asks.clear();
            bench.primary.handle_connection_lost(bench.now, "broke");
        }
        bench.collect();
        // The capture under way keeps the machine from leaving.
        bench.answer();
        bench.primary.handle_guest_event(bench.now, GuestEvent::Died { how: "signal 9".into() });
        bench.collect();
        for _ in 0..5 {
            bench.answer();
            bench.wait(Duration::from_secs(1));
        }
        let node = match bench.record.map(|record| record.owner) {
            Some(Owner::Solo { node, .. }) => node,
            owner => panic!("{owner:?}"),
        };
        assert_eq!(node, if pair_was_written { party(2) } else { party(1) });
    }
}

/// P5: an ask of an earlier life of this node may be granted while a later life pairs. Nobody runs the VM elsewhere by that, so the later
/// life takes the record over, from a pair, too (P2), unless that one's standby has won.
#[test]
fn a_late_ask_of_an_earlier_life_destroys_nothing() {
    let (earlier, other) = (Party { incarnation: Incarnation(0), ..party(1) }, party(2));
    for activated in [None, Some(false), Some(true)] {
        let mut bench = Bench::pairing();
        bench.record_becomes(match activated {
            None => Owner::Paired { primary: earlier, standby: other },
            Some(activated) => Owner::Solo { node: earlier, activated, other: Some(other) },
        });
        bench.answer();
        assert!(bench.take().contains(&Output::Mute), "{activated:?}");
        bench.cancel_capture();
        for _ in 0..5 {
            bench.wait(Duration::from_secs(1));
            bench.answer();
        }
        let outputs = bench.take();
        assert!(!outputs.contains(&Output::Fence), "{activated:?}: {outputs:?}");
        let alone = outputs.contains(&Output::OpenOutput) && outputs.contains(&Output::Resume);
        assert!(alone, "{activated:?}: {outputs:?}");
    }
    let mut bench = Bench::pairing();
    bench.record_becomes(Owner::Paired { primary: earlier, standby: other });
    bench.record_becomes(Owner::Solo { node: other, activated: true, other: Some(earlier) });
    bench.answer();
    bench.cancel_capture();
    for _ in 0..5 {
        bench.wait(Duration::from_secs(1));
        bench.answer();
    }
    let outputs = bench.take();
    assert!(outputs.contains(&Output::Fence) && !outputs.contains(&Output::OpenOutput), "{outputs:?}");
}

/// P27: two rehearsals at once say nothing about the copy.
#[test]
fn a_busy_standby_ends_no_protection_and_is_asked_again_for_the_first_rehearsal() {
    let mut bench = Bench::protected();
    bench.primary.handle_operator(bench.now, Operator::Rehearse).expect("it may");
    assert!(bench.primary.handle_operator(bench.now, Operator::Rehearse).is_err(), "one is under way");
    let epoch = bench.primary.next_epoch();
    bench.primary.handle_rehearsed(bench.now, epoch, RehearsalResult::Busy);
    assert_eq!(bench.primary.state().0, ProtectionState::Protected);
    bench.primary.handle_operator(bench.now, Operator::Rehearse).expect("the first one is over");
    bench.primary.handle_rehearsed(bench.now, epoch, RehearsalResult::Fails { reason: "no".into() });
    assert_eq!(bench.primary.state().0, ProtectionState::FailingOver);

    let (mut bench, first) = Bench::rehearsing();
    let asked = Output::Peer(PeerMessage::Rehearse { epoch: first });
    assert!(bench.take().contains(&asked));
    let mut again = 0;
    while bench.primary.state().0 != ProtectionState::Unprotected {
        bench.primary.handle_rehearsed(bench.now, first, RehearsalResult::Busy);
        let at = bench.primary.poll_timeout().unwrap_or(bench.now);
        bench.wait(at - bench.now);
        again += u32::from(bench.take().contains(&asked));
        assert!(again < 1000, "for ever");
    }
    assert!(again > 10, "{again}");
    let (mut bench, first) = Bench::rehearsing();
    bench.primary.handle_rehearsed(bench.now, first, RehearsalResult::Busy);
    let loads = RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO };
    bench.primary.handle_rehearsed(bench.now, first, loads);
    bench.collect();
    bench.captured();
}

/// P23: what a large epoch takes on its way is no suspicion; that nothing comes after that is one.
#[test]
fn a_large_epoch_has_the_time_that_its_bytes_need() {
    for (bytes, by_size) in [(1_000, Duration::ZERO), (100_000_000, Duration::from_secs(2))] {
        let mut bench = Bench::protected();
        let epoch = bench.primary.next_epoch();
        let report = CaptureReport { epoch, paused_at: bench.now, bytes, ..CaptureReport::default() };
        bench.primary.handle_captured(bench.now, report);
        bench.wait(Duration::from_millis(190) + by_size);
        assert_eq!(bench.primary.state().0, ProtectionState::Protected, "{bytes} bytes");
        bench.wait(Duration::from_millis(20));
        assert_eq!(bench.primary.state().0, ProtectionState::FailingOver, "{bytes} bytes");
    }
}

/// P23: a rehearsal on demand excuses late acknowledgements, whoever asked for it, for a bounded time.
#[test]
fn a_rehearsal_excuses_late_acknowledgements_for_a_while() {
    for announced in [false, true] {
        for ends in [false, true] {
            let mut bench = Bench::protected();
            bench.captured_now();
            let begun = bench.now;
            let epoch = bench.primary.next_epoch();
            if announced {
                bench.primary.handle_peer(bench.now, PeerMessage::Rehearsing { epoch });
            } else {
                bench.primary.handle_operator(bench.now, Operator::Rehearse).expect("it may");
            }
            for _ in 0..20 {
                bench.wait(Duration::from_millis(100));
                // Saying it again and again excuses no longer.
                if announced {
                    bench.primary.handle_peer(bench.now, PeerMessage::Rehearsing { epoch });
                }
            }
            assert_eq!(bench.primary.state().0, ProtectionState::Protected);
            if ends {
                let loads = RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO };
                bench.primary.handle_rehearsed(bench.now, epoch, loads);
                bench.wait(Duration::from_millis(150));
                assert_eq!(bench.primary.state().0, ProtectionState::Protected, "what piled up has its time");
                bench.wait(Duration::from_millis(100));
            } else {
                bench.wait(begun + REHEARSAL_EXCUSES - bench.now);
            }
            assert_eq!(bench.primary.state().0, ProtectionState::FailingOver, "announced {announced}, ends {ends}");
        }
    }
}

proptest! {
    /// No order of inputs panics, spins, opens output that another node could be heard beside, or says anything after the end.
    #[test]
    fn any_order_of_inputs_is_safe(
        begin in 0_usize..3, steps in prop::collection::vec((0_u8..20, any::<u8>()), 0..120)
    ) {
        let mut bench = [Bench::new, Bench::pairing, Bench::protected][begin]();
        let mut finished = false;
        for (kind, number) in steps {
            let next = bench.primary.next_epoch();
            let some = Epoch(u64::from(number) % (next.0 + 2));
            match kind {
                0..=3 => bench.answer(),
                4 => bench.primary.handle_prepared(bench.now),
                5 => bench.primary.handle_synced(bench.now),
                6..=9 if bench.primary.epochs.awaits_report(next) => {
                    let report = CaptureReport { epoch: next, paused_at: bench.now, ..CaptureReport::default() };
                    bench.primary.handle_captured(bench.now, report);
                }
                10 if bench.primary.epochs.awaits_report(next) => {
                    bench.primary.handle_capture_failed(bench.now, next, number % 4 > 0, "failed");
                }
                11..=13 => bench.primary.handle_acknowledged(bench.now, bench.primary.session(), Incarnation(1), Epoch(next.0.max(1) - 1)),
                14 => {
                    let result = match number % 8 {
                        0 => RehearsalResult::Fails { reason: "it does not load".into() },
                        1 => RehearsalResult::Busy,
                        _ => RehearsalResult::Loads { launch: Duration::ZERO, load: Duration::ZERO },
                    };
                    bench.primary.handle_rehearsed(bench.now, Epoch(next.0.max(1) - 1), result);
                }
                15 => match number % 6 {
                    0 => bench.primary.handle_peer_suspected(bench.now),
                    1 => bench.primary.handle_peer_heard(bench.now),
                    2 => bench.primary.handle_connection_lost(bench.now, "broke"),
                    3 => bench.primary.handle_peer_restarted(bench.now, Incarnation(2)),
                    4 => bench.primary.handle_rehearsing(bench.now, some),
                    _ => bench.primary.handle_acknowledged(bench.now, bench.primary.session(), Incarnation(1), some),
                },
                16 => {
                    let event = match number % 6 {
                        0 => GuestEvent::Shutdown { gone: number % 4 == 0 },
                        1 => GuestEvent::Died { how: "died".into() },
                        2 => GuestEvent::Changed { what: "changed".into() },
                        3 => GuestEvent::Paused,
                        4 => GuestEvent::Resumed,
                        _ => GuestEvent::Reset,
                    };
                    bench.primary.handle_guest_event(bench.now, event);
                }
                17 => {
                    let ask = [Operator::Unprotect, Operator::Failover, Operator::Rehearse][usize::from(number % 3)];
                    let _ = bench.primary.handle_operator(bench.now, ask);
                }
                18 => match bench.record.map(|record| record.owner) {
                    Some(Owner::Paired { .. }) => bench.record_becomes(Owner::Solo { node: party(2), activated: false, other: Some(party(1)) }),
                    Some(Owner::Solo { node, .. }) if node == party(2) && number % 2 == 0 =>
                        bench.record_becomes(Owner::Solo { node, activated: true, other: Some(party(1)) }),
                    _ => {}
                },
                _ => bench.wait(Duration::from_millis(u64::from(number) * 20)),
            }
            if let Some(at) = bench.primary.poll_timeout() {
                // A timeout that has come is over once it was handled.
                if at <= bench.now {
                    bench.primary.handle_timeout(bench.now);
                    prop_assert!(bench.primary.poll_timeout().is_none_or(|at| at > bench.now), "it spins");
                }
            }
            for output in bench.take() {
                prop_assert!(!finished, "{output:?} after the end");
                match output {
                    Output::Finished => finished = true,
                    Output::OpenOutput => {
                        let alone = match bench.record.map(|record| record.owner) {
                            None => !bench.primary.ownership().is_exposed(),
                            Some(Owner::Solo { node, .. } | Owner::Stopped { node }) => node == party(1),
                            Some(Owner::Paired { .. }) => false,
                        };
                        prop_assert!(alone, "opened while the record says {:?}", bench.record);
                    }
                    Output::Fence => {
                        let elsewhere = matches!(bench.record.map(|record| record.owner),
                            Some(Owner::Solo { node, activated: true, .. }) if node == party(2));
                        let stopped = matches!(bench.record.map(|record| record.owner), Some(Owner::Stopped { .. }));
                        prop_assert!(elsewhere || stopped, "destroyed while the record says {:?}", bench.record);
                    }
                    _ => {}
                }
            }
        }
    }
}
