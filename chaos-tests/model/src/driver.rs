//! What the product's agent does with the outputs of the cores, in small.
//!
//! As in the product, a generation and a mark are written before the next input; the twin is built, and memory synchronised and rehearsed, without
//! a choice, because nothing can tell when.

use heartbeat_core::ids::{Epoch, Generation};
use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreOp, StoreRequest};
use replicator_core::message::{Durability, PeerMessage, RehearsalResult};
use replicator_core::pacing::Pacing;
use replicator_core::primary::{self, CaptureReport, Primary, PrimaryConfig};
use replicator_core::standby::{self, Standby, StandbyConfig, SwitchedOff};

use crate::check::{State, Violation};
use crate::store::Packet;
use crate::trouble::Memory;
use crate::wiring::Wiring;
use crate::world::{Capture, Connection, Copied, Streamed, VM, World, node};

/// Longer than any run: what these would bound is an action of its own here.
const NEVER: std::time::Duration = std::time::Duration::from_secs(1_000_000);

impl World {
    /// The operator protects the guest of this host with the other host.
    pub(crate) fn protect(&mut self, host: usize) {
        self.connection = Some(Connection::default());
        (self.hosts[host].linked, self.hosts[1 - host].linked) = (true, false);
        let (me, peer) = (self.party(host), self.party(1 - host));
        let mut config = PrimaryConfig::new(VM, me, peer);
        config.ownership.store = self.store_of(host);
        let state = &mut self.hosts[host];
        config.ownership.generation = state.generation;
        config.ownership.first_request = state.take_requests();
        config.first_epoch = state.next_epoch;
        config.pacing = Pacing::Fixed { every: std::time::Duration::ZERO };
        (config.acknowledge_within, config.frozen_after) = (NEVER, NEVER);
        let mut primary = Primary::new(config);
        primary.handle_start(state.now);
        state.primary = Some(Box::new(primary));
        (state.muted, state.memory) = (false, Memory::Guest);
        // A copy of an earlier time is not what this session counts on.
        (state.copy, state.binding, state.mark) = (None, None, None);
        self.pump(host);
    }

    /// Does what the machines of a host say, until they say nothing more.
    pub(crate) fn pump(&mut self, host: usize) {
        loop {
            if let Some(output) = self.hosts[host].primary.as_mut().and_then(|machine| machine.poll_output()) {
                self.do_primary(host, output);
            } else if let Some(output) = self.hosts[host].standby.as_mut().and_then(|machine| machine.poll_output()) {
                self.do_standby(host, output);
            } else if let Some(output) = self.hosts[host].restart.as_mut().and_then(|machine| machine.poll_output()) {
                self.do_restart(host, output);
            } else {
                return;
            }
        }
    }

    fn do_primary(&mut self, host: usize, output: primary::Output) {
        use primary::Output;
        let now = self.hosts[host].now;
        match output {
            Output::Prepare { generation } => {
                let message = PeerMessage::Prepare {
                    vm: VM,
                    name: String::new(),
                    generation,
                    recipe: Vec::new(),
                    layout: Vec::new(),
                    durability: Durability::Disk,
                    protection: Vec::new(),
                };
                self.tell(host, message);
            }
            Output::Sync => self.hosts[host].primary.as_mut().expect("it said so").handle_synced(now),
            Output::Capture { epoch, hold, stay_paused, .. } => {
                let capture = Capture { epoch, hold, stay_paused, begun: None };
                assert!(self.hosts[host].capture.replace(capture).is_none(), "two captures at once");
            }
            Output::Cancel => {
                if let Some(capture) = self.hosts[host].capture.filter(|capture| capture.begun.is_none()) {
                    self.hosts[host].capture = None;
                    let primary = self.hosts[host].primary.as_mut().expect("it said so");
                    primary.handle_capture_failed(now, capture.epoch, true, "cancelled");
                }
            }
            Output::Send { epoch } => {
                let state = self.hosts[host].captured.iter().find(|(known, _)| *known == epoch).expect("captured").1;
                let primary = self.hosts[host].primary.as_ref().expect("it said so");
                let (generation, incarnation) = (primary.session(), self.hosts[host].incarnation);
                self.stream_out(host, 1, Streamed::Epoch { generation, incarnation, epoch, state });
                if self.wiring == Wiring::ReleaseOnSent {
                    self.release(host, epoch);
                }
            }
            Output::PutBack { epoch } => {
                let before = self.hosts[host].captured.len();
                self.hosts[host].captured.retain(|(known, _)| *known != epoch);
                assert!(self.hosts[host].captured.len() < before, "put back what was not captured");
            }
            Output::Release { through } => {
                self.hosts[host].captured.retain(|(epoch, _)| *epoch > through);
                self.release(host, through);
            }
            Output::OpenOutput => self.open_gate(host),
            Output::Mute => {
                let state = &mut self.hosts[host];
                state.muted = true;
                // What is held may be dropped; that it is kept is the worse case.
                state.gate.holding = true;
                if let Some(guest) = &mut state.guest {
                    guest.running = false;
                }
                if self.wiring == Wiring::DestroyEarly {
                    self.fence(host);
                }
            }
            Output::Resume => {
                let state = &mut self.hosts[host];
                state.muted = false;
                if let Some(guest) = &mut state.guest {
                    guest.running = true;
                }
            }
            Output::Fence => self.fence(host),
            Output::Ask(request) => self.ask(host, request),
            Output::Peer(message) => self.tell(host, message),
            Output::PersistGeneration(generation) => {
                self.generation_is_durable(host, generation);
                self.hosts[host].primary.as_mut().expect("it said so").handle_generation_persisted(now, generation);
            }
            Output::Close(_) => self.close(host),
            Output::Detach | Output::State { .. } => {}
            Output::Finished => {
                let state = &mut self.hosts[host];
                state.next_epoch = state.primary.take().expect("it said so").next_epoch();
                (state.capture, state.captured) = (None, Vec::new());
            }
        }
    }

    fn do_standby(&mut self, host: usize, output: standby::Output) {
        use standby::Output;
        let now = self.hosts[host].now;
        match output {
            Output::Commit { epoch } => {
                let host = &mut self.hosts[host];
                let state = host.staged.iter().find(|(known, _)| *known == epoch).expect("it was staged").1;
                host.staged.retain(|(known, _)| known.next() >= epoch);
                host.copy = Some(Copied { epoch, state, failed: false, gone: false });
            }
            Output::Acknowledge { generation, incarnation, epoch } => {
                self.tell(host, PeerMessage::Acknowledge { generation, incarnation, epoch });
            }
            Output::Discard { epoch } => {
                self.hosts[host].staged.retain(|(known, _)| *known != epoch);
                if self.wiring == Wiring::AcknowledgeAfterGrant {
                    let standby = self.hosts[host].standby.as_ref().expect("it said so");
                    let (generation, incarnation) = (standby.config().generation, self.hosts[host].incarnation);
                    self.tell(host, PeerMessage::Acknowledge { generation, incarnation, epoch });
                }
            }
            Output::Rehearse { .. } => {
                let result = RehearsalResult::Loads { launch: Default::default(), load: Default::default() };
                self.hosts[host].standby.as_mut().expect("it said so").handle_rehearsed(now, result);
            }
            Output::Ask(request) => self.ask(host, request),
            Output::Peer(message) => self.tell(host, message),
            Output::PersistGeneration(generation) => {
                self.generation_is_durable(host, generation);
                self.hosts[host].standby.as_mut().expect("it said so").handle_generation_persisted(now, generation);
            }
            Output::Mark { generation, .. } => {
                self.generation_is_durable(host, generation);
                self.hosts[host].mark = Some(generation);
                self.hosts[host].standby.as_mut().expect("it said so").handle_marked(now, generation);
            }
            Output::SwitchOff if self.wiring == Wiring::ActivateUnfenced => {
                let standby = self.hosts[host].standby.as_mut().expect("it said so");
                standby.handle_switched_off(now, SwitchedOff::Confirmed);
            }
            Output::SwitchOff => self.hosts[host].fencing = true,
            Output::Keep { generation, epoch } => self.keep(host, generation, epoch),
            Output::Activate { epoch } => self.hosts[host].activating = Some(epoch),
            Output::Destroy => self.destroy(host),
            Output::Close(_) => self.close(host),
            Output::Release | Output::State { .. } => {}
            Output::Finished => self.hosts[host].standby = None,
        }
    }

    fn tell(&mut self, from: usize, message: PeerMessage) {
        if !self.hosts[from].linked {
            return;
        }
        self.stream_out(from, 0, Streamed::Control(message));
    }

    fn stream_out(&mut self, from: usize, stream: usize, streamed: Streamed) {
        if let Some(connection) = self.connection.as_mut().filter(|connection| connection.lost == [false; 2]) {
            connection.queues[1 - from][stream].push_back(streamed);
        }
    }

    /// What was said before arrives first.
    fn close(&mut self, host: usize) {
        if !self.hosts[host].linked {
            return;
        }
        self.stream_out(host, 0, Streamed::Closed);
        if let Some(connection) = &mut self.connection {
            connection.lost[host] = true;
        }
    }

    pub(crate) fn ask(&mut self, host: usize, request: StoreRequest) {
        if let StoreOp::Change { owner, .. } = request.op {
            self.hosts[host].asked = request.id;
            let alone = matches!(owner, Owner::Solo { node: wanted, .. } if wanted.node == node(host));
            if alone && self.wiring == Wiring::AloneWithoutGrant && self.hosts[host].primary.is_some() {
                self.open_gate(host);
            }
        }
        self.send(Packet::Request(self.hosts[host].asks, request));
    }

    fn release(&mut self, host: usize, through: Epoch) {
        while let Some((epoch, state)) = self.hosts[host].gate.held.front().copied() {
            if epoch > through {
                return;
            }
            self.hosts[host].gate.held.pop_front();
            self.heard(host, state);
        }
    }

    fn open_gate(&mut self, host: usize) {
        self.hosts[host].gate.holding = false;
        while let Some((_, state)) = self.hosts[host].gate.held.pop_front() {
            self.heard(host, state);
        }
    }

    /// The guest is destroyed because it runs elsewhere.
    pub(crate) fn fence(&mut self, host: usize) {
        if self.hosts[host].guest.take().is_none() {
            return;
        }
        (self.hosts[host].capture, self.hosts[host].memory) = (None, Memory::Nothing);
        let elsewhere = match self.owner() {
            Some(Owner::Solo { node: winner, activated: true, .. } | Owner::Paired { primary: winner, .. }) => {
                winner.node != node(host)
            }
            Some(Owner::Stopped { .. }) => true,
            _ => false,
        };
        // Whether this was wrong is known when the winner cannot run, at the latest.
        if !elsewhere && self.wiring != Wiring::DestroyEarly {
            self.checker.broken(Violation::Destroyed);
        }
        let other = &self.hosts[1 - host];
        if !other.has_vm() && !other.lost_by_fault && !matches!(self.owner(), Some(Owner::Stopped { .. })) {
            self.checker.broken(Violation::NoCopy);
        }
    }

    /// The standby's copy is destroyed because nobody needs it.
    fn destroy(&mut self, host: usize) {
        let named = match self.owner() {
            Some(Owner::Paired { primary, standby }) => {
                let session = self.hosts[host].standby.as_ref().expect("it said so").config().generation;
                let current = self.record().is_some_and(|record| record.generation == session);
                current && primary.node != node(host) && *standby == self.party(host)
            }
            Some(Owner::Solo { node: owner, .. }) => owner.node == node(host),
            None | Some(Owner::Stopped { .. }) => false,
        };
        // One that makes room was of no use when the store was read last. A late ask of an earlier life of the primary may name it since, and
        // harms nobody while that primary has its guest.
        let other = &self.hosts[1 - host];
        if named && self.makes_room && !other.has_vm() && !other.lost_by_fault {
            self.checker.broken(Violation::NoCopy);
        } else if named && !self.makes_room {
            self.checker.broken(Violation::Destroyed);
        }
        let state = &mut self.hosts[host];
        state.staged.clear();
        (state.copy, state.binding, state.memory) = (None, None, Memory::Nothing);
    }

    // --- the pause path ---

    pub(crate) fn begin_capture(&mut self, host: usize) {
        let (early, late) = (self.wiring == Wiring::SealEarly, self.wiring == Wiring::HoldLate);
        let state = &mut self.hosts[host];
        let capture = state.capture.as_mut().expect("offered only then");
        if !capture.hold && !capture.stay_paused {
            self.left.captures -= 1;
        }
        let guest = state.guest.as_mut().expect("offered only then");
        guest.running = false;
        capture.begun = Some(guest.state);
        let next = if early { capture.epoch } else { capture.epoch.next() };
        if capture.hold && !late || late && state.gate.begin_late {
            state.gate.holding = true;
        }
        state.gate.begin_late = capture.hold;
        if state.gate.holding {
            state.gate.epoch = next;
        }
    }

    pub(crate) fn end_capture(&mut self, host: usize) {
        let shut_down = self.shut_down;
        let state = &mut self.hosts[host];
        let now = state.now;
        let capture = state.capture.take().expect("offered only then");
        let copied = capture.begun.expect("offered only then");
        if let Some(guest) = &mut state.guest {
            guest.running = !capture.stay_paused && !state.muted && !shut_down;
        }
        state.captured.push((capture.epoch, copied));
        let report = CaptureReport { epoch: capture.epoch, paused_at: now, pages: 1, ..CaptureReport::default() };
        if let Some(primary) = &mut state.primary {
            primary.handle_captured(now, report);
        }
        self.pump(host);
    }

    // --- the replication connection ---

    pub(crate) fn stream(&mut self, host: usize, stream: usize) {
        let connection = self.connection.as_mut().expect("offered only then");
        match connection.queues[host][stream].pop_front().expect("offered only then") {
            Streamed::Closed => self.lose(host),
            Streamed::Control(PeerMessage::Prepare { generation, .. }) => self.prepare(host, generation),
            // The one it was for was never made, or is of an earlier connection.
            _ if !self.hosts[host].linked => {}
            Streamed::Control(message) => {
                let now = self.hosts[host].now;
                if let PeerMessage::Binding { epoch } = message {
                    self.hosts[host].binding = self.hosts[host].binding.or(Some(epoch));
                }
                let mut message = Some(message);
                let mut take = || message.take().expect("there is one machine");
                if let Some(primary) = &mut self.hosts[host].primary {
                    primary.handle_peer(now, take());
                } else if let Some(standby) = &mut self.hosts[host].standby {
                    standby.handle_peer(now, take());
                }
                self.pump(host);
            }
            Streamed::Epoch { generation, incarnation, epoch, state } => {
                self.received(host, generation, incarnation, epoch, state);
            }
        }
    }

    fn prepare(&mut self, host: usize, generation: Generation) {
        // A copy that is kept for nobody makes room (P9); a guest that still has to be fenced does not, nor one that is being activated.
        let state = &mut self.hosts[host];
        let now = state.now;
        let stays = state.standby.as_mut().is_some_and(|standby| standby.handle_operator_discard(now).is_err());
        let taken = state.primary.is_some() || state.restart.is_some() || state.guest.is_some();
        if stays || taken || state.activating.is_some() || !self.follow_keeper(host) {
            self.stream_out(host, 0, Streamed::Control(PeerMessage::Refused { reason: String::new() }));
            return;
        }
        self.makes_room = true;
        self.pump(host);
        (self.makes_room, self.hosts[host].linked) = (false, true);
        let (me, peer) = (self.party(host), self.party(1 - host));
        let mut config = StandbyConfig::new(VM, me, peer, generation);
        config.ownership.store = self.store_of(host);
        config.fence_required = self.fences;
        let state = &mut self.hosts[host];
        (state.fencing, state.unconfirmed, state.resumed, state.keeping) = (false, false, false, None);
        state.staged.clear();
        (state.copy, state.binding, state.mark) = (None, None, None);
        (state.lost_by_fault, state.memory) = (false, Memory::Standby);
        config.ownership.generation = state.generation;
        config.ownership.first_request = state.take_requests();
        let mut standby = Standby::new(config);
        standby.handle_prepared(state.now);
        state.standby = Some(Box::new(standby));
        self.pump(host);
    }

    fn received(
        &mut self,
        host: usize,
        generation: Generation,
        incarnation: heartbeat_core::ids::Incarnation,
        epoch: Epoch,
        state: State,
    ) {
        let now = self.hosts[host].now;
        if let Some(standby) = &mut self.hosts[host].standby {
            self.hosts[host].staged.push((epoch, state));
            standby.handle_staged(now, generation, incarnation, epoch);
        }
        self.pump(host);
    }
}
