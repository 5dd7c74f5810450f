//! The page pipeline on recorded epochs of a real guest, against copying the same bytes.
//!
//! Each epoch is first copied into the buffer that the pause would have left it in, so that all that is timed finds it
//! equally warm: the copy, the encoding, the decoding with its checks, and the application to a memfd like the twin's.
//!
//! Promise: a pass counts only if the standby's memory is equal to the guest's afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use replicator::pages::decode::Stager;
use replicator::pages::encode::Encoder;
use replicator::pages::frame::StreamId;
use replicator::pages::shadow::ShadowMode;
use replicator::pages::staged::Arena;
use vmm_hooks::guest::{Capture, TwinMemory as _};
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::sys::memory::BlockMemory;

use crate::pause::Recording;
use crate::row::{Better, Pairs, Report};
use crate::stats::{count, length};

/// Each stage at least, in terms of the speed of memcpy.
const BUDGET: f64 = 0.08;
/// More than any epoch here needs.
const LIMIT: usize = 1 << 30;
/// Pages of one piece of the initial sync.
const CHUNK: usize = 256;

/// What one pass over all epochs took.
#[derive(Debug, Default)]
struct Pass {
    bytes: u64,
    wire: u64,
    copy: Duration,
    encode: Duration,
    decode: Duration,
    apply: Duration,
}

/// Measures on what was recorded.
pub(crate) fn measure(recording: &Recording, quick: bool, report: &mut Report) -> Result<()> {
    let passes = if quick { 3 } else { 9 };
    println!("page pipeline: {passes} passes over {} recorded epochs", recording.epochs.len());
    let [mut encode, mut decode, mut stage, mut wire] = [const { None::<Pairs> }; 4].map(Option::unwrap_or_default);
    for _ in 0..passes {
        let pass = pass(recording)?;
        let speed = |time: Duration| count(pass.bytes) / 1e9 / time.as_secs_f64();
        encode.push(speed(pass.encode), speed(pass.copy));
        decode.push(speed(pass.decode + pass.apply), speed(pass.copy));
        stage.push(speed(pass.decode), speed(pass.copy));
        let epochs = length(recording.epochs.len());
        wire.push(count(pass.wire) / 1e3 / epochs, count(pass.bytes) / 1e3 / epochs);
    }
    report.add("page pipeline, encode against memcpy", "GB/s", Better::Higher, Some(BUDGET), &encode);
    report.add("page pipeline, decode and apply against memcpy", "GB/s", Better::Higher, Some(BUDGET), &decode);
    report.add("page pipeline, decode alone against memcpy", "GB/s", Better::Higher, None, &stage);
    report.add("bytes on the wire against dirty bytes, under load", "kB/epoch", Better::Lower, None, &wire);
    Ok(())
}

fn pass(recording: &Recording) -> Result<Pass> {
    let layout = &recording.layout;
    let mut encoder = Encoder::new(layout.pages(), ShadowMode::Full);
    let memory = BlockMemory::new("bench", layout).context("memory for the standby's side")?;
    for (pages, bytes) in recording.base.pages.chunks(CHUNK).zip(recording.base.bytes.chunks(CHUNK * PAGE_SIZE)) {
        encoder.encode_chunk(&id(0), pages, bytes, &mut |_| {});
        for (&page, content) in pages.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
            memory.write(page, 0, content);
        }
    }
    let mut pass = Pass::default();
    let mut warm = Capture::default();
    let (mut copied, mut frames) = (Vec::new(), Vec::<Bytes>::new());
    let (mut arena, mut device) = (Arena::default(), None);
    for (epoch, number) in recording.epochs.iter().zip(1..) {
        warm.pages.clone_from(&epoch.pages);
        warm.bytes.clone_from(&epoch.bytes);
        warm.device.clone_from(&epoch.device);
        copied.resize(warm.bytes.len() + warm.device.len(), 0);
        let begun = Instant::now();
        copied[..warm.bytes.len()].copy_from_slice(&warm.bytes);
        copied[warm.bytes.len()..].copy_from_slice(&warm.device);
        pass.copy += begun.elapsed();
        std::hint::black_box(&copied);

        frames.clear();
        let begun = Instant::now();
        encoder.encode_epoch(&id(number), &warm, &mut |frame| frames.push(frame))?;
        pass.encode += begun.elapsed();

        let begun = Instant::now();
        let mut stager = Stager::reusing(layout.pages(), device.take(), LIMIT, std::mem::take(&mut arena));
        for frame in &frames {
            stager.push(frame)?;
        }
        let staged = stager.finish()?;
        pass.decode += begun.elapsed();
        ensure!(staged.device_state() == warm.device, "epoch {number}: the device state is not what was sent");

        let begun = Instant::now();
        staged.apply(&memory);
        pass.apply += begun.elapsed();
        pass.bytes += u64::try_from(copied.len())?;
        pass.wire += staged.wire_bytes();
        device = staged.device();
        arena = staged.into_arena();
    }
    check(recording, &memory)?;
    Ok(pass)
}

/// An error unless `memory` holds what the guest's memory held at the last epoch.
fn check(recording: &Recording, memory: &BlockMemory) -> Result<()> {
    let mut expected = recording.base.bytes.clone();
    for epoch in &recording.epochs {
        for (&page, content) in epoch.pages.iter().zip(epoch.bytes.chunks_exact(PAGE_SIZE)) {
            let start = usize::try_from(page)? * PAGE_SIZE;
            expected[start..start + PAGE_SIZE].copy_from_slice(content);
        }
    }
    let mut there = vec![0; PAGE_SIZE];
    for (page, content) in (0..).zip(expected.chunks_exact(PAGE_SIZE)) {
        memory.read(page, &mut there);
        ensure!(there == content, "page {page} of the standby differs from the guest's");
    }
    Ok(())
}

fn id(epoch: u64) -> StreamId {
    StreamId { vm: [7; 16], generation: 1, incarnation: 1, epoch, binding: true, sync: false }
}
