//! The simulated machine: what would be a process elsewhere.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::disks::Disks;
use super::gate::SimGate;
use crate::disk::DiskChange;
use crate::guest::{Fence, GuestError, GuestErrorKind, GuestEvent};
use crate::layout::{Layout, PAGE_SIZE, PageSet};

/// The frame that an activated twin sends before anything else.
pub const ANNOUNCEMENT: &[u8] = b"announce";

/// What a saved register file starts with.
const REGISTERS_MAGIC: [u8; 8] = *b"SIMREGS1";

/// Bytes of device state: the registers, and a table that hardly changes, as in a real one.
const DEVICE_BYTES: usize = 6000;

/// A step of a [`super::SimGuest`] that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Pausing: the guest runs on.
    Pause,
    /// Resuming: the guest stands.
    Resume,
    /// Arming the tracker.
    Arm,
    /// Harvesting, after half of the tracker's marks are gone.
    Harvest,
    /// Saving device state.
    Device,
    /// Copying pages, after half of them.
    Copy,
    /// Putting the gate in.
    Hold,
    /// Taking the gate away.
    Open,
    /// Beginning to mirror its disks.
    Mirror,
    /// A write to a mirrored disk gets lost: the next capture fails, and so do all until mirroring is begun anew.
    DiskWrite,
}

/// The registers: all of the machine's state that is not memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Registers {
    steps: u64,
    random: u64,
    frames: u64,
}

impl Registers {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }

    fn save(&self) -> Vec<u8> {
        let mut bytes = REGISTERS_MAGIC.to_vec();
        for register in [self.steps, self.random, self.frames] {
            bytes.extend_from_slice(&register.to_le_bytes());
        }
        bytes.extend((bytes.len()..DEVICE_BYTES).map(|at| (at / 7).to_le_bytes()[0]));
        bytes
    }

    fn load(bytes: &[u8]) -> Result<Self, GuestError> {
        let bad =
            || GuestError::new(GuestErrorKind::Failed, "the device state does not load: it is not a register file");
        if bytes.len() != DEVICE_BYTES || bytes[..8] != REGISTERS_MAGIC {
            return Err(bad());
        }
        let mut words = bytes[8..].as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut word = || words.next().ok_or_else(bad);
        Ok(Self { steps: word()?, random: word()?, frames: word()? })
    }
}

/// Everything inside. One lock for all of it: a simulation has no races of its own.
pub(super) struct Inner {
    pub(super) layout: Layout,
    memory: Arc<Mutex<Vec<u8>>>,
    registers: Registers,
    pub(super) running: bool,
    pub(super) ended: bool,
    /// Set while somebody is attached.
    pub(super) gate: Option<Weak<SimGate>>,
    /// The hardware's dirty marks; `None` while nothing tracks.
    pub(super) marks: Option<PageSet>,
    pub(super) faults: BTreeSet<Fault>,
    pub(super) events: Vec<GuestEvent>,
    pub(super) disks: Disks,
    wire: Vec<Vec<u8>>,
}

impl Inner {
    /// Whether `fault` was asked for; it happens once.
    pub(super) fn fails(&mut self, fault: Fault) -> bool {
        self.faults.remove(&fault)
    }

    pub(super) fn save(&self) -> Vec<u8> {
        self.registers.save()
    }

    pub(super) fn copy_page(&self, page: u64, into: &mut Vec<u8>) {
        let start = offset(page);
        into.extend_from_slice(&locked(&self.memory)[start..start + PAGE_SIZE]);
    }

    fn write(&mut self, page: u64, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAGE_SIZE, "a write past the end of a page");
        let start = offset(page) + at;
        locked(&self.memory)[start..start + bytes.len()].copy_from_slice(bytes);
        if let Some(marks) = &mut self.marks {
            marks.insert(page);
        }
    }

    /// One step: reads a word, writes a few, and every few steps a frame goes out that depends on all of it.
    fn step(&mut self) -> Option<Vec<u8>> {
        let pages = usize::try_from(self.layout.pages()).expect("a simulated guest is small");
        let registers = &mut self.registers;
        registers.steps += 1;
        let (from, word) = (registers.below(pages), registers.below(PAGE_SIZE / 8) * 8);
        let start = from * PAGE_SIZE + word;
        let read = locked(&self.memory)[start..start + 8].try_into().expect("eight bytes");
        self.registers.random ^= u64::from_le_bytes(read);
        match self.registers.below(16) {
            0 => self.fill(pages, |registers| registers.next().to_le_bytes()),
            1 => self.fill(pages, |_| [0; 8]),
            _ => {
                // Most writes go to few pages, as in a real guest.
                let page = if self.registers.below(4) == 0 {
                    self.registers.below(pages)
                } else {
                    self.registers.below(pages.min(4))
                };
                let at = self.registers.below(PAGE_SIZE / 8) * 8;
                let value = self.registers.next().to_le_bytes();
                self.write(page as u64, at, &value);
            }
        }
        if !self.registers.steps.is_multiple_of(3) {
            return None;
        }
        self.registers.frames += 1;
        let registers = self.registers;
        Some([registers.frames, registers.steps, registers.random].map(u64::to_le_bytes).concat())
    }

    fn fill(&mut self, pages: usize, word: fn(&mut Registers) -> [u8; 8]) {
        let page = self.registers.below(pages) as u64;
        for at in (0..PAGE_SIZE).step_by(8) {
            let bytes = word(&mut self.registers);
            self.write(page, at, &bytes);
        }
    }
}

/// A simulated virtual machine. Clones are the same machine.
#[derive(Clone)]
pub struct SimMachine {
    inner: Arc<Mutex<Inner>>,
    seed: u64,
}

impl SimMachine {
    /// A running machine with zeroed memory whose life is decided by `seed`.
    #[must_use]
    pub fn boot(seed: u64, layout: Layout) -> Self {
        let length = offset(layout.pages());
        let registers = Registers { steps: 0, random: seed, frames: 0 };
        Self::assemble(seed, layout, Arc::new(Mutex::new(vec![0; length])), registers)
    }

    /// The same machine with empty disks of these sizes in bytes. Nobody may be attached.
    ///
    /// # Panics
    /// If somebody is.
    #[must_use]
    pub fn with_disks(self, bytes: &[usize]) -> Self {
        assert!(!self.is_touched(), "disks come with the machine");
        self.lock().disks = Disks::new(bytes);
        self
    }

    /// Writes to a disk as the guest would.
    ///
    /// # Panics
    /// If there is no such disk or it ends before.
    pub fn write_disk(&self, disk: usize, offset: usize, change: DiskChange) {
        self.lock().disks.write(disk, offset, change);
    }

    /// What is on a disk.
    ///
    /// # Panics
    /// If there is no such disk.
    #[must_use]
    pub fn disk(&self, disk: usize) -> Vec<u8> {
        self.lock().disks.images[disk].clone()
    }

    /// A running machine that goes on from `device` and `memory`.
    pub(super) fn resume(
        seed: u64,
        layout: Layout,
        memory: Arc<Mutex<Vec<u8>>>,
        device: &[u8],
    ) -> Result<Self, GuestError> {
        Ok(Self::assemble(seed, layout, memory, Registers::load(device)?))
    }

    /// Whether `device` would load.
    pub(super) fn check_device(device: &[u8]) -> Result<(), GuestError> {
        Registers::load(device).map(|_| ())
    }

    fn assemble(seed: u64, layout: Layout, memory: Arc<Mutex<Vec<u8>>>, registers: Registers) -> Self {
        let inner = Inner {
            layout,
            memory,
            registers,
            running: true,
            ended: false,
            gate: None,
            marks: None,
            faults: BTreeSet::new(),
            events: Vec::new(),
            disks: Disks::default(),
            wire: Vec::new(),
        };
        Self { inner: Arc::new(Mutex::new(inner)), seed }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        locked(&self.inner)
    }

    /// The seed it was booted with.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Lets it do `steps` steps. A machine that stands or has ended does none. Returns how many it did.
    pub fn run(&self, steps: u64) -> u64 {
        for done in 0..steps {
            let mut inner = self.lock();
            if !inner.running || inner.ended {
                return done;
            }
            let frame = inner.step();
            drop(inner);
            if let Some(frame) = frame {
                self.emit(frame);
            }
        }
        steps
    }

    /// Emits one frame, through the gate if there is one. A machine that stands or has ended emits none.
    pub fn emit(&self, frame: Vec<u8>) {
        let mut inner = self.lock();
        if !inner.running || inner.ended {
            return;
        }
        match inner.gate.as_ref().and_then(Weak::upgrade) {
            Some(gate) => {
                drop(inner);
                gate.take(frame);
            }
            None => inner.wire.push(frame),
        }
    }

    /// Puts a frame on the wire, where other machines see it.
    pub(super) fn transmit(&self, frame: Vec<u8>) {
        self.lock().wire.push(frame);
    }

    /// Writes guest memory as the guest would.
    ///
    /// # Panics
    /// If it is past the end of the page or of memory.
    pub fn write(&self, page: u64, at: usize, bytes: &[u8]) {
        self.lock().write(page, at, bytes);
    }

    /// Takes the frames that were put on the wire since the last call.
    #[must_use]
    pub fn take_wire(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.lock().wire)
    }

    /// All of its memory.
    #[must_use]
    pub fn memory(&self) -> Vec<u8> {
        locked(&self.lock().memory).clone()
    }

    /// How many steps it has done in its life, earlier hosts included.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.lock().registers.steps
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let inner = self.lock();
        inner.running && !inner.ended
    }

    /// Whether anything of an attachment is left in it.
    #[must_use]
    pub fn is_touched(&self) -> bool {
        let inner = self.lock();
        let gated = inner.gate.as_ref().is_some_and(|gate| gate.strong_count() > 0);
        gated || inner.marks.is_some() || inner.disks.mirrored()
    }

    /// The next call that comes to `fault` fails there, once.
    pub fn fail_once(&self, fault: Fault) {
        self.lock().faults.insert(fault);
    }

    /// Something happens to it: the attached guest reports `event`. A death or a shutdown ends it.
    pub fn raise(&self, event: GuestEvent) {
        let mut inner = self.lock();
        match event {
            GuestEvent::Shutdown | GuestEvent::Died { .. } => inner.ended = true,
            GuestEvent::Paused => inner.running = false,
            GuestEvent::Resumed => inner.running = true,
            GuestEvent::Reset | GuestEvent::Changed { .. } => {}
        }
        inner.events.push(event);
    }

    /// A handle that ends it.
    #[must_use]
    pub fn fence(&self) -> SimFence {
        SimFence { machine: self.clone() }
    }
}

impl std::fmt::Debug for SimMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.lock();
        write!(
            f,
            "SimMachine(seed {}, {:?}, running {}, ended {})",
            self.seed, inner.registers, inner.running, inner.ended
        )
    }
}

/// Ends a [`SimMachine`].
#[derive(Debug)]
pub struct SimFence {
    machine: SimMachine,
}

impl Fence for SimFence {
    fn fence(&self) -> Result<(), GuestError> {
        self.machine.lock().ended = true;
        Ok(())
    }

    fn ended(&self) -> bool {
        self.machine.lock().ended
    }
}

/// Where a page starts in memory.
pub(super) fn offset(page: u64) -> usize {
    usize::try_from(page).expect("a simulated guest is small") * PAGE_SIZE
}

/// A lock that a panicking test has poisoned is as good as any other here: the test has failed already.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
