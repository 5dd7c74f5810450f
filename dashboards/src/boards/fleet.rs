//! The fleet: is everything protected, and if not, what is not?

use super::{states, with_marks, with_vms};
use crate::grafana::{Dashboard, Panel};
use crate::rules::failovers;

pub(super) fn board() -> Dashboard {
    let board = Dashboard::new(
        "understudy-fleet",
        "Understudy: fleet",
        "Whether every VM could lose its host now, and which could not.",
    );
    with_marks(with_vms(board)).panels(counts().into_iter().chain([states(), table()]).chain(trends()))
}

fn counts() -> Vec<Panel> {
    vec![
        Panel::stat(
            "VMs protected",
            "VMs that survive the death of their host now. Compare with the number beside it.",
            "none",
        )
        .good_from(1.0)
        .now("sum(vm:understudy_vm_protected:max{vm=~\"$vm\"}) or vector(0)", "protected"),
        Panel::stat(
            "VMs at risk",
            "VMs that run and would be lost with their host. Find them in the table below; \
             `understudy status VM` on their host says why and what to do.",
            "none",
        )
        .bad_from(1.0, 1.0)
        .now("count(vm:understudy_vm_protected:max{vm=~\"$vm\"} == 0) or vector(0)", "at risk"),
        Panel::stat(
            "Agents down",
            "Agents that Prometheus cannot reach. Their VMs may run, but nobody sees them: look at the host and at \
             `systemctl status understudy-agent`.",
            "none",
        )
        .bad_from(1.0, 1.0)
        .now("count(up{job=\"understudy\"} == 0) or vector(0)", "down"),
        Panel::stat(
            "Witnesses unreachable",
            "Agents that their witness does not answer. Without it no failover happens: a VM whose host dies stalls. Start \
             the witness or mend the network to it.",
            "none",
        )
        .bad_from(1.0, 1.0)
        .now("count(understudy_witness_reachable{instance=~\"$instance\"} == 0) or vector(0)", "unreachable"),
        Panel::stat(
            "Failovers in this range",
            "Failovers, planned ones included. Each unplanned one had a cause: see the dashboard of failovers.",
            "none",
        )
        .bad_from(1.0, 5.0)
        .now(&format!("sum({}) or vector(0)", failovers("instance=~\"$instance\",vm=~\"$vm\"", "$__range")), "failovers"),
        Panel::stat(
            "Worst replication lag",
            "The age of the oldest copy that a standby could go on with. Above a second: the standby or the network to it \
             does not keep up; see the dashboard of that VM.",
            "s",
        )
        .bad_from(0.5, 2.0)
        .now("max(understudy_replication_lag_seconds{instance=~\"$instance\",vm=~\"$vm\"})", "lag"),
    ]
}

fn table() -> Panel {
    Panel::table(
        "Copies now",
        "Each copy of each VM with its state. Degraded, error or failing-over that stays: `understudy status VM` there.",
        "understudy_vm_state{instance=~\"$instance\",vm=~\"$vm\"} == 1",
        &["vm", "instance", "state"],
        None,
    )
    .plain()
}

fn trends() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Pause, 99th percentile",
            "How long the slowest epochs stop a guest. Above some milliseconds: see the split of the pause on the VM's \
             dashboard; many dirty pages, a slow disk flush and a busy host are the usual causes.",
            "s",
        )
        .bad_from(0.01, 0.05)
        .query("instance_vm:understudy_epoch_pause_seconds:p99_5m{instance=~\"$instance\",vm=~\"$vm\"}", "{{vm}}"),
        Panel::lines(
            "Commit, 99th percentile",
            "How long output waits at most after its epoch ended. Grows with the network's round trip and with a busy \
             standby; clients feel it in each answer.",
            "s",
        )
        .bad_from(0.02, 0.1)
        .query("instance_vm:understudy_epoch_commit_seconds:p99_5m{instance=~\"$instance\",vm=~\"$vm\"}", "{{vm}}"),
        Panel::lines(
            "Part of the time that guests stand",
            "The guest's clock loses as much. Above 0.25: use a longer epoch, or move load away; keep chrony running in the \
             guest.",
            "percentunit",
        )
        .bad_from(0.1, 0.3)
        .query("understudy_guest_pause_share_ratio{instance=~\"$instance\",vm=~\"$vm\"}", "{{vm}} on {{instance}}"),
        Panel::lines(
            "Replication traffic",
            "Bytes of committed epochs given to the network, by VM. If it nears the link's capacity, commits slow down: give \
             replication a link of its own, or a larger shadow.",
            "Bps",
        )
        .stacked()
        .query(
            "sum by (vm) (rate(understudy_epoch_wire_bytes_total{instance=~\"$instance\",vm=~\"$vm\"}[$__rate_interval]))",
            "{{vm}}",
        ),
    ]
}
