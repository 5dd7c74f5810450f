//! The standby's side: twins whose memory is a vector of the host's.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::machine::{ANNOUNCEMENT, SimMachine, locked, offset};
use crate::guest::{
    Activation, Fence, GuestError, GuestErrorKind, Recipe, Rehearsal, Survivor, Twin, TwinHost, TwinMemory,
};
use crate::layout::{Layout, PAGE_SIZE};

/// Bound on how often a twin that dies while loading is launched again.
pub const MAX_RELAUNCHES: u32 = 3;

/// A step of a twin that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TwinFault {
    /// Preparing: nothing is left behind.
    Prepare,
    /// Rehearsing: the scratch twin does not load.
    Rehearse,
    /// Activating: the twin dies while it loads, and is launched again.
    DiesLoading,
    /// Activating: it does not come to run.
    Activate,
}

#[derive(Debug, Default)]
struct Host {
    twins: BTreeMap<String, Option<SimMachine>>,
    /// How often each is still to happen.
    faults: BTreeMap<TwinFault, u32>,
}

/// A standby host. Clones are the same host.
#[derive(Debug, Clone, Default)]
pub struct SimHost {
    host: Arc<Mutex<Host>>,
}

impl SimHost {
    /// A host without twins.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next `times` calls that come to `fault` fail there.
    pub fn fail(&self, fault: TwinFault, times: u32) {
        locked(&self.host).faults.insert(fault, times);
    }

    /// The names of the twins that are here, activated or not.
    #[must_use]
    pub fn twins(&self) -> Vec<String> {
        locked(&self.host).twins.keys().cloned().collect()
    }

    /// The machine of an activated twin.
    #[must_use]
    pub fn machine(&self, name: &str) -> Option<SimMachine> {
        locked(&self.host).twins.get(name).cloned().flatten()
    }

    fn fails(&self, fault: TwinFault) -> Result<(), GuestError> {
        match locked(&self.host).faults.get_mut(&fault) {
            Some(times) if *times > 0 => {
                *times -= 1;
                Err(GuestError::new(GuestErrorKind::Failed, format!("{fault:?} failed as it was told to")))
            }
            _ => Ok(()),
        }
    }
}

impl TwinHost for SimHost {
    fn prepare(
        &self,
        name: &str,
        recipe: &Recipe,
        layout: &Layout,
        _images: &[PathBuf],
    ) -> Result<Box<dyn Twin>, GuestError> {
        let refuse = |why: String| Err(GuestError::new(GuestErrorKind::Refused, why));
        if recipe.backend != "sim" {
            return refuse(format!("this host builds simulated twins, not {} ones", recipe.backend));
        }
        let Ok(seed) = recipe.body.parse() else {
            return refuse("the recipe of the simulated guest is not a seed".to_owned());
        };
        self.fails(TwinFault::Prepare)?;
        let mut host = locked(&self.host);
        if host.twins.contains_key(name) {
            return refuse(format!("there is a twin called {name} already"));
        }
        host.twins.insert(name.to_owned(), None);
        let bytes = Arc::new(Mutex::new(vec![0; offset(layout.pages())]));
        Ok(Box::new(SimTwin {
            host: self.clone(),
            name: name.to_owned(),
            seed,
            layout: layout.clone(),
            memory: Arc::new(SimMemory { pages: layout.pages(), bytes }),
            end: Arc::new(End::default()),
        }))
    }
}

/// Memory of a twin; shared with the machine that it becomes.
#[derive(Debug)]
struct SimMemory {
    pages: u64,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl SimMemory {
    fn start(&self, page: u64) -> usize {
        assert!(page < self.pages, "page {page} of a twin with {} pages", self.pages);
        offset(page)
    }
}

impl TwinMemory for SimMemory {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn write(&self, page: u64, at: usize, bytes: &[u8]) {
        let start = self.start(page);
        locked(&self.bytes)[start..start + PAGE_SIZE][at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn read(&self, page: u64, into: &mut [u8]) {
        let start = self.start(page);
        into.copy_from_slice(&locked(&self.bytes)[start..start + PAGE_SIZE]);
    }

    fn zero(&self, page: u64) {
        let start = self.start(page);
        locked(&self.bytes)[start..start + PAGE_SIZE].fill(0);
    }
}

/// Whether a twin has been ended, shared with its fence.
#[derive(Debug, Default)]
struct End {
    state: Mutex<EndState>,
}

#[derive(Debug, Default)]
struct EndState {
    ended: bool,
    machine: Option<SimMachine>,
}

impl Fence for End {
    fn fence(&self) -> Result<(), GuestError> {
        let mut state = locked(&self.state);
        state.ended = true;
        state.machine.as_ref().map_or(Ok(()), |machine| machine.fence().fence())
    }

    fn ended(&self) -> bool {
        let state = locked(&self.state);
        state.ended || state.machine.as_ref().is_some_and(|machine| machine.fence().ended())
    }
}

/// A waiting or activated twin.
#[derive(Debug)]
struct SimTwin {
    host: SimHost,
    name: String,
    seed: u64,
    layout: Layout,
    memory: Arc<SimMemory>,
    end: Arc<End>,
}

impl SimTwin {
    fn load(&self, device: &[u8]) -> Result<SimMachine, GuestError> {
        SimMachine::resume(self.seed, self.layout.clone(), self.memory.bytes.clone(), device)
    }
}

impl Twin for SimTwin {
    fn memory(&self) -> Arc<dyn TwinMemory> {
        self.memory.clone()
    }

    fn rehearse(&mut self, device: &[u8]) -> Result<Rehearsal, GuestError> {
        let start = Instant::now();
        self.host.fails(TwinFault::Rehearse)?;
        SimMachine::check_device(device)?;
        Ok(Rehearsal { launch: Duration::ZERO, load: start.elapsed() })
    }

    fn activate(&mut self, device: &[u8]) -> Result<Activation, GuestError> {
        let start = Instant::now();
        let mut relaunched = 0;
        while self.host.fails(TwinFault::DiesLoading).is_err() {
            relaunched += 1;
            if relaunched > MAX_RELAUNCHES {
                return Err(GuestError::new(GuestErrorKind::Failed, "the twin died each time that it was launched"));
            }
        }
        self.host.fails(TwinFault::Activate)?;
        let mut end = locked(&self.end.state);
        if end.ended || end.machine.is_some() {
            return Err(GuestError::new(GuestErrorKind::Failed, "the twin has ended or runs already"));
        }
        let machine = self.load(device)?;
        end.machine = Some(machine.clone());
        let load = start.elapsed();
        machine.transmit(ANNOUNCEMENT.to_vec());
        locked(&self.host.host).twins.insert(self.name.clone(), Some(machine));
        Ok(Activation { load, resume: start.elapsed() - load, relaunched })
    }

    fn alive(&mut self) -> bool {
        !self.end.ended()
    }

    fn fence(&self) -> Arc<dyn Fence> {
        self.end.clone()
    }

    fn destroy(self: Box<Self>) -> Result<(), GuestError> {
        self.end.fence()?;
        locked(&self.host.host).twins.remove(&self.name);
        Ok(())
    }

    fn release(self: Box<Self>) -> Result<Survivor, GuestError> {
        let running = locked(&self.end.state).machine.is_some();
        if !running || self.end.ended() {
            return Err(GuestError::new(GuestErrorKind::Failed, "the twin was not activated or has ended"));
        }
        // No process: the name is what a simulated guest is found by.
        Ok(Survivor { pid: 0, control: self.name.clone() })
    }
}
