//! Guest pages copied by two threads: the caller's, and one that waits for such work.
//!
//! Promise: when [`Copier::copy`] returns, all pages are where they belong and no other thread touches the buffer, whichever of the two
//! has copied what; nothing is allocated. A helper that gets no processor costs nothing but its waking: the caller goes on without it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::kvm::ram::Ram;
use crate::layout::PAGE_SIZE;
use crate::sys::sched::{Urgency, realtime};

/// Pages that a thread takes at once.
const CHUNK: usize = 16;
/// How often the caller looks whether the helper has finished what it had taken before it lets itself be woken: some microseconds, as
/// long as a chunk takes.
const SPINS: usize = 2000;

/// Copies consecutive pages in one piece each.
///
/// # Panics
/// If a page is outside of `ram`, or `into` has not the length of the pages.
pub fn by_runs(ram: &Ram, pages: &[u64], into: &mut [u8]) {
    assert_eq!(into.len(), pages.len() * PAGE_SIZE, "a buffer of another length");
    let (mut pages, mut into) = (pages, into);
    while let Some(&first) = pages.first() {
        let run = pages.iter().zip(first..).take_while(|&(&page, expected)| page == expected).count();
        let (now, later) = into.split_at_mut(run * PAGE_SIZE);
        ram.read_pages(first, now);
        (pages, into) = (&pages[run..], later);
    }
}

/// A list of pages and where they are to go. Both belong to the caller of [`Copier::copy`].
#[derive(Debug, Clone, Copy)]
struct Work {
    pages: *const u64,
    length: usize,
    into: *mut u8,
}

// SAFETY: the pointers are followed by the two threads that share the work alone, each in chunks that it took for itself.
unsafe impl Send for Work {}

#[derive(Debug, Default)]
struct State {
    /// To be begun by the helper.
    work: Option<Work>,
    /// The helper is at it.
    working: bool,
    ends: bool,
}

#[derive(Debug)]
struct Shared {
    ram: Arc<Ram>,
    /// The next page, by its place in the list, that nobody has taken.
    next: AtomicUsize,
    /// As `working`, for who looks without the lock.
    busy: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds the work")
    }

    /// Copies what nobody has taken.
    ///
    /// # Safety
    /// `work` is the work that `next` counts for, its pointers are those of slices of `length` pages that are borrowed, the second of
    /// them exclusively, until every thread has returned from here, and nobody else uses them meanwhile.
    unsafe fn take_part(&self, work: Work) {
        loop {
            let start = self.next.fetch_add(CHUNK, Ordering::Relaxed);
            if start >= work.length {
                return;
            }
            let length = CHUNK.min(work.length - start);
            // SAFETY: inside of the list, by the two lines above.
            let pages = unsafe { work.pages.add(start) };
            // SAFETY: the list is borrowed, by the caller's promise, and nobody writes it.
            let pages = unsafe { std::slice::from_raw_parts(pages, length) };
            // SAFETY: the buffer has as many pages as the list.
            let into = unsafe { work.into.add(start * PAGE_SIZE) };
            // SAFETY: each chunk is taken by one thread, once: `next` only grows. So nobody else has a reference to this part of
            // the buffer, which is borrowed and initialised.
            let into = unsafe { std::slice::from_raw_parts_mut(into, length * PAGE_SIZE) };
            by_runs(&self.ram, pages, into);
        }
    }

    /// The helper's life.
    fn help(&self) {
        let mut state = self.lock();
        loop {
            if state.ends {
                return;
            }
            let Some(work) = state.work.take() else {
                state = self.changed.wait(state).expect("nobody panics while it holds the work");
                continue;
            };
            state.working = true;
            self.busy.store(true, Ordering::Relaxed);
            drop(state);
            // SAFETY: `copy` gave the work away with its `next` at the beginning, and does not return before `working` is false again.
            unsafe { self.take_part(work) };
            state = self.lock();
            state.working = false;
            self.busy.store(false, Ordering::Relaxed);
            self.changed.notify_all();
        }
    }

    /// Takes back what the helper has not begun, and waits until it has finished what it has.
    fn settle(&self) {
        self.lock().work = None;
        for _ in 0..SPINS {
            if !self.busy.load(Ordering::Relaxed) {
                break;
            }
            std::hint::spin_loop();
        }
        let done = self.changed.wait_while(self.lock(), |state| state.working);
        drop(done.expect("nobody panics while it holds the work"));
    }
}

/// Settles, also when what is done meanwhile panics.
struct Settles<'a>(&'a Shared);

impl Drop for Settles<'_> {
    fn drop(&mut self) {
        self.0.settle();
    }
}

/// The two threads' work, and the second of them.
#[derive(Debug)]
pub struct Copier {
    shared: Arc<Shared>,
    helper: Option<JoinHandle<()>>,
}

impl Copier {
    /// Starts the helper, which waits.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn new(ram: Arc<Ram>) -> io::Result<Self> {
        let state = Mutex::new(State::default());
        let (next, busy) = (AtomicUsize::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { ram, next, busy, state, changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let helper = std::thread::Builder::new().name("us-copy".to_owned()).spawn(move || {
            // Else a busy host might take its processor away in the middle of a chunk, for which the caller then waits. Without it that is so.
            let _ = realtime(Urgency::Pause);
            theirs.help();
        })?;
        Ok(Self { shared, helper: Some(helper) })
    }

    /// Does what is to be done meanwhile, while the helper begins to copy `pages` to `into`; then copies what is left of them.
    ///
    /// # Panics
    /// If a page is outside of the memory, or `into` has not the length of the pages.
    pub fn copy<R>(&mut self, pages: &[u64], into: &mut [u8], meanwhile: impl FnOnce() -> R) -> R {
        assert_eq!(into.len(), pages.len() * PAGE_SIZE, "a buffer of another length");
        let inside = |&page: &u64| page < self.shared.ram.pages();
        // Here, where it is the caller's panic: they are in order.
        assert!(pages.iter().all(inside), "a page outside of the memory");
        let work = Work { pages: pages.as_ptr(), length: pages.len(), into: into.as_mut_ptr() };
        self.shared.next.store(0, Ordering::Relaxed);
        let settles = Settles(&self.shared);
        self.shared.lock().work = Some(work);
        self.shared.changed.notify_all();
        let done = meanwhile();
        // SAFETY: both slices are borrowed until this function returns, which it does after `settles`; until then nobody else uses
        // them: `meanwhile` cannot, for they are borrowed.
        unsafe { self.shared.take_part(work) };
        drop(settles);
        done
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_all();
        if let Some(helper) = self.helper.take() {
            // It cannot have panicked: what it copies was looked at before.
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::SharedMemory;

    #[test]
    fn each_page_is_copied_once_whoever_does_it() {
        const PAGES: u64 = 1000;
        let shared = SharedMemory::new("copy-test", PAGES * PAGE_SIZE as u64).expect("a small one");
        for page in 0..PAGES {
            shared.write(page * PAGE_SIZE as u64, &[u8::try_from(page % 251).expect("small"); PAGE_SIZE]);
        }
        let ram = Arc::new(Ram::map(&shared, false).expect("it can be mapped"));
        let mut copier = Copier::new(ram).expect("a thread");
        let mut into = Vec::new();
        // Few and many, in runs and alone, with a helper that is there in time and one that is not.
        for (round, step) in (0..200_usize).zip([1, 2, 3, 7].into_iter().cycle()) {
            let pages: Vec<u64> = (0..PAGES).step_by(step).take(round * 7).collect();
            into.clear();
            into.resize(pages.len() * PAGE_SIZE, 0xff);
            let answer = copier.copy(&pages, &mut into, || {
                if round % 3 == 0 {
                    std::thread::yield_now();
                }
                round
            });
            assert_eq!(answer, round);
            for (page, bytes) in pages.iter().zip(into.chunks(PAGE_SIZE)) {
                assert!(bytes.iter().all(|&byte| u64::from(byte) == page % 251), "page {page}, round {round}");
            }
        }
    }

    #[test]
    fn a_panic_meanwhile_leaves_nobody_at_the_buffer() {
        let shared = SharedMemory::new("copy-test", 64 * PAGE_SIZE as u64).expect("a small one");
        let mut copier = Copier::new(Arc::new(Ram::map(&shared, false).expect("it can be mapped"))).expect("a thread");
        let pages: Vec<u64> = (0..64).collect();
        let mut into = vec![1; pages.len() * PAGE_SIZE];
        let copying = std::panic::AssertUnwindSafe(|| copier.copy(&pages, &mut into, || panic!("as it must")));
        std::panic::catch_unwind(copying).expect_err("it panics");
        assert!(!copier.shared.lock().working && copier.shared.lock().work.is_none());
        copier.copy(&pages, &mut into, || ());
        assert!(into.iter().all(|&byte| byte == 0));
    }
}
