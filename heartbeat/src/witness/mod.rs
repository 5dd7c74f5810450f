//! The built-in witness: a small daemon on a third host that keeps one ownership record per VM.
//!
//! The machine of `heartbeat-core` decides; this module gives it connections and a disk. Promises
//! (`docs/protocol.md` P4, P8): no answer before what it shows is durable, reads included; a request
//! counts only in the name that its connection proved; a damaged record is refused, never taken for absent.

pub(crate) mod disk;
pub mod keeper;
mod serve;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use heartbeat_core::ids::{StoreId, VmId};
use heartbeat_core::record::Record;
pub use heartbeat_core::witness::WitnessStats;

pub use disk::DiskError;

use crate::quic::{Endpoint, EndpointOptions, Profile, QuicError, close};
use crate::trust::{Card, Identity, IdentityError, PairError, PairWindow, Peers, PeersError, Role, WindowLimits};

/// How a witness is started.
#[derive(Debug, Clone)]
pub struct WitnessConfig {
    /// Where certificate, peers and records are kept; made if missing.
    pub state_dir: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Name for operators; the host's name by default.
    pub name: Option<String>,
}

/// Why a witness cannot start.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// Its identity cannot be used.
    #[error("the witness has no usable identity")]
    Identity(#[from] IdentityError),
    /// Its peers cannot be read.
    #[error("the peers of the witness cannot be read")]
    Peers(#[from] PeersError),
    /// Its records cannot be read.
    #[error("the records of the witness cannot be read")]
    Disk(#[from] DiskError),
    /// It cannot listen.
    #[error("the witness cannot listen")]
    Quic(#[from] QuicError),
}

/// One line of a witness's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessRecord {
    /// Which VM.
    pub vm: VmId,
    /// The durable record, or why this VM is refused until an operator acts.
    pub state: Result<Record, String>,
}

/// A running witness. [`WitnessDaemon::stop`] ends it in order; dropping it ends it at once, which loses
/// no answer that was given.
#[derive(Debug)]
pub struct WitnessDaemon {
    identity: Arc<Identity>,
    peers: Arc<Peers>,
    endpoint: Arc<Endpoint>,
    server: Arc<serve::Server>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for WitnessDaemon {
    fn drop(&mut self) {
        self.serving.abort();
        self.endpoint.close(close::DONE, "");
    }
}

impl WitnessDaemon {
    /// Reads the state directory and serves, on the current tokio runtime.
    ///
    /// # Errors
    /// [`WitnessError`].
    pub fn start(config: &WitnessConfig) -> Result<Self, WitnessError> {
        let identity = Arc::new(Identity::start(&config.state_dir, config.name.as_deref())?);
        let peers = Arc::new(Peers::open(&config.state_dir.join("peers"))?);
        let (disk, found) = disk::Disk::open(&config.state_dir)?;
        let server = Arc::new(serve::Server::new(disk, found, peers.clone()));
        let options = EndpointOptions { bind: config.listen, profile: Profile::Control, mtu: None };
        let endpoint = Arc::new(Endpoint::open(identity.clone(), peers.clone(), options)?);
        let serving = tokio::spawn(serve::accept_all(server.clone(), endpoint.clone()));
        tracing::info!(
            name = identity.name(), node = %identity.node(), store = %server.store(),
            listen = %endpoint.local_addr()?, "the witness serves"
        );
        Ok(Self { identity, peers, endpoint, server, serving })
    }

    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Whom it trusts.
    #[must_use]
    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// Where it listens.
    ///
    /// # Errors
    /// [`QuicError::Closed`].
    pub fn local_addr(&self) -> Result<SocketAddr, QuicError> {
        self.endpoint.local_addr()
    }

    /// The store's id.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.server.store()
    }

    /// Every VM it knows, those it refuses included.
    #[must_use]
    pub fn records(&self) -> Vec<WitnessRecord> {
        self.server.records()
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> WitnessStats {
        self.server.stats()
    }

    /// Opens a pairing window at `bind`, for an agent to join. The caller shows its code and waits on it.
    ///
    /// # Errors
    /// [`PairError::Bind`], [`PairError::Tls`].
    pub fn open_pairing(&self, bind: SocketAddr, limits: WindowLimits) -> Result<PairWindow, PairError> {
        let addresses = self.endpoint.local_addr().into_iter().collect();
        let card = Card { role: Role::Witness, addresses, heartbeat: Vec::new() };
        PairWindow::open(self.identity.clone(), self.peers.clone(), card, bind, limits)
    }

    /// Takes no more requests, waits for records that are being written, and closes the connections.
    pub async fn stop(&self) {
        self.serving.abort();
        self.server.settle().await;
        self.endpoint.close(close::DONE, "the witness stops");
        self.endpoint.wait_idle().await;
    }
}
