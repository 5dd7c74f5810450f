//! A vCPU's state: read and loaded in the one order that KVM takes.
//!
//! Read: `KVM_GET_MP_STATE` first, for it may take in events that others show; events last, for reading others may change them.
//! Loaded: what the registers mean (CPUID, long before) first, `xcrs` before `xsave`, which is checked against it; model-specific registers
//! after `sregs`, the local APIC between them, which needs its base from `sregs` and is needed by the deadline of its timer, a
//! model-specific register and the last of them; events last. (Documentation/virt/kvm/api.rst; the same order as in Firecracker and Cloud Hypervisor.)
//! Every step has a name in its error.

use std::time::{Duration, Instant};

use kvm_bindings::{
    Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::Kvm;
use zerocopy::{FromBytes, IntoBytes};

use super::{Reader, StateError, Tag, Writer};
use crate::sys::kvm::{KvmError, Vcpu, failed, xsave_with};

/// Bytes of the part of `kvm_xsave` that every host has.
const REGION: usize = 4096;
/// When the local APIC's timer is to fire: taken only by one that is in that mode, and compared with the time stamp counter.
const TSC_DEADLINE: u32 = 0x6e0;

/// How long the state of a vCPU that has not run since is what it was: its clock goes on.
const FRESH: Duration = Duration::from_millis(100);
/// `IA32_TSC`.
const TSC: u32 = 0x10;
/// Many seconds of any processor.
const ELSEWHERE: u64 = 1 << 38;
/// `IA32_EFER.SCE`: there is a `SYSCALL`; `.LMA`: it is in long mode.
const SYSCALL: u64 = 1;
const LONG_MODE: u64 = 1 << 10;
/// `CR0.PE`.
const PROTECTED_MODE: u64 = 1;
/// `CR4.CET`: there is a shadow stack, which has registers of its own.
const SHADOW_STACKS: u64 = 1 << 23;
/// `IA32_SYSENTER_CS`: with none there is no `SYSENTER`.
const SYSENTER_CS: u32 = 0x174;

/// Room for a vCPU's state, made once, so that reading it allocates nothing.
#[derive(Debug)]
pub(in crate::kvm) struct Room {
    xsave: Xsave,
    msrs: Msrs,
    /// `IA32_TSC` alone, and which of `msrs` it is.
    tsc: Option<(Msrs, usize)>,
    /// What only code at CPL 0 can change, of a guest that cannot come there: beside `msrs`.
    settled: Option<Settled>,
    khz: u32,
    /// Whether the vCPU was run at all.
    ran: bool,
    /// The state that was read last, and when.
    last: Vec<u8>,
    read: Option<Instant>,
}

/// See [`Room::settled`].
#[derive(Debug, Clone, Copy)]
struct Settled {
    mp_state: kvm_mp_state,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
}

/// Whether a guest that is at CPL 3 with these registers stays there, whatever it does: it has no interrupt or exception that is delivered, no gate or
/// segment that it could load, and no fast system call. (Intel SDM volume 3A, chapters "Protection" and "Interrupt and Exception Handling".)
fn stays_at_user_level(sregs: &kvm_sregs, msrs: &[kvm_msr_entry]) -> bool {
    let protects = sregs.cr0 & PROTECTED_MODE != 0 && sregs.efer & LONG_MODE != 0 && sregs.cr4 & SHADOW_STACKS == 0;
    let at_user_level = protects && sregs.ss.dpl == 3 && sregs.cs.selector & 3 == 3;
    let no_tables = sregs.idt.limit == 0 && sregs.gdt.limit == 0 && sregs.ldt.unusable != 0;
    let sysenter = msrs.iter().find(|msr| msr.index == SYSENTER_CS);
    let no_calls = sregs.efer & SYSCALL == 0 && sysenter.is_some_and(|msr| msr.data & 0xfffc == 0);
    at_user_level && no_tables && no_calls
}

impl Room {
    /// Room for `vcpu`, which has not run; asks once which model-specific registers it has: `KVM_GET_MSRS` stops at the first that it does
    /// not know. One whose own value KVM does not take back cannot have another (`MSR_KVM_ASYNC_PF_INT` without an interrupt controller).
    pub(in crate::kvm) fn new(kvm: &Kvm, vcpu: &Vcpu) -> Result<Self, KvmError> {
        let list = kvm.get_msr_index_list().map_err(failed("list model-specific registers"))?;
        let readable = |&&index: &&u32| {
            let entry = kvm_msr_entry { index, ..Default::default() };
            let mut one = Msrs::from_entries(&[entry]).expect("one fits");
            matches!(vcpu.fd().get_msrs(&mut one), Ok(1)) && matches!(vcpu.fd().set_msrs(&one), Ok(1))
        };
        let mut entries: Vec<_> = list
            .as_slice()
            .iter()
            .filter(readable)
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        entries.sort_by_key(|entry| entry.index == TSC_DEADLINE);
        let msrs = Msrs::from_entries(&entries).expect("KVM lists no more than it takes");
        let tsc = entries.iter().position(|entry| entry.index == TSC);
        let tsc = tsc.map(|place| (Msrs::from_entries(&entries[place..=place]).expect("one fits"), place));
        let khz = vcpu.fd().get_tsc_khz().unwrap_or(0);
        let xsave = vcpu.new_xsave()?;
        Ok(Self { xsave, msrs, tsc, settled: None, khz, ran: false, last: Vec::new(), read: None })
    }
}

/// Writes the state of a vCPU that stands; `ran`: it was in the guest since this was last called; `chips`: it has a local APIC.
///
/// Each question to a vCPU costs some microseconds, so none is asked twice: one that was not in the guest is as it was, what KVM leaves
/// with each exit is taken from there, and what a guest at CPL 3 cannot change, which cannot come to CPL 0, is asked once. A local APIC takes in events
/// also while its vCPU stands: then all is asked, each time.
pub(in crate::kvm) fn save(
    vcpu: &Vcpu,
    room: &mut Room,
    ran: bool,
    number: u64,
    chips: bool,
    into: &mut Writer<'_>,
) -> Result<(), StateError> {
    if ran || chips {
        (room.ran, room.read) = (true, None);
    }
    if room.read.is_some_and(|read| read.elapsed() < FRESH) {
        into.bytes.extend_from_slice(&room.last);
        return Ok(());
    }
    let start = into.bytes.len();
    read(vcpu, room, number, chips, into)?;
    room.last.clear();
    room.last.extend_from_slice(&into.bytes[start..]);
    room.read = Some(Instant::now());
    Ok(())
}

fn read(vcpu: &Vcpu, room: &mut Room, number: u64, chips: bool, into: &mut Writer<'_>) -> Result<(), StateError> {
    let fd = vcpu.fd();
    let named = |what| move |error| StateError::Vcpu { vcpu: number, source: failed(what)(error) };
    let left_with = vcpu.left_with().filter(|_| room.ran && !chips);
    // It may take in events that others show, of a local APIC: without one it is asked later, or not at all.
    let mut mp_state = if chips { Some(fd.get_mp_state().map_err(named("read a vCPU's activity"))?) } else { None };
    let (regs, sregs) = match &left_with {
        Some(left) => (left.regs, left.sregs),
        None => (
            fd.get_regs().map_err(named("read a vCPU's registers"))?,
            fd.get_sregs().map_err(named("read a vCPU's system registers"))?,
        ),
    };
    room.settled = room.settled.filter(|_| stays_at_user_level(&sregs, room.msrs.as_slice()));
    let settled = match room.settled {
        Some(settled) => settled,
        None => Settled {
            mp_state: match mp_state.take() {
                Some(mp_state) => mp_state,
                None => fd.get_mp_state().map_err(named("read a vCPU's activity"))?,
            },
            xcrs: fd.get_xcrs().map_err(named("read a vCPU's extended control registers"))?,
            debug: fd.get_debug_regs().map_err(named("read a vCPU's debug registers"))?,
        },
    };
    into.structure(Tag::MpState, &settled.mp_state);
    into.structure(Tag::Regs, &regs);
    into.structure(Tag::Sregs, &sregs);
    into.structure(Tag::Xcrs, &settled.xcrs);
    vcpu.read_xsave(&mut room.xsave).map_err(|source| StateError::Vcpu { vcpu: number, source })?;
    write_xsave(&room.xsave, into);
    into.structure(Tag::DebugRegs, &settled.debug);
    if chips {
        into.structure(Tag::Lapic, &fd.get_lapic().map_err(named("read a vCPU's local APIC"))?);
    }
    let registers = named("read a vCPU's model-specific registers");
    match &mut room.tsc {
        Some((tsc, place)) if room.settled.is_some() => {
            if fd.get_msrs(tsc).map_err(registers)? != 1 {
                return Err(StateError::Msr { vcpu: number, index: TSC });
            }
            room.msrs.as_mut_slice()[*place] = tsc.as_slice()[0];
        }
        _ => {
            let read = fd.get_msrs(&mut room.msrs).map_err(registers)?;
            if let Some(missing) = room.msrs.as_slice().get(read) {
                return Err(StateError::Msr { vcpu: number, index: missing.index });
            }
        }
    }
    into.structure(Tag::Msrs, room.msrs.as_slice());
    into.structure(Tag::TscKhz, &room.khz);
    let events = match left_with {
        Some(left) => left.events,
        None => fd.get_vcpu_events().map_err(named("read a vCPU's events"))?,
    };
    into.structure(Tag::Events, &events);
    let stays = !chips && room.tsc.is_some() && stays_at_user_level(&sregs, room.msrs.as_slice());
    room.settled = stays.then_some(settled);
    Ok(())
}

/// A vCPU's state that was read and makes sense as a form; whether this host takes it is seen when it is loaded.
#[derive(Debug)]
pub(in crate::kvm) struct Parsed {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Xsave,
    debug: kvm_debugregs,
    lapic: Option<kvm_lapic_state>,
    msrs: Msrs,
    khz: u32,
    events: kvm_vcpu_events,
}

impl Parsed {
    /// Reads the state of vCPU `number`; `chips`: it has a local APIC.
    pub(in crate::kvm) fn read(number: u64, chips: bool, from: &mut Reader<'_>) -> Result<Self, StateError> {
        let mp_state = from.structure(Tag::MpState, "a vCPU's activity")?;
        let regs = from.structure(Tag::Regs, "registers")?;
        let sregs = from.structure(Tag::Sregs, "system registers")?;
        let xcrs = from.structure(Tag::Xcrs, "extended control registers")?;
        let xsave = read_xsave(from.bytes(Tag::Xsave)?, number)?;
        let debug = from.structure(Tag::DebugRegs, "debug registers")?;
        let lapic = if chips { Some(from.structure(Tag::Lapic, "a local APIC")?) } else { None };
        // Not where it lies: the bytes need not be aligned.
        let entries = from.bytes(Tag::Msrs)?.chunks(size_of::<kvm_msr_entry>()).map(kvm_msr_entry::read_from_bytes);
        let msrs = entries.collect::<Result<Vec<_>, _>>().ok().and_then(|msrs| Msrs::from_entries(&msrs).ok());
        let msrs = msrs.ok_or(StateError::Invalid { what: "model-specific registers" })?;
        let khz: u32 = from.structure(Tag::TscKhz, "a clock rate")?;
        let events = from.structure(Tag::Events, "events")?;
        Ok(Self { mp_state, regs, sregs, xcrs, xsave, debug, lapic, msrs, khz, events })
    }

    /// Loads it into a vCPU that has not run.
    pub(in crate::kvm) fn load(&self, vcpu: &Vcpu, room: &mut Room, number: u64) -> Result<(), StateError> {
        let fd = vcpu.fd();
        let named = |what| move |error| StateError::Vcpu { vcpu: number, source: failed(what)(error) };
        (room.settled, room.read) = (None, None);
        fd.set_mp_state(self.mp_state).map_err(named("load a vCPU's activity"))?;
        fd.set_regs(&self.regs).map_err(named("load a vCPU's registers"))?;
        fd.set_sregs(&self.sregs).map_err(named("load a vCPU's system registers"))?;
        // A processor without XSAVE has none, and takes none.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(named("load a vCPU's extended control registers"))?;
        }
        vcpu.load_xsave(&self.xsave).map_err(|source| StateError::Vcpu { vcpu: number, source })?;
        fd.set_debug_regs(&self.debug).map_err(named("load a vCPU's debug registers"))?;
        if let Some(lapic) = &self.lapic {
            fd.set_lapic(lapic).map_err(named("load a vCPU's local APIC"))?;
        }
        // A host whose own rate is the same needs no scaling, which not every host can do.
        if self.khz != 0 && fd.get_tsc_khz().ok() != Some(self.khz) {
            fd.set_tsc_khz(self.khz).map_err(named("load a vCPU's clock rate"))?;
            room.khz = self.khz;
        }
        if number == 0
            && let Some(elsewhere) = self.tsc_elsewhere()
        {
            fd.set_msrs(&elsewhere).map_err(named("load a vCPU's time stamp counter"))?;
        }
        let loaded = fd.set_msrs(&self.msrs).map_err(named("load a vCPU's model-specific registers"))?;
        if let Some(refused) = self.msrs.as_slice().get(loaded) {
            return Err(StateError::Msr { vcpu: number, index: refused.index });
        }
        fd.set_vcpu_events(&self.events).map_err(named("load a vCPU's events"))?;
        // So that the guest's watchdogs know that it stood; a guest without KVM's clock cannot be told, and has none that look at it.
        match fd.kvmclock_ctrl() {
            Err(error) if error.errno() != libc::EINVAL => Err(named("tell a vCPU that it stood")(error)),
            _ => Ok(()),
        }
    }

    /// A time stamp counter that is far from the one to be loaded. KVM takes a value within a second of what the machine's would be now for an attempt to
    /// write the same to all vCPUs, and lets the counter be as it was (`kvm_synchronize_tsc`); a machine that has waited may come near a guest's. So the first
    /// vCPU's is written elsewhere first.
    fn tsc_elsewhere(&self) -> Option<Msrs> {
        let tsc = self.msrs.as_slice().iter().find(|msr| msr.index == TSC)?;
        let entry = kvm_msr_entry { index: TSC, data: tsc.data.wrapping_add(ELSEWHERE), ..Default::default() };
        Some(Msrs::from_entries(&[entry]).expect("one fits"))
    }

    /// Writes it as [`save`] writes a vCPU's.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(in crate::kvm) fn write(&self, into: &mut Writer<'_>) {
        into.structure(Tag::MpState, &self.mp_state);
        into.structure(Tag::Regs, &self.regs);
        into.structure(Tag::Sregs, &self.sregs);
        into.structure(Tag::Xcrs, &self.xcrs);
        write_xsave(&self.xsave, into);
        into.structure(Tag::DebugRegs, &self.debug);
        if let Some(lapic) = &self.lapic {
            into.structure(Tag::Lapic, lapic);
        }
        into.structure(Tag::Msrs, self.msrs.as_slice());
        into.structure(Tag::TscKhz, &self.khz);
        into.structure(Tag::Events, &self.events);
    }

    /// One of nothing but zeroes, with so many model-specific registers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(in crate::kvm) fn zeroes(msrs: usize) -> Self {
        Self {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xcrs: kvm_xcrs::default(),
            xsave: xsave_with(&[0; 4], [0; REGION / 4]).expect("there is memory"),
            debug: kvm_debugregs::default(),
            lapic: None,
            msrs: Msrs::from_entries(&vec![kvm_msr_entry::default(); msrs]).expect("few"),
            khz: 0,
            events: kvm_vcpu_events::default(),
        }
    }
}

fn write_xsave(xsave: &Xsave, into: &mut Writer<'_>) {
    into.section(Tag::Xsave, |section| {
        section.bytes.extend_from_slice(xsave.as_fam_struct_ref().xsave.region.as_bytes());
        section.bytes.extend_from_slice(xsave.as_slice().as_bytes());
    });
}

fn read_xsave(bytes: &[u8], number: u64) -> Result<Xsave, StateError> {
    let invalid = StateError::Invalid { what: "a vector state" };
    let Some((region, words)) = bytes.split_at_checked(REGION) else { return Err(invalid) };
    if !words.len().is_multiple_of(4) {
        return Err(invalid);
    }
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("four"));
    let words: Vec<u32> = words.chunks_exact(4).map(word).collect();
    let mut first = [0; REGION / 4];
    first.iter_mut().zip(region.chunks_exact(4)).for_each(|(into, bytes)| *into = word(bytes));
    xsave_with(&words, first).map_err(|source| StateError::Vcpu { vcpu: number, source })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::kvm::pilot::abi;
    use crate::kvm::{Dirty, GateBounds, Machine, PilotOptions, Spec, host};

    #[test]
    fn a_guest_that_may_come_to_another_level_is_asked_everything() {
        let mut sregs = kvm_sregs::default();
        (sregs.ss.dpl, sregs.cs.selector, sregs.ldt.unusable, sregs.efer, sregs.cr0) = (3, 0xb, 1, 0x500, 0x8000_0033);
        let sysenter = |data| [kvm_msr_entry { index: SYSENTER_CS, data, ..Default::default() }];
        assert!(stays_at_user_level(&sregs, &sysenter(0)));
        assert!(!stays_at_user_level(&sregs, &sysenter(8)) && !stays_at_user_level(&sregs, &[]));
        type Change = fn(&mut kvm_sregs);
        let changes: [Change; 9] = [
            |sregs| sregs.cr0 &= !PROTECTED_MODE,
            |sregs| sregs.efer &= !LONG_MODE,
            |sregs| sregs.cr4 |= SHADOW_STACKS,
            |sregs| sregs.ss.dpl = 0,
            |sregs| sregs.cs.selector = 8,
            |sregs| sregs.idt.limit = 0xfff,
            |sregs| sregs.gdt.limit = 31,
            |sregs| sregs.ldt.unusable = 0,
            |sregs| sregs.efer |= SYSCALL,
        ];
        for change in changes {
            let mut changed = sregs;
            change(&mut changed);
            assert!(!stays_at_user_level(&changed, &sysenter(0)), "{changed:?}");
        }
    }

    #[test]
    fn what_kvm_is_not_asked_is_what_it_would_say() {
        const PILOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/pilot/pilot");
        let kvm = match host() {
            Ok(kvm) if Path::new(PILOT).exists() => kvm,
            Ok(_) => return println!("skipped: the pilot guest is not built; cargo xtask setup"),
            Err(error) => return println!("skipped: no /dev/kvm: {error}"),
        };
        let spec = Spec {
            name: "state".to_owned(),
            memory: abi::MEMORY_MIN,
            cpus: 2,
            net: None,
            disks: Vec::new(),
            dirty: Dirty::Bitmap,
        };
        let options = PilotOptions::default();
        let machine = Machine::pilot(&kvm, spec, Path::new(PILOT), &options, None, GateBounds::default());
        let machine = machine.expect("this host can");
        let mut bytes = Vec::new();
        let mut places = [0; 2];
        for round in 0..40 {
            if round > 0 {
                machine.resume().expect("it stands");
                // The first vCPU works at times, the other one never.
                if round % 4 != 0 {
                    let page = u32::try_from(abi::FREE / 4096).expect("small");
                    machine.order(&[abi::order::FILL, page, 1], Duration::from_secs(60)).expect("the pilot works");
                }
                machine.pause().expect("it runs");
            }
            machine.save(&mut bytes).expect("it stands");
            let (mut reader, _) = Reader::begin(&bytes).expect("it was just written");
            for (number, slot) in (0..).zip(&machine.0.slots) {
                let said = Parsed::read(number, false, &mut reader).expect("it was just written");
                let vcpu = slot.vcpu.lock().expect("nobody panics");
                let fd = vcpu.fd();
                let regs = fd.get_regs().expect("it stands");
                assert_eq!(said.regs, regs, "vCPU {number}, round {round}");
                assert_eq!(said.sregs.as_bytes(), fd.get_sregs().expect("it stands").as_bytes());
                assert_eq!(said.events.as_bytes(), fd.get_vcpu_events().expect("it stands").as_bytes());
                assert_eq!(said.debug.as_bytes(), fd.get_debug_regs().expect("it stands").as_bytes());
                assert_eq!(said.xcrs.as_bytes(), fd.get_xcrs().expect("it stands").as_bytes());
                assert_eq!(said.mp_state.as_bytes(), fd.get_mp_state().expect("it stands").as_bytes());
                assert_eq!(said.khz, fd.get_tsc_khz().unwrap_or(0));
                let mut msrs = said.msrs.clone();
                fd.get_msrs(&mut msrs).expect("it stands");
                for (said, is) in said.msrs.as_slice().iter().zip(msrs.as_slice()) {
                    // The clock goes on, and so do the two of Hyper-V that KVM counts by itself.
                    let same = match is.index {
                        TSC => said.data < is.data,
                        0x4000_0010 | 0x4000_0020 => true,
                        _ => said.data == is.data,
                    };
                    assert!(same, "register {:#x}: {:#x}, it is {:#x}", is.index, said.data, is.data);
                }
                let settled = slot.room.lock().expect("nobody panics").settled;
                assert!(settled.is_some(), "a pilot stays at CPL 3, so it is asked less");
                places[usize::try_from(number).expect("two")] = regs.rip;
            }
        }
        assert!(places.iter().all(|&place| place > abi::IMAGE), "the vCPUs did not run: {places:x?}");
        machine.fence().fence().expect("it ends");
    }
}
