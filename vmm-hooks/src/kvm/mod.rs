//! Back end: our own microVM on KVM, in a process of its own or run by threads of this one.
//!
//! A small machine on the rust-vmm crates: memory in a memfd, vCPUs that leave the guest when they are kicked, virtio-mmio net and block, a
//! serial port. Who protects it has its memory mapped, so a pause costs microseconds, not a monitor's milliseconds.
//!
//! | module | promise |
//! | --- | --- |
//! | [`machine`] | makes, starts, stops and ends a machine; its vCPUs stand when it says so |
//! | `vcpu` | one vCPU's thread, and what its exits ask for |
//! | `confine` | what the threads of a machine that runs may ask the kernel for |
//! | [`ram`] | guest memory, with marks of what the VMM itself wrote |
//! | `virtio` | the devices; the disk-write log |
//! | [`gate`] | output by epochs |
//! | `state` | device state: saved and loaded in KVM's order, every step with its error |
//! | [`cpuid`] | what the guest is told of its processor; what another host lacks of it |
//! | `track` | dirty pages by KVM's bitmap or its rings |
//! | `copying` | the pages of a capture, copied by two threads |
//! | `hot` | which of them are written all the time, and stay writable |
//! | [`ring`] | the rings: read, given back, and tried before they are relied on |
//! | [`guest`] | a machine as a [`crate::guest::Guest`] |
//! | [`twin`] | a standby's twins |
//! | [`process`] | a machine in a process of its own, with the same `Guest` and twins |
//! | `start` | new machines that boot something |
//! | [`boot`] | starting the pilot guest |
//! | [`linux`] | starting a Linux kernel; `acpi`: what it is told of its machine |
//! | `chips` | interrupt controllers, timer, serial port, and ports to switch off by: for a kernel |
//! | [`pilot`] | what is known of the pilot from outside |
//!
//! A guest that resets itself is off, as under QEMU with `-no-reboot`.

mod acpi;
mod bare;
pub mod boot;
mod chips;
mod confine;
mod copying;
pub mod cpuid;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing {
    //! Targets of the fuzzer: see `qemu::fuzzing`.
    pub(crate) use super::process::fuzzing::run as process;
    pub(crate) use super::state::fuzzing::run as snapshot;
    pub(crate) use super::virtio::fuzzing::run as virtio;
}
pub mod gate;
pub mod guest;
mod hot;
pub mod linux;
pub mod machine;
mod orders;
pub mod pilot;
pub mod process;
pub mod ram;
mod registry;
pub mod ring;
mod start;
mod state;
mod track;
mod trial;
pub mod twin;
mod vcpu;
mod virtio;
mod wake;
mod worth;

pub use boot::PilotOptions;
pub use gate::GateBounds;
pub use guest::{BACKEND, KvmGuest, attach};
pub use linux::{LinuxOptions, is_bzimage};
pub use machine::{Dirty, DiskFile, Machine, NetCard, Spec};
pub use twin::{KvmTwinHost, TwinHostOptions};

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use crate::guest::{GuestError, GuestErrorKind};
use crate::tap::{self, Tap};

/// Joins a new machine's card to this host's network: its tap is made unless it is there, and put on the card's bridge. A card without a bridge
/// learns which one its tap is on.
///
/// # Errors
/// [`GuestErrorKind::Refused`] if this host has no such bridge, or the tap cannot be had.
pub fn join(card: &mut NetCard) -> Result<OwnedFd, GuestError> {
    let made = Tap::ensure(&card.tap, card.bridge.as_deref(), None)?;
    let wire = crate::sys::tap::open(&card.tap).map_err(|error| {
        GuestError::new(GuestErrorKind::Refused, format!("the tap interface {} cannot be used: {error}", card.tap))
            .advise("nothing was started; end who uses it, or name another one")
    })?;
    if card.bridge.is_none() {
        (card.bridge, _) = tap::describe(std::process::id(), &card.tap);
    }
    if let Some(tap) = made {
        tap.keep();
    }
    Ok(wire)
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`GuestErrorKind::Refused`] if this host has no KVM or this process may not use it.
pub fn host() -> Result<Arc<Kvm>, GuestError> {
    let kvm = Kvm::new().map_err(|error| {
        let source = std::io::Error::from_raw_os_error(error.errno());
        GuestError::new(GuestErrorKind::Refused, format!("/dev/kvm cannot be opened: {source}"))
            .advise("load the kernel's kvm module, and let this user read and write /dev/kvm")
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(kvm_bindings::KVM_API_VERSION) {
        return Err(GuestError::new(GuestErrorKind::Refused, format!("this host's KVM speaks version {version}")));
    }
    Ok(Arc::new(kvm))
}
