//! The memory that a microVM's process and its protector both have: what the machine shows of itself, the pages that were found dirty, the
//! device state of a capture, copies of the pages of a small one, and disk writes on their way. And a bell that the process rings when what is shown is
//! waited for.
//!
//! Promise: who looks, and then waits for the bell, misses nothing that is rung for. Each word is of one writer, or is joined by atomic operations; what a process that was broken into writes here can make its protector
//! lose this guest's pages, and nothing else.
//!
//! Layout: a page of words, the bitmap, the state, the copies, the writes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::time::{ClockId, clock_gettime};

use crate::disk::{DiskChange, DiskWrite};
use crate::kvm::ram::add_word;
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::memory::SharedMemory;

/// What is shown, each by one word.
#[derive(Debug, Clone, Copy)]
pub(in crate::kvm) enum Shown {
    /// Whether vCPUs run ([`RUNS`]), the guest has shut itself down or the machine has ended ([`OVER`]).
    Run = 0,
    /// 1: events wait to be taken.
    Events,
    /// Whether output is held or dropped.
    Closed,
    HeldFrames,
    HeldBytes,
    /// When the oldest held frame was emitted, by the monotonic clock; 0: there is none.
    HeldSince,
    Released,
    Dropped,
    /// When the first frame of the epoch that is not sealed was emitted; 0: there is none.
    First,
    /// What a protector has left: [`MIRRORED`], [`TRACKED`].
    Left,
    /// 1: the protector waits for vCPUs that have nothing to do. The one of these words that it writes.
    Watched,
}

pub(in crate::kvm) const RUNS: u64 = 1;
pub(in crate::kvm) const OVER: u64 = 2;
pub(super) const MIRRORED: u64 = 1;
pub(super) const TRACKED: u64 = 2;

/// A word for each vCPU: 1 if it waits, and nothing happened that ends its wait.
const VCPUS: usize = 64;
/// Most vCPUs.
pub(super) const CPUS_MAX: u64 = 128;
const WORD: usize = 8;
/// Room for the state of devices, and of each vCPU.
const STATE: u64 = 1 << 20;
const STATE_OF_VCPU: u64 = 64 << 10;
/// Most pages that a process copies itself, to go on by itself: more are not worth that they are copied thrice.
pub(super) const FEW: usize = 128;
/// Room for their copies.
const COPIES: u64 = (FEW * PAGE_SIZE) as u64;
/// Room for writes: more than the longest and its head.
const WRITES: usize = 8 << 20;
const HEAD: usize = 24;

/// Nanoseconds of the monotonic clock, which both processes have. Never 0.
pub(in crate::kvm) fn nanos() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let whole = u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000);
    whole.saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0)).max(1)
}

/// When it was `nanos` of the monotonic clock; `None`: never, as 0 says.
pub(super) fn instant(nanos: u64) -> Option<Instant> {
    if nanos == 0 {
        return None;
    }
    let ago = self::nanos().saturating_sub(nanos);
    let now = Instant::now();
    Some(now.checked_sub(Duration::from_nanos(ago)).unwrap_or(now))
}

/// The bytes that go with the head of a write.
fn data(write: &DiskWrite) -> &[u8] {
    if let DiskChange::Data(data) = &write.change { data } else { &[] }
}

/// The memory.
#[derive(Debug)]
pub(in crate::kvm) struct Board {
    memory: SharedMemory,
    /// An eventfd that does not wait.
    bell: OwnedFd,
    bitmap: usize,
    bitmap_words: usize,
    state: u64,
    state_max: usize,
    copies: u64,
    writes: u64,
}

impl Board {
    fn place(memory: SharedMemory, bell: OwnedFd, cpus: u64, pages: u64) -> Option<Self> {
        let words = usize::try_from(pages.div_ceil(64)).ok()?;
        let page = PAGE_SIZE as u64;
        let bitmap = page;
        let state = bitmap + (words as u64 * WORD as u64).next_multiple_of(page);
        let state_max = STATE + cpus.min(CPUS_MAX) * STATE_OF_VCPU;
        let copies = state + state_max;
        let writes = copies + COPIES;
        (memory.length() == writes + WRITES as u64).then(|| Self {
            memory,
            bell,
            bitmap: PAGE_SIZE / WORD,
            bitmap_words: words,
            state,
            state_max: usize::try_from(state_max).expect("bounded"),
            copies,
            writes,
        })
    }

    fn bytes(cpus: u64, pages: u64) -> u64 {
        let bitmap = (pages.div_ceil(64) * WORD as u64).next_multiple_of(PAGE_SIZE as u64);
        PAGE_SIZE as u64 + bitmap + STATE + cpus.min(CPUS_MAX) * STATE_OF_VCPU + COPIES + WRITES as u64
    }

    /// One for a machine with so many vCPUs and pages.
    pub(super) fn new(name: &str, cpus: u64, pages: u64) -> io::Result<Self> {
        let memory = SharedMemory::new(&format!("{name}/board"), Self::bytes(cpus, pages)).map_err(io::Error::other)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self::place(memory, bell, cpus, pages).expect("made for it"))
    }

    /// The same one, from the other side. `None`: it is not for such a machine.
    pub(super) fn of(memory: SharedMemory, bell: OwnedFd, cpus: u64, pages: u64) -> Option<Self> {
        Self::place(memory, bell, cpus, pages)
    }

    /// Its memory and its bell, to be passed on.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.memory.fd(), self.bell.as_fd()]
    }

    /// Rings: what somebody may wait for is shown.
    pub(in crate::kvm) fn ring(&self) {
        // It fails if it has rung often enough already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Waits until it rings, at most until `deadline`; false: it is past that. To be looked again after each.
    pub(super) fn wait_for_ring(&self, deadline: Instant) -> bool {
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        let Some(timeout) = left.and_then(|left| Timespec::try_from(left).ok()) else { return false };
        // An error is looked at again, until the deadline.
        if let Ok(1..) = poll(&mut [PollFd::new(&self.bell, PollFlags::IN)], Some(&timeout)) {
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
        true
    }

    pub(in crate::kvm) fn show(&self, what: Shown, value: u64) {
        self.memory.word(what as usize).store(value, SeqCst);
    }

    pub(in crate::kvm) fn shown(&self, what: Shown) -> u64 {
        self.memory.word(what as usize).load(SeqCst)
    }

    /// Whether vCPU `number` waits, and nothing happened that ends its wait.
    pub(in crate::kvm) fn show_vcpu(&self, number: usize, waits: bool) {
        if (number as u64) < CPUS_MAX {
            self.memory.word(VCPUS + number).store(waits.into(), SeqCst);
            // Who watches has said so before it looked: it sees this word, or is seen here.
            if waits && self.shown(Shown::Watched) != 0 {
                self.ring();
            }
        }
    }

    /// Whether the first `cpus` vCPUs wait; waits for that at most for `most`.
    pub(super) fn wait_idle(&self, cpus: u64, most: Duration) -> bool {
        let cpus = usize::try_from(cpus.min(CPUS_MAX)).expect("few");
        let idle = || (0..cpus).all(|number| self.memory.word(VCPUS + number).load(SeqCst) == 1);
        if idle() {
            return true;
        }
        let deadline = Instant::now() + most;
        self.show(Shown::Watched, 1);
        while !idle() && self.wait_for_ring(deadline) {}
        self.show(Shown::Watched, 0);
        idle()
    }

    /// Adds pages that were found.
    pub(super) fn add_found(&self, dirty: &PageSet) {
        for (index, &word) in dirty.words().iter().take(self.bitmap_words).enumerate().filter(|&(_, &word)| word != 0) {
            self.memory.word(self.bitmap + index).fetch_or(word, SeqCst);
        }
    }

    /// Moves the pages that were found to `dirty`.
    pub(super) fn take_found(&self, dirty: &mut PageSet) {
        for index in 0..self.bitmap_words {
            let word = self.memory.word(self.bitmap + index);
            if word.load(SeqCst) != 0 {
                add_word(dirty, index, word.swap(0, SeqCst));
            }
        }
    }

    /// The same, and they stay.
    pub(super) fn look_at_found(&self, dirty: &mut PageSet) {
        for index in 0..self.bitmap_words {
            add_word(dirty, index, self.memory.word(self.bitmap + index).load(SeqCst));
        }
    }

    /// Whether there is room for a state of so many bytes.
    pub(super) fn takes_state(&self, bytes: usize) -> bool {
        bytes <= self.state_max
    }

    /// Puts a state there. False: it is too long.
    pub(super) fn put_state(&self, bytes: &[u8]) -> bool {
        let takes = self.takes_state(bytes.len());
        if takes {
            self.memory.write(self.state, bytes);
        }
        takes
    }

    /// Reads a state of so many bytes into `into`, which is cleared. False: none is so long.
    pub(super) fn read_state(&self, bytes: u64, into: &mut Vec<u8>) -> bool {
        let Some(length) = usize::try_from(bytes).ok().filter(|&length| length <= self.state_max) else { return false };
        into.resize(length, 0);
        self.memory.read(self.state, into);
        true
    }

    /// Puts copies of pages there, at most [`FEW`].
    pub(super) fn put_copies(&self, bytes: &[u8]) {
        assert!(bytes.len() <= FEW * PAGE_SIZE, "too many pages");
        self.memory.write(self.copies, bytes);
    }

    /// Reads the copies of so many pages into `into`, which gets their length. False: there are never so many.
    pub(super) fn read_copies(&self, pages: usize, into: &mut Vec<u8>) -> bool {
        if pages > FEW {
            return false;
        }
        into.resize(pages * PAGE_SIZE, 0);
        self.memory.read(self.copies, into);
        true
    }

    /// Whether there is room for all of the writes at once.
    pub(super) fn takes_writes(writes: &std::collections::VecDeque<DiskWrite>) -> bool {
        let mut at = 0;
        writes.iter().all(|write| {
            let end = at + HEAD + data(write).len();
            at = end.next_multiple_of(WORD);
            end <= WRITES
        })
    }

    /// Puts as many of the writes there as there is room for, and takes them away; how many.
    pub(super) fn put_writes(&self, writes: &mut std::collections::VecDeque<DiskWrite>) -> u32 {
        let (mut at, mut count) = (0, 0);
        while let Some(write) = writes.front() {
            let data = data(write);
            if at + HEAD + data.len() > WRITES {
                break;
            }
            let kind = u32::from(matches!(write.change, DiskChange::Data(_)));
            let mut head = [0; HEAD];
            head[..4].copy_from_slice(&write.disk.to_le_bytes());
            head[4..8].copy_from_slice(&kind.to_le_bytes());
            head[8..16].copy_from_slice(&write.offset.to_le_bytes());
            head[16..].copy_from_slice(&write.bytes().to_le_bytes());
            self.memory.write(self.writes + at as u64, &head);
            self.memory.write(self.writes + (at + HEAD) as u64, data);
            // Heads begin at whole words.
            at = (at + HEAD + data.len()).next_multiple_of(WORD);
            count += 1;
            writes.pop_front();
        }
        count
    }

    /// Reads so many writes to disks of these sizes, to the end of `into`; how much of the board they take.
    pub(super) fn read_writes(
        &self,
        count: u32,
        sizes: &[u64],
        into: &mut Vec<DiskWrite>,
    ) -> Result<usize, &'static str> {
        let mut at = 0;
        for _ in 0..count {
            let mut head = [0; HEAD];
            if at + HEAD > WRITES {
                return Err("more writes than there is room for");
            }
            self.memory.read(self.writes + at as u64, &mut head);
            let number = |start: usize| u32::from_le_bytes(head[start..start + 4].try_into().expect("four"));
            let long = |start: usize| u64::from_le_bytes(head[start..start + 8].try_into().expect("eight"));
            let (disk, kind, offset, bytes) = (number(0), number(4), long(8), long(16));
            let size = sizes.get(disk as usize).ok_or("a write to no disk")?;
            if bytes == 0 || offset.checked_add(bytes).is_none_or(|end| end > *size) {
                return Err("a write outside of its disk");
            }
            at += HEAD;
            let change = if kind == 0 {
                DiskChange::Zero(bytes)
            } else {
                let length = usize::try_from(bytes).ok().filter(|&length| length <= WRITES - at);
                let length = length.ok_or("a write that is longer than there is room for")?;
                let mut data = vec![0; length];
                self.memory.read(self.writes + at as u64, &mut data);
                at = (at + length).next_multiple_of(WORD);
                DiskChange::Data(data)
            };
            into.push(DiskWrite { disk, offset, change });
        }
        Ok(at)
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn put_raw_writes(&self, bytes: &[u8]) {
        self.memory.write(self.writes, bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn pages_are_found_until_they_are_taken_and_the_other_side_has_the_same() {
        let ours = Board::new("test", 2, 130).expect("a small one");
        let theirs = |cpus, pages| {
            let [memory, bell] = ours.fds().map(|fd| fd.try_clone_to_owned().expect("a descriptor"));
            Board::of(SharedMemory::from_fd(memory).expect("it is"), bell, cpus, pages)
        };
        assert!(theirs(2, 1 << 20).is_none(), "for another machine");
        let theirs = theirs(2, 130).expect("the same machine");
        let mut dirty = PageSet::empty(130);
        dirty.insert(3);
        theirs.add_found(&dirty);
        dirty.clear();
        dirty.insert(129);
        theirs.add_found(&dirty);
        let mut found = PageSet::empty(130);
        ours.look_at_found(&mut found);
        assert_eq!(found.iter().collect::<Vec<_>>(), [3, 129]);
        found.clear();
        ours.take_found(&mut found);
        assert_eq!(found.iter().collect::<Vec<_>>(), [3, 129]);
        found.clear();
        ours.take_found(&mut found);
        assert!(found.is_empty(), "they come once");
        theirs.show_vcpu(0, true);
        assert!(ours.wait_idle(1, Duration::ZERO) && !ours.wait_idle(2, Duration::ZERO));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| ours.wait_idle(2, Duration::from_secs(30)));
            while theirs.shown(Shown::Watched) == 0 {
                std::thread::yield_now();
            }
            theirs.show_vcpu(1, false);
            theirs.show_vcpu(1, true);
            assert!(waits.join().expect("it does not panic"), "rung for");
        });
        assert!(theirs.put_state(&[7; 1000]) && !theirs.put_state(&vec![0; 2 << 20]));
        let mut state = vec![1; 5000];
        assert!(ours.read_state(1000, &mut state) && state == [7; 1000] && !ours.read_state(2 << 20, &mut state));
        theirs.put_copies(&[9; 2 * PAGE_SIZE]);
        let mut copies = vec![1; 7 * PAGE_SIZE];
        assert!(ours.read_copies(2, &mut copies) && copies == [9; 2 * PAGE_SIZE]);
        assert!(ours.read_copies(FEW, &mut copies) && !ours.read_copies(FEW + 1, &mut copies));
        assert!(ours.read_state(1000, &mut state) && state == [7; 1000], "they are apart");
    }

    #[test]
    fn writes_come_in_their_order_in_as_many_parts_as_it_takes() {
        let board = Board::new("test", 1, 64).expect("a small one");
        let write = |number: u64| DiskWrite {
            disk: 0,
            offset: number * 512,
            change: if number == 4 { DiskChange::Zero(512) } else { DiskChange::Data(vec![1; 3 << 20]) },
        };
        let all: Vec<DiskWrite> = (0..9).map(write).collect();
        let mut waiting: VecDeque<DiskWrite> = all.iter().cloned().collect();
        let (mut read, mut parts) = (Vec::new(), 0);
        while !waiting.is_empty() {
            let takes = Board::takes_writes(&waiting);
            let count = board.put_writes(&mut waiting);
            assert_eq!(takes, waiting.is_empty(), "it is known before");
            assert!(count > 0, "one at least");
            board.read_writes(count, &[16 << 20], &mut read).expect("they are inside");
            parts += 1;
        }
        assert!(read == all && parts > 1, "{parts} parts");
        let mut outside = VecDeque::from([write(1)]);
        assert_eq!(board.put_writes(&mut outside), 1);
        board.read_writes(1, &[1 << 20], &mut read).expect_err("the disk is smaller");
        board.read_writes(1, &[], &mut read).expect_err("there is no disk");
    }
}
