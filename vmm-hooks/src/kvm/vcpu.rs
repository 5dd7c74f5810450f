//! A vCPU's thread, and what its exits ask for.
//!
//! A kick makes `KVM_RUN` return only after what the exit before had asked for is finished in the guest's registers, so a vCPU
//! stands only between two instructions. A vCPU whose guest asks to wait kicks itself, so that it stands while it waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::VcpuExit;

use super::chips::PortAsk;
use super::confine::confine;
use super::machine::Inner;
use super::pilot::abi::{self, port};
use super::ring::RingError;
use crate::guest::GuestEvent;

/// The life of vCPU `number`.
pub(super) fn run(inner: &Inner, number: usize) {
    let slot = &inner.slots[number];
    slot.kick.mine();
    if let Err(error) = confine() {
        inner.end(Some(died(error.to_string())));
    }
    // How long the guest wants to wait.
    let mut rest = None;
    while inner.may_run(number, rest.take()) {
        if number == 0 && inner.look.swap(false, Ordering::SeqCst) {
            inner.look_into_devices();
        }
        let mut vcpu = slot.vcpu.lock().expect("nobody panics while it holds a vCPU");
        slot.ran.store(true, Ordering::SeqCst);
        slot.on.store(rustix::thread::sched_getcpu(), Ordering::Relaxed);
        loop {
            let end = match vcpu.fd_mut().run() {
                Ok(VcpuExit::IoOut(port::WAIT, data)) => {
                    rest = Some(Duration::from_micros(word(data).into()));
                    slot.kick.hold();
                    None
                }
                Ok(exit) => inner.serve(exit, number),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => break,
                Err(error) => {
                    let why = std::io::Error::from_raw_os_error(error.errno());
                    Some(died(format!("vCPU {number} cannot be run: {why}")))
                }
            };
            if let Some(event) = end {
                drop(vcpu);
                inner.end(Some(event));
                break;
            }
        }
    }
    inner.thread_ended();
}

fn died(how: String) -> GuestEvent {
    GuestEvent::Died { how }
}

fn word(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    word.iter_mut().zip(bytes).for_each(|(to, &from)| *to = from);
    u32::from_le_bytes(word)
}

impl Inner {
    fn look_into_devices(&self) {
        let memory = self.vm.ram().memory();
        if let Some(net) = &self.net {
            net.look(memory);
        }
        let mut left = false;
        for block in &self.blocks {
            left |= block.look(memory);
        }
        if left {
            self.look.store(true, Ordering::SeqCst);
        }
    }

    /// Does what an exit asks for; how the machine ends, if it does.
    fn serve(&self, exit: VcpuExit<'_>, cpu: usize) -> Option<GuestEvent> {
        let exit = match (&self.chips, exit) {
            (Some(chips), VcpuExit::IoOut(number, data)) => {
                match chips.write(number, data) {
                    PortAsk::Nothing => {}
                    PortAsk::Print(bytes) => self.print(&bytes),
                    PortAsk::Off => self.shut_down("has switched itself off"),
                    PortAsk::Reset => self.shut_down("has reset itself, and a microVM does not begin anew: it is off"),
                }
                return None;
            }
            (Some(chips), VcpuExit::IoIn(number, data)) => {
                chips.read(number, data);
                return None;
            }
            (_, exit) => exit,
        };
        match exit {
            VcpuExit::IoOut(port::DONE, _) => {
                self.orders.done();
                // It may have been an order for another vCPU.
                self.wake_all();
            }
            VcpuExit::IoOut(port::EXIT, data) if word(data) == 0 => self.shut_down("has shut itself down"),
            VcpuExit::IoOut(port::EXIT, data) => {
                return Some(died(format!("the guest ended itself with code {}", word(data))));
            }
            VcpuExit::IoOut(port::SERIAL, data) => self.print(data),
            VcpuExit::IoOut(..) => {}
            VcpuExit::IoIn(number, data) => {
                let value = match number {
                    port::ORDER => self.orders.next(),
                    port::CLOCK => self.clock.low(cpu),
                    port::CLOCK_HIGH => self.clock.high(cpu),
                    // Nobody is there.
                    _ => u32::MAX,
                };
                data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
            }
            VcpuExit::MmioRead(address, data) => self.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => self.mmio_write(address, data),
            VcpuExit::Intr => {}
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                let emptied = self.rings.as_ref().map_or(Err(RingError::Broken), |rings| rings.full(cpu));
                if let Err(error) = emptied {
                    return Some(died(format!(
                        "vCPU {cpu} cannot go on: {error}; start it anew with `--dirty bitmap`"
                    )));
                }
            }
            VcpuExit::Shutdown => return Some(died(format!("vCPU {cpu} met a fault that the guest does not handle"))),
            VcpuExit::InternalError => return Some(died(format!("KVM cannot run what vCPU {cpu} is at"))),
            VcpuExit::FailEntry(reason, _) => {
                return Some(died(format!("vCPU {cpu} cannot enter the guest, for the hardware's reason {reason:#x}")));
            }
            VcpuExit::Hlt => return Some(died(format!("vCPU {cpu} halted, and nothing can wake it"))),
            other => {
                return Some(died(format!("vCPU {cpu} left the guest in a way that is not known here: {other:?}")));
            }
        }
        None
    }

    /// Which device has `address`, by its place, and where in it that is.
    fn device(address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(abi::MMIO)?;
        Some((usize::try_from(offset / abi::MMIO_STRIDE).ok()?, offset % abi::MMIO_STRIDE))
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let Some((place, offset)) = Self::device(address) else { return data.fill(0xff) };
        match (&self.net, place) {
            (Some(net), 0) => net.read(offset, data),
            (net, place) => match self.blocks.get(place - usize::from(net.is_some())) {
                Some(block) => block.read(offset, data),
                None => data.fill(0xff),
            },
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        let Some((place, offset)) = Self::device(address) else { return };
        let memory = self.vm.ram().memory();
        match (&self.net, place) {
            (Some(net), 0) => net.write(offset, data, memory),
            (net, place) => {
                let block = self.blocks.get(place - usize::from(net.is_some()));
                if block.is_some_and(|block| block.write(offset, data, memory)) {
                    self.look.store(true, Ordering::SeqCst);
                }
            }
        }
    }
}
