//! Pages that a guest writes in epoch after epoch: they are not protected again in each of them.
//!
//! The first write to a protected page takes the guest out and in again, which costs between one and twenty microseconds, by the host; copying a page
//! that was not written costs less than the least of that, and the encoder leaves out what did not change. So a page that was found written twice, not more
//! than a few epochs apart, stays writable for as many epochs as cost less than its next first write ([`super::worth`]), and counts as dirty in each of them. Then it is
//! protected once, to see whether it is still written: if so it stays writable for twice as long.
//!
//! Promise: what is kept is a page that KVM's log has as dirty and goes on to have as dirty, for its mark is not cleared. Nothing is guessed about a page
//! that is not in the log.

/// How often in a row a page is found written before it is kept: one that is written once and never again is not carried along.
const ROW: u8 = 2;
/// Harvests at most from one of these times to the next. A guest that is slow because its pages are protected comes to each of them in some epochs only.
const GAP: u32 = 3;
/// It is kept for as many harvests as it is worth first, then for twice as many each time, so often.
const DOUBLINGS: u8 = 3;
/// Most harvests that a page is kept for.
const MOST: u8 = 64;

/// What is known of one page.
#[derive(Debug, Clone, Copy, Default)]
struct Page {
    /// The last harvest that it was dirty in.
    last: u32,
    /// How often in a row it was found written, as far as that matters.
    row: u8,
    /// Harvests that it is kept for.
    left: u8,
}

/// What is known of all pages of a machine.
#[derive(Debug)]
pub(super) struct Hot {
    pages: Vec<Page>,
    harvest: u32,
    /// For how many harvests a page is kept first.
    worth: u8,
}

impl Hot {
    /// Knows nothing of so many words of a log. For `worth` see [`super::worth`].
    pub(super) fn new(words: usize, worth: u8) -> Self {
        // A page that was never dirty was not so a few harvests before the first.
        Self { pages: vec![Page::default(); words * 64], harvest: GAP, worth: worth.max(1) }
    }

    /// All marks were cleared: nothing is known.
    pub(super) fn forget(&mut self) {
        self.pages.fill(Page::default());
        self.harvest = GAP;
    }

    /// Takes the pages that stay writable out of `bits`, a log as it was read: what is left is to be cleared. If that fails what is known is
    /// wrong, and to be forgotten.
    pub(super) fn keep(&mut self, bits: &mut [u64]) {
        if self.harvest == u32::MAX {
            self.forget();
        }
        self.harvest += 1;
        let now = self.harvest;
        for (word, pages) in bits.iter_mut().zip(self.pages.chunks_exact_mut(64)) {
            let mut left = *word;
            while left != 0 {
                let index = left.trailing_zeros();
                left &= left - 1;
                let page = &mut pages[index as usize];
                if page.left > 0 {
                    page.left -= 1;
                    // Not the last of them: it was not protected, and is not now.
                    if page.left > 0 {
                        *word &= !(1 << index);
                    }
                } else {
                    page.row = if page.last >= now - GAP { (page.row + 1).min(ROW + DOUBLINGS) } else { 1 };
                    if page.row >= ROW {
                        page.left = self.worth.min(MOST >> (page.row - ROW)) << (page.row - ROW);
                        *word &= !(1 << index);
                    }
                }
                page.last = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What KVM does with one page: it is dirty until it is cleared, and then if it is written.
    fn play(hot: &mut Hot, dirty: &mut bool, written: bool, faults: &mut u32) -> bool {
        if written && !*dirty {
            *faults += 1;
            *dirty = true;
        }
        let found = *dirty;
        let mut bits = [0, u64::from(*dirty) << 7];
        hot.keep(&mut bits);
        assert!(bits[0] == 0 && (bits[1] == 0 || found), "only what is dirty is cleared");
        *dirty &= bits[1] == 0;
        found
    }

    #[test]
    fn a_page_that_is_written_again_and_again_is_found_each_time_and_seldom_protected() {
        for (worth, few) in [(1, 150), (4, 50), (48, 20)] {
            let (mut hot, mut dirty, mut faults) = (Hot::new(2, worth), false, 0);
            for epoch in 0..1000 {
                assert!(play(&mut hot, &mut dirty, true, &mut faults), "epoch {epoch}");
            }
            assert!((10..few).contains(&faults), "{faults} faults");
            // In two of three epochs is enough.
            let (mut hot, mut dirty, mut faults) = (Hot::new(2, worth), false, 0);
            for epoch in 0..1000 {
                play(&mut hot, &mut dirty, epoch % 3 != 0, &mut faults);
            }
            assert!((10..few * 3 / 2).contains(&faults), "{faults} faults");
            // It is no longer written: found for a while, then never again.
            let found = (0..1000).filter(|_| play(&mut hot, &mut dirty, false, &mut faults)).count();
            assert!(found <= usize::from(MOST), "{found} times");
            // And then as one that is new.
            let before = faults;
            for epoch in 0..ROW {
                assert!(play(&mut hot, &mut dirty, true, &mut faults), "epoch {epoch}");
            }
            assert_eq!(faults - before, u32::from(ROW));
        }
    }

    #[test]
    fn one_that_is_written_twice_is_kept_for_what_it_is_worth() {
        for worth in [1, 4, 48] {
            let (mut hot, mut dirty, mut faults) = (Hot::new(2, worth), false, 0);
            assert!(play(&mut hot, &mut dirty, true, &mut faults) && play(&mut hot, &mut dirty, true, &mut faults));
            let found = (0..1000).filter(|_| play(&mut hot, &mut dirty, false, &mut faults)).count();
            assert_eq!((found, faults), (usize::from(worth), 2), "no more than another fault costs");
        }
    }

    #[test]
    fn one_that_is_written_now_and_then_is_never_kept() {
        let (mut hot, mut dirty, mut faults) = (Hot::new(2, 48), false, 0);
        for epoch in 0..1000 {
            let written = epoch % (GAP + 1) == 0;
            assert_eq!(play(&mut hot, &mut dirty, written, &mut faults), written, "epoch {epoch}");
        }
        assert_eq!(faults, 250);
    }
}
