//! New machines that boot something: the pilot, or a Linux kernel. What they boot is opened before, so that whoever makes them may have no path.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::boot::{self, PilotOptions, Privilege};
use super::gate::GateBounds;
use super::linux::{self, LinuxOptions};
use super::machine::{Devices, Machine, Means, Spec, open_disks, refused};
use super::pilot::abi;
use super::{chips, cpuid};
use crate::guest::GuestError;
use crate::sys::memory::SharedMemory;

/// Most vCPUs under a kernel.
pub(super) const CPUS_MAX: u8 = 64;

/// A file that is needed to boot, open.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: File,
    /// Where it was found, for people.
    pub(super) path: PathBuf,
}

impl Image {
    pub(super) fn open(path: &Path) -> Result<Self, GuestError> {
        let file = File::open(path)
            .map_err(|error| refused(format!("{} cannot be started: {error}", path.display())).because(error))?;
        Ok(Self { file, path: path.to_owned() })
    }
}

/// What a new machine boots.
#[derive(Debug)]
pub(super) enum Boots {
    /// The pilot.
    Pilot(Image, PilotOptions),
    /// A Linux kernel.
    Linux(Kernel),
}

/// A kernel with its initramfs and its command line.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: Image,
    pub(super) initrd: Option<Image>,
    pub(super) cmdline: String,
}

impl Kernel {
    /// Opens what the options name.
    pub(super) fn open(options: &LinuxOptions) -> Result<Self, GuestError> {
        let LinuxOptions { kernel, initrd, cmdline } = options;
        let initrd = initrd.as_deref().map(Image::open).transpose()?;
        Ok(Self { image: Image::open(kernel)?, initrd, cmdline: cmdline.clone() })
    }
}

/// Memory for a machine.
pub(super) fn new_memory(spec: &Spec) -> Result<SharedMemory, GuestError> {
    if spec.memory == 0 {
        return Err(refused("a microVM cannot have no memory"));
    }
    SharedMemory::new(&format!("{}/ram", spec.name), spec.memory)
        .map_err(|error| refused("there is no memory for the microVM").because(error))
}

impl Machine {
    /// Makes a machine that boots the pilot from `image`. It stands. `wire` takes and gives one frame a call, and is there if the machine has
    /// a card.
    ///
    /// # Errors
    /// If this host cannot have it; nothing is left behind.
    pub fn pilot(
        kvm: &Arc<Kvm>,
        spec: Spec,
        image: &Path,
        options: &PilotOptions,
        wire: Option<OwnedFd>,
        bounds: GateBounds,
    ) -> Result<Self, GuestError> {
        Self::begin(kvm, spec, Boots::Pilot(Image::open(image)?, *options), wire, bounds)
    }

    /// Makes a machine that boots a Linux kernel. It stands. `wire`: as for [`Machine::pilot`].
    ///
    /// # Errors
    /// If this host cannot have it; nothing is left behind.
    pub fn linux(
        kvm: &Arc<Kvm>,
        spec: Spec,
        options: &LinuxOptions,
        wire: Option<OwnedFd>,
        bounds: GateBounds,
    ) -> Result<Self, GuestError> {
        Self::begin(kvm, spec, Boots::Linux(Kernel::open(options)?), wire, bounds)
    }

    fn begin(
        kvm: &Arc<Kvm>,
        spec: Spec,
        boots: Boots,
        wire: Option<OwnedFd>,
        bounds: GateBounds,
    ) -> Result<Self, GuestError> {
        let (memory, disks) = (new_memory(&spec)?, open_disks(&spec)?);
        Self::boot(
            kvm,
            spec,
            boots,
            Means { memory: &memory, private: false, devices: Devices { wire, disks, bounds } },
        )
    }

    /// Makes a machine of `spec` that boots something. It stands.
    pub(super) fn boot(kvm: &Arc<Kvm>, spec: Spec, boots: Boots, means: Means<'_>) -> Result<Self, GuestError> {
        match boots {
            Boots::Pilot(image, options) => Self::boot_pilot(kvm, spec, image, &options, means),
            Boots::Linux(kernel) => Self::boot_linux(kvm, spec, kernel, means),
        }
    }

    fn boot_pilot(
        kvm: &Arc<Kvm>,
        spec: Spec,
        mut image: Image,
        options: &PilotOptions,
        means: Means<'_>,
    ) -> Result<Self, GuestError> {
        if spec.memory < abi::MEMORY_MIN || spec.cpus > abi::CPUS_MAX {
            return Err(refused(format!(
                "a pilot has at least {} bytes of memory and at most {} vCPUs",
                abi::MEMORY_MIN,
                abi::CPUS_MAX
            )));
        }
        let cpuid = cpuid::supported(kvm).map_err(|error| refused(error.to_string()).because(error))?;
        let machine = Self::make(kvm, spec, &cpuid, false, means)?;
        let inner = &machine.0;
        let net = inner.net.is_some().then_some(abi::MMIO);
        let disks: Vec<u64> = (0..inner.blocks.len()).map(|index| inner.block_address(index)).collect();
        let mut start = || -> Result<(), GuestError> {
            let cpus = inner.spec.cpus;
            let entry = boot::load(inner.vm.ram().memory(), &mut image, options, cpus, net, &disks)?;
            for (number, slot) in (0..).zip(&inner.slots) {
                let vcpu = slot.vcpu.lock().expect("nobody panics while it holds a vCPU");
                boot::enter(&vcpu, number, entry, Privilege::User)
                    .map_err(|error| refused(error.to_string()).because(error))?;
            }
            Ok(())
        };
        start().inspect_err(|_| machine.end(None))?;
        Ok(machine)
    }

    fn boot_linux(kvm: &Arc<Kvm>, spec: Spec, mut kernel: Kernel, means: Means<'_>) -> Result<Self, GuestError> {
        let cpus = u8::try_from(spec.cpus).ok().filter(|&cpus| cpus <= CPUS_MAX);
        let cpus = cpus.ok_or_else(|| refused(format!("a microVM has at most {CPUS_MAX} vCPUs")))?;
        let cpuid = cpuid::for_kernel(kvm, cpus).map_err(|error| refused(error.to_string()).because(error))?;
        let machine = Self::make(kvm, spec, &cpuid, true, means)?;
        let inner = &machine.0;
        let mut start = || -> Result<(), GuestError> {
            let devices = usize::from(inner.net.is_some()) + inner.blocks.len();
            let address = |place: usize| abi::MMIO + abi::MMIO_STRIDE * place as u64;
            let devices: Vec<_> =
                (0..devices).map(|place| (address(place), chips::line_of(place).expect("joined"))).collect();
            let entry = linux::load(inner.vm.ram().memory(), &mut kernel, cpus, &devices)?;
            for (number, slot) in (0..).zip(&inner.slots) {
                let vcpu = slot.vcpu.lock().expect("nobody panics while it holds a vCPU");
                linux::enter(&vcpu, number, entry).map_err(|error| {
                    refused(format!("the microVM cannot be made: {error}: {}", error.source)).because(error)
                })?;
            }
            Ok(())
        };
        start().inspect_err(|_| machine.end(None))?;
        Ok(machine)
    }
}
