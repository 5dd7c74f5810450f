//! How a VM is to be protected, whoever runs it: the hosts that may hold it, and what its operator asked for.
//!
//! It travels with each session to the standby, which would be the one to protect the VM again, and each side keeps it over
//! restarts ([`super::durable`]). Hosts are named by their pinned identity: names are each agent's own.

use heartbeat::trust::{Peer, Peers, Role};
use heartbeat_core::ids::NodeId;
use serde::{Deserialize, Serialize};

use super::arbiter::Arbiter;
use crate::control::api::{
    DurabilityPolicy, EpochPolicy, ErrorBody, ErrorKind, ProtectRequest, ShadowPolicy, WithoutWitness,
};

/// The most hosts that one VM may have.
pub(super) const MAX_HOSTS: usize = 16;

/// A host that may hold the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostRef {
    /// Its pinned identity, as hex.
    pub(super) node: String,
    /// What whoever listed it calls it.
    pub(super) name: String,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Protection {
    /// Nobody looks for another standby after a failure.
    #[serde(default)]
    pub(super) once: bool,
    /// When an epoch ends; each agent's default if absent.
    #[serde(default)]
    pub(super) epoch: Option<EpochPolicy>,
    /// Bound on the copy of sent pages; each agent's default if absent.
    #[serde(default)]
    pub(super) shadow: Option<ShadowPolicy>,
    /// What an acknowledgement promises of disk writes.
    #[serde(default)]
    pub(super) durability: DurabilityPolicy,
    /// Who is asked who may run it: [`Arbiter::id`].
    #[serde(default)]
    pub(super) witness: String,
    /// No third host keeps the record; `witness` names the host of the VM that does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) without_witness: Option<WithoutWitness>,
    /// The host that it was first protected on, then those that may stand by, best first.
    #[serde(default)]
    pub(super) hosts: Vec<HostRef>,
}

impl Protection {
    /// What an operator asked for on the host `me`.
    ///
    /// # Errors
    /// If a host is not known, or is none.
    pub(super) fn asked(
        request: &ProtectRequest,
        me: HostRef,
        to: &Peer,
        arbiter: &Arbiter,
        peers: &Peers,
    ) -> Result<Self, ErrorBody> {
        let mut hosts = vec![me, HostRef::of(to)];
        for name in &request.standbys {
            let peer = host(peers, name)?;
            if hosts.iter().all(|known| known.node != peer.node.to_string()) {
                hosts.push(HostRef::of(&peer));
            }
        }
        if hosts.len() > MAX_HOSTS {
            let message = format!("a VM can have {MAX_HOSTS} hosts at most, not {}", hosts.len());
            return Err(ErrorBody::new(ErrorKind::Invalid, message));
        }
        Ok(Self {
            once: request.once,
            epoch: request.epoch,
            shadow: request.shadow,
            durability: request.durability,
            witness: arbiter.id(),
            without_witness: request.without_witness,
            hosts,
        })
    }

    /// What the standby is told.
    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it is plain data")
    }

    /// What a primary told.
    ///
    /// # Errors
    /// If it is not what [`Protection::encode`] makes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut told: Self = serde_json::from_slice(bytes)?;
        told.hosts.truncate(MAX_HOSTS);
        Ok(told)
    }

    /// The hosts that may stand by when the VM runs on `me`, best first. Those that cannot be named are left out.
    pub(super) fn standbys(&self, me: NodeId) -> Vec<(NodeId, &str)> {
        let named = self.hosts.iter().filter_map(|host| Some((host.node.parse().ok()?, host.name.as_str())));
        named.filter(|(node, _)| *node != me).collect()
    }

    /// The hosts' names, for people.
    pub(super) fn names(&self) -> Vec<String> {
        self.hosts.iter().map(|host| host.name.clone()).collect()
    }
}

impl HostRef {
    fn of(peer: &Peer) -> Self {
        Self { node: peer.node.to_string(), name: peer.name.clone() }
    }
}

/// A paired host.
///
/// # Errors
/// If there is none of that name, or it is a witness.
pub(super) fn host(peers: &Peers, name: &str) -> Result<Peer, ErrorBody> {
    let peer = peers.by_name(name).map_err(|error| ErrorBody::new(ErrorKind::NotFound, error.to_string()))?;
    if peer.role != Role::Agent {
        return Err(ErrorBody::new(ErrorKind::Refused, format!("{} is a witness, not a host", peer.name)));
    }
    Ok(peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Protection {
        let host = |number: u8| HostRef { node: NodeId([number; 16]).to_string(), name: format!("host-{number}") };
        Protection { hosts: vec![host(1), host(2), host(3)], ..Protection::default() }
    }

    #[test]
    fn whoever_runs_it_finds_all_others_and_the_first_host_first() {
        let nodes =
            |me: u8| three().standbys(NodeId([me; 16])).into_iter().map(|(node, _)| node.0[0]).collect::<Vec<_>>();
        assert_eq!(nodes(1), [2, 3]);
        assert_eq!(nodes(2), [1, 3]);
        assert_eq!(nodes(3), [1, 2]);
    }

    #[test]
    fn it_arrives_as_it_was_sent_and_damage_is_an_error() {
        assert_eq!(Protection::decode(&three().encode()).expect("ours"), three());
        assert!(Protection::decode(b"{\"once\":1}").is_err());
        assert!(Protection::decode(b"").is_err());
    }
}
