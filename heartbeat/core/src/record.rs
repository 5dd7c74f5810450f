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
/// mark stopped what it owns. A node that owns alone may do so in a later incarnation; a party of a pair may not.
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
                let lost = if asker == primary {
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
