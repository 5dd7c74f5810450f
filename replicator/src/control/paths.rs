//! What operators are told of the paths to a peer.

use serde::{Deserialize, Serialize};

/// One path to a peer, part of [`super::api::PeerStatus`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Which one, from 0, as in `heartbeat_listen`.
    pub path: usize,
    /// Where this host listens on it.
    pub local: String,
    /// Where the peer does, as pinned when it was paired.
    pub address: String,
    /// The peer was heard on it, and is not silent past the detector's bound.
    pub up: bool,
    /// Milliseconds since it was last heard there; absent if never.
    #[serde(default)]
    pub silence_ms: Option<f64>,
    /// The failure detector's phi on this path alone.
    pub phi: f64,
    /// The last round trip there.
    #[serde(default)]
    pub rtt_ms: Option<f64>,
}
