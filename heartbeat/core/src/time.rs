//! Points in time as the cores see them: nanoseconds since an arbitrary start that the driver chose.

use core::fmt;
use core::ops::{Add, Sub};
use core::time::Duration;

/// Nanoseconds since an arbitrary start. Comparable only within one process and one start.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// The start.
    pub const ZERO: Self = Self(0);
    /// The end of time: about 584 years after the start. A deadline that never comes.
    pub const MAX: Self = Self(u64::MAX);

    /// `duration` in whole nanoseconds; what does not fit is `u64::MAX`.
    fn nanos(duration: Duration) -> u64 {
        u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The time `duration` after the start.
    #[must_use]
    pub fn from_start(duration: Duration) -> Self {
        Self(Self::nanos(duration))
    }

    /// Later by `duration`, or `None` past the end of time.
    #[must_use]
    pub fn checked_add(self, duration: Duration) -> Option<Self> {
        self.0.checked_add(u64::try_from(duration.as_nanos()).ok()?).map(Self)
    }

    /// Later by `duration`, at most [`Time::MAX`].
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(Self::nanos(duration)))
    }

    /// Earlier by `duration`, at least the start.
    #[must_use]
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(Self::nanos(duration)))
    }

    /// How long ago `earlier` was, or `None` if it is later.
    #[must_use]
    pub fn checked_since(self, earlier: Self) -> Option<Duration> {
        self.0.checked_sub(earlier.0).map(Duration::from_nanos)
    }

    /// How long ago `earlier` was; zero if it is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;
    /// Saturates, as [`Time::saturating_add`]: a deadline past the end of time never comes.
    fn add(self, duration: Duration) -> Self {
        self.saturating_add(duration)
    }
}

impl Sub for Time {
    type Output = Duration;
    /// Saturates, as [`Time::since`].
    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}ms", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn adding_and_taking_away_agree(start in any::<u64>(), by in any::<u64>()) {
            let (time, by) = (Time(start), Duration::from_nanos(by));
            match time.checked_add(by) {
                Some(later) => {
                    prop_assert_eq!(later, time + by);
                    prop_assert_eq!(later - time, by);
                    prop_assert_eq!(later.saturating_sub(by), time);
                    prop_assert_eq!(time.checked_since(later).is_some(), by.is_zero());
                }
                None => prop_assert_eq!(time + by, Time::MAX),
            }
        }
    }

    #[test]
    fn the_longest_duration_saturates() {
        assert_eq!(Time(1) + Duration::MAX, Time::MAX);
        assert_eq!(Time(1).checked_add(Duration::MAX), None);
        assert_eq!(Time(1).saturating_sub(Duration::MAX), Time::ZERO);
    }
}
