//! Dirty pages by KVM's bitmap, joined with what the VMM itself wrote.
//!
//! With manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`) reading the log changes nothing, and a harvest takes two system calls:
//! a page is in the harvest before its mark is cleared.

use std::sync::Arc;

use super::ram::add_word;
use crate::layout::PageSet;
use crate::sys::kvm::Vm;
use crate::track::{TrackError, Tracker};

/// Finds written pages of one machine.
#[derive(Debug)]
pub(super) struct KvmTracker {
    vm: Arc<Vm>,
    armed: bool,
    /// The log as it was read last.
    bits: Vec<u64>,
}

impl KvmTracker {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        let bits = vec![0; vm.log_words()];
        Self { vm, armed: false, bits }
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

impl Tracker for KvmTracker {
    fn name(&self) -> &'static str {
        "kvm-bitmap"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        if self.armed {
            self.disarm()?;
        }
        self.vm.ram().forget_own_writes();
        self.vm.log(true)?;
        self.armed = true;
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.read(dirty)?;
        self.vm.clear_dirty(&self.bits)?;
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
