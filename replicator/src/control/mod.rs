//! The control API: how an operator's tools talk to the agent of this host, and to a witness.
//!
//! HTTP/1.1 and JSON on a unix socket that only root can open. [`api`] holds the types of every request and answer,
//! [`agent_api`] the trait behind the server, [`server`] and [`client`] the two ends, [`socket`] the socket's own rules.
//! Work that takes long (protecting, failing over) is started by a POST that answers at once; its progress is read from the
//! VM's status, that of a change of hands ([`change`]) as it is left when it has ended.

pub mod agent_api;
pub mod api;
pub mod change;
pub mod client;
pub mod doctor;
pub mod drill;
pub mod latch;
pub mod microvm;
pub mod paths;
pub mod policy;
pub mod server;
pub mod socket;
pub(crate) mod window;

#[cfg(test)]
mod tests;
