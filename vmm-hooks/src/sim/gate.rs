//! The simulated gate: a queue of tagged frames in front of a machine's wire.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use super::machine::{SimMachine, locked};
use crate::guest::{Gate, Held};

/// Bound on the frames that a gate holds; what comes above it is dropped.
pub const MAX_HELD_FRAMES: usize = 65_536;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Frames pass.
    Open,
    /// Frames are held.
    Holding,
    /// Frames are dropped, for ever.
    Shut,
}

#[derive(Debug)]
struct Waiting {
    epoch: u64,
    frame: Vec<u8>,
    emitted: Instant,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    /// What frames that come now are tagged with.
    current: u64,
    held: VecDeque<Waiting>,
    bytes: u64,
    released: u64,
    dropped: u64,
}

/// Holds the frames of one [`SimMachine`].
#[derive(Debug)]
pub struct SimGate {
    machine: SimMachine,
    state: Mutex<State>,
    came: Condvar,
}

impl SimGate {
    pub(super) fn new(machine: SimMachine) -> Self {
        let state = State { mode: Mode::Open, current: 0, held: VecDeque::new(), bytes: 0, released: 0, dropped: 0 };
        Self { machine, state: Mutex::new(state), came: Condvar::new() }
    }

    /// A frame from the machine.
    pub(super) fn take(&self, frame: Vec<u8>) {
        let mut state = locked(&self.state);
        match state.mode {
            Mode::Open => self.machine.transmit(frame),
            Mode::Holding if state.held.len() < MAX_HELD_FRAMES => {
                state.bytes += frame.len() as u64;
                let epoch = state.current;
                state.held.push_back(Waiting { epoch, frame, emitted: Instant::now() });
                self.came.notify_all();
            }
            Mode::Holding | Mode::Shut => state.dropped += 1,
        }
    }

    /// From now on frames are held, tagged with `epoch`. A gate that was shut stays shut.
    pub(super) fn hold(&self, epoch: u64) {
        let mut state = locked(&self.state);
        if state.mode == Mode::Open {
            state.mode = Mode::Holding;
        }
        state.current = epoch;
    }

    /// Releases everything and lets frames pass. A gate that was shut stays shut.
    pub(super) fn open(&self) {
        self.release(u64::MAX);
        let mut state = locked(&self.state);
        if state.mode == Mode::Holding {
            state.mode = Mode::Open;
        }
    }
}

impl Gate for SimGate {
    fn seal(&self, next: u64) -> u64 {
        let mut state = locked(&self.state);
        let sealed = state.current;
        state.current = next;
        state.held.iter().filter(|waiting| waiting.epoch == sealed).count() as u64
    }

    fn release(&self, through: u64) {
        let mut state = locked(&self.state);
        while let Some(waiting) = state.held.pop_front_if(|waiting| waiting.epoch <= through) {
            state.bytes -= waiting.frame.len() as u64;
            state.released += 1;
            self.machine.transmit(waiting.frame);
        }
    }

    fn shut(&self) {
        let mut state = locked(&self.state);
        state.mode = Mode::Shut;
        state.dropped += state.held.len() as u64;
        state.held.clear();
        state.bytes = 0;
        self.came.notify_all();
    }

    fn held(&self) -> Held {
        let state = locked(&self.state);
        Held {
            frames: state.held.len() as u64,
            bytes: state.bytes,
            oldest: state.held.front().map(|waiting| waiting.emitted),
            released: state.released,
            dropped: state.dropped,
        }
    }

    fn wait_output(&self, deadline: Instant) -> Option<Instant> {
        let mut state = locked(&self.state);
        loop {
            let first = state.held.partition_point(|waiting| waiting.epoch < state.current);
            if let Some(waiting) = state.held.get(first) {
                return Some(waiting.emitted);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.came.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}
