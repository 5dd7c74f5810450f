//! What a vCPU waits for that has nothing to do: that something happens, or a time.
//!
//! Promise: what happens after the guest has last looked ends the wait that follows, also if it happens before that begins.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use super::process::board::Board;

/// Counts what happens, for one vCPU.
#[derive(Debug, Default)]
pub(super) struct Wake {
    state: Mutex<State>,
    changed: Condvar,
    /// If somebody in another process looks: where it is shown, and as which vCPU.
    shown: OnceLock<(Arc<Board>, usize)>,
}

#[derive(Debug, Default)]
struct State {
    happened: u64,
    /// What had happened when the vCPU last began to look.
    seen: u64,
    waits: bool,
}

impl Wake {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it counts")
    }

    /// Shows itself there from now on, as that of vCPU `number`.
    pub(super) fn show_on(&self, board: Arc<Board>, number: usize) {
        // Once for a machine.
        let _ = self.shown.set((board, number));
        self.show(&self.lock());
    }

    /// To be called after each change.
    fn show(&self, state: &State) {
        if let Some((board, number)) = self.shown.get() {
            board.show_vcpu(*number, state.waits && state.happened == state.seen);
        }
    }

    /// Something happened: who waits goes on, and who begins to wait now does not.
    pub(super) fn wake(&self) {
        let mut state = self.lock();
        state.happened += 1;
        self.show(&state);
        if state.waits {
            self.changed.notify_all();
        }
    }

    /// Whether nothing has happened that ends the vCPU's wait, or the one that it is about to begin.
    pub(super) fn quiet(&self) -> bool {
        let state = self.lock();
        state.happened == state.seen
    }

    /// For the vCPU's thread: waits until more has happened than when this last returned, or for `most`.
    pub(super) fn wait(&self, most: Duration) {
        let deadline = Instant::now() + most;
        let mut state = self.lock();
        state.waits = true;
        self.show(&state);
        while state.happened == state.seen {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                break;
            };
            state = self.changed.wait_timeout(state, left).expect("nobody panics while it counts").0;
        }
        state.waits = false;
        state.seen = state.happened;
        self.show(&state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_before_a_wait_ends_it_once() {
        let wake = Wake::default();
        wake.wake();
        wake.wake();
        // For ever, if it were lost.
        wake.wait(Duration::MAX / 4);
        assert!(wake.quiet());
        wake.wait(Duration::ZERO);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wake.wait(Duration::MAX / 4));
            while !wake.lock().waits {
                std::thread::yield_now();
            }
            assert!(wake.quiet());
            wake.wake();
            waiting.join().expect("it does not panic");
        });
    }
}
