//! The status page: what an operator sees in a browser at the metrics' address.
//!
//! Promise: it tells no more than `/metrics`, beside the agent's own name, which its peers' metrics tell, and when things
//! happened, which whoever scrapes knows. It is filled by the same calls as the metrics and read from their values; no reason,
//! address, path or process ever comes to it. It is read-only, and what it costs is bounded: [`history`] and [`EVENTS`].

mod history;
mod routes;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use self::history::{History, STEP};
use super::{PeerMetrics, VmMetrics, WitnessMetrics};
use crate::control::api::{FailoverReport, Role, SyncProgress};

pub(super) use routes::routes;

/// Events that are kept, the newest, of all VMs together.
const EVENTS: usize = 50;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn ms(duration: Duration) -> f64 {
    // Hundredths are enough for people, and make the answer short.
    (duration.as_secs_f64() * 1e5).round() / 1e2
}

/// What the page knows beside the metrics' values: the handles to read them by, and what happened lately.
#[derive(Debug)]
pub(super) struct Recent {
    since_unix_ms: u64,
    vms: Mutex<BTreeMap<String, VmMetrics>>,
    peers: Mutex<BTreeMap<String, PeerMetrics>>,
    witnesses: Mutex<BTreeMap<String, WitnessMetrics>>,
    events: Arc<Events>,
}

impl Recent {
    pub(super) fn new() -> Self {
        Self {
            since_unix_ms: unix_ms(),
            vms: Mutex::default(),
            peers: Mutex::default(),
            witnesses: Mutex::default(),
            events: Arc::default(),
        }
    }

    /// Where what happens to the VM `name` goes: where it went before, if it is known.
    pub(super) fn of_vm(&self, name: &str) -> Arc<VmRecent> {
        let known = lock(&self.vms).get(name).map(|vm| Arc::clone(vm.recent()));
        known.unwrap_or_else(|| Arc::new(VmRecent::new(name, Arc::clone(&self.events))))
    }

    pub(super) fn add_vm(&self, name: &str, vm: VmMetrics) {
        lock(&self.vms).insert(name.to_owned(), vm);
    }

    pub(super) fn remove_vm(&self, name: &str) {
        lock(&self.vms).remove(name);
    }

    pub(super) fn add_peer(&self, name: &str, peer: PeerMetrics) {
        lock(&self.peers).insert(name.to_owned(), peer);
    }

    pub(super) fn remove_peer(&self, name: &str) {
        lock(&self.peers).remove(name);
    }

    pub(super) fn add_witness(&self, name: &str, witness: WitnessMetrics) {
        lock(&self.witnesses).insert(name.to_owned(), witness);
    }

    pub(super) fn remove_witness(&self, name: &str) {
        lock(&self.witnesses).remove(name);
    }

    /// All of it, now.
    pub(super) fn page(&self, agent: &str) -> Page {
        let vms: Vec<VmMetrics> = lock(&self.vms).values().cloned().collect();
        let peers = lock(&self.peers).iter().map(|(name, peer)| peer.on_page(name)).collect();
        let witnesses = lock(&self.witnesses).iter().filter_map(|(name, witness)| witness.on_page(name)).collect();
        Page {
            agent: agent.to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            unix_ms: unix_ms(),
            since_unix_ms: self.since_unix_ms,
            step_ms: u64::try_from(STEP.as_millis()).unwrap_or(u64::MAX),
            vms: vms.iter().map(VmMetrics::on_page).collect(),
            events: self.events.newest(),
            peers,
            witnesses,
        }
    }
}

/// The ring of what happened.
#[derive(Debug, Default)]
struct Events(Mutex<VecDeque<Event>>);

impl Events {
    fn add(&self, vm: &str, kind: &'static str, text: String) {
        let mut events = lock(&self.0);
        if events.len() == EVENTS {
            events.pop_front();
        }
        events.push_back(Event { unix_ms: unix_ms(), vm: vm.to_owned(), kind, text });
    }

    /// The newest first.
    fn newest(&self) -> Vec<Event> {
        lock(&self.0).iter().rev().cloned().collect()
    }
}

/// What happened to one VM lately. All handles of its metrics share it.
#[derive(Debug)]
pub(super) struct VmRecent {
    name: String,
    events: Arc<Events>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: &'static str,
    role: Option<Role>,
    peer: String,
    generation: u64,
    sync: Option<SyncProgress>,
    failover: Option<LastFailover>,
    history: History,
}

impl VmRecent {
    fn new(name: &str, events: Arc<Events>) -> Self {
        Self { name: name.to_owned(), events, inner: Mutex::default() }
    }

    /// A state as [`crate::control::api::ProtectionState::word`], and how far the synchronisation is.
    pub(super) fn state(&self, word: &'static str, sync: Option<SyncProgress>) {
        let mut inner = lock(&self.inner);
        let before = std::mem::replace(&mut inner.state, word);
        inner.sync = sync;
        drop(inner);
        if before != word {
            let text = if before.is_empty() { word.to_owned() } else { format!("{before} \u{2192} {word}") };
            self.events.add(&self.name, "state", text);
        }
    }

    pub(super) fn role(&self, role: Role) {
        let before = lock(&self.inner).role.replace(role);
        if before != Some(role) {
            self.events.add(&self.name, "role", format!("this host's copy is the {}", role.word()));
        }
    }

    pub(super) fn peer(&self, peer: &str) {
        let mut inner = lock(&self.inner);
        if inner.peer != peer {
            peer.clone_into(&mut inner.peer);
        }
    }

    pub(super) fn generation(&self, generation: u64) {
        let before = std::mem::replace(&mut lock(&self.inner).generation, generation);
        if before != generation {
            self.events.add(&self.name, "ownership", format!("generation {generation}"));
        }
    }

    pub(super) fn epoch(&self, pause: Duration) {
        lock(&self.inner).history.epoch(pause);
    }

    pub(super) fn lag(&self, lag: Duration) {
        let lag = Some(lag).filter(|lag| !lag.is_zero());
        lock(&self.inner).history.look(Instant::now(), lag);
    }

    pub(super) fn rehearsed(&self, loads: bool) {
        let text = if loads { "the copy loads" } else { "the copy does not load" };
        self.events.add(&self.name, "rehearsal", text.to_owned());
    }

    pub(super) fn failover(&self, report: &FailoverReport) {
        let last = LastFailover {
            unix_ms: report.detected_unix_ms,
            cause: report.cause.word(),
            detection_ms: report.detection_ms,
            grant_ms: report.grant_ms,
            activation_ms: report.activation_ms.map(|activation| activation.total),
        };
        let activation = last.activation_ms.map_or(String::new(), |ms| format!(", activation {ms:.0} ms"));
        let text = format!("goes on here: {}, detection {:.0} ms{activation}", last.cause, last.detection_ms);
        lock(&self.inner).failover = Some(last);
        self.events.add(&self.name, "failover", text);
    }

    /// Its part of the page; the metrics' values are still to be filled in.
    pub(super) fn on_page(&self) -> VmOnPage {
        let inner = lock(&self.inner);
        let of = |what: fn(&history::Step) -> Option<Duration>| -> Vec<Option<f64>> {
            inner.history.steps().map(|step| what(step).map(ms)).collect()
        };
        VmOnPage {
            name: self.name.clone(),
            role: inner.role.map_or("", Role::word),
            state: inner.state,
            sync: inner.sync,
            peer: inner.peer.clone(),
            generation: inner.generation,
            epochs_per_s: inner.history.epochs_per_second(),
            failover: inner.failover.clone(),
            pause_ms: of(|step| step.pause),
            lag_ms: of(|step| step.lag),
            ..VmOnPage::default()
        }
    }
}

/// What the page polls. Made for this page of this version alone: read the control API or the metrics from elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Page {
    agent: String,
    version: &'static str,
    /// Now, by this host's clock.
    unix_ms: u64,
    /// When the agent started; nothing is told of before.
    since_unix_ms: u64,
    /// Length of a step of the VMs' histories.
    step_ms: u64,
    vms: Vec<VmOnPage>,
    /// The newest first.
    events: Vec<Event>,
    peers: Vec<PeerOnPage>,
    witnesses: Vec<WitnessOnPage>,
}

/// One VM. Figures are those of the metrics.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub(super) struct VmOnPage {
    name: String,
    role: &'static str,
    state: &'static str,
    sync: Option<SyncProgress>,
    peer: String,
    generation: u64,
    pub(super) epoch_committed: i64,
    epochs_per_s: f64,
    /// Part of the time that the guest stood.
    pub(super) pause_share: f64,
    pub(super) held_frames: i64,
    pub(super) held_bytes: i64,
    pub(super) held_oldest_ms: f64,
    /// Since the agent started.
    pub(super) failovers: u64,
    failover: Option<LastFailover>,
    /// The longest pause in each step, oldest first; none where no epoch was committed.
    pause_ms: Vec<Option<f64>>,
    /// The largest replication lag seen in each step; none where there is no question of one.
    lag_ms: Vec<Option<f64>>,
}

/// The last failover whose survivor runs here.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct LastFailover {
    unix_ms: u64,
    cause: &'static str,
    detection_ms: f64,
    grant_ms: Option<f64>,
    activation_ms: Option<f64>,
}

/// Something that happened, in words and figures of ours alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Event {
    unix_ms: u64,
    vm: String,
    kind: &'static str,
    text: String,
}

/// A peer. Figures are those of the metrics.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct PeerOnPage {
    pub(super) name: String,
    pub(super) phi: f64,
    pub(super) silence_ms: f64,
    pub(super) rtt_ms: f64,
}

/// A witness.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct WitnessOnPage {
    pub(super) name: String,
    pub(super) reachable: bool,
}

#[cfg(test)]
mod tests;
