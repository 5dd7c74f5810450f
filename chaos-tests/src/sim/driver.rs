//! The wiring between the cores and the simulated world: what the product's agent does, in small.

use std::time::Duration;

use heartbeat_core::ids::{Epoch, Generation, Incarnation};
use heartbeat_core::ownership::Verdict;
use heartbeat_core::record::Owner;
use heartbeat_core::time::Time;
use replicator_core::message::{Durability, PeerMessage, RehearsalResult};
use replicator_core::pacing::{AutoPacing, Pacing};
use replicator_core::primary::{self, CaptureReport, Primary, PrimaryConfig};
use replicator_core::restart::{self, Restart};
use replicator_core::standby::{self, ActivationResult, Standby, StandbyConfig};
use replicator_core::state::ProtectionState;

use super::history::State;
use super::host::{Capture, FIRST_WAIT, Guest, node, party};
use super::network::{Connection, Streamed};
use super::options::{Fault, Wiring};
use super::world::{Event, VM, World};

/// How often a capture that waits for output looks for it.
const LOOK_FOR_OUTPUT: Duration = Duration::from_millis(1);

impl World {
    /// The operator protects the guest of this host with the other host.
    pub(super) fn protect(&mut self, host: usize) {
        let other = 1 - host;
        if !self.hosts[other].alive {
            return;
        }
        self.connections += 1;
        let id = self.connections;
        self.connection = Some(Connection::new(id, self.now));
        let me = party(host, self.hosts[host].incarnation);
        let peer = party(other, self.hosts[other].incarnation);
        let mut config = PrimaryConfig::new(VM, me, peer);
        config.ownership.generation = self.hosts[host].generation;
        config.ownership.first_request = self.hosts[host].take_requests();
        config.ownership.store = self.options.pair.then(|| self.pair.store_of(host));
        config.first_epoch = self.hosts[host].next_epoch;
        config.start_within = Duration::from_secs(2);
        config.pair_within = Duration::from_secs(1);
        config.planned_within = Duration::from_secs(1);
        config.frozen_after = Duration::from_millis(300);
        config.pacing = if self.options.auto {
            Pacing::Auto(AutoPacing::default())
        } else {
            Pacing::Fixed { every: Duration::from_millis(25) }
        };
        let mut primary = Primary::new(config);
        primary.handle_start(self.now);
        self.hosts[host].primary = Some(primary);
        (self.hosts[host].muted, self.hosts[host].told_shutdown) = (false, false);
        self.hosts[host].had_guest = true;
        self.hosts[host].activated_from = None;
        self.note(|_| format!("host {host} protects its guest"));
        for side in 0..2 {
            self.after(Duration::from_millis(1), Event::CheckConnection(side));
        }
        self.pump(host);
    }

    /// Does what the machines of a host say, until they say nothing more.
    pub(super) fn pump(&mut self, host: usize) {
        loop {
            if let Some(output) = self.hosts[host].primary.as_mut().and_then(Primary::poll_output) {
                self.note(|_| format!("host {host} primary: {output:?}"));
                self.do_primary(host, output);
            } else if let Some(output) = self.hosts[host].standby.as_mut().and_then(Standby::poll_output) {
                self.note(|_| format!("host {host} standby: {output:?}"));
                self.do_standby(host, output);
            } else if let Some(output) = self.hosts[host].restart.as_mut().and_then(Restart::poll_output) {
                self.note(|_| format!("host {host} restart: {output:?}"));
                self.do_restart(host, output);
            } else {
                break;
            }
        }
        let due = [
            self.hosts[host].restart.as_ref().and_then(Restart::poll_timeout),
            self.hosts[host].primary.as_ref().and_then(Primary::poll_timeout),
            self.hosts[host].standby.as_ref().and_then(Standby::poll_timeout),
        ];
        if let Some(at) = due.into_iter().flatten().min() {
            self.at(at, Event::Timer(host));
        }
    }

    fn do_primary(&mut self, host: usize, output: primary::Output) {
        use primary::Output;
        match output {
            Output::Prepare { generation } => {
                let message = PeerMessage::Prepare {
                    vm: VM,
                    name: "vm".into(),
                    generation,
                    recipe: Vec::new(),
                    layout: Vec::new(),
                    durability: Durability::Disk,
                    protection: Vec::new(),
                };
                self.tell(host, &message);
            }
            Output::Sync => {
                let wait = self.rng.micros(5_000, 150_000);
                self.after(wait, Event::Synced(host));
            }
            Output::Capture { epoch, hold, stay_paused, window } => {
                let capture = Capture { epoch, hold, stay_paused, window, begun: None };
                assert!(self.hosts[host].capture.replace(capture).is_none(), "two captures at once");
                self.at(window.earliest, Event::TryCapture(host));
            }
            Output::Cancel => {
                if let Some(capture) = self.hosts[host].capture.filter(|capture| capture.begun.is_none()) {
                    self.hosts[host].capture = None;
                    self.capture_failed(host, capture.epoch, "cancelled");
                }
            }
            Output::Send { epoch } => {
                let state = self.hosts[host].captured[&epoch];
                let primary = self.hosts[host].primary.as_ref().expect("it said so");
                let (generation, incarnation) = (primary.session(), self.hosts[host].incarnation);
                self.send(host, 1, Streamed::Epoch { generation, incarnation, epoch, state });
                let wait = self.rng.micros(10, 2_000);
                self.after(wait, Event::Sent(host, epoch));
            }
            Output::PutBack { epoch } => {
                let forgotten = self.hosts[host].captured.remove(&epoch);
                assert!(forgotten.is_some(), "put back what was not captured");
            }
            Output::Release { through } => {
                self.hosts[host].captured.retain(|&epoch, _| epoch > through);
                self.release(host, through);
            }
            Output::OpenOutput => self.open_gate(host),
            Output::Mute => {
                self.counts.muted += 1;
                let state = &mut self.hosts[host];
                state.muted = true;
                state.gate.holding = true;
                if let Some(guest) = &mut state.guest {
                    guest.running = false;
                }
                if self.rng.chance(500) {
                    self.hosts[host].gate.held.clear();
                }
                if self.wiring == Wiring::DestroyEarly {
                    self.fence(host);
                }
            }
            Output::Resume => {
                self.counts.given_back += u64::from(std::mem::replace(&mut self.hosts[host].muted, false));
                if let Some(guest) = &mut self.hosts[host].guest {
                    guest.running = true;
                }
            }
            Output::Fence => self.fence(host),
            Output::Ask(request) => self.ask(host, request),
            Output::Peer(message) => self.tell(host, &message),
            Output::PersistGeneration(generation) => self.persist(host, generation),
            Output::Close(_) => self.close(host),
            Output::Detach | Output::State { .. } => {}
            Output::Finished => {
                let primary = self.hosts[host].primary.take().expect("it said so");
                self.hosts[host].next_epoch = primary.next_epoch();
                self.hosts[host].capture = None;
                self.hosts[host].captured.clear();
                let well = primary.state().0 == ProtectionState::Degraded;
                self.protect_later(host, well);
            }
        }
    }

    fn do_restart(&mut self, host: usize, output: restart::Output) {
        use restart::Output;
        match output {
            Output::Ask(request) => self.ask(host, request),
            Output::PersistGeneration(generation) => self.persist(host, generation),
            Output::Free => {
                self.counts.freed += 1;
                let shut_down = self.shut_down;
                let state = &mut self.hosts[host];
                state.gate = super::host::Gate::default();
                state.muted = false;
                if let Some(guest) = &mut state.guest {
                    guest.running = !shut_down;
                }
            }
            Output::Fence => self.fence(host),
            Output::Keep(grant) => {
                let wait = self.rng.micros(50, 4_000);
                self.after(wait, Event::KeptNoted(host, grant));
            }
            Output::State { .. } => {}
            Output::Finished(restart::End::Kept { grant, forced }) => {
                self.hosts[host].restart = None;
                self.resume(host, grant, forced);
            }
            Output::Finished(end) => {
                self.hosts[host].restart = None;
                self.counts.returned += u64::from(end == restart::End::GaveBack);
                self.protect_later(host, true);
            }
        }
    }

    /// A guest that runs here alone is protected again after a while; ever later as long as nothing comes of it.
    pub(super) fn protect_later(&mut self, host: usize, well: bool) {
        let again = self.options.again;
        let state = &mut self.hosts[host];
        if !again || state.guest.is_none() || state.unprotected {
            return;
        }
        state.patience = if well { FIRST_WAIT } else { (state.patience * 2).min(800) };
        let wait = Duration::from_millis(state.patience);
        self.after(wait, Event::Again(host));
    }

    pub(super) fn again(&mut self, host: usize) {
        let state = &self.hosts[host];
        let idle = state.primary.is_none() && state.restart.is_none() && state.standby.is_none();
        if state.guest.is_none() || !idle || state.unprotected || self.shut_down {
            return;
        }
        if self.hosts[1 - host].alive {
            self.counts.again += 1;
            self.protect(host);
        } else if self.options.pair || self.options.fence {
            // It may have power again.
            self.protect_later(host, false);
        }
    }

    fn do_standby(&mut self, host: usize, output: standby::Output) {
        use standby::Output;
        match output {
            Output::Commit { epoch } => {
                let state = self.hosts[host].staged[&epoch];
                self.hosts[host].staged.retain(|&known, _| known.next() >= epoch);
                self.checker.holds(host, Some(state));
                self.counts.epochs += 1;
            }
            Output::Acknowledge { generation, incarnation, epoch } => {
                self.tell(host, &PeerMessage::Acknowledge { generation, incarnation, epoch });
            }
            Output::Discard { epoch } => {
                self.hosts[host].staged.remove(&epoch);
                if self.wiring == Wiring::AcknowledgeAfterGrant {
                    let standby = self.hosts[host].standby.as_ref().expect("it said so");
                    let (generation, incarnation) = (standby.config().generation, self.hosts[host].incarnation);
                    self.tell(host, &PeerMessage::Acknowledge { generation, incarnation, epoch });
                }
            }
            Output::Rehearse { .. } => {
                let longest = if self.rng.chance(800) { 40_000 } else { 400_000 };
                let wait = self.rng.micros(2_000, longest);
                let loads = !self.rng.chance(20);
                self.after(wait, Event::Rehearsed(host, loads));
            }
            Output::Ask(request) => self.ask(host, request),
            Output::Peer(message) => self.tell(host, &message),
            Output::PersistGeneration(generation) => self.persist(host, generation),
            Output::Mark { generation, .. } => {
                let wait = self.rng.micros(50, 5_000);
                self.after(wait, Event::Marked(host, generation));
            }
            Output::Activate { epoch } => {
                let runs = !self.rng.chance(self.options.activation_failures);
                // One that fails is found out late: the primary has read of it meanwhile.
                let wait = self.rng.micros(2_000, if runs { 60_000 } else { 900_000 });
                self.after(wait, Event::Activated(host, epoch, runs));
                if self.rng.chance(self.options.restarts) {
                    self.after(wait / 2, Event::Fault(Fault::RestartAgent(host)));
                }
            }
            Output::Destroy => {
                let owner = self.record().map(|record| record.owner);
                let mine = match owner {
                    Some(Owner::Paired { primary, standby }) => {
                        let session = self.hosts[host].standby.as_ref().expect("it said so").config().generation;
                        let current = self.record().is_some_and(|record| record.generation == session);
                        current && primary.node != node(host) && standby == party(host, self.hosts[host].incarnation)
                    }
                    Some(Owner::Solo { node: owner, .. }) => owner.node == node(host),
                    None | Some(Owner::Stopped { .. }) => false,
                };
                if mine {
                    self.checker.broken(|| format!("host {host} destroyed its copy, and the record says {owner:?}"));
                }
                self.hosts[host].staged.clear();
                self.checker.holds(host, None);
            }
            Output::Close(_) => self.close(host),
            Output::SwitchOff if self.wiring == Wiring::ActivateUnfenced => self.fenced(host, true),
            Output::SwitchOff => {
                let confirmed = !self.rng.chance(self.options.fence_failures);
                let wait = self.rng.micros(1_000, 300_000);
                self.after(wait, Event::SwitchedOff(host, confirmed));
                // While it is under way, or while the next one is waited for.
                if self.rng.chance(self.options.restarts) {
                    self.after(wait.mul_f64(1.7), Event::Fault(Fault::RestartAgent(host)));
                }
            }
            Output::Keep { generation, epoch } => self.keep(host, generation, epoch),
            Output::Release | Output::State { .. } => {}
            Output::Finished => {
                self.hosts[host].standby = None;
                self.protect_later(host, true);
            }
        }
    }

    fn persist(&mut self, host: usize, generation: Generation) {
        let wait = self.rng.micros(50, 4_000);
        self.after(wait, Event::GenerationDurable(host, generation));
    }

    /// What was said before arrives first.
    fn close(&mut self, host: usize) {
        self.send(host, 0, Streamed::Closed);
        if let Some(connection) = &mut self.connection {
            connection.lost[host] = true;
        }
    }

    fn release(&mut self, host: usize, through: Epoch) {
        while let Some((epoch, state)) = self.hosts[host].gate.held.front().copied() {
            if epoch > through {
                break;
            }
            self.hosts[host].gate.held.pop_front();
            self.heard(host, state);
        }
    }

    pub(super) fn open_gate(&mut self, host: usize) {
        self.counts.opened += 1;
        self.hosts[host].gate.holding = false;
        while let Some((_, state)) = self.hosts[host].gate.held.pop_front() {
            self.heard(host, state);
        }
    }

    /// The guest's process ends. What the gate holds stays with the agent.
    pub(super) fn end_guest(&mut self, host: usize) {
        self.hosts[host].guest = None;
        self.hosts[host].capture = None;
    }

    pub(super) fn is_activating(&self, host: usize) -> bool {
        self.hosts[host].standby.as_ref().is_some_and(|standby| {
            let verdict = standby.ownership().verdict();
            // One that was resumed knows that without having read it.
            matches!(verdict, Verdict::SoloMe { .. }) || self.hosts[host].resumed && verdict == Verdict::Unknown
        })
    }

    pub(super) fn synced(&mut self, host: usize) {
        let now = self.now;
        if let Some(primary) = &mut self.hosts[host].primary {
            primary.handle_synced(now);
        }
        self.pump(host);
    }

    // --- the pause path ---

    pub(super) fn try_capture(&mut self, host: usize) {
        let now = self.now;
        let state = &mut self.hosts[host];
        let Some(capture) = state.capture.as_mut().filter(|capture| capture.begun.is_none()) else { return };
        if now < capture.window.earliest {
            return;
        }
        let waits = state.gate.held.back().is_some_and(|&(epoch, _)| epoch == state.gate.epoch);
        if now < capture.window.latest && !(waits && capture.window.on_output.is_some()) {
            let at = (now + LOOK_FOR_OUTPUT).min(capture.window.latest);
            self.at(at, Event::TryCapture(host));
            return;
        }
        let Some(guest) = &mut state.guest else { return };
        if self.rng.chance(self.options.capture_failures) {
            let epoch = capture.epoch;
            state.capture = None;
            self.capture_failed(host, epoch, "it would not stop");
            return;
        }
        guest.running = false;
        capture.begun = Some((guest.state, now));
        let next = if self.wiring == Wiring::SealEarly { capture.epoch } else { capture.epoch.next() };
        let late = self.wiring == Wiring::HoldLate;
        if capture.hold && !late || late && state.gate.begin_late {
            state.gate.holding = true;
        }
        state.gate.begin_late = capture.hold;
        if state.gate.holding {
            state.gate.epoch = next;
        }
        let wait = self.rng.micros(500, 6_000);
        self.after(wait, Event::EndCapture(host));
    }

    pub(super) fn end_capture(&mut self, host: usize) {
        let now = self.now;
        let shut_down = self.shut_down;
        let frozen = self.hosts[host].guest.as_ref().map(|guest| guest.frozen_until).filter(|&until| until > now);
        if let Some(until) = frozen {
            self.at(until, Event::EndCapture(host));
            return;
        }
        let state = &mut self.hosts[host];
        // One of an earlier session may have left the end of its capture behind.
        let Some(capture) = state.capture.take_if(|capture| capture.begun.is_some()) else { return };
        let (copied, paused_at) = capture.begun.expect("asked above");
        if let Some(guest) = &mut state.guest {
            guest.running = !capture.stay_paused && !state.muted && !shut_down;
        }
        state.captured.insert(capture.epoch, copied);
        let held = state.gate.held.iter().filter(|(epoch, _)| *epoch == capture.epoch).count();
        let report = CaptureReport {
            epoch: capture.epoch,
            paused_at,
            pause: now - paused_at,
            pages: 40,
            bytes: 160_000,
            held_frames: held as u64,
            first_output: None,
        };
        if let Some(primary) = &mut state.primary {
            primary.handle_captured(now, report);
        }
        self.pump(host);
    }

    fn capture_failed(&mut self, host: usize, epoch: Epoch, why: &str) {
        let now = self.now;
        if let Some(primary) = &mut self.hosts[host].primary {
            primary.handle_capture_failed(now, epoch, true, why);
        }
        self.pump(host);
    }

    pub(super) fn sent(&mut self, host: usize, epoch: Epoch) {
        if self.wiring == Wiring::ReleaseOnSent {
            self.release(host, epoch);
        }
        self.pump(host);
    }

    // --- what comes from the other side ---

    pub(super) fn told(&mut self, host: usize, message: PeerMessage) {
        let now = self.now;
        self.note(|_| format!("host {host} is told {message:?}"));
        if let PeerMessage::Prepare { generation, .. } = message {
            self.prepare(host, generation);
            return;
        }
        // A connection is between one primary and one standby.
        if let Some(primary) = &mut self.hosts[host].primary {
            primary.handle_peer(now, message);
        } else if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_peer(now, message);
        }
        self.pump(host);
    }

    fn prepare(&mut self, host: usize, generation: Generation) {
        // A copy of an earlier session that is kept for nobody makes room; a guest that still has to be fenced does not.
        let state = &self.hosts[host];
        let busy =
            state.primary.is_some() || state.restart.is_some() || state.guest.is_some() || self.is_activating(host);
        if busy {
            self.tell(host, &PeerMessage::Refused { reason: "another copy is here".into() });
            return;
        }
        self.hosts[host].staged.clear();
        self.hosts[host].destroyed = false;
        self.checker.holds(host, None);
        let me = party(host, self.hosts[host].incarnation);
        let peer = party(1 - host, self.hosts[1 - host].incarnation);
        let mut config = StandbyConfig::new(VM, me, peer, generation);
        config.fence_required = self.options.fence;
        config.ownership.generation = self.hosts[host].generation;
        config.ownership.first_request = self.hosts[host].take_requests();
        if self.options.pair {
            // The primary says who keeps the record.
            self.pair.follow(host);
            config.ownership.store = Some(self.pair.store_of(host));
        }
        self.hosts[host].standby = Some(Standby::new(config));
        (self.hosts[host].had_guest, self.hosts[host].resumed) = (false, false);
        let wait = self.rng.micros(1_000, 50_000);
        self.after(wait, Event::Prepared(host));
    }

    pub(super) fn received(
        &mut self,
        host: usize,
        generation: Generation,
        incarnation: Incarnation,
        epoch: Epoch,
        state: State,
    ) {
        let now = self.now;
        if let Some(standby) = &mut self.hosts[host].standby {
            self.hosts[host].staged.insert(epoch, state);
            standby.handle_staged(now, generation, incarnation, epoch);
        }
        self.pump(host);
    }

    pub(super) fn prepared(&mut self, host: usize) {
        let now = self.now;
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_prepared(now);
        }
        self.pump(host);
    }

    pub(super) fn rehearsed(&mut self, host: usize, loads: bool) {
        let now = self.now;
        let result = if loads {
            RehearsalResult::Loads { launch: Duration::from_millis(3), load: Duration::from_millis(1) }
        } else {
            RehearsalResult::Fails { reason: "it did not load".into() }
        };
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_rehearsed(now, result);
            self.counts.rehearsed += u64::from(loads);
        }
        self.pump(host);
    }

    pub(super) fn generation_durable(&mut self, host: usize, generation: Generation) {
        let now = self.now;
        let state = &mut self.hosts[host];
        state.generation = state.generation.max(generation);
        if let Some(primary) = &mut state.primary {
            primary.handle_generation_persisted(now, generation);
        }
        if let Some(standby) = &mut state.standby {
            standby.handle_generation_persisted(now, generation);
        }
        if let Some(restart) = &mut state.restart {
            restart.handle_generation_persisted(now, generation);
        }
        self.pump(host);
    }

    pub(super) fn marked(&mut self, host: usize, generation: Generation) {
        let now = self.now;
        let state = &mut self.hosts[host];
        (state.marked, state.generation) = (Some(generation), state.generation.max(generation));
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_marked(now, generation);
        }
        self.pump(host);
    }

    pub(super) fn activated(&mut self, host: usize, epoch: Epoch, runs: bool) {
        let now = self.now;
        let staged = &self.hosts[host].staged;
        let older = staged.range(..epoch).next_back().filter(|_| self.wiring == Wiring::ActivateOlder);
        let state = older.map_or(staged[&epoch], |(_, &state)| state);
        let result = if runs {
            self.counts.activations += 1;
            self.runs_unfenced(host);
            self.hosts[host].guest = Some(Guest::running(state));
            (self.hosts[host].activated_from, self.hosts[host].destroyed) = (Some(state), false);
            self.hosts[host].gate = super::host::Gate::default();
            self.hosts[host].had_guest = true;
            ActivationResult::Runs { load: Duration::from_millis(2), resume: Duration::from_millis(1) }
        } else {
            self.failed_activation = true;
            self.cannot_run(host);
            ActivationResult::Fails { reason: "it did not load".into() }
        };
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_activated(now, result);
        }
        self.pump(host);
    }

    // --- the end ---

    /// After the faults: whoever may run does (`docs/protocol.md` P12), and remembers everything that was heard.
    pub(super) fn judge(&mut self, quiet: Duration) {
        if self.checker.violation.is_some() {
            return;
        }
        let audible = |world: &Self, host: usize| {
            let state = &world.hosts[host];
            state.alive && state.guest.as_ref().is_some_and(|guest| guest.running) && !state.gate.holding
        };
        let protected = (0..2).find(|&host| {
            let state = &self.hosts[host];
            // One that waits for the record runs unheard, and may never be heard again.
            let waits = state.restart.is_some();
            state.alive && !waits && state.guest.as_ref().is_some_and(|guest| guest.running) && state.gate.holding
        });
        let running = (0..2).find(|&host| audible(self, host)).or(protected);
        if let Some(host) = running {
            let state = self.hosts[host].guest.as_ref().expect("it runs").state;
            self.checker.survives(&self.histories, host, state);
        }
        let owner = self.record().map(|record| record.owner);
        let can = |world: &Self, node_id: heartbeat_core::ids::NodeId| {
            (0..2)
                .find(|&host| node(host) == node_id)
                .is_some_and(|host| world.hosts[host].alive && world.has_copy(host))
        };
        let expected = !self.shut_down
            && match owner {
                None => self.hosts[0].alive && self.hosts[0].guest.is_some(),
                Some(Owner::Solo { node: owner, .. }) => can(self, owner.node),
                Some(Owner::Paired { primary, standby }) => can(self, primary.node) || can(self, standby.node),
                Some(Owner::Stopped { .. }) => false,
            };
        // Without the host that keeps it nobody knows, nor without the one that must say whether it was forced out.
        let expected = expected && (!self.options.pair || self.is_kept());
        let heard = self.last_heard + quiet >= self.options.end && self.last_heard > Time::ZERO;
        if expected && !heard {
            self.checker.broken(|| format!("nobody runs, and the record says {owner:?}"));
        }
        // Both hosts are there, one of them runs the VM alone, and nobody wants it so: it must have found its standby.
        let alone = matches!(owner, Some(Owner::Solo { .. }));
        let wanted = self.options.again && self.hosts.iter().all(|host| host.alive && !host.unprotected);
        if expected && alone && wanted && self.was_protected {
            self.checker.broken(|| format!("the VM was not protected again, and the record says {owner:?}"));
        }
    }

    /// A guest, or a whole copy that was not found to be unable to run.
    fn has_copy(&self, host: usize) -> bool {
        self.hosts[host].guest.is_some()
            || self.waits_with_kept(host)
            || (self.hosts[host].standby.is_some() && !self.hosts[host].staged.is_empty() && !self.failed_activation)
    }
}
