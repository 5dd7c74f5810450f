//! The metrics of one peer and its paths, and of one witness.

use std::time::Duration;

use heartbeat::beat::MAX_PATHS;
use prometheus::{Gauge, HistogramVec, IntCounter, IntGauge};

use super::families::{Families, WITNESS_OUTCOMES};
use super::page::{PeerOnPage, WitnessOnPage};
use crate::control::api::Suspicion;

/// The handle of one peer's metrics. Clones are the same handle.
#[derive(Debug, Clone)]
pub struct PeerMetrics {
    phi: Gauge,
    silence: Gauge,
    rtt: Gauge,
}

impl PeerMetrics {
    pub(super) fn new(families: &Families, name: &str) -> Self {
        let peer = &[name];
        Self {
            phi: families.peer_phi.with_label_values(peer),
            silence: families.peer_silence_seconds.with_label_values(peer),
            rtt: families.peer_rtt_seconds.with_label_values(peer),
        }
    }

    /// What the status page shows of the peer.
    pub(super) fn on_page(&self, name: &str) -> PeerOnPage {
        let [silence_ms, rtt_ms] = [&self.silence, &self.rtt].map(|gauge| gauge.get() * 1e3);
        PeerOnPage { name: name.to_owned(), phi: self.phi.get(), silence_ms, rtt_ms }
    }

    /// What the failure detector thinks now.
    pub fn set_suspicion(&self, suspicion: &Suspicion) {
        self.phi.set(suspicion.phi);
        self.silence.set(suspicion.silence_ms / 1e3);
    }

    /// A heartbeat's round trip.
    pub fn set_rtt(&self, rtt: Duration) {
        self.rtt.set(rtt.as_secs_f64());
    }
}

/// The handle of one path to a peer. Clones are the same handle.
#[derive(Debug, Clone)]
pub struct PathMetrics {
    up: IntGauge,
    phi: Gauge,
    silence: Gauge,
    rtt: Gauge,
    sent: IntCounter,
    received: IntCounter,
}

impl PathMetrics {
    pub(super) fn new(families: &Families, peer: &str, path: usize) -> Self {
        let path = path.to_string();
        let labels = &[peer, path.as_str()];
        Self {
            up: families.peer_path_up.with_label_values(labels),
            phi: families.peer_path_phi.with_label_values(labels),
            silence: families.peer_path_silence_seconds.with_label_values(labels),
            rtt: families.peer_path_rtt_seconds.with_label_values(labels),
            sent: families.heartbeats_sent.with_label_values(labels),
            received: families.heartbeats_received.with_label_values(labels),
        }
    }

    /// What the failure detector thinks of this path now, and whether the peer is heard on it.
    pub fn set(&self, suspicion: &Suspicion, up: bool) {
        self.up.set(i64::from(up));
        self.phi.set(suspicion.phi);
        self.silence.set(suspicion.silence_ms / 1e3);
    }

    /// A heartbeat's round trip.
    pub fn set_rtt(&self, rtt: Duration) {
        self.rtt.set(rtt.as_secs_f64());
    }

    /// Heartbeats were sent.
    pub fn sent(&self, heartbeats: u64) {
        self.sent.inc_by(heartbeats);
    }

    /// Heartbeats were heard.
    pub fn received(&self, heartbeats: u64) {
        self.received.inc_by(heartbeats);
    }
}

/// Removes every series of the peer.
pub(super) fn remove(families: &Families, name: &str) {
    let peer = &[name];
    for family in [&families.peer_phi, &families.peer_silence_seconds, &families.peer_rtt_seconds] {
        let _ = family.remove_label_values(peer);
    }
    for path in 0..MAX_PATHS {
        remove_path(families, name, path);
    }
}

/// Removes every series of one path.
pub(super) fn remove_path(families: &Families, peer: &str, path: usize) {
    let path = path.to_string();
    let labels = &[peer, path.as_str()];
    let _ = families.peer_path_up.remove_label_values(labels);
    let gauges = [&families.peer_path_phi, &families.peer_path_silence_seconds, &families.peer_path_rtt_seconds];
    for family in gauges {
        let _ = family.remove_label_values(labels);
    }
    for family in [&families.heartbeats_sent, &families.heartbeats_received] {
        let _ = family.remove_label_values(labels);
    }
}

/// How a request to the witness ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WitnessOutcome {
    /// The compare-and-set won.
    Granted,
    /// It did not.
    Refused,
    /// A read was answered.
    Read,
    /// No answer came, or the connection broke.
    Lost,
}

/// The handle of one witness's metrics. Clones are the same handle.
#[derive(Debug, Clone)]
pub struct WitnessMetrics {
    seconds: HistogramVec,
    /// Of what is looked for whether it is needed or not.
    reachable: Option<IntGauge>,
    name: String,
}

impl WitnessMetrics {
    pub(super) fn new(families: &Families, name: &str) -> Self {
        let reachable = families.witness_reachable.with_label_values(&[name]);
        Self { reachable: Some(reachable), ..Self::of_host(families, name) }
    }

    pub(super) fn of_host(families: &Families, name: &str) -> Self {
        for outcome in WITNESS_OUTCOMES {
            // There from the start, so that the first one of its kind is seen as a growth.
            let _ = families.witness_request_seconds.with_label_values(&[name, outcome]);
        }
        Self { seconds: families.witness_request_seconds.clone(), reachable: None, name: name.to_owned() }
    }

    /// What the status page shows of the witness; nothing of a host that keeps a record, which is a peer.
    pub(super) fn on_page(&self, name: &str) -> Option<WitnessOnPage> {
        let reachable = self.reachable.as_ref()?.get() == 1;
        Some(WitnessOnPage { name: name.to_owned(), reachable })
    }

    /// Whether the witness answered when it was looked for.
    pub fn set_reachable(&self, reachable: bool) {
        if let Some(gauge) = &self.reachable {
            gauge.set(i64::from(reachable));
        }
    }

    /// A request ended after `took`.
    pub fn observe(&self, outcome: WitnessOutcome, took: Duration) {
        let [granted, refused, read, lost] = WITNESS_OUTCOMES;
        let word = match outcome {
            WitnessOutcome::Granted => granted,
            WitnessOutcome::Refused => refused,
            WitnessOutcome::Read => read,
            WitnessOutcome::Lost => lost,
        };
        self.seconds.with_label_values(&[self.name.as_str(), word]).observe(took.as_secs_f64());
    }
}

/// What the fence command said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceOutcome {
    /// The host is off.
    Confirmed,
    /// Nothing that can be relied on.
    Failed,
}

/// Removes what says whether a witness can be reached; its requests stay counted.
pub(super) fn remove_witness(families: &Families, name: &str) {
    let _ = families.witness_reachable.remove_label_values(&[name]);
}
