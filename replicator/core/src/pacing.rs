//! How long an epoch lasts: fixed, or `auto`: until output waits.
//!
//! `auto` ends an epoch soon after the guest emitted something, so that a client waits for one commit and not for a timer. It never ends
//! one so soon that pauses would take more than the bounded share of the time, and an idle guest is captured rarely. Output of
//! several clients that comes close together should fall into one epoch: the gather time grows while epochs hold many frames, up to
//! the length of a pause (waiting longer would cost each client more than the saved pause), and falls to nothing
//! while they hold one. Pure: reports in, windows out.

use core::time::Duration;

use heartbeat_core::time::Time;

/// Bound on an epoch, whatever the pauses are: the capture must come while the standby still waits for it.
pub const LONGEST_IDLE: Duration = Duration::from_secs(1);
/// An epoch that holds more frames than this has the output of several clients.
const MANY_FRAMES: u64 = 2;
/// The smallest gather time that is not nothing.
const GATHER_STEP: Duration = Duration::from_micros(100);

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
    /// The longest epoch of an idle guest, unless `idle_share` asks for a longer one; that then goes up to [`LONGEST_IDLE`].
    pub longest: Duration,
    /// Bound on the gather time.
    pub gather: Duration,
}

impl Default for AutoPacing {
    fn default() -> Self {
        Self { busy_share: 25, idle_share: 5, longest: Duration::from_millis(100), gather: Duration::from_millis(3) }
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

/// Follows the pauses and says when the next one may be.
#[derive(Clone, Debug)]
pub struct Pacer {
    policy: Pacing,
    /// Moving average of the pauses.
    pause: Duration,
    gather: Duration,
}

impl Pacer {
    /// A pacer that saw no pause yet.
    ///
    /// # Panics
    /// If a share is not in 1..=90.
    #[must_use]
    pub fn new(policy: Pacing) -> Self {
        if let Pacing::Auto(auto) = policy {
            assert!((1..=90).contains(&auto.busy_share) && (1..=90).contains(&auto.idle_share), "no such share");
        }
        Self { policy, pause: Duration::ZERO, gather: Duration::ZERO }
    }

    /// The policy from now on. What was learned stays.
    pub fn set_policy(&mut self, policy: Pacing) {
        *self = Self { pause: self.pause, gather: self.gather, ..Self::new(policy) };
    }

    /// An epoch was captured with this pause and held this many frames.
    pub fn captured(&mut self, pause: Duration, held_frames: u64) {
        // A rise counts at once, so that the share is kept; a fall by a quarter each time.
        self.pause = if pause >= self.pause { pause } else { self.pause - (self.pause - pause) / 4 };
        if let Pacing::Auto(auto) = self.policy {
            self.gather = if held_frames > MANY_FRAMES {
                (self.gather * 5 / 4).max(GATHER_STEP).min(auto.gather).min(self.pause)
            } else {
                self.gather / 2
            };
        }
    }

    /// When to capture next, if the guest has run since `resumed`.
    #[must_use]
    pub fn window(&self, resumed: Time) -> Window {
        match self.policy {
            Pacing::Fixed { every } => Window { earliest: resumed + every, latest: resumed + every, on_output: None },
            Pacing::Auto(auto) => {
                let earliest = run_for(self.pause, auto.busy_share);
                let idle = run_for(self.pause, auto.idle_share).clamp(auto.longest, auto.longest.max(LONGEST_IDLE));
                let earliest = earliest.min(LONGEST_IDLE);
                Window {
                    earliest: resumed + earliest,
                    latest: resumed + idle.max(earliest),
                    on_output: Some(self.gather),
                }
            }
        }
    }
}

/// How long to run between two pauses so that pauses take at most `share` percent of the time.
fn run_for(pause: Duration, share: u8) -> Duration {
    let share = u32::from(share);
    // Rounded up: the bound holds for the shortest pauses, too.
    (pause * (100 - share) + Duration::from_nanos(u64::from(share) - 1)) / share
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn fixed_is_fixed() {
        let mut pacer = Pacer::new(Pacing::Fixed { every: 25 * MS });
        pacer.captured(4 * MS, 50);
        let at = Time::from_start(65 * MS);
        assert_eq!(pacer.window(Time::from_start(40 * MS)), Window { earliest: at, latest: at, on_output: None });
    }

    #[test]
    fn one_client_never_waits_for_others_and_many_gather_up_to_a_pause() {
        let mut pacer = Pacer::new(Pacing::Auto(AutoPacing::default()));
        for _ in 0..100 {
            pacer.captured(2 * MS, 1);
        }
        assert_eq!(pacer.window(Time::ZERO).on_output, Some(Duration::ZERO));
        for _ in 0..100 {
            pacer.captured(2 * MS, 50);
        }
        assert_eq!(pacer.window(Time::ZERO).on_output, Some(2 * MS));
        for _ in 0..100 {
            pacer.captured(9 * MS, 50);
        }
        assert_eq!(pacer.window(Time::ZERO).on_output, Some(3 * MS));
        for _ in 0..40 {
            pacer.captured(2 * MS, 1);
        }
        assert_eq!(pacer.window(Time::ZERO).on_output, Some(Duration::ZERO));
    }

    proptest! {
        #[test]
        fn pauses_take_no_more_than_their_share(
            pauses in prop::collection::vec(1_u64..20_000, 1..50), busy in 1_u8..=90, idle in 1_u8..=90
        ) {
            let auto = AutoPacing { busy_share: busy, idle_share: idle, ..AutoPacing::default() };
            let mut pacer = Pacer::new(Pacing::Auto(auto));
            for pause in pauses {
                let pause = Duration::from_micros(pause);
                pacer.captured(pause, 3);
                let window = pacer.window(Time::ZERO);
                prop_assert!(window.earliest <= window.latest);
                prop_assert!(window.latest <= Time::ZERO + LONGEST_IDLE);
                prop_assert!(window.latest >= Time::ZERO + auto.longest);
                let share = |run: Duration| pause.as_secs_f64() / (pause + run).as_secs_f64() * 100.0;
                let run = window.earliest - Time::ZERO;
                prop_assert!(run == LONGEST_IDLE || share(run) <= f64::from(busy) + 0.01);
                let run = window.latest - Time::ZERO;
                prop_assert!(run == LONGEST_IDLE || share(run) <= f64::from(idle) + 0.01);
            }
        }
    }
}
