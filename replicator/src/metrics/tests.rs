use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use vmm_hooks::guest::PauseParts;

use super::*;
use crate::control::api::{
    EncodedBytes, FailoverReport, GuestClock, HeldOutput, ProtectionState, Role, Suspicion, SyncProgress,
};
use crate::status::EpochObservation;

fn epoch(n: u64) -> EpochObservation {
    EpochObservation {
        epoch: n,
        length: Duration::from_millis(25),
        pause: PauseParts {
            stop: Duration::from_micros(200),
            total: Duration::from_millis(2),
            ..PauseParts::default()
        },
        commit: Duration::from_millis(3),
        dirty_pages: 300,
        bytes: EncodedBytes { delta: 1_000, raw: 4_096, ..EncodedBytes::default() },
        wire_bytes: 6_000,
    }
}

/// Everything that can be observed, observed.
fn all() -> Metrics {
    let metrics = Metrics::new();
    let vm = metrics.vm("web-1");
    vm.set_role(Role::Primary);
    vm.set_generation(3);
    vm.set_state(&ProtectionState::Syncing(SyncProgress { done_pages: 5, total_pages: 9, round: 2 }));
    vm.observe_epoch(&epoch(7));
    vm.set_held(&HeldOutput { frames: 2, bytes: 120, oldest_ms: 1.5, released: 10, dropped: 3 });
    vm.set_guest_clock(&GuestClock { lag_seconds: 1.5, pause_share: 0.08 });
    vm.observe_failover(&FailoverReport::example());
    vm.observe_disks_held(Duration::from_millis(3), 4096);
    vm.set_disk_journal(4608, 1 << 20);
    vm.set_replication_lag(Duration::from_millis(40));
    vm.rehearsed(true);
    metrics.set_held_limits(1 << 20, Duration::from_secs(5));
    let peer = metrics.peer("host-b");
    peer.set_suspicion(&Suspicion::new(0.5, 12.0, false));
    peer.set_rtt(Duration::from_micros(250));
    let path = metrics.path("host-b", 1);
    path.set(&Suspicion::new(0.75, 14.0, false), true);
    path.set_rtt(Duration::from_micros(350));
    path.sent(4);
    path.received(3);
    let witness = metrics.witness("w");
    witness.observe(WitnessOutcome::Granted, Duration::from_millis(2));
    witness.set_reachable(true);
    metrics.fenced(FenceOutcome::Confirmed, Duration::from_secs(3));
    metrics
}

/// The value of a series as exported, or `None` if it is not.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn every_family_is_written_somewhere() {
    let metrics = all();
    // A family without series is not gathered, so what is defined is counted at the registry's other end.
    let gathered: BTreeSet<String> = metrics.registry.gather().iter().map(|f| f.name().to_owned()).collect();
    let described: BTreeSet<String> = families().into_iter().map(|family| family.name).collect();
    assert_eq!(gathered, described);
    let text = metrics.encode();
    for name in &gathered {
        assert!(name.starts_with("understudy_"), "{name}");
        let lines = text.lines().filter(|line| line.starts_with(name.as_str()));
        let written =
            lines.filter_map(|line| line.rsplit(' ').next()).any(|number| number.parse::<f64>().unwrap() != 0.0);
        assert!(written, "{name} is 0 in all of its series");
    }
}

#[test]
fn an_epoch_is_counted_in_base_units() {
    let text = all().encode();
    for (series, expected) in [
        ("understudy_epochs_total{vm=\"web-1\"}", 1.0),
        ("understudy_epoch_committed{vm=\"web-1\"}", 7.0),
        ("understudy_epoch_seconds_sum{vm=\"web-1\"}", 0.025),
        ("understudy_epoch_pause_seconds_sum{part=\"stop\",vm=\"web-1\"}", 0.000_2),
        ("understudy_epoch_pause_seconds_sum{part=\"total\",vm=\"web-1\"}", 0.002),
        ("understudy_guest_clock_lag_seconds_total{vm=\"web-1\"}", 1.5),
        ("understudy_guest_pause_share_ratio{vm=\"web-1\"}", 0.08),
        ("understudy_epoch_commit_seconds_sum{vm=\"web-1\"}", 0.003),
        ("understudy_epoch_dirty_pages_sum{vm=\"web-1\"}", 300.0),
        ("understudy_epoch_encoded_bytes_total{encoding=\"delta\",vm=\"web-1\"}", 1_000.0),
        ("understudy_epoch_encoded_bytes_total{encoding=\"lz4\",vm=\"web-1\"}", 0.0),
        ("understudy_epoch_wire_bytes_total{vm=\"web-1\"}", 6_000.0),
        ("understudy_held_output_age_seconds{vm=\"web-1\"}", 0.001_5),
        ("understudy_failovers_total{cause=\"silence\",vm=\"web-1\"}", 1.0),
        ("understudy_failover_phase_seconds_sum{phase=\"activation\",vm=\"web-1\"}", 0.032),
        ("understudy_replication_lag_seconds{vm=\"web-1\"}", 0.04),
        ("understudy_rehearsal_timestamp_seconds{outcome=\"fails\",vm=\"web-1\"}", 0.0),
        ("understudy_held_output_limit_bytes", 1_048_576.0),
        ("understudy_held_output_limit_seconds", 5.0),
        ("understudy_failovers_total{cause=\"planned\",vm=\"web-1\"}", 0.0),
        ("understudy_witness_request_seconds_count{outcome=\"lost\",witness=\"w\"}", 0.0),
        ("understudy_witness_reachable{witness=\"w\"}", 1.0),
        ("understudy_sync_done_pages{vm=\"web-1\"}", 5.0),
        ("understudy_peer_silence_seconds{peer=\"host-b\"}", 0.012),
        ("understudy_peer_path_up{path=\"1\",peer=\"host-b\"}", 1.0),
        ("understudy_peer_path_silence_seconds{path=\"1\",peer=\"host-b\"}", 0.014),
        ("understudy_heartbeats_received_total{path=\"1\",peer=\"host-b\"}", 3.0),
    ] {
        assert_eq!(value(&text, series), Some(expected), "{series}");
    }
}

#[test]
fn a_vm_is_in_one_state_at_a_time() {
    let metrics = Metrics::new();
    let vm = metrics.vm("web-1");
    for state in [ProtectionState::Pairing, ProtectionState::Protected, ProtectionState::Fenced] {
        vm.set_state(&state);
        let text = metrics.encode();
        for word in ProtectionState::WORDS {
            let series = format!("understudy_vm_state{{state=\"{word}\",vm=\"web-1\"}}");
            assert_eq!(value(&text, &series), Some(f64::from(u8::from(word == state.word()))), "{series}");
        }
        assert_eq!(value(&text, "understudy_sync_round{vm=\"web-1\"}"), Some(0.0));
    }
}

#[test]
fn a_gates_totals_become_steps_also_when_it_is_made_anew() {
    let metrics = Metrics::new();
    let vm = metrics.vm("web-1");
    for (released, dropped) in [(10, 1), (15, 1), (4, 2)] {
        vm.set_held(&HeldOutput { released, dropped, ..HeldOutput::default() });
    }
    let text = metrics.encode();
    assert_eq!(value(&text, "understudy_output_released_frames_total{vm=\"web-1\"}"), Some(19.0));
    assert_eq!(value(&text, "understudy_output_dropped_frames_total{vm=\"web-1\"}"), Some(2.0));
}

#[test]
fn a_clocks_lag_grows_also_when_the_agent_counts_anew() {
    let metrics = Metrics::new();
    let vm = metrics.vm("web-1");
    for lag_seconds in [1.0, 1.5, 0.25] {
        vm.set_guest_clock(&GuestClock { lag_seconds, pause_share: 0.1 });
    }
    let text = metrics.encode();
    assert_eq!(value(&text, "understudy_guest_clock_lag_seconds_total{vm=\"web-1\"}"), Some(1.75));
}

#[test]
fn a_journal_that_is_gone_is_exported_no_more() {
    let metrics = all();
    let text = metrics.encode();
    assert_eq!(value(&text, "understudy_disk_journal_bytes{vm=\"web-1\"}"), Some(4608.0));
    assert_eq!(value(&text, "understudy_disk_held_bytes_total{vm=\"web-1\"}"), Some(4096.0));
    metrics.vm("web-1").remove_disk_journal();
    let text = metrics.encode();
    assert!(!text.contains("disk_journal_bytes{") && text.contains("disk_held_bytes_total{"), "{text}");
}

#[test]
fn a_removed_vm_and_peer_leave_nothing() {
    let metrics = all();
    metrics.vm("web-2").observe_epoch(&epoch(1));
    metrics.remove_vm("web-1");
    metrics.remove_peer("host-b");
    metrics.remove_witness("w");
    let text = metrics.encode();
    assert!(!text.contains("witness_reachable"), "{text}");
    assert!(!text.contains("web-1") && !text.contains("host-b"), "{text}");
    assert!(text.contains("understudy_epochs_total{vm=\"web-2\"} 1"));
}

#[test]
fn two_agents_in_one_process_do_not_mix() {
    let (one, other) = (Metrics::new(), Metrics::new());
    one.vm("web-1").observe_epoch(&epoch(1));
    assert!(!other.encode().contains("web-1"));
}

#[tokio::test]
async fn metrics_are_served_as_text() {
    let server = MetricsServer::bind("127.0.0.1:0".parse().unwrap(), all(), "host-a").await.unwrap();
    let address = server.address().unwrap();
    let serving = tokio::spawn(server.serve());
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(answer.contains("# HELP understudy_epochs_total "), "{answer}");
    serving.abort();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let error = MetricsServer::bind(taken.local_addr().unwrap(), Metrics::new(), "host-a").await.unwrap_err();
    assert!(error.to_string().contains("metrics cannot be served"), "{error}");
}

/// Where Prometheus' own checker is installed it must find nothing.
#[test]
fn promtool_finds_nothing() {
    let check =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Ok(mut check) = check else {
        eprintln!("skipped: promtool is not installed");
        return;
    };
    check.stdin.take().unwrap().write_all(all().encode().as_bytes()).unwrap();
    let output = check.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What is described is what is exported: types, label names, and the values of labels that are words.
#[test]
fn families_are_described_as_they_are_exported() {
    let text = all().encode();
    for family in families() {
        assert!(text.contains(&format!("# TYPE {} {}\n", family.name, family.kind.word())), "{family:?}");
        let mut prefix = family.name.clone();
        if family.kind == Kind::Histogram {
            prefix.push_str("_count");
        }
        let series: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(prefix.as_str())).collect();
        for line in &series {
            let labels = line.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(labels, _)| labels);
            let pairs: Vec<(&str, &str)> = labels.split(',').filter_map(|pair| pair.split_once('=')).collect();
            let named: BTreeSet<&str> = pairs.iter().map(|&(name, _)| name).collect();
            assert_eq!(named, family.labels.iter().copied().collect(), "{}{line}", family.name);
            for (name, value) in pairs {
                if let Some(known) = label_values(&family.name, name) {
                    assert!(known.contains(&value.trim_matches('"')), "{}{line}", family.name);
                }
            }
        }
        assert!(!series.is_empty(), "{family:?}");
    }
}
