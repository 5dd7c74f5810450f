//! Random guest histories: whatever happens to epochs on the way, the standby ends with the guest's memory.

use proptest::prelude::*;

use super::super::encode::{EncodeStats, Encoder};
use super::super::shadow::ShadowMode;
use super::*;

const PAGES: u64 = 24;

/// How the guest writes one page.
#[derive(Debug, Clone)]
enum Write {
    Words { page: u64, offset: usize, value: u8, words: usize },
    Zero { page: u64 },
    Text { page: u64, seed: u8 },
    Noise { page: u64, seed: u64 },
    Same { page: u64 },
}

/// What becomes of an epoch.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Applied,
    Twice,
    /// The first application dies after so many writes.
    HalfThenWhole(u64),
    /// Never staged; so are this many epochs that were encoded after it.
    Abandoned {
        with: usize,
    },
}

#[derive(Debug, Clone)]
struct Epoch {
    writes: Vec<Write>,
    device: (usize, usize, u8),
    fate: Fate,
    piece: usize,
    chunk: Option<(u64, u64)>,
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let page = 0..PAGES;
    let write = prop_oneof![
        // Few values, so that pages come back to what they were.
        6 => (page.clone(), 0..4000_usize, 0..3_u8, 1..12_usize)
            .prop_map(|(page, offset, value, words)| Write::Words { page, offset, value, words }),
        1 => (page.clone(), 0..1_usize, 0..3_u8, Just(500_usize))
            .prop_map(|(page, offset, value, words)| Write::Words { page, offset, value, words }),
        2 => page.clone().prop_map(|page| Write::Zero { page }),
        2 => (page.clone(), 0..3_u8).prop_map(|(page, seed)| Write::Text { page, seed }),
        2 => (page.clone(), any::<u64>()).prop_map(|(page, seed)| Write::Noise { page, seed }),
        1 => page.prop_map(|page| Write::Same { page }),
    ];
    prop::collection::vec(write, 0..14)
}

fn epochs() -> impl Strategy<Value = Vec<Epoch>> {
    let fate = prop_oneof![
        3 => Just(Fate::Applied),
        1 => Just(Fate::Twice),
        2 => (0..200_u64).prop_map(Fate::HalfThenWhole),
        2 => (0..3_usize).prop_map(|with| Fate::Abandoned { with }),
    ];
    let device = (0..9000_usize, 1..20_000_usize, any::<u8>());
    let piece = prop_oneof![1..60_usize, 1000..70_000_usize];
    let chunk = prop::option::weighted(0.3, (0..PAGES, 0..20_u64));
    let epoch = (writes(), device, fate, piece, chunk).prop_map(|(writes, device, fate, piece, chunk)| Epoch {
        writes,
        device,
        fate,
        piece,
        chunk,
    });
    prop::collection::vec(epoch, 1..12)
}

fn modes() -> impl Strategy<Value = ShadowMode> {
    prop_oneof![
        Just(ShadowMode::Full),
        (0..20 * 4096_u64).prop_map(|bytes| ShadowMode::Bounded { bytes }),
        Just(ShadowMode::Off)
    ]
}

fn perform(machine: &mut Machine, write: &Write) {
    match *write {
        Write::Words { page, offset, value, words } => {
            let end = (offset + words * 8).min(PAGE_SIZE);
            machine.write(page, offset, &vec![value; end - offset]);
        }
        Write::Zero { page } => machine.write(page, 0, &[0; PAGE_SIZE]),
        Write::Text { page, seed } => machine.write(page, 0, [seed, 1, 2, 3, seed, 5, 6, 7].repeat(512).as_slice()),
        Write::Noise { page, seed } => machine.write(page, 0, &noise(seed, PAGE_SIZE)),
        Write::Same { page } => machine.dirty.insert(page),
    }
}

/// The tallies must account for each captured page and each byte.
pub(super) fn check_stats(stats: &EncodeStats, pages: usize, stream: &[Bytes]) {
    let tallies = [stats.zero, stats.same, stats.delta, stats.lz4, stats.raw];
    assert_eq!(tallies.iter().map(|tally| tally.pages).sum::<u64>(), pages as u64);
    assert_eq!(stats.wire_bytes, stream.iter().map(Bytes::len).sum::<usize>() as u64);
    assert_eq!(stats.frames, stream.len() as u64);
    let records = tallies.iter().map(|tally| tally.bytes).sum::<u64>() + stats.device_wire_bytes + stats.disk.bytes;
    let framing = stats.frames * crate::pages::frame::FRAME_HEADER as u64;
    let fixed = (crate::pages::frame::HEAD_BYTES + crate::pages::frame::TRAILER_BYTES) as u64;
    assert_eq!(records + framing + fixed, stats.wire_bytes);
}

fn encode(encoder: &mut Encoder, number: u64, capture: &Capture) -> Vec<Bytes> {
    let mut stream = Vec::new();
    let stats = encoder.encode_epoch(&id(number), capture, &mut |frame| stream.push(frame)).expect("small");
    check_stats(&stats, capture.pages.len(), &stream);
    stream
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn the_standby_has_the_guests_memory_after_each_committed_epoch(mode in modes(), epochs in epochs()) {
        let mut machine = Machine::new(PAGES);
        let mut encoder = Encoder::new(PAGES, mode);
        let memory = Memory::new(PAGES);
        let mut device = None;
        let mut number = 0;
        for epoch in epochs {
            epoch.writes.iter().for_each(|write| perform(&mut machine, write));
            let (at, length, value) = epoch.device;
            machine.device.resize(length, 0);
            if let Some(byte) = machine.device.get_mut(at) { *byte = value; }
            number += 1;
            if let Some((first, count)) = epoch.chunk {
                // A piece of the initial sync. Its pages stay dirty; what follows must be right all the same.
                let pages: Vec<u64> = (first..(first + count).min(PAGES)).collect();
                let mut stream = Vec::new();
                let bytes = machine.bytes_of(&pages);
                let stats = encoder.encode_chunk(&id(number), &pages, &bytes, &mut |frame| stream.push(frame));
                check_stats(&stats, pages.len(), &stream);
                let staged = stage(&stream, PAGES, device.clone(), epoch.piece, LIMIT).expect("a good stream");
                prop_assert!(staged.id().sync && staged.device_state().is_empty());
                staged.apply(&memory);
            }
            let capture = machine.capture();
            let stream = encode(&mut encoder, number, &capture);
            if let Fate::Abandoned { with } = epoch.fate {
                let mut lost = page_set(PAGES, &capture.pages);
                for later in 0..with {
                    perform(&mut machine, &Write::Text { page: later as u64, seed: 9 });
                    number += 1;
                    let capture = machine.capture();
                    encode(&mut encoder, number, &capture);
                    lost.union_with(&page_set(PAGES, &capture.pages));
                }
                encoder.forget(&lost);
                machine.dirty.union_with(&lost);
                continue;
            }
            let staged = stage(&stream, PAGES, device.clone(), epoch.piece, LIMIT).expect("a good stream");
            match epoch.fate {
                Fate::Twice => staged.apply(&memory),
                Fate::HalfThenWhole(writes) => {
                    memory.die_after(Some(writes));
                    staged.apply(&memory);
                    memory.die_after(None);
                }
                Fate::Applied | Fate::Abandoned { .. } => {}
            }
            staged.apply(&memory);
            prop_assert!(memory.bytes() == machine.memory, "memory differs after epoch {}", number);
            prop_assert_eq!(staged.epoch(), number);
            prop_assert!(staged.device_state() == machine.device, "device state differs");
            prop_assert_eq!(staged.wire_bytes(), stream.iter().map(Bytes::len).sum::<usize>() as u64);
            device = staged.device();
        }
    }
}

/// One epoch of a fresh machine, through everything.
fn one(machine: &mut Machine, encoder: &mut Encoder, number: u64) -> EncodeStats {
    let capture = machine.capture();
    let mut frames = Vec::new();
    encoder.encode_epoch(&id(number), &capture, &mut |frame| frames.push(frame)).expect("small")
}

#[test]
fn each_page_is_sent_the_cheapest_way() {
    let mut machine = Machine::new(PAGES);
    let mut encoder = Encoder::new(PAGES, ShadowMode::Full);
    machine.write(0, 0, &noise(1, PAGE_SIZE));
    machine.write(1, 0, &[1, 2, 3, 4].repeat(1024));
    let stats = one(&mut machine, &mut encoder, 1);
    assert_eq!((stats.raw.pages, stats.lz4.pages, stats.zero.pages), (1, 1, PAGES - 2));
    assert_eq!(stats.zero.bytes, 8, "a run of zero pages is one record");
    machine.write(0, 100, &[7; 8]);
    machine.write(2, 0, &[7; 8]);
    machine.dirty.insert(1);
    machine.dirty.insert(3);
    let stats = one(&mut machine, &mut encoder, 2);
    assert_eq!((stats.delta.pages, stats.same.pages, stats.raw.pages), (2, 2, 0));
    assert_eq!(stats.delta.bytes, (8 + 4 + 16) + (8 + 4 + 8));
    assert_eq!(stats.device_wire_bytes, 0, "a device state that did not change costs nothing");
}

#[test]
fn lz4_is_hardly_tried_while_it_does_not_pay_and_is_found_again_when_it_does() {
    let mut machine = Machine::new(256);
    let mut encoder = Encoder::new(256, ShadowMode::Off);
    (0..256).for_each(|page| machine.write(page, 0, &noise(page, PAGE_SIZE)));
    assert_eq!(one(&mut machine, &mut encoder, 1).raw.pages, 256);
    let mut packed = Vec::new();
    for epoch in 2..5 {
        (0..256).for_each(|page| machine.write(page, 0, &[1, 2, 3, 4].repeat(1024)));
        packed.push(one(&mut machine, &mut encoder, epoch).lz4.pages);
    }
    assert!(packed[0] < 250, "it gave up on LZ4 while pages were noise: {packed:?}");
    assert_eq!(packed[2], 256, "it found that LZ4 pays again: {packed:?}");
}

#[test]
fn frames_are_bounded_and_their_memory_is_used_again() {
    let pages = 300;
    let mut machine = Machine::new(pages);
    let mut encoder = Encoder::new(pages, ShadowMode::Off);
    (0..pages).for_each(|page| machine.write(page, 0, &noise(page, PAGE_SIZE)));
    let capture = machine.capture();
    let mut places = std::collections::BTreeSet::new();
    for epoch in 0..20 {
        let mut frames = Vec::new();
        encoder.encode_epoch(&id(epoch), &capture, &mut |frame| frames.push(frame)).expect("small");
        assert!(
            frames.iter().all(|frame| frame.len() <= crate::pages::frame::FRAME_HEADER + crate::pages::MAX_PAYLOAD)
        );
        assert!(frames.len() < 12, "300 raw pages need five full frames: {}", frames.len());
        places.insert(frames[0].as_ptr() as usize);
    }
    assert!(places.len() < 20, "each epoch had new memory");
}

#[test]
fn a_device_state_that_is_too_large_is_refused_and_changes_nothing() {
    let mut machine = Machine::new(PAGES);
    let mut encoder = Encoder::new(PAGES, ShadowMode::Full);
    one(&mut machine, &mut encoder, 1);
    let capture = Capture { device: vec![0; crate::pages::MAX_DEVICE_BYTES + 1], ..Capture::default() };
    let refused = encoder.encode_epoch(&id(2), &capture, &mut |_| panic!("a frame of a refused epoch"));
    assert!(refused.is_err());
    assert_eq!(one(&mut machine, &mut encoder, 2).device_wire_bytes, 0, "the last sent device state is still known");
}
