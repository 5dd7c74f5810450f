//! Guest memory as a list of named blocks, and sets of its pages.
//!
//! Promise: both hosts number pages alike. A page number is dense over all blocks in the order of the
//! layout: block 0 owns pages `0..n0`, block 1 owns `n0..n0+n1`, and so on. Nothing here touches memory.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes in a page. Tracking, copying and encoding all use this unit.
pub const PAGE_SIZE: usize = 4096;

/// Bound on guest memory that a layout may describe: 16 TiB.
pub const MAX_PAGES: u64 = 1 << 32;

/// Bound on the number of blocks of one layout.
pub const MAX_BLOCKS: usize = 256;

/// One block of guest memory (QEMU: a `RAMBlock`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// The name both hosts know it by, such as `pc.ram` or `0000:00:02.0/vga.vram`.
    pub name: String,
    /// Its length in pages.
    pub pages: u64,
}

/// Why a layout was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// It has no page at all.
    #[error("the memory layout is empty")]
    Empty,
    /// It has more blocks than [`MAX_BLOCKS`].
    #[error("the memory layout has {blocks} blocks, the bound is {MAX_BLOCKS}")]
    TooManyBlocks {
        /// How many it has.
        blocks: usize,
    },
    /// It has more pages than [`MAX_PAGES`].
    #[error("the memory layout has more than {MAX_PAGES} pages")]
    TooLarge,
    /// Two blocks share a name.
    #[error("two memory blocks are called {name}")]
    DuplicateName {
        /// The name.
        name: String,
    },
}

/// All guest memory. Built by [`Layout::new`] only, so that its invariants hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Block>", into = "Vec<Block>")]
pub struct Layout {
    blocks: Vec<Block>,
    first_page: Vec<u64>,
    pages: u64,
}

impl Layout {
    /// Checks and numbers the blocks.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn new(blocks: Vec<Block>) -> Result<Self, LayoutError> {
        if blocks.len() > MAX_BLOCKS {
            return Err(LayoutError::TooManyBlocks { blocks: blocks.len() });
        }
        let mut names = std::collections::HashSet::new();
        let mut first_page = Vec::with_capacity(blocks.len());
        let mut pages = 0_u64;
        for block in &blocks {
            if !names.insert(block.name.as_str()) {
                return Err(LayoutError::DuplicateName { name: block.name.clone() });
            }
            first_page.push(pages);
            pages = pages.checked_add(block.pages).ok_or(LayoutError::TooLarge)?;
        }
        if pages == 0 {
            return Err(LayoutError::Empty);
        }
        if pages > MAX_PAGES {
            return Err(LayoutError::TooLarge);
        }
        Ok(Self { blocks, first_page, pages })
    }

    /// The blocks, in numbering order.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// How many pages there are in all.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The page numbers of block `index`.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block_pages(&self, index: usize) -> Range<u64> {
        let first = self.first_page[index];
        first..first + self.blocks[index].pages
    }

    /// Which block holds `page`, and the page's number within it; `None` past the end.
    #[must_use]
    pub fn locate(&self, page: u64) -> Option<(usize, u64)> {
        if page >= self.pages {
            return None;
        }
        // The last block that starts at or before the page; empty blocks share their start with the next one.
        let index = self.first_page.partition_point(|&first| first <= page) - 1;
        Some((index, page - self.first_page[index]))
    }
}

impl TryFrom<Vec<Block>> for Layout {
    type Error = LayoutError;
    fn try_from(blocks: Vec<Block>) -> Result<Self, LayoutError> {
        Self::new(blocks)
    }
}

impl From<Layout> for Vec<Block> {
    fn from(layout: Layout) -> Self {
        layout.blocks
    }
}

/// A set of page numbers of one layout, as a bitmap.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    #[must_use]
    pub fn empty(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("a bitmap fits in memory");
        Self { words: vec![0; words], pages }
    }

    /// The set of all of `pages` pages.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert_range(0..pages);
        set
    }

    /// How many pages it ranges over, in the set or not.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.pages
    }

    /// The set as a bitmap, the first page in the lowest bit.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    fn slot(&self, page: u64) -> (usize, u64) {
        assert!(page < self.pages, "page {page} is outside of a set over {} pages", self.pages);
        (usize::try_from(page / 64).expect("checked when built"), 1 << (page % 64))
    }

    /// Puts one page in.
    ///
    /// # Panics
    /// If the page is out of range.
    pub fn insert(&mut self, page: u64) {
        let (word, bit) = self.slot(page);
        self.words[word] |= bit;
    }

    /// Takes one page out.
    ///
    /// # Panics
    /// If the page is out of range.
    pub fn remove(&mut self, page: u64) {
        let (word, bit) = self.slot(page);
        self.words[word] &= !bit;
    }

    /// Puts a range of pages in.
    ///
    /// # Panics
    /// If the range is out of range.
    pub fn insert_range(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (first, _) = self.slot(range.start);
        let (last, _) = self.slot(range.end - 1);
        let head = !0_u64 << (range.start % 64);
        let tail = !0_u64 >> (63 - (range.end - 1) % 64);
        if first == last {
            self.words[first] |= head & tail;
        } else {
            self.words[first] |= head;
            self.words[first + 1..last].fill(!0);
            self.words[last] |= tail;
        }
    }

    /// Whether a page is in the set.
    ///
    /// # Panics
    /// If the page is out of range.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let (word, bit) = self.slot(page);
        self.words[word] & bit != 0
    }

    /// Puts every page of `other` in.
    ///
    /// # Panics
    /// If the two range over different layouts.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "two sets over different layouts");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Takes every page of `other` out.
    ///
    /// # Panics
    /// If the two range over different layouts.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "two sets over different layouts");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().zip(0_u64..).flat_map(|(&word, index)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    index * 64 + u64::from(bit)
                })
            })
        })
    }

    /// The pages as maximal runs of consecutive numbers, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut pages = self.iter().peekable();
        std::iter::from_fn(move || {
            let start = pages.next()?;
            let mut end = start + 1;
            while pages.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(start..end)
        })
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {})", self.len(), self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(name: &str, pages: u64) -> Block {
        Block { name: name.to_owned(), pages }
    }

    #[test]
    fn locates_pages_across_blocks_also_empty_ones() {
        let layout = Layout::new(vec![block("a", 3), block("none", 0), block("b", 2)]).expect("a good layout");
        assert_eq!(layout.pages(), 5);
        assert_eq!(layout.locate(2), Some((0, 2)));
        assert_eq!(layout.locate(3), Some((2, 0)));
        assert_eq!(layout.locate(4), Some((2, 1)));
        assert_eq!(layout.locate(5), None);
        assert_eq!(layout.block_pages(2), 3..5);
    }

    #[test]
    fn refuses_layouts_that_break_the_numbering() {
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Empty));
        assert_eq!(Layout::new(vec![block("a", MAX_PAGES + 1)]), Err(LayoutError::TooLarge));
        assert_eq!(Layout::new(vec![block("a", u64::MAX), block("b", 2)]), Err(LayoutError::TooLarge));
        let twice = Layout::new(vec![block("a", 1), block("a", 1)]);
        assert_eq!(twice, Err(LayoutError::DuplicateName { name: "a".to_owned() }));
    }

    proptest! {
        #[test]
        fn a_set_behaves_like_a_sorted_list(pages in prop::collection::btree_set(0_u64..300, 0..120),
                                            range in 0_u64..300, length in 0_u64..200) {
            let mut set = PageSet::empty(300);
            let mut model = pages.clone();
            for &page in &pages { set.insert(page); }
            let end = (range + length).min(300);
            set.insert_range(range..end);
            model.extend(range..end);
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.runs().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert!(set.runs().zip(set.runs().skip(1)).all(|(a, b)| a.end < b.start));
            prop_assert_eq!(set.len(), model.len() as u64);
            let mut rest = PageSet::full(300);
            rest.subtract(&set);
            prop_assert_eq!(rest.len(), 300 - set.len());
            rest.union_with(&set);
            prop_assert_eq!(rest, PageSet::full(300));
        }
    }
}
