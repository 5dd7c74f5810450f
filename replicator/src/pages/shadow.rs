//! The shadow: what the standby will have, page by page, as far as it is remembered.
//!
//! A page *known* to the shadow has exactly the bytes that the standby's page has once it has applied every stream that the
//! encoder wrote so far, in order. The encoder updates the shadow as it writes; who abandons a stream must make the
//! shadow forget that stream's pages (see [`super::encode::Encoder::forget`]). A page that is not known is sent whole.

use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use super::{Page, delta};

/// How much is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShadowMode {
    /// Every page: costs as much memory as the guest has pages that are not zero.
    Full,
    /// At most so many bytes of pages, each page in one possible place: a later page pushes out an earlier one.
    Bounded {
        /// Bytes; rounded down to whole pages.
        bytes: u64,
    },
    /// Nothing: every page is sent whole.
    Off,
}

/// What the shadow knows of a page.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Base<'a> {
    /// Nothing.
    Unknown,
    /// It is all zeroes.
    Zero,
    /// Its bytes.
    Known(&'a Page),
}

/// No page has this number: [`vmm_hooks::layout::MAX_PAGES`] is far below.
const EMPTY: u64 = u64::MAX;

/// Remembers sent pages. A slot holds pages `slot, slot + slots, ...`, one at a time; with a slot per page it forgets none.
pub(crate) struct Shadow {
    slots: Vec<Page>,
    tags: Vec<u64>,
    /// Pages known to be zero; they take no slot. `None` when off.
    zero: Option<PageSet>,
}

impl Shadow {
    pub(crate) fn new(pages: u64, mode: ShadowMode) -> Self {
        let slots = match mode {
            ShadowMode::Full => pages,
            ShadowMode::Bounded { bytes } => (bytes / PAGE_SIZE as u64).min(pages),
            ShadowMode::Off => 0,
        };
        let slots = usize::try_from(slots).expect("the shadow fits in the address space");
        let zero = (mode != ShadowMode::Off).then(|| PageSet::empty(pages));
        // Zeroed pages come from the kernel untouched: memory is used only once a page is remembered.
        Self { slots: vec![[0; PAGE_SIZE]; slots], tags: vec![EMPTY; slots], zero }
    }

    fn slot(&self, page: u64) -> Option<usize> {
        let slot = page.checked_rem(self.tags.len() as u64)?;
        Some(usize::try_from(slot).expect("an index of a vector"))
    }

    pub(crate) fn base(&self, page: u64) -> Base<'_> {
        if self.zero.as_ref().is_some_and(|zero| zero.contains(page)) {
            return Base::Zero;
        }
        match self.slot(page) {
            Some(slot) if self.tags[slot] == page => Base::Known(&self.slots[slot]),
            _ => Base::Unknown,
        }
    }

    /// The page was sent as zeroes.
    pub(crate) fn set_zero(&mut self, page: u64) {
        self.forget(page);
        if let Some(zero) = &mut self.zero {
            zero.insert(page);
        }
    }

    /// The page was sent whole.
    pub(crate) fn set(&mut self, page: u64, bytes: &Page) {
        if let Some(zero) = &mut self.zero {
            zero.remove(page);
        }
        if let Some(slot) = self.slot(page) {
            self.tags[slot] = page;
            self.slots[slot] = *bytes;
        }
    }

    /// The page was sent as a delta that turns its base into `bytes`.
    pub(crate) fn patch(&mut self, page: u64, patch: &[u8], bytes: &Page) {
        match self.slot(page) {
            Some(slot) if self.tags[slot] == page => delta::apply(patch, &mut self.slots[slot]),
            _ => self.set(page, bytes),
        }
    }

    pub(crate) fn forget(&mut self, page: u64) {
        if let Some(zero) = &mut self.zero {
            zero.remove(page);
        }
        if let Some(slot) = self.slot(page)
            && self.tags[slot] == page
        {
            self.tags[slot] = EMPTY;
        }
    }

    pub(crate) fn forget_all(&mut self) {
        if let Some(zero) = &mut self.zero {
            zero.clear();
        }
        self.tags.fill(EMPTY);
    }
}

impl std::fmt::Debug for Shadow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shadow({} slots)", self.tags.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_shadow_remembers_the_later_of_two_pages_that_share_a_slot() {
        let mut shadow = Shadow::new(8, ShadowMode::Bounded { bytes: 2 * 4096 + 100 });
        shadow.set(1, &[1; 4096]);
        shadow.set(3, &[3; 4096]);
        assert!(matches!(shadow.base(1), Base::Unknown));
        assert!(matches!(shadow.base(3), Base::Known(bytes) if bytes == &[3; 4096]));
        shadow.forget(1);
        assert!(matches!(shadow.base(3), Base::Known(_)), "forgetting a page must not touch its slot's owner");
    }

    #[test]
    fn a_page_that_becomes_zero_and_then_something_else_is_known_each_time() {
        let mut shadow = Shadow::new(4, ShadowMode::Full);
        shadow.set(2, &[5; 4096]);
        shadow.set_zero(2);
        assert!(matches!(shadow.base(2), Base::Zero));
        let mut page = [0; 4096];
        page[8] = 9;
        let mut buffer = delta::DeltaBuffer::default();
        delta::encode(&[0; 4096], &page, &mut buffer);
        shadow.patch(2, buffer.bytes(), &page);
        assert!(matches!(shadow.base(2), Base::Known(bytes) if bytes == &page));
        shadow.forget_all();
        assert!(matches!(shadow.base(2), Base::Unknown));
    }

    #[test]
    fn off_knows_nothing() {
        let mut shadow = Shadow::new(4, ShadowMode::Off);
        shadow.set(2, &[5; 4096]);
        shadow.set_zero(3);
        assert!(matches!(shadow.base(2), Base::Unknown));
        assert!(matches!(shadow.base(3), Base::Unknown));
    }
}
