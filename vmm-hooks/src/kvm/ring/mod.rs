//! Dirty pages by rings, one a vCPU (`KVM_CAP_DIRTY_LOG_RING`), in the order that the kernel documents (Documentation/virt/kvm/api.rst, section
//! 8.29): an entry is read after its flags, given back by its flags, and its page is tracked anew by `KVM_RESET_DIRTY_RINGS`.
//!
//! Promises: a page is in the set of its epoch before its entry is given back. A ring that overflowed is never taken for a whole one: the
//! kernel overwrites entries then, which leaves every entry dirty, which a ring that is emptied in time never is. Nothing is found any more from
//! then on, and every harvest fails. A reset that was broken off leaves pages untracked ([`crate::sys::kvm::Vm::reset_rings`]): the harvest of their epoch, which
//! has them, tracks all memory anew before the next one begins.
//!
//! A vCPU whose ring is full empties all of them itself, into the set of the epoch that it is in, and goes on: see [`Rings::full`].

pub mod check;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::layout::PageSet;
use crate::sys::kvm::{KvmError, SLOT, Taken, Vcpu, Vm};
use crate::sys::ring::{Entry, Ring};

/// Entries of each vCPU's ring: 64 KiB of memory that cannot be swapped out.
pub(super) const LENGTH: usize = 4096;
/// How often KVM may take nothing back before that is an error: a signal that is pending makes it return at once.
const RESETS_MAX: u32 = 1000;

/// Why the dirty pages are not known.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel wrote over entries that nobody had read.
    #[error("the ring of dirty pages of vCPU {cpu} has overflowed: not all that the guest wrote is known")]
    Overflow {
        /// Whose ring.
        cpu: usize,
    },
    /// It overflowed before.
    #[error("a ring of dirty pages has overflowed before, and cannot be used again")]
    Broken,
    /// There is no such page.
    #[error("KVM says that page {page} of memory slot {slot} is dirty, and there is none")]
    Entry {
        /// The memory slot.
        slot: u32,
        /// The page in it.
        page: u64,
    },
    /// What was given back is not what was taken back.
    #[error("KVM took {taken} entries of its rings of dirty pages back, and {harvested} were read")]
    Reset {
        /// Entries that were read.
        harvested: usize,
        /// Entries that KVM says it has again.
        taken: usize,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// What is known of rings.
#[derive(Debug)]
struct State {
    /// Where each one goes on.
    next: Vec<usize>,
    /// What was found since the last harvest.
    found: PageSet,
    broken: bool,
    /// Pages that were found since the last harvest may not be tracked any more: KVM's reset was broken off.
    torn: bool,
    /// How often entries were collected.
    rounds: u64,
    /// For each vCPU: at which round it last stopped at a full ring that was found empty.
    vain: Vec<Option<u64>>,
}

impl State {
    fn new(rings: usize, pages: u64) -> Self {
        let (next, vain) = (vec![0; rings], vec![None; rings]);
        Self { next, found: PageSet::empty(pages), broken: false, torn: false, rounds: 0, vain }
    }

    /// Reads what `rings` hold, and has it taken back by `reset`, which says how many entries it took. How many there were.
    fn collect<R: AsRef<[Entry]>>(
        &mut self,
        rings: &[R],
        reset: impl FnMut() -> Result<Taken, KvmError>,
    ) -> Result<usize, RingError> {
        if self.broken {
            return Err(RingError::Broken);
        }
        let collected = self.read(rings).and_then(|harvested| {
            self.torn |= take_back(harvested, reset)?;
            Ok(harvested)
        });
        // What is not known or not tracked any more cannot become known.
        self.broken = collected.is_err();
        self.rounds += u64::from(matches!(collected, Ok(1..)));
        collected
    }

    /// vCPU `cpu` stopped because its ring was full, and so many entries were collected then.
    fn emptied(&mut self, cpu: usize, collected: usize) -> Result<(), RingError> {
        // Another one that stopped at the same moment emptied all rings before: this one goes on.
        if collected > 0 || self.vain[cpu].replace(self.rounds) != Some(self.rounds) {
            return Ok(());
        }
        // KVM counts entries that are not there, and would stop this vCPU again at once, for ever.
        self.broken = true;
        Err(RingError::Broken)
    }

    /// Forgets what was found, of a machine that stands; `track_anew`: has all pages tracked that are not.
    fn take(&mut self, track_anew: impl FnOnce() -> Result<(), KvmError>) -> Result<(), RingError> {
        self.found.clear();
        if std::mem::take(&mut self.torn) {
            tracing::debug!("the reset of a ring of dirty pages was broken off; all memory is tracked anew");
            let tracked = track_anew();
            self.broken |= tracked.is_err();
            tracked?;
        }
        Ok(())
    }

    fn read<R: AsRef<[Entry]>>(&mut self, rings: &[R]) -> Result<usize, RingError> {
        let mut harvested = 0;
        for (cpu, (ring, next)) in rings.iter().zip(&mut self.next).enumerate() {
            let ring = ring.as_ref();
            let mut read = 0;
            while read < ring.len()
                && let Some((slot, page)) = ring[*next].dirty()
            {
                if slot != SLOT || page >= self.found.capacity() {
                    return Err(RingError::Entry { slot, page });
                }
                self.found.insert(page);
                ring[*next].harvested();
                *next = if *next + 1 == ring.len() { 0 } else { *next + 1 };
                read += 1;
            }
            if read == ring.len() {
                return Err(RingError::Overflow { cpu });
            }
            harvested += read;
        }
        Ok(harvested)
    }
}

/// Has `harvested` entries taken back. Whether that was broken off, so that not all of their pages may be tracked.
fn take_back(harvested: usize, mut reset: impl FnMut() -> Result<Taken, KvmError>) -> Result<bool, RingError> {
    let (mut taken, mut vain, mut torn) = (0, 0, false);
    while taken < harvested && vain < RESETS_MAX {
        match reset() {
            Ok(Taken { entries, broken_off }) => {
                taken += entries;
                vain += u32::from(entries == 0);
                torn |= broken_off || (entries > 0 && taken < harvested);
            }
            Err(error) if error.source.kind() == std::io::ErrorKind::Interrupted => (vain, torn) = (vain + 1, true),
            Err(error) => return Err(error.into()),
        }
    }
    if taken == harvested { Ok(torn) } else { Err(RingError::Reset { harvested, taken }) }
}

/// The rings of one machine.
#[derive(Debug)]
pub(super) struct Rings {
    vm: Arc<Vm>,
    rings: Vec<Ring>,
    state: Mutex<State>,
    filled: AtomicU64,
}

impl Rings {
    /// Those of `vcpus`, all that `vm` has; it was made with rings of [`LENGTH`].
    pub(super) fn new<'a>(vm: &Arc<Vm>, vcpus: impl IntoIterator<Item = &'a Vcpu>) -> Result<Self, KvmError> {
        let rings = vcpus.into_iter().map(|vcpu| Ring::map(vcpu.fd(), LENGTH)).collect::<Result<Vec<_>, _>>()?;
        let state = Mutex::new(State::new(rings.len(), vm.ram().pages()));
        Ok(Self { vm: Arc::clone(vm), rings, state, filled: AtomicU64::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it reads rings")
    }

    /// Adds what was written since the last harvest to `dirty`; `take`: and it is not found again, for which the machine must stand.
    pub(super) fn harvest(&self, dirty: &mut PageSet, take: bool) -> Result<(), RingError> {
        let mut state = self.lock();
        state.collect(&self.rings, || self.vm.reset_rings())?;
        dirty.union_with(&state.found);
        if take {
            state.take(|| self.vm.log(false).and_then(|()| self.vm.log(true)))?;
        }
        Ok(())
    }

    /// Forgets what was written. No page is tracked then before logging is begun anew.
    pub(super) fn forget(&self) -> Result<(), RingError> {
        let mut state = self.lock();
        state.collect(&self.rings, || self.vm.reset_rings())?;
        state.take(|| Ok(()))
    }

    /// How often a vCPU stopped because its ring was full.
    pub(super) fn filled(&self) -> u64 {
        self.filled.load(Ordering::Relaxed)
    }

    /// For vCPU `cpu`, which KVM does not let go on before its ring is emptied. While other vCPUs run this is as good as while they stand: a page is
    /// found, and is read only when all of them stand; whoever writes it again meanwhile makes a new entry.
    pub(super) fn full(&self, cpu: usize) -> Result<(), RingError> {
        self.filled.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        let collected = state.collect(&self.rings, || self.vm.reset_rings())?;
        state.emptied(cpu, collected)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 100;
    const SHORT: usize = 8;
    /// A vCPU leaves the guest when its ring has so many.
    const SOFT: usize = 6;

    /// A ring as the kernel keeps it: two counters that only grow.
    struct Kernel {
        ring: Vec<Entry>,
        dirty: Cell<usize>,
        reset: Cell<usize>,
        /// Pages whose writes it does not see.
        untracked: RefCell<BTreeSet<u64>>,
    }

    impl Kernel {
        fn new() -> Self {
            let ring = (0..SHORT).map(|_| Entry::default()).collect();
            Self { ring, dirty: Cell::new(0), reset: Cell::new(0), untracked: RefCell::default() }
        }

        /// The guest writes.
        fn write(&self, page: u64) {
            if self.untracked.borrow_mut().insert(page) {
                self.push(page);
            }
        }

        fn full(&self) -> bool {
            self.dirty.get() - self.reset.get() >= SOFT
        }

        /// Writes over what is there if nobody looked whether it is full.
        fn push(&self, page: u64) {
            self.ring[self.dirty.get() % SHORT].push(SLOT, page);
            self.dirty.set(self.dirty.get() + 1);
        }

        /// At most so many, as when a signal comes: the page of the last one is then not tracked.
        fn reset(&self, most: usize) -> Taken {
            let begun = self.reset.get();
            let mut at = begun;
            let (mut gathered, mut broken_off) = (None, false);
            loop {
                if at - begun == most {
                    (gathered, broken_off) = (None, true);
                    break;
                }
                let entry = &self.ring[at % SHORT];
                let page = entry.page();
                if at == self.dirty.get() || !entry.reset() {
                    break;
                }
                at += 1;
                if let Some(page) = gathered.replace(page) {
                    self.untracked.borrow_mut().remove(&page);
                }
            }
            if let Some(page) = gathered {
                self.untracked.borrow_mut().remove(&page);
            }
            self.reset.set(at);
            Taken { entries: at - begun, broken_off }
        }
    }

    impl AsRef<[Entry]> for Kernel {
        fn as_ref(&self) -> &[Entry] {
            &self.ring
        }
    }

    fn whole(entries: usize) -> Taken {
        Taken { entries, broken_off: false }
    }

    fn collect(state: &mut State, kernels: &[Kernel], most: usize) -> Result<usize, RingError> {
        let all = || kernels.iter().map(|kernel| kernel.reset(most));
        let sum = |sum: Taken, next: Taken| Taken {
            entries: sum.entries + next.entries,
            broken_off: sum.broken_off || next.broken_off,
        };
        state.collect(kernels, || Ok(all().fold(whole(0), sum)))
    }

    #[test]
    fn a_ring_goes_round_and_each_page_is_found_once() {
        let (mut state, kernels) = (State::new(1, PAGES), [Kernel::new()]);
        for page in 0..PAGES {
            kernels[0].push(page);
            // Sometimes three at once, and the end of the ring in the middle of them.
            if page % 3 == 2 {
                assert_eq!(collect(&mut state, &kernels, SHORT).expect("it is whole"), 3);
                assert_eq!(state.found.iter().collect::<Vec<_>>(), [page - 2, page - 1, page]);
                state.found.clear();
            }
        }
        assert_eq!(collect(&mut state, &kernels, SHORT).expect("it is whole"), 1);
        assert_eq!(collect(&mut state, &kernels, SHORT).expect("it is whole"), 0, "nothing is found twice");
    }

    #[test]
    fn a_ring_that_was_written_over_is_an_error_for_good() {
        // By one entry, and by twice its length.
        for written in [SHORT + 1, 2 * SHORT, 3 * SHORT - 1] {
            let (mut state, kernels) = (State::new(2, PAGES), [Kernel::new(), Kernel::new()]);
            (0..written).for_each(|page| kernels[1].push(page as u64));
            let error = collect(&mut state, &kernels, SHORT).expect_err("entries were lost");
            assert!(matches!(error, RingError::Overflow { cpu: 1 }), "{error}");
            let error = collect(&mut state, &kernels, SHORT).expect_err("it was broken");
            assert!(matches!(error, RingError::Broken), "{error}");
        }
    }

    #[test]
    fn a_page_that_is_not_there_and_a_reset_that_takes_something_else_are_errors() {
        let (mut state, kernel) = (State::new(1, PAGES), Kernel::new());
        kernel.ring[0].push(SLOT, PAGES);
        assert!(matches!(state.collect(&[&kernel], || Ok(whole(1))), Err(RingError::Entry { .. })));
        let (mut state, kernel) = (State::new(1, PAGES), Kernel::new());
        kernel.ring[0].push(SLOT + 1, 3);
        assert!(matches!(state.collect(&[&kernel], || Ok(whole(1))), Err(RingError::Entry { .. })));
        for taken in [0, 2] {
            let (mut state, kernel) = (State::new(1, PAGES), Kernel::new());
            kernel.push(3);
            let collected = state.collect(&[&kernel], || Ok(whole(taken)));
            assert!(matches!(collected, Err(RingError::Reset { harvested: 1, taken: its }) if its == taken));
        }
        // What the kernel refuses is told.
        let (mut state, kernel) = (State::new(1, PAGES), Kernel::new());
        kernel.push(3);
        let refused = || Err(KvmError { what: "be asked", source: std::io::ErrorKind::InvalidInput.into() });
        assert!(matches!(state.collect(&[&kernel], refused), Err(RingError::Kvm(_))));
    }

    #[test]
    fn two_that_are_full_at_once_go_on_and_one_that_is_full_of_nothing_does_not() {
        let (mut state, kernels) = (State::new(2, PAGES), [Kernel::new(), Kernel::new()]);
        for round in 0..3 {
            (0..SOFT).for_each(|page| kernels.iter().for_each(|kernel| kernel.push((round + page) as u64)));
            // The first one empties both.
            let collected = collect(&mut state, &kernels, SHORT).expect("emptied in time");
            assert_eq!(collected, 2 * SOFT);
            state.emptied(0, collected).expect("it was full");
            let collected = collect(&mut state, &kernels, SHORT).expect("emptied in time");
            assert_eq!(collected, 0);
            state.emptied(1, collected).expect("it was full, until the first one emptied it");
        }
        assert!(matches!(state.emptied(1, 0), Err(RingError::Broken)), "nothing happened since");
        assert!(matches!(collect(&mut state, &kernels, SHORT), Err(RingError::Broken)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write { cpu: usize, page: u64 },
        Harvest,
    }

    proptest! {
        /// Writers that empty their rings when they are full, and harvests in between: no page is lost, and none comes that nobody wrote.
        #[test]
        fn no_page_is_lost(
            steps in prop::collection::vec(
                prop_oneof![8 => (0..2_usize, 0..PAGES).prop_map(|(cpu, page)| Step::Write { cpu, page }), 1 => Just(Step::Harvest)],
                0..300,
            ),
            most in 1..4_usize,
        ) {
            let (mut state, kernels) = (State::new(2, PAGES), [Kernel::new(), Kernel::new()]);
            let mut written = PageSet::empty(PAGES);
            for step in steps {
                match step {
                    Step::Write { cpu, page } => {
                        kernels[cpu].write(page);
                        written.insert(page);
                        if kernels[cpu].full() {
                            prop_assert!(collect(&mut state, &kernels, most).expect("emptied in time") >= SOFT);
                        }
                    }
                    Step::Harvest => {
                        collect(&mut state, &kernels, most).expect("emptied in time");
                        prop_assert_eq!(&state.found, &written);
                        let anew = || {
                            kernels.iter().for_each(|kernel| kernel.untracked.borrow_mut().clear());
                            Ok(())
                        };
                        state.take(anew).expect("it is tracked anew");
                        written.clear();
                    }
                }
            }
        }
    }
}
