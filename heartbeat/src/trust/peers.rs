//! The peers this node trusts: one TOML file each, pinned by the exact certificate.
//!
//! Promises: a peer is durable before [`Peers::add`] returns; ids and names are unique; a file that
//! cannot be read is an error at opening, never a silently missing peer.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use heartbeat_core::ids::NodeId;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::trust::identity::{check_name, node_of};

/// Most peers of one node.
pub const MAX_PEERS: usize = 256;
/// Most addresses of one kind that a peer may have.
pub const MAX_ADDRESSES: usize = 8;

const EXTENSION: &str = "toml";

/// What a peer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, bincode::Encode, bincode::Decode)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It runs and protects virtual machines.
    Agent,
    /// It keeps the ownership records.
    Witness,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agent => "agent",
            Self::Witness => "witness",
        })
    }
}

/// One pinned peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name, unique among the peers of a node.
    pub name: String,
    /// Its id, derived from the certificate.
    pub node: NodeId,
    /// What it is for.
    pub role: Role,
    /// Where it listens for [`crate::quic`] connections, best first.
    pub addresses: Vec<SocketAddr>,
    /// Where it listens for heartbeats, one address per path; empty for a witness.
    pub heartbeat: Vec<SocketAddr>,
    /// Its certificate; a connection must show exactly this one.
    pub certificate: CertificateDer<'static>,
}

/// Why the peers' store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// A file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A peer's file is damaged.
    #[error("the peer file {path} is damaged ({what}); remove it and pair with that peer again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another peer has this name already.
    #[error("another peer is named {name:?} already; remove that one first, or rename this node")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The peer's description breaks a rule.
    #[error("this peer cannot be stored: {what}")]
    Invalid {
        /// The broken rule.
        what: String,
    },
    /// There is no such peer.
    #[error("no peer is known as {name:?}; pair with it first")]
    Unknown {
        /// What was asked for.
        name: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerFile {
    name: String,
    role: Role,
    addresses: Vec<SocketAddr>,
    heartbeat: Vec<SocketAddr>,
    certificate: String,
}

/// The store of pinned peers. Shared by `Arc`; all calls are short.
#[derive(Debug)]
pub struct Peers {
    dir: PathBuf,
    peers: RwLock<BTreeMap<NodeId, Peer>>,
}

impl Peers {
    /// Opens the store in `dir` (made if missing) and reads every peer.
    ///
    /// # Errors
    /// [`PeersError::Io`] and [`PeersError::Damaged`].
    pub fn open(dir: &Path) -> Result<Self, PeersError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| PeersError::Io { path, source }
        };
        files::make_dir(dir).map_err(at(dir))?;
        let mut peers = BTreeMap::new();
        for entry in std::fs::read_dir(dir).map_err(at(dir))? {
            let path = entry.map_err(at(dir))?.path();
            if path.extension().is_none_or(|extension| extension != EXTENSION) {
                continue;
            }
            let peer = read_peer(&path)?;
            peers.insert(peer.node, peer);
        }
        Ok(Self { dir: dir.to_path_buf(), peers: RwLock::new(peers) })
    }

    /// All peers, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Peer> {
        self.read(|peers| peers.values().cloned().collect())
    }

    /// The peer with this id.
    #[must_use]
    pub fn by_node(&self, node: NodeId) -> Option<Peer> {
        self.read(|peers| peers.get(&node).cloned())
    }

    /// The peer with this name.
    ///
    /// # Errors
    /// [`PeersError::Unknown`].
    pub fn by_name(&self, name: &str) -> Result<Peer, PeersError> {
        self.read(|peers| peers.values().find(|peer| peer.name == name).cloned())
            .ok_or_else(|| PeersError::Unknown { name: name.to_owned() })
    }

    /// The peer that shows exactly this certificate.
    #[must_use]
    pub fn by_certificate(&self, certificate: &CertificateDer<'_>) -> Option<Peer> {
        self.by_node(node_of(certificate)).filter(|peer| peer.certificate == *certificate)
    }

    /// The first witness, if there is one.
    #[must_use]
    pub fn witness(&self) -> Option<Peer> {
        self.read(|peers| peers.values().find(|peer| peer.role == Role::Witness).cloned())
    }

    /// Pins `peer`, replacing one with the same id.
    ///
    /// # Errors
    /// [`PeersError::NameTaken`], [`PeersError::Invalid`], [`PeersError::Io`]; nothing was changed then.
    pub fn add(&self, peer: Peer) -> Result<(), PeersError> {
        check_peer(&peer)?;
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if peers.values().any(|other| other.name == peer.name && other.node != peer.node) {
            return Err(PeersError::NameTaken { name: peer.name });
        }
        if peers.len() >= MAX_PEERS && !peers.contains_key(&peer.node) {
            return Err(PeersError::Invalid { what: format!("there are {MAX_PEERS} peers already") });
        }
        let file = PeerFile {
            name: peer.name.clone(),
            role: peer.role,
            addresses: peer.addresses.clone(),
            heartbeat: peer.heartbeat.clone(),
            certificate: pem::encode(&pem::Pem::new("CERTIFICATE", peer.certificate.as_ref())),
        };
        let path = self.path(peer.node);
        let text = toml::to_string(&file).map_err(|error| PeersError::Invalid { what: error.to_string() })?;
        files::replace(&path, text.as_bytes()).map_err(|source| PeersError::Io { path, source })?;
        peers.insert(peer.node, peer);
        Ok(())
    }

    /// Forgets the peer named `name`. New connections with it are refused from now on; the caller
    /// closes those that exist.
    ///
    /// # Errors
    /// [`PeersError::Unknown`], [`PeersError::Io`].
    pub fn remove(&self, name: &str) -> Result<Peer, PeersError> {
        let peer = self.by_name(name)?;
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(peer.node);
        files::remove(&path).map_err(|source| PeersError::Io { path, source })?;
        peers.remove(&peer.node);
        Ok(peer)
    }

    fn read<T>(&self, f: impl FnOnce(&BTreeMap<NodeId, Peer>) -> T) -> T {
        f(&self.peers.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn path(&self, node: NodeId) -> PathBuf {
        self.dir.join(format!("{node}.{EXTENSION}"))
    }
}

fn check_peer(peer: &Peer) -> Result<(), PeersError> {
    let invalid = |what: String| Err(PeersError::Invalid { what });
    if let Err(error) = check_name(&peer.name) {
        return invalid(error.to_string());
    }
    if peer.node != node_of(&peer.certificate) {
        return invalid("the id does not belong to the certificate".to_owned());
    }
    if peer.addresses.len() > MAX_ADDRESSES || peer.heartbeat.len() > MAX_ADDRESSES {
        return invalid(format!("more than {MAX_ADDRESSES} addresses"));
    }
    Ok(())
}

fn read_peer(path: &Path) -> Result<Peer, PeersError> {
    let damaged = |what: String| PeersError::Damaged { path: path.to_path_buf(), what };
    let text = std::fs::read_to_string(path).map_err(|source| PeersError::Io { path: path.to_path_buf(), source })?;
    let file: PeerFile = toml::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    let certificate =
        CertificateDer::from_pem_slice(file.certificate.as_bytes()).map_err(|error| damaged(error.to_string()))?;
    let peer = Peer {
        name: file.name,
        node: node_of(&certificate),
        role: file.role,
        addresses: file.addresses,
        heartbeat: file.heartbeat,
        certificate,
    };
    check_peer(&peer).map_err(|error| damaged(error.to_string()))?;
    Ok(peer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::Identity;

    fn peer(name: &str) -> Peer {
        let dir = tempfile::tempdir().expect("temporary directory");
        let identity = Identity::start(dir.path(), Some(name)).expect("identity");
        Peer {
            name: name.to_owned(),
            node: identity.node(),
            role: Role::Agent,
            addresses: vec!["127.0.0.1:7420".parse().expect("address")],
            heartbeat: vec!["[::1]:7421".parse().expect("address")],
            certificate: identity.certificate().clone(),
        }
    }

    #[test]
    fn peers_survive_a_restart_and_are_found_by_every_key() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (a, b) = (peer("a"), peer("b"));
        let store = Peers::open(dir.path()).expect("open");
        store.add(a.clone()).expect("add a");
        store.add(b.clone()).expect("add b");
        let store = Peers::open(dir.path()).expect("open again");
        assert_eq!(store.list().len(), 2);
        assert_eq!(store.by_name("a").expect("a"), a);
        assert_eq!(store.by_node(b.node), Some(b.clone()));
        assert_eq!(store.by_certificate(&b.certificate), Some(b.clone()));
        assert_eq!(store.remove("b").expect("remove"), b);
        let store = Peers::open(dir.path()).expect("open a third time");
        assert!(matches!(store.by_name("b"), Err(PeersError::Unknown { .. })));
        assert_eq!(store.by_certificate(&b.certificate), None);
    }

    #[test]
    fn a_name_belongs_to_one_node_and_an_id_to_its_certificate() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = Peers::open(dir.path()).expect("open");
        store.add(peer("a")).expect("add");
        assert!(matches!(store.add(peer("a")), Err(PeersError::NameTaken { .. })));
        let mut forged = peer("c");
        forged.node = peer("d").node;
        assert!(matches!(store.add(forged), Err(PeersError::Invalid { .. })));
    }

    #[test]
    fn a_damaged_peer_file_is_an_error_at_opening() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = Peers::open(dir.path()).expect("open");
        let a = peer("a");
        store.add(a.clone()).expect("add");
        let path = store.path(a.node);
        let text = std::fs::read_to_string(&path).expect("read");
        std::fs::write(&path, &text[..text.len() / 2]).expect("damage");
        assert!(matches!(Peers::open(dir.path()), Err(PeersError::Damaged { .. })));
    }
}
