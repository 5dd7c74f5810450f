//! Heartbeats: is the other node alive, told within milliseconds.
//!
//! Every node sends small datagrams to every paired agent, over each configured path, on QUIC connections
//! and a thread of their own, so that neither bulk loss recovery nor a busy agent delays them. What
//! arrives feeds the phi-accrual detector of `heartbeat-core`; what changes comes out as a [`PeerEvent`].
//!
//! Promises: a peer is suspected when all paths on which it was ever heard are silent past the detector's
//! bound, once per silence; a lost connection is only the beginning of a silence; after our own thread
//! was starved, every peer gets a whole fresh silence before it is suspected. Time decides only how soon
//! the agent acts, never what is safe (`docs/protocol.md` P7).

mod drive;
pub(crate) mod pulse;
mod track;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub use heartbeat_core::detector::DetectorConfig;
use heartbeat_core::ids::{Incarnation, NodeId, VmId};
use tokio::sync::{mpsc, watch};

pub use pulse::{GuestStatus, MAX_REPORTS};

use crate::quic::QuicError;
use crate::trust::{Identity, Peers};

/// Events that may wait for the receiver. One more is dropped with an error in the log;
/// [`Beat::stats`] still tells the truth then.
pub const MAX_EVENTS: usize = 1024;
/// Most paths of one node.
pub const MAX_PATHS: usize = crate::trust::peers::MAX_ADDRESSES;

/// How heartbeats are sent and judged.
#[derive(Debug, Clone)]
pub struct BeatOptions {
    /// Where to listen, one address per path; the same order as on the peers. Port 0 takes a free one.
    pub paths: Vec<SocketAddr>,
    /// Interval, silence and threshold. The same on all nodes.
    pub detector: DetectorConfig,
    /// If our own loop comes this late, we were starved and judge nobody for one whole silence.
    pub starved_after: Duration,
}

impl BeatOptions {
    /// The defaults with these paths: every 20 ms, suspicion after about 200 ms, starved after 100 ms.
    #[must_use]
    pub fn new(paths: Vec<SocketAddr>) -> Self {
        let detector = DetectorConfig::default();
        Self { paths, starved_after: detector.interval * 5, detector }
    }
}

/// What changed about a peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PeerEvent {
    /// The peer was heard for the first time since this node started.
    Heard {
        /// Which peer.
        node: NodeId,
        /// Which life of it.
        incarnation: Incarnation,
    },
    /// The peer is silent on all paths past the bound.
    Suspected {
        /// Which peer.
        node: NodeId,
        /// The lowest phi of its paths.
        phi: f64,
        /// How long it is silent on all of them.
        silence: Duration,
    },
    /// A suspected peer was heard again.
    HeardAgain {
        /// Which peer.
        node: NodeId,
        /// How long it had been silent.
        silence: Duration,
    },
    /// One path to the peer is silent past the bound while another one is heard. Nobody is suspected for that.
    PathDown {
        /// Which peer.
        node: NodeId,
        /// Which path, from 0.
        path: usize,
        /// How long it is silent.
        silence: Duration,
    },
    /// That path is heard again, while the peer was not suspected: else [`PeerEvent::HeardAgain`] says it for the first path, and
    /// this for each other one.
    PathUp {
        /// Which peer.
        node: NodeId,
        /// Which path, from 0.
        path: usize,
        /// How long it had been silent.
        silence: Duration,
    },
    /// The peer restarted. Comes before the [`PeerEvent::HeardAgain`] of the same heartbeat.
    Incarnation {
        /// Which peer.
        node: NodeId,
        /// Its former life.
        old: Incarnation,
        /// Its life now.
        new: Incarnation,
    },
    /// The peer says something new of one of its guests.
    GuestReport {
        /// Which peer.
        node: NodeId,
        /// Which guest.
        vm: VmId,
        /// How it is.
        status: GuestStatus,
    },
    /// Our own thread was not scheduled for this long: nobody is judged for one whole silence.
    Starved {
        /// How late the loop came.
        late: Duration,
    },
}

/// One path to one peer, as metrics show it. Counters are since this node started (or paired).
#[derive(Debug, Clone, PartialEq)]
pub struct PathStats {
    /// Which peer.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Which path, from 0.
    pub path: usize,
    /// Where this node listens on it.
    pub local: SocketAddr,
    /// Where the peer does, as pinned.
    pub address: SocketAddr,
    /// It was heard, and is not silent past the detector's bound.
    pub up: bool,
    /// Whether a connection stands.
    pub connected: bool,
    /// Heartbeats sent.
    pub sent: u64,
    /// Heartbeats received.
    pub received: u64,
    /// The last round trip, without the time the peer held it.
    pub rtt: Option<Duration>,
    /// The detector's phi at the last tick.
    pub phi: f64,
    /// Time since the last heartbeat at the last tick; `None` before the first.
    pub silence: Option<Duration>,
    /// Whether the peer (not the path alone) is suspected.
    pub suspected: bool,
}

/// Why heartbeats cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BeatError {
    /// No path, or more than [`MAX_PATHS`].
    #[error("heartbeats need 1 to {MAX_PATHS} paths, not {0}")]
    Paths(usize),
    /// A socket cannot be opened.
    #[error("heartbeats cannot listen")]
    Quic(#[from] QuicError),
    /// The thread or its runtime cannot be made.
    #[error("the heartbeat thread cannot start")]
    Thread(#[source] io::Error),
}

/// What this node reports of its own guests.
pub(crate) type Reports = BTreeMap<VmId, GuestStatus>;

/// Running heartbeats. Dropping it stops them and waits for the thread.
#[derive(Debug)]
pub struct Beat {
    addresses: Vec<SocketAddr>,
    reports: watch::Sender<Reports>,
    stats: Arc<Mutex<Vec<PathStats>>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Beat {
    /// Starts the heartbeat thread; all paired agents are included, and those paired or removed later
    /// within half a second.
    ///
    /// `on_thread` runs first on that thread, to raise its priority as the caller can.
    ///
    /// # Errors
    /// [`BeatError`].
    pub fn start(
        identity: Arc<Identity>,
        peers: Arc<Peers>,
        options: BeatOptions,
        on_thread: impl FnOnce() + Send + 'static,
    ) -> Result<(Self, mpsc::Receiver<PeerEvent>), BeatError> {
        if options.paths.is_empty() || options.paths.len() > MAX_PATHS {
            return Err(BeatError::Paths(options.paths.len()));
        }
        let (events, receiver) = mpsc::channel(MAX_EVENTS);
        let (reports, watched) = watch::channel(Reports::new());
        let stats = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        let shared = stats.clone();
        let thread = std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(move || {
                // Best effort: without the right to it, heartbeats run at normal priority.
                let _ = rustix::process::nice(-20);
                on_thread();
                let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = ready.send(Err(BeatError::Thread(error)));
                        return;
                    }
                };
                runtime.block_on(async move {
                    match drive::Drive::open(identity, peers, options, events, watched, shared) {
                        Ok((drive, addresses)) => {
                            let _ = ready.send(Ok(addresses));
                            drive.run(stopped).await;
                        }
                        Err(error) => {
                            let _ = ready.send(Err(error.into()));
                        }
                    }
                });
            })
            .map_err(BeatError::Thread)?;
        let addresses = started.recv().expect("the thread answers before it ends")?;
        Ok((Self { addresses, reports, stats, stop: Some(stop), thread: Some(thread) }, receiver))
    }

    /// Where it listens, one address per path.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Says how a guest of this node is, with every heartbeat from now on. More than [`MAX_REPORTS`]
    /// guests take turns.
    pub fn report(&self, vm: VmId, status: GuestStatus) {
        self.reports.send_modify(|reports| {
            reports.insert(vm, status);
        });
    }

    /// Says nothing more of a guest.
    pub fn forget(&self, vm: VmId) {
        self.reports.send_modify(|reports| {
            reports.remove(&vm);
        });
    }

    /// All paths to all peers, as of the last tick.
    #[must_use]
    pub fn stats(&self) -> Vec<PathStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the heartbeat thread panicked");
        }
    }
}
