//! The output gate, where frames leave the machine: held by epochs, released in order.
//!
//! Promise: a frame is tagged under the same lock that [`Gate::seal`] takes, by the vCPU that emits it; so what is emitted before
//! a pause is tagged before it, and nothing can be emitted while the machine stands. Memory is bounded: at the bound the newest
//! frames are dropped, and a frame that got too old is dropped rather than released. Without a protector frames are not held.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use super::process::board::{Board, Shown, nanos};
use crate::guest::{Gate, Held};

/// What a frame costs beside its bytes.
const FRAME_OVERHEAD: usize = 64;

/// How a gate is bounded.
#[derive(Debug, Clone, Copy)]
pub struct GateBounds {
    /// Bytes of frames that may wait.
    pub bytes: usize,
    /// Age at which a frame is not released any more.
    pub age: Duration,
}

impl Default for GateBounds {
    fn default() -> Self {
        Self { bytes: 64 << 20, age: Duration::from_secs(2) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    Holding,
    Shut,
}

#[derive(Debug)]
struct Frame {
    epoch: u64,
    emitted: Instant,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    epoch: u64,
    held: VecDeque<Frame>,
    bytes: usize,
    released: u64,
    dropped: u64,
    /// Buffers of released frames, to be used again.
    spare: Vec<Vec<u8>>,
}

/// Buffers that are kept to be used again.
const SPARE_MAX: usize = 256;

/// The gate of one machine, in front of its network.
#[derive(Debug)]
pub struct KvmGate {
    /// Takes one frame a write: a tap, or a socket that keeps messages apart. `None`: the machine has no network.
    wire: Option<OwnedFd>,
    state: Mutex<State>,
    came: Condvar,
    bounds: GateBounds,
    /// If somebody in another process looks: where it is shown.
    shown: OnceLock<Arc<Board>>,
}

impl State {
    /// The first frame of the epoch that is not sealed.
    fn first(&self) -> Option<&Frame> {
        self.held.get(self.held.partition_point(|frame| frame.epoch < self.epoch))
    }
}

impl KvmGate {
    /// An open gate.
    pub(super) fn new(wire: Option<OwnedFd>, bounds: GateBounds) -> Self {
        let state = State {
            mode: Mode::Open,
            epoch: 0,
            held: VecDeque::new(),
            bytes: 0,
            released: 0,
            dropped: 0,
            spare: Vec::new(),
        };
        Self { wire, state: Mutex::new(state), came: Condvar::new(), bounds, shown: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds the gate")
    }

    /// Shows itself there from now on, and rings its bell when output waits.
    pub(super) fn show_on(&self, board: Arc<Board>) {
        let state = self.lock();
        // Once for a machine.
        let _ = self.shown.set(board);
        self.show(&state);
    }

    /// To be called after each change.
    fn show(&self, state: &State) {
        let Some(board) = self.shown.get() else { return };
        let now = nanos();
        let emitted = |frame: &Frame| {
            let ago = u64::try_from(frame.emitted.elapsed().as_nanos()).unwrap_or(u64::MAX);
            now.saturating_sub(ago).max(1)
        };
        let frames = state.held.len();
        board.show(Shown::Closed, u64::from(state.mode != Mode::Open));
        board.show(Shown::HeldFrames, frames as u64);
        board.show(Shown::HeldBytes, (state.bytes - frames * FRAME_OVERHEAD) as u64);
        board.show(Shown::HeldSince, state.held.front().map_or(0, emitted));
        board.show(Shown::Released, state.released);
        board.show(Shown::Dropped, state.dropped);
        let first = state.first();
        let came = first.is_some() && board.shown(Shown::First) == 0;
        board.show(Shown::First, first.map_or(0, emitted));
        if came {
            board.ring();
        }
    }

    /// Whether the network took it. A full queue drops, as networks may.
    fn transmit(&self, frame: &[u8]) -> bool {
        let Some(wire) = &self.wire else { return false };
        loop {
            match rustix::io::write(wire, frame) {
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::trace!(error = %io::Error::from(error), "the network did not take a frame");
                    return false;
                }
            }
        }
    }

    /// A frame that the guest emits.
    pub(super) fn take(&self, frame: &[u8]) {
        let mut state = self.lock();
        match state.mode {
            Mode::Open => {
                if !self.transmit(frame) {
                    state.dropped += 1;
                }
            }
            Mode::Holding if state.bytes + frame.len() + FRAME_OVERHEAD <= self.bounds.bytes => {
                state.bytes += frame.len() + FRAME_OVERHEAD;
                let epoch = state.epoch;
                let mut bytes = state.spare.pop().unwrap_or_default();
                bytes.extend_from_slice(frame);
                state.held.push_back(Frame { epoch, emitted: Instant::now(), bytes });
                self.came.notify_all();
            }
            Mode::Holding | Mode::Shut => state.dropped += 1,
        }
        self.show(&state);
    }

    /// Emits a frame that is not the guest's, past what is held; not if the gate is shut.
    pub(super) fn announce(&self, frame: &[u8]) {
        if self.lock().mode != Mode::Shut {
            self.transmit(frame);
        }
    }

    /// From now on frames are held, tagged with `epoch`. A gate that was shut stays shut.
    pub(super) fn hold(&self, epoch: u64) {
        let mut state = self.lock();
        if state.mode == Mode::Open {
            state.mode = Mode::Holding;
        }
        state.epoch = epoch;
        self.show(&state);
    }

    /// Releases everything and lets frames pass. A gate that was shut stays shut.
    pub(super) fn open(&self) {
        let mut state = self.lock();
        self.release_locked(&mut state, u64::MAX);
        if state.mode == Mode::Holding {
            state.mode = Mode::Open;
        }
        self.show(&state);
    }

    /// The machine has ended: nothing more comes. What is held may still be released.
    pub(super) fn end(&self) {
        self.came.notify_all();
    }

    /// Whether frames are held or dropped.
    pub(super) fn closed(&self) -> bool {
        self.lock().mode != Mode::Open
    }

    fn release_locked(&self, state: &mut State, through: u64) {
        while let Some(frame) = state.held.pop_front_if(|frame| frame.epoch <= through) {
            state.bytes -= frame.bytes.len() + FRAME_OVERHEAD;
            let fresh = frame.emitted.elapsed() <= self.bounds.age;
            // Counted before it is heard: who hears it finds it counted.
            *(if fresh { &mut state.released } else { &mut state.dropped }) += 1;
            self.show(state);
            if fresh && !self.transmit(&frame.bytes) {
                state.released -= 1;
                state.dropped += 1;
                self.show(state);
            }
            if state.spare.len() < SPARE_MAX {
                let mut bytes = frame.bytes;
                bytes.clear();
                state.spare.push(bytes);
            }
        }
    }
}

impl Gate for KvmGate {
    fn seal(&self, next: u64) -> u64 {
        let mut state = self.lock();
        let sealed = state.epoch;
        state.epoch = next;
        self.show(&state);
        state.held.iter().rev().take_while(|frame| frame.epoch == sealed).count() as u64
    }

    fn release(&self, through: u64) {
        self.release_locked(&mut self.lock(), through);
    }

    fn shut(&self) {
        let mut state = self.lock();
        state.mode = Mode::Shut;
        state.dropped += state.held.len() as u64;
        state.held.clear();
        state.bytes = 0;
        self.show(&state);
        self.came.notify_all();
    }

    fn held(&self) -> Held {
        let state = self.lock();
        let frames = state.held.len();
        Held {
            frames: frames as u64,
            bytes: (state.bytes - frames * FRAME_OVERHEAD) as u64,
            oldest: state.held.front().map(|frame| frame.emitted),
            released: state.released,
            dropped: state.dropped,
        }
    }

    fn wait_output(&self, deadline: Instant) -> Option<Instant> {
        let mut state = self.lock();
        loop {
            if let Some(frame) = state.first() {
                return Some(frame.emitted);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.came.wait_timeout(state, left).expect("nobody panics while it holds the gate").0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn gate(bounds: GateBounds) -> (KvmGate, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().expect("a pair");
        ours.set_nonblocking(true).expect("it can");
        theirs.set_nonblocking(true).expect("it can");
        (KvmGate::new(Some(ours.into()), bounds), theirs)
    }

    fn heard(wire: &UnixDatagram) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 100];
        while let Ok(bytes) = wire.recv(&mut buffer) {
            frames.push(buffer[..bytes].to_vec());
        }
        frames
    }

    #[test]
    fn the_newest_are_dropped_at_the_bound_and_the_old_are_not_released() {
        let (gate, wire) = gate(GateBounds { bytes: 2 * (10 + FRAME_OVERHEAD), ..GateBounds::default() });
        gate.hold(1);
        (0..3).for_each(|number| gate.take(&[number; 10]));
        assert_eq!((gate.held().frames, gate.held().bytes, gate.held().dropped), (2, 20, 1));
        gate.release(1);
        assert_eq!(heard(&wire), [[0; 10], [1; 10]]);
        let (gate, wire) = self::gate(GateBounds { age: Duration::ZERO, ..GateBounds::default() });
        gate.hold(1);
        gate.take(&[1]);
        let emitted = Instant::now();
        while emitted.elapsed().is_zero() {}
        gate.release(1);
        assert_eq!((gate.held().released, gate.held().dropped), (0, 1));
        assert!(heard(&wire).is_empty());
    }

    #[test]
    fn a_shut_gate_does_not_even_announce() {
        let (gate, wire) = gate(GateBounds::default());
        gate.take(&[1]);
        gate.hold(1);
        gate.take(&[2]);
        gate.shut();
        gate.open();
        gate.take(&[3]);
        gate.announce(&[4]);
        assert_eq!(heard(&wire), [[1]]);
        assert_eq!(gate.held().dropped, 2);
    }
}
