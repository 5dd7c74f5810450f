//! A protector in one process: captures epoch by epoch, applies at once, releases what the epoch emitted.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_hooks::disk::{DiskChange, DiskWrite};
use vmm_hooks::guest::{Capture, Guest, PauseParts, Twin, TwinHost, TwinMemory};
use vmm_hooks::kvm::{KvmGuest, KvmTwinHost, Machine, attach};
use vmm_hooks::layout::PAGE_SIZE;

/// Pages that are copied at once.
const BATCH: u64 = 256;

/// Copies all memory of a guest.
pub(crate) fn copy_all(guest: &mut KvmGuest, memory: &dyn TwinMemory) {
    let mut bytes = Vec::new();
    for start in (0..memory.pages()).step_by(usize::try_from(BATCH).expect("small")) {
        let pages: Vec<u64> = (start..memory.pages().min(start + BATCH)).collect();
        guest.read_pages(&pages, &mut bytes).expect("it is there");
        for (&page, bytes) in pages.iter().zip(bytes.chunks(PAGE_SIZE)) {
            memory.write(page, 0, bytes);
        }
    }
}

/// A machine, its twin, and how far they are.
pub(crate) struct Protected {
    guest: KvmGuest,
    twin: Box<dyn Twin>,
    images: Vec<File>,
    capture: Capture,
    /// The device state of the last whole epoch.
    device: Vec<u8>,
    epoch: u64,
    pauses: Vec<(PauseParts, usize)>,
}

impl Protected {
    /// Holds the machine's output, mirrors its disks and copies all of it to a twin called `name`.
    pub(crate) fn begin(machine: &Machine, host: &KvmTwinHost, name: &str, images: Vec<PathBuf>) -> Self {
        let mut guest = attach(machine).expect("nobody is attached");
        let twin = host.prepare(name, guest.recipe(), guest.layout(), &images).expect("this host can");
        let open = |path: &PathBuf| OpenOptions::new().write(true).open(path).expect("its image");
        let images: Vec<File> = images.iter().map(open).collect();
        guest.mirror_disks().expect("it works");
        let mut writes = Vec::new();
        while !guest.mirror_progress().expect("it is whole").ready {
            guest.take_writes(&mut writes, 1 << 20, Duration::ZERO);
        }
        apply(&images, &writes);
        guest.pause().expect("it runs");
        guest.arm().expect("it stands");
        guest.hold_output(1).expect("it stands");
        let mut protected =
            Self { guest, twin, images, capture: Capture::default(), device: Vec::new(), epoch: 1, pauses: Vec::new() };
        protected.seal_and_take(Instant::now());
        copy_all(&mut protected.guest, protected.twin.memory().as_ref());
        protected.guest.resume().expect("it stands");
        protected.commit();
        protected.pauses.clear();
        protected
    }

    #[allow(dead_code, reason = "the tests with a kernel in the machine look at it from inside")]
    pub(crate) fn memory(&self) -> Arc<dyn TwinMemory> {
        self.twin.memory()
    }

    /// Captures a machine that stands.
    fn seal_and_take(&mut self, began: Instant) {
        let mut parts = PauseParts { stop: began.elapsed(), ..PauseParts::default() };
        self.guest.gate().seal(self.epoch + 1);
        self.guest.capture(&mut self.capture, &mut parts).expect("it stands");
        self.pauses.push((parts, self.capture.pages.len()));
    }

    /// Applies what was captured, and releases its output.
    fn commit(&mut self) {
        let memory = self.twin.memory();
        for (&page, bytes) in self.capture.pages.iter().zip(self.capture.bytes.chunks(PAGE_SIZE)) {
            memory.write(page, 0, bytes);
        }
        apply(&self.images, &self.capture.disk);
        self.device.clone_from(&self.capture.device);
        self.guest.gate().release(self.epoch);
        self.epoch += 1;
    }

    /// One epoch: ends when output waits, or at the latest after `most`.
    pub(crate) fn epoch(&mut self, most: Duration) {
        self.guest.gate().wait_output(Instant::now() + most);
        let began = Instant::now();
        self.guest.pause().expect("it runs");
        self.seal_and_take(began);
        let resumed = Instant::now();
        self.guest.resume().expect("it stands");
        if let Some((parts, _)) = self.pauses.last_mut() {
            parts.resume = resumed.elapsed();
            parts.total = began.elapsed();
        }
        self.commit();
    }

    /// The median pause, and its parts.
    pub(crate) fn figures(&self) -> String {
        let part = |part: fn(&PauseParts) -> Duration| {
            let mut values: Vec<Duration> = self.pauses.iter().map(|(parts, _)| part(parts)).collect();
            values.sort_unstable();
            values[values.len() / 2]
        };
        let mut pages: Vec<usize> = self.pauses.iter().map(|&(_, pages)| pages).collect();
        pages.sort_unstable();
        format!(
            "{} pauses, median {:?} (stop {:?}, harvest {:?}, device {:?}, copy {:?}, resume {:?}), {} pages",
            pages.len(),
            part(|parts| parts.total),
            part(|parts| parts.stop),
            part(|parts| parts.harvest),
            part(|parts| parts.device),
            part(|parts| parts.copy),
            part(|parts| parts.resume),
            pages[pages.len() / 2],
        )
    }

    /// Ends the machine in the middle of an epoch, and lets the twin go on. How many epochs there were.
    pub(crate) fn kill(mut self) -> (Box<dyn Twin>, u64) {
        self.guest.gate().shut();
        self.guest.fence().fence().expect("it ends");
        self.twin.rehearse(&self.device).expect("this state loads");
        let activation = self.twin.activate(&self.device).expect("it goes on");
        println!("activated: {activation:?}");
        (self.twin, self.epoch - 1)
    }
}

fn apply(images: &[File], writes: &[DiskWrite]) {
    for write in writes {
        let bytes = match &write.change {
            DiskChange::Data(data) => data.clone(),
            DiskChange::Zero(bytes) => vec![0; usize::try_from(*bytes).expect("small")],
        };
        images[write.disk as usize].write_all_at(&bytes, write.offset).expect("room");
    }
}
