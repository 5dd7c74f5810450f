//! Hosts and heartbeats: who hears whom, and whether the witness is there.

use super::with_hosts;
use crate::grafana::{Dashboard, Panel};

pub(super) fn board() -> Dashboard {
    let board = Dashboard::new(
        "understudy-hosts",
        "Understudy: hosts and heartbeats",
        "Agents, the heartbeats between them, and the witness.",
    );
    let all = [agents(), heartbeats(), witness()];
    with_hosts(board).panels(all.into_iter().flatten())
}

fn agents() -> Vec<Panel> {
    vec![
        Panel::row("Agents"),
        Panel::stat(
            "Agents up",
            "Agents that Prometheus reaches. Fewer than there are hosts: look at the missing host.",
            "none",
        )
        .good_from(1.0)
        .now("sum(up{job=\"understudy\",instance=~\"$instance\"})", "up"),
        Panel::table(
            "Versions",
            "The program of each agent. Pairs of different versions work only if one of them offers the other's protocol: \
             upgrade the standby first.",
            "understudy_build_info{instance=~\"$instance\"}",
            &["instance", "version"],
            None,
        )
        .size(10, 6)
        .plain(),
        Panel::table(
            "Copies per host",
            "How many copies each host has in each state. All primaries on one host: its death makes all of them fail over \
             at once.",
            "sum by (instance, state) (understudy_vm_state{instance=~\"$instance\"}) > 0",
            &["instance", "state"],
            Some("copies"),
        )
        .size(10, 6)
        .plain(),
    ]
}

fn heartbeats() -> Vec<Panel> {
    let rate =
        |way: &str| format!("rate(understudy_heartbeats_{way}_total{{instance=~\"$instance\"}}[$__rate_interval])");
    let (sent, received) = (rate("sent"), rate("received"));
    vec![
        Panel::row("Heartbeats"),
        Panel::lines(
            "Suspicion of peers (phi)",
            "What the failure detector thinks. Peaks without a failure: a lossy or congested path; give heartbeats a path of \
             their own, or a longer `heartbeat.silence`.",
            "none",
        )
        .bad_from(4.0, 8.0)
        .query("understudy_peer_phi{instance=~\"$instance\"}", "{{instance}} of {{peer}}"),
        Panel::lines(
            "Time since a peer was heard",
            "A saw of one interval is normal. A line that climbs: the peer or the path to it is gone.",
            "s",
        )
        .bad_from(0.2, 1.0)
        .query("understudy_peer_silence_seconds{instance=~\"$instance\"}", "{{instance}} of {{peer}}"),
        Panel::lines(
            "Round trip of heartbeats",
            "Smoothed. Every commit waits at least this long; on a local network it is below a millisecond.",
            "s",
        )
        .bad_from(0.005, 0.05)
        .query("understudy_peer_rtt_seconds{instance=~\"$instance\"}", "{{instance}} to {{peer}}"),
        Panel::lines(
            "Heartbeats sent and heard",
            "Both should be the same. Heard fewer than the other side sends: the path loses datagrams.",
            "ops",
        )
        .query(&sent, "{{instance}} to {{peer}}, path {{path}}")
        .query(&received, "{{instance}} from {{peer}}, path {{path}}"),
        Panel::stat(
            "Paths",
            "1: the peer is heard on this path. 0: it is not, or never was. Nothing fails over while one path of a peer is heard; mend the \
             link before the others fail, too.",
            "none",
        )
        .size(8, 8)
        .good_from(1.0)
        .now("understudy_peer_path_up{instance=~\"$instance\"}", "{{instance}} hears {{peer}} on {{path}}"),
        Panel::lines(
            "Silence by path",
            "Time since the peer was heard on each path. One line that climbs alone: that link is down. All of a peer's: the peer is gone.",
            "s",
        )
        .size(8, 8)
        .bad_from(0.2, 1.0)
        .query("understudy_peer_path_silence_seconds{instance=~\"$instance\"}", "{{instance}} of {{peer}}, path {{path}}"),
        Panel::lines(
            "Suspicion and round trip by path",
            "phi and the last round trip in milliseconds. A path whose peaks are higher than the others' loses or delays datagrams.",
            "none",
        )
        .size(8, 8)
        .query("understudy_peer_path_phi{instance=~\"$instance\"}", "phi: {{instance}} of {{peer}}, path {{path}}")
        .query("understudy_peer_path_rtt_seconds{instance=~\"$instance\"} * 1000", "ms: {{instance}} to {{peer}}, path {{path}}"),
    ]
}

fn witness() -> Vec<Panel> {
    let name = "understudy_witness_request_seconds";
    let quantile = |q: f64| {
        format!(
            "histogram_quantile({q}, sum by (instance, le) (rate({name}_bucket{{instance=~\"$instance\",outcome!=\"lost\"}}[$__rate_interval])))"
        )
    };
    vec![
        Panel::row("Witness"),
        Panel::stat(
            "Witness answers",
            "1: it answered when the agent last looked. 0: no failover can happen until it does; start it, or mend the \
             network between this host and it.",
            "none",
        )
        .size(8, 8)
        .good_from(1.0)
        .now("understudy_witness_reachable{instance=~\"$instance\"}", "{{instance}} asks {{witness}}"),
        Panel::lines(
            "Latency of the witness",
            "Of answered questions. A failover waits for one; a slow disk under the witness shows here.",
            "s",
        )
        .size(8, 8)
        .bad_from(0.05, 0.5)
        .query(&quantile(0.5), "{{instance}} p50")
        .query(&quantile(0.99), "{{instance}} p99"),
        Panel::lines("Questions to the witness", "By outcome. lost means that no answer came in time.", "ops")
            .size(8, 8)
            .query(
                &format!(
                    "sum by (instance, outcome) (rate({name}_count{{instance=~\"$instance\"}}[$__rate_interval]))"
                ),
                "{{instance}} {{outcome}}",
            ),
        Panel::stat(
            "Fence commands in the last day",
            "How often the program of `[fence]` was asked to switch another host off, and whether it confirmed that. One that failed \
             confirmed nothing: nobody was forced out by it.",
            "none",
        )
        .size(8, 8)
        .now("increase(understudy_fence_seconds_count{instance=~\"$instance\"}[1d])", "{{instance}} {{outcome}}"),
    ]
}
