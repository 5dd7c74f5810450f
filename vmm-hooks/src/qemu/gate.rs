//! Holds frames by epochs: a thread of its own reads what the guest emits and writes what is released.
//!
//! Each netdev has two filters in QEMU and two sockets to us: one by which the guest's frames come (`captured`), one by
//! which they go back to be emitted (`released`). An unread capture socket would freeze QEMU, its monitor included, so the
//! thread waits for nothing but these sockets: never for QMP, the standby or control.
//!
//! Promise: a frame is tagged under the same lock that [`Gate::seal`] takes, and `seal` empties the capture sockets before the
//! epoch moves. A frame may be tagged late, never early. Frames leave in the order in which they came. Memory is bounded:
//! at the bound the newest frames are dropped, and a frame that got too old is dropped rather than released.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::guest::{Gate, Held};

/// Bytes before each frame on both sockets: its length, big-endian.
const HEADER: usize = 4;

/// Bound on one frame; QEMU's own is 68 kB and a vnet header.
const FRAME_MAX: usize = 256 << 10;

/// Bytes read from a socket at once.
const READ_SIZE: usize = 256 << 10;

/// Bound on the reads of one seal. What QEMU has emitted fits its socket buffer, which is far smaller.
const SEAL_READS_MAX: usize = 1024;

/// What a frame costs beside its bytes.
const FRAME_OVERHEAD: usize = 64;

/// How a gate is bounded.
#[derive(Debug, Clone, Copy)]
pub(super) struct GateBounds {
    /// Bytes of frames that may wait, sealed or not, released and not yet taken by QEMU included.
    pub(super) bytes: usize,
    /// Age at which a frame is not released any more.
    pub(super) age: Duration,
}

/// Our ends of one netdev's two sockets.
#[derive(Debug)]
pub(super) struct Port {
    /// The guest's frames come from here.
    pub(super) captured: UnixStream,
    /// Released frames go here.
    pub(super) released: UnixStream,
}

/// The gate of one QEMU.
#[derive(Debug)]
pub(super) struct QemuGate {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    output: Condvar,
    /// Wakes the thread when there is something new to wait for.
    wake: OwnedFd,
    bounds: GateBounds,
}

#[derive(Debug)]
struct Frame {
    port: usize,
    epoch: u64,
    emitted: Instant,
    /// With its header.
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct PortState {
    captured: Arc<UnixStream>,
    released: Arc<UnixStream>,
    /// The start of a frame whose end has not come yet.
    partial: Vec<u8>,
    outgoing: VecDeque<Vec<u8>>,
    /// How much of the first outgoing frame is written.
    written: usize,
    /// The guest's end is closed: nothing comes or goes any more.
    closed: bool,
}

#[derive(Debug)]
struct State {
    ports: Vec<PortState>,
    epoch: u64,
    held: VecDeque<Frame>,
    /// Bytes of `held` and of all that is outgoing.
    bytes: usize,
    held_bytes: u64,
    /// When the first frame of the epoch that is not sealed was emitted.
    waiting: Option<Instant>,
    released: u64,
    dropped: u64,
    shut: bool,
    stop: bool,
    scratch: Vec<u8>,
}

impl QemuGate {
    /// A gate with no port yet; starts its thread.
    pub(super) fn new(bounds: GateBounds) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                ports: Vec::new(),
                epoch: 0,
                held: VecDeque::new(),
                bytes: 0,
                held_bytes: 0,
                waiting: None,
                released: 0,
                dropped: 0,
                shut: false,
                stop: false,
                scratch: vec![0; READ_SIZE],
            }),
            output: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            bounds,
        });
        let thread = thread::Builder::new().name("gate".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Puts ports in, tagging what comes from now on with `epoch`. There must be none from before.
    pub(super) fn install(&self, ports: Vec<Port>, epoch: u64) -> io::Result<()> {
        for port in &ports {
            port.captured.set_nonblocking(true)?;
            port.released.set_nonblocking(true)?;
        }
        let mut state = self.shared.lock();
        assert!(state.ports.is_empty(), "a gate has one set of ports at a time");
        state.epoch = epoch;
        state.ports = ports
            .into_iter()
            .map(|port| PortState {
                captured: Arc::new(port.captured),
                released: Arc::new(port.released),
                partial: Vec::new(),
                outgoing: VecDeque::new(),
                written: 0,
                closed: false,
            })
            .collect();
        drop(state);
        self.shared.wake();
        Ok(())
    }

    /// Whether there are ports.
    pub(super) fn is_installed(&self) -> bool {
        !self.shared.lock().ports.is_empty()
    }

    /// Whether it was shut for good.
    pub(super) fn is_shut(&self) -> bool {
        self.shared.lock().shut
    }

    /// Takes everything that has come, releases everything, and waits until QEMU's sockets have taken it. `false` if they did not
    /// until `deadline`.
    pub(super) fn flush(&self, deadline: Instant) -> bool {
        let next = self.shared.lock().epoch + 1;
        self.seal(next);
        self.release(next);
        let mut state = self.shared.lock();
        loop {
            if state.ports.iter().all(|port| port.closed || port.outgoing.is_empty()) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // The thread tells when it has written.
            state = self.shared.output.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tells QEMU that nothing more comes on the release sockets.
    pub(super) fn half_close(&self) {
        for port in &self.shared.lock().ports {
            // A socket whose other end is gone is as closed as it can be.
            let _ = port.released.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Takes the ports out and closes the sockets. Frames still in them are dropped.
    pub(super) fn uninstall(&self) {
        let mut state = self.shared.lock();
        let dropped = state.held.len();
        state.dropped += dropped as u64;
        state.held.clear();
        state.ports.clear();
        (state.bytes, state.held_bytes, state.waiting) = (0, 0, None);
        drop(state);
        self.shared.wake();
    }
}

impl Drop for QemuGate {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Gate for QemuGate {
    fn seal(&self, next: u64) -> u64 {
        let mut state = self.shared.lock();
        for index in 0..state.ports.len() {
            // What is left behind at the bound is tagged late, which is safe.
            for _ in 0..SEAL_READS_MAX {
                if !state.read_port(index, &self.shared.bounds) {
                    break;
                }
            }
        }
        state.expire(&self.shared.bounds);
        let sealed = state.epoch;
        state.epoch = next;
        state.waiting = None;
        state.held.iter().filter(|frame| frame.epoch == sealed).count() as u64
    }

    fn release(&self, through: u64) {
        let mut state = self.shared.lock();
        state.release(through, &self.shared.bounds);
        let stuck = state.write_all();
        drop(state);
        if stuck {
            self.shared.wake();
        }
    }

    fn shut(&self) {
        let mut state = self.shared.lock();
        state.shut = true;
        state.dropped += state.held.len() as u64;
        state.held.clear();
        (state.bytes, state.held_bytes, state.waiting) = (0, 0, None);
        for port in &mut state.ports {
            // A frame that is half written is never completed: QEMU waits for its rest for ever.
            port.outgoing.clear();
            port.written = 0;
        }
    }

    fn held(&self) -> Held {
        let state = self.shared.lock();
        Held {
            frames: state.held.len() as u64,
            bytes: state.held_bytes,
            oldest: state.held.front().map(|frame| frame.emitted),
            released: state.released,
            dropped: state.dropped,
        }
    }

    fn wait_output(&self, deadline: Instant) -> Option<Instant> {
        let mut state = self.shared.lock();
        loop {
            if let Some(emitted) = state.waiting {
                return Some(emitted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.shared.output.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the frames as they are; holding them is the safe side.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Only fails if it is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn run(&self) {
        loop {
            let sockets: Vec<(Arc<UnixStream>, Option<Arc<UnixStream>>)> = {
                let state = self.lock();
                if state.stop {
                    return;
                }
                let open = state.ports.iter().filter(|port| !port.closed);
                open.map(|port| {
                    let released = (!port.outgoing.is_empty()).then(|| Arc::clone(&port.released));
                    (Arc::clone(&port.captured), released)
                })
                .collect()
            };
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            for (captured, released) in &sockets {
                fds.push(PollFd::new(&**captured, PollFlags::IN));
                if let Some(released) = released {
                    fds.push(PollFd::new(&**released, PollFlags::OUT));
                }
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll on our own sockets failed: {error}"),
            }
            let woken = !fds[0].revents().is_empty();
            drop(fds);
            if woken {
                let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
            }
            let mut state = self.lock();
            for index in 0..state.ports.len() {
                state.read_port(index, &self.bounds);
            }
            state.write_all();
            drop(state);
            self.output.notify_all();
        }
    }
}

impl State {
    /// Reads once from a port's capture socket and tags the frames; `false` if nothing was there.
    fn read_port(&mut self, index: usize, bounds: &GateBounds) -> bool {
        if self.ports[index].closed {
            return false;
        }
        let captured = Arc::clone(&self.ports[index].captured);
        let mut scratch = std::mem::take(&mut self.scratch);
        let got = match (&*captured).read(&mut scratch) {
            Ok(0) => {
                self.close(index);
                false
            }
            Ok(length) => {
                self.take_bytes(index, &scratch[..length], bounds);
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(_) => {
                self.close(index);
                false
            }
        };
        self.scratch = scratch;
        got
    }

    fn take_bytes(&mut self, index: usize, bytes: &[u8], bounds: &GateBounds) {
        let mut partial = std::mem::take(&mut self.ports[index].partial);
        partial.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(header) = partial.get(at..at + HEADER) {
            let length = u32::from_be_bytes(header.try_into().expect("four bytes"));
            let Some(length) = usize::try_from(length).ok().filter(|length| *length <= FRAME_MAX) else {
                // Not the stream of a filter: nothing that follows can be understood.
                self.close(index);
                return;
            };
            let end = at + HEADER + length;
            let Some(frame) = partial.get(at..end) else { break };
            self.take_frame(index, frame.to_vec(), bounds);
            at = end;
        }
        partial.drain(..at);
        self.ports[index].partial = partial;
    }

    fn take_frame(&mut self, port: usize, bytes: Vec<u8>, bounds: &GateBounds) {
        if self.bytes + bytes.len() + FRAME_OVERHEAD > bounds.bytes {
            self.expire(bounds);
        }
        if self.shut || self.bytes + bytes.len() + FRAME_OVERHEAD > bounds.bytes {
            self.dropped += 1;
            return;
        }
        let emitted = Instant::now();
        self.bytes += bytes.len() + FRAME_OVERHEAD;
        self.held_bytes += bytes.len() as u64;
        self.waiting.get_or_insert(emitted);
        self.held.push_back(Frame { port, epoch: self.epoch, emitted, bytes });
    }

    /// Drops what got too old.
    fn expire(&mut self, bounds: &GateBounds) {
        while self.held.front().is_some_and(|frame| frame.emitted.elapsed() > bounds.age) {
            if let Some(frame) = self.held.pop_front() {
                self.forget(&frame);
                self.dropped += 1;
            }
        }
    }

    fn forget(&mut self, frame: &Frame) {
        self.bytes -= frame.bytes.len() + FRAME_OVERHEAD;
        self.held_bytes -= frame.bytes.len() as u64;
    }

    fn release(&mut self, through: u64, bounds: &GateBounds) {
        self.expire(bounds);
        while self.held.front().is_some_and(|frame| frame.epoch <= through) {
            let Some(frame) = self.held.pop_front() else { return };
            self.held_bytes -= frame.bytes.len() as u64;
            let port = &mut self.ports[frame.port];
            if port.closed {
                self.bytes -= frame.bytes.len() + FRAME_OVERHEAD;
                self.dropped += 1;
            } else {
                port.outgoing.push_back(frame.bytes);
                self.released += 1;
            }
        }
        if self.waiting.is_some() && !self.held.iter().any(|frame| frame.epoch == self.epoch) {
            self.waiting = None;
        }
    }

    /// Writes what is outgoing without waiting; `true` if something is left.
    fn write_all(&mut self) -> bool {
        let mut left = false;
        for index in 0..self.ports.len() {
            loop {
                let port = &mut self.ports[index];
                let Some(frame) = port.outgoing.front() else { break };
                match (&*port.released).write(&frame[port.written..]) {
                    Ok(length) => {
                        port.written += length;
                        if port.written == frame.len() {
                            self.bytes -= frame.len() + FRAME_OVERHEAD;
                            port.outgoing.pop_front();
                            port.written = 0;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        left = true;
                        break;
                    }
                    Err(_) => {
                        self.close(index);
                        break;
                    }
                }
            }
        }
        left
    }

    fn close(&mut self, index: usize) {
        let port = &mut self.ports[index];
        port.closed = true;
        port.partial.clear();
        let outgoing: usize = port.outgoing.drain(..).map(|frame| frame.len() + FRAME_OVERHEAD).sum();
        self.bytes -= outgoing;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: GateBounds = GateBounds { bytes: 1 << 20, age: Duration::from_secs(3600) };

    /// The guest's ends of one port.
    struct Guest {
        out: UnixStream,
        heard: UnixStream,
    }

    impl Guest {
        fn emit(&mut self, body: &[u8]) {
            let mut frame = u32::try_from(body.len()).expect("small").to_be_bytes().to_vec();
            frame.extend_from_slice(body);
            self.out.write_all(&frame).expect("the gate reads");
        }

        fn hear(&mut self) -> Vec<u8> {
            let mut header = [0; HEADER];
            self.heard.read_exact(&mut header).expect("a frame");
            let mut body = vec![0; usize::try_from(u32::from_be_bytes(header)).expect("small")];
            self.heard.read_exact(&mut body).expect("a whole frame");
            body
        }

        fn hears_nothing(&mut self) -> bool {
            self.heard.set_nonblocking(true).expect("a socket");
            let got = self.heard.read(&mut [0; 1]);
            self.heard.set_nonblocking(false).expect("a socket");
            matches!(got, Err(error) if error.kind() == ErrorKind::WouldBlock)
        }
    }

    fn gate(ports: usize, bounds: GateBounds) -> (QemuGate, Vec<Guest>) {
        let gate = QemuGate::new(bounds).expect("a thread");
        let mut guests = Vec::new();
        let mut ours = Vec::new();
        for _ in 0..ports {
            let (captured, out) = UnixStream::pair().expect("a socket pair");
            let (released, heard) = UnixStream::pair().expect("a socket pair");
            ours.push(Port { captured, released });
            guests.push(Guest { out, heard });
        }
        gate.install(ours, 1).expect("sockets");
        (gate, guests)
    }

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn holds_until_released_and_keeps_the_order() {
        let (gate, mut guests) = gate(2, BOUNDS);
        guests[0].emit(b"a");
        guests[1].emit(b"b");
        assert!(gate.wait_output(far()).is_some());
        assert_eq!(gate.seal(2), 2);
        guests[0].emit(b"c");
        assert!(gate.wait_output(far()).is_some());
        assert!(guests.iter_mut().all(Guest::hears_nothing));
        gate.release(1);
        assert_eq!((guests[0].hear(), guests[1].hear()), (b"a".to_vec(), b"b".to_vec()));
        assert!(guests.iter_mut().all(Guest::hears_nothing), "epoch 2 is not released");
        assert_eq!(gate.held().frames, 1);
        assert_eq!(gate.seal(3), 1);
        assert!(gate.wait_output(Instant::now()).is_none(), "a sealed frame asks for no epoch");
        gate.release(2);
        assert_eq!(guests[0].hear(), b"c");
        let held = gate.held();
        assert_eq!((held.frames, held.bytes, held.released, held.dropped), (0, 0, 3, 0));
    }

    #[test]
    fn a_frame_that_is_not_whole_at_the_seal_belongs_to_the_next_epoch() {
        let (gate, mut guests) = gate(1, BOUNDS);
        guests[0].out.write_all(&[0, 0, 0, 2, b'x']).expect("the gate reads");
        assert_eq!(gate.seal(2), 0);
        guests[0].out.write_all(b"y").expect("the gate reads");
        assert_eq!(gate.seal(3), 1);
        gate.release(1);
        assert!(guests[0].hears_nothing());
        gate.release(2);
        assert_eq!(guests[0].hear(), b"xy");
    }

    #[test]
    fn at_the_bound_the_newest_are_dropped_and_the_guest_is_never_stopped() {
        let (gate, mut guests) = gate(1, GateBounds { bytes: 10 * (100 + HEADER + FRAME_OVERHEAD), ..BOUNDS });
        for number in 0..40_000_u32 {
            let mut body = [0; 100];
            body[..4].copy_from_slice(&number.to_be_bytes());
            guests[0].emit(&body);
        }
        assert_eq!(gate.seal(2), 10);
        gate.release(1);
        for number in 0..10_u32 {
            assert_eq!(guests[0].hear()[..4], number.to_be_bytes());
        }
        assert_eq!(gate.held().dropped, 39_990);
        guests[0].emit(b"again");
        gate.seal(3);
        gate.release(2);
        assert_eq!(guests[0].hear(), b"again");
    }

    #[test]
    fn what_got_too_old_is_never_released() {
        let (gate, mut guests) = gate(1, GateBounds { age: Duration::ZERO, ..BOUNDS });
        guests[0].emit(b"old");
        gate.wait_output(far());
        gate.seal(2);
        gate.release(1);
        assert!(guests[0].hears_nothing());
        assert_eq!(gate.held(), Held { dropped: 1, ..Held::default() });
    }

    #[test]
    fn a_shut_gate_is_never_heard_again() {
        let (gate, mut guests) = gate(1, BOUNDS);
        guests[0].emit(b"held");
        gate.seal(2);
        gate.shut();
        guests[0].emit(b"later");
        gate.seal(3);
        gate.release(u64::MAX);
        assert!(guests[0].hears_nothing());
        assert_eq!(gate.held(), Held { dropped: 2, ..Held::default() });
    }

    #[test]
    fn a_slow_qemu_gets_everything_in_order_from_the_thread() {
        let (gate, mut guests) = gate(1, GateBounds { bytes: 64 << 20, ..BOUNDS });
        for number in 0..20_000_u32 {
            guests[0].emit(&[number.to_be_bytes().as_slice(), &[7; 400]].concat());
        }
        gate.seal(2);
        gate.release(1);
        for number in 0..20_000_u32 {
            assert_eq!(guests[0].hear()[..4], number.to_be_bytes());
        }
        assert!(gate.flush(far()));
    }

    #[test]
    fn flush_and_half_close_leave_nothing_behind() {
        let (gate, mut guests) = gate(1, BOUNDS);
        guests[0].emit(b"sealed");
        gate.seal(2);
        guests[0].emit(b"not sealed");
        assert!(gate.flush(far()));
        gate.half_close();
        assert_eq!(guests[0].hear(), b"sealed");
        assert_eq!(guests[0].hear(), b"not sealed");
        assert_eq!(guests[0].heard.read(&mut [0; 1]).expect("closed in order"), 0);
        gate.uninstall();
        assert!(!gate.is_installed());
        assert_eq!(guests[0].out.read(&mut [0; 1]).expect("closed in order"), 0);
    }

    #[test]
    fn nonsense_closes_the_port_and_nothing_else() {
        let (gate, mut guests) = gate(2, BOUNDS);
        guests[0].out.write_all(&[0xff; 64]).expect("the gate reads");
        gate.seal(2);
        guests[1].emit(b"fine");
        gate.seal(3);
        gate.release(2);
        assert_eq!(guests[1].hear(), b"fine");
    }

    #[derive(Debug, Clone)]
    enum Act {
        Emit(u8),
        Seal,
        Release(u64),
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Never early, never out of order, nothing lost below the bounds.
        #[test]
        fn frames_leave_in_order_and_only_when_their_epoch_is_released(acts in prop::collection::vec(prop_oneof![
            4 => (0_u8..2).prop_map(Act::Emit), 2 => Just(Act::Seal), 2 => (0_u64..6).prop_map(Act::Release)], 0..60)) {
            let (gate, mut guests) = gate(2, BOUNDS);
            let (mut epoch, mut number) = (1_u64, 0_u32);
            let mut waiting: [VecDeque<(u64, u32)>; 2] = Default::default();
            for act in acts.into_iter().chain([Act::Seal, Act::Release(u64::MAX)]) {
                match act {
                    Act::Emit(port) => {
                        guests[usize::from(port)].emit(&number.to_be_bytes());
                        waiting[usize::from(port)].push_back((epoch, number));
                        number += 1;
                    }
                    Act::Seal => {
                        let expected = waiting.iter().flatten().filter(|(tag, _)| *tag == epoch).count();
                        prop_assert_eq!(gate.seal(epoch + 1), expected as u64);
                        epoch += 1;
                    }
                    Act::Release(back) => {
                        // An epoch that is not sealed is never released.
                        let through = if back == u64::MAX { epoch - 1 } else { (epoch - 1).saturating_sub(back) };
                        gate.release(through);
                        for (guest, waiting) in guests.iter_mut().zip(&mut waiting) {
                            while waiting.front().is_some_and(|(tag, _)| *tag <= through) {
                                let (_, number) = waiting.pop_front().expect("just seen");
                                prop_assert_eq!(guest.hear(), number.to_be_bytes().to_vec());
                            }
                            prop_assert!(guest.hears_nothing());
                        }
                    }
                }
            }
        }
    }
}
