//! What of the first copy of the disks the standby does not have: the primary's side of [`super::known`].
//!
//! The hypervisor's mirror tells everything that is on the disks, in whatever order, mixed with what the guest writes meanwhile; QEMU
//! tells zeroes for the whole disk before anything else. [`Difference`] leaves out what changes nothing on the standby, and
//! keeps zeroes back until it is known whether something else follows.
//!
//! Promise: applied in order to images that hold what the standby said, what it lets through gives, after [`Difference::finish`],
//! what all of it would give. If the mirror has not told the whole of a piece whose content is not known here, that is an error and not a guess.

use std::collections::BTreeMap;

use vmm_hooks::disk::{DiskChange, DiskWrite};

use super::known::{Digest, Known, PIECE};

/// Unit in which it is noted what of a piece was told.
const SECTOR: u64 = PIECE / 128;

/// What is known of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing was told of it; the standby has what it said.
    Untold,
    /// It was told whole, and is what the standby has.
    Same,
    /// Told whole as zeroes, which the standby does not have, and not sent.
    Owed,
    /// A part was told and sent.
    Partly,
    /// Whatever was told of it was sent, and that was all of it.
    Sent,
}

#[derive(Debug)]
struct Disk {
    bytes: u64,
    known: Vec<Digest>,
    states: Vec<State>,
    /// Of pieces that were partly told: which sectors.
    told: BTreeMap<usize, u128>,
}

/// See the module.
#[derive(Debug)]
pub struct Difference {
    disks: Vec<Disk>,
    left_out: u64,
}

/// The mirror has not told all of a disk. Nothing is committed by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the first copy of disk {disk} has no word of what is at {offset}; protect the VM again after the standby's older copies of its disks are deleted"
)]
pub struct Incomplete {
    /// Which, by its place.
    pub disk: u32,
    /// Where.
    pub offset: u64,
}

impl Difference {
    /// Of disks of these sizes, on a standby that has this.
    #[must_use]
    pub fn new(sizes: &[u64], known: Known) -> Self {
        let disk = |(&bytes, known): (&u64, Vec<Digest>)| Disk {
            bytes,
            states: vec![State::Untold; known.len()],
            known,
            told: BTreeMap::new(),
        };
        Self { disks: sizes.iter().zip(known.0).map(disk).collect(), left_out: 0 }
    }

    /// Bytes that the standby had already.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Leaves out of `writes` what changes nothing.
    ///
    /// # Panics
    /// If a write is outside of its disk: a bug of the back end.
    #[must_use]
    pub fn filter(&mut self, writes: Vec<DiskWrite>) -> Vec<DiskWrite> {
        let mut through = Vec::with_capacity(writes.len());
        for write in writes {
            let index = usize::try_from(write.disk).expect("a u32 fits");
            let disk = &mut self.disks[index];
            assert!(write.offset + write.bytes() <= disk.bytes, "a write outside of its disk");
            self.left_out += disk.filter(write, &mut through);
        }
        through
    }

    /// The mirror has told everything: what is still to be sent.
    ///
    /// # Errors
    /// [`Incomplete`] if it has not.
    pub fn finish(self) -> Result<Vec<DiskWrite>, Incomplete> {
        let mut owed: Vec<DiskWrite> = Vec::new();
        for (number, disk) in self.disks.iter().enumerate() {
            let number = u32::try_from(number).expect("at most MAX_DISKS");
            for (piece, state) in disk.states.iter().enumerate() {
                let (from, to) = disk.range(piece);
                match state {
                    // A new image reads as zeroes where nothing was told, as ever.
                    State::Untold | State::Partly if disk.known[piece] != Digest::ZEROES => {
                        return Err(Incomplete { disk: number, offset: from });
                    }
                    State::Owed => match owed.last_mut() {
                        Some(DiskWrite { disk: same, offset, change: DiskChange::Zero(bytes) })
                            if *same == number && *offset + *bytes == from =>
                        {
                            *bytes += to - from;
                        }
                        _ => owed.push(zeroes(number, from, to)),
                    },
                    State::Untold | State::Partly | State::Same | State::Sent => {}
                }
            }
        }
        Ok(owed)
    }
}

fn zeroes(disk: u32, from: u64, to: u64) -> DiskWrite {
    DiskWrite { disk, offset: from, change: DiskChange::Zero(to - from) }
}

impl Disk {
    fn range(&self, piece: usize) -> (u64, u64) {
        let from = piece as u64 * PIECE;
        (from, (from + PIECE).min(self.bytes))
    }

    /// Passes on what has to be sent, in as few writes as it came in where it can. Returns the bytes that were left out.
    fn filter(&mut self, write: DiskWrite, through: &mut Vec<DiskWrite>) -> u64 {
        let (start, end) = (write.offset, write.offset + write.bytes());
        let mut left_out = 0;
        // What is to be sent of it and not yet passed on.
        let mut pending: Option<(u64, u64)> = None;
        let mut at = start;
        while at < end {
            let piece = usize::try_from(at / PIECE).expect("fits");
            let (from, to) = (at, if piece < self.states.len() { self.range(piece).1.min(end) } else { end });
            at = to;
            let part = Part { write: &write, from, to };
            let (send, before) = if piece < self.states.len() { self.meet(piece, &part) } else { (true, None) };
            if before.is_some() || !send {
                pending.take().into_iter().for_each(|(from, to)| through.push(part.of(from, to)));
            }
            through.extend(before);
            if send {
                pending = Some((pending.map_or(from, |(from, _)| from), to));
            } else if let DiskChange::Data(_) = write.change {
                left_out += to - from;
            }
        }
        match pending {
            Some((from, to)) if (from, to) == (start, end) => through.push(write),
            Some((from, to)) => through.push(Part { write: &write, from, to }.of(from, to)),
            None => {}
        }
        left_out
    }

    /// Whether a part of a write, which lies in one piece, has to be sent; and what before it.
    fn meet(&mut self, piece: usize, part: &Part<'_>) -> (bool, Option<DiskWrite>) {
        let (from, to) = self.range(piece);
        let whole = (part.from, part.to) == (from, to);
        let state = self.states[piece];
        if state == State::Sent {
            return (true, None);
        }
        if whole && state != State::Partly {
            let digest = part.digest();
            let (next, send) = match (digest == self.known[piece], digest == Digest::ZEROES) {
                (true, _) => (State::Same, false),
                (false, true) => (State::Owed, false),
                (false, false) => (State::Sent, true),
            };
            self.states[piece] = next;
            return (send, None);
        }
        if whole {
            self.told.remove(&piece);
            self.states[piece] = State::Sent;
            return (true, None);
        }
        match state {
            State::Owed => {
                self.states[piece] = State::Sent;
                (true, Some(zeroes(part.write.disk, from, to)))
            }
            // What the standby has is what the disk has.
            State::Same => {
                self.states[piece] = State::Sent;
                (true, None)
            }
            State::Untold | State::Partly | State::Sent => {
                let told = self.told.entry(piece).or_default();
                *told |= sectors(part.from - from, part.to - from);
                let all = sectors(0, (to - from).next_multiple_of(SECTOR));
                if *told == all {
                    self.told.remove(&piece);
                    self.states[piece] = State::Sent;
                } else {
                    self.states[piece] = State::Partly;
                }
                (true, None)
            }
        }
    }
}

/// The sectors of a piece that lie wholly between these bytes of it.
fn sectors(from: u64, to: u64) -> u128 {
    let (first, end) = (from.div_ceil(SECTOR), to / SECTOR);
    let below = |sector: u64| if sector >= 128 { u128::MAX } else { (1 << sector) - 1 };
    if first >= end { 0 } else { below(end) & !below(first) }
}

/// A part of a write.
struct Part<'a> {
    write: &'a DiskWrite,
    from: u64,
    to: u64,
}

impl Part<'_> {
    fn digest(&self) -> Digest {
        match &self.write.change {
            DiskChange::Zero(_) => Digest::ZEROES,
            DiskChange::Data(data) => Digest::of(&data[self.span(self.from, self.to)]),
        }
    }

    /// The same write, between these bytes of the disk alone.
    fn of(&self, from: u64, to: u64) -> DiskWrite {
        match &self.write.change {
            DiskChange::Zero(_) => zeroes(self.write.disk, from, to),
            DiskChange::Data(data) => {
                let data = data[self.span(from, to)].to_vec();
                DiskWrite { disk: self.write.disk, offset: from, change: DiskChange::Data(data) }
            }
        }
    }

    fn span(&self, from: u64, to: u64) -> std::ops::Range<usize> {
        let place = |at: u64| usize::try_from(at - self.write.offset).expect("it is in memory");
        place(from)..place(to)
    }
}

/// What writes make of images in memory, for who judges the filter.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn apply(images: &mut [Vec<u8>], writes: &[DiskWrite]) {
    for write in writes {
        let image = &mut images[usize::try_from(write.disk).expect("small")];
        let from = usize::try_from(write.offset).expect("small");
        match &write.change {
            DiskChange::Data(data) => image[from..from + data.len()].copy_from_slice(data),
            DiskChange::Zero(bytes) => image[from..from + usize::try_from(*bytes).expect("small")].fill(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZES: [u64; 2] = [5 * PIECE + 1536, 2 * PIECE];

    fn known(images: &[Vec<u8>]) -> Known {
        let piece = usize::try_from(PIECE).expect("small");
        Known(images.iter().map(|image| image.chunks(piece).map(Digest::of).collect()).collect())
    }

    /// Images whose pieces are of few kinds, so that some are the same.
    fn images() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(0..3_u8, 8).prop_map(|kinds| {
            let mut kinds = kinds.into_iter();
            SIZES
                .iter()
                .map(|&bytes| {
                    let mut image = vec![0; usize::try_from(bytes).expect("small")];
                    for piece in image.chunks_mut(usize::try_from(PIECE).expect("small")) {
                        piece.fill(kinds.next().expect("enough"));
                    }
                    image
                })
                .collect()
        })
    }

    fn guest_write() -> impl Strategy<Value = DiskWrite> {
        (0..2_u32, any::<prop::sample::Index>(), prop_oneof![1..4_u64, 100..300_u64], 0..3_u8, any::<bool>()).prop_map(
            |(disk, at, sectors, byte, aligned)| {
                let bytes = SIZES[usize::try_from(disk).expect("small")];
                let unit = if aligned { PIECE } else { 512 };
                let offset = at.index(usize::try_from(bytes / unit).expect("small")) as u64 * unit;
                let length = (sectors * 512).min(bytes - offset);
                let change = match byte {
                    0 => DiskChange::Zero(length),
                    byte => DiskChange::Data(vec![byte; usize::try_from(length).expect("small")]),
                };
                DiskWrite { disk, offset, change }
            },
        )
    }

    /// What a mirror tells of disks: zeroes for all of it first or not, then the pieces in runs of so many, the guest's writes between.
    fn told(disks: &[Vec<u8>], zeroes_first: bool, run: usize, mut guest: Vec<DiskWrite>) -> Vec<DiskWrite> {
        let mut told = Vec::new();
        let mut now = disks.to_vec();
        if zeroes_first {
            told.extend((0..2).map(|disk| zeroes(disk, 0, SIZES[usize::try_from(disk).expect("small")])));
        }
        for disk in 0..2 {
            let bytes = usize::try_from(SIZES[disk]).expect("small");
            for from in (0..bytes).step_by(run * usize::try_from(PIECE).expect("small")) {
                if let Some(write) = guest.pop() {
                    apply(&mut now, std::slice::from_ref(&write));
                    told.push(write);
                }
                let to = (from + run * usize::try_from(PIECE).expect("small")).min(bytes);
                let data = &now[disk][from..to];
                let all_zeroes = data.iter().all(|&byte| byte == 0);
                if all_zeroes && zeroes_first {
                    continue;
                }
                let change =
                    if all_zeroes { DiskChange::Zero((to - from) as u64) } else { DiskChange::Data(data.to_vec()) };
                told.push(DiskWrite { disk: u32::try_from(disk).expect("small"), offset: from as u64, change });
            }
        }
        told.extend(guest);
        told
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// P48.
        #[test]
        fn what_is_left_out_changes_nothing(
            older in images(),
            disks in images(),
            zeroes_first in any::<bool>(),
            run in 1..4_usize,
            guest in prop::collection::vec(guest_write(), 0..12),
            batch in 1..5_usize,
        ) {
            let told = told(&disks, zeroes_first, run, guest);
            let (mut all, mut some) = (older.clone(), older.clone());
            apply(&mut all, &told);
            let mut difference = Difference::new(&SIZES, known(&older));
            for writes in told.chunks(batch) {
                apply(&mut some, &difference.filter(writes.to_vec()));
            }
            let left_out = difference.left_out();
            apply(&mut some, &difference.finish().expect("all of it was told"));
            prop_assert!(all == some);
            let bytes: u64 = told.iter().map(DiskWrite::bytes).sum();
            prop_assert!(left_out <= bytes);
        }

        /// Whatever is told and however little: an error, or the same.
        #[test]
        fn what_was_not_told_is_never_guessed(
            older in images(),
            zeroed in any::<bool>(),
            guest in prop::collection::vec(guest_write(), 0..20),
        ) {
            let told: Vec<_> = guest.into_iter().filter(|write| zeroed || write.offset % PIECE != 0).collect();
            let (mut all, mut some) = (older.clone(), older.clone());
            apply(&mut all, &told);
            let mut difference = Difference::new(&SIZES, known(&older));
            apply(&mut some, &difference.filter(told.clone()));
            if let Ok(owed) = difference.finish() {
                apply(&mut some, &owed);
                prop_assert!(all == some);
                for (disk, image) in older.iter().enumerate() {
                    for (at, piece) in image.chunks(usize::try_from(PIECE).expect("small")).enumerate() {
                        let from = at as u64 * PIECE;
                        let covered = |byte: u64| told.iter().any(|write| {
                            usize::try_from(write.disk) == Ok(disk) && (write.offset..write.offset + write.bytes()).contains(&byte)
                        });
                        let whole = (0..piece.len() as u64).step_by(512).all(|sector| covered(from + sector));
                        prop_assert!(whole || piece.iter().all(|&byte| byte == 0), "piece {at} of disk {disk} was not told whole");
                    }
                }
            }
        }
    }

    #[test]
    fn the_same_disk_costs_nothing_and_one_byte_costs_its_piece() {
        let piece = usize::try_from(PIECE).expect("small");
        let mut disks: Vec<Vec<u8>> =
            SIZES.iter().map(|&bytes| (0..bytes).map(|at| u8::try_from(at % 251).expect("small")).collect()).collect();
        disks[0][2 * piece..3 * piece].fill(0);
        let older = disks.clone();
        let mut difference = Difference::new(&SIZES, known(&older));
        assert!(difference.filter(told(&disks, true, 2, Vec::new())).is_empty());
        assert_eq!(difference.left_out(), SIZES.iter().sum::<u64>());
        assert!(difference.finish().expect("all of it was told").is_empty());

        disks[0][piece + 7] ^= 1;
        let mut difference = Difference::new(&SIZES, known(&older));
        let sent = difference.filter(told(&disks, true, 3, Vec::new()));
        let [DiskWrite { disk: 0, offset: PIECE, change: DiskChange::Data(data) }] = sent.as_slice() else {
            panic!("{} writes", sent.len());
        };
        assert_eq!(data.len(), piece);
    }
}
