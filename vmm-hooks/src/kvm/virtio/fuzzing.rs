//! Target `virtio`: what a guest may do to its disk and its card: registers, memory, queues, at any time. Not part of the API.
//!
//! Holds: the devices answer, and stay within their bounds; every page that a device changed is marked, so that the next harvest has it; the
//! log of disk writes, applied in order, makes the disk; what is held for the network is what a frame can be; a device's state loads into
//! another one and is the same there.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_mmio as mmio;
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::log::DiskLog;
use super::net::Net;
use crate::disk::DiskChange;
use crate::guest::Gate;
use crate::kvm::gate::{GateBounds, KvmGate};
use crate::kvm::ram::Ram;
use crate::kvm::state::{Reader, Writer};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::memory::SharedMemory;

const PAGES: u64 = 32;
const DISK: u64 = 64 * 512;
/// Most of what one input does.
const ACTS: usize = 200;
/// Where each queue is that comes up by itself: the disk's, the card's two. Descriptors, then the rings 0x400 and 0x800 after them.
const QUEUES: [u64; 3] = [0x1000, 0x2000, 0x3000];
/// Entries of such a queue.
const ENTRIES: u32 = 8;

/// What is left of the input; zeroes after its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, most: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A value for a register: small, a place in memory, or any.
    fn value(&mut self) -> u32 {
        match self.byte() {
            small @ 0..16 => small.into(),
            page @ 16..64 => u32::from(page) << 10,
            _ => u32::from(self.word()) << 16 | u32::from(self.word()),
        }
    }

    /// An address in the guest's memory, or just behind it.
    fn address(&mut self) -> u64 {
        u64::from(self.word()) << 1
    }
}

/// A machine without vCPUs.
struct Devices {
    ram: Ram,
    file: File,
    log: Arc<DiskLog>,
    halt: Arc<AtomicBool>,
    gate: Arc<KvmGate>,
    block: Block,
    net: Net,
    /// The disk as the log makes it.
    copy: Vec<u8>,
}

fn block(file: &File, log: &Arc<DiskLog>, halt: &Arc<AtomicBool>) -> Block {
    Block::new(0, "disk", file.try_clone().expect("a descriptor"), DISK, Arc::clone(log), Arc::clone(halt))
}

fn net(gate: &Arc<KvmGate>) -> Net {
    let wire = File::open("/dev/null").expect("it is everywhere");
    Net::new([2, 0, 0, 0, 0, 1], wire.into(), Arc::clone(gate)).expect("a descriptor")
}

impl Devices {
    fn new() -> Self {
        let memory = |name, bytes| SharedMemory::new(name, bytes).expect("a small one");
        let ram = Ram::map(&memory("fuzz-ram", PAGES * PAGE_SIZE as u64), false).expect("it can be mapped");
        let file = File::from(memory("fuzz-disk", DISK).fd().as_fd().try_clone_to_owned().expect("a descriptor"));
        let (log, halt) = (Arc::new(DiskLog::new(vec![DISK])), Arc::new(AtomicBool::new(false)));
        let gate = Arc::new(KvmGate::new(None, GateBounds { bytes: 1 << 20, ..GateBounds::default() }));
        gate.hold(1);
        let (block, net) = (block(&file, &log, &halt), net(&gate));
        log.start();
        let copy = vec![0; usize::try_from(DISK).expect("small")];
        let mut devices = Self { ram, file, log, halt, gate, block, net, copy };
        devices.take_writes();
        devices
    }

    fn write(&self, card: bool, register: u32, value: u32) {
        let (register, value, memory) = (u64::from(register), value.to_le_bytes(), self.ram.memory());
        if card {
            self.net.write(register, &value, memory);
        } else {
            self.block.write(register, &value, memory);
        }
    }

    /// Brings a device up with one queue, as a driver does.
    fn bring_up(&self, card: bool, queue: u32) {
        let at = u32::try_from(QUEUES[usize::from(card) * 2 - usize::from(card && queue == 0)]).expect("small");
        for (register, value) in [
            (mmio::VIRTIO_MMIO_STATUS, 3),
            (mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            (mmio::VIRTIO_MMIO_DRIVER_FEATURES, 1),
            (mmio::VIRTIO_MMIO_STATUS, 11),
            (mmio::VIRTIO_MMIO_QUEUE_SEL, queue),
            (mmio::VIRTIO_MMIO_QUEUE_NUM, ENTRIES),
            (mmio::VIRTIO_MMIO_QUEUE_DESC_LOW, at),
            (mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW, at + 0x400),
            (mmio::VIRTIO_MMIO_QUEUE_USED_LOW, at + 0x800),
            (mmio::VIRTIO_MMIO_QUEUE_READY, 1),
        ] {
            self.write(card, register, value);
        }
    }

    /// Puts bytes into memory as the guest does. What is behind its end is not there.
    fn put(&self, address: u64, bytes: &[u8]) {
        let _ = self.ram.memory().write_slice(bytes, GuestAddress(address));
    }

    fn pages(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.ram.bytes()).expect("small")];
        self.ram.read_pages(0, &mut bytes);
        bytes
    }

    /// Applies what was logged to the copy of the disk.
    fn take_writes(&mut self) {
        let mut writes = Vec::new();
        loop {
            self.log.take(&mut writes, 1 << 20, Duration::ZERO, |_, offset, length, with| {
                self.block.copy(offset, length, with);
            });
            if writes.is_empty() {
                return;
            }
            for write in writes.drain(..) {
                let start = usize::try_from(write.offset).expect("inside the disk");
                match write.change {
                    DiskChange::Data(data) => self.copy[start..start + data.len()].copy_from_slice(&data),
                    DiskChange::Zero(bytes) => {
                        let bytes = usize::try_from(bytes).expect("inside the disk");
                        self.copy[start..start + bytes].fill(0);
                    }
                }
            }
        }
    }

    /// Lets `act` work the devices; everything that it changes in memory must be marked.
    fn work(&mut self, act: impl FnOnce(&Self)) {
        let before = self.pages();
        self.ram.forget_own_writes();
        act(self);
        let after = self.pages();
        let mut marked = PageSet::empty(PAGES);
        self.ram.own_writes(&mut marked, true);
        for (page, (before, after)) in (0..).zip(before.chunks(PAGE_SIZE).zip(after.chunks(PAGE_SIZE))) {
            assert!(before == after || marked.contains(page), "page {page} was written and is not marked");
        }
        self.take_writes();
        let held = self.gate.held();
        assert!(held.bytes <= 1 << 20, "the gate holds more than its bound");
        if held.bytes > 1 << 18 {
            self.gate.release(1);
        }
    }

    fn state(&self) -> Vec<u8> {
        let mut state = Vec::new();
        let mut writer = Writer::begin(&mut state, 0);
        self.block.save(&mut writer);
        self.net.save(&mut writer);
        state
    }

    /// Goes on in other devices, as after a failover.
    fn go_over(&mut self) {
        let state = self.state();
        (self.block, self.net) = (block(&self.file, &self.log, &self.halt), net(&self.gate));
        let (mut reader, _) = Reader::begin(&state).expect("it was just written");
        self.block.load(&mut reader, self.ram.memory()).expect("what was saved loads");
        self.net.load(&mut reader, self.ram.memory()).expect("what was saved loads");
        reader.finish("more").expect("and nothing is left");
        assert_eq!(self.state(), state, "the state of the other devices is not the same");
    }
}

/// The first byte chooses what comes up by itself, the rest is what the guest and its network do.
pub(crate) fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut devices = Devices::new();
    let choice = input.byte();
    if choice & 1 == 0 {
        devices.bring_up(false, 0);
        devices.write(false, mmio::VIRTIO_MMIO_STATUS, 15);
    }
    if choice & 2 == 0 {
        devices.bring_up(true, 0);
        devices.bring_up(true, 1);
        devices.write(true, mmio::VIRTIO_MMIO_STATUS, 15);
    }
    for _ in 0..ACTS {
        if input.0.is_empty() {
            break;
        }
        let act = input.byte();
        let (card, act) = (act >= 128, act % 10);
        match act {
            0 => {
                let (register, value) = (u32::from(input.byte()) * 4, input.value());
                devices.work(|devices| devices.write(card, register, value));
            }
            1 => {
                let (address, length) = (input.address(), input.byte());
                devices.put(address, input.bytes(length.into()));
            }
            2 => {
                let queue = u32::from(input.byte() % 3);
                devices.work(|devices| devices.write(card, mmio::VIRTIO_MMIO_QUEUE_NOTIFY, queue));
            }
            3 => {
                let frame = vec![input.byte(); usize::from(input.word() % 3000)];
                devices.work(|devices| {
                    devices.net.feed(&frame, devices.ram.memory());
                });
            }
            4 => drop(devices.halt.fetch_xor(true, Ordering::SeqCst)),
            5 => devices.work(|devices| {
                devices.block.look(devices.ram.memory());
                devices.net.look(devices.ram.memory());
            }),
            6 => devices.go_over(),
            // A descriptor, in the form that it must have.
            7 => {
                let (place, index) = (input.byte(), u64::from(input.byte()) % u64::from(ENTRIES));
                let mut descriptor = input.address().to_le_bytes().to_vec();
                descriptor.extend(u32::from(input.word()).to_le_bytes());
                descriptor.extend([input.byte() & 7, 0, input.byte() % 16, 0]);
                devices.put(QUEUES[usize::from(place) % QUEUES.len()] + 16 * index, &descriptor);
            }
            // And one that is offered.
            8 => {
                let ring = QUEUES[usize::from(input.byte()) % QUEUES.len()] + 0x400;
                let next: u16 = devices.ram.memory().read_obj(GuestAddress(ring + 2)).expect("inside");
                devices.put(ring + 4 + 2 * u64::from(next % 8), &[input.byte() % 16, 0]);
                devices.put(ring + 2, &next.wrapping_add(1).to_le_bytes());
            }
            _ => {
                let mut read = [0; 8];
                let (register, length) = (u64::from(input.word() % 0x200), usize::from(input.byte() % 9));
                devices.block.read(register, &mut read[..length]);
                devices.net.read(register, &mut read[..length]);
            }
        }
    }
    devices.go_over();
    if devices.log.active() {
        let mut disk = vec![0; devices.copy.len()];
        devices.file.read_exact_at(&mut disk, 0).expect("inside");
        assert!(disk == devices.copy, "the log does not make the disk");
    }
    devices.gate.shut();
}
