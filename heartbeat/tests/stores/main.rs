//! What every ownership store keeps, asked of each of them; and what only some of them can be asked.

mod cluster;
#[path = "../common/mod.rs"]
mod common;
mod contract;
mod etcd;

use std::sync::Arc;

use common::{ANY, Node, PATIENCE, patiently};
use contract::Side;
use heartbeat::store::WitnessClient;
use heartbeat::trust::WindowLimits;
use heartbeat::trust::pairing::join;
use heartbeat::witness::{WitnessConfig, WitnessDaemon};
use heartbeat_core::ids::Party;

/// Pairs `node` with the witness and makes a client of it.
async fn side(node: &Node, witness: &WitnessDaemon) -> Side {
    let window = witness.open_pairing(ANY, WindowLimits::default()).expect("window");
    let (address, code) = (window.local_addr().expect("open"), window.code().clone());
    let card = node.card();
    let (owner, joiner) = tokio::join!(window.wait(), join(&node.identity, &node.peers, &card, address, &code));
    assert_eq!(owner.expect("paired").node, node.identity.node());
    let store = WitnessClient::new(node.endpoint.clone(), joiner.expect("paired").node, PATIENCE);
    let party = Party { node: node.identity.node(), incarnation: node.identity.incarnation() };
    Side { store: Arc::new(store), party }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_witness_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let config = WitnessConfig { state_dir: dir.path().to_path_buf(), listen: ANY, name: Some("w".to_owned()) };
    let witness = WitnessDaemon::start(&config).expect("it starts");
    let (a, b) = (Node::start("a"), Node::start("b"));
    let (a, b) = (side(&a, &witness).await, side(&b, &witness).await);
    patiently(contract::holds(&a, &b)).await;
}
