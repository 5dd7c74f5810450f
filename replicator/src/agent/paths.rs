//! What heartbeats say of each path to a peer, as metrics and in words.
//!
//! Promise: a peer is shown by the path that it is heard best on, since one that is heard is enough; each path is shown by itself, too, and
//! one that is gone from both configurations is shown no more.

use std::collections::BTreeMap;

use heartbeat::beat::PathStats;

use crate::control::api::Suspicion;
use crate::control::paths::PathStatus;
use crate::metrics::Metrics;

/// What was counted before, by peer and path.
#[derive(Debug, Default)]
pub(super) struct Figures(BTreeMap<(String, usize), (u64, u64)>);

impl Figures {
    /// Brings `paths` to the metrics. Returns what each peer looks like, by name.
    pub(super) fn show(&mut self, paths: &[PathStats], metrics: &Metrics) -> BTreeMap<String, Suspicion> {
        let mut peers = BTreeMap::new();
        for path in paths {
            let shown = metrics.path(&path.name, path.path);
            shown.set(&suspicion(path), path.up);
            if let Some(rtt) = path.rtt {
                shown.set_rtt(rtt);
            }
            let before = self.0.insert((path.name.clone(), path.path), (path.sent, path.received));
            let (sent, received) = before.unwrap_or_default();
            // A peer that was paired again counts from zero.
            shown.sent(path.sent.saturating_sub(sent));
            shown.received(path.received.saturating_sub(received));
            if peers.contains_key(&path.name) {
                continue;
            }
            let Some(best) = best(paths.iter().filter(|other| other.node == path.node)) else { continue };
            let peer = metrics.peer(&path.name);
            peer.set_suspicion(&suspicion(best));
            if let Some(rtt) = best.rtt {
                peer.set_rtt(rtt);
            }
            peers.insert(path.name.clone(), suspicion(best));
        }
        self.0.retain(|(peer, number), _| {
            let stays = paths.iter().any(|path| path.name == *peer && path.path == *number);
            if !stays {
                metrics.remove_path(peer, *number);
            }
            stays
        });
        peers
    }
}

/// The path that speaks for its peer: the one that was heard last.
pub(super) fn best<'a>(paths: impl Iterator<Item = &'a PathStats>) -> Option<&'a PathStats> {
    paths.min_by_key(|path| (path.silence.is_none(), path.silence))
}

/// How alive the peer looks on this path; whether it is suspected is said of the peer.
pub(super) fn suspicion(path: &PathStats) -> Suspicion {
    Suspicion::new(path.phi, path.silence.unwrap_or_default().as_secs_f64() * 1e3, path.suspected)
}

/// The same for operators.
pub(super) fn status(path: &PathStats) -> PathStatus {
    PathStatus {
        path: path.path,
        local: path.local.to_string(),
        address: path.address.to_string(),
        up: path.up,
        silence_ms: path.silence.map(|silence| silence.as_secs_f64() * 1e3),
        phi: suspicion(path).phi,
        rtt_ms: path.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use heartbeat_core::ids::NodeId;

    use super::*;

    fn path(number: usize, silence_ms: Option<u64>, up: bool) -> PathStats {
        PathStats {
            node: NodeId([1; 16]),
            name: "host-b".into(),
            path: number,
            local: ([10, 0, 0, 1], 7845).into(),
            address: ([10, 0, 0, 2], 7845).into(),
            up,
            connected: true,
            sent: 10,
            received: 9,
            rtt: Some(Duration::from_micros(300)),
            phi: if up { 0.5 } else { 1e9 },
            silence: silence_ms.map(Duration::from_millis),
            suspected: false,
        }
    }

    #[test]
    fn a_peer_is_shown_by_the_path_that_is_heard_and_each_path_by_itself() {
        let metrics = Metrics::new();
        let mut figures = Figures::default();
        // One that was never heard has a phi of 0, and says nothing good all the same.
        let never = PathStats { phi: 0.0, rtt: None, ..path(2, None, false) };
        let peers = figures.show(&[path(0, Some(9_000), false), path(1, Some(12), true), never], &metrics);
        assert_eq!(peers["host-b"].silence_ms, 12.0);
        let text = metrics.encode();
        for line in [
            "understudy_peer_silence_seconds{peer=\"host-b\"} 0.012",
            "understudy_peer_path_silence_seconds{path=\"0\",peer=\"host-b\"} 9",
            "understudy_peer_path_up{path=\"0\",peer=\"host-b\"} 0",
            "understudy_peer_path_up{path=\"1\",peer=\"host-b\"} 1",
            "understudy_peer_path_up{path=\"2\",peer=\"host-b\"} 0",
            "understudy_heartbeats_received_total{path=\"1\",peer=\"host-b\"} 9",
        ] {
            assert!(text.lines().any(|said| said == line), "{line} is not in {text}");
        }
        figures.show(&[path(1, Some(12), true)], &metrics);
        let text = metrics.encode();
        assert!(!text.contains("path=\"0\"") && text.contains("path=\"1\""), "{text}");
    }
}
