//! The tracker of choice: the kernel write-tracks the guest's memory, and `PAGEMAP_SCAN` asks it from outside.
//!
//! Arming gives the process a userfaultfd in asynchronous write-protect mode, once, by [`crate::sys::inject`]; from then on
//! nothing stops or enters the process. A harvest makes two passes: a scan that changes nothing finds the written runs,
//! then those runs alone are write-protected again. (Protecting in the first pass would make the kernel tell KVM about all of
//! memory in each harvest, and drop its mappings.) Where there is no KVM to tell, the runs of one page table are protected in one
//! step: each step interrupts the process's other threads to flush their TLBs, and its device state is being saved by one of
//! them. The guest stands meanwhile; what saving writes between the passes is found by the second one, too.

use std::ops::Range;

use super::{RangeMap, TrackError, Tracker};
use crate::layout::PageSet;
use crate::sys::inject::{self, Injected};
use crate::sys::pagemap::Pagemap;
use crate::sys::process::PidFd;

/// Bytes that one page table maps (x86-64); the kernel flushes TLBs once for each that it has walked.
const PAGE_TABLE: u64 = 2 << 20;

/// Finds written pages by `PAGEMAP_SCAN`.
///
/// Dropped while armed, it leaves the userfaultfd in the process: the next arming, by an agent that was started again, takes
/// it over.
#[derive(Debug)]
pub struct PagemapTracker {
    process: PidFd,
    map: RangeMap,
    /// KVM maps this memory, too.
    kvm: bool,
    armed: Option<Armed>,
    /// Written runs of one harvest, by address. Kept to be reused.
    runs: Vec<Range<u64>>,
}

#[derive(Debug)]
struct Armed {
    injected: Injected,
    pagemap: Pagemap,
}

impl PagemapTracker {
    /// A tracker of the pages of `map` in `process`, which runs its guest by KVM or without. Changes nothing before it is armed.
    #[must_use]
    pub fn new(process: PidFd, map: RangeMap, kvm: bool) -> Self {
        Self { process, map, kvm, armed: None, runs: Vec::new() }
    }

    /// The descriptor in the process that keeps its memory tracked; `None` while not armed.
    #[must_use]
    pub fn injected(&self) -> Option<&Injected> {
        self.armed.as_ref().map(|armed| &armed.injected)
    }
}

/// What is protected in one step: the first of `runs`, and without KVM those after it that lie in the same page table. How many runs,
/// and from where to where.
fn step(runs: &[Range<u64>], kvm: bool) -> Option<(usize, Range<u64>)> {
    let first = runs.first()?;
    let table = first.start / PAGE_TABLE;
    let more = runs[1..].iter().take_while(|run| !kvm && (run.end - 1) / PAGE_TABLE == table).count();
    Some((1 + more, first.start..runs[more].end))
}

impl Tracker for PagemapTracker {
    fn name(&self) -> &'static str {
        "pagemap"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        if self.armed.is_none() {
            let ranges: Vec<_> = self.map.segments().iter().map(|segment| segment.addresses.clone()).collect();
            let pagemap = Pagemap::open(&self.process)?;
            let injected = inject::attach(&self.process, &ranges)?;
            self.armed = Some(Armed { injected, pagemap });
        }
        let armed = self.armed.as_mut().expect("just set");
        let mut result = Ok(());
        for segment in self.map.segments() {
            result = result.and_then(|()| armed.pagemap.protect_written(segment.addresses.clone(), |_| {}));
        }
        if let Err(error) = result {
            // The first failure is the one to tell; what stays in the process is found and reused by the next arming.
            if let Err(second) = self.disarm() {
                tracing::warn!(error = %second, "tracking could not be taken out of the process again");
            }
            return Err(error.into());
        }
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        let armed = self.armed.as_mut().ok_or(TrackError::NotArmed)?;
        for segment in self.map.segments() {
            self.runs.clear();
            armed.pagemap.written(segment.addresses.clone(), |run| {
                dirty.insert_range(segment.pages_at(&run));
                self.runs.push(run);
            })?;
            // Each run is in `dirty` before its mark is taken away here.
            let mut left = &self.runs[..];
            while let Some((count, range)) = step(left, self.kvm) {
                let done =
                    armed.pagemap.protect_written(range.clone(), |run| dirty.insert_range(segment.pages_at(&run)));
                if done.is_err() {
                    // Marks between the runs may be gone, and nobody said which.
                    dirty.insert_range(segment.pages_at(&range));
                }
                done?;
                left = &left[count..];
            }
        }
        Ok(())
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        let armed = self.armed.as_mut().ok_or(TrackError::NotArmed)?;
        for segment in self.map.segments() {
            armed.pagemap.written(segment.addresses.clone(), |run| dirty.insert_range(segment.pages_at(&run)))?;
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        let Some(armed) = &self.armed else { return Ok(()) };
        if !self.process.has_exited() {
            inject::detach(&self.process, &armed.injected)?;
        }
        self.armed = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_a_run_or_a_page_table_of_runs() {
        let runs = [
            0x1f_e000..0x1f_f000,
            0x20_0000..0x20_1000,
            0x20_8000..0x20_a000,
            0x3f_f000..0x40_0000,
            0x40_0000..0x60_1000,
        ];
        let steps = |kvm| {
            let (mut left, mut steps) = (&runs[..], Vec::new());
            while let Some((count, range)) = step(left, kvm) {
                steps.push(range);
                left = &left[count..];
            }
            steps
        };
        assert_eq!(steps(true), runs);
        assert_eq!(steps(false), [0x1f_e000..0x1f_f000, 0x20_0000..0x40_0000, 0x40_0000..0x60_1000]);
    }
}
