//! Hosts that lose power, and agents that end and begin anew: what is left of them, and how a new life takes it up (`docs/protocol.md` P60 to P62).

use heartbeat_core::ids::{Epoch, Generation, Party};
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::record::Owner;
use heartbeat_core::store::StoreAnswer;
use replicator_core::restart::{self, End, Here, Restart};
use replicator_core::standby::{Standby, StandbyConfig, SwitchedOff};

use crate::check::Violation;
use crate::wiring::Wiring;
use crate::world::{Action, Copied, Gate, Guest, Kept, VM, World, node, spend};

/// What an agent made durable of the VM for its next life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Memory {
    /// There is nothing to take up.
    Nothing,
    /// It stands by for it.
    Standby,
    /// Its guest is here.
    Guest,
}

/// What became of a twin whose agent ended while it was being activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Twin {
    /// It was told to run, and does.
    Runs,
    /// The mark was not durable yet; or the twin was not told to run, and is ended.
    NeverRan,
    /// It ran, was heard if it could be, and ended with its agent. Nothing but the mark tells of it.
    RanAndEnded,
}

impl World {
    /// What may befall this host.
    pub(crate) fn troubles(&self, host: usize, actions: &mut Vec<Action>) {
        let (left, state) = (&self.left, &self.hosts[host]);
        let writes = self.is_pair() && self.stores[host].writing.is_some();
        for kept in [false, true].into_iter().filter(|kept| !kept || writes) {
            if left.kills > 0 {
                actions.push(Action::Kill(host, kept));
            }
            if left.restarts > 0 && state.activating.is_none() {
                actions.push(Action::Restart(host, None, kept));
            } else if left.restarts > 0 {
                let twins = [Twin::Runs, Twin::NeverRan, Twin::RanAndEnded];
                actions.extend(twins.map(|twin| Action::Restart(host, Some(twin), kept)));
            }
        }
        if left.forces > 0 && self.is_forceable(host) {
            actions.push(Action::Confirm(host));
        }
        if self.is_pair() && self.stores[host].confirmed {
            actions.push(Action::Force(host));
        }
        if self.is_pair() && self.wants_to_be_shown(host) {
            actions.push(Action::Show(host));
        }
        if left.boots > 0 && self.may_boot(host) {
            actions.push(Action::Boot(host));
        }
    }

    /// The fence command of this host has ended.
    pub(crate) fn switched_off(&mut self, host: usize, confirmed: bool) {
        spend(&mut self.left.fences);
        (self.hosts[host].fencing, self.hosts[host].unconfirmed) = (false, !confirmed);
        if confirmed && self.hosts[1 - host].alive {
            self.loses_power(1 - host, false);
        }
        let result = if confirmed { SwitchedOff::Confirmed } else { SwitchedOff::unconfirmed("") };
        let now = self.hosts[host].now;
        self.input(host, |_| {}, |standby| standby.handle_switched_off(now, result));
    }

    /// A copy begins to run here: where fencing is required that of the other host stands, heard or not.
    pub(crate) fn runs_beside_none(&mut self, host: usize) {
        if self.fences && self.hosts[1 - host].guest.is_some_and(|guest| guest.running) {
            self.checker.broken(Violation::Unfenced);
        }
    }

    pub(crate) fn kill(&mut self, host: usize, kept: bool) {
        spend(&mut self.left.kills);
        self.loses_power(host, kept);
    }

    fn loses_power(&mut self, host: usize, kept: bool) {
        // From here on the other one is all there is.
        if let Some(&Owner::Paired { primary, standby }) = self.owner()
            && primary.node == node(host)
            && standby == self.party(1 - host)
            && !self.hosts[1 - host].has_vm()
            && !self.hosts[1 - host].lost_by_fault
        {
            self.checker.broken(Violation::NoCopy);
        }
        let state = &mut self.hosts[host];
        (state.alive, state.guest, state.capture) = (false, None, None);
        if let Some(kept) = &mut state.kept {
            kept.off_since = true;
        }
        (state.primary, state.standby, state.restart, state.activating) = (None, None, None, None);
        (state.fencing, state.keeping) = (false, None);
        (state.muted, state.lost_by_fault) = (true, true);
        state.gate = Gate::default();
        if let Some(connection) = &mut self.connection {
            connection.lost[host] = true;
        }
        self.store_ends(host, kept);
    }

    pub(crate) fn power_on(&mut self, host: usize) {
        spend(&mut self.left.returns);
        let state = &mut self.hosts[host];
        (state.alive, state.muted) = (true, false);
        if let Some(copy) = &mut state.copy {
            copy.gone = true;
        }
        state.staged.clear();
        self.begins_anew(host);
    }

    /// The agent ends and begins anew; QEMUs go on.
    pub(crate) fn restart(&mut self, host: usize, twin: Option<Twin>, kept: bool) {
        spend(&mut self.left.restarts);
        if let Some(twin) = twin {
            self.activation_ends(host, twin);
        }
        let twice = self.wiring == Wiring::ActivateTwice;
        let state = &mut self.hosts[host];
        if state.standby.is_some() && state.guest.is_none() {
            // What it staged went with it.
            if let Some(copy) = &mut state.copy {
                copy.gone = true;
            }
            state.lost_by_fault = true;
            state.staged.clear();
        }
        if let Some(guest) = state.guest.as_mut().filter(|_| twice && state.mark.is_some())
            && let Some(copy) = state.copy
        {
            guest.state = copy.state;
            self.checker.runs(copy.state);
        }
        self.store_ends(host, kept);
        self.begins_anew(host);
    }

    fn activation_ends(&mut self, host: usize, twin: Twin) {
        let state = &mut self.hosts[host];
        let epoch = state.activating.take().expect("offered only then");
        let copy = state.staged.iter().find(|(known, _)| *known == epoch).expect("it was acknowledged").1;
        match twin {
            Twin::NeverRan => state.mark = None,
            Twin::Runs => {
                state.guest = Some(Guest { state: copy, running: true });
                (state.gate, state.muted, state.memory) = (Gate::default(), false, Memory::Guest);
                self.checker.runs(copy);
                self.runs_beside_none(host);
            }
            Twin::RanAndEnded => {
                self.checker.runs(copy);
                if self.left.steps > 0 {
                    spend(&mut self.left.steps);
                    let heard = copy.step(self.next_step);
                    self.next_step += 1;
                    self.heard(host, heard);
                }
            }
        }
    }

    /// A new life of the agent, with nothing but what is durable, and with the guest, if one is here.
    fn begins_anew(&mut self, host: usize) {
        self.store_begins(host);
        let store = self.store_of(host);
        let state = &mut self.hosts[host];
        state.incarnation = state.incarnation.next();
        state.next_epoch = Epoch(state.next_epoch.0 + 100);
        (state.primary, state.standby, state.restart, state.ended) = (None, None, None, None);
        (state.fencing, state.keeping) = (false, None);
        state.suspects = false;
        state.gate.held.clear();
        if let Some(guest) =
            state.guest.as_mut().filter(|_| state.capture.is_some_and(|capture| capture.begun.is_some()))
        {
            guest.running = false;
        }
        (state.capture, state.captured) = (None, Vec::new());
        if let Some(connection) = &mut self.connection {
            connection.lost[host] = true;
        }
        let found = self.record().map(|record| record.generation);
        let state = &mut self.hosts[host];
        let marked = state.mark.filter(|_| self.wiring != Wiring::ForgetMark);
        let here = match (state.guest, state.memory, state.kept) {
            (Some(_), ..) => Here::Guest,
            (None, Memory::Guest, _) => Here::Gone,
            (None, Memory::Standby, Some(kept)) if self.wiring == Wiring::KeptIsEnough => {
                Here::Kept { grant: found.unwrap_or(kept.grant), marked: None, off_since: false }
            }
            (None, Memory::Standby, Some(kept)) => Here::Kept { grant: kept.grant, marked, off_since: kept.off_since },
            (None, Memory::Standby, None) => Here::Copy { marked },
            (None, Memory::Nothing, _) => return,
        };
        let mut config = OwnershipConfig::new(VM, Party { node: node(host), incarnation: state.incarnation });
        (config.generation, config.first_request, config.store) = (state.generation, state.take_requests(), store);
        let mut restart = Restart::new(config, here);
        restart.handle_start(state.now);
        state.restart = Some(Box::new(restart));
        if self.wiring == Wiring::FreeUnread && here == Here::Guest {
            self.free(host);
        }
        self.pump(host);
    }

    pub(crate) fn do_restart(&mut self, host: usize, output: restart::Output) {
        use restart::Output;
        let now = self.hosts[host].now;
        match output {
            Output::Ask(request) => self.ask(host, request),
            Output::PersistGeneration(generation) => {
                self.generation_is_durable(host, generation);
                self.hosts[host].restart.as_mut().expect("it said so").handle_generation_persisted(now, generation);
            }
            Output::Free => self.free(host),
            Output::Fence => self.fence(host),
            Output::Keep(grant) => {
                let state = &mut self.hosts[host];
                let kept = state.kept.as_mut().expect("it was found");
                (kept.grant, kept.off_since) = (grant, false);
                state.restart.as_mut().expect("it said so").handle_kept(now, grant);
            }
            Output::State { .. } => {}
            Output::Finished(End::Kept { grant, forced }) => {
                self.hosts[host].restart = None;
                self.resume(host, grant, forced);
            }
            Output::Finished(end) => {
                let state = &mut self.hosts[host];
                (state.restart, state.ended) = (None, Some(end));
                if end != End::Ours {
                    state.memory = Memory::Nothing;
                }
            }
        }
    }

    /// A copy that waits for its fence is to be made durable.
    pub(crate) fn keep(&mut self, host: usize, grant: Generation, epoch: Epoch) {
        let state = &mut self.hosts[host];
        let copy = state.copy.expect("it was acknowledged");
        assert_eq!(copy.epoch, epoch, "another epoch than the last acknowledged one is kept");
        let config = state.standby.as_ref().expect("it said so").config();
        let (session, primary) = (config.generation, config.primary);
        state.keeping = Some(Kept { grant, epoch, state: copy.state, session, primary, off_since: false });
    }

    /// It is.
    pub(crate) fn kept(&mut self, host: usize) {
        spend(&mut self.left.keeps);
        let state = &mut self.hosts[host];
        let kept = state.keeping.take().expect("offered only then");
        state.kept = Some(kept);
        let now = state.now;
        self.input(host, |_| {}, |standby| standby.handle_kept(now, kept.grant, true));
    }

    /// A new life goes on with what a former one kept.
    fn resume(&mut self, host: usize, grant: Generation, forced: bool) {
        let (me, store) = (self.party(host), self.store_of(host));
        let state = &mut self.hosts[host];
        let Kept { epoch, state: copy, session, primary, .. } = state.kept.expect("it was found");
        let mut config = StandbyConfig::new(VM, me, primary, session);
        config.fence_required = self.fences;
        (config.ownership.store, config.ownership.generation) = (store, state.generation);
        config.ownership.first_request = state.take_requests();
        state.staged = vec![(epoch, copy)];
        state.copy = Some(Copied { epoch, state: copy, failed: false, gone: false });
        (state.binding, state.linked, state.resumed) = (Some(epoch), false, true);
        (state.lost_by_fault, state.unconfirmed) = (false, false);
        state.standby = Some(Box::new(Standby::resume(config, state.now, grant, epoch, forced)));
    }

    pub(crate) fn generation_is_durable(&mut self, host: usize, generation: Generation) {
        let known = &mut self.hosts[host].generation;
        *known = (*known).max(generation);
    }

    /// The guest is this node's: what its gate holds is dropped, and it runs and is heard.
    fn free(&mut self, host: usize) {
        let shut_down = self.shut_down;
        let state = &mut self.hosts[host];
        (state.gate, state.muted) = (Gate::default(), false);
        if let Some(guest) = &mut state.guest {
            guest.running = !shut_down;
        }
    }

    /// [`Wiring::FreeFormerLife`]: no record, or one that names this node in whichever life, is enough to free what was found.
    pub(crate) fn freed_by_mistake(&mut self, host: usize, answer: &StoreAnswer) {
        let mine = match answer.record.map(|record| record.owner) {
            None => true,
            Some(Owner::Solo { node: owner, .. }) => owner.node == node(host),
            Some(_) => false,
        };
        if mine && self.hosts[host].restart.is_some() && self.hosts[host].guest.is_some() {
            self.free(host);
        }
    }
}
