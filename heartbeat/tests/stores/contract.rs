//! The contract of an ownership store (`docs/protocol.md` P2, P6, P8), as two nodes see it.

use std::sync::Arc;

use heartbeat::store::OwnershipStore;
use heartbeat_core::ids::{Generation, Incarnation, NodeId, Party, Revision, StoreId, VmId};
use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};

/// Races of two nodes for one record.
const RACES: u8 = 20;

/// One node and its way to the store.
pub(crate) struct Side {
    pub(crate) store: Arc<dyn OwnershipStore>,
    pub(crate) party: Party,
}

impl Side {
    /// Asks once; there must be an answer, and it must be to this.
    pub(crate) async fn ask(&self, vm: VmId, op: StoreOp) -> StoreAnswer {
        let request = StoreRequest { id: 7, vm, asker: self.party, op };
        let answer = self.store.ask(request).await.unwrap_or_else(|error| panic!("no answer: {error:?}"));
        assert_eq!((answer.id, answer.vm), (7, vm));
        answer
    }

    pub(crate) async fn read(&self, vm: VmId) -> StoreAnswer {
        let answer = self.ask(vm, StoreOp::Read).await;
        assert!(!answer.applied);
        answer
    }

    /// Asks to change what `seen` showed.
    pub(crate) async fn change(&self, seen: &StoreAnswer, owner: Owner) -> StoreAnswer {
        let expect = seen.record.map(|record| (record.store, record.revision));
        self.ask(seen.vm, StoreOp::Change { expect, owner }).await
    }
}

pub(crate) fn solo(node: Party, activated: bool, other: Party) -> Owner {
    Owner::Solo { node, activated, other: Some(other) }
}

/// All of it.
pub(crate) async fn holds(a: &Side, b: &Side) {
    an_absent_record_is_absent_and_is_not_made_by_a_wrong_expectation(a, b).await;
    a_life_of_a_record_is_one_line_that_both_see(a, b).await;
    nobody_writes_anothers_cause(a, b).await;
    of_two_that_race_exactly_one_wins(a, b).await;
}

async fn an_absent_record_is_absent_and_is_not_made_by_a_wrong_expectation(a: &Side, b: &Side) {
    let vm = VmId([101; 16]);
    let (first, second) = tokio::join!(a.read(vm), b.read(vm));
    assert_eq!((first.record, second.record), (None, None));
    assert_eq!(first.store, second.store, "it is one store");
    assert_ne!(first.store, StoreId::default());
    for store in [first.store, StoreId([1; 16])] {
        let op = StoreOp::Change {
            expect: Some((store, Revision(1))),
            owner: Owner::Paired { primary: a.party, standby: b.party },
        };
        let answer = a.ask(vm, op).await;
        assert_eq!((answer.applied, answer.record), (false, None));
    }
    assert_eq!(b.read(vm).await.record, None);
}

async fn a_life_of_a_record_is_one_line_that_both_see(a: &Side, b: &Side) {
    let vm = VmId([102; 16]);
    let (one, two) = (a.party, b.party);
    let absent = a.read(vm).await;
    let life = [
        (a, Owner::Paired { primary: one, standby: two }, 1),
        (b, solo(two, false, one), 2),
        (b, solo(one, false, two), 3),
        (a, solo(one, true, two), 3),
        (a, Owner::Paired { primary: one, standby: two }, 4),
        (b, solo(two, false, one), 5),
        (b, solo(two, true, one), 5),
        (b, Owner::Stopped { node: two }, 6),
    ];
    let mut seen = absent;
    for (index, (side, owner, generation)) in life.into_iter().enumerate() {
        let answer = side.change(&seen, owner).await;
        let record = answer.record.expect("it was made");
        assert!(answer.applied, "{answer:?}");
        let revision = Revision(u64::try_from(index).expect("few") + 1);
        assert_eq!((record.store, record.owner, record.revision), (absent.store, owner, revision));
        assert_eq!(record.generation, Generation(generation));
        // The same once more expects what is no longer there, as a request does that the network doubled.
        let again = side.change(&seen, owner).await;
        assert_eq!((again.applied, again.record), (false, Some(record)));
        for reader in [a, b] {
            assert_eq!(reader.read(vm).await, StoreAnswer { applied: false, ..answer });
        }
        seen = answer;
    }
}

async fn nobody_writes_anothers_cause(a: &Side, b: &Side) {
    let vm = VmId([103; 16]);
    let (one, two) = (a.party, b.party);
    let third = Party { node: NodeId([9; 16]), incarnation: Incarnation(1) };
    let next = |party: Party| Party { incarnation: party.incarnation.next(), ..party };
    let pair = Owner::Paired { primary: one, standby: two };
    let absent = a.read(vm).await;
    assert!(!b.change(&absent, pair).await.applied, "a standby makes no pair");
    let paired = a.change(&absent, pair).await;
    assert!(paired.applied);
    for (side, owner) in [
        (a, solo(two, false, one)),
        (b, solo(one, false, two)),
        (b, solo(two, true, one)),
        (b, Owner::Stopped { node: two }),
        (b, Owner::Paired { primary: two, standby: one }),
        (a, Owner::Paired { primary: one, standby: third }),
        (a, solo(one, false, third)),
        (a, solo(next(one), false, two)),
        (a, solo(third, false, one)),
    ] {
        let answer = side.change(&paired, owner).await;
        assert_eq!((answer.applied, answer.record), (false, paired.record), "{owner:?}");
    }
    let granted = b.change(&paired, solo(two, false, one)).await;
    assert!(granted.applied);
    for owner in [solo(one, true, two), Owner::Paired { primary: one, standby: two }, Owner::Stopped { node: one }] {
        let answer = a.change(&granted, owner).await;
        assert_eq!((answer.applied, answer.record), (false, granted.record), "{owner:?}");
    }
}

async fn of_two_that_race_exactly_one_wins(a: &Side, b: &Side) {
    let (one, two) = (a.party, b.party);
    for round in 0..RACES {
        let vm = VmId([round; 16]);
        let absent = a.read(vm).await;
        let paired = a.change(&absent, Owner::Paired { primary: one, standby: two }).await;
        assert!(paired.applied, "{paired:?}");
        let (first, second) =
            tokio::join!(a.change(&paired, solo(one, false, two)), b.change(&paired, solo(two, false, one)));
        assert!(first.applied != second.applied, "round {round}: {first:?} {second:?}");
        assert_eq!(first.record, second.record, "the loser sees who won");
    }
}
