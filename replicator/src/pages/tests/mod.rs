//! Tests of the whole pipeline: a simulated guest, the encoder, the stager, and the standby's memory.

mod disks;
mod history;
mod hostile;

use std::sync::Mutex;

use bytes::Bytes;
use vmm_hooks::guest::{Capture, TwinMemory};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use super::decode::{StageError, Stager};
use super::frame::StreamId;
use super::staged::{DeviceState, StagedEpoch};

/// More than any test needs.
const LIMIT: usize = 8 << 20;

/// Standby memory that can be made to stop: after so many more writes it ignores everything, like an agent that has died.
#[derive(Debug)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    writes_left: Mutex<Option<u64>>,
}

impl Memory {
    fn new(pages: u64) -> Self {
        let length = usize::try_from(pages).expect("small") * PAGE_SIZE;
        // Not zeroes: what the stream does not say must not be taken for granted.
        Self { bytes: Mutex::new(vec![0xA5; length]), writes_left: Mutex::new(None) }
    }

    fn die_after(&self, writes: Option<u64>) {
        *self.writes_left.lock().expect("no panic") = writes;
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().expect("no panic").clone()
    }

    fn put(&self, page: u64, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE_SIZE, "a write past the page");
        let mut left = self.writes_left.lock().expect("no panic");
        match &mut *left {
            Some(0) => return,
            Some(left) => *left -= 1,
            None => {}
        }
        let start = usize::try_from(page).expect("small") * PAGE_SIZE + offset;
        self.bytes.lock().expect("no panic")[start..start + bytes.len()].copy_from_slice(bytes);
    }
}

impl TwinMemory for Memory {
    fn pages(&self) -> u64 {
        (self.bytes.lock().expect("no panic").len() / PAGE_SIZE) as u64
    }

    fn write(&self, page: u64, offset: usize, bytes: &[u8]) {
        self.put(page, offset, bytes);
    }

    fn read(&self, page: u64, into: &mut [u8]) {
        let start = usize::try_from(page).expect("small") * PAGE_SIZE;
        into.copy_from_slice(&self.bytes.lock().expect("no panic")[start..start + PAGE_SIZE]);
    }

    fn zero(&self, page: u64) {
        self.put(page, 0, &[0; PAGE_SIZE]);
    }
}

/// A guest's memory and device state, with the pages written since the last capture.
struct Machine {
    memory: Vec<u8>,
    device: Vec<u8>,
    dirty: PageSet,
}

impl Machine {
    fn new(pages: u64) -> Self {
        let length = usize::try_from(pages).expect("small") * PAGE_SIZE;
        Self { memory: vec![0; length], device: vec![1; 5000], dirty: PageSet::full(pages) }
    }

    fn write(&mut self, page: u64, offset: usize, bytes: &[u8]) {
        let start = usize::try_from(page).expect("small") * PAGE_SIZE + offset;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
        self.dirty.insert(page);
    }

    fn bytes_of(&self, pages: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &page in pages {
            let start = usize::try_from(page).expect("small") * PAGE_SIZE;
            bytes.extend_from_slice(&self.memory[start..start + PAGE_SIZE]);
        }
        bytes
    }

    fn capture(&mut self) -> Capture {
        let pages: Vec<u64> = self.dirty.iter().collect();
        self.dirty.clear();
        Capture { bytes: self.bytes_of(&pages), pages, device: self.device.clone(), ..Capture::default() }
    }
}

fn id(epoch: u64) -> StreamId {
    StreamId { vm: *b"0123456789abcdef", generation: 3, incarnation: 4, epoch, binding: true, sync: false }
}

fn page_set(capacity: u64, pages: &[u64]) -> PageSet {
    let mut set = PageSet::empty(capacity);
    for &page in pages {
        set.insert(page);
    }
    set
}

/// Gives a stream to a stager in pieces of `piece` bytes.
fn stage(
    stream: &[Bytes],
    pages: u64,
    previous: Option<DeviceState>,
    piece: usize,
    limit: usize,
) -> Result<StagedEpoch, StageError> {
    let mut stager = Stager::new(pages, previous, limit);
    for piece in stream.concat().chunks(piece) {
        stager.push(piece)?;
    }
    stager.finish()
}

/// Bytes that LZ4 cannot pack.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..length).map(|_| random.below(256).to_le_bytes()[0]).collect()
}

/// A small deterministic source of numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }
}
