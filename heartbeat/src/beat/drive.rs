//! The heartbeat thread's loop: connections in and out, ticks, deadlines, and noticing our own starvation.
//!
//! Of two nodes the one with the lower id dials, on every path; the other accepts. A newer connection of
//! the same peer and path takes the older one's place.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use heartbeat_core::ids::NodeId;
use heartbeat_core::time::Time;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::pulse::{MAX_PULSE, MAX_REPORTS, Pulse, Report};
use super::track::Track;
use super::{BeatOptions, PathStats, PeerEvent, Reports};
use crate::quic::{Connection, Endpoint, EndpointOptions, Profile, Purpose, QuicError, close, decode, encode};
use crate::trust::{Identity, Peer, Peers, Role};

/// How often the list of peers is looked at for changes.
const LOOK_AT_PEERS: Duration = Duration::from_millis(500);
/// How long one dial of a heartbeat connection may take.
const DIAL_DEADLINE: Duration = Duration::from_millis(500);
/// Pause after the first dial that failed; it doubles.
const FIRST_REDIAL: Duration = Duration::from_millis(20);
/// Longest pause between two dials.
const LONGEST_REDIAL: Duration = Duration::from_millis(200);
/// When a deadline passes, what waits in the socket is read first, for this long.
const LAST_LOOK: Duration = Duration::from_millis(1);
/// Things that may wait for the loop; more wait at their source.
const MAX_INPUTS: usize = 1024;

enum Input {
    Link { path: usize, connection: Connection },
    Pulse { node: NodeId, path: usize, at: Instant, pulse: Pulse },
    Lost { node: NodeId, path: usize, id: usize },
}

/// A task that ends with its owner.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Link {
    connection: Connection,
    _reader: Task,
}

struct Watched {
    peer: Peer,
    track: Track,
    links: Vec<Option<Link>>,
    sent: Vec<u64>,
    /// Set while a deadline has passed and the socket gets its last look.
    last_look: Option<Time>,
    _dialers: Vec<Task>,
}

pub(super) struct Drive {
    identity: Arc<Identity>,
    peers: Arc<Peers>,
    options: BeatOptions,
    events: mpsc::Sender<PeerEvent>,
    reports: watch::Receiver<Reports>,
    stats: Arc<Mutex<Vec<PathStats>>>,
    endpoints: Vec<Arc<Endpoint>>,
    /// Where each of them listens.
    locals: Vec<SocketAddr>,
    start: Instant,
    sequence: u64,
    watched: BTreeMap<NodeId, Watched>,
    sender: mpsc::Sender<Input>,
    inputs: mpsc::Receiver<Input>,
    _acceptors: Vec<Task>,
}

impl Drive {
    pub(super) fn open(
        identity: Arc<Identity>,
        peers: Arc<Peers>,
        options: BeatOptions,
        events: mpsc::Sender<PeerEvent>,
        reports: watch::Receiver<Reports>,
        stats: Arc<Mutex<Vec<PathStats>>>,
    ) -> Result<(Self, Vec<SocketAddr>), QuicError> {
        let (sender, inputs) = mpsc::channel(MAX_INPUTS);
        let mut endpoints = Vec::new();
        let mut acceptors = Vec::new();
        let mut addresses = Vec::new();
        for (path, &bind) in options.paths.iter().enumerate() {
            let options = EndpointOptions { bind, profile: Profile::Heartbeat, mtu: None };
            let endpoint = Arc::new(Endpoint::open(identity.clone(), peers.clone(), options)?);
            addresses.push(endpoint.local_addr()?);
            acceptors.push(Task(tokio::spawn(accept_all(endpoint.clone(), path, sender.clone()))));
            endpoints.push(endpoint);
        }
        let drive = Self {
            identity,
            peers,
            options,
            events,
            reports,
            stats,
            endpoints,
            locals: addresses.clone(),
            start: Instant::now(),
            sequence: 0,
            watched: BTreeMap::new(),
            sender,
            inputs,
            _acceptors: acceptors,
        };
        Ok((drive, addresses))
    }

    pub(super) async fn run(mut self, mut stop: oneshot::Receiver<()>) {
        let interval = self.options.detector.interval;
        let (mut next_tick, mut next_look) = (Instant::now(), Instant::now());
        let mut last_pass = Instant::now();
        loop {
            // 1. Were we scheduled? Each pass ends by the next tick at the latest.
            let now = Instant::now();
            let late = now.duration_since(last_pass);
            if late > self.options.starved_after.max(interval * 2) {
                self.starved(late);
            }
            last_pass = now;

            // 2. What came, before any judgement.
            for _ in 0..MAX_INPUTS {
                let Ok(input) = self.inputs.try_recv() else { break };
                self.take(input);
            }

            // 3. What is due.
            if now >= next_look {
                self.look_at_peers();
                next_look = now + LOOK_AT_PEERS;
            }
            if now >= next_tick || self.reports.has_changed().unwrap_or(false) {
                self.tick();
                next_tick = (next_tick + interval).max(now + interval / 2);
            }
            let wake = self.judge().map_or(next_tick, |at| at.min(next_tick)).min(next_look);

            // 4. Wait for more.
            tokio::select! {
                biased;
                _ = &mut stop => break,
                input = self.inputs.recv() => {
                    let input = input.expect("this loop holds a sender");
                    self.take(input);
                }
                Ok(()) = self.reports.changed() => self.reports.mark_changed(),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
        for endpoint in &self.endpoints {
            endpoint.close(close::DONE, "heartbeats stop");
        }
        for endpoint in &self.endpoints {
            // So that the peers learn of it; they take it as the beginning of a silence all the same.
            let _ = tokio::time::timeout(DIAL_DEADLINE, endpoint.wait_idle()).await;
        }
    }

    fn time(&self, at: Instant) -> Time {
        Time::from_start(at.saturating_duration_since(self.start))
    }

    fn now(&self) -> Time {
        self.time(Instant::now())
    }

    fn tell(&self, events: Vec<PeerEvent>) {
        for event in events {
            if self.events.try_send(event).is_err() && !self.events.is_closed() {
                tracing::error!(?event, "nobody takes heartbeat events; this one is dropped");
            }
        }
    }

    fn starved(&mut self, late: Duration) {
        tracing::warn!(?late, "the heartbeat thread was not scheduled; nobody is suspected for one whole silence");
        let now = self.now();
        for watched in self.watched.values_mut() {
            watched.track.handle_starvation(now);
            watched.last_look = None;
        }
        self.tell(vec![PeerEvent::Starved { late }]);
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Link { path, connection } => self.link(path, connection),
            Input::Pulse { node, path, at, pulse } => {
                let at = self.time(at);
                let mut events = Vec::new();
                if let Some(watched) = self.watched.get_mut(&node) {
                    watched.track.handle_pulse(at, path, &pulse, &mut events);
                }
                self.tell(events);
            }
            Input::Lost { node, path, id } => {
                if let Some(watched) = self.watched.get_mut(&node) {
                    let slot = &mut watched.links[path];
                    if slot.as_ref().is_some_and(|link| link.connection.quic.stable_id() == id) {
                        tracing::debug!(peer = %watched.peer.name, path, "heartbeat connection lost");
                        *slot = None;
                    }
                }
            }
        }
    }

    fn link(&mut self, path: usize, connection: Connection) {
        let node = connection.peer.node;
        if !self.watched.contains_key(&node) {
            // Paired a moment ago.
            self.look_at_peers();
        }
        let Some(watched) = self.watched.get_mut(&node) else {
            connection.close(close::NOT_PAIRED, "no heartbeats with this node");
            return;
        };
        let reader = Task(tokio::spawn(read_all(connection.quic.clone(), node, path, self.sender.clone())));
        tracing::debug!(peer = %watched.peer.name, path, remote = %connection.quic.remote_address(), "heartbeat connection stands");
        if let Some(old) = watched.links[path].replace(Link { connection, _reader: reader }) {
            old.connection.close(close::REPLACED, "a newer connection took its place");
        }
    }

    /// Sends one heartbeat to everyone and publishes the numbers.
    fn tick(&mut self) {
        self.sequence += 1;
        let reports = turn(&self.reports.borrow_and_update(), self.sequence);
        let now = self.now();
        let mut stats = Vec::new();
        let mut events = Vec::new();
        for watched in self.watched.values_mut() {
            watched.track.judge_paths(now, &mut events);
            for path in 0..watched.links.len() {
                if let Some(link) = &watched.links[path] {
                    let pulse = Pulse {
                        node: self.identity.node(),
                        incarnation: self.identity.incarnation().0,
                        sequence: self.sequence,
                        sent: now.0,
                        echo: watched.track.echo(now, path),
                        reports: reports.clone(),
                    };
                    // A lost connection is noticed by its reader.
                    if link.connection.quic.send_datagram(encode(&pulse).into()).is_ok() {
                        watched.sent[path] += 1;
                    }
                }
                // A path that only one of the two has is none.
                let Some(&address) = watched.peer.heartbeat.get(path) else { continue };
                let view = watched.track.view(now, path);
                stats.push(PathStats {
                    node: watched.peer.node,
                    name: watched.peer.name.clone(),
                    path,
                    local: self.locals[path],
                    address,
                    up: view.up,
                    connected: watched.links[path].is_some(),
                    sent: watched.sent[path],
                    received: view.received,
                    rtt: view.rtt,
                    phi: view.phi,
                    silence: view.silence,
                    suspected: watched.track.suspected(),
                });
            }
        }
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        self.tell(events);
    }

    /// Suspects who is due, after a last look at the socket. Returns when to come again.
    fn judge(&mut self) -> Option<Instant> {
        let now = self.now();
        let mut events = Vec::new();
        let mut wake: Option<Time> = None;
        for watched in self.watched.values_mut() {
            let Some(due) = watched.track.next_check() else { continue };
            let at = if now < due {
                watched.last_look = None;
                due
            } else {
                let until = *watched.last_look.get_or_insert(now + LAST_LOOK);
                if now >= until {
                    watched.last_look = None;
                    watched.track.judge(now, &mut events);
                    continue;
                }
                until
            };
            wake = Some(wake.map_or(at, |wake| wake.min(at)));
        }
        self.tell(events);
        wake.and_then(|at| self.start.checked_add(Duration::from_nanos(at.0)))
    }

    /// Takes up agents that were paired and lets go of those that were removed or changed.
    fn look_at_peers(&mut self) {
        let agents: BTreeMap<NodeId, Peer> = self
            .peers
            .list()
            .into_iter()
            .filter(|peer| peer.role == Role::Agent)
            .map(|peer| (peer.node, peer))
            .collect();
        self.watched.retain(|node, watched| {
            let stays = agents.get(node) == Some(&watched.peer);
            if !stays {
                for link in watched.links.iter().flatten() {
                    link.connection.close(close::NOT_PAIRED, "not paired any more");
                }
            }
            stays
        });
        for (node, peer) in agents {
            if !self.watched.contains_key(&node) {
                let watched = self.watch(peer);
                self.watched.insert(node, watched);
            }
        }
    }

    fn watch(&self, peer: Peer) -> Watched {
        let paths = self.endpoints.len();
        let mut dialers = Vec::new();
        if self.identity.node() < peer.node {
            for (path, (endpoint, &address)) in self.endpoints.iter().zip(&peer.heartbeat).enumerate() {
                let dial = dial_forever(endpoint.clone(), peer.clone(), address, path, self.sender.clone());
                dialers.push(Task(tokio::spawn(dial)));
            }
        }
        Watched {
            track: Track::new(peer.node, paths, self.options.detector),
            links: std::iter::repeat_with(|| None).take(paths).collect(),
            sent: vec![0; paths],
            last_look: None,
            _dialers: dialers,
            peer,
        }
    }
}

/// The reports whose turn it is.
fn turn(reports: &Reports, sequence: u64) -> Vec<Report> {
    let turns = u64::try_from(reports.len().div_ceil(MAX_REPORTS).max(1)).expect("usize fits u64");
    let turn = usize::try_from(sequence % turns).expect("less than the number of reports");
    let all = reports.iter().map(|(&vm, &status)| Report { vm, status });
    all.skip(turn * MAX_REPORTS).take(MAX_REPORTS).collect()
}

async fn accept_all(endpoint: Arc<Endpoint>, path: usize, inputs: mpsc::Sender<Input>) {
    while let Some(connection) = endpoint.accept().await {
        if connection.purpose != Purpose::Heartbeat {
            connection.close(close::PROTOCOL, "this port is for heartbeats");
            continue;
        }
        if inputs.send(Input::Link { path, connection }).await.is_err() {
            return;
        }
    }
}

async fn dial_forever(
    endpoint: Arc<Endpoint>,
    peer: Peer,
    address: SocketAddr,
    path: usize,
    inputs: mpsc::Sender<Input>,
) {
    let mut pause = FIRST_REDIAL;
    let mut complained = false;
    loop {
        let dial = endpoint.connect_to(&peer, address, Purpose::Heartbeat);
        match tokio::time::timeout(DIAL_DEADLINE, dial).await {
            Ok(Ok(connection)) => {
                (pause, complained) = (FIRST_REDIAL, false);
                let quic = connection.quic.clone();
                if inputs.send(Input::Link { path, connection }).await.is_err() {
                    return;
                }
                quic.closed().await;
            }
            Ok(Err(error)) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!(peer = %peer.name, %address, %error, "no heartbeat connection; trying on");
                }
            }
            Err(_) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!(peer = %peer.name, %address, "no heartbeat connection: no answer; trying on");
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_REDIAL);
    }
}

async fn read_all(quic: quinn::Connection, node: NodeId, path: usize, inputs: mpsc::Sender<Input>) {
    while let Ok(bytes) = quic.read_datagram().await {
        let at = Instant::now();
        let pulse = if bytes.len() <= MAX_PULSE { decode::<Pulse>(&bytes).ok() } else { None };
        let Some(pulse) = pulse.filter(|pulse| pulse.node == node) else {
            quic.close(quinn::VarInt::from_u32(close::PROTOCOL), b"bad heartbeat");
            break;
        };
        if inputs.send(Input::Pulse { node, path, at, pulse }).await.is_err() {
            return;
        }
    }
    let _ = inputs.send(Input::Lost { node, path, id: quic.stable_id() }).await;
}

#[cfg(test)]
mod tests {
    use heartbeat_core::ids::VmId;

    use super::*;
    use crate::beat::GuestStatus;

    #[test]
    fn every_report_has_its_turn() {
        for count in [0_u8, 1, 32, 33, 100] {
            let reports: Reports = (0..count).map(|n| (VmId([n; 16]), GuestStatus::Running)).collect();
            let mut seen = std::collections::BTreeSet::new();
            for sequence in 0..4 {
                let turn = turn(&reports, sequence);
                assert!(turn.len() <= MAX_REPORTS);
                seen.extend(turn.iter().map(|report| report.vm));
            }
            assert_eq!(seen.len(), usize::from(count));
        }
    }
}
