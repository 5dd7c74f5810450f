//! The process of a microVM: makes one machine, and does what its protector asks until that is gone.
//!
//! Promises: it is confined before it looks at what the machine is to be. A twin's machine has no device and no thread before it is loaded. When its protector's socket is closed a gate that held output is shut, and
//! the process ends. A page that was found is on the board before its question is answered, whatever the answer is. A machine goes on by itself only
//! when nothing of its capture can fail any more, and all of it is copied that the guest can change.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::board::{Board, CPUS_MAX, FEW, MIRRORED, Shown, TRACKED, nanos};
use super::link::{LinkError, receive, send};
use super::wire::{
    Answer, Captured, Event, GateRequest, GoneOn, MESSAGE_MAX, Request, Start, Started, VERSION, What, Writes, decode,
    encode,
};
use crate::disk::DiskWrite;
use crate::guest::{Gate as _, GuestError, GuestErrorKind};
use crate::kvm::bare::Bare;
use crate::kvm::boot::PilotOptions;
use crate::kvm::confine::confine_process;
use crate::kvm::gate::GateBounds;
use crate::kvm::guest::Body;
use crate::kvm::machine::{Devices, Machine, Means, Spec};
use crate::kvm::ram::Ram;
use crate::kvm::start::{Boots, Image, Kernel};
use crate::kvm::state::StateError;
use crate::kvm::track;
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::copy::by_runs;
use crate::sys::isolate::ignore_endings;
use crate::sys::memory::SharedMemory;
use crate::track::Tracker;

/// The life of a microVM's process, whose standard input is the socket of its protector. To be called by a process with one thread.
#[must_use]
pub fn main() -> ExitCode {
    // What is half dead must not go on.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::abort();
    }));
    ignore_endings();
    // Its file is `/proc/self/exe`, which would tell nobody what it is. It is only a name if that fails.
    let _ = rustix::thread::set_name(c"us-microvm");
    let socket = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(%error, "a microVM's process has no socket");
            return ExitCode::FAILURE;
        }
    };
    let confined = confine_process();
    if let Ok(missing) = &confined
        && !missing.is_empty()
    {
        tracing::warn!(missing = missing.join(", "), "a microVM's process could not be confined in all ways");
    }
    serve(socket, confined.err());
    ExitCode::SUCCESS
}

/// What there is in the process.
enum Life {
    /// No machine. The reason if none may be made here.
    Empty(Option<GuestError>),
    Waits(Box<Waiting>),
    Has(Box<Server>),
    /// It was asked for what could not be made, or has shown that a state loads.
    Over,
}

/// Answers until the other end is closed. `unfit`: why no machine may be made here.
fn serve(socket: OwnedFd, unfit: Option<GuestError>) {
    let (mut inbox, mut out) = (vec![0; MESSAGE_MAX], vec![0; MESSAGE_MAX]);
    let (mut fds, mut life) = (Vec::new(), Life::Empty(unfit));
    loop {
        let length = match receive(&socket, &mut inbox, &mut fds) {
            Ok(length) => length,
            Err(LinkError::Closed) => break,
            Err(error) => {
                tracing::error!(%error, "a microVM's process hears nothing any more");
                break;
            }
        };
        let Some((number, request)) = decode::<Request>(&inbox[..length]) else {
            tracing::error!("a microVM's process was asked what it does not know");
            break;
        };
        let answered = if let Life::Has(server) = &mut life {
            let answered = server.answer(request);
            server.show();
            answered
        } else {
            let passed = std::mem::take(&mut fds);
            let become_other = match (std::mem::replace(&mut life, Life::Over), request) {
                (Life::Empty(Some(unfit)), Request::Start(_)) => Err(unfit),
                (Life::Empty(None), Request::Start(start)) => begin(&start, passed),
                (Life::Waits(waiting), Request::Load { bytes, wire }) => waiting.load(bytes, wire, passed),
                _ => Err(out_of_turn()),
            };
            become_other.map(|(next, answer)| {
                life = next;
                answer
            })
        };
        if number == 0 {
            continue;
        }
        let answer = answered.unwrap_or_else(|error| Answer::Failed(error.into()));
        let too_long = || Answer::Failed(GuestError::new(GuestErrorKind::Failed, "the answer is too long").into());
        let length = encode(number, &answer, &mut out).or_else(|| encode(number, &too_long(), &mut out));
        let length = length.expect("an error is short");
        if send(&socket, &out[..length], &[], true).is_err() {
            break;
        }
    }
    if let Life::Has(server) = life
        && server.machine.0.gate.closed()
    {
        server.machine.0.gate.shut();
    }
}

fn refused(message: impl Into<String>) -> GuestError {
    GuestError::new(GuestErrorKind::Refused, message)
}

fn out_of_turn() -> GuestError {
    GuestError::new(GuestErrorKind::Failed, "this is asked before a machine was made, or after")
}

fn does_not_load(error: StateError) -> GuestError {
    GuestError::new(GuestErrorKind::Failed, format!("the microVM's state does not load here: {error}"))
        .advise("the committed memory is unharmed")
        .because(error)
}

/// Makes the machine, or of a twin's what can be made.
fn begin(start: &Start, fds: Vec<OwnedFd>) -> Result<(Life, Answer), GuestError> {
    if start.version != VERSION {
        return Err(refused(format!("the microVM's process speaks version {VERSION}, not {}", start.version)));
    }
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| refused("a descriptor is missing"));
    let kvm = Arc::new(crate::sys::kvm::of(next()?));
    let unusable = |error: io::Error| refused("the memory that was passed on cannot be used").because(error);
    let memory = SharedMemory::from_fd(next()?).map_err(unusable)?;
    let board = SharedMemory::from_fd(next()?).map_err(unusable)?;
    let (bell, gate) = (next()?, next()?);
    let wire = start.wire.then(&mut next).transpose()?;
    let text = &start.description;
    let unread = |error: serde_json::Error| refused("the description of the microVM cannot be read").because(error);
    let (spec, begins) = match &start.what {
        What::Pilot { path, address, prefix, gateway, log } => {
            let image = Image { file: File::from(next()?), path: PathBuf::from(path) };
            let (address, gateway) = (Ipv4Addr::from_bits(*address), gateway.map(Ipv4Addr::from_bits));
            let options = PilotOptions { address, prefix: *prefix, gateway, log: *log };
            (serde_json::from_str(text).map_err(unread)?, Ok(Boots::Pilot(image, options)))
        }
        What::Linux { path, initrd, cmdline } => {
            let image = Image { file: File::from(next()?), path: PathBuf::from(path) };
            let mut initramfs =
                |path: &String| Ok::<_, GuestError>(Image { file: File::from(next()?), path: PathBuf::from(path) });
            let initrd = initrd.as_ref().map(&mut initramfs).transpose()?;
            let kernel = Kernel { image, initrd, cmdline: cmdline.clone() };
            (serde_json::from_str(text).map_err(unread)?, Ok(Boots::Linux(kernel)))
        }
        What::Twin { scratch } => {
            let Body { spec, cpuid, chips } = serde_json::from_str(text).map_err(unread)?;
            (spec, Err((cpuid, chips, *scratch)))
        }
    };
    let spec: Spec = spec;
    let board = Board::of(board, bell, spec.cpus, spec.memory / PAGE_SIZE as u64);
    let board = Arc::new(board.ok_or_else(|| refused("the memory that was passed on is for another microVM"))?);
    if memory.length() != spec.memory || spec.cpus > CPUS_MAX {
        return Err(refused("the microVM is not what its description says"));
    }
    let bounds = GateBounds {
        bytes: usize::try_from(start.held_bytes).unwrap_or(usize::MAX),
        age: Duration::from_millis(start.held_millis),
    };
    match begins {
        Ok(boots) => {
            let devices = Devices { wire, disks: images(&spec, fds)?, bounds };
            let machine = Machine::boot(&kvm, spec, boots, Means { memory: &memory, private: false, devices })?;
            Server::begin(machine, board, gate)
        }
        Err((cpuid, chips, scratch)) => {
            let bare = Bare::new(&kvm, spec, &cpuid, chips, &memory, scratch)?;
            Ok((Life::Waits(Box::new(Waiting { bare, board, gate, bounds, scratch })), Answer::Done))
        }
    }
}

/// The images of the disks: all that is left of what was passed on.
fn images(spec: &Spec, fds: impl Iterator<Item = OwnedFd>) -> Result<Vec<File>, GuestError> {
    let disks: Vec<File> = fds.map(File::from).collect();
    if disks.len() == spec.disks.len() { Ok(disks) } else { Err(refused("an image is missing")) }
}

/// A twin's machine as far as it is there before it is loaded.
struct Waiting {
    bare: Bare,
    board: Arc<Board>,
    gate: OwnedFd,
    bounds: GateBounds,
    /// It is only to show that a state loads.
    scratch: bool,
}

impl Waiting {
    /// Makes the rest of the machine, and loads it.
    fn load(self, bytes: u64, wire: bool, fds: Vec<OwnedFd>) -> Result<(Life, Answer), GuestError> {
        let Self { bare, board, gate, bounds, scratch } = self;
        let mut fds = fds.into_iter();
        let wire = wire.then(|| fds.next().ok_or_else(|| refused("a descriptor is missing"))).transpose()?;
        let disks = images(&bare.spec, fds)?;
        let mut state = Vec::new();
        if !board.read_state(bytes, &mut state) {
            return Err(refused("a state that is too long"));
        }
        let machine = Machine::with(bare, Devices { wire, disks, bounds })?;
        machine.load(&state).map_err(does_not_load).inspect_err(|_| machine.end(None))?;
        if !scratch {
            return Server::begin(machine, board, gate);
        }
        let mut again = Vec::new();
        let read = machine.save(&mut again).map_err(does_not_load);
        machine.fence().fence()?;
        read?;
        if again.len() != state.len() {
            let why = "the microVM's state reads otherwise than it was loaded";
            return Err(GuestError::new(GuestErrorKind::Failed, why));
        }
        Ok((Life::Over, Answer::Done))
    }
}

/// Answers for the gate until the other end is closed.
fn serve_gate(machine: &Machine, socket: &OwnedFd) {
    let (mut inbox, mut out, mut fds) = (vec![0; MESSAGE_MAX], vec![0; MESSAGE_MAX], Vec::new());
    let gate = &machine.0.gate;
    while let Ok(length) = receive(socket, &mut inbox, &mut fds) {
        let Some((number, request)) = decode::<GateRequest>(&inbox[..length]) else { return };
        let mut answer = Answer::Done;
        match request {
            GateRequest::Hold(epoch) => gate.hold(epoch),
            GateRequest::Seal(next) => answer = Answer::Sealed(gate.seal(next)),
            GateRequest::Release(through) => gate.release(through),
            GateRequest::Open => gate.open(),
            GateRequest::Shut => gate.shut(),
            GateRequest::Announce => machine.announce(),
        }
        if number != 0 {
            let length = encode(number, &answer, &mut out).expect("it is short");
            if send(socket, &out[..length], &[], true).is_err() {
                return;
            }
        }
    }
}

/// The machine, and what is between it and its protector.
struct Server {
    machine: Machine,
    board: Arc<Board>,
    tracker: Box<dyn Tracker>,
    /// Pages of one harvest; kept to be used again, as the next ones are.
    dirty: PageSet,
    few: Few,
    state: Vec<u8>,
    captured: Vec<DiskWrite>,
    /// Writes that are on their way.
    writes: VecDeque<DiskWrite>,
}

/// The pages of a small epoch, copied while the machine stands. Not on the board yet: what its protector has read last is slow to write.
#[derive(Default)]
struct Few {
    pages: Vec<u64>,
    /// As long as it ever is, and written once, so that no pause waits for memory.
    bytes: Vec<u8>,
}

impl Few {
    /// To be called before the first of them are found.
    fn make_room(&mut self) {
        self.pages.reserve(FEW + 1);
        self.bytes.resize(FEW * PAGE_SIZE, 0xff);
    }

    /// Whether there are few of these; then they are what is copied next.
    fn are(&mut self, dirty: &PageSet) -> bool {
        self.pages.clear();
        self.pages.extend(dirty.iter().take(FEW + 1));
        self.pages.len() <= FEW
    }

    fn copy(&mut self, ram: &Ram) {
        by_runs(ram, &self.pages, &mut self.bytes[..self.pages.len() * PAGE_SIZE]);
    }

    fn copied(&self) -> &[u8] {
        &self.bytes[..self.pages.len() * PAGE_SIZE]
    }
}

fn length(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn untracked(error: crate::track::TrackError) -> GuestError {
    crate::kvm::guest::failed(error)
}

impl Server {
    /// Serves a new machine.
    fn begin(machine: Machine, board: Arc<Board>, gate: OwnedFd) -> Result<(Life, Answer), GuestError> {
        machine.show_on(&board);
        let (gates, named) = (machine.clone(), std::thread::Builder::new().name("gate".to_owned()));
        let gate_thread = named.spawn(move || serve_gate(&gates, &gate));
        gate_thread.map_err(|error| refused("the microVM's threads cannot be started").because(error))?;
        let inner = &machine.0;
        let body = Body { spec: inner.spec.clone(), cpuid: machine.cpuid().to_vec(), chips: machine.has_chips() };
        let started = Started {
            body: serde_json::to_string(&body).expect("plain data"),
            disks: inner.log.sizes().to_vec(),
            note: machine.dirty_note(),
        };
        let tracker = track::tracker(inner);
        let dirty = PageSet::empty(inner.vm.ram().pages());
        let server = Self {
            machine,
            board,
            tracker,
            dirty,
            few: Few::default(),
            state: Vec::new(),
            captured: Vec::new(),
            writes: VecDeque::new(),
        };
        server.show();
        Ok((Life::Has(Box::new(server)), Answer::Started(started)))
    }

    fn answer(&mut self, request: Request) -> Result<Answer, GuestError> {
        let inner = Arc::clone(&self.machine.0);
        match request {
            Request::Start(_) | Request::Load { .. } => return Err(out_of_turn()),
            Request::Pause => self.machine.pause()?,
            Request::Resume => self.machine.resume()?,
            Request::Epoch { begin, next, go_on } => {
                self.machine.pause()?;
                let mut held = 0;
                if begin {
                    inner.gate.hold(next);
                } else {
                    held = inner.gate.seal(next);
                }
                return self.capture(held, go_on).map(Answer::Captured);
            }
            Request::Capture => return self.capture(0, false).map(Answer::Captured),
            Request::MoreWrites => return Ok(Answer::Writes(self.next_writes())),
            Request::Arm => {
                self.few.make_room();
                self.tracker.arm().map_err(untracked)?;
            }
            Request::Harvest => {
                let harvested = self.harvest();
                self.board.add_found(&self.dirty);
                harvested?;
            }
            Request::Mirror => {
                self.writes.clear();
                inner.log.start();
            }
            Request::Progress => {
                let progress = inner.log.progress().ok_or_else(crate::kvm::guest::not_whole)?;
                return Ok(Answer::Progress { done: progress.done, total: progress.total, ready: progress.ready });
            }
            Request::TakeWrites { bytes, micros } => {
                self.captured.clear();
                let (bytes, wait) = (usize::try_from(bytes).unwrap_or(usize::MAX), Duration::from_micros(micros));
                inner.log.take(&mut self.captured, bytes, wait, |disk, offset, length, with| {
                    inner.blocks[disk as usize].copy(offset, length, with);
                });
                self.writes.extend(self.captured.drain(..));
                return Ok(Answer::Writes(self.next_writes()));
            }
            Request::Unmirror => {
                inner.log.end();
                self.writes.clear();
            }
            Request::Detach { open } => {
                if open {
                    inner.gate.open();
                }
                inner.log.end();
                self.writes.clear();
                let disarmed = self.tracker.disarm().map_err(untracked);
                self.machine.resume()?;
                disarmed?;
            }
            Request::Events => {
                let events = self.machine.take_events().into_iter().filter_map(Event::of);
                return Ok(Answer::Events(events.collect()));
            }
            Request::Look => {}
            Request::Order { words, millis } => self.machine.order(&words, Duration::from_millis(millis))?,
            Request::Serial => {
                let mut text = self.machine.serial();
                let surplus = text.len().saturating_sub(MESSAGE_MAX / 2);
                text.drain(..text.ceil_char_boundary(surplus));
                return Ok(Answer::Text(text));
            }
        }
        Ok(Answer::Done)
    }

    /// Finds the dirty pages. Also if it fails they are to be put on the board: the tracker may not find them again.
    fn harvest(&mut self) -> Result<(), GuestError> {
        self.dirty.clear();
        self.tracker.harvest(&mut self.dirty).map_err(untracked)
    }

    /// Puts an epoch on the board; `go_on`: lets the machine run again as soon as it can.
    fn capture(&mut self, held: u64, go_on: bool) -> Result<Captured, GuestError> {
        let captured = self.take(go_on);
        // Perhaps while it runs: they are taken when this is answered.
        self.board.add_found(&self.dirty);
        let (harvest, device, gone_on) = captured?;
        if gone_on.is_some() {
            self.board.put_copies(self.few.copied());
            // It was asked before whether it fits.
            self.board.put_state(&self.state);
        }
        Ok(Captured {
            held,
            harvest_nanos: length(harvest),
            device_nanos: length(device),
            state: self.state.len() as u64,
            writes: self.next_writes(),
            gone_on,
        })
    }

    /// Takes an epoch, and lets the machine run if that may be and the epoch is small; else its state is on the board. How long the harvest and the
    /// state took.
    fn take(&mut self, go_on: bool) -> Result<(Duration, Duration, Option<GoneOn>), GuestError> {
        let start = Instant::now();
        self.harvest()?;
        let harvested = Instant::now();
        self.machine.save(&mut self.state).map_err(|error| {
            GuestError::new(GuestErrorKind::Failed, format!("the microVM's state could not be read: {error}"))
                .because(error)
        })?;
        if !self.board.takes_state(self.state.len()) {
            return Err(GuestError::new(GuestErrorKind::Failed, "the microVM's state is too long"));
        }
        let (harvest, mut device) = (harvested - start, harvested.elapsed());
        // After what can fail: writes that were taken from the log are no longer within its bound.
        if !self.machine.0.log.capture(&mut self.captured) {
            return Err(crate::kvm::guest::not_whole());
        }
        self.writes.extend(self.captured.drain(..));
        let copying = Instant::now();
        if !(go_on && self.few.are(&self.dirty) && Board::takes_writes(&self.writes)) {
            self.board.put_state(&self.state);
            device += copying.elapsed();
            return Ok((harvest, device, None));
        }
        self.few.copy(self.machine.0.vm.ram());
        let copied = Instant::now();
        self.machine.resume()?;
        let gone_on = GoneOn {
            at: nanos(),
            copy_nanos: length(copied - copying),
            resume_nanos: length(copied.elapsed()),
            pages: self.few.pages.len() as u64,
        };
        Ok((harvest, device, Some(gone_on)))
    }

    fn next_writes(&mut self) -> Writes {
        let count = self.board.put_writes(&mut self.writes);
        Writes { count, more: !self.writes.is_empty() }
    }

    /// Shows what a protector has left in the machine.
    fn show(&self) {
        let inner = &self.machine.0;
        let left = if inner.log.active() { MIRRORED } else { 0 } | if inner.vm.logs() { TRACKED } else { 0 };
        self.board.show(Shown::Left, left);
    }
}
