//! The ownership record: who may run one VM, and which changes of it are anybody's to ask for.
//!
//! Promise (`docs/protocol.md` P2): [`permitted`] lets a node write only its own cause. A change away from `paired` takes the
//! exact parties that the record names, incarnation included.

use bincode::{Decode, Encode};

use crate::ids::{Generation, Party, Revision, StoreId};

/// Who may run a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Owner {
    /// The primary runs it and emits what the standby acknowledged.
    Paired {
        /// Runs it.
        primary: Party,
        /// Holds a whole copy.
        standby: Party,
    },
    /// One node may run it alone.
    Solo {
        /// Which.
        node: Party,
        /// Whether it said that it runs. Only then may another copy be destroyed.
        activated: bool,
        /// The other party of the pair that this came from: the one to whom it may be given back.
        other: Option<Party>,
    },
    /// It ended on purpose; no copy may run.
    Stopped {
        /// Who owned it and said so.
        node: Party,
    },
}

/// The one record of a VM in an ownership store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Record {
    /// The store that holds it.
    pub store: StoreId,
    /// Grows with every change.
    pub revision: Revision,
    /// Grows with each change of who may run.
    pub generation: Generation,
    /// Who may run.
    pub owner: Owner,
}

impl Record {
    /// The record after a change to `owner`; `old` is what it was, `None` if absent.
    #[must_use]
    pub fn changed(store: StoreId, old: Option<&Self>, owner: Owner) -> Self {
        let Some(old) = old else {
            return Self { store, revision: Revision(1), generation: Generation(1), owner };
        };
        // Only the word "it runs" of the same node leaves the generation as it is.
        let same_runner = matches!((old.owner, owner),
            (Owner::Solo { node: was, .. }, Owner::Solo { node: is, .. }) if was == is);
        let generation = if same_runner { old.generation } else { old.generation.next() };
        Self { store, revision: old.revision.next(), generation, owner }
    }
}

/// Why a change is not the asker's to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The record is not what the asker expected.
    #[error("the record is not the expected one")]
    Expectation,
    /// The asker is no party of the old or the new record, or not in this incarnation.
    #[error("the asker is not a party of the change")]
    NotAParty,
    /// The change is not the asker's own cause.
    #[error("the change is not the asker's own cause")]
    NotItsCause,
    /// A party is paired with itself.
    #[error("a node cannot be paired with itself")]
    SameNode,
}

/// Whether `asker` may change `old` (`None`: absent) to `new`.
///
/// A node may pair itself as primary where no record is or where it is the solo or stopped owner; make itself solo where no record
/// is, or as either party of a pair, or as the owner; give back what it has not activated to the other party; and
/// mark stopped what it owns. A node that owns alone may do so in a later incarnation. So may the primary of a pair make itself solo: the
/// guest that everything was heard of is on its host, whichever life of its agent serves it. A standby's later life holds nothing.
///
/// # Errors
/// [`Refusal`] says why not.
pub fn permitted(asker: Party, old: Option<&Owner>, new: &Owner) -> Result<(), Refusal> {
    match *new {
        Owner::Paired { primary, standby } => {
            if primary != asker {
                return Err(Refusal::NotItsCause);
            }
            if primary.node == standby.node {
                return Err(Refusal::SameNode);
            }
            match old {
                None => Ok(()),
                Some(Owner::Solo { node, .. } | Owner::Stopped { node }) if node.node == asker.node => Ok(()),
                Some(Owner::Paired { .. }) => Err(Refusal::NotItsCause),
                Some(_) => Err(Refusal::NotAParty),
            }
        }
        Owner::Solo { node, activated, other } if node == asker => match old {
            None => Ok(()),
            Some(&Owner::Paired { primary, standby }) => {
                let lost = if asker.node == primary.node && asker.incarnation >= primary.incarnation {
                    standby
                } else if asker == standby && !activated {
                    primary
                } else {
                    return Err(Refusal::NotAParty);
                };
                if other == Some(lost) { Ok(()) } else { Err(Refusal::NotItsCause) }
            }
            Some(Owner::Solo { node, .. } | Owner::Stopped { node }) if node.node == asker.node => Ok(()),
            Some(_) => Err(Refusal::NotAParty),
        },
        Owner::Solo { node: to, activated, other } => match old {
            Some(&Owner::Solo { node, activated: false, other: Some(back) }) if node == asker => {
                if to == back && !activated && other == Some(asker) { Ok(()) } else { Err(Refusal::NotItsCause) }
            }
            Some(Owner::Solo { node, .. }) if *node == asker => Err(Refusal::NotItsCause),
            _ => Err(Refusal::NotAParty),
        },
        Owner::Stopped { node } => {
            if node != asker {
                return Err(Refusal::NotItsCause);
            }
            match old {
                Some(Owner::Paired { primary, .. }) if *primary == asker => Ok(()),
                Some(Owner::Solo { node, .. } | Owner::Stopped { node }) if node.node == asker.node => Ok(()),
                _ => Err(Refusal::NotAParty),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::ids::{Incarnation, NodeId};
    use std::vec::Vec;

    fn party(node: u8, incarnation: u64) -> Party {
        Party { node: NodeId([node; 16]), incarnation: Incarnation(incarnation) }
    }

    /// Every party of a small world: three nodes, two lives each.
    fn parties() -> Vec<Party> {
        (1..=3).flat_map(|node| (1..=2).map(move |life| party(node, life))).collect()
    }

    /// Every owner that can be written with them.
    fn owners() -> Vec<Owner> {
        let mut owners = Vec::new();
        for &node in &parties() {
            owners.push(Owner::Stopped { node });
            for &other in &parties() {
                owners.push(Owner::Paired { primary: node, standby: other });
                for activated in [false, true] {
                    owners.push(Owner::Solo { node, activated, other: Some(other) });
                }
            }
            for activated in [false, true] {
                owners.push(Owner::Solo { node, activated, other: None });
            }
        }
        owners
    }

    /// P2, over every asker, old and new owner of the small world.
    #[test]
    fn nobody_writes_anothers_cause() {
        let (mut allowed, mut refused) = (0, 0);
        for asker in parties() {
            for old in owners() {
                for new in owners() {
                    if permitted(asker, Some(&old), &new).is_err() {
                        refused += 1;
                        continue;
                    }
                    allowed += 1;
                    match old {
                        // Only the exact parties end a pair, or the primary's later life, and never for another.
                        Owner::Paired { primary, standby } => {
                            let own = asker.node == primary.node && asker.incarnation >= primary.incarnation;
                            assert!(own || asker == standby);
                            match new {
                                Owner::Solo { node, activated, other } => {
                                    assert_eq!(node, asker);
                                    assert!(other == Some(if own { standby } else { primary }));
                                    assert!(own || !activated, "a standby cannot have run before its grant");
                                }
                                Owner::Stopped { node } => assert!(node == asker && asker == primary),
                                Owner::Paired { .. } => panic!("a pair replaced a pair"),
                            }
                        }
                        Owner::Solo { node, activated, other } => {
                            assert_eq!(node.node, asker.node, "only the owner changes what is owned alone");
                            if let Owner::Solo { node: to, .. } = new
                                && to != asker
                            {
                                assert!(
                                    !activated && other == Some(to) && node == asker,
                                    "a give-back, and nothing else"
                                );
                            }
                        }
                        Owner::Stopped { node } => assert_eq!(node.node, asker.node),
                    }
                    if let Owner::Paired { primary, standby } = new {
                        assert!(primary == asker && standby.node != asker.node);
                    }
                }
            }
        }
        assert!(allowed > 100 && refused > allowed, "{allowed} {refused}");
    }

    #[test]
    fn the_generation_grows_unless_the_same_node_only_says_that_it_runs() {
        let (a, b) = (party(1, 1), party(2, 1));
        let store = StoreId([1; 16]);
        let change = |old: &Record, owner| Record::changed(store, Some(old), owner);
        let pair = Record::changed(store, None, Owner::Paired { primary: a, standby: b });
        assert_eq!((pair.revision, pair.generation), (Revision(1), Generation(1)));
        let solo = change(&pair, Owner::Solo { node: b, activated: false, other: Some(a) });
        assert_eq!((solo.revision, solo.generation), (Revision(2), Generation(2)));
        let runs = change(&solo, Owner::Solo { node: b, activated: true, other: Some(a) });
        assert_eq!((runs.revision, runs.generation), (Revision(3), Generation(2)));
        let back = change(&solo, Owner::Solo { node: a, activated: false, other: Some(b) });
        assert_eq!(back.generation, Generation(3));
        let stopped = change(&runs, Owner::Stopped { node: b });
        assert_eq!((stopped.revision, stopped.generation), (Revision(4), Generation(3)));
    }
}
