//! What of a machine can be there before it is known what it goes on from: its processors and its memory, without devices and threads.
//!
//! Promise: nothing in it runs, and nothing of it reaches outside. It is the slow part of making a machine, so a twin that waits has it already.

use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;

use super::chips::Chips;
use super::cpuid::{self, Leaf};
use super::machine::{Dirty, NO_RINGS, Slot, Spec, refused};
use super::ram::Ram;
use super::ring::{self, Rings};
use super::state::vcpu::Room;
use super::trial::Code;
use super::wake::Wake;
use super::worth;
use crate::disk::MAX_DISKS;
use crate::guest::GuestError;
use crate::sys::kvm::{KvmError, Vcpu, Vm, failed};
use crate::sys::memory::SharedMemory;

/// Processors and memory.
pub(super) struct Bare {
    pub(super) spec: Spec,
    pub(super) cpuid: Vec<Leaf>,
    pub(super) vm: Arc<Vm>,
    /// If its dirty pages are kept in rings.
    pub(super) rings: Option<Arc<Rings>>,
    /// Why they are not, though it was to have rings.
    pub(super) no_rings: Option<String>,
    /// For how many harvests a page is worth being left writable, by the bitmap.
    pub(super) worth: u8,
    /// What a kernel needs beside processors, memory and virtio devices.
    pub(super) chips: Option<Chips>,
    pub(super) slots: Vec<Slot>,
}

impl Bare {
    /// Makes those of a machine of `spec`, with what a kernel needs if `chips`. `private`: what it writes to `memory` stays with it.
    ///
    /// # Errors
    /// If this host cannot have it.
    pub(super) fn new(
        kvm: &Kvm,
        spec: Spec,
        cpuid: &[Leaf],
        chips: bool,
        memory: &SharedMemory,
        private: bool,
    ) -> Result<Self, GuestError> {
        if spec.cpus == 0 || spec.disks.len() > MAX_DISKS {
            return Err(refused(format!("a microVM has at least one vCPU and at most {MAX_DISKS} disks")));
        }
        let kvm_failed = |error: KvmError| {
            refused(format!("the microVM {} cannot be made: {error}: {}", spec.name, error.source)).because(error)
        };
        let ram = Ram::map(memory, private).map_err(|error| refused(error.to_string()).because(error))?;
        let code = if chips { Code::Kernel } else { Code::User };
        let no_rings = (spec.dirty == Dirty::Ring).then(|| ring::check::of_host(kvm, code)).and_then(Result::err);
        if let Some(why) = &no_rings {
            tracing::warn!(name = spec.name, why, "{NO_RINGS}");
        }
        let with_rings = spec.dirty == Dirty::Ring && no_rings.is_none();
        // One that is not protected is not asked.
        let worth = if with_rings || private { 1 } else { worth::of_host(kvm, code) };
        let ram = Arc::new(ram);
        let vm = if with_rings { Vm::with_rings(kvm, ram, ring::LENGTH) } else { Vm::new(kvm, ram) };
        let vm = Arc::new(vm.map_err(kvm_failed)?);
        // Before the first vCPU, which has its part of them.
        let chips = chips.then(|| Chips::new(&vm)).transpose().map_err(kvm_failed)?;
        let mut slots = Vec::new();
        for number in 0..spec.cpus {
            let vcpu = Vcpu::new(&vm, number).map_err(kvm_failed)?;
            let table = cpuid::table(cpuid, u32::try_from(number).expect("few"));
            let table = table.ok_or_else(|| refused("the processor's description is too long for KVM"))?;
            vcpu.fd().set_cpuid2(&table).map_err(failed("set what a vCPU's processor is")).map_err(kvm_failed)?;
            let room = Room::new(kvm, &vcpu).map_err(kvm_failed)?;
            slots.push(Slot {
                kick: vcpu.kick(),
                vcpu: Mutex::new(vcpu),
                wake: Wake::default(),
                ran: AtomicBool::new(false),
                on: AtomicUsize::new(0),
                stands: AtomicBool::new(false),
                room: Mutex::new(room),
            });
        }
        let rings = with_rings.then(|| {
            let vcpus: Vec<_> = slots.iter_mut().map(|slot: &mut Slot| slot.vcpu.get_mut()).collect();
            let vcpus = vcpus.into_iter().map(|vcpu| &*vcpu.expect("nobody panics while it holds a vCPU"));
            Rings::new(&vm, vcpus).map(Arc::new)
        });
        let rings = rings.transpose().map_err(kvm_failed)?;
        Ok(Self { cpuid: cpuid.to_vec(), vm, rings, no_rings, worth, chips, slots, spec })
    }
}
