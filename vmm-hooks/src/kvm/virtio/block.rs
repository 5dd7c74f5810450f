//! The virtio block device: a raw file.
//!
//! A request is done when the file has it: a write is in the host's page cache then, a flush on the disk. While the disks are mirrored,
//! each write is also in the [`DiskLog`] before the guest is told that it is done.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::Bytes;

use super::log::{DiskLog, PIECE, change};
use super::{Ask, QUEUE_SIZE, Transport};
use crate::kvm::chips::Line;
use crate::kvm::ram::Memory;
use crate::kvm::state::{Reader, StateError, Writer};

const SECTOR: u64 = 512;
/// Bytes of a request's head.
const HEAD: usize = 16;
/// Most bytes of one request: a guest cannot make us take more memory.
const REQUEST_MAX: usize = 4 << 20;

/// One disk of a machine.
#[derive(Debug)]
pub(in crate::kvm) struct Block {
    number: u32,
    name: String,
    state: Mutex<State>,
    log: Arc<DiskLog>,
    /// The machine is to stand: no request is begun any more.
    halt: Arc<AtomicBool>,
}

#[derive(Debug)]
struct State {
    transport: Transport,
    file: File,
    bytes: u64,
    buffer: Vec<u8>,
}

/// What a request asks for, as far as the guest's own description of it holds.
struct Request {
    kind: u32,
    sector: u64,
    data: Vec<Descriptor>,
    bytes: usize,
    /// Where the device says how it went.
    status: Descriptor,
}

impl Request {
    fn read(chain: DescriptorChain<&Memory>, memory: &Memory) -> Result<Self, &'static str> {
        let mut descriptors: Vec<Descriptor> = chain.collect();
        let status = descriptors.pop().filter(|status| status.is_write_only() && status.len() >= 1);
        let status = status.ok_or("a request without a place for its status")?;
        if descriptors.is_empty() {
            return Err("a request without a head");
        }
        let head = descriptors.remove(0);
        let mut bytes = [0; HEAD];
        if head.is_write_only() || (head.len() as usize) < HEAD || memory.read_slice(&mut bytes, head.addr()).is_err() {
            return Err("a request whose head cannot be read");
        }
        let (kind, rest) = bytes.split_at(4);
        let kind = u32::from_le_bytes(kind.try_into().expect("four"));
        let sector = u64::from_le_bytes(rest[4..].try_into().expect("eight"));
        let bytes = descriptors.iter().map(|descriptor| descriptor.len() as usize).sum();
        if bytes > REQUEST_MAX {
            return Err("a request that is too long");
        }
        Ok(Self { kind, sector, data: descriptors, bytes, status })
    }
}

impl Block {
    pub(in crate::kvm) fn new(
        number: u32,
        name: &str,
        file: File,
        bytes: u64,
        log: Arc<DiskLog>,
        halt: Arc<AtomicBool>,
    ) -> Self {
        let mut config = vec![0; 64];
        config[..8].copy_from_slice(&(bytes / SECTOR).to_le_bytes());
        // seg_max: a chain holds the head and the status, too.
        config[12..16].copy_from_slice(&(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        let features = 1 << blk::VIRTIO_BLK_F_FLUSH | 1 << blk::VIRTIO_BLK_F_SEG_MAX;
        let transport = Transport::new(VIRTIO_ID_BLOCK, features, config, 1);
        let state = Mutex::new(State { transport, file, bytes, buffer: Vec::new() });
        Self { number, name: name.to_owned(), state, log, halt }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds a disk")
    }

    /// Joins it to an interrupt line.
    pub(in crate::kvm) fn interrupt_by(&self, line: Line) {
        self.lock().transport.interrupt_by(line);
    }

    pub(in crate::kvm) fn read(&self, offset: u64, into: &mut [u8]) {
        self.lock().transport.read(offset, into);
    }

    /// Whether requests are left for when the machine runs again.
    pub(in crate::kvm) fn write(&self, offset: u64, bytes: &[u8], memory: &Memory) -> bool {
        let mut state = self.lock();
        match state.transport.write(offset, bytes, memory) {
            Ask::Look(_) => self.work(&mut state, memory),
            Ask::Reset | Ask::Nothing => false,
        }
    }

    /// Looks into the queue, as if it were notified.
    pub(in crate::kvm) fn look(&self, memory: &Memory) -> bool {
        let mut state = self.lock();
        state.transport.runs() && self.work(&mut state, memory)
    }

    /// Does what is in the queue. Whether something is left, because the machine is to stand.
    ///
    /// No more than the queue can hold: what a driver adds meanwhile it notifies of itself.
    fn work(&self, state: &mut State, memory: &Memory) -> bool {
        for _ in 0..QUEUE_SIZE {
            if self.halt.load(Ordering::SeqCst) || !self.log.room() {
                return true;
            }
            let chain = match state.transport.queues[0].iter(memory) {
                Ok(mut chains) => chains.next(),
                Err(error) => {
                    state.transport.break_down(&error);
                    return false;
                }
            };
            let Some(chain) = chain else { return false };
            let head = chain.head_index();
            let done = Request::read(chain, memory).map_err(str::to_owned).and_then(|request| {
                let (status, written) = self.serve(state, &request, memory);
                memory.write_obj(status, request.status.addr()).map_err(|error| error.to_string())?;
                Ok(written + 1)
            });
            let used = done.and_then(|written| {
                let written = u32::try_from(written).expect("a request is bounded");
                state.transport.queues[0].add_used(memory, head, written).map_err(|error| error.to_string())
            });
            if let Err(why) = used {
                state.transport.break_down(&why);
                return false;
            }
            state.transport.used();
        }
        false
    }

    /// The status of a request, and how many bytes of data it wrote to the guest.
    fn serve(&self, state: &mut State, request: &Request, memory: &Memory) -> (u8, usize) {
        let code = |code: u32| u8::try_from(code).expect("a byte");
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            tracing::warn!(disk = self.name, sector = request.sector, %error, "{what}");
            (code(blk::VIRTIO_BLK_S_IOERR), 0)
        };
        let start = request.sector.checked_mul(SECTOR);
        let fits = |start: u64| {
            (request.bytes as u64).is_multiple_of(SECTOR)
                && start.checked_add(request.bytes as u64) <= Some(state.bytes)
        };
        match request.kind {
            blk::VIRTIO_BLK_T_IN => {
                let Some(start) = start.filter(|&start| fits(start)) else { return (code(blk::VIRTIO_BLK_S_IOERR), 0) };
                state.buffer.resize(request.bytes, 0);
                if let Err(error) = state.file.read_exact_at(&mut state.buffer, start) {
                    return failed("the disk could not be read", &error);
                }
                let mut rest = &state.buffer[..];
                for descriptor in &request.data {
                    let (part, after) = rest.split_at(descriptor.len() as usize);
                    if !descriptor.is_write_only() || memory.write_slice(part, descriptor.addr()).is_err() {
                        return (code(blk::VIRTIO_BLK_S_IOERR), 0);
                    }
                    rest = after;
                }
                (code(blk::VIRTIO_BLK_S_OK), request.bytes)
            }
            blk::VIRTIO_BLK_T_OUT => {
                let Some(start) = start.filter(|&start| fits(start)) else { return (code(blk::VIRTIO_BLK_S_IOERR), 0) };
                state.buffer.resize(request.bytes, 0);
                let mut rest = &mut state.buffer[..];
                for descriptor in &request.data {
                    let (part, after) = rest.split_at_mut(descriptor.len() as usize);
                    if descriptor.is_write_only() || memory.read_slice(part, descriptor.addr()).is_err() {
                        return (code(blk::VIRTIO_BLK_S_IOERR), 0);
                    }
                    rest = after;
                }
                if let Err(error) = state.file.write_all_at(&state.buffer, start) {
                    // Some of it may be written.
                    self.log.break_down();
                    return failed("the disk could not be written", &error);
                }
                if request.bytes > 0 && self.log.active() {
                    self.log.wrote(self.number, start, change(std::mem::take(&mut state.buffer)));
                }
                (code(blk::VIRTIO_BLK_S_OK), 0)
            }
            blk::VIRTIO_BLK_T_FLUSH => match state.file.sync_data() {
                Ok(()) => (code(blk::VIRTIO_BLK_S_OK), 0),
                Err(error) => failed("the disk could not be flushed", &error),
            },
            _ => (code(blk::VIRTIO_BLK_S_UNSUPP), 0),
        }
    }

    /// Hands `length` bytes at `offset` to `with`, while nobody writes the disk.
    pub(in crate::kvm) fn copy(&self, offset: u64, length: u64, with: &mut dyn FnMut(Option<Vec<u8>>)) {
        let state = self.lock();
        let mut bytes = vec![0; usize::try_from(length.min(PIECE)).expect("a piece is small")];
        let read: io::Result<()> = state.file.read_exact_at(&mut bytes, offset);
        if let Err(error) = &read {
            tracing::warn!(disk = self.name, offset, %error, "the disk could not be read to be copied");
        }
        with(read.ok().map(|()| bytes));
    }

    pub(in crate::kvm) fn save(&self, into: &mut Writer<'_>) {
        self.lock().transport.save(into);
    }

    pub(in crate::kvm) fn load(&self, from: &mut Reader<'_>, memory: &Memory) -> Result<(), StateError> {
        self.lock().transport.load(from, memory)
    }
}
