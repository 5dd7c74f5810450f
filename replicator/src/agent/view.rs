//! What an operator sees of one VM: filled by its task, read by the control API and the metrics.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use heartbeat_core::ids::VmId;
use heartbeat_core::time::Time;
use vmm_hooks::guest::{Activation, Gate};

use super::clock;
use super::events::EventLog;
use super::lag::Lag;
use crate::control::api::{
    ActivationMs, EventKind, FailoverCause, FailoverReport, GuestClock, HeldOutput, ProtectionState, Role, SurvivorAt,
    Suspicion, SyncProgress, VmEvent, VmStatus,
};
use crate::control::change::Change;
use crate::metrics::VmMetrics;
use crate::status::{EpochObservation, EpochStats};

/// One VM's view. Shared by its task and the control API.
#[derive(Debug)]
pub(super) struct View {
    inner: Mutex<Inner>,
    metrics: VmMetrics,
    events: EventLog,
    lag: Arc<Lag>,
}

#[derive(Debug)]
struct Inner {
    status: VmStatus,
    epochs: EpochStats,
    /// When the pause of the last committed epoch ended (primary).
    captured: Option<Instant>,
    gate: Option<Arc<dyn Gate>>,
    failing: Option<Failing>,
    /// What ceased last: the store had been asked, and may still grant it.
    ceased: Option<(Failing, FailoverReport)>,
    awaited: Awaited,
}

/// A change of hands that is waited for.
#[derive(Debug, Default)]
pub(super) struct Awaited {
    /// Each has its own; 0: nothing was asked for.
    pub(super) number: u64,
    /// What an operator asked for last.
    pub(super) change: Option<Change>,
    /// How the VM was left when that had ended.
    pub(super) ended: Option<VmStatus>,
}

/// A failover under way.
#[derive(Debug, Clone, Copy)]
struct Failing {
    detected: Time,
    granted: Option<Time>,
}

impl Inner {
    fn has_changed(&self) -> bool {
        self.awaited.change.is_some_and(|change| change.is_done(&self.status))
    }

    /// Before it becomes something else.
    fn keep_change(&mut self) {
        if self.has_changed() {
            self.awaited.ended = Some(self.status.clone());
        }
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl View {
    /// A view of a VM whose protection begins.
    pub(super) fn new(name: &str, vm: VmId, role: Role, metrics: VmMetrics, events: EventLog) -> Self {
        metrics.set_role(role);
        let mut status = VmStatus::new(name, vm.to_string(), role);
        status.state = ProtectionState::Pairing;
        metrics.set_state(&status.state);
        let inner = Inner {
            status,
            epochs: EpochStats::new(),
            captured: None,
            gate: None,
            failing: None,
            ceased: None,
            awaited: Awaited::default(),
        };
        Self { inner: Mutex::new(inner), metrics, events, lag: Arc::default() }
    }

    /// The metrics that it fills.
    pub(super) fn metrics(&self) -> &VmMetrics {
        &self.metrics
    }

    /// Keeps what happened.
    fn tell(&self, inner: &Inner, kind: EventKind, text: String) {
        let status = &inner.status;
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.events.append(&VmEvent {
            unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
            kind,
            role: status.role,
            state: status.state.word().to_owned(),
            generation: status.generation,
            epoch: status.epoch_committed,
            text,
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the control API answers now.
    pub(super) fn status(&self) -> VmStatus {
        let inner = self.lock();
        let mut status = inner.status.clone();
        status.epochs = inner.epochs.summary();
        status.held = inner.gate.as_ref().map(|gate| HeldOutput::from(gate.held()));
        status.guest_clock = self.guest_clock(&inner);
        status
    }

    /// How far the guest's clock fell behind; for who pauses the guest.
    pub(super) fn lag(&self) -> Arc<Lag> {
        self.lag.clone()
    }

    /// `None` where nobody pauses the guest: on the standby.
    fn guest_clock(&self, inner: &Inner) -> Option<GuestClock> {
        let primary = inner.status.role == Role::Primary;
        primary.then(|| GuestClock {
            lag_seconds: self.lag.total().as_secs_f64(),
            pause_share: inner.epochs.pause_share(),
        })
    }

    /// The other side's name.
    pub(super) fn peer(&self) -> String {
        self.lock().status.peer.clone()
    }

    /// Another protection of the same VM begins here. What the last failover was stays to be seen.
    pub(super) fn begin(&self, role: Role, peer: &str, warnings: Vec<String>) {
        let mut inner = self.lock();
        inner.keep_change();
        (inner.epochs, inner.captured, inner.gate) = (EpochStats::new(), None, None);
        (inner.failing, inner.ceased) = (None, None);
        let status = &mut inner.status;
        (status.role, status.warnings, status.suspicion) = (role, warnings, None);
        peer.clone_into(&mut status.peer);
        status.advice.clear();
        drop(inner);
        self.metrics.set_role(role);
        self.metrics.set_held(&HeldOutput::default());
    }

    /// Changes the plain fields.
    pub(super) fn set(&self, change: impl FnOnce(&mut VmStatus)) {
        change(&mut self.lock().status);
    }

    /// Changes the state, and says so in one log line.
    pub(super) fn set_state(&self, state: ProtectionState, reason: &str) {
        let mut inner = self.lock();
        inner.keep_change();
        let before = inner.status.state.word();
        if before != state.word() || inner.status.reason != reason {
            tracing::info!(vm = inner.status.name, from = before, to = state.word(), reason, "state");
            let was = if before == state.word() { String::new() } else { format!("was {before}") };
            let text =
                [was.as_str(), reason].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
            inner.status.state = state;
            self.tell(&inner, EventKind::State, text);
        } else {
            inner.status.state = state;
        }
        inner.status.reason = reason.to_owned();
        inner.status.advice.clear();
        self.metrics.set_state(&inner.status.state);
    }

    /// From now on it is kept how this change ends; what was kept before.
    pub(super) fn await_change(&self, awaited: Awaited) -> Awaited {
        std::mem::replace(&mut self.lock().awaited, awaited)
    }

    /// The change of this number is not waited for; `before` is, if nothing else is by now. Whether that is so.
    pub(super) fn give_up_change(&self, number: u64, before: Awaited) -> bool {
        let mut inner = self.lock();
        let last = inner.awaited.number == number;
        if last {
            inner.awaited = before;
        }
        last
    }

    /// How the change that was asked for last ended, if it has.
    pub(super) fn changed(&self) -> Option<VmStatus> {
        let inner = self.lock();
        if inner.has_changed() { Some(inner.status.clone()) } else { inner.awaited.ended.clone() }
    }

    /// How far the initial sync is; shown only while it is under way.
    pub(super) fn set_progress(&self, progress: SyncProgress) {
        let mut inner = self.lock();
        if matches!(inner.status.state, ProtectionState::Syncing(_)) {
            inner.status.state = ProtectionState::Syncing(progress);
            self.metrics.set_state(&inner.status.state);
        }
    }

    /// The gate whose held output is shown, from now on or no more.
    pub(super) fn set_gate(&self, gate: Option<Arc<dyn Gate>>) {
        if gate.is_none() {
            self.metrics.set_held(&HeldOutput::default());
        }
        self.lock().gate = gate;
    }

    /// Brings to the metrics what changes also while no epoch is committed: that is when it matters.
    pub(super) fn look(&self) {
        let inner = self.lock();
        let held = inner.gate.as_ref().map(|gate| HeldOutput::from(gate.held()));
        let covered = matches!(inner.status.state, ProtectionState::Protected | ProtectionState::FailingOver);
        let captured = inner.captured.filter(|_| covered && inner.status.role == Role::Primary);
        self.metrics.set_peer(&inner.status.peer);
        drop(inner);
        if let Some(held) = held {
            self.metrics.set_held(&held);
        }
        self.metrics.set_replication_lag(captured.map_or(Duration::ZERO, |at| at.elapsed()));
    }

    /// A rehearsal ended here.
    pub(super) fn rehearsed(&self, loads: bool) {
        self.metrics.rehearsed(loads);
        let text = if loads { "the standby's copy loads" } else { "the standby's copy does not load" };
        self.tell(&self.lock(), EventKind::Rehearsal, text.to_owned());
    }

    /// An operator breaks something on purpose.
    pub(super) fn drill(&self, what: &str) {
        self.tell(&self.lock(), EventKind::Drill, what.to_owned());
    }

    /// A generation was read.
    pub(super) fn set_generation(&self, generation: u64) {
        let mut inner = self.lock();
        if inner.status.generation != generation {
            inner.status.generation = generation;
            self.tell(&inner, EventKind::Ownership, format!("generation {generation} was read"));
        }
        drop(inner);
        self.metrics.set_generation(generation);
    }

    /// What the failure detector thinks of the peer.
    pub(super) fn set_suspicion(&self, suspicion: Option<Suspicion>) {
        self.lock().status.suspicion = suspicion;
    }

    /// An epoch was committed (primary).
    pub(super) fn observe(&self, epoch: &EpochObservation) {
        let mut inner = self.lock();
        inner.epochs.observe(epoch);
        inner.captured = Instant::now().checked_sub(epoch.commit);
        inner.status.epoch_committed = epoch.epoch;
        let held = inner.gate.as_ref().map(|gate| HeldOutput::from(gate.held()));
        let clock = self.guest_clock(&inner);
        drop(inner);
        self.metrics.observe_epoch(epoch);
        if let Some(clock) = clock {
            self.metrics.set_guest_clock(&clock);
        }
        if let Some(held) = held {
            self.metrics.set_held(&held);
        }
    }

    /// An epoch was committed (standby).
    pub(super) fn set_committed(&self, epoch: u64) {
        self.lock().status.epoch_committed = epoch;
        self.metrics.set_committed(epoch);
    }

    /// A failover begins here: the peer is suspected, or the operator asked.
    pub(super) fn failover_began(&self, cause: FailoverCause, last_heard: Option<Time>) {
        let detected = clock::now();
        let mut inner = self.lock();
        if inner.failing.is_some() {
            return;
        }
        let last_heard = last_heard.unwrap_or(detected);
        inner.ceased = None;
        inner.failing = Some(Failing { detected, granted: None });
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        inner.status.failover = Some(FailoverReport {
            cause,
            generation: inner.status.generation,
            epoch: inner.status.epoch_committed,
            detected_unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
            last_heard_monotonic_ns: last_heard.0,
            detected_monotonic_ns: detected.0,
            granted_monotonic_ns: None,
            loaded_monotonic_ns: None,
            running_monotonic_ns: None,
            detection_ms: ms(detected.since(last_heard)),
            grant_ms: None,
            activation_ms: None,
        });
    }

    /// Something happened to who may run it that no generation tells of.
    pub(super) fn note_ownership(&self, text: &str) {
        self.tell(&self.lock(), EventKind::Ownership, text.to_owned());
    }

    /// The failover that began is off: the peer is heard again and nothing was granted yet.
    pub(super) fn failover_ceased(&self) {
        let mut inner = self.lock();
        if inner.failing.is_some_and(|failing| failing.granted.is_none()) {
            inner.ceased = inner.failing.take().zip(inner.status.failover.take());
        }
    }

    /// The grant was read. It may have been asked for before the peer was heard again, or by somebody who did not say that a failover begins: it counts all
    /// the same.
    pub(super) fn granted(&self, generation: u64, epoch: u64) {
        let now = clock::now();
        let mut inner = self.lock();
        if inner.failing.is_none() {
            if let Some((failing, report)) = inner.ceased.take() {
                inner.failing = Some(failing);
                inner.status.failover = Some(report);
            } else {
                drop(inner);
                self.failover_began(FailoverCause::Silence, None);
                inner = self.lock();
            }
        }
        let Some(failing) = inner.failing.as_mut() else { return };
        failing.granted = Some(now);
        let detected = failing.detected;
        if let Some(report) = inner.status.failover.as_mut() {
            report.generation = generation;
            report.epoch = epoch;
            report.granted_monotonic_ns = Some(now.0);
            report.grant_ms = Some(ms(now.since(detected)));
        }
    }

    /// The survivor runs.
    pub(super) fn activated(&self, activation: Activation) {
        let now = clock::now();
        let mut inner = self.lock();
        let granted = inner.failing.take().and_then(|failing| failing.granted).unwrap_or(now);
        let Some(report) = inner.status.failover.as_mut() else { return };
        let loaded = now.saturating_sub(activation.resume);
        report.loaded_monotonic_ns = Some(loaded.0);
        report.running_monotonic_ns = Some(now.0);
        report.activation_ms = Some(ActivationMs {
            load: ms(activation.load),
            resume: ms(activation.resume),
            total: ms(now.since(granted)),
        });
        let report = report.clone();
        inner.status.role = Role::Survivor;
        let (cause, total) = (report.cause.word(), ms(now.since(granted)));
        let text = format!(
            "goes on here from epoch {} ({cause}; detection {:.0} ms, activation {total:.0} ms)",
            report.epoch, report.detection_ms
        );
        self.tell(&inner, EventKind::Failover, text);
        drop(inner);
        self.metrics.set_role(Role::Survivor);
        self.metrics.observe_failover(&report);
    }

    /// This side went on alone without activating anything (a primary that lost its standby).
    pub(super) fn went_alone(&self) {
        self.lock().failing = None;
    }

    /// So much of the first copy of the disks the standby had already.
    pub(super) fn spared(&self, bytes: u64) {
        if bytes > 0 {
            let had = bytesize::ByteSize(bytes).display().iec();
            self.tell(
                &self.lock(),
                EventKind::Sync,
                format!("the standby had {had} of the disks already; the rest of them was sent"),
            );
        }
    }

    /// Where the survivor runs.
    pub(super) fn set_survivor(&self, survivor: SurvivorAt) {
        self.lock().status.survivor = Some(survivor);
    }
}

/// The core's word for the API's.
pub(super) fn api_state(state: replicator_core::state::ProtectionState) -> ProtectionState {
    use replicator_core::state::ProtectionState as Core;
    match state {
        Core::Unprotected => ProtectionState::Unprotected,
        Core::Pairing => ProtectionState::Pairing,
        Core::Syncing => ProtectionState::Syncing(SyncProgress::default()),
        Core::Protected => ProtectionState::Protected,
        Core::Degraded => ProtectionState::Degraded,
        Core::FailingOver => ProtectionState::FailingOver,
        Core::Fenced => ProtectionState::Fenced,
        Core::Error => ProtectionState::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::events::{Writer, read};
    use crate::metrics::Metrics;

    const ACTIVATION: Activation =
        Activation { load: Duration::from_millis(2), resume: Duration::from_millis(3), relaunched: 0 };

    /// What is told of a copy that runs after `before` had happened, by the grant 21.
    fn told_after(before: impl FnOnce(&View)) -> FailoverReport {
        let dir = tempfile::tempdir().expect("a directory");
        let writer = Writer::start().expect("a thread");
        let log = EventLog::new(&writer, dir.path(), "web-1");
        let view = View::new("web-1", VmId([1; 16]), Role::Standby, Metrics::new().vm("web-1"), log);
        before(&view);
        assert_eq!(view.status().failover, None, "nothing was granted");
        view.granted(21, 119);
        view.activated(ACTIVATION);
        let status = view.status();
        assert_eq!(status.role, Role::Survivor);
        writer.catch_up(Duration::from_secs(60));
        let noted = read(dir.path(), "web-1", 9).expect("readable");
        assert!(noted.iter().any(|event| event.kind == EventKind::Failover), "{noted:?}");
        let report = status.failover.expect("there was one");
        assert_eq!((report.cause, report.generation, report.epoch), (FailoverCause::Silence, 21, 119));
        report
    }

    /// Found by the chaos suite: the copy ran, and its agent called itself a standby and noted no failover.
    #[test]
    fn a_grant_that_comes_after_the_peer_was_heard_again_is_a_failover() {
        let report = told_after(|view| {
            view.failover_began(FailoverCause::Silence, Some(Time(1)));
            view.failover_ceased();
        });
        assert_eq!(report.last_heard_monotonic_ns, 1);
    }

    /// Found by the chaos suite: the primary died before its standby had read that it is protected.
    #[test]
    fn a_grant_of_which_nobody_said_that_a_failover_begins_is_one() {
        told_after(|_| {});
    }
}
