//! A whole machine's state: decoded; KVM is given its part by whoever asks, at the moment for it.

use kvm_bindings::kvm_clock_data;

use super::vcpu::Parsed;
use super::{Reader, StateError, Tag};
use crate::kvm::orders::Clock;
use crate::kvm::ram::Memory;
use crate::kvm::virtio::block::Block;
use crate::kvm::virtio::net::Net;

/// The parts of a new machine that a state is loaded into.
#[derive(Debug)]
pub(in crate::kvm) struct Parts<'a> {
    /// How many vCPUs it has.
    pub(in crate::kvm) cpus: u64,
    /// Whether it has interrupt controllers.
    pub(in crate::kvm) chips: bool,
    pub(in crate::kvm) clock: &'a Clock,
    pub(in crate::kvm) net: Option<&'a Net>,
    pub(in crate::kvm) blocks: &'a [Block],
    pub(in crate::kvm) memory: &'a Memory,
}

/// What KVM is to be given.
#[derive(Debug)]
pub(in crate::kvm) struct Decoded {
    pub(in crate::kvm) vcpus: Vec<Parsed>,
    pub(in crate::kvm) clock: kvm_clock_data,
}

/// Decodes a state: gives the processors' part to `take`, which loads what KVM keeps, interrupt controllers from the reader among it, and then
/// loads the devices, whose interrupt lines rise on controllers that are loaded. After an error the machine is of no use.
pub(in crate::kvm) fn decode(
    bytes: &[u8],
    parts: &Parts<'_>,
    take: impl FnOnce(Decoded, &mut Reader<'_>) -> Result<(), StateError>,
) -> Result<(), StateError> {
    let (mut reader, found) = Reader::begin(bytes)?;
    if found != parts.cpus {
        return Err(StateError::Vcpus { expected: parts.cpus, found });
    }
    let vcpus = (0..found).map(|number| Parsed::read(number, parts.chips, &mut reader)).collect::<Result<_, _>>()?;
    let clock = reader.structure(Tag::KvmClock, "a clock")?;
    take(Decoded { vcpus, clock }, &mut reader)?;
    let section = |reader: &mut Reader<'_>, tag, load: &dyn Fn(&mut Reader<'_>) -> Result<(), StateError>| {
        let mut section = reader.section(tag)?;
        load(&mut section)?;
        section.finish("a device with more than its state")
    };
    section(&mut reader, Tag::Clock, &|from| parts.clock.load(from))?;
    if let Some(net) = parts.net {
        section(&mut reader, Tag::Net, &|from| net.load(from, parts.memory))?;
    }
    for block in parts.blocks {
        section(&mut reader, Tag::Block, &|from| block.load(from, parts.memory))?;
    }
    reader.end()
}
