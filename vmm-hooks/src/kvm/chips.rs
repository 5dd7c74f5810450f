//! What a kernel expects of a machine beside its processors: KVM's own interrupt controllers and timer, a serial port, and ports to switch
//! off and to reset by.
//!
//! Promise: a device's interrupt line is up as long as the device says so ([`Line`]), on this host and on the next: lines are not saved, devices
//! raise them again. The serial port alone pulses its line, as on every PC.
//!
//! | what | saved by |
//! | --- | --- |
//! | both PICs, the I/O APIC, the PIT | KVM, as the kernel's own structures |
//! | local APICs | with their vCPUs (`state::vcpu`) |
//! | the serial port | its registers |

use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::state::{Reader, StateError, Tag, Writer};
use crate::sys::kvm::{KvmError, Vm, failed};

/// Where KVM's I/O APIC is, with as many lines.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
const LINES: u32 = 24;
/// Where each vCPU finds its local APIC.
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel's processors, below four gigabytes and above everything of the guest.
const TSS: usize = 0xfffb_d000;

/// The first serial port and its line.
pub(super) const SERIAL: u16 = 0x3f8;
pub(super) const SERIAL_LINE: u32 = 4;
/// ACPI's sleep control register: [`SLEEP_ENABLE`] is set in what is written to switch off.
pub(super) const SLEEP: u16 = 0x600;
pub(super) const SLEEP_STATUS: u16 = 0x601;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The command that resets, on the keyboard controller's port.
pub(super) const RESET: u8 = 0xfe;

/// Ports that are not at the head of this file.
pub(super) mod port {
    /// The keyboard controller's commands and status.
    pub(in crate::kvm) const RESET: u16 = 0x64;
}

/// The line of the first device; those below are a PC's own.
const FIRST_LINE: u32 = 5;

/// The line of device `place`, if there are so many.
pub(super) fn line_of(place: usize) -> Option<u32> {
    u32::try_from(place).ok().map(|place| place + FIRST_LINE).filter(|&line| line < LINES)
}

/// An input of the interrupt controllers.
#[derive(Debug, Clone)]
pub(super) struct Line {
    vm: Arc<Vm>,
    number: u32,
}

impl Line {
    pub(super) fn new(vm: &Arc<Vm>, number: u32) -> Self {
        Self { vm: Arc::clone(vm), number }
    }

    /// Raises or lowers it.
    pub(super) fn set(&self, up: bool) {
        // KVM knows no reason to refuse a machine that has interrupt controllers.
        if let Err(error) = self.vm.fd().set_irq_line(self.number, up) {
            tracing::error!(line = self.number, up, %error, "KVM did not take an interrupt line");
        }
    }
}

/// The serial port's line.
struct Pulse(Line);

impl Trigger for Pulse {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set(true);
        self.0.set(false);
        Ok(())
    }
}

type Port = Serial<Pulse, NoEvents, Vec<u8>>;

/// What a port's exit asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PortAsk {
    Nothing,
    /// To print these bytes.
    Print(Vec<u8>),
    /// To switch the machine off.
    Off,
    /// To reset it.
    Reset,
}

/// The chips of one machine.
pub(super) struct Chips {
    vm: Arc<Vm>,
    serial: Mutex<Port>,
}

impl std::fmt::Debug for Chips {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chips").finish_non_exhaustive()
    }
}

impl Chips {
    /// Gives `vm`, which has no vCPU yet, its chips.
    pub(super) fn new(vm: &Arc<Vm>) -> Result<Self, KvmError> {
        vm.fd().set_tss_address(TSS).map_err(failed("set aside pages for itself"))?;
        vm.fd().create_irq_chip().map_err(failed("make interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd().create_pit2(pit).map_err(failed("make a timer"))?;
        let serial = Serial::new(Pulse(Line::new(vm, SERIAL_LINE)), Vec::new());
        Ok(Self { vm: Arc::clone(vm), serial: Mutex::new(serial) })
    }

    fn serial(&self) -> MutexGuard<'_, Port> {
        self.serial.lock().expect("nobody panics while it holds the serial port")
    }

    /// A write of `data` to a port.
    pub(super) fn write(&self, number: u16, data: &[u8]) -> PortAsk {
        let Some(&byte) = data.first() else { return PortAsk::Nothing };
        match number {
            SERIAL..0x400 => {
                let offset = u8::try_from(number - SERIAL).expect("eight ports");
                let mut serial = self.serial();
                // A vector takes everything, and so does a pulse.
                let _ = serial.write(offset, byte);
                let out = std::mem::take(serial.writer_mut());
                if out.is_empty() { PortAsk::Nothing } else { PortAsk::Print(out) }
            }
            SLEEP if byte & SLEEP_ENABLE != 0 => PortAsk::Off,
            port::RESET if byte == RESET => PortAsk::Reset,
            _ => PortAsk::Nothing,
        }
    }

    /// A read of a port; nobody is at most of them.
    pub(super) fn read(&self, number: u16, data: &mut [u8]) {
        data.fill(0xff);
        let byte = match number {
            SERIAL..0x400 => self.serial().read(u8::try_from(number - SERIAL).expect("eight ports")),
            // A controller that has nothing to say and takes everything at once.
            SLEEP | SLEEP_STATUS | port::RESET => 0,
            _ => return,
        };
        if let Some(first) = data.first_mut() {
            *first = byte;
        }
    }

    /// Writes their state, of a machine that stands.
    pub(super) fn save(&self, into: &mut Writer<'_>) -> Result<(), KvmError> {
        for chip_id in 0..3 {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.vm.fd().get_irqchip(&mut chip).map_err(failed("read an interrupt controller"))?;
            into.structure(Tag::IrqChip, &chip);
        }
        into.structure(Tag::Pit, &self.vm.fd().get_pit2().map_err(failed("read the timer"))?);
        let state = self.serial().state();
        into.section(Tag::Serial, |section| {
            registers(&state).into_iter().for_each(|register| section.u32(register.into()));
            section.u32(u32::try_from(state.in_buffer.len()).expect("short"));
            state.in_buffer.iter().for_each(|&byte| section.u32(byte.into()));
        });
        Ok(())
    }

    /// Loads their state into a new machine, whose vCPUs have theirs.
    pub(super) fn load(&self, from: &mut Reader<'_>) -> Result<(), StateError> {
        for chip_id in 0..3 {
            let chip: kvm_irqchip = from.structure(Tag::IrqChip, "an interrupt controller")?;
            if chip.chip_id != chip_id {
                return Err(StateError::Invalid { what: "an interrupt controller" });
            }
            self.vm.fd().set_irqchip(&chip).map_err(failed("load an interrupt controller"))?;
        }
        let pit = from.structure(Tag::Pit, "a timer")?;
        self.vm.fd().set_pit2(&pit).map_err(failed("load the timer"))?;
        let invalid = || StateError::Invalid { what: "a serial port" };
        let mut section = from.section(Tag::Serial)?;
        let mut byte = || u8::try_from(section.u32()?).map_err(|_| invalid());
        let mut state = SerialState {
            baud_divisor_low: byte()?,
            baud_divisor_high: byte()?,
            interrupt_enable: byte()?,
            interrupt_identification: byte()?,
            line_control: byte()?,
            line_status: byte()?,
            modem_control: byte()?,
            modem_status: byte()?,
            scratch: byte()?,
            in_buffer: Vec::new(),
        };
        for _ in 0..byte()? {
            state.in_buffer.push(byte()?);
        }
        section.finish("a serial port")?;
        let line = Pulse(Line::new(&self.vm, SERIAL_LINE));
        *self.serial() = Serial::from_state(&state, line, NoEvents, Vec::new()).map_err(|_| invalid())?;
        Ok(())
    }
}

fn registers(state: &SerialState) -> [u8; 9] {
    [
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
    ]
}
