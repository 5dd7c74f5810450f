//! Whether epochs are committed in time, and what waits for them.

use crate::rules::{Alert, Case, Severity};

const LAG: &str = "understudy_replication_lag_seconds{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const EPOCHS: &str = "understudy_epochs_total{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const STATE: &str = "understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"protected\"}";
const ROLE: &str = "understudy_vm_role{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",role=\"primary\"}";
const HELD: &str = "understudy_held_output_bytes{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const HELD_MOST: &str = "understudy_held_output_limit_bytes{job=\"understudy\",instance=\"a:9644\"}";
const AGE: &str = "understudy_held_output_age_seconds{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const AGE_MOST: &str = "understudy_held_output_limit_seconds{job=\"understudy\",instance=\"a:9644\"}";
const DROPPED: &str = "understudy_output_dropped_frames_total{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const JOURNAL: &str = "understudy_disk_journal_bytes{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const JOURNAL_MOST: &str = "understudy_disk_journal_limit_bytes{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const CLOCK: &str = "understudy_guest_clock_lag_seconds_total{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"}";
const FAST: &str =
    "understudy_epoch_commit_seconds_bucket{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",le=\"0.01\"}";
const SLOW: &str =
    "understudy_epoch_commit_seconds_bucket{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",le=\"0.5\"}";
const ANY: &str =
    "understudy_epoch_commit_seconds_bucket{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",le=\"+Inf\"}";

pub(super) fn alerts() -> Vec<Alert> {
    let here = [("job", "understudy"), ("instance", "a:9644"), ("vm", "web-1")];
    vec![
        Alert {
            name: "UnderstudyCommitsStalled",
            severity: Severity::Critical,
            expr: "instance_vm:understudy_epochs:rate1m == 0\nand on (instance, vm) \
                   (understudy_vm_state{state=\"protected\"} == 1)\nand on (instance, vm) \
                   (understudy_vm_role{role=\"primary\"} == 1)"
                .to_owned(),
            hold: "15s",
            summary: "{{ $labels.vm }} on {{ $labels.instance }} commits nothing",
            description: "No epoch was committed for a minute while the VM is said to be protected: clients get no answer.",
            cases: vec![
                Case::new("no epochs", "5m", &[(EPOCHS, "100x200"), (STATE, "1x200"), (ROLE, "1x200")]).fires(&here),
                Case::new("epochs", "5m", &[(EPOCHS, "0+900x200"), (STATE, "1x200"), (ROLE, "1x200")]),
                Case::new("not protected", "5m", &[(EPOCHS, "100x200"), (STATE, "0x200"), (ROLE, "1x200")]),
            ],
        },
        Alert {
            name: "UnderstudyReplicationLag",
            severity: Severity::Warning,
            expr: "understudy_replication_lag_seconds > 1".to_owned(),
            hold: "15s",
            summary: "The copy of {{ $labels.vm }} is more than a second old",
            description: "The standby acknowledges late; a failover now would do again what the VM did since.",
            cases: vec![
                Case::new("late", "2m", &[(LAG, "3x200")]).fires(&here),
                Case::new("in time", "2m", &[(LAG, "0.02x200")]),
            ],
        },
        Alert {
            name: "UnderstudyCommitSlow",
            severity: Severity::Warning,
            expr: "instance_vm:understudy_epoch_commit_seconds:p99_5m > 0.1".to_owned(),
            hold: "5m",
            summary: "Output of {{ $labels.vm }} waits more than a tenth of a second for its commit",
            description: "One commit in a hundred takes longer than 100 ms: clients feel it.",
            cases: vec![
                Case::new("slow", "15m", &[(FAST, "0+50x200"), (SLOW, "0+100x200"), (ANY, "0+100x200")]).fires(&here),
                Case::new("fast", "15m", &[(FAST, "0+100x200"), (SLOW, "0+100x200"), (ANY, "0+100x200")]),
            ],
        },
        Alert {
            name: "UnderstudyHeldOutputNearLimit",
            severity: Severity::Warning,
            expr: "understudy_held_output_bytes / on (instance) group_left () understudy_held_output_limit_bytes > 0.5\nor \
                   understudy_held_output_age_seconds / on (instance) group_left () understudy_held_output_limit_seconds > 0.5"
                .to_owned(),
            hold: "0s",
            summary: "Held output of {{ $labels.vm }} on {{ $labels.instance }} nears its limit",
            description: "More than half of what may be held, by size or by age. Beyond the limit frames are dropped.",
            cases: vec![
                Case::new("large", "1m", &[(HELD, "60x200"), (HELD_MOST, "100x200"), (AGE, "0x200"), (AGE_MOST, "5x200")])
                    .fires(&here),
                Case::new("old", "1m", &[(HELD, "1x200"), (HELD_MOST, "100x200"), (AGE, "4x200"), (AGE_MOST, "5x200")])
                    .fires(&here),
                Case::new("little", "1m", &[(HELD, "9x200"), (HELD_MOST, "100x200"), (AGE, "0x200"), (AGE_MOST, "5x200")]),
            ],
        },
        Alert {
            name: "UnderstudyJournalFilling",
            severity: Severity::Warning,
            expr: "understudy_disk_journal_bytes / understudy_disk_journal_limit_bytes > 0.8".to_owned(),
            hold: "15s",
            summary: "The journal of the disks of {{ $labels.vm }} on {{ $labels.instance }} is nearly full",
            description: "The standby's disk does not keep up; epochs, and with them the VM's output, are about to wait for it.",
            cases: vec![
                Case::new("full", "2m", &[(JOURNAL, "90x200"), (JOURNAL_MOST, "100x200")]).fires(&here),
                Case::new("half full", "2m", &[(JOURNAL, "50x200"), (JOURNAL_MOST, "100x200")]),
            ],
        },
        Alert {
            name: "UnderstudyOutputDropped",
            severity: Severity::Warning,
            expr: "increase(understudy_output_dropped_frames_total[5m]) > 0".to_owned(),
            hold: "1m",
            summary: "Frames of {{ $labels.vm }} were dropped on {{ $labels.instance }}",
            description: "The gate was at its limit, or this copy lost ownership. Clients send again.",
            cases: vec![
                Case::new("dropped", "5m", &[(DROPPED, "0x6 7x200")]).fires(&here),
                Case::new("none", "5m", &[(DROPPED, "7x200")]),
            ],
        },
        Alert {
            name: "UnderstudyGuestClockLosing",
            severity: Severity::Warning,
            expr: "rate(understudy_guest_clock_lag_seconds_total[5m]) > 0.3".to_owned(),
            hold: "10m",
            summary: "The clock of {{ $labels.vm }} loses more than 30 percent",
            description: "The guest stands for almost a third of the time, and its clock with it.",
            cases: vec![
                Case::new("much", "20m", &[(CLOCK, "0+6x200")]).fires(&here),
                Case::new("little", "20m", &[(CLOCK, "0+0.6x200")]),
            ],
        },
    ]
}
