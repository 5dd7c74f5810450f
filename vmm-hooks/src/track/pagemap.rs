//! The tracker of choice: the kernel write-tracks the guest's memory, and `PAGEMAP_SCAN` asks it from outside.
//!
//! Arming gives the process a userfaultfd in asynchronous write-protect mode, once, by [`crate::sys::inject`]; from then on
//! nothing stops or enters the process. A harvest makes two passes: a scan that changes nothing finds the written runs,
//! then those runs alone are write-protected again. (Protecting in the first pass would make the kernel tell KVM about all of
//! memory in each harvest, and drop its mappings.) The guest stands meanwhile, so nothing is written between the passes.

use super::{RangeMap, TrackError, Tracker};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::inject::{self, Injected};
use crate::sys::pagemap::{Pagemap, ScanError};
use crate::sys::process::PidFd;

/// Finds written pages by `PAGEMAP_SCAN`.
///
/// Dropped while armed, it leaves the userfaultfd in the process: the next arming, by an agent that was started again, takes
/// it over.
#[derive(Debug)]
pub struct PagemapTracker {
    process: PidFd,
    map: RangeMap,
    armed: Option<Armed>,
    /// Written runs of one harvest, by address. Kept to be reused.
    runs: Vec<std::ops::Range<u64>>,
}

#[derive(Debug)]
struct Armed {
    injected: Injected,
    pagemap: Pagemap,
}

impl PagemapTracker {
    /// A tracker of the pages of `map` in `process`. Changes nothing before it is armed.
    #[must_use]
    pub fn new(process: PidFd, map: RangeMap) -> Self {
        Self { process, map, armed: None, runs: Vec::new() }
    }

    /// The descriptor in the process that keeps its memory tracked; `None` while not armed.
    #[must_use]
    pub fn injected(&self) -> Option<&Injected> {
        self.armed.as_ref().map(|armed| &armed.injected)
    }
}

/// Calls `found` with the page numbers of each written run.
fn scan(
    pagemap: &mut Pagemap,
    map: &RangeMap,
    mut found: impl FnMut(std::ops::Range<u64>, std::ops::Range<u64>),
) -> Result<(), ScanError> {
    let page = PAGE_SIZE as u64;
    for segment in map.segments() {
        pagemap.written(segment.addresses.clone(), |run| {
            let number = |address: u64| segment.pages.start + (address - segment.addresses.start) / page;
            found(number(run.start)..number(run.end), run);
        })?;
    }
    Ok(())
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
        let runs = &mut self.runs;
        runs.clear();
        scan(&mut armed.pagemap, &self.map, |pages, addresses| {
            dirty.insert_range(pages);
            runs.push(addresses);
        })?;
        // Each run is in `dirty` before its mark is taken away here.
        for run in runs.drain(..) {
            armed.pagemap.protect_written(run, |_| {})?;
        }
        Ok(())
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        let armed = self.armed.as_mut().ok_or(TrackError::NotArmed)?;
        Ok(scan(&mut armed.pagemap, &self.map, |pages, _| dirty.insert_range(pages))?)
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
