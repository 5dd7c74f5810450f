//! `understudy witness`: the daemon of crate `heartbeat` with a control socket.

use std::sync::Arc;

use anyhow::Context as _;
use heartbeat::witness::WitnessDaemon;
use tokio::signal::unix::{SignalKind, signal};

use super::config::WitnessConfig;
use crate::control::agent_api::WitnessApi;
use crate::control::api::{ErrorBody, PairOpenRequest, PairWindow, WitnessStatus};
use crate::control::server::serve_witness;
use crate::control::socket::ControlSocket;
use crate::control::window::PairingWindow;

/// Runs until SIGTERM or SIGINT.
pub(super) async fn run(config: WitnessConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let socket = ControlSocket::bind(&config.control_socket())?;
    let daemon = WitnessDaemon::start(&heartbeat::witness::WitnessConfig {
        state_dir: config.state_dir.clone(),
        listen: config.listen,
        name: config.name.clone(),
    })?;
    let api = Arc::new(Witness { daemon, config, window: PairingWindow::default() });
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    let served = serve_witness(socket, Arc::clone(&api), stop).await.context("the control socket failed");
    tracing::info!("the witness stops");
    api.daemon.stop().await;
    served
}

/// The running daemon behind the control socket.
struct Witness {
    daemon: WitnessDaemon,
    config: WitnessConfig,
    window: PairingWindow,
}

impl WitnessApi for Witness {
    async fn status(&self) -> Result<WitnessStatus, ErrorBody> {
        Ok(WitnessStatus {
            name: self.daemon.identity().name().to_owned(),
            node_id: self.daemon.identity().node().to_string(),
            store_id: self.daemon.store().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peers: self.daemon.peers().list().into_iter().map(|peer| peer.name).collect(),
        })
    }

    async fn pair_open(&self, request: PairOpenRequest) -> Result<PairWindow, ErrorBody> {
        let open = |limits| self.daemon.open_pairing(self.config.pair_listen, limits);
        self.window.open(&request, self.daemon.identity().name(), open).await
    }
}
