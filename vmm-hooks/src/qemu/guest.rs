//! An attached QEMU: paused, harvested, captured, gated, and left again as it was found.
//!
//! Promise: a page whose mark was taken from the tracker is in the capture that is handed out, or is put back. While an
//! agent is attached its monitor connection is the one way in which it touches the guest; if the agent dies, the
//! capture sockets close, QEMU drops the guest's frames, and the guest is mute.

mod shape;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::discover::{Discovered, connect, discover};
use super::disks::Mirrors;
use super::gate::{GateBounds, QemuGate};
use super::idle::Vcpus;
use super::qmp::{Qmp, QmpError, QmpEvent};
use super::recipe::{QemuRecipe, layout};
use super::state::{StateError, StateFile};
use super::{AttachOptions, CheckLevel, Target, TrackerChoice, checks, cmdline, filters};
use crate::disk::{DiskImage, DiskWrite, MirrorProgress};
use crate::guest::{Capture, Fence, Gate, Guest, GuestError, GuestErrorKind, GuestEvent, PauseParts, Recipe};
use crate::layout::{Layout, PAGE_SIZE, PageSet};
use crate::sys::process::{PidFd, ProcessMemory};
use crate::track::{CompareTracker, DirtyLedger, PagemapTracker, RangeMap, SoftDirtyTracker, Tracker};
use shape::{Comparing, Shape};

/// How long a killed QEMU may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long QEMU may take to emit what was released when the gate is taken away.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Devices are compared with what was attached at each resume, memory and the network's layout every so many.
const COMPARE_ALL_EVERY: u64 = 16;

/// How long a closed monitor is taken for a dying process.
const DYING: Duration = Duration::from_secs(1);

/// How often leaving tries to take the filters out.
const OPEN_TRIES: u32 = 3;

/// A running QEMU that we are attached to.
#[derive(Debug)]
pub struct QemuGuest {
    qmp: Qmp,
    process: PidFd,
    memory: ProcessMemory,
    map: RangeMap,
    ledger: DirtyLedger<Box<dyn Tracker>>,
    /// Dirty pages are found by comparing, which does not see a change that was undone.
    compares: bool,
    layout: Layout,
    recipe: Recipe,
    state: StateFile,
    gate: Arc<QemuGate>,
    mirrors: Mirrors,
    vcpus: Vcpus,
    netdevs: Vec<String>,
    shape: Shape,
    /// We told it to stop, and nobody has let it go on since.
    paused: bool,
    /// QEMU has said since that it stands.
    stands: bool,
    /// STOP events to come that are ours.
    own_stops: u32,
    /// RESUME events to come that are ours.
    own_resumes: u32,
    /// There may be filters of ours in QEMU.
    filtered: bool,
    /// Its owner stopped it, or it shut itself down.
    paused_by_owner: bool,
    /// It ran while we had stopped it: somebody else let it, or a `cont` of ours came late.
    resumed_behind_us: bool,
    /// A guest's shutdown pauses QEMU instead of ending it, by our doing.
    shutdown_pauses: bool,
    died: bool,
    resumes: u64,
    comparing: Option<Comparing>,
    events: Vec<GuestEvent>,
    runs: Vec<(u64, u64)>,
}

/// Attaches to a running QEMU, after every check that [`super::doctor`] does. The guest goes on running; its output passes
/// as before and nothing is tracked yet.
///
/// # Errors
/// [`GuestErrorKind::Refused`] with the first refusal of the checklist, or [`GuestErrorKind::Failed`]; QEMU is as it was.
pub fn attach(target: &Target, options: &AttachOptions) -> Result<QemuGuest, GuestError> {
    let (mut qmp, process) = connect(target)?;
    let found = discover(&mut qmp, &process)?;
    let list = checks::host(options.tracker).into_iter().chain(checks::examine(&qmp, &found, options.tracker));
    if let Some(refusal) = list.into_iter().find(|check| check.level == CheckLevel::Refusal) {
        return Err(GuestError::new(GuestErrorKind::Refused, refusal.message).advise(refusal.advice));
    }
    let choice = checks::tracker_for(&found, options.tracker);
    let Discovered { machine, network, argv, .. } = &found;
    let blocks = match &found.blocks {
        Ok(blocks) => blocks,
        Err(error) => return Err(GuestError::new(GuestErrorKind::Refused, error.to_string())),
    };
    let layout = layout(blocks)?;
    let addresses: Vec<u64> = blocks.iter().map(|block| block.host).collect();
    let map = RangeMap::new(&layout, &addresses)
        .map_err(|error| GuestError::new(GuestErrorKind::Refused, error.to_string()).because(error))?;
    let memory = ProcessMemory::new(process.clone());
    let tracker: Box<dyn Tracker> = match choice {
        TrackerChoice::Compare => Box::new(CompareTracker::new(memory.clone(), map.clone())),
        TrackerChoice::SoftDirty => Box::new(SoftDirtyTracker::new(process.clone(), map.clone())),
        TrackerChoice::Auto | TrackerChoice::PagemapScan => {
            Box::new(PagemapTracker::new(process.clone(), map.clone(), found.kvm))
        }
    };
    let recipe = QemuRecipe::of(&found, blocks).pack();
    let shape = Shape {
        network: network.clone(),
        devices: shape::devices(&mut qmp)?,
        blocks: blocks.iter().map(|block| (block.name.clone(), block.total)).collect(),
    };
    let netdevs = network.nics.iter().filter_map(|nic| nic.netdev.as_ref()).map(|netdev| netdev.id.clone()).collect();
    let bounds = GateBounds { bytes: options.held_bytes_max, age: options.held_age_max };
    let gate = QemuGate::new(bounds)
        .map_err(|error| GuestError::new(GuestErrorKind::Failed, "cannot start the gate's thread").because(error))?;
    let vcpus = Vcpus::find(&mut qmp, process.pid())?;
    let mirrors = Mirrors::new(&found.storage, process.clone());
    let shutdown_pauses = qmp.has("set-action") && !cmdline::shutdown_pauses(argv);
    // Last, because it is the first change in QEMU.
    let state = StateFile::open(&mut qmp, machine)?;
    Ok(QemuGuest {
        qmp,
        process,
        memory,
        map,
        ledger: DirtyLedger::new(tracker, layout.pages()),
        compares: choice == TrackerChoice::Compare,
        layout,
        recipe,
        state,
        gate: Arc::new(gate),
        mirrors,
        vcpus,
        netdevs,
        shape,
        paused: false,
        stands: false,
        own_stops: 0,
        own_resumes: 0,
        filtered: false,
        paused_by_owner: false,
        resumed_behind_us: false,
        shutdown_pauses,
        died: false,
        resumes: 0,
        comparing: None,
        events: Vec::new(),
        runs: Vec::new(),
    })
}

impl QemuGuest {
    /// How dirty pages are found.
    #[must_use]
    pub fn tracker(&self) -> &'static str {
        self.ledger.tracker().name()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Other bounds of the log of disk writes than the usual, for tests: bytes over which writes wait, bytes over which the
    /// mirror breaks, and how long a write waits.
    #[doc(hidden)]
    pub fn bound_disk_log(&self, soft: usize, hard: usize, stall: Duration) {
        self.mirrors.bound(soft, hard, stall);
    }

    /// Cuts QEMU's connections for mirroring disks, for tests.
    #[doc(hidden)]
    pub fn cut_disk_mirrors(&self) {
        self.mirrors.cut();
    }

    fn run(&mut self, command: &str, arguments: Value) -> Result<Value, GuestError> {
        let done = self.qmp.execute(command, arguments);
        self.judge(done)
    }

    /// A monitor that closed is a dead QEMU only if its process has ended.
    fn judge<T>(&self, done: Result<T, impl Into<GuestError>>) -> Result<T, GuestError> {
        done.map_err(|error| {
            let error = error.into();
            match error.kind {
                GuestErrorKind::Gone if !self.process.wait_exit(DYING) => {
                    GuestError { kind: GuestErrorKind::Failed, ..error }
                }
                GuestErrorKind::Failed if self.process.has_exited() => {
                    GuestError { kind: GuestErrorKind::Gone, ..error }
                }
                _ => error,
            }
        })
    }

    /// Takes in QEMU's events.
    fn take_events(&mut self) {
        let events = match self.qmp.poll_events() {
            Ok(events) => events,
            Err(error) => {
                if self.process.wait_exit(Duration::ZERO) && !self.died {
                    self.died = true;
                    self.events.push(GuestEvent::Died { how: format!("its process has ended ({error})") });
                }
                return;
            }
        };
        for event in events {
            self.take_event(&event);
        }
    }

    fn take_event(&mut self, event: &QmpEvent) {
        let text = |name: &str| event.data.get(name).and_then(Value::as_str).unwrap_or_default();
        match event.name.as_str() {
            "STOP" if self.own_stops > 0 => {
                self.own_stops -= 1;
                self.paused = true;
                self.resumed_behind_us = false;
            }
            "RESUME" if self.own_resumes > 0 => {
                self.own_resumes -= 1;
                self.resumed_behind_us |= self.paused;
                self.paused = false;
            }
            "STOP" if !self.paused && !self.paused_by_owner => {
                self.paused_by_owner = true;
                self.events.push(GuestEvent::Paused);
            }
            "RESUME" if self.paused => {
                self.resumed_behind_us = true;
                self.paused = false;
                self.paused_by_owner = false;
                self.events.push(GuestEvent::Resumed);
            }
            "RESUME" if self.paused_by_owner => {
                self.paused_by_owner = false;
                self.events.push(GuestEvent::Resumed);
            }
            "SHUTDOWN" if event.data.get("guest") == Some(&Value::Bool(true)) => {
                self.paused_by_owner = true;
                self.events.push(GuestEvent::Shutdown);
            }
            "RESET" => self.events.push(GuestEvent::Reset),
            "DEVICE_DELETED" | "MEMORY_DEVICE_SIZE_CHANGE" | "MEM_UNPLUG_ERROR" | "ACPI_DEVICE_OST" => {
                let what = format!("QEMU reports {} {}", event.name, text("path"));
                self.events.push(GuestEvent::Changed { what: what.trim_end().to_owned() });
            }
            _ => self.mirrors.take_event(event),
        }
    }

    /// Harvest, save and copy; on an error the caller puts `taken` back.
    fn capture_into(
        &mut self,
        into: &mut Capture,
        parts: &mut PauseParts,
        taken: &mut PageSet,
    ) -> Result<(), GuestError> {
        let started = Instant::now();
        let whole = self.mirrors.before_capture(&mut self.qmp);
        self.judge(whole)?;
        let saving = self.state.start(&mut self.qmp);
        let saving = self.judge(saving)?;
        let asked = self.mirrors.ask(&mut self.qmp);
        // Where nobody may write during a harvest, the save comes first, and a harvest only after one that has ended.
        let both = self.ledger.tracker().others_may_write();
        let (saving, ended) = if both { (Some(saving), None) } else { (None, Some(self.qmp.collect(saving))) };
        parts.device = started.elapsed();
        let harvesting = Instant::now();
        let first = if matches!(ended, Some(Err(_))) { Ok(()) } else { self.ledger.harvest(taken) };
        parts.harvest = harvesting.elapsed();
        let copied = first.map_err(GuestError::from).and_then(|()| {
            let copying = Instant::now();
            into.pages.clear();
            into.pages.extend(taken.iter());
            let copied = read(&self.memory, &self.map, &mut self.runs, &into.pages, &mut into.bytes);
            parts.copy = copying.elapsed();
            copied
        });
        // Whatever became of the harvest: a save that goes on must not meet a running guest.
        let saved = match saving {
            Some(saving) => {
                let saved = self.qmp.collect(saving);
                parts.device = started.elapsed();
                saved
            }
            None => ended.expect("waited for above"),
        };
        let mirrored = asked.and_then(|asked| asked.map(|asked| self.qmp.collect(asked)).transpose());
        self.judge(saved)?;
        let mirrored = self.judge(mirrored)?;
        copied?;
        // What saving wrote to guest memory belongs to this epoch.
        let again = Instant::now();
        let mut late = PageSet::empty(taken.capacity());
        if both {
            self.ledger.harvest(&mut late)?;
        }
        parts.harvest += again.elapsed();
        taken.union_with(&late);
        if !late.is_empty() {
            let copying = Instant::now();
            let pages: Vec<u64> = late.iter().collect();
            let mut bytes = Vec::new();
            read(&self.memory, &self.map, &mut self.runs, &pages, &mut bytes)?;
            merge(into, &pages, &bytes);
            parts.copy += copying.elapsed();
        }
        self.state.read(&mut into.device)?;
        self.take_events();
        if self.resumed_behind_us {
            return Err(GuestError::new(GuestErrorKind::Failed, "the guest was let run while it was captured").advise(
                "nothing is lost, the epoch is captured again; keep other programs from pausing and resuming it",
            ));
        }
        self.mirrors.prove(mirrored)?;
        // Last of all: what is taken cannot come again.
        into.disk.clear();
        self.mirrors.take_all(&mut into.disk);
        Ok(())
    }

    fn set_shutdown(&mut self, action: &str) -> Result<(), GuestError> {
        if self.shutdown_pauses {
            self.run("set-action", json!({ "shutdown": action }))?;
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), GuestError> {
        if self.gate.is_shut() {
            return Err(GuestError::new(GuestErrorKind::Failed, "this copy of the guest was muted for good")
                .advise("it may not be heard again; fence it"));
        }
        let mut opened = self.open_output();
        for _ in 1..OPEN_TRIES {
            if opened.is_ok() || self.process.has_exited() {
                break;
            }
            opened = self.open_output();
        }
        if opened.is_err() && self.filtered {
            // Even if it cannot be stopped for that: its frames get out of order at worst.
            opened = self.remove_filters();
        }
        let mut result = opened;
        result = result.and(self.ledger.disarm().map_err(GuestError::from));
        result = result.and(self.unmirror_disks());
        result = result.and(self.set_shutdown("poweroff"));
        let closed = self.state.close(&mut self.qmp);
        result = result.and(self.judge(closed));
        // Last of all, because it may end QEMU.
        let ended = self.end_if_shut_down();
        result.and(ended.and_then(|ended| if ended { Ok(()) } else { self.resume() }))
    }

    /// Releases what is held and takes the filters out. The gate's sockets are closed whatever happens: a guest that keeps a
    /// filter is mute until this is called again and succeeds.
    fn remove_filters(&mut self) -> Result<(), GuestError> {
        let mut emitted = true;
        if self.gate.is_installed() {
            let deadline = Instant::now() + FLUSH_TIMEOUT;
            emitted = self.gate.flush(deadline);
            self.gate.half_close();
            emitted &= matches!(filters::wait_drained(&mut self.qmp, deadline), Ok(true));
        }
        let removed = filters::remove(&mut self.qmp);
        self.gate.uninstall();
        self.judge(removed)?;
        self.filtered = false;
        if !emitted {
            tracing::warn!(pid = self.process.pid(), "QEMU did not take all held frames in time; some were dropped");
        }
        Ok(())
    }

    /// Ends QEMU if its guest shut down and only our doing kept it from ending then. Whether it did.
    fn end_if_shut_down(&mut self) -> Result<bool, GuestError> {
        // Its owner wants it to stay, or it cannot be kept.
        if !self.shutdown_pauses {
            return Ok(false);
        }
        let status = self.run("query-status", json!({}))?;
        if status.get("status").and_then(Value::as_str) != Some("shutdown") {
            return Ok(false);
        }
        let asked = self.qmp.send("quit", json!({}));
        let asked = self.judge(asked)?;
        self.qmp.forget(&asked);
        if self.process.wait_exit(KILL_TIMEOUT) {
            return Ok(true);
        }
        Err(GuestError::new(GuestErrorKind::Failed, "the guest has shut down, but its QEMU does not end")
            .advise("nothing runs in it any more; end its process"))
    }

    /// Does this while the guest stands, and lets it run again if it ran.
    fn standing(&mut self, act: impl FnOnce(&mut Self) -> Result<(), GuestError>) -> Result<(), GuestError> {
        if self.paused && self.stands {
            return act(self);
        }
        self.pause()?;
        let done = act(self);
        let resumed = self.resume();
        done.and(resumed)
    }

    /// After the reply of a `stop` or `cont`, or its lack: the events that it caused came before it.
    fn settle(&mut self, answer: &Result<Value, QmpError>) {
        self.take_events();
        if matches!(answer, Ok(_) | Err(QmpError::Refused { .. })) {
            // Everything sent earlier is done, too; what did not change the state made no event.
            (self.own_stops, self.own_resumes) = (0, 0);
        }
    }
}

impl Guest for QemuGuest {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn gate(&self) -> Arc<dyn Gate> {
        Arc::clone(&self.gate) as Arc<dyn Gate>
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.take_events();
        if self.paused && self.stands {
            return Ok(());
        }
        // QEMU answers once every write to a disk is done, so none may wait for us.
        self.mirrors.lift();
        let asked = self.qmp.send("stop", json!({}));
        if asked.is_err() {
            self.mirrors.lower();
        }
        let asked = self.judge(asked)?;
        // From here on it will stand, however late the answer comes.
        self.own_stops += 1;
        (self.paused, self.stands, self.resumed_behind_us) = (true, false, false);
        let stopped = self.qmp.collect(asked);
        self.settle(&stopped);
        if let Err(error) = &stopped {
            if matches!(error, QmpError::Refused { .. }) || self.paused_by_owner {
                self.paused = false;
            } else if let Ok(late) = self.qmp.send("cont", json!({})) {
                // QEMU does it after the `stop`: the guest runs on as soon as it can.
                self.qmp.forget(&late);
                self.own_resumes += 1;
                self.paused = false;
            }
            // If its `stop` is late the log stays lifted until the guest is resumed.
            if matches!(error, QmpError::Refused { .. }) {
                self.mirrors.lower();
            }
        }
        self.judge(stopped)?;
        self.stands = true;
        self.mirrors.stopped();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.paused && !self.paused_by_owner {
            let asked = self.qmp.send("cont", json!({}));
            let asked = self.judge(asked)?;
            self.own_resumes += 1;
            self.stands = false;
            let resumed = self.qmp.collect(asked);
            self.paused = resumed.is_err();
            self.settle(&resumed);
            self.judge(resumed)?;
        }
        (self.paused, self.stands) = (false, false);
        self.mirrors.lower();
        self.resumes += 1;
        // QEMU answers in order: what the resume before asked is answered.
        self.look_at_comparison();
        if self.comparing.is_none() {
            let asked = self.start_comparing(self.resumes.is_multiple_of(COMPARE_ALL_EVERY));
            self.judge(asked)?;
        }
        Ok(())
    }

    fn idle(&mut self) -> bool {
        self.vcpus.idle()
    }

    fn arm(&mut self) -> Result<(), GuestError> {
        self.ledger.arm()?;
        self.set_shutdown("pause")
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        let harvested = self.ledger.harvest(dirty);
        self.judge(harvested)
    }

    fn put_back(&mut self, dirty: &PageSet) {
        self.ledger.put_back(dirty);
    }

    fn put_back_writes(&mut self, writes: Vec<DiskWrite>) {
        self.mirrors.put_back(writes);
    }

    fn disk_images(&self) -> Vec<DiskImage> {
        self.mirrors.images()
    }

    fn mirror_disks(&mut self) -> Result<(), GuestError> {
        if self.mirrors.is_empty() {
            return Ok(());
        }
        self.standing(|guest| {
            let started = guest.mirrors.start(&mut guest.qmp);
            guest.judge(started)
        })
    }

    fn mirror_progress(&mut self) -> Result<MirrorProgress, GuestError> {
        self.take_events();
        let progress = self.mirrors.progress(&mut self.qmp);
        self.judge(progress)
    }

    fn take_writes(&mut self, into: &mut Vec<DiskWrite>, bytes: usize, wait: Duration) {
        self.mirrors.take(into, bytes, wait);
    }

    fn unmirror_disks(&mut self) -> Result<(), GuestError> {
        // Before QEMU stops, for which it waits for every answer.
        self.mirrors.give_up();
        if !self.mirrors.are_running() {
            return Ok(());
        }
        self.standing(|guest| {
            let stopped = guest.mirrors.stop(&mut guest.qmp);
            // Nothing that its jobs said in the end is news.
            guest.take_events();
            guest.judge(stopped)
        })
    }

    fn read_pages(&mut self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError> {
        if self.compares && !self.paused {
            // A page that changes, is read here, and changes back is equal to the tracker's copy and not to the caller's.
            let mut owed = PageSet::empty(self.layout.pages());
            pages.iter().for_each(|&page| owed.insert(page));
            self.ledger.put_back(&owed);
        }
        let copied = read(&self.memory, &self.map, &mut self.runs, pages, bytes);
        self.judge(copied)
    }

    fn capture(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        let mut taken = PageSet::empty(self.layout.pages());
        let captured = self.capture_into(into, parts, &mut taken);
        if captured.is_err() {
            self.ledger.put_back(&taken);
        }
        self.judge(captured)
    }

    fn hold_output(&mut self, epoch: u64) -> Result<(), GuestError> {
        if self.gate.is_installed() {
            self.gate.seal(epoch);
            return Ok(());
        }
        if self.filtered {
            // An earlier attempt to take them out failed.
            self.remove_filters()?;
        }
        self.filtered = true;
        let ports = filters::install(&mut self.qmp, &self.netdevs);
        let installed = self.judge(ports).and_then(|ports| {
            self.gate.install(ports, epoch).map_err(|error| {
                GuestError::new(GuestErrorKind::Failed, "cannot set the gate's sockets up").because(error)
            })
        });
        if installed.is_err() {
            // The guest stands: nothing has been captured yet. What cannot be taken out now is tried again later.
            let _ = self.remove_filters();
        }
        installed
    }

    fn open_output(&mut self) -> Result<(), GuestError> {
        if self.gate.is_shut() {
            return Err(GuestError::new(GuestErrorKind::Failed, "the gate was shut for good"));
        }
        if !self.filtered {
            return Ok(());
        }
        // Stopped, so that no new frame overtakes one that was held.
        let was_paused = self.paused;
        self.pause()?;
        let removed = self.remove_filters();
        if !was_paused {
            self.resume()?;
        }
        removed
    }

    fn events(&mut self) -> Vec<GuestEvent> {
        self.look_at_comparison();
        self.take_events();
        if !self.died && self.process.has_exited() {
            self.died = true;
            self.events.push(GuestEvent::Died { how: "its process has ended".to_owned() });
        }
        std::mem::take(&mut self.events)
    }

    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(ProcessFence { process: self.process.clone() })
    }

    fn detach(mut self: Box<Self>) -> Result<(), GuestError> {
        let left = self.leave();
        self.judge(left).map_err(|error| {
            let message = format!("something of ours may be left in QEMU {}: {}", self.process.pid(), error.message);
            GuestError { message, ..error }
        })
    }
}

/// Ends a QEMU by SIGKILL, never by its monitor.
#[derive(Debug)]
pub(super) struct ProcessFence {
    pub(super) process: PidFd,
}

impl Fence for ProcessFence {
    fn fence(&self) -> Result<(), GuestError> {
        self.process.kill_confirmed(KILL_TIMEOUT).map_err(GuestError::from)
    }

    fn ended(&self) -> bool {
        self.process.has_exited()
    }
}

impl From<StateError> for GuestError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Qmp(error) => error.into(),
            error => Self::new(GuestErrorKind::Failed, error.to_string()).because(error),
        }
    }
}

/// Copies pages out of QEMU. Bytes left over from an earlier epoch are overwritten, not cleared first.
fn read(
    memory: &ProcessMemory,
    map: &RangeMap,
    runs: &mut Vec<(u64, u64)>,
    pages: &[u64],
    bytes: &mut Vec<u8>,
) -> Result<(), GuestError> {
    map.runs(pages.iter().copied(), runs);
    bytes.resize(pages.len() * PAGE_SIZE, 0);
    memory.read_runs(runs, bytes)?;
    Ok(())
}

/// Puts later copies of pages into a capture: over the earlier copy, or at their place.
fn merge(into: &mut Capture, pages: &[u64], bytes: &[u8]) {
    let mut new = Vec::new();
    for (page, copy) in pages.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
        match into.pages.binary_search(page) {
            Ok(at) => into.bytes[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].copy_from_slice(copy),
            Err(_) => new.push((*page, copy)),
        }
    }
    let mut old = into.pages.len();
    let mut end = old + new.len();
    into.pages.resize(end, 0);
    into.bytes.resize(end * PAGE_SIZE, 0);
    // From the back, so that nothing is overwritten before it was moved.
    for (page, copy) in new.into_iter().rev() {
        while old > 0 && into.pages[old - 1] > page {
            into.pages[end - 1] = into.pages[old - 1];
            into.bytes.copy_within((old - 1) * PAGE_SIZE..old * PAGE_SIZE, (end - 1) * PAGE_SIZE);
            (old, end) = (old - 1, end - 1);
        }
        into.pages[end - 1] = page;
        into.bytes[(end - 1) * PAGE_SIZE..end * PAGE_SIZE].copy_from_slice(copy);
        end -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn merging_is_overwriting_by_page(first in prop::collection::btree_map(0_u64..40, any::<u8>(), 0..20),
                                          later in prop::collection::btree_map(0_u64..40, any::<u8>(), 0..20)) {
            let flat = |map: &BTreeMap<u64, u8>| map.values().flat_map(|&byte| [byte; PAGE_SIZE]).collect::<Vec<u8>>();
            let mut capture = Capture { pages: first.keys().copied().collect(), bytes: flat(&first), ..Capture::default() };
            let pages: Vec<u64> = later.keys().copied().collect();
            merge(&mut capture, &pages, &flat(&later));
            let mut model = first;
            model.extend(later);
            prop_assert_eq!(capture.pages, model.keys().copied().collect::<Vec<_>>());
            prop_assert_eq!(capture.bytes, flat(&model));
        }
    }
}
