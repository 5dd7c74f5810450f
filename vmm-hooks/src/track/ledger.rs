//! The put-back rule: no failure after a harvest loses a dirty page.
//!
//! A page is *owed* from the moment the tracker's mark of it may be gone until a harvest has handed it out. A harvest that
//! fails half way hands nothing out; what it took from the tracker is owed. A page that was handed out and not committed is put
//! back, and is owed again.

use super::{TrackError, Tracker};
use crate::layout::PageSet;

/// A tracker and the pages that it has given up and nobody has taken yet.
#[derive(Debug)]
pub struct DirtyLedger<T: Tracker> {
    tracker: T,
    owed: PageSet,
}

impl<T: Tracker> DirtyLedger<T> {
    /// A ledger over `pages` pages found by `tracker`.
    #[must_use]
    pub fn new(tracker: T, pages: u64) -> Self {
        Self { tracker, owed: PageSet::empty(pages) }
    }

    /// The tracker.
    #[must_use]
    pub fn tracker(&self) -> &T {
        &self.tracker
    }

    /// While stopped and drained: starts tracking. The caller sends all memory after this, so nothing is owed from before.
    ///
    /// # Errors
    /// If it fails, nothing is tracked; what was owed stays owed.
    pub fn arm(&mut self) -> Result<(), TrackError> {
        self.tracker.arm()?;
        self.owed.clear();
        Ok(())
    }

    /// While stopped and drained: adds to `dirty` every page written since the last arming or harvest, and every page
    /// that is owed, and arms again.
    ///
    /// # Errors
    /// If it fails, `dirty` is as it was and nothing is lost: the next harvest hands it all out.
    ///
    /// # Panics
    /// If `dirty` ranges over another layout.
    pub fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        assert_eq!(dirty.capacity(), self.owed.capacity(), "two sets over different layouts");
        // Straight into what is owed: wherever the tracker stops, no page is anywhere else.
        self.tracker.harvest(&mut self.owed)?;
        dirty.union_with(&self.owed);
        self.owed.clear();
        Ok(())
    }

    /// At any time: adds to `dirty` what the next harvest would hand out, so far as it is known now.
    ///
    /// # Errors
    /// If it fails, nothing is lost.
    pub fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        dirty.union_with(&self.owed);
        self.tracker.peek(dirty)
    }

    /// Gives pages back that were harvested and not committed; the next harvest hands them out again.
    ///
    /// # Panics
    /// If `dirty` ranges over another layout.
    pub fn put_back(&mut self, dirty: &PageSet) {
        self.owed.union_with(dirty);
    }

    /// Whether the next harvest hands out pages that the tracker does not know of.
    #[must_use]
    pub fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Stops tracking.
    ///
    /// # Errors
    /// See [`Tracker::disarm`].
    pub fn disarm(&mut self) -> Result<(), TrackError> {
        self.tracker.disarm()
    }
}

impl Tracker for Box<dyn Tracker> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn others_may_write(&self) -> bool {
        (**self).others_may_write()
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        (**self).arm()
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        (**self).harvest(dirty)
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        (**self).peek(dirty)
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        (**self).disarm()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    /// Marks pages as a kernel would, takes marks away one by one, and fails when it is told to.
    #[derive(Debug, Default)]
    struct Faulty {
        marks: BTreeSet<u64>,
        armed: bool,
        /// Fail before taking the mark with this number.
        fail_at: Option<usize>,
    }

    impl Faulty {
        fn write(&mut self, page: u64) {
            self.marks.insert(page);
        }

        fn failing(&self, step: usize) -> Result<(), TrackError> {
            if self.fail_at == Some(step) { Err(TrackError::NotArmed) } else { Ok(()) }
        }
    }

    impl Tracker for Faulty {
        fn name(&self) -> &'static str {
            "faulty"
        }

        fn arm(&mut self) -> Result<(), TrackError> {
            self.failing(0)?;
            self.marks.clear();
            self.armed = true;
            Ok(())
        }

        fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
            let marks = self.marks.clone();
            for (step, page) in marks.into_iter().enumerate() {
                self.failing(step)?;
                dirty.insert(page);
                self.marks.remove(&page);
            }
            // Failing after the last mark is a failure too.
            self.failing(usize::try_from(PAGES).expect("small"))
        }

        fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
            for (step, &page) in self.marks.iter().enumerate() {
                self.failing(step)?;
                dirty.insert(page);
            }
            Ok(())
        }

        fn disarm(&mut self) -> Result<(), TrackError> {
            self.armed = false;
            Ok(())
        }
    }

    fn ledger() -> DirtyLedger<Faulty> {
        let mut ledger = DirtyLedger::new(Faulty::default(), PAGES);
        ledger.arm().expect("no failure was asked for");
        ledger
    }

    fn pages(set: &PageSet) -> Vec<u64> {
        set.iter().collect()
    }

    #[test]
    fn a_harvest_that_fails_at_any_step_loses_no_page_and_hands_none_out() {
        for step in (0..6).chain([usize::try_from(PAGES).expect("small")]) {
            let mut ledger = ledger();
            let written = [1, 3, 8, 21, 33, 39];
            written.iter().for_each(|&page| ledger.tracker.write(page));
            ledger.tracker.fail_at = Some(step);
            let mut dirty = PageSet::empty(PAGES);
            ledger.harvest(&mut dirty).expect_err("the failure that was asked for");
            assert!(dirty.is_empty(), "a failed harvest hands nothing out (step {step})");
            ledger.tracker.fail_at = None;
            ledger.tracker.write(2);
            ledger.harvest(&mut dirty).expect("no failure any more");
            assert_eq!(pages(&dirty), [1, 2, 3, 8, 21, 33, 39], "step {step}");
            dirty.clear();
            ledger.harvest(&mut dirty).expect("no failure any more");
            assert!(dirty.is_empty(), "what was handed out is not owed any more (step {step})");
        }
    }

    #[test]
    fn what_is_put_back_comes_with_the_next_harvest() {
        let mut ledger = ledger();
        ledger.tracker.write(5);
        let mut epoch = PageSet::empty(PAGES);
        ledger.harvest(&mut epoch).expect("it works");
        ledger.put_back(&epoch);
        ledger.tracker.write(6);
        let mut seen = PageSet::empty(PAGES);
        ledger.peek(&mut seen).expect("it works");
        assert_eq!(pages(&seen), [5, 6], "a peek sees what is owed, too");
        let mut next = PageSet::empty(PAGES);
        ledger.harvest(&mut next).expect("it works");
        assert_eq!(pages(&next), [5, 6]);
    }

    #[test]
    fn a_failed_arming_keeps_what_is_owed() {
        let mut ledger = ledger();
        let mut owed = PageSet::empty(PAGES);
        owed.insert(7);
        ledger.put_back(&owed);
        ledger.tracker.fail_at = Some(0);
        ledger.arm().expect_err("the failure that was asked for");
        ledger.tracker.fail_at = None;
        let mut dirty = PageSet::empty(PAGES);
        ledger.harvest(&mut dirty).expect("it works");
        assert_eq!(pages(&dirty), [7]);
    }

    #[derive(Debug, Clone)]
    enum Act {
        Write(u64),
        /// Harvest; the tracker fails at the step, if there is one. `true`: the epoch is committed, else put back.
        Harvest(Option<usize>, bool),
        Peek(Option<usize>),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let step =
            || prop::option::weighted(0.4, prop_oneof![0..8_usize, Just(usize::try_from(PAGES).expect("small"))]);
        let act = prop_oneof![
            4 => (0..PAGES).prop_map(Act::Write),
            3 => (step(), any::<bool>()).prop_map(|(fail, commit)| Act::Harvest(fail, commit)),
            1 => step().prop_map(Act::Peek),
        ];
        prop::collection::vec(act, 0..80)
    }

    proptest! {
        /// The model: a page written is uncommitted until an epoch that holds it, harvested after the write, is committed.
        #[test]
        fn every_uncommitted_page_is_in_the_next_harvest(acts in acts()) {
            let mut ledger = ledger();
            let mut uncommitted = BTreeSet::new();
            for act in acts.into_iter().chain([Act::Harvest(None, true), Act::Harvest(None, true)]) {
                let mut dirty = PageSet::empty(PAGES);
                match act {
                    Act::Write(page) => {
                        ledger.tracker.write(page);
                        uncommitted.insert(page);
                    }
                    Act::Harvest(fail, commit) => {
                        ledger.tracker.fail_at = fail;
                        if ledger.harvest(&mut dirty).is_err() {
                            prop_assert!(dirty.is_empty());
                            continue;
                        }
                        prop_assert_eq!(pages(&dirty), uncommitted.iter().copied().collect::<Vec<_>>());
                        if commit { uncommitted.clear() } else { ledger.put_back(&dirty) }
                    }
                    Act::Peek(fail) => {
                        ledger.tracker.fail_at = fail;
                        if ledger.peek(&mut dirty).is_ok() {
                            prop_assert_eq!(pages(&dirty), uncommitted.iter().copied().collect::<Vec<_>>());
                        }
                    }
                }
            }
            prop_assert!(uncommitted.is_empty());
        }
    }
}
