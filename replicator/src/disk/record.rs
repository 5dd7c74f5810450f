//! A journal record: one epoch's writes to all disks (`docs/protocol.md` P42).
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0..8 | magic | `USDJREC1` |
//! | 8..24 | salt | random, of this journal file: a guest cannot write what passes for a record |
//! | 24..32 | term | grows with every opening of the journal |
//! | 32..40 | position | where the record begins, counted on over all laps of the ring |
//! | 40..64 | generation, incarnation, epoch | u64 each |
//! | 64..72 | body | bytes of the writes |
//! | 72..80 | flushed | the position up to which the journal was surely on the disk when this was written |
//! | 80..84 | writes | how many, u32 |
//! | 84..88 | CRC-32 | of bytes 0..84 |
//! | 88.. | writes | each: disk u32, kind u32 (1 bytes, 2 zeroes), offset u64, length u64, and the bytes of kind 1 |
//! | then | trailer | `USDJEND1`, position u64, CRC-32 u32 of all before this field, 0 u32 |
//! | then | padding | zeroes up to [`BLOCK`] |
//!
//! All numbers are little-endian. No block holds parts of two records: what was acknowledged is not written to again.

use vmm_hooks::disk::{DiskChange, DiskWrite};

/// Records begin at multiples of this many bytes.
pub(super) const BLOCK: u64 = 4096;
/// Bytes of a record's header.
pub(super) const HEADER: usize = 88;
const CRC_AT: usize = HEADER - 4;
const TRAILER: usize = 24;
const WRITE: usize = 24;
const MAGIC: &[u8; 8] = b"USDJREC1";
const END: &[u8; 8] = b"USDJEND1";
const BYTES: u32 = 1;
const ZEROES: u32 = 2;

const _: () = assert!(HEADER + TRAILER <= 4096, "an epoch without bytes takes one block");

/// Which journal, and which of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) salt: u128,
    pub(super) term: u64,
}

/// Which epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EpochId {
    /// Of the session: grows with each change of who may run.
    pub generation: u64,
    /// Of the primary's agent.
    pub incarnation: u64,
    /// The epoch.
    pub epoch: u64,
}

/// The head of a record that is in its place and of this life. Its rest may be torn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) id: EpochId,
    /// Up to where the journal was surely on the disk when this was written.
    pub(super) flushed: u64,
    body: u64,
    writes: u32,
}

/// Bytes that the record of `writes` takes, padding included.
pub(super) fn bytes_of(writes: &[DiskWrite]) -> u64 {
    padded(body_of(writes))
}

fn body_of(writes: &[DiskWrite]) -> u64 {
    writes
        .iter()
        .map(|write| WRITE as u64 + if let DiskChange::Data(data) = &write.change { data.len() as u64 } else { 0 })
        .sum()
}

fn padded(body: u64) -> u64 {
    (HEADER + TRAILER) as u64 + body + padding(body)
}

fn padding(body: u64) -> u64 {
    let used = (HEADER + TRAILER) as u64 + body;
    used.next_multiple_of(BLOCK) - used
}

impl Head {
    /// Reads the head of a record that begins at `position`; `None` if it is none of this life, or torn.
    pub(super) fn parse(bytes: &[u8; HEADER], life: Life, position: u64) -> Option<Self> {
        let whole = &bytes[..8] == MAGIC
            && get_u32(bytes, CRC_AT) == crc32fast::hash(&bytes[..CRC_AT])
            && bytes[8..24] == life.salt.to_le_bytes()
            && get_u64(bytes, 24) == life.term
            && get_u64(bytes, 32) == position;
        let id = EpochId { generation: get_u64(bytes, 40), incarnation: get_u64(bytes, 48), epoch: get_u64(bytes, 56) };
        whole.then(|| Self { id, body: get_u64(bytes, 64), flushed: get_u64(bytes, 72), writes: get_u32(bytes, 80) })
    }

    /// Bytes of the whole record, padding included. Saturates: a damaged length is no length.
    pub(super) fn bytes(&self) -> u64 {
        if self.body > u64::MAX / 2 { u64::MAX } else { padded(self.body) }
    }
}

/// Puts the record at `position` into `into`, in place of what is in it. The journal is on the disk up to `flushed`.
///
/// # Panics
/// If there are 2^32 writes or more.
pub(super) fn put(into: &mut Vec<u8>, life: Life, (position, flushed): (u64, u64), id: EpochId, writes: &[DiskWrite]) {
    let body = body_of(writes);
    into.clear();
    into.extend_from_slice(MAGIC);
    into.extend_from_slice(&life.salt.to_le_bytes());
    for number in [life.term, position, id.generation, id.incarnation, id.epoch, body, flushed] {
        into.extend_from_slice(&number.to_le_bytes());
    }
    into.extend_from_slice(&u32::try_from(writes.len()).expect("bounded by the store").to_le_bytes());
    into.extend_from_slice(&crc32fast::hash(into).to_le_bytes());
    for write in writes {
        let kind = if matches!(write.change, DiskChange::Data(_)) { BYTES } else { ZEROES };
        into.extend_from_slice(&write.disk.to_le_bytes());
        into.extend_from_slice(&kind.to_le_bytes());
        into.extend_from_slice(&write.offset.to_le_bytes());
        into.extend_from_slice(&write.bytes().to_le_bytes());
        if let DiskChange::Data(data) = &write.change {
            into.extend_from_slice(data);
        }
    }
    into.extend_from_slice(END);
    into.extend_from_slice(&position.to_le_bytes());
    into.extend_from_slice(&crc32fast::hash(into).to_le_bytes());
    into.extend_from_slice(&[0; 4]);
    let whole = into.len() + usize::try_from(padding(body)).expect("less than a block");
    into.resize(whole, 0);
}

/// A write as it lies in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    pub(super) disk: u32,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// `None`: zeroes.
    pub(super) data: Option<&'a [u8]>,
}

/// The writes of a whole record; `None` if it is torn.
pub(super) fn pieces<'a>(record: &'a [u8], head: &Head, position: u64) -> Option<Vec<Piece<'a>>> {
    let body = usize::try_from(head.body).ok()?;
    let end = HEADER.checked_add(body)?;
    let trailer = record.get(end..end.checked_add(TRAILER)?)?;
    let whole = &trailer[..8] == END
        && get_u64(trailer, 8) == position
        && get_u32(trailer, 16) == crc32fast::hash(&record[..end + 16]);
    if !whole {
        return None;
    }
    let mut pieces = Vec::new();
    let mut rest = &record[HEADER..end];
    while !rest.is_empty() {
        let (write, after) = rest.split_at_checked(WRITE)?;
        let (kind, bytes) = (get_u32(write, 4), get_u64(write, 16));
        let (data, after) = match kind {
            BYTES => after.split_at_checked(usize::try_from(bytes).ok()?).map(|(data, after)| (Some(data), after))?,
            ZEROES => (None, after),
            _ => return None,
        };
        pieces.push(Piece { disk: get_u32(write, 0), offset: get_u64(write, 8), bytes, data });
        rest = after;
    }
    (pieces.len() == usize::try_from(head.writes).ok()?).then_some(pieces)
}

pub(super) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Life = Life { salt: 77, term: 3 };
    const ID: EpochId = EpochId { generation: 4, incarnation: 5, epoch: 6 };

    fn read(record: &[u8], life: Life, position: u64) -> Option<(EpochId, usize)> {
        let head = Head::parse(record.first_chunk()?, life, position)?;
        pieces(record, &head, position).map(|pieces| (head.id, pieces.len()))
    }

    #[test]
    fn p42_a_record_is_read_whole_in_its_own_place_and_life_or_not_at_all() {
        let writes = [
            DiskWrite { disk: 1, offset: 512, change: DiskChange::Data(vec![9; 700]) },
            DiskWrite { disk: 0, offset: 0, change: DiskChange::Zero(1 << 40) },
        ];
        let mut record = Vec::new();
        put(&mut record, LIFE, (8192, 4096), ID, &writes);
        assert_eq!(record.len() as u64, bytes_of(&writes));
        assert_eq!(record.len() as u64, BLOCK);
        let head = Head::parse(record.first_chunk().expect("long enough"), LIFE, 8192).expect("a head");
        let read_back = pieces(&record, &head, 8192).expect("whole");
        assert_eq!(read_back[0], Piece { disk: 1, offset: 512, bytes: 700, data: Some(&[9; 700]) });
        assert_eq!(read_back[1], Piece { disk: 0, offset: 0, bytes: 1 << 40, data: None });
        assert_eq!(read(&record, LIFE, 8192), Some((ID, 2)));
        assert_eq!(read(&record, LIFE, 12288), None, "another lap");
        assert_eq!(read(&record, Life { term: 4, ..LIFE }, 8192), None, "an earlier life");
        assert_eq!(read(&record, Life { salt: 78, ..LIFE }, 8192), None, "another journal");
        let used = HEADER + 2 * WRITE + 700 + TRAILER - 4;
        for at in 0..used {
            let mut damaged = record.clone();
            damaged[at] ^= 4;
            assert_eq!(read(&damaged, LIFE, 8192), None, "byte {at}");
            assert_eq!(read(&record[..at], LIFE, 8192), None, "cut at {at}");
        }
    }
}
