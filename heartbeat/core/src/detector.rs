//! A phi-accrual failure detector (Hayashibara et al. 2004).
//!
//! Phi is -log10 of the probability that a living peer would be silent for this long, judged by the intervals seen so far. A suspicion is
//! never a proof: it decides how soon we ask for the grant, not whether we may run (`docs/protocol.md` P7).
//!
//! The distribution is taken as normal, by the logistic approximation. Its standard deviation has a floor, so that a few very
//! regular samples do not make a detector that suspects at the first hiccup; and a margin is added to the mean such that a
//! perfectly regular peer is suspected after exactly the configured silence.

use alloc::collections::VecDeque;
use core::time::Duration;

use crate::ids::Incarnation;
use crate::time::Time;

/// Bound on the samples kept.
pub const MAX_SAMPLES: usize = 100;
/// However irregular the peer was, it is suspected after this many times the configured silence.
pub const MAX_SILENCE_FACTOR: u32 = 4;
/// The floor on the standard deviation is the interval divided by this.
const FLOOR_DIVISOR: u32 = 4;

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
    /// The peer is heard for the first time.
    First,
    /// The peer is heard, as before.
    Heard,
    /// The peer is another one than before: it restarted. Samples of its old life are forgotten.
    NewIncarnation,
    /// From a life of the peer that is over: ignored.
    Stale,
}

/// The detector of one peer.
#[derive(Clone, Debug)]
pub struct Detector {
    config: DetectorConfig,
    /// How many standard deviations after the mean phi reaches the threshold.
    deviations: f64,
    incarnation: Option<Incarnation>,
    last: Option<Time>,
    samples: VecDeque<f64>,
}

impl Detector {
    /// A detector that heard nothing yet; it suspects nobody until the first heartbeat came.
    ///
    /// # Panics
    /// If the interval or the silence is zero, or the threshold is not between 0 and 300.
    #[must_use]
    pub fn new(config: DetectorConfig) -> Self {
        assert!(!config.interval.is_zero() && !config.silence.is_zero(), "an interval of nothing");
        assert!(config.threshold > 0.0 && config.threshold < 300.0, "no such phi");
        let (mut low, mut high) = (-20.0, 60.0);
        for _ in 0..80 {
            let middle = f64::midpoint(low, high);
            if phi_at(middle) < config.threshold { low = middle } else { high = middle }
        }
        Self { config, deviations: high, incarnation: None, last: None, samples: VecDeque::new() }
    }

    /// A heartbeat of the peer in this life arrived. An arrival before the last one counts as at the last one.
    pub fn handle_heartbeat(&mut self, now: Time, incarnation: Incarnation) -> Arrival {
        let arrival = match self.incarnation {
            None => Arrival::First,
            Some(known) if known == incarnation => Arrival::Heard,
            Some(known) if known > incarnation => return Arrival::Stale,
            Some(_) => Arrival::NewIncarnation,
        };
        self.incarnation = Some(incarnation);
        let now = self.last.map_or(now, |last| now.max(last));
        if arrival == Arrival::Heard {
            let gap = self.last.map_or(Duration::ZERO, |last| now - last);
            if self.samples.len() == MAX_SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back(gap.min(self.bound()).as_secs_f64());
        } else {
            self.samples.clear();
        }
        self.last = Some(now);
        arrival
    }

    /// How unlikely it is that a living peer was silent this long. 0 before the first heartbeat.
    #[must_use]
    pub fn phi(&self, now: Time) -> f64 {
        let Some(last) = self.last else { return 0.0 };
        let (mean, deviation) = self.distribution();
        phi_at((now.since(last).as_secs_f64() - mean) / deviation)
    }

    /// Whether the peer is suspected at `now`: exactly if `now` is at or after [`Detector::next_check`].
    #[must_use]
    pub fn is_suspect(&self, now: Time) -> bool {
        self.next_check().is_some_and(|at| now >= at)
    }

    /// When the peer will be suspected if nothing more is heard; `None` before the first heartbeat.
    #[must_use]
    pub fn next_check(&self) -> Option<Time> {
        let last = self.last?;
        let (mean, deviation) = self.distribution();
        let after = Duration::try_from_secs_f64(mean + deviation * self.deviations).unwrap_or(Duration::ZERO);
        Some(last + after.clamp(self.config.interval, self.bound()))
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

    fn bound(&self) -> Duration {
        self.config.silence.saturating_mul(MAX_SILENCE_FACTOR)
    }

    /// Mean, margin included, and standard deviation of the intervals, in seconds. The configured interval counts as one sample.
    fn distribution(&self) -> (f64, f64) {
        let interval = self.config.interval.as_secs_f64();
        let count = 1.0 + f64::from(u32::try_from(self.samples.len()).expect("at most MAX_SAMPLES"));
        let mean = (interval + self.samples.iter().sum::<f64>()) / count;
        let square = |gap: f64| (gap - mean) * (gap - mean);
        let variance = (square(interval) + self.samples.iter().map(|&gap| square(gap)).sum::<f64>()) / count;
        let floor = interval / f64::from(FLOOR_DIVISOR);
        let margin = (self.config.silence.as_secs_f64() - interval - floor * self.deviations).max(0.0);
        (mean + margin, square_root(variance).max(floor))
    }
}

/// Phi at `y` standard deviations after the mean: log10(1 + e^x), with x the logistic approximation's cubic.
fn phi_at(y: f64) -> f64 {
    let x = y * (1.5976 + 0.070_566 * y * y);
    let natural = if x > 40.0 { x } else { ln(1.0 + exp(x)) };
    natural / core::f64::consts::LN_10
}

/// e^x for x up to 40; 0 below -40. (`core` has no transcendental functions.)
fn exp(x: f64) -> f64 {
    if x < -40.0 {
        return 0.0;
    }
    // e^x = (e^(x/64))^64, the inner one by its series.
    let small = x / 64.0;
    let (mut term, mut sum) = (1.0, 1.0);
    for n in 1..14_u32 {
        term *= small / f64::from(n);
        sum += term;
    }
    (0..6).fold(sum, |power, _| power * power)
}

/// The natural logarithm of a finite number of at least 1.
fn ln(value: f64) -> f64 {
    let (mut mantissa, mut exponent) = (value, 0_u32);
    while mantissa > 1.5 {
        mantissa /= 2.0;
        exponent += 1;
    }
    // ln m = 2 atanh((m-1)/(m+1)), with m in 0.75..=1.5.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let (mut power, mut sum) = (z, 0.0);
    for n in 0..16_u32 {
        sum += power / f64::from(2 * n + 1);
        power *= z * z;
    }
    2.0 * sum + f64::from(exponent) * core::f64::consts::LN_2
}

/// The square root of a number that is not negative, by Newton's method.
fn square_root(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let mut root = value.max(1.0);
    for _ in 0..200 {
        let next = f64::midpoint(root, value / root);
        if next >= root {
            break;
        }
        root = next;
    }
    root
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    const ONE: Incarnation = Incarnation(1);

    fn ms(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    fn regular(beats: u64) -> Detector {
        let mut detector = Detector::new(DetectorConfig::default());
        for beat in 0..beats {
            detector.handle_heartbeat(ms(20 * beat), ONE);
        }
        detector
    }

    #[test]
    fn a_regular_peer_is_suspected_after_the_configured_silence_with_few_samples_and_many() {
        for beats in [1, 2, 5, 300] {
            let detector = regular(beats);
            let last = detector.last_heard().expect("heard");
            let silence = detector.next_check().expect("heard") - last;
            assert!(silence.abs_diff(Duration::from_millis(200)) < Duration::from_millis(1), "{silence:?}");
            assert!(detector.phi(last + Duration::from_millis(100)) < 1.0);
        }
    }

    #[test]
    fn nobody_is_suspected_before_the_first_heartbeat() {
        let detector = Detector::new(DetectorConfig::default());
        assert_eq!((detector.next_check(), detector.is_suspect(Time::MAX)), (None, false));
    }

    #[test]
    fn a_new_incarnation_forgets_and_is_told_and_the_old_one_is_stale() {
        let mut detector = Detector::new(DetectorConfig::default());
        assert_eq!(detector.handle_heartbeat(ms(0), Incarnation(2)), Arrival::First);
        for beat in 1..50 {
            assert_eq!(detector.handle_heartbeat(ms(beat * 97), Incarnation(2)), Arrival::Heard);
        }
        let slow = detector.next_check().expect("heard") - detector.last_heard().expect("heard");
        assert_eq!(detector.handle_heartbeat(ms(5000), Incarnation(3)), Arrival::NewIncarnation);
        let fresh = detector.next_check().expect("heard") - ms(5000);
        assert!(fresh < slow, "{fresh:?} {slow:?}");
        assert_eq!(detector.handle_heartbeat(ms(5001), Incarnation(2)), Arrival::Stale);
        assert_eq!(detector.last_heard(), Some(ms(5000)));
    }

    proptest! {
        #[test]
        fn the_mathematics_agree_with_std(x in -40.0_f64..40.0, v in 1.0_f64..1e15) {
            prop_assert!((exp(x) / x.exp() - 1.0).abs() < 1e-9);
            prop_assert!((ln(v) - v.ln()).abs() < 1e-9);
            prop_assert!((square_root(1.0 / v) * v.sqrt() - 1.0).abs() < 1e-9);
        }

        #[test]
        fn phi_grows_with_silence_and_crosses_at_next_check(
            gaps in prop::collection::vec(0_u64..400, 0..150), probe in 0_u64..2_000, more in 0_u64..500
        ) {
            let mut detector = Detector::new(DetectorConfig::default());
            let mut now = 0;
            detector.handle_heartbeat(ms(0), ONE);
            for gap in gaps { now += gap; detector.handle_heartbeat(ms(now), ONE); }
            let (early, late) = (ms(now + probe), ms(now + probe + more));
            prop_assert!(detector.phi(early) <= detector.phi(late) + 1e-9);
            let at = detector.next_check().expect("heard");
            prop_assert!(at - ms(now) <= Duration::from_millis(800));
            prop_assert!(detector.is_suspect(at) && !detector.is_suspect(at.saturating_sub(Duration::from_nanos(1))));
            if at - ms(now) < Duration::from_millis(800) {
                prop_assert!((detector.phi(at) - 8.0).abs() < 0.01, "{}", detector.phi(at));
            }
        }
    }
}
