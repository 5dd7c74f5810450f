//! Who may run: failure detector, ownership and witness as pure state machines.
//!
//! Time, disk confirmations and messages are inputs; what to send and to persist are outputs, in order. Nothing here
//! reads a clock, draws a random number or does I/O, and no clock is part of safety (`docs/protocol.md` P7): time only
//! decides how soon we act. The words and clauses are in `docs/protocol.md`.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod detector;
pub mod ids;
pub mod ownership;
pub mod record;
pub mod store;
pub mod time;
pub mod wire;
pub mod witness;
