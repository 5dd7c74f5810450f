//! The control API's client, for the command line and for tools in this repository.
//!
//! Each call is one connection, one request, one answer, within a bound of time.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::api::{
    Accepted, AgentStatus, DoctorReport, DoctorRequest, ErrorBody, ErrorKind, FailoverRequest, PairJoinRequest,
    PairOpenRequest, PairWindow, Paired, ProtectRequest, RehearsalReport, VmEvent, VmRequest, VmStatus, WitnessStatus,
};
use super::drill::{DrillPlan, DrillRequest};
use super::latch::{MayStart, MayStartRequest};
use super::microvm::{RunRequest, Started};

/// The longest answer that is read, in bytes.
pub const MAX_ANSWER: usize = 8 << 20;
/// How long a status may take.
pub const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long other requests may take: a rehearsal starts a QEMU and loads all of its state.
pub const WORK_TIMEOUT: Duration = Duration::from_secs(300);

/// A request got no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers on {socket}")]
    NoAgent {
        /// The socket.
        socket: PathBuf,
    },
    /// Not root.
    #[error("not allowed to open {socket}: only root may")]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
    },
    /// The connection failed.
    #[error("the connection to {socket} failed")]
    Io {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The exchange broke off: the agent ended, or it does not speak HTTP.
    #[error("the agent broke off")]
    Http(#[from] hyper::Error),
    /// The answer's body could not be read, or is longer than [`MAX_ANSWER`].
    #[error("the agent's answer could not be read to its end: {0}")]
    Body(String),
    /// The answer is not what was asked for.
    #[error("the agent's answer is not understood: its version is another one")]
    Answer(#[source] serde_json::Error),
    /// No answer in time.
    #[error("the agent did not answer within {} seconds", .0.as_secs())]
    Timeout(Duration),
    /// The agent refused or failed.
    #[error(transparent)]
    Agent(#[from] ErrorBody),
}

/// Asks one agent, or one witness. Calls may be made at the same time.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the agent that listens on `socket`. Connects at each call.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The agent and all it knows.
    ///
    /// # Errors
    /// As [`ClientError`] says; so do all other calls.
    pub async fn status(&self) -> Result<AgentStatus, ClientError> {
        self.get("/v1/status").await
    }

    /// The witness and what it keeps.
    #[allow(clippy::missing_errors_doc)]
    pub async fn witness_status(&self) -> Result<WitnessStatus, ClientError> {
        self.get("/v1/status").await
    }

    /// One VM, by name.
    #[allow(clippy::missing_errors_doc)]
    pub async fn vm_status(&self, name: &str) -> Result<VmStatus, ClientError> {
        self.get(&format!("/v1/vms/{}", percent_encode(name))).await
    }

    /// How far the change of hands is that was asked for last of a VM. An agent that was not restarted since its program was replaced may not know that
    /// question: it is asked how the VM is.
    #[allow(clippy::missing_errors_doc)]
    pub async fn vm_change(&self, name: &str) -> Result<VmStatus, ClientError> {
        match self.get(&format!("/v1/vms/{}/change", percent_encode(name))).await {
            Err(ClientError::Agent(error)) if error.kind == ErrorKind::Invalid => self.vm_status(name).await,
            answer => answer,
        }
    }

    /// The last `last` things that happened to a VM there, oldest first.
    #[allow(clippy::missing_errors_doc)]
    pub async fn vm_events(&self, name: &str, last: usize) -> Result<Vec<VmEvent>, ClientError> {
        self.get(&format!("/v1/vms/{}/events?last={last}", percent_encode(name))).await
    }

    /// Starts a microVM.
    #[allow(clippy::missing_errors_doc)]
    pub async fn run(&self, request: &RunRequest) -> Result<Started, ClientError> {
        self.post("/v1/run", request).await
    }

    /// Ends a microVM that nobody protects.
    #[allow(clippy::missing_errors_doc)]
    pub async fn end(&self, request: &VmRequest) -> Result<Accepted, ClientError> {
        self.post("/v1/end", request).await
    }

    /// Starts to protect a VM.
    #[allow(clippy::missing_errors_doc)]
    pub async fn protect(&self, request: &ProtectRequest) -> Result<Accepted, ClientError> {
        self.post("/v1/protect", request).await
    }

    /// Ends a protection.
    #[allow(clippy::missing_errors_doc)]
    pub async fn unprotect(&self, request: &VmRequest) -> Result<VmStatus, ClientError> {
        self.post("/v1/unprotect", request).await
    }

    /// Proves that the standby's copy loads.
    #[allow(clippy::missing_errors_doc)]
    pub async fn rehearse(&self, request: &VmRequest) -> Result<RehearsalReport, ClientError> {
        self.post("/v1/rehearse", request).await
    }

    /// Asks whether a drill may begin.
    #[allow(clippy::missing_errors_doc)]
    pub async fn drill(&self, request: &DrillRequest) -> Result<DrillPlan, ClientError> {
        self.post("/v1/drill", request).await
    }

    /// Starts a change of hands.
    #[allow(clippy::missing_errors_doc)]
    pub async fn failover(&self, request: &FailoverRequest) -> Result<Accepted, ClientError> {
        self.post("/v1/failover", request).await
    }

    /// Asks whether a VM may be started from its disks.
    #[allow(clippy::missing_errors_doc)]
    pub async fn may_start(&self, request: &MayStartRequest) -> Result<MayStart, ClientError> {
        self.post("/v1/may-start", request).await
    }

    /// Opens a pairing window, on an agent or a witness.
    #[allow(clippy::missing_errors_doc)]
    pub async fn pair_open(&self, request: &PairOpenRequest) -> Result<PairWindow, ClientError> {
        self.post("/v1/pair/open", request).await
    }

    /// Pairs with a node whose window is open.
    #[allow(clippy::missing_errors_doc)]
    pub async fn pair_join(&self, request: &PairJoinRequest) -> Result<Paired, ClientError> {
        self.post("/v1/pair/join", request).await
    }

    /// Checks what would stop protection.
    #[allow(clippy::missing_errors_doc)]
    pub async fn doctor(&self, request: &DoctorRequest) -> Result<DoctorReport, ClientError> {
        self.post("/v1/doctor", request).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new(), STATUS_TIMEOUT).await
    }

    async fn post<R: Serialize + Sync, T: DeserializeOwned>(&self, path: &str, request: &R) -> Result<T, ClientError> {
        let body = serde_json::to_vec(request).expect("a request is plain data");
        self.call(Method::POST, path, body.into(), WORK_TIMEOUT).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        bound: Duration,
    ) -> Result<T, ClientError> {
        let (ok, answer) = tokio::time::timeout(bound, self.exchange(method, path, body))
            .await
            .map_err(|_| ClientError::Timeout(bound))??;
        if ok {
            return serde_json::from_slice(&answer).map_err(ClientError::Answer);
        }
        let error: ErrorBody = serde_json::from_slice(&answer).map_err(ClientError::Answer)?;
        Err(ClientError::Agent(error))
    }

    /// Whether it succeeded, and the body.
    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(bool, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| self.connect_error(source))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "agent")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .expect("the path is percent-encoded");
        let response = sender.send_request(request).await?;
        let ok = response.status().is_success();
        let answer = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| ClientError::Body(error.to_string()))?
            .to_bytes();
        driver.abort();
        Ok((ok, answer))
    }

    fn connect_error(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NoAgent { socket },
            io::ErrorKind::PermissionDenied => ClientError::NotAllowed { socket },
            _ => ClientError::Io { socket, source },
        }
    }
}

/// Everything but letters, digits, `-`, `.`, `_` and `~` as `%XX`.
fn percent_encode(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
