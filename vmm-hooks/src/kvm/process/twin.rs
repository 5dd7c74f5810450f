//! The standby's side: a twin is committed memory, and a process that waits with a machine that has processors and memory, and neither devices nor
//! threads. At its activation these are made, and the state is loaded.
//!
//! Promises: a host that cannot have the machine says so when the twin is prepared. The memory outlives the process, so one that dies while it waits, or
//! while it loads, is launched again. A rehearsal is another process, whose writes to the memory stay with it. A twin that was fenced is never activated.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::guest::{Ends, Microvm, Plan, unexpected};
use super::spawn::Program;
use super::wire::{Answer, What};
use crate::guest::{
    Activation, Fence, GuestError, GuestErrorKind, Recipe, Rehearsal, Survivor, Twin, TwinHost, TwinMemory,
};
use crate::kvm::guest::{BACKEND, Body};
use crate::kvm::machine::{open_disks, refused};
use crate::kvm::registry::Registry;
use crate::kvm::twin::{TwinHostOptions, described};
use crate::layout::Layout;
use crate::sys::memory::BlockMemory;
use crate::tap::Tap;

/// How often an activation is tried in a new process whose one before died.
const RELAUNCHES_MAX: u32 = 3;

/// A standby host. Clones are the same host.
#[derive(Debug, Clone)]
pub struct ProcessTwinHost {
    program: Program,
    options: TwinHostOptions,
    twins: Registry<Microvm>,
}

impl ProcessTwinHost {
    /// A host without twins, whose processes are of `program`.
    #[must_use]
    pub fn new(program: Program, options: TwinHostOptions) -> Self {
        Self { program, options, twins: Registry::default() }
    }

    /// The names of the twins that are here, activated or not.
    #[must_use]
    pub fn twins(&self) -> Vec<String> {
        self.twins.names()
    }

    /// A process called `name` that waits with the machine of `body` around `memory`. `scratch`: see [`What::Twin`].
    fn wait(&self, name: &str, body: &Body, memory: &BlockMemory, scratch: bool) -> Result<Ends, GuestError> {
        let plan = Plan {
            spec: &body.spec,
            description: serde_json::to_string(body).expect("plain data"),
            what: What::Twin { scratch },
            memory: memory.block(0).expect("a machine has memory"),
            wire: None,
            files: Vec::new(),
            disks: &[],
            bounds: self.options.bounds,
        };
        match Ends::start(&self.program, name, &plan)? {
            (ends, Answer::Done) => Ok(ends),
            _ => Err(unexpected(name)),
        }
    }

    /// The microVM of an activated twin, which is its taker's business from now on: another twin of its name may be made.
    #[must_use]
    pub fn take(&self, name: &str) -> Option<Microvm> {
        self.twins.take(name)
    }
}

impl TwinHost for ProcessTwinHost {
    fn prepare(
        &self,
        name: &str,
        recipe: &Recipe,
        wanted: &Layout,
        images: &[PathBuf],
    ) -> Result<Box<dyn Twin>, GuestError> {
        if recipe.backend != BACKEND {
            return Err(refused(format!("this host builds microVMs, not guests of the back end {}", recipe.backend)));
        }
        let body = described(&*crate::kvm::host()?, name, recipe, wanted, images, &self.options)?;
        let memory = BlockMemory::new(name, wanted)
            .map_err(|error| refused("there is no memory for the twin").because(error))?;
        let waits = self.wait(name, &body, &memory, false).map_err(failed)?;
        let tap = self.twins.add(name, || self.options.make_tap(&body.spec))?;
        let end = Arc::new(End { ended: AtomicBool::new(false), life: Mutex::new(Life::Waits(Box::new(waits))) });
        Ok(Box::new(ProcessTwin { host: self.clone(), body, memory: Arc::new(memory), end, tap }))
    }
}

/// What there is of a twin beside its memory.
#[derive(Debug)]
enum Life {
    Waits(Box<Ends>),
    Runs(Microvm),
    /// Nothing: it was ended, or its activation failed.
    Over,
}

/// A twin's life, shared with its fence.
#[derive(Debug)]
struct End {
    ended: AtomicBool,
    life: Mutex<Life>,
}

impl End {
    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().expect("nobody panics while it holds the twin")
    }
}

impl Fence for End {
    fn fence(&self) -> Result<(), GuestError> {
        // Under the lock, so that it cannot be activated meanwhile.
        let life = self.lock();
        self.ended.store(true, Ordering::SeqCst);
        match &*life {
            Life::Waits(ends) => ends.process.kill(),
            Life::Runs(machine) => machine.fence().fence(),
            Life::Over => Ok(()),
        }
    }

    fn ended(&self) -> bool {
        match &*self.lock() {
            Life::Runs(machine) => machine.process().has_exited(),
            Life::Waits(..) | Life::Over => self.ended.load(Ordering::SeqCst),
        }
    }
}

struct ProcessTwin {
    host: ProcessTwinHost,
    body: Body,
    memory: Arc<BlockMemory>,
    end: Arc<End>,
    /// If it was made for this twin.
    tap: Option<Tap>,
}

/// What goes wrong with a twin's process is no end of a guest.
fn failed(error: GuestError) -> GuestError {
    let kind = if error.kind == GuestErrorKind::Gone { GuestErrorKind::Failed } else { error.kind };
    GuestError { kind, ..error }
}

/// The same, and whether the process died.
fn failed_or_died(error: GuestError) -> (GuestError, bool) {
    let died = error.kind == GuestErrorKind::Gone;
    (failed(error), died)
}

impl ProcessTwin {
    fn wait(&self, name: &str, scratch: bool) -> Result<Ends, GuestError> {
        self.host.wait(name, &self.body, &self.memory, scratch)
    }

    /// Has the machine that waits go on from `device`; whether it may be tried again if it fails.
    fn load(&self, mut ends: Ends, device: &[u8]) -> Result<Microvm, (GuestError, bool)> {
        let spec = &self.body.spec;
        let mut made = || {
            let wire = spec.net.as_ref().map(|card| (self.host.options.join)(card)).transpose();
            let wire = wire.map_err(|error| {
                GuestError::new(GuestErrorKind::Failed, format!("the twin cannot be joined to the network: {error}"))
                    .advise("the committed memory is unharmed; make the tap interface and try again")
                    .because(error)
            })?;
            let disks = open_disks(spec)?;
            let answer = ends.load(&spec.name, device, wire.as_ref(), &disks)?;
            Ok((answer, disks))
        };
        let loaded = made().and_then(|(answer, disks)| {
            let memory = self.memory.block(0).expect("a machine has memory");
            Microvm::of(ends, answer, spec.clone(), memory, &disks)
        });
        loaded.map_err(failed_or_died)
    }
}

impl Twin for ProcessTwin {
    fn memory(&self) -> Arc<dyn TwinMemory> {
        Arc::<BlockMemory>::clone(&self.memory)
    }

    fn rehearse(&mut self, device: &[u8]) -> Result<Rehearsal, GuestError> {
        let start = Instant::now();
        let name = format!("{}-rehearsal", self.body.spec.name);
        let mut ends = self.wait(&name, true).map_err(failed)?;
        // Nobody is at the other end, and the scratch machine never runs.
        let wire = self.body.spec.net.is_some().then(UnixDatagram::pair).transpose();
        let wire = wire.map_err(|error| {
            GuestError::new(GuestErrorKind::Failed, "there is no socket for a rehearsal").because(error)
        })?;
        let (wire, _other) = wire.map_or((None, None), |(ours, theirs)| (Some(ours.into()), Some(theirs)));
        let disks = open_disks(&self.body.spec)?;
        let launch = start.elapsed();
        let answer = ends.load(&name, device, wire.as_ref(), &disks);
        let load = start.elapsed() - launch;
        ends.process.kill()?;
        match answer.map_err(failed)? {
            Answer::Done => Ok(Rehearsal { launch, load }),
            _ => Err(unexpected(&name)),
        }
    }

    fn activate(&mut self, device: &[u8]) -> Result<Activation, GuestError> {
        let start = Instant::now();
        let mut life = self.end.lock();
        if matches!(&*life, Life::Runs(_)) || self.end.ended.load(Ordering::SeqCst) {
            return Err(GuestError::new(GuestErrorKind::Failed, "the twin has ended or runs already"));
        }
        let mut relaunched = 0;
        let machine = loop {
            let waits = match std::mem::replace(&mut *life, Life::Over) {
                Life::Waits(ends) if !ends.process.handle().has_exited() => Ok(*ends),
                _ => {
                    relaunched += 1;
                    self.wait(&self.body.spec.name, false).map_err(failed_or_died)
                }
            };
            match waits.and_then(|ends| self.load(ends, device)) {
                Ok(machine) => break machine,
                Err((error, again)) if again && relaunched < RELAUNCHES_MAX => {
                    tracing::warn!(vm = self.body.spec.name, %error, "a twin died while it loaded, and is launched again");
                }
                Err((error, _)) => return Err(error),
            }
        };
        let load = start.elapsed();
        machine.resume()?;
        // One that has switched itself off or died since did run: its events tell of it.
        if !machine.is_running() && !machine.is_over() {
            // Its guest may have gone on: what was committed is no longer what is in its memory.
            self.end.ended.store(true, Ordering::SeqCst);
            return Err(GuestError::new(GuestErrorKind::Failed, "the twin was loaded, and does not run")
                .advise("the committed memory may have been written to; look at the agent's log"));
        }
        let resume = start.elapsed() - load;
        if let Err(error) = machine.0.gate.announce() {
            tracing::warn!(vm = self.body.spec.name, %error, "the network was not told where the guest is now");
        }
        *life = Life::Runs(machine.clone());
        self.host.twins.activated(&self.body.spec.name, machine);
        Ok(Activation { load, resume, relaunched })
    }

    fn alive(&mut self) -> bool {
        !self.end.ended()
    }

    fn fence(&self) -> Arc<dyn Fence> {
        Arc::<End>::clone(&self.end)
    }

    fn destroy(self: Box<Self>) -> Result<(), GuestError> {
        self.end.fence()?;
        self.host.twins.remove(&self.body.spec.name);
        self.tap.map_or(Ok(()), Tap::remove)
    }

    fn release(mut self: Box<Self>) -> Result<Survivor, GuestError> {
        let pid = match &*self.end.lock() {
            Life::Runs(machine) if !machine.process().has_exited() => machine.process().pid(),
            _ => return Err(GuestError::new(GuestErrorKind::Failed, "the twin was not activated or has ended")),
        };
        if let Some(tap) = self.tap.take() {
            tap.keep();
        }
        // Its handle is found by its name.
        Ok(Survivor { pid, control: self.body.spec.name.clone() })
    }
}
