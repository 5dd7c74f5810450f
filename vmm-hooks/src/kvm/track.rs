//! Dirty pages by KVM's bitmap or by its rings, joined with what the VMM itself wrote.
//!
//! With manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`) reading the log changes nothing, and a harvest takes two system calls:
//! a page is in the harvest before its mark is cleared. Marks of pages that are written again and again are not cleared each time ([`super::hot`]). A harvest of rings takes five (one, with signals blocked and waits counted around it), and as long as there are dirty pages, not pages.

use std::sync::Arc;

use super::hot::Hot;
use super::machine::Inner;
use super::ram::add_word;
use super::ring::Rings;
use crate::layout::PageSet;
use crate::sys::kvm::Vm;
use crate::track::{TrackError, Tracker};

/// What finds the written pages of a machine.
pub(super) fn tracker(machine: &Inner) -> Box<dyn Tracker> {
    let vm = Arc::clone(&machine.vm);
    match &machine.rings {
        Some(rings) => Box::new(RingTracker { vm, rings: Arc::clone(rings), armed: false }),
        None => Box::new(BitmapTracker::new(vm, machine.worth)),
    }
}

/// By the bitmap.
#[derive(Debug)]
struct BitmapTracker {
    vm: Arc<Vm>,
    armed: bool,
    /// The log as it was read last.
    bits: Vec<u64>,
    hot: Hot,
}

impl BitmapTracker {
    fn new(vm: Arc<Vm>, worth: u8) -> Self {
        let bits = vec![0; vm.log_words()];
        let hot = Hot::new(bits.len(), worth);
        Self { vm, armed: false, bits, hot }
    }

    fn read(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        if !self.armed {
            return Err(TrackError::NotArmed);
        }
        self.vm.dirty(&mut self.bits)?;
        for (index, &word) in self.bits.iter().enumerate() {
            add_word(dirty, index, word);
        }
        Ok(())
    }
}

impl Tracker for BitmapTracker {
    fn name(&self) -> &'static str {
        "kvm-bitmap"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        if self.armed {
            self.disarm()?;
        }
        self.vm.ram().forget_own_writes();
        self.hot.forget();
        self.vm.log(true)?;
        self.armed = true;
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.read(dirty)?;
        self.hot.keep(&mut self.bits);
        if let Err(error) = self.vm.clear_dirty(&self.bits) {
            self.hot.forget();
            return Err(error.into());
        }
        self.vm.ram().own_writes(dirty, true);
        Ok(())
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.read(dirty)?;
        self.vm.ram().own_writes(dirty, false);
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        if self.armed {
            self.vm.log(false)?;
            self.armed = false;
        }
        Ok(())
    }
}

/// By the rings.
#[derive(Debug)]
struct RingTracker {
    vm: Arc<Vm>,
    rings: Arc<Rings>,
    armed: bool,
}

impl RingTracker {
    fn harvest(&self, dirty: &mut PageSet, take: bool) -> Result<(), TrackError> {
        if !self.armed {
            return Err(TrackError::NotArmed);
        }
        self.rings.harvest(dirty, take)?;
        self.vm.ram().own_writes(dirty, take);
        Ok(())
    }
}

impl Tracker for RingTracker {
    fn name(&self) -> &'static str {
        "kvm-ring"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        self.disarm()?;
        // What was written before.
        self.rings.forget()?;
        self.vm.ram().forget_own_writes();
        self.vm.log(true)?;
        self.armed = true;
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        Self::harvest(self, dirty, true)
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        Self::harvest(self, dirty, false)
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        if self.armed {
            self.vm.log(false)?;
            self.armed = false;
        }
        Ok(())
    }
}
