//! Dirty tracking: which guest pages were written since the last harvest.
//!
//! Losing a dirty page is the worst bug this program can have. Two rules keep it away:
//!
//! 1. **Put back.** What was harvested and not committed is given back, and comes with the next harvest. [`DirtyLedger`]
//!    keeps this rule; everybody who harvests does so through it.
//! 2. **Re-arm only while stopped and drained.** [`Tracker::arm`] and [`Tracker::harvest`] may be called only while the vCPUs
//!    stand and no I/O is in flight. A device that reads from disk straight into guest memory (`cache=none`) holds those pages
//!    pinned and writes them without a page fault: a page that is write-protected in that time is changed and never found. While
//!    the guest runs, only [`Tracker::peek`] may look; what it finds stays dirty.
//!
//! Memory that is discarded instead of written (`MADV_DONTNEED` by a balloon or by free page reporting) is not found by
//! [`PagemapTracker`], as it is not by QEMU's own migration: the standby keeps the bytes from before, and the guest may not
//! expect anything of such a page until it writes it again.

mod compare;
mod ledger;
mod pagemap;
mod ranges;
pub mod soft_dirty;

use std::fmt;

pub use compare::CompareTracker;
pub use ledger::DirtyLedger;
pub use pagemap::PagemapTracker;
pub use ranges::{RangeError, RangeMap, Segment};
pub use soft_dirty::SoftDirtyTracker;

use crate::layout::PageSet;
use crate::sys::pagemap::ScanError;
use crate::sys::process::ProcessError;

/// Why tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// It was not armed, or was disarmed.
    #[error("dirty tracking is not armed")]
    NotArmed,
    /// The process could not be given a userfaultfd, or it could not be closed.
    #[error(transparent)]
    Inject(#[from] crate::sys::inject::InjectError),
    /// The page map could not be scanned.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// KVM's log could not be read or cleared.
    #[error(transparent)]
    Kvm(#[from] crate::sys::kvm::KvmError),
    /// KVM's rings could not be read or given back.
    #[error(transparent)]
    Ring(#[from] crate::kvm::ring::RingError),
    /// The process or its memory could not be reached.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Finds the pages that were written. One of several ways, behind one contract.
pub trait Tracker: Send + fmt::Debug {
    /// A short name for operators and metrics.
    fn name(&self) -> &'static str;

    /// Whether somebody else than the guest may write its memory during a harvest, as a hypervisor does that saves device state. What is
    /// written then is found by this harvest or by the next one; if not, the harvest must wait until nobody writes.
    fn others_may_write(&self) -> bool {
        true
    }

    /// While stopped and drained: from now on every written page is found. Pages written earlier need not be found: the
    /// caller sends all memory after this. Arming what is armed starts anew.
    ///
    /// # Errors
    /// If it fails, nothing is tracked.
    fn arm(&mut self) -> Result<(), TrackError>;

    /// While stopped and drained: adds every page written since the last arming or harvest, and arms again. May add pages that
    /// were not written.
    ///
    /// # Errors
    /// If it fails, each page whose mark this call has taken away was added to `dirty` before.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError>;

    /// At any time: adds the pages written since the last arming or harvest, without arming again: the next harvest finds every
    /// written page, whatever was seen here. While the guest runs this is an estimate: a page written in this moment may be
    /// missing, and pages that nobody wrote may be there (a kernel that splits a huge mapping shows all of it as written for a
    /// moment). While it stands no written page is missing.
    ///
    /// # Errors
    /// If it fails, nothing was lost.
    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError>;

    /// Stops tracking and takes everything of ours out of the process. Disarming what is not armed, or what has ended, is
    /// no error.
    ///
    /// # Errors
    /// If something of ours had to stay in the process.
    fn disarm(&mut self) -> Result<(), TrackError>;
}
