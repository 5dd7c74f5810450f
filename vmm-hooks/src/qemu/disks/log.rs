//! What the guest wrote to its mirrored disks and nobody has taken yet, in the order of completion.
//!
//! Promise: a write is in the log before the guest is told that it is done. The log is bounded: over [`LogBounds::soft`] the
//! answer to a write waits until somebody takes some, so that the guest's disks are as fast as whoever takes. That wait ends
//! by itself: at once when the bound is lifted (around QEMU's `stop`, which waits for every answer), and after
//! [`LogBounds::stall`] without anybody taking, because other things in QEMU wait for answers, too. Over
//! [`LogBounds::hard`] nothing is kept any more and the log is broken: no write is ever missing from what a log that is not
//! broken hands out.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::disk::{DiskChange, DiskWrite};

/// What a write costs beside its data.
const WRITE_OVERHEAD: usize = 96;

/// How a log is bounded.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogBounds {
    /// Bytes over which answers wait.
    pub(super) soft: usize,
    /// Bytes over which the log breaks.
    pub(super) hard: usize,
    /// How long an answer waits while nobody takes.
    pub(super) stall: Duration,
}

/// The default: 64 MiB and 256 MiB; half of the time that QEMU's monitor may take to answer.
pub(super) const BOUNDS: LogBounds = LogBounds { soft: 64 << 20, hard: 256 << 20, stall: Duration::from_secs(5) };

const _: () = assert!(BOUNDS.soft + 2 * crate::nbd::PAYLOAD_MAX as usize <= BOUNDS.hard);

/// The log of all disks of one guest.
#[derive(Debug)]
pub(super) struct WriteLog {
    state: Mutex<State>,
    /// Told when there is room, or no more reason to wait for it.
    room: Condvar,
    /// Told when a write came.
    came: Condvar,
}

#[derive(Debug)]
struct State {
    writes: VecDeque<DiskWrite>,
    bytes: usize,
    bounds: LogBounds,
    /// Bytes that were ever written to the disks while it was open.
    written: u64,
    /// How often it was opened.
    opening: u64,
    /// Writes are kept.
    open: bool,
    /// It was full.
    overrun: bool,
    /// Nobody waits for room.
    lifted: bool,
    /// Since when it has been over the soft bound without anybody taking.
    over_since: Option<Instant>,
}

fn cost(write: &DiskWrite) -> usize {
    WRITE_OVERHEAD
        + match &write.change {
            DiskChange::Data(data) => data.len(),
            DiskChange::Zero(_) => 0,
        }
}

impl WriteLog {
    /// A closed one.
    pub(super) fn new(bounds: LogBounds) -> Self {
        Self {
            state: Mutex::new(State {
                writes: VecDeque::new(),
                bytes: 0,
                bounds,
                written: 0,
                opening: 0,
                open: false,
                overrun: false,
                lifted: false,
                over_since: None,
            }),
            room: Condvar::new(),
            came: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other bounds from now on.
    pub(super) fn bound(&self, bounds: LogBounds) {
        self.lock().bounds = bounds;
        self.room.notify_all();
    }

    /// Empties it and keeps writes from now on.
    pub(super) fn open(&self) {
        let mut state = self.lock();
        state.clear();
        (state.open, state.overrun, state.written) = (true, false, 0);
        state.opening += 1;
    }

    /// Empties it and forgets writes from now on; nobody waits.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.clear();
        state.open = false;
        drop(state);
        self.room.notify_all();
        self.came.notify_all();
    }

    /// Nobody waits for room until [`Self::lower`].
    pub(super) fn lift(&self) {
        self.lock().lifted = true;
        self.room.notify_all();
    }

    /// The bound holds again.
    pub(super) fn lower(&self) {
        let mut state = self.lock();
        state.lifted = false;
        state.watch();
    }

    /// Whether it was full and forgot writes.
    pub(super) fn overrun(&self) -> bool {
        self.lock().overrun
    }

    /// Appends a write; returns when it may be answered.
    pub(super) fn append(&self, write: DiskWrite) {
        let mut state = self.lock();
        if !state.open {
            return;
        }
        let cost = cost(&write);
        state.bytes += cost;
        state.written += (cost - WRITE_OVERHEAD) as u64;
        state.writes.push_back(write);
        if state.bytes > state.bounds.hard {
            state.clear();
            (state.open, state.overrun) = (false, true);
            drop(state);
            self.room.notify_all();
            self.came.notify_all();
            return;
        }
        state.watch();
        self.came.notify_all();
        while state.open
            && !state.lifted
            && let Some(since) = state.over_since
        {
            let left = state.bounds.stall.saturating_sub(since.elapsed());
            if left.is_zero() {
                return;
            }
            state = self.room.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Moves writes of at most `bytes` of data to the end of `into`, but at least one; waits for it no longer than `wait`.
    pub(super) fn take(&self, into: &mut Vec<DiskWrite>, bytes: usize, wait: Duration) {
        let deadline = Instant::now() + wait;
        let mut state = self.lock();
        while state.writes.is_empty() && state.open {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.came.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut taken = 0;
        while let Some(write) = state.writes.front() {
            let data = cost(write) - WRITE_OVERHEAD;
            if taken > 0 && taken + data > bytes {
                break;
            }
            // A run of zeroes is no data, but a caller that asked for one write does not want them all.
            taken += data.max(1);
            state.bytes -= data + WRITE_OVERHEAD;
            into.extend(state.writes.pop_front());
        }
        state.over_since = None;
        state.watch();
        drop(state);
        self.room.notify_all();
    }

    /// How often it was opened so far.
    pub(super) fn opening(&self) -> u64 {
        self.lock().opening
    }

    /// Waits until so many bytes were written since this opening, and gives how many; `None` once that is over.
    pub(super) fn wait_written(&self, opening: u64, bytes: u64) -> Option<u64> {
        let mut state = self.lock();
        let now = |state: &State| state.open && state.opening == opening;
        while now(&state) && state.written < bytes {
            state = self.came.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        now(&state).then_some(state.written)
    }

    /// Moves everything to the end of `into`.
    pub(super) fn take_all(&self, into: &mut Vec<DiskWrite>) {
        let mut state = self.lock();
        into.extend(state.writes.drain(..));
        state.clear();
        drop(state);
        self.room.notify_all();
    }

    /// Puts writes back that were taken: they come first again. Nobody waits because of them.
    pub(super) fn put_back(&self, writes: Vec<DiskWrite>) {
        let mut state = self.lock();
        if !state.open {
            return;
        }
        state.bytes += writes.iter().map(cost).sum::<usize>();
        for write in writes.into_iter().rev() {
            state.writes.push_front(write);
        }
        drop(state);
        self.came.notify_all();
    }
}

impl State {
    fn clear(&mut self) {
        self.writes.clear();
        self.bytes = 0;
        self.over_since = None;
    }

    /// Notices when the bound is crossed.
    fn watch(&mut self) {
        if self.bytes <= self.bounds.soft {
            self.over_since = None;
        } else if self.over_since.is_none() {
            self.over_since = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(30);

    fn write(offset: u64, bytes: usize) -> DiskWrite {
        DiskWrite { disk: 0, offset, change: DiskChange::Data(vec![1; bytes]) }
    }

    fn log(soft: usize, hard: usize, stall: Duration) -> Arc<WriteLog> {
        let log = WriteLog::new(LogBounds { soft, hard, stall });
        log.open();
        Arc::new(log)
    }

    /// Appends from another thread; hears when it was answered.
    fn append(log: &Arc<WriteLog>, write: DiskWrite) -> Receiver<()> {
        let (log, (told, hear)) = (Arc::clone(log), channel());
        thread::spawn(move || {
            log.append(write);
            told.send(())
        });
        hear
    }

    fn offsets(writes: &[DiskWrite]) -> Vec<u64> {
        writes.iter().map(|write| write.offset).collect()
    }

    #[test]
    fn writes_come_out_in_order_by_amount_and_what_is_put_back_first() {
        let log = log(1 << 20, 1 << 20, LONG);
        (0..5).for_each(|offset| log.append(write(offset, 10)));
        log.append(DiskWrite { disk: 1, offset: 5, change: DiskChange::Zero(1 << 40) });
        let mut taken = Vec::new();
        log.take(&mut taken, 25, Duration::ZERO);
        assert_eq!(offsets(&taken), [0, 1]);
        log.take(&mut taken, 1, Duration::ZERO);
        assert_eq!(offsets(&taken), [0, 1, 2], "one at least");
        log.put_back(taken.split_off(1));
        let mut rest = Vec::new();
        log.take_all(&mut rest);
        assert_eq!(offsets(&rest), [1, 2, 3, 4, 5]);
        log.take(&mut rest, 1, SHORT);
        assert_eq!((rest.len(), log.lock().bytes), (5, 0));
    }

    #[test]
    fn over_the_bound_an_answer_waits_until_some_was_taken() {
        let log = log(500, 1 << 20, LONG);
        assert!(append(&log, write(0, 300)).recv_timeout(LONG).is_ok());
        let answer = append(&log, write(1, 300));
        // It is there to be taken before it is answered.
        let mut taken = Vec::new();
        while log.lock().writes.len() < 2 {
            thread::yield_now();
        }
        assert_eq!(answer.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
        log.take(&mut taken, 1, LONG);
        assert!(answer.recv_timeout(LONG).is_ok());
    }

    #[test]
    fn lifting_or_closing_lets_answers_go_and_nobody_taking_does_after_a_while() {
        let blocked = log(10, 1 << 20, LONG);
        let answer = append(&blocked, write(0, 100));
        assert_eq!(answer.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
        blocked.lift();
        assert!(answer.recv_timeout(LONG).is_ok());
        assert!(append(&blocked, write(1, 100)).recv_timeout(LONG).is_ok());
        blocked.lower();
        let answer = append(&blocked, write(2, 100));
        assert_eq!(answer.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
        blocked.close();
        assert!(answer.recv_timeout(LONG).is_ok());
        let stalled = log(10, 1 << 20, SHORT);
        assert!(append(&stalled, write(0, 100)).recv_timeout(LONG).is_ok());
        assert!(append(&stalled, write(1, 100)).recv_timeout(LONG).is_ok());
        assert!(!stalled.overrun());
    }

    #[test]
    fn what_was_written_is_counted_until_it_is_closed() {
        let log = log(1 << 20, 1 << 20, LONG);
        let (told, hear) = channel();
        let waiting = thread::spawn({
            let log = Arc::clone(&log);
            move || {
                told.send(log.wait_written(1, 15))?;
                told.send(log.wait_written(1, 21))
            }
        });
        log.append(write(0, 10));
        log.append(write(1, 10));
        assert_eq!(hear.recv_timeout(LONG), Ok(Some(20)));
        log.close();
        assert_eq!(hear.recv_timeout(LONG), Ok(None));
        waiting.join().expect("no panic").expect("somebody hears");
    }

    #[test]
    fn over_the_hard_bound_it_breaks_and_says_so() {
        let log = log(10, 1000, Duration::ZERO);
        log.append(write(0, 500));
        assert!(!log.overrun());
        log.append(write(1, 500));
        assert!(log.overrun());
        log.append(write(2, 1));
        log.put_back(vec![write(3, 1)]);
        let mut taken = Vec::new();
        log.take(&mut taken, usize::MAX, LONG);
        assert!(taken.is_empty(), "a log with a gap hands nothing out");
        log.open();
        assert!(!log.overrun());
        log.append(write(3, 1));
        log.take_all(&mut taken);
        assert_eq!(offsets(&taken), [3]);
    }
}
