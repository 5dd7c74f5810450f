//! The pause of an attached QEMU against its floor, and a recording of what the epochs of a real guest hold.
//!
//! The guest is attached by the same back end that the agent uses, with its gate in place, while Redis is under load. Each
//! round runs the guest for a while, captures it, runs it again, and takes the floor by a second monitor of the same QEMU:
//! so each pair has met the same guest and the same machine. Held frames are released at once after each capture.
//!
//! Time of copying: the pages that the capture has just copied are copied once more within this process.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use replicator::demo::lab::Machine;
use vmm_hooks::guest::{Capture, Guest, PauseParts};
use vmm_hooks::layout::{Layout, PAGE_SIZE};
use vmm_hooks::qemu::{AttachOptions, Target, attach};

use crate::monitor::{Floor, Monitor};
use crate::row::{Better, Pairs, Report};
use crate::stage::{Means, Stage};
use crate::stats::{length, median, ms};

/// The pause at most in terms of floor and copy together.
const BUDGET: f64 = 1.25;
/// How long the guest runs before each pause and before each floor.
const RUN: Duration = Duration::from_millis(10);
/// Connections of the load.
const CONNECTIONS: u32 = 50;
/// Rounds before it counts.
const WARM_UP: usize = 10;

/// What a guest had in its memory when it was armed, and the epochs since.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) layout: Layout,
    pub(crate) base: Capture,
    pub(crate) epochs: Vec<Capture>,
}

#[derive(Debug)]
struct Round {
    parts: PauseParts,
    floor: Floor,
    copy: Duration,
    pages: usize,
}

/// Measures the pause, and returns what was recorded meanwhile.
pub(crate) async fn measure(means: &Means, report: &mut Report) -> Result<Recording> {
    let rounds = if means.quick { 150 } else { 600 };
    println!("pause of an attached QEMU: {rounds} rounds");
    let second = means.dir.join("pause/vm/second.sock");
    let more = ["-qmp", &format!("unix:{},server=on,wait=off", second.display())].map(str::to_owned).into();
    let stage = Stage::boot(means, "pause", &Machine { more, ..Machine::default() }).await?;
    let first = stage.lab.vm_control();
    let mut load = stage.load_until_dropped(CONNECTIONS)?;
    let work = tokio::task::spawn_blocking(move || alternate(&first, &second, rounds));
    let (taken, recording) = tokio::select! {
        done = work => done.context("the measuring thread failed")??,
        error = load.ends_by_itself() => return Err(error),
    };
    drop(load);
    rows(&taken, report);
    Ok(recording)
}

fn alternate(first: &Path, second: &Path, rounds: usize) -> Result<(Vec<Round>, Recording)> {
    let mut guest = attach(&Target::QmpSocket(first.to_path_buf()), &AttachOptions::default())?;
    let mut monitor = Monitor::connect(second)?;
    let result = record(&mut guest, &mut monitor, rounds);
    let left = Box::new(guest).detach();
    let result = result?;
    left?;
    Ok(result)
}

fn record(guest: &mut dyn Guest, monitor: &mut Monitor, rounds: usize) -> Result<(Vec<Round>, Recording)> {
    let gate = guest.gate();
    let mut base = Capture { pages: (0..guest.layout().pages()).collect(), ..Capture::default() };
    guest.pause()?;
    guest.arm()?;
    guest.hold_output(1)?;
    guest.read_pages(&base.pages, &mut base.bytes)?;
    guest.resume()?;
    let (mut taken, mut epochs) = (Vec::new(), Vec::new());
    let mut capture = Capture::default();
    let mut copied = Vec::new();
    for (round, epoch) in (0..rounds + WARM_UP).zip(1..) {
        sleep(RUN);
        let mut parts = PauseParts::default();
        let begun = Instant::now();
        guest.pause()?;
        parts.stop = begun.elapsed();
        gate.seal(epoch + 1);
        guest.capture(&mut capture, &mut parts)?;
        let resuming = Instant::now();
        guest.resume()?;
        (parts.resume, parts.total) = (resuming.elapsed(), begun.elapsed());
        gate.release(epoch);
        copied.resize(capture.bytes.len(), 0);
        let copying = Instant::now();
        copied.copy_from_slice(&capture.bytes);
        let copy = copying.elapsed();
        std::hint::black_box(&copied);
        // What happened in the guest is the floor's doing, or the load's.
        drop(guest.events());
        epochs.push(Capture {
            pages: capture.pages.clone(),
            bytes: capture.bytes.clone(),
            device: capture.device.clone(),
            ..Capture::default()
        });
        sleep(RUN);
        let floor = monitor.floor()?;
        if round >= WARM_UP {
            taken.push(Round { parts, floor, copy, pages: capture.pages.len() });
        }
    }
    Ok((taken, Recording { layout: guest.layout().clone(), base, epochs }))
}

fn rows(taken: &[Round], report: &mut Report) {
    let middle = |of: &dyn Fn(&Round) -> f64| median(taken.iter().map(of)).unwrap_or_default();
    println!(
        "  {:.0} dirty pages; stop {:.2} of {:.2} ms, device state {:.2} of {:.2} ms, cont {:.2} of {:.2} ms, \
         harvest {:.2} ms, copy {:.2} ms (within the process {:.3} ms)",
        middle(&|round| length(round.pages)),
        middle(&|round| ms(round.parts.stop)),
        middle(&|round| ms(round.floor.stop)),
        middle(&|round| ms(round.parts.device)),
        middle(&|round| ms(round.floor.save)),
        middle(&|round| ms(round.parts.resume)),
        middle(&|round| ms(round.floor.cont)),
        middle(&|round| ms(round.parts.harvest)),
        middle(&|round| ms(round.parts.copy)),
        middle(&|round| ms(round.copy)),
    );
    // One bad moment hits one of a pair's two halves: the medians of a handful of neighbours are compared instead.
    let mut add = |name: &str, budget, value: &dyn Fn(&Round) -> f64, baseline: &dyn Fn(&Round) -> f64| {
        let mut pairs = Pairs::default();
        for some in taken.chunks(15) {
            if let (Some(value), Some(baseline)) = (median(some.iter().map(value)), median(some.iter().map(baseline))) {
                pairs.push(value, baseline);
            }
        }
        report.add(name, "ms", Better::Lower, budget, &pairs);
    };
    add("qemu pause against stop + save + cont + memcpy", Some(BUDGET), &|round| ms(round.parts.total), &|round| {
        ms(round.floor.total() + round.copy)
    });
    add("harvest of dirty pages, of the pause", None, &|round| ms(round.parts.harvest), &|round| ms(round.parts.total));
    add("copy out of QEMU against memcpy", None, &|round| ms(round.parts.copy), &|round| ms(round.copy));
    let mut speed = Pairs::default();
    for round in taken.iter().filter(|round| round.pages > 0) {
        let gigabytes = length(round.pages * PAGE_SIZE) / 1e9;
        speed.push(gigabytes / round.parts.copy.as_secs_f64(), gigabytes / round.copy.as_secs_f64());
    }
    report.add("copy out of QEMU, speed", "GB/s", Better::Higher, None, &speed);
}
