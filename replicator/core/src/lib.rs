//! What is copied: the epoch commit protocol as pure state machines, one [`primary::Primary`] and one
//! [`standby::Standby`] per protected VM.
//!
//! Time, disk confirmations and messages are inputs; what to capture, send, apply, hold, release and fence are outputs, in
//! order. Page bytes never enter; page sets are the driver's, keyed by epoch. Words and clauses: `docs/protocol.md`.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod message;
pub mod pacing;
pub mod primary;
pub mod release;
pub mod restart;
pub mod standby;
pub mod state;
pub mod stats;
