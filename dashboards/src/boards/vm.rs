//! One VM: what protection costs it, and how far behind its copy is.

use super::{buckets, quantile, roles, states, with_marks, with_vms};
use crate::grafana::{Dashboard, Panel};

pub(super) fn board() -> Dashboard {
    let board = Dashboard::new(
        "understudy-vm",
        "Understudy: one VM",
        "Epochs, pauses, lag, held output and traffic of the chosen VMs.",
    );
    let all = [
        vec![Panel::row("State"), states(), roles()],
        state(),
        epochs(),
        pause(),
        commit(),
        held(),
        bytes(),
        disks(),
        copy(),
    ];
    with_marks(with_vms(board)).panels(all.into_iter().flatten())
}

/// `name{picked}`.
fn picked(name: &str) -> String {
    format!("{name}{{instance=~\"$instance\",vm=~\"$vm\"}}")
}

fn rate(name: &str, by: &str) -> String {
    format!("sum by ({by}) (rate({}[$__rate_interval]))", picked(name))
}

fn state() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Generation",
            "Grows with each change of who may run. A step without a failover or a planned move that you know of: read the \
             agents' logs of that moment.",
            "none",
        )
        .query(&picked("understudy_vm_generation"), "{{vm}} on {{instance}}"),
        Panel::lines(
            "Last committed epoch",
            "Primary and standby count together. A standby that stays behind, or two flat lines while the VM is protected: \
             commits are stalled, look at lag and at the peer's heartbeats.",
            "none",
        )
        .query(&picked("understudy_epoch_committed"), "{{vm}} on {{instance}}"),
    ]
}

fn epochs() -> Vec<Panel> {
    let length = "understudy_epoch_seconds";
    let dirty = "understudy_epoch_dirty_pages";
    vec![
        Panel::row("Epochs"),
        Panel::lines(
            "Epochs per second",
            "Committed epochs. Zero while protected: commits are stalled.",
            "ops",
        )
        .query(&rate("understudy_epochs_total", "vm"), "{{vm}}"),
        Panel::lines(
            "Length of an epoch",
            "From one pause to the next. Long epochs mean that the standby does not keep up (back-pressure) or that nothing \
             waits to leave; with `--epoch` you choose.",
            "s",
        )
        .bad_from(0.25, 1.0)
        .query(&quantile(0.5, length, "vm"), "{{vm}} p50")
        .query(&quantile(0.99, length, "vm"), "{{vm}} p99"),
        Panel::heat(
            "Lengths of epochs",
            "Each column shows how epochs' lengths are spread. A second band at the top: epochs that had to wait for the \
             standby.",
            "s",
            &buckets(length, ""),
        )
        .plain(),
        Panel::heat(
            "Dirty pages per epoch",
            "Pages that the guest wrote in an epoch. A band that climbs explains longer pauses and more traffic: look for a \
             new load in the guest.",
            "none",
            &buckets(dirty, ""),
        )
        .plain(),
    ]
}

fn pause() -> Vec<Panel> {
    let name = "understudy_epoch_pause_seconds";
    let part = |suffix: &str| {
        format!(
            "sum by (part) (rate({name}_{suffix}{{instance=~\"$instance\",vm=~\"$vm\",part!=\"total\"}}[$__rate_interval]))"
        )
    };
    vec![
        Panel::row("Pause"),
        Panel::heat(
            "Pauses",
            "How long the guest stands for an epoch. One narrow band is good. A tail at the top: look at the split for the \
             part that grew.",
            "s",
            &buckets(name, ",part=\"total\""),
        )
        .plain(),
        Panel::lines(
            "Where the pause goes",
            "Mean by part. stop grows with unflushed disk data and a busy host, harvest and copy with memory and dirty \
             pages, device with the number of devices, resume with a busy host. Parts may overlap.",
            "s",
        )
        .stacked()
        .query(&format!("{} / {}", part("sum"), part("count")), "{{part}}"),
        Panel::lines(
            "Part of the time that the guest stands",
            "Over the last 1024 epochs. It is bounded by the policy; above 0.25 for long: choose a longer epoch or move load \
             away.",
            "percentunit",
        )
        .bad_from(0.1, 0.3)
        .query(&picked("understudy_guest_pause_share_ratio"), "{{vm}} on {{instance}}"),
        Panel::lines(
            "What the guest's clock loses",
            "Seconds per second that the guest's clock falls behind unless something in the guest sets it right. Run chrony \
             in the guest; if it cannot follow, choose longer epochs.",
            "s",
        )
        .bad_from(0.1, 0.3)
        .query(&rate("understudy_guest_clock_lag_seconds_total", "vm"), "{{vm}}"),
    ]
}

fn commit() -> Vec<Panel> {
    let name = "understudy_epoch_commit_seconds";
    vec![
        Panel::row("Commit and lag"),
        Panel::lines(
            "Commit latency",
            "From the end of a pause until the standby's acknowledgement was read: what each answer of the guest waits in \
             addition. Grows with the round trip, with traffic and with a busy standby.",
            "s",
        )
        .bad_from(0.02, 0.1)
        .query(&quantile(0.5, name, "vm"), "{{vm}} p50")
        .query(&quantile(0.99, name, "vm"), "{{vm}} p99"),
        Panel::heat(
            "Commits",
            "How commit latencies are spread. A second band: some epochs meet a queue, on the link or on the standby.",
            "s",
            &buckets(name, ""),
        )
        .plain(),
        Panel::lines(
            "Replication lag",
            "The age of the copy that the standby could go on with. Nothing that left the VM is lost at a failover, but what \
             it did in this time is done again. Above a second: see commits and the peer's heartbeats.",
            "s",
        )
        .bad_from(0.5, 2.0)
        .query(&picked("understudy_replication_lag_seconds"), "{{vm}} on {{instance}}"),
    ]
}

fn held() -> Vec<Panel> {
    vec![
        Panel::row("Held output"),
        Panel::lines(
            "Bytes held",
            "Frames that wait for their epoch's acknowledgement. Near the limit they are dropped: the guest sends faster \
             than the standby acknowledges. See commits; raise `gate.bytes` if bursts are normal.",
            "bytes",
        )
        .query(&picked("understudy_held_output_bytes"), "{{vm}} on {{instance}}")
        .query("understudy_held_output_limit_bytes{instance=~\"$instance\"}", "limit of {{instance}}"),
        Panel::lines("Frames held", "The same in frames. See bytes held.", "none")
            .query(&picked("understudy_held_output_frames"), "{{vm}} on {{instance}}"),
        Panel::lines(
            "Age of the oldest held frame",
            "What a client waits at least. A line that climbs: nothing is acknowledged, the VM stalls for its clients. See \
             the states and whether the witness answers.",
            "s",
        )
        .query(&picked("understudy_held_output_age_seconds"), "{{vm}} on {{instance}}")
        .query("understudy_held_output_limit_seconds{instance=~\"$instance\"}", "limit of {{instance}}"),
        Panel::lines(
            "Frames released and dropped",
            "Dropped frames are lost packets to a client, which sends again. Some at a failover are normal; many while \
             protected: the gate is at its limit.",
            "pps",
        )
        .query(&rate("understudy_output_released_frames_total", "vm"), "{{vm}} released")
        .query(&rate("understudy_output_dropped_frames_total", "vm"), "{{vm}} dropped"),
    ]
}

fn bytes() -> Vec<Panel> {
    vec![
        Panel::row("Traffic"),
        Panel::lines(
            "Bytes by encoding",
            "How pages and device state were encoded. Much raw: the shadow is too small or off (`--shadow`), or the guest \
             writes what does not compress.",
            "Bps",
        )
        .stacked()
        .query(&rate("understudy_epoch_encoded_bytes_total", "encoding"), "{{encoding}}"),
        Panel::lines(
            "Bytes on the wire",
            "What committed epochs gave to the network. Near the link's capacity: a link of its own for replication.",
            "Bps",
        )
        .query(&rate("understudy_epoch_wire_bytes_total", "vm"), "{{vm}}"),
    ]
}

fn disks() -> Vec<Panel> {
    let hold = "understudy_disk_hold_seconds";
    vec![
        Panel::row("Disks on the standby"),
        Panel::lines(
            "Until disk writes are held",
            "What the standby's disk adds to each commit: journaling an epoch's disk writes, until they are durable unless \
             `--durability memory` was chosen. Slow: a faster disk for the standby's images and journal, or one of its own.",
            "s",
        )
        .bad_from(0.02, 0.1)
        .query(&quantile(0.5, hold, "vm"), "{{vm}} p50")
        .query(&quantile(0.99, hold, "vm"), "{{vm}} p99"),
        Panel::lines(
            "Disk writes held",
            "What the guest writes to its disks, as it comes to the standby.",
            "Bps",
        )
        .query(&rate("understudy_disk_held_bytes_total", "vm"), "{{vm}}"),
        Panel::lines(
            "Journal",
            "Epochs whose disk writes are not yet surely in the images. Near the limit the standby's disk does not keep up, and \
             epochs wait for room.",
            "bytes",
        )
        .query(&picked("understudy_disk_journal_bytes"), "{{vm}} on {{instance}}")
        .query(&picked("understudy_disk_journal_limit_bytes"), "limit of {{vm}}"),
    ]
}

fn copy() -> Vec<Panel> {
    vec![
        Panel::row("Synchronisation and rehearsal"),
        Panel::lines(
            "Pages of the initial synchronisation",
            "Sent and to be sent in the present round. If the rounds do not become smaller, the guest writes faster than the \
             link carries.",
            "none",
        )
        .query(&picked("understudy_sync_done_pages"), "{{vm}} sent")
        .query(&picked("understudy_sync_total_pages"), "{{vm}} of"),
        Panel::lines(
            "Round of the initial synchronisation",
            "From 1; 0 when it is done. Many rounds: see the pages beside it.",
            "none",
        )
        .query(&picked("understudy_sync_round"), "{{vm}} on {{instance}}"),
        Panel::stat(
            "Since the last good rehearsal",
            "How long ago the standby last proved that its copy loads. Old: `understudy rehearse VM`.",
            "s",
        )
        .size(12, 5)
        .bad_from(604_800.0, 1_209_600.0)
        .or_say("no standby here")
        .now(
            "time() - (understudy_rehearsal_timestamp_seconds{instance=~\"$instance\",vm=~\"$vm\",outcome=\"loads\"} > 0)",
            "{{vm}} on {{instance}}",
        ),
        Panel::stat(
            "Last rehearsal failed",
            "1: the copy did not load when it was last tried, and a failover would fail. The standby's log says why; \
             `understudy rehearse VM` tries again.",
            "none",
        )
        .size(12, 5)
        .bad_from(1.0, 1.0)
        .or_say("no standby here")
        .now(
            "understudy_rehearsal_timestamp_seconds{instance=~\"$instance\",vm=~\"$vm\",outcome=\"fails\"} > bool ignoring \
             (outcome) understudy_rehearsal_timestamp_seconds{instance=~\"$instance\",vm=~\"$vm\",outcome=\"loads\"}",
            "{{vm}} on {{instance}}",
        ),
    ]
}
