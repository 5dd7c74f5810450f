//! The recording rules: what several panels and alerts need, and what would be slow to compute in each.

use super::{Recorded, state_code};

/// All of them.
#[must_use]
pub fn all() -> Vec<Recorded> {
    let p99 = |name: &str, more: &str| {
        format!("histogram_quantile(0.99, sum by (instance, job, vm, le) (rate({name}_bucket{more}[5m])))")
    };
    vec![
        Recorded {
            name: "instance_vm:understudy_vm_state:code",
            labels: &["instance", "job", "vm"],
            expr: state_code(),
        },
        // By the copy that runs: a standby calls itself protected while it holds a whole epoch.
        Recorded {
            name: "vm:understudy_vm_protected:max",
            labels: &["vm"],
            expr: "max by (vm) (\n  understudy_vm_state{state=\"protected\"}\n  and on (instance, vm) \
                   (understudy_vm_role{role=~\"primary|survivor\"} == 1)\n)"
                .to_owned(),
        },
        Recorded {
            name: "instance_vm:understudy_epochs:rate1m",
            labels: &["instance", "job", "vm"],
            expr: "sum by (instance, job, vm) (rate(understudy_epochs_total[1m]))".to_owned(),
        },
        Recorded {
            name: "instance_vm:understudy_epoch_pause_seconds:p99_5m",
            labels: &["instance", "job", "vm"],
            expr: p99("understudy_epoch_pause_seconds", "{part=\"total\"}"),
        },
        Recorded {
            name: "instance_vm:understudy_epoch_commit_seconds:p99_5m",
            labels: &["instance", "job", "vm"],
            expr: p99("understudy_epoch_commit_seconds", ""),
        },
    ]
}
