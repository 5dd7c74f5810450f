//! The store that a host of the pair keeps itself, where there is no third host.
//!
//! It is a witness's store in the agent's state directory, with the same promises, asked over the agent's own address. One thing more: in a new life it
//! answers nothing of a VM before the other host has shown what its store has of it, since this host may have been forced out meanwhile
//! (`docs/protocol.md` P13). Whoever drives it asks by [`ask_what_is_kept`] for each of [`Keeper::questions`].

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::VarInt;

use heartbeat_core::ids::{Generation, NodeId, Party, StoreId, VmId};
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::StoreRequest;
use heartbeat_core::wire::MAX_STORE_MESSAGE;

use super::DiskError;
use super::disk::Disk;
use super::serve::{Server, serve_connection};
use crate::quic::{Connection, Endpoint, MessageError, Purpose, QuicError, read_message, write_message};
use crate::store::{Asked, OwnershipStore, RESET_LATCHED, StoreError};
use crate::trust::Peers;

/// How long an answer of this host's own store may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Why a host could not be forced out. The record is what it was, unless the write failed: then this VM is refused until the agent starts again.
#[derive(Debug, thiserror::Error)]
pub enum ForceError {
    /// Another change is under way, or the record is damaged.
    #[error("the record that this host keeps of the VM cannot be written now")]
    Busy,
    /// The disk failed.
    #[error("the record could not be written to this host's state directory; see the agent's log")]
    NotWritten,
}

/// A host's own store.
#[derive(Debug, Clone)]
pub struct Keeper {
    server: Arc<Server>,
    me: NodeId,
}

/// Of a VM, who has to be asked before this store may answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Which VM.
    pub vm: VmId,
    /// Who may have forced this host out; `None`: any host that it is paired with, and all of them must answer.
    pub of: Option<NodeId>,
}

impl Keeper {
    /// Opens the store below `dir`, in a new life of the agent of `me`. The store is made if there is none.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(dir: &Path, me: NodeId, peers: Arc<Peers>) -> Result<Self, DiskError> {
        let (disk, found) = Disk::open(dir)?;
        Ok(Self { server: Arc::new(Server::of_pair(disk, found, peers, me)), me })
    }

    /// The store's id.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.server.store()
    }

    /// The durable record of a VM, which may be older than what the other host has.
    #[must_use]
    pub fn record(&self, vm: VmId) -> Option<Record> {
        self.server.record(vm)
    }

    /// Whether this store answers for a VM.
    #[must_use]
    pub fn is_confirmed(&self, vm: VmId) -> bool {
        !self.server.is_unconfirmed(vm)
    }

    /// Serves the other host's connection to its end.
    pub async fn serve(&self, connection: Connection) {
        match connection.purpose {
            Purpose::Kept => self.show(connection).await,
            _ => serve_connection(self.server.clone(), connection).await,
        }
    }

    /// What has to be asked: of VMs that it must not answer for, and of those whose winner did not say yet that it runs.
    #[must_use]
    pub fn questions(&self) -> Vec<Question> {
        let whole = self.server.records().into_iter().filter_map(|known| Some((known.vm, known.state.ok()?)));
        whole.filter_map(|(vm, record)| self.question(vm, &record)).collect()
    }

    fn question(&self, vm: VmId, record: &Record) -> Option<Question> {
        let another = |party: Party| Some(party.node).filter(|node| *node != self.me);
        let (of, waits) = match record.owner {
            Owner::Paired { primary, standby } => (another(primary).or(another(standby)), false),
            Owner::Solo { node, activated, other } => {
                (another(node).or(other.and_then(another)), node.node != self.me && !activated)
            }
            Owner::Stopped { node } => (another(node), false),
        };
        (waits || self.server.is_unconfirmed(vm)).then_some(Question { vm, of })
    }

    /// What the other host's own store has of a VM: [`ask_what_is_kept`].
    pub fn told(&self, vm: VmId, theirs: Option<&Record>) {
        self.server.told_of_other(vm, theirs);
    }

    /// The other host of this VM is about to be confirmed dead. As long as what this returns is there, that host is shown nothing; `None`: somebody else has it.
    #[must_use]
    pub fn begin_force(&self, vm: VmId) -> Option<Forcing> {
        self.server.begin_force(vm).then(|| Forcing { keeper: self.clone(), vm })
    }

    /// Shows a paired host what is durable, and certain: whether it was forced out is not known while that is being written.
    async fn show(&self, connection: Connection) {
        while let Ok((mut send, mut recv)) = connection.quic.accept_bi().await {
            let Ok(vm) = read_message::<VmId>(&mut recv, MAX_STORE_MESSAGE).await else { return };
            let Some(kept) = self.server.shown(vm) else {
                // It asks again. Fails only if it has gone.
                let _ = send.reset(VarInt::from_u32(RESET_LATCHED));
                continue;
            };
            if write_message(&mut send, &kept).await.is_ok() {
                // Fails only if the asker has gone.
                let _ = send.finish();
            }
        }
    }
}

/// Somebody forces the other host of a VM out, or lets it be, by dropping this.
#[derive(Debug)]
pub struct Forcing {
    keeper: Keeper,
    vm: VmId,
}

impl Forcing {
    /// The other host is confirmed dead, which was asked for after this began: from now on this store's record names `me` alone. Durable when it returns.
    ///
    /// # Errors
    /// [`ForceError`].
    pub async fn confirmed(self, me: Party, seen: Generation) -> Result<Record, ForceError> {
        let written = self.keeper.server.force(self.vm, me, seen).ok_or(ForceError::Busy)?;
        match written.await {
            Ok(true) => self.keeper.record(self.vm).ok_or(ForceError::NotWritten),
            Ok(false) | Err(_) => Err(ForceError::NotWritten),
        }
    }
}

impl Drop for Forcing {
    fn drop(&mut self) {
        self.keeper.server.end_force(self.vm);
    }
}

impl OwnershipStore for Keeper {
    fn ask(&self, request: StoreRequest) -> Asked<'_> {
        Box::pin(async move {
            let silent = || StoreError::Silent { after: ANSWER_WITHIN, source: None };
            let mut pending = self.server.request(self.me, request).map_err(|_| StoreError::Latched)?;
            let answer = tokio::time::timeout(ANSWER_WITHIN, &mut pending.receiver).await;
            answer.map_err(|_| silent())?.map_err(|_| silent())
        })
    }
}

/// Why the other host did not show what it keeps.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// It cannot be reached.
    #[error("the other host cannot be reached")]
    Unreachable(#[from] QuicError),
    /// The connection broke.
    #[error("the connection to the other host broke")]
    Broken(#[from] MessageError),
}

/// Asks another host what its own store has of a VM.
///
/// # Errors
/// [`KeptError`]; that proves nothing.
pub async fn ask_what_is_kept(endpoint: &Endpoint, node: NodeId, vm: VmId) -> Result<Option<Record>, KeptError> {
    let connection = endpoint.connect(node, Purpose::Kept).await?;
    let lost = |error| KeptError::Broken(MessageError::Read(quinn::ReadError::ConnectionLost(error)));
    let (mut send, mut recv) = connection.quic.open_bi().await.map_err(lost)?;
    write_message(&mut send, &vm).await?;
    Ok(read_message(&mut recv, MAX_STORE_MESSAGE).await?)
}
