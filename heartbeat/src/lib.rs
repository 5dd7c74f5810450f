//! Who may run: trust between nodes, QUIC connections, heartbeats, the witness and its client, etcd as an ownership store.
//!
//! The decisions are made by the pure machines of `heartbeat-core`; this crate gives them clocks, disks and
//! a network. `docs/protocol.md` has the clauses that both keep.

pub mod beat;
pub mod etcd;
pub mod files;
#[doc(hidden)]
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod quic;
pub mod slots;
pub mod store;
pub mod trust;
pub mod witness;
