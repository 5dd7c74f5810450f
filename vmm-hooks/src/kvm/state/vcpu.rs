//! A vCPU's state: read and loaded in the one order that KVM takes.
//!
//! Read: `KVM_GET_MP_STATE` first, for it may take in events that others show; events last, for reading others may change them.
//! Loaded: what the registers mean (CPUID, long before) first, `xcrs` before `xsave`, which is checked against it; model-specific registers
//! after `sregs`; events last. (Documentation/virt/kvm/api.rst; the same order as in Firecracker and Cloud Hypervisor.)
//! Every step has a name in its error.

use kvm_bindings::{Msrs, Xsave, kvm_msr_entry};
use kvm_ioctls::Kvm;
use zerocopy::{FromBytes, IntoBytes};

use super::{Reader, StateError, Tag, Writer};
use crate::sys::kvm::{KvmError, Vcpu, failed, xsave_with};

/// Bytes of the part of `kvm_xsave` that every host has.
const REGION: usize = 4096;

/// Room for a vCPU's state, made once, so that reading it allocates nothing.
#[derive(Debug)]
pub(in crate::kvm) struct Room {
    xsave: Xsave,
    msrs: Msrs,
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
        let entries: Vec<_> = list
            .as_slice()
            .iter()
            .filter(readable)
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).expect("KVM lists no more than it takes");
        Ok(Self { xsave: vcpu.new_xsave()?, msrs })
    }
}

/// Writes the state of a vCPU that stands.
pub(in crate::kvm) fn save(vcpu: &Vcpu, room: &mut Room, number: u64, into: &mut Writer<'_>) -> Result<(), StateError> {
    let fd = vcpu.fd();
    let named = |what| move |error| StateError::Vcpu { vcpu: number, source: failed(what)(error) };
    into.structure(Tag::MpState, &fd.get_mp_state().map_err(named("read a vCPU's activity"))?);
    into.structure(Tag::Regs, &fd.get_regs().map_err(named("read a vCPU's registers"))?);
    into.structure(Tag::Sregs, &fd.get_sregs().map_err(named("read a vCPU's system registers"))?);
    into.structure(Tag::Xcrs, &fd.get_xcrs().map_err(named("read a vCPU's extended control registers"))?);
    vcpu.read_xsave(&mut room.xsave).map_err(|source| StateError::Vcpu { vcpu: number, source })?;
    into.section(Tag::Xsave, |section| {
        section.bytes.extend_from_slice(room.xsave.as_fam_struct_ref().xsave.region.as_bytes());
        section.bytes.extend_from_slice(room.xsave.as_slice().as_bytes());
    });
    into.structure(Tag::DebugRegs, &fd.get_debug_regs().map_err(named("read a vCPU's debug registers"))?);
    let read = fd.get_msrs(&mut room.msrs).map_err(named("read a vCPU's model-specific registers"))?;
    let msrs = room.msrs.as_slice();
    if let Some(missing) = msrs.get(read) {
        return Err(StateError::Msr { vcpu: number, index: missing.index });
    }
    into.structure(Tag::Msrs, msrs);
    let khz = fd.get_tsc_khz().unwrap_or(0);
    into.structure(Tag::TscKhz, &khz);
    into.structure(Tag::Events, &fd.get_vcpu_events().map_err(named("read a vCPU's events"))?);
    Ok(())
}

/// Loads the state of a vCPU that has not run.
pub(in crate::kvm) fn load(vcpu: &Vcpu, number: u64, from: &mut Reader<'_>) -> Result<(), StateError> {
    let fd = vcpu.fd();
    let named = |what| move |error| StateError::Vcpu { vcpu: number, source: failed(what)(error) };
    let mp_state = from.structure(Tag::MpState, "a vCPU's activity")?;
    let regs = from.structure(Tag::Regs, "registers")?;
    let sregs = from.structure(Tag::Sregs, "system registers")?;
    let xcrs = from.structure(Tag::Xcrs, "extended control registers")?;
    let xsave = read_xsave(from.bytes(Tag::Xsave)?, number)?;
    let debug = from.structure(Tag::DebugRegs, "debug registers")?;
    // Not where it lies: the bytes need not be aligned.
    let entries = from.bytes(Tag::Msrs)?.chunks(size_of::<kvm_msr_entry>()).map(kvm_msr_entry::read_from_bytes);
    let msrs = entries.collect::<Result<Vec<_>, _>>().ok().and_then(|msrs| Msrs::from_entries(&msrs).ok());
    let msrs = msrs.ok_or(StateError::Invalid { what: "model-specific registers" })?;
    let khz: u32 = from.structure(Tag::TscKhz, "a clock rate")?;
    let events = from.structure(Tag::Events, "events")?;

    fd.set_mp_state(mp_state).map_err(named("load a vCPU's activity"))?;
    fd.set_regs(&regs).map_err(named("load a vCPU's registers"))?;
    fd.set_sregs(&sregs).map_err(named("load a vCPU's system registers"))?;
    fd.set_xcrs(&xcrs).map_err(named("load a vCPU's extended control registers"))?;
    vcpu.load_xsave(&xsave).map_err(|source| StateError::Vcpu { vcpu: number, source })?;
    fd.set_debug_regs(&debug).map_err(named("load a vCPU's debug registers"))?;
    // A host whose own rate is the same needs no scaling, which not every host can do.
    if khz != 0 && fd.get_tsc_khz().ok() != Some(khz) {
        fd.set_tsc_khz(khz).map_err(named("load a vCPU's clock rate"))?;
    }
    let loaded = fd.set_msrs(&msrs).map_err(named("load a vCPU's model-specific registers"))?;
    if let Some(refused) = msrs.as_slice().get(loaded) {
        return Err(StateError::Msr { vcpu: number, index: refused.index });
    }
    fd.set_vcpu_events(&events).map_err(named("load a vCPU's events"))?;
    Ok(())
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
