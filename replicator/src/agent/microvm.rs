//! microVMs of this agent: guests in processes that it starts, beside the QEMUs that it attaches to.
//!
//! Promises: a microVM is started only when the store does not say that its VM is another host's. It ends with the agent's process, whatever the reason:
//! a later life makes sure of that, and a standby that is there goes on from the last acknowledged epoch. So an agent that is told to stop hands
//! its protected microVMs over first.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreOp, StoreRequest};
use tokio::sync::oneshot;
use vmm_hooks::guest::{Guest, GuestError, GuestErrorKind, Recipe, Survivor, Twin, TwinHost};
use vmm_hooks::kvm::process::guest::Boot;
use vmm_hooks::kvm::process::{self, Microvm, ProcessTwinHost, Program};
use vmm_hooks::kvm::{self, Dirty, DiskFile, GateBounds, LinuxOptions, NetCard, PilotOptions, Spec};
use vmm_hooks::layout::Layout;
use vmm_hooks::qemu::{self, AttachOptions, QemuTwinHost};
use vmm_hooks::sys::process::PidFd;

use super::aside::aside;
use super::durable::{Durable, GuestAt};
use super::sessions::{blocking, vm_name};
use super::{Agent, Request, STOP_WITHIN, Vm};
use crate::cli::config::AgentConfig;
use crate::control::api::{Accepted, ErrorBody, ErrorKind, ProtectionState, Role, VmStatus};
use crate::control::microvm::{DirtyPages, RunNet, RunRequest, Started};

/// What a kernel is told that its operator tells nothing.
const CMDLINE: &str = "console=ttyS0 panic=-1";
/// The longest name of a microVM, in bytes.
const NAME_MAX: usize = 64;

/// The hidden command that is the process of a microVM.
const PROCESS_COMMAND: &str = "microvm";

/// Twins of either back end, as a recipe wants them.
#[derive(Debug)]
pub(super) struct Twins {
    pub(super) qemu: QemuTwinHost,
    pub(super) kvm: ProcessTwinHost,
}

impl TwinHost for Twins {
    fn prepare(
        &self,
        name: &str,
        recipe: &Recipe,
        layout: &Layout,
        images: &[PathBuf],
    ) -> Result<Box<dyn Twin>, GuestError> {
        if recipe.backend == kvm::BACKEND {
            self.kvm.prepare(name, recipe, layout, images)
        } else {
            self.qemu.prepare(name, recipe, layout, images)
        }
    }
}

/// The microVMs that run here, protected or not, and the twins of such.
#[derive(Debug)]
pub(super) struct Microvms {
    program: Program,
    twins: ProcessTwinHost,
    bounds: GateBounds,
    machines: Mutex<BTreeMap<String, Microvm>>,
    /// One starts at a time.
    starting: tokio::sync::Mutex<()>,
}

impl Microvms {
    pub(super) fn new(config: &AgentConfig) -> Self {
        let bounds =
            GateBounds { bytes: usize::try_from(config.gate.bytes).unwrap_or(usize::MAX), age: config.gate.age };
        let bridges = Some(config.standby.bridges.clone());
        let options = kvm::TwinHostOptions { bounds, bridges, ..kvm::TwinHostOptions::default() };
        let program = Program::own(&[PROCESS_COMMAND]);
        Self {
            twins: ProcessTwinHost::new(program.clone(), options),
            program,
            bounds,
            machines: Mutex::default(),
            starting: tokio::sync::Mutex::default(),
        }
    }

    /// Where twins of microVMs are made.
    pub(super) fn twins(&self) -> ProcessTwinHost {
        self.twins.clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Microvm>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The microVM called `name`, unless it is over.
    pub(super) fn get(&self, name: &str) -> Option<Microvm> {
        self.lock().get(name).filter(|machine| !machine.is_over()).cloned()
    }

    /// Whether the one at `at` is here, and over for sure. Nothing of it is left then.
    fn is_gone(&self, at: &GuestAt) -> bool {
        let is_it = |machine: &Microvm| {
            let process = machine.process();
            (process.pid(), process.start_time()) == (at.pid, at.started)
        };
        let machine = self.lock().get(&at.name).filter(|machine| is_it(machine)).cloned();
        // Without the lock: it may wait for the process to end.
        machine.is_some_and(|machine| machine.is_gone())
    }

    /// Lets go of the one called `name` if it is over: its process ends, and its memory, tap and disk are free.
    pub(super) fn forget(&self, name: &str) {
        self.forget_if(|its| its == name);
    }

    /// Takes those that are over and that `may` go.
    fn take_if(&self, may: impl Fn(&str) -> bool) -> Vec<(String, Microvm)> {
        self.lock().extract_if(.., |name, machine| machine.is_over() && may(name)).collect()
    }

    /// Ends what is left of the one called `name` if it is over; returns when it has ended.
    ///
    /// # Errors
    /// If its end could not be confirmed.
    pub(super) async fn end_over(&self, name: &str) -> Result<(), ErrorBody> {
        for (_, machine) in self.take_if(|its| its == name) {
            blocking(move || machine.fence().fence()).await??;
        }
        Ok(())
    }

    /// Lets go of those that are over and that `may` go.
    pub(super) fn forget_if(&self, may: impl Fn(&str) -> bool) {
        for (name, machine) in self.take_if(may) {
            if machine.process().has_exited() {
                tracing::warn!(vm = name, pid = machine.process().pid(), "the process of a microVM has ended");
            }
            drop(tokio::task::spawn_blocking(move || {
                if let Err(error) = machine.fence().fence() {
                    tracing::error!(vm = name, %error, "what is left of a microVM could not be removed");
                }
            }));
        }
    }
}

/// Which guest of this host an operator means.
pub(super) enum Place {
    Qemu(qemu::Target),
    Microvm(Microvm),
}

impl Place {
    /// What the VM is called from now on.
    pub(super) fn name(&self, asked: &str) -> String {
        match self {
            Self::Qemu(target) => vm_name(asked, target),
            Self::Microvm(machine) => machine.spec().name.clone(),
        }
    }

    /// Attaches to it. Blocks.
    pub(super) fn attach(self, name: String, options: &AttachOptions) -> Result<(Box<dyn Guest>, GuestAt), GuestError> {
        match self {
            Self::Qemu(target) => {
                let guest = qemu::attach(&target, options)?;
                let started = match PidFd::open(guest.pid()) {
                    Ok(process) => process.start_time(),
                    Err(error) => return Box::new(guest).detach().and(Err(error.into())),
                };
                let control = match target {
                    qemu::Target::QmpSocket(path) => Some(path),
                    qemu::Target::Pid(_) => None,
                };
                let pid = guest.pid();
                Ok((Box::new(guest), GuestAt { name, pid, started, control, attached: false, microvm: false }))
            }
            Self::Microvm(machine) => {
                let at = at(name, &machine);
                Ok((Box::new(process::attach(&machine)?), at))
            }
        }
    }
}

/// Where a microVM is.
fn at(name: String, machine: &Microvm) -> GuestAt {
    let process = machine.process();
    GuestAt { name, pid: process.pid(), started: process.start_time(), control: None, attached: false, microvm: true }
}

impl Agent {
    /// Finds the guest that an operator calls `asked`.
    pub(super) async fn place(&self, asked: &str) -> Result<Place, ErrorBody> {
        if let Some(machine) = self.microvms.get(asked) {
            return Ok(Place::Microvm(machine));
        }
        let asked = asked.to_owned();
        Ok(Place::Qemu(blocking(move || qemu::resolve(&asked)).await??))
    }

    /// Attaches to a guest that was attached to before, or was activated here.
    pub(super) async fn attach_again(&self, at: &GuestAt) -> Result<Box<dyn Guest>, GuestError> {
        let gone = || GuestError::new(GuestErrorKind::Gone, format!("{} has ended", at.name));
        let place = if at.microvm {
            Place::Microvm(self.microvms.get(&at.name).ok_or_else(gone)?)
        } else {
            Place::Qemu(at.target())
        };
        let (name, pid, options) = (at.name.clone(), at.pid, self.attach_options());
        let attached = blocking(move || {
            let (guest, found) = place.attach(name, &options)?;
            if found.pid == pid {
                return Ok(guest);
            }
            let other = format!("process {} answers where the guest should be", found.pid);
            Err(GuestError::new(
                GuestErrorKind::Failed,
                match guest.detach() {
                    Ok(()) => other,
                    Err(_) => format!("{other}, and was not left in order"),
                },
            ))
        });
        attached.await.map_err(|error| GuestError::new(GuestErrorKind::Failed, error.message))?
    }

    /// Whether a guest has ended for sure.
    pub(super) fn is_gone(&self, at: &GuestAt) -> bool {
        at.process_is_gone() || at.microvm && aside(|| self.microvms.is_gone(at))
    }

    /// Where a survivor is. A microVM's machine is this agent's from now on.
    pub(super) fn survivor_at(&self, name: &str, survivor: &Survivor) -> Option<GuestAt> {
        let Some(machine) = self.microvms.twins.take(name) else { return GuestAt::of(name, survivor) };
        let at = at(name.to_owned(), &machine);
        self.microvms.lock().insert(name.to_owned(), machine);
        Some(at)
    }

    /// Starts a microVM; returns when it runs.
    pub(super) async fn run_microvm(&self, request: RunRequest) -> Result<Started, ErrorBody> {
        let _one = self.microvms.starting.lock().await;
        let name = request.name.clone();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.is_empty() || name.len() > NAME_MAX || !name.bytes().all(plain) {
            let message =
                format!("{name:?} is no name of a microVM: at most {NAME_MAX} letters, digits, `-`, `_` and `.`");
            return Err(ErrorBody::new(ErrorKind::Invalid, message));
        }
        self.settled(&name).await;
        self.forget_ended(&name);
        self.microvms.end_over(&name).await?;
        self.free_name(&name)?;
        self.may_start(&name).await?;
        let (bounds, program) = (self.microvms.bounds, self.microvms.program.clone());
        let machine = blocking(move || boot(request, &program, bounds)).await??;
        // It stands until its place is sure: what came meanwhile has the name.
        let placed = {
            let vms = self.vms();
            if vms.contains_key(&name) {
                Err(busy(&name))
            } else {
                self.microvms.lock().insert(name.clone(), machine.clone());
                Ok(())
            }
        };
        let started = placed.and_then(|()| machine.resume().map_err(ErrorBody::from));
        if let Err(error) = started {
            let fence = machine.fence();
            blocking(move || fence.fence()).await??;
            self.microvms.forget(&name);
            return Err(error);
        }
        tracing::info!(vm = name, pid = machine.process().pid(), "a microVM runs");
        Ok(Started { vm: name, note: machine.dirty_note() })
    }

    /// Ends a microVM that nobody protects; returns when it has ended.
    pub(super) async fn end_microvm(&self, name: &str) -> Result<Accepted, ErrorBody> {
        self.settled(name).await;
        self.forget_ended(name);
        let Some(machine) = self.microvms.get(name) else {
            return Err(ErrorBody::new(ErrorKind::NotFound, format!("no microVM called {name} runs on this host")));
        };
        if self.vms().contains_key(name) {
            return Err(ErrorBody::new(ErrorKind::Refused, format!("{name} is protected"))
                .advise(format!("nothing was changed; `understudy unprotect {name}` first")));
        }
        blocking(move || machine.fence().fence()).await??;
        self.microvms.forget(name);
        tracing::info!(vm = name, "a microVM was ended by its operator");
        Ok(Accepted { vm: name.to_owned() })
    }

    fn free_name(&self, name: &str) -> Result<(), ErrorBody> {
        if self.vms().contains_key(name) || self.microvms.get(name).is_some() {
            return Err(busy(name));
        }
        Ok(())
    }

    /// Makes the record of a VM that was protected before this life's (docs/protocol.md P3, P6): else it may not begin anew here.
    async fn may_start(&self, name: &str) -> Result<(), ErrorBody> {
        let unusable = |error: std::io::Error| {
            ErrorBody::new(ErrorKind::Failed, format!("what this host remembers of {name} cannot be used"))
                .because(&error)
        };
        let Some(mut durable) = Durable::find(&self.config.state_dir, name).map_err(unusable)? else { return Ok(()) };
        if let Some(guest) = durable.guest().filter(|guest| !self.is_gone(guest)) {
            let message = format!("process {} on this host is an earlier copy of {name}", guest.pid);
            return Err(ErrorBody::new(ErrorKind::Busy, message).advise("nothing was started; it must end first"));
        }
        if durable.store().is_none() {
            return Ok(());
        }
        let numbers = durable.begin_session().map_err(unusable)?;
        let protection = durable.protection().cloned();
        let arbiter = match &protection {
            Some(protection) => self.arbiter_of(protection)?,
            None => self.arbiter(None)?,
        };
        let (vm, me) = (durable.vm(), self.me());
        let read = StoreRequest { id: numbers.first_request, vm, asker: me, op: StoreOp::Read };
        let silent = |error: heartbeat::store::StoreError| {
            let message = format!("{name} was protected before, and the witness does not say who runs it");
            ErrorBody::new(ErrorKind::Unavailable, message)
                .advise("nothing was started; try again when the witness answers, or take another name")
                .because(&error)
        };
        let store = self.store(&arbiter);
        let found = store.ask(read).await.map_err(silent)?;
        let refused = |why: String| {
            ErrorBody::new(ErrorKind::Refused, why)
                .advise("nothing was started; see `understudy status` on its other hosts, or take another name")
        };
        if durable.store().is_some_and(|known| known != found.store.to_string()) {
            return Err(refused(format!("this witness is not the one that {name} was recorded in")));
        }
        if found.record.map_or(0, |record| record.generation.0) < durable.generation() {
            return Err(refused(format!(
                "the witness knows less of {name} than this host: it was restored, or begun anew"
            )));
        }
        match found.record.map(|record| record.owner) {
            None => {}
            Some(Owner::Solo { node, activated: true, .. } | Owner::Stopped { node }) if node.node == me.node => {}
            Some(Owner::Paired { primary: node, .. } | Owner::Solo { node, .. } | Owner::Stopped { node })
                if node.node != me.node =>
            {
                let host = self.peers.by_node(node.node).map_or_else(|| node.node.to_string(), |peer| peer.name);
                return Err(refused(format!("{name} belongs to {host}, by its record")));
            }
            Some(owner) => {
                return Err(refused(format!("it is not settled who runs {name}: its record says {owner:?}")));
            }
        }
        // What a former life of this agent asked may still be on its way: it is void once this life has won a change.
        let expect = found.record.map(|record| (record.store, record.revision));
        let owner = Owner::Solo { node: me, activated: true, other: None };
        let change =
            StoreRequest { id: numbers.first_request + 1, vm, asker: me, op: StoreOp::Change { expect, owner } };
        let answer = store.ask(change).await.map_err(silent)?;
        match answer.record {
            Some(record) if record.owner == owner => durable.set_generation(record.generation.0).map_err(unusable),
            _ => Err(refused(format!("the record of {name} changed at the same moment"))),
        }
    }

    /// Lets go of microVMs that are over; not of one whose last epoch may still be captured.
    pub(super) fn forget_microvms(&self) {
        let in_hand: BTreeSet<String> =
            self.vms().iter().filter(|(_, vm)| !vm.task.is_finished()).map(|(name, _)| name.clone()).collect();
        self.microvms.forget_if(|name| !in_hand.contains(name));
    }

    /// What operators see of microVMs that nobody protects.
    pub(super) fn unprotected_microvms(&self) -> Vec<VmStatus> {
        let names: Vec<String> = self.microvms.lock().keys().cloned().collect();
        names.iter().filter_map(|name| self.unprotected_microvm(name)).collect()
    }

    /// The same of one, unless it is not there or has a task.
    pub(super) fn unprotected_microvm(&self, name: &str) -> Option<VmStatus> {
        if self.vms().contains_key(name) {
            return None;
        }
        let machine = self.microvms.get(name)?;
        let durable = Durable::find(&self.config.state_dir, name).ok().flatten();
        let vm = durable.as_ref().map(|durable| durable.vm().to_string()).unwrap_or_default();
        let mut status = VmStatus::new(name, vm, Role::Primary);
        status.generation = durable.map_or(0, |durable| durable.generation());
        let traces = machine.traces();
        if traces.is_empty() {
            status.state = ProtectionState::Unprotected;
        } else {
            status.state = ProtectionState::Error;
            status.reason = format!("nobody protects it, and {}", traces.join(", "));
            status.advice = "the agent's log says what happened; fail it over, or end it".to_owned();
        }
        Some(status)
    }

    /// The agent stops, and this microVM with it: whoever stands by goes on with it first, without loss.
    pub(super) async fn hand_over(&self, name: &str, vm: &mut Vm) {
        let (reply, answer) = oneshot::channel();
        let moved = async {
            vm.requests
                .send(Request::Failover { planned: true, reply })
                .await
                .map_err(|_| "it has no task".to_owned())?;
            answer.await.map_err(|_| "it has no task".to_owned())?.map_err(|error| error.message)?;
            (&mut vm.task).await.map_err(|error| error.to_string())
        };
        match tokio::time::timeout(STOP_WITHIN, moved).await {
            Ok(Ok(())) if self.microvms.get(name).is_none() => tracing::info!(vm = name, "handed over"),
            Ok(Ok(())) => tracing::error!(vm = name, "could not be handed over: it ends with this agent"),
            Ok(Err(why)) => tracing::error!(vm = name, why, "could not be handed over: it ends with this agent"),
            Err(_) => tracing::error!(vm = name, "could not be handed over in time: it ends with this agent"),
        }
    }
}

fn busy(name: &str) -> ErrorBody {
    ErrorBody::new(ErrorKind::Busy, format!("a VM called {name} is known here already"))
        .advise("see `understudy status`")
}

/// Makes a microVM that stands.
fn boot(request: RunRequest, program: &Program, bounds: GateBounds) -> Result<Microvm, GuestError> {
    let RunRequest { name, kernel, initrd, cmdline, memory, cpus, disk, net, dirty } = request;
    let linux = initrd.is_some() || cmdline.is_some() || kvm::is_bzimage(&kernel);
    if !linux && net.as_ref().is_some_and(|net| net.address.is_none()) {
        let error = GuestError::new(GuestErrorKind::Refused, "the pilot guest has no address for its network card");
        return Err(error.advise("nothing was started; give it one, or a Linux kernel something to boot from"));
    }
    // Before anything is made for it.
    kvm::host()?;
    let disks = disk.into_iter().map(|path| DiskFile { name: "disk0".to_owned(), path }).collect::<Vec<_>>();
    let mut options = PilotOptions { log: !disks.is_empty(), ..PilotOptions::default() };
    let mut wire = None;
    let mut card = None;
    if let Some(RunNet { tap, bridge, mac, address, prefix, gateway }) = net {
        options = PilotOptions { address: address.unwrap_or(options.address), prefix, gateway, ..options };
        let card = card.insert(NetCard { mac: mac.unwrap_or_else(|| mac_of(&name)), tap, bridge });
        wire = Some(kvm::join(card)?);
    }
    let dirty = match dirty {
        DirtyPages::Bitmap => Dirty::Bitmap,
        DirtyPages::Ring => Dirty::Ring,
    };
    let spec = Spec { name, memory, cpus, net: card, disks, dirty };
    if linux {
        let cmdline = cmdline.unwrap_or_else(|| CMDLINE.to_owned());
        let boot = Boot::Linux(LinuxOptions { kernel, initrd, cmdline });
        return Microvm::start(program, spec, &boot, wire, bounds);
    }
    Microvm::start(program, spec, &Boot::Pilot(kernel, options), wire, bounds)
}

/// A hardware address of its own for each name, of the range that is given to virtual machines.
fn mac_of(name: &str) -> [u8; 6] {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [a, b, c, _] = hash.to_be_bytes();
    [0x52, 0x54, 0, a, b, c]
}
