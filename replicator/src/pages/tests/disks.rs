//! Disk writes through encoder, wire and stager: all of them, in order, inside their disks, and within the limit.

use std::sync::Arc;

use proptest::prelude::*;
use vmm_hooks::disk::{DiskChange, DiskWrite};

use super::super::disk::{MAX_DATA, WriteError};
use super::super::encode::Encoder;
use super::super::frame::{FRAME_HEADER, FrameKind};
use super::super::shadow::ShadowMode;
use super::super::{MAX_PAYLOAD, frame};
use super::*;

const PAGES: u64 = 4;
const SIZES: [u64; 2] = [600 << 10, 3000];

fn stage_with(stream: &[Bytes], piece: usize, limit: usize) -> Result<StagedEpoch, StageError> {
    let mut stager = Stager::new(PAGES, None, limit).with_disks(Arc::from(SIZES));
    for piece in stream.concat().chunks(piece) {
        stager.push(piece)?;
    }
    stager.finish()
}

fn encode(capture: &Capture) -> Vec<Bytes> {
    let mut stream = Vec::new();
    let mut encoder = Encoder::new(PAGES, ShadowMode::Full);
    let stats = encoder.encode_epoch(&id(1), capture, &mut |frame| stream.push(frame)).expect("small");
    super::history::check_stats(&stats, capture.pages.len(), &stream);
    assert_eq!(stats.disk.pages, capture.disk.len() as u64);
    stream
}

/// Plays writes over images of zeroes.
fn images(writes: &[DiskWrite]) -> Vec<Vec<u8>> {
    let mut images: Vec<Vec<u8>> = SIZES.iter().map(|&size| vec![0; usize::try_from(size).expect("small")]).collect();
    for write in writes {
        let start = usize::try_from(write.offset).expect("small");
        let end = start + usize::try_from(write.bytes()).expect("small");
        let target = &mut images[usize::try_from(write.disk).expect("small")][start..end];
        match &write.change {
            DiskChange::Data(data) => target.copy_from_slice(data),
            DiskChange::Zero(_) => target.fill(0),
        }
    }
    images
}

fn writes() -> impl Strategy<Value = Vec<DiskWrite>> {
    let write = (0..2_usize, any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
        |(disk, offset, length, seed, zero)| {
            let offset = offset % SIZES[disk];
            let length = 1 + length % (SIZES[disk] - offset).min(300 << 10);
            let change = if zero {
                DiskChange::Zero(length)
            } else {
                DiskChange::Data(
                    seed.to_le_bytes().into_iter().cycle().take(usize::try_from(length).expect("small")).collect(),
                )
            };
            DiskWrite { disk: u32::try_from(disk).expect("small"), offset, change }
        },
    );
    prop::collection::vec(write, 0..12)
}

proptest! {
    #[test]
    fn writes_arrive_whole_and_in_order(writes in writes(), piece in 1_usize..9000) {
        let mut machine = Machine::new(PAGES);
        let capture = Capture { disk: writes.clone(), ..machine.capture() };
        let stream = encode(&capture);
        prop_assert!(stream.iter().all(|frame| frame.len() <= FRAME_HEADER + MAX_PAYLOAD));
        let staged = stage_with(&stream, piece, LIMIT).expect("our own stream");
        prop_assert!(images(staged.disk()) == images(&writes));
        let data: u64 = staged.disk().iter().map(|write| match write.change { DiskChange::Data(_) => write.bytes(), DiskChange::Zero(_) => 0 }).sum();
        prop_assert!(staged.staged_bytes() >= data);
        // The first copy travels the same way, without device state.
        let mut chunk = Vec::new();
        Encoder::new(PAGES, ShadowMode::Off).encode_writes(&id(1), &writes, &mut |frame| chunk.push(frame));
        let staged = stage_with(&chunk, piece, LIMIT).expect("our own stream");
        prop_assert!(staged.id().sync && images(staged.disk()) == images(&writes));
    }
}

fn data(disk: u32, offset: u64, length: usize) -> DiskWrite {
    DiskWrite { disk, offset, change: DiskChange::Data(vec![1; length]) }
}

#[test]
fn writes_outside_of_the_disks_are_refused() {
    let staged = |write| stage_with(&encode(&Capture { disk: vec![write], ..Capture::default() }), 500, LIMIT).err();
    assert_eq!(staged(data(1, 2990, 10)), None);
    assert_eq!(staged(data(1, 2990, 11)), Some(WriteError::Outside { disk: 1, offset: 2990 }.into()));
    assert_eq!(staged(data(2, 0, 1)), Some(WriteError::Disk { disk: 2 }.into()));
    let zero = DiskWrite { disk: 0, offset: u64::MAX, change: DiskChange::Zero(2) };
    assert_eq!(staged(zero), Some(WriteError::Outside { disk: 0, offset: u64::MAX }.into()));
    let stream = encode(&Capture { disk: vec![data(0, 0, 1)], ..Capture::default() });
    let none = stage(&stream, PAGES, None, 500, LIMIT).err();
    assert_eq!(none, Some(WriteError::Disk { disk: 0 }.into()), "a guest without disks");
}

#[test]
fn disk_frames_come_first_and_as_many_writes_as_they_announce() {
    let mut machine = Machine::new(PAGES);
    let stream = encode(&Capture { disk: vec![data(0, 0, 9), data(1, 0, 9)], ..machine.capture() });
    let kind = |frame: &Bytes| frame[5];
    assert_eq!(kind(&stream[1]), FrameKind::Disk as u8);
    let swapped = [stream[0].clone(), stream[2].clone(), stream[1].clone()];
    assert_eq!(stage_with(&swapped, 99, LIMIT).err(), Some(StageError::Order { kind: FrameKind::Disk }));
    let left_out: Vec<Bytes> = stream.iter().filter(|frame| kind(frame) != FrameKind::Disk as u8).cloned().collect();
    assert_eq!(stage_with(&left_out, 99, LIMIT).err(), Some(StageError::Totals));
    for count in [1, 3] {
        let mut lie = stream[1].to_vec();
        frame::seal(&mut lie, FrameKind::Disk, 0, count);
        let refused = stage_with(&[stream[0].clone(), Bytes::from(lie)], 99, LIMIT).err();
        assert_eq!(refused, Some(WriteError::Malformed.into()));
    }
}

#[test]
fn writes_stay_within_the_limit_or_are_refused() {
    let capture = Capture { disk: (0..4).map(|at| data(0, at, MAX_DATA / 2)).collect(), ..Capture::default() };
    let stream = encode(&capture);
    let needed =
        usize::try_from(stage_with(&stream, 5000, LIMIT).expect("a good stream").staged_bytes()).expect("small");
    assert!(stage_with(&stream, 5000, needed).is_ok());
    for limit in [0, needed / 2, needed - 1] {
        assert_eq!(stage_with(&stream, 5000, limit).err(), Some(StageError::TooLarge { limit }));
    }
}
