//! What a pause of the microVM costs, in its parts, by threads of this process and in a process of its own, and that it allocates nothing here; how many
//! epochs a second it makes.
//!
//! Alone in its program: every allocation of the process is counted. The figures are printed, not judged: `cargo test` does not have the
//! machine for itself. `UNDERSTUDY_LONG` measures more.

use std::alloc::System;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use vmm_hooks::guest::{After, Capture, Fence, Guest, PauseParts, TwinHost};
use vmm_hooks::kvm::pilot::abi;
use vmm_hooks::kvm::process::guest::Boot;
use vmm_hooks::kvm::process::{self, Microvm, Program};
use vmm_hooks::kvm::{Dirty, GateBounds, KvmTwinHost, Machine, PilotOptions, Spec, attach, host};
use vmm_hooks::layout::PAGE_SIZE;

#[global_allocator]
static ALLOCATIONS: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const PILOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/pilot/pilot");
const PATIENCE: Duration = Duration::from_secs(60);
/// Epochs of each size.
const EPOCHS: usize = 11;
/// Dirty pages of an epoch.
const SIZES: [u32; 2] = [10, 1000];
/// And with `UNDERSTUDY_LONG`.
const MORE: [u32; 2] = [100, 10_000];
/// Pages that are written in a minute of epochs, and an epoch's length.
const EPOCH_PAGES: u32 = 50;
const EPOCH: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Most steps of the worker in a millisecond: on few cores it must not be in the way of what is measured.
const RATE_MAX: u32 = 500;

/// The steps that the worker has done.
fn done(guest: &mut dyn Guest, page: &mut Vec<u8>) -> u64 {
    guest.read_pages(&[abi::WORKERS / PAGE_SIZE as u64 + 1], page).expect("it is there");
    let start = usize::try_from(abi::worker::DONE * 8).expect("inside a page");
    u64::from_le_bytes(page[start..start + 8].try_into().expect("eight"))
}

fn median(values: impl Iterator<Item = Duration>) -> Duration {
    let mut values: Vec<Duration> = values.collect();
    values.sort_unstable();
    values[values.len() / 2]
}

/// Copies so many pages from one place to another.
fn memcpy(pages: usize) -> Duration {
    let from = vec![7_u8; pages * PAGE_SIZE];
    let mut to = vec![0_u8; pages * PAGE_SIZE];
    median((0..EPOCHS).map(|_| {
        let start = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        start.elapsed()
    }))
}

#[test]
fn a_pause_allocates_nothing() {
    let kvm = match host() {
        Ok(kvm) => kvm,
        Err(error) => return println!("skipped: no /dev/kvm: {error}"),
    };
    if !Path::new(PILOT).exists() {
        return println!("skipped: the pilot guest is not built; cargo xtask setup");
    }
    let more = std::env::var_os("UNDERSTUDY_LONG").is_some();
    let sizes = SIZES.into_iter().chain(MORE.into_iter().filter(|_| more));
    for (size, process) in sizes.flat_map(|size| [(size, false), (size, true)]) {
        let (machine, mut guest) = writer(&kvm, size, size.min(RATE_MAX), process);
        let guest = guest.as_mut();
        let (mut capture, mut page) = (Capture::default(), Vec::new());
        let mut pauses: Vec<(PauseParts, usize)> = Vec::with_capacity(EPOCHS + 2);
        // The first two make room.
        for epoch in 0..EPOCHS + 2 {
            // Until all pages have been written again.
            let (before, deadline) = (done(guest, &mut page), Instant::now() + PATIENCE);
            while done(guest, &mut page) < before + u64::from(size) {
                assert!(Instant::now() < deadline, "the worker stands");
                std::thread::yield_now();
            }
            let mut parts = PauseParts::default();
            let counted = Region::new(ALLOCATIONS);
            let start = Instant::now();
            guest.capture_epoch(false, epoch as u64, After::Run, &mut capture, &mut parts).expect("it runs");
            let resuming = Instant::now();
            guest.resume().expect("it stands");
            parts.end(start, resuming);
            let counted = counted.change();
            if epoch >= 2 {
                assert_eq!((counted.allocations, counted.reallocations), (0, 0), "{size} pages, epoch {epoch}");
                pauses.push((parts, capture.pages.len()));
            }
        }
        let part = |part: fn(&PauseParts) -> Duration| median(pauses.iter().map(|(parts, _)| part(parts)));
        let pages = pauses.iter().map(|&(_, pages)| pages).max().unwrap_or(0);
        let place = if process { "in a process" } else { "by threads" };
        println!(
            "{place}, {pages} pages: pause {:?} (stop {:?}, harvest {:?}, device {:?}, copy {:?}, resume {:?}), memcpy {:?}, state {} bytes",
            part(|parts| parts.total),
            part(|parts| parts.stop),
            part(|parts| parts.harvest),
            part(|parts| parts.device),
            part(|parts| parts.copy),
            part(|parts| parts.resume),
            memcpy(pages),
            capture.device.len(),
        );
        if let Vm::Process(machine) = &machine {
            let asked = median((0..EPOCHS * 10).map(|_| {
                let start = Instant::now();
                assert!(machine.is_running());
                start.elapsed()
            }));
            println!("a question to its process, and its answer: {asked:?}");
        }
        machine.fence().fence().expect("it ends");
    }
    if more {
        sustained(&kvm, false);
        sustained(&kvm, true);
    }
}

/// A machine, which ends with it.
enum Vm {
    Here(Machine),
    Process(Microvm),
}

impl Vm {
    fn fence(&self) -> Arc<dyn Fence> {
        match self {
            Self::Here(machine) => machine.fence(),
            Self::Process(machine) => machine.fence(),
        }
    }
}

/// An armed machine whose second vCPU writes `pages` pages, one after the other, `rate` a millisecond or, with 0, without pause.
fn writer(kvm: &Arc<Kvm>, pages: u32, rate: u32, process: bool) -> (Vm, Box<dyn Guest>) {
    let spec = Spec {
        name: "pause".to_owned(),
        memory: 128 << 20,
        cpus: 2,
        net: None,
        disks: Vec::new(),
        dirty: Dirty::Bitmap,
    };
    let options = PilotOptions::default();
    let bounds = GateBounds::default();
    let first = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small");
    let sequential = u32::try_from(abi::SEQUENTIAL).expect("small");
    let work = [abi::order::WORK, 1, first, pages, sequential, rate];
    let (machine, mut guest): (_, Box<dyn Guest>) = if process {
        let program = Program::new(env!("CARGO_BIN_EXE_microvm-process"), &[]);
        let boot = Boot::Pilot(PILOT.into(), options);
        let machine = Microvm::start(&program, spec, &boot, None, bounds).expect("this host can");
        machine.resume().expect("it is new");
        machine.order(&work, PATIENCE).expect("the pilot works");
        let guest = process::attach(&machine).expect("nobody is attached");
        (Vm::Process(machine), Box::new(guest))
    } else {
        let machine = Machine::pilot(kvm, spec, Path::new(PILOT), &options, None, bounds).expect("this host can");
        machine.resume().expect("it is new");
        machine.order(&work, PATIENCE).expect("the pilot works");
        let guest = attach(&machine).expect("nobody is attached");
        (Vm::Here(machine), Box::new(guest))
    };
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    guest.resume().expect("it stands");
    (machine, guest)
}

/// A minute of epochs, one begun each millisecond, of a guest that writes fifty pages over and over; another thread puts them into a twin's memory.
fn sustained(kvm: &Arc<Kvm>, process: bool) {
    let (machine, mut guest) = writer(kvm, EPOCH_PAGES, 0, process);
    let mut twin = KvmTwinHost::default().prepare("pause-twin", guest.recipe(), guest.layout(), &[]).expect("room");
    let memory = twin.memory();
    let ((captured, epochs), (spare, spares)) = (channel::<Capture>(), channel());
    let applier = std::thread::spawn(move || {
        for capture in epochs {
            for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks(PAGE_SIZE)) {
                memory.write(page, 0, bytes);
            }
            // Nobody takes it at the end.
            let _ = spare.send(capture);
        }
    });
    let begun = Instant::now();
    let (mut pauses, mut pages) = (Vec::new(), 0);
    while begun.elapsed() < MINUTE {
        let mut epoch = spares.try_recv().unwrap_or_default();
        let start = Instant::now();
        let next_epoch = pauses.len() as u64;
        let mut parts = PauseParts::default();
        guest.capture_epoch(false, next_epoch, After::Run, &mut epoch, &mut parts).expect("it runs");
        let resuming = Instant::now();
        guest.resume().expect("it stands");
        parts.end(start, resuming);
        pauses.push(parts.total);
        pages += epoch.pages.len();
        captured.send(epoch).expect("the other thread lives");
        let next = begun + EPOCH * u32::try_from(pauses.len()).expect("few");
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let (took, paused) = (begun.elapsed(), pauses.iter().sum::<Duration>());
    drop(captured);
    applier.join().expect("it does not panic");
    pauses.sort_unstable();
    println!(
        "{}, {} epochs in {took:?}, {} pages each; paused for {paused:?}, median {:?}, 99 % {:?}",
        if process { "in a process" } else { "by threads" },
        pauses.len(),
        pages / pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() * 99 / 100],
    );
    assert!(twin.alive());
    twin.destroy().expect("it can be ended");
    machine.fence().fence().expect("it ends");
}
