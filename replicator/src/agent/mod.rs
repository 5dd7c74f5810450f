//! The agent: one per host. Joins the pure cores to guests, network, store and operators.
//!
//! | module | promise |
//! | --- | --- |
//! | [`primary`], [`standby`] | the VM tasks: each owns one pure core and does what it says, in order |
//! | `pause` | the one thread that touches a protected guest |
//! | `encoder`, `intake` | epochs onto and off the connection, in order, in bounded memory |
//! | `twin` | the one thread that touches a twin |
//! | `disks` | holds a standby's disk writes before their epoch counts as staged |
//! | `arbiter` | which ownership store is asked: a witness or etcd |
//! | `link`, `asker`, `beats` | peer messages, questions to the store, suspicion |
//! | `paths` | what heartbeats say of each path to a peer, as metrics and words |
//! | `kept` | a copy that waits for its fence, on the disk |
//! | `durable`, `owed` | what a host remembers of a VM, and what it could not write down yet |
//! | `view` | what operators see |
//! | `api`, `sessions` | the control API; protections that begin |
//! | `protection`, `reprotect` | how a VM is to be protected, and a standby that is looked for again and again |
//! | `force`, `fence` | a host that is confirmed dead is forced out, where no third one keeps the record |
//! | `microvm` | microVMs: started, ended, handed over when the agent stops |
//! | `latch` | nothing else starts a VM beside the copy that runs |
//! | `found`, `leftovers` | what a former life of the agent left |

mod api;
mod arbiter;
mod aside;
mod asker;
mod beats;
mod changes;
mod clock;
mod disks;
mod drill;
mod durable;
mod encoder;
mod events;
mod fence;
mod force;
mod found;
mod intake;
mod kept;
mod lag;
mod latch;
mod leftovers;
mod link;
mod microvm;
mod owed;
mod paths;
mod pause;
mod primary;
mod protection;
mod reprotect;
mod sessions;
mod standby;
mod twin;
mod view;
mod witnesses;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use heartbeat::beat::{Beat, BeatOptions, DetectorConfig};
use heartbeat::etcd::EtcdStore;
use heartbeat::quic::{Endpoint, EndpointOptions, Profile, Purpose, close};
use heartbeat::store::{OwnershipStore, WitnessClients};
use heartbeat::trust::{Card, Identity, Peers, Role};
use heartbeat::witness::keeper::Keeper;
use heartbeat_core::ids::{Generation, NodeId, Party, StoreId, VmId};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use vmm_hooks::guest::TwinHost;
use vmm_hooks::qemu::{QemuTwinHost, TwinHostOptions};
use vmm_hooks::sys::sched::{Urgency, realtime};

use self::beats::Beats;
use self::microvm::{Microvms, Twins};
use self::view::View;
use crate::cli::config::AgentConfig;
use crate::control::api::{ErrorBody, ErrorKind, ProtectionState, RehearsalReport, Role as VmRole, WithoutWitness};
use crate::control::server::serve_agent;
use crate::control::socket::ControlSocket;
use crate::control::window::PairingWindow;
use crate::metrics::{Metrics, MetricsServer, WitnessMetrics};

/// Requests of operators that may wait for one VM's task.
const REQUESTS: usize = 8;
/// How long a stopping agent waits for its protections to end.
const STOP_WITHIN: Duration = Duration::from_secs(15);
/// The same, for a copy that is being written down so that another life of the agent finds it.
const KEEP_WITHIN: Duration = Duration::from_secs(300);
/// How long who asks for a VM of a former life waits until it is known whose that is.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);
/// How often, and how many times at most, it is looked whether such a task has ended then.
const ENDING_LOOK: Duration = Duration::from_millis(2);
const ENDING_LOOKS: u32 = 25;
/// How often the heartbeats' figures go to the metrics and the views.
const LOOK: Duration = Duration::from_millis(500);

/// What an operator asks of a VM's task, with where the answer goes.
#[derive(Debug)]
enum Request {
    /// End the protection; answered when that is done.
    Unprotect(oneshot::Sender<Result<(), ErrorBody>>),
    /// The same, because the agent stops: a later life of it protects the VM again.
    Stop(oneshot::Sender<Result<(), ErrorBody>>),
    /// Prove that the copy loads; answered when that is done.
    Rehearse(oneshot::Sender<Result<RehearsalReport, ErrorBody>>),
    /// Whether the VM could go on here if the other host were known to be dead.
    MayForce(oneshot::Sender<Result<Forceable, ErrorBody>>),
    /// The other host is dead, and this store's record names this node, durably: go on by it.
    Forced {
        /// This host's own.
        store: StoreId,
        /// How to ask it.
        keeper: (Arc<dyn OwnershipStore>, WitnessMetrics),
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), ErrorBody>>,
    },
    /// The VM is this host's and waits for the other one to be off.
    Fence {
        /// What the operator says to that.
        word: FenceWord,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), ErrorBody>>,
    },
    /// Change hands; answered when that has begun.
    Failover {
        /// Without loss, from the primary.
        planned: bool,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), ErrorBody>>,
    },
}

/// What an operator says while a VM waits for its other host to be off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FenceWord {
    /// It is off.
    Confirmed,
    /// It is to be switched off now, not only when it is time.
    Now,
    /// It is well, and gets the VM back.
    GiveBack,
}

/// A VM that waits for a host that may be dead.
#[derive(Debug, Clone, Copy)]
struct Forceable {
    vm: VmId,
    /// The highest that this host has seen.
    generation: Generation,
    /// What its operator said when it was protected.
    without_witness: Option<WithoutWitness>,
    /// It is this host's already, and waits for the other one to be off.
    fencing: bool,
}

/// A VM that this agent knows.
#[derive(Debug)]
struct Vm {
    view: Arc<View>,
    requests: mpsc::Sender<Request>,
    task: JoinHandle<()>,
    /// Of what a former life of the agent had: `true` once it is known whose it is.
    settled: Option<watch::Receiver<bool>>,
}

impl Vm {
    /// Whether it may be this host's and wait for its fence, with its copy being written down.
    fn may_keep(&self) -> bool {
        let status = self.view.status();
        status.role == VmRole::Standby && status.state == ProtectionState::FailingOver
    }
}

/// The agent, as its parts share it.
#[derive(Debug)]
struct Agent {
    config: AgentConfig,
    identity: Arc<Identity>,
    peers: Arc<Peers>,
    bulk: Endpoint,
    control: Arc<Endpoint>,
    clients: WitnessClients,
    /// Asked instead of a witness, where it is configured.
    etcd: Option<Arc<EtcdStore>>,
    /// What this host keeps itself, for VMs that no third host keeps the record of.
    keeper: Keeper,
    beat: Arc<Beat>,
    beats: Beats,
    metrics: Metrics,
    twins: Arc<dyn TwinHost>,
    microvms: Microvms,
    vms: Mutex<BTreeMap<String, Vm>>,
    changes: changes::Changes,
    window: PairingWindow,
    latches: latch::Latches,
    events: events::Writer,
    /// Itself, for tasks that outlive a request.
    own: Weak<Agent>,
}

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A directory cannot be made.
    #[error("cannot use the directory {path}")]
    Directory {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The identity cannot be read or made.
    #[error("this node's identity cannot be used")]
    Identity(#[from] heartbeat::trust::IdentityError),
    /// The pinned peers cannot be read.
    #[error("the pinned peers cannot be read")]
    Peers(#[from] heartbeat::trust::PeersError),
    /// An endpoint cannot be opened.
    #[error("the agent cannot listen")]
    Quic(#[from] heartbeat::quic::QuicError),
    /// What the configuration says of etcd cannot be used.
    #[error("etcd cannot be asked")]
    Etcd(#[from] heartbeat::etcd::EtcdConfigError),
    /// The records that this host keeps itself cannot be read.
    #[error("the records that this host keeps cannot be used")]
    Keeper(#[from] heartbeat::witness::DiskError),
    /// Heartbeats cannot start.
    #[error("heartbeats cannot start")]
    Beat(#[from] heartbeat::beat::BeatError),
    /// The control socket cannot be opened.
    #[error("the control socket cannot be opened")]
    Control(#[from] crate::control::socket::SocketError),
    /// The metrics address cannot be bound.
    #[error("metrics cannot be served")]
    Metrics(#[from] crate::metrics::MetricsServerError),
    /// Signals or the control socket fail.
    #[error("the agent cannot go on")]
    Io(#[from] std::io::Error),
}

/// Runs an agent until SIGTERM or SIGINT. Then its primaries are unprotected, so that their guests run on and are heard, its protected microVMs
/// are handed to their standbys, and its standbys are given up.
///
/// # Errors
/// [`AgentError`].
pub async fn run(config: AgentConfig) -> Result<(), AgentError> {
    let mut terminate = signal(SignalKind::terminate())?;
    for path in [&config.state_dir, &config.run_dir] {
        heartbeat::files::make_dir(path).map_err(|source| AgentError::Directory { path: path.clone(), source })?;
    }
    let socket = ControlSocket::bind(&config.control_socket())?;
    let identity = Arc::new(Identity::start(&config.state_dir, config.name.as_deref())?);
    let peers = Arc::new(Peers::open(&config.state_dir.join("peers"))?);
    let open = |bind, profile| {
        Endpoint::open(Arc::clone(&identity), Arc::clone(&peers), EndpointOptions { bind, profile, mtu: None })
    };
    let bulk = open(config.listen, Profile::Bulk)?;
    let control = Arc::new(open(SocketAddr::new(config.listen.ip(), 0), Profile::Control)?);
    let etcd = match &config.etcd {
        Some(etcd) => Some(Arc::new(EtcdStore::new(etcd, arbiter::ASK_WITHIN)?)),
        None => None,
    };
    let keeper = Keeper::open(&config.state_dir.join("keeper"), identity.node(), Arc::clone(&peers))?;
    let detector = DetectorConfig {
        interval: config.heartbeat.interval,
        silence: config.heartbeat.silence,
        ..DetectorConfig::default()
    };
    let options =
        BeatOptions { paths: config.heartbeat_listen.clone(), detector, starved_after: config.heartbeat.interval * 5 };
    let (beat, events) = Beat::start(Arc::clone(&identity), Arc::clone(&peers), options, || {
        if let Err(error) = realtime(Urgency::Heartbeat) {
            tracing::warn!(%error, "heartbeats run without real-time priority");
        }
    })?;
    let metrics = Metrics::new();
    metrics.set_held_limits(config.gate.bytes, config.gate.age);
    if let Some(address) = config.metrics {
        let server = MetricsServer::bind(address, metrics.clone(), identity.name()).await?;
        tokio::spawn(server.serve());
    }
    let twins = QemuTwinHost::new(TwinHostOptions {
        run_dir: config.run_dir.join("twins"),
        binary: config.standby.qemu.clone(),
        bridges: config.standby.bridges.clone(),
    });
    // Twins of a former life that never ran hold memory and taps, and nobody can activate them any more.
    let swept = tokio::task::spawn_blocking(move || {
        let removed = twins.remove_leftovers();
        let survivors = twins.survivors();
        (twins, removed, survivors)
    });
    let (twins, removed, survivors) = swept.await.map_err(std::io::Error::other)?;
    if !removed.paths.is_empty() {
        tracing::warn!(?removed, "removed twins that a former life of this agent had left waiting");
    }
    let microvms = Microvms::new(&config);
    let lines = events::Writer::start()?;
    let twins = Twins { qemu: twins, kvm: microvms.twins() };
    let agent = Arc::new_cyclic(|own| Agent {
        config,
        identity,
        peers,
        bulk,
        clients: WitnessClients::new(Arc::clone(&control), arbiter::ASK_WITHIN),
        control,
        etcd,
        keeper,
        beat: Arc::new(beat),
        beats: Beats::default(),
        metrics,
        twins: Arc::new(twins),
        microvms,
        vms: Mutex::new(BTreeMap::new()),
        changes: changes::Changes::default(),
        window: PairingWindow::default(),
        latches: latch::Latches::default(),
        events: lines,
        own: own.clone(),
    });
    tracing::info!(name = agent.identity.name(), node = %agent.identity.node(), "the agent runs");
    let told = Arc::clone(&agent);
    tokio::spawn(async move { told.beats.run(events).await });
    tokio::spawn(Arc::clone(&agent).look());
    tokio::spawn(Arc::clone(&agent).look_for_witnesses());
    tokio::spawn(Arc::clone(&agent).ask_what_others_keep());
    // Before anything else: what might start a VM beside the copy that runs is kept from it.
    agent.latch_first().await;
    // Before anybody can ask for anything: what was left behind decides what may be asked.
    agent.take_up(survivors, &removed.never_ran);
    tokio::spawn(Arc::clone(&agent).accept());
    tokio::spawn(Arc::clone(&agent).keep_latched());
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    serve_agent(socket, Arc::clone(&agent), stop).await?;
    agent.stop().await;
    Ok(())
}

/// See [`latch::without_agent`].
pub(crate) use latch::without_agent as latch_without_agent;

/// The error of an operator's word about another host that nobody waits for.
fn not_fencing(name: &str) -> ErrorBody {
    ErrorBody::new(ErrorKind::Refused, format!("{name} does not wait here for another host to be off"))
        .advise("nothing was changed; see `understudy status`")
}

/// The error of a planned failover that was asked of the standby.
fn wrong_side(name: &str) -> ErrorBody {
    ErrorBody::new(ErrorKind::Refused, format!("{name} does not run on this host"))
        .advise("ask the primary's agent for a planned failover")
}

impl Agent {
    fn vms(&self) -> MutexGuard<'_, BTreeMap<String, Vm>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> Arc<Self> {
        self.own.upgrade().expect("whoever calls this holds it")
    }

    /// Waits, for a bounded time, until it is known whose a VM is that a former life of this agent had.
    async fn settled(&self, name: &str) {
        let settled = self.vms().get(name).and_then(|vm| vm.settled.clone());
        if let Some(mut settled) = settled {
            // One whose task has ended is settled, too.
            let _ = tokio::time::timeout(SETTLE_WITHIN, settled.wait_for(|settled| *settled)).await;
            // One that is over leaves its place a moment later.
            for _ in 0..ENDING_LOOKS {
                if self.vms().get(name).is_none_or(|vm| vm.task.is_finished()) {
                    break;
                }
                tokio::time::sleep(ENDING_LOOK).await;
            }
        }
    }

    /// Who this agent is, in this life.
    fn me(&self) -> Party {
        Party { node: self.identity.node(), incarnation: self.identity.incarnation() }
    }

    /// What a host is called here.
    fn name_of(&self, node: NodeId) -> String {
        if node == self.me().node {
            return self.identity.name().to_owned();
        }
        self.peers.by_node(node).map_or_else(|| node.to_string(), |peer| peer.name)
    }

    /// What it tells of itself when it pairs.
    fn card(&self) -> Card {
        let addresses = self.config.reachable_at();
        Card { role: Role::Agent, addresses, heartbeat: self.beat.addresses().to_vec() }
    }

    /// Serves the connections of peers that protect VMs here.
    async fn accept(self: Arc<Self>) {
        while let Some(connection) = self.bulk.accept().await {
            if connection.purpose == Purpose::Replication {
                tokio::spawn(Arc::clone(&self).stand_by(connection));
            } else if matches!(connection.purpose, Purpose::Witness | Purpose::Kept) {
                let keeper = self.keeper.clone();
                tokio::spawn(async move { keeper.serve(connection).await });
            } else {
                connection.close(close::PROTOCOL, "this address is for replication");
            }
        }
    }

    /// Brings the heartbeats' figures to metrics and views.
    async fn look(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK);
        let mut figures = paths::Figures::default();
        loop {
            tick.tick().await;
            for vm in self.vms().values() {
                vm.view.look();
            }
            self.forget_microvms();
            for (peer, suspicion) in figures.show(&self.beat.stats(), &self.metrics) {
                for vm in self.vms().values() {
                    if vm.view.peer() == peer {
                        vm.view.set_suspicion(Some(suspicion));
                    }
                }
            }
        }
    }

    /// Leaves every guest running and heard, as far as that can be had in time.
    async fn stop(&self) {
        tracing::info!("the agent stops");
        let vms = std::mem::take(&mut *self.vms());
        for (name, mut vm) in vms {
            if self.microvms.get(&name).is_some() {
                self.hand_over(&name, &mut vm).await;
                vm.task.abort();
                continue;
            }
            let within = if vm.may_keep() { KEEP_WITHIN } else { STOP_WITHIN };
            let (reply, answer) = oneshot::channel();
            if vm.requests.send(Request::Stop(reply)).await.is_ok() {
                match tokio::time::timeout(within, answer).await {
                    Ok(Ok(Ok(()))) => {}
                    Ok(Ok(Err(error))) => tracing::warn!(vm = name, %error, "left as it is"),
                    Ok(Err(_)) => {}
                    Err(_) => tracing::error!(
                        vm = name,
                        "could not be unprotected in time: it is mute until its owner is known"
                    ),
                }
            }
            vm.task.abort();
            // The task's end closes the queue of its twin's thread, which then ends the twin.
            let _ = vm.task.await;
        }
        self.bulk.close(close::DONE, "the agent stops");
        self.bulk.wait_idle().await;
    }
}
