//! The standby's side: a twin is committed memory until it is activated, and then a machine of this process around that memory.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::cpuid;
use super::gate::GateBounds;
use super::guest::{BACKEND, Body, layout};
use super::machine::{Devices, Machine, Means, NetCard, Spec, open_disks, refused};
use super::registry::Registry;
use crate::guest::{
    Activation, Fence, GuestError, GuestErrorKind, Recipe, Rehearsal, Survivor, Twin, TwinHost, TwinMemory,
};
use crate::layout::Layout;
use crate::sys::memory::BlockMemory;
use crate::tap::Tap;

/// Joins a twin's card to this host's network: gives what takes and gives one frame a call.
pub type Join = Arc<dyn Fn(&NetCard) -> io::Result<OwnedFd> + Send + Sync>;

/// How a host makes its twins.
#[derive(Clone)]
pub struct TwinHostOptions {
    /// Called when a twin is activated.
    pub join: Join,
    /// How the survivors' gates are bounded.
    pub bounds: GateBounds,
    /// Makes the tap interface of each card when its twin is prepared, unless it is there, and puts it on the bridge that the card was on:
    /// by this map from the primary's bridge to this host's, or the one of the same name. `None`: whoever joins cards sees to it.
    pub bridges: Option<BTreeMap<String, String>>,
}

impl Default for TwinHostOptions {
    /// Cards are on taps of the names that they had.
    fn default() -> Self {
        Self { join: Arc::new(|card| crate::sys::tap::open(&card.tap)), bounds: GateBounds::default(), bridges: None }
    }
}

impl fmt::Debug for TwinHostOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TwinHostOptions").field("bounds", &self.bounds).finish_non_exhaustive()
    }
}

/// A standby host. Clones are the same host.
#[derive(Debug, Clone, Default)]
pub struct KvmTwinHost {
    options: TwinHostOptions,
    twins: Registry<Machine>,
}

impl KvmTwinHost {
    /// A host without twins.
    #[must_use]
    pub fn new(options: TwinHostOptions) -> Self {
        Self { options, twins: Registry::default() }
    }

    /// The names of the twins that are here, activated or not.
    #[must_use]
    pub fn twins(&self) -> Vec<String> {
        self.twins.names()
    }

    /// The machine of an activated twin.
    #[must_use]
    pub fn machine(&self, name: &str) -> Option<Machine> {
        self.twins.machine(name)
    }

    /// The machine of an activated twin, which is its taker's business from now on: another twin of its name may be made.
    #[must_use]
    pub fn take(&self, name: &str) -> Option<Machine> {
        self.twins.take(name)
    }
}

impl TwinHostOptions {
    /// Sees to the tap of a twin's card; what was made for it.
    pub(super) fn make_tap(&self, spec: &Spec) -> Result<Option<Tap>, GuestError> {
        let (Some(card), true) = (&spec.net, self.bridges.is_some()) else { return Ok(None) };
        Tap::ensure(&card.tap, card.bridge.as_deref(), None)
    }

    /// The bridge that a card is on here, which was on `there`.
    fn bridge(&self, there: Option<String>) -> Option<String> {
        let here = there.as_ref().and_then(|bridge| self.bridges.as_ref()?.get(bridge)).cloned();
        here.or(there)
    }
}

/// What a recipe describes, as it is to be on this host, if this host can have it.
pub(super) fn described(
    kvm: &kvm_ioctls::Kvm,
    name: &str,
    recipe: &Recipe,
    wanted: &Layout,
    images: &[PathBuf],
    options: &TwinHostOptions,
) -> Result<Body, GuestError> {
    if recipe.backend != BACKEND {
        return Err(refused(format!("this host builds microVMs, not guests of the back end {}", recipe.backend)));
    }
    let Body { mut spec, cpuid, chips } = serde_json::from_str(&recipe.body)
        .map_err(|error| refused("the description of the microVM cannot be read").because(error))?;
    if layout(spec.memory).as_ref() != Some(wanted) {
        return Err(refused("the microVM's memory is not what its description says"));
    }
    if images.len() != spec.disks.len() {
        let error = format!("the microVM has {} disks, and {} images are there for it", spec.disks.len(), images.len());
        return Err(refused(error));
    }
    let offered = cpuid::offered(kvm).map_err(|error| refused(error.to_string()).because(error))?;
    let missing = cpuid::missing(&cpuid, &offered);
    if !missing.is_empty() {
        return Err(refused(format!(
            "this host's processor lacks what the guest was promised: {}",
            missing.join(", ")
        ))
        .advise("choose a standby with the same processor, or start the guest with fewer features"));
    }
    for (disk, image) in spec.disks.iter_mut().zip(images) {
        disk.path.clone_from(image);
    }
    name.clone_into(&mut spec.name);
    if let Some(card) = &mut spec.net {
        card.bridge = options.bridge(card.bridge.take());
    }
    Ok(Body { spec, cpuid, chips })
}

impl TwinHost for KvmTwinHost {
    fn prepare(
        &self,
        name: &str,
        recipe: &Recipe,
        wanted: &Layout,
        images: &[PathBuf],
    ) -> Result<Box<dyn Twin>, GuestError> {
        let kvm = super::host()?;
        let Body { spec, cpuid, chips } = described(&kvm, name, recipe, wanted, images, &self.options)?;
        let memory = BlockMemory::new(name, wanted)
            .map_err(|error| refused("there is no memory for the twin").because(error))?;
        let tap = self.twins.add(name, || self.options.make_tap(&spec))?;
        Ok(Box::new(KvmTwin {
            host: self.clone(),
            kvm,
            spec,
            cpuid,
            chips,
            memory: Arc::new(memory),
            end: Arc::default(),
            tap,
        }))
    }
}

/// Whether a twin was ended, shared with its fence.
#[derive(Debug, Default)]
struct End {
    ended: AtomicBool,
    machine: Mutex<Option<Machine>>,
}

impl End {
    fn lock(&self) -> MutexGuard<'_, Option<Machine>> {
        self.machine.lock().expect("nobody panics while it holds the twin")
    }
}

impl Fence for End {
    fn fence(&self) -> Result<(), GuestError> {
        // Under the lock, so that it cannot be activated meanwhile.
        let machine = self.lock();
        self.ended.store(true, Ordering::SeqCst);
        machine.as_ref().map_or(Ok(()), |machine| machine.fence().fence())
    }

    fn ended(&self) -> bool {
        match self.lock().as_ref() {
            Some(machine) => machine.fence().ended(),
            None => self.ended.load(Ordering::SeqCst),
        }
    }
}

struct KvmTwin {
    host: KvmTwinHost,
    kvm: Arc<kvm_ioctls::Kvm>,
    spec: Spec,
    cpuid: Vec<cpuid::Leaf>,
    chips: bool,
    memory: Arc<BlockMemory>,
    end: Arc<End>,
    /// If it was made for this twin.
    tap: Option<Tap>,
}

fn does_not_load(error: super::state::StateError) -> GuestError {
    GuestError::new(GuestErrorKind::Failed, format!("the microVM's state does not load here: {error}"))
        .advise("the committed memory is unharmed")
        .because(error)
}

impl KvmTwin {
    /// A machine around the committed memory that stands where `device` says.
    fn load(&self, device: &[u8], private: bool, wire: Option<OwnedFd>) -> Result<Machine, GuestError> {
        let memory = self.memory.block(0).expect("a machine has memory");
        let bounds = self.host.options.bounds;
        let spec = self.spec.clone();
        let means = Means { memory, private, devices: Devices { wire, disks: open_disks(&spec)?, bounds } };
        let machine = Machine::make(&self.kvm, spec, &self.cpuid, self.chips, means)
            .map_err(|error| GuestError { kind: GuestErrorKind::Failed, ..error })?;
        machine.load(device).map_err(does_not_load).inspect_err(|_| machine.end(None))?;
        Ok(machine)
    }
}

impl Twin for KvmTwin {
    fn memory(&self) -> Arc<dyn TwinMemory> {
        Arc::<BlockMemory>::clone(&self.memory)
    }

    fn rehearse(&mut self, device: &[u8]) -> Result<Rehearsal, GuestError> {
        let start = Instant::now();
        // Nobody is at the other end, and the scratch machine never runs.
        let wire = self.spec.net.is_some().then(UnixDatagram::pair).transpose();
        let wire = wire.map_err(|error| {
            GuestError::new(GuestErrorKind::Failed, "there is no socket for a rehearsal").because(error)
        })?;
        let (wire, _other) = wire.map_or((None, None), |(ours, theirs)| (Some(ours.into()), Some(theirs)));
        let launch = start.elapsed();
        let machine = self.load(device, true, wire)?;
        let load = start.elapsed() - launch;
        let mut again = Vec::new();
        let read = machine.save(&mut again).map_err(does_not_load);
        machine.fence().fence()?;
        read?;
        if again.len() != device.len() {
            return Err(GuestError::new(
                GuestErrorKind::Failed,
                "the microVM's state reads otherwise than it was loaded",
            ));
        }
        Ok(Rehearsal { launch, load })
    }

    fn activate(&mut self, device: &[u8]) -> Result<Activation, GuestError> {
        let start = Instant::now();
        let mut end = self.end.lock();
        if end.is_some() || self.end.ended.load(Ordering::SeqCst) {
            return Err(GuestError::new(GuestErrorKind::Failed, "the twin has ended or runs already"));
        }
        let wire = self.spec.net.as_ref().map(|card| (self.host.options.join)(card)).transpose();
        let wire = wire.map_err(|error| {
            GuestError::new(GuestErrorKind::Failed, format!("the twin cannot be joined to the network: {error}"))
                .advise("the committed memory is unharmed; make the tap interface and try again")
                .because(error)
        })?;
        let machine = self.load(device, false, wire)?;
        let load = start.elapsed();
        machine.resume().inspect_err(|_| machine.end(None))?;
        let resume = start.elapsed() - load;
        machine.announce();
        *end = Some(machine.clone());
        self.host.twins.activated(&self.spec.name, machine);
        Ok(Activation { load, resume, relaunched: 0 })
    }

    fn alive(&mut self) -> bool {
        !self.end.ended()
    }

    fn fence(&self) -> Arc<dyn Fence> {
        Arc::<End>::clone(&self.end)
    }

    fn destroy(self: Box<Self>) -> Result<(), GuestError> {
        self.end.fence()?;
        self.host.twins.remove(&self.spec.name);
        self.tap.map_or(Ok(()), Tap::remove)
    }

    fn release(mut self: Box<Self>) -> Result<Survivor, GuestError> {
        let activated = self.end.lock().is_some();
        if !activated || self.end.ended() {
            return Err(GuestError::new(GuestErrorKind::Failed, "the twin was not activated or has ended"));
        }
        if let Some(tap) = self.tap.take() {
            tap.keep();
        }
        // A machine of this process: it is found by its name.
        Ok(Survivor { pid: std::process::id(), control: self.spec.name.clone() })
    }
}
