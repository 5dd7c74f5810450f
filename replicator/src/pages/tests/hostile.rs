//! Streams from a peer that means harm, or from a wire that damages: never a panic, never more memory than granted, and
//! an epoch is staged only if all of it is right.

use heartbeat_core::ids::Epoch;
use proptest::prelude::*;

use super::super::encode::Encoder;
use super::super::frame::{self, FRAME_HEADER, FrameError, FrameHeader, FrameKind, StreamHead, Totals};
use super::super::record::{self, RecordError, RecordKind};
use super::super::shadow::ShadowMode;
use super::super::{MAX_PAYLOAD, delta};
use super::*;

const PAGES: u64 = 24;

/// Two streams of one guest: a first one, and a second one with deltas, and the first one's device state.
fn streams() -> (Vec<Bytes>, Vec<Bytes>, DeviceState) {
    let mut machine = Machine::new(PAGES);
    let mut encoder = Encoder::new(PAGES, ShadowMode::Full);
    for page in 0..12 {
        let bytes = if page % 3 == 0 { noise(page, PAGE_SIZE) } else { page.to_le_bytes().repeat(512) };
        machine.write(page, 0, &bytes);
    }
    let mut encode = |machine: &mut Machine, number| {
        let mut stream = Vec::new();
        encoder.encode_epoch(&id(number), &machine.capture(), &mut |frame| stream.push(frame)).expect("small");
        stream
    };
    let first = encode(&mut machine, 1);
    for page in 3..20 {
        machine.write(page, 40 * usize::try_from(page).expect("small"), b"changed words");
    }
    machine.write(21, 0, &[3; PAGE_SIZE]);
    machine.device[4090..4100].fill(9);
    let second = encode(&mut machine, 2);
    let staged = stage(&first, PAGES, None, 999, LIMIT).expect("a good stream");
    (first, second, staged.device().expect("an epoch has device state"))
}

/// A frame taken apart.
#[derive(Clone)]
struct Frame {
    kind: FrameKind,
    first: u64,
    count: u32,
    payload: Vec<u8>,
}

fn take_apart(stream: &[Bytes]) -> Vec<Frame> {
    let frame = |frame: &Bytes| {
        let (header, payload) = frame.split_first_chunk::<FRAME_HEADER>().expect("whole");
        let header = FrameHeader::parse(header).expect("good");
        Frame { kind: header.kind, first: header.first, count: header.count, payload: payload.to_vec() }
    };
    stream.iter().map(frame).collect()
}

/// Puts frames together again with right checksums and a right trailer: a liar who knows the format.
fn put_together(frames: &[Frame], pages: u64, device_crc: u32) -> Vec<Bytes> {
    let mut totals = Totals::default();
    let mut stream = Vec::new();
    for frame in frames {
        let mut payload = frame.payload.clone();
        if frame.kind == FrameKind::Trailer {
            payload = totals.trailer(pages, device_crc).to_bytes().to_vec();
        }
        let mut bytes = [vec![0; FRAME_HEADER], payload].concat();
        let crc = frame::seal(&mut bytes, frame.kind, frame.first, frame.count);
        totals.add(bytes.len(), crc);
        stream.push(Bytes::from(bytes));
    }
    stream
}

/// A stream of one pages frame with this payload and no device state.
fn lie(first: u64, count: u32, payload: Vec<u8>) -> Result<StagedEpoch, StageError> {
    let head = StreamHead { id: StreamId { sync: true, ..id(1) }, layout_pages: PAGES, device: None };
    let frames = [
        Frame { kind: FrameKind::Head, first: 0, count: 0, payload: head.to_bytes().to_vec() },
        Frame { kind: FrameKind::Pages, first, count, payload },
        Frame { kind: FrameKind::Trailer, first: 0, count: 0, payload: Vec::new() },
    ];
    stage(&put_together(&frames, u64::from(count), 0), PAGES, None, 100, LIMIT)
}

fn raw(page: u64) -> Vec<u8> {
    [record::header(page, RecordKind::Raw, 4096).as_slice(), &[7; PAGE_SIZE]].concat()
}

#[test]
fn a_lie_that_is_no_lie_is_staged() {
    assert_eq!(lie(4, 2, [raw(4), raw(9)].concat()).expect("nothing is wrong with it").pages(), 2);
}

#[test]
fn pages_must_ascend_come_once_and_lie_in_the_layout() {
    let page = |page| Some(StageError::Page { page });
    assert_eq!(lie(9, 2, [raw(9), raw(4)].concat()).err(), page(4));
    assert_eq!(lie(4, 2, [raw(4), raw(4)].concat()).err(), page(4));
    assert_eq!(lie(PAGES, 1, raw(PAGES)).err(), page(PAGES));
    assert_eq!(lie(u64::from(u32::MAX), 1, raw(u64::from(u32::MAX))).err(), page(u64::from(u32::MAX)));
    let zeroes = record::header(20, RecordKind::Zero, 5).to_vec();
    assert_eq!(lie(20, 5, zeroes.clone()).err(), page(20));
    assert_eq!(lie(4, 1, raw(5)).err(), page(4), "not the page that the frame announced");
    assert_eq!(lie(4, 2, raw(4)).err(), page(4), "not as many pages as the frame announced");
    assert_eq!(lie(3, 4, [record::header(3, RecordKind::Zero, 3).to_vec(), raw(5)].concat()).err(), page(5));
}

#[test]
fn records_must_be_whole_and_well_formed() {
    let record = |error| Some(StageError::Record(error));
    assert_eq!(lie(4, 1, raw(4)[..4000].to_vec()).err(), record(RecordError::Truncated));
    assert_eq!(lie(4, 1, raw(4)[..5].to_vec()).err(), record(RecordError::Truncated));
    let with = |kind, body: &[u8]| {
        let n = u16::try_from(body.len()).expect("short");
        lie(4, 1, [record::header(4, kind, n).as_slice(), body].concat()).err()
    };
    assert_eq!(with(RecordKind::Raw, &[1; 100]), record(RecordError::Length { page: 4, length: 100 }));
    assert_eq!(with(RecordKind::Delta, &[0, 0, 1, 0, 1, 2, 3]), record(RecordError::Delta { page: 4 }));
    assert_eq!(with(RecordKind::Delta, &[]), record(RecordError::Delta { page: 4 }));
    assert_eq!(with(RecordKind::Lz4, &[0xFF; 50]), record(RecordError::Lz4 { page: 4 }));
    let (short, long) = (lz4_flex::block::compress(&[0; 4095]), lz4_flex::block::compress(&[0; 5000]));
    assert_eq!(with(RecordKind::Lz4, &short), record(RecordError::Lz4 { page: 4 }));
    assert_eq!(with(RecordKind::Lz4, &long), record(RecordError::Lz4 { page: 4 }));
    let mut unknown = raw(4);
    unknown[4] = 9;
    assert_eq!(lie(4, 1, unknown).err(), record(RecordError::Kind { page: 4, kind: 9 }));
    let none = record::header(4, RecordKind::Zero, 0).to_vec();
    assert_eq!(lie(4, 1, none).err(), record(RecordError::Length { page: 4, length: 0 }));
}

#[test]
fn frames_must_come_in_order_and_all_of_them() {
    let (_, second, device) = streams();
    let frames = take_apart(&second);
    let kinds: Vec<_> = frames.iter().map(|frame| frame.kind).collect();
    assert_eq!(kinds, [FrameKind::Head, FrameKind::Pages, FrameKind::Device, FrameKind::Trailer]);
    let run = |order: &[usize]| {
        let frames: Vec<_> = order.iter().map(|&index| frames[index].clone()).collect();
        stage(&put_together(&frames, 0, 0), PAGES, Some(device.clone()), 77, LIMIT).err()
    };
    assert_eq!(run(&[1, 2, 3]), Some(StageError::Order { kind: FrameKind::Pages }));
    assert_eq!(run(&[0, 0, 1]), Some(StageError::Order { kind: FrameKind::Head }));
    assert_eq!(run(&[0, 2, 1]), Some(StageError::Order { kind: FrameKind::Pages }));
    assert_eq!(run(&[0, 1, 2]), Some(StageError::Unfinished));
    assert_eq!(run(&[]), Some(StageError::Unfinished));
    assert_eq!(run(&[0, 1, 3]), Some(StageError::DeviceCrc), "a device frame is missing");
    let whole = second.concat();
    for cut in [1, FRAME_HEADER - 1, FRAME_HEADER, 200, whole.len() - 1] {
        let cut = stage(&[Bytes::copy_from_slice(&whole[..cut])], PAGES, Some(device.clone()), 50, LIMIT);
        assert_eq!(cut.err(), Some(StageError::Unfinished));
    }
    let more = [whole, vec![0]].concat();
    assert_eq!(stage(&[Bytes::from(more)], PAGES, Some(device), 5000, LIMIT).err(), Some(StageError::Trailing));
}

#[test]
fn a_page_frame_left_out_is_found_by_the_totals() {
    let (_, second, device) = streams();
    let stream = [second[0].clone(), second[2].clone(), second[3].clone()];
    assert_eq!(stage(&stream, PAGES, Some(device), 5000, LIMIT).err(), Some(StageError::Totals));
}

#[test]
fn a_device_delta_is_refused_without_its_base() {
    let (_, second, device) = streams();
    assert_eq!(stage(&second, PAGES, None, 5000, LIMIT).err(), Some(StageError::DeviceBase));
    let mut other = device.to_vec();
    other[0] ^= 1;
    let other = Some(DeviceState::new(other));
    assert_eq!(stage(&second, PAGES, other, 5000, LIMIT).err(), Some(StageError::DeviceBase));
    assert!(stage(&second, PAGES, Some(device), 5000, LIMIT).is_ok());
}

#[test]
fn another_layout_is_refused() {
    let (first, ..) = streams();
    let refused = stage(&first, PAGES + 1, None, 5000, LIMIT).err();
    assert_eq!(refused, Some(StageError::Layout { theirs: PAGES, ours: PAGES + 1 }));
}

#[test]
fn a_stream_stays_within_its_limit_or_is_refused() {
    let (first, ..) = streams();
    let needed = stage(&first, PAGES, None, 5000, LIMIT).expect("a good stream").staged_bytes();
    let needed = usize::try_from(needed).expect("small");
    // The device state is staged in whole blocks.
    let needed = needed.next_multiple_of(PAGE_SIZE) + PAGE_SIZE;
    for limit in [0, 1, 4096, 8192, needed / 2, needed * 2 / 3, needed] {
        match stage(&first, PAGES, None, 700, limit) {
            Ok(staged) => {
                assert_eq!(limit, needed);
                assert!(staged.into_arena().0.capacity() <= limit);
            }
            Err(error) => assert_eq!(error, StageError::TooLarge { limit }),
        }
    }
}

#[test]
fn an_error_is_final() {
    let (first, ..) = streams();
    let mut stager = Stager::new(PAGES, None, LIMIT);
    let error = stager.push(b"this is no frame, however long one looks at it").expect_err("no magic");
    assert_eq!(error, StageError::Frame(FrameError::Magic));
    assert_eq!(stager.push(&first.concat()), Err(error));
    assert_eq!(stager.finish().err(), Some(error));
}

#[test]
fn a_header_is_looked_at_as_soon_as_it_is_there() {
    for piece in [1, 5, FRAME_HEADER] {
        let mut stager = Stager::new(PAGES, None, LIMIT);
        let pushed: Vec<_> = [b'x'; FRAME_HEADER].chunks(piece).map(|piece| stager.push(piece)).collect();
        assert_eq!(pushed.last(), Some(&Err(StageError::Frame(FrameError::Magic))), "in pieces of {piece}");
    }
}

#[test]
fn memory_of_an_applied_epoch_serves_the_next_one() {
    let (first, second, device) = streams();
    let memory = Memory::new(PAGES);
    let staged = stage(&first, PAGES, None, 5000, LIMIT).expect("a good stream");
    staged.apply(&memory);
    let mut stager = Stager::reusing(PAGES, Some(device), LIMIT, staged.into_arena());
    stager.push(&second.concat()).expect("a good stream");
    assert_eq!(stager.head().map(|head| head.id.epoch), Some(2));
    let staged = stager.finish().expect("a whole stream");
    assert!(staged.pages() < PAGES, "nothing of the first epoch is left in it");
    staged.apply(&memory);
}

/// Damages `stream` somewhere. With `cover`, the checksums are made right again.
fn damage(random: &mut Random, stream: &[Bytes], cover: bool) -> Vec<Bytes> {
    if !cover {
        let mut bytes = stream.concat();
        match random.below(4) {
            0 => {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            1 => bytes.truncate(random.below(bytes.len())),
            2 => {
                let (a, b) = (random.below(bytes.len()), random.below(bytes.len()));
                bytes.drain(a.min(b)..a.max(b));
            }
            _ => {
                let at = random.below(bytes.len());
                let extra = noise(random.next(), random.below(40));
                bytes.splice(at..at, extra);
            }
        }
        return vec![Bytes::from(bytes)];
    }
    let mut frames = take_apart(stream);
    for _ in 0..=random.below(3) {
        let (index, other) = (random.below(frames.len()), random.below(frames.len()));
        match random.below(8) {
            0 => frames.swap(index, other),
            1 => frames[index] = frames[other].clone(),
            2 if frames.len() > 1 => drop(frames.remove(index)),
            3 => frames[index].count = random.below(70_000).try_into().expect("small"),
            4 => frames[index].first = random.next() >> random.below(64),
            _ => {
                // Within the first bytes are the lengths and kinds; anywhere else are more of them.
                let payload = &mut frames[index].payload;
                let reach = if random.below(2) == 0 { payload.len() } else { payload.len().min(64) };
                if reach > 0 {
                    let at = random.below(reach);
                    payload[at] = if random.below(2) == 0 { 0xFF } else { random.below(256).to_le_bytes()[0] };
                }
            }
        }
    }
    let pages = frames.iter().filter(|frame| frame.kind == FrameKind::Pages).map(|frame| u64::from(frame.count)).sum();
    let mut parsed = stream.concat();
    let device_crc = parsed.split_off(parsed.len() - 8);
    put_together(&frames, pages, u32::from_le_bytes(device_crc[..4].try_into().expect("four bytes")))
}

/// Whatever is staged must be harmless to apply, and within the limit.
fn survive(stream: &[Bytes], device: &DeviceState, piece: usize) -> bool {
    let limit = 200_000;
    match stage(stream, PAGES, Some(device.clone()), piece, limit) {
        Ok(staged) => {
            assert!(staged.staged_bytes() <= limit as u64);
            assert!(staged.pages() <= PAGES);
            staged.apply(&Memory::new(PAGES));
            assert!(staged.into_arena().0.capacity() <= limit);
            true
        }
        Err(_) => false,
    }
}

#[test]
fn damaged_streams_never_panic_and_plain_damage_is_always_found() {
    let (first, second, device) = streams();
    let mut random = Random(7);
    let mut staged = 0;
    for round in 0..6000 {
        let stream = if round % 2 == 0 { &first } else { &second };
        let cover = random.below(3) > 0;
        let damaged = damage(&mut random, stream, cover);
        let accepted = survive(&damaged, &device, 1 + random.below(9000));
        assert!(cover || !accepted || damaged.concat() == stream.concat(), "damage was not found in round {round}");
        staged += u32::from(accepted);
    }
    assert!(staged > 50, "the liar never came past the checksums: {staged}");
}

#[test]
fn the_longest_frame_of_zero_records_takes_no_more_than_its_limit() {
    let payload = record::header(0, RecordKind::Zero, u16::MAX).repeat(MAX_PAYLOAD / record::RECORD_HEADER);
    assert_eq!(lie(0, u32::MAX, payload).err(), Some(StageError::Page { page: 0 }));
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_never_staged(bytes in prop::collection::vec(any::<u8>(), 0..600), piece in 1_usize..100) {
        prop_assert!(stage(&[Bytes::from(bytes)], PAGES, None, piece, LIMIT).is_err());
    }

    #[test]
    fn arbitrary_records_never_panic(
        records in prop::collection::vec((0..PAGES, 0_u8..6, 0_u16..40, prop::collection::vec(0_u8..4, 0..40)), 1..6),
    ) {
        let mut payload = Vec::new();
        for (page, kind, n, body) in &records {
            let mut header = record::header(*page, RecordKind::Zero, *n);
            header[4] = *kind;
            payload.extend_from_slice(&header);
            payload.extend_from_slice(body);
        }
        if let Ok(staged) = lie(records[0].0, u32::try_from(records.len()).expect("few"), payload) {
            staged.apply(&Memory::new(PAGES));
        }
    }

    #[test]
    fn a_head_is_what_it_was_before_the_wire(
        generation in any::<u64>(), incarnation in any::<u64>(), epoch in any::<u64>(), binding in any::<bool>(),
        length in 0_u32..1000, base in prop::option::of((any::<u32>(), any::<u32>())), sync in any::<bool>(),
    ) {
        let base = base.map(|(length, crc)| frame::DeviceBase { length, crc });
        let device = (!sync).then_some(frame::DeviceHead { length, base });
        let id = StreamId { vm: [7; 16], generation, incarnation, epoch, binding, sync };
        let head = StreamHead { id, layout_pages: epoch ^ generation, device };
        let bounded = if epoch < Epoch::BOUND.0 { Ok(head) } else { Err(FrameError::Field { field: "epoch" }) };
        prop_assert_eq!(StreamHead::parse(&head.to_bytes()), bounded);
        let trailer = frame::Trailer { pages: epoch, bytes: generation, frames: length, digest: 5, device_crc: 6 };
        prop_assert_eq!(frame::Trailer::parse(&trailer.to_bytes()), Ok(trailer));
    }

    #[test]
    fn a_delta_of_arbitrary_form_never_reaches_past_its_page(body in prop::collection::vec(prop_oneof![Just(0_u8), 0_u8..3], 4..80)) {
        if delta::valid(&body) {
            prop_assert!(delta::runs(&body).all(|(at, bytes)| at + bytes.len() <= PAGE_SIZE));
        }
    }
}
