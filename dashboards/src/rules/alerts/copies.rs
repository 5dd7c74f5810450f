//! Whether each VM has a copy to go on with, and who runs it.

use crate::rules::{Alert, Case, Severity, failovers};

const A: &str = "understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\"";
const PRIMARY: (&str, &str) =
    ("understudy_vm_role{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",role=\"primary\"}", "1x200");
const STANDBY: (&str, &str) =
    ("understudy_vm_role{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",role=\"standby\"}", "1x200");
const PROTECTED: (&str, &str) =
    ("understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"protected\"}", "1x200");
const NOT_PROTECTED: (&str, &str) =
    ("understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"protected\"}", "0x200");
const DEGRADED: (&str, &str) =
    ("understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"degraded\"}", "1x200");
const UNPROTECTED: (&str, &str) =
    ("understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"unprotected\"}", "1x200");

/// A case of one VM whose state is `state` all the time.
fn in_state(name: &'static str, at: &'static str, state: &str) -> Case {
    let mut case = Case::new(name, at, &[PRIMARY]);
    case.series.push((format!("{A},state=\"{state}\"}}"), "1x200"));
    case
}

pub(super) fn alerts() -> Vec<Alert> {
    let here = [("job", "understudy"), ("instance", "a:9644"), ("vm", "web-1")];
    let state = |word| [here[0], here[1], here[2], ("state", word)];
    vec![
        Alert {
            name: "UnderstudyTwoOwners",
            severity: Severity::Critical,
            expr: "count by (vm) (\n  understudy_vm_role{role=~\"primary|survivor\"} == 1\n  and on (instance, vm) \
                   (understudy_vm_state{state=~\"pairing|syncing|protected|degraded\"} == 1)\n) > 1"
                .to_owned(),
            hold: "30s",
            summary: "Two hosts say that they run {{ $labels.vm }}",
            description: "Two agents report a running copy of one VM that is neither fenced nor failing over.",
            cases: vec![
                Case::new("both run", "3m", &[
                    PRIMARY,
                    DEGRADED,
                    ("understudy_vm_role{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",role=\"survivor\"}", "1x200"),
                    ("understudy_vm_state{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",state=\"degraded\"}", "1x200"),
                ])
                .fires(&[("vm", "web-1")]),
                Case::new("the loser is fenced", "3m", &[
                    PRIMARY,
                    ("understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"fenced\"}", "1x200"),
                    ("understudy_vm_role{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",role=\"survivor\"}", "1x200"),
                    ("understudy_vm_state{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",state=\"degraded\"}", "1x200"),
                ]),
                Case::new("a pair", "3m", &[PRIMARY, PROTECTED, STANDBY]),
            ],
        },
        Alert {
            name: "UnderstudyVmError",
            severity: Severity::Critical,
            expr: "understudy_vm_state{state=\"error\"} == 1".to_owned(),
            hold: "0s",
            summary: "{{ $labels.vm }} on {{ $labels.instance }} needs an operator",
            description: "The agent stopped working on this copy because of an error that it cannot mend.",
            cases: vec![
                in_state("error", "1m", "error").fires(&state("error")),
                Case::new("no error", "1m", &[PRIMARY, PROTECTED]),
            ],
        },
        Alert {
            name: "UnderstudyFailoverStalled",
            severity: Severity::Critical,
            expr: "understudy_vm_state{state=\"failing-over\"} == 1".to_owned(),
            hold: "30s",
            summary: "{{ $labels.vm }} on {{ $labels.instance }} waits for who may run it",
            description: "Neither the peer nor the witness answers: the VM stalls until one of them does.",
            cases: vec![
                in_state("stalled", "2m", "failing-over").fires(&state("failing-over")),
                Case::new("over in time", "2m", &[
                    PRIMARY,
                    (
                        "understudy_vm_state{job=\"understudy\",instance=\"a:9644\",vm=\"web-1\",state=\"failing-over\"}",
                        "0 0 1 0x200",
                    ),
                ]),
            ],
        },
        Alert {
            name: "UnderstudyVmUnprotected",
            severity: Severity::Critical,
            expr: "vm:understudy_vm_protected:max == 0\nand on (vm) (max by (vm) \
                   (understudy_vm_state{state=~\"pairing|syncing|degraded|failing-over|error\"}) == 1)"
                .to_owned(),
            hold: "2m",
            summary: "{{ $labels.vm }} would be lost with its host",
            description: "No standby holds a whole copy. A VM that an operator unprotected is not meant.",
            cases: vec![
                Case::new("degraded", "5m", &[PRIMARY, NOT_PROTECTED, DEGRADED]).fires(&[("vm", "web-1")]),
                Case::new("protected", "5m", &[PRIMARY, PROTECTED]),
                Case::new("by an operator's wish", "5m", &[PRIMARY, NOT_PROTECTED, UNPROTECTED]),
                Case::new("for a moment", "5m", &[
                    PRIMARY,
                    (PROTECTED.0, "1x10 0x3 1x200"),
                    (DEGRADED.0, "0x10 1x3 0x200"),
                ]),
            ],
        },
        Alert {
            name: "UnderstudyStandbyMissing",
            severity: Severity::Critical,
            expr: "(\n  understudy_vm_state{state=\"protected\"} == 1\n  and on (instance, vm) \
                   (understudy_vm_role{role=\"primary\"} == 1)\n)\nunless on (vm) (understudy_vm_role{role=\"standby\"} == 1)"
                .to_owned(),
            hold: "1m",
            summary: "No host reports the standby of {{ $labels.vm }}",
            description: "The primary says protected, but no agent that Prometheus reaches has the copy.",
            cases: vec![
                Case::new("no standby", "3m", &[PRIMARY, PROTECTED]).fires(&state("protected")),
                Case::new("a standby", "3m", &[PRIMARY, PROTECTED, STANDBY]),
            ],
        },
        Alert {
            name: "UnderstudySyncSlow",
            severity: Severity::Warning,
            expr: "understudy_vm_state{state=\"syncing\"} == 1".to_owned(),
            hold: "15m",
            summary: "The first copy of {{ $labels.vm }} does not come to an end",
            description: "The initial synchronisation has taken a quarter of an hour; until it ends the VM is not protected.",
            cases: vec![
                in_state("slow", "20m", "syncing").fires(&state("syncing")),
                in_state("under way", "5m", "syncing"),
            ],
        },
        Alert {
            name: "UnderstudyRehearsalFailed",
            severity: Severity::Critical,
            expr: "understudy_rehearsal_timestamp_seconds{outcome=\"fails\"}\n> ignoring (outcome) \
                   understudy_rehearsal_timestamp_seconds{outcome=\"loads\"}\nand on (instance, vm) \
                   (understudy_vm_role{role=\"standby\"} == 1)"
                .to_owned(),
            hold: "0s",
            summary: "The copy of {{ $labels.vm }} on {{ $labels.instance }} did not load",
            description: "The last rehearsal failed: a failover would most likely fail too.",
            cases: vec![
                Case::new("failed last", "2m", &[
                    STANDBY,
                    (LOADS, "100x200"),
                    (FAILS, "200x200"),
                ])
                .fires(&[("job", "understudy"), ("instance", "b:9644"), ("vm", "web-1")]),
                Case::new("loaded since", "2m", &[STANDBY, (LOADS, "300x200"), (FAILS, "200x200")]),
                Case::new("not a standby any more", "2m", &[(LOADS, "100x200"), (FAILS, "200x200")]),
            ],
        },
        Alert {
            name: "UnderstudyRehearsalOld",
            severity: Severity::Warning,
            expr: "time() - (understudy_rehearsal_timestamp_seconds{outcome=\"loads\"} != 0) > 7 * 86400\nand on \
                   (instance, vm) (understudy_vm_role{role=\"standby\"} == 1)"
                .to_owned(),
            hold: "0s",
            summary: "The copy of {{ $labels.vm }} was last rehearsed more than a week ago",
            description: "Nobody knows whether the copy still loads; it is cheap to find out.",
            cases: vec![
                // Times before 1970, so that a week has passed without simulating one.
                Case::new("a week ago", "2m", &[STANDBY, (LOADS, "-604800x200"), (FAILS, "0x200")]).fires(&[
                    ("job", "understudy"),
                    ("instance", "b:9644"),
                    ("vm", "web-1"),
                    ("outcome", "loads"),
                ]),
                Case::new("since then", "2m", &[STANDBY, (LOADS, "-600000x200"), (FAILS, "0x200")]),
                Case::new("never yet", "2m", &[STANDBY, (LOADS, "0x200"), (FAILS, "0x200")]),
            ],
        },
        Alert {
            name: "UnderstudyFailover",
            severity: Severity::Info,
            expr: failovers("", "10m"),
            hold: "0s",
            summary: "{{ $labels.vm }} went on on {{ $labels.instance }}: {{ $labels.cause }}",
            description: "A failover happened in the last ten minutes. Clients saw a pause of a fraction of a second.",
            cases: vec![
                Case::new("a failover", "5m", &[(FAILOVERS, "0x8 1x200")]).fires(&[
                    ("job", "understudy"),
                    ("instance", "b:9644"),
                    ("vm", "web-1"),
                    ("cause", "silence"),
                ]),
                Case::new("a failover before its agent was first scraped", "15m", &[(UP, "1x200"), (FAILOVERS, "_x50 1x200")])
                    .fires(&[("job", "understudy"), ("instance", "b:9644"), ("vm", "web-1"), ("cause", "silence")]),
                Case::new("one that happened before Prometheus started", "15m", &[(UP, "_x50 1x200"), (FAILOVERS, "_x50 1x200")]),
                Case::new("a VM that was never failed over, new", "15m", &[(UP, "1x200"), (FAILOVERS, "_x50 0x200")]),
                Case::new("long ago", "30m", &[(FAILOVERS, "0x8 1x200")]),
                Case::new("long ago, and its host was not reached since", "45m", &[
                    (UP, "1x119 0x39 1x100"),
                    (FAILOVERS, "0x8 1x110 stale _x39 1x100"),
                ]),
            ],
        },
    ]
}

const UP: &str = "up{job=\"understudy\",instance=\"b:9644\"}";
const FAILOVERS: &str =
    "understudy_failovers_total{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",cause=\"silence\"}";
const LOADS: &str =
    "understudy_rehearsal_timestamp_seconds{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",outcome=\"loads\"}";
const FAILS: &str =
    "understudy_rehearsal_timestamp_seconds{job=\"understudy\",instance=\"b:9644\",vm=\"web-1\",outcome=\"fails\"}";
