//! Who a node is, whom it trusts, and how that trust begins.
//!
//! A node is its self-signed certificate. Two nodes trust each other after a pairing with a one-time
//! code, and then by the exact certificate alone. There is no authority and no unauthenticated mode.

pub mod identity;
pub mod pairing;
pub mod peers;

pub use identity::{Identity, IdentityError, node_of};
pub use pairing::{Card, PairCode, PairError, PairWindow, WindowLimits};
pub use peers::{Peer, Peers, PeersError, Role};
