//! One machine: what it is made of, and the one place that knows whether it runs.
//!
//! Promises: when [`Machine::pause`] returns, every vCPU stands outside of the guest with nothing unfinished, no request is in flight, and
//! nobody writes the guest's memory; if it fails, the machine runs on. A new machine stands. A pause makes a bounded number of system calls
//! (for each vCPU that is in the guest a signal, and its wake-up) and allocates nothing. A vCPU that waits for something to do stands already: a
//! pause neither wakes it nor waits for it.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::bare::Bare;
use super::chips::{self, Chips, Line};
use super::confine::confine;
use super::cpuid::Leaf;
use super::gate::{GateBounds, KvmGate};
use super::orders::{Clock, Orders};
use super::pilot::abi;
use super::process::board::{Board, OVER, RUNS, Shown};
use super::ring::Rings;
use super::state::machine::Parts;
use super::state::vcpu::Room;
use super::state::{self, StateError, Tag, Writer};
use super::vcpu;
use super::virtio::block::Block;
use super::virtio::log::DiskLog;
use super::virtio::net::Net;
use super::wake::Wake;
use crate::guest::{Fence, GuestError, GuestErrorKind, GuestEvent};
use crate::sys::kvm::{Kick, Vcpu, Vm, failed};
use crate::sys::memory::SharedMemory;

/// Longest wait for vCPUs to stand. A vCPU may be in a write to a slow disk.
const STAND_MAX: Duration = Duration::from_secs(10);
/// How long a pause looks for vCPUs that run on other processors before it lets itself be woken.
const LOOKED_FOR: Duration = Duration::from_micros(100);
/// Serial output that is kept.
const SERIAL_MAX: usize = 64 << 10;
/// What an operator is told who asked for rings that this host cannot have; why follows.
pub(super) const NO_RINGS: &str = "its dirty pages are found by the bitmap, which loses none, and not by the ring";

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetCard {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The tap interface it is on.
    pub tap: String,
    /// The bridge that the tap is on, if it is.
    #[serde(default)]
    pub bridge: Option<String>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// Its name, for people.
    pub name: String,
    /// Its raw image.
    pub path: PathBuf,
}

/// How KVM says which pages were written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dirty {
    /// A bit a page.
    #[default]
    Bitmap,
    /// A ring a vCPU, where this host's KVM keeps rings whole; else the bitmap: see [`ring::check`].
    Ring,
}

impl Dirty {
    fn is_bitmap(&self) -> bool {
        *self == Self::Bitmap
    }
}

/// What a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Its name.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
    /// Its vCPUs.
    pub cpus: u64,
    /// Its network card.
    pub net: Option<NetCard>,
    /// Its disks.
    pub disks: Vec<DiskFile>,
    /// How its written pages are found, on this host and on those that it goes to.
    #[serde(default, skip_serializing_if = "Dirty::is_bitmap")]
    pub dirty: Dirty,
}

/// What a machine is made of beside its description.
#[derive(Debug)]
pub(super) struct Means<'a> {
    pub(super) memory: &'a SharedMemory,
    /// What it writes to its memory stays with it.
    pub(super) private: bool,
    pub(super) devices: Devices,
}

/// What a machine's devices are made of.
#[derive(Debug)]
pub(super) struct Devices {
    /// Takes and gives one frame a call; there if the machine has a card.
    pub(super) wire: Option<OwnedFd>,
    /// The images of its disks, in their order.
    pub(super) disks: Vec<File>,
    pub(super) bounds: GateBounds,
}

/// Whether vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Stand,
    End,
}

#[derive(Debug)]
struct Run {
    want: Want,
    /// Which vCPUs stand: outside of the guest, and not to enter it before they looked here.
    standing: Vec<bool>,
    /// vCPU threads that have not ended.
    alive: usize,
    /// The guest has shut itself down: it stands for good, whole.
    off: bool,
    /// How it ended.
    end: Option<GuestEvent>,
    events: Vec<GuestEvent>,
    /// So many wait for vCPUs to stand.
    awaited: usize,
}

/// One vCPU and what belongs to it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) vcpu: Mutex<Vcpu>,
    pub(super) kick: Arc<Kick>,
    pub(super) wake: Wake,
    /// Whether it was in the guest since its state was last read.
    pub(super) ran: AtomicBool,
    /// The processor that it last entered the guest on.
    pub(super) on: AtomicUsize,
    /// As in [`Run::standing`], for who looks without the lock.
    pub(super) stands: AtomicBool,
    pub(super) room: Mutex<Room>,
}

/// Everything of a machine.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) spec: Spec,
    cpuid: Vec<Leaf>,
    pub(super) vm: Arc<Vm>,
    /// If its dirty pages are kept in rings.
    pub(super) rings: Option<Arc<Rings>>,
    /// Why they are not, though it was to have rings.
    no_rings: Option<String>,
    /// See [`Bare::worth`].
    pub(super) worth: u8,
    /// What a kernel needs beside processors, memory and virtio devices.
    pub(super) chips: Option<Chips>,
    pub(super) slots: Vec<Slot>,
    pub(super) net: Option<Net>,
    pub(super) blocks: Vec<Block>,
    pub(super) gate: Arc<KvmGate>,
    pub(super) log: Arc<DiskLog>,
    pub(super) orders: Orders,
    pub(super) clock: Clock,
    /// Devices are to begin no request.
    halt: Arc<AtomicBool>,
    /// Devices may have requests that were left.
    pub(super) look: AtomicBool,
    serial: Mutex<Vec<u8>>,
    /// Whether somebody protects it.
    pub(super) attached: AtomicBool,
    run: Mutex<Run>,
    /// For vCPUs that stand.
    go: Condvar,
    /// For whom waits for vCPUs.
    stood: Condvar,
    /// If somebody in another process looks: where it is shown.
    shown: OnceLock<Arc<Board>>,
}

/// A machine. Clones are the same one; it runs on until it is ended, also if nobody has one.
#[derive(Debug, Clone)]
pub struct Machine(pub(super) Arc<Inner>);

pub(super) fn refused(message: impl Into<String>) -> GuestError {
    GuestError::new(GuestErrorKind::Refused, message)
}

fn no_disk(path: &Path, why: &dyn std::fmt::Display) -> GuestError {
    refused(format!("the disk {} cannot be used: {why}", path.display()))
}

/// Opens the images of a machine's disks.
pub(super) fn open_disks(spec: &Spec) -> Result<Vec<File>, GuestError> {
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    spec.disks.iter().map(|disk| open(&disk.path).map_err(|error| no_disk(&disk.path, &error))).collect()
}

/// A disk's image with its size.
fn sized(file: File, path: &Path) -> Result<(File, u64), GuestError> {
    let fail = |why: String| no_disk(path, &why);
    let bytes = file.metadata().map_err(|error| fail(error.to_string()))?.len();
    if bytes == 0 || !bytes.is_multiple_of(512) {
        return Err(fail(format!("its size is {bytes} bytes, not a number of sectors of 512 bytes")));
    }
    Ok((file, bytes))
}

impl Machine {
    /// Makes a machine of `spec` of these means, without anything in it, with what a kernel needs if `chips`. It stands.
    pub(super) fn make(
        kvm: &Arc<Kvm>,
        spec: Spec,
        cpuid: &[Leaf],
        chips: bool,
        means: Means<'_>,
    ) -> Result<Self, GuestError> {
        let Means { memory, private, devices } = means;
        Self::with(Bare::new(kvm, spec, cpuid, chips, memory, private)?, devices)
    }

    /// Makes the rest of a machine. It stands.
    pub(super) fn with(bare: Bare, devices: Devices) -> Result<Self, GuestError> {
        let Bare { spec, cpuid, vm, rings, no_rings, worth, chips, slots } = bare;
        let Devices { wire, disks, bounds } = devices;
        assert_eq!(disks.len(), spec.disks.len(), "an opened image for each disk");
        let sized = disks.into_iter().zip(&spec.disks).map(|(file, disk)| sized(file, &disk.path));
        let disks = sized.collect::<Result<Vec<_>, _>>()?;
        let log = Arc::new(DiskLog::new(disks.iter().map(|&(_, bytes)| bytes).collect()));
        let halt = Arc::new(AtomicBool::new(true));
        let mut blocks = Vec::new();
        for ((number, (file, bytes)), disk) in (0..).zip(disks).zip(&spec.disks) {
            blocks.push(Block::new(number, &disk.name, file, bytes, Arc::clone(&log), Arc::clone(&halt)));
        }
        let network = |error: &dyn std::fmt::Display| refused(format!("the microVM's network cannot be used: {error}"));
        let outgoing = wire.as_ref().map(OwnedFd::try_clone).transpose().map_err(|error| network(&error))?;
        let gate = Arc::new(KvmGate::new(outgoing, bounds));
        let net = match (&spec.net, wire) {
            (Some(card), Some(wire)) => {
                // A confined process may not: its wire is so from the beginning.
                if !rustix::fs::fcntl_getfl(&wire).is_ok_and(|flags| flags.contains(rustix::fs::OFlags::NONBLOCK)) {
                    rustix::io::ioctl_fionbio(&wire, true).map_err(|error| network(&error))?;
                }
                Some(Net::new(card.mac, wire, Arc::clone(&gate)).map_err(|error| network(&error))?)
            }
            (None, _) => None,
            (Some(card), None) => return Err(network(&format!("there is nothing to join {} to", card.tap))),
        };
        if chips.is_some() {
            let line = |place| chips::line_of(place).map(|number| Line::new(&vm, number));
            let crowded = || refused("a microVM with a kernel has at most 19 disks and cards");
            if let Some(net) = &net {
                net.interrupt_by(line(0).ok_or_else(crowded)?);
            }
            for (place, block) in (usize::from(net.is_some())..).zip(&blocks) {
                block.interrupt_by(line(place).ok_or_else(crowded)?);
            }
        }
        let alive = slots.len();
        let inner = Arc::new(Inner {
            cpuid,
            vm,
            rings,
            no_rings,
            worth,
            chips,
            clock: Clock::new(slots.len()),
            slots,
            net,
            blocks,
            gate,
            log,
            orders: Orders::default(),
            halt,
            look: AtomicBool::new(true),
            serial: Mutex::default(),
            attached: AtomicBool::new(false),
            run: Mutex::new(Run {
                want: Want::Stand,
                standing: vec![false; alive],
                alive,
                off: false,
                end: None,
                events: Vec::new(),
                awaited: 0,
            }),
            go: Condvar::new(),
            stood: Condvar::new(),
            shown: OnceLock::new(),
            spec,
        });
        let machine = Self(inner);
        machine.start_threads()?;
        Ok(machine)
    }

    fn start_threads(&self) -> Result<(), GuestError> {
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            let made = std::thread::Builder::new().name(name).spawn(body);
            made.map(drop).map_err(|error| refused("the microVM's threads cannot be started").because(error))
        };
        for number in 0..self.0.slots.len() {
            let inner = Arc::clone(&self.0);
            let started = spawn(format!("vcpu{number}"), Box::new(move || vcpu::run(&inner, number)));
            if started.is_err() {
                // Those that were not started will not end.
                self.0.run().alive -= self.0.slots.len() - number;
                self.end(None);
            }
            started?;
        }
        if self.0.net.is_some() {
            let inner = Arc::clone(&self.0);
            let receive = move || {
                if let Err(error) = confine() {
                    return inner.end(Some(GuestEvent::Died { how: error.to_string() }));
                }
                let net = inner.net.as_ref().expect("asked above");
                // The first vCPU is the one that serves the network.
                net.receive(inner.vm.ram().memory(), &inner.slots[0].wake);
            };
            spawn("net".to_owned(), Box::new(receive)).inspect_err(|_| self.end(None))?;
        }
        Ok(())
    }

    /// What it is.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.0.spec
    }

    /// What its guest is told of its processor.
    pub(super) fn cpuid(&self) -> &[Leaf] {
        &self.0.cpuid
    }

    /// Whether it has what a kernel needs.
    pub(super) fn has_chips(&self) -> bool {
        self.0.chips.is_some()
    }

    /// What its operator is to know of how its dirty pages are found, if that is not what was asked for: one sentence.
    #[must_use]
    pub fn dirty_note(&self) -> Option<String> {
        self.0.no_rings.as_ref().map(|why| format!("{NO_RINGS}: {why}"))
    }

    /// How often one of its vCPUs stopped because its ring of dirty pages was full.
    #[must_use]
    pub fn rings_filled(&self) -> u64 {
        self.0.rings.as_ref().map_or(0, |rings| rings.filled())
    }

    /// Shows itself on `board` from now on.
    pub(super) fn show_on(&self, board: &Arc<Board>) {
        for (number, slot) in self.0.slots.iter().enumerate() {
            slot.wake.show_on(Arc::clone(board), number);
        }
        self.0.gate.show_on(Arc::clone(board));
        let run = self.0.run();
        // Once for a machine.
        let _ = self.0.shown.set(Arc::clone(board));
        self.0.show(&run);
    }

    /// Whether its vCPUs run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.0.run().want == Want::Run
    }

    /// Whether its guest has shut itself down, or it has ended: nothing of it runs again.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let run = self.0.run();
        run.off || run.end.is_some()
    }

    /// Stops it: see the module's promises.
    ///
    /// # Errors
    /// [`GuestErrorKind::Gone`] if it has ended; else it runs on.
    pub fn pause(&self) -> Result<(), GuestError> {
        let inner = &self.0;
        let mut run = inner.run();
        if run.end.is_some() {
            return Err(inner.gone(&run));
        }
        run.want = Want::Stand;
        let here = rustix::thread::sched_getcpu();
        let mut beside = true;
        for (slot, _) in inner.slots.iter().zip(&run.standing).filter(|&(_, standing)| !standing) {
            slot.kick.kick();
            beside &= slot.on.load(Ordering::Relaxed) != here;
        }
        // While they are on their way. A request that one of them begins meanwhile it finishes before it stands.
        inner.show(&run);
        inner.halt();
        drop(run);
        if beside {
            inner.look_for_stand();
        }
        let waits = |run: &mut Run| run.standing.contains(&false) && run.end.is_none();
        run = inner.run();
        run.awaited += 1;
        let waited = inner.stood.wait_timeout_while(run, STAND_MAX, waits);
        let (mut run, late) = waited.expect("nobody panics while it holds the machine");
        run.awaited -= 1;
        if run.end.is_some() {
            return Err(inner.gone(&run));
        }
        drop(run);
        if late.timed_out() {
            self.resume()?;
            let error = GuestError::new(GuestErrorKind::Failed, "the microVM's vCPUs did not stop in time");
            return Err(error.advise("the guest runs on; look whether its disk answers"));
        }
        if let Some(net) = &inner.net {
            net.run(false);
        }
        inner.clock.stop();
        Ok(())
    }

    /// Lets it run. A machine whose guest has shut itself down stays off, which is no error.
    ///
    /// # Errors
    /// [`GuestErrorKind::Gone`] if it has ended.
    pub fn resume(&self) -> Result<(), GuestError> {
        let inner = &self.0;
        let mut run = inner.run();
        if run.end.is_some() {
            return Err(inner.gone(&run));
        }
        if run.off {
            return Ok(());
        }
        inner.halt.store(false, Ordering::SeqCst);
        inner.log.stop(false);
        inner.clock.start();
        run.want = Want::Run;
        inner.show(&run);
        drop(run);
        inner.go.notify_all();
        if inner.look.load(Ordering::SeqCst) {
            // The first vCPU is to look, and may be waiting.
            inner.slots[0].wake.wake();
        }
        if let Some(net) = &inner.net {
            net.run(true);
        }
        Ok(())
    }

    /// Waits until every vCPU of a machine that runs waits for something to happen, for at most so long; whether they do.
    pub(super) fn wait_idle(&self, most: Duration) -> bool {
        let inner = &self.0;
        let mut run = inner.run();
        run.awaited += 1;
        // One that stands and was woken will stand again: then it is looked at again.
        let idle = |run: &Run| !run.standing.contains(&false) && inner.slots.iter().all(|slot| slot.wake.quiet());
        let waited = inner.stood.wait_timeout_while(run, most, |run| !idle(run) && run.end.is_none());
        run = waited.expect("nobody panics while it holds the machine").0;
        run.awaited -= 1;
        idle(&run)
    }

    /// Ends it; `event` is told of it, if it is news. Does not wait for its threads.
    pub(super) fn end(&self, event: Option<GuestEvent>) {
        self.0.end(event);
    }

    /// A handle that ends it.
    #[must_use]
    pub fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(MachineFence(self.clone()))
    }

    /// What it has written to its serial port, the last of it.
    #[must_use]
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&self.0.serial.lock().expect("nobody panics while it holds the serial port"))
            .into_owned()
    }

    /// Orders the pilot to do something (see [`abi::order`]) and waits until it has, for `most`.
    ///
    /// # Errors
    /// If the machine has ended or does not answer.
    pub fn order(&self, words: &[u32], most: Duration) -> Result<(), GuestError> {
        let number = self.0.orders.give(words);
        self.0.wake_all();
        if self.0.orders.carried_out(number, most) {
            return Ok(());
        }
        let run = self.0.run();
        if run.end.is_some() {
            return Err(self.0.gone(&run));
        }
        Err(GuestError::new(GuestErrorKind::Failed, "the pilot did not carry out an order in time"))
    }

    /// Writes the state of a machine that stands to `into`, which is cleared.
    pub(super) fn save(&self, into: &mut Vec<u8>) -> Result<(), StateError> {
        let inner = &self.0;
        let mut writer = Writer::begin(into, inner.spec.cpus);
        for (number, slot) in (0..).zip(&inner.slots) {
            let vcpu = slot.vcpu.lock().expect("nobody panics while it holds a vCPU");
            let mut room = slot.room.lock().expect("nobody panics while it holds a vCPU");
            let ran = slot.ran.swap(false, Ordering::SeqCst);
            state::vcpu::save(&vcpu, &mut room, ran, number, inner.chips.is_some(), &mut writer)?;
        }
        let clock = inner.vm.fd().get_clock().map_err(failed("read the guest's clock"))?;
        writer.structure(Tag::KvmClock, &clock);
        if let Some(chips) = &inner.chips {
            chips.save(&mut writer)?;
        }
        writer.section(Tag::Clock, |section| inner.clock.save(section));
        if let Some(net) = &inner.net {
            writer.section(Tag::Net, |section| net.save(section));
        }
        for block in &inner.blocks {
            writer.section(Tag::Block, |section| block.save(section));
        }
        writer.end();
        Ok(())
    }

    /// Loads a state into a new machine that stands. If it fails the machine is of no use.
    pub(super) fn load(&self, bytes: &[u8]) -> Result<(), StateError> {
        let inner = &self.0;
        let parts = Parts {
            cpus: inner.spec.cpus,
            chips: inner.chips.is_some(),
            clock: &inner.clock,
            net: inner.net.as_ref(),
            blocks: &inner.blocks,
            memory: inner.vm.ram().memory(),
        };
        state::machine::decode(bytes, &parts, |mut decoded, reader| {
            for ((number, slot), parsed) in (0..).zip(&inner.slots).zip(&decoded.vcpus) {
                let vcpu = slot.vcpu.lock().expect("nobody panics while it holds a vCPU");
                parsed.load(&vcpu, &mut slot.room.lock().expect("nobody panics while it holds a vCPU"), number)?;
            }
            // The guest's time stood while it did: it is set, not moved on by what has passed since.
            decoded.clock.flags = 0;
            inner.vm.fd().set_clock(&decoded.clock).map_err(failed("load the guest's clock"))?;
            match &inner.chips {
                Some(chips) => chips.load(reader),
                None => Ok(()),
            }
        })
    }

    /// Tells the network where it is now: a reverse ARP request of its own address, to everybody.
    pub(super) fn announce(&self) {
        let Some(card) = &self.0.spec.net else { return };
        let mut frame = [0; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&card.mac);
        // RARP, Ethernet, IPv4, 6 and 4 bytes, request.
        frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        frame[22..28].copy_from_slice(&card.mac);
        frame[32..38].copy_from_slice(&card.mac);
        self.0.gate.announce(&frame);
    }

    /// What happened since the last call.
    pub(super) fn take_events(&self) -> Vec<GuestEvent> {
        let mut run = self.0.run();
        let events = std::mem::take(&mut run.events);
        self.0.show(&run);
        events
    }
}

impl Inner {
    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().expect("nobody panics while it holds the machine")
    }

    /// To be called after each change.
    fn show(&self, run: &Run) {
        let Some(board) = self.shown.get() else { return };
        let over = run.off || run.end.is_some();
        board.show(Shown::Run, if run.want == Want::Run { RUNS } else { 0 } | if over { OVER } else { 0 });
        board.show(Shown::Events, if run.events.is_empty() { 0 } else { 1 });
    }

    /// Where disk `index` is.
    pub(super) fn block_address(&self, index: usize) -> u64 {
        abi::MMIO + abi::MMIO_STRIDE * (index as u64 + u64::from(self.net.is_some()))
    }

    fn gone(&self, run: &Run) -> GuestError {
        let how = match &run.end {
            Some(GuestEvent::Died { how }) => format!(": {how}"),
            _ => String::new(),
        };
        GuestError::new(GuestErrorKind::Gone, format!("the microVM {} has ended{how}", self.spec.name))
    }

    /// Looks again and again, for [`LOOKED_FOR`] at most, until every vCPU stands: they are on other processors, and being woken from one costs
    /// more than they need.
    fn look_for_stand(&self) {
        let until = Instant::now() + LOOKED_FOR;
        while !self.slots.iter().all(|slot| slot.stands.load(Ordering::Acquire)) && Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    /// Lets no request of a device begin, nor wait for room in the log.
    fn halt(&self) {
        self.halt.store(true, Ordering::SeqCst);
        self.log.stop(true);
    }

    /// Gets every vCPU out of the guest and out of what it waits for.
    fn interrupt(&self) {
        self.halt();
        self.slots.iter().for_each(|slot| slot.kick.kick());
        self.wake_all();
    }

    /// Something happened that may be any vCPU's business.
    pub(super) fn wake_all(&self) {
        self.slots.iter().for_each(|slot| slot.wake.wake());
    }

    /// For a vCPU's thread: the guest shuts itself down. It stands from now on, so that its last output and writes can be committed.
    pub(super) fn shut_down(&self, how: &str) {
        let mut run = self.run();
        if run.want != Want::End && !run.off {
            tracing::info!(name = self.spec.name, "the microVM's guest {how}");
            run.off = true;
            run.want = Want::Stand;
            run.events.push(GuestEvent::Shutdown);
        }
        self.show(&run);
        drop(run);
        self.orders.end();
        // The caller's vCPU, too: it finishes its instruction and stands.
        self.interrupt();
    }

    pub(super) fn end(&self, event: Option<GuestEvent>) {
        let mut run = self.run();
        run.want = Want::End;
        if run.end.is_none() {
            if let Some(event) = &event {
                tracing::info!(name = self.spec.name, ?event, "the microVM ends");
                run.events.push(event.clone());
            }
            run.end = Some(event.unwrap_or(GuestEvent::Died { how: "it was ended from outside".to_owned() }));
        }
        self.show(&run);
        drop(run);
        self.interrupt();
        self.orders.end();
        if let Some(net) = &self.net {
            net.end();
        }
        self.go.notify_all();
        self.stood.notify_all();
    }

    /// For the thread of vCPU `number`, outside of the guest with nothing unfinished: waits until something happens, or for `rest`, and stands
    /// while it is to. False: it is to end.
    pub(super) fn may_run(&self, number: usize, rest: Option<Duration>) -> bool {
        let slot = &self.slots[number];
        let mut run = self.run();
        run.standing[number] = true;
        slot.stands.store(true, Ordering::Release);
        // A system call, also if nobody waits; and who looks at `stands` needs the lock next.
        if run.awaited > 0 {
            self.stood.notify_all();
        }
        if let Some(most) = rest {
            // It counts as standing all the time, so a pause need not wake it. Afterwards it looks whether it is to go on.
            drop(run);
            slot.wake.wait(most);
            run = self.run();
        }
        run = self.go.wait_while(run, |run| run.want == Want::Stand).expect("nobody panics while it holds the machine");
        run.standing[number] = false;
        slot.stands.store(false, Ordering::Release);
        // Under the lock: who asks for the next pause kicks after this.
        slot.kick.clear();
        run.want == Want::Run
    }

    /// For a vCPU's thread: it has ended.
    pub(super) fn thread_ended(&self) {
        self.run().alive -= 1;
        self.stood.notify_all();
    }

    /// A byte for the serial port.
    pub(super) fn print(&self, bytes: &[u8]) {
        let mut serial = self.serial.lock().expect("nobody panics while it holds the serial port");
        serial.extend_from_slice(bytes);
        if bytes.contains(&b'\n') {
            let end = serial.len() - 1;
            let start = serial[..end].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            tracing::info!(name = self.spec.name, line = %String::from_utf8_lossy(&serial[start..end]), "serial");
        }
        if serial.len() > SERIAL_MAX {
            let surplus = serial.len() - SERIAL_MAX / 2;
            serial.drain(..surplus);
        }
    }
}

/// Ends a machine.
#[derive(Debug)]
struct MachineFence(Machine);

impl Fence for MachineFence {
    fn fence(&self) -> Result<(), GuestError> {
        self.0.end(None);
        let deadline = Instant::now() + STAND_MAX;
        let mut run = self.0.0.run();
        while run.alive > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let error = GuestError::new(GuestErrorKind::Failed, "the microVM's vCPUs did not end in time");
                return Err(error.advise("it is mute and will end; end this process to be sure"));
            }
            run = self.0.0.stood.wait_timeout(run, left).expect("nobody panics while it holds the machine").0;
        }
        drop(run);
        self.0.0.gate.end();
        Ok(())
    }

    fn ended(&self) -> bool {
        let run = self.0.0.run();
        run.end.is_some() && run.alive == 0
    }
}
