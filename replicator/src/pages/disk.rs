//! Disk writes within a stream: the records of `Disk` frames.
//!
//! A frame's payload is one or more records, in the order in which the guest's writes were completed. A record is
//! [`WRITE_HEADER`] bytes and, if it carries data, that data:
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..4 | disk, u32: its place in the recipe |
//! | 4 | kind: 1 data, 2 zeroes; 0 is invalid |
//! | 5..8 | reserved, 0 |
//! | 8..16 | offset in bytes, u64 |
//! | 16..24 | length in bytes, u64, at least 1; of data at most [`MAX_DATA`] |
//!
//! A write lies inside its disk. A longer one is cut into several records.

use vmm_hooks::disk::{DiskChange, DiskWrite};

use super::MAX_PAYLOAD;

/// Bytes of a record before its data.
pub const WRITE_HEADER: usize = 24;

/// Data bytes of one record, so that it fits a frame.
pub const MAX_DATA: usize = MAX_PAYLOAD - WRITE_HEADER;

/// What a staged write takes in memory beside its data.
pub(super) const OVERHEAD: usize = size_of::<DiskWrite>();

const DATA: u8 = 1;
const ZERO: u8 = 2;

/// Why a record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// It ends within itself, or has an unknown kind, reserved bits or no length.
    #[error("a disk write's record is malformed")]
    Malformed,
    /// There is no such disk.
    #[error("a write to disk {disk}, which is not there")]
    Disk {
        /// Which.
        disk: u32,
    },
    /// It leaves its disk.
    #[error("a write to disk {disk} at {offset} leaves the disk")]
    Outside {
        /// Which.
        disk: u32,
        /// Where it begins.
        offset: u64,
    },
}

/// The header of a record.
fn header(disk: u32, kind: u8, offset: u64, length: u64) -> [u8; WRITE_HEADER] {
    let mut bytes = [0; WRITE_HEADER];
    bytes[0..4].copy_from_slice(&disk.to_le_bytes());
    bytes[4] = kind;
    bytes[8..16].copy_from_slice(&offset.to_le_bytes());
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// Gives `write` as records to `put`, each as header and data.
pub(super) fn records(write: &DiskWrite, mut put: impl FnMut(&[u8; WRITE_HEADER], &[u8])) {
    match &write.change {
        DiskChange::Zero(length) => put(&header(write.disk, ZERO, write.offset, *length), &[]),
        DiskChange::Data(data) => {
            let mut offset = write.offset;
            for piece in data.chunks(MAX_DATA) {
                put(&header(write.disk, DATA, offset, piece.len() as u64), piece);
                offset += piece.len() as u64;
            }
        }
    }
}

/// Takes the next record off `rest`; `sizes` are those of the disks.
pub(super) fn take(rest: &mut &[u8], sizes: &[u64]) -> Result<DiskWrite, WriteError> {
    let (head, body) = rest.split_first_chunk::<WRITE_HEADER>().ok_or(WriteError::Malformed)?;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let disk = u32::from_le_bytes(head[0..4].try_into().expect("four bytes"));
    let (offset, length) = (word(8), word(16));
    if head[5..8] != [0; 3] || length == 0 {
        return Err(WriteError::Malformed);
    }
    let index = usize::try_from(disk).map_err(|_| WriteError::Disk { disk })?;
    let size = *sizes.get(index).ok_or(WriteError::Disk { disk })?;
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(WriteError::Outside { disk, offset });
    }
    let (change, after) = match head[4] {
        ZERO => (DiskChange::Zero(length), body),
        DATA => {
            let bytes = usize::try_from(length).map_err(|_| WriteError::Malformed)?;
            let (data, after) = body.split_at_checked(bytes).ok_or(WriteError::Malformed)?;
            (DiskChange::Data(data.to_vec()), after)
        }
        _ => return Err(WriteError::Malformed),
    };
    *rest = after;
    Ok(DiskWrite { disk, offset, change })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 2] = [1 << 20, 512];

    fn packed(write: &DiskWrite) -> Vec<u8> {
        let mut bytes = Vec::new();
        records(write, |header, data| {
            bytes.extend_from_slice(header);
            bytes.extend_from_slice(data);
        });
        bytes
    }

    #[test]
    fn long_writes_are_cut_and_lose_nothing() {
        let data: Vec<u8> = (0..=250).cycle().take(MAX_DATA * 2 + 7).collect();
        let bytes = packed(&DiskWrite { disk: 0, offset: 512, change: DiskChange::Data(data.clone()) });
        let (mut rest, mut image, mut pieces) = (bytes.as_slice(), vec![0; 1 << 20], 0);
        while !rest.is_empty() {
            let write = take(&mut rest, &SIZES).expect("well-formed");
            let DiskChange::Data(piece) = &write.change else { panic!("data") };
            let start = usize::try_from(write.offset).expect("small");
            image[start..start + piece.len()].copy_from_slice(piece);
            pieces += 1;
        }
        assert_eq!(pieces, 3);
        assert!(image[512..512 + data.len()] == data);
    }

    #[test]
    fn what_is_not_a_write_inside_a_disk_is_refused() {
        let good = packed(&DiskWrite { disk: 1, offset: 500, change: DiskChange::Data(vec![7; 12]) });
        assert!(take(&mut good.as_slice(), &SIZES).is_ok());
        for cut in 0..good.len() {
            assert_eq!(take(&mut &good[..cut], &SIZES), Err(WriteError::Malformed), "cut at {cut}");
        }
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            take(&mut bad.as_slice(), &SIZES)
        };
        assert_eq!(with(0, 2), Err(WriteError::Disk { disk: 2 }));
        assert_eq!(with(4, 0), Err(WriteError::Malformed));
        assert_eq!(with(4, 3), Err(WriteError::Malformed));
        assert_eq!(with(6, 1), Err(WriteError::Malformed));
        assert_eq!(with(15, 0xFF), Err(WriteError::Outside { disk: 1, offset: 0xFF00_0000_0000_01F4 }));
        assert_eq!(with(16, 13), Err(WriteError::Outside { disk: 1, offset: 500 }));
        let none = packed(&DiskWrite { disk: 0, offset: 0, change: DiskChange::Zero(0) });
        assert_eq!(take(&mut none.as_slice(), &SIZES), Err(WriteError::Malformed));
    }
}
