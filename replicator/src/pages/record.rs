//! Records: the pages (or device state blocks) within a frame, and within a staged epoch.
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0..4 | page | u32: page number in the layout (device state: 4 KiB block number); a layout has at most 2^32 pages |
//! | 4 | kind | 1 zero, 2 word delta, 3 LZ4, 4 raw; 0 is invalid |
//! | 5 | reserved | 0 |
//! | 6..8 | n | u16: zero: how many consecutive pages, at least 1; else: bytes of the body that follows |
//! | 8.. | body | nothing / a [delta](super::delta) against the last sent copy / one LZ4 block that gives a page / the page |
//!
//! Pages ascend and come once, over all frames of a stream.

use vmm_hooks::layout::PAGE_SIZE;

use super::{Page, delta};

/// Bytes of a record's header.
pub const RECORD_HEADER: usize = 8;

/// The longest LZ4 body that is taken: above it, raw is as good and faster.
pub const MAX_LZ4: usize = PAGE_SIZE / 8 * 7;

/// How a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// A run of pages of zeroes.
    Zero = 1,
    /// Replacement runs against the last sent copy.
    Delta = 2,
    /// One LZ4 block.
    Lz4 = 3,
    /// The page.
    Raw = 4,
}

/// One record and its body, checked by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// The (first) page or block.
    pub page: u64,
    /// What is done to it.
    pub body: Body<'a>,
}

/// The body of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// So many pages of zeroes.
    Zero(u16),
    /// A valid delta.
    Delta(&'a [u8]),
    /// An LZ4 block, not yet decompressed.
    Lz4(&'a [u8]),
    /// A page.
    Raw(&'a Page),
}

impl Record<'_> {
    /// How many pages it is about.
    #[must_use]
    pub fn pages(&self) -> u64 {
        if let Body::Zero(run) = self.body { u64::from(run) } else { 1 }
    }
}

/// Why a record was refused. Always the peer's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The frame ends within a record.
    #[error("a frame ends within a record")]
    Truncated,
    /// An unknown kind, or reserved bits that are set.
    #[error("a record of page {page} has unknown kind {kind}")]
    Kind {
        /// Its page.
        page: u64,
        /// The two bytes of kind and reserved, as one number.
        kind: u16,
    },
    /// A body whose length does not fit its kind.
    #[error("a record of page {page} has a body of the wrong length {length}")]
    Length {
        /// Its page.
        page: u64,
        /// The length.
        length: usize,
    },
    /// A delta whose runs are not in order, or leave the page.
    #[error("the delta of page {page} is malformed")]
    Delta {
        /// Its page.
        page: u64,
    },
    /// An LZ4 block that does not give exactly one page.
    #[error("the compressed page {page} does not decompress to a page")]
    Lz4 {
        /// Its page.
        page: u64,
    },
}

/// Takes the first record off `bytes`, which must not be empty. What comes back is whole and well-formed by itself; an LZ4
/// block must still be decompressed to know.
///
/// # Errors
/// [`RecordError`].
pub fn take<'a>(bytes: &mut &'a [u8]) -> Result<Record<'a>, RecordError> {
    let (header, rest) = bytes.split_first_chunk::<RECORD_HEADER>().ok_or(RecordError::Truncated)?;
    let [a, b, c, d, kind, reserved, low, high] = *header;
    let page = u64::from(u32::from_le_bytes([a, b, c, d]));
    let n = u16::from_le_bytes([low, high]);
    let length = usize::from(n);
    let unknown = RecordError::Kind { page, kind: u16::from_le_bytes([kind, reserved]) };
    if reserved != 0 {
        return Err(unknown);
    }
    if kind == RecordKind::Zero as u8 {
        if n == 0 {
            return Err(RecordError::Length { page, length });
        }
        *bytes = rest;
        return Ok(Record { page, body: Body::Zero(n) });
    }
    let (body, after) = rest.split_at_checked(length).ok_or(RecordError::Truncated)?;
    let body = if kind == RecordKind::Delta as u8 {
        if !delta::valid(body) {
            return Err(RecordError::Delta { page });
        }
        Body::Delta(body)
    } else if kind == RecordKind::Lz4 as u8 {
        if length == 0 || length > MAX_LZ4 {
            return Err(RecordError::Length { page, length });
        }
        Body::Lz4(body)
    } else if kind == RecordKind::Raw as u8 {
        Body::Raw(body.try_into().map_err(|_| RecordError::Length { page, length })?)
    } else {
        return Err(unknown);
    };
    *bytes = after;
    Ok(Record { page, body })
}

/// The header of a record.
///
/// # Panics
/// If the page number needs more than 32 bits: no layout has such a page.
#[must_use]
pub fn header(page: u64, kind: RecordKind, n: u16) -> [u8; RECORD_HEADER] {
    let [a, b, c, d] = u32::try_from(page).expect("a layout has at most 2^32 pages").to_le_bytes();
    let [low, high] = n.to_le_bytes();
    [a, b, c, d, kind as u8, 0, low, high]
}

/// The length of a record's body as its header says it.
pub(crate) fn body_u16(length: usize) -> u16 {
    u16::try_from(length).expect("a body is at most one page")
}
