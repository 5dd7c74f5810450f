//! Target `snapshot`: a machine's state, as a standby is given it. Not part of the API.
//!
//! The input edits a state that decodes, for a whole one is longer than inputs are. Holds: decoding ends with a reason, or with what
//! encodes to the very same bytes: a state has one form, and not a byte more or less is that state. What KVM says to the values is not asked
//! here.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_bindings::kvm_clock_data;

use super::machine::{Decoded, Parts, decode};
use super::vcpu::Parsed;
use super::{Tag, Writer};
use crate::kvm::gate::{GateBounds, KvmGate};
use crate::kvm::orders::Clock;
use crate::kvm::ram::Ram;
use crate::kvm::virtio::block::Block;
use crate::kvm::virtio::log::DiskLog;
use crate::kvm::virtio::net::Net;
use crate::layout::PAGE_SIZE;
use crate::sys::memory::SharedMemory;

const DISK: u64 = 8 * 512;

/// What a state is loaded into.
struct Machine {
    cpus: u64,
    clock: Clock,
    net: Option<Net>,
    blocks: Vec<Block>,
    ram: Ram,
}

impl Machine {
    fn new(cpus: u64, card: bool, disks: u32) -> Self {
        let memory = |name, bytes| SharedMemory::new(name, bytes).expect("a small one");
        let ram = Ram::map(&memory("fuzz-ram", 16 * PAGE_SIZE as u64), false).expect("it can be mapped");
        let net = card.then(|| {
            let wire = File::open("/dev/null").expect("it is everywhere");
            let gate = Arc::new(KvmGate::new(None, GateBounds::default()));
            Net::new([2, 0, 0, 0, 0, 1], wire.into(), gate).expect("a descriptor")
        });
        let log = Arc::new(DiskLog::new(vec![DISK; disks as usize]));
        let disk = |number| {
            let file = File::from(memory("fuzz-disk", DISK).fd().as_fd().try_clone_to_owned().expect("a descriptor"));
            Block::new(number, "disk", file, DISK, Arc::clone(&log), Arc::new(AtomicBool::new(true)))
        };
        let blocks = (0..disks).map(disk).collect();
        Self { cpus, clock: Clock::new(usize::try_from(cpus).expect("few")), net, blocks, ram }
    }

    fn parts(&self) -> Parts<'_> {
        Parts {
            cpus: self.cpus,
            chips: false,
            clock: &self.clock,
            net: self.net.as_ref(),
            blocks: &self.blocks,
            memory: self.ram.memory(),
        }
    }

    /// The state, with what KVM would be given.
    fn encode(&self, decoded: &Decoded) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::begin(&mut bytes, self.cpus);
        decoded.vcpus.iter().for_each(|vcpu| vcpu.write(&mut writer));
        writer.structure(Tag::KvmClock, &decoded.clock);
        writer.section(Tag::Clock, |section| self.clock.save(section));
        if let Some(net) = &self.net {
            writer.section(Tag::Net, |section| net.save(section));
        }
        for block in &self.blocks {
            writer.section(Tag::Block, |section| block.save(section));
        }
        writer.end();
        bytes
    }
}

/// The first byte chooses the machine; then come edits: what is to be done, where, and how much or what.
pub(crate) fn run(bytes: &[u8]) {
    let Some((&choice, mut edits)) = bytes.split_first() else { return };
    let machine = Machine::new(u64::from(choice & 1) + 1, choice & 2 == 0, u32::from(choice >> 2 & 1));
    let vcpus = (0..machine.cpus).map(|_| Parsed::zeroes(usize::from(choice >> 4))).collect();
    let mut state = machine.encode(&Decoded { vcpus, clock: kvm_clock_data::default() });
    while let Some((&[what, low, high, count], rest)) = edits.split_first_chunk() {
        let count = usize::from(count);
        // From the start or, where the devices are, from the end.
        let place = usize::from(u16::from_le_bytes([low, high])).min(state.len());
        let place = if what & 1 == 0 { place } else { state.len() - place };
        let end = (place + count).min(state.len());
        edits = rest;
        match what >> 1 & 3 {
            0 => drop(state.drain(place..end)),
            1 => state.truncate(place),
            kind => {
                let (new, rest) = rest.split_at(count.min(rest.len()));
                edits = rest;
                let old = if kind == 2 { place..(place + new.len()).min(state.len()) } else { place..place };
                state.splice(old, new.iter().copied());
            }
        }
    }
    let mut given = None;
    let decoded = decode(&state, &machine.parts(), |decoded, _| {
        given = Some(decoded);
        Ok(())
    });
    match decoded {
        Ok(()) => {
            let given = given.expect("nothing is loaded before it");
            assert!(machine.encode(&given) == state, "a state has a second form");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
