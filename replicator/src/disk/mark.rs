//! What is durable of the store besides records: how far the images are, and whose they are (`docs/protocol.md` P41).
//!
//! A journal begins with two slots of one sector each, [`SLOT`] bytes apart, written in turn: a torn one leaves the other.
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0..8 | magic | `USDJHDR1` |
//! | 8..16 | sequence | grows with every mark; the higher of two whole ones counts |
//! | 16..32 | salt | random, of this journal file |
//! | 32..40 | term | of the records that count |
//! | 40..48 | capacity | bytes of the ring |
//! | 48..56 | head | position of the first record that may be missing in an image |
//! | 56..64 | state | u64, see [`State`] |
//! | 64..88 | generation, incarnation, epoch | what the images hold up to `head` |
//! | 88..96 | number | finishing: the last epoch that may be applied; recovering: the last that is; activated: the generation of the grant |
//! | 96..104 | disks | how many, u32, and the CRC-32 of their names and sizes |
//! | 104..108 | CRC-32 | of bytes 0..104 |

use vmm_hooks::disk::DiskSpec;

use super::record::{EpochId, Life, get_u32, get_u64};

/// Bytes from one slot to the other.
pub(super) const SLOT: u64 = 4096;
/// Bytes of a mark; less than a sector, so that it is written whole or not at all by most disks.
pub(super) const MARK: usize = 108;
const MAGIC: &[u8; 8] = b"USDJHDR1";

const _: () = assert!(MARK <= 512 && SLOT >= 512);

/// How far the images are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The first copy is under way: the images are not whole, and nobody may start from them.
    Syncing,
    /// They are whole, together with the journal.
    Whole,
    /// The same, and a recovery brings them to this epoch: they may hold some of it already.
    Recovering(u64),
    /// They are being brought to exactly this epoch, which the twin goes on from.
    Finishing(u64),
    /// They are at exactly the epoch that the twin goes on from, nothing is journaled.
    Finished,
    /// They belong to the survivor of this generation.
    Activated(u64),
}

/// One mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) sequence: u64,
    pub(super) life: Life,
    pub(super) capacity: u64,
    pub(super) head: u64,
    pub(super) state: State,
    pub(super) id: EpochId,
    pub(super) disks: (u32, u32),
}

/// What a mark remembers of the disks: how many, and a checksum of names and sizes.
pub(super) fn disks_mark<'a>(disks: impl Iterator<Item = &'a DiskSpec>) -> (u32, u32) {
    let mut count = 0;
    let mut hasher = crc32fast::Hasher::new();
    for disk in disks {
        count += 1;
        hasher.update(disk.name.as_bytes());
        hasher.update(&[0xff]);
        hasher.update(&disk.bytes.to_le_bytes());
    }
    (count, hasher.finalize())
}

impl Mark {
    pub(super) fn to_bytes(self) -> [u8; MARK] {
        let (state, number) = match self.state {
            State::Syncing => (1, 0),
            State::Whole => (2, 0),
            State::Finishing(epoch) => (3, epoch),
            State::Finished => (4, 0),
            State::Activated(generation) => (5, generation),
            State::Recovering(epoch) => (6, epoch),
        };
        let mut bytes = [0; MARK];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.life.salt.to_le_bytes());
        let EpochId { generation, incarnation, epoch } = self.id;
        let numbers = [self.life.term, self.capacity, self.head, state, generation, incarnation, epoch, number];
        for (field, number) in bytes[32..96].chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        bytes[96..100].copy_from_slice(&self.disks.0.to_le_bytes());
        bytes[100..104].copy_from_slice(&self.disks.1.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..104]);
        bytes[104..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a slot; `None` if it is torn, or was never written.
    pub(super) fn parse(bytes: &[u8; MARK]) -> Option<Self> {
        if &bytes[..8] != MAGIC || get_u32(bytes, 104) != crc32fast::hash(&bytes[..104]) {
            return None;
        }
        let number = get_u64(bytes, 88);
        let state = match get_u64(bytes, 56) {
            1 => State::Syncing,
            2 => State::Whole,
            3 => State::Finishing(number),
            4 => State::Finished,
            5 => State::Activated(number),
            6 => State::Recovering(number),
            _ => return None,
        };
        Some(Self {
            sequence: get_u64(bytes, 8),
            life: Life {
                salt: u128::from_le_bytes(bytes[16..32].try_into().expect("sixteen bytes")),
                term: get_u64(bytes, 32),
            },
            capacity: get_u64(bytes, 40),
            head: get_u64(bytes, 48),
            state,
            id: EpochId { generation: get_u64(bytes, 64), incarnation: get_u64(bytes, 72), epoch: get_u64(bytes, 80) },
            disks: (get_u32(bytes, 96), get_u32(bytes, 100)),
        })
    }

    /// Where this mark stands in the file: marks take the slots in turn.
    pub(super) fn at(&self) -> u64 {
        self.sequence % 2 * SLOT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p41_a_mark_is_read_as_it_was_written_and_a_damaged_one_is_none() {
        let states = [
            State::Syncing,
            State::Whole,
            State::Finishing(9),
            State::Finished,
            State::Activated(u64::MAX),
            State::Recovering(8),
        ];
        for (sequence, state) in (1_u64..).zip(states) {
            let mark = Mark {
                sequence,
                life: Life { salt: u128::MAX - 5, term: 2 },
                capacity: 1 << 20,
                head: 3 << 40,
                state,
                id: EpochId { generation: 1, incarnation: 2, epoch: 3 },
                disks: disks_mark([DiskSpec { name: "a".into(), bytes: 4 }].iter()),
            };
            let bytes = mark.to_bytes();
            assert_eq!(Mark::parse(&bytes), Some(mark));
            for at in 0..MARK {
                let mut damaged = bytes;
                damaged[at] ^= 1;
                assert_eq!(Mark::parse(&damaged), None, "byte {at}");
            }
        }
        let one = |name: &str, bytes| DiskSpec { name: name.into(), bytes };
        assert_ne!(disks_mark([one("a", 1), one("b", 1)].iter()), disks_mark([one("b", 1), one("a", 1)].iter()));
    }
}
