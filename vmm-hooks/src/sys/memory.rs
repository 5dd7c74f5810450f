//! Shared memory that outlives the process that maps it: a memfd, and guest memory made of such memfds.
//!
//! Promise: no reference into the memory exists. Another process may map and change it at any time, so every access is
//! a relaxed atomic access of a whole aligned word, which no concurrent writer can make undefined. A reader may see a
//! page half written, never more than that. The length is sealed: nobody can shrink the memory below a mapping.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::guest::TwinMemory;
use crate::layout::{Layout, PAGE_SIZE};

/// Bytes in the unit of access.
const WORD: usize = 8;

/// Why shared memory could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {length} bytes of shared memory called {name}")]
pub struct MemoryError {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// What was tried.
    pub what: &'static str,
    /// The kernel's reason.
    #[source]
    pub source: io::Error,
}

/// Memory in a memfd, mapped here, to be mapped elsewhere through its descriptor.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    start: NonNull<AtomicU64>,
    length: usize,
}

// SAFETY: the mapping belongs to the value and may be used from any thread: every access through `start` is atomic, and
// the mapping is removed by `drop` alone, which has the only reference.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; methods with `&self` make atomic accesses only.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes `length` bytes of zeroes, called `name` (for `/proc/PID/fd`, at most 249 bytes are kept). Memory is taken
    /// as it is written. `length` is rounded up to whole pages.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If `length` is zero or beyond the address space.
    pub fn new(name: &str, length: u64) -> Result<Self, MemoryError> {
        let page = PAGE_SIZE as u64;
        let length = length.next_multiple_of(page);
        assert!(length > 0, "shared memory without a byte");
        let bytes = usize::try_from(length).expect("lengths are 64 bits wide");
        let failed = |what: &'static str| {
            let name = name.to_owned();
            move |source: rustix::io::Errno| MemoryError { name, length, what, source: source.into() }
        };
        let mut short: String = name.to_owned();
        short.truncate((0..=MAX_NAME.min(name.len())).rev().find(|&i| name.is_char_boundary(i)).unwrap_or(0));
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(short.as_str(), flags).map_err(failed("make"))?;
        rustix::fs::ftruncate(&fd, length).map_err(failed("size"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(failed("seal"))?;
        let start = map(&fd, bytes).map_err(failed("map"))?;
        Ok(Self { fd, start, length: bytes })
    }

    /// Maps memory that another process made by [`SharedMemory::new`] and passed on.
    ///
    /// # Errors
    /// If it is not such memory, or the kernel refuses.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let length = u64::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        let sealed = rustix::fs::fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !sealed || length == 0 || !length.is_multiple_of(PAGE_SIZE as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is no shared memory of a fixed length"));
        }
        let bytes = usize::try_from(length).expect("lengths are 64 bits wide");
        let start = map(&fd, bytes)?;
        Ok(Self { fd, start, length: bytes })
    }

    /// The word at place `index`, in words of eight bytes; all who have the memory see the same one.
    ///
    /// # Panics
    /// If it is outside.
    #[must_use]
    pub fn word(&self, index: usize) -> &AtomicU64 {
        &self.words()[index]
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// The descriptor that others map it by.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `length` bytes, is page-aligned, lives as long as `self`, cannot shrink (sealed) and is
        // initialised (zeroes). `AtomicU64` may be changed by others at any time while shared references to it exist.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length / WORD) }
    }

    fn range(&self, offset: u64, length: usize) -> Range<usize> {
        let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(length)?));
        range.filter(|range| range.end <= self.length).unwrap_or_else(|| {
            panic!("{length} bytes at {offset} are outside of {} bytes of shared memory", self.length)
        })
    }

    /// Copies from `offset` on to `into`.
    ///
    /// # Panics
    /// If the range is outside.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let range = self.range(offset, into.len());
        let words = self.words();
        let (mut at, mut into) = (range.start, into);
        while !into.is_empty() {
            if at % WORD == 0 && into.len() >= WORD {
                let (whole, rest) = into.as_chunks_mut::<WORD>();
                for (bytes, word) in whole.iter_mut().zip(&words[at / WORD..]) {
                    *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
                }
                at += whole.len() * WORD;
                into = rest;
            } else {
                let length = (WORD - at % WORD).min(into.len());
                let bytes = words[at / WORD].load(Ordering::Relaxed).to_ne_bytes();
                let (head, rest) = into.split_at_mut(length);
                head.copy_from_slice(&bytes[at % WORD..at % WORD + length]);
                at += length;
                into = rest;
            }
        }
    }

    /// Copies `bytes` to `offset` on.
    ///
    /// # Panics
    /// If the range is outside.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let range = self.range(offset, bytes.len());
        let words = self.words();
        let (mut at, mut bytes) = (range.start, bytes);
        while !bytes.is_empty() {
            if at % WORD == 0 && bytes.len() >= WORD {
                let (whole, rest) = bytes.as_chunks::<WORD>();
                for (bytes, word) in whole.iter().zip(&words[at / WORD..]) {
                    word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
                }
                at += whole.len() * WORD;
                bytes = rest;
            } else {
                // Part of a word: its other bytes may be written by another thread meanwhile, so they must not be lost.
                let (head, rest) = bytes.split_at((WORD - at % WORD).min(bytes.len()));
                let place = at % WORD..at % WORD + head.len();
                let changed = |word: u64| {
                    let mut word = word.to_ne_bytes();
                    word[place.clone()].copy_from_slice(head);
                    Some(u64::from_ne_bytes(word))
                };
                let stored = words[at / WORD].fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
                assert!(stored.is_ok(), "the change is never refused");
                at += head.len();
                bytes = rest;
            }
        }
    }

    /// Sets `length` bytes from `offset` on to zero. Whole pages are given back to the kernel where it takes them.
    ///
    /// # Panics
    /// If the range is outside.
    pub fn zero(&self, offset: u64, length: usize) {
        let range = self.range(offset, length);
        if length == 0 || rustix::fs::fallocate(&self.fd, punch(), offset, length as u64).is_ok() {
            return;
        }
        const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        for start in range.clone().step_by(PAGE_SIZE) {
            self.write(start as u64, &ZEROES[..PAGE_SIZE.min(range.end - start)]);
        }
    }
}

fn map(fd: &OwnedFd, bytes: usize) -> rustix::io::Result<NonNull<AtomicU64>> {
    // SAFETY: the kernel chooses the place of a new mapping (null hint, no MAP_FIXED), so no memory of ours changes.
    let start = unsafe {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0)
    }?;
    Ok(NonNull::new(start.cast()).expect("a mapping is never at address zero"))
}

/// Bytes that the kernel keeps of a memfd's name.
const MAX_NAME: usize = 249;

fn punch() -> FallocateFlags {
    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this start and length, nobody else unmaps it, and no borrow of it is
        // left, for `self` is borrowed exclusively.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(result.is_ok(), "a mapping of ours can be unmapped");
    }
}

/// Guest memory on the standby: one [`SharedMemory`] a block of the layout.
#[derive(Debug)]
pub struct BlockMemory {
    layout: Layout,
    blocks: Vec<Option<SharedMemory>>,
}

impl BlockMemory {
    /// Makes zeroed memory for `layout`; descriptors are called `NAME/BLOCK`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(name: &str, layout: &Layout) -> Result<Self, MemoryError> {
        let make = |block: &crate::layout::Block| match block.pages {
            0 => Ok(None),
            pages => SharedMemory::new(&format!("{name}/{}", block.name), pages * PAGE_SIZE as u64).map(Some),
        };
        let blocks = layout.blocks().iter().map(make).collect::<Result<_, _>>()?;
        Ok(Self { layout: layout.clone(), blocks })
    }

    /// The layout that it was made for.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory of block `index` of the layout; `None` if the block has no page.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block(&self, index: usize) -> Option<&SharedMemory> {
        self.blocks[index].as_ref()
    }

    fn locate(&self, page: u64) -> (&SharedMemory, u64) {
        let place = self.layout.locate(page);
        let (index, within) = place.unwrap_or_else(|| panic!("page {page} of {}", self.layout.pages()));
        (self.blocks[index].as_ref().expect("a block with a page has memory"), within * PAGE_SIZE as u64)
    }
}

impl TwinMemory for BlockMemory {
    fn pages(&self) -> u64 {
        self.layout.pages()
    }

    fn write(&self, page: u64, offset: usize, bytes: &[u8]) {
        assert!(
            offset <= PAGE_SIZE && bytes.len() <= PAGE_SIZE - offset,
            "{} bytes at {offset} leave the page",
            bytes.len()
        );
        let (memory, start) = self.locate(page);
        memory.write(start + offset as u64, bytes);
    }

    fn read(&self, page: u64, into: &mut [u8]) {
        assert_eq!(into.len(), PAGE_SIZE, "a page is read whole");
        let (memory, start) = self.locate(page);
        memory.read(start, into);
    }

    fn zero(&self, page: u64) {
        let (memory, start) = self.locate(page);
        memory.zero(start, PAGE_SIZE);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use proptest::prelude::*;

    use super::*;
    use crate::layout::Block;

    fn file(memory: &SharedMemory) -> std::fs::File {
        memory.fd().try_clone_to_owned().expect("a descriptor").into()
    }

    #[test]
    fn whole_zeroed_pages_are_given_back() {
        let memory = SharedMemory::new("test", 64 * PAGE_SIZE as u64).expect("a small one");
        memory.write(0, &vec![1; 64 * PAGE_SIZE]);
        let full = file(&memory).metadata().expect("a file").blocks();
        memory.zero(8 * PAGE_SIZE as u64, 32 * PAGE_SIZE);
        let less = file(&memory).metadata().expect("a file").blocks();
        assert!(less <= full / 2, "{full} blocks, then {less}");
        let mut page = vec![9; PAGE_SIZE];
        memory.read(20 * PAGE_SIZE as u64, &mut page);
        assert!(page.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn it_outlives_its_mapping_and_cannot_be_resized() {
        let memory = SharedMemory::new("test", 1).expect("a small one");
        assert_eq!(memory.length(), PAGE_SIZE as u64);
        memory.write(77, b"still here");
        let file = file(&memory);
        drop(memory);
        let mut bytes = [0; 10];
        file.read_exact_at(&mut bytes, 77).expect("it is as long");
        assert_eq!(&bytes, b"still here");
        file.set_len(0).expect_err("it is sealed");
        file.set_len(1 << 20).expect_err("it is sealed");
        let again = SharedMemory::from_fd(file.into()).expect("it is such memory");
        again.read(77, &mut bytes[..5]);
        assert_eq!(&bytes[..5], b"still");
        again.word(1).store(u64::MAX, Ordering::Relaxed);
        again.read(15, &mut bytes[..2]);
        assert_eq!(bytes[..2], [0xff, 0]);
        let other = tempfile::tempfile().expect("a file");
        other.set_len(PAGE_SIZE as u64).expect("room");
        SharedMemory::from_fd(other.into()).expect_err("who made this could cut it off below the mapping");
    }

    #[test]
    fn threads_that_write_neighbouring_bytes_do_not_harm_each_other() {
        let memory = SharedMemory::new("test", 1).expect("a small one");
        std::thread::scope(|scope| {
            for lane in 0..8_u8 {
                let memory = &memory;
                scope.spawn(move || (0..20_000_u32).for_each(|_| memory.write(lane.into(), &[lane + 1])));
            }
        });
        let mut bytes = [0; 8];
        memory.read(0, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn pages_of_all_blocks_are_apart() {
        let block = |name: &str, pages| Block { name: name.to_owned(), pages };
        let layout = Layout::new(vec![block("a", 2), block("none", 0), block("b", 1)]).expect("a good layout");
        let memory = BlockMemory::new("test", &layout).expect("small ones");
        for page in 0..memory.pages() {
            memory.write(page, 3, &[u8::try_from(page).expect("small") + 1]);
        }
        memory.zero(1);
        let first = |page| {
            let mut bytes = vec![0; PAGE_SIZE];
            memory.read(page, &mut bytes);
            bytes[3]
        };
        assert_eq!([first(0), first(1), first(2)], [1, 0, 3]);
        assert!(memory.block(1).is_none());
        assert_eq!(memory.block(2).map(SharedMemory::length), Some(PAGE_SIZE as u64));
    }

    #[test]
    #[should_panic(expected = "leave the page")]
    fn a_write_past_a_page_panics() {
        let layout = Layout::new(vec![Block { name: "a".to_owned(), pages: 2 }]).expect("a good layout");
        BlockMemory::new("test", &layout).expect("a small one").write(0, PAGE_SIZE - 1, &[1, 2]);
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_vector(acts in prop::collection::vec((0_u8..3, 0..3 * PAGE_SIZE, 0..5000_usize, any::<u8>()), 1..30)) {
            let length = 3 * PAGE_SIZE;
            let memory = SharedMemory::new("test", length as u64).expect("a small one");
            let mut model = vec![0_u8; length];
            for (what, offset, count, value) in acts {
                let range = offset..(offset + count).min(length);
                match what {
                    0 => {
                        let bytes: Vec<u8> = range.clone().map(|i| value ^ u8::try_from(i % 256).expect("small")).collect();
                        memory.write(offset as u64, &bytes);
                        model[range].copy_from_slice(&bytes);
                    }
                    1 => {
                        memory.zero(offset as u64, range.len());
                        model[range].fill(0);
                    }
                    _ => {
                        let mut bytes = vec![value; range.len()];
                        memory.read(offset as u64, &mut bytes);
                        prop_assert!(bytes == model[range]);
                    }
                }
            }
        }
    }
}
