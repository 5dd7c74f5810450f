//! Which pages of another process were written: `PAGEMAP_SCAN` on `/proc/PID/pagemap`.
//!
//! The kernel's reference is `Documentation/admin-guide/mm/pagemap.rst`, "Pagemap Scan IOCTL" (Linux 6.7 and newer). A page
//! counts as written (`PAGE_IS_WRITTEN`) when it is not write-protected; the kernel lifts the protection by itself at the first
//! write in ranges that are registered with a userfaultfd in asynchronous write-protect mode (`UFFD_FEATURE_WP_ASYNC`).
//! A page that was never touched is not written, and becomes written when it is first written to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::process::{PidFd, ProcessError};

/// Regions taken from the kernel in one call.
const REGIONS: usize = 4096;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Write-protect what matched, in the same step.
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// Fail with `EPERM` where memory in the range is not tracked, instead of skipping it.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = (3 << 30) | (96 << 16) | (0x66 << 8) | 16;
const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<PageRegion>() == 24);

/// Why a scan failed.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The kernel is older than 6.7.
    #[error("this kernel has no PAGEMAP_SCAN (Linux 6.7 and newer have it)")]
    Unsupported,
    /// Part of the range is not registered for tracking.
    #[error("memory of process {pid} within {start:#x}..{end:#x} is not tracked")]
    NotTracked {
        /// The process.
        pid: u32,
        /// First address of the range.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// The process has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// Another failure.
    #[error("PAGEMAP_SCAN of process {pid} failed")]
    Os {
        /// The process.
        pid: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// The page map of one process. Stays bound to its memory, whatever becomes of the pid.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    process: PidFd,
    regions: Vec<PageRegion>,
}

impl Pagemap {
    /// Opens the page map of `process`. Needs the right to trace it.
    ///
    /// # Errors
    /// If it has ended or may not be looked at.
    pub fn open(process: &PidFd) -> Result<Self, ProcessError> {
        let pid = process.pid();
        let file = File::open(format!("/proc/{pid}/pagemap"));
        if process.has_exited() {
            return Err(ProcessError::Gone { pid });
        }
        let file = file.map_err(|source| ProcessError::Os { pid, what: "open the page map", source })?;
        Ok(Self { file, process: process.clone(), regions: vec![PageRegion::default(); REGIONS] })
    }

    /// Calls `found` for each run of written pages in `range` (addresses, page-aligned), in ascending order. Changes nothing.
    ///
    /// # Errors
    /// [`ScanError::NotTracked`] if part of the range is not tracked. Runs found before the failure were reported.
    pub fn written(&mut self, range: Range<u64>, found: impl FnMut(Range<u64>)) -> Result<(), ScanError> {
        self.scan(range, PM_SCAN_CHECK_WPASYNC, found)
    }

    /// As [`Pagemap::written`], and write-protects each run in the same step as it finds it: no write gets lost between.
    /// Other pages are left alone; the kernel tells secondary MMUs (KVM) about the whole range, so give it small ranges.
    ///
    /// # Errors
    /// As [`Pagemap::written`]; a run that was protected may not have been reported then.
    pub fn protect_written(&mut self, range: Range<u64>, found: impl FnMut(Range<u64>)) -> Result<(), ScanError> {
        self.scan(range, PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING, found)
    }

    fn scan(&mut self, range: Range<u64>, flags: u64, mut found: impl FnMut(Range<u64>)) -> Result<(), ScanError> {
        let mut start = range.start;
        // Each round moves `start` on, so there are at most as many rounds as pages.
        while start < range.end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags,
                start,
                end: range.end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                category_mask: PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..ScanArgument::default()
            };
            // SAFETY: PAGEMAP_SCAN reads and writes one `pm_scan_arg` through the pointer (its size is in it) and writes at
            // most `vec_len` regions to `vec`: both are ours, initialised, exclusively borrowed, and alive during the call.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let Ok(count) = usize::try_from(count) else {
                match self.failed(&range) {
                    Some(error) => return Err(error),
                    None => continue,
                }
            };
            for region in &self.regions[..count] {
                found(region.start..region.end);
            }
            assert!(argument.walk_end > start, "PAGEMAP_SCAN made no progress at {start:#x}");
            start = argument.walk_end;
        }
        // A process that ends gives up its memory, and a scan of no memory finds nothing: that is no answer.
        if self.process.has_exited() { Err(ScanError::Gone { pid: self.process.pid() }) } else { Ok(()) }
    }

    /// The error of the call that just failed; `None` if it is to be made again.
    fn failed(&self, range: &Range<u64>) -> Option<ScanError> {
        let pid = self.process.pid();
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::EINTR) => None,
            Some(libc::ENOTTY) => Some(ScanError::Unsupported),
            Some(libc::EPERM) => Some(ScanError::NotTracked { pid, start: range.start, end: range.end }),
            Some(libc::ESRCH) => Some(ScanError::Gone { pid }),
            _ => Some(ScanError::Os { pid, source }),
        }
    }
}

/// Whether this kernel has `PAGEMAP_SCAN`, by trying it on this process. Tracking also needs [`super::inject::kernel_supports`].
#[must_use]
pub fn supported() -> bool {
    let Ok(mut pagemap) = PidFd::open(std::process::id()).and_then(|me| Pagemap::open(&me)) else { return false };
    // An empty range is left by the loop before the call, so one page is scanned; no tracking needed without the check.
    pagemap.scan(0..crate::layout::PAGE_SIZE as u64, 0, |_| {}).is_ok()
}
