//! How long an epoch lasts: fixed, or `auto`: until output waits.
//!
//! Either way pauses take no more than a bounded share of the time, because the guest's clock stands in them: `auto` has bounds of its
//! own, and a fixed epoch is stretched rather than letting pauses take more than [`FIXED_SHARE`]. Only the longest epoch
//! ([`LONGEST_IDLE`]) is above that: pauses of a second and more cannot be bounded without losing the standby.
//!
//! `auto` ends an epoch soon after the guest emitted something, so that a client waits for one commit and not for a timer. It never ends
//! one so soon that pauses would take more than the bounded share of the time, and an idle guest is captured rarely. Output of
//! several clients that comes close together should fall into one epoch: the gather time grows while epochs hold many frames, up to
//! the length of a pause (waiting longer would cost each client more than the saved pause), and falls to nothing
//! while they hold one. A guest that has nothing to do while its output waits loses nothing by a pause: then a larger
//! share is allowed. One that has is let run for [`SHORTEST_BUSY`] at least: each epoch costs it more than its pause, for every page that it
//! writes again is found anew, and who waits behind others does not see two milliseconds. Nor is one captured sooner that has nothing to do between the
//! requests of several clients than these are worth: [`WORTH`] for each frame of an epoch, from [`SHORTEST_MANY`] to [`LONGEST_MANY`]. Very many, whose frames are worth
//! more than [`SHORTEST_BUSY`], make the epoch of a busy guest, too, and none of theirs goes on once pauses take no more than [`MANY_SHARE`] of the time: they
//! wait for each other's epoch, so that what a longer one saves in pauses it costs in waiting.
//!
//! Shares are those of a *typical* pause: the mean of the last pauses, in which none counts for more than twice their median. A
//! pause that was long because the host was busy elsewhere would otherwise make every client wait for many epochs, and
//! the guest would have gained nothing by it. Pure: reports in, windows out.

use core::time::Duration;

use heartbeat_core::time::Time;

/// Bound on an epoch, whatever the pauses are: the capture must come while the standby still waits for it.
pub const LONGEST_IDLE: Duration = Duration::from_secs(1);
/// The shortest epoch under [`Pacing::Auto`] of a guest that has something to do.
pub const SHORTEST_BUSY: Duration = Duration::from_millis(2);
/// The least that the frames of several clients are worth.
pub const SHORTEST_MANY: Duration = Duration::from_micros(500);
/// The most that the frames of very many are.
pub const LONGEST_MANY: Duration = Duration::from_millis(3);
/// The share of the time, in percent, that pauses take of a guest that has very many, unless an epoch would be shorter than [`SHORTEST_MANY`] or longer than
/// [`LONGEST_MANY`]: about where they lose as much by pauses as by waiting for each
/// other, on two machines of which one pauses twice as long as the other.
pub const MANY_SHARE: u8 = 11;
/// How long an epoch goes on for each frame in it: the work of an epoch, a few hundred microseconds of both hosts, is shared by them.
pub const WORTH: Duration = Duration::from_micros(200);
/// Bound on the share of time spent paused under [`Pacing::Fixed`], in percent.
pub const FIXED_SHARE: u8 = 50;
/// An epoch that holds more frames than this has the output of several clients.
const MANY_FRAMES: u64 = 2;
/// How many pauses tell what a typical one is.
const RECENT: usize = 15;
/// The smallest gather time that is not nothing.
const GATHER_STEP: Duration = Duration::from_micros(100);

/// The policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pacing {
    /// A capture each `every`, counted from the end of the last pause; later if pauses would take more than [`FIXED_SHARE`].
    Fixed {
        /// The time between two pauses.
        every: Duration,
    },
    /// A capture soon after output waits.
    Auto(AutoPacing),
}

/// Bounds of [`Pacing::Auto`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AutoPacing {
    /// Bound on the share of time spent paused while output waits, in percent (1..=90).
    pub busy_share: u8,
    /// The same while output waits and the guest has nothing else to do; not below `busy_share`.
    pub waiting_share: u8,
    /// Bound on the share of time spent paused while no output waits, in percent (1..=90).
    pub idle_share: u8,
    /// The longest epoch of an idle guest, unless `idle_share` asks for a longer one; that then goes up to [`LONGEST_IDLE`].
    pub longest: Duration,
    /// Bound on the gather time.
    pub gather: Duration,
}

impl Default for AutoPacing {
    fn default() -> Self {
        Self {
            busy_share: 25,
            waiting_share: 40,
            idle_share: 5,
            longest: Duration::from_millis(100),
            gather: Duration::from_millis(3),
        }
    }
}

/// When the next capture is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// Not before this.
    pub earliest: Time,
    /// At this time anyway.
    pub latest: Time,
    /// `Some`: between the two, as soon as output waits. `None`: at `latest`.
    pub on_output: Option<OnOutput>,
}

/// How waiting output ends an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OnOutput {
    /// The oldest of it has waited this long.
    pub gather: Duration,
    /// If the guest has nothing to do, it may be this much before [`Window::earliest`].
    pub sooner: Duration,
}

/// Follows the pauses and says when the next one may be.
#[derive(Clone, Debug, Hash)]
pub struct Pacer {
    policy: Pacing,
    /// The last pauses, the next to be replaced at `oldest` once there are [`RECENT`].
    recent: [Duration; RECENT],
    filled: usize,
    oldest: usize,
    /// A typical pause.
    pause: Duration,
    gather: Duration,
    /// What the frames of the last epochs are worth; 0: they are of one client.
    many: Duration,
}

impl Pacer {
    /// A pacer that saw no pause yet.
    ///
    /// # Panics
    /// If a share is not in 1..=90.
    #[must_use]
    pub fn new(policy: Pacing) -> Self {
        let mut pacer = Self {
            policy,
            recent: [Duration::ZERO; RECENT],
            filled: 0,
            oldest: 0,
            pause: Duration::ZERO,
            gather: Duration::ZERO,
            many: Duration::ZERO,
        };
        pacer.set_policy(policy);
        pacer
    }

    /// The policy from now on. What was learned stays.
    ///
    /// # Panics
    /// If a share is not in 1..=90.
    pub fn set_policy(&mut self, policy: Pacing) {
        if let Pacing::Auto(auto) = policy {
            let shares = [auto.busy_share, auto.waiting_share, auto.idle_share];
            assert!(shares.iter().all(|share| (1..=90).contains(share)), "no such share");
        }
        self.policy = policy;
    }

    /// An epoch was captured with this pause and held this many frames.
    pub fn captured(&mut self, pause: Duration, held_frames: u64) {
        self.recent[self.oldest] = pause;
        self.oldest = (self.oldest + 1) % RECENT;
        self.filled = RECENT.min(self.filled + 1);
        self.pause = typical(&self.recent[..self.filled]);
        if let Pacing::Auto(auto) = self.policy {
            self.gather = if held_frames > MANY_FRAMES {
                (self.gather * 5 / 4).max(GATHER_STEP).min(auto.gather).min(self.pause)
            } else {
                self.gather / 2
            };
            self.many = if self.gather.is_zero() {
                Duration::ZERO
            } else {
                let frames = u32::try_from(held_frames).unwrap_or(u32::MAX);
                let worth = WORTH.saturating_mul(frames).min(LONGEST_MANY);
                // Half way to it: epochs with few frames are among those with many.
                ((self.many + worth) / 2).max(SHORTEST_MANY)
            };
        }
    }

    /// When to capture next, if the guest has run since `resumed`.
    #[must_use]
    pub fn window(&self, resumed: Time) -> Window {
        match self.policy {
            Pacing::Fixed { every } => {
                let at = resumed + every.max(run_for(self.pause, FIXED_SHARE).min(LONGEST_IDLE));
                Window { earliest: at, latest: at, on_output: None }
            }
            Pacing::Auto(auto) => {
                let many = self.many.min(run_for(self.pause, MANY_SHARE).max(SHORTEST_MANY));
                let busy = if self.many < SHORTEST_BUSY { SHORTEST_BUSY } else { many };
                let earliest = run_for(self.pause, auto.busy_share).clamp(busy, LONGEST_IDLE);
                let waiting = run_for(self.pause, auto.waiting_share).max(many).min(earliest);
                let idle = run_for(self.pause, auto.idle_share).clamp(auto.longest, auto.longest.max(LONGEST_IDLE));
                Window {
                    earliest: resumed + earliest,
                    latest: resumed + idle.max(earliest),
                    on_output: Some(OnOutput { gather: self.gather, sooner: earliest - waiting }),
                }
            }
        }
    }
}

/// The mean of the pauses, in which none counts for more than twice their median. There is at least one.
fn typical(pauses: &[Duration]) -> Duration {
    let mut sorted = [Duration::ZERO; RECENT];
    let sorted = &mut sorted[..pauses.len()];
    sorted.copy_from_slice(pauses);
    sorted.sort_unstable();
    let most = sorted[sorted.len() / 2] * 2;
    let sum: Duration = sorted.iter().map(|&pause| pause.min(most)).sum();
    sum / u32::try_from(sorted.len()).expect("a handful")
}

/// How long to run between two pauses so that pauses take at most `share` percent of the time.
fn run_for(pause: Duration, share: u8) -> Duration {
    let share = u32::from(share);
    // Rounded up: the bound holds for the shortest pauses, too.
    (pause * (100 - share) + Duration::from_nanos(u64::from(share) - 1)) / share
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

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

    fn gather(pacer: &Pacer) -> Option<Duration> {
        pacer.window(Time::ZERO).on_output.map(|on_output| on_output.gather)
    }

    #[test]
    fn a_fixed_epoch_is_stretched_before_pauses_take_more_than_their_share() {
        let mut pacer = Pacer::new(Pacing::Fixed { every: MS });
        let pauses = |pacer: &mut Pacer, pause: Duration| {
            for _ in 0..RECENT {
                pacer.captured(pause, 1);
            }
        };
        pauses(&mut pacer, MS);
        assert_eq!(pacer.window(Time::ZERO).latest, Time::from_start(MS));
        pauses(&mut pacer, 30 * MS);
        assert_eq!(pacer.window(Time::ZERO).earliest, Time::from_start(30 * MS));
        // Shorter pauses bring the chosen length back.
        pauses(&mut pacer, MS / 2);
        assert_eq!(pacer.window(Time::ZERO).earliest, Time::from_start(MS));
        pauses(&mut pacer, 5000 * MS);
        assert_eq!(pacer.window(Time::ZERO).latest, Time::ZERO + LONGEST_IDLE);
    }

    #[test]
    fn one_client_never_waits_for_others_and_many_gather_up_to_a_pause() {
        let mut pacer = Pacer::new(Pacing::Auto(AutoPacing::default()));
        for _ in 0..100 {
            pacer.captured(2 * MS, 1);
        }
        assert_eq!(gather(&pacer), Some(Duration::ZERO));
        for _ in 0..100 {
            pacer.captured(2 * MS, 50);
        }
        assert_eq!(gather(&pacer), Some(2 * MS));
        for _ in 0..100 {
            pacer.captured(9 * MS, 50);
        }
        assert_eq!(gather(&pacer), Some(3 * MS));
        for _ in 0..40 {
            pacer.captured(2 * MS, 1);
        }
        assert_eq!(gather(&pacer), Some(Duration::ZERO));
    }

    #[test]
    fn short_pauses_do_not_make_short_epochs_of_a_busy_guest_but_of_one_that_waits() {
        let mut pacer = Pacer::new(Pacing::Auto(AutoPacing::default()));
        let rows = [
            (MS / 20, 1, SHORTEST_BUSY, MS * 3 / 40..MS * 3 / 40),
            (MS / 4, 3, SHORTEST_BUSY, WORTH * 29 / 10..WORTH * 3),
            (MS / 4, 12, MS * 101 / 50, MS * 101 / 50..MS * 203 / 100),
            (MS / 10, 3, SHORTEST_BUSY, WORTH * 29 / 10..WORTH * 3),
            (MS / 4, 8, SHORTEST_BUSY, WORTH * 15 / 2..WORTH * 8),
            (MS / 2, 1_000_000, LONGEST_MANY - MS / 100, LONGEST_MANY - MS / 100..LONGEST_MANY),
            (MS / 10, 1_000_000, MS * 4 / 5, MS * 4 / 5..MS * 82 / 100),
            (MS / 40, 1_000_000, SHORTEST_MANY, SHORTEST_MANY..SHORTEST_MANY),
            (MS / 20, 1, SHORTEST_BUSY, MS * 3 / 40..MS * 3 / 40),
        ];
        for (pause, frames, earliest, least) in rows {
            for _ in 0..40 {
                pacer.captured(pause, frames);
            }
            let window = pacer.window(Time::ZERO);
            assert!(window.earliest >= Time::ZERO + earliest && window.earliest <= Time::ZERO + earliest + MS / 100);
            let sooner = window.on_output.expect("auto").sooner;
            let waiting = window.earliest - Time::ZERO - sooner;
            assert!(waiting >= least.start && waiting <= least.end, "{frames} frames in an epoch: {waiting:?}");
        }
        // Long pauses bound it all the same.
        for _ in 0..RECENT {
            pacer.captured(2 * MS, 50);
        }
        assert_eq!(pacer.window(Time::ZERO).earliest, Time::ZERO + 6 * MS);
    }

    #[test]
    fn one_long_pause_is_not_paid_for_by_every_client() {
        let mut pacer = Pacer::new(Pacing::Auto(AutoPacing::default()));
        for _ in 0..RECENT {
            pacer.captured(2 * MS, 50);
        }
        let before = pacer.window(Time::ZERO).earliest - Time::ZERO;
        pacer.captured(120 * MS, 50);
        let after = pacer.window(Time::ZERO).earliest - Time::ZERO;
        assert!(after > before && after < before * 11 / 10, "{before:?}, then {after:?}");
        for _ in 0..RECENT {
            pacer.captured(120 * MS, 50);
        }
        assert_eq!(pacer.window(Time::ZERO).earliest, Time::ZERO + 360 * MS, "pauses that stay long count in full");
    }

    proptest! {
        #[test]
        fn pauses_take_no_more_than_their_share(
            others in prop::collection::vec(1_u64..20_000, 0..50), pause in 1_u64..20_000, busy in 1_u8..=90,
            waiting in 1_u8..=90, idle in 1_u8..=90
        ) {
            let auto = AutoPacing { busy_share: busy, waiting_share: waiting, idle_share: idle, ..AutoPacing::default() };
            let mut pacer = Pacer::new(Pacing::Auto(auto));
            let others = others.into_iter().map(Duration::from_micros);
            let pause = Duration::from_micros(pause);
            for (number, pause) in others.chain([pause; RECENT]).enumerate() {
                pacer.captured(pause, 3);
                let window = pacer.window(Time::ZERO);
                prop_assert!(window.earliest <= window.latest, "{number}");
                prop_assert!(window.latest <= Time::ZERO + LONGEST_IDLE);
                prop_assert!(window.latest >= Time::ZERO + auto.longest);
                prop_assert!(window.on_output.is_some_and(|on| Time::ZERO + on.sooner <= window.earliest));
            }
            // The last pauses were all alike: each kept its share.
            let window = pacer.window(Time::ZERO);
            let keeps = |run: Duration, bound: u8| {
                let share = pause.as_secs_f64() / (pause + run).as_secs_f64() * 100.0;
                run == LONGEST_IDLE || share <= f64::from(bound) + 0.01
            };
            let earliest = window.earliest - Time::ZERO;
            prop_assert!(keeps(earliest, busy));
            prop_assert!(keeps(window.latest - Time::ZERO, idle));
            let sooner = window.on_output.expect("auto").sooner;
            prop_assert!(earliest == LONGEST_IDLE || keeps(earliest - sooner, busy.max(waiting)));
        }

        #[test]
        fn a_typical_pause_is_between_the_least_and_twice_the_middle(
            pauses in prop::collection::vec(1_u64..1_000_000, 1..=RECENT)
        ) {
            let mut pauses: Vec<Duration> = pauses.into_iter().map(Duration::from_micros).collect();
            let typical = typical(&pauses);
            pauses.sort_unstable();
            prop_assert!(typical >= pauses[0] && typical <= pauses[pauses.len() / 2] * 2);
        }
    }
}
