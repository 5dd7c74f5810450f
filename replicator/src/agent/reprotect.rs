//! A VM's life under this agent, from session to session: what was protected once is protected again.
//!
//! When a protection ends by a failure and the guest runs here alone, be it as the survivor or because its standby was lost, a
//! standby is looked for among the VM's hosts ([`Protection`]) until one holds a copy, the operator ends it, or the guest is
//! gone. The guest is touched only when a host has answered.
//!
//! Promises: one session at a time; each is a session like any other (`docs/protocol.md` P10), so the copy that is made is
//! staged beside whatever other hosts keep, and nothing is held before it is whole. Tries come ever later: at once when a host
//! is heard again, else after 1 s, doubling to [`UNREACHABLE_MOST`] while none answers and to [`FAILED_MOST`] if one does and
//! it fails, since that costs the guest something each time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeat::quic::Purpose;
use heartbeat::trust::Peer;
use heartbeat_core::ids::VmId;
use tokio::sync::mpsc;
use vmm_hooks::guest::{GuestErrorKind, Survivor};
use vmm_hooks::qemu;
use vmm_hooks::sys::process::{PidFd, ProcessError};

use super::beats::Beat;
use super::disks::survivor_left;
use super::durable::{Durable, GuestAt};
use super::primary::{self, Left};
use super::protection::Protection;
use super::sessions::blocking;
use super::view::View;
use super::{Agent, Request, link};
use crate::control::api::{ErrorBody, ErrorKind, ProtectionState};

/// The first wait.
const FIRST: Duration = Duration::from_secs(1);
/// The longest wait while no host can be reached.
const UNREACHABLE_MOST: Duration = Duration::from_secs(15);
/// The longest wait after a host was reached and yet holds no copy.
const FAILED_MOST: Duration = Duration::from_secs(300);
/// A protection that lasted so long was no failure: the waits begin anew.
const LASTED: Duration = Duration::from_secs(60);
/// How long a host may take to answer.
const REACH_WITHIN: Duration = Duration::from_secs(5);
/// How often it is looked whether the guest is still there.
const LOOK: Duration = Duration::from_millis(500);

/// A VM that this agent has, over all its sessions.
#[derive(Debug)]
pub(super) struct Life {
    /// Who has it.
    pub(super) agent: Arc<Agent>,
    /// Its identity.
    pub(super) vm: VmId,
    /// Its guest here.
    pub(super) at: GuestAt,
    /// How it is to be protected.
    pub(super) protection: Protection,
    /// What operators see.
    pub(super) view: Arc<View>,
    /// What operators ask.
    pub(super) requests: mpsc::Receiver<Request>,
}

/// What came of a try.
enum Tried {
    /// Nobody answered.
    Unreachable(String),
    /// Somebody did, and yet there is no copy.
    Failed(String),
    /// There was a session, and it has ended.
    Left(Left),
}

impl GuestAt {
    /// Where it can be attached to.
    pub(super) fn target(&self) -> qemu::Target {
        self.control.clone().map_or(qemu::Target::Pid(self.pid), qemu::Target::QmpSocket)
    }

    /// Whether its process has ended for sure.
    pub(super) fn process_is_gone(&self) -> bool {
        match PidFd::open_same(self.pid, self.started) {
            Ok(process) => process.has_exited(),
            Err(error) => matches!(error, ProcessError::Gone { .. } | ProcessError::Reused { .. }),
        }
    }

    /// A survivor's.
    pub(super) fn of(name: &str, survivor: &Survivor) -> Option<Self> {
        let process = PidFd::open(survivor.pid).ok()?;
        let control = Some(survivor.control.clone().into());
        Some(Self {
            name: name.to_owned(),
            pid: survivor.pid,
            started: process.start_time(),
            control,
            attached: false,
            microvm: false,
        })
    }
}

impl Life {
    /// Goes through a session that was begun, and through all that follow.
    pub(super) async fn protect(mut self, setup: primary::Setup) {
        match primary::run(setup, &mut self.requests).await {
            Ok(left) => self.go_on(left, false).await,
            Err(error) => {
                tracing::error!(vm = self.at.name, %error, "the protection could not begin");
                self.view.set_state(ProtectionState::Error, &error.message);
            }
        }
    }

    /// Goes on after a session. `again`: even if that never came to protect the VM.
    pub(super) async fn go_on(mut self, mut left: Left, mut again: bool) {
        loop {
            match left {
                Left::Alone { was_protected } if (again || was_protected) && !self.protection.once => {
                    again = true;
                    self.note(|durable, at| durable.set_guest(Some(at)));
                    left = self.look().await;
                }
                left => return self.rest(left),
            }
        }
    }

    /// What is remembered after the last session.
    fn rest(&self, left: Left) {
        let gone = self.agent.is_gone(&self.at);
        if gone && self.at.microvm {
            self.agent.microvms.forget(&self.at.name);
        }
        // Its end may not be over yet; no copy is made here before it is.
        if left == Left::Over && self.view.status().state == ProtectionState::Fenced {
            survivor_left(&self.agent.config.standby.images, &self.at.name);
        }
        self.note(|durable, at| {
            if gone || matches!(left, Left::Asked | Left::Alone { .. }) {
                durable.settle()?;
            } else {
                durable.set_guest(Some(at))?;
            }
            // It runs here as the record's only owner, and nothing that was asked can change that any more.
            if !gone && matches!(left, Left::Asked | Left::Alone { .. }) {
                // If somebody else has written it since, it stays latched.
                durable.unlatch()?;
            }
            Ok(())
        });
    }

    /// Changes what this host remembers of it. Without that nothing is unsafe: a later life of the agent knows less.
    fn note(&self, change: impl FnOnce(&mut Durable, GuestAt) -> std::io::Result<()>) {
        let at = GuestAt { attached: false, ..self.at.clone() };
        let noted = Durable::find(&self.agent.config.state_dir, &self.at.name)
            .and_then(|durable| durable.map_or(Ok(()), |mut durable| change(&mut durable, at)));
        if let Err(error) = noted {
            tracing::error!(vm = self.at.name, %error, "this host cannot write what it should remember of the VM");
        }
    }

    /// Looks for a standby until a session has ended in another way than alone, or somebody ends it.
    async fn look(&mut self) -> Left {
        let me = self.agent.me().node;
        let nodes: Vec<_> = self.protection.standbys(me).into_iter().map(|(node, _)| node).collect();
        let mut news = self.agent.beats.subscribe_all(&nodes);
        let mut wait = FIRST;
        let mut reason = self.view.status().reason;
        loop {
            self.show(&reason);
            let heard = match self.wait(wait, &mut news).await {
                Ok(heard) => heard,
                Err(left) => return left,
            };
            if heard {
                wait = FIRST;
            }
            let began = Instant::now();
            let most;
            (reason, most) = match self.try_all().await {
                Tried::Unreachable(why) => (why, UNREACHABLE_MOST),
                Tried::Failed(why) => (why, FAILED_MOST),
                Tried::Left(Left::Alone { was_protected }) => {
                    if was_protected && began.elapsed() >= LASTED {
                        wait = FIRST / 2;
                    }
                    (self.view.status().reason, FAILED_MOST)
                }
                Tried::Left(left) => return left,
            };
            wait = (wait * 2).min(most);
        }
    }

    fn show(&self, reason: &str) {
        let said = reason.strip_prefix(LOOKING).unwrap_or(reason);
        let said = if said.is_empty() { "none has been tried yet" } else { said };
        self.view.set_state(ProtectionState::Degraded, &format!("{LOOKING}{said}"));
        let advice = format!(
            "the VM runs here, alone; it is tried again by itself, until `understudy unprotect {}`",
            self.at.name
        );
        self.view.set(|status| status.advice = advice);
    }

    /// Waits for the next try. Says whether it is due because a host is heard again; an error is the end.
    async fn wait(&mut self, wait: Duration, news: &mut mpsc::UnboundedReceiver<Beat>) -> Result<bool, Left> {
        let due = tokio::time::sleep(wait);
        tokio::pin!(due);
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                () = &mut due => return Ok(false),
                Some(beat) = news.recv() => if let Beat::Heard | Beat::Restarted(_) = beat {
                    return Ok(true);
                },
                _ = look.tick() => if self.agent.is_gone(&self.at) {
                    self.view.set_state(ProtectionState::Unprotected, "its process has ended; nobody stood by");
                    return Err(Left::Over);
                },
                request = self.requests.recv() => if let Some(left) = self.request(request) {
                    return Err(left);
                },
            }
        }
    }

    /// Answers an operator while nobody stands by. `Some` is the end.
    fn request(&self, request: Option<Request>) -> Option<Left> {
        let name = &self.at.name;
        let nobody = || {
            ErrorBody::new(
                ErrorKind::NotProtected,
                format!("{name} is not protected now: {}", self.view.status().reason),
            )
            .advise("it runs on; a standby is looked for")
        };
        // An operator who left does not wait for the answer.
        match request {
            Some(Request::Unprotect(reply)) => {
                self.view.set_state(ProtectionState::Unprotected, "");
                self.rest(Left::Asked);
                let _ = reply.send(Ok(()));
                return Some(Left::Asked);
            }
            Some(Request::Stop(reply)) => {
                let _ = reply.send(Ok(()));
                return Some(Left::Stopped);
            }
            Some(Request::MayForce(reply)) => drop(reply.send(Err(nobody()))),
            Some(Request::Fence { reply, .. }) => drop(reply.send(Err(nobody()))),
            Some(Request::Forced { reply, .. }) => drop(reply.send(Err(nobody()))),
            Some(Request::Rehearse(reply)) => drop(reply.send(Err(nobody()))),
            Some(Request::Failover { reply, .. }) => drop(reply.send(Err(nobody()))),
            None => return Some(Left::Stopped),
        }
        None
    }

    /// Tries the hosts, best first, until one has held a copy.
    async fn try_all(&mut self) -> Tried {
        let (mut unreachable, mut failed) = (Vec::new(), Vec::new());
        let hosts: Vec<_> = self
            .protection
            .standbys(self.agent.me().node)
            .into_iter()
            .map(|(node, name)| (node, name.to_owned()))
            .collect();
        for (node, name) in hosts {
            let Some(peer) = self.agent.peers.by_node(node) else {
                unreachable.push(format!("{name} is not paired with this host"));
                continue;
            };
            match self.try_one(&peer).await {
                Tried::Unreachable(why) => unreachable.push(why),
                Tried::Failed(why) => failed.push(why),
                Tried::Left(Left::Alone { was_protected: false }) => {
                    failed.push(format!("{}: {}", peer.name, self.view.status().reason));
                }
                left @ Tried::Left(_) => return left,
            }
        }
        if !failed.is_empty() {
            failed.extend(unreachable);
            return Tried::Failed(failed.join("; "));
        }
        if unreachable.is_empty() {
            unreachable.push("no other host is listed for it".to_owned());
        }
        Tried::Unreachable(unreachable.join("; "))
    }

    async fn try_one(&mut self, peer: &Peer) -> Tried {
        let agent = Arc::clone(&self.agent);
        let reached = tokio::time::timeout(REACH_WITHIN, agent.bulk.connect(peer.node, Purpose::Replication)).await;
        let Ok(Ok(mut connection)) = reached else {
            return Tried::Unreachable(format!("{} cannot be reached", peer.name));
        };
        if let Err(error) = link::greet(&mut connection, agent.me(), self.vm, true).await {
            return Tried::Failed(format!("{} does not take part: {error}", peer.name));
        }
        let guest = match agent.attach_again(&self.at).await {
            Ok(guest) => guest,
            Err(error) if error.kind == GuestErrorKind::Gone => {
                self.view.set_state(ProtectionState::Unprotected, "its process has ended; nobody stood by");
                return Tried::Left(Left::Over);
            }
            Err(error) => return Tried::Failed(error.to_string()),
        };
        match agent.session(&self.at, &self.protection, peer, Some(connection), guest, Some(&self.view)).await {
            Ok((setup, _)) => match primary::run(setup, &mut self.requests).await {
                Ok(left) => Tried::Left(left),
                Err(error) => Tried::Failed(error.message),
            },
            Err((guest, error)) => match blocking(move || guest.detach()).await {
                Ok(Ok(())) => Tried::Failed(error.message),
                Ok(Err(worse)) => Tried::Failed(format!("{}; {worse}", error.message)),
                Err(worse) => Tried::Failed(worse.message),
            },
        }
    }
}

/// What a reason begins with while a standby is looked for.
const LOOKING: &str = "looking for a standby: ";
