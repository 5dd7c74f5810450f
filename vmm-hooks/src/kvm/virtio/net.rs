//! The virtio network device: a descriptor that gives and takes one frame a call, a tap or a socket that keeps messages apart.
//!
//! What the guest emits goes through the machine's [`KvmGate`], in the exit in which it notifies. What comes is put into the guest's
//! memory by a thread of its own, which waits while the machine stands, and while the guest has no buffer for it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::Bytes;

use super::{Ask, QUEUE_SIZE, Transport};
use crate::kvm::chips::Line;
use crate::kvm::gate::KvmGate;
use crate::kvm::ram::Memory;
use crate::kvm::state::{Reader, StateError, Writer};
use crate::kvm::wake::Wake;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes before each frame in the guest's buffers: `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Longest frame.
const FRAME_MAX: usize = 64 << 10;

/// The card of a machine.
#[derive(Debug)]
pub(in crate::kvm) struct Net {
    gate: Arc<KvmGate>,
    wire: OwnedFd,
    /// Wakes the receiving thread out of waiting for frames.
    stop: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    transport: Transport,
    /// Whether the machine runs: only then may the guest's memory be written.
    runs: bool,
    ended: bool,
    buffer: Vec<u8>,
}

/// How putting a frame into the guest went.
enum Delivery {
    Done,
    /// There is no buffer for it.
    Later,
}

impl Net {
    pub(in crate::kvm) fn new(mac: [u8; 6], wire: OwnedFd, gate: Arc<KvmGate>) -> std::io::Result<Self> {
        let transport = Transport::new(VIRTIO_ID_NET, 1 << VIRTIO_NET_F_MAC, mac.to_vec(), 2);
        Ok(Self {
            gate,
            wire,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: Mutex::new(State { transport, runs: false, ended: false, buffer: Vec::with_capacity(FRAME_MAX) }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds the card")
    }

    /// Joins it to an interrupt line.
    pub(in crate::kvm) fn interrupt_by(&self, line: Line) {
        self.lock().transport.interrupt_by(line);
    }

    pub(in crate::kvm) fn read(&self, offset: u64, into: &mut [u8]) {
        self.lock().transport.read(offset, into);
    }

    pub(in crate::kvm) fn write(&self, offset: u64, bytes: &[u8], memory: &Memory) {
        let mut state = self.lock();
        match state.transport.write(offset, bytes, memory) {
            Ask::Look(TRANSMIT) => self.transmit(&mut state, memory),
            Ask::Look(_) | Ask::Reset => self.changed.notify_all(),
            Ask::Nothing => {}
        }
    }

    /// Looks into the queues, as if they were notified.
    pub(in crate::kvm) fn look(&self, memory: &Memory) {
        let mut state = self.lock();
        if state.transport.runs() {
            self.transmit(&mut state, memory);
        }
    }

    /// Lets the receiving thread write memory, or makes it wait; afterwards it does not write any more.
    pub(in crate::kvm) fn run(&self, runs: bool) {
        self.lock().runs = runs;
        // Nobody waits for it to stand.
        if runs {
            self.changed.notify_all();
        }
    }

    /// Ends the receiving thread.
    pub(in crate::kvm) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
        // Fails only if it was written before.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Emits what is in the guest's queue, and no more than it can hold: what a driver adds meanwhile it notifies of itself.
    fn transmit(&self, state: &mut State, memory: &Memory) {
        let State { transport, buffer, .. } = state;
        for _ in 0..QUEUE_SIZE {
            let chain = match transport.queues[TRANSMIT].iter(memory) {
                Ok(mut chains) => chains.next(),
                Err(error) => return transport.break_down(&error),
            };
            let Some(chain) = chain else { return };
            let head = chain.head_index();
            buffer.clear();
            for descriptor in chain.readable() {
                let (at, length) = (buffer.len(), descriptor.len() as usize);
                if at + length > FRAME_MAX {
                    return transport.break_down(&"a frame that is too long");
                }
                buffer.resize(at + length, 0);
                if let Err(error) = memory.read_slice(&mut buffer[at..], descriptor.addr()) {
                    return transport.break_down(&error);
                }
            }
            if let Some(frame) = buffer.get(HEADER..).filter(|frame| !frame.is_empty()) {
                self.gate.take(frame);
            }
            if let Err(error) = transport.queues[TRANSMIT].add_used(memory, head, 0) {
                return transport.break_down(&error);
            }
            transport.used();
        }
    }

    /// The receiving thread.
    pub(in crate::kvm) fn receive(&self, memory: &Memory, wake: &Wake) {
        let mut frame = vec![0; HEADER + FRAME_MAX];
        // num_buffers, the only field that is not zero.
        frame[10] = 1;
        loop {
            let mut fds = [PollFd::new(&self.wire, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "the guest receives nothing any more"),
            }
            let mut state = self.lock();
            if state.ended {
                return;
            }
            while !(state.runs && state.transport.runs()) {
                state = self.changed.wait(state).expect("nobody panics while it holds the card");
                if state.ended {
                    return;
                }
            }
            let length = match rustix::io::read(&self.wire, &mut frame[HEADER..]) {
                Ok(0) => return,
                Ok(length) => length,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
                Err(error) => return tracing::error!(%error, "the guest receives nothing any more"),
            };
            loop {
                match deliver(&mut state.transport, &frame[..HEADER + length], memory) {
                    Delivery::Done => break,
                    Delivery::Later => {
                        let waits = |state: &mut State| {
                            !(state.ended
                                || state.runs && state.transport.runs() && offers(&mut state.transport, memory))
                        };
                        state = self.changed.wait_while(state, waits).expect("nobody panics while it holds the card");
                        if state.ended {
                            return;
                        }
                    }
                }
            }
            drop(state);
            wake.wake();
        }
    }

    /// Puts a frame into a guest that runs, as the receiving thread does. Whether there was a buffer for it.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(in crate::kvm) fn feed(&self, frame: &[u8], memory: &Memory) -> bool {
        let mut state = self.lock();
        if !state.transport.runs() {
            return false;
        }
        let bytes = [&[0; HEADER], frame].concat();
        match deliver(&mut state.transport, &bytes, memory) {
            Delivery::Done => true,
            Delivery::Later => offers(&mut state.transport, memory),
        }
    }

    pub(in crate::kvm) fn save(&self, into: &mut Writer<'_>) {
        self.lock().transport.save(into);
    }

    pub(in crate::kvm) fn load(&self, from: &mut Reader<'_>, memory: &Memory) -> Result<(), StateError> {
        self.lock().transport.load(from, memory)
    }
}

/// Whether the guest has a buffer for a frame. Asks to be notified of one if it has not; nothing to do for a queue that is broken.
fn offers(transport: &mut Transport, memory: &Memory) -> bool {
    let queue = &mut transport.queues[RECEIVE];
    if queue.iter(memory).is_ok_and(|mut chains| chains.next().is_some()) {
        queue.go_to_previous_position();
        return true;
    }
    queue.enable_notification(memory).unwrap_or(false)
}

fn deliver(transport: &mut Transport, bytes: &[u8], memory: &Memory) -> Delivery {
    let chain = match transport.queues[RECEIVE].iter(memory) {
        Ok(mut chains) => chains.next(),
        Err(error) => {
            transport.break_down(&error);
            return Delivery::Done;
        }
    };
    let Some(chain) = chain else { return Delivery::Later };
    let head = chain.head_index();
    let mut rest = bytes;
    for descriptor in chain.writable() {
        let (part, after) = rest.split_at(rest.len().min(descriptor.len() as usize));
        if let Err(error) = memory.write_slice(part, descriptor.addr()) {
            transport.break_down(&error);
            return Delivery::Done;
        }
        rest = after;
    }
    // What does not fit is cut off: the driver's buffers are too small for its network.
    let written = u32::try_from(bytes.len() - rest.len()).expect("a frame is short");
    match transport.queues[RECEIVE].add_used(memory, head, written) {
        Ok(()) => transport.used(),
        Err(error) => transport.break_down(&error),
    }
    // Buffers that come back need not be told of: the thread looks.
    if let Err(error) = transport.queues[RECEIVE].disable_notification(memory) {
        transport.break_down(&error);
    }
    Delivery::Done
}
