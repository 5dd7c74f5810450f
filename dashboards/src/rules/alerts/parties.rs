//! Whether agents, peers and the witness are there.

use crate::rules::{Alert, Case, Severity};

const UP: &str = "up{job=\"understudy\",instance=\"a:9644\"}";
const SILENCE: &str = "understudy_peer_silence_seconds{job=\"understudy\",instance=\"a:9644\",peer=\"host-b\"}";
const PATHS: [&str; 2] = [
    "understudy_peer_path_up{job=\"understudy\",instance=\"a:9644\",peer=\"host-b\",path=\"0\"}",
    "understudy_peer_path_up{job=\"understudy\",instance=\"a:9644\",peer=\"host-b\",path=\"1\"}",
];
const WITNESS: &str = "understudy_witness_reachable{job=\"understudy\",instance=\"a:9644\",witness=\"w\"}";

pub(super) fn alerts() -> Vec<Alert> {
    let here = [("job", "understudy"), ("instance", "a:9644")];
    vec![
        Alert {
            name: "UnderstudyAgentDown",
            severity: Severity::Critical,
            expr: "up{job=\"understudy\"} == 0".to_owned(),
            hold: "30s",
            summary: "The agent {{ $labels.instance }} does not answer",
            description: "Prometheus cannot reach it: the host, the agent or the network between is gone.",
            cases: vec![
                Case::new("down", "2m", &[(UP, "0x200")]).fires(&here),
                Case::new("up", "2m", &[(UP, "1x200")]),
                Case::new("one scrape failed", "2m", &[(UP, "1 1 0 1x200")]),
            ],
        },
        Alert {
            name: "UnderstudyWitnessUnreachable",
            severity: Severity::Critical,
            expr: "understudy_witness_reachable == 0".to_owned(),
            hold: "30s",
            summary: "The witness {{ $labels.witness }} does not answer {{ $labels.instance }}",
            description: "No failover happens without it: a VM whose host dies now stalls until it answers.",
            cases: vec![
                Case::new("gone", "2m", &[(WITNESS, "0x200")]).fires(&[here[0], here[1], ("witness", "w")]),
                Case::new("there", "2m", &[(WITNESS, "1x200")]),
            ],
        },
        Alert {
            name: "UnderstudyPeerSilent",
            severity: Severity::Warning,
            expr: "understudy_peer_silence_seconds > 1".to_owned(),
            hold: "10s",
            summary: "{{ $labels.instance }} does not hear {{ $labels.peer }}",
            description: "No heartbeat for more than a second: the peer is dead or cut off, and protects nothing.",
            cases: vec![
                Case::new("silent", "2m", &[(SILENCE, "2+15x200")]).fires(&[here[0], here[1], ("peer", "host-b")]),
                Case::new("heard", "2m", &[(SILENCE, "0.03x200")]),
            ],
        },
        Alert {
            name: "UnderstudyPathDown",
            severity: Severity::Warning,
            expr: "understudy_peer_path_up == 0 and on (instance, peer) max by (instance, peer) (understudy_peer_path_up) == 1"
                .to_owned(),
            hold: "30s",
            summary: "{{ $labels.instance }} does not hear {{ $labels.peer }} on path {{ $labels.path }}",
            description: "It is heard on another path, so nothing fails over; but one more link that fails may look like a dead host.",
            cases: vec![
                Case::new("one of two", "2m", &[(PATHS[0], "1x200"), (PATHS[1], "1 0x200")]).fires(&[
                    here[0],
                    here[1],
                    ("peer", "host-b"),
                    ("path", "1"),
                ]),
                Case::new("both, which is a silent peer", "2m", &[(PATHS[0], "0x200"), (PATHS[1], "0x200")]),
                Case::new("none", "2m", &[(PATHS[0], "1x200"), (PATHS[1], "1x200")]),
                Case::new("a moment", "2m", &[(PATHS[0], "1x200"), (PATHS[1], "1 0 1x200")]),
            ],
        },
        Alert {
            name: "UnderstudyVersionsDiffer",
            severity: Severity::Info,
            expr: "count(count by (version) (understudy_build_info)) > 1".to_owned(),
            hold: "30m",
            summary: "Agents of different versions run",
            description: "Fine while you upgrade; a pair that stays mixed is not what was tested.",
            cases: vec![
                Case::new(
                    "two versions",
                    "35m",
                    &[
                        ("understudy_build_info{job=\"understudy\",instance=\"a:9644\",version=\"0.1.0\"}", "1x200"),
                        ("understudy_build_info{job=\"understudy\",instance=\"b:9644\",version=\"0.2.0\"}", "1x200"),
                    ],
                )
                .fires(&[]),
                Case::new(
                    "one version",
                    "35m",
                    &[
                        ("understudy_build_info{job=\"understudy\",instance=\"a:9644\",version=\"0.1.0\"}", "1x200"),
                        ("understudy_build_info{job=\"understudy\",instance=\"b:9644\",version=\"0.1.0\"}", "1x200"),
                    ],
                ),
            ],
        },
    ]
}
