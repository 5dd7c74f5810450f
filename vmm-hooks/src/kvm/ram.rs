//! Guest memory: a memfd mapped here, with marks of what the VMM itself writes.
//!
//! KVM's log knows the guest's own writes. What a device of ours writes goes through `vm-memory`, which marks it in [`Marks`]; every
//! harvest joins both.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::memory::SharedMemory;

/// Most memory of a guest: it ends before the addresses of devices, and KVM's log takes it in one piece.
pub const BYTES_MAX: u64 = 3 << 30;

/// Guest memory as virtio queues and loaders take it.
pub(crate) type Memory = GuestMemoryMmap<Marks>;

/// One bit a page that the VMM wrote.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    words: Vec<AtomicU64>,
}

impl NewBitmap for Marks {
    fn with_len(bytes: usize) -> Self {
        let words = bytes.div_ceil(PAGE_SIZE).div_ceil(64);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl<'a> WithBitmapSlice<'a> for Marks {
    type S = RefSlice<'a, Marks>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, length: usize) {
        if length == 0 {
            return;
        }
        let last = offset.saturating_add(length - 1) / PAGE_SIZE;
        for page in offset / PAGE_SIZE..=last {
            if let Some(word) = self.words.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        self.words.get(page / 64).is_some_and(|word| word.load(Ordering::SeqCst) & 1 << (page % 64) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Marks> {
        RefSlice::new(self, offset)
    }
}

/// Adds the pages in a word of a bitmap.
pub(super) fn add_word(dirty: &mut PageSet, index: usize, mut word: u64) {
    while word != 0 {
        let page = index as u64 * 64 + u64::from(word.trailing_zeros());
        // A log has whole words, memory need not.
        if page < dirty.capacity() {
            dirty.insert(page);
        }
        word &= word - 1;
    }
}

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A guest cannot have so much, or so little.
    #[error("a microVM cannot have {bytes} bytes of memory: whole pages, at most {BYTES_MAX} bytes")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// It cannot be mapped.
    #[error("guest memory cannot be mapped: {0}")]
    Map(String),
}

/// The memory of one machine, from address zero on.
#[derive(Debug)]
pub struct Ram {
    memory: Memory,
    bytes: u64,
}

impl Ram {
    /// Maps `shared`; `private`: what is written here stays here.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn map(shared: &SharedMemory, private: bool) -> Result<Self, RamError> {
        let bytes = shared.length();
        if bytes > BYTES_MAX || !bytes.is_multiple_of(PAGE_SIZE as u64) {
            return Err(RamError::Size { bytes });
        }
        let map = |error: &dyn std::fmt::Display| RamError::Map(error.to_string());
        let size = usize::try_from(bytes).expect("lengths are 64 bits wide");
        let fd = shared.fd().as_fd().try_clone_to_owned().map_err(|error| map(&error))?;
        let flags = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let region = MmapRegionBuilder::new_with_bitmap(size, Marks::with_len(size))
            .with_file_offset(FileOffset::new(File::from(fd), 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| map(&error))?;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("it ends before the end of addresses");
        let memory = Memory::from_regions(vec![region]).map_err(|error| map(&error))?;
        Ok(Self { memory, bytes })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its length in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE as u64
    }

    /// Where it is mapped in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.region().as_ptr() as u64
    }

    fn region(&self) -> &GuestRegionMmap<Marks> {
        self.memory.iter().next().expect("there is one region")
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    fn marks(&self) -> &[AtomicU64] {
        &(**self.region()).bitmap().words
    }

    /// Adds what the VMM wrote to `dirty`; `take`: and forgets it.
    pub(super) fn own_writes(&self, dirty: &mut PageSet, take: bool) {
        for (index, word) in self.marks().iter().enumerate() {
            let marks = word.load(Ordering::SeqCst);
            if marks == 0 {
                continue;
            }
            // First there, then no longer here.
            add_word(dirty, index, marks);
            if take {
                word.fetch_and(!marks, Ordering::SeqCst);
            }
        }
    }

    /// Forgets what the VMM wrote.
    pub(super) fn forget_own_writes(&self) {
        self.marks().iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Copies consecutive pages from `first` on to `into`.
    ///
    /// # Panics
    /// If they are outside.
    pub fn read_pages(&self, first: u64, into: &mut [u8]) {
        let address = GuestAddress(first * PAGE_SIZE as u64);
        self.memory.read_slice(into, address).unwrap_or_else(|error| panic!("page {first} and after: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_through_it_is_marked_once_and_a_private_mapping_writes_nothing_through() {
        let shared = SharedMemory::new("ram-test", 130 * PAGE_SIZE as u64).expect("a small one");
        let ram = Ram::map(&shared, false).expect("it can be mapped");
        let page = |page: u64, offset: u64| GuestAddress(page * PAGE_SIZE as u64 + offset);
        ram.memory().write_slice(&[7; 10], page(64, 4090)).expect("inside");
        ram.memory().write_obj(9_u8, page(129, 0)).expect("inside");
        let mut byte = [0];
        ram.memory().read_slice(&mut byte, page(3, 0)).expect("inside");
        let mut dirty = PageSet::empty(ram.pages());
        ram.own_writes(&mut dirty, false);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [64, 65, 129], "a look takes nothing away");
        dirty.clear();
        ram.own_writes(&mut dirty, true);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [64, 65, 129]);
        dirty.clear();
        ram.own_writes(&mut dirty, true);
        assert!(dirty.is_empty());
        let private = Ram::map(&shared, true).expect("it can be mapped");
        private.memory().read_slice(&mut byte, page(129, 0)).expect("inside");
        assert_eq!(byte, [9]);
        private.memory().write_obj(1_u8, page(129, 0)).expect("inside");
        ram.memory().read_slice(&mut byte, page(129, 0)).expect("inside");
        assert_eq!(byte, [9], "what a private mapping writes stays there");
    }
}
