//! VMs that a former life of this agent had a part in: each is taken up before anybody asks for anything.
//!
//! While an agent is gone its protected guests are mute: the sockets of their gates went with it. What becomes of one is for
//! [`replicator_core::restart::Restart`] to say, out of what is found here and what the record says; this task does it.
//!
//! Promise: a guest is ended, or heard, only when that machine says so; its end is confirmed. One that is this node's is
//! protected again. A microVM ends with the life that started it: what is left of one is ended first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, NodeId};
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::store::StoreAnswer;
use replicator_core::restart::{End, Here, Output, Restart};
use replicator_core::standby::StandbyConfig;
use tokio::sync::{mpsc, watch};
use vmm_hooks::guest::{GuestError, GuestErrorKind, Survivor, Twin, TwinHost};
use vmm_hooks::qemu;
use vmm_hooks::sys::process::{PidFd, ProcessError};

use super::asker::Asker;
use super::disks::{DiskThreads, survivor_left};
use super::durable::{Durable, GuestAt, KeptAt};
use super::kept::{self, About};
use super::primary::{Left, wait_until};
use super::reprotect::Life;
use super::sessions::{blocking, durability};
use super::standby::{self, Origin};
use super::view::api_state;
use super::{Agent, REQUESTS, Request, Vm, clock, force};
use crate::control::api::{ErrorBody, ErrorKind, FailoverCause, ProtectionState, Role};
use crate::metrics::VmMetrics;
use crate::pages::staged::DeviceState;

/// How long a killed guest may take to end.
const KILL_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked whether the guest is still there.
const LOOK: Duration = Duration::from_millis(500);

/// A VM that waits for its record.
struct Found {
    life: Life,
    core: Restart,
    durable: Durable,
    asker: Asker,
    answers: mpsc::UnboundedReceiver<StoreAnswer>,
    /// Its guest, if it has one.
    process: Option<PidFd>,
    /// A former life had it in its hands, and may have left it paused.
    attached: bool,
    end: Option<End>,
    settled: watch::Sender<bool>,
}

impl Agent {
    /// Gives each VM of a former life a task. `survivors`: twins that run, by name. `never_ran`: names of those whose twin waited,
    /// and cannot run any more.
    pub(super) fn take_up(&self, survivors: Vec<(String, Survivor)>, never_ran: &[String]) {
        let survivors: BTreeMap<String, Survivor> = survivors.into_iter().collect();
        for durable in Durable::with_parts(&self.config.state_dir) {
            let name = durable.name().to_owned();
            if let Err(error) = self.find(durable, survivors.get(&name), never_ran.contains(&name)) {
                tracing::error!(vm = name, %error, causes = ?error.causes, "what a former life of this agent had is left as it is");
            }
        }
    }

    fn find(&self, mut durable: Durable, survivor: Option<&Survivor>, never_ran: bool) -> Result<(), ErrorBody> {
        let name = durable.name().to_owned();
        let unwritten = |error: std::io::Error| {
            ErrorBody::new(ErrorKind::Failed, "this host cannot write its state directory").because(&error)
        };
        // One that was activated a moment before the former life ended is not noted yet.
        let at = durable.guest().cloned().or_else(|| survivor.and_then(|survivor| GuestAt::of(&name, survivor)));
        let process = at.as_ref().map(|at| PidFd::open_same(at.pid, at.started));
        let (here, process) = match process {
            None => {
                let marked = durable.mark().filter(|_| !never_ran).map(|mark| Generation(mark.generation));
                let kept = durable.kept().filter(|kept| is_there(&name, kept));
                let here =
                    kept.map(|kept| Here::Kept { grant: Generation(kept.grant), marked, off_since: kept.off_since() });
                (here.unwrap_or(Here::Copy { marked }), None)
            }
            // It ends with the life that started it, and is made sure of: nobody can speak to it any more.
            Some(Ok(process)) if at.as_ref().is_some_and(|at| at.microvm) => {
                process.kill_confirmed(KILL_WITHIN).map_err(|error| {
                    ErrorBody::new(ErrorKind::Failed, format!("a microVM of a former life does not end: {error}"))
                        .advise("it is mute if it was protected; look whether the host's kernel hangs")
                })?;
                (Here::Gone, None)
            }
            Some(Ok(process)) => (Here::Guest, Some(process)),
            Some(Err(ProcessError::Gone { .. } | ProcessError::Reused { .. })) => (Here::Gone, None),
            Some(Err(error)) => return Err(ErrorBody::new(ErrorKind::Failed, error.to_string())),
        };
        let none =
            || GuestAt { name: name.clone(), pid: 0, started: 0, control: None, attached: false, microvm: false };
        let at = at.unwrap_or_else(none);
        tracing::warn!(
            vm = name,
            ?here,
            pid = at.pid,
            attached = at.attached,
            "takes up what a former life of this agent had"
        );
        let protection = durable.protection().cloned().unwrap_or_default();
        let (asker, answers) = self.asker(&self.arbiter_for(&protection, &durable)?);
        let numbers = durable.begin_session().map_err(unwritten)?;
        let ownership = OwnershipConfig {
            store: durable.store().and_then(|store| store.parse().ok()),
            generation: Generation(durable.generation()),
            first_request: numbers.first_request,
            ..OwnershipConfig::new(durable.vm(), self.me())
        };
        let role = if let Here::Copy { .. } | Here::Kept { .. } = here { Role::Standby } else { Role::Primary };
        let view = self.new_view(&name, durable.vm(), role);
        view.set(|status| status.hosts = protection.names());
        view.set_generation(durable.generation());
        let (sender, requests) = mpsc::channel(REQUESTS);
        let (attached, vm) = (at.attached, durable.vm());
        let life = Life { agent: self.own(), vm, at, protection, view: Arc::clone(&view), requests };
        let core = Restart::new(ownership, here);
        let (tell, settled) = watch::channel(false);
        let found = Found { life, core, durable, asker, answers, process, attached, end: None, settled: tell };
        let task = tokio::spawn(found.settle());
        // Also one of which nothing is left: until that is settled no session of it may begin here.
        self.vms().insert(name, Vm { view, requests: sender, task, settled: Some(settled) });
        Ok(())
    }
}

impl Found {
    /// Goes on as the record says.
    async fn settle(mut self) {
        self.core.handle_start(clock::now());
        let mut look = tokio::time::interval(LOOK);
        loop {
            while let Some(output) = self.core.poll_output() {
                tracing::trace!(vm = self.life.at.name, ?output, "restart");
                if let Err(error) = self.act(output).await {
                    tracing::error!(vm = self.life.at.name, %error, advice = error.advice, causes = ?error.causes, "the guest of a former life is left as it is");
                    self.life.view.set_state(ProtectionState::Error, &error.message);
                    self.life.view.set(|status| status.advice.clone_from(&error.advice));
                    return;
                }
            }
            if let Some(end) = self.end {
                return self.over(end).await;
            }
            let deadline = self.core.poll_timeout();
            let guest = self.process.is_some();
            tokio::select! {
                Some(answer) = self.answers.recv() => self.answer(&answer),
                request = self.life.requests.recv() => if self.request(request) {
                    return;
                },
                _ = look.tick(), if guest => if self.process.as_ref().is_some_and(PidFd::has_exited) {
                    self.process = None;
                    self.life.view.set_state(ProtectionState::FailingOver, "its process has ended");
                    self.core.handle_gone(clock::now());
                },
                () = wait_until(deadline) => self.core.handle_timeout(clock::now()),
            }
        }
    }

    async fn act(&mut self, output: Output) -> Result<(), ErrorBody> {
        match output {
            Output::Ask(request) => self.asker.ask(request),
            Output::PersistGeneration(generation) => {
                self.durable.set_generation(generation.0).map_err(|error| {
                    ErrorBody::new(ErrorKind::Failed, "this host cannot write its state directory").because(&error)
                })?;
                self.life.view.set_generation(generation.0);
                self.core.handle_generation_persisted(clock::now(), generation);
            }
            Output::State { state, reason } => {
                let reason = self.named(reason);
                self.life.view.set_state(api_state(state), &reason);
                if state == replicator_core::state::ProtectionState::FailingOver {
                    let advice = "nothing is lost; if that host does not answer either, bring it back".to_owned();
                    self.life.view.set(|status| status.advice = advice);
                }
            }
            Output::Keep(grant) => {
                let noted = self.durable.kept().map(|kept| KeptAt::now(grant, kept.dir.clone()));
                self.durable.set_kept(noted).map_err(|error| {
                    ErrorBody::new(ErrorKind::Failed, "this host cannot write its state directory").because(&error)
                })?;
                self.core.handle_kept(clock::now(), grant);
            }
            Output::Free => self.free_guest().await?,
            Output::Fence => self.fence().await?,
            Output::Finished(end) => self.end = Some(end),
        }
        Ok(())
    }

    /// The core's words, with the peer's name in place of its identity.
    fn named(&self, reason: String) -> String {
        let called = |node: NodeId| Some((node, self.life.agent.peers.by_node(node)?.name));
        match self.core.other().and_then(called) {
            Some((node, name)) => reason.replace(&format!("host {node}"), &name),
            None => reason,
        }
    }

    fn answer(&mut self, answer: &StoreAnswer) {
        if self.durable.store().is_none()
            && let Err(error) = self.durable.set_store(&answer.store.to_string())
        {
            tracing::error!(vm = self.life.at.name, %error, "the store's identity could not be made durable");
            return;
        }
        self.core.handle_answer(clock::now(), answer);
    }

    /// Takes out what the former life left, and lets the guest run.
    async fn free_guest(&mut self) -> Result<(), ErrorBody> {
        let (target, attached) = (self.life.at.target(), self.attached);
        let removed = blocking(move || {
            let mut removed = qemu::remove_leftovers(&target)?;
            if attached && qemu::let_run(&target)? {
                removed.push("a pause: the guest runs again".to_owned());
            }
            Ok::<_, GuestError>(removed)
        })
        .await??;
        let reason = if removed.is_empty() {
            "this agent was started again".to_owned()
        } else {
            format!("this agent was started again, and removed what its former life had left: {}", removed.join(", "))
        };
        self.life.view.set_state(ProtectionState::Degraded, &reason);
        Ok(())
    }

    /// Kills the guest and confirms its end.
    async fn fence(&mut self) -> Result<(), ErrorBody> {
        let Some(process) = self.process.take() else { return Ok(()) };
        match blocking(move || process.kill_confirmed(KILL_WITHIN)).await? {
            Ok(()) | Err(ProcessError::Gone { .. }) => {
                tracing::warn!(vm = self.life.at.name, "this copy was destroyed: the VM runs elsewhere");
                Ok(())
            }
            Err(error) => Err(ErrorBody::new(ErrorKind::Failed, "this copy could not be ended; it is mute")
                .advise(format!("end process {} by hand", self.life.at.pid))
                .because(&error)),
        }
    }

    /// Whether that was the last one.
    fn request(&mut self, request: Option<Request>) -> bool {
        let status = self.life.view.status();
        let not_yet = || {
            ErrorBody::new(ErrorKind::Busy, format!("it is not known yet who runs {}: {}", status.name, status.reason))
                .advise(status.advice.clone())
        };
        // An operator who left does not wait for the answer.
        match request {
            None => return true,
            Some(Request::Stop(reply)) => {
                let _ = reply.send(Ok(()));
                return true;
            }
            Some(Request::Unprotect(reply)) => drop(reply.send(Err(not_yet()))),
            Some(Request::MayForce(reply)) => {
                let forceable = self.core.may_be_forced().map(|()| self.durable.forceable());
                let refused = |why: &str| ErrorBody::new(ErrorKind::Refused, why);
                let _ = reply.send(forceable.map_err(refused));
            }
            Some(Request::Forced { store, keeper, reply }) => {
                let me = self.life.agent.me().node;
                let kept = force::keep(&mut self.durable, &mut self.asker, me, store, keeper);
                if kept.is_ok() {
                    self.core.handle_forced(clock::now(), store);
                }
                let _ = reply.send(kept);
            }
            Some(Request::Rehearse(reply)) => drop(reply.send(Err(not_yet()))),
            Some(Request::Fence { reply, .. }) => drop(reply.send(Err(not_yet()))),
            Some(Request::Failover { reply, .. }) => drop(reply.send(Err(not_yet()))),
        }
        false
    }

    async fn over(mut self, end: End) {
        tracing::info!(vm = self.life.at.name, ?end, "what a former life of this agent had is settled");
        match end {
            End::Kept { grant, forced } => return self.wait_on(grant, forced).await,
            End::Ours => {
                if self.life.protection.once || self.life.protection.hosts.is_empty() {
                    let reason = self.life.view.status().reason;
                    self.life.view.set_state(ProtectionState::Unprotected, &reason);
                }
                let Self { life, settled, .. } = self;
                // Nobody may be there to hear it.
                let _ = settled.send(true);
                return life.go_on(Left::Alone { was_protected: true }, true).await;
            }
            End::Stopped => self.life.view.set_state(ProtectionState::Unprotected, "the guest shut down"),
            End::Theirs if self.life.view.status().state == ProtectionState::Fenced => {}
            End::Theirs => {
                self.life.view.set_state(
                    ProtectionState::Unprotected,
                    "this agent was started again, and has no copy of it any more",
                );
            }
            End::GaveBack => {
                self.life.view.set_state(
                    ProtectionState::Unprotected,
                    "this agent was started again, and gave it back to the host that has it",
                );
            }
        }
        if let End::Theirs = end {
            survivor_left(&self.life.agent.config.standby.images, &self.life.at.name);
        }
        match self.durable.settle() {
            // Nothing is noted that could be of use.
            Ok(()) => {
                let copies = self.durable.copies();
                drop(blocking(move || kept::forget(&copies)).await);
            }
            Err(error) => tracing::error!(vm = self.life.at.name, %error, "that it is settled could not be noted"),
        }
    }

    /// The VM is this host's, and its copy is on the disk: goes on waiting with it for the other host to be off.
    async fn wait_on(self, grant: Generation, forced: bool) {
        let (view, name) = (Arc::clone(&self.life.view), self.life.at.name.clone());
        let again = "this agent was started again, and makes the copy ready that it had kept";
        view.set_state(ProtectionState::FailingOver, again);
        view.set(|status| status.advice = "nothing is lost".to_owned());
        if let Err(error) = self.resume(grant, forced).await {
            tracing::error!(vm = name, %error, advice = error.advice, causes = ?error.causes, "a copy that was kept cannot be gone on with");
            view.set_state(ProtectionState::Error, &error.message);
            view.set(|status| status.advice.clone_from(&error.advice));
        }
    }

    async fn resume(self, grant: Generation, forced: bool) -> Result<(), ErrorBody> {
        let Self { life, mut durable, asker, answers, settled, .. } = self;
        let Life { agent, vm, at: GuestAt { name, .. }, protection, view, requests } = life;
        let dir = durable.kept().expect("it was found").dir.clone();
        let unusable = |error: ErrorBody| {
            let removed = "then the VM is given back to the other host, which must have its copy";
            error.advise(format!(
                "the VM runs nowhere, and its copy stays in {0}. Mend that and start this agent again; if that copy is beyond hope, remove {0} first: {removed}",
                dir.display()
            ))
        };
        let about = kept::about(&dir).and_then(|about| Ok((about.primary()?, about)));
        let (primary, about) = about.map_err(|error| {
            unusable(ErrorBody::new(ErrorKind::Failed, "the copy that was kept cannot be read").because(&error))
        })?;
        let (twins, from, called, metrics) =
            (Arc::clone(&agent.twins), dir.clone(), name.clone(), view.metrics().clone());
        let epoch = Epoch(about.epoch);
        let (described, session) = (about.of.clone(), Generation(about.session));
        let made = blocking(move || ready(&*twins, &called, &from, &about, metrics)).await?;
        let Ready { twin, disks, device } = made.map_err(|error| unusable(error.into()))?;
        let numbers = durable.begin_session().map_err(|error| {
            ErrorBody::new(ErrorKind::Failed, "this host cannot write its state directory").because(&error)
        })?;
        let ownership = OwnershipConfig {
            store: durable.store().and_then(|store| store.parse().ok()),
            generation: Generation(durable.generation()),
            first_request: numbers.first_request,
            ..OwnershipConfig::new(vm, agent.me())
        };
        let fence_required = agent.fence_required();
        let config =
            StandbyConfig { ownership, fence_required, ..StandbyConfig::new(vm, agent.me(), primary, session) };
        let peer = agent.name_of(primary.node);
        view.set(|status| peer.clone_into(&mut status.peer));
        view.set_committed(epoch.0);
        view.failover_began(FailoverCause::Silence, None);
        let beats = agent.beats.subscribe(primary.node);
        let setup = standby::Setup {
            name,
            config,
            twin,
            described,
            origin: Origin::Kept { disks, device, grant, epoch, forced, life: agent.beats.life(primary.node) },
            asker: (asker, answers),
            beats,
            heartbeats: Arc::clone(&agent.beat),
            fencer: agent.fencer(primary.node, &peer),
            durable,
            view,
        };
        // Nobody may be there to hear it.
        let _ = settled.send(true);
        agent.stand_and_survive(setup, protection, requests).await;
        Ok(())
    }
}

/// Whether a copy that was kept is there. One that cannot be read may be readable again: only an operator takes it away.
fn is_there(name: &str, kept: &KeptAt) -> bool {
    let gone = matches!(kept::about(&kept.dir), Err(error) if error.kind() == std::io::ErrorKind::NotFound);
    if gone {
        tracing::error!(vm = name, path = %kept.dir.display(), "the copy that was kept while its fence was waited for is not there any more");
    }
    !gone
}

/// A copy that was kept, as it is gone on with.
struct Ready {
    /// It has the memory.
    twin: Box<dyn Twin>,
    /// The twin's disks, if it has any that are replicated.
    disks: Option<DiskThreads>,
    device: DeviceState,
}

/// Makes one ready. On error nothing is left of the twin.
fn ready(twins: &dyn TwinHost, name: &str, dir: &Path, about: &About, metrics: VmMetrics) -> Result<Ready, GuestError> {
    let of = &about.of;
    let found = |place: &PathBuf| {
        DiskThreads::found(place.clone(), &of.recipe.disks, durability(of.durability), about.epoch, metrics)
    };
    let disks = of.disks.as_ref().map(found).transpose()?;
    let images = disks.as_ref().map(DiskThreads::as_images).unwrap_or_default();
    let images: Vec<PathBuf> = images.into_iter().map(|image| image.path).collect();
    let twin = twins.prepare(name, &of.recipe, &of.layout, &images)?;
    match kept::load(dir, about, &*twin.memory()) {
        Ok(device) => Ok(Ready { twin, disks, device: Arc::new(device) }),
        Err(error) => {
            if let Err(error) = twin.destroy() {
                tracing::error!(%error, "a twin that is not needed could not be removed");
            }
            Err(GuestError::new(GuestErrorKind::Failed, format!("the copy that was kept cannot be read: {error}")))
        }
    }
}
