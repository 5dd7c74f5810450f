//! etcd (version 3) as the ownership store: one key per VM, changed by transactions alone.
//!
//! Promises (`docs/protocol.md` P2, P6, P8), the same as the built-in witness's:
//!
//! - An answer shows a record that a majority of the members has on disk. Reads are linearizable, also of a member that is not the leader.
//! - A change is one transaction that compares the modification revision of the VM's key with the one that was read; who asks for it and whether
//!   it is its own to ask for ([`permitted`]) is judged by this client. etcd cannot: whoever may write below the prefix is trusted.
//! - An error or a silence proves nothing. Members that do not answer are passed over, until the deadline.
//! - The store's id is made of a random one, kept below the prefix, and of the cluster's. A cluster that was restored from a snapshot has another
//!   id, so it is another store; its records name the former one and are refused. One that goes back in time while this client lives
//!   is refused too.
//!
//! The members are asked through their JSON gateway (`docs/decisions.md`).

mod api;
mod http;

use std::fmt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use heartbeat_core::ids::{StoreId, VmId};
use heartbeat_core::record::{Record, permitted};
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};
use tokio::time::Instant;

use self::api::{Authenticated, Compare, Failure, Header, KeyValue, Operation, Transaction, TransactionResult};
use self::http::{Endpoint, Transport};
use crate::store::{Asked, OwnershipStore, StoreError};
use crate::witness::disk;

/// How long one member may take before another is asked, and at most half of the deadline.
const MEMBER_WITHIN: Duration = Duration::from_secs(1);
/// Pause after every member was asked in vain.
const PAUSE: Duration = Duration::from_millis(50);
/// Bound on the members of a configuration.
pub const MAX_ENDPOINTS: usize = 16;
/// Where the keys are unless the configuration says otherwise.
pub const DEFAULT_PREFIX: &str = "understudy/";

/// How a cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Its members, as `https://HOST:PORT`; `http` only to this very machine.
    pub endpoints: Vec<String>,
    /// What all keys begin with.
    pub prefix: String,
    /// PEM file with the certificates that members' certificates are signed by. Needed for `https`.
    pub ca: Option<PathBuf>,
    /// PEM files with this client's certificate and its key, if the members ask for one.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Who asks, if the cluster wants to know.
    pub user: Option<EtcdUser>,
}

/// A user of a cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdUser {
    /// Its name.
    pub name: String,
    /// Its password.
    pub password: String,
}

impl fmt::Debug for EtcdUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdUser").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EtcdConfigError {
    /// None or too many.
    #[error("between 1 and {MAX_ENDPOINTS} etcd endpoints are needed")]
    Endpoints,
    /// Not an address.
    #[error("`{endpoint}` is no address of an etcd member: {why}")]
    Endpoint {
        /// As configured.
        endpoint: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A file with certificates or a key.
    #[error("{path} holds no usable {what}")]
    File {
        /// Which.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why.
        source: rustls_pki_types::pem::Error,
    },
    /// Certificates that TLS cannot be made of.
    #[error("the certificates for etcd cannot be used")]
    Tls(#[from] rustls::Error),
}

/// Why etcd gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The member cannot be reached.
    #[error("etcd member {endpoint} cannot be reached")]
    Unreachable {
        /// Which.
        endpoint: String,
        /// Why.
        source: std::io::Error,
    },
    /// The exchange broke off, or is no HTTP.
    #[error("the exchange with etcd member {endpoint} broke off: {why}")]
    Broken {
        /// Which.
        endpoint: String,
        /// Why.
        why: String,
    },
    /// It took too long.
    #[error("etcd member {endpoint} did not answer within {after:?}")]
    Slow {
        /// Which.
        endpoint: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The member answered with an error.
    #[error("etcd member {endpoint} refused: {message}")]
    Refused {
        /// Which.
        endpoint: String,
        /// What it said.
        message: String,
        /// Its code, as gRPC numbers them.
        code: i64,
    },
    /// The answer is not understood.
    #[error("the answer of etcd member {endpoint} is not understood: {why}")]
    Strange {
        /// Which.
        endpoint: String,
        /// Why.
        why: String,
    },
    /// The value of a key is not what we write there.
    #[error(
        "etcd's key {key} is damaged: {why}; nobody goes alone until it is restored or, if no host runs the VM unseen, removed"
    )]
    Damaged {
        /// Which key.
        key: String,
        /// What is wrong.
        why: String,
    },
    /// The record was made in another store: this cluster was restored or made anew.
    #[error(
        "etcd's key {key} was written in another store ({wrote}): the cluster was restored from a snapshot or made anew, and grants nothing; make sure which host runs the VM, then remove the key"
    )]
    OtherStore {
        /// Which key.
        key: String,
        /// The store that the record names.
        wrote: StoreId,
    },
    /// A member of another cluster, or of a new one under the old name.
    #[error(
        "etcd member {endpoint} is of another cluster than before; nobody goes alone until the agent is restarted with endpoints of one cluster"
    )]
    OtherCluster {
        /// Which.
        endpoint: String,
    },
    /// The cluster forgot what it had confirmed.
    #[error(
        "etcd member {endpoint} went back in time: it is at revision {now} after {before}; its data was restored or lost, and it grants nothing"
    )]
    WentBack {
        /// Which.
        endpoint: String,
        /// What it says now.
        now: u64,
        /// What was seen before the question was sent.
        before: u64,
    },
}

/// gRPC's code of a token that is no longer good.
const UNAUTHENTICATED: i64 = 16;
/// gRPC's codes of what will not change by asking another member: invalid argument, permission denied.
const FINAL: [i64; 2] = [3, 7];

impl EtcdError {
    /// Whether another member, or the same one a little later, may answer.
    fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Broken { .. } | Self::Slow { .. } | Self::Strange { .. } => true,
            Self::Refused { code, .. } => !FINAL.contains(code),
            Self::Damaged { .. } | Self::OtherStore { .. } | Self::OtherCluster { .. } | Self::WentBack { .. } => false,
        }
    }
}

/// What is known of the cluster.
#[derive(Default)]
struct Known {
    /// The member that answered last, or the one after the last that did not.
    preferred: usize,
    token: Option<String>,
    cluster: Option<u64>,
    /// The highest revision that a member told of.
    revision: u64,
}

/// A client of one cluster.
pub struct EtcdStore {
    endpoints: Vec<Endpoint>,
    prefix: String,
    user: Option<EtcdUser>,
    transport: Transport,
    deadline: Duration,
    known: Mutex<Known>,
}

/// The store's id and a VM's record, at one moment.
#[derive(Debug)]
struct Seen {
    /// The modification revision of the store's key, 0 if absent.
    store_revision: u64,
    store: StoreId,
    /// The modification revision of the VM's key, 0 if absent.
    record_revision: u64,
    record: Option<Record>,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoints, prefix, user, .. } = self;
        f.debug_struct("EtcdStore")
            .field("endpoints", endpoints)
            .field("prefix", prefix)
            .field("user", user)
            .finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// A client; nothing is asked before the first request, each of which may take `deadline`.
    ///
    /// # Errors
    /// [`EtcdConfigError`] says which part of the configuration cannot be used.
    pub fn new(config: &EtcdConfig, deadline: Duration) -> Result<Self, EtcdConfigError> {
        if config.endpoints.is_empty() || config.endpoints.len() > MAX_ENDPOINTS {
            return Err(EtcdConfigError::Endpoints);
        }
        let endpoints: Vec<_> = config.endpoints.iter().map(|text| Endpoint::parse(text)).collect::<Result<_, _>>()?;
        Ok(Self {
            transport: Transport::new(&endpoints, config)?,
            endpoints,
            prefix: config.prefix.clone(),
            user: config.user.clone(),
            deadline,
            known: Mutex::new(Known::default()),
        })
    }

    fn store_key(&self) -> String {
        format!("{}store", self.prefix)
    }

    fn key(&self, vm: VmId) -> String {
        format!("{}vms/{vm}", self.prefix)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().expect("nobody panics while it is held")
    }

    /// One exchange with one member.
    async fn exchange(&self, index: usize, transaction: &Transaction) -> Result<TransactionResult, EtcdError> {
        let endpoint = &self.endpoints[index];
        let (before, token) = {
            let known = self.known();
            (known.revision, known.token.clone())
        };
        let token = match (&self.user, token) {
            (Some(user), None) => Some(self.authenticate(endpoint, user).await?),
            (_, token) => token,
        };
        let body = serde_json::to_vec(transaction).expect("a transaction is JSON");
        let answer = self.post(endpoint, "/v3/kv/txn", body, token.as_deref()).await;
        if matches!(answer, Err(EtcdError::Refused { code: UNAUTHENTICATED, .. })) {
            // It grew old. The next attempt asks for another one.
            self.known().token = None;
        }
        let result: TransactionResult = parse(endpoint, &answer?)?;
        self.check(endpoint, &result.header, before)?;
        Ok(result)
    }

    async fn authenticate(&self, endpoint: &Endpoint, user: &EtcdUser) -> Result<String, EtcdError> {
        let body = serde_json::json!({ "name": user.name, "password": user.password });
        let answer = self.post(endpoint, "/v3/auth/authenticate", body.to_string().into_bytes(), None).await?;
        let Authenticated { token } = parse(endpoint, &answer)?;
        self.known().token = Some(token.clone());
        Ok(token)
    }

    async fn post(
        &self,
        endpoint: &Endpoint,
        path: &'static str,
        body: Vec<u8>,
        token: Option<&str>,
    ) -> Result<Vec<u8>, EtcdError> {
        let after = MEMBER_WITHIN.min(self.deadline / 2);
        let (ok, answer) = tokio::time::timeout(after, self.transport.post(endpoint, path, body, token))
            .await
            .map_err(|_| EtcdError::Slow { endpoint: endpoint.to_string(), after })??;
        if ok {
            return Ok(answer);
        }
        let Failure { message, code } = parse(endpoint, &answer)?;
        Err(EtcdError::Refused { endpoint: endpoint.to_string(), message, code })
    }

    /// Whether the member is of the cluster that we know, and not behind what it had confirmed.
    fn check(&self, endpoint: &Endpoint, header: &Header, before: u64) -> Result<(), EtcdError> {
        let mut known = self.known();
        if *known.cluster.get_or_insert(header.cluster_id) != header.cluster_id {
            return Err(EtcdError::OtherCluster { endpoint: endpoint.to_string() });
        }
        if header.revision < before {
            return Err(EtcdError::WentBack { endpoint: endpoint.to_string(), now: header.revision, before });
        }
        known.revision = known.revision.max(header.revision);
        Ok(())
    }

    /// The operations that show the store's id and the VM's record.
    fn look(&self, vm: VmId) -> Vec<Operation> {
        vec![Operation::range(&self.store_key()), Operation::range(&self.key(vm))]
    }

    /// What [`EtcdStore::look`] brought. The store's id is 0 with `store_revision` 0 if there is none yet.
    fn seen(&self, vm: VmId, result: &TransactionResult, endpoint: &Endpoint) -> Result<Seen, EtcdError> {
        let [store, record] = &result.ranges()[..] else {
            let why = "not the two keys that were asked for".to_owned();
            return Err(EtcdError::Strange { endpoint: endpoint.to_string(), why });
        };
        let revision = |value: &Option<&KeyValue>| value.map_or(0, |value| value.mod_revision);
        let (store_revision, record_revision) = (revision(store), revision(record));
        let store = match store {
            None => StoreId::default(),
            Some(value) => {
                let text = String::from_utf8_lossy(&value.value);
                let made: StoreId = text.parse().map_err(|_| EtcdError::Damaged {
                    key: self.store_key(),
                    why: "it holds no store id".to_owned(),
                })?;
                combined(made, result.header.cluster_id)
            }
        };
        let record = match record {
            None => None,
            Some(value) => {
                let key = self.key(vm);
                let record =
                    disk::parse(vm, &value.value).map_err(|why| EtcdError::Damaged { key: key.clone(), why })?;
                if record.store != store {
                    return Err(EtcdError::OtherStore { key, wrote: record.store });
                }
                Some(record)
            }
        };
        Ok(Seen { store_revision, store, record_revision, record })
    }

    /// Asks one member.
    async fn ask_member(&self, index: usize, request: &StoreRequest) -> Result<StoreAnswer, EtcdError> {
        let (vm, endpoint) = (request.vm, &self.endpoints[index]);
        let look = Transaction { success: self.look(vm), ..Transaction::default() };
        let mut seen = self.seen(vm, &self.exchange(index, &look).await?, endpoint)?;
        if seen.store_revision == 0 {
            // The first question ever. Whoever else makes it at the same moment, one of the ids stays.
            let fresh = StoreId(*uuid::Uuid::new_v4().as_bytes());
            let make = Transaction {
                compare: vec![Compare::unchanged(&self.store_key(), 0)],
                success: vec![Operation::put(&self.store_key(), fresh.to_string().as_bytes())],
                failure: Vec::new(),
            };
            self.exchange(index, &make).await?;
            seen = self.seen(vm, &self.exchange(index, &look).await?, endpoint)?;
            if seen.store_revision == 0 {
                let why = "its id was removed while it was asked".to_owned();
                return Err(EtcdError::Strange { endpoint: endpoint.to_string(), why });
            }
        }
        let answer = |seen: &Seen, record: Option<Record>, applied: bool| StoreAnswer {
            id: request.id,
            vm,
            store: seen.store,
            record,
            applied,
        };
        let StoreOp::Change { expect, owner } = request.op else { return Ok(answer(&seen, seen.record, false)) };
        let expected = expect == seen.record.map(|record| (record.store, record.revision));
        let old = seen.record.as_ref();
        if !expected || permitted(request.asker, old.map(|record| &record.owner), &owner).is_err() {
            return Ok(answer(&seen, seen.record, false));
        }
        let next = Record::changed(seen.store, old, owner);
        let change = Transaction {
            compare: vec![
                Compare::unchanged(&self.store_key(), seen.store_revision),
                Compare::unchanged(&self.key(vm), seen.record_revision),
            ],
            success: vec![Operation::put(&self.key(vm), &disk::file(vm, next))],
            failure: self.look(vm),
        };
        let result = self.exchange(index, &change).await?;
        if result.succeeded {
            return Ok(answer(&seen, Some(next), true));
        }
        let now = self.seen(vm, &result, endpoint)?;
        Ok(answer(&now, now.record, false))
    }

    /// Asks one member after the other until an answer or the deadline comes. A request that was sent twice is harmless, as for the
    /// witness: its second copy finds the record changed and shows it.
    async fn ask_until(&self, request: StoreRequest) -> Result<StoreAnswer, StoreError> {
        let end = Instant::now() + self.deadline;
        let mut last = None;
        loop {
            let first = self.known().preferred;
            for turn in 0..self.endpoints.len() {
                let index = (first + turn) % self.endpoints.len();
                match tokio::time::timeout_at(end, self.ask_member(index, &request)).await {
                    Ok(Ok(answer)) => {
                        self.known().preferred = index;
                        return Ok(answer);
                    }
                    Ok(Err(error)) if error.may_pass() => last = Some(error),
                    Ok(Err(error)) => return Err(StoreError::Etcd(error)),
                    Err(_) => {}
                }
                // A question that follows begins with another one, however short its deadline.
                self.known().preferred = (index + 1) % self.endpoints.len();
            }
            if Instant::now() + PAUSE >= end {
                let source = last.map(|error| Box::new(StoreError::Etcd(error)));
                return Err(StoreError::Silent { after: self.deadline, source });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl OwnershipStore for EtcdStore {
    fn ask(&self, request: StoreRequest) -> Asked<'_> {
        Box::pin(self.ask_until(request))
    }
}

/// The id that was made in a cluster and the cluster's own, as one.
fn combined(made: StoreId, cluster: u64) -> StoreId {
    let mut bytes = made.0;
    for (byte, other) in bytes.iter_mut().zip(cluster.to_be_bytes()) {
        *byte ^= other;
    }
    StoreId(bytes)
}

fn parse<T: serde::de::DeserializeOwned>(endpoint: &Endpoint, bytes: &[u8]) -> Result<T, EtcdError> {
    serde_json::from_slice(bytes)
        .map_err(|error| EtcdError::Strange { endpoint: endpoint.to_string(), why: error.to_string() })
}
