//! The pilot's ports: orders for it, its clock, its waiting and its end. See `pilot/src/abi.rs`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Orders on their way to the pilot.
#[derive(Debug, Default)]
pub(super) struct Orders {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    words: VecDeque<u32>,
    given: u64,
    done: u64,
    ended: bool,
}

impl Orders {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds orders")
    }

    /// Gives an order; its number.
    pub(super) fn give(&self, words: &[u32]) -> u64 {
        let mut state = self.lock();
        state.words.extend(words);
        state.given += 1;
        state.given
    }

    /// Waits until the order with this number is carried out. False: the machine has ended, or it takes longer than `most`.
    pub(super) fn carried_out(&self, number: u64, most: Duration) -> bool {
        let waits = |state: &mut State| state.done < number && !state.ended;
        let (state, _) =
            self.changed.wait_timeout_while(self.lock(), most, waits).expect("nobody panics while it holds orders");
        state.done >= number
    }

    /// The next word for the pilot.
    pub(super) fn next(&self) -> u32 {
        self.lock().words.pop_front().unwrap_or(0)
    }

    /// The pilot carried out an order.
    pub(super) fn done(&self) {
        self.lock().done += 1;
        self.changed.notify_all();
    }

    /// Nothing is carried out any more.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

/// The time that a machine has run.
#[derive(Debug)]
pub(super) struct Clock {
    state: Mutex<ClockState>,
    /// The high halves of what the vCPUs read last.
    latches: Vec<AtomicU32>,
}

#[derive(Debug, Default)]
struct ClockState {
    ran: Duration,
    since: Option<Instant>,
}

impl Clock {
    /// A clock at zero that stands.
    pub(super) fn new(cpus: usize) -> Self {
        Self { state: Mutex::default(), latches: (0..cpus).map(|_| AtomicU32::new(0)).collect() }
    }

    fn lock(&self) -> MutexGuard<'_, ClockState> {
        self.state.lock().expect("nobody panics while it holds the clock")
    }

    pub(super) fn start(&self) {
        self.lock().since.get_or_insert_with(Instant::now);
    }

    pub(super) fn stop(&self) {
        let mut state = self.lock();
        if let Some(since) = state.since.take() {
            state.ran += since.elapsed();
        }
    }

    /// Nanoseconds that the machine has run.
    pub(super) fn now(&self) -> u64 {
        let state = self.lock();
        let ran = state.ran + state.since.map_or(Duration::ZERO, |since| since.elapsed());
        u64::try_from(ran.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The low half of the time; keeps the high half for this vCPU.
    pub(super) fn low(&self, cpu: usize) -> u32 {
        let now = self.now();
        self.latches[cpu].store(u32::try_from(now >> 32).expect("32 bits"), Ordering::Relaxed);
        u32::try_from(now & 0xffff_ffff).expect("32 bits")
    }

    /// The high half of what this vCPU read last.
    pub(super) fn high(&self, cpu: usize) -> u32 {
        self.latches[cpu].load(Ordering::Relaxed)
    }

    /// Time, and what each vCPU has still to read.
    pub(super) fn save(&self, into: &mut super::state::Writer<'_>) {
        into.u64(self.now());
        self.latches.iter().for_each(|latch| into.u32(latch.load(Ordering::Relaxed)));
    }

    pub(super) fn load(&self, from: &mut super::state::Reader<'_>) -> Result<(), super::state::StateError> {
        self.lock().ran = Duration::from_nanos(from.u64()?);
        for latch in &self.latches {
            latch.store(from.u32()?, Ordering::Relaxed);
        }
        Ok(())
    }
}
