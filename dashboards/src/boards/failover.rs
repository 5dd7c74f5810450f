//! Failovers: what happened when, and how long each phase took.

use super::{roles, states, with_marks, with_vms};
use crate::grafana::{Dashboard, Panel};
use crate::rules::failovers;

pub(super) fn board() -> Dashboard {
    let board = Dashboard::new(
        "understudy-failover",
        "Understudy: failovers",
        "What happened when ownership changed hands: choose a range around a red mark.",
    );
    let all = [counts(), vec![Panel::row("What happened when"), states(), roles()], around()];
    with_marks(with_vms(board)).panels(all.into_iter().flatten())
}

fn counts() -> Vec<Panel> {
    let grown = |suffix: &str| {
        format!(
            "sum by (phase) (increase(understudy_failover_phase_seconds_{suffix}{{instance=~\"$instance\",vm=~\"$vm\"}}[$__range]))"
        )
    };
    let seen = |suffix: &str| {
        format!("sum by (phase) (understudy_failover_phase_seconds_{suffix}{{instance=~\"$instance\",vm=~\"$vm\"}})")
    };
    vec![
        Panel::table(
            "Failovers by cause",
            "silence: the host was not heard. unacknowledged: it was heard but did not commit. peer-restarted, guest-died: \
             its agent said so. planned: somebody asked. Find the cause on the old host before you protect towards it again.",
            &format!(
                "sum by (vm, instance, cause) ({})",
                failovers("instance=~\"$instance\",vm=~\"$vm\"", "$__range")
            ),
            &["vm", "instance", "cause"],
            Some("failovers"),
        )
        .size(10, 7)
        .or_say("no failover in this range")
        .plain(),
        Panel::stat(
            "Mean time of each phase since the agents started",
            "detection: last heartbeat until suspicion; grant: the witness's answer; load: the device state; resume: until \
             the guest ran; activation: grant until it ran. A long detection is your setting (`heartbeat.silence`), a long \
             grant is the way to the witness, a long load is a busy standby.",
            "s",
        )
        .size(14, 7)
        .bad_from(0.5, 2.0)
        .or_say("no failover yet")
        .now(&format!("{} / {} > 0", seen("sum"), seen("count")), "{{phase}}"),
        Panel::lines(
            "Phases of the failovers in this range",
            "The same over the time range, for comparing with earlier ones.",
            "s",
        )
        .size(24, 7)
        .bad_from(0.5, 2.0)
        .query(&format!("{} / ({} > 0)", grown("sum"), grown("count")), "{{phase}}"),
    ]
}

fn around() -> Vec<Panel> {
    let picked = "instance=~\"$instance\",vm=~\"$vm\"";
    vec![
        Panel::row("Around it"),
        Panel::lines(
            "Suspicion (phi)",
            "1: one chance in ten to be wrong about a failure; 2: one in a hundred. Peaks without a failover: a lossy or \
             congested heartbeat path.",
            "none",
        )
        .bad_from(4.0, 8.0)
        .query("understudy_peer_phi{instance=~\"$instance\"}", "{{instance}} of {{peer}}"),
        Panel::lines(
            "Time since the peer was heard",
            "Climbs from the moment a host is dead or cut off. If it climbs on both hosts, the network between them is \
             broken, not a host.",
            "s",
        )
        .bad_from(0.2, 1.0)
        .query("understudy_peer_silence_seconds{instance=~\"$instance\"}", "{{instance}} of {{peer}}"),
        Panel::lines(
            "Epochs per second",
            "Ends where the primary died or was cut off; begins again when the VM is protected again.",
            "ops",
        )
        .query(
            &format!("sum by (instance, vm) (rate(understudy_epochs_total{{{picked}}}[$__rate_interval]))"),
            "{{vm}} on {{instance}}",
        ),
        Panel::lines(
            "Questions to the witness",
            "By outcome. Each failover needs one that was granted. lost: no answer came, see whether the witness runs and \
             can be reached.",
            "ops",
        )
        .query(
            "sum by (instance, outcome) (rate(understudy_witness_request_seconds_count{instance=~\"$instance\"}[$__rate_interval]))",
            "{{instance}} {{outcome}}",
        ),
        Panel::lines(
            "Generation",
            "One step per change of who may run.",
            "none",
        )
        .query(&format!("understudy_vm_generation{{{picked}}}"), "{{vm}} on {{instance}}"),
        Panel::lines(
            "Age of the oldest held frame",
            "Climbs while a primary is mute because it does not know whether it still owns the VM. It is dropped at the \
             limit, never sent late.",
            "s",
        )
        .query(&format!("understudy_held_output_age_seconds{{{picked}}}"), "{{vm}} on {{instance}}"),
    ]
}
