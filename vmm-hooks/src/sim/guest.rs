//! The primary's side: a machine that somebody is attached to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::gate::SimGate;
use super::machine::{Fault, SimMachine};
use crate::disk::{DiskSpec, DiskWrite, MirrorProgress};
use crate::guest::{Capture, Fence, Gate, Guest, GuestError, GuestErrorKind, GuestEvent, PauseParts, Recipe};
use crate::layout::{Layout, PageSet};
use crate::track::{DirtyLedger, TrackError, Tracker};

/// Attaches to a machine.
///
/// # Errors
/// [`GuestErrorKind::Refused`] if somebody is attached to it, [`GuestErrorKind::Gone`] if it has ended.
pub fn attach(machine: &SimMachine) -> Result<SimGuest, GuestError> {
    if machine.is_touched() {
        let error = GuestError::new(GuestErrorKind::Refused, "somebody is attached to this guest already");
        return Err(error.advise("nothing was changed; detach the other one first"));
    }
    let mut inner = machine.lock();
    if inner.ended {
        return Err(gone());
    }
    let gate = Arc::new(SimGate::new(machine.clone()));
    inner.gate = Some(Arc::downgrade(&gate));
    let layout = inner.layout.clone();
    let disks = inner.disks.images.iter().enumerate();
    let disks =
        disks.map(|(index, image)| DiskSpec { name: format!("disk{index}"), bytes: image.len() as u64 }).collect();
    drop(inner);
    let recipe = Recipe { backend: "sim".to_owned(), body: machine.seed().to_string(), disks };
    let ledger = DirtyLedger::new(SimTracker { machine: machine.clone() }, layout.pages());
    Ok(SimGuest { machine: machine.clone(), layout, recipe, gate, ledger, paused: false })
}

/// A guest that is attached to.
#[derive(Debug)]
pub struct SimGuest {
    machine: SimMachine,
    layout: Layout,
    recipe: Recipe,
    gate: Arc<SimGate>,
    ledger: DirtyLedger<SimTracker>,
    /// Whether this side has paused it.
    paused: bool,
}

fn gone() -> GuestError {
    GuestError::new(GuestErrorKind::Gone, "the guest has ended")
}

fn broken() -> GuestError {
    GuestError::new(GuestErrorKind::Failed, "the mirror of the guest's disks is not whole")
        .advise("nothing of this epoch is committed; wait for the first copy, or begin to mirror anew")
}

impl SimGuest {
    /// Refuses if the machine has ended or `fault` was asked for.
    fn step(&self, fault: Fault) -> Result<(), GuestError> {
        let mut inner = self.machine.lock();
        if inner.ended {
            return Err(gone());
        }
        if inner.fails(fault) {
            return Err(GuestError::new(GuestErrorKind::Failed, format!("{fault:?} failed as it was told to")));
        }
        Ok(())
    }

    /// A call that only makes sense while the guest stands.
    fn must_stand(&self, call: &str) {
        assert!(self.paused, "{call} of a guest that was not paused");
    }

    fn copy(&self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError> {
        bytes.clear();
        let half = pages.len() / 2;
        for (done, &page) in pages.iter().enumerate() {
            if done == half {
                self.step(Fault::Copy)?;
            }
            self.machine.lock().copy_page(page, bytes);
        }
        Ok(())
    }

    /// Saves and copies what was harvested.
    fn take(&self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        let start = Instant::now();
        self.step(Fault::Device)?;
        into.device = self.machine.lock().save();
        parts.device = start.elapsed();
        let start = Instant::now();
        let result = self.copy(&into.pages, &mut into.bytes);
        parts.copy = start.elapsed();
        result?;
        let mut inner = self.machine.lock();
        if inner.fails(Fault::DiskWrite) {
            inner.disks.break_mirror();
        }
        if inner.disks.capture(&mut into.disk) { Ok(()) } else { Err(broken()) }
    }
}

impl Guest for SimGuest {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn gate(&self) -> Arc<dyn Gate> {
        self.gate.clone()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        if self.paused {
            return Ok(());
        }
        self.step(Fault::Pause)?;
        self.machine.lock().running = false;
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.step(Fault::Resume)?;
        self.machine.lock().running = true;
        self.paused = false;
        Ok(())
    }

    fn arm(&mut self) -> Result<(), GuestError> {
        self.must_stand("arming");
        self.ledger.arm().map_err(failed)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.must_stand("a harvest");
        self.ledger.harvest(dirty).map_err(failed)
    }

    fn put_back(&mut self, dirty: &PageSet) {
        self.ledger.put_back(dirty);
    }

    fn read_pages(&mut self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError> {
        if let Some(page) = pages.iter().find(|&&page| page >= self.layout.pages()) {
            return Err(GuestError::new(GuestErrorKind::Failed, format!("the guest has no page {page}")));
        }
        self.copy(pages, bytes)
    }

    fn capture(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        self.must_stand("a capture");
        let start = Instant::now();
        let mut dirty = PageSet::empty(self.layout.pages());
        self.harvest(&mut dirty)?;
        into.pages.clear();
        into.pages.extend(dirty.iter());
        parts.harvest = start.elapsed();
        let taken = self.take(into, parts);
        if taken.is_err() {
            self.put_back(&dirty);
        }
        taken
    }

    fn hold_output(&mut self, epoch: u64) -> Result<(), GuestError> {
        self.must_stand("holding the output");
        self.step(Fault::Hold)?;
        self.gate.hold(epoch);
        Ok(())
    }

    fn open_output(&mut self) -> Result<(), GuestError> {
        self.step(Fault::Open)?;
        self.gate.open();
        Ok(())
    }

    fn put_back_writes(&mut self, writes: Vec<DiskWrite>) {
        self.machine.lock().disks.put_back(writes);
    }

    fn mirror_disks(&mut self) -> Result<(), GuestError> {
        self.step(Fault::Mirror)?;
        self.machine.lock().disks.start();
        Ok(())
    }

    fn mirror_progress(&mut self) -> Result<MirrorProgress, GuestError> {
        self.machine.lock().disks.progress().ok_or_else(broken)
    }

    /// Nothing comes while this waits: whoever drives the machine is the caller.
    fn take_writes(&mut self, into: &mut Vec<DiskWrite>, bytes: usize, _wait: Duration) {
        self.machine.lock().disks.take(into, bytes);
    }

    fn unmirror_disks(&mut self) -> Result<(), GuestError> {
        self.machine.lock().disks.stop();
        Ok(())
    }

    fn events(&mut self) -> Vec<GuestEvent> {
        std::mem::take(&mut self.machine.lock().events)
    }

    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(self.machine.fence())
    }

    fn detach(mut self: Box<Self>) -> Result<(), GuestError> {
        self.gate.open();
        self.ledger.disarm().map_err(failed)?;
        let mut inner = self.machine.lock();
        inner.gate = None;
        inner.disks.stop();
        if self.paused {
            inner.running = true;
        }
        Ok(())
    }
}

fn failed(error: TrackError) -> GuestError {
    GuestError::new(GuestErrorKind::Failed, "the guest's dirty pages could not be found").because(error)
}

/// Reads the machine's dirty marks, as a tracker reads a kernel's.
#[derive(Debug)]
struct SimTracker {
    machine: SimMachine,
}

impl Tracker for SimTracker {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        let mut inner = self.machine.lock();
        if inner.ended || inner.fails(Fault::Arm) {
            return Err(TrackError::NotArmed);
        }
        inner.marks = Some(PageSet::empty(inner.layout.pages()));
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        let mut inner = self.machine.lock();
        let fails = inner.fails(Fault::Harvest) || inner.ended;
        let marks = inner.marks.as_mut().ok_or(TrackError::NotArmed)?;
        let mut found: Vec<u64> = marks.iter().collect();
        if fails {
            found.truncate(found.len() / 2);
        }
        for page in found {
            dirty.insert(page);
            marks.remove(page);
        }
        if fails { Err(TrackError::NotArmed) } else { Ok(()) }
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        let inner = self.machine.lock();
        dirty.union_with(inner.marks.as_ref().ok_or(TrackError::NotArmed)?);
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        self.machine.lock().marks = None;
        Ok(())
    }
}
