//! Client and server against each other over a real socket, with an agent that only remembers what it was asked.

use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use super::agent_api::AgentApi;
use super::api::*;
use super::client::{Client, ClientError};
use super::drill::{DrillFault, DrillPlan, DrillRequest};
use super::latch::{MayStart, MayStartRequest};
use super::microvm::{RunRequest, Started};
use super::server::{MAX_REQUEST, serve_agent};
use super::socket::ControlSocket;

#[derive(Debug, Default)]
struct FakeAgent {
    asked: Mutex<Vec<String>>,
    /// `unprotect` says that it has begun, and goes on when told.
    begun: Notify,
    go_on: Notify,
    ended: Notify,
}

impl FakeAgent {
    fn note(&self, what: impl Into<String>) {
        self.asked.lock().unwrap().push(what.into());
    }
}

fn vm() -> VmStatus {
    let mut vm = VmStatus::new("web 1/ä", "id-1", Role::Primary);
    vm.state = ProtectionState::Syncing(SyncProgress { done_pages: 1, total_pages: 2, round: 3 });
    vm.suspicion = Some(Suspicion::new(f64::INFINITY, 12.5, true));
    vm.epochs = Some(EpochSummary { epochs: 5, pause_ms_p50: 0.25, ..EpochSummary::default() });
    vm.failover = Some(FailoverReport {
        cause: FailoverCause::Silence,
        generation: 2,
        epoch: 9,
        detected_unix_ms: 1,
        last_heard_monotonic_ns: 10,
        detected_monotonic_ns: 20,
        granted_monotonic_ns: Some(30),
        loaded_monotonic_ns: None,
        running_monotonic_ns: None,
        detection_ms: 0.01,
        grant_ms: Some(0.02),
        activation_ms: None,
    });
    vm
}

fn event() -> VmEvent {
    VmEvent {
        unix_ms: 1_795_000_000_123,
        kind: EventKind::Failover,
        role: Role::Survivor,
        state: "degraded".into(),
        generation: 4,
        epoch: 12,
        text: "runs here".into(),
    }
}

impl AgentApi for FakeAgent {
    async fn status(&self) -> Result<AgentStatus, ErrorBody> {
        Ok(AgentStatus {
            name: "host-a".into(),
            node_id: "ab".into(),
            incarnation: 1,
            version: "0".into(),
            vms: vec![vm()],
            peers: Vec::new(),
        })
    }

    async fn vm_status(&self, name: &str) -> Result<VmStatus, ErrorBody> {
        if name == vm().name {
            return Ok(vm());
        }
        Err(ErrorBody::new(ErrorKind::NotFound, format!("no VM is called `{name}`")).advise("See `understudy status`."))
    }

    async fn vm_change(&self, name: &str) -> Result<VmStatus, ErrorBody> {
        Ok(VmStatus { name: name.to_owned(), state: ProtectionState::Fenced, ..vm() })
    }

    async fn vm_events(&self, name: &str, last: usize) -> Result<Vec<VmEvent>, ErrorBody> {
        self.note(format!("{last} events of {name}"));
        Ok(vec![event()])
    }

    async fn run(&self, request: RunRequest) -> Result<Started, ErrorBody> {
        self.note(serde_json::to_string(&request).unwrap());
        Ok(Started { vm: request.name, note: None })
    }

    async fn end(&self, request: VmRequest) -> Result<Accepted, ErrorBody> {
        Ok(Accepted { vm: request.vm })
    }

    async fn protect(&self, request: ProtectRequest) -> Result<Accepted, ErrorBody> {
        self.note(serde_json::to_string(&request).unwrap());
        Ok(Accepted { vm: request.vm })
    }

    async fn unprotect(&self, request: VmRequest) -> Result<VmStatus, ErrorBody> {
        self.begun.notify_one();
        self.go_on.notified().await;
        self.note(format!("unprotected {}", request.vm));
        self.ended.notify_one();
        Ok(vm())
    }

    async fn rehearse(&self, _: VmRequest) -> Result<RehearsalReport, ErrorBody> {
        panic!("a bug in the agent");
    }

    async fn drill(&self, request: DrillRequest) -> Result<DrillPlan, ErrorBody> {
        Err(ErrorBody::new(ErrorKind::Refused, format!("{} stands by here: no {}", request.vm, request.fault)))
    }

    async fn failover(&self, request: FailoverRequest) -> Result<Accepted, ErrorBody> {
        let cause = std::io::Error::other("the disk is full");
        Err(ErrorBody::new(ErrorKind::Busy, format!("{} is busy", request.vm)).because(&cause))
    }

    async fn may_start(&self, request: MayStartRequest) -> Result<MayStart, ErrorBody> {
        Ok(MayStart { reason: format!("{:?}", request.vm) })
    }

    async fn pair_open(&self, request: PairOpenRequest) -> Result<PairWindow, ErrorBody> {
        Ok(PairWindow {
            name: "host-a".into(),
            code: "1234-5678".into(),
            address: "192.0.2.1:7844".into(),
            expires_unix_ms: request.ttl_s * 1_000,
        })
    }

    async fn pair_join(&self, request: PairJoinRequest) -> Result<Paired, ErrorBody> {
        Ok(Paired { name: request.host, node_id: request.code, kind: PeerKind::Agent })
    }

    async fn doctor(&self, request: DoctorRequest) -> Result<DoctorReport, ErrorBody> {
        let check = |verdict| Check { name: "x".into(), verdict, found: "y".into(), advice: String::new() };
        let verdict = if request.vm.is_some() { Verdict::Refused } else { Verdict::Warning };
        Ok(DoctorReport { checks: vec![check(Verdict::Ok), check(verdict)] })
    }
}

struct Fixture {
    agent: Arc<FakeAgent>,
    client: Client,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let agent = Arc::new(FakeAgent::default());
        let bound = ControlSocket::bind(&socket).unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(serve_agent(bound, Arc::clone(&agent), async {
            let _ = stopped.await;
        }));
        Self { agent, client: Client::new(&socket), stop, server, socket, _dir: dir }
    }

    async fn finish(self) {
        self.stop.send(()).unwrap();
        self.server.await.unwrap().unwrap();
        assert!(!self.socket.exists());
    }
}

async fn refused<T: std::fmt::Debug>(call: impl Future<Output = Result<T, ClientError>>) -> ErrorBody {
    match call.await {
        Err(ClientError::Agent(body)) => body,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_request_arrives_and_is_answered() {
    let fixture = Fixture::new();
    let client = &fixture.client;

    assert_eq!(client.status().await.unwrap().vms, vec![vm()]);
    assert_eq!(client.vm_status("web 1/ä").await.unwrap(), vm());
    let changed = client.vm_change("web 1/ä").await.unwrap();
    assert_eq!((changed.name.as_str(), changed.state), ("web 1/ä", ProtectionState::Fenced));
    let request = ProtectRequest {
        vm: "/run/web.qmp".into(),
        to: "host-b".into(),
        epoch: Some("25ms".parse().unwrap()),
        shadow: Some(ShadowPolicy::Off),
        durability: crate::control::policy::DurabilityPolicy::Memory,
        witness: None,
        standbys: vec!["host-c".into()],
        once: false,
        without_witness: None,
    };
    assert_eq!(client.protect(&request).await.unwrap().vm, "/run/web.qmp");
    assert_eq!(
        fixture.agent.asked.lock().unwrap()[0],
        r#"{"vm":"/run/web.qmp","to":"host-b","epoch":"25ms","shadow":"off","durability":"memory","witness":null,"standbys":["host-c"],"once":false,"without_witness":null}"#
    );
    assert_eq!(client.vm_events("web 1/ä", 7).await.unwrap(), [event()]);
    assert_eq!(fixture.agent.asked.lock().unwrap()[1], "7 events of web 1/ä");
    assert_eq!(client.pair_open(&PairOpenRequest { ttl_s: 60 }).await.unwrap().expires_unix_ms, 60_000);
    let join = PairJoinRequest { host: "host-b".into(), port: 1, code: "7".into() };
    assert_eq!(client.pair_join(&join).await.unwrap().node_id, "7");
    assert!(client.doctor(&DoctorRequest::default()).await.unwrap().passed());
    assert!(!client.doctor(&DoctorRequest { vm: Some("x".into()) }).await.unwrap().passed());
    fixture.finish().await;
}

#[tokio::test]
async fn errors_keep_their_kind_advice_and_causes() {
    let fixture = Fixture::new();
    let missing = refused(fixture.client.vm_status("web-2")).await;
    assert_eq!((missing.kind, missing.advice.as_str()), (ErrorKind::NotFound, "See `understudy status`."));
    let busy = refused(fixture.client.failover(&FailoverRequest {
        vm: "web-1".into(),
        planned: true,
        back: false,
        force: false,
        confirm: None,
        give_back: false,
    }))
    .await;
    assert_eq!((busy.kind, busy.causes), (ErrorKind::Busy, vec!["the disk is full".to_owned()]));
    let drill = DrillRequest { vm: "web-1".to_owned(), fault: DrillFault::KillVm, confirmed: false };
    assert_eq!(refused(fixture.client.drill(&drill)).await.message, "web-1 stands by here: no kill-vm");
    let ended = refused(fixture.client.rehearse(&VmRequest { vm: "web-1".into() })).await;
    assert_eq!(ended.kind, ErrorKind::Failed, "a panic is answered, and the server lives: {ended:?}");
    assert!(fixture.client.status().await.is_ok());
    fixture.finish().await;
}

#[tokio::test]
async fn a_request_runs_to_its_end_when_its_client_leaves() {
    let fixture = Fixture::new();
    let client = fixture.client.clone();
    let call = tokio::spawn(async move { client.unprotect(&VmRequest { vm: "web-1".into() }).await });
    fixture.agent.begun.notified().await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    // Another exchange gives the server the time to see that the client has gone.
    fixture.client.status().await.unwrap();
    fixture.agent.go_on.notify_one();
    fixture.agent.ended.notified().await;
    assert_eq!(*fixture.agent.asked.lock().unwrap(), ["unprotected web-1"]);
    fixture.finish().await;
}

#[tokio::test]
async fn bad_requests_are_refused() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let fixture = Fixture::new();
    let ask = async |path: &str, body: &str| {
        let mut stream = tokio::net::UnixStream::connect(&fixture.socket).await.unwrap();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        // The server may close while a body that is too long is written.
        let _ = stream.write_all(body.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let typo = ask("/v1/protect", r#"{"vm":"a","to":"b","epok":"auto"}"#).await;
    assert!(typo.starts_with("HTTP/1.1 400") && typo.contains("unknown field `epok`"), "{typo}");
    let bounds = ask("/v1/protect", r#"{"vm":"a","to":"b","epoch":"1h"}"#).await;
    assert!(bounds.contains("out of bounds"), "{bounds}");
    let route = ask("/v1/format-disk", "{}").await;
    assert!(route.starts_with("HTTP/1.1 400") && route.contains("no such request"), "{route}");
    let long = ask("/v1/unprotect", &" ".repeat(MAX_REQUEST + 1)).await;
    assert!(long.starts_with("HTTP/1.1 413"), "{long}");
    assert!(fixture.agent.asked.lock().unwrap().is_empty());
    fixture.finish().await;
}

/// As the agents of before that question answer.
#[tokio::test]
async fn an_older_agent_says_how_the_vm_is() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut asked = [0; 4096];
            let length = stream.read(&mut asked).await.unwrap();
            let (line, body) = if asked[..length].starts_with(b"GET /v1/vms/web-1 ") {
                ("200 OK", serde_json::to_string(&vm()).unwrap())
            } else {
                let error = ErrorBody::new(ErrorKind::Invalid, "this agent has no such request");
                ("400 Bad Request", serde_json::to_string(&error).unwrap())
            };
            let answer = format!("HTTP/1.1 {line}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let client = Client::new(&socket);
    assert_eq!(client.vm_change("web-1").await.unwrap(), vm());
    let other = refused(client.vm_change("web-2")).await;
    assert_eq!(other.kind, ErrorKind::Invalid);
}

#[tokio::test]
async fn no_agent_is_an_error_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let client = Client::new(&socket);
    assert!(matches!(client.status().await, Err(ClientError::NoAgent { .. })));
    // A socket that a killed agent left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(matches!(client.status().await, Err(ClientError::NoAgent { .. })));
}

#[test]
fn a_state_is_one_word_and_its_progress_beside_it() {
    let json = serde_json::to_value(vm()).unwrap();
    assert_eq!(json["state"], "syncing");
    assert_eq!(json["progress"]["total_pages"], 2);
    assert_eq!(json["suspicion"]["phi"], MAX_PHI);
    let mut protected = vm();
    protected.state = ProtectionState::Protected;
    let json = serde_json::to_value(&protected).unwrap();
    assert_eq!(json["state"], "protected");
    assert_eq!(json.get("progress"), None);
    assert_eq!(serde_json::from_value::<VmStatus>(json).unwrap(), protected);
    for word in ProtectionState::WORDS {
        let mut json = serde_json::to_value(&protected).unwrap();
        json["state"] = word.into();
        json["progress"] = serde_json::to_value(SyncProgress::default()).unwrap();
        if word != "syncing" {
            json.as_object_mut().unwrap().remove("progress");
        }
        assert_eq!(serde_json::from_value::<VmStatus>(json).unwrap().state.word(), word);
    }
}
