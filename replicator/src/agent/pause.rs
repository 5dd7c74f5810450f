//! The pause path: the one thread that touches a protected guest.
//!
//! It owns the [`Guest`], takes [`Command`]s and answers with [`Report`]s. Nothing in it is async. While a guest is
//! protected it never waits for the standby: a capture is handed over in its report, and the core orders no more of them
//! than its pipeline holds. During the initial sync it waits for the encoder, which is what bounds memory then.
//!
//! Promises:
//! - an epoch is sealed between pause and resume, before its dirty pages are harvested (docs/protocol.md, clause P2);
//! - pages of a failed capture come again with the next one;
//! - while a capture waits for its moment, other commands are served within [`SLICE`].

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use heartbeat_core::time::Time;
use replicator_core::pacing::OnOutput;
use tokio::sync::mpsc::UnboundedSender;
use vmm_hooks::disk::{DiskWrite, MirrorProgress};
use vmm_hooks::guest::{After, Capture, Gate, Guest, GuestError, GuestErrorKind, GuestEvent, PauseParts};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use super::lag::Stand;
use super::{clock, encoder};
use crate::disk::known::Known;

/// The longest this thread waits without looking at its commands and at the guest.
const SLICE: Duration = Duration::from_millis(5);
/// How long it waits for the guest to have nothing to do, while its output waits, before it looks at its commands.
const LOOK: Duration = Duration::from_micros(150);
/// Pages of one chunk of the initial sync: 1 MiB.
const CHUNK_PAGES: usize = 256;
/// Rounds of the initial sync before it goes on with what is left.
const MAX_ROUNDS: u32 = 12;
/// How often the first copy of the disks is asked how far it is.
const MIRROR_LOOK: Duration = Duration::from_millis(100);
/// A round this small is left to the first whole epoch.
const SMALL_ROUND: u64 = 2048;

/// When and how one epoch is to be captured.
#[derive(Debug, Clone, Copy)]
pub(super) struct CaptureOrder {
    /// Its number.
    pub(super) epoch: u64,
    /// Output emitted after this capture is held: the first epoch the standby will hold.
    pub(super) begin_hold: bool,
    /// Not before.
    pub(super) earliest: Time,
    /// Not after.
    pub(super) latest: Time,
    /// How output that waits ends the epoch; `None`: not at all.
    pub(super) on_output: Option<OnOutput>,
    /// Leave the guest paused: this is its last epoch here.
    pub(super) stay_paused: bool,
}

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    /// Arm the tracker and send all memory, in rounds.
    Sync,
    /// Capture an epoch.
    Capture(CaptureOrder),
    /// The capture that waits for its moment is not wanted: it is reported as failed.
    Cancel,
    /// These pages were not committed, nor these disk writes, which were not sent.
    PutBack(Vec<u64>, Vec<DiskWrite>),
    /// Let output pass by itself.
    Open,
    /// Stop the guest and leave it stopped, gate as it is.
    Pause,
    /// Let the guest run.
    Resume,
    /// Leave the guest as it was found, and end the thread.
    Detach,
    /// End the thread and leave the guest as it stands (it has ended, or is to be ended).
    Quit,
}

/// What the thread answers.
#[derive(Debug)]
pub(super) enum Report {
    /// The first copy of the disks goes on.
    Mirroring(MirrorProgress),
    /// Sync goes on.
    Syncing {
        /// Which round, from 1.
        round: u32,
        /// Pages sent in this round.
        done: u64,
        /// Pages of this round.
        total: u64,
    },
    /// All memory was sent once; what has been written since is tracked.
    Synced,
    /// Sync failed.
    SyncFailed(GuestError),
    /// An epoch was captured.
    Captured(Box<Captured>),
    /// An epoch could not be captured; its pages come again.
    CaptureFailed {
        /// Which.
        epoch: u64,
        /// Why.
        error: GuestError,
    },
    /// Something happened in the guest.
    Event(GuestEvent),
    /// The answer to [`Command::Open`].
    Opened(Result<(), GuestError>),
    /// The answer to [`Command::Pause`].
    Paused(Result<(), GuestError>),
    /// The answer to [`Command::Resume`].
    Resumed(Result<(), GuestError>),
    /// The answer to [`Command::Detach`]: the thread has ended.
    Detached(Result<(), GuestError>),
}

/// Measurements of one captured epoch.
#[derive(Debug)]
pub(super) struct Captured {
    /// Which.
    pub(super) epoch: u64,
    /// Its contents.
    pub(super) capture: Capture,
    /// The pause.
    pub(super) parts: PauseParts,
    /// How long the guest ran before it, from the end of the pause before.
    pub(super) ran: Duration,
    /// When the pause began.
    pub(super) began: Time,
    /// Frames that the epoch holds.
    pub(super) held_frames: u64,
    /// When the first of them was emitted.
    pub(super) first_output: Option<Instant>,
}

/// A part of the initial sync, on its way to the encoder.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Page numbers, ascending.
    pub(super) pages: Vec<u64>,
    /// Their bytes.
    pub(super) bytes: Vec<u8>,
}

/// The thread's state.
pub(super) struct PauseThread {
    guest: Box<dyn Guest>,
    gate: Arc<dyn Gate>,
    commands: Receiver<Command>,
    reports: UnboundedSender<Report>,
    chunks: SyncSender<encoder::Job>,
    spare: Receiver<Capture>,
    known: Option<Receiver<Known>>,
    order: Option<CaptureOrder>,
    running_since: Instant,
    dirty: PageSet,
    stopped: bool,
    stand: Stand,
    /// The command that ended a sync half way.
    interrupting: Option<Command>,
}

impl std::fmt::Debug for PauseThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PauseThread").field("order", &self.order).finish_non_exhaustive()
    }
}

/// Whether the thread goes on.
enum Next {
    Go,
    End,
}

impl PauseThread {
    /// Takes the guest. `chunks` leads to the encoder, `spare` brings used captures back, `known` what the standby has of the disks.
    pub(super) fn new(
        guest: Box<dyn Guest>,
        commands: Receiver<Command>,
        reports: UnboundedSender<Report>,
        chunks: SyncSender<encoder::Job>,
        (spare, known): (Receiver<Capture>, Receiver<Known>),
        stand: Stand,
    ) -> Self {
        let gate = guest.gate();
        let dirty = PageSet::empty(guest.layout().pages());
        Self {
            guest,
            gate,
            commands,
            reports,
            chunks,
            spare,
            known: Some(known),
            order: None,
            running_since: Instant::now(),
            dirty,
            stopped: false,
            stand,
            interrupting: None,
        }
    }

    /// Runs until it is told to end or its task is gone. A task that vanishes leaves the guest as it is: mute if it was held.
    pub(super) fn run(mut self) {
        loop {
            let command = match (self.interrupting.take(), self.order) {
                (Some(command), _) => Ok(command),
                (None, None) => self.commands.recv_timeout(SLICE * 4),
                (None, Some(order)) => self.await_moment(order),
            };
            let next = match command {
                Ok(Command::Detach) => {
                    let answer = self.guest.detach();
                    let _ = self.reports.send(Report::Detached(answer));
                    return;
                }
                Ok(command) => self.serve(command),
                Err(RecvTimeoutError::Timeout) => Next::Go,
                Err(RecvTimeoutError::Disconnected) => Next::End,
            };
            if matches!(next, Next::End) {
                return;
            }
            self.hear();
        }
    }

    /// Tells what happened in the guest.
    fn hear(&mut self) {
        for event in self.guest.events() {
            self.stand.heard(&event, Instant::now());
            self.report(Report::Event(event));
        }
    }

    /// Stops the guest, and the time that it stands for us begins.
    fn hold(&mut self) -> Result<(), GuestError> {
        let asked = Instant::now();
        self.guest.pause()?;
        self.stand.stops(asked);
        Ok(())
    }

    /// Lets the guest run.
    fn let_run(&mut self) -> Result<(), GuestError> {
        self.let_run_on(None)
    }

    /// Lets the guest run; `since`: it does since then.
    fn let_run_on(&mut self, since: Option<Instant>) -> Result<(), GuestError> {
        let resumed = self.guest.resume();
        self.running_since = since.unwrap_or_else(Instant::now);
        if resumed.is_ok() {
            self.stand.runs(self.running_since);
        }
        resumed
    }

    /// A report that nobody waits for any more is dropped: the next receive sees that the task is gone.
    fn report(&self, report: Report) {
        let _ = self.reports.send(report);
    }

    fn serve(&mut self, command: Command) -> Next {
        match command {
            Command::Sync => match self.sync() {
                Ok(Next::End) => return Next::End,
                Ok(Next::Go) => self.report(Report::Synced),
                Err(error) => self.report(Report::SyncFailed(error)),
            },
            Command::Capture(order) => self.order = Some(order),
            Command::Cancel => self.cancel(),
            Command::PutBack(pages, writes) => {
                let mut set = PageSet::empty(self.dirty.capacity());
                for page in pages {
                    set.insert(page);
                }
                self.guest.put_back(&set);
                self.guest.put_back_writes(writes);
            }
            Command::Open => {
                self.cancel();
                // Output first: what QEMU makes of its block jobs must not keep it.
                let opened = self.guest.open_output();
                let answer = opened.and(self.guest.unmirror_disks());
                self.report(Report::Opened(answer));
            }
            Command::Pause => {
                self.cancel();
                let answer = self.hold();
                self.stopped = answer.is_ok();
                self.report(Report::Paused(answer));
            }
            Command::Resume => {
                let answer = self.let_run();
                self.stopped = answer.is_err();
                self.report(Report::Resumed(answer));
            }
            Command::Detach => unreachable!("served by run, which owns the guest"),
            Command::Quit => return Next::End,
        }
        Next::Go
    }

    /// Forgets the capture that waits for its moment, and says so.
    fn cancel(&mut self) {
        if let Some(CaptureOrder { epoch, .. }) = self.order.take() {
            let error = GuestError::new(GuestErrorKind::Failed, "the capture was cancelled");
            self.report(Report::CaptureFailed { epoch, error });
        }
    }

    /// Waits a slice for the ordered capture's moment; captures when it has come.
    fn await_moment(&mut self, order: CaptureOrder) -> Result<Command, RecvTimeoutError> {
        match self.commands.try_recv() {
            Ok(command) => return Ok(command),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) => {}
        }
        let now = clock::now();
        let latest = order.latest.max(order.earliest);
        if now < order.earliest {
            let early = order.earliest.since(now);
            let Some(on_output) = order.on_output else { return self.commands.recv_timeout(early.min(SLICE)) };
            if early > on_output.sooner {
                return self.commands.recv_timeout((early - on_output.sooner).min(SLICE));
            }
            // A guest that has nothing to do, and output that waits: running on would gain nothing.
            let Some(first) = self.gate.wait_output(Instant::now() + early.min(SLICE)) else {
                return Err(RecvTimeoutError::Timeout);
            };
            let missing = on_output.gather.saturating_sub(first.elapsed());
            if !missing.is_zero() {
                return self.commands.recv_timeout(early.min(missing).min(SLICE));
            }
            if !self.guest.wait_idle(early.min(LOOK)) {
                return Err(RecvTimeoutError::Timeout);
            }
            self.order = None;
            self.capture(order);
            return Err(RecvTimeoutError::Timeout);
        }
        let left = latest.since(now);
        let due = if left.is_zero() {
            true
        } else if let Some(OnOutput { gather, .. }) = order.on_output {
            match self.gate.wait_output(Instant::now() + left.min(SLICE)) {
                Some(first) => {
                    // Once output waits, the epoch gathers what comes with it, then ends.
                    let missing = gather.saturating_sub(first.elapsed()).min(left);
                    if !missing.is_zero() {
                        return self.commands.recv_timeout(missing.min(SLICE));
                    }
                    true
                }
                None => false,
            }
        } else {
            return self.commands.recv_timeout(left.min(SLICE));
        };
        if due {
            self.order = None;
            self.capture(order);
        }
        Err(RecvTimeoutError::Timeout)
    }

    fn capture(&mut self, order: CaptureOrder) {
        let epoch = order.epoch;
        let mut capture = self.spare.try_recv().unwrap_or_default();
        let mut parts = PauseParts::default();
        let ran = self.running_since.elapsed();
        let first_output = self.gate.wait_output(Instant::now());
        let began = clock::now();
        let start = Instant::now();
        let result = self.capture_paused(order, &mut capture, &mut parts);
        let resume = Instant::now();
        // A guest that its owner or the core has stopped stays stopped.
        let stay = self.stopped || (order.stay_paused && result.is_ok());
        let resumed = if stay { Ok(()) } else { self.let_run_on(parts.ran_again) };
        self.stopped = stay;
        self.running_since = parts.end(start, resume);
        let held_frames = match result.and_then(|held| resumed.map(|()| held)) {
            Ok(held) => held,
            Err(error) => {
                // If the capture was whole and only the resume failed, it will not be sent: its pages come again.
                let mut set = PageSet::empty(self.dirty.capacity());
                capture.pages.iter().for_each(|&page| set.insert(page));
                self.guest.put_back(&set);
                self.guest.put_back_writes(std::mem::take(&mut capture.disk));
                // Of a guest that is gone its events tell, and nothing else: its end is no failed capture.
                if error.kind != GuestErrorKind::Gone {
                    self.report(Report::CaptureFailed { epoch, error });
                }
                return;
            }
        };
        let captured = Captured { epoch, capture, parts, ran, began, held_frames, first_output };
        self.report(Report::Captured(Box::new(captured)));
    }

    fn capture_paused(
        &mut self,
        order: CaptureOrder,
        capture: &mut Capture,
        parts: &mut PauseParts,
    ) -> Result<u64, GuestError> {
        capture.pages.clear();
        capture.disk.clear();
        // It may stand from now on, also if it fails; then it is let run again.
        self.stand.stops(Instant::now());
        let after = if self.stopped || order.stay_paused { After::Stand } else { After::Run };
        self.guest.capture_epoch(order.begin_hold, order.epoch + 1, after, capture, parts).inspect_err(|_| {
            // The back end has put the pages back.
            capture.pages.clear();
        })
    }

    /// Stop, arm, run, send everything; then rounds of what was written meanwhile. Tracking is armed again only while
    /// the guest stands.
    fn sync(&mut self) -> Result<Next, GuestError> {
        if !self.guest.recipe().disks.is_empty()
            && let Next::End = self.mirror()?
        {
            return Ok(Next::End);
        }
        self.hold()?;
        let armed = self.guest.arm();
        let resumed = self.let_run();
        armed?;
        resumed?;
        let mut set = PageSet::full(self.dirty.capacity());
        let mut before = u64::MAX;
        for round in 1.. {
            if let Next::End = self.send_round(round, &set)? {
                return Ok(Next::End);
            }
            // Asked before the next harvest: whatever is harvested here is sent here.
            if round >= MAX_ROUNDS || (round > 1 && set.len() <= SMALL_ROUND) || set.len() >= before {
                return self.flush();
            }
            before = set.len();
            set.clear();
            self.hold()?;
            let harvested = self.guest.harvest(&mut set);
            let resumed = self.let_run();
            harvested?;
            if let Err(error) = resumed {
                self.guest.put_back(&set);
                return Err(error);
            }
        }
        unreachable!("the rounds are bounded")
    }

    /// Begins to mirror the disks and sends all that is written to them until their first copy is complete.
    fn mirror(&mut self) -> Result<Next, GuestError> {
        if let Some(known) = self.known.take() {
            let known = loop {
                match known.recv_timeout(SLICE) {
                    Ok(known) => break known,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        let why = "the standby did not say what it has of the disks";
                        return Err(GuestError::new(GuestErrorKind::Failed, why));
                    }
                }
                if let Some(end) = self.interrupted(None)? {
                    return Ok(end);
                }
                self.hear();
            };
            self.give(encoder::Job::Known(known))?;
        }
        self.guest.mirror_disks()?;
        loop {
            let progress = self.guest.mirror_progress()?;
            self.report(Report::Mirroring(progress));
            let looked = Instant::now();
            while looked.elapsed() < MIRROR_LOOK {
                let sent = self.send_writes(SLICE)?;
                if let Some(end) = self.interrupted(None)? {
                    return Ok(end);
                }
                if progress.ready && !sent {
                    return Ok(Next::Go);
                }
            }
            if progress.ready {
                // A guest that writes without end: what comes is sent with the rounds of the memory.
                return Ok(Next::Go);
            }
            self.hear();
        }
    }

    /// Sends what was written to the disks meanwhile. Whether there was anything.
    fn send_writes(&mut self, wait: Duration) -> Result<bool, GuestError> {
        let mut writes = Vec::new();
        self.guest.take_writes(&mut writes, CHUNK_PAGES * PAGE_SIZE, wait);
        if writes.is_empty() {
            return Ok(false);
        }
        self.give(encoder::Job::Writes(writes))?;
        Ok(true)
    }

    /// Gives the encoder a part of the initial sync; waits for room.
    fn give(&self, job: encoder::Job) -> Result<(), GuestError> {
        let refused = |_| GuestError::new(GuestErrorKind::Failed, "the standby takes no more of the initial sync");
        self.chunks.send(job).map_err(refused)
    }

    /// Whether the sync is to end: a command that came, whatever it is, is more urgent than the sync, and is served next. `set` is
    /// what was not sent of the memory.
    fn interrupted(&mut self, set: Option<&PageSet>) -> Result<Option<Next>, GuestError> {
        match self.commands.try_recv() {
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Ok(Some(Next::End)),
            Ok(command) => {
                self.interrupting = Some(command);
                if let Some(set) = set {
                    self.guest.put_back(set);
                }
                Err(GuestError::new(GuestErrorKind::Failed, "the initial sync was cancelled"))
            }
        }
    }

    /// Waits until the encoder has taken every chunk, so that its queue is free for epochs.
    fn flush(&self) -> Result<Next, GuestError> {
        let (done, wait) = std::sync::mpsc::channel();
        // A failed send drops `done`, and the wait fails.
        let _ = self.chunks.send(encoder::Job::Flush(done));
        match wait.recv() {
            Ok(()) => Ok(Next::Go),
            Err(_) => Err(GuestError::new(GuestErrorKind::Failed, "the standby takes no more of the initial sync")),
        }
    }

    fn send_round(&mut self, round: u32, set: &PageSet) -> Result<Next, GuestError> {
        let pages: Vec<u64> = set.iter().collect();
        let total = set.len();
        let mut done = 0;
        for chunk in pages.chunks(CHUNK_PAGES) {
            let mut bytes = Vec::new();
            if let Err(error) = self.guest.read_pages(chunk, &mut bytes) {
                self.guest.put_back(set);
                return Err(error);
            }
            let job = encoder::Job::Chunk(Chunk { pages: chunk.to_vec(), bytes });
            if let Err(error) = self.give(job) {
                self.guest.put_back(set);
                return Err(error);
            }
            done += u64::try_from(chunk.len()).expect("a chunk is small");
            self.report(Report::Syncing { round, done, total });
            self.send_writes(Duration::ZERO)?;
            if let Some(end) = self.interrupted(Some(set))? {
                return Ok(end);
            }
            self.hear();
        }
        Ok(Next::Go)
    }
}

#[cfg(test)]
mod tests;
