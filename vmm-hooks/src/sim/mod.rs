//! Back end `sim`: a deterministic guest for tests.
//!
//! A [`SimMachine`] stands for a virtual machine's process: memory in a vector, a few registers, and a network wire. It
//! advances only when [`SimMachine::run`] is called, and what it does next depends on its registers and on what it reads
//! from its memory: a copy that goes on from the wrong bytes soon emits the wrong frames. The same seed gives the same
//! frames, byte by byte.
//!
//! Promises: it keeps the contract of [`crate::guest`] as the real back ends do, through the same [`crate::track::DirtyLedger`];
//! any step can be made to fail once ([`SimMachine::fail_once`], [`SimHost::fail`]); and it panics on calls that a driver
//! must not make, such as harvesting a running guest.

mod disks;
mod gate;
mod guest;
mod machine;
mod twin;

pub use gate::{MAX_HELD_FRAMES, SimGate};
pub use guest::{SimGuest, attach};
pub use machine::{ANNOUNCEMENT, Fault, SimFence, SimMachine};
pub use twin::{MAX_RELAUNCHES, SimHost, TwinFault};
