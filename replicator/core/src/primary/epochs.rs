//! The bounded pipeline of epochs: one capture under way, and those that wait for their acknowledgement.

use alloc::collections::VecDeque;
use core::time::Duration;

use heartbeat_core::ids::Epoch;
use heartbeat_core::time::Time;

use super::io::CaptureReport;

/// How long after a failed capture the next one may begin, times the failures in a row.
const RETRY_AFTER: Duration = Duration::from_millis(10);

/// A capture under way.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Capturing {
    pub(super) epoch: Epoch,
    pub(super) hold: bool,
    pub(super) stay_paused: bool,
    pub(super) cancelled: bool,
    /// When it begins at the latest.
    latest: Time,
}

#[derive(Clone, Copy, Debug, Hash)]
struct InFlight {
    epoch: Epoch,
    captured_at: Time,
    bytes: u64,
}

/// What an acknowledgement brought.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acknowledged {
    pub(super) epochs: u64,
    /// From the end of the newest one's capture to now.
    pub(super) commit: Duration,
}

#[derive(Clone, Debug, Hash)]
pub(super) struct Epochs {
    /// The epoch that the guest is in.
    next: Epoch,
    capturing: Option<Capturing>,
    /// The capture that was under way when the guest went: its report may have been on its way.
    forgotten: Option<Epoch>,
    in_flight: VecDeque<InFlight>,
    failures: u32,
    /// When the guest last began to run.
    resumed: Time,
    retry_at: Time,
    /// When the last acknowledgement came.
    progress: Time,
}

impl Epochs {
    pub(super) fn new(first: Epoch) -> Self {
        Self {
            next: first,
            capturing: None,
            forgotten: None,
            in_flight: VecDeque::new(),
            failures: 0,
            resumed: Time::ZERO,
            retry_at: Time::ZERO,
            progress: Time::ZERO,
        }
    }

    pub(super) fn next(&self) -> Epoch {
        self.next
    }

    pub(super) fn resumed(&self) -> Time {
        self.resumed
    }

    pub(super) fn retry_at(&self) -> Time {
        self.retry_at
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.is_some()
    }

    /// Whether a driver may report this capture: it is under way, or was when the guest went.
    #[cfg(test)]
    pub(super) fn awaits_report(&self, epoch: Epoch) -> bool {
        self.is_capturing() || self.forgotten == Some(epoch)
    }

    pub(super) fn begin_capture(&mut self, hold: bool, stay_paused: bool, latest: Time) -> Epoch {
        assert!(self.capturing.is_none(), "two captures at once");
        self.capturing = Some(Capturing { epoch: self.next, hold, stay_paused, cancelled: false, latest });
        self.next
    }

    /// When a capture that is under way begins at the latest.
    pub(super) fn capture_due(&self) -> Option<Time> {
        self.capturing.map(|capture| capture.latest)
    }

    /// Whether a capture is under way that was not cancelled yet; it is now.
    pub(super) fn cancel(&mut self) -> bool {
        self.capturing.as_mut().is_some_and(|capture| !core::mem::replace(&mut capture.cancelled, true))
    }

    /// The guest is gone: no report need come, and one that does is of no use.
    pub(super) fn forget_capture(&mut self) {
        if let Some(capture) = self.capturing.take() {
            self.forgotten = Some(capture.epoch);
        }
    }

    /// Ends the capture of `epoch`; `None` if it was forgotten meanwhile.
    pub(super) fn end_capture(&mut self, epoch: Epoch) -> Option<Capturing> {
        if self.forgotten == Some(epoch) {
            self.forgotten = None;
            return None;
        }
        let capture = self.capturing.take().filter(|capture| capture.epoch == epoch);
        Some(capture.expect("a report about a capture that was not asked for"))
    }

    pub(super) fn captured(&mut self, report: &CaptureReport, now: Time) {
        self.skip(report);
        self.in_flight.push_back(InFlight { epoch: report.epoch, captured_at: now, bytes: report.bytes });
    }

    /// The epoch was captured and goes nowhere; its number is used all the same.
    pub(super) fn skip(&mut self, report: &CaptureReport) {
        self.failures = 0;
        self.next = report.epoch.next();
        self.resumed = report.paused_at + report.pause;
    }

    /// How many captures failed in a row, cancelled ones not counted; `None` if this one was forgotten.
    pub(super) fn capture_failed(&mut self, epoch: Epoch, now: Time) -> Option<u32> {
        if !self.end_capture(epoch)?.cancelled {
            self.failures += 1;
            self.retry_at = now + RETRY_AFTER * self.failures;
        }
        Some(self.failures)
    }

    /// Everything up to `epoch` is held by the standby; `None` if that is no news.
    pub(super) fn acknowledged(&mut self, now: Time, epoch: Epoch) -> Option<Acknowledged> {
        let mut news = None;
        while let Some(entry) = self.in_flight.front().filter(|entry| entry.epoch <= epoch) {
            let epochs = news.map_or(0, |news: Acknowledged| news.epochs) + 1;
            news = Some(Acknowledged { epochs, commit: now - entry.captured_at });
            self.in_flight.pop_front();
        }
        if news.is_some() {
            self.progress = now;
        }
        news
    }

    /// What was not acknowledged until now is not held against the standby.
    pub(super) fn excuse(&mut self, now: Time) {
        self.progress = now;
    }

    /// When the oldest epoch is too old. Its size counts all the way, not only until it was handed to the transport: the link may
    /// have most of it to carry then, and the standby all of it to check and to stage.
    pub(super) fn deadline(&self, within: Duration, bytes_per_second: u64) -> Option<Time> {
        let oldest = self.in_flight.front()?;
        let by_size = Duration::from_nanos(oldest.bytes.saturating_mul(1_000_000_000) / bytes_per_second.max(1));
        Some(oldest.captured_at.max(self.progress) + by_size + within)
    }

    /// Takes out every epoch that was not acknowledged.
    pub(super) fn take_unacknowledged(&mut self) -> impl Iterator<Item = Epoch> {
        core::mem::take(&mut self.in_flight).into_iter().map(|entry| entry.epoch)
    }
}
