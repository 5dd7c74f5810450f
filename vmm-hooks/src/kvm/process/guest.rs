//! A microVM in a process of its own: the handle, and it as a [`Guest`].
//!
//! Promises: what a capture found is in the ledger here before anything can fail. A question that is not answered in time leaves a guest that is told to
//! run, no page lost, and a mirror that counts as broken.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::beside::{Beside, Stays};
use super::board::{Board, CPUS_MAX, MIRRORED, OVER, RUNS, Shown, TRACKED};
use super::gate::ProcessGate;
use super::link::{Link, LinkError, pair};
use super::spawn::{Process, Program, open_kvm};
use super::wire::{Answer, Request, Start, Started, VERSION, What};
use crate::disk::{DiskSpec, DiskWrite, MirrorProgress};
use crate::guest::{After, Capture, Fence, Gate, Guest, GuestError, GuestErrorKind, GuestEvent, PauseParts, Recipe};
use crate::kvm::boot::PilotOptions;
use crate::kvm::copying::Copying;
use crate::kvm::gate::GateBounds;
use crate::kvm::guest::{BACKEND, Body, layout, not_whole};
use crate::kvm::linux::LinuxOptions;
use crate::kvm::machine::{Spec, open_disks, refused};
use crate::kvm::ram::Ram;
use crate::kvm::start::{Image, Kernel, new_memory};
use crate::layout::{Layout, PAGE_SIZE, PageSet};
use crate::sys::copy::by_runs;
use crate::sys::memory::SharedMemory;
use crate::sys::sched::{Urgency, realtime_of};
use crate::track::{DirtyLedger, TrackError, Tracker};

/// Longest wait for an answer: longer than a machine waits for its vCPUs.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(15);
/// Longest wait for a machine to be made: its host's rings may have to be tried.
const START_MAX: Duration = Duration::from_secs(90);

/// What a new machine boots, as its operator names it.
#[derive(Debug, Clone)]
pub enum Boot {
    /// The pilot, from this image.
    Pilot(std::path::PathBuf, PilotOptions),
    /// A Linux kernel.
    Linux(LinuxOptions),
}

/// Everything of the handle.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) spec: Spec,
    recipe: Recipe,
    layout: Layout,
    /// Of its disks.
    pub(super) sizes: Vec<u64>,
    note: Option<String>,
    ram: Arc<Ram>,
    pub(super) board: Arc<Board>,
    link: Mutex<Link>,
    pub(super) gate: Arc<ProcessGate>,
    pub(super) process: Arc<Process>,
    attached: AtomicBool,
    /// Its death was told.
    told: AtomicBool,
}

/// A microVM in a process of its own. Clones are the same one; it is ended when nobody has one.
#[derive(Debug, Clone)]
pub struct Microvm(pub(super) Arc<Inner>);

/// A machine that is to be made by a process.
pub(super) struct Plan<'a> {
    pub(super) spec: &'a Spec,
    /// See [`Start`].
    pub(super) description: String,
    pub(super) what: What,
    pub(super) memory: &'a SharedMemory,
    /// This and what follows: nothing for a twin.
    pub(super) wire: Option<OwnedFd>,
    /// What it boots.
    pub(super) files: Vec<File>,
    pub(super) disks: &'a [File],
    pub(super) bounds: GateBounds,
}

/// A process, and what is between it and this one.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) process: Process,
    link: Link,
    board: Arc<Board>,
    gate: ProcessGate,
}

fn unusable(name: &str, why: &dyn std::fmt::Display) -> GuestError {
    GuestError::new(GuestErrorKind::Failed, format!("the process of the microVM {name} cannot be used: {why}"))
}

/// Asks for what makes a machine. An error is [`GuestErrorKind::Gone`] if the process ended meanwhile, and only then.
fn ask_to_make(
    process: &Process,
    link: &mut Link,
    name: &str,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<Answer, GuestError> {
    match link.ask(request, fds, START_MAX) {
        Ok(Answer::Failed(failure)) => Err(failure.into()),
        Ok(answer) => Ok(answer),
        Err(LinkError::Closed) => {
            let _ = process.handle().wait_exit(Duration::from_secs(1));
            let why = unusable(name, &process.end().unwrap_or_else(|| "it does not listen".to_owned()));
            Err(GuestError { kind: GuestErrorKind::Gone, ..why })
        }
        Err(error) => Err(unusable(name, &error)),
    }
}

impl Ends {
    /// Starts a process of this name and has it do what `plan` says; its answer. For errors see [`ask_to_make`].
    pub(super) fn start(program: &Program, name: &str, plan: &Plan<'_>) -> Result<(Self, Answer), GuestError> {
        let (process, link) = Process::start(program, name)?;
        Self::begin(process, link, name, plan)
    }

    /// The same of a process that was started.
    pub(super) fn begin(
        process: Process,
        mut link: Link,
        name: &str,
        plan: &Plan<'_>,
    ) -> Result<(Self, Answer), GuestError> {
        if plan.spec.cpus == 0 || plan.spec.cpus > CPUS_MAX {
            return Err(refused(format!("a microVM has at least one vCPU and at most {CPUS_MAX}")));
        }
        let failed = |error: &dyn std::fmt::Display| unusable(name, error);
        let kvm = open_kvm()?;
        let board = Board::new(name, plan.spec.cpus, plan.memory.length() / PAGE_SIZE as u64);
        let board = Arc::new(board.map_err(|error| failed(&error))?);
        let (ours, theirs) = pair().map_err(|error| failed(&error))?;
        let mut fds: Vec<BorrowedFd<'_>> = vec![kvm.as_fd(), plan.memory.fd()];
        fds.extend(board.fds());
        fds.push(theirs.as_fd());
        not_blocking(name, plan.wire.as_ref())?;
        fds.extend(plan.wire.as_ref().map(AsFd::as_fd));
        fds.extend(plan.files.iter().chain(plan.disks).map(AsFd::as_fd));
        let start = Request::Start(Start {
            version: VERSION,
            description: plan.description.clone(),
            what: plan.what.clone(),
            wire: plan.wire.is_some(),
            held_bytes: plan.bounds.bytes as u64,
            held_millis: u64::try_from(plan.bounds.age.as_millis()).unwrap_or(u64::MAX),
        });
        let answer = ask_to_make(&process, &mut link, name, &start, &fds)?;
        let gate = ProcessGate::new(name, Link::new(ours), Arc::clone(&board));
        Ok((Self { process, link, board, gate }, answer))
    }

    /// Has a process with a twin that waits load `state`; its answer. For errors see [`ask_to_make`].
    pub(super) fn load(
        &mut self,
        name: &str,
        state: &[u8],
        wire: Option<&OwnedFd>,
        disks: &[File],
    ) -> Result<Answer, GuestError> {
        if !self.board.put_state(state) {
            return Err(unusable(name, &"the state is too long"));
        }
        not_blocking(name, wire)?;
        let fds: Vec<BorrowedFd<'_>> = wire.map(AsFd::as_fd).into_iter().chain(disks.iter().map(AsFd::as_fd)).collect();
        let request = Request::Load { bytes: state.len() as u64, wire: wire.is_some() };
        ask_to_make(&self.process, &mut self.link, name, &request, &fds)
    }
}

/// A confined process may not see to that itself.
fn not_blocking(name: &str, wire: Option<&OwnedFd>) -> Result<(), GuestError> {
    let done = wire.map_or(Ok(()), |wire| rustix::io::ioctl_fionbio(wire, true));
    done.map_err(|error| unusable(name, &error))
}

impl Microvm {
    /// Starts a process and has it make a machine that boots something. It stands. `wire` takes and gives one frame a call, and is there if the machine
    /// has a card.
    ///
    /// # Errors
    /// If this host cannot have it; nothing is left behind.
    pub fn start(
        program: &Program,
        spec: Spec,
        boot: &Boot,
        wire: Option<OwnedFd>,
        bounds: GateBounds,
    ) -> Result<Self, GuestError> {
        let text = |path: &std::path::Path| path.display().to_string();
        let (what, files) = match boot {
            Boot::Pilot(path, PilotOptions { address, prefix, gateway, log }) => {
                let (address, gateway) = (address.to_bits(), gateway.map(|gateway| gateway.to_bits()));
                let what = What::Pilot { path: text(path), address, prefix: *prefix, gateway, log: *log };
                (what, vec![Image::open(path)?.file])
            }
            Boot::Linux(options) => {
                let Kernel { image, initrd, cmdline } = Kernel::open(options)?;
                let path = text(&image.path);
                let what = What::Linux { path, initrd: initrd.as_ref().map(|initrd| text(&initrd.path)), cmdline };
                (what, std::iter::once(image).chain(initrd).map(|image| image.file).collect())
            }
        };
        let memory = new_memory(&spec)?;
        let description = serde_json::to_string(&spec).expect("plain data");
        let disks = open_disks(&spec)?;
        let plan = Plan { spec: &spec, description, what, memory: &memory, wire, files, disks: &disks, bounds };
        let (ends, answer) = Ends::start(program, &spec.name, &plan)?;
        Self::of(ends, answer, spec, &memory, &disks)
    }

    /// What a process has made, as it `answer`s.
    pub(super) fn of(
        ends: Ends,
        answer: Answer,
        spec: Spec,
        memory: &SharedMemory,
        images: &[File],
    ) -> Result<Self, GuestError> {
        let Answer::Started(Started { body, disks: sizes, note }) = answer else {
            return Err(unexpected(&spec.name));
        };
        // All that is believed of it is what it alone can know: what its guest is told of the processor.
        let bytes = images.iter().map(|disk| disk.metadata().map(|about| about.len())).collect::<Result<Vec<_>, _>>();
        let described = serde_json::from_str::<Body>(&body).is_ok_and(|body| body.spec == spec);
        if !described || bytes.ok().as_ref() != Some(&sizes) {
            return Err(unexpected(&spec.name));
        }
        let ram = Ram::map(memory, false).map_err(|error| refused(error.to_string()).because(error))?;
        let Ends { process, link, board, gate } = ends;
        let disks = sizes.iter().zip(&spec.disks);
        let disks = disks.map(|(&bytes, disk)| DiskSpec { name: disk.name.clone(), bytes }).collect();
        Ok(Self(Arc::new(Inner {
            layout: layout(spec.memory).expect("a machine has memory"),
            recipe: Recipe { backend: BACKEND.to_owned(), body, disks },
            sizes,
            note,
            ram: Arc::new(ram),
            board,
            link: Mutex::new(link),
            gate: Arc::new(gate),
            process: Arc::new(process),
            attached: AtomicBool::new(false),
            told: AtomicBool::new(false),
            spec,
        })))
    }

    /// What it is.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.0.spec
    }

    /// What its operator is to know of how its dirty pages are found, if that is not what was asked for: one sentence.
    #[must_use]
    pub fn dirty_note(&self) -> Option<String> {
        self.0.note.clone()
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &crate::sys::process::PidFd {
        self.0.process.handle()
    }

    /// Whether its guest has shut itself down, or it has ended: nothing of it runs again.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.board.shown(Shown::Run) & OVER != 0 || self.process().has_exited()
    }

    /// Whether nothing of it can run again, whatever it shows. One that is over, and that nobody is attached to, is ended for that.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.process().has_exited()
            || self.is_over() && !self.0.attached.load(Ordering::SeqCst) && self.0.process.kill().is_ok()
    }

    /// Whether its vCPUs run, once all that was asked is done. False if it does not answer.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.0.must(&Request::Look).is_ok() && self.0.board.shown(Shown::Run) & RUNS != 0
    }

    /// Stops it; see [`Guest::pause`].
    ///
    /// # Errors
    /// [`GuestErrorKind::Gone`] if it has ended; else it runs on.
    pub fn pause(&self) -> Result<(), GuestError> {
        let paused = self.0.must(&Request::Pause);
        if let Err(error) = &paused
            && error.kind != GuestErrorKind::Gone
        {
            // If the question is only late.
            let _ = self.resume();
        }
        paused
    }

    /// Lets it run. Does not wait until it does. A machine whose guest has shut itself down stays off, which is no error.
    ///
    /// # Errors
    /// [`GuestErrorKind::Gone`] if it has ended.
    pub fn resume(&self) -> Result<(), GuestError> {
        let posted = self.0.lock().post(&Request::Resume);
        posted.map_err(|error| self.0.failed(error))
    }

    /// A handle that ends it.
    #[must_use]
    pub fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(ProcessFence(Arc::clone(&self.0.process)))
    }

    /// What a protector has left in it, in words.
    #[must_use]
    pub fn traces(&self) -> Vec<String> {
        let left = self.0.board.shown(Shown::Left);
        [
            (self.0.attached.load(Ordering::SeqCst), "somebody is attached"),
            (self.0.board.shown(Shown::Closed) != 0, "its output is held"),
            (left & MIRRORED != 0, "its disks are mirrored"),
            (left & TRACKED != 0, "its memory is tracked"),
        ]
        .into_iter()
        .filter(|&(there, _)| there)
        .map(|(_, what)| what.to_owned())
        .collect()
    }

    /// Orders the pilot to do something and waits until it has, for `most`.
    ///
    /// # Errors
    /// If the machine has ended or does not answer.
    pub fn order(&self, words: &[u32], most: Duration) -> Result<(), GuestError> {
        let millis = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
        match self.0.ask_within(&Request::Order { words: words.to_vec(), millis }, most + ANSWER_MAX)? {
            Answer::Done => Ok(()),
            _ => Err(unexpected(&self.0.spec.name)),
        }
    }

    /// What its guest wrote to its serial port, the last of it.
    ///
    /// # Errors
    /// If it has ended or does not answer.
    pub fn serial(&self) -> Result<String, GuestError> {
        match self.0.ask(&Request::Serial)? {
            Answer::Text(text) => Ok(text),
            _ => Err(unexpected(&self.0.spec.name)),
        }
    }
}

pub(super) fn unexpected(name: &str) -> GuestError {
    GuestError::new(GuestErrorKind::Failed, format!("the process of the microVM {name} answers what was not asked"))
        .advise("end the microVM: its guest may have broken out of it")
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, Link> {
        self.link.lock().expect("nobody panics while it asks")
    }

    fn failed(&self, error: LinkError) -> GuestError {
        let name = &self.spec.name;
        if matches!(error, LinkError::Closed) {
            let _ = self.process.handle().wait_exit(Duration::from_secs(1));
            let how = self.process.end().map_or_else(String::new, |how| format!(": {how}"));
            return GuestError::new(GuestErrorKind::Gone, format!("the microVM {name} has ended{how}"));
        }
        GuestError::new(GuestErrorKind::Failed, format!("the process of the microVM {name} does not answer"))
            .advise("nothing is lost; look whether its disk answers, or end it")
            .because(error)
    }

    fn ask_within(&self, request: &Request, within: Duration) -> Result<Answer, GuestError> {
        let answer = self.lock().ask(request, &[], within);
        match answer.map_err(|error| self.failed(error))? {
            Answer::Failed(failure) => Err(failure.into()),
            answer => Ok(answer),
        }
    }

    pub(super) fn ask(&self, request: &Request) -> Result<Answer, GuestError> {
        self.ask_within(request, ANSWER_MAX)
    }

    fn must(&self, request: &Request) -> Result<(), GuestError> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            _ => Err(unexpected(&self.spec.name)),
        }
    }
}

/// Ends the process.
#[derive(Debug)]
struct ProcessFence(Arc<Process>);

impl Fence for ProcessFence {
    fn fence(&self) -> Result<(), GuestError> {
        self.0.kill()
    }

    fn ended(&self) -> bool {
        self.0.handle().has_exited()
    }
}

/// The pages that the process has put on the board.
#[derive(Debug)]
pub(super) struct BoardTracker(Arc<Board>);

impl Tracker for BoardTracker {
    fn name(&self) -> &'static str {
        "kvm-board"
    }

    fn arm(&mut self) -> Result<(), TrackError> {
        self.0.take_found(&mut PageSet::empty(0));
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.0.take_found(dirty);
        Ok(())
    }

    fn peek(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.0.look_at_found(dirty);
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TrackError> {
        Ok(())
    }
}

/// A microVM that is protected.
#[derive(Debug)]
pub struct ProcessGuest {
    pub(super) machine: Microvm,
    pub(super) ledger: DirtyLedger<BoardTracker>,
    /// The pages of one capture. Kept to be used again.
    pub(super) dirty: PageSet,
    /// Disk writes that were given back.
    pub(super) returned: Vec<DiskWrite>,
    pub(super) copying: Copying,
    /// `None`: its thread has no real-time priority, and goes to a processor that is free anyway.
    beside: Option<Beside>,
    /// It has told of its death, and its process has not ended.
    dying: Option<GuestEvent>,
    pub(super) mirrored: bool,
    /// Writes were lost.
    pub(super) broken: bool,
    /// Pages may be on the board, or come there late, that were not taken: those of a question whose answer was an error or is missing.
    pub(super) untaken: bool,
    /// It stands, or may stand: it is to be resumed.
    pub(super) paused: bool,
    /// It went on by itself from where its caller believes that it stands.
    pub(super) gone_on: bool,
}

/// Attaches to a microVM of this process's.
///
/// # Errors
/// [`GuestErrorKind::Refused`] if somebody is attached to it.
pub fn attach(machine: &Microvm) -> Result<ProcessGuest, GuestError> {
    if machine.0.attached.swap(true, Ordering::SeqCst) {
        let error = GuestError::new(GuestErrorKind::Refused, "somebody is attached to this microVM already");
        return Err(error.advise("nothing was changed; detach the other one first"));
    }
    // The half of a pause that its own thread does is as urgent as the one that is done here.
    let urgent = realtime_of(machine.process().pid(), Some(Urgency::Pause)).inspect_err(|error| {
        tracing::warn!(vm = machine.0.spec.name, %error, "a microVM's process has no real-time priority: a busy host may make its pauses longer");
    });
    let beside = urgent.ok().map(|()| Beside::new(machine.process().pid()));
    let pages = machine.0.layout.pages();
    Ok(ProcessGuest {
        machine: machine.clone(),
        ledger: DirtyLedger::new(BoardTracker(Arc::clone(&machine.0.board)), pages),
        dirty: PageSet::empty(pages),
        returned: Vec::new(),
        copying: Copying::new(Arc::clone(&machine.0.ram)),
        beside: beside.flatten(),
        dying: None,
        mirrored: false,
        broken: false,
        untaken: false,
        paused: false,
        gone_on: false,
    })
}

impl ProcessGuest {
    /// Keeps this thread and the process's on one processor, for a question whose answer is waited for.
    pub(super) fn take_turns(&mut self) -> Option<Stays> {
        let process = self.machine.process();
        self.beside.as_mut()?.take_turns(|| !process.has_exited())
    }

    fn must_stand(&self, call: &str) {
        assert!(self.paused, "{call} of a guest that was not paused");
    }
}

impl Guest for ProcessGuest {
    fn layout(&self) -> &Layout {
        &self.machine.0.layout
    }

    fn recipe(&self) -> &Recipe {
        &self.machine.0.recipe
    }

    fn gate(&self) -> Arc<dyn Gate> {
        Arc::<ProcessGate>::clone(&self.machine.0.gate)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.gone_on = false;
        // An epoch that was not answered may end, and its guest go on, at any time.
        if !self.paused || self.untaken {
            let _stays = self.take_turns();
            self.machine.pause()?;
            self.paused = true;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if !std::mem::take(&mut self.gone_on) {
            let stays = self.take_turns();
            self.machine.resume()?;
            // It is its turn now: the guest is not to wait for what this thread does next.
            if let Some(stays) = stays {
                stays.give_way();
            }
        }
        self.paused = false;
        Ok(())
    }

    fn idle(&mut self) -> bool {
        self.wait_idle(Duration::ZERO)
    }

    fn wait_idle(&mut self, most: Duration) -> bool {
        self.machine.0.board.wait_idle(self.machine.0.spec.cpus, most)
    }

    fn pauses_alone(&self) -> bool {
        true
    }

    fn arm(&mut self) -> Result<(), GuestError> {
        self.must_stand("arming");
        self.machine.0.must(&Request::Arm)?;
        self.ledger.arm().expect("the board is there");
        self.untaken = false;
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.must_stand("a harvest");
        self.untaken = true;
        self.machine.0.must(&Request::Harvest)?;
        self.ledger.harvest(dirty).expect("the board is there");
        self.untaken = false;
        Ok(())
    }

    fn put_back(&mut self, dirty: &PageSet) {
        self.ledger.put_back(dirty);
    }

    fn put_back_writes(&mut self, mut writes: Vec<DiskWrite>) {
        if self.mirrored && !self.broken {
            writes.append(&mut self.returned);
            self.returned = writes;
        }
    }

    fn read_pages(&mut self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError> {
        if let Some(page) = pages.iter().find(|&&page| page >= self.machine.0.layout.pages()) {
            return Err(GuestError::new(GuestErrorKind::Failed, format!("the guest has no page {page}")));
        }
        bytes.resize(pages.len() * PAGE_SIZE, 0);
        by_runs(&self.machine.0.ram, pages, bytes);
        Ok(())
    }

    fn capture(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        self.must_stand("a capture");
        let start = Instant::now();
        let captured = self.ask_captured(&Request::Capture)?;
        if captured.gone_on.is_some() {
            return Err(self.not_believed());
        }
        self.take(&captured, start.elapsed(), into, parts)
    }

    fn capture_epoch(
        &mut self,
        begin: bool,
        next: u64,
        after: After,
        into: &mut Capture,
        parts: &mut PauseParts,
    ) -> Result<u64, GuestError> {
        if begin {
            // On the gate's own socket, behind what was asked there and given up: an opening that comes later would be heard.
            self.machine.0.gate.hold(next)?;
        }
        self.epoch(begin, next, after, into, parts)
    }

    fn hold_output(&mut self, epoch: u64) -> Result<(), GuestError> {
        self.must_stand("holding the output");
        self.machine.0.gate.hold(epoch)
    }

    fn open_output(&mut self) -> Result<(), GuestError> {
        self.machine.0.gate.open()
    }

    fn mirror_disks(&mut self) -> Result<(), GuestError> {
        self.machine.0.must(&Request::Mirror)?;
        self.returned.clear();
        (self.mirrored, self.broken) = (true, false);
        Ok(())
    }

    fn mirror_progress(&mut self) -> Result<MirrorProgress, GuestError> {
        if self.broken {
            return Err(not_whole());
        }
        match self.machine.0.ask(&Request::Progress)? {
            Answer::Progress { done, total, ready } => Ok(MirrorProgress { done, total, ready }),
            _ => Err(unexpected(&self.machine.0.spec.name)),
        }
    }

    fn take_writes(&mut self, into: &mut Vec<DiskWrite>, bytes: usize, wait: Duration) {
        if !self.returned.is_empty() {
            return into.append(&mut self.returned);
        }
        if !self.mirrored || self.broken {
            return;
        }
        let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        let asked = Request::TakeWrites { bytes: bytes as u64, micros };
        let taken = match self.machine.0.ask_within(&asked, wait + ANSWER_MAX) {
            Ok(Answer::Writes(writes)) => self.fetch(writes, into),
            Ok(_) => Err(unexpected(&self.machine.0.spec.name)),
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            // Whoever asks how far the copy is is told.
            self.broken = true;
            tracing::warn!(vm = self.machine.0.spec.name, %error, "disk writes of a microVM were lost on their way");
        }
    }

    fn unmirror_disks(&mut self) -> Result<(), GuestError> {
        self.returned.clear();
        self.machine.0.must(&Request::Unmirror)?;
        (self.mirrored, self.broken) = (false, false);
        Ok(())
    }

    fn events(&mut self) -> Vec<GuestEvent> {
        let inner = &self.machine.0;
        let mut events: Vec<GuestEvent> = Vec::new();
        if inner.board.shown(Shown::Events) != 0
            && let Ok(Answer::Events(told)) = inner.ask(&Request::Events)
        {
            events.extend(told.into_iter().map(GuestEvent::from));
        }
        // Others go on in its place once they are told that it is dead, so its word is not enough.
        let died = events.iter().position(|event| matches!(event, GuestEvent::Died { .. }));
        self.dying = died.map(|at| events.remove(at)).or(self.dying.take());
        if let Some(death) = self.dying.take() {
            match inner.process.kill() {
                Ok(()) if inner.told.swap(true, Ordering::SeqCst) => {}
                Ok(()) => events.push(death),
                Err(error) => {
                    tracing::error!(vm = inner.spec.name, %error, "a microVM says that it is dead, and its process does not end");
                    self.dying = Some(death);
                }
            }
        }
        if !inner.process.was_killed()
            && let Some(how) = inner.process.end()
            && !inner.told.swap(true, Ordering::SeqCst)
        {
            events.push(GuestEvent::Died { how });
        }
        events
    }

    fn fence(&self) -> Arc<dyn Fence> {
        self.machine.fence()
    }

    fn detach(self: Box<Self>) -> Result<(), GuestError> {
        let gate = &self.machine.0.gate;
        // By the gate's own way, on which releases may be.
        let opened = gate.open();
        self.machine.0.must(&Request::Detach { open: !gate.is_shut() }).and(opened)
    }
}

impl Drop for ProcessGuest {
    fn drop(&mut self) {
        // One that has ended may have been waited for, and another process have its number.
        if !self.machine.process().has_exited() {
            let _ = realtime_of(self.machine.process().pid(), None);
            if let Some(beside) = &mut self.beside {
                beside.part();
            }
        }
        self.machine.0.attached.store(false, Ordering::SeqCst);
    }
}
