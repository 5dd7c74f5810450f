//! Nodes of a test: an identity, a peers' store and an endpoint on 127.0.0.1, each in a directory of its own.
#![allow(dead_code, reason = "each test file uses its part")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use heartbeat::quic::{Endpoint, EndpointOptions, Profile};
use heartbeat::trust::{Card, Identity, IdentityError, Peer, Peers, Role};
use tempfile::TempDir;

/// A free port on the loopback interface.
pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// How long a test waits for what must happen before it calls it missing. Never a measure of speed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Node {
    pub(crate) dir: TempDir,
    pub(crate) identity: Arc<Identity>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) endpoint: Arc<Endpoint>,
}

impl Node {
    pub(crate) fn start(name: &str) -> Self {
        Self::start_with(name, Profile::Control)
    }

    pub(crate) fn start_with(name: &str, profile: Profile) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let identity = Arc::new(Identity::start(dir.path(), Some(name)).expect("identity"));
        let peers = Arc::new(Peers::open(&dir.path().join("peers")).expect("peers"));
        let options = EndpointOptions { bind: ANY, profile, mtu: None };
        let endpoint = Endpoint::open(identity.clone(), peers.clone(), options).expect("endpoint");
        Self { dir, identity, peers, endpoint: Arc::new(endpoint) }
    }

    pub(crate) fn card(&self) -> Card {
        let addresses = vec![self.endpoint.local_addr().expect("open")];
        Card { role: Role::Agent, addresses, heartbeat: Vec::new() }
    }

    /// This node as a peer of another.
    pub(crate) fn as_peer(&self, heartbeat: Vec<SocketAddr>) -> Peer {
        Peer {
            name: self.identity.name().to_owned(),
            node: self.identity.node(),
            role: Role::Agent,
            addresses: vec![self.endpoint.local_addr().expect("open")],
            heartbeat,
            certificate: self.identity.certificate().clone(),
        }
    }
}

/// Pins each node's certificate at the other, without a pairing.
pub(crate) fn introduce(a: &Node, b: &Node) {
    a.peers.add(b.as_peer(Vec::new())).expect("b at a");
    b.peers.add(a.as_peer(Vec::new())).expect("a at b");
}

/// Starts an identity again whose former user is just going away.
pub(crate) async fn restart(dir: &Path) -> Identity {
    patiently(async {
        loop {
            match Identity::start(dir, None) {
                Ok(identity) => return identity,
                Err(IdentityError::InUse { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await
}

/// Waits for what must happen.
pub(crate) async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it must happen")
}
