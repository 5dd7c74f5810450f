//! Target `stream`: any bytes as a stream, from a peer who knows how to make checksums.
//!
//! The first byte says what is mended before the stager sees it: the CRC of each frame, and the trailer's totals. Holds:
//! in whatever pieces it comes, the stager says the same; and what it accepts, a second reader that shares no code
//! with it finds whole and understands alike.

use std::sync::Arc;

use vmm_hooks::disk::{DiskChange, DiskWrite};
use vmm_hooks::layout::PAGE_SIZE;

use super::Memory;
use crate::pages::decode::{StageError, Stager};
use crate::pages::frame::FRAME_HEADER;
use crate::pages::staged::{DeviceState, StagedEpoch};

const PAGES: usize = 6;
const LIMIT: usize = 64 << 10;
const HEAD: u8 = 1;
const RECORDS: u8 = 2;
const DEVICE: u8 = 3;
const TRAILER: u8 = 4;
const DISK: u8 = 5;
/// Bytes of the disks.
const DISKS: [u64; 2] = [4096, 512];

pub(super) fn run(bytes: &[u8]) {
    let Some((&mend, rest)) = bytes.split_first() else { return };
    let mut stream = rest.to_vec();
    if mend & 1 != 0 {
        mend_frames(&mut stream, mend & 2 != 0);
    }
    let previous: DeviceState = Arc::new((0_u8..100).cycle().take(PAGE_SIZE + 100).collect());
    let held = (mend & 4 != 0).then(|| previous.clone());
    let whole = stage(&stream, stream.len().max(1), held.clone());
    let pieces = stage(&stream, usize::from(mend >> 3) + 1, held.clone());
    match (whole, pieces) {
        (Err(one), Err(other)) => assert_eq!(one, other, "the error depends on the pieces"),
        (Ok(one), Ok(other)) => {
            let (first, second) = (Memory::new(PAGES), Memory::new(PAGES));
            one.apply(&first);
            other.apply(&second);
            assert!(first.bytes() == second.bytes() && one.device_state() == other.device_state());
            assert!(one.staged_bytes() <= LIMIT as u64);
            assert_eq!(one.disk(), other.disk());
            let (memory, device, disks) = read_again(&stream, held.as_deref().map_or(&[], Vec::as_slice));
            assert!(memory == first.bytes(), "the memory is not what the stream says");
            assert!(device == one.device_state(), "the device state is not what the stream says");
            assert!(disks == play(one.disk()), "the disks are not what the stream says");
            assert_eq!(one.wire_bytes(), stream.len() as u64, "bytes that nobody looked at");
        }
        (one, other) => panic!("accepted in some pieces and not in others: {one:?} and {other:?}"),
    }
}

fn stage(stream: &[u8], piece: usize, held: Option<DeviceState>) -> Result<StagedEpoch, StageError> {
    let mut stager = Stager::new(PAGES as u64, held, LIMIT).with_disks(Arc::from(DISKS));
    let mut outcome = Ok(());
    for piece in stream.chunks(piece) {
        let next = stager.push(piece);
        assert!(outcome.is_ok() || next == outcome, "an error that is not final");
        outcome = next;
    }
    let end = stager.finish();
    assert!(outcome.is_ok() || end.is_err(), "staged after an error");
    end
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    let word: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
    usize::try_from(u32::from_le_bytes(word)).expect("64 bits")
}

/// Walks the frames as far as their lengths make sense and makes their CRCs right; with `totals`, the trailer as well.
fn mend_frames(stream: &mut [u8], totals: bool) {
    let (mut at, mut pages, mut frames, mut digest) = (0, 0_u64, 0_u32, crc32fast::Hasher::new());
    while stream.len() >= at + FRAME_HEADER {
        let end = at + FRAME_HEADER + u32_at(stream, at + 20);
        if end > stream.len() {
            return;
        }
        let kind = stream[at + 5];
        if kind == TRAILER && totals && end - at >= FRAME_HEADER + 24 {
            let body = at + FRAME_HEADER;
            stream[body..body + 8].copy_from_slice(&pages.to_le_bytes());
            stream[body + 8..body + 16].copy_from_slice(&(at as u64).to_le_bytes());
            stream[body + 16..body + 20].copy_from_slice(&frames.to_le_bytes());
            let sum = digest.clone().finalize();
            stream[body + 20..body + 24].copy_from_slice(&sum.to_le_bytes());
        }
        let crc = frame_crc(&stream[at..end]).to_le_bytes();
        stream[at + 24..at + FRAME_HEADER].copy_from_slice(&crc);
        if kind == RECORDS {
            pages += u32_at(stream, at + 16) as u64;
        }
        digest.update(&crc);
        frames += 1;
        at = end;
    }
}

fn frame_crc(frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..24]);
    crc.update(&frame[FRAME_HEADER..]);
    crc.finalize()
}

/// The disks after these writes.
fn play(writes: &[DiskWrite]) -> Vec<Vec<u8>> {
    let mut disks = fresh_disks();
    for write in writes {
        let start = usize::try_from(write.offset).expect("small");
        let end = start + usize::try_from(write.bytes()).expect("small");
        let target = &mut disks[usize::try_from(write.disk).expect("small")][start..end];
        match &write.change {
            DiskChange::Data(data) => target.copy_from_slice(data),
            DiskChange::Zero(_) => target.fill(0),
        }
    }
    disks
}

fn fresh_disks() -> Vec<Vec<u8>> {
    DISKS.iter().map(|&bytes| vec![0xA5; usize::try_from(bytes).expect("small")]).collect()
}

/// A second reader for an accepted stream: checks what the stager must have checked, and gives memory, device state and disks.
fn read_again(stream: &[u8], previous: &[u8]) -> (Vec<u8>, Vec<u8>, Vec<Vec<u8>>) {
    let mut memory = vec![0xA5; PAGES * PAGE_SIZE];
    let (mut device, mut device_length, mut kinds) = (Vec::new(), 0, Vec::new());
    let mut disks = fresh_disks();
    let (mut at, mut pages, mut digest) = (0, 0, crc32fast::Hasher::new());
    while at < stream.len() {
        let end = at + FRAME_HEADER + u32_at(stream, at + 20);
        let (frame, kind) = (&stream[at..end], stream[at + 5]);
        let body = &frame[FRAME_HEADER..];
        assert_eq!(u32_at(frame, 24), frame_crc(frame) as usize, "a frame with a wrong CRC was accepted");
        assert_eq!(&frame[..5], b"UPGE\x01");
        match kind {
            HEAD => {
                device_length = u32_at(body, 52);
                let flags = u32_at(body, 48);
                device = if flags & 8 != 0 { previous.to_vec() } else { Vec::new() };
                device.resize(device_length.next_multiple_of(PAGE_SIZE), 0);
            }
            RECORDS => pages += records(body, &mut memory),
            DEVICE => drop(records(body, &mut device)),
            DISK => writes(body, &mut disks),
            _ => {
                assert_eq!(u32_at(body, 0), pages, "pages were lost or made up");
                assert_eq!(u32_at(body, 8), at, "bytes were lost or made up");
                assert_eq!(u32_at(body, 16), kinds.len(), "frames were lost or made up");
                assert_eq!(u32_at(body, 20), digest.clone().finalize() as usize);
                assert_eq!(end, stream.len(), "the trailer is not the end");
                if device_length > 0 {
                    assert_eq!(u32_at(body, 24), crc32fast::hash(&device[..device_length]) as usize);
                }
            }
        }
        digest.update(&frame[24..FRAME_HEADER]);
        // Disk frames come right after the head.
        kinds.push(if kind == DISK { HEAD } else { kind });
        at = end;
    }
    assert!(kinds.is_sorted() && kinds.first() == Some(&HEAD) && kinds.last() == Some(&TRAILER), "{kinds:?}");
    device.truncate(device_length);
    (memory, device, disks)
}

/// Plays disk writes over `disks`.
fn writes(mut rest: &[u8], disks: &mut [Vec<u8>]) {
    while !rest.is_empty() {
        let (disk, kind, at, length) = (u32_at(rest, 0), rest[4], u32_at(rest, 8), u32_at(rest, 16));
        rest = &rest[24..];
        let target = &mut disks[disk][at..at + length];
        if kind == 2 {
            target.fill(0);
        } else {
            target.copy_from_slice(&rest[..length]);
            rest = &rest[length..];
        }
    }
}

/// Plays the records over `into`; gives the number of pages.
fn records(mut rest: &[u8], into: &mut [u8]) -> usize {
    let mut pages = 0;
    while !rest.is_empty() {
        let (page, kind) = (u32_at(rest, 0), rest[4]);
        let n = usize::from(u16::from_le_bytes([rest[6], rest[7]]));
        rest = &rest[8..];
        if kind == 1 {
            into[page * PAGE_SIZE..(page + n) * PAGE_SIZE].fill(0);
            pages += n;
            continue;
        }
        let (mut body, after) = rest.split_at(n);
        let target = &mut into[page * PAGE_SIZE..(page + 1) * PAGE_SIZE];
        match kind {
            2 => {
                while !body.is_empty() {
                    let first = usize::from(u16::from_le_bytes([body[0], body[1]])) * 8;
                    let length = usize::from(u16::from_le_bytes([body[2], body[3]])) * 8;
                    target[first..first + length].copy_from_slice(&body[4..4 + length]);
                    body = &body[4 + length..];
                }
            }
            3 => target.copy_from_slice(&lz4_flex::block::decompress(body, PAGE_SIZE).expect("it was unpacked before")),
            _ => target.copy_from_slice(body),
        }
        rest = after;
        pages += 1;
    }
    pages
}
