//! The VM task of a primary: passes inputs to [`replicator_core::primary::Primary`] and does what it says, in order.
//!
//! It never blocks on the guest, on the standby or on the store: the pause thread, the encoder and the asker do. What it
//! does itself is memory and small synced files.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, TrySendError, channel};
use std::time::Duration;

use heartbeat::beat::GuestStatus;
use heartbeat_core::ids::{Epoch, Generation, Party};
use heartbeat_core::store::StoreAnswer;
use heartbeat_core::time::Time;
use replicator_core::message::{Durability, PeerMessage, RehearsalResult, clip};
use replicator_core::primary::{CaptureReport, GuestEvent, Operator, Output, Primary, PrimaryConfig};
use tokio::sync::{mpsc, oneshot};
use vmm_hooks::disk::{DiskChange, DiskWrite};
use vmm_hooks::guest::{self, Capture, Fence, Gate, Guest, GuestError, GuestErrorKind, PauseParts};
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::sys::sched::{Urgency, realtime};

use super::asker::Asker;
use super::beats::Beat;
use super::durable::Durable;
use super::encoder::{self, Job, Session};
use super::intake;
use super::lag::Stand;
use super::link::{Link, Received};
use super::pause::{self, CaptureOrder, Captured, Command, PauseThread};
use super::sessions::blocking;
use super::view::{View, api_state};
use super::{Request, clock, force, not_fencing};
use crate::control::api::{
    EncodedBytes, ErrorBody, ErrorKind, FailoverCause, ProtectionState, RehearsalReport, SyncProgress,
};
use crate::pages::encode::EncodeStats;
use crate::pages::shadow::ShadowMode;
use crate::status::EpochObservation;

/// What a protection is started with.
pub(super) struct Setup {
    /// The VM's name.
    pub(super) name: String,
    /// The attached guest.
    pub(super) guest: Box<dyn Guest>,
    /// How the core works.
    pub(super) config: PrimaryConfig,
    /// Bound on the copy of sent pages.
    pub(super) shadow: ShadowMode,
    /// What an acknowledgement promises of disk writes.
    pub(super) durability: Durability,
    /// The replication connection.
    pub(super) link: Link,
    /// The same, for bulk streams.
    pub(super) connection: quinn::Connection,
    /// The store, and its answers.
    pub(super) asker: (Asker, mpsc::UnboundedReceiver<StoreAnswer>),
    /// Tells the standby's node by heartbeats how the guest is.
    pub(super) vitals: Arc<heartbeat::beat::Beat>,
    /// What the failure detector says of the standby's node.
    pub(super) beats: mpsc::UnboundedReceiver<Beat>,
    /// How the VM is to be protected, as the standby is told.
    pub(super) protection: Vec<u8>,
    /// What this host remembers of the VM.
    pub(super) durable: Durable,
    /// What operators see.
    pub(super) view: Arc<View>,
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How a protection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing is to be done here any more: the guest was destroyed, or has ended, or cannot be protected by this node.
    Over,
    /// An operator ended it; the guest runs, as it was found.
    Asked,
    /// The agent stops; the guest runs, as it was found, and is to be protected again by a later life of the agent.
    Stopped,
    /// The guest runs here, as it was found, and nobody stands by.
    Alone {
        /// It was protected before.
        was_protected: bool,
    },
}

/// A captured epoch on its way to its acknowledgement.
#[derive(Debug)]
struct Flight {
    /// Its contents, until they are sent.
    capture: Option<Capture>,
    /// Its pages, for a put-back.
    pages: Vec<u64>,
    parts: PauseParts,
    ran: Duration,
    ended: Time,
    binding: bool,
    stats: EncodeStats,
}

struct Task {
    name: String,
    core: Primary,
    /// Recipe and layout, as the standby reads them.
    prepare: (Vec<u8>, Vec<u8>),
    protection: Vec<u8>,
    durability: Durability,
    commands: Sender<Command>,
    gate: Arc<dyn Gate>,
    fence: Arc<dyn Fence>,
    jobs: SyncSender<Job>,
    link: Link,
    vitals: Arc<heartbeat::beat::Beat>,
    asker: Asker,
    durable: Durable,
    view: Arc<View>,
    flights: BTreeMap<u64, Flight>,
    holding: bool,
    ending: Vec<oneshot::Sender<Result<(), ErrorBody>>>,
    rehearsals: Vec<oneshot::Sender<Result<RehearsalReport, ErrorBody>>>,
    detached: Option<Result<(), GuestError>>,
    detaching: bool,
    fencing: bool,
    /// Somebody asked for the end, and how that ends.
    told: Option<Left>,
    was_protected: bool,
    finished: bool,
}

/// Runs a protection to its end. Returns when the guest was left, lost or destroyed.
///
/// # Errors
/// If a thread cannot be started; the guest is left as it was found then.
pub(super) async fn run(setup: Setup, requests: &mut mpsc::Receiver<Request>) -> Result<Left, ErrorBody> {
    let Setup {
        name,
        guest,
        config,
        shadow,
        durability,
        link,
        connection,
        asker,
        vitals,
        mut beats,
        protection,
        durable,
        view,
    } = setup;
    let (asker, mut answers) = asker;
    let (commands, inbox) = channel();
    let (reports, mut pause_reports) = mpsc::unbounded_channel();
    let (encoder_reports, mut encoded) = mpsc::unbounded_channel();
    let (spare, spares) = channel();
    let layout_pages = guest.layout().pages();
    let gate = guest.gate();
    let fence = guest.fence();
    let prepare = (
        serde_json::to_vec(guest.recipe()).expect("a recipe is plain data"),
        serde_json::to_vec(guest.layout()).expect("a layout is plain data"),
    );
    let session = Session {
        vm: config.ownership.vm.0,
        generation: 0,
        incarnation: config.ownership.me.incarnation.0,
        layout_pages,
        disks: guest.recipe().disks.iter().map(|disk| disk.bytes).collect(),
    };
    let no_thread = |error: std::io::Error| {
        ErrorBody::new(ErrorKind::Failed, "a thread could not be started; the VM runs on unprotected").because(&error)
    };
    let (tell, known) = channel();
    if !session.disks.is_empty() {
        tokio::spawn(intake::known(connection.clone(), Arc::clone(&session.disks), tell));
    }
    let jobs = encoder::start(session, shadow, connection, spare, encoder_reports);
    // The guest is handed over once the thread runs, so that it is still here to be left if there is none.
    let (hand, take) = channel::<PauseThread>();
    let started = jobs.and_then(|jobs| {
        let alone = guest.pauses_alone();
        let body = move || {
            if let Ok(thread) = take.recv() {
                if alone && let Err(error) = realtime(Urgency::Pause) {
                    tracing::warn!(%error, "a VM's pauses have no real-time priority: a busy host may make them longer");
                }
                thread.run();
            }
        };
        std::thread::Builder::new().name("us-pause".into()).spawn(body).map(|_| jobs)
    });
    let jobs = match started {
        Ok(jobs) => jobs,
        Err(error) => {
            blocking(move || guest.detach()).await??;
            return Err(no_thread(error));
        }
    };
    let thread = PauseThread::new(guest, inbox, reports, jobs.clone(), (spares, known), Stand::new(view.lag()));
    hand.send(thread).map_err(|_| no_thread(std::io::Error::other("it ended at once")))?;
    let mut task = Task {
        name,
        core: Primary::new(config),
        prepare,
        protection,
        durability,
        commands,
        gate,
        fence,
        jobs,
        link,
        vitals,
        asker,
        durable,
        view,
        flights: BTreeMap::new(),
        holding: false,
        ending: Vec::new(),
        rehearsals: Vec::new(),
        detached: None,
        detaching: false,
        fencing: false,
        told: None,
        was_protected: false,
        finished: false,
    };
    task.vitals.report(config.ownership.vm, GuestStatus::Running);
    task.core.handle_start(clock::now());
    loop {
        task.outputs();
        if task.finished && (!task.detaching || task.detached.is_some()) {
            break;
        }
        let deadline = task.core.poll_timeout();
        tokio::select! {
            biased;
            received = task.link.next() => task.received(received),
            report = pause_reports.recv(), if task.detached.is_none() => match report {
                Some(report) => task.pause_report(report),
                None => task.pause_thread_ended(),
            },
            Some(report) = encoded.recv() => task.encoder_report(report),
            Some(answer) = answers.recv() => task.answer(&answer),
            Some(beat) = beats.recv() => task.beat(beat),
            Some(request) = requests.recv() => task.request(request),
            () = wait_until(deadline) => task.core.handle_timeout(clock::now()),
        }
    }
    Ok(task.end())
}

/// Waits until the core's deadline; for ever if there is none.
pub(super) async fn wait_until(deadline: Option<Time>) {
    match deadline {
        None | Some(Time::MAX) => std::future::pending().await,
        Some(time) => tokio::time::sleep_until(clock::instant(time).into()).await,
    }
}

impl Task {
    fn command(&self, command: Command) {
        // The thread ends only after a detach or when it is told to: then there is nothing left to command.
        let _ = self.commands.send(command);
    }

    fn outputs(&mut self) {
        while let Some(output) = self.core.poll_output() {
            tracing::trace!(vm = self.name, ?output, "core");
            match output {
                Output::Prepare { generation } => self.prepare(generation),
                Output::Sync => self.command(Command::Sync),
                Output::Capture { epoch, hold, stay_paused, window } => {
                    if hold {
                        self.holding = true;
                        self.view.set_gate(Some(Arc::clone(&self.gate)));
                    }
                    self.view.set(|status| status.epoch_current = epoch.0);
                    self.command(Command::Capture(CaptureOrder {
                        epoch: epoch.0,
                        begin_hold: hold,
                        stay_paused,
                        earliest: window.earliest,
                        latest: window.latest,
                        on_output: window.on_output,
                    }));
                }
                Output::Send { epoch } => self.send(epoch.0),
                Output::PutBack { epoch } => self.put_back(epoch.0),
                Output::Release { through } => self.release(through.0),
                Output::OpenOutput => {
                    self.holding = false;
                    self.view.went_alone();
                    self.view.set_gate(None);
                    self.command(Command::Open);
                }
                // What is held stays held: the core releases nothing more. The gate is shut for good at the fence.
                Output::Mute => self.command(Command::Pause),
                Output::Cancel => self.command(Command::Cancel),
                Output::Resume => self.command(Command::Resume),
                Output::Fence => self.destroy(),
                Output::Ask(request) => self.asker.ask(request),
                Output::Peer(message) => {
                    if let PeerMessage::GuestDied { .. } = message {
                        let status = if self.fence.ended() { GuestStatus::Dead } else { GuestStatus::Frozen };
                        self.vitals.report(self.core.config().ownership.vm, status);
                        self.view.failover_began(FailoverCause::GuestDied, None);
                    }
                    self.link.send(message);
                }
                Output::PersistGeneration(generation) => self.persist(generation),
                Output::Close(code) => self.link.close(code, ""),
                Output::Detach => {
                    self.detaching = true;
                    self.command(Command::Detach);
                }
                Output::State { state, reason } => {
                    self.was_protected |= state == replicator_core::state::ProtectionState::Protected;
                    if state == replicator_core::state::ProtectionState::FailingOver {
                        // Unless something else was seen before, it is the age of the oldest epoch.
                        self.view.failover_began(FailoverCause::Unacknowledged, None);
                    }
                    self.view.set_state(api_state(state), &reason);
                }
                Output::Finished => self.finished = true,
            }
        }
    }

    fn prepare(&mut self, generation: Generation) {
        self.view.set_generation(generation.0);
        self.job(Job::Begin { generation: generation.0 });
        let (recipe, layout) = self.prepare.clone();
        self.link.send(PeerMessage::Prepare {
            vm: self.core.config().ownership.vm,
            name: self.name.clone(),
            generation,
            recipe,
            layout,
            durability: self.durability,
            protection: self.protection.clone(),
        });
    }

    /// Gives the encoder something to do. Its queue has room: the chunks of the initial sync have been flushed when epochs
    /// begin, and of those there are fewer than the queue holds.
    fn job(&self, job: Job) {
        match self.jobs.try_send(job) {
            // An encoder that has ended told why, and the core acts on that.
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => panic!("the encoder's queue is full: the pipeline is too long for it"),
        }
    }

    fn send(&mut self, epoch: u64) {
        let Some(flight) = self.flights.get_mut(&epoch) else { return };
        let Some(capture) = flight.capture.take() else { return };
        let binding = flight.binding;
        self.job(Job::Epoch { epoch, binding, capture });
    }

    fn put_back(&mut self, epoch: u64) {
        let Some(flight) = self.flights.remove(&epoch) else { return };
        self.job(Job::Forget(flight.pages.clone()));
        // Of an epoch that was sent the writes are gone. The session ends then, and with it the mirror.
        let writes = flight.capture.map(|capture| capture.disk).unwrap_or_default();
        self.command(Command::PutBack(flight.pages, writes));
    }

    fn release(&mut self, through: u64) {
        self.gate.release(through);
        let now = clock::now();
        let later = self.flights.split_off(&(through + 1));
        for (epoch, flight) in std::mem::replace(&mut self.flights, later) {
            // The epochs before output is held wait for the rehearsal, not for the standby: they would spoil the figures.
            if flight.binding {
                self.observe(epoch, &flight, now);
            }
        }
    }

    fn observe(&self, epoch: u64, flight: &Flight, now: Time) {
        let stats = &flight.stats;
        self.view.observe(&EpochObservation {
            epoch,
            length: flight.ran + flight.parts.total,
            pause: flight.parts,
            commit: now.since(flight.ended),
            dirty_pages: u64::try_from(flight.pages.len()).expect("a page count fits"),
            bytes: EncodedBytes {
                zero: stats.zero.bytes,
                same: stats.same.bytes,
                delta: stats.delta.bytes,
                lz4: stats.lz4.bytes,
                raw: stats.raw.bytes,
                device: stats.device_wire_bytes,
            },
            wire_bytes: stats.wire_bytes,
        });
    }

    fn destroy(&mut self) {
        self.fencing = true;
        let (gate, fence) = (Arc::clone(&self.gate), Arc::clone(&self.fence));
        let name = self.name.clone();
        self.command(Command::Quit);
        tokio::task::spawn_blocking(move || {
            // May wait for a process that does not answer, for seconds.
            gate.shut();
            match fence.fence() {
                Ok(()) => tracing::warn!(vm = name, "this copy was destroyed: the VM runs elsewhere"),
                Err(error) => {
                    tracing::error!(vm = name, %error, "this copy could not be destroyed; it is mute and paused");
                }
            }
        });
    }

    fn persist(&mut self, generation: Generation) {
        match self.durable.set_generation(generation.0) {
            Ok(()) => {
                self.view.set_generation(generation.0);
                self.core.handle_generation_persisted(clock::now(), generation);
            }
            Err(error) => {
                // Without it nothing may be acted upon: the VM stays as the stricter rule has it.
                tracing::error!(vm = self.name, %error, "the generation could not be made durable");
                self.view.set_state(ProtectionState::Error, "this host cannot write its state directory");
            }
        }
    }

    fn received(&mut self, received: Received) {
        let now = clock::now();
        match received {
            Received::Message(message) => {
                if let PeerMessage::Rehearsed { epoch, result } = &message {
                    self.rehearsed(epoch.0, result);
                }
                self.core.handle_peer(now, message);
            }
            Received::Lost { reason } => {
                tracing::warn!(vm = self.name, reason, "the replication connection is lost");
                self.core.handle_connection_lost(now, &clip(&reason));
            }
        }
    }

    /// Tells the operators who asked how the rehearsal went.
    fn rehearsed(&mut self, epoch: u64, result: &RehearsalResult) {
        let report = match result {
            RehearsalResult::Loads { launch, load } => {
                Ok(RehearsalReport { epoch, launch_ms: launch.as_secs_f64() * 1e3, load_ms: load.as_secs_f64() * 1e3 })
            }
            RehearsalResult::Fails { reason } => {
                Err(ErrorBody::new(ErrorKind::Failed, format!("the standby's copy does not load: {reason}"))
                    .advise("the VM runs on here; it is not protected until its copy loads"))
            }
            RehearsalResult::Busy => Err(ErrorBody::new(
                ErrorKind::Refused,
                "the standby is busy with another rehearsal; this one was not tried",
            )
            .advise("nothing has changed; ask again when the other one is over")),
        };
        for reply in self.rehearsals.drain(..) {
            let _ = reply.send(report.clone());
        }
    }

    fn pause_report(&mut self, report: pause::Report) {
        let now = clock::now();
        match report {
            pause::Report::Mirroring(progress) => {
                let blocks = |bytes: u64| bytes / PAGE_SIZE as u64;
                let (done_pages, total_pages) = (blocks(progress.done), blocks(progress.total));
                self.view.set_progress(SyncProgress { done_pages, total_pages, round: 0 });
            }
            pause::Report::Syncing { round, done, total } => {
                self.view.set_progress(SyncProgress { done_pages: done, total_pages: total, round });
            }
            pause::Report::Synced => self.core.handle_synced(now),
            pause::Report::SyncFailed(error) => self.core.handle_sync_failed(now, &clip(&told(&error))),
            pause::Report::Captured(captured) => self.captured(now, *captured),
            pause::Report::CaptureFailed { epoch, error } => {
                tracing::warn!(vm = self.name, epoch, %error, advice = error.advice, "an epoch was not captured");
                let retryable = error.kind == GuestErrorKind::Failed;
                self.core.handle_capture_failed(now, Epoch(epoch), retryable, &clip(&told(&error)));
            }
            pause::Report::Event(event) => self.guest_event(now, event),
            pause::Report::Opened(Err(error)) => {
                tracing::error!(vm = self.name, %error, "output is still held; unprotect the VM to let it pass");
            }
            pause::Report::Paused(Err(error)) | pause::Report::Resumed(Err(error)) => {
                tracing::error!(vm = self.name, %error, advice = error.advice, "the guest did not obey");
            }
            pause::Report::Opened(Ok(())) | pause::Report::Paused(Ok(())) | pause::Report::Resumed(Ok(())) => {}
            pause::Report::Detached(result) => self.detached = Some(result),
        }
    }

    /// The thread has ended without a report: it was told to quit, or it failed. Nothing can be done in the guest any more.
    fn pause_thread_ended(&mut self) {
        let error = GuestError::new(
            GuestErrorKind::Failed,
            "the pause thread has ended; the guest was not left as it was found",
        );
        self.detached = Some(Err(error));
        if !self.fencing {
            let how = "the thread that serves the guest has ended";
            self.core.handle_connection_lost(clock::now(), how);
        }
    }

    fn captured(&mut self, now: Time, captured: Captured) {
        let Captured { epoch, capture, parts, ran, began, held_frames, first_output } = captured;
        let pages = u64::try_from(capture.pages.len()).expect("a page count fits");
        let bytes = u64::try_from(capture.bytes.len() + capture.device.len() + disk_bytes(&capture.disk))
            .expect("a length fits");
        let report = CaptureReport {
            epoch: Epoch(epoch),
            paused_at: began,
            pause: parts.total,
            pages,
            bytes,
            held_frames,
            first_output: first_output.map(clock::time_of),
        };
        let flight = Flight {
            pages: capture.pages.clone(),
            capture: Some(capture),
            parts,
            ran,
            ended: began + parts.total,
            binding: self.holding,
            stats: EncodeStats::default(),
        };
        self.flights.insert(epoch, flight);
        self.core.handle_captured(now, report);
    }

    fn guest_event(&mut self, now: Time, event: guest::GuestEvent) {
        tracing::info!(vm = self.name, ?event, "guest");
        let event = match event {
            guest::GuestEvent::Shutdown => GuestEvent::Shutdown { gone: self.fence.ended() },
            guest::GuestEvent::Reset => GuestEvent::Reset,
            guest::GuestEvent::Paused => GuestEvent::Paused,
            guest::GuestEvent::Resumed => GuestEvent::Resumed,
            guest::GuestEvent::Died { how } => GuestEvent::Died { how: clip(&how) },
            guest::GuestEvent::Changed { what } => GuestEvent::Changed { what: clip(&what) },
        };
        self.core.handle_guest_event(now, event);
    }

    fn encoder_report(&mut self, report: encoder::Report) {
        let now = clock::now();
        match report {
            encoder::Report::Sent { epoch, stats } => {
                if let Some(flight) = self.flights.get_mut(&epoch) {
                    flight.stats = stats;
                }
            }
            encoder::Report::Unencodable { epoch, error } => {
                tracing::error!(vm = self.name, epoch, %error, "an epoch cannot be encoded");
                self.core.handle_connection_lost(now, &clip(&error.to_string()));
            }
            encoder::Report::Spared { bytes } => {
                tracing::info!(vm = self.name, bytes, "the standby had this much of the disks already");
                self.view.spared(bytes);
            }
            encoder::Report::Incomplete(incomplete) => {
                tracing::error!(vm = self.name, %incomplete, "the first copy of the disks is not whole");
                self.core.handle_connection_lost(now, &clip(&incomplete.to_string()));
            }
            encoder::Report::Broken { reason } => self.core.handle_connection_lost(now, &clip(&reason)),
        }
    }

    fn answer(&mut self, answer: &StoreAnswer) {
        if self.durable.store().is_none()
            && let Err(error) = self.durable.set_store(&answer.store.to_string())
        {
            // The first store that answers must be remembered before it is believed.
            tracing::error!(vm = self.name, %error, "the store's identity could not be made durable");
            return;
        }
        self.core.handle_answer(clock::now(), answer);
    }

    fn beat(&mut self, beat: Beat) {
        let now = clock::now();
        match beat {
            Beat::Suspected { last_heard } => {
                if self.view.status().state == ProtectionState::Protected {
                    self.view.failover_began(FailoverCause::Silence, last_heard);
                }
                self.core.handle_peer_suspected(now);
            }
            Beat::Heard => {
                self.view.failover_ceased();
                self.core.handle_peer_heard(now);
            }
            Beat::Restarted(incarnation) => self.core.handle_peer_restarted(now, incarnation),
            // The standby's node runs no copy of this VM.
            Beat::GuestLost(_) => {}
        }
    }

    fn request(&mut self, request: Request) {
        let now = clock::now();
        let refused = |message: String| ErrorBody::new(ErrorKind::Refused, message);
        match request {
            Request::Unprotect(reply) => self.unprotect(now, reply, Left::Asked),
            Request::Stop(reply) => self.unprotect(now, reply, Left::Stopped),
            Request::Failover { planned: true, reply } => {
                let answer = self.core.handle_operator(now, Operator::Failover);
                if answer.is_ok() {
                    self.view.failover_began(FailoverCause::Planned, None);
                }
                // An operator who left does not wait for the answer.
                let _ = reply.send(answer.map_err(refused));
            }
            Request::Failover { planned: false, reply } => {
                let body = refused(format!("{} runs here, and its host is not lost", self.name))
                    .advise("use --planned to move it, or ask the standby's agent to take over");
                let _ = reply.send(Err(body));
            }
            Request::Fence { reply, .. } => drop(reply.send(Err(not_fencing(&self.name)))),
            Request::MayForce(reply) => {
                let forceable = self.core.may_be_forced().map(|()| self.durable.forceable());
                let _ = reply.send(forceable.map_err(|why| refused(why.to_owned())));
            }
            Request::Forced { store, keeper, reply } => {
                let me = self.core.config().ownership.me.node;
                let kept = force::keep(&mut self.durable, &mut self.asker, me, store, keeper);
                if kept.is_ok() {
                    self.core.handle_forced(now, store);
                }
                let _ = reply.send(kept);
            }
            Request::Rehearse(reply) => match self.core.handle_operator(now, Operator::Rehearse) {
                Ok(()) => self.rehearsals.push(reply),
                Err(why) => drop(reply.send(Err(refused(why)))),
            },
        }
    }

    fn unprotect(&mut self, now: Time, reply: oneshot::Sender<Result<(), ErrorBody>>, end: Left) {
        if let Err(why) = self.core.handle_operator(now, Operator::Unprotect) {
            let _ = reply.send(Err(ErrorBody::new(ErrorKind::Refused, why)));
            return;
        }
        self.told = self.told.or(Some(end));
        self.ending.push(reply);
        // A later life of this agent must not take up what its operator ended.
        if end == Left::Asked
            && let Err(error) = self.durable.set_protection(None)
        {
            tracing::error!(vm = self.name, %error, "it could not be noted that the protection was ended");
        }
    }

    /// How it ended, for who would protect the guest again.
    fn left(&self) -> Left {
        let state = self.view.status().state;
        match (self.told, state) {
            _ if self.fencing || self.fence.ended() => Left::Over,
            (Some(told), _) => told,
            (None, ProtectionState::Degraded | ProtectionState::Unprotected) if self.detaching => {
                Left::Alone { was_protected: self.was_protected }
            }
            _ => Left::Over,
        }
    }

    /// The guest was left, lost or destroyed: tell who waits, and end the threads.
    fn end(mut self) -> Left {
        self.view.set_gate(None);
        self.vitals.forget(self.core.config().ownership.vm);
        let result = match self.detached.take() {
            Some(Err(error)) if self.detaching => Err(ErrorBody::from(error)),
            Some(_) | None => Ok(()),
        };
        if let Err(body) = &result {
            tracing::error!(vm = self.name, message = body.message, "something was left in the guest");
        }
        for reply in self.ending.drain(..) {
            let _ = reply.send(result.clone());
        }
        self.command(Command::Quit);
        let (standby, left) = (self.core.config().standby.node, self.left());
        tracing::info!(vm = self.name, %standby, ?left, "protection ended");
        left
    }
}

/// Bytes that disk writes take on the wire.
fn disk_bytes(writes: &[DiskWrite]) -> usize {
    let data = |write: &DiskWrite| if let DiskChange::Data(data) = &write.change { data.len() } else { 0 };
    writes.iter().map(data).sum()
}

fn told(error: &GuestError) -> String {
    if error.advice.is_empty() { error.message.clone() } else { format!("{}; {}", error.message, error.advice) }
}

/// The parties of a protection, for its start.
pub(super) fn standby_party(connection: &heartbeat::quic::Connection) -> Party {
    Party { node: connection.peer.node, incarnation: connection.incarnation }
}
