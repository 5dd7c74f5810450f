//! Whom this agent asks who may run a VM: a paired witness, or etcd where it is configured.

use std::sync::Arc;
use std::time::Duration;

use heartbeat::store::{OwnershipStore, WitnessClient};
use heartbeat::trust::{Peer, Role};
use heartbeat_core::store::StoreAnswer;
use tokio::sync::mpsc;

use super::Agent;
use super::asker::Asker;
use super::protection::Protection;
use crate::control::api::{ErrorBody, ErrorKind};

/// How long one question may take; the core asks again by itself.
pub(super) const ASK_WITHIN: Duration = Duration::from_secs(1);
/// What etcd is called where a witness has a name.
pub(super) const ETCD: &str = "etcd";

/// An ownership store that this agent can ask.
#[derive(Debug, Clone)]
pub(super) enum Arbiter {
    /// A paired witness.
    Witness(Peer),
    /// The configured cluster.
    Etcd,
}

impl Arbiter {
    /// What a protection calls it: a witness's identity as hex, or `etcd`.
    pub(super) fn id(&self) -> String {
        match self {
            Self::Witness(peer) => peer.node.to_string(),
            Self::Etcd => ETCD.to_owned(),
        }
    }
}

impl Agent {
    /// The store that a protection names; this agent's own witness if it names none that this agent knows: one that never heard of the VM
    /// grants nothing.
    pub(super) fn arbiter_of(&self, protection: &Protection) -> Result<Arbiter, ErrorBody> {
        let named = protection.witness.as_str();
        if !named.is_empty() && (named == ETCD) != self.etcd.is_some() {
            let (there, here) = if named == ETCD { ("etcd", "a witness") } else { ("a witness", "etcd") };
            let message = format!("the VM's hosts ask {there} who may run it, and this agent asks {here}");
            return Err(ErrorBody::new(ErrorKind::Refused, message).advise(
                "nothing was changed; write the same `[etcd]` into the configuration of all agents of the VM",
            ));
        }
        let known = named.parse().ok().and_then(|node| self.peers.by_node(node));
        known
            .filter(|peer| peer.role == Role::Witness)
            .map_or_else(|| self.arbiter(None), |peer| Ok(Arbiter::Witness(peer)))
    }

    /// The store that `name` means, or the one that this agent asks if none is named.
    pub(super) fn arbiter(&self, name: Option<&str>) -> Result<Arbiter, ErrorBody> {
        if self.etcd.is_some() {
            // Two agents of one VM must ask one store: where there is etcd nothing else is asked.
            return match name {
                None | Some(ETCD) => Ok(Arbiter::Etcd),
                Some(name) => Err(ErrorBody::new(
                    ErrorKind::Refused,
                    format!("this agent asks etcd who may run a VM, and not the witness {name}"),
                )
                .advise("leave the witness out, or take `[etcd]` out of the configuration of both agents")),
            };
        }
        let found = match name.or(self.config.witness.as_deref()) {
            Some(name) => self.peers.by_name(name).ok().filter(|peer| peer.role == Role::Witness),
            None => self.peers.witness(),
        };
        found.map(Arbiter::Witness).ok_or_else(|| {
            ErrorBody::new(ErrorKind::NotFound, "this agent is paired with no such witness").advise(
                "run `understudy witness` on a third host and pair with it, or configure etcd: without either nobody may go alone",
            )
        })
    }

    pub(super) fn store(&self, arbiter: &Arbiter) -> Arc<dyn OwnershipStore> {
        match arbiter {
            Arbiter::Witness(peer) => Arc::new(WitnessClient::new(Arc::clone(&self.control), peer.node, ASK_WITHIN)),
            Arbiter::Etcd => {
                let etcd: Arc<dyn OwnershipStore> = self.etcd.clone().expect("named only where it is configured");
                etcd
            }
        }
    }

    pub(super) fn asker(&self, arbiter: &Arbiter) -> (Asker, mpsc::UnboundedReceiver<StoreAnswer>) {
        let name = match arbiter {
            Arbiter::Witness(peer) => peer.name.as_str(),
            Arbiter::Etcd => ETCD,
        };
        Asker::new(self.store(arbiter), self.metrics.witness(name))
    }
}
