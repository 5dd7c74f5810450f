//! Two nodes and a witness on 127.0.0.1.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{ANY, Node, patiently};
use heartbeat::quic::{Purpose, read_message, write_message};
use heartbeat::store::{OwnershipStore, StoreError, WitnessClient, WitnessClients};
use heartbeat::trust::pairing::join;
use heartbeat::trust::{IdentityError, WindowLimits};
use heartbeat::witness::{WitnessConfig, WitnessDaemon, WitnessError};
use heartbeat_core::ids::{Party, StoreId, VmId};
use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};
use tempfile::TempDir;

const ROUNDS: u8 = 100;

/// Starts a witness; if its directory's former user is just going away, waits for that.
async fn start_witness(dir: &Path, listen: SocketAddr) -> WitnessDaemon {
    let config = WitnessConfig { state_dir: dir.to_path_buf(), listen, name: Some("w".to_owned()) };
    patiently(async {
        loop {
            match WitnessDaemon::start(&config) {
                Ok(daemon) => return daemon,
                Err(WitnessError::Identity(IdentityError::InUse { .. }) | WitnessError::Quic(_)) => {
                    tokio::task::yield_now().await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await
}

/// Pairs `node` with the witness by a code, and makes a client of it.
async fn pair(node: &Node, witness: &WitnessDaemon) -> Arc<WitnessClient> {
    let window = witness.open_pairing(ANY, WindowLimits::default()).expect("window");
    let (address, code) = (window.local_addr().expect("open"), window.code().clone());
    let card = node.card();
    let (owner, joiner) = tokio::join!(window.wait(), join(&node.identity, &node.peers, &card, address, &code));
    assert_eq!(owner.expect("paired").node, node.identity.node());
    let peer = joiner.expect("paired");
    Arc::new(WitnessClient::new(node.endpoint.clone(), peer.node, common::PATIENCE))
}

struct World {
    dir: TempDir,
    witness: WitnessDaemon,
    a: Node,
    b: Node,
    of_a: Arc<WitnessClient>,
    of_b: Arc<WitnessClient>,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let witness = start_witness(dir.path(), ANY).await;
        let (a, b) = (Node::start("a"), Node::start("b"));
        let (of_a, of_b) = (pair(&a, &witness).await, pair(&b, &witness).await);
        Self { dir, witness, a, b, of_a, of_b }
    }

    fn party(node: &Node) -> Party {
        Party { node: node.identity.node(), incarnation: node.identity.incarnation() }
    }
}

fn request(id: u64, vm: VmId, asker: Party, op: StoreOp) -> StoreRequest {
    StoreRequest { id, vm, asker, op }
}

/// A request to change what `seen` showed.
fn change(seen: &StoreAnswer, asker: Party, owner: Owner) -> StoreRequest {
    let expect = seen.record.map(|record| (record.store, record.revision));
    request(seen.id + 1, seen.vm, asker, StoreOp::Change { expect, owner })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_that_race_exactly_one_wins() {
    let world = World::start().await;
    let (a, b) = (World::party(&world.a), World::party(&world.b));
    let mut wins_of_a = 0;
    for round in 0..ROUNDS {
        let vm = VmId([round; 16]);
        let pairing = Owner::Paired { primary: a, standby: b };
        let paired = request(1, vm, a, StoreOp::Change { expect: None, owner: pairing });
        let paired = world.of_a.ask(paired).await.expect("answer");
        assert!(paired.applied);
        let solo = |node, other| Owner::Solo { node, activated: false, other: Some(other) };
        let (first, second) = tokio::join!(
            world.of_a.ask(change(&paired, a, solo(a, b))),
            world.of_b.ask(change(&paired, b, solo(b, a)))
        );
        let (first, second) = (first.expect("answer"), second.expect("answer"));
        assert!(first.applied != second.applied, "round {round}: {first:?} {second:?}");
        assert_eq!(first.record, second.record, "the loser sees who won");
        wins_of_a += u32::from(first.applied);
    }
    println!("a won {wins_of_a} of {ROUNDS} races");
    let stats = world.witness.stats();
    assert_eq!(stats.applied, 2 * u64::from(ROUNDS));
    assert_eq!(stats.refused_expectation, u64::from(ROUNDS));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_witness_keeps_its_records_and_its_clients_find_it_again() {
    let mut world = World::start().await;
    let (a, b) = (World::party(&world.a), World::party(&world.b));
    let vm = VmId([9; 16]);
    let listen = world.witness.local_addr().expect("open");
    let mut seen = world.of_a.ask(request(1, vm, a, StoreOp::Read)).await.expect("answer");
    assert_eq!(seen.record, None);
    for kill in [false, true, false] {
        let owner = match seen.record.map(|record| record.owner) {
            Some(Owner::Solo { .. }) => Owner::Paired { primary: a, standby: b },
            _ => Owner::Solo { node: a, activated: true, other: seen.record.map(|_| b) },
        };
        seen = world.of_a.ask(change(&seen, a, owner)).await.expect("answer");
        assert!(seen.applied, "{seen:?}");
        if !kill {
            world.witness.stop().await;
        }
        drop(world.witness);
        world.witness = start_witness(world.dir.path(), listen).await;
        for (client, party) in [(&world.of_a, a), (&world.of_b, b)] {
            let read = client.ask(request(77, vm, party, StoreOp::Read)).await.expect("answer");
            assert_eq!((read.store, read.record), (seen.store, seen.record));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_in_another_nodes_name_is_refused_and_changes_nothing() {
    let world = World::start().await;
    let (a, b) = (World::party(&world.a), World::party(&world.b));
    let vm = VmId([5; 16]);
    let owner = Owner::Paired { primary: a, standby: b };
    let forged = request(1, vm, a, StoreOp::Change { expect: None, owner });
    let connection =
        world.b.endpoint.connect(world.witness.identity().node(), Purpose::Witness).await.expect("connected");
    let (mut send, mut recv) = connection.quic.open_bi().await.expect("stream");
    write_message(&mut send, &forged).await.expect("write");
    let answer = patiently(read_message::<StoreAnswer>(&mut recv, 512)).await;
    assert!(answer.is_err(), "{answer:?}");
    let read = world.of_a.ask(request(2, vm, a, StoreOp::Read)).await.expect("answer");
    assert_eq!(read.record, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_record_is_refused_at_once_and_not_taken_for_absent() {
    let mut world = World::start().await;
    let (a, b) = (World::party(&world.a), World::party(&world.b));
    let vm = VmId([6; 16]);
    let owner = Owner::Paired { primary: a, standby: b };
    let pairing = request(1, vm, a, StoreOp::Change { expect: None, owner });
    assert!(world.of_a.ask(pairing).await.expect("answer").applied);
    let listen = world.witness.local_addr().expect("open");
    world.witness.stop().await;
    drop(world.witness);
    let file = world.dir.path().join("records").join(format!("{vm}.record"));
    std::fs::write(&file, b"damaged").expect("damage");
    world.witness = start_witness(world.dir.path(), listen).await;
    let refused = world.of_a.ask(request(2, vm, a, StoreOp::Read)).await;
    assert!(matches!(refused, Err(StoreError::Latched)), "{refused:?}");
    let records = world.witness.records();
    assert!(records.len() == 1 && records[0].state.is_err(), "{records:?}");
    let other = world.of_a.ask(request(3, VmId([7; 16]), a, StoreOp::Read)).await;
    assert_eq!(other.expect("other VMs are served").record, None);
}

/// Two nodes of which the second answers every question with a record that is not there; on its first connection only so many. The first node, the
/// second, and how many connections that one has accepted.
fn played(answers: u32) -> (Node, Node, Arc<AtomicU32>) {
    let (asker, witness) = (Node::start("a"), Node::start("w"));
    common::introduce(&asker, &witness);
    let accepted = Arc::new(AtomicU32::new(0));
    let (counts, endpoint) = (accepted.clone(), witness.endpoint.clone());
    tokio::spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            let first = counts.fetch_add(1, Ordering::SeqCst) == 0;
            tokio::spawn(async move {
                let (mut asked, mut unanswered) = (0, Vec::new());
                while let Ok((mut send, mut recv)) = connection.quic.accept_bi().await {
                    let StoreRequest { id, vm, .. } = read_message(&mut recv, 512).await.expect("a question");
                    asked += 1;
                    if first && asked > answers {
                        unanswered.push((send, recv));
                        continue;
                    }
                    let answer = StoreAnswer { id, vm, store: StoreId([1; 16]), record: None, applied: false };
                    write_message(&mut send, &answer).await.expect("somebody hears");
                }
            });
        }
    });
    (asker, witness, accepted)
}

/// So a failover finds the connection of whoever looked after its witness, and need not dial.
#[tokio::test]
async fn all_questions_to_one_node_go_over_one_connection() {
    let (asker, witness, accepted) = played(u32::MAX);
    let (a, node) = (World::party(&asker), witness.identity.node());
    let clients = WitnessClients::new(asker.endpoint.clone(), common::PATIENCE);
    for (id, connections) in [(1, 1), (2, 1), (3, 2)] {
        if id == 3 {
            clients.retain(|_| false);
        }
        let answer = clients.of(node).ask(request(id, VmId([1; 16]), a, StoreOp::Read)).await.expect("answer");
        assert_eq!((answer.id, accepted.load(Ordering::SeqCst)), (id, connections));
    }
}

/// The path that it goes over may have failed with the primary.
#[tokio::test]
async fn a_connection_that_brings_no_answer_any_more_is_replaced() {
    let (asker, witness, accepted) = played(1);
    let a = World::party(&asker);
    let client = WitnessClient::new(asker.endpoint.clone(), witness.identity.node(), common::PATIENCE);
    for (id, connections) in [(1, 1), (2, 2), (3, 2)] {
        let answer = patiently(client.ask(request(id, VmId([1; 16]), a, StoreOp::Read))).await.expect("answer");
        assert_eq!((answer.id, accepted.load(Ordering::SeqCst)), (id, connections));
    }
}

#[tokio::test]
async fn a_witness_that_is_not_there_is_a_silence() {
    let world = World::start().await;
    let a = World::party(&world.a);
    let node = world.witness.identity().node();
    world.witness.stop().await;
    drop(world.witness);
    let client = WitnessClient::new(world.a.endpoint.clone(), node, Duration::from_millis(300));
    let silent = client.ask(request(1, VmId([1; 16]), a, StoreOp::Read)).await;
    assert!(matches!(silent, Err(StoreError::Silent { .. })), "{silent:?}");
}
