//! The VM task of a standby: passes inputs to [`replicator_core::standby::Standby`] and does what it says, in order.
//!
//! It owns the staged epochs between their arrival and their commit. The twin itself belongs to a thread of its own
//! ([`super::twin`]), the streams to the intake ([`super::intake`]): this task never waits for either.

mod waiting;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeat::beat::Beat as Heartbeats;
use heartbeat_core::ids::{Epoch, Generation, Incarnation};
use heartbeat_core::store::StoreAnswer;
use heartbeat_core::time::Time;
use replicator_core::message::{CloseCode, PeerMessage, RehearsalResult, clip};
use replicator_core::standby::{ActivationResult, Output, Standby, StandbyConfig, Suspicion};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};
use vmm_hooks::disk::DiskImage;
use vmm_hooks::guest::{Fence, GuestError, Survivor, Twin};

use super::asker::Asker;
use super::beats::Beat;
use super::disks::{Committer, DiskThreads, Held, StandbyDisks};
use super::durable::{Durable, Mark};
use super::encoder::Session;
use super::fence::Fencer;
use super::intake::{self, IntakeEnd, Staged};
use super::kept::{self, Described};
use super::link::{Link, Received};
use super::owed::{LONGEST, Owed};
use super::primary::wait_until;
use super::twin::{self, Command, TwinThread};
use super::view::{View, api_state};
use super::{FenceWord, Forceable, Request, clock, force, not_fencing, wrong_side};
use crate::control::api::{
    ErrorBody, ErrorKind, FailoverCause, ProtectionState, RehearsalReport, SurvivorAt, WithoutWitness,
};
use crate::pages::staged::DeviceState;

/// How often the waiting twin is looked after.
const LOOK: Duration = Duration::from_secs(1);

/// What a standby is started with.
pub(super) struct Setup {
    /// The VM's name.
    pub(super) name: String,
    /// How the core works.
    pub(super) config: StandbyConfig,
    /// The waiting twin.
    pub(super) twin: Box<dyn Twin>,
    /// What it was built from.
    pub(super) described: Described,
    /// Where its copy comes from.
    pub(super) origin: Origin,
    /// The store, and its answers.
    pub(super) asker: (Asker, mpsc::UnboundedReceiver<StoreAnswer>),
    /// What the failure detector says of the primary's node.
    pub(super) beats: mpsc::UnboundedReceiver<Beat>,
    /// What it says when it is asked.
    pub(super) heartbeats: Arc<Heartbeats>,
    /// Switches the primary's host off, if this agent can.
    pub(super) fencer: Option<Fencer>,
    /// What this host remembers of the VM.
    pub(super) durable: Durable,
    /// What operators see.
    pub(super) view: Arc<View>,
}

/// Where a standby's copy comes from.
pub(super) enum Origin {
    /// A primary sends it.
    Primary {
        /// The twin's disks, if it has any that are replicated.
        disks: Option<Box<StandbyDisks>>,
        /// The control stream.
        link: Link,
        /// The connection, for bulk streams.
        connection: quinn::Connection,
        /// What the primary's streams carry.
        session: Session,
        /// Bound on staged bytes.
        staging: u64,
    },
    /// A former life of this agent kept it while it waited for its fence, and the twin has its memory.
    Kept {
        /// The twin's disks, if it has any that are replicated.
        disks: Option<DiskThreads>,
        /// The device state.
        device: DeviceState,
        /// This life's.
        grant: Generation,
        /// As of which it is.
        epoch: Epoch,
        /// The other host is dead, as was confirmed.
        forced: bool,
        /// The life in which that is heard now.
        life: Option<Incarnation>,
    },
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("name", &self.name).finish_non_exhaustive()
    }
}

type StopReply = oneshot::Sender<Result<(), ErrorBody>>;
type RehearsalReply = oneshot::Sender<Result<RehearsalReport, ErrorBody>>;

struct Task {
    name: String,
    core: Standby,
    /// Of a copy that a primary sends.
    link: Option<Link>,
    asker: Asker,
    durable: Durable,
    view: Arc<View>,
    twin: Option<TwinThread>,
    fence: Arc<dyn Fence>,
    staged: BTreeMap<u64, Staged>,
    rehearsing: Option<u64>,
    rehearsal_replies: Vec<RehearsalReply>,
    /// Of replicated disks.
    committer: Option<Committer>,
    intake: Option<AbortHandle>,
    described: Described,
    /// Why the copy could not be kept when that was tried last.
    unkept: Option<String>,
    /// Who stops this agent, and waits until it is.
    stopping: Option<StopReply>,
    /// Its disks, if they come to run here.
    images: Vec<DiskImage>,
    /// By the mark.
    granted: Generation,
    /// Nothing more is to come in.
    closed: bool,
    activating: bool,
    died: bool,
    gone: bool,
    leaving: bool,
    survivor: Option<Survivor>,
    finished: bool,
    /// What could not be written down.
    owed: Owed,
    /// What the core said last of the VM, while something else is shown.
    said: Option<(ProtectionState, String)>,
    heartbeats: Arc<Heartbeats>,
    fencer: Option<Fencer>,
    /// Where the fence command's word goes, and when it confirmed nothing last.
    fenced: mpsc::UnboundedSender<Result<(), ErrorBody>>,
    unconfirmed: Option<Instant>,
}

/// Runs a standby to its end: its twin was released as the survivor, which is returned, or destroyed.
pub(super) async fn run(setup: Setup, requests: &mut mpsc::Receiver<Request>) -> Option<Survivor> {
    let Setup { name, config, twin, described, origin, asker, mut beats, heartbeats, fencer, durable, view } = setup;
    let (asker, mut answers) = asker;
    let (fenced, mut fence_words) = mpsc::unbounded_channel();
    let fence = twin.fence();
    let (reports, mut twin_reports) = mpsc::unbounded_channel();
    let (staged_in, staged_out) = mpsc::unbounded_channel();
    // Without disks the intake's epochs come straight here; else when their disk writes are held.
    let (mut direct, mut held, mut threads, mut committer) = (None, None, None, None);
    let mut started = Ok(());
    let (mut own_link, mut intake, mut given, mut device) = (None, None, None, DeviceState::default());
    let images = match &origin {
        Origin::Primary { disks, .. } => disks.as_ref().map(|disks| disks.as_images()),
        Origin::Kept { disks, .. } => disks.as_ref().map(DiskThreads::as_images),
    };
    match origin {
        Origin::Primary { disks, link, connection, session, staging } => {
            match disks {
                None => direct = Some(staged_out),
                Some(mut disks) => {
                    tokio::spawn(intake::tell_known(connection.clone(), disks.take_known()));
                    match disks.start(staged_out, view.metrics().clone()) {
                        Ok((running, commits, passed_on)) => {
                            (threads, committer, held) = (Some(running), Some(commits), Some(passed_on));
                        }
                        Err(error) => started = Err(error),
                    }
                }
            }
            (own_link, intake) = (Some(link), Some(tokio::spawn(intake::run(connection, session, staging, staged_in))));
        }
        Origin::Kept { disks, device: kept, grant, epoch, forced, life } => {
            (threads, device) = (disks, kept);
            given = Some((Standby::resume(config, clock::now(), grant, epoch, forced), life));
        }
    }
    let (core, life) = given.unwrap_or_else(|| (Standby::new(config), None));
    let mut task = Task {
        name,
        core,
        link: own_link,
        asker,
        durable,
        view,
        twin: None,
        fence,
        staged: BTreeMap::new(),
        rehearsing: None,
        rehearsal_replies: Vec::new(),
        committer,
        intake: intake.as_ref().map(JoinHandle::abort_handle),
        described,
        unkept: None,
        stopping: None,
        images: images.unwrap_or_default(),
        granted: Generation::default(),
        closed: false,
        activating: false,
        died: false,
        gone: false,
        leaving: false,
        survivor: None,
        finished: false,
        owed: Owed::default(),
        said: None,
        heartbeats,
        fencer,
        fenced,
        unconfirmed: None,
    };
    // It may have been heard before this was there to be told.
    if life > Some(config.primary.incarnation) {
        task.core.handle_suspected(clock::now(), Suspicion::Restarted);
    }
    match started.and_then(|()| TwinThread::start(twin, threads, device, reports)) {
        Ok(thread) => {
            task.twin = Some(thread);
            task.core.handle_prepared(clock::now());
        }
        Err(error) => {
            task.gone = true;
            task.core.handle_prepare_failed(clock::now(), &clip(&format!("the twin's thread cannot start: {error}")));
        }
    }
    let mut look = tokio::time::interval(LOOK);
    loop {
        task.outputs();
        if task.finished && (task.gone || !task.leaving) {
            break;
        }
        let deadline = task.core.poll_timeout();
        tokio::select! {
            biased;
            received = next_received(&mut task.link) => task.received(received),
            Some(report) = twin_reports.recv() => task.twin_report(report),
            Some(answer) = answers.recv() => task.answer(&answer),
            epoch = next_of(&mut direct) => task.stage(epoch),
            epoch = next_of(&mut held) => task.held(epoch),
            Some(beat) = beats.recv() => task.beat(beat),
            Some(word) = fence_words.recv() => task.fence_ended(word),
            Some(request) = requests.recv() => task.request(request),
            ended = end_of(&mut intake) => {
                if task.leaving || task.closed {
                    continue;
                }
                task.intake_ended(ended);
            }
            () = wait_until(deadline) => task.core.handle_timeout(clock::now()),
            _ = look.tick() => {
                task.pay();
                task.look_after();
                task.look_at_the_primary();
            }
        }
    }
    task.end_intake();
    tracing::info!(vm = task.name, "the standby's part has ended");
    task.survivor
}

fn told(error: &GuestError) -> String {
    clip(&if error.advice.is_empty() { error.message.clone() } else { format!("{}; {}", error.message, error.advice) })
}

impl Task {
    fn command(&self, command: Command) {
        if let Some(twin) = &self.twin {
            twin.command(command);
        }
    }

    fn outputs(&mut self) {
        while let Some(output) = self.core.poll_output() {
            tracing::trace!(vm = self.name, ?output, "core");
            match output {
                Output::Commit { epoch } => {
                    self.view.set_committed(epoch.0);
                    if let Some(committer) = &self.committer {
                        committer.commit(epoch.0);
                    }
                    if let Some(staged) = self.staged.remove(&epoch.0) {
                        self.command(Command::Apply(Box::new(staged)));
                    }
                }
                Output::Acknowledge { generation, incarnation, epoch } => {
                    self.acknowledge(generation, incarnation, epoch)
                }
                Output::Discard { epoch } => drop(self.staged.remove(&epoch.0)),
                Output::Rehearse { epoch } => {
                    self.rehearsing = Some(epoch.0);
                    self.command(Command::Rehearse);
                }
                Output::Ask(request) => self.asker.ask(request),
                Output::Peer(message) => self.send(message),
                Output::PersistGeneration(generation) => self.persist(generation),
                Output::Mark { generation, epoch } => self.mark(generation, epoch),
                Output::Activate { epoch } => {
                    // What was staged later was never acknowledged.
                    tracing::warn!(vm = self.name, epoch = epoch.0, "activating");
                    self.staged.clear();
                    self.activating = true;
                    self.end_intake();
                    self.command(Command::Activate { epoch: epoch.0, generation: self.granted.0 });
                }
                Output::SwitchOff => {
                    self.unconfirmed = None;
                    let fencer = self.fencer.as_ref().expect("what requires it names the command");
                    fencer.start(self.fenced.clone());
                }
                Output::Keep { generation, epoch } => self.keep(generation, epoch),
                Output::Release => {
                    self.leaving = true;
                    self.command(Command::Release);
                }
                Output::Destroy => {
                    self.staged.clear();
                    self.leaving = true;
                    self.end_intake();
                    self.command(Command::Destroy);
                }
                Output::Close(code) => self.close(code, ""),
                Output::State { state, reason } => {
                    self.said = Some((api_state(state), reason));
                    // Who must make room is told of that as long as it is so.
                    if !self.durable.has_failed() {
                        self.show();
                    }
                }
                Output::Finished => {
                    self.finished = true;
                    self.show();
                }
            }
        }
    }

    /// Nothing more comes in; what waits for the disks is dropped with it.
    fn end_intake(&mut self) {
        self.closed = true;
        if let Some(intake) = self.intake.take() {
            intake.abort();
        }
        self.committer = None;
    }

    fn send(&self, message: PeerMessage) {
        if let Some(link) = &self.link {
            link.send(message);
        }
    }

    fn close(&self, code: CloseCode, reason: &str) {
        if let Some(link) = &self.link {
            link.close(code, reason);
        }
    }

    fn acknowledge(&mut self, generation: Generation, incarnation: Incarnation, epoch: Epoch) {
        self.send(PeerMessage::Acknowledge { generation, incarnation, epoch });
        self.view.set(|status| status.epoch_current = epoch.0.saturating_add(1));
    }

    fn persist(&mut self, generation: Generation) {
        match self.durable.set_generation(generation.0) {
            Ok(()) => {
                self.view.set_generation(generation.0);
                self.core.handle_generation_persisted(clock::now(), generation);
            }
            Err(error) => {
                self.owed.generation = self.owed.generation.max(Some(generation));
                self.disk_failed(&error);
            }
        }
    }

    fn mark(&mut self, generation: Generation, epoch: Epoch) {
        self.view.granted(generation.0, epoch.0);
        self.granted = generation;
        self.write_mark(generation, epoch);
    }

    fn write_mark(&mut self, generation: Generation, epoch: Epoch) {
        match self.durable.set_mark(Mark { generation: generation.0, epoch: epoch.0 }, self.images.clone()) {
            Ok(()) => {
                self.view.set_generation(generation.0);
                // What was kept is noted no more: the guest is about to change what it is a copy of.
                let copies = self.durable.copies();
                drop(tokio::task::spawn_blocking(move || kept::forget(&copies)));
                self.core.handle_marked(clock::now(), generation);
            }
            Err(error) => {
                self.owed.mark = Some((generation, epoch));
                self.disk_failed(&error);
            }
        }
    }

    /// Shows what the core said last.
    fn show(&mut self) {
        let Some((state, reason)) = self.said.clone() else { return };
        let failing_over = state == ProtectionState::FailingOver;
        self.view.set_state(state, &reason);
        if self.core.is_fencing() {
            self.advise_fencing();
        } else {
            self.advise(failing_over);
        }
    }

    /// Says what can be done about a primary that is gone and that keeps the record itself.
    fn advise(&self, failing_over: bool) {
        let alone = self.durable.forceable().without_witness.filter(|_| failing_over);
        let Some(policy) = alone.filter(|_| self.durable.keeper() == Some(self.core.config().primary.node)) else {
            return;
        };
        let peer = self.view.peer();
        let forced = match policy {
            WithoutWitness::Manual => format!("; if it is dead: `understudy failover {} --force`", self.name),
            WithoutWitness::Stall => String::new(),
        };
        let advice =
            format!("{peer} keeps the record of who may run the VM: the VM stands until {peer} is back{forced}");
        self.view.set(|status| status.advice = advice);
    }

    /// Without the write nothing may be acted upon: the copy stays as it is. It is tried again by itself, since a full disk may have
    /// room again.
    fn disk_failed(&mut self, error: &std::io::Error) {
        self.owed.failed(Instant::now());
        tracing::error!(vm = self.name, %error, "this host cannot write its state directory");
        self.view.set_state(ProtectionState::Error, "this host cannot write its state directory; the copy is kept");
        let seconds = LONGEST.as_secs();
        let advice = format!(
            "make room on this host's state directory, or repair it ({error}): it is tried again by itself, at least every {seconds} s"
        );
        self.view.set(|status| status.advice = advice);
    }

    /// Tries again what could not be written, when it is time.
    fn pay(&mut self) {
        if !self.owed.is_due(Instant::now()) {
            return;
        }
        if let Err(error) = self.durable.mend() {
            tracing::warn!(vm = self.name, %error, "this host still cannot write its state directory");
            self.owed.failed(Instant::now());
            return;
        }
        tracing::info!(vm = self.name, "this host can write its state directory again");
        let Owed { generation, mark, .. } = self.owed.mended();
        if let Some(generation) = generation {
            self.persist(generation);
        }
        if let Some((generation, epoch)) = mark {
            self.write_mark(generation, epoch);
        }
        if !self.durable.has_failed() {
            self.show();
        }
    }

    fn received(&mut self, received: Received) {
        let now = clock::now();
        match received {
            Received::Message(message) => {
                match message {
                    PeerMessage::GuestDied { .. } => self.view.failover_began(FailoverCause::GuestDied, None),
                    PeerMessage::Planned { .. } => self.view.failover_began(FailoverCause::Planned, None),
                    _ => {}
                }
                self.core.handle_peer(now, message);
            }
            Received::Lost { reason } => {
                if self.core.is_told_to_end() {
                    tracing::info!(vm = self.name, reason, "the primary has closed the replication connection");
                } else {
                    tracing::warn!(vm = self.name, reason, "the replication connection is lost");
                }
                if self.acts_alone() {
                    self.view.failover_began(FailoverCause::Silence, None);
                }
                self.core.handle_suspected(now, Suspicion::ConnectionLost);
            }
        }
    }

    /// Whether a suspicion now leads to asking for the VM. That the record names this copy may not have been read, and so not be shown, yet.
    fn acts_alone(&self) -> bool {
        let counted_on = match self.view.status().state {
            ProtectionState::Protected => true,
            ProtectionState::Syncing { .. } => self.core.is_bound(),
            _ => false,
        };
        counted_on && !self.core.is_told_to_end()
    }

    fn stage(&mut self, staged: Staged) {
        if staged.epoch.id().sync {
            if self.core.acknowledged().is_some() {
                // It would change a copy that is whole without an epoch's commit.
                tracing::error!(vm = self.name, "the primary sent a part of an initial sync after its end");
                self.close(OUT_OF_TURN, "the initial sync is over");
                return;
            }
            self.command(Command::Apply(Box::new(staged)));
            return;
        }
        let id = *staged.epoch.id();
        self.staged.insert(id.epoch, staged);
        let (generation, incarnation) = (Generation(id.generation), Incarnation(id.incarnation));
        self.core.handle_staged(clock::now(), generation, incarnation, Epoch(id.epoch));
    }

    /// An epoch whose disk writes are held, or the error after which none is.
    fn held(&mut self, epoch: Held) {
        match epoch {
            Ok(staged) => self.stage(staged),
            Err(error) => {
                tracing::error!(vm = self.name, %error, "the disks of this copy take nothing more");
                self.core.handle_failed(clock::now(), &clip(&error.to_string()));
            }
        }
    }

    fn intake_ended(&mut self, end: IntakeEnd) {
        tracing::warn!(vm = self.name, reason = end.reason, "nothing more is received");
        if let Some(code) = end.code {
            self.close(code, &end.reason);
        }
        self.core.handle_suspected(clock::now(), Suspicion::ConnectionLost);
    }

    fn twin_report(&mut self, report: twin::Report) {
        let now = clock::now();
        match report {
            twin::Report::Rehearsed(result) => self.rehearsed(now, result),
            twin::Report::Kept(grant, written) => self.kept(grant, written),
            twin::Report::Activated(Ok(activation)) => {
                self.view.activated(activation);
                let runs = ActivationResult::Runs { load: activation.load, resume: activation.resume };
                self.core.handle_activated(now, runs);
            }
            twin::Report::Activated(Err(error)) => {
                tracing::error!(vm = self.name, %error, advice = error.advice, "the copy does not run");
                self.activating = false;
                self.core.handle_activated(now, ActivationResult::Fails { reason: told(&error) });
            }
            twin::Report::Released(Ok(survivor)) => {
                self.view.set_survivor(SurvivorAt { control: survivor.control.clone(), pid: survivor.pid });
                self.survivor = Some(survivor);
                self.gone = true;
            }
            twin::Report::Released(Err(error)) | twin::Report::Destroyed(Err(error)) => {
                tracing::error!(vm = self.name, %error, advice = error.advice, "the twin could not be let go");
                self.gone = true;
            }
            twin::Report::Destroyed(Ok(())) => self.gone = true,
        }
    }

    fn rehearsed(&mut self, now: Time, result: Result<vmm_hooks::guest::Rehearsal, GuestError>) {
        let epoch = self.rehearsing.take().unwrap_or_default();
        self.view.rehearsed(result.is_ok());
        let (report, result) = match result {
            Ok(rehearsal) => (
                Ok(RehearsalReport {
                    epoch,
                    launch_ms: rehearsal.launch.as_secs_f64() * 1e3,
                    load_ms: rehearsal.load.as_secs_f64() * 1e3,
                }),
                RehearsalResult::Loads { launch: rehearsal.launch, load: rehearsal.load },
            ),
            Err(error) => {
                let reason = told(&error);
                tracing::error!(vm = self.name, reason, "the copy does not load");
                (Err(ErrorBody::from(error)), RehearsalResult::Fails { reason })
            }
        };
        for reply in self.rehearsal_replies.drain(..) {
            let _ = reply.send(report.clone());
        }
        self.core.handle_rehearsed(now, result);
    }

    fn answer(&mut self, answer: &StoreAnswer) {
        if self.durable.store().is_none()
            && let Err(error) = self.durable.set_store(&answer.store.to_string())
        {
            self.disk_failed(&error);
            return;
        }
        self.core.handle_answer(clock::now(), answer);
    }

    fn beat(&mut self, beat: Beat) {
        let now = clock::now();
        match beat {
            Beat::Suspected { last_heard } => {
                if self.acts_alone() {
                    self.view.failover_began(FailoverCause::Silence, last_heard);
                }
                self.core.handle_suspected(now, Suspicion::Silent);
            }
            Beat::GuestLost(vm) => {
                if vm == self.core.config().ownership.vm {
                    if self.acts_alone() {
                        self.view.failover_began(FailoverCause::GuestDied, None);
                    }
                    self.core.handle_suspected(now, Suspicion::GuestLost);
                }
            }
            Beat::Heard => {
                self.core.handle_peer_heard(now);
                // One that has its grant goes on, unless it gives it back.
                if !self.core.is_fencing() {
                    self.view.failover_ceased();
                }
            }
            Beat::Restarted(incarnation) => {
                if incarnation > self.core.config().primary.incarnation {
                    if self.acts_alone() {
                        self.view.failover_began(FailoverCause::PeerRestarted, None);
                    }
                    self.core.handle_suspected(now, Suspicion::Restarted);
                }
            }
        }
    }

    fn request(&mut self, request: Request) {
        let now = clock::now();
        let refused = |why: String| ErrorBody::new(ErrorKind::Refused, why);
        match request {
            Request::Rehearse(reply) => match self.core.handle_operator_rehearse(now) {
                Ok(()) => self.rehearsal_replies.push(reply),
                Err(why) => drop(reply.send(Err(refused(why)))),
            },
            Request::MayForce(reply) => {
                let fencing = self.core.is_fencing();
                let forceable = self.core.may_be_forced().map(|()| Forceable { fencing, ..self.durable.forceable() });
                let _ = reply.send(forceable.map_err(|why| refused(why.to_owned())));
            }
            Request::Forced { store, keeper, reply } => {
                let me = self.core.config().ownership.me.node;
                let kept = force::keep(&mut self.durable, &mut self.asker, me, store, keeper);
                if kept.is_ok() {
                    self.view.failover_began(FailoverCause::Forced, None);
                    self.core.handle_forced(now, store);
                }
                let _ = reply.send(kept);
            }
            Request::Fence { reply, .. } if !self.core.is_fencing() => {
                drop(reply.send(Err(not_fencing(&self.name))));
            }
            Request::Fence { word, reply } => {
                let answer = match word {
                    FenceWord::Confirmed => self.core.handle_operator_confirmed(now),
                    FenceWord::Now => self.core.handle_operator_fence(now),
                    FenceWord::GiveBack => self.core.handle_operator_give_back(now),
                };
                let _ = reply.send(answer.map_err(|why| refused(why.to_owned())));
            }
            Request::Failover { planned: false, reply } => {
                let answer = self.core.handle_operator_failover(now);
                if answer.is_ok() {
                    self.view.failover_began(FailoverCause::Planned, None);
                }
                let _ = reply.send(answer.map_err(refused));
            }
            Request::Failover { planned: true, reply } => drop(reply.send(Err(wrong_side(&self.name)))),
            Request::Stop(reply) => self.stop(reply),
            Request::Unprotect(reply) => match self.core.handle_operator_discard(now) {
                Ok(()) => drop(reply.send(Ok(()))),
                Err(why) => drop(reply.send(Err(refused(why)))),
            },
        }
    }

    /// A twin that died waiting is launched again by the activation; its operator should know all the same.
    fn look_after(&mut self) {
        if !self.died && !self.activating && !self.leaving && self.fence.ended() {
            self.died = true;
            tracing::error!(vm = self.name, "the waiting twin has ended; it will be launched again when it is needed");
        }
    }
}

/// What comes next in a queue that may not be there, or have ended.
async fn next_of<T>(queue: &mut Option<mpsc::UnboundedReceiver<T>>) -> T {
    if let Some(queue) = queue
        && let Some(next) = queue.recv().await
    {
        return next;
    }
    std::future::pending().await
}

/// What comes next of a primary, if there is one.
async fn next_received(link: &mut Option<Link>) -> Received {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}

/// The end of an intake, once.
async fn end_of(intake: &mut Option<JoinHandle<IntakeEnd>>) -> IntakeEnd {
    let Some(running) = intake else { return std::future::pending().await };
    let ended = running.await;
    *intake = None;
    ended.unwrap_or(IntakeEnd { code: None, reason: "the intake failed".into() })
}

/// Tells a primary that its VM cannot stand by here, and closes.
pub(super) fn refuse(link: &Link, reason: &str) {
    link.send(PeerMessage::Refused { reason: clip(reason) });
    // The primary closes when it has read it.
    tracing::warn!(reason, "a VM was refused");
}

/// The code with which a primary that speaks out of turn is cut off.
pub(super) const OUT_OF_TURN: CloseCode = CloseCode::Unexpected;
