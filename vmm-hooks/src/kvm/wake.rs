//! What a vCPU waits for that has nothing to do: that something happens, or a time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Counts what happens.
#[derive(Debug, Default)]
pub(super) struct Wake {
    count: Mutex<u64>,
    changed: Condvar,
    waiting: AtomicUsize,
}

impl Wake {
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().expect("nobody panics while it counts")
    }

    /// Something happened: everybody who waits goes on, and who begins to wait now does not.
    pub(super) fn all(&self) {
        *self.lock() += 1;
        self.changed.notify_all();
    }

    /// How much has happened.
    pub(super) fn happened(&self) -> u64 {
        *self.lock()
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Waits until more has happened than `seen`, or for `most`; returns what has happened.
    pub(super) fn wait(&self, seen: u64, most: Duration) -> u64 {
        let deadline = Instant::now() + most;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut count = self.lock();
        while *count == seen {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                break;
            };
            count = self.changed.wait_timeout(count, left).expect("nobody panics while it counts").0;
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        *count
    }
}
