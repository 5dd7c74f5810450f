//! What a kernel is told of its machine: ACPI tables, in memory that the firmware of other machines keeps.
//!
//! The profile is "hardware-reduced" (ACPI 6.5, 4.1), as in Firecracker and Cloud Hypervisor: no timer, no power management registers but the two
//! that switch off, no legacy interrupt controller. Debian's cloud kernel finds virtio-mmio devices by these tables alone.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use super::chips::{IO_APIC, LOCAL_APIC, RESET, SERIAL, SERIAL_LINE, SLEEP, SLEEP_STATUS, port};
use super::pilot::abi;
use super::ram::Memory;

/// Where the tables are: memory between 640 KiB and one megabyte, which no kernel takes for its own.
pub(super) const TABLES: u64 = 0xe_0000;
/// The first byte that is not theirs.
const END: u64 = super::linux::RESET_VECTOR;

const OEM: [u8; 6] = *b"USTUDY";
const TABLE: [u8; 8] = *b"MICROVM ";
/// What a guest writes to be switched off: the type that `_S5_` names.
const OFF: u8 = 5;
/// `IAPC_BOOT_ARCH`: no VGA, no message-signalled interrupts, no clock in CMOS; and, by a bit that is not set, no keyboard controller.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 3 | 1 << 5;

/// What does not fit between its place and the reset vector.
#[derive(Debug, thiserror::Error)]
#[error("the machine has more devices than its tables can hold")]
pub(super) struct TooLarge;

/// Writes the tables of a machine with `cpus` vCPUs and these devices, by address and interrupt. The address of the first table.
pub(super) fn write(memory: &Memory, cpus: u8, devices: &[(u64, u32)]) -> Result<u64, TooLarge> {
    let mut next = TABLES + Rsdp::len() as u64;
    let mut put = |bytes: &[u8]| -> Result<u64, TooLarge> {
        let at = next.next_multiple_of(16);
        next = at + bytes.len() as u64;
        if next > END {
            return Err(TooLarge);
        }
        memory.write_slice(bytes, GuestAddress(at)).map_err(|_| TooLarge)?;
        Ok(at)
    };
    let dsdt = put(dsdt(devices).as_slice())?;
    let fadt = put(&bytes(&fadt(dsdt).finalize()))?;
    let madt = put(&bytes(&madt(cpus)))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(TABLES)).map_err(|_| TooLarge)?;
    Ok(TABLES)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let io = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = io(port::RESET);
    fadt.reset_value = RESET;
    fadt.sleep_control_reg = io(SLEEP);
    fadt.sleep_status_reg = io(SLEEP_STATUS);
    fadt
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt(devices: &[(u64, u32)]) -> Sdt {
    let mut body = Vec::new();
    for (index, &(address, line)) in devices.iter().enumerate() {
        let address = u32::try_from(address).expect("devices are below four gigabytes");
        let stride = u32::try_from(abi::MMIO_STRIDE).expect("small");
        let memory = aml::Memory32Fixed::new(true, address, stride);
        let interrupt = aml::Interrupt::new(true, false, false, false, line);
        let resources = aml::ResourceTemplate::new(vec![&memory, &interrupt]);
        aml::Device::new(
            format!("_SB_.V{index:03X}").as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &u32::try_from(index).expect("few")),
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(&mut body);
    }
    let io = aml::IO::new(SERIAL, SERIAL, 1, 8);
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_LINE);
    let resources = aml::ResourceTemplate::new(vec![&io, &interrupt]);
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(&mut body);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&OFF])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    dsdt.append_slice(&body);
    dsdt
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kvm::ram::Ram;
    use crate::sys::memory::SharedMemory;

    #[test]
    fn every_table_is_found_from_the_first_one_and_adds_up_to_zero() {
        let shared = SharedMemory::new("acpi-test", 2 << 20).expect("a small one");
        let ram = Arc::new(Ram::map(&shared, false).expect("it can be mapped"));
        let read = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            ram.memory().read_slice(&mut bytes, GuestAddress(at)).expect("inside");
            bytes
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        let long = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
        let table = |at: u64, name: &[u8]| {
            let length = word(&read(at, 8), 4) as usize;
            let bytes = read(at, length);
            assert_eq!(&bytes[..4], name);
            assert_eq!(sum(&bytes), 0, "{}", String::from_utf8_lossy(name));
            bytes
        };
        let first = write(ram.memory(), 2, &[(abi::MMIO, 5), (abi::MMIO + abi::MMIO_STRIDE, 6)]).expect("it fits");
        let root = read(first, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(long(&root, 24), b"XSDT");
        let fadt = table(long(&xsdt, 36), b"FACP");
        let madt = table(long(&xsdt, 44), b"APIC");
        assert_eq!(word(&madt, 36), LOCAL_APIC);
        assert_eq!(madt.len(), 44 + 2 * 8 + 12);
        let dsdt = table(long(&fadt, 140), b"DSDT");
        assert_eq!(dsdt.windows(8).filter(|part| part == b"LNRO0005").count(), 2);
        let many: Vec<_> = (0..2000).map(|index| (abi::MMIO + index * abi::MMIO_STRIDE, 5)).collect();
        write(ram.memory(), 1, &many).expect_err("more than fits");
    }
}
