//! A VM that a former life of this agent left behind: muted by filters whose other end is gone, or still tracked.
//!
//! Promise: it is freed only after the store has made this node, in this life, its sole owner (docs/protocol.md P2, P3); a
//! reading alone would not do, since what the former life asked may still be on its way. Whose record names a standby
//! stays as it is: that standby may run it.

use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreOp, StoreRequest};
use vmm_hooks::qemu;

use super::Agent;
use super::durable::Durable;
use super::protection::Protection;
use super::sessions::blocking;
use crate::control::api::{ErrorBody, ErrorKind, ProtectionState, Role, VmStatus};

impl Agent {
    /// Frees the VM called `name`, which no task of this agent knows.
    pub(super) async fn free(&self, name: &str) -> Result<VmStatus, ErrorBody> {
        let unusable = |error: std::io::Error| {
            ErrorBody::new(ErrorKind::Failed, format!("what this host remembers of {name} cannot be used"))
                .because(&error)
        };
        if let Some(status) = self.unprotected_microvm(name) {
            return Ok(status);
        }
        let Some(mut durable) = Durable::find(&self.config.state_dir, name).map_err(unusable)? else {
            return Err(super::api::not_known(name));
        };
        let asked = name.to_owned();
        let target = blocking(move || qemu::resolve(&asked)).await??;
        // A copy that waits is no VM that could be freed: going on from it is a failover's business.
        let asked = target.clone();
        let state = blocking(move || qemu::run_state(&asked)).await??;
        if !matches!(state.as_str(), "running" | "paused") {
            return Err(ErrorBody::new(ErrorKind::Refused, format!("{name} is in state `{state}` here, not running"))
                .advise("nothing was changed; end this process if no other host needs it"));
        }
        let at_once = || {
            let message = format!("{name} was asked for by somebody else at the same moment");
            ErrorBody::new(ErrorKind::Busy, message).advise("nothing was changed in it; ask again")
        };
        let Some(numbers) = durable.begin_session_unchanged().map_err(unusable)? else { return Err(at_once()) };
        let generation = self.own_alone(name, &mut durable, numbers.first_request).await?;
        let alone = durable.set_generation_unchanged(generation).map_err(unusable)?;
        if !alone || self.task_of(name).is_some() || !durable.unlatch().map_err(unusable)? {
            return Err(at_once());
        }
        let removed = blocking(move || qemu::remove_leftovers(&target)).await??;
        tracing::info!(vm = name, ?removed, "freed");
        let mut status = VmStatus::new(name, durable.vm().to_string(), Role::Primary);
        status.state = ProtectionState::Unprotected;
        status.generation = generation;
        status.reason = if removed.is_empty() {
            "nothing of a former life of this agent was left in it".into()
        } else {
            format!("removed what a former life of this agent had left: {}", removed.join(", "))
        };
        Ok(status)
    }

    /// Wins the record for this node in this life, or says who has it. Returns the record's generation.
    pub(super) async fn own_alone(
        &self,
        name: &str,
        durable: &mut Durable,
        first_request: u64,
    ) -> Result<u64, ErrorBody> {
        let store = self.store(&self.arbiter_for(&Protection::default(), durable)?);
        let (vm, me) = (durable.vm(), self.me());
        let silent = |error: heartbeat::store::StoreError| {
            ErrorBody::new(ErrorKind::Unavailable, format!("the witness does not say who owns {name}"))
                .advise("nothing was changed; try again when the witness answers")
                .because(&error)
        };
        let read = StoreRequest { id: first_request, vm, asker: me, op: StoreOp::Read };
        let found = store.ask(read).await.map_err(silent)?;
        if durable.store().is_some_and(|known| known != found.store.to_string()) {
            return Err(ErrorBody::new(
                ErrorKind::Refused,
                format!("this witness is not the one that {name} was recorded in"),
            )
            .advise(
                "nothing was changed; pair with the former witness again, or make sure that no other host runs the VM",
            ));
        }
        if found.record.map_or(0, |record| record.generation.0) < durable.generation() {
            return Err(ErrorBody::new(
                ErrorKind::Refused,
                format!(
                    "the witness knows less of {name} than this host: it was restored from a backup, or begun anew"
                ),
            )
            .advise("nothing was changed; make sure that no other host runs the VM before you go on"));
        }
        match found.record.map(|record| record.owner) {
            None => {}
            Some(Owner::Solo { node, .. } | Owner::Stopped { node }) if node.node == me.node => {}
            // Nothing of it was ever here, or is any more.
            Some(_) if durable.guest().is_none() => return Err(super::api::not_known(name)),
            Some(owner) => {
                return Err(ErrorBody::new(
                    ErrorKind::Refused,
                    format!("{name} is not this node's alone: the record says {owner:?}"),
                )
                .advise("the copy here stays mute; the host that the record names decides, or runs it already"));
            }
        }
        let expect = found.record.map(|record| (record.store, record.revision));
        let owner = Owner::Solo { node: me, activated: true, other: None };
        let change = StoreRequest { id: first_request + 1, vm, asker: me, op: StoreOp::Change { expect, owner } };
        let answer = store.ask(change).await.map_err(silent)?;
        match answer.record {
            Some(record) if record.owner == owner => Ok(record.generation.0),
            _ => Err(ErrorBody::new(ErrorKind::Refused, format!("the record of {name} changed at the same moment"))
                .advise("nothing was changed here; try again")),
        }
    }
}
