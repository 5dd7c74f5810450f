//! The page pipeline: what turns a captured epoch into bytes for the standby, and those bytes into committed memory.
//!
//! Promises:
//! - [`encode::Encoder`] writes, for one epoch or one piece of the initial sync, one *stream* of frames.
//! - [`decode::Stager`] takes the stream in any pieces, trusts nothing in it, and ends with a
//!   [`staged::StagedEpoch`] only if all of it is there and right. Nothing is acknowledged before that.
//! - [`staged::StagedEpoch::apply`] cannot fail and may be repeated: after a crash in the middle of applying, applying
//!   again from the start gives the same memory.
//!
//! No I/O, no clock, no async, no unsafe code. The wire form is described in [`frame`] (frames), [`record`] (the pages
//! within a frame) and [`disk`] (disk writes within a frame).

pub mod decode;
pub mod delta;
pub mod disk;
pub mod encode;
pub mod frame;
#[doc(hidden)]
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod record;
pub mod shadow;
pub mod staged;

#[cfg(test)]
mod tests;

use vmm_hooks::layout::PAGE_SIZE;

/// One page's bytes.
pub(crate) type Page = [u8; PAGE_SIZE];

/// A page of zeroes, to compare with.
pub(crate) static ZERO_PAGE: Page = [0; PAGE_SIZE];

/// Bound on a frame's payload: 256 KiB. Batching some sixty raw pages or thousands of deltas makes framing cheap.
pub const MAX_PAYLOAD: usize = 256 * 1024;

/// Bound on the device state of one guest: 64 MiB.
pub const MAX_DEVICE_BYTES: usize = 64 * 1024 * 1024;

/// Splits captured bytes into pages.
///
/// # Panics
/// If the length is not a whole number of pages: a bug of the caller.
pub(crate) fn as_pages(bytes: &[u8]) -> &[Page] {
    let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
    assert!(rest.is_empty(), "page bytes end within a page");
    pages
}

/// A length that a named bound keeps far below 4 GiB.
pub(crate) fn bounded_u32(length: usize) -> u32 {
    u32::try_from(length).expect("bounded well below 4 GiB")
}
