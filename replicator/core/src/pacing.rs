//! How long an epoch lasts: fixed, or as soon as output waits.

use core::time::Duration;

use heartbeat_core::time::Time;

/// The policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pacing {
    /// A capture each `every`, counted from the end of the last pause.
    Fixed {
        /// The time between two pauses.
        every: Duration,
    },
    /// A capture soon after output waits.
    Auto(AutoPacing),
}

/// Bounds of [`Pacing::Auto`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoPacing {
    /// Bound on the share of time spent paused while output waits, in percent (1..=90).
    pub busy_share: u8,
    /// Bound on the share of time spent paused while no output waits, in percent (1..=90).
    pub idle_share: u8,
    /// The longest epoch of an idle guest.
    pub longest: Duration,
    /// Bound on the gather time.
    pub gather: Duration,
}

impl Default for AutoPacing {
    fn default() -> Self {
        Self {
            busy_share: 25,
            idle_share: 5,
            longest: Duration::from_millis(100),
            gather: Duration::from_millis(3),
        }
    }
}

/// When the next capture is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Not before this.
    pub earliest: Time,
    /// At this time anyway.
    pub latest: Time,
    /// `Some(gather)`: between the two, as soon as the oldest waiting output has waited this long. `None`: at `latest`.
    pub on_output: Option<Duration>,
}
