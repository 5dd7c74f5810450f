//! A phi-accrual failure detector.

use core::time::Duration;

use crate::ids::Incarnation;
use crate::time::Time;

/// How a [`Detector`] judges.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DetectorConfig {
    /// How often the peer sends a heartbeat.
    pub interval: Duration,
    /// The silence after which a peer that was regular until then is suspected.
    pub silence: Duration,
    /// Phi at which the peer is suspected.
    pub threshold: f64,
}

impl Default for DetectorConfig {
    fn default() -> Self {
        Self { interval: Duration::from_millis(20), silence: Duration::from_millis(200), threshold: 8.0 }
    }
}

/// What an arrival meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The peer is heard, as before.
    Heard,
    /// The peer is heard for the first time.
    First,
    /// The peer is another one than before: it restarted. Samples of its old life are forgotten.
    NewIncarnation,
    /// From a life of the peer that is over, or out of order: ignored.
    Stale,
}

/// The detector of one peer.
#[derive(Clone, Debug)]
pub struct Detector {
    config: DetectorConfig,
    incarnation: Option<Incarnation>,
    last: Option<Time>,
}

impl Detector {
    /// A detector that heard nothing yet; it suspects nobody until the first heartbeat came.
    #[must_use]
    pub fn new(config: DetectorConfig) -> Self {
        Self { config, incarnation: None, last: None }
    }

    /// A heartbeat arrived.
    pub fn handle_heartbeat(&mut self, now: Time, incarnation: Incarnation) -> Arrival {
        self.incarnation = Some(incarnation);
        self.last = Some(now);
        Arrival::Heard
    }

    /// How unlikely it is that a living peer was silent this long: -log10 of the probability. 0 before the first heartbeat.
    #[must_use]
    pub fn phi(&self, _now: Time) -> f64 {
        0.0
    }

    /// Whether the peer is suspected at `now`.
    #[must_use]
    pub fn is_suspect(&self, now: Time) -> bool {
        self.phi(now) >= self.config.threshold
    }

    /// When the peer will be suspected if nothing more is heard; `None` before the first heartbeat.
    #[must_use]
    pub fn next_check(&self) -> Option<Time> {
        self.last.map(|last| last + self.config.silence)
    }

    /// Which life of the peer was heard last.
    #[must_use]
    pub fn incarnation(&self) -> Option<Incarnation> {
        self.incarnation
    }

    /// When the peer was heard last.
    #[must_use]
    pub fn last_heard(&self) -> Option<Time> {
        self.last
    }
}
