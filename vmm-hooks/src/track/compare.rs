//! The tracker that always works: it keeps a copy of all guest memory and compares.
//!
//! A full copy, not a hash: a page whose change a hash does not see would be lost. It costs the guest's memory once more,
//! and the time to read all of it in each harvest, so it is the fallback.

use super::{RangeMap, TrackError, Tracker};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::process::ProcessMemory;

/// Pages read from the process in one go.
const CHUNK_PAGES: u64 = 256;

/// Compares the memory of a process with a private copy.
#[derive(Debug)]
pub struct CompareTracker {
    memory: ProcessMemory,
    map: RangeMap,
    /// A page's bytes as of the last arming or harvest, in page order; empty while not armed.
    copy: Vec<u8>,
    chunk: Vec<u8>,
}

impl CompareTracker {
    /// A tracker of the pages of `map` in `memory`. Takes no memory before it is armed.
    #[must_use]
    pub fn new(memory: ProcessMemory, map: RangeMap) -> Self {
        Self { memory, map, copy: Vec::new(), chunk: Vec::new() }
    }

    /// Reads all memory, chunk by chunk, and hands out (page number, its bytes now, its bytes in the copy).
    fn each(&mut self, mut visit: impl FnMut(u64, &[u8], &mut [u8])) -> Result<(), TrackError> {
        if self.copy.is_empty() {
            return Err(TrackError::NotArmed);
        }
        for segment in self.map.segments() {
            let mut first = segment.pages.start;
            while first < segment.pages.end {
                let count = CHUNK_PAGES.min(segment.pages.end - first);
                let now = bytes(count);
                self.chunk.resize(now, 0);
                let address = segment.addresses.start + (first - segment.pages.start) * PAGE_SIZE as u64;
                self.memory.read(address, &mut self.chunk)?;
                let copy = &mut self.copy[bytes(first)..][..now];
                for ((page, now), then) in
                    (first..).zip(self.chunk.chunks_exact(PAGE_SIZE)).zip(copy.chunks_exact_mut(PAGE_SIZE))
                {
                    visit(page, now, then);
                }
                first += count;
            }
        }
        Ok(())
    }
}

fn bytes(pages: u64) -> usize {
    usize::try_from(pages).expect("lengths are 64 bits wide") * PAGE_SIZE
}

impl Tracker for CompareTracker {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        self.copy.resize(bytes(self.map.pages()), 0);
        let result = self.each(|_, now, then| then.copy_from_slice(now));
        if result.is_err() {
            self.copy = Vec::new();
        }
        result
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.each(|page, now, then| {
            if now != then {
                dirty.insert(page);
                then.copy_from_slice(now);
            }
        })
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.each(|page, now, then| {
            if now != then {
                dirty.insert(page);
            }
        })
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        self.copy = Vec::new();
        self.chunk = Vec::new();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Block, Layout};
    use crate::sys::memory::SharedMemory;
    use crate::sys::process::PidFd;

    /// Where `memory` is mapped in this process, found by its name.
    fn address(name: &str) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("proc");
        let line = maps.lines().find(|line| line.contains(name)).expect("it is mapped");
        u64::from_str_radix(line.split('-').next().expect("a range"), 16).expect("an address")
    }

    #[test]
    fn finds_each_changed_page_once_and_needs_no_arming_again() {
        let pages = 2 * CHUNK_PAGES + 3;
        let memory = SharedMemory::new("compare-test", pages * PAGE_SIZE as u64).expect("a small one");
        let layout = Layout::new(vec![Block { name: "a".to_owned(), pages }]).expect("a good layout");
        let map = RangeMap::new(&layout, &[address("compare-test")]).expect("one block");
        let me = PidFd::open(std::process::id()).expect("this process lives");
        let mut tracker = CompareTracker::new(ProcessMemory::new(me), map);
        let mut dirty = PageSet::empty(pages);
        let early = tracker.harvest(&mut dirty);
        assert!(matches!(early, Err(TrackError::NotArmed)), "{early:?}");
        memory.write(5, &[1]);
        tracker.arm().expect("it can be read");
        let last = pages - 1;
        for page in [0, CHUNK_PAGES, last] {
            memory.write(page * PAGE_SIZE as u64 + 4095, &[7]);
        }
        tracker.peek(&mut dirty).expect("it can be read");
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [0, CHUNK_PAGES, last]);
        dirty.clear();
        tracker.harvest(&mut dirty).expect("it can be read");
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [0, CHUNK_PAGES, last]);
        dirty.clear();
        tracker.harvest(&mut dirty).expect("it can be read");
        assert!(dirty.is_empty());
        tracker.disarm().expect("nothing to leave");
    }
}
