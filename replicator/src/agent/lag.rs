//! How far the guest's clock fell behind because of us.
//!
//! A paused guest's clock stands (docs/architecture.md, "The guest's clock"): what counts is the time that we hold the guest, from
//! the call that stops it until the one that lets it run has returned, whatever for. Time in which its owner has paused it, or it
//! has shut itself down, is not ours and does not count. Pure but for the shared total: times are inputs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_hooks::guest::GuestEvent;

/// The total, shared with who shows it.
#[derive(Debug, Default)]
pub(super) struct Lag(AtomicU64);

impl Lag {
    /// The total so far.
    pub(super) fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn add(&self, time: Duration) {
        self.0.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Who makes the guest stand now, as its one pauser knows it.
#[derive(Debug)]
pub(super) struct Stand {
    lag: Arc<Lag>,
    /// Since when we hold it, as far as it was not counted yet.
    ours: Option<Instant>,
    by_owner: bool,
}

impl Stand {
    /// A guest that runs.
    pub(super) fn new(lag: Arc<Lag>) -> Self {
        Self { lag, ours: None, by_owner: false }
    }

    /// We stop it. Stopping it again changes nothing.
    pub(super) fn stops(&mut self, now: Instant) {
        self.ours.get_or_insert(now);
    }

    /// We let it run.
    pub(super) fn runs(&mut self, now: Instant) {
        self.count(now);
        self.ours = None;
    }

    /// Something happened to it.
    pub(super) fn heard(&mut self, event: &GuestEvent, now: Instant) {
        match event {
            GuestEvent::Paused | GuestEvent::Shutdown | GuestEvent::Died { .. } => {
                self.count(now);
                self.by_owner = true;
            }
            GuestEvent::Resumed => {
                self.count(now);
                self.by_owner = false;
            }
            GuestEvent::Reset | GuestEvent::Changed { .. } => {}
        }
    }

    fn count(&mut self, now: Instant) {
        let Some(since) = self.ours.as_mut() else { return };
        if !self.by_owner {
            self.lag.add(now.saturating_duration_since(*since));
        }
        *since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays steps at the given milliseconds and gives the lag in milliseconds.
    fn lag(steps: &[(u64, &str)]) -> u128 {
        let lag = Arc::new(Lag::default());
        let (mut stand, start) = (Stand::new(lag.clone()), Instant::now());
        for (at, step) in steps {
            let now = start + Duration::from_millis(*at);
            match *step {
                "stop" => stand.stops(now),
                "run" => stand.runs(now),
                "pause" => stand.heard(&GuestEvent::Paused, now),
                "resume" => stand.heard(&GuestEvent::Resumed, now),
                "reset" => stand.heard(&GuestEvent::Reset, now),
                "shutdown" => stand.heard(&GuestEvent::Shutdown, now),
                other => panic!("no step {other}"),
            }
        }
        lag.total().as_millis()
    }

    #[test]
    fn our_pauses_add_up() {
        assert_eq!(
            lag(&[(0, "stop"), (2, "run"), (10, "stop"), (11, "stop"), (13, "reset"), (15, "run"), (90, "run")]),
            7
        );
    }

    #[test]
    fn a_pause_of_its_owner_does_not_count() {
        assert_eq!(lag(&[(0, "pause"), (1, "stop"), (3, "run"), (50, "resume")]), 0);
        assert_eq!(lag(&[(0, "stop"), (2, "run"), (5, "shutdown"), (6, "stop"), (60, "run")]), 2);
        // Into and out of the middle of one of ours.
        assert_eq!(lag(&[(0, "stop"), (2, "pause"), (50, "resume"), (53, "run")]), 5);
        assert_eq!(lag(&[(0, "stop"), (2, "pause"), (10, "run"), (50, "resume"), (60, "stop"), (61, "run")]), 3);
    }
}
