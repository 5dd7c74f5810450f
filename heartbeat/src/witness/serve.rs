//! Between the connections, the witness machine and the disk.
//!
//! The machine is behind one lock, held only to feed it and to take its outputs; the disk is written on
//! blocking threads, one write per VM at a time (the machine sees to that).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use heartbeat_core::ids::{Generation, NodeId, Party, StoreId, VmId};
use heartbeat_core::record::Record;
use heartbeat_core::store::{StoreAnswer, StoreRequest};
use heartbeat_core::wire::MAX_STORE_MESSAGE;
use heartbeat_core::witness::{Witness, WitnessOutput, WitnessStats};
use quinn::{RecvStream, SendStream, VarInt};
use tokio::sync::{Semaphore, oneshot};

use super::WitnessRecord;
use super::disk::{Disk, Found};
use crate::quic::{Connection, Endpoint, Purpose, close, read_message, write_message};
use crate::store::RESET_LATCHED;
use crate::trust::Peers;

/// Connections served at once; one more is turned away.
const MAX_CONNECTIONS: usize = 512;
/// Disk writes at once.
const MAX_WRITES: u32 = 16;
/// How long a request may take from its first byte to its answer.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// The witness behind its connections.
#[derive(Debug)]
pub(super) struct Server {
    disk: Arc<Disk>,
    peers: Arc<Peers>,
    writes: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    machine: Witness,
    /// VMs whose record cannot be trusted, and why.
    latched: BTreeMap<VmId, String>,
    answers: HashMap<u64, oneshot::Sender<StoreAnswer>>,
    /// Who waits for a forced record, by VM.
    forced: BTreeMap<VmId, oneshot::Sender<bool>>,
    next_tag: u64,
}

impl Server {
    pub(super) fn new(disk: Disk, found: Vec<Found>, peers: Arc<Peers>) -> Self {
        Self::with(disk, found, peers, Witness::new)
    }

    /// Kept by a host of the pair itself.
    pub(super) fn of_pair(disk: Disk, found: Vec<Found>, peers: Arc<Peers>, me: NodeId) -> Self {
        Self::with(disk, found, peers, |store, records| Witness::of_pair(store, records, me))
    }

    fn with(
        disk: Disk,
        found: Vec<Found>,
        peers: Arc<Peers>,
        machine: impl FnOnce(StoreId, Vec<(VmId, Record)>) -> Witness,
    ) -> Self {
        let mut records: Vec<(VmId, Record)> = Vec::new();
        let mut latched = BTreeMap::new();
        for (vm, state) in found {
            match state {
                Ok(record) => records.push((vm, record)),
                Err(why) => {
                    tracing::error!(%vm, why, "a record is damaged: requests for this VM are refused until an operator restores or removes it");
                    latched.insert(vm, why);
                }
            }
        }
        let machine = machine(disk.store(), records);
        let state = State { machine, latched, answers: HashMap::new(), forced: BTreeMap::new(), next_tag: 0 };
        let writes = Arc::new(Semaphore::new(usize::try_from(MAX_WRITES).expect("small")));
        Self { disk: Arc::new(disk), peers, writes, state: Mutex::new(state) }
    }

    pub(super) fn store(&self) -> StoreId {
        self.disk.store()
    }

    pub(super) fn stats(&self) -> WitnessStats {
        self.lock().machine.stats()
    }

    pub(super) fn records(&self) -> Vec<WitnessRecord> {
        let state = self.lock();
        let mut records: BTreeMap<VmId, Result<Record, String>> =
            state.machine.records().map(|(vm, record)| (vm, Ok(*record))).collect();
        records.extend(state.latched.iter().map(|(vm, why)| (*vm, Err(why.clone()))));
        records.into_iter().map(|(vm, state)| WitnessRecord { vm, state }).collect()
    }

    pub(super) fn record(&self, vm: VmId) -> Option<Record> {
        self.lock().machine.record(vm).copied()
    }

    pub(super) fn is_unconfirmed(&self, vm: VmId) -> bool {
        self.lock().machine.is_unconfirmed(vm)
    }

    /// See [`Witness::shown`]. A damaged record is no absent one.
    pub(super) fn shown(&self, vm: VmId) -> Option<Option<Record>> {
        let state = self.lock();
        state.machine.shown(vm).filter(|_| !state.latched.contains_key(&vm))
    }

    /// See [`Witness::handle_forcing`].
    pub(super) fn begin_force(&self, vm: VmId) -> bool {
        self.lock().machine.handle_forcing(vm)
    }

    /// See [`Witness::handle_force_over`].
    pub(super) fn end_force(&self, vm: VmId) {
        self.lock().machine.handle_force_over(vm);
    }

    /// See [`Witness::handle_others_record`].
    pub(super) fn told_of_other(self: &Arc<Self>, vm: VmId, theirs: Option<&Record>) {
        self.lock().machine.handle_others_record(vm, theirs);
        self.pump();
    }

    /// See [`Witness::handle_force`]. The receiver hears whether the record became durable.
    pub(super) fn force(self: &Arc<Self>, vm: VmId, me: Party, seen: Generation) -> Option<oneshot::Receiver<bool>> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.lock();
            if state.latched.contains_key(&vm) || !state.machine.handle_force(vm, me, seen) {
                return None;
            }
            state.forced.insert(vm, sender);
        }
        self.pump();
        Some(receiver)
    }

    /// Waits until no disk write is under way.
    pub(super) async fn settle(&self) {
        let all = self.writes.acquire_many(MAX_WRITES).await;
        drop(all.expect("the semaphore is never closed"));
    }

    /// Nothing panics while it holds the lock but by our own bug; then the record is not to be trusted.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no one panicked in the witness machine")
    }

    /// Feeds a request. The answer comes by the receiver; if the machine drops the request, never.
    pub(super) fn request(self: &Arc<Self>, from: NodeId, request: StoreRequest) -> Result<Pending, Latched> {
        let (sender, receiver) = oneshot::channel();
        let tag = {
            let mut state = self.lock();
            if state.latched.contains_key(&request.vm) {
                return Err(Latched);
            }
            let tag = state.next_tag;
            state.next_tag += 1;
            state.answers.insert(tag, sender);
            state.machine.handle_request(from, tag, request);
            tag
        };
        let pending = Pending { server: self.clone(), tag, receiver };
        self.pump();
        Ok(pending)
    }

    /// Does what the machine wants done.
    fn pump(self: &Arc<Self>) {
        let mut state = self.lock();
        while let Some(output) = state.machine.poll_output() {
            match output {
                WitnessOutput::Answer { tag, answer, .. } => {
                    if let Some(sender) = state.answers.remove(&tag) {
                        // The asker may have gone; its answer is then lost, which proves nothing to it.
                        let _ = sender.send(answer);
                    }
                }
                WitnessOutput::Persist { vm, record, token } => {
                    tokio::spawn(self.clone().persist(vm, record, token));
                }
            }
        }
    }

    async fn persist(self: Arc<Self>, vm: VmId, record: Record, token: u64) {
        let permit = self.writes.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let disk = self.disk.clone();
        let written = tokio::task::spawn_blocking(move || {
            let written = disk.write(vm, record);
            // Held by the write itself, so that it counts even if this task is dropped.
            drop(permit);
            written
        });
        let written = written.await.expect("writing a record does not panic");
        {
            let mut state = self.lock();
            if let Some(waiting) = state.forced.remove(&vm) {
                // Who forced it may have gone.
                let _ = waiting.send(written.is_ok());
            }
            match written {
                Ok(()) => {
                    state.machine.handle_persisted(token);
                    tracing::info!(%vm, generation = %record.generation, owner = ?record.owner, "record changed");
                }
                Err(error) => {
                    state.machine.handle_persist_failed(token);
                    let why = format!("its record could not be written: {error}");
                    tracing::error!(%vm, %error, "a record could not be written: requests for this VM are refused until the witness is restarted");
                    state.latched.insert(vm, why);
                }
            }
        }
        self.pump();
    }
}

/// The VM is refused.
#[derive(Debug)]
pub(super) struct Latched;

/// A request that waits for its answer. Dropping it forgets the answer.
#[derive(Debug)]
pub(super) struct Pending {
    server: Arc<Server>,
    tag: u64,
    pub(super) receiver: oneshot::Receiver<StoreAnswer>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.server.lock().answers.remove(&self.tag);
    }
}

/// Takes connections until the endpoint closes.
pub(super) async fn accept_all(server: Arc<Server>, endpoint: Arc<Endpoint>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Some(connection) = endpoint.accept().await {
        if connection.purpose != Purpose::Witness {
            connection.close(close::PROTOCOL, "this is a witness");
            continue;
        }
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            connection.close(close::BUSY, "too many connections");
            continue;
        };
        let server = server.clone();
        tokio::spawn(async move {
            serve_connection(server, connection).await;
            drop(permit);
        });
    }
}

/// One request per stream; the transport bounds how many are open.
pub(super) async fn serve_connection(server: Arc<Server>, connection: Connection) {
    let from = connection.peer.node;
    while let Ok((send, recv)) = connection.quic.accept_bi().await {
        if server.peers.by_certificate(&connection.peer.certificate).is_none() {
            connection.close(close::NOT_PAIRED, "not paired any more");
            return;
        }
        let (server, quic) = (server.clone(), connection.quic.clone());
        tokio::spawn(async move {
            let serve = serve_request(&server, from, &quic, send, recv);
            if tokio::time::timeout(REQUEST_DEADLINE, serve).await.is_err() {
                tracing::warn!(%from, "a request got no answer in time");
            }
        });
    }
}

async fn serve_request(
    server: &Arc<Server>,
    from: NodeId,
    quic: &quinn::Connection,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let request: StoreRequest = match read_message(&mut recv, MAX_STORE_MESSAGE).await {
        Ok(request) => request,
        Err(error) => {
            if error.is_peers_fault() {
                tracing::warn!(%from, %error, "a request broke the protocol");
                quic.close(VarInt::from_u32(close::PROTOCOL), b"bad request");
            }
            return;
        }
    };
    if request.asker.node != from {
        tracing::warn!(%from, claimed = %request.asker.node, "a request in another node's name");
        quic.close(VarInt::from_u32(close::PROTOCOL), b"asker is not the peer");
        return;
    }
    let Ok(mut pending) = server.request(from, request) else {
        tracing::warn!(%from, vm = %request.vm, "a request for a VM whose record is damaged was refused");
        let _ = send.reset(VarInt::from_u32(RESET_LATCHED));
        return;
    };
    if let Ok(answer) = (&mut pending.receiver).await
        && write_message(&mut send, &answer).await.is_ok()
    {
        // Fails only if the asker has gone.
        let _ = send.finish();
    }
}

#[cfg(test)]
mod tests {
    use heartbeat_core::ids::Incarnation;
    use heartbeat_core::record::Owner;
    use heartbeat_core::store::StoreOp;

    use super::*;

    const VM: VmId = VmId([3; 16]);

    fn party(n: u8) -> Party {
        Party { node: NodeId([n; 16]), incarnation: Incarnation(1) }
    }

    fn pairing(id: u64, primary: u8, standby: u8) -> StoreRequest {
        let owner = Owner::Paired { primary: party(primary), standby: party(standby) };
        let op = StoreOp::Change { expect: None, owner };
        StoreRequest { id, vm: VM, asker: party(primary), op }
    }

    #[test]
    fn a_witness_killed_between_persist_and_answer_keeps_its_vote() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, _) = Disk::open(dir.path()).expect("open");
        let mut machine = Witness::new(disk.store(), []);
        machine.handle_request(party(1).node, 0, pairing(1, 1, 2));
        let Some(WitnessOutput::Persist { vm, record, .. }) = machine.poll_output() else {
            panic!("a change is persisted before it is answered");
        };
        assert_eq!(machine.poll_output(), None, "nothing is said before it is durable");
        disk.write(vm, record).expect("write");
        // Killed here: the machine never learns that the write ended, and nobody got an answer.
        drop((machine, disk));

        let (disk, found) = Disk::open(dir.path()).expect("restart");
        let records = found.into_iter().map(|(vm, state)| (vm, state.expect("whole")));
        let mut machine = Witness::new(disk.store(), records);
        machine.handle_request(party(2).node, 7, pairing(2, 2, 1));
        let Some(WitnessOutput::Answer { tag: 7, answer, .. }) = machine.poll_output() else {
            panic!("a refusal needs no disk");
        };
        assert!(!answer.applied);
        assert_eq!(answer.record, Some(record), "the first vote stands");
    }

    #[tokio::test]
    async fn a_damaged_record_is_refused_and_shown_and_others_are_served() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, _) = Disk::open(dir.path()).expect("open");
        let peers = Arc::new(Peers::open(&dir.path().join("peers")).expect("peers"));
        let found = vec![(VM, Err("its checksum is wrong".to_owned()))];
        let server = Arc::new(Server::new(disk, found, peers));
        assert!(server.request(party(1).node, pairing(1, 1, 2)).is_err());
        let records = server.records();
        assert!(matches!(&records[..], [WitnessRecord { vm: VM, state: Err(_) }]), "{records:?}");

        let other = StoreRequest { vm: VmId([4; 16]), ..pairing(2, 1, 2) };
        let mut pending = server.request(party(1).node, other).expect("served");
        let answer = (&mut pending.receiver).await.expect("answered");
        assert!(answer.applied);
    }

    /// `docs/protocol.md` P13: what may have been forced is not shown as it was before, and a damaged record is not shown as none.
    #[tokio::test]
    async fn a_record_that_is_not_known_for_sure_is_not_shown() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, _) = Disk::open(dir.path()).expect("open");
        let peers = Arc::new(Peers::open(&dir.path().join("peers")).expect("peers"));
        let damaged = VmId([4; 16]);
        let found = vec![(damaged, Err("its checksum is wrong".to_owned()))];
        let server = Arc::new(Server::of_pair(disk, found, peers, party(1).node));
        assert_eq!(server.shown(damaged), None);
        assert_eq!(server.shown(VM), Some(None), "it keeps nothing of it");
        assert!(server.begin_force(VM));
        assert_eq!(server.shown(VM), None, "it may be forced in a moment");
        server.end_force(VM);
        assert_eq!(server.shown(VM), Some(None), "it was not");
        assert!(server.begin_force(VM));
        // The runtime has one thread: the write begins when this test waits.
        let forced = server.force(VM, party(1), Generation(1)).expect("it may be written");
        assert_eq!(server.shown(VM), None, "nobody knows yet");
        assert!(forced.await.expect("it is written"));
        server.end_force(VM);
        let shown = server.shown(VM).expect("it is known").expect("there is one");
        assert!(matches!(shown.owner, Owner::Solo { node, .. } if node == party(1)), "{shown:?}");

        std::fs::remove_dir_all(dir.path().join("records")).expect("break the disk");
        assert!(server.begin_force(VM));
        let forced = server.force(VM, party(1), Generation(1)).expect("it is tried");
        assert!(!forced.await.expect("it is tried"));
        server.end_force(VM);
        assert_eq!(server.shown(VM), None, "which of the two the disk has is not known");
    }

    #[tokio::test]
    async fn a_write_that_fails_latches_its_vm() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, _) = Disk::open(dir.path()).expect("open");
        let peers = Arc::new(Peers::open(&dir.path().join("peers")).expect("peers"));
        let server = Arc::new(Server::new(disk, Vec::new(), peers));
        std::fs::remove_dir_all(dir.path().join("records")).expect("break the disk");
        let mut pending = server.request(party(1).node, pairing(1, 1, 2)).expect("taken");
        server.settle().await;
        // The failure reaches the machine after the write gave up its permit; ask until it is there.
        while !server.lock().latched.contains_key(&VM) {
            tokio::task::yield_now().await;
        }
        assert!(pending.receiver.try_recv().is_err(), "no answer");
        assert!(server.request(party(1).node, pairing(2, 1, 2)).is_err());
    }
}
