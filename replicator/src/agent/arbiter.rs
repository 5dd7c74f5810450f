//! Whom this agent asks who may run a VM: a paired witness, etcd where it is configured, or one of the VM's own hosts where there is no third one.
//!
//! Promise: all questions to one node go over one connection, so that a failover finds the one that its witness was looked after by
//! ([`super::witnesses`]), and need not dial.

use std::sync::Arc;
use std::time::Duration;

use heartbeat::store::OwnershipStore;
use heartbeat::trust::{Peer, Role};
use heartbeat_core::ids::NodeId;
use heartbeat_core::store::StoreAnswer;
use tokio::sync::mpsc;

use super::Agent;
use super::asker::Asker;
use super::durable::Durable;
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
    /// One of the VM's own hosts: this one, or a paired one.
    Host(NodeId),
}

impl Arbiter {
    /// What a protection calls it: a witness's identity as hex, or `etcd`.
    pub(super) fn id(&self) -> String {
        match self {
            Self::Witness(peer) => peer.node.to_string(),
            Self::Etcd => ETCD.to_owned(),
            Self::Host(node) => node.to_string(),
        }
    }
}

impl Agent {
    /// The store that a VM is recorded in as far as this host remembers; else the one that its protection names.
    pub(super) fn arbiter_for(&self, protection: &Protection, durable: &Durable) -> Result<Arbiter, ErrorBody> {
        durable.keeper().map_or_else(|| self.arbiter_of(protection), |keeper| Ok(Arbiter::Host(keeper)))
    }

    /// Who keeps the record of a VM that is to be protected without a third host: whoever did, or this host.
    pub(super) fn arbiter_of_pair(&self, name: &str) -> Result<Arbiter, ErrorBody> {
        if self.etcd.is_some() {
            return Err(ErrorBody::new(ErrorKind::Refused, "this agent asks etcd who may run a VM")
                .advise("leave --without-witness out: with etcd no host of the VM needs to keep the record"));
        }
        let known = Durable::find(&self.config.state_dir, name).map_err(|error| {
            ErrorBody::new(ErrorKind::Failed, format!("what this host remembers of {name} cannot be used"))
                .because(&error)
        })?;
        match known {
            Some(durable) if durable.keeper().is_none() && durable.store().is_some() => {
                Err(ErrorBody::new(ErrorKind::Refused, format!("the record of {name} is kept by a third host already"))
                    .advise("leave --without-witness out"))
            }
            Some(durable) => Ok(Arbiter::Host(durable.keeper().unwrap_or(self.me().node))),
            None => Ok(Arbiter::Host(self.me().node)),
        }
    }

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
        if protection.without_witness.is_some() {
            let keeper: NodeId = named.parse().map_err(|_| {
                ErrorBody::new(ErrorKind::Failed, "the VM's protection does not say which host keeps its record")
            })?;
            return Ok(Arbiter::Host(keeper));
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
                "run `understudy witness` on a third host and pair with it, or configure etcd; with two hosts only, protect with --without-witness",
            )
        })
    }

    pub(super) fn store(&self, arbiter: &Arbiter) -> Arc<dyn OwnershipStore> {
        match arbiter {
            Arbiter::Witness(peer) => self.clients.of(peer.node),
            Arbiter::Etcd => {
                let etcd: Arc<dyn OwnershipStore> = self.etcd.clone().expect("named only where it is configured");
                etcd
            }
            Arbiter::Host(node) if *node == self.me().node => Arc::new(self.keeper.clone()),
            Arbiter::Host(node) => self.clients.of(*node),
        }
    }

    pub(super) fn asker(&self, arbiter: &Arbiter) -> (Asker, mpsc::UnboundedReceiver<StoreAnswer>) {
        let metrics = match arbiter {
            Arbiter::Witness(peer) => self.metrics.witness(&peer.name),
            Arbiter::Etcd => self.metrics.witness(ETCD),
            Arbiter::Host(node) => self.metrics.keeper(&self.name_of(*node)),
        };
        Asker::new(self.store(arbiter), metrics)
    }
}
