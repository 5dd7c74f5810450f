//! etcd as a store: the contract, members that die, TLS and users, a cluster that was restored.

use std::sync::Arc;

use heartbeat::etcd::{EtcdConfig, EtcdError, EtcdStore, EtcdUser};
use heartbeat::store::{OwnershipStore as _, StoreError};
use heartbeat_core::ids::{Incarnation, NodeId, Party, VmId};
use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreOp, StoreRequest};

use crate::cluster::{Cluster, Tls, is_installed};
use crate::common::{PATIENCE, patiently};
use crate::contract::{self, Side, solo};

const VM: VmId = VmId([77; 16]);

fn party(node: u8) -> Party {
    Party { node: NodeId([node; 16]), incarnation: Incarnation(1) }
}

fn side(config: &EtcdConfig, node: u8) -> Side {
    Side { store: Arc::new(EtcdStore::new(config, PATIENCE).expect("usable")), party: party(node) }
}

fn read(asker: u8) -> StoreRequest {
    StoreRequest { id: 1, vm: VM, asker: party(asker), op: StoreOp::Read }
}

/// The contract, then one member after the other dies, the leader first, while the record changes hands: each change is there afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_keep_the_contract_and_outlive_each_of_them() {
    if !is_installed() {
        return;
    }
    let mut cluster = Cluster::start(3, false);
    let (a, b) = (side(&cluster.config(), 1), side(&cluster.config(), 2));
    patiently(contract::holds(&a, &b)).await;
    let (one, two) = (party(1), party(2));
    let mut seen = a.change(&a.read(VM).await, Owner::Paired { primary: one, standby: two }).await;
    for round in 0..3 {
        let leader = cluster.leader();
        cluster.kill(leader);
        // Asked while there is no leader: the answer waits for the next one.
        let (winner, loser, from, to) = if round % 2 == 0 { (&b, &a, one, two) } else { (&a, &b, two, one) };
        let (granted, known) =
            patiently(async { tokio::join!(winner.change(&seen, solo(to, false, from)), loser.read(VM)) }).await;
        // A request that was sent twice is refused the second time, and the record says whose it is.
        let record = granted.record.expect("there is one");
        assert_eq!(record.owner, solo(to, false, from), "round {round}: {granted:?}");
        assert!(known.record.is_some_and(|known| known.revision <= record.revision));
        cluster.run(leader);
        let paired = patiently(winner.change(&granted, Owner::Paired { primary: to, standby: from })).await;
        assert!(paired.record.is_some_and(|record| record.revision == granted.record.expect("seen").revision.next()));
        seen = patiently(loser.read(VM)).await;
        assert_eq!(seen.record, paired.record);
    }
}

/// Without a majority there is no answer, and with it again there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_is_a_silence() {
    if !is_installed() {
        return;
    }
    let mut cluster = Cluster::start(3, false);
    let config = cluster.config();
    let a = side(&config, 1);
    let paired = a.change(&a.read(VM).await, Owner::Paired { primary: party(1), standby: party(2) }).await;
    cluster.kill(0);
    cluster.kill(1);
    let hasty = EtcdStore::new(&config, std::time::Duration::from_secs(2)).expect("usable");
    let silent = hasty.ask(read(1)).await;
    assert!(matches!(silent, Err(StoreError::Silent { .. })), "{silent:?}");
    cluster.run(0);
    assert_eq!(patiently(a.read(VM)).await.record, paired.record);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_users_are_who_they_say() {
    if !is_installed() {
        return;
    }
    let cluster = Cluster::start(1, true);
    for arguments in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "agent:word"],
        &["role", "add", "agents"],
        &["role", "grant-permission", "agents", "--prefix=true", "readwrite", "understudy/"],
        &["user", "grant-role", "agent", "agents"],
        &["user", "add", "guest:word"],
        &["auth", "enable"],
    ] {
        cluster.ctl(arguments).unwrap_or_else(|| panic!("etcdctl {arguments:?}"));
    }
    let as_user = |name: &str, password: &str| EtcdConfig {
        user: Some(EtcdUser { name: name.to_owned(), password: password.to_owned() }),
        ..cluster.config()
    };
    let a = side(&as_user("agent", "word"), 1);
    let paired = a.change(&a.read(VM).await, Owner::Paired { primary: party(1), standby: party(2) }).await;
    assert!(paired.applied);
    for (config, what) in
        [(as_user("agent", "wrong"), "a wrong password"), (as_user("guest", "word"), "a user without rights")]
    {
        let refused = side(&config, 1).store.ask(read(1)).await;
        assert!(matches!(refused, Err(StoreError::Etcd(EtcdError::Refused { .. }))), "{what}: {refused:?}");
    }
    // Somebody else's authority: the member is not believed.
    let other = tempfile::tempdir().expect("temporary directory");
    let config = EtcdConfig { ca: Some(Tls::make(other.path()).ca), ..as_user("agent", "word") };
    let hasty = EtcdStore::new(&config, std::time::Duration::from_secs(2)).expect("usable");
    let silent = hasty.ask(read(1)).await;
    assert!(matches!(silent, Err(StoreError::Silent { .. })), "{silent:?}");
}

/// A cluster that came from a backup may have forgotten a grant: it grants nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_cluster_is_another_store() {
    if !is_installed() {
        return;
    }
    let cluster = Cluster::start(1, false);
    let config = cluster.config();
    let a = side(&config, 1);
    let paired = a.change(&a.read(VM).await, Owner::Paired { primary: party(1), standby: party(2) }).await;
    assert!(paired.applied);
    let _restored = cluster.restore();
    // Who knew the cluster before, and who begins now.
    let known = a.store.ask(read(1)).await;
    assert!(matches!(known, Err(StoreError::Etcd(EtcdError::OtherCluster { .. }))), "{known:?}");
    let fresh = side(&config, 1).store.ask(read(1)).await;
    assert!(
        matches!(&fresh, Err(StoreError::Etcd(EtcdError::OtherStore { wrote, .. })) if *wrote == paired.store),
        "{fresh:?}"
    );
    // For a VM that it knows nothing of it says so, under another id.
    let unknown = StoreRequest { vm: VmId([78; 16]), ..read(1) };
    let answer = side(&config, 1).store.ask(unknown).await.expect("an answer");
    assert!(answer.record.is_none() && answer.store != paired.store, "{answer:?}");
}
