//! A machine as a [`Guest`]: what its protector in this process calls.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::copying::Copying;
use super::cpuid::Leaf;
use super::machine::{Machine, Spec};
use super::state::StateError;
use super::track;
use crate::disk::{DiskSpec, DiskWrite, MirrorProgress};
use crate::guest::{Capture, Fence, Gate, Guest, GuestError, GuestErrorKind, GuestEvent, PauseParts, Recipe};
use crate::layout::{Block, Layout, PAGE_SIZE, PageSet};
use crate::sys::copy::by_runs;
use crate::track::{DirtyLedger, TrackError, Tracker};

/// The back end's name in recipes.
pub const BACKEND: &str = "kvm";
/// The name of the only memory block.
const RAM: &str = "ram";

/// The body of a recipe.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Body {
    pub(super) spec: Spec,
    /// What the guest was promised of its processor.
    pub(super) cpuid: Vec<Leaf>,
    /// Whether it has interrupt controllers, a timer and a serial port.
    #[serde(default)]
    pub(super) chips: bool,
}

/// The layout of a machine with so many bytes of memory.
pub(super) fn layout(bytes: u64) -> Option<Layout> {
    Layout::new(vec![Block { name: RAM.to_owned(), pages: bytes / PAGE_SIZE as u64 }]).ok()
}

/// A machine that is protected.
#[derive(Debug)]
pub struct KvmGuest {
    machine: Machine,
    layout: Layout,
    recipe: Recipe,
    ledger: DirtyLedger<Box<dyn Tracker>>,
    /// The pages of one capture. Kept to be used again.
    dirty: PageSet,
    copying: Copying,
    /// Whether this side has paused it.
    paused: bool,
}

/// Attaches to a machine of this process.
///
/// # Errors
/// [`GuestErrorKind::Refused`] if somebody is attached to it.
pub fn attach(machine: &Machine) -> Result<KvmGuest, GuestError> {
    let spec = machine.spec();
    let layout = layout(spec.memory).expect("a machine has memory");
    let body = Body { spec: spec.clone(), cpuid: machine.cpuid().to_vec(), chips: machine.has_chips() };
    let disks = machine.0.log.sizes().iter().zip(&spec.disks);
    let recipe = Recipe {
        backend: BACKEND.to_owned(),
        body: serde_json::to_string(&body).expect("plain data"),
        disks: disks.map(|(&bytes, disk)| DiskSpec { name: disk.name.clone(), bytes }).collect(),
    };
    if machine.0.attached.swap(true, Ordering::SeqCst) {
        let error = GuestError::new(GuestErrorKind::Refused, "somebody is attached to this microVM already");
        return Err(error.advise("nothing was changed; detach the other one first"));
    }
    let ledger = DirtyLedger::new(track::tracker(&machine.0), layout.pages());
    let dirty = PageSet::empty(layout.pages());
    let copying = Copying::new(Arc::clone(machine.0.vm.ram()));
    Ok(KvmGuest { machine: machine.clone(), layout, recipe, ledger, dirty, copying, paused: false })
}

pub(super) fn failed(error: TrackError) -> GuestError {
    let ring = matches!(error, TrackError::Ring(_));
    let failed = GuestError::new(GuestErrorKind::Failed, "the guest's dirty pages could not be found").because(error);
    if !ring {
        return failed;
    }
    failed.advise("the guest runs on, unprotected; to protect it again, start it anew with `--dirty bitmap`")
}

pub(super) fn not_whole() -> GuestError {
    GuestError::new(GuestErrorKind::Failed, "the mirror of the guest's disks is not whole")
        .advise("nothing of this epoch is committed; wait for the first copy, or begin to mirror anew")
}

impl KvmGuest {
    fn must_stand(&self, call: &str) {
        assert!(self.paused, "{call} of a guest that was not paused");
    }

    /// Saves and copies what was harvested.
    fn take(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        let start = Instant::now();
        let machine = &self.machine;
        let save = || {
            let start = Instant::now();
            machine.save(&mut into.device)?;
            parts.device = start.elapsed();
            Ok(())
        };
        let saved = self.copying.copy(&into.pages, &mut into.bytes, save);
        saved.map_err(|error: StateError| {
            GuestError::new(GuestErrorKind::Failed, format!("the microVM's state could not be read: {error}"))
                .because(error)
        })?;
        parts.copy = start.elapsed() - parts.device;
        if self.machine.0.log.capture(&mut into.disk) { Ok(()) } else { Err(not_whole()) }
    }
}

impl Guest for KvmGuest {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn gate(&self) -> Arc<dyn Gate> {
        Arc::<super::gate::KvmGate>::clone(&self.machine.0.gate)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        if !self.paused {
            self.machine.pause()?;
            self.paused = true;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.machine.resume()?;
        self.paused = false;
        Ok(())
    }

    fn idle(&mut self) -> bool {
        self.wait_idle(Duration::ZERO)
    }

    fn wait_idle(&mut self, most: Duration) -> bool {
        self.machine.wait_idle(most)
    }

    fn pauses_alone(&self) -> bool {
        true
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

    fn put_back_writes(&mut self, writes: Vec<DiskWrite>) {
        self.machine.0.log.put_back(writes);
    }

    fn read_pages(&mut self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError> {
        if let Some(page) = pages.iter().find(|&&page| page >= self.layout.pages()) {
            return Err(GuestError::new(GuestErrorKind::Failed, format!("the guest has no page {page}")));
        }
        bytes.resize(pages.len() * PAGE_SIZE, 0);
        by_runs(self.machine.0.vm.ram(), pages, bytes);
        Ok(())
    }

    fn capture(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        self.must_stand("a capture");
        let start = Instant::now();
        self.dirty.clear();
        self.ledger.harvest(&mut self.dirty).map_err(failed)?;
        into.pages.clear();
        into.pages.extend(self.dirty.iter());
        parts.harvest = start.elapsed();
        let taken = self.take(into, parts);
        if taken.is_err() {
            self.ledger.put_back(&self.dirty);
        }
        taken
    }

    fn hold_output(&mut self, epoch: u64) -> Result<(), GuestError> {
        self.must_stand("holding the output");
        self.machine.0.gate.hold(epoch);
        Ok(())
    }

    fn open_output(&mut self) -> Result<(), GuestError> {
        self.machine.0.gate.open();
        Ok(())
    }

    fn mirror_disks(&mut self) -> Result<(), GuestError> {
        self.machine.0.log.start();
        Ok(())
    }

    fn mirror_progress(&mut self) -> Result<MirrorProgress, GuestError> {
        self.machine.0.log.progress().ok_or_else(not_whole)
    }

    fn take_writes(&mut self, into: &mut Vec<DiskWrite>, bytes: usize, wait: Duration) {
        let blocks = &self.machine.0.blocks;
        self.machine.0.log.take(into, bytes, wait, |disk, offset, length, with| {
            blocks[disk as usize].copy(offset, length, with);
        });
    }

    fn unmirror_disks(&mut self) -> Result<(), GuestError> {
        self.machine.0.log.end();
        Ok(())
    }

    fn events(&mut self) -> Vec<GuestEvent> {
        self.machine.take_events()
    }

    fn fence(&self) -> Arc<dyn Fence> {
        self.machine.fence()
    }

    fn detach(mut self: Box<Self>) -> Result<(), GuestError> {
        self.machine.0.gate.open();
        self.machine.0.log.end();
        let disarmed = self.ledger.disarm().map_err(failed);
        if self.paused {
            self.resume()?;
        }
        disarmed
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        self.machine.0.attached.store(false, Ordering::SeqCst);
    }
}

impl Machine {
    /// What a protector has left in it, in words.
    #[must_use]
    pub fn traces(&self) -> Vec<String> {
        let inner = &self.0;
        [
            (inner.attached.load(Ordering::SeqCst), "somebody is attached"),
            (inner.gate.closed(), "its output is held"),
            (inner.log.active(), "its disks are mirrored"),
            (inner.vm.logs(), "its memory is tracked"),
        ]
        .into_iter()
        .filter(|&(there, _)| there)
        .map(|(_, what)| what.to_owned())
        .collect()
    }
}
