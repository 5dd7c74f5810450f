//! What a standby had to write down and could not: when that is tried again.
//!
//! Promise: a disk that has room again is noticed within [`LONGEST`]; one that has none is asked less and less often.

use std::time::{Duration, Instant};

use heartbeat_core::ids::{Epoch, Generation};

/// The first wait after a write that failed. It doubles with each that fails after it.
const FIRST: Duration = Duration::from_secs(1);
/// The longest wait between two tries.
pub(super) const LONGEST: Duration = Duration::from_secs(15);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Owed {
    /// The highest generation that was seen.
    pub(super) generation: Option<Generation>,
    /// An activation that waits for its mark.
    pub(super) mark: Option<(Generation, Epoch)>,
    wait: Option<Duration>,
    due: Option<Instant>,
}

impl Owed {
    /// A write has failed.
    pub(super) fn failed(&mut self, now: Instant) {
        let wait = self.wait.map_or(FIRST, |wait| (wait * 2).min(LONGEST));
        (self.wait, self.due) = (Some(wait), Some(now + wait));
    }

    /// Whether it is time to try again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| now >= due)
    }

    /// Everything that was remembered before is on the disk again: what is owed, to be written now.
    pub(super) fn mended(&mut self) -> Self {
        std::mem::take(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_asked_less_and_less_often_and_never_for_nothing() {
        let mut owed = Owed::default();
        let mut now = Instant::now();
        assert!(!owed.is_due(now + LONGEST), "nothing has failed");
        let mut waits = Vec::new();
        for _ in 0..7 {
            owed.failed(now);
            let wait = owed.wait.unwrap();
            assert!(!owed.is_due(now + wait - Duration::from_millis(1)) && owed.is_due(now + wait));
            waits.push(wait.as_secs());
            now += wait;
        }
        assert_eq!(waits, [1, 2, 4, 8, 15, 15, 15]);
        owed.mark = Some((Generation(3), Epoch(9)));
        assert_eq!(owed.mended().mark, Some((Generation(3), Epoch(9))));
        assert!(owed.mark.is_none() && !owed.is_due(now + LONGEST));
    }
}
