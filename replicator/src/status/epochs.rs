//! Statistics over a window of epochs.

use std::collections::VecDeque;
use std::time::Duration;

use vmm_hooks::guest::PauseParts;

use crate::control::api::{EncodedBytes, EpochSummary, PausePartsMs};

/// How many committed epochs percentiles are computed over: about 25 seconds at 25 ms.
pub const WINDOW: usize = 1_024;

/// One committed epoch, observed by the primary when its acknowledgement was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EpochObservation {
    /// Its number.
    pub epoch: u64,
    /// From the end of the last pause to the end of its own.
    pub length: Duration,
    /// Where its pause went.
    pub pause: PauseParts,
    /// End of the pause until the acknowledgement was read: encoding, sending, staging and the way back.
    pub commit: Duration,
    /// Pages found dirty.
    pub dirty_pages: u64,
    /// Encoded bytes.
    pub bytes: EncodedBytes,
    /// Bytes given to the transport, frames and message headers included, QUIC's own excluded.
    pub wire_bytes: u64,
}

/// The last [`WINDOW`] epochs, and totals.
#[derive(Debug, Clone, Default)]
pub struct EpochStats {
    recent: VecDeque<EpochObservation>,
    epochs: u64,
    bytes: EncodedBytes,
    wire_bytes: u64,
}

impl EpochStats {
    /// Nothing observed.
    #[must_use]
    pub fn new() -> Self {
        Self { recent: VecDeque::with_capacity(WINDOW), ..Self::default() }
    }

    /// Adds an epoch; forgets the oldest beyond [`WINDOW`].
    pub fn observe(&mut self, epoch: &EpochObservation) {
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(*epoch);
        self.epochs += 1;
        self.bytes += epoch.bytes;
        self.wire_bytes += epoch.wire_bytes;
    }

    /// The numbers, or `None` if no epoch was observed.
    #[must_use]
    pub fn summary(&self) -> Option<EpochSummary> {
        if self.recent.is_empty() {
            return None;
        }
        let ms = |rank: u32, of: fn(&EpochObservation) -> Duration| self.percentile(rank, of).as_secs_f64() * 1e3;
        Some(EpochSummary {
            epochs: self.epochs,
            epoch_ms_p50: ms(50, |e| e.length),
            pause_ms_p50: ms(50, |e| e.pause.total),
            pause_ms_p99: ms(99, |e| e.pause.total),
            pause_parts_ms_p50: PausePartsMs {
                stop: ms(50, |e| e.pause.stop),
                harvest: ms(50, |e| e.pause.harvest),
                device: ms(50, |e| e.pause.device),
                copy: ms(50, |e| e.pause.copy),
                resume: ms(50, |e| e.pause.resume),
            },
            dirty_pages_p50: self.percentile(50, |e| e.dirty_pages),
            commit_ms_p50: ms(50, |e| e.commit),
            commit_ms_p99: ms(99, |e| e.commit),
            bytes: self.bytes,
            wire_bytes: self.wire_bytes,
        })
    }

    /// The part of the window's time that the guest stood; 0 if no epoch was observed.
    #[must_use]
    pub fn pause_share(&self) -> f64 {
        let (mut stood, mut all) = (Duration::ZERO, Duration::ZERO);
        for epoch in &self.recent {
            stood += epoch.pause.total;
            all += epoch.length;
        }
        if all.is_zero() { 0.0 } else { stood.as_secs_f64() / all.as_secs_f64() }
    }

    /// The smallest value that at least `rank` percent of the window do not exceed. The window is not empty.
    fn percentile<T: Ord + Copy>(&self, rank: u32, of: impl Fn(&EpochObservation) -> T) -> T {
        let mut values: Vec<T> = self.recent.iter().map(of).collect();
        let at = (values.len() * rank as usize).div_ceil(100).max(1) - 1;
        *values.select_nth_unstable(at).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(n: u64) -> EpochObservation {
        EpochObservation {
            epoch: n,
            length: Duration::from_millis(20 + n),
            pause: PauseParts {
                total: Duration::from_millis(n),
                stop: Duration::from_micros(n),
                ..PauseParts::default()
            },
            commit: Duration::from_millis(2 * n),
            dirty_pages: 10 * n,
            bytes: EncodedBytes { delta: n, raw: 4096, ..EncodedBytes::default() },
            wire_bytes: 5_000,
        }
    }

    #[test]
    fn nothing_observed_has_no_summary() {
        assert_eq!(EpochStats::new().summary(), None);
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut stats = EpochStats::new();
        // Not in order: percentiles must sort.
        for n in (1..=100).rev() {
            stats.observe(&epoch(n));
        }
        let summary = stats.summary().unwrap();
        assert_eq!(summary.epochs, 100);
        assert_eq!(summary.pause_ms_p50, 50.0);
        assert_eq!(summary.pause_ms_p99, 99.0);
        assert_eq!(summary.pause_parts_ms_p50.stop, 0.05);
        assert_eq!(summary.epoch_ms_p50, 70.0);
        assert_eq!(summary.commit_ms_p50, 100.0);
        assert_eq!(summary.commit_ms_p99, 198.0);
        assert_eq!(summary.dirty_pages_p50, 500);
        assert_eq!(summary.bytes.delta, 5_050);
        assert_eq!(summary.bytes.total(), 5_050 + 409_600);
        assert_eq!(summary.wire_bytes, 500_000);
    }

    #[test]
    fn the_pause_share_is_of_the_windows_time() {
        let mut stats = EpochStats::new();
        assert_eq!(stats.pause_share(), 0.0);
        // 20 of 40 ms, then 40 of 60 ms.
        stats.observe(&epoch(20));
        assert_eq!(stats.pause_share(), 0.5);
        stats.observe(&epoch(40));
        assert_eq!(stats.pause_share(), 0.6);
    }

    #[test]
    fn one_epoch_is_its_own_percentile() {
        let mut stats = EpochStats::new();
        stats.observe(&epoch(7));
        let summary = stats.summary().unwrap();
        assert_eq!((summary.pause_ms_p50, summary.pause_ms_p99), (7.0, 7.0));
    }

    #[test]
    fn the_window_forgets_and_the_totals_do_not() {
        let mut stats = EpochStats::new();
        stats.observe(&epoch(100_000));
        for _ in 0..WINDOW {
            stats.observe(&epoch(1));
        }
        let summary = stats.summary().unwrap();
        assert_eq!(summary.pause_ms_p99, 1.0, "the slow epoch has left the window");
        assert_eq!(summary.epochs, WINDOW as u64 + 1);
        assert_eq!(summary.bytes.delta, 100_000 + WINDOW as u64);
    }
}
