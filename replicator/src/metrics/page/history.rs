//! The last minutes of one VM, in steps: a bounded ring in the agent, so that a page that is opened after an event shows it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Length of a step.
pub(super) const STEP: Duration = Duration::from_secs(2);
/// Steps that are kept: five minutes.
const STEPS: usize = 150;
/// Steps that a rate is over.
const RATE_STEPS: u32 = 5;

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Step {
    /// The longest pause of an epoch that was committed in it.
    pub(super) pause: Option<Duration>,
    /// The largest replication lag that was seen in it.
    pub(super) lag: Option<Duration>,
    /// Epochs committed in it.
    pub(super) epochs: u32,
}

/// The ring.
#[derive(Debug, Default)]
pub(super) struct History {
    /// When the step under way began.
    began: Option<Instant>,
    current: Step,
    steps: VecDeque<Step>,
}

impl History {
    /// An epoch was committed.
    pub(super) fn epoch(&mut self, pause: Duration) {
        self.current.pause = self.current.pause.max(Some(pause));
        self.current.epochs += 1;
    }

    /// The lag at `now`. Called a few times in each step; steps in which it was not are empty.
    pub(super) fn look(&mut self, now: Instant, lag: Option<Duration>) {
        let began = *self.began.get_or_insert(now);
        let passed = now.saturating_duration_since(began).as_nanos() / STEP.as_nanos();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        if passed > 0 {
            let step = std::mem::take(&mut self.current);
            let missed = (passed as usize - 1).min(STEPS);
            self.steps.extend(std::iter::once(step).chain(std::iter::repeat_n(Step::default(), missed)));
            self.steps.drain(..self.steps.len().saturating_sub(STEPS));
            self.began = Some(began + STEP * passed);
        }
        self.current.lag = self.current.lag.max(lag);
    }

    /// The whole steps, oldest first.
    pub(super) fn steps(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter()
    }

    /// Epochs a second in the last whole steps.
    pub(super) fn epochs_per_second(&self) -> f64 {
        let recent = self.steps.iter().rev().take(RATE_STEPS as usize);
        let (count, epochs) = recent.fold((0_u32, 0_u32), |(count, epochs), step| (count + 1, epochs + step.epochs));
        if count == 0 { 0.0 } else { f64::from(epochs) / (STEP * count).as_secs_f64() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_step_has_the_worst_of_its_time() {
        let (mut history, start) = (History::default(), Instant::now());
        history.look(start, Some(ms(30)));
        [4, 9, 5].into_iter().for_each(|pause| history.epoch(ms(pause)));
        history.look(start + ms(500), Some(ms(80)));
        history.look(start + ms(1_500), None);
        assert_eq!(history.steps().count(), 0, "the first is under way");
        history.look(start + STEP, Some(ms(7)));
        assert_eq!(
            history.steps().copied().collect::<Vec<_>>(),
            [Step { pause: Some(ms(9)), lag: Some(ms(80)), epochs: 3 }]
        );
        assert_eq!(history.epochs_per_second(), 1.5);
    }

    #[test]
    fn time_that_nobody_looked_is_empty_and_takes_its_place() {
        let (mut history, start) = (History::default(), Instant::now());
        history.look(start, None);
        history.epoch(ms(3));
        history.look(start + STEP * 4 + ms(1), None);
        let pauses: Vec<Option<Duration>> = history.steps().map(|step| step.pause).collect();
        assert_eq!(pauses, [Some(ms(3)), None, None, None]);
        history.look(start + STEP * 5, None);
        assert_eq!(history.steps().count(), 5, "steps keep their grid");
    }

    #[test]
    fn it_is_bounded() {
        let (mut history, start) = (History::default(), Instant::now());
        for step in 0..u32::try_from(STEPS).unwrap() * 2 {
            history.look(start + STEP * step, None);
        }
        assert_eq!(history.steps().count(), STEPS);
        history.look(start + STEP * 1_000_000, None);
        assert_eq!(history.steps().count(), STEPS);
    }
}
