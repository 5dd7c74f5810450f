//! What the metrics are, for those who document, plot and check them: names, types, labels, the values that labels take.

use super::families::{self, FAILOVER_PHASES, FENCE_OUTCOMES, PAUSE_PARTS, REHEARSAL_OUTCOMES, WITNESS_OUTCOMES};
use crate::control::api::{EncodedBytes, FailoverCause, ProtectionState, Role};

/// The type of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows, and begins again at 0 with a new agent.
    Counter,
    /// Counts observations by size: `_bucket`, `_sum`, `_count`.
    Histogram,
}

impl Kind {
    /// Prometheus' word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric family as it is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricFamily {
    /// Its name, `understudy_` included.
    pub name: String,
    /// Its type.
    pub kind: Kind,
    /// Its labels, beside those that Prometheus adds.
    pub labels: Vec<&'static str>,
    /// What it means, and where a duration starts and ends.
    pub help: String,
}

impl MetricFamily {
    /// The unit, which the name ends with.
    #[must_use]
    pub fn unit(&self) -> &'static str {
        let name = self.name.strip_suffix("_total").unwrap_or(&self.name);
        ["seconds", "bytes", "pages", "frames", "ratio"]
            .into_iter()
            .find(|unit| name.ends_with(&format!("_{unit}")))
            .unwrap_or("1")
    }
}

/// Every family of an agent.
#[must_use]
pub fn families() -> Vec<MetricFamily> {
    families::described()
}

/// The values that a label of family `name` takes, or `None` if they are names and the like. (`outcome` says different
/// things of different families.)
#[must_use]
pub fn label_values(name: &str, label: &str) -> Option<Vec<&'static str>> {
    Some(match label {
        "state" => ProtectionState::WORDS.to_vec(),
        "role" => [Role::Primary, Role::Standby, Role::Survivor].map(Role::word).to_vec(),
        "part" => PAUSE_PARTS.to_vec(),
        "phase" => FAILOVER_PHASES.to_vec(),
        "cause" => FailoverCause::ALL.map(FailoverCause::word).to_vec(),
        "encoding" => EncodedBytes::default().named().map(|(encoding, _)| encoding).to_vec(),
        "outcome" if name.contains("rehearsal") => REHEARSAL_OUTCOMES.to_vec(),
        "outcome" if name.contains("fence") => FENCE_OUTCOMES.to_vec(),
        "outcome" => WITNESS_OUTCOMES.to_vec(),
        _ => return None,
    })
}
