//! A vCPU's ring of dirty pages, mapped (`KVM_CAP_DIRTY_LOG_RING`, Documentation/virt/kvm/api.rst, section 8.29).
//!
//! Promise: nobody but the kernel and who harvests writes an entry, and each of them writes its flags alone: everything is an atomic
//! access. What an entry means, and in which order it is read, is `kvm::ring`.

use std::fmt;
use std::io;
use std::mem::{align_of, offset_of, size_of};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};

use super::kvm::KvmError;

/// `KVM_DIRTY_GFN_F_DIRTY`: the kernel has written the entry.
pub const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: it was harvested, and the kernel may have it back.
pub const RESET: u32 = 2;

/// One entry: `struct kvm_dirty_gfn`.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>() && align_of::<Entry>() >= align_of::<u64>());
const _: () = assert!(
    offset_of!(Entry, flags) == offset_of!(kvm_dirty_gfn, flags)
        && offset_of!(Entry, slot) == offset_of!(kvm_dirty_gfn, slot)
        && offset_of!(Entry, offset) == offset_of!(kvm_dirty_gfn, offset)
);

impl Entry {
    /// The memory slot and the page in it, if the kernel has written the entry and nobody has harvested it.
    #[must_use]
    pub fn dirty(&self) -> Option<(u32, u64)> {
        // With this the rest of the entry is what the kernel wrote before.
        let flags = self.flags.load(Ordering::Acquire);
        (flags & (DIRTY | RESET) == DIRTY)
            .then(|| (self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed)))
    }

    /// Gives it back: the kernel takes it with the next reset.
    pub fn harvested(&self) {
        self.flags.store(RESET, Ordering::Release);
    }

    /// What the kernel does when a page becomes dirty.
    #[cfg(test)]
    pub(crate) fn push(&self, slot: u32, offset: u64) {
        self.slot.store(slot, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        self.flags.store(DIRTY, Ordering::Release);
    }

    /// What the kernel reads in a reset.
    #[cfg(test)]
    pub(crate) fn page(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// What the kernel does in a reset; false: the entry was not harvested.
    #[cfg(test)]
    pub(crate) fn reset(&self) -> bool {
        self.flags.compare_exchange(RESET, 0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// A vCPU's ring. It outlives the vCPU's descriptor: the mapping keeps what it maps.
pub struct Ring {
    entries: NonNull<Entry>,
    length: usize,
}

// SAFETY: the mapping belongs to the value, and what is in it is touched by atomic accesses alone.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Ring {
    /// Maps the ring of `vcpu`, whose machine has rings of `length` entries.
    ///
    /// # Errors
    /// If the kernel refuses: its machine has no rings, or not of this length.
    pub fn map(vcpu: &VcpuFd, length: usize) -> Result<Self, KvmError> {
        let fail = |source: io::Error| KvmError { what: "map a vCPU's ring of dirty pages", source };
        // SAFETY: the descriptor stays open as long as `vcpu`, longer than this borrow.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let bytes = length * size_of::<Entry>();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * rustix::param::page_size() as u64;
        // SAFETY: the kernel chooses the place of the mapping, so no memory of ours changes.
        let entries =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, offset) };
        let entries = entries.map_err(|error| fail(error.into()))?;
        Ok(Self { entries: NonNull::new(entries.cast()).expect("no mapping is at zero"), length })
    }

    /// Its entries.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        // SAFETY: the mapping has room for as many, is aligned to a page, lives as long as `self`, and any bytes are an `Entry`; the kernel,
        // which writes them, does so as if by atomic accesses, and nobody has a plain reference into it.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.length) }
    }
}

impl AsRef<[Entry]> for Ring {
    fn as_ref(&self) -> &[Entry] {
        self.entries()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map`; no borrow of it is left.
        let result = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), self.length * size_of::<Entry>()) };
        debug_assert!(result.is_ok(), "a mapping of ours can be unmapped");
    }
}
