//! Ownership stores as the agent sees them: ask, and get an answer or none.
//!
//! **An error or a silence proves nothing**: the change may have been applied or not. Only a later read's
//! answer tells (`docs/protocol.md` P4).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use heartbeat_core::ids::NodeId;
use heartbeat_core::store::{StoreAnswer, StoreRequest};
use heartbeat_core::wire::MAX_STORE_MESSAGE;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::etcd::EtcdError;
use crate::quic::{Connection, Endpoint, MessageError, Purpose, QuicError, close, read_message, write_message};

/// Pause before the second dial of one request; it doubles.
const FIRST_RETRY: Duration = Duration::from_millis(20);
/// How long a question waits for an answer over a connection that was there before, until another is dialed: its path may be the one that failed.
const STALE: Duration = Duration::from_millis(250);
/// Longest pause between two dials.
const LONGEST_RETRY: Duration = Duration::from_millis(500);

/// Code with which the witness resets the stream of a request for a VM whose record is damaged.
pub(crate) const RESET_LATCHED: u32 = 1;

/// Why there is no answer. None of these says whether the request took effect.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store did not answer in time.
    #[error("the ownership store did not answer within {after:?}; nobody goes alone until it does")]
    Silent {
        /// The deadline that passed.
        after: Duration,
        /// The last reason why, if one is known.
        #[source]
        source: Option<Box<StoreError>>,
    },
    /// The store cannot be reached.
    #[error("the ownership store cannot be reached")]
    Unreachable(#[source] QuicError),
    /// The connection broke under the request.
    #[error("the connection to the ownership store broke")]
    Broken(#[source] MessageError),
    /// The store holds a damaged record for this VM and refuses to guess.
    #[error(
        "the witness refuses this VM because its record is damaged; see the witness's log, restore the record there, and restart it"
    )]
    Latched,
    /// etcd gave no answer that counts.
    #[error("etcd gave no answer that counts")]
    Etcd(#[source] EtcdError),
    /// The store's answer is not to this request.
    #[error("the ownership store answered another question")]
    Mixed,
}

/// The answer that an [`OwnershipStore`] will give.
pub type Asked<'a> = Pin<Box<dyn Future<Output = Result<StoreAnswer, StoreError>> + Send + 'a>>;

/// A store of ownership records. Safe to share; requests may be under way at the same time.
pub trait OwnershipStore: Send + Sync + std::fmt::Debug {
    /// Asks once and waits for the answer, for a bounded time.
    ///
    /// An answer shows the durable record after the request. An error or a silence proves nothing: the
    /// request may take effect even after it is returned. Dropping the future is a silence.
    fn ask(&self, request: StoreRequest) -> Asked<'_>;
}

/// A client of the built-in witness.
#[derive(Debug)]
pub struct WitnessClient {
    endpoint: Arc<Endpoint>,
    witness: NodeId,
    deadline: Duration,
    connection: Mutex<Option<Connection>>,
}

impl WitnessClient {
    /// A client of `witness`, a pinned peer, over `endpoint` (of the control profile). Each request may
    /// take `deadline`, dialing included. Nothing is dialed before the first request.
    #[must_use]
    pub fn new(endpoint: Arc<Endpoint>, witness: NodeId, deadline: Duration) -> Self {
        Self { endpoint, witness, deadline, connection: Mutex::new(None) }
    }

    /// Which witness this is a client of.
    #[must_use]
    pub fn witness(&self) -> NodeId {
        self.witness
    }

    /// A connection that was alive a moment ago, dialed if there is none but `stale`; whether it was there.
    async fn connection(&self, stale: Option<usize>) -> Result<(quinn::Connection, bool), StoreError> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = &*slot
            && connection.quic.close_reason().is_none()
            && Some(connection.quic.stable_id()) != stale
        {
            return Ok((connection.quic.clone(), true));
        }
        let connection =
            self.endpoint.connect(self.witness, Purpose::Witness).await.map_err(StoreError::Unreachable)?;
        let quic = connection.quic.clone();
        *slot = Some(connection);
        Ok((quic, false))
    }

    /// Asks over one connection; if that was there before and brings no answer in time, over another.
    async fn ask_once(&self, request: &StoreRequest) -> Result<StoreAnswer, StoreError> {
        let (connection, was_there) = self.connection(None).await?;
        if !was_there {
            return Self::ask_over(&connection, request).await;
        }
        match tokio::time::timeout(STALE, Self::ask_over(&connection, request)).await {
            Ok(answer) => answer,
            Err(_) => {
                let (other, _) = self.connection(Some(connection.stable_id())).await?;
                Self::ask_over(&other, request).await
            }
        }
    }

    async fn ask_over(connection: &quinn::Connection, request: &StoreRequest) -> Result<StoreAnswer, StoreError> {
        let broken = StoreError::Broken;
        let (mut send, mut recv) = connection
            .open_bi()
            .await
            .map_err(|error| broken(MessageError::Read(quinn::ReadError::ConnectionLost(error))))?;
        write_message(&mut send, request).await.map_err(broken)?;
        let answer: StoreAnswer = read_message(&mut recv, MAX_STORE_MESSAGE).await.map_err(|error| {
            let latched = quinn::VarInt::from_u32(RESET_LATCHED);
            if matches!(&error, MessageError::Read(quinn::ReadError::Reset(code)) if *code == latched) {
                return StoreError::Latched;
            }
            if error.is_peers_fault() {
                connection.close(quinn::VarInt::from_u32(close::PROTOCOL), b"bad answer");
            }
            broken(error)
        })?;
        if answer.id == request.id && answer.vm == request.vm {
            Ok(answer)
        } else {
            connection.close(quinn::VarInt::from_u32(close::PROTOCOL), b"mixed answer");
            Err(StoreError::Mixed)
        }
    }

    /// Asks until an answer or the deadline comes. A request that is sent twice is harmless: a change is a
    /// compare-and-set, so its second copy finds the record changed and shows it.
    async fn ask_until(&self, request: StoreRequest) -> Result<StoreAnswer, StoreError> {
        let end = Instant::now() + self.deadline;
        let mut pause = FIRST_RETRY;
        let mut last = None;
        loop {
            let silent =
                |last: Option<StoreError>| StoreError::Silent { after: self.deadline, source: last.map(Box::new) };
            match tokio::time::timeout_at(end, self.ask_once(&request)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(StoreError::Latched)) => return Err(StoreError::Latched),
                Ok(Err(error)) => last = Some(error),
                Err(_) => return Err(silent(last)),
            }
            if Instant::now() + pause >= end {
                return Err(silent(last));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }
}

impl OwnershipStore for WitnessClient {
    fn ask(&self, request: StoreRequest) -> Asked<'_> {
        Box::pin(self.ask_until(request))
    }
}

/// The clients of an agent, one for each node that it asks: all its questions to that node go over one connection. So who asks when a
/// primary has died finds the connection of whoever looked after the witness before, and need not dial.
#[derive(Debug)]
pub struct WitnessClients {
    endpoint: Arc<Endpoint>,
    deadline: Duration,
    clients: std::sync::Mutex<BTreeMap<NodeId, Arc<WitnessClient>>>,
}

impl WitnessClients {
    /// None yet. For `endpoint` and `deadline` see [`WitnessClient::new`].
    #[must_use]
    pub fn new(endpoint: Arc<Endpoint>, deadline: Duration) -> Self {
        Self { endpoint, deadline, clients: std::sync::Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Arc<WitnessClient>>> {
        self.clients.lock().expect("nobody panics while it holds the clients")
    }

    /// That of `node`.
    #[must_use]
    pub fn of(&self, node: NodeId) -> Arc<WitnessClient> {
        let make = || Arc::new(WitnessClient::new(Arc::clone(&self.endpoint), node, self.deadline));
        Arc::clone(self.lock().entry(node).or_insert_with(make))
    }

    /// Keeps those of nodes that this one is `paired` with. The connection of another ends with the last who has its client.
    pub fn retain(&self, paired: impl Fn(NodeId) -> bool) {
        self.lock().retain(|&node, _| paired(node));
    }
}
