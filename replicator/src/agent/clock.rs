//! One clock for the pure cores: `CLOCK_MONOTONIC` in nanoseconds.
//!
//! Promise: all processes of one host read the same number at the same moment, so that times in status
//! reports of two agents on one machine can be subtracted. Nothing about safety reads it.

use std::time::{Duration, Instant};

use heartbeat_core::time::Time;
use rustix::time::{ClockId, clock_gettime};

/// Now.
pub(super) fn now() -> Time {
    let spec = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(spec.tv_sec).expect("the monotonic clock never runs below zero");
    let nanos = u64::try_from(spec.tv_nsec).expect("nanoseconds are never negative");
    Time(seconds * 1_000_000_000 + nanos)
}

/// The `Instant` of a core's time: its distance from now, put on `Instant`'s clock.
pub(super) fn instant(time: Time) -> Instant {
    let distance = time.0.saturating_sub(now().0);
    Instant::now() + Duration::from_nanos(distance)
}

/// The core's time of an `Instant` that has passed.
pub(super) fn time_of(instant: Instant) -> Time {
    let age = u64::try_from(instant.elapsed().as_nanos()).unwrap_or(u64::MAX);
    Time(now().0.saturating_sub(age))
}
