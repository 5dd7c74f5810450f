//! Prometheus metrics of one agent.
//!
//! [`Metrics`] owns its registry: nothing is global, two agents in one process do not mix. [`Metrics::vm`] and
//! [`Metrics::peer`] give handles whose series are looked up once, so that observing costs nanoseconds. Every metric is
//! called `understudy_*`, has base units and a help text that says where a duration starts and ends and what it leaves out.

mod describe;
mod families;
mod http;
mod page;
mod peer;
mod vm;

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Encoder as _, Registry, TextEncoder};

pub use describe::{Kind, MetricFamily, families, label_values};
pub use http::{MetricsServer, MetricsServerError};
pub use page::Page;
pub use peer::{FenceOutcome, PathMetrics, PeerMetrics, WitnessMetrics, WitnessOutcome};
pub use vm::VmMetrics;

use families::Families;
use page::Recent;

/// The metrics of one agent. Clones are the same metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    families: Arc<Families>,
    recent: Arc<Recent>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics, none with a series yet but the build's.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let families = Families::new(&registry);
        for outcome in families::FENCE_OUTCOMES {
            let _ = families.fence_seconds.with_label_values(&[outcome]);
        }
        families.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self { registry, families: Arc::new(families), recent: Arc::new(Recent::new()) }
    }

    /// The bounds beyond which held output is dropped.
    pub fn set_held_limits(&self, bytes: u64, age: Duration) {
        let none: &[&str] = &[];
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.families.held_limit_bytes.with_label_values(none).set(bytes);
        self.families.held_limit_seconds.with_label_values(none).set(age.as_secs_f64());
    }

    /// The handle of one VM. Take one per protection and clone it: counters that a gate reports as totals are kept apart by
    /// handle.
    #[must_use]
    pub fn vm(&self, name: &str) -> VmMetrics {
        let vm = VmMetrics::new(Arc::clone(&self.families), name, self.recent.of_vm(name));
        self.recent.add_vm(name, vm.clone());
        vm
    }

    /// Forgets a VM: its series are exported no more. Handles that are left write nowhere.
    pub fn remove_vm(&self, name: &str) {
        self.recent.remove_vm(name);
        vm::remove(&self.families, name);
    }

    /// The handle of one peer.
    #[must_use]
    pub fn peer(&self, name: &str) -> PeerMetrics {
        let peer = PeerMetrics::new(&self.families, name);
        self.recent.add_peer(name, peer.clone());
        peer
    }

    /// The handle of one path to a peer, from 0.
    #[must_use]
    pub fn path(&self, peer: &str, path: usize) -> PathMetrics {
        PathMetrics::new(&self.families, peer, path)
    }

    /// Forgets a path: its series are exported no more.
    pub fn remove_path(&self, peer: &str, path: usize) {
        peer::remove_path(&self.families, peer, path);
    }

    /// Forgets a peer, its paths too.
    pub fn remove_peer(&self, name: &str) {
        self.recent.remove_peer(name);
        peer::remove(&self.families, name);
    }

    /// The handle of one witness.
    #[must_use]
    pub fn witness(&self, name: &str) -> WitnessMetrics {
        let witness = WitnessMetrics::new(&self.families, name);
        self.recent.add_witness(name, witness.clone());
        witness
    }

    /// The handle of a host that keeps the record of a VM in place of a witness.
    #[must_use]
    pub fn keeper(&self, name: &str) -> WitnessMetrics {
        WitnessMetrics::of_host(&self.families, name)
    }

    /// The fence command ended after `took`.
    pub fn fenced(&self, outcome: FenceOutcome, took: Duration) {
        let [confirmed, failed] = families::FENCE_OUTCOMES;
        let word = if outcome == FenceOutcome::Confirmed { confirmed } else { failed };
        self.families.fence_seconds.with_label_values(&[word]).observe(took.as_secs_f64());
    }

    /// Forgets a witness: whether it can be reached is exported no more.
    pub fn remove_witness(&self, name: &str) {
        self.recent.remove_witness(name);
        peer::remove_witness(&self.families, name);
    }

    /// What the status page of the agent called `agent` shows now.
    #[must_use]
    pub fn page(&self, agent: &str) -> Page {
        self.recent.page(agent)
    }

    /// All series in Prometheus' text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("names and labels were checked when the metrics were made");
        String::from_utf8(text).expect("the text encoder writes UTF-8")
    }
}

#[cfg(test)]
mod tests;
