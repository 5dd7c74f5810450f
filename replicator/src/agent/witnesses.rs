//! Looks whether the paired witnesses answer, before they are needed.
//!
//! A protection asks its witness only when ownership changes, so without this a dead witness would be noticed by the failover
//! that it stalls. The question is a read for a VM that nobody ever wrote: it makes no record and changes none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeat::store::{OwnershipStore as _, WitnessClient};
use heartbeat::trust::Role;
use heartbeat_core::ids::{NodeId, VmId};
use heartbeat_core::store::{StoreOp, StoreRequest};

use super::Agent;
use crate::metrics::WitnessOutcome;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// The VM that is asked for. Identities of VMs are random; this one is nobody's.
const NOBODY: VmId = VmId([0; 16]);

impl Agent {
    /// Looks for ever. A witness is asked over one connection as long as that lasts.
    pub(super) async fn look_for_witnesses(self: Arc<Self>) {
        let mut clients: BTreeMap<NodeId, (String, WitnessClient)> = BTreeMap::new();
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut id = 0;
        loop {
            tick.tick().await;
            let witnesses: Vec<_> = self.peers.list().into_iter().filter(|peer| peer.role == Role::Witness).collect();
            clients.retain(|node, (name, _)| {
                let stays = witnesses.iter().any(|witness| witness.node == *node);
                if !stays {
                    self.metrics.remove_witness(name);
                }
                stays
            });
            for witness in witnesses {
                let fresh = || (witness.name.clone(), self.store(&witness));
                let (name, client) = clients.entry(witness.node).or_insert_with(fresh);
                id += 1;
                let began = Instant::now();
                let answer = client.ask(StoreRequest { id, vm: NOBODY, asker: self.me(), op: StoreOp::Read }).await;
                let metrics = self.metrics.witness(name);
                let outcome = if answer.is_ok() { WitnessOutcome::Read } else { WitnessOutcome::Lost };
                metrics.observe(outcome, began.elapsed());
                metrics.set_reachable(answer.is_ok());
                if let Err(error) = answer {
                    tracing::debug!(witness = name, %error, "a witness does not answer");
                }
            }
        }
    }
}
