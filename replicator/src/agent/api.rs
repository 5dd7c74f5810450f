//! The control API of an agent: each call finds its VM, asks its task, and answers in words.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeat::trust::pairing::{self, ParseCodeError};
use heartbeat::trust::{self, Peer};
use tokio::sync::oneshot;

use super::sessions::blocking;
use super::{Agent, FenceWord, Request, STOP_WITHIN, events, paths};
use crate::control::agent_api::AgentApi;
use crate::control::api::{
    Accepted, AgentStatus, DoctorReport, DoctorRequest, ErrorBody, ErrorKind, FailoverRequest, PairJoinRequest,
    PairOpenRequest, PairWindow, Paired, PeerKind, PeerStatus, ProtectRequest, ProtectionState, RehearsalReport, Role,
    VmEvent, VmRequest, VmStatus,
};
use crate::control::change::Change;
use crate::control::doctor;
use crate::control::drill::{DrillPlan, DrillRequest};
use crate::control::latch::{MayStart, MayStartRequest};
use crate::control::microvm::{RunRequest, Started};

/// How long who asks for events waits for the last ones to be written.
const EVENTS_WITHIN: Duration = Duration::from_secs(1);
/// How often it is looked whether a task that ends has ended.
const ENDING_LOOK: Duration = Duration::from_millis(2);

pub(super) fn not_known(name: &str) -> ErrorBody {
    ErrorBody::new(ErrorKind::NotProtected, format!("no VM called {name} is protected or stands by on this host"))
        .advise("see `understudy status`")
}

fn ended(name: &str) -> ErrorBody {
    ErrorBody::new(ErrorKind::NotProtected, format!("the protection of {name} has ended"))
        .advise("see `understudy status` for how")
}

fn kind(role: trust::Role) -> PeerKind {
    match role {
        trust::Role::Agent => PeerKind::Agent,
        trust::Role::Witness => PeerKind::Witness,
    }
}

impl Agent {
    /// Asks a VM's task and waits for its answer.
    pub(super) async fn ask<T>(
        &self,
        name: &str,
        request: impl FnOnce(oneshot::Sender<Result<T, ErrorBody>>) -> Request,
    ) -> Result<T, ErrorBody> {
        let requests = self.vms().get(name).map(|vm| vm.requests.clone()).ok_or_else(|| not_known(name))?;
        let (reply, answer) = oneshot::channel();
        requests.send(request(reply)).await.map_err(|_| ended(name))?;
        answer.await.map_err(|_| ended(name))?
    }

    /// Waits, for a bounded time, until the task of a VM has ended that said so, and lets go of it: who is told that a
    /// protection is over may ask for the next one at once.
    async fn let_end(&self, name: &str) {
        let deadline = Instant::now() + STOP_WITHIN;
        while self.vms().get(name).is_some_and(|vm| !vm.task.is_finished()) && Instant::now() < deadline {
            tokio::time::sleep(ENDING_LOOK).await;
        }
        self.forget_ended(name);
    }

    /// Only a VM that is protected on the host that it came from goes back there.
    fn check_way_back(&self, name: &str) -> Result<(), ErrorBody> {
        let status = self.vms().get(name).map(|vm| vm.view.status()).ok_or_else(|| not_known(name))?;
        let refused = |message: String| Err(ErrorBody::new(ErrorKind::Refused, message));
        let Some(home) = status.hosts.first() else {
            return refused(format!("it is not known where {name} came from; use `understudy failover --planned`"));
        };
        if status.role == Role::Standby {
            return refused(format!("{name} does not run here; ask {} for it", status.peer));
        }
        if *home == self.identity.name() {
            return refused(format!("{name} runs on its first host already, which is this one"));
        }
        if status.state != ProtectionState::Protected || status.peer != *home {
            let now = if status.reason.is_empty() { String::new() } else { format!(": {}", status.reason) };
            let message = format!("{name} cannot go back to {home} now: it is {}{now}", status.state);
            return Err(ErrorBody::new(ErrorKind::Refused, message)
                .advise(format!("it runs on here; ask again when it is protected with {home}")));
        }
        Ok(())
    }

    /// Asks for a change of hands.
    async fn change_hands(&self, request: &FailoverRequest) -> Result<Accepted, ErrorBody> {
        let FailoverRequest { vm, planned, back, force, confirm, .. } = request;
        if *force {
            return self.force(vm, confirm.as_deref()).await;
        }
        if *back {
            self.check_way_back(vm)?;
        }
        self.ask(vm, |reply| Request::Failover { planned: *planned, reply }).await?;
        Ok(Accepted { vm: vm.clone() })
    }

    fn peer_status(&self, peer: Peer) -> PeerStatus {
        // The path that is heard best speaks for the node.
        let stats: Vec<_> = self.beat.stats().into_iter().filter(|path| path.node == peer.node).collect();
        let best = paths::best(stats.iter());
        PeerStatus {
            name: peer.name,
            node_id: peer.node.to_string(),
            kind: kind(peer.role),
            address: peer.addresses.first().map(ToString::to_string).unwrap_or_default(),
            connected: stats.iter().any(|path| path.connected),
            suspicion: best.map(paths::suspicion),
            rtt_ms: best.and_then(|path| path.rtt).map(|rtt| rtt.as_secs_f64() * 1e3),
            paths: stats.iter().map(paths::status).collect(),
        }
    }
}

/// The addresses of a host name. Asks the resolver, so it blocks.
fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, ErrorBody> {
    let unknown = |message: String| ErrorBody::new(ErrorKind::NotFound, message);
    let found: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(|error| unknown(format!("the host {host} is not known")).because(&error))?
        .collect();
    if found.is_empty() { Err(unknown(format!("the host {host} has no address"))) } else { Ok(found) }
}

impl AgentApi for Agent {
    async fn status(&self) -> Result<AgentStatus, ErrorBody> {
        Ok(AgentStatus {
            name: self.identity.name().to_owned(),
            node_id: self.identity.node().to_string(),
            incarnation: self.identity.incarnation().0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vms: {
                let known: Vec<_> = self.vms().values().map(|vm| vm.view.status()).collect();
                known.into_iter().chain(self.unprotected_microvms()).collect()
            },
            peers: self.peers.list().into_iter().map(|peer| self.peer_status(peer)).collect(),
        })
    }

    async fn vm_status(&self, name: &str) -> Result<VmStatus, ErrorBody> {
        let known = self.vms().get(name).map(|vm| vm.view.status());
        known.or_else(|| self.unprotected_microvm(name)).ok_or_else(|| not_known(name))
    }

    async fn vm_change(&self, name: &str) -> Result<VmStatus, ErrorBody> {
        let now = self.vms().get(name).map(|vm| Arc::clone(&vm.view));
        match self.changes.status(name, now.as_ref()) {
            Some(status) => Ok(status),
            None => self.vm_status(name).await,
        }
    }

    async fn vm_events(&self, name: &str, last: usize) -> Result<Vec<VmEvent>, ErrorBody> {
        let (state_dir, of) = (self.config.state_dir.clone(), name.to_owned());
        let lines = self.events.clone();
        let events = blocking(move || {
            lines.catch_up(EVENTS_WITHIN);
            events::read(&state_dir, &of, last)
        })
        .await?
        .map_err(|error| {
            ErrorBody::new(ErrorKind::Failed, format!("the events of {name} cannot be read")).because(&error)
        })?;
        if events.is_empty() && !self.vms().contains_key(name) {
            return Err(ErrorBody::new(
                ErrorKind::NotFound,
                format!("nothing ever happened to a VM called {name} here"),
            )
            .advise("see `understudy status` for names"));
        }
        Ok(events)
    }

    async fn run(&self, request: RunRequest) -> Result<Started, ErrorBody> {
        self.run_microvm(request).await
    }

    async fn end(&self, request: VmRequest) -> Result<Accepted, ErrorBody> {
        self.end_microvm(&request.vm).await
    }

    async fn protect(&self, request: ProtectRequest) -> Result<Accepted, ErrorBody> {
        self.protect_vm(request).await
    }

    async fn unprotect(&self, request: VmRequest) -> Result<VmStatus, ErrorBody> {
        let name = request.vm;
        self.settled(&name).await;
        // A protection that has ended by itself, because this node went alone, has nothing left to end.
        self.forget_ended(&name);
        if !self.vms().contains_key(&name) {
            return self.free(&name).await;
        }
        self.ask(&name, Request::Unprotect).await?;
        let status = self.vm_status(&name).await?;
        self.let_end(&name).await;
        Ok(status)
    }

    async fn rehearse(&self, request: VmRequest) -> Result<RehearsalReport, ErrorBody> {
        self.ask(&request.vm, Request::Rehearse).await
    }

    async fn drill(&self, request: DrillRequest) -> Result<DrillPlan, ErrorBody> {
        self.plan_drill(request).await
    }

    async fn failover(&self, request: FailoverRequest) -> Result<Accepted, ErrorBody> {
        if request.give_back {
            self.ask(&request.vm, |reply| Request::Fence { word: FenceWord::GiveBack, reply }).await?;
            return Ok(Accepted { vm: request.vm });
        }
        let change = if request.force { Change::GoOn } else { Change::HandOver };
        let view = self.vms().get(&request.vm).map(|vm| Arc::clone(&vm.view));
        let begun = view.map(|view| self.changes.begin(&request.vm, &view, change));
        let answer = self.change_hands(&request).await;
        if let (Err(_), Some(begun)) = (&answer, begun) {
            self.changes.refused(&request.vm, begun);
        }
        answer
    }

    async fn may_start(&self, request: MayStartRequest) -> Result<MayStart, ErrorBody> {
        self.may_be_started(request).await
    }

    async fn pair_open(&self, request: PairOpenRequest) -> Result<PairWindow, ErrorBody> {
        let open = |limits| {
            let (identity, peers) = (Arc::clone(&self.identity), Arc::clone(&self.peers));
            trust::PairWindow::open(identity, peers, self.card(), self.config.pair_listen, limits)
        };
        self.window.open(&request, self.identity.name(), open).await
    }

    async fn pair_join(&self, request: PairJoinRequest) -> Result<Paired, ErrorBody> {
        let code = request.code.parse().map_err(|error: ParseCodeError| {
            ErrorBody::new(ErrorKind::Invalid, "this is no pairing code").because(&error)
        })?;
        let PairJoinRequest { host, port, .. } = request;
        let name = host.clone();
        let addresses = blocking(move || resolve(&host, port)).await??;
        let mut last = None;
        for address in addresses {
            match pairing::join(&self.identity, &self.peers, &self.card(), address, &code).await {
                Ok(peer) => {
                    let node_id = peer.node.to_string();
                    return Ok(Paired { name: peer.name, node_id, kind: kind(peer.role) });
                }
                Err(error) => last = Some(error),
            }
        }
        let error = last.expect("there was at least one address");
        Err(ErrorBody::new(ErrorKind::Unavailable, format!("pairing with {name} failed")).because(&error))
    }

    async fn doctor(&self, request: DoctorRequest) -> Result<DoctorReport, ErrorBody> {
        blocking(move || doctor::local(request.vm.as_deref())).await?
    }
}
