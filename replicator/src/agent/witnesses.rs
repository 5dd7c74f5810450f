//! Looks whether the paired witnesses, or etcd, answer, before they are needed.
//!
//! A protection asks its witness only when ownership changes, so without this a dead witness would be noticed by the failover
//! that it stalls, and a living one be dialed by it. The question is a read for a VM that nobody ever wrote: it makes no record and changes none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeat::store::OwnershipStore;
use heartbeat::trust::Role;
use heartbeat_core::ids::VmId;
use heartbeat_core::store::{StoreOp, StoreRequest};

use super::Agent;
use super::arbiter::{Arbiter, ETCD};
use crate::metrics::WitnessOutcome;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// The VM that is asked for. Identities of VMs are random; this one is nobody's.
const NOBODY: VmId = VmId([0; 16]);

impl Agent {
    /// Looks for ever.
    pub(super) async fn look_for_witnesses(self: Arc<Self>) {
        let mut clients: BTreeMap<String, Arc<dyn OwnershipStore>> = BTreeMap::new();
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut id = 0;
        loop {
            tick.tick().await;
            let arbiters = self.arbiters();
            self.clients.retain(|node| self.peers.by_node(node).is_some());
            clients.retain(|name, _| {
                let stays = arbiters.contains_key(name);
                if !stays {
                    self.metrics.remove_witness(name);
                }
                stays
            });
            for (name, arbiter) in arbiters {
                let client = clients.entry(name.clone()).or_insert_with(|| self.store(&arbiter));
                id += 1;
                let began = Instant::now();
                let answer = client.ask(StoreRequest { id, vm: NOBODY, asker: self.me(), op: StoreOp::Read }).await;
                let metrics = self.metrics.witness(&name);
                let outcome = if answer.is_ok() { WitnessOutcome::Read } else { WitnessOutcome::Lost };
                metrics.observe(outcome, began.elapsed());
                metrics.set_reachable(answer.is_ok());
                if let Err(error) = answer {
                    tracing::debug!(witness = name, %error, "a witness does not answer");
                }
            }
        }
    }

    /// Every store that this agent may ask, by name. Where etcd is configured, it alone.
    fn arbiters(&self) -> BTreeMap<String, Arbiter> {
        if self.etcd.is_some() {
            return BTreeMap::from([(ETCD.to_owned(), Arbiter::Etcd)]);
        }
        let witnesses = self.peers.list().into_iter().filter(|peer| peer.role == Role::Witness);
        witnesses.map(|peer| (peer.name.clone(), Arbiter::Witness(peer))).collect()
    }
}
