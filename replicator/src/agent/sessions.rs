//! Protections that begin: on the primary by an operator's request, on the standby by a primary's connection.

use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use heartbeat::quic::{Connection, Purpose, read_message};
use heartbeat::trust::Peer;
use heartbeat_core::ids::{Epoch, Generation, NodeId, Party, VmId};
use heartbeat_core::ownership::OwnershipConfig;
use replicator_core::message::{Durability, MAX_MESSAGE, PeerMessage};
use replicator_core::pacing::{AutoPacing, Pacing};
use replicator_core::primary::PrimaryConfig;
use replicator_core::standby::StandbyConfig;
use tokio::sync::mpsc;
use vmm_hooks::disk::{DiskSpec, MAX_DISKS};
use vmm_hooks::guest::{Guest, GuestError, GuestErrorKind, Recipe};
use vmm_hooks::layout::Layout;
use vmm_hooks::qemu::{self, AttachOptions};

use super::arbiter::Arbiter;
use super::disks::StandbyDisks;
use super::durable::{Durable, GuestAt};
use super::encoder::Session;
use super::events::EventLog;
use super::fence::Fencer;
use super::kept::{self, Described};
use super::link::{self, Link};
use super::primary::Left;
use super::protection::{HostRef, Protection};
use super::reprotect::Life;
use super::standby::Origin;
use super::view::View;
use super::{Agent, REQUESTS, Request, Vm, primary, protection, standby};
use crate::control::api::{
    Accepted, DurabilityPolicy, EpochPolicy, ErrorBody, ErrorKind, ProtectRequest, ProtectionState, Role as VmRole,
    ShadowPolicy,
};
use crate::pages::shadow::ShadowMode;

fn failed(message: impl Into<String>, cause: &dyn std::error::Error) -> ErrorBody {
    ErrorBody::new(ErrorKind::Failed, message).because(cause)
}

impl Agent {
    /// What is shown and kept of a VM from now on.
    pub(super) fn new_view(&self, name: &str, vm: VmId, role: VmRole) -> Arc<View> {
        let events = EventLog::new(&self.events, &self.config.state_dir, name);
        Arc::new(View::new(name, vm, role, self.metrics.vm(name), events))
    }

    /// Starts to protect a VM; returns when its task runs.
    pub(super) async fn protect_vm(&self, request: ProtectRequest) -> Result<Accepted, ErrorBody> {
        let peer = protection::host(&self.peers, &request.to)?;
        let me = HostRef { node: self.me().node.to_string(), name: self.identity.name().to_owned() };
        let options = self.attach_options();
        let place = self.place(&request.vm).await?;
        let name = place.name(&request.vm);
        let arbiter = match request.without_witness {
            Some(_) => self.arbiter_of_pair(&name)?,
            None => self.arbiter(request.witness.as_deref())?,
        };
        let protection = Protection::asked(&request, me, &peer, &arbiter, &self.peers)?;
        self.settled(&name).await;
        self.forget_ended(&name);
        if self.vms().contains_key(&name) {
            return Err(ErrorBody::new(ErrorKind::Busy, format!("{name} is protected already, or stands by here"))
                .advise("see `understudy status`"));
        }
        let asked = name.clone();
        let (guest, at) = blocking(move || place.attach(asked, &options)).await??;
        let (guest, error) = match self.session(&at, &protection, &peer, None, guest, None).await {
            Ok((setup, view)) => match self.start_life(at, protection, setup, view) {
                Ok(()) => return Ok(Accepted { vm: name }),
                Err(refused) => refused,
            },
            Err(refused) => refused,
        };
        blocking(move || guest.detach()).await??;
        Err(error)
    }

    /// The task of a VM whose first session is ready. If its place was taken meanwhile the guest comes back.
    fn start_life(
        &self,
        at: GuestAt,
        protection: Protection,
        setup: primary::Setup,
        view: Arc<View>,
    ) -> Result<(), (Box<dyn Guest>, ErrorBody)> {
        let (sender, requests) = mpsc::channel(REQUESTS);
        match self.vms().entry(at.name.clone()) {
            Entry::Occupied(_) => {
                let body = ErrorBody::new(ErrorKind::Busy, format!("{} is being protected already", at.name));
                Err((setup.guest, body))
            }
            Entry::Vacant(place) => {
                let (vm, life_view) = (setup.durable.vm(), Arc::clone(&view));
                let life = Life { agent: self.own(), vm, at, protection, view: life_view, requests };
                let task = tokio::spawn(life.protect(setup));
                place.insert(Vm { view, requests: sender, task, settled: None });
                Ok(())
            }
        }
    }

    /// How this agent attaches to guests.
    pub(super) fn attach_options(&self) -> AttachOptions {
        AttachOptions {
            held_bytes_max: usize::try_from(self.config.gate.bytes).unwrap_or(usize::MAX),
            held_age_max: self.config.gate.age,
            tracker: self.config.tracker,
        }
    }

    /// A VM whose task has ended leaves its place to a new one.
    pub(super) fn forget_ended(&self, name: &str) {
        let mut vms = self.vms();
        if vms.get(name).is_some_and(|vm| vm.task.is_finished()) {
            vms.remove(name);
            self.metrics.remove_vm(name);
        }
    }

    /// A copy that is kept for nobody, because its VM's primary owns it alone, makes way when that primary comes again. The
    /// core says whether it is kept for nobody; else it stays.
    async fn make_way(&self, name: &str, vm: VmId) {
        let is_copy = self.vms().get(name).is_some_and(|known| {
            let status = known.view.status();
            status.role == VmRole::Standby && status.vm_id == vm.to_string()
        });
        if is_copy && self.ask(name, Request::Unprotect).await.is_ok() {
            let known = self.vms().remove(name);
            if let Some(known) = known {
                // Its task ends when its twin is gone; a twin that stays makes the new one's preparation fail, in words.
                let _ = tokio::time::timeout(MAKE_WAY_WITHIN, known.task).await;
            }
        }
    }

    /// Everything of a session between attaching and its first step. `connection` is one that was greeted, `view` that of the
    /// sessions before. On error the guest comes back, to be left as it was.
    pub(super) async fn session(
        &self,
        at: &GuestAt,
        protection: &Protection,
        peer: &Peer,
        connection: Option<Connection>,
        guest: Box<dyn Guest>,
        view: Option<&Arc<View>>,
    ) -> Result<(primary::Setup, Arc<View>), (Box<dyn Guest>, ErrorBody)> {
        let name = at.name.as_str();
        let opened = self.open_durable(name, VmId(*uuid::Uuid::new_v4().as_bytes()), false);
        let opened = opened.and_then(|opened| Ok((self.arbiter_for(protection, &opened.0)?, opened)));
        let (arbiter, (mut durable, ownership, first_epoch)) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err((guest, error)),
        };
        // By force another host may have come to keep the record.
        let protection = &Protection { witness: arbiter.id(), ..protection.clone() };
        let connection = match connection {
            Some(connection) => connection,
            None => match self.reach(peer, durable.vm()).await {
                Ok(connection) => connection,
                Err(error) => return Err((guest, error)),
            },
        };
        // A later life of this agent takes it up from here.
        let noted = durable
            .set_guest(Some(GuestAt { attached: true, ..at.clone() }))
            .and_then(|()| durable.set_protection(Some(protection.clone())))
            .and_then(|()| durable.set_kept(None))
            .and_then(|()| durable.latch(guest.disk_images()))
            .and_then(|()| match arbiter {
                Arbiter::Host(node) => durable.set_keeper(node, None),
                _ => Ok(()),
            });
        if let Err(error) = noted {
            return Err((guest, failed(format!("this host cannot remember that it protects {name}"), &error)));
        }
        let defaults = PrimaryConfig::new(durable.vm(), self.me(), primary::standby_party(&connection));
        let config = PrimaryConfig {
            first_epoch,
            pacing: self.pacing(protection.epoch.unwrap_or(self.config.epoch.policy)),
            pipeline: usize::try_from(self.config.epoch.pipeline).expect("bounded by the configuration"),
            acknowledge_within: self.config.heartbeat.unacknowledged
                + syncing(&guest.recipe().disks, protection.durability),
            ownership,
            frozen_after: defaults.frozen_after + copying(guest.layout().pages()),
            ..defaults
        };
        let view = view.cloned().unwrap_or_else(|| self.new_view(name, durable.vm(), VmRole::Primary));
        view.begin(VmRole::Primary, &peer.name, guest.warnings());
        view.set(|status| status.hosts = protection.names());
        let Connection { send, recv, quic, .. } = connection;
        let setup = primary::Setup {
            name: name.to_owned(),
            guest,
            config,
            shadow: shadow(protection.shadow.unwrap_or(self.config.epoch.shadow)),
            durability: durability(protection.durability),
            link: Link::start(quic.clone(), send, recv),
            connection: quic,
            asker: self.asker(&arbiter),
            vitals: Arc::clone(&self.beat),
            beats: self.beats.subscribe(peer.node),
            protection: protection.encode(),
            durable,
            view: Arc::clone(&view),
        };
        Ok((setup, view))
    }

    /// A greeted connection to a host, for a VM.
    async fn reach(&self, peer: &Peer, vm: VmId) -> Result<Connection, ErrorBody> {
        let mut connection = self.bulk.connect(peer.node, Purpose::Replication).await.map_err(|error| {
            ErrorBody::new(ErrorKind::Unavailable, format!("{} cannot be reached", peer.name)).because(&error)
        })?;
        link::greet(&mut connection, self.me(), vm, true)
            .await
            .map_err(|error| failed(format!("{} does not take part", peer.name), &error))?;
        Ok(connection)
    }

    /// What this host remembers of a VM, how its core asks, and the session's first epoch. A VM that is not remembered gets
    /// the identity `vm`; one that is keeps its own, unless its primary says otherwise (`adopt`).
    fn open_durable(&self, name: &str, vm: VmId, adopt: bool) -> Result<(Durable, OwnershipConfig, Epoch), ErrorBody> {
        let unusable = |error: std::io::Error| {
            failed(format!("what this host remembers of {name} cannot be used"), &error)
                .advise("nothing was changed; see to the state directory")
        };
        let mut durable = Durable::open(&self.config.state_dir, name, vm).map_err(unusable)?;
        if adopt {
            durable.set_vm(vm).map_err(unusable)?;
        }
        let numbers = durable.begin_session().map_err(unusable)?;
        let ownership = OwnershipConfig {
            store: durable.store().and_then(|store| store.parse().ok()),
            generation: Generation(durable.generation()),
            first_request: numbers.first_request,
            ..OwnershipConfig::new(durable.vm(), self.me())
        };
        Ok((durable, ownership, Epoch(numbers.first_epoch)))
    }

    fn pacing(&self, policy: EpochPolicy) -> Pacing {
        match policy {
            EpochPolicy::Fixed(every) => Pacing::Fixed { every },
            EpochPolicy::Auto => Pacing::Auto(AutoPacing {
                busy_share: self.config.epoch.busy_share,
                waiting_share: self.config.epoch.waiting_share,
                idle_share: self.config.epoch.idle_share,
                longest: self.config.epoch.longest,
                gather: self.config.epoch.gather,
            }),
        }
    }

    /// A primary has connected: stand by for its VM.
    pub(super) async fn stand_by(self: Arc<Self>, mut connection: Connection) {
        let from = connection.peer.name.clone();
        if let Err(error) = link::greet(&mut connection, self.me(), VmId::default(), false).await {
            tracing::warn!(from, %error, "a replication connection was refused");
            return;
        }
        let message = read_message(&mut connection.recv, MAX_MESSAGE);
        let Ok(Ok(PeerMessage::Prepare { vm, name, generation, recipe, layout, durability, protection })) =
            tokio::time::timeout(PREPARE_WITHIN, message).await
        else {
            tracing::warn!(from, "a replication connection did not say what it is for");
            connection.close(standby::OUT_OF_TURN.code(), "a prepare was expected");
            return;
        };
        let primary = primary::standby_party(&connection);
        let Connection { send, recv, quic, .. } = connection;
        let link = Link::start(quic.clone(), send, recv);
        let asked = Asked { vm, name, generation, recipe, layout, durability, protection, primary };
        match self.prepare(asked, &from, &link).await {
            Ok(prepared) => self.start_standby(prepared, link, quic, &from).await,
            Err(error) => {
                let reason = if error.advice.is_empty() {
                    error.message
                } else {
                    format!("{}; {}", error.message, error.advice)
                };
                standby::refuse(&link, &reason);
                // The connection stays until the primary has read why; it closes then, or the idle timeout does.
                quic.closed().await;
            }
        }
    }

    async fn prepare(&self, asked: Asked, from: &str, link: &Link) -> Result<Prepared, ErrorBody> {
        let Asked { vm, name, generation, recipe, layout, durability, protection, primary } = asked;
        let unreadable = |error: serde_json::Error| failed("the description of the VM cannot be read", &error);
        let recipe: Recipe = serde_json::from_slice(&recipe).map_err(unreadable)?;
        let layout: Layout = serde_json::from_slice(&layout).map_err(unreadable)?;
        let protection = Protection::decode(&protection).map_err(unreadable)?;
        let arbiter = self.arbiter_of(&protection)?;
        self.settled(&name).await;
        self.forget_ended(&name);
        self.make_way(&name, vm).await;
        self.microvms.end_over(&name).await?;
        if self.vms().contains_key(&name) || self.microvms.get(&name).is_some() {
            return Err(ErrorBody::new(ErrorKind::Busy, format!("a VM called {name} is known here already"))
                .advise("see `understudy status` on this host"));
        }
        tracing::info!(vm = name, from, rtt = ?link.rtt(), pages = layout.pages(), "prepares a twin");
        self.follow_keeper(&name, vm, primary, &arbiter)?;
        let (mut durable, ownership, _) = self.open_durable(&name, vm, true)?;
        if let Some(guest) = durable.guest().filter(|guest| !self.is_gone(guest)) {
            let message = format!("process {} on this host is an earlier copy of {name}", guest.pid);
            return Err(ErrorBody::new(ErrorKind::Busy, message).advise("it must end first; nothing was changed"));
        }
        let noted = durable
            .set_guest(None)
            .and_then(|()| durable.set_protection(Some(protection.clone())))
            .and_then(|()| durable.set_kept(None))
            .and_then(|()| durable.latch_as_standby());
        noted.map_err(|error| failed(format!("this host cannot remember that it stands by for {name}"), &error))?;
        let pages = layout.pages();
        let (twins, twin_name) = (Arc::clone(&self.twins), name.clone());
        let images = self.config.standby.images.clone();
        let older = durable.disks().to_vec();
        let sizes: Arc<[u64]> = recipe.disks.iter().map(|disk| disk.bytes).collect();
        let copies = durable.copies();
        let mut described = Described {
            recipe: recipe.clone(),
            layout: layout.clone(),
            durability: protection.durability,
            disks: None,
        };
        let (disks, twin) = blocking(move || {
            kept::forget(&copies);
            let disks = match recipe.disks.as_slice() {
                [] => None,
                disks if disks.len() > MAX_DISKS => {
                    let message = format!("the VM has {} disks, at most {MAX_DISKS} can be replicated", disks.len());
                    return Err(GuestError::new(GuestErrorKind::Refused, message));
                }
                disks => Some(StandbyDisks::make(&images, &twin_name, disks, durability, &older)?),
            };
            let paths = disks.as_ref().map(StandbyDisks::images).unwrap_or_default();
            match twins.prepare(&twin_name, &recipe, &layout, &paths) {
                Ok(twin) => Ok((disks, twin)),
                Err(error) => {
                    if let Some(disks) = disks {
                        disks.remove();
                    }
                    Err(error)
                }
            }
        })
        .await??;
        described.disks = disks.as_ref().map(|disks| disks.dir().to_path_buf());
        let fence_required = self.fence_required();
        let defaults = StandbyConfig::new(vm, self.me(), primary, generation);
        let config = StandbyConfig { ownership, fence_required, ..defaults };
        Ok(Prepared { name, config, pages, sizes, twin, described, disks, arbiter, durable, protection })
    }

    /// Whether a winner here must have the other host switched off.
    pub(super) fn fence_required(&self) -> bool {
        self.config.fence.as_ref().is_some_and(|fence| fence.required)
    }

    /// What switches a host off, if this agent can.
    pub(super) fn fencer(&self, node: NodeId, name: &str) -> Option<Fencer> {
        self.config.fence.clone().map(|config| Fencer {
            config,
            host: HostRef { node: node.to_string(), name: name.to_owned() },
            metrics: self.metrics.clone(),
        })
    }

    async fn start_standby(&self, prepared: Prepared, link: Link, connection: quinn::Connection, from: &str) {
        let Prepared { name, config, pages, sizes, twin, described, disks, arbiter, durable, protection } = prepared;
        let view = self.new_view(&name, durable.vm(), VmRole::Standby);
        view.set(|status| {
            from.clone_into(&mut status.peer);
            status.hosts = protection.names();
        });
        view.set_generation(config.generation.0);
        let (sender, requests) = mpsc::channel(REQUESTS);
        let session = Session {
            vm: config.ownership.vm.0,
            generation: config.generation.0,
            incarnation: config.primary.incarnation.0,
            layout_pages: pages,
            disks: sizes,
        };
        let setup = standby::Setup {
            name: name.clone(),
            config,
            twin,
            described,
            origin: Origin::Primary {
                disks: disks.map(Box::new),
                link,
                connection,
                session,
                staging: self.config.standby.staging,
            },
            asker: self.asker(&arbiter),
            beats: self.beats.subscribe(config.primary.node),
            heartbeats: Arc::clone(&self.beat),
            fencer: self.fencer(config.primary.node, from),
            durable,
            view: Arc::clone(&view),
        };
        let spare = match self.vms().entry(name) {
            Entry::Occupied(_) => Some(setup),
            Entry::Vacant(place) => {
                let task = tokio::spawn(self.own().stand_and_survive(setup, protection, requests));
                place.insert(Vm { view, requests: sender, task, settled: None });
                None
            }
        };
        // Two primaries asked for the same name at once: the first one has the place.
        if let Some(standby::Setup { twin, origin: Origin::Primary { disks, link, .. }, .. }) = spare {
            standby::refuse(&link, "a VM of that name was prepared at the same time");
            let destroy = move || {
                let destroyed = twin.destroy();
                if let Some(disks) = disks {
                    disks.remove();
                }
                destroyed
            };
            if let Err(error) = blocking(destroy).await {
                tracing::error!(%error, "a twin that is not needed could not be removed");
            }
        }
    }
}

impl Agent {
    /// Stands by, and if the VM comes to run here looks for its next standby.
    pub(super) async fn stand_and_survive(
        self: Arc<Self>,
        setup: standby::Setup,
        protection: Protection,
        mut requests: mpsc::Receiver<Request>,
    ) {
        let (name, view, vm) = (setup.name.clone(), Arc::clone(&setup.view), setup.config.ownership.vm);
        let session = setup.durable.session();
        let survivor = standby::run(setup, &mut requests).await;
        let at = survivor.and_then(|survivor| self.survivor_at(&name, &survivor));
        let Some(at) = at else {
            // Nothing is here any more that a later life of this agent could take up.
            let forgotten = Durable::find(&self.config.state_dir, &name)
                .and_then(|durable| durable.map_or(Ok(()), |mut durable| durable.forget_copy(session)));
            if let Err(error) = forgotten {
                tracing::warn!(vm = name, %error, "it could not be noted that the copy is gone");
            }
            if view.status().state == ProtectionState::Unprotected {
                // Its protection was ended: nobody is to look after what is shown of it.
                self.metrics.remove_vm(&name);
            }
            return;
        };
        let life = Life { agent: self, vm, at, protection, view, requests };
        life.go_on(Left::Alone { was_protected: true }, true).await;
    }
}

/// How long an old copy may take to make way.
const MAKE_WAY_WITHIN: Duration = Duration::from_secs(10);
/// How long a dialer may take to say what its connection is for.
const PREPARE_WITHIN: Duration = Duration::from_secs(10);

/// A prepare message.
struct Asked {
    vm: VmId,
    name: String,
    generation: Generation,
    recipe: Vec<u8>,
    layout: Vec<u8>,
    durability: Durability,
    protection: Vec<u8>,
    primary: Party,
}

/// A standby that is ready to begin.
struct Prepared {
    name: String,
    config: StandbyConfig,
    pages: u64,
    /// Of its disks, in bytes.
    sizes: Arc<[u64]>,
    twin: Box<dyn vmm_hooks::guest::Twin>,
    described: Described,
    disks: Option<StandbyDisks>,
    arbiter: Arbiter,
    durable: Durable,
    protection: Protection,
}

/// How much later an acknowledgement may come that waits for a disk: a busy one may take so long for a sync, and its host
/// is not lost by it.
fn syncing(disks: &[DiskSpec], durability: DurabilityPolicy) -> Duration {
    if disks.is_empty() || durability == DurabilityPolicy::Memory { Duration::ZERO } else { Duration::from_secs(1) }
}

/// How long a host that is not stuck may take to copy all of a guest's memory: one GiB each second.
fn copying(pages: u64) -> Duration {
    const PAGES_PER_SECOND: u64 = 1 << 18;
    Duration::from_millis(pages.saturating_mul(1000) / PAGES_PER_SECOND)
}

/// Runs what blocks beside the runtime.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ErrorBody> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| failed("the agent could not finish this; its log says why", &error))
}

pub(super) fn durability(policy: DurabilityPolicy) -> Durability {
    match policy {
        DurabilityPolicy::Disk => Durability::Disk,
        DurabilityPolicy::Memory => Durability::Memory,
    }
}

fn shadow(policy: ShadowPolicy) -> ShadowMode {
    match policy {
        ShadowPolicy::Full => ShadowMode::Full,
        ShadowPolicy::Size(bytes) => ShadowMode::Bounded { bytes },
        ShadowPolicy::Off => ShadowMode::Off,
    }
}

/// What the VM is called from now on: what QEMU calls it, else what the operator called it.
pub(super) fn vm_name(asked: &str, target: &qemu::Target) -> String {
    let pid = match target {
        qemu::Target::Pid(pid) => Some(*pid),
        qemu::Target::QmpSocket(_) => None,
    };
    let named = qemu::running().into_iter().find(|(running, _)| Some(*running) == pid).and_then(|(_, name)| name);
    match (named, pid) {
        (Some(name), _) => name,
        (None, Some(pid)) => format!("vm-{pid}"),
        (None, None) => {
            let stem = std::path::Path::new(asked).file_stem().and_then(|stem| stem.to_str());
            stem.unwrap_or("vm").to_owned()
        }
    }
}
