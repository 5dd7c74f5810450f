//! A standby that has won and waits for the primary's host to be off (docs/protocol.md P15): what it does meanwhile, and what it says.
//!
//! Promise: its copy is noted as kept only when it is on the disk, and only while it waits.

use std::path::PathBuf;
use std::time::Instant;

use heartbeat_core::ids::{Epoch, Generation};
use replicator_core::message::clip;
use replicator_core::standby::SwitchedOff;

use super::{LOOK, StopReply, Task};
use crate::agent::clock;
use crate::agent::durable::KeptAt;
use crate::agent::kept::{self, About};
use crate::agent::twin::Command;
use crate::control::api::{ErrorBody, ErrorKind};

impl Task {
    /// Says what can be done while nothing confirms that the primary's host is off.
    pub(super) fn advise_fencing(&self) {
        let (peer, name) = (self.view.peer(), &self.name);
        let kept = match (self.core.is_kept(), &self.unkept) {
            (Some(true), _) => "the copy is on this host's disk, and this agent may be stopped and started".to_owned(),
            (None, _) => {
                "the copy is being written to this host's disk, so that this agent may be stopped then".to_owned()
            }
            (Some(false), why) => format!(
                "do not stop this agent, for the copy would end with it: it could not be written to the state directory ({})",
                why.as_deref().unwrap_or("not tried yet")
            ),
        };
        let advice = format!(
            "the VM stands, and nothing is lost; {kept}. See to the fence device; or switch {peer} off by hand, then `understudy failover {name} --force --confirm-dead {peer}`; or, if {peer} is well, `understudy failover {name} --give-back`"
        );
        self.view.set(|status| status.advice = advice);
    }

    /// The copy does not change any more: it is written down, so that another life of this agent can wait with it.
    pub(super) fn keep(&mut self, grant: Generation, epoch: Epoch) {
        self.end_intake();
        let config = self.core.config();
        let about = About::new(self.described.clone(), epoch.0, config.generation.0, config.primary);
        let dir = self.durable.copies().join(grant.to_string());
        self.command(Command::Keep { grant, about: Box::new(about), dir });
    }

    /// It was written, or could not be.
    pub(super) fn kept(&mut self, grant: Generation, written: Result<PathBuf, String>) {
        let noted = match written {
            Ok(dir) if self.core.is_fencing() => {
                let noted = self.durable.set_kept(Some(KeptAt::now(grant, dir.clone())));
                noted.map(|()| dir).map_err(|error| {
                    self.disk_failed(&error);
                    error.to_string()
                })
            }
            Ok(dir) => {
                drop(tokio::task::spawn_blocking(move || kept::remove(&dir)));
                Err("it is not needed any more".to_owned())
            }
            Err(why) => Err(why),
        };
        match &noted {
            Ok(dir) => {
                tracing::info!(vm = self.name, path = %dir.display(), "the copy that waits for the fence is kept")
            }
            Err(why) if self.core.is_fencing() => {
                tracing::error!(
                    vm = self.name,
                    why,
                    "the copy that waits for the fence ends with this agent: it could not be kept"
                );
            }
            Err(_) => {}
        }
        self.core.handle_kept(clock::now(), grant, noted.is_ok());
        self.unkept = noted.err();
        if !self.durable.has_failed() {
            self.show();
        }
        if let Some(reply) = self.stopping.take() {
            self.stop(reply);
        }
    }

    /// This agent stops.
    pub(super) fn stop(&mut self, reply: StopReply) {
        if !self.core.is_fencing() {
            let answer = self.core.handle_operator_discard(clock::now());
            drop(reply.send(answer.map_err(|why| ErrorBody::new(ErrorKind::Refused, why))));
            return;
        }
        match self.core.is_kept() {
            Some(true) => drop(reply.send(Ok(()))),
            Some(false) => {
                let why =
                    format!("the copy of {} could not be kept: {}", self.name, self.unkept.as_deref().unwrap_or("?"));
                drop(reply.send(Err(ErrorBody::new(ErrorKind::Failed, why))));
            }
            None => self.stopping = Some(reply),
        }
    }

    /// The fence command has ended.
    pub(super) fn fence_ended(&mut self, word: Result<(), ErrorBody>) {
        let result = match word {
            Ok(()) => {
                let off = format!("the fence command confirmed that {} is off", self.view.peer());
                tracing::warn!(vm = self.name, off, "fenced");
                self.view.note_ownership(&off);
                SwitchedOff::Confirmed
            }
            Err(error) => {
                tracing::error!(vm = self.name, error = error.message, "not fenced: the VM does not run here yet");
                self.unconfirmed = Some(Instant::now());
                SwitchedOff::unconfirmed(clip(&error.message))
            }
        };
        self.core.handle_switched_off(clock::now(), result);
    }

    /// A primary that could not be switched off may be well, and never have been silent: then it is heard since.
    pub(super) fn look_at_the_primary(&mut self) {
        let Some(since) = self.unconfirmed.filter(|_| self.core.is_fencing()) else { return };
        let (node, since) = (self.core.config().primary.node, since.elapsed());
        // Whatever was still under way when it was found to be silent or lost has arrived by then.
        let heard = self.heartbeats.stats().iter().any(|path| {
            path.node == node && !path.suspected && path.silence.is_some_and(|silence| silence + LOOK < since)
        });
        if heard {
            self.core.handle_peer_heard(clock::now());
        }
    }
}
