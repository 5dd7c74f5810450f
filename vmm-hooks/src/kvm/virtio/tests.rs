use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_mmio as mmio;
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::log::DiskLog;
use super::net::Net;
use crate::disk::{DiskChange, DiskWrite};
use crate::guest::Gate;
use crate::kvm::gate::{GateBounds, KvmGate};
use crate::kvm::ram::{Memory, Ram};
use crate::kvm::state::{Reader, Writer};
use crate::layout::PAGE_SIZE;
use crate::sys::memory::SharedMemory;

const SECTORS: u64 = 64;
/// Where a test's queue is, its buffers after it.
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

fn ram() -> Ram {
    let shared = SharedMemory::new("virtio-test", 32 * PAGE_SIZE as u64).expect("a small one");
    Ram::map(&shared, false).expect("it can be mapped")
}

fn block(halt: &Arc<AtomicBool>) -> (Block, Arc<DiskLog>, File) {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(SECTORS * 512).expect("room");
    let log = Arc::new(DiskLog::new(vec![SECTORS * 512]));
    let twice = file.try_clone().expect("a descriptor");
    (Block::new(0, "test", file, SECTORS * 512, Arc::clone(&log), Arc::clone(halt)), log, twice)
}

/// Brings a device up with a queue of eight, as a driver does.
fn bring_up(write: &mut dyn FnMut(u32, u32), queue: u32) {
    for (register, value) in [
        (mmio::VIRTIO_MMIO_STATUS, 3),
        (mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        (mmio::VIRTIO_MMIO_DRIVER_FEATURES, 1),
        (mmio::VIRTIO_MMIO_STATUS, 11),
        (mmio::VIRTIO_MMIO_QUEUE_SEL, queue),
        (mmio::VIRTIO_MMIO_QUEUE_NUM, 8),
        (mmio::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
        (mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000),
        (mmio::VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000),
        (mmio::VIRTIO_MMIO_QUEUE_READY, 1),
        (mmio::VIRTIO_MMIO_STATUS, 15),
    ] {
        write(register, value);
    }
}

/// Puts the request with this number, of one sector, into the queue.
fn request(memory: &Memory, number: u16, kind: u32, sector: u64, byte: u8) {
    let (head, data, status) = (BUFFERS, BUFFERS + 0x200, BUFFERS + 0x100);
    memory.write_obj(kind, GuestAddress(head)).expect("inside");
    memory.write_obj(sector, GuestAddress(head + 8)).expect("inside");
    memory.write_slice(&[byte; 512], GuestAddress(data)).expect("inside");
    memory.write_obj(0xff_u8, GuestAddress(status)).expect("inside");
    // Next, and writable by the device.
    let of_data = if kind == blk::VIRTIO_BLK_T_IN { 3 } else { 1 };
    for (index, (address, length, flags)) in (0..).zip([(head, 16_u32, 1_u16), (data, 512, of_data), (status, 1, 2)]) {
        let at = DESC + 16 * index;
        memory.write_obj(address, GuestAddress(at)).expect("inside");
        memory.write_obj(length, GuestAddress(at + 8)).expect("inside");
        memory.write_obj(flags, GuestAddress(at + 12)).expect("inside");
        memory.write_obj(u16::try_from(index + 1).expect("small"), GuestAddress(at + 14)).expect("inside");
    }
    memory.write_obj(0_u16, GuestAddress(AVAIL + 4 + 2 * u64::from(number % 8))).expect("inside");
    memory.write_obj(number + 1, GuestAddress(AVAIL + 2)).expect("inside");
}

fn used(memory: &Memory) -> u16 {
    memory.read_obj(GuestAddress(USED + 2)).expect("inside")
}

fn status(memory: &Memory) -> u8 {
    memory.read_obj(GuestAddress(BUFFERS + 0x100)).expect("inside")
}

fn taken(log: &DiskLog) -> Vec<DiskWrite> {
    let mut writes = Vec::new();
    log.take(&mut writes, 1 << 20, Duration::ZERO, |_, _, _, _| panic!("there is nothing to copy"));
    writes
}

#[test]
fn a_request_that_was_not_begun_is_done_when_the_machine_goes_on_here_or_elsewhere() {
    let halt = Arc::new(AtomicBool::new(false));
    let (ram, (one, log, file)) = (ram(), block(&halt));
    let memory = ram.memory();
    bring_up(&mut |register, value| assert!(!one.write(register.into(), &value.to_le_bytes(), memory)), 0);
    let notify = |device: &Block| device.write(mmio::VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4], memory);
    log.start();
    // The first copy, taken.
    let mut first = Vec::new();
    log.take(&mut first, 1 << 20, Duration::ZERO, |_, offset, length, with| one.copy(offset, length, with));
    assert_eq!(first, [DiskWrite { disk: 0, offset: 0, change: DiskChange::Zero(SECTORS * 512) }]);
    request(memory, 0, blk::VIRTIO_BLK_T_OUT, 3, 7);
    assert!(!notify(&one), "nothing is left");
    assert_eq!((used(memory), status(memory)), (1, 0));
    assert_eq!(taken(&log), [DiskWrite { disk: 0, offset: 3 * 512, change: DiskChange::Data(vec![7; 512]) }]);
    // A pause comes before the next one.
    halt.store(true, Ordering::SeqCst);
    request(memory, 1, blk::VIRTIO_BLK_T_OUT, 4, 8);
    assert!(notify(&one), "it is left");
    assert_eq!(used(memory), 1);
    assert!(taken(&log).is_empty());
    let mut state = Vec::new();
    one.save(&mut Writer::begin(&mut state, 1));
    halt.store(false, Ordering::SeqCst);
    // Elsewhere, on another disk, with this memory.
    let (other, _, other_file) = block(&halt);
    let (mut reader, _) = Reader::begin(&state).expect("it is whole");
    other.load(&mut reader, memory).expect("it loads");
    reader.finish("a rest").expect("no rest");
    assert!(!other.look(memory), "nothing is left");
    assert_eq!((used(memory), status(memory)), (2, 0));
    let sector = |file: &File, sector: u64| {
        let mut bytes = [0; 512];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, sector * 512).expect("inside");
        bytes[0]
    };
    assert_eq!((sector(&file, 3), sector(&file, 4)), (7, 0));
    assert_eq!((sector(&other_file, 3), sector(&other_file, 4)), (0, 8));
    // And what was written is read.
    request(memory, 2, blk::VIRTIO_BLK_T_IN, 4, 0);
    assert!(!notify(&other));
    let mut read = [0; 512];
    memory.read_slice(&mut read, GuestAddress(BUFFERS + 0x200)).expect("inside");
    assert_eq!((read, status(memory)), ([8; 512], 0));
}

#[test]
fn a_request_outside_of_the_disk_fails_and_writes_nothing() {
    let halt = Arc::new(AtomicBool::new(false));
    let (ram, (device, log, _)) = (ram(), block(&halt));
    let memory = ram.memory();
    bring_up(&mut |register, value| assert!(!device.write(register.into(), &value.to_le_bytes(), memory)), 0);
    for (number, sector) in (0..).zip([SECTORS, u64::MAX / 512, u64::MAX]) {
        request(memory, number, blk::VIRTIO_BLK_T_OUT, sector, 1);
        device.write(mmio::VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4], memory);
        assert_eq!((used(memory), status(memory)), (number + 1, 1), "sector {sector}");
    }
    assert!(!log.active());
}

#[derive(Debug, Clone)]
enum Act {
    Register(u32, u32),
    Memory(u64, Vec<u8>),
    Notify(u32),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let value = prop_oneof![0..16_u32, Just(0x1000), Just(0x2000), Just(0x3000), any::<u32>()];
    let act = prop_oneof![
        2 => (0..0x200_u32, value).prop_map(|(register, value)| Act::Register(register & !3, value)),
        4 => (DESC..USED + 0x200, prop::collection::vec(prop_oneof![3 => 0..4_u8, 1 => any::<u8>()], 1..40))
            .prop_map(|(address, bytes)| Act::Memory(address, bytes)),
        4 => (0..3_u32).prop_map(Act::Notify),
    ];
    prop::collection::vec(act, 0..60)
}

proptest! {
    /// Whatever a driver does, a device answers, writes nothing outside of the guest's memory, and lets its state be saved.
    #[test]
    fn no_driver_harms_its_device(acts in acts(), lead in any::<bool>()) {
        let halt = Arc::new(AtomicBool::new(false));
        let (ram, (block, _, _)) = (ram(), block(&halt));
        let memory = ram.memory();
        let (wire, other) = UnixDatagram::pair().expect("a pair");
        wire.set_nonblocking(true).expect("it can");
        let gate = Arc::new(KvmGate::new(Some(wire.try_clone().expect("a descriptor").into()), GateBounds::default()));
        gate.shut();
        let net = Net::new([2, 0, 0, 0, 0, 1], wire.into(), gate).expect("a descriptor");
        if lead {
            bring_up(&mut |register, value| assert!(!block.write(register.into(), &value.to_le_bytes(), memory)), 0);
            bring_up(&mut |register, value| net.write(register.into(), &value.to_le_bytes(), memory), 1);
        }
        for act in acts {
            let (register, value) = match act {
                Act::Register(register, value) => (register, value),
                Act::Notify(queue) => (mmio::VIRTIO_MMIO_QUEUE_NOTIFY, queue),
                Act::Memory(address, bytes) => {
                    memory.write_slice(&bytes, GuestAddress(address)).expect("inside");
                    continue;
                }
            };
            block.write(register.into(), &value.to_le_bytes(), memory);
            net.write(register.into(), &value.to_le_bytes(), memory);
            let mut read = [0; 4];
            block.read(register.into(), &mut read);
            net.read(register.into(), &mut read);
        }
        let mut state = Vec::new();
        let mut writer = Writer::begin(&mut state, 1);
        block.save(&mut writer);
        net.save(&mut writer);
        drop(other);
    }
}
