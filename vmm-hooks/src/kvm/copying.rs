//! Copying the pages of a capture out of a machine's memory, by two threads where that is worth it.
//!
//! Promise: when [`Copying::copy`] returns every page was copied, after the machine stood still and before it may run again, and nobody else
//! touches the buffer.

use std::sync::Arc;

use super::ram::Ram;
use crate::layout::PAGE_SIZE;
use crate::sys::copy::{Copier, by_runs};

/// With so many pages, 2 MiB, a second thread helps: it has to be woken, which takes as long as copying some hundreds on a virtual machine.
const HELPED: usize = 512;

/// The memory, and who copies out of it.
#[derive(Debug)]
pub(super) struct Copying {
    ram: Arc<Ram>,
    /// `None`: this host has one processor, or no thread to spare.
    helper: Option<Copier>,
}

impl Copying {
    /// Starts the second thread, which waits.
    pub(super) fn new(ram: Arc<Ram>) -> Self {
        let several = std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
        let helper = several.then(|| Copier::new(Arc::clone(&ram)).ok()).flatten();
        Self { ram, helper }
    }

    /// Copies `pages` to `into`, which gets their length, and does meanwhile what is to be done.
    ///
    /// # Panics
    /// If a page is outside of the memory.
    pub(super) fn copy<R>(&mut self, pages: &[u64], into: &mut Vec<u8>, meanwhile: impl FnOnce() -> R) -> R {
        // Without clearing: what is overwritten below need not be zeroed first.
        into.resize(pages.len() * PAGE_SIZE, 0);
        if let Some(helper) = &mut self.helper
            && pages.len() >= HELPED
        {
            return helper.copy(pages, into, meanwhile);
        }
        let done = meanwhile();
        by_runs(&self.ram, pages, into);
        done
    }
}
