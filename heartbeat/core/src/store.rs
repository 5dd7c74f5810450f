//! What is asked of an ownership store and what it answers.
//!
//! An answer always shows the durable record after the request was handled (`docs/protocol.md` P6, P8). `applied: false` is a refusal and
//! proves nothing but what the record in it says; no answer proves nothing at all.

use bincode::{Decode, Encode};

use crate::ids::{Party, Revision, StoreId, VmId};
use crate::record::{Owner, Record};

/// A request to an ownership store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct StoreRequest {
    /// Chosen by the asker; comes back in the answer.
    pub id: u64,
    /// Which VM's record.
    pub vm: VmId,
    /// Who asks, in which life. The store checks the node against the connection's identity.
    pub asker: Party,
    /// What is asked.
    pub op: StoreOp,
}

/// What can be asked of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum StoreOp {
    /// A linearizable read.
    Read,
    /// A compare-and-set.
    Change {
        /// The record must be this one; `None`: it must be absent.
        expect: Option<(StoreId, Revision)>,
        /// What it becomes.
        owner: Owner,
    },
}

/// A store's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct StoreAnswer {
    /// The request's.
    pub id: u64,
    /// Which VM's record.
    pub vm: VmId,
    /// The store that answers.
    pub store: StoreId,
    /// The durable record after the request was handled; `None`: absent.
    pub record: Option<Record>,
    /// Whether this request changed it.
    pub applied: bool,
}
