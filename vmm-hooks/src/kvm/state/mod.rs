//! The form of device state: one version, sections in one fixed order, no length that is not checked.
//!
//!     "USKVMST" 1 | vCPUs: u32 | for each vCPU: the sections of `vcpu` | clock | chips, if it has them | devices
//!
//! A section is its tag and its length (u32 each, little-endian) and so many bytes: for KVM's own structures their memory, whose
//! form the kernel keeps for ever. A reader takes a section only where it must stand, so nothing is missing, twice there, or left over.

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
pub(super) mod machine;
pub(super) mod vcpu;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::kvm::KvmError;

const MAGIC: [u8; 8] = *b"USKVMST\x01";

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Tag {
    MpState = 1,
    Regs,
    Sregs,
    Xsave,
    Xcrs,
    DebugRegs,
    Msrs,
    Events,
    TscKhz,
    KvmClock,
    Clock,
    Net,
    Block,
    End,
    Lapic,
    IrqChip,
    Pit,
    Serial,
}

/// Why a state was not taken or does not load.
#[derive(Debug, thiserror::Error)]
pub(in crate::kvm) enum StateError {
    /// It is no state, or one of another version.
    #[error("this is no state of a microVM, or one of another version")]
    Magic,
    /// It ends before its end.
    #[error("the state of the microVM ends in the middle")]
    Truncated,
    /// Another section stands where one must stand.
    #[error("the state of the microVM has section {found} where {expected} must stand")]
    Order {
        /// What must stand there.
        expected: u32,
        /// What does.
        found: u32,
    },
    /// It is of a machine of another form.
    #[error("the state is of a microVM with {found} vCPUs, this one has {expected}")]
    Vcpus {
        /// Of this machine.
        expected: u64,
        /// Of the state's.
        found: u64,
    },
    /// A value cannot be.
    #[error("the state of the microVM has {what} that cannot be")]
    Invalid {
        /// What.
        what: &'static str,
    },
    /// A step of taking or loading it failed.
    #[error("vCPU {vcpu}: {source}")]
    Vcpu {
        /// The vCPU's number.
        vcpu: u64,
        /// What failed.
        source: KvmError,
    },
    /// A model-specific register was refused.
    #[error("vCPU {vcpu}: this host does not take model-specific register {index:#x}")]
    Msr {
        /// The vCPU's number.
        vcpu: u64,
        /// The register.
        index: u32,
    },
    /// A step for the whole machine failed.
    #[error(transparent)]
    Vm(#[from] KvmError),
}

/// Writes a state.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Begins a state in `bytes`, which is cleared.
    pub(super) fn begin(bytes: &'a mut Vec<u8>, vcpus: u64) -> Self {
        bytes.clear();
        bytes.extend_from_slice(&MAGIC);
        let mut writer = Self { bytes };
        writer.u32(u32::try_from(vcpus).expect("few"));
        writer
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A section that `write` fills.
    pub(super) fn section<R>(&mut self, tag: Tag, write: impl FnOnce(&mut Writer<'_>) -> R) -> R {
        self.u32(tag as u32);
        self.u32(0);
        let start = self.bytes.len();
        let result = write(&mut Writer { bytes: self.bytes });
        let length = u32::try_from(self.bytes.len() - start).expect("a section is small");
        self.bytes[start - 4..start].copy_from_slice(&length.to_le_bytes());
        result
    }

    /// A section that holds a structure as it is in memory.
    pub(super) fn structure<T: IntoBytes + Immutable + ?Sized>(&mut self, tag: Tag, value: &T) {
        self.section(tag, |section| section.bytes.extend_from_slice(value.as_bytes()));
    }

    /// Ends the state.
    pub(super) fn end(&mut self) {
        self.section(Tag::End, |_| ());
    }
}

/// Reads a state.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Begins to read; how many vCPUs the state is of.
    pub(super) fn begin(bytes: &'a [u8]) -> Result<(Self, u64), StateError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(StateError::Magic)?;
        let mut reader = Self { rest };
        let vcpus = reader.u32()?;
        Ok((reader, vcpus.into()))
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(StateError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn u32(&mut self) -> Result<u32, StateError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four")))
    }

    pub(super) fn u64(&mut self) -> Result<u64, StateError> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight")))
    }

    /// The next section, which must be of this kind.
    pub(super) fn section(&mut self, tag: Tag) -> Result<Reader<'a>, StateError> {
        let found = self.u32()?;
        if found != tag as u32 {
            return Err(StateError::Order { expected: tag as u32, found });
        }
        let length = self.u32()? as usize;
        Ok(Reader { rest: self.take(length)? })
    }

    /// The next section, as the structure that it must be.
    pub(super) fn structure<T: FromBytes>(&mut self, tag: Tag, what: &'static str) -> Result<T, StateError> {
        T::read_from_bytes(self.section(tag)?.rest).map_err(|_| StateError::Invalid { what })
    }

    /// The next section's bytes.
    pub(super) fn bytes(&mut self, tag: Tag) -> Result<&'a [u8], StateError> {
        Ok(self.section(tag)?.rest)
    }

    /// Nothing may be left.
    pub(super) fn finish(&self, what: &'static str) -> Result<(), StateError> {
        if self.rest.is_empty() { Ok(()) } else { Err(StateError::Invalid { what }) }
    }

    /// The state ends here.
    pub(super) fn end(&mut self) -> Result<(), StateError> {
        self.section(Tag::End)?.finish("an end")?;
        self.finish("more than its end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_reads_as_it_was_written_and_no_part_of_it_does() {
        let mut bytes = vec![1, 2, 3];
        let mut writer = Writer::begin(&mut bytes, 2);
        writer.section(Tag::Clock, |section| section.u64(77));
        writer.structure(Tag::Msrs, &[1_u32, 2]);
        writer.end();
        let read = |bytes: &[u8]| -> Result<(u64, u64, [u32; 2]), StateError> {
            let (mut reader, vcpus) = Reader::begin(bytes)?;
            let mut clock = reader.section(Tag::Clock)?;
            let time = clock.u64()?;
            clock.finish("a clock")?;
            let words = reader.structure(Tag::Msrs, "registers")?;
            reader.end()?;
            Ok((vcpus, time, words))
        };
        assert_eq!(read(&bytes).expect("it is whole"), (2, 77, [1, 2]));
        for length in 0..bytes.len() {
            read(&bytes[..length]).expect_err("a part");
        }
        let mut more = bytes.clone();
        more.push(0);
        read(&more).expect_err("more than it");
        let (mut reader, _) = Reader::begin(&bytes).expect("it is whole");
        assert!(matches!(reader.section(Tag::Msrs), Err(StateError::Order { .. })));
    }
}
