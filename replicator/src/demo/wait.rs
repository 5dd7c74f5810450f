//! Waiting for conditions, each with a bound and an error that says what was waited for.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::time::{ClockId, clock_gettime};

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of every figure, the same in all processes of one machine.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).expect("the monotonic clock starts at 0");
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).expect("a part of a second is not negative")
}

/// Milliseconds from one instant to a later one.
#[must_use]
pub fn ms_between(from_ns: u64, to_ns: u64) -> f64 {
    Duration::from_nanos(to_ns.saturating_sub(from_ns)).as_secs_f64() * 1e3
}

/// Looks until `look` finds what it seeks. `Ok(Err(seen))` means not yet, and says what was seen instead; an error ends the waiting.
///
/// # Errors
/// After `bound`, with `what` was waited for and what was seen last.
pub async fn until<T>(
    what: &str,
    bound: Duration,
    mut look: impl AsyncFnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        match look().await? {
            Ok(found) => return Ok(found),
            Err(seen) if Instant::now() >= deadline => {
                bail!("waited {bound:?} in vain for {what}; seen last: {seen}")
            }
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}
