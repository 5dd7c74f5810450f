//! The pause of a microVM in its parts, and its epochs a second: a machine in a process of its own, with the tracker and the capture that the
//! agent uses and nothing else in the way.
//!
//! A pause is promised in terms of a memcpy of its dirty pages, and two of those are measured beside it. One is of the very pages, out of the
//! guest's memory, by one thread: in every other epoch, so that they lie where the guest has left them, as they do for a capture. The other is of as
//! many pages that this processor has just copied: in its caches, as far as they fit there. No first copy of what another processor wrote
//! can be as fast.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use vmm_hooks::guest::{After, Capture, Guest, PauseParts, TwinHost, TwinMemory};
use vmm_hooks::kvm::pilot::abi;
use vmm_hooks::kvm::process::guest::Boot;
use vmm_hooks::kvm::process::{Microvm, ProcessGuest, Program, attach};
use vmm_hooks::kvm::{Dirty, GateBounds, KvmTwinHost, PilotOptions, Spec};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};
use vmm_hooks::sys::sched::{Urgency, realtime};

use crate::row::{Better, Pairs, Report};
use crate::stats::{length, median, ms};

/// What a pause may take beside its copy, in milliseconds, and how many copies.
const FLOOR_MS: f64 = 0.1;
const COPIES: f64 = 1.5;
/// Dirty pages of an epoch.
const SIZES: [u32; 4] = [10, 100, 1000, 10_000];
/// Epochs a second, and dirty pages of each, that are promised.
const RATE: f64 = 1000.0;
const RATE_PAGES: u32 = 50;
/// Bound on what the pilot is ordered.
const PATIENCE: Duration = Duration::from_secs(60);
/// Epochs of each kind before they count.
const WARM_UP: usize = 5;
/// Time between two looks at what the guest has written.
const LOOK: Duration = Duration::from_micros(20);
/// Most steps of the pilot's worker in a millisecond.
const WORK_MAX: u32 = 500;

/// One pause, and copies of what it copied.
struct Pause {
    parts: PauseParts,
    pages: usize,
    /// Of the same pages, as the guest left them an epoch later.
    copy: Duration,
    /// Of as many pages that were copied just before.
    again: Duration,
}

/// What was measured.
pub(crate) struct Measured {
    pauses: Vec<(u32, Dirty, Result<Vec<Pause>, String>)>,
    /// Epochs a second, and pages in each.
    sustained: (f64, f64),
    seconds: u64,
}

/// Measures, on a thread as urgent as the one that pauses for the agent.
pub(crate) fn measure(pilot: &Path, understudy: &Path, quick: bool) -> Result<Measured> {
    let measured = std::thread::scope(|scope| {
        let urgent = scope.spawn(|| {
            if let Err(error) = realtime(Urgency::Pause) {
                println!("  without real-time priority, which an agent has: {error}");
            }
            measure_here(pilot, understudy, quick)
        });
        urgent.join()
    });
    measured.ok().context("the measuring thread failed")?
}

fn measure_here(pilot: &Path, understudy: &Path, quick: bool) -> Result<Measured> {
    // As the agent starts it.
    let program = Program::new(understudy, &["microvm"]);
    let (epochs, seconds) = if quick { (100, 5) } else { (400, 60) };
    let mut taken = Vec::new();
    for dirty in [Dirty::Bitmap, Dirty::Ring] {
        for size in SIZES {
            taken.push((size, dirty, pauses(&program, pilot, size, dirty, epochs)?));
        }
    }
    Ok(Measured { pauses: taken, sustained: sustained(&program, pilot, Duration::from_secs(seconds))?, seconds })
}

/// The rows of it.
pub(crate) fn rows(measured: &Measured, report: &mut Report) {
    for (size, dirty, pauses) in &measured.pauses {
        match pauses {
            Ok(pauses) => pause_rows(*size, *dirty, pauses, report),
            Err(why) => report.skip(&format!("kvm pause, {size} dirty pages, {}", tracker(*dirty)), why),
        }
    }
    let ((rate, each), seconds) = (measured.sustained, measured.seconds);
    let name = format!("kvm epochs a second over {seconds} s");
    report.add(&name, "epochs/s", Better::Higher, Some(1.0), &Pairs::one(rate, RATE));
    let name = format!("kvm dirty pages in each of them, of a guest that writes {RATE_PAGES} over and over");
    report.add(&name, "pages", Better::Higher, Some(1.0), &Pairs::one(each, f64::from(RATE_PAGES)));
}

fn tracker(dirty: Dirty) -> &'static str {
    match dirty {
        Dirty::Bitmap => "by bitmap",
        Dirty::Ring => "by rings",
    }
}

/// A machine whose second vCPU writes `pages` pages, one after the other, `rate` a millisecond or, with 0, without pause, and is tracked.
fn writer(program: &Program, pilot: &Path, pages: u32, rate: u32, dirty: Dirty) -> Result<(Microvm, ProcessGuest)> {
    let spec = Spec { name: "bench".to_owned(), memory: 128 << 20, cpus: 2, net: None, disks: Vec::new(), dirty };
    let boot = Boot::Pilot(pilot.to_owned(), PilotOptions::default());
    let machine = Microvm::start(program, spec, &boot, None, GateBounds::default())?;
    machine.resume()?;
    let first = u32::try_from(abi::FREE / PAGE_SIZE as u64)?;
    let order = [abi::order::WORK, 1, first, pages, u32::try_from(abi::SEQUENTIAL)?, rate];
    machine.order(&order, PATIENCE)?;
    let mut guest = attach(&machine)?;
    guest.pause()?;
    guest.arm()?;
    guest.hold_output(1)?;
    guest.resume()?;
    Ok((machine, guest))
}

/// The steps that the worker has done.
fn done(guest: &mut ProcessGuest, page: &mut Vec<u8>) -> Result<u64> {
    guest.read_pages(&[abi::WORKERS / PAGE_SIZE as u64 + 1], page)?;
    let start = usize::try_from(abi::worker::DONE * 8)?;
    Ok(u64::from_le_bytes(page[start..start + 8].try_into()?))
}

/// One pause and capture.
fn capture(guest: &mut ProcessGuest, epoch: u64, capture: &mut Capture) -> Result<PauseParts> {
    let mut parts = PauseParts::default();
    let begun = Instant::now();
    guest.capture_epoch(false, epoch + 1, After::Run, capture, &mut parts)?;
    let resuming = Instant::now();
    guest.resume()?;
    parts.end(begun, resuming);
    Ok(parts)
}

/// Pauses of a guest that writes this many pages in between; a reason if this host cannot find its dirty pages so.
fn pauses(
    program: &Program,
    pilot: &Path,
    size: u32,
    dirty: Dirty,
    epochs: usize,
) -> Result<Result<Vec<Pause>, String>> {
    println!("pause of a microVM with {size} dirty pages, {}: {epochs} epochs", tracker(dirty));
    let (machine, mut guest) = writer(program, pilot, size, size.min(WORK_MAX), dirty)?;
    let note = machine.dirty_note();
    let taken = match note {
        None => Ok(alternate(&mut guest, size, epochs)?),
        Some(why) => Err(why),
    };
    Box::new(guest).detach()?;
    machine.fence().fence()?;
    Ok(taken)
}

/// Captures, and in every other epoch nothing but the copy.
fn alternate(guest: &mut ProcessGuest, size: u32, epochs: usize) -> Result<Vec<Pause>> {
    let (mut taken, mut page, mut epoch) = (Vec::new(), Vec::new(), Capture::default());
    let (mut dirty, mut pages) = (PageSet::empty(guest.layout().pages()), Vec::new());
    let (mut copied, mut again) = (Vec::new(), Vec::new());
    for (number, at) in (0..epochs + WARM_UP).zip(1..) {
        written(guest, size, &mut page)?;
        let parts = capture(guest, at, &mut epoch)?;
        written(guest, size, &mut page)?;
        guest.pause()?;
        dirty.clear();
        guest.harvest(&mut dirty)?;
        pages.clear();
        pages.extend(dirty.iter());
        let copying = Instant::now();
        guest.read_pages(&pages, &mut copied)?;
        let copy = copying.elapsed();
        guest.resume()?;
        again.resize(copied.len(), 0);
        let copying = Instant::now();
        again.copy_from_slice(&copied);
        let again_took = copying.elapsed();
        std::hint::black_box(&again);
        if number >= WARM_UP {
            taken.push(Pause { parts, pages: epoch.pages.len(), copy, again: again_took });
        }
    }
    Ok(taken)
}

/// Waits until the worker has written all of its pages once more.
fn written(guest: &mut ProcessGuest, size: u32, page: &mut Vec<u8>) -> Result<()> {
    let (before, deadline) = (done(guest, page)?, Instant::now() + PATIENCE);
    while done(guest, page)? < before + u64::from(size) {
        if Instant::now() > deadline {
            bail!("the pilot's worker stands");
        }
        // This thread comes before the guest's: it has to let them run.
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn pause_rows(size: u32, dirty: Dirty, taken: &[Pause], report: &mut Report) {
    let middle = |of: &dyn Fn(&Pause) -> f64| median(taken.iter().map(of)).unwrap_or_default();
    let us = |time: Duration| ms(time) * 1e3;
    let found = tracker(dirty);
    println!(
        "  {:.0} dirty pages, {found}; pause {:.0} us: stop {:.0}, harvest {:.0}, device state {:.0}, copy {:.0}, resume {:.0}; \
         a memcpy of them {:.0}, and once more {:.0}",
        middle(&|pause| length(pause.pages)),
        middle(&|pause| us(pause.parts.total)),
        middle(&|pause| us(pause.parts.stop)),
        middle(&|pause| us(pause.parts.harvest)),
        middle(&|pause| us(pause.parts.device)),
        middle(&|pause| us(pause.parts.copy)),
        middle(&|pause| us(pause.parts.resume)),
        middle(&|pause| us(pause.copy)),
        middle(&|pause| us(pause.again)),
    );
    let mut add = |what: &str, copy: &dyn Fn(&Pause) -> Duration| {
        let mut pairs = Pairs::default();
        // As for QEMU: the medians of a handful of neighbours.
        for some in taken.chunks(15) {
            let value = median(some.iter().map(|pause| ms(pause.parts.total)));
            if let (Some(value), Some(copy)) = (value, median(some.iter().map(|pause| ms(copy(pause))))) {
                pairs.push(value, FLOOR_MS + COPIES * copy);
            }
        }
        let name = format!("kvm pause, {size} dirty pages, {found}, against 100 us + 1.5 x {what}");
        report.add(&name, "ms", Better::Lower, Some(1.0), &pairs);
    };
    add("memcpy of them", &|pause| pause.copy);
    add("memcpy within the caches", &|pause| pause.again);
}

/// Epochs a second over `length`: captured each millisecond, with the pages that the guest wrote since, and put into a twin's memory by another
/// thread. Epochs a second, and pages in each.
fn sustained(program: &Program, pilot: &Path, length: Duration) -> Result<(f64, f64)> {
    println!("epochs of a microVM with {RATE_PAGES} dirty pages: {} s", length.as_secs());
    let (machine, mut guest) = writer(program, pilot, RATE_PAGES, 0, Dirty::Bitmap)?;
    let mut twin = KvmTwinHost::default().prepare("bench-twin", guest.recipe(), guest.layout(), &[])?;
    let memory: Arc<dyn TwinMemory> = twin.memory();
    let (captured, epochs) = std::sync::mpsc::channel::<Capture>();
    let (spare, spares) = std::sync::mpsc::channel();
    let applier = std::thread::spawn(move || {
        let (mut pages, mut whole) = (0, 0_u32);
        for capture in epochs {
            for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks(PAGE_SIZE)) {
                memory.write(page, 0, bytes);
            }
            pages += capture.pages.len();
            whole += u32::from(capture.pages.len() >= RATE_PAGES as usize);
            // Nobody takes it at the end.
            let _ = spare.send(capture);
        }
        (pages, whole)
    });
    let (begun, mut taken) = (Instant::now(), 0_u32);
    while begun.elapsed() < length {
        let mut epoch = spares.try_recv().unwrap_or_default();
        capture(&mut guest, u64::from(taken) + 1, &mut epoch)?;
        guest.gate().release(u64::from(taken) + 1);
        captured.send(epoch).ok().context("the applying thread has ended")?;
        taken += 1;
        // Not faster than what is promised: a guest that is always paused writes nothing.
        let next = begun + Duration::from_micros(990) * taken;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let took = begun.elapsed();
    drop(captured);
    let (pages, whole) = applier.join().ok().context("the applying thread failed")?;
    let each = self::length(pages) / f64::from(taken);
    println!(
        "  {taken} epochs in {:.1} s, {each:.1} pages each; {whole} of them with {RATE_PAGES} or more",
        took.as_secs_f64()
    );
    if !twin.alive() {
        bail!("the twin has ended");
    }
    twin.destroy()?;
    Box::new(guest).detach()?;
    machine.fence().fence()?;
    Ok((f64::from(taken) / took.as_secs_f64(), each))
}
