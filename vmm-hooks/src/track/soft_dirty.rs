//! The tracker of kernels before 6.7: soft-dirty bits. The kernel write-protects all pages of a process when its bits are cleared, and sets
//! a page's bit at the first write after that, in the process and, through it, in KVM (Documentation/admin-guide/mm/soft-dirty.rst; bit 55 of an
//! entry, pagemap.rst; needs `CONFIG_MEM_SOFT_DIRTY`, which Debian and others build in).
//!
//! Two limits of these bits:
//! - They are read and cleared in two calls, for the whole process. Who writes between the two is not found, so a harvest must
//!   not meet any writer at all, the saving of device state included: [`Tracker::others_may_write`] is false.
//! - The kernel may take a page of shared memory out of the process when memory is short, and its bit with it. (A private page keeps it in its
//!   swap entry.) So only private memory can be tracked; who chooses a tracker looks.
//!
//! A huge page has one bit: all of it counts as written. What did not change in it is found by whoever encodes, and not sent.
//!
//! Nothing is put into the process, and nothing stays in it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::{RangeMap, TrackError, Tracker};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::process::{PidFd, ProcessError};

/// Bytes of a page's entry.
const ENTRY: usize = 8;
/// The bit of an entry.
const SOFT_DIRTY: u64 = 1 << 55;
/// Entries read in one call: what 128 MiB have.
const ENTRIES: usize = 1 << 15;
/// What clears the bits when it is written to `clear_refs`.
const CLEAR: &[u8] = b"4";

/// Finds written pages by soft-dirty bits.
#[derive(Debug)]
pub struct SoftDirtyTracker {
    process: PidFd,
    map: RangeMap,
    armed: Option<Armed>,
    entries: Vec<u8>,
}

#[derive(Debug)]
struct Armed {
    entries: File,
    clear: File,
}

impl SoftDirtyTracker {
    /// A tracker of the pages of `map`, all of them private memory of `process`. Changes nothing before it is armed.
    #[must_use]
    pub fn new(process: PidFd, map: RangeMap) -> Self {
        Self { process, map, armed: None, entries: Vec::new() }
    }

    fn error(&self, what: &'static str, source: io::Error) -> TrackError {
        let pid = self.process.pid();
        let ended = self.process.has_exited();
        TrackError::Process(if ended { ProcessError::Gone { pid } } else { ProcessError::Os { pid, what, source } })
    }

    fn open(&self) -> Result<Armed, TrackError> {
        let pid = self.process.pid();
        let open = || {
            let entries = File::open(format!("/proc/{pid}/pagemap"))?;
            let clear = File::options().write(true).open(format!("/proc/{pid}/clear_refs"))?;
            Ok(Armed { entries, clear })
        };
        let opened = open().map_err(|error| self.error("open the page map", error))?;
        // Both stay bound to the process that had the number then.
        if self.process.has_exited() { Err(ProcessError::Gone { pid }.into()) } else { Ok(opened) }
    }

    fn clear(&self) -> Result<(), TrackError> {
        let armed = self.armed.as_ref().ok_or(TrackError::NotArmed)?;
        (&armed.clear).write_all(CLEAR).map_err(|error| self.error("clear the soft-dirty bits", error))
    }

    fn find(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        let armed = self.armed.as_ref().ok_or(TrackError::NotArmed)?;
        let mut buffer = std::mem::take(&mut self.entries);
        buffer.resize(ENTRIES * ENTRY, 0);
        let mut read = || {
            for segment in self.map.segments() {
                let (mut page, mut entry) = (segment.pages.start, segment.addresses.start / PAGE_SIZE as u64);
                while page < segment.pages.end {
                    let count = usize::try_from(segment.pages.end - page).unwrap_or(ENTRIES).min(ENTRIES);
                    let entries = &mut buffer[..count * ENTRY];
                    armed.entries.read_exact_at(entries, entry * ENTRY as u64)?;
                    for (page, entry) in (page..).zip(entries.chunks_exact(ENTRY)) {
                        if u64::from_ne_bytes(entry.try_into().expect("eight bytes")) & SOFT_DIRTY != 0 {
                            dirty.insert(page);
                        }
                    }
                    (page, entry) = (page + count as u64, entry + count as u64);
                }
            }
            Ok(())
        };
        let read = read();
        self.entries = buffer;
        read.map_err(|error| self.error("read the page map", error))?;
        // A process that ends gives up its memory: that is no answer.
        if self.process.has_exited() { Err(ProcessError::Gone { pid: self.process.pid() }.into()) } else { Ok(()) }
    }
}

impl Tracker for SoftDirtyTracker {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn others_may_write(&self) -> bool {
        false
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        if self.armed.is_none() {
            self.armed = Some(self.open()?);
        }
        let cleared = self.clear();
        if cleared.is_err() {
            self.armed = None;
        }
        cleared
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.find(dirty)?;
        self.clear()
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.find(dirty)
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        self.armed = None;
        self.entries = Vec::new();
        Ok(())
    }
}

/// Whether this kernel has the bits: a page that was just written has one. (Without them clearing succeeds all the same, and nothing is found.)
#[must_use]
pub fn supported() -> bool {
    let written = std::hint::black_box(vec![1_u8; PAGE_SIZE]);
    let address = written.as_ptr() as u64;
    let mut entry = [0; ENTRY];
    let read = File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut entry, address / PAGE_SIZE as u64 * ENTRY as u64));
    read.is_ok() && u64::from_ne_bytes(entry) & SOFT_DIRTY != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Block, Layout};

    /// Own memory, page-aligned, as one block.
    fn tracked(memory: &[u8]) -> (SoftDirtyTracker, usize, u64) {
        let skip = memory.as_ptr().align_offset(PAGE_SIZE);
        let pages = ((memory.len() - skip) / PAGE_SIZE) as u64;
        let layout = Layout::new(vec![Block { name: "a".to_owned(), pages }]).expect("a good layout");
        let map = RangeMap::new(&layout, &[memory.as_ptr() as u64 + skip as u64]).expect("one block");
        let me = PidFd::open(std::process::id()).expect("this process lives");
        (SoftDirtyTracker::new(me, map), skip, pages)
    }

    /// What was written was found, and beyond that only what may share a huge page with it.
    fn assert_found(dirty: &PageSet, written: &[u64], first: u64) {
        let huge = |page: u64| (first + page) / 512;
        assert!(written.iter().all(|&page| dirty.contains(page)), "{written:?} of {} pages", dirty.len());
        let strange = dirty.iter().find(|&page| written.iter().all(|&near| huge(near) != huge(page)));
        assert_eq!(strange, None, "was not written, nor anything near");
    }

    #[test]
    fn finds_what_was_written_since_the_last_harvest_or_refuses_to_be_chosen() {
        let mut memory = vec![1_u8; (ENTRIES + 9) * PAGE_SIZE];
        let (mut tracker, skip, pages) = tracked(&memory);
        let mut dirty = PageSet::empty(pages);
        assert!(matches!(tracker.harvest(&mut dirty), Err(TrackError::NotArmed)));
        tracker.arm().expect("this process may");
        let first = (memory.as_ptr() as u64 + skip as u64) / PAGE_SIZE as u64;
        let wanted = [0, 7, ENTRIES as u64 - 1, ENTRIES as u64, pages - 1];
        for &page in &wanted {
            memory[skip + usize::try_from(page).expect("small") * PAGE_SIZE + 5] = 2;
        }
        std::hint::black_box(&memory);
        tracker.harvest(&mut dirty).expect("this process lives");
        if !supported() {
            println!("skipped: this kernel has no soft-dirty bits");
            assert!(dirty.is_empty());
            return;
        }
        assert_found(&dirty, &wanted, first);
        assert!(dirty.len() < pages / 4);
        dirty.clear();
        memory[skip + 3 * PAGE_SIZE] = 3;
        std::hint::black_box(&memory);
        for _ in 0..2 {
            tracker.peek(&mut dirty).expect("this process lives");
            assert_found(&dirty, &[3], first);
            dirty.clear();
        }
        tracker.harvest(&mut dirty).expect("this process lives");
        assert_found(&dirty, &[3], first);
    }

    #[test]
    fn the_end_of_the_process_is_an_error_and_not_nothing() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("coreutils");
        let process = PidFd::open(child.id()).expect("it lives");
        let layout = Layout::new(vec![Block { name: "a".to_owned(), pages: 4 }]).expect("a good layout");
        let map = RangeMap::new(&layout, &[0x10_0000]).expect("one block");
        let mut tracker = SoftDirtyTracker::new(process, map);
        tracker.arm().expect("root may");
        child.kill().and_then(|()| child.wait()).expect("ours");
        let gone = tracker.harvest(&mut PageSet::empty(4));
        assert!(matches!(gone, Err(TrackError::Process(ProcessError::Gone { .. }))), "{gone:?}");
    }
}
