//! Where the pages of a layout lie in the address space of the process that runs the guest.

use std::ops::Range;

use crate::layout::{Layout, PAGE_SIZE};

/// Consecutive pages at consecutive addresses: one block of the layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The page numbers.
    pub pages: Range<u64>,
    /// The addresses.
    pub addresses: Range<u64>,
}

impl Segment {
    /// The page numbers of a run of addresses within it.
    pub(super) fn pages_at(&self, run: &Range<u64>) -> Range<u64> {
        let number = |address: u64| self.pages.start + (address - self.addresses.start) / PAGE_SIZE as u64;
        number(run.start)..number(run.end)
    }
}

/// Why addresses do not fit a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// There is not one address for each block.
    #[error("{addresses} addresses for {blocks} memory blocks")]
    Count {
        /// Blocks of the layout.
        blocks: usize,
        /// Addresses given.
        addresses: usize,
    },
    /// An address is not at a page boundary, or the block reaches past the end of the address space.
    #[error("memory block {block} cannot lie at {address:#x}")]
    Address {
        /// The block's name.
        block: String,
        /// Its address.
        address: u64,
    },
    /// Two blocks share addresses.
    #[error("memory blocks {first} and {second} overlap")]
    Overlap {
        /// One block's name.
        first: String,
        /// The other's.
        second: String,
    },
}

/// Maps page numbers to addresses and back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeMap {
    /// In page order; blocks without a page are left out.
    segments: Vec<Segment>,
    pages: u64,
}

impl RangeMap {
    /// The blocks of `layout` at `addresses`, one for each block in the layout's order (a block without a page may have any).
    ///
    /// # Errors
    /// See [`RangeError`].
    pub fn new(layout: &Layout, addresses: &[u64]) -> Result<Self, RangeError> {
        let blocks = layout.blocks();
        if blocks.len() != addresses.len() {
            return Err(RangeError::Count { blocks: blocks.len(), addresses: addresses.len() });
        }
        let page = PAGE_SIZE as u64;
        let mut segments = Vec::new();
        let mut by_address: Vec<(Range<u64>, &str)> = Vec::new();
        for (index, (block, &start)) in blocks.iter().zip(addresses).enumerate() {
            if block.pages == 0 {
                continue;
            }
            let end = block.pages.checked_mul(page).and_then(|length| start.checked_add(length));
            let Some(end) = end.filter(|_| start.is_multiple_of(page)) else {
                return Err(RangeError::Address { block: block.name.clone(), address: start });
            };
            by_address.push((start..end, &block.name));
            segments.push(Segment { pages: layout.block_pages(index), addresses: start..end });
        }
        by_address.sort_by_key(|(range, _)| range.start);
        for pair in by_address.windows(2) {
            if pair[0].0.end > pair[1].0.start {
                return Err(RangeError::Overlap { first: pair[0].1.to_owned(), second: pair[1].1.to_owned() });
            }
        }
        Ok(Self { segments, pages: layout.pages() })
    }

    /// The blocks that have pages, in page order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// How many pages there are in all.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The address of `page`; `None` past the end.
    #[must_use]
    pub fn address(&self, page: u64) -> Option<u64> {
        let index = self.segments.partition_point(|segment| segment.pages.end <= page);
        let segment = self.segments.get(index)?;
        Some(segment.addresses.start + (page - segment.pages.start) * PAGE_SIZE as u64)
    }

    /// The addresses of `pages`, as runs of (address, length in bytes): what [`crate::sys::process::ProcessMemory::read_runs`]
    /// takes. Neighbours are joined where pages and addresses both go on.
    ///
    /// # Panics
    /// If a page is out of range.
    pub fn runs(&self, pages: impl IntoIterator<Item = u64>, into: &mut Vec<(u64, u64)>) {
        into.clear();
        for page in pages {
            let address = self.address(page).unwrap_or_else(|| panic!("page {page} of {}", self.pages));
            match into.last_mut() {
                Some((start, length)) if *start + *length == address => *length += PAGE_SIZE as u64,
                _ => into.push((address, PAGE_SIZE as u64)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Block;

    fn layout(pages: &[u64]) -> Layout {
        let block = |(index, &pages): (usize, &u64)| Block { name: format!("b{index}"), pages };
        Layout::new(pages.iter().enumerate().map(block).collect()).expect("a good layout")
    }

    #[test]
    fn maps_pages_to_addresses_across_blocks() {
        let map = RangeMap::new(&layout(&[2, 0, 3]), &[0x9000, 7, 0x1000]).expect("no overlap");
        assert_eq!(map.address(1), Some(0xa000));
        assert_eq!(map.address(2), Some(0x1000));
        assert_eq!(map.address(4), Some(0x3000));
        assert_eq!(map.address(5), None);
        let mut runs = Vec::new();
        map.runs([0, 1, 2, 4], &mut runs);
        assert_eq!(runs, [(0x9000, 0x2000), (0x1000, 0x1000), (0x3000, 0x1000)]);
    }

    #[test]
    fn refuses_addresses_that_cannot_be() {
        let two = layout(&[2, 2]);
        assert_eq!(RangeMap::new(&two, &[0]), Err(RangeError::Count { blocks: 2, addresses: 1 }));
        let odd = RangeMap::new(&two, &[0x1000, 0x8001]);
        assert_eq!(odd, Err(RangeError::Address { block: "b1".to_owned(), address: 0x8001 }));
        let last = u64::MAX - 0xfff;
        assert_eq!(RangeMap::new(&two, &[0, last]), Err(RangeError::Address { block: "b1".to_owned(), address: last }));
        let over = RangeMap::new(&two, &[0x2000, 0x1000]);
        assert_eq!(over, Err(RangeError::Overlap { first: "b1".to_owned(), second: "b0".to_owned() }));
    }
}
