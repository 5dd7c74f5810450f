//! The simulated world: virtual time, events in order, and what happens at each.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use heartbeat_core::detector::Arrival;
use heartbeat_core::ids::{Epoch, Generation, StoreId, VmId};
use heartbeat_core::record::{Owner, Record};
use heartbeat_core::store::{StoreOp, StoreRequest};
use heartbeat_core::time::Time;
use heartbeat_core::wire::{self, MAX_STORE_MESSAGE};
use heartbeat_core::witness::{Witness, WitnessOutput};
use replicator_core::message::PeerMessage;
use replicator_core::primary::GuestEvent;
use replicator_core::standby::Suspicion;

use super::history::{Checker, Histories, State, may_only_run_on};
use super::host::{Guest, Host, Kept, node};
use super::network::{Connection, Cuts, Datagram, Streamed, WITNESS};
use super::options::{Fault, Options, Wiring};
use super::pair::Pair;
use super::rng::Rng;

pub(super) const VM: VmId = VmId([9; 16]);
pub(super) const STORE: StoreId = StoreId([5; 16]);
const HEARTBEAT: Duration = Duration::from_millis(20);
/// How long a stream that cannot pass waits before it is tried again.
const RETRANSMIT: Duration = Duration::from_millis(15);
/// The simulated witness of [`Wiring::SilenceIsGrant`] is waited for this long.
const IMPATIENCE: Duration = Duration::from_millis(300);
/// Bound on the events of one run: more means that a machine spins.
const MAX_EVENTS: u64 = 400_000;

#[derive(Debug)]
pub(super) enum Event {
    GuestRuns(usize),
    Beat(usize),
    CheckPeer(usize),
    CheckConnection(usize),
    Deliver {
        to: usize,
        datagram: Datagram,
    },
    Stream {
        connection: u64,
        to: usize,
        stream: usize,
    },
    Timer(usize),
    Synced(usize),
    TryCapture(usize),
    EndCapture(usize),
    Sent(usize, Epoch),
    Prepared(usize),
    Rehearsed(usize, bool),
    Activated(usize, Epoch, bool),
    /// The fence command of this host has ended, and confirmed that the other one is off.
    SwitchedOff(usize, bool),
    /// A copy that waits for the fence is durable, or found no room.
    Kept(usize, Kept, bool),
    /// It is noted with another grant.
    KeptNoted(usize, Generation),
    GenerationDurable(usize, Generation),
    Marked(usize, Generation),
    RecordDurable(u64),
    /// Of the store that this host keeps.
    KeptDurable(usize, u64),
    /// A host asks the other one about what it keeps.
    AskOther(usize),
    /// The other host was confirmed dead a moment ago, and is to be forced out.
    Force(usize),
    PowerOn(usize),
    RecordFailed(u64, Record),
    WitnessRestarts,
    GuestGoesOn(usize),
    GuestEnds(usize),
    GuestSays(usize, GuestEvent),
    Lose(usize),
    Again(usize),
    Fault(Fault),
    Healed,
}

/// Which host's agent (or host) an event needs, and whether the agent is needed.
fn target(event: &Event) -> Option<(usize, bool)> {
    match *event {
        Event::GuestRuns(host) | Event::GuestGoesOn(host) | Event::GuestEnds(host) => Some((host, false)),
        Event::Deliver { to, .. } if to == WITNESS => None,
        Event::Stream { to: host, .. }
        | Event::Deliver { to: host, .. }
        | Event::Beat(host)
        | Event::CheckPeer(host)
        | Event::CheckConnection(host)
        | Event::Timer(host)
        | Event::Synced(host)
        | Event::TryCapture(host)
        | Event::EndCapture(host)
        | Event::Sent(host, _)
        | Event::Prepared(host)
        | Event::Rehearsed(host, _)
        | Event::Activated(host, ..)
        | Event::SwitchedOff(host, _)
        | Event::Kept(host, ..)
        | Event::KeptNoted(host, _)
        | Event::GenerationDurable(host, _)
        | Event::Marked(host, _)
        | Event::GuestSays(host, _)
        | Event::Again(host)
        | Event::AskOther(host)
        | Event::KeptDurable(host, _)
        | Event::Force(host)
        | Event::Lose(host) => Some((host, true)),
        Event::PowerOn(_)
        | Event::RecordDurable(_)
        | Event::RecordFailed(..)
        | Event::WitnessRestarts
        | Event::Fault(_)
        | Event::Healed => None,
    }
}

#[derive(Debug)]
pub(super) struct Queued {
    at: Time,
    number: u64,
    pub(super) event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// What happened in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Epochs that a standby committed.
    pub epochs: u64,
    /// Times that a record named a pair.
    pub pairings: u64,
    /// Twins that were activated.
    pub activations: u64,
    /// Guests that were fenced.
    pub fenced: u64,
    /// Times that a primary opened its output.
    pub opened: u64,
    /// Times that a primary fell mute.
    pub muted: u64,
    /// Muted guests that resumed.
    pub given_back: u64,
    /// Rehearsals that went well.
    pub rehearsed: u64,
    /// Writes of the witness that failed.
    pub latched: u64,
    /// Guests that were found frozen.
    pub frozen: u64,
    /// Agents that restarted.
    pub restarts: u64,
    /// Guests that a new life of an agent freed.
    pub freed: u64,
    /// Grants that a new life of an agent gave back.
    pub returned: u64,
    /// Times that a guest was to be protected again by itself.
    pub again: u64,
    /// Hosts that were switched off before the VM ran on the other one.
    pub switched_off: u64,
    /// Fence commands that failed.
    pub unconfirmed: u64,
    /// Copies that were kept while a fence was waited for, and that a new life went on with.
    pub resumed: u64,
    /// Hosts that were forced out.
    pub forced: u64,
    /// Those that learnt of it from the other one.
    pub learnt: u64,
    /// Those by which something was lost that had been heard.
    pub rolled_back: u64,
}

pub(super) struct World {
    pub(super) now: Time,
    pub(super) wiring: Wiring,
    pub(super) options: Options,
    pub(super) rng: Rng,
    pub(super) histories: Histories,
    pub(super) checker: Checker,
    pub(super) hosts: [Host; 2],
    pub(super) connection: Option<Connection>,
    pub(super) connections: u64,
    pub(super) counts: Counts,
    /// A guest shut down, and the operator knows.
    pub(super) shut_down: bool,
    /// The copy on this host failed to activate.
    pub(super) failed_activation: bool,
    /// A record named a pair.
    pub(super) was_protected: bool,
    /// A frame was heard at this time last.
    pub(super) last_heard: Time,
    pub(super) trace: Option<Vec<String>>,
    pub(super) cuts: Cuts,
    pub(super) witness: Witness,
    /// In place of the witness, where there is no third host.
    pub(super) pair: Pair,
    /// What the witness is making durable.
    pub(super) writing: Option<Record>,
    /// What a witness whose write failed will find when it restarts.
    pub(super) on_disk: Option<Option<Record>>,
    pub(super) events: BinaryHeap<Reverse<Queued>>,
    number: u64,
}

impl World {
    pub(super) fn new(seed: u64, wiring: Wiring, traced: bool) -> Self {
        let mut rng = Rng::new(seed);
        let options = Options::of(seed, &mut rng);
        let histories = Histories::new();
        let guest = Guest::running(histories.boot());
        let mut world = Self {
            now: Time::ZERO,
            wiring,
            rng,
            histories,
            checker: Checker::default(),
            hosts: [Host::new(Some(guest)), Host::new(None)],
            connection: None,
            connections: 0,
            counts: Counts::default(),
            shut_down: false,
            failed_activation: false,
            was_protected: false,
            last_heard: Time::ZERO,
            trace: traced.then(Vec::new),
            cuts: Cuts::default(),
            witness: Witness::new(STORE, []),
            pair: Pair::new(),
            writing: None,
            on_disk: None,
            events: BinaryHeap::new(),
            number: 0,
            options,
        };
        for host in 0..2 {
            world.after(Duration::from_micros(7), Event::GuestRuns(host));
            world.after(Duration::from_millis(3), Event::Beat(host));
            if world.options.pair {
                world.after(Duration::from_millis(5), Event::AskOther(host));
            }
        }
        world.after(Duration::from_millis(10), Event::Fault(Fault::Protect));
        for (at, fault) in world.options.faults.clone() {
            world.at(at, Event::Fault(fault));
        }
        world.at(world.options.healed, Event::Healed);
        world.note(|world| format!("{:?}", world.options));
        world
    }

    pub(super) fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        if let Some(mut trace) = self.trace.take() {
            trace.push(format!("{:?} {}", self.now, line(self)));
            self.trace = Some(trace);
        }
    }

    pub(super) fn at(&mut self, at: Time, event: Event) {
        self.number += 1;
        self.events.push(Reverse(Queued { at: at.max(self.now), number: self.number, event }));
    }

    pub(super) fn after(&mut self, wait: Duration, event: Event) {
        self.at(self.now + wait, event);
    }

    pub(super) fn record(&self) -> Option<&Record> {
        if self.options.pair { self.pair.record() } else { self.witness.record(VM) }
    }

    fn owner(&self) -> Option<&Owner> {
        self.record().map(|record| &record.owner)
    }

    /// Runs to the end, or to the first violation.
    pub(super) fn run(&mut self) {
        for _ in 0..MAX_EVENTS {
            let Some(Reverse(Queued { at, event, .. })) = self.events.pop() else { return };
            if at > self.options.end || self.checker.violation.is_some() {
                return;
            }
            self.now = at;
            if let Some((host, agent)) = target(&event) {
                let state = &self.hosts[host];
                if !state.alive {
                    continue;
                }
                let until = if agent { state.frozen_until.max(state.agent_frozen_until) } else { state.frozen_until };
                if until > self.now {
                    self.at(until, event);
                    continue;
                }
            }
            self.happens(event);
        }
        self.checker.broken(|| "a machine spins: too many events".into());
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::GuestRuns(host) => self.guest_runs(host),
            Event::Beat(host) => {
                let incarnation = self.hosts[host].incarnation;
                self.datagram(host, 1 - host, Datagram::Heartbeat(incarnation));
                self.after(HEARTBEAT, Event::Beat(host));
            }
            Event::CheckPeer(host) => self.check_peer(host),
            Event::CheckConnection(host) => self.check_connection(host),
            Event::Deliver { to, datagram } => self.delivered(to, datagram),
            Event::Stream { connection, to, stream } => self.stream(connection, to, stream),
            Event::Timer(host) => self.timer(host),
            Event::Synced(host) => self.synced(host),
            Event::TryCapture(host) => self.try_capture(host),
            Event::EndCapture(host) => self.end_capture(host),
            Event::Sent(host, epoch) => self.sent(host, epoch),
            Event::Prepared(host) => self.prepared(host),
            Event::Rehearsed(host, loads) => self.rehearsed(host, loads),
            Event::Activated(host, epoch, runs) => self.activated(host, epoch, runs),
            Event::SwitchedOff(host, confirmed) => self.switched_off(host, confirmed),
            Event::Kept(host, kept, durable) => self.kept(host, kept, durable),
            Event::KeptNoted(host, grant) => self.kept_noted(host, grant),
            Event::GenerationDurable(host, generation) => self.generation_durable(host, generation),
            Event::Marked(host, generation) => self.marked(host, generation),
            Event::RecordDurable(token) => {
                self.writing = None;
                self.witness.handle_persisted(token);
                self.pump_witness();
            }
            Event::RecordFailed(token, record) => {
                let old = self.witness.record(VM).copied();
                self.on_disk = Some(if self.rng.chance(500) { Some(record) } else { old });
                self.writing = None;
                self.witness.handle_persist_failed(token);
                self.counts.latched += 1;
                let wait = self.rng.micros(10_000, 900_000);
                self.after(wait, Event::WitnessRestarts);
            }
            Event::WitnessRestarts => self.restart_witness(),
            Event::KeptDurable(host, token) => self.kept_durable(host, token),
            Event::AskOther(host) => self.ask_other(host),
            Event::Force(host) => self.is_confirmed(host),
            Event::PowerOn(host) => self.power_on(host),
            Event::GuestGoesOn(host) => {
                if let Some(guest) = &mut self.hosts[host].guest {
                    guest.stopped = false;
                    self.guest_event(host, GuestEvent::Resumed);
                }
            }
            Event::GuestEnds(host) => {
                if self.hosts[host].guest.is_some() {
                    self.end_guest(host);
                    self.guest_is_gone(host);
                    self.guest_event(host, GuestEvent::Died { how: "it ended after its shutdown".into() });
                }
            }
            Event::GuestSays(host, event) => {
                self.hosts[host].told_shutdown |= matches!(event, GuestEvent::Shutdown { .. });
                let now = self.now;
                if let Some(primary) = &mut self.hosts[host].primary {
                    primary.handle_guest_event(now, event);
                }
                self.pump(host);
            }
            Event::Lose(host) => self.lose_connection(host, "broke"),
            Event::Again(host) => self.again(host),
            Event::Fault(fault) => self.fault(fault),
            Event::Healed => self.healed(),
        }
    }

    // --- guest ---

    fn guest_runs(&mut self, host: usize) {
        let wait = self.rng.micros(1_000, 6_000);
        self.after(wait, Event::GuestRuns(host));
        let input = self.rng.any();
        let emits = self.rng.chance(600);
        let now = self.now;
        let Some(guest) = self.hosts[host].guest.as_mut().filter(|guest| guest.runs(now)) else { return };
        guest.state = self.histories.step(guest.state, input);
        let state = guest.state;
        if emits {
            let gate = &mut self.hosts[host].gate;
            if gate.holding {
                gate.held.push_back((gate.epoch, state));
            } else {
                self.heard(host, state);
            }
        }
    }

    pub(super) fn heard(&mut self, host: usize, state: State) {
        let alone = may_only_run_on(self.owner(), |id| *id == node(host));
        self.checker.heard(&self.histories, host, state, alone);
        self.last_heard = self.now;
    }

    // --- network ---

    pub(super) fn delay(&mut self) -> Duration {
        if self.rng.chance(self.options.straggle) {
            self.rng.micros(1_000, 600_000)
        } else {
            self.rng.micros(100, 100 + self.options.delay)
        }
    }

    pub(super) fn datagram(&mut self, from: usize, to: usize, datagram: Datagram) {
        let copies = 1 + u32::from(self.rng.chance(self.options.doubled));
        for _ in 0..copies {
            if self.cuts.passes(self.now, from, to) && !self.rng.chance(self.options.loss) {
                let delay = self.delay();
                self.after(delay, Event::Deliver { to, datagram: datagram.clone() });
            }
        }
    }

    fn delivered(&mut self, to: usize, datagram: Datagram) {
        match datagram {
            Datagram::Heartbeat(incarnation) => self.heartbeat(to, incarnation),
            Datagram::Request { from, request } if to != WITNESS => self.asked_of_host(to, from, request),
            Datagram::Kept { life, record } => self.told_of_kept(to, life, record),
            Datagram::AskKept { life } => self.asked_of_kept(to, life),
            Datagram::Request { from, request } => {
                if self.answered_by_mistake(from, &request) {
                    return;
                }
                self.witness.handle_request(node(from), from as u64, request);
                self.pump_witness();
            }
            Datagram::Answer(answer) => {
                if self.wiring == Wiring::RefusalIsGrant && !answer.applied {
                    let asked = self.hosts[to].asking_since.is_some();
                    let ended = matches!(answer.record, Some(Record { owner: Owner::Solo { .. }, .. }));
                    if asked && ended && self.hosts[to].primary.is_some() {
                        self.open_gate(to);
                    }
                }
                self.defeated_by_mistake(to, &answer);
                let now = self.now;
                if let Some(primary) = &mut self.hosts[to].primary {
                    primary.handle_answer(now, &answer);
                }
                if let Some(standby) = &mut self.hosts[to].standby {
                    standby.handle_answer(now, &answer);
                }
                if let Some(restart) = &mut self.hosts[to].restart {
                    restart.handle_answer(now, &answer);
                }
                self.pump(to);
            }
        }
    }

    pub(super) fn ask(&mut self, host: usize, request: StoreRequest) {
        let bytes = wire::encode::<MAX_STORE_MESSAGE, _>(&request).expect("a request fits");
        assert_eq!(wire::decode::<MAX_STORE_MESSAGE, StoreRequest>(&bytes), Ok(request));
        if let StoreOp::Change { .. } = request.op {
            self.hosts[host].asked = request.id;
        }
        let own_cause = matches!(request.op, StoreOp::Change { owner: Owner::Solo { .. }, .. });
        if own_cause && self.hosts[host].asking_since.is_none() {
            self.hosts[host].asking_since = Some(self.now);
        }
        if self.options.pair {
            self.ask_pair(host, request);
        } else {
            self.datagram(host, WITNESS, Datagram::Request { from: host, request });
        }
    }

    fn pump_witness(&mut self) {
        while let Some(output) = self.witness.poll_output() {
            match output {
                WitnessOutput::Persist { record, token, .. } => {
                    self.note(|_| format!("witness writes {:?}", record.owner));
                    if let Owner::Paired { .. } = record.owner {
                        self.counts.pairings += 1;
                        self.was_protected = true;
                    }
                    self.writing = Some(record);
                    let slow = self.wiring == Wiring::ReadUndurable;
                    let wait = self.rng.micros(50, if slow { 700_000 } else { 9_000 });
                    let fails = self.rng.chance(self.options.disk_failures);
                    self.after(
                        wait,
                        if fails { Event::RecordFailed(token, record) } else { Event::RecordDurable(token) },
                    );
                }
                WitnessOutput::Answer { tag, answer, .. } => {
                    let to = usize::try_from(tag).expect("a host");
                    self.checker.shows(answer.record);
                    self.datagram(WITNESS, to, Datagram::Answer(answer));
                }
            }
        }
    }

    fn heartbeat(&mut self, host: usize, incarnation: heartbeat_core::ids::Incarnation) {
        let now = self.now;
        let state = &mut self.hosts[host];
        match state.detector.handle_heartbeat(now, incarnation) {
            Arrival::Stale => return,
            Arrival::NewIncarnation => {
                if let Some(primary) = &mut state.primary {
                    primary.handle_peer_restarted(now, incarnation);
                }
                // A session that the new life began is not over by that.
                if let Some(standby) =
                    state.standby.as_mut().filter(|standby| standby.config().primary.incarnation < incarnation)
                {
                    standby.handle_suspected(now, Suspicion::Restarted);
                }
            }
            // What a former life of this node had may be of a former life of the other one, too.
            Arrival::First => self.lives(host),
            Arrival::Heard => {}
        }
        let state = &mut self.hosts[host];
        if std::mem::replace(&mut state.suspects, false) {
            if let Some(primary) = &mut state.primary {
                primary.handle_peer_heard(now);
            }
            if let Some(standby) = &mut state.standby {
                standby.handle_peer_heard(now);
            }
        }
        if !std::mem::replace(&mut state.checks, true) {
            let at = state.detector.next_check().expect("just heard");
            self.at(at, Event::CheckPeer(host));
        }
        self.pump(host);
    }

    fn check_peer(&mut self, host: usize) {
        let now = self.now;
        let state = &mut self.hosts[host];
        let Some(at) = state.detector.next_check().filter(|_| state.checks) else { return };
        if now < at {
            self.at(at, Event::CheckPeer(host));
            return;
        }
        state.checks = false;
        state.suspects = true;
        if let Some(primary) = &mut state.primary {
            primary.handle_peer_suspected(now);
        }
        if let Some(standby) = &mut state.standby {
            standby.handle_suspected(now, Suspicion::Silent);
        }
        self.note(|_| format!("host {host} suspects its peer"));
        self.pump(host);
    }

    /// Sends on a stream of the connection, if this side did not lose it.
    pub(super) fn send(&mut self, from: usize, stream: usize, streamed: Streamed) {
        let delay = self.delay();
        let to = 1 - from;
        let Some(connection) = self.connection.as_mut().filter(|connection| !connection.lost[from]) else { return };
        let queue = &mut connection.queues[to][stream];
        let at = queue.back().map_or(self.now, |&(at, _)| at).max(self.now + delay);
        queue.push_back((at, streamed));
        if queue.len() == 1 {
            let connection = connection.id;
            self.at(at, Event::Stream { connection, to, stream });
        }
    }

    fn stream(&mut self, id: u64, to: usize, stream: usize) {
        let passes = self.cuts.passes(self.now, 1 - to, to);
        let Some(connection) =
            self.connection.as_mut().filter(|connection| connection.id == id && !connection.lost[to])
        else {
            return;
        };
        if !passes {
            self.after(RETRANSMIT, Event::Stream { connection: id, to, stream });
            return;
        }
        let Some((_, streamed)) = connection.queues[to][stream].pop_front() else { return };
        if let Some(&(at, _)) = connection.queues[to][stream].front() {
            self.at(at, Event::Stream { connection: id, to, stream });
        }
        match streamed {
            Streamed::Closed => self.lose_connection(to, "closed"),
            Streamed::Control(message) => self.told(to, message),
            Streamed::Epoch { generation, incarnation, epoch, state } => {
                self.received(to, generation, incarnation, epoch, state);
            }
        }
    }

    /// The connection lives while each side can hear the other's kernel.
    fn check_connection(&mut self, host: usize) {
        let timeout = self.options.connection_timeout;
        let audible = self.hosts[1 - host].alive && self.cuts.passes(self.now, 1 - host, host);
        let now = self.now;
        let Some(connection) = self.connection.as_mut().filter(|connection| !connection.lost[host]) else { return };
        if audible && !connection.lost[1 - host] {
            connection.heard[host] = now;
        }
        if now - connection.heard[host] >= timeout {
            self.lose_connection(host, "timed out");
        } else {
            self.after(RETRANSMIT, Event::CheckConnection(host));
        }
    }

    pub(super) fn lose_connection(&mut self, host: usize, why: &str) {
        let Some(connection) = self.connection.as_mut().filter(|connection| !connection.lost[host]) else { return };
        connection.lost[host] = true;
        let now = self.now;
        self.note(|_| format!("host {host}: connection {why}"));
        if let Some(primary) = &mut self.hosts[host].primary {
            primary.handle_connection_lost(now, why);
        }
        if let Some(standby) = &mut self.hosts[host].standby {
            standby.handle_suspected(now, Suspicion::ConnectionLost);
        }
        self.pump(host);
    }

    // --- time ---

    fn timer(&mut self, host: usize) {
        let now = self.now;
        if self.wiring == Wiring::SilenceIsGrant
            && self.hosts[host].primary.is_some()
            && self.hosts[host].asking_since.is_some_and(|since| now - since > IMPATIENCE)
        {
            self.open_gate(host);
        }
        let state = &mut self.hosts[host];
        if let Some(primary) =
            state.primary.as_mut().filter(|primary| primary.poll_timeout().is_some_and(|at| at <= now))
        {
            primary.handle_timeout(now);
        }
        if let Some(standby) =
            state.standby.as_mut().filter(|standby| standby.poll_timeout().is_some_and(|at| at <= now))
        {
            standby.handle_timeout(now);
        }
        if let Some(restart) =
            state.restart.as_mut().filter(|restart| restart.poll_timeout().is_some_and(|at| at <= now))
        {
            restart.handle_timeout(now);
        }
        self.pump(host);
    }

    /// One control message, as its receiver sees it: it went over the wire.
    pub(super) fn tell(&mut self, from: usize, message: &PeerMessage) {
        if matches!(message, PeerMessage::GuestDied { .. }) && self.hosts[from].told_shutdown {
            self.checker.broken(|| format!("host {from} wants its guest revived, which shut down"));
        }
        let lost = matches!(message, PeerMessage::GuestDied { .. });
        self.counts.frozen +=
            u64::from(lost && self.hosts[from].guest.as_ref().is_some_and(|guest| guest.frozen_until > Time::ZERO));
        let bytes = message.encode().expect("a message fits");
        let message = PeerMessage::decode(&bytes).expect("it was encoded just now");
        self.send(from, 0, Streamed::Control(message));
    }
}
