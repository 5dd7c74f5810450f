//! One state of the world, what can happen next in it, and what happens then.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use heartbeat_core::ids::{Epoch, Generation, Incarnation, NodeId, Party, VmId};
use heartbeat_core::record::Owner;
use heartbeat_core::time::Time;
use replicator_core::message::PeerMessage;
use replicator_core::primary::{GuestEvent, Operator, Primary};
use replicator_core::restart::{End, Restart};
use replicator_core::standby::{ActivationResult, Standby, Suspicion};
use replicator_core::state::ProtectionState;

use crate::check::{Checker, State, Violation, may_only_run_on};
use crate::scenario::{Bounds, Scenario, Start};
use crate::store::{Packet, Store};
use crate::trouble::{Memory, Twin};
use crate::wiring::Wiring;

pub(crate) const VM: VmId = VmId([9; 16]);
/// Bound on what a run that is settled without choices may take.
const SETTLES_WITHIN: usize = 500;

/// What can happen. Hosts are 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The guest goes on and emits a frame.
    Step(usize),
    /// The guest is paused for the capture that was asked for.
    Begin(usize),
    /// The capture is done.
    End(usize),
    /// The twin runs, or cannot.
    Activated(usize, bool),
    /// The fence command of this host has ended: the other one is off, or it is not known to be.
    SwitchedOff(usize, bool),
    /// A message to or from the witness arrives; a copy of it is still under way if so.
    Arrives(usize, bool),
    /// The next message of a stream of the replication connection arrives at this host: control (0) or pages (1).
    Stream(usize, usize),
    /// The write of a store is durable.
    Durable(usize),
    /// The witness crashes and restarts; a write under way was kept, or not.
    WitnessCrash(bool),
    /// The host's clock reaches its next deadline.
    Tick(usize),
    /// The host learns that the replication connection is broken.
    Lose(usize),
    /// The host suspects its peer.
    Suspect(usize),
    /// It hears it again.
    Hear(usize),
    /// The host loses power. A write of its own store was kept, or not.
    Kill(usize, bool),
    /// It has power again, and nothing but what it made durable.
    PowerOn(usize),
    /// Its agent restarts, in the middle of an activation, or not. A write of its own store was kept, or not.
    Restart(usize, Option<Twin>, bool),
    /// The other host is dead, as is confirmed to the operator who wants to force it out.
    Confirm(usize),
    /// It was, and is forced out, unless the VM can go on without that.
    Force(usize),
    /// The other host shows this one what its own store has.
    Show(usize),
    /// Its operator starts the VM from its disk, as its own store allows.
    Boot(usize),
    /// The copy that waits for the fence is durable, and noted with its grant.
    Kept(usize),
    /// Its guest's process dies.
    Dies(usize),
    /// Its guest shuts down.
    ShutsDown(usize),
    /// The primary's operator asks for a planned failover.
    Planned(usize),
    /// The primary's operator ends the protection.
    Unprotect(usize),
    /// The standby's operator asks it to take over.
    TakeOver(usize),
    /// The operator protects the guest with the other host.
    Protect(usize),
}

#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Guest {
    pub(crate) state: State,
    pub(crate) running: bool,
}

/// Frames that wait, with the epoch they are tagged with.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Gate {
    pub(crate) holding: bool,
    pub(crate) epoch: Epoch,
    pub(crate) held: VecDeque<(Epoch, State)>,
    /// Only [`Wiring::HoldLate`] looks at it.
    pub(crate) begin_late: bool,
}

#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Capture {
    pub(crate) epoch: Epoch,
    pub(crate) hold: bool,
    pub(crate) stay_paused: bool,
    /// What was captured, once the guest was paused.
    pub(crate) begun: Option<State>,
}

/// A copy that a standby holds.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Copied {
    pub(crate) epoch: Epoch,
    pub(crate) state: State,
    /// It was found to be unable to run.
    pub(crate) failed: bool,
    /// A fault took it. What it held was safe to be heard all the same: nobody else may run.
    pub(crate) gone: bool,
}

/// A copy on the disk of a host that waits for its fence.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Kept {
    pub(crate) grant: Generation,
    pub(crate) epoch: Epoch,
    pub(crate) state: State,
    /// Of the session that it came by.
    pub(crate) session: Generation,
    pub(crate) primary: Party,
    /// The host was off since it was noted.
    pub(crate) off_since: bool,
}

#[derive(Clone, Debug, Hash)]
pub(crate) struct Host {
    pub(crate) alive: bool,
    pub(crate) now: Time,
    pub(crate) incarnation: Incarnation,
    /// Durable: the highest generation seen.
    pub(crate) generation: Generation,
    /// Durable: what it marked as being activated.
    pub(crate) mark: Option<Generation>,
    pub(crate) guest: Option<Guest>,
    pub(crate) gate: Gate,
    pub(crate) primary: Option<Box<Primary>>,
    pub(crate) standby: Option<Box<Standby>>,
    /// Of a new life of the agent, until it knows what it may do with what it found.
    pub(crate) restart: Option<Box<Restart>>,
    /// Durable: what a new life of the agent takes the VM up by.
    pub(crate) memory: Memory,
    /// How the last taking up ended.
    pub(crate) ended: Option<End>,
    /// Durable: whose store it asks, where there is no third host.
    pub(crate) asks: usize,
    /// Its machine is an end of the replication connection, not of an earlier one.
    pub(crate) linked: bool,
    pub(crate) next_request: u64,
    pub(crate) next_epoch: Epoch,
    pub(crate) capture: Option<Capture>,
    /// Captured and not acknowledged.
    pub(crate) captured: Vec<(Epoch, State)>,
    /// As a standby: whole epochs.
    pub(crate) staged: Vec<(Epoch, State)>,
    pub(crate) copy: Option<Copied>,
    /// From which epoch on the primary holds output, as this standby was told.
    pub(crate) binding: Option<Epoch>,
    pub(crate) activating: Option<Epoch>,
    /// It is having the other host switched off.
    pub(crate) fencing: bool,
    /// That was tried, and confirmed nothing.
    pub(crate) unconfirmed: bool,
    /// A copy is being made durable.
    pub(crate) keeping: Option<Kept>,
    /// Durable: it, and the grant that it is noted with. It goes when another one takes its place, and not before: nothing relies on that.
    pub(crate) kept: Option<Kept>,
    /// It is gone on with.
    pub(crate) resumed: bool,
    /// Told to mute: a capture that ends leaves the guest paused.
    pub(crate) muted: bool,
    pub(crate) suspects: bool,
    /// A fault took its copy.
    pub(crate) lost_by_fault: bool,
    /// The last change that it asked for. Only [`Wiring::RefusalIsDefeat`] looks at it.
    pub(crate) asked: u64,
}

#[derive(Clone, Debug, Hash)]
pub(crate) enum Streamed {
    Control(PeerMessage),
    Epoch { generation: Generation, incarnation: Incarnation, epoch: Epoch, state: State },
    Closed,
}

/// The replication connection: by receiver and stream, what is under way in order; and who lost it.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Connection {
    pub(crate) queues: [[VecDeque<Streamed>; 2]; 2],
    pub(crate) lost: [bool; 2],
}

/// One state. Two are the same if they hash alike: that is how `stateright` knows them, too.
#[derive(Clone, Debug, Hash)]
#[allow(clippy::derived_hash_with_manual_eq, reason = "equality is made of the hash")]
pub struct World {
    pub(crate) wiring: Wiring,
    /// A winner must have the other host switched off.
    pub(crate) fences: bool,
    pub(crate) left: Bounds,
    pub(crate) hosts: [Host; 2],
    pub(crate) connection: Option<Connection>,
    pub(crate) packets: Vec<Packet>,
    /// The witness's; or those that the two hosts keep.
    pub(crate) stores: Vec<Store>,
    /// Whose store the record is in: of the hosts, the one that forced last.
    pub(crate) keeper: usize,
    pub(crate) checker: Checker,
    pub(crate) shut_down: bool,
    /// A copy is being destroyed to make room for that of another session.
    pub(crate) makes_room: bool,
    pub(crate) next_step: u8,
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        let hash = |world: &Self| {
            let mut hasher = DefaultHasher::new();
            world.hash(&mut hasher);
            hasher.finish()
        };
        hash(self) == hash(other)
    }
}

pub(crate) fn node(host: usize) -> NodeId {
    NodeId([u8::try_from(host + 1).expect("two hosts"); 16])
}

pub(crate) fn host_of(node: NodeId) -> usize {
    usize::from(node.0[0] - 1)
}

impl Host {
    fn new(guest: Option<Guest>) -> Self {
        Self {
            alive: true,
            now: Time::ZERO,
            incarnation: Incarnation(1),
            generation: Generation(0),
            mark: None,
            guest,
            gate: Gate::default(),
            primary: None,
            standby: None,
            restart: None,
            memory: Memory::Nothing,
            ended: None,
            asks: 0,
            linked: false,
            next_request: 1,
            next_epoch: Epoch(1),
            capture: None,
            captured: Vec::new(),
            staged: Vec::new(),
            copy: None,
            binding: None,
            activating: None,
            fencing: false,
            unconfirmed: false,
            keeping: None,
            kept: None,
            resumed: false,
            muted: false,
            suspects: false,
            lost_by_fault: false,
            asked: 0,
        }
    }

    /// A copy that the primary counts on, and that could run as far as anybody knows.
    fn is_whole(&self) -> bool {
        self.copy
            .is_some_and(|copy| !copy.failed && !copy.gone && self.binding.is_some_and(|binding| copy.epoch >= binding))
    }

    /// Whether the VM can go on from here.
    pub(crate) fn has_vm(&self) -> bool {
        self.alive && (self.guest.is_some() || self.is_whole())
    }

    pub(crate) fn take_requests(&mut self) -> u64 {
        let first = self.next_request;
        self.next_request += 1 << 16;
        first
    }
}

/// Takes one from what may still happen.
pub(crate) fn spend(left: &mut u8) {
    *left = left.checked_sub(1).expect("offered only if it is left");
}

impl World {
    pub(crate) fn begin(scenario: &Scenario) -> Self {
        let guest = Guest { state: State::default(), running: true };
        let mut world = Self {
            wiring: Wiring::Faithful,
            fences: scenario.bounds.fences > 0,
            left: Bounds { captures: 9, ..Bounds::default() },
            hosts: [Host::new(Some(guest)), Host::new(None)],
            connection: None,
            packets: Vec::new(),
            stores: Store::all(scenario.start.has_third()),
            keeper: 0,
            checker: Checker::default(),
            shut_down: false,
            makes_room: false,
            next_step: 1,
        };
        match scenario.start {
            Start::Pairing => world.protect(0),
            Start::Protected | Start::TwoHosts => {
                world.protect(0);
                world.settle(|world| world.is_protected(0));
            }
            Start::PairingAgain | Start::TwoHostsAgain => {
                world.protect(0);
                world.settle(|world| world.is_protected(0));
                world.happens(Action::Lose(1));
                world.settle(|world| world.hosts[1].guest.is_some() && world.hosts[1].standby.is_none());
                world.happens(Action::Lose(0));
                world.settle(|world| world.hosts[0].guest.is_none() && world.hosts[0].primary.is_none());
                world.packets.clear();
                world.protect(1);
                if scenario.start == Start::TwoHostsAgain {
                    world.settle(|world| world.is_protected(1));
                }
            }
            Start::TwoHostsAlone => {
                world.protect(0);
                world.settle(|world| world.is_protected(0));
                world.happens(Action::Lose(0));
                world.settle(|world| world.hosts[0].primary.is_none());
                world.happens(Action::Lose(1));
                world.settle(|world| world.packets.is_empty() && world.may_be_forced(1));
            }
        }
        (world.wiring, world.left) = (scenario.wiring, scenario.bounds);
        world
    }

    pub(crate) fn is_protected(&self, host: usize) -> bool {
        self.hosts[host].primary.as_ref().is_some_and(|primary| primary.state().0 == ProtectionState::Protected)
            && self.packets.is_empty()
            && self
                .connection
                .as_ref()
                .is_some_and(|connection| connection.queues.iter().flatten().all(VecDeque::is_empty))
    }

    /// Lets what is under way happen, in one order and without faults.
    fn settle(&mut self, until: impl Fn(&Self) -> bool) {
        for _ in 0..SETTLES_WITHIN {
            if until(self) {
                return;
            }
            let mut actions = Vec::new();
            self.actions(&mut actions);
            let first = actions.iter().copied().find(|action| match action {
                Action::Activated(_, runs) => *runs,
                Action::Arrives(_, again) => !*again,
                Action::Stream(..) | Action::Durable(_) | Action::End(_) => true,
                _ => false,
            });
            let next = first.or_else(|| actions.iter().copied().find(|action| matches!(action, Action::Begin(_))));
            self.happens(next.expect("something is under way"));
        }
        panic!("it does not settle: {self:?}");
    }

    pub(crate) fn party(&self, host: usize) -> Party {
        Party { node: node(host), incarnation: self.hosts[host].incarnation }
    }

    pub(crate) fn owner(&self) -> Option<&Owner> {
        self.record().map(|record| &record.owner)
    }

    /// What can happen next.
    pub(crate) fn actions(&self, actions: &mut Vec<Action>) {
        let left = &self.left;
        for host in 0..2 {
            let state = &self.hosts[host];
            if !state.alive {
                if left.returns > 0 {
                    actions.push(Action::PowerOn(host));
                }
                continue;
            }
            let primary = state.primary.is_some();
            if state.guest.is_some_and(|guest| guest.running) {
                if left.steps > 0 {
                    actions.push(Action::Step(host));
                }
                if left.shutdowns > 0 {
                    actions.push(Action::ShutsDown(host));
                }
            }
            if state.guest.is_some() && left.deaths > 0 {
                actions.push(Action::Dies(host));
            }
            match state.capture {
                Some(Capture { begun: Some(_), .. }) => actions.push(Action::End(host)),
                Some(capture)
                    if state.guest.is_some() && (left.captures > 0 || capture.hold || capture.stay_paused) =>
                {
                    actions.push(Action::Begin(host));
                }
                _ => {}
            }
            if state.activating.is_some() {
                actions.push(Action::Activated(host, true));
                if left.failures > 0 {
                    actions.push(Action::Activated(host, false));
                }
            }
            if state.fencing && left.fences > 0 {
                actions.push(Action::SwitchedOff(host, true));
                actions.push(Action::SwitchedOff(host, false));
            }
            if state.keeping.is_some() && left.keeps > 0 {
                actions.push(Action::Kept(host));
            }
            if let Some(connection) = self.connection.as_ref().filter(|connection| !connection.lost[host]) {
                for stream in 0..2 {
                    if !connection.queues[host][stream].is_empty() {
                        actions.push(Action::Stream(host, stream));
                    }
                }
                if left.breaks > 0 || connection.lost[1 - host] {
                    actions.push(Action::Lose(host));
                }
            }
            if left.ticks[host] > 0 && self.next_deadline(host).is_some() {
                actions.push(Action::Tick(host));
            }
            if primary || state.standby.is_some() {
                if state.suspects {
                    actions.push(Action::Hear(host));
                } else if left.suspicions > 0 {
                    actions.push(Action::Suspect(host));
                }
            }
            self.troubles(host, actions);
            if primary && left.planned > 0 {
                actions.push(Action::Planned(host));
            }
            if primary && left.unprotects > 0 {
                actions.push(Action::Unprotect(host));
            }
            if state.standby.is_some() && left.takeovers > 0 {
                actions.push(Action::TakeOver(host));
            }
            let apart = self.connection.as_ref().is_none_or(|connection| connection.lost == [true; 2]);
            let idle = self.is_idle(host) && state.guest.is_some();
            if left.protects > 0 && idle && apart && self.hosts[1 - host].alive && !self.shut_down {
                actions.push(Action::Protect(host));
            }
        }
        self.store_actions(actions);
    }

    fn next_deadline(&self, host: usize) -> Option<Time> {
        let state = &self.hosts[host];
        let due = [
            state.primary.as_ref().and_then(|primary| primary.poll_timeout()),
            state.standby.as_ref().and_then(|standby| standby.poll_timeout()),
            state.restart.as_ref().and_then(|restart| restart.poll_timeout()),
        ];
        due.into_iter().flatten().min()
    }

    pub(crate) fn happens(&mut self, action: Action) {
        match action {
            Action::Step(host) => self.step(host),
            Action::Begin(host) => self.begin_capture(host),
            Action::End(host) => self.end_capture(host),
            Action::Activated(host, runs) => self.activated(host, runs),
            Action::SwitchedOff(host, confirmed) => self.switched_off(host, confirmed),
            Action::Arrives(index, again) => self.arrives(index, again),
            Action::Stream(host, stream) => self.stream(host, stream),
            Action::Durable(store) => self.durable(store),
            Action::WitnessCrash(kept) => self.witness_crashes(kept),
            Action::Tick(host) => {
                spend(&mut self.left.ticks[host]);
                let at = self.next_deadline(host).expect("offered only if there is one");
                let state = &mut self.hosts[host];
                state.now = state.now.max(at);
                let now = state.now;
                self.input_any(
                    host,
                    |primary| primary.handle_timeout(now),
                    |standby| standby.handle_timeout(now),
                    |restart| restart.handle_timeout(now),
                );
            }
            Action::Lose(host) => {
                let both = self.connection.as_ref().is_some_and(|connection| connection.lost[1 - host]);
                if !both && self.left.breaks > 0 {
                    spend(&mut self.left.breaks);
                }
                self.lose(host);
            }
            Action::Suspect(host) => {
                spend(&mut self.left.suspicions);
                self.hosts[host].suspects = true;
                let now = self.hosts[host].now;
                self.input(
                    host,
                    |primary| primary.handle_peer_suspected(now),
                    |standby| standby.handle_suspected(now, Suspicion::Silent),
                );
            }
            Action::Hear(host) => {
                self.hosts[host].suspects = false;
                let now = self.hosts[host].now;
                self.input(host, |primary| primary.handle_peer_heard(now), |standby| standby.handle_peer_heard(now));
            }
            Action::Kill(host, kept) => self.kill(host, kept),
            Action::PowerOn(host) => self.power_on(host),
            Action::Restart(host, twin, kept) => self.restart(host, twin, kept),
            Action::Confirm(host) => self.confirm(host),
            Action::Force(host) => self.force(host),
            Action::Show(host) => self.show(host),
            Action::Boot(host) => self.boot(host),
            Action::Kept(host) => self.kept(host),
            Action::Dies(host) => {
                spend(&mut self.left.deaths);
                let state = &mut self.hosts[host];
                (state.guest, state.capture, state.lost_by_fault) = (None, None, true);
                let now = state.now;
                if let Some(restart) = &mut state.restart {
                    restart.handle_gone(now);
                }
                self.guest_event(host, GuestEvent::Died { how: String::new() });
            }
            Action::ShutsDown(host) => {
                spend(&mut self.left.shutdowns);
                self.shut_down = true;
                self.hosts[host].guest.as_mut().expect("it runs").running = false;
                self.guest_event(host, GuestEvent::Shutdown { gone: false });
            }
            Action::Planned(host) => {
                spend(&mut self.left.planned);
                self.operator(host, Operator::Failover);
            }
            Action::Unprotect(host) => {
                spend(&mut self.left.unprotects);
                self.operator(host, Operator::Unprotect);
            }
            Action::TakeOver(host) => {
                spend(&mut self.left.takeovers);
                let now = self.hosts[host].now;
                let standby = self.hosts[host].standby.as_mut().expect("offered only if there is one");
                // A refusal changes nothing.
                let _refused = standby.handle_operator_failover(now);
                self.pump(host);
            }
            Action::Protect(host) => {
                spend(&mut self.left.protects);
                self.protect(host);
            }
        }
    }

    /// Gives an input to whichever machine the host has, and does what it says.
    pub(crate) fn input(
        &mut self,
        host: usize,
        primary: impl FnOnce(&mut Primary),
        standby: impl FnOnce(&mut Standby),
    ) {
        self.input_any(host, primary, standby, |_| {});
    }

    /// The same, where a new life that took the VM up wants to know of it, too.
    pub(crate) fn input_any(
        &mut self,
        host: usize,
        primary: impl FnOnce(&mut Primary),
        standby: impl FnOnce(&mut Standby),
        restart: impl FnOnce(&mut Restart),
    ) {
        if let Some(machine) = &mut self.hosts[host].primary {
            primary(machine);
        } else if let Some(machine) = &mut self.hosts[host].standby {
            standby(machine);
        } else if let Some(machine) = &mut self.hosts[host].restart {
            restart(machine);
        }
        self.pump(host);
    }

    /// No machine has the VM in its hands here.
    pub(crate) fn is_idle(&self, host: usize) -> bool {
        let state = &self.hosts[host];
        state.primary.is_none() && state.standby.is_none() && state.restart.is_none()
    }

    fn operator(&mut self, host: usize, ask: Operator) {
        let now = self.hosts[host].now;
        let primary = self.hosts[host].primary.as_mut().expect("offered only if there is one");
        // A refusal changes nothing.
        let _refused = primary.handle_operator(now, ask);
        self.pump(host);
    }

    fn guest_event(&mut self, host: usize, event: GuestEvent) {
        let now = self.hosts[host].now;
        self.input(host, |primary| primary.handle_guest_event(now, event), |_| {});
    }

    fn step(&mut self, host: usize) {
        spend(&mut self.left.steps);
        let number = self.next_step;
        self.next_step += 1;
        let state = &mut self.hosts[host];
        let guest = state.guest.as_mut().expect("it runs");
        guest.state = guest.state.step(number);
        let emitted = guest.state;
        if state.gate.holding && state.primary.is_none() {
            // Nobody reads what it says: QEMU drops it.
        } else if state.gate.holding {
            state.gate.held.push_back((state.gate.epoch, emitted));
        } else {
            self.heard(host, emitted);
        }
    }

    pub(crate) fn heard(&mut self, host: usize, state: State) {
        let alone = may_only_run_on(self.owner(), |id| id == node(host));
        let other = self.hosts[1 - host].copy.map(|copy| copy.state);
        self.checker.heard(state, alone, other);
    }

    fn activated(&mut self, host: usize, runs: bool) {
        let older = self.wiring == Wiring::ActivateOlder;
        let state = &mut self.hosts[host];
        let epoch = state.activating.take().expect("offered only then");
        let found = |staged: &[(Epoch, State)], of: Epoch| {
            staged.iter().find(|(known, _)| *known == of).map(|(_, state)| *state)
        };
        let before = Epoch(epoch.0 - 1);
        let copy = found(&state.staged, epoch).expect("it was acknowledged");
        let copy = if older { found(&state.staged, before).unwrap_or(copy) } else { copy };
        let result = if runs {
            state.guest = Some(Guest { state: copy, running: true });
            (state.gate, state.muted, state.memory) = (Gate::default(), false, Memory::Guest);
            self.checker.runs(copy);
            self.runs_beside_none(host);
            ActivationResult::Runs { load: Default::default(), resume: Default::default() }
        } else {
            spend(&mut self.left.failures);
            if let Some(copy) = &mut state.copy {
                copy.failed = true;
            }
            state.lost_by_fault = true;
            if !self.hosts[1 - host].has_vm() && !self.hosts[1 - host].lost_by_fault {
                self.checker.broken(Violation::NoCopy);
            }
            ActivationResult::Fails { reason: String::new() }
        };
        let now = self.hosts[host].now;
        self.input(host, |_| {}, |standby| standby.handle_activated(now, result));
    }

    pub(crate) fn lose(&mut self, host: usize) {
        let Some(connection) = self.connection.as_mut().filter(|connection| !connection.lost[host]) else { return };
        connection.lost[host] = true;
        for queue in &mut connection.queues[host] {
            queue.clear();
        }
        if !self.hosts[host].linked {
            return;
        }
        let now = self.hosts[host].now;
        self.input(
            host,
            |primary| primary.handle_connection_lost(now, "broken"),
            |standby| standby.handle_suspected(now, Suspicion::ConnectionLost),
        );
    }
}
