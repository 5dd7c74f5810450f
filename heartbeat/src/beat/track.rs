//! What is known of one peer: a detector per path, and the changes that are worth an event.
//!
//! Pure: time comes in, events go out. A peer is suspected when every path on which it was ever heard is
//! past its detector's bound. A path alone that is past it is *down*: that is told, and nothing comes of it.

use std::collections::BTreeMap;
use std::time::Duration;

use heartbeat_core::detector::{Arrival, Detector, DetectorConfig};
use heartbeat_core::ids::{Incarnation, NodeId, VmId};
use heartbeat_core::time::Time;

use super::PeerEvent;
use super::pulse::{Echo, GuestStatus, Pulse};

/// Guests remembered of one peer; reports of more are ignored.
const MAX_GUESTS: usize = 1024;

/// One peer.
#[derive(Debug)]
pub(super) struct Track {
    node: NodeId,
    config: DetectorConfig,
    paths: Vec<Path>,
    incarnation: Option<Incarnation>,
    /// Highest sequence of this incarnation on any path.
    sequence: u64,
    last_heard: Option<Time>,
    suspected: bool,
    guests: BTreeMap<VmId, GuestStatus>,
}

#[derive(Debug)]
struct Path {
    detector: Detector,
    /// Highest sequence of this incarnation on this path.
    sequence: u64,
    received: u64,
    last: Option<Time>,
    /// Its detector's bound has passed, and nothing was heard since.
    down: bool,
    /// `sent` of the last heartbeat.
    echo: u64,
    rtt: Option<Duration>,
}

/// One path's numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct PathView {
    pub(super) received: u64,
    pub(super) rtt: Option<Duration>,
    pub(super) phi: f64,
    pub(super) silence: Option<Duration>,
    /// It was heard, and is not past its bound.
    pub(super) up: bool,
}

impl Track {
    pub(super) fn new(node: NodeId, paths: usize, config: DetectorConfig) -> Self {
        let path = || Path {
            detector: Detector::new(config),
            sequence: 0,
            received: 0,
            last: None,
            down: false,
            echo: 0,
            rtt: None,
        };
        Self {
            node,
            config,
            paths: std::iter::repeat_with(path).take(paths).collect(),
            incarnation: None,
            sequence: 0,
            last_heard: None,
            suspected: false,
            guests: BTreeMap::new(),
        }
    }

    /// A heartbeat came on `path` at `now`, the receiver's clock. Sequences start at 1.
    pub(super) fn handle_pulse(&mut self, now: Time, path: usize, pulse: &Pulse, events: &mut Vec<PeerEvent>) {
        let node = self.node;
        let new = Incarnation(pulse.incarnation);
        match self.incarnation {
            Some(old) if new < old => return,
            Some(old) if new > old => {
                events.push(PeerEvent::Incarnation { node, old, new });
                self.sequence = 0;
                self.guests.clear();
                self.paths.iter_mut().for_each(|path| path.sequence = 0);
            }
            Some(_) => {}
            None => events.push(PeerEvent::Heard { node, incarnation: new }),
        }
        self.incarnation = Some(new);
        let on = &mut self.paths[path];
        if pulse.sequence <= on.sequence {
            return;
        }
        on.sequence = pulse.sequence;
        on.received += 1;
        if on.detector.is_suspect(now) {
            // An outage is no sample of how regular the peer is.
            on.detector = Detector::new(self.config);
        }
        let arrival = on.detector.handle_heartbeat(now, new);
        debug_assert_ne!(arrival, Arrival::Stale, "older lives were dropped above");
        let path_silence = on.last.map_or(Duration::ZERO, |last| now.since(last));
        on.last = Some(now);
        let path_was_down = std::mem::take(&mut on.down);
        on.echo = pulse.sent;
        if let Some(Echo { sent, held }) = pulse.echo {
            on.rtt = now.0.checked_sub(sent).and_then(|whole| whole.checked_sub(held)).map(Duration::from_nanos);
        }
        let silence = self.last_heard.map_or(Duration::ZERO, |last| now.since(last));
        self.last_heard = Some(now);
        if std::mem::take(&mut self.suspected) {
            events.push(PeerEvent::HeardAgain { node, silence });
        } else if path_was_down {
            events.push(PeerEvent::PathUp { node, path, silence: path_silence });
        }
        if pulse.sequence > self.sequence {
            self.sequence = pulse.sequence;
            for report in &pulse.reports {
                let full = self.guests.len() >= MAX_GUESTS && !self.guests.contains_key(&report.vm);
                if !full && self.guests.insert(report.vm, report.status) != Some(report.status) {
                    events.push(PeerEvent::GuestReport { node, vm: report.vm, status: report.status });
                }
            }
        }
    }

    /// We were not scheduled until `now`: every path that was fine before gets a whole fresh silence.
    pub(super) fn handle_starvation(&mut self, now: Time) {
        let Some(incarnation) = self.incarnation else { return };
        if self.suspected {
            return;
        }
        for path in self.paths.iter_mut().filter(|path| path.last.is_some() && !path.down) {
            path.detector = Detector::new(self.config);
            path.detector.handle_heartbeat(now, incarnation);
        }
    }

    /// When [`Track::judge`] will suspect if nothing more is heard; `None` if it would not.
    pub(super) fn next_check(&self) -> Option<Time> {
        if self.suspected {
            return None;
        }
        self.paths.iter().filter_map(|path| path.detector.next_check()).max()
    }

    /// Which paths are down: told of each once, unless the peer is silent on all of them, which is more.
    pub(super) fn judge_paths(&mut self, now: Time, events: &mut Vec<PeerEvent>) {
        let node = self.node;
        let silent = |path: &Path| path.last.is_none() || path.detector.is_suspect(now);
        let all = self.suspected || self.paths.iter().all(silent);
        for (number, path) in self.paths.iter_mut().enumerate() {
            let Some(last) = path.last else { continue };
            if all || path.down || !path.detector.is_suspect(now) {
                continue;
            }
            path.down = true;
            events.push(PeerEvent::PathDown { node, path: number, silence: now.since(last) });
        }
    }

    /// Suspects the peer if all its paths are silent past the bound.
    pub(super) fn judge(&mut self, now: Time, events: &mut Vec<PeerEvent>) {
        let (Some(at), Some(last)) = (self.next_check(), self.last_heard) else { return };
        if now < at {
            return;
        }
        self.suspected = true;
        self.paths.iter_mut().for_each(|path| path.down = path.last.is_some());
        let heard = self.paths.iter().filter(|path| path.last.is_some());
        let phi = heard.map(|path| path.detector.phi(now)).fold(f64::INFINITY, f64::min);
        events.push(PeerEvent::Suspected { node: self.node, phi, silence: now.since(last) });
    }

    pub(super) fn suspected(&self) -> bool {
        self.suspected
    }

    /// What to echo on `path` in a heartbeat that leaves at `now`.
    pub(super) fn echo(&self, now: Time, path: usize) -> Option<Echo> {
        let path = &self.paths[path];
        let held = u64::try_from(now.since(path.last?).as_nanos()).ok()?;
        Some(Echo { sent: path.echo, held })
    }

    pub(super) fn view(&self, now: Time, path: usize) -> PathView {
        let path = &self.paths[path];
        PathView {
            received: path.received,
            rtt: path.rtt,
            phi: path.detector.phi(now),
            silence: path.last.map(|last| now.since(last)),
            up: path.last.is_some() && !path.down,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beat::pulse::Report;

    const NODE: NodeId = NodeId([1; 16]);
    const VM: VmId = VmId([2; 16]);
    const MS: u64 = 1_000_000;

    fn pulse(incarnation: u64, sequence: u64) -> Pulse {
        Pulse { node: NODE, incarnation, sequence, sent: 0, echo: None, reports: Vec::new() }
    }

    /// A peer heard every 20 ms on these paths until `until` ms (exclusive).
    fn heard(paths: &[usize], until: u64) -> Track {
        let mut track = Track::new(NODE, 2, DetectorConfig::default());
        let mut events = Vec::new();
        for tick in 0..until / 20 {
            for path in paths {
                track.handle_pulse(Time(tick * 20 * MS), *path, &pulse(1, tick + 1), &mut events);
            }
        }
        assert_eq!(events, [PeerEvent::Heard { node: NODE, incarnation: Incarnation(1) }]);
        track
    }

    fn judged(track: &mut Track, at: u64) -> Vec<PeerEvent> {
        let mut events = Vec::new();
        track.judge(Time(at * MS), &mut events);
        events
    }

    #[test]
    fn a_silent_peer_is_suspected_once_and_heard_again_once() {
        let mut track = heard(&[0], 1000);
        let at = track.next_check().expect("heard").0.div_ceil(MS);
        assert!(judged(&mut track, at - 1).is_empty());
        let events = judged(&mut track, at);
        assert!(matches!(events[..], [PeerEvent::Suspected { phi, .. }] if phi >= 7.9), "{events:?}");
        assert!(judged(&mut track, at + 1000).is_empty(), "once per silence");
        assert_eq!(track.next_check(), None);
        let mut events = Vec::new();
        track.handle_pulse(Time(5000 * MS), 0, &pulse(1, 999), &mut events);
        let silence = Duration::from_millis(5000 - 980);
        assert_eq!(events, [PeerEvent::HeardAgain { node: NODE, silence }]);
        assert_eq!(track.next_check(), Some(Time(5200 * MS)), "an outage does not slow the next detection");
    }

    #[test]
    fn one_path_that_is_heard_is_enough() {
        let mut track = heard(&[0, 1], 1000);
        let mut events = Vec::new();
        for tick in 50..100 {
            track.handle_pulse(Time(tick * 20 * MS), 1, &pulse(1, tick + 1), &mut events);
            track.judge(Time(tick * 20 * MS + 1), &mut events);
        }
        assert!(events.is_empty(), "{events:?}");
        assert_eq!(judged(&mut track, 5000).len(), 1);
    }

    #[test]
    fn a_path_that_is_down_is_told_once_and_suspects_nobody() {
        let mut track = heard(&[0, 1], 1000);
        let mut events = Vec::new();
        for tick in 50..100 {
            track.handle_pulse(Time(tick * 20 * MS), 1, &pulse(1, tick + 1), &mut events);
            track.judge_paths(Time(tick * 20 * MS + 1), &mut events);
            track.judge(Time(tick * 20 * MS + 1), &mut events);
        }
        assert!(
            matches!(events[..], [PeerEvent::PathDown { path: 0, silence, .. }] if silence >= Duration::from_millis(200)),
            "{events:?}"
        );
        let up = |track: &Track| [0, 1].map(|path| track.view(Time(1990 * MS), path).up);
        assert_eq!(up(&track), [false, true]);
        // We were not scheduled: that is no reason to hope for a path that was down before.
        track.handle_starvation(Time(1990 * MS));
        assert_eq!(up(&track), [false, true]);
        events.clear();
        track.handle_pulse(Time(1995 * MS), 0, &pulse(1, 200), &mut events);
        let silence = Duration::from_millis(1995 - 980);
        assert_eq!(events, [PeerEvent::PathUp { node: NODE, path: 0, silence }]);
        assert_eq!(up(&track), [true, true]);
    }

    #[test]
    fn paths_of_a_silent_peer_are_down_and_said_to_be_up_one_by_one() {
        let mut track = heard(&[0, 1], 1000);
        let mut events = Vec::new();
        track.judge_paths(Time(5000 * MS), &mut events);
        assert!(events.is_empty(), "a silent peer is more than its paths: {events:?}");
        assert_eq!(judged(&mut track, 5000).len(), 1);
        let up = |track: &Track| [0, 1].map(|path| track.view(Time(6000 * MS), path).up);
        assert_eq!(up(&track), [false, false]);
        track.handle_pulse(Time(6000 * MS), 1, &pulse(1, 200), &mut events);
        assert!(matches!(events[..], [PeerEvent::HeardAgain { .. }]), "{events:?}");
        assert_eq!(up(&track), [false, true]);
        events.clear();
        track.judge_paths(Time(6001 * MS), &mut events);
        track.handle_pulse(Time(6002 * MS), 0, &pulse(1, 201), &mut events);
        assert!(matches!(events[..], [PeerEvent::PathUp { path: 0, .. }]), "{events:?}");
    }

    #[test]
    fn a_peer_never_heard_is_never_suspected() {
        let mut track = Track::new(NODE, 2, DetectorConfig::default());
        assert_eq!(track.next_check(), None);
        track.handle_starvation(Time(MS));
        assert!(judged(&mut track, 1_000_000).is_empty());
    }

    #[test]
    fn after_starvation_a_peer_has_a_whole_fresh_silence() {
        let mut track = heard(&[0], 1000);
        track.handle_starvation(Time(9000 * MS));
        assert_eq!(track.next_check(), Some(Time(9200 * MS)));
        assert!(judged(&mut track, 9199).is_empty());
        let events = judged(&mut track, 9200);
        let expected = Duration::from_millis(9200 - 980);
        assert!(matches!(events[..], [PeerEvent::Suspected { silence, .. }] if silence == expected), "{events:?}");
    }

    #[test]
    fn a_restart_is_told_and_the_old_life_is_not_heard_any_more() {
        let mut track = heard(&[0], 1000);
        let mut events = Vec::new();
        track.judge(Time(9000 * MS), &mut events);
        events.clear();
        track.handle_pulse(Time(9001 * MS), 0, &pulse(2, 1), &mut events);
        assert!(
            matches!(
                events[..],
                [PeerEvent::Incarnation { old: Incarnation(1), new: Incarnation(2), .. }, PeerEvent::HeardAgain { .. },]
            ),
            "{events:?}"
        );
        events.clear();
        track.handle_pulse(Time(9100 * MS), 0, &pulse(1, 5000), &mut events);
        assert!(events.is_empty());
        assert_eq!(track.next_check(), Some(Time(9201 * MS)), "the old life did not count");
    }

    #[test]
    fn a_guest_report_is_told_when_it_changes_and_older_ones_are_not() {
        let mut track = heard(&[0], 20);
        let mut events = Vec::new();
        let mut send = |sequence, path, status| {
            let mut pulse = pulse(1, sequence);
            pulse.reports.push(Report { vm: VM, status });
            track.handle_pulse(Time(sequence * MS), path, &pulse, &mut events);
        };
        send(10, 0, GuestStatus::Running);
        send(11, 0, GuestStatus::Running);
        send(13, 0, GuestStatus::Dead);
        send(12, 1, GuestStatus::Running);
        let told = |status| PeerEvent::GuestReport { node: NODE, vm: VM, status };
        assert_eq!(events, [told(GuestStatus::Running), told(GuestStatus::Dead)]);
    }

    #[test]
    fn the_round_trip_leaves_out_what_the_peer_held() {
        let mut track = heard(&[0], 20);
        let mut pulse = pulse(1, 2);
        pulse.echo = Some(Echo { sent: 3 * MS, held: 4 * MS });
        track.handle_pulse(Time(8 * MS), 0, &pulse, &mut Vec::new());
        assert_eq!(track.view(Time(8 * MS), 0).rtt, Some(Duration::from_millis(1)));
    }
}
