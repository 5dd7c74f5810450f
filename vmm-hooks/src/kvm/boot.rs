//! Putting the pilot into a new machine, and its vCPUs to its first instruction, at CPL 3 with IOPL 3.

use std::net::Ipv4Addr;

use kvm_bindings::{kvm_regs, kvm_segment};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::pilot::{abi, abi::param};
use super::ram::Memory;
use super::start::Image;
use crate::guest::{GuestError, GuestErrorKind};
use crate::layout::PAGE_SIZE;
use crate::sys::kvm::{KvmError, Vcpu, failed};

/// What the pilot is told beside what its machine has.
#[derive(Debug, Clone, Copy)]
pub struct PilotOptions {
    /// Its network address.
    pub address: Ipv4Addr,
    /// Bits of the network's prefix.
    pub prefix: u8,
    /// Its gateway.
    pub gateway: Option<Ipv4Addr>,
    /// Whether its first disk holds the append-only log; the others, or all, are written by order alone.
    pub log: bool,
}

impl Default for PilotOptions {
    fn default() -> Self {
        Self { address: Ipv4Addr::new(10, 0, 0, 2), prefix: 24, gateway: None, log: false }
    }
}

/// Page tables: four gigabytes mapped one to one, open to CPL 3.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;
const GIGABYTES: u64 = 4;
/// Present, writable, user.
const TABLE: u64 = 7;
/// And two megabytes large.
const LARGE: u64 = 0x87;

const CR0: u64 = 0x8005_0033;
/// PAE, SSE and its exceptions.
const CR4: u64 = 0x620;
/// Long mode, enabled and active.
const EFER: u64 = 0x500;
/// I/O privilege level 3, interrupts off.
const RFLAGS: u64 = 0x3002;
/// Interrupts off.
const RFLAGS_KERNEL: u64 = 2;

fn refused(image: &Image, error: &dyn std::fmt::Display) -> GuestError {
    let path = image.path.display();
    GuestError::new(GuestErrorKind::Refused, format!("{path} cannot be started as a pilot guest: {error}"))
        .advise("build the pilot with cargo xtask setup")
}

/// Writes image, page tables and parameters. The address of the first instruction.
pub(super) fn load(
    memory: &Memory,
    image: &mut Image,
    options: &PilotOptions,
    cpus: u64,
    net: Option<u64>,
    disks: &[u64],
) -> Result<u64, GuestError> {
    let loaded = Elf::load(memory, None, &mut image.file, Some(GuestAddress(abi::IMAGE)));
    let fail = |error: &dyn std::fmt::Display| refused(image, error);
    let loaded = loaded.map_err(|error| fail(&error))?;
    if loaded.kernel_end > abi::IMAGE_END {
        return Err(fail(&"it is too large"));
    }
    let word = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address)).map_err(|error| fail(&error));
    tables(memory).map_err(|error| fail(&error))?;
    let (log, ordered) = match disks.split_first() {
        Some((&first, rest)) if options.log => (first, rest),
        _ => (0, disks),
    };
    let address = |address: Ipv4Addr| u64::from(u32::from(address));
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), cpus);
    let values = [
        (param::MAGIC, param::MAGIC_VALUE),
        (param::CPUS, cpus),
        (param::NET, net.unwrap_or(0)),
        (param::LOG, log),
        (param::DISKS, ordered.len() as u64),
        (param::ADDRESS, address(options.address)),
        (param::PREFIX, options.prefix.into()),
        (param::GATEWAY, options.gateway.map_or(0, address)),
        (param::SEED, seed),
    ];
    for (index, value) in values {
        word(abi::PARAMS + 8 * index, value)?;
    }
    for (index, &disk) in (param::DISK..).zip(ordered) {
        word(abi::PARAMS + 8 * index, disk)?;
    }
    Ok(loaded.kernel_load.0)
}

/// Writes page tables that map the first gigabytes one to one.
pub(super) fn tables(memory: &Memory) -> Result<(), GuestMemoryError> {
    let word = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address));
    word(PML4, PDPT | TABLE)?;
    for gigabyte in 0..GIGABYTES {
        word(PDPT + 8 * gigabyte, (PD + gigabyte * PAGE_SIZE as u64) | TABLE)?;
    }
    for large in 0..GIGABYTES * 512 {
        word(PD + 8 * large, large << 21 | LARGE)?;
    }
    Ok(())
}

/// What code may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Privilege {
    /// CPL 0.
    Kernel,
    /// CPL 3, with every port.
    User,
}

impl Privilege {
    /// `RFLAGS` at its first instruction.
    pub(super) fn flags(self) -> u64 {
        match self {
            Self::Kernel => RFLAGS_KERNEL,
            Self::User => RFLAGS,
        }
    }
}

/// Puts vCPU `number` to its first instruction, in the page tables of [`tables`].
pub(super) fn enter(vcpu: &Vcpu, number: u64, entry: u64, privilege: Privilege) -> Result<(), KvmError> {
    let mut sregs = vcpu.fd().get_sregs().map_err(failed("read a vCPU's system registers"))?;
    let level: u8 = if privilege == Privilege::User { 3 } else { 0 };
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x8 | u16::from(level),
        type_: 11,
        present: 1,
        dpl: level,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x10 | u16::from(level), type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    if privilege == Privilege::User {
        // No way to CPL 0: with no descriptor that can be loaded there is none that a guest could write itself.
        (sregs.gdt.limit, sregs.idt.limit) = (0, 0);
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    }
    vcpu.fd().set_sregs(&sregs).map_err(failed("set a vCPU's system registers"))?;
    let regs = kvm_regs { rip: entry, rdi: number, rflags: privilege.flags(), ..Default::default() };
    vcpu.fd().set_regs(&regs).map_err(failed("set a vCPU's registers"))
}
