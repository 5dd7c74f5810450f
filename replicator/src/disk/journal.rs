//! The journal file: two marks and a ring of records (`docs/protocol.md` P41, P42).
//!
//! Promises: a record is written where no record lies that is still needed; what [`scan`] finds are whole records of this
//! life of the journal, in order and without a gap; where one is missing that was surely on the disk, it says so.

use std::io;

use super::files::File;
use super::mark::{MARK, Mark, SLOT};
use super::record::{self, BLOCK, EpochId, HEADER, Head};

/// Where the ring begins.
pub(super) const RING: u64 = 2 * SLOT;

const _: () = assert!(RING.is_multiple_of(BLOCK));

/// A record in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) epoch: u64,
    pub(super) position: u64,
    pub(super) bytes: u64,
}

impl Entry {
    pub(super) fn end(&self) -> u64 {
        self.position + self.bytes
    }
}

/// What stands between the head and the first record that is missing or torn.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) entries: Vec<Entry>,
    /// A record that was on the disk before others were written is damaged.
    pub(super) gap: bool,
}

/// Reads both slots. The one that counts, if any is whole.
pub(super) fn read_mark(file: &dyn File) -> io::Result<Option<Mark>> {
    let mut best: Option<Mark> = None;
    for slot in [0, SLOT] {
        let mut bytes = [0; MARK];
        match file.read_at(slot, &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            done => done?,
        }
        let whole = Mark::parse(&bytes).filter(|mark| mark.at() == slot);
        if whole.map(|mark| mark.sequence) > best.map(|mark| mark.sequence) {
            best = whole;
        }
    }
    Ok(best)
}

/// Writes a mark into its slot and brings it, with all that was written to the file before, onto the disk.
pub(super) fn write_mark(file: &dyn File, mark: Mark) -> io::Result<()> {
    file.write_at(mark.at(), &mark.to_bytes())?;
    file.sync()
}

/// The pieces of `length` bytes from `position` on: where in the file, and which of the bytes.
fn pieces(capacity: u64, position: u64, length: usize) -> [(u64, std::ops::Range<usize>); 2] {
    let at = position % capacity;
    let first = usize::try_from(capacity - at).map_or(length, |left| left.min(length));
    [(RING + at, 0..first), (RING, first..length)]
}

/// Writes `bytes` from `position` on, over the ring's end if need be.
pub(super) fn write(file: &dyn File, capacity: u64, position: u64, bytes: &[u8]) -> io::Result<()> {
    for (at, part) in pieces(capacity, position, bytes.len()) {
        if !part.is_empty() {
            file.write_at(at, &bytes[part])?;
        }
    }
    Ok(())
}

/// Fills `buffer` from `position` on.
pub(super) fn read(file: &dyn File, capacity: u64, position: u64, buffer: &mut [u8]) -> io::Result<()> {
    for (at, part) in pieces(capacity, position, buffer.len()) {
        if !part.is_empty() {
            file.read_at(at, &mut buffer[part])?;
        }
    }
    Ok(())
}

/// Reads the record at `position` into `buffer`, which has no more than `room` bytes; `None` if there is no whole one.
pub(super) fn read_record(
    file: &dyn File,
    mark: &Mark,
    position: u64,
    room: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Head>> {
    let Some(head) = read_head(file, mark, position)? else {
        return Ok(None);
    };
    let Some(length) = usize::try_from(head.bytes()).ok().filter(|_| head.bytes() <= room) else {
        return Ok(None);
    };
    buffer.resize(length, 0);
    read(file, mark.capacity, position, buffer)?;
    Ok(record::pieces(buffer, &head, position).is_some().then_some(head))
}

fn read_head(file: &dyn File, mark: &Mark, position: u64) -> io::Result<Option<Head>> {
    let mut bytes = [0; HEADER];
    read(file, mark.capacity, position, &mut bytes)?;
    Ok(Head::parse(&bytes, mark.life, position))
}

/// Finds all records from the mark's head on.
pub(super) fn scan(file: &dyn File, mark: &Mark) -> io::Result<Scan> {
    let end = mark.head + mark.capacity;
    let (mut position, mut last) = (mark.head, mark.id);
    let mut entries = Vec::new();
    let mut buffer = Vec::new();
    while position < end {
        let head = read_record(file, mark, position, end - position, &mut buffer)?;
        let Some(head) = head.filter(|head| follows(head.id, last)) else {
            break;
        };
        entries.push(Entry { epoch: head.id.epoch, position, bytes: head.bytes() });
        position += head.bytes();
        last = head.id;
    }
    let mut gap = false;
    for later in (position..end).step_by(usize::try_from(BLOCK).expect("a block is small")).skip(1) {
        gap |= read_head(file, mark, later)?.is_some_and(|head| head.flushed > position);
    }
    Ok(Scan { entries, gap })
}

/// Whether an epoch may come after another one: of the same session, and later.
pub(super) fn follows(id: EpochId, last: EpochId) -> bool {
    (id.generation, id.incarnation) == (last.generation, last.incarnation) && id.epoch > last.epoch
}
