//! The standby's disks: one sparse image for each disk of a VM, and one journal for all of them.
//!
//! | module | promise |
//! | --- | --- |
//! | [`store`] | what is taken outlives what its policy says; no image holds a write that was not committed |
//! | [`open`] | makes, gives up, recovers: always a whole epoch, not older than the last acknowledged one |
//! | [`error`] | what happened, what is safe, what to do |
//! | [`files`] | the file system, or a model of one |
//! | [`known`] | what new images hold, as digests |
//! | [`difference`] | the primary's side of it: only what a standby does not have is sent |
//! | [`older`] | begins new images with an older copy |
//!
//! The rules are in `docs/protocol.md`, P40 to P47. In the order of a standby's life:
//!
//! 1. [`create`](open::create) before the first protection, [`reset`](open::reset) before each other one;
//!    [`recover`](open::recover) after a restart, to learn what is there.
//! 2. [`write`](DiskStore::write) for each piece of the first copy, then [`begin`](DiskStore::begin), then acknowledge.
//! 3. For each epoch: [`append`](DiskStore::append), then acknowledge, then [`commit`](DiskStore::commit). Another thread
//!    calls [`apply`](DiskStore::apply) whenever something was committed, [`flush`](DiskStore::flush) when it has nothing else to do.
//! 4. At a failover: [`finish`](DiskStore::finish), then [`activated`](DiskStore::activated), then the twin may open the images.
//!
//! After a latched error nothing is taken or finished by that store. If the VM must go on from its copy all the same, drop it,
//! [`recover`](open::recover) with the last acknowledged epoch as the limit, and finish at the epoch that it found.

pub mod difference;
pub mod error;
pub mod files;
mod images;
mod journal;
pub mod known;
mod mark;
pub(crate) mod older;
pub mod open;
mod record;
pub mod store;

#[cfg(test)]
mod tests;

pub use error::DiskError;
pub use mark::State;
pub use open::{Recovered, Setup, StandbyDisk, create, recover, reset, state_in};
pub use record::EpochId;
pub use store::{DiskStore, Policy, Progress};
