//! The metrics of one VM.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{Counter, Gauge, Histogram, IntCounter, IntGauge};

use super::families::{FAILOVER_PHASES, Families, PAUSE_PARTS, REHEARSAL_OUTCOMES};
use super::page::{VmOnPage, VmRecent};
use crate::control::api::{
    EncodedBytes, FailoverCause, FailoverReport, GuestClock, HeldOutput, ProtectionState, Role, SyncProgress,
};
use crate::status::EpochObservation;

/// The handle of one VM's metrics. Clones are the same handle; cheap to call from any thread.
#[derive(Debug, Clone)]
pub struct VmMetrics {
    series: Arc<Series>,
}

#[derive(Debug)]
struct Series {
    families: Arc<Families>,
    name: String,
    recent: Arc<VmRecent>,
    epochs: IntCounter,
    epoch_committed: IntGauge,
    epoch_seconds: Histogram,
    pause_seconds: [Histogram; PAUSE_PARTS.len()],
    clock_lag_seconds: Counter,
    pause_share: Gauge,
    commit_seconds: Histogram,
    lag_seconds: Gauge,
    dirty_pages: Histogram,
    encoded_bytes: [IntCounter; ENCODINGS],
    wire_bytes: IntCounter,
    generation: IntGauge,
    held_frames: IntGauge,
    held_bytes: IntGauge,
    held_age_seconds: Gauge,
    released_frames: IntCounter,
    dropped_frames: IntCounter,
    sync: [IntGauge; 3],
    /// Released and dropped frames as the gate said last: it reports totals, counters want steps.
    gate_totals: Mutex<(u64, u64)>,
    /// The lag as the agent said last, for the same reason.
    lag: Mutex<f64>,
}

const ENCODINGS: usize = 6;

impl VmMetrics {
    pub(super) fn new(families: Arc<Families>, name: &str, recent: Arc<VmRecent>) -> Self {
        let vm = &[name];
        let bytes = EncodedBytes::default().named();
        let series = Series {
            epochs: families.epochs.with_label_values(vm),
            epoch_committed: families.epoch_committed.with_label_values(vm),
            epoch_seconds: families.epoch_seconds.with_label_values(vm),
            pause_seconds: PAUSE_PARTS.map(|part| families.pause_seconds.with_label_values(&[name, part])),
            clock_lag_seconds: families.clock_lag_seconds.with_label_values(vm),
            pause_share: families.pause_share.with_label_values(vm),
            commit_seconds: families.commit_seconds.with_label_values(vm),
            lag_seconds: families.lag_seconds.with_label_values(vm),
            dirty_pages: families.dirty_pages.with_label_values(vm),
            encoded_bytes: bytes.map(|(encoding, _)| families.encoded_bytes.with_label_values(&[name, encoding])),
            wire_bytes: families.wire_bytes.with_label_values(vm),
            generation: families.vm_generation.with_label_values(vm),
            held_frames: families.held_frames.with_label_values(vm),
            held_bytes: families.held_bytes.with_label_values(vm),
            held_age_seconds: families.held_age_seconds.with_label_values(vm),
            released_frames: families.released_frames.with_label_values(vm),
            dropped_frames: families.dropped_frames.with_label_values(vm),
            sync: [
                families.sync_done_pages.with_label_values(vm),
                families.sync_total_pages.with_label_values(vm),
                families.sync_round.with_label_values(vm),
            ],
            gate_totals: Mutex::new((0, 0)),
            lag: Mutex::new(0.0),
            name: name.to_owned(),
            recent,
            families,
        };
        for cause in FailoverCause::ALL {
            // There from the start, so that the first failover is seen as a growth.
            let _ = series.families.failovers.with_label_values(&[name, cause.word()]);
        }
        for phase in FAILOVER_PHASES {
            let _ = series.families.failover_phase_seconds.with_label_values(&[name, phase]);
        }
        let handle = Self { series: Arc::new(series) };
        // Until its state is set it is none that an operator would be told of.
        handle.count_state(&ProtectionState::Unprotected);
        handle
    }

    /// What happened to the VM lately.
    pub(super) fn recent(&self) -> &Arc<VmRecent> {
        &self.series.recent
    }

    /// What the status page shows of the VM.
    pub(super) fn on_page(&self) -> VmOnPage {
        let series = &*self.series;
        let failovers = FailoverCause::ALL
            .map(|cause| series.families.failovers.with_label_values(&[series.name.as_str(), cause.word()]).get());
        let mut page = series.recent.on_page();
        page.epoch_committed = series.epoch_committed.get();
        page.pause_share = series.pause_share.get();
        (page.held_frames, page.held_bytes) = (series.held_frames.get(), series.held_bytes.get());
        page.held_oldest_ms = series.held_age_seconds.get() * 1e3;
        page.failovers = failovers.iter().sum();
        page
    }

    /// Counts a committed epoch.
    pub fn observe_epoch(&self, epoch: &EpochObservation) {
        let series = &*self.series;
        series.epochs.inc();
        series.epoch_committed.set(gauge(epoch.epoch));
        series.epoch_seconds.observe(epoch.length.as_secs_f64());
        series.commit_seconds.observe(epoch.commit.as_secs_f64());
        #[allow(clippy::cast_precision_loss)] // Exact below 2^53 pages.
        series.dirty_pages.observe(epoch.dirty_pages as f64);
        let pause = &epoch.pause;
        let parts = [pause.stop, pause.harvest, pause.device, pause.copy, pause.resume, pause.total];
        for (histogram, part) in series.pause_seconds.iter().zip(parts) {
            histogram.observe(part.as_secs_f64());
        }
        for (counter, (_, bytes)) in series.encoded_bytes.iter().zip(epoch.bytes.named()) {
            counter.inc_by(bytes);
        }
        series.wire_bytes.inc_by(epoch.wire_bytes);
        series.recent.epoch(epoch.pause.total);
    }

    /// The standby holds this epoch whole. (The primary's side is in [`VmMetrics::observe_epoch`].)
    pub fn set_committed(&self, epoch: u64) {
        self.series.epoch_committed.set(gauge(epoch));
    }

    /// The protection's state, and the sync's progress with it.
    pub fn set_state(&self, state: &ProtectionState) {
        let sync = if let ProtectionState::Syncing(progress) = state { Some(*progress) } else { None };
        self.series.recent.state(state.word(), sync);
        self.count_state(state);
    }

    fn count_state(&self, state: &ProtectionState) {
        let series = &*self.series;
        for word in ProtectionState::WORDS {
            let is = i64::from(word == state.word());
            series.families.vm_state.with_label_values(&[series.name.as_str(), word]).set(is);
        }
        let progress = match state {
            ProtectionState::Syncing(progress) => *progress,
            _ => SyncProgress::default(),
        };
        series.sync[0].set(gauge(progress.done_pages));
        series.sync[1].set(gauge(progress.total_pages));
        series.sync[2].set(i64::from(progress.round));
    }

    /// Which copy this agent has.
    pub fn set_role(&self, role: Role) {
        self.series.recent.role(role);
        for one in [Role::Primary, Role::Standby, Role::Survivor] {
            let labels = [self.series.name.as_str(), one.word()];
            self.series.families.vm_role.with_label_values(&labels).set(i64::from(one == role));
        }
    }

    /// The generation that this agent knows.
    pub fn set_generation(&self, generation: u64) {
        self.series.recent.generation(generation);
        self.series.generation.set(gauge(generation));
    }

    /// The other side's name. No metric has it by VM; the peers' metrics have it.
    pub fn set_peer(&self, peer: &str) {
        self.series.recent.peer(peer);
    }

    /// What the gate holds, and its totals.
    pub fn set_held(&self, held: &HeldOutput) {
        let series = &*self.series;
        series.held_frames.set(gauge(held.frames));
        series.held_bytes.set(gauge(held.bytes));
        series.held_age_seconds.set(held.oldest_ms / 1e3);
        let mut last = series.gate_totals.lock().unwrap_or_else(PoisonError::into_inner);
        series.released_frames.inc_by(step(last.0, held.released));
        series.dropped_frames.inc_by(step(last.1, held.dropped));
        *last = (held.released, held.dropped);
    }

    /// How old the state is that the standby could go on with; 0 where that is no question. To be told twice a second: the
    /// status page's steps are made of it.
    pub fn set_replication_lag(&self, lag: Duration) {
        self.series.recent.lag(lag);
        self.series.lag_seconds.set(lag.as_secs_f64());
    }

    /// Counts an epoch of which this host holds the disk writes: after how long, and how many bytes they were.
    pub fn observe_disks_held(&self, after: Duration, bytes: u64) {
        let Series { families, name, .. } = &*self.series;
        families.disk_hold_seconds.with_label_values(&[name.as_str()]).observe(after.as_secs_f64());
        families.disk_held_bytes.with_label_values(&[name.as_str()]).inc_by(bytes);
    }

    /// How many bytes of the journal of a VM's disks are in use on this host, and of how many.
    pub fn set_disk_journal(&self, used: u64, limit: u64) {
        let Series { families, name, .. } = &*self.series;
        families.disk_journal_bytes.with_label_values(&[name.as_str()]).set(gauge(used));
        families.disk_journal_limit_bytes.with_label_values(&[name.as_str()]).set(gauge(limit));
    }

    /// This host has no journal of the VM's disks any more.
    pub fn remove_disk_journal(&self) {
        let Series { families, name, .. } = &*self.series;
        for family in [&families.disk_journal_bytes, &families.disk_journal_limit_bytes] {
            // One that was never set is no error.
            let _ = family.remove_label_values(&[name.as_str()]);
        }
    }

    /// A rehearsal on this host ended now.
    pub fn rehearsed(&self, loads: bool) {
        let series = &*self.series;
        series.recent.rehearsed(loads);
        let of =
            |outcome| series.families.rehearsal_timestamp_seconds.with_label_values(&[series.name.as_str(), outcome]);
        let [good, bad] = REHEARSAL_OUTCOMES.map(of);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if loads { good } else { bad }.set(now.as_secs_f64());
    }

    /// What pauses did to the guest's clock. A smaller lag is that of a new protection, which counts from 0.
    pub fn set_guest_clock(&self, clock: &GuestClock) {
        let series = &*self.series;
        series.pause_share.set(clock.pause_share);
        let mut last = series.lag.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if clock.lag_seconds < *last { 0.0 } else { *last };
        series.clock_lag_seconds.inc_by(clock.lag_seconds - before);
        *last = clock.lag_seconds;
    }

    /// Counts a failover whose survivor runs here. Call once, when the report is complete.
    pub fn observe_failover(&self, report: &FailoverReport) {
        let series = &*self.series;
        series.recent.failover(report);
        let labels = [series.name.as_str(), report.cause.word()];
        series.families.failovers.with_label_values(&labels).inc();
        let activation = report.activation_ms;
        let phases = [
            Some(report.detection_ms),
            report.grant_ms,
            activation.map(|a| a.load),
            activation.map(|a| a.resume),
            activation.map(|a| a.total),
        ];
        for (phase, ms) in FAILOVER_PHASES.into_iter().zip(phases) {
            if let Some(ms) = ms {
                let labels = [series.name.as_str(), phase];
                series.families.failover_phase_seconds.with_label_values(&labels).observe(ms / 1e3);
            }
        }
    }
}

/// Removes every series of the VM. A series that was never made is no error.
pub(super) fn remove(families: &Families, name: &str) {
    let vm = &[name];
    for family in [
        &families.vm_generation,
        &families.epoch_committed,
        &families.held_frames,
        &families.held_bytes,
        &families.sync_done_pages,
        &families.sync_total_pages,
        &families.sync_round,
        &families.disk_journal_bytes,
        &families.disk_journal_limit_bytes,
    ] {
        let _ = family.remove_label_values(vm);
    }
    for family in [
        &families.epochs,
        &families.wire_bytes,
        &families.released_frames,
        &families.dropped_frames,
        &families.disk_held_bytes,
    ] {
        let _ = family.remove_label_values(vm);
    }
    for family in
        [&families.epoch_seconds, &families.commit_seconds, &families.dirty_pages, &families.disk_hold_seconds]
    {
        let _ = family.remove_label_values(vm);
    }
    let _ = families.held_age_seconds.remove_label_values(vm);
    let _ = families.lag_seconds.remove_label_values(vm);
    for outcome in REHEARSAL_OUTCOMES {
        let _ = families.rehearsal_timestamp_seconds.remove_label_values(&[name, outcome]);
    }
    let _ = families.pause_share.remove_label_values(vm);
    let _ = families.clock_lag_seconds.remove_label_values(vm);
    for word in ProtectionState::WORDS {
        let _ = families.vm_state.remove_label_values(&[name, word]);
    }
    for role in [Role::Primary, Role::Standby, Role::Survivor] {
        let _ = families.vm_role.remove_label_values(&[name, role.word()]);
    }
    for part in PAUSE_PARTS {
        let _ = families.pause_seconds.remove_label_values(&[name, part]);
    }
    for (encoding, _) in EncodedBytes::default().named() {
        let _ = families.encoded_bytes.remove_label_values(&[name, encoding]);
    }
    for cause in FailoverCause::ALL {
        let _ = families.failovers.remove_label_values(&[name, cause.word()]);
    }
    for phase in FAILOVER_PHASES {
        let _ = families.failover_phase_seconds.remove_label_values(&[name, phase]);
    }
}

/// A total's growth; a smaller total is a new gate, which counts from 0.
fn step(last: u64, now: u64) -> u64 {
    now.checked_sub(last).unwrap_or(now)
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
