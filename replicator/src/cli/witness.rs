//! `understudy witness`: the daemon of crate `heartbeat` with a control socket.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use heartbeat::trust::{PairError, WindowLimits};
use heartbeat::witness::WitnessDaemon;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::config::WitnessConfig;
use crate::control::agent_api::WitnessApi;
use crate::control::api::{ErrorBody, ErrorKind, PairOpenRequest, PairWindow, WitnessStatus};
use crate::control::server::serve_witness;
use crate::control::socket::ControlSocket;

/// How often a pairing window's address is tried, and the time between.
const BIND_TRIES: u32 = 20;
const BIND_AGAIN: Duration = Duration::from_millis(25);

/// Runs until SIGTERM or SIGINT.
pub(super) async fn run(config: WitnessConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let socket = ControlSocket::bind(&config.control_socket())?;
    let daemon = WitnessDaemon::start(&heartbeat::witness::WitnessConfig {
        state_dir: config.state_dir.clone(),
        listen: config.listen,
        name: config.name.clone(),
    })?;
    let api = Arc::new(Witness { daemon, config, window: Mutex::new(None) });
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
    /// The open pairing window's task. A new window closes the old one.
    window: Mutex<Option<JoinHandle<()>>>,
}

impl Witness {
    /// Opens a window; waits a bounded time for the socket of one that was just closed.
    async fn open(&self, limits: WindowLimits) -> Result<heartbeat::trust::PairWindow, PairError> {
        let mut tries = 1;
        loop {
            match self.daemon.open_pairing(self.config.pair_listen, limits) {
                Err(PairError::Bind { .. }) if tries < BIND_TRIES => tokio::time::sleep(BIND_AGAIN).await,
                other => return other,
            }
            tries += 1;
        }
    }
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
        let open_for = Duration::from_secs(request.ttl_s);
        if open_for.is_zero() || open_for > super::args::MAX_PAIRING {
            return Err(ErrorBody::new(ErrorKind::Invalid, "a pairing window is open for 1 second to 1 hour"));
        }
        let mut open = self.window.lock().await;
        if let Some(old) = open.take() {
            old.abort();
        }
        let failed =
            |error: PairError| ErrorBody::new(ErrorKind::Failed, "the pairing window cannot be opened").because(&error);
        let window = self.open(WindowLimits { open_for, ..WindowLimits::default() }).await.map_err(failed)?;
        let answer = PairWindow {
            name: self.daemon.identity().name().to_owned(),
            code: window.code().to_string(),
            address: window.local_addr().map_err(failed)?.to_string(),
            expires_unix_ms: unix_ms(SystemTime::now() + open_for),
        };
        *open = Some(tokio::spawn(async move {
            if let Err(error) = window.wait().await {
                tracing::warn!(%error, "the pairing window closed without a peer");
            }
        }));
        Ok(answer)
    }
}

fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
