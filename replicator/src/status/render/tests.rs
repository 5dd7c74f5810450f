use super::*;
use crate::control::api::{
    ActivationMs, Check, EncodedBytes, FailoverCause, GuestClock, HeldOutput, PausePartsMs, Role, SurvivorAt, Suspicion,
};

fn protected() -> VmStatus {
    let mut vm = VmStatus::new("web-1", "7f3a", Role::Primary);
    vm.state = ProtectionState::Protected;
    vm.generation = 3;
    vm.epoch_committed = 1_234;
    vm.epoch_current = 1_235;
    vm.peer = "host-b".into();
    vm.suspicion = Some(Suspicion::new(0.31, 14.2, false));
    vm.epochs = Some(EpochSummary {
        epochs: 1_234,
        epoch_ms_p50: 24.96,
        pause_ms_p50: 1.872,
        pause_ms_p99: 4.2,
        pause_parts_ms_p50: PausePartsMs { stop: 0.2, harvest: 0.1, device: 1.1, copy: 0.4, resume: 0.07 },
        dirty_pages_p50: 312,
        commit_ms_p50: 3.16,
        commit_ms_p99: 12.5,
        bytes: EncodedBytes { delta: 3 << 20, raw: 4096, device: 1 << 20, ..EncodedBytes::default() },
        wire_bytes: 5 << 20,
    });
    vm.guest_clock = Some(GuestClock { lag_seconds: 12.34, pause_share: 0.071 });
    vm.held = Some(HeldOutput { frames: 2, bytes: 180, oldest_ms: 1.5, released: 40, dropped: 1 });
    vm.warnings = vec!["serial port serial0 is not held".into()];
    vm
}

fn survivor() -> VmStatus {
    let mut vm = VmStatus::new("db", "9c", Role::Survivor);
    vm.state = ProtectionState::Unprotected;
    vm.reason = "host-a was silent, db runs here now".into();
    vm.advice = "Protect it again when another host is ready.".into();
    vm.generation = 4;
    vm.epoch_committed = 77;
    vm.epoch_current = 77;
    vm.survivor = Some(SurvivorAt { control: "/run/understudy/twins/db/qmp".into(), pid: 4711 });
    vm.failover = Some(FailoverReport {
        cause: FailoverCause::Silence,
        generation: 4,
        epoch: 77,
        detected_unix_ms: 1_800_000_000_123,
        last_heard_monotonic_ns: 1,
        detected_monotonic_ns: 2,
        granted_monotonic_ns: Some(3),
        loaded_monotonic_ns: Some(4),
        running_monotonic_ns: Some(5),
        detection_ms: 205.4,
        grant_ms: Some(2.25),
        activation_ms: Some(ActivationMs { load: 31.0, resume: 1.04, total: 33.5 }),
    });
    vm
}

#[test]
fn all_vms_and_peers_are_tables() {
    let status = AgentStatus {
        name: "host-a".into(),
        node_id: "ab".into(),
        incarnation: 5,
        version: "0.1.0".into(),
        vms: vec![protected(), survivor()],
        peers: vec![
            PeerStatus {
                name: "host-b".into(),
                node_id: "cd".into(),
                kind: PeerKind::Agent,
                address: "10.0.0.2:7844".into(),
                connected: true,
                suspicion: Some(Suspicion::new(0.31, 14.2, false)),
                rtt_ms: Some(0.25),
                paths: Vec::new(),
            },
            PeerStatus {
                name: "w".into(),
                node_id: "ef".into(),
                kind: PeerKind::Witness,
                address: String::new(),
                connected: false,
                suspicion: None,
                rtt_ms: None,
                paths: Vec::new(),
            },
        ],
    };
    assert_eq!(
        agent(&status),
        "\
agent host-a (version 0.1.0, incarnation 5)

VM     ROLE      STATE        PEER    GEN  COMMITTED  EPOCH    PAUSE p50/p99      COMMIT   HELD
web-1  primary   protected    host-b  3    1234       25.0 ms  1.87 ms / 4.20 ms  3.16 ms  2
db     survivor  unprotected  -       4    77         -        -                  -        -

db: host-a was silent, db runs here now
  Protect it again when another host is ready.

PEER    KIND     ADDRESS        CONNECTED  SILENCE  PHI  RTT
host-b  agent    10.0.0.2:7844  yes        14.2 ms  0.3  0.25 ms
w       witness  -              no         -        -    -
"
    );
}

#[test]
fn paths_are_shown_where_there_are_several_and_one_that_is_down_is_told() {
    let path = |path, silence_ms, up| PathStatus {
        path,
        local: format!("10.{path}.0.1:7845"),
        address: format!("10.{path}.0.2:7845"),
        up,
        silence_ms,
        phi: if up { 0.2 } else { 1_000.0 },
        rtt_ms: up.then_some(0.4),
    };
    let peer = PeerStatus {
        name: "host-b".into(),
        node_id: "cd".into(),
        kind: PeerKind::Agent,
        address: "10.0.0.2:7844".into(),
        connected: true,
        suspicion: None,
        rtt_ms: None,
        paths: vec![path(0, Some(12_000.0), false), path(1, Some(14.2), true)],
    };
    let status = AgentStatus {
        name: "host-a".into(),
        node_id: "ab".into(),
        incarnation: 5,
        version: "0.1.0".into(),
        vms: Vec::new(),
        peers: vec![peer.clone()],
    };
    let text = agent(&status);
    let expected = "
PATH  TO      FROM           ADDRESS        HEARD  SILENCE  PHI     RTT
0     host-b  10.0.0.1:7845  10.0.0.2:7845  no     12 s     1000.0  -
1     host-b  10.1.0.1:7845  10.1.0.2:7845  yes    14.2 ms  0.2     0.40 ms

host-b is not heard on path 0 (10.0.0.2:7845), but on another one: nothing fails over for that.
  Mend that link: while it is down the others must not fail, too.
";
    assert!(text.ends_with(expected), "{text}");
    let alone = PeerStatus { paths: vec![path(0, Some(14.2), true)], ..peer };
    assert!(
        !agent(&AgentStatus { peers: vec![alone], ..status }).contains("PATH"),
        "one path is what the peer's row says"
    );
}

#[test]
fn an_event_is_one_line() {
    let event = VmEvent {
        unix_ms: 1_795_000_000_123,
        kind: crate::control::api::EventKind::State,
        role: Role::Primary,
        state: "degraded".into(),
        generation: 4,
        epoch: 12,
        text: "was protected: the standby is silent".into(),
    };
    assert_eq!(
        super::event(&event),
        "2026-11-18T11:06:40.123Z  primary   degraded      generation 4, epoch 12: was protected: the standby is silent"
    );
}

#[test]
fn an_agent_without_anything_says_what_to_do() {
    let status = AgentStatus {
        name: "host-a".into(),
        node_id: "ab".into(),
        incarnation: 1,
        version: "0.1.0".into(),
        vms: Vec::new(),
        peers: Vec::new(),
    };
    assert_eq!(
        agent(&status),
        "\
agent host-a (version 0.1.0, incarnation 1)

No VM is protected here. Protect one with `understudy protect VM --to HOST`.

Paired with nobody. Pair with `understudy pair`.
"
    );
}

#[test]
fn a_protected_vm_in_detail() {
    assert_eq!(
        vm(&protected()),
        "\
VM            web-1 (7f3a)
state         protected
role          primary, with host-b, generation 3
peer          silent for 14.2 ms, phi 0.3
epoch         1234 committed, 1235 under way
epochs        1234, 25.0 ms each, 312 dirty pages
pause         1.87 ms (p99 4.20 ms)
              stop 0.20 ms, harvest 0.10 ms, device 1.10 ms, copy 0.40 ms, resume 0.07 ms
commit        3.16 ms (p99 12.5 ms)
sent          5.0 MiB (delta 3.0 MiB, raw 4.0 KiB, device 1.0 MiB)
guest's clock lost 12.3 s in our pauses, which take 7.1 % of the time
held output   2 frames, 180 B, oldest 1.50 ms (40 released, 1 dropped)
warning       serial port serial0 is not held
"
    );
}

#[test]
fn a_survivor_in_detail() {
    assert_eq!(
        vm(&survivor()),
        "\
VM            db (9c)
state         unprotected: host-a was silent, db runs here now
              Protect it again when another host is ready.
role          survivor, generation 4
runs as       process 4711, /run/understudy/twins/db/qmp
epoch         77 committed, 77 under way
failover      2027-01-15T08:00:00.123Z, silence, epoch 77, generation 4: detection 205 ms, grant 2.25 ms, \
activation 33.5 ms (load 31.0 ms, resume 1.04 ms)
"
    );
}

#[test]
fn progress_is_a_share_of_the_round() {
    let of = |done_pages, total_pages| SyncProgress { done_pages, total_pages, round: 1 };
    assert_eq!([percent(&of(0, 0)), percent(&of(1, 3)), percent(&of(9, 3))], [0, 33, 100]);
    assert_eq!(state(&ProtectionState::Syncing(of(1, 2))), "syncing 50% (round 1)");
}

#[test]
fn a_checklist_ends_with_its_verdict() {
    let check = |name: &str, verdict, advice: &str| Check {
        name: name.into(),
        verdict,
        found: "found".into(),
        advice: advice.into(),
    };
    let mut report = DoctorReport { checks: vec![check("kernel", Verdict::Ok, "")] };
    assert_eq!(checklist(&report), "ok       kernel: found\n\nNothing stands in the way of protection.\n");
    report.checks.push(check("serial", Verdict::Warning, "Mind it."));
    assert!(
        checklist(&report).ends_with("warning  serial: found\n         Mind it.\n\nProtection works; 1 warning.\n")
    );
    report.checks.push(check("disk", Verdict::Refused, ""));
    report.checks.push(check("net", Verdict::Refused, ""));
    assert!(checklist(&report).ends_with("Protection would be refused: 2 reasons.\n"));
}
