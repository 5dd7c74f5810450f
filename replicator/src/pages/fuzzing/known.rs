//! Target `known`: what a standby says of its disks, and a mirror's history through the filter that it feeds.

use vmm_hooks::disk::{DiskChange, DiskWrite};

use super::Choices;
use crate::disk::difference::{Difference, apply};
use crate::disk::known::{Digest, Known, PIECE};

const SIZES: [u64; 2] = [2 * PIECE + 1024, PIECE];

pub(super) fn run(bytes: &[u8]) {
    message(bytes);
    history(&mut Choices(bytes));
}

/// The message, its checksum mended so that the rest is reached.
fn message(bytes: &[u8]) {
    let whole = [bytes, &crc32fast::hash(bytes).to_le_bytes()].concat();
    let Ok(known) = Known::decode(&whole, &SIZES) else { return };
    assert_eq!(known.0.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(Known::decode(&known.encode(), &SIZES), Ok(known));
    assert!(Known::decode(&whole[..whole.len() - 1], &SIZES).is_err());
}

/// What goes through the filter gives what all of it would give, or there is an error.
fn history(choices: &mut Choices<'_>) {
    let sizes = SIZES.map(|bytes| usize::try_from(bytes).expect("small"));
    let mut older = sizes.map(|bytes| vec![0; bytes]);
    for image in &mut older {
        image.chunks_mut(usize::try_from(PIECE).expect("small")).for_each(|piece| piece.fill(choices.byte() % 3));
    }
    let known =
        older.each_ref().map(|image| image.chunks(usize::try_from(PIECE).expect("small")).map(Digest::of).collect());
    let (mut all, mut some) = (older.clone(), older);
    let mut difference = Difference::new(&SIZES, Known(known.into()));
    while !choices.is_empty() {
        let disk = choices.below(2);
        // Often a whole piece, as a mirror tells it.
        let unit = [512, usize::try_from(PIECE).expect("small")][choices.below(2)];
        let offset = choices.below(sizes[disk].div_ceil(unit)) * unit;
        let length = ((choices.below(130) + 1) * [512, unit][choices.below(2)]).min(sizes[disk] - offset);
        let change = match choices.byte() % 3 {
            0 => DiskChange::Zero(length as u64),
            byte => DiskChange::Data(vec![byte; length]),
        };
        let write = DiskWrite { disk: u32::try_from(disk).expect("small"), offset: offset as u64, change };
        apply(&mut all, std::slice::from_ref(&write));
        apply(&mut some, &difference.filter(vec![write]));
    }
    if let Ok(owed) = difference.finish() {
        apply(&mut some, &owed);
        assert!(all == some, "the images differ");
    }
}
