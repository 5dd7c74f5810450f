//! Trouble: what each fault does to the world, and how an agent begins a new life.

use std::cmp::Reverse;

use heartbeat_core::detector::{Detector, DetectorConfig};
use heartbeat_core::ids::Epoch;
use heartbeat_core::ownership::OwnershipConfig;
use heartbeat_core::witness::Witness;
use replicator_core::primary::{GuestEvent, Operator};
use replicator_core::restart::{Here, Restart};

use super::host::{Guest, Host};
use super::options::{Fault, Wiring};
use super::world::{Event, STORE, VM, World};

impl World {
    pub(super) fn fault(&mut self, fault: Fault) {
        self.note(|_| format!("fault: {fault:?}"));
        let now = self.now;
        // The host that protects a guest, or runs one.
        let runs = |world: &Self| (0..2).find(|&host| world.hosts[host].alive && world.hosts[host].guest.is_some());
        match fault {
            Fault::Kill(host) => {
                self.hosts[host].alive = false;
                self.hosts[host].guest = None;
            }
            // Never shorter than it is: what waits for the end of it would come after what happens before that.
            Fault::PauseHost(host, long) => {
                let until = &mut self.hosts[host].frozen_until;
                *until = (*until).max(now + long);
            }
            Fault::PauseAgent(host, long) => {
                let until = &mut self.hosts[host].agent_frozen_until;
                *until = (*until).max(now + long);
            }
            Fault::Cut(from, to, long) => self.cuts.cut(from, to, now + long),
            Fault::CutBoth(one, other, long) => {
                self.cuts.cut(one, other, now + long);
                self.cuts.cut(other, one, now + long);
            }
            Fault::BreakConnection => {
                for host in 0..2 {
                    let wait = self.rng.micros(10, 90_000);
                    self.after(wait, Event::Lose(host));
                }
            }
            Fault::RestartStandby => {
                let host = (0..2).find(|&host| self.hosts[host].standby.is_some() && self.hosts[host].alive);
                if let Some(host) = host {
                    self.restart(host);
                }
            }
            Fault::RestartAgent(host) => {
                if self.acting(host).is_some() {
                    self.restart(host);
                }
            }
            Fault::GuestDies => {
                if let Some(host) = runs(self) {
                    self.end_guest(host);
                    self.guest_is_gone(host);
                    self.guest_event(host, GuestEvent::Died { how: "killed".into() });
                }
            }
            Fault::GuestShutsDown(gone) => {
                // A guest that is paused cannot shut down.
                let host = runs(self).filter(|&host| self.guest_runs_now(host));
                if let Some(host) = host {
                    self.shut_down = true;
                    self.hosts[host].guest.as_mut().expect("it runs").running = false;
                    if gone {
                        self.end_guest(host);
                        self.guest_is_gone(host);
                    }
                    self.guest_event(host, GuestEvent::Shutdown { gone });
                }
            }
            Fault::GuestShutsDownAndEnds => {
                let host = runs(self).filter(|&host| self.guest_runs_now(host));
                if let Some(host) = host {
                    self.shut_down = true;
                    self.hosts[host].guest.as_mut().expect("it runs").running = false;
                    self.guest_event(host, GuestEvent::Shutdown { gone: false });
                    let wait = self.rng.micros(0, 60_000);
                    self.after(wait, Event::GuestEnds(host));
                }
            }
            Fault::PauseGuest(long) => {
                if let Some(host) = runs(self) {
                    self.hosts[host].guest.as_mut().expect("it runs").stopped = true;
                    self.guest_event(host, GuestEvent::Paused);
                    self.after(long, Event::GuestGoesOn(host));
                }
            }
            Fault::GuestFreezes(long) => {
                if let Some(guest) = runs(self).and_then(|host| self.hosts[host].guest.as_mut()) {
                    guest.frozen_until = now + long;
                }
            }
            Fault::Rehearse => {
                for host in 0..2 {
                    let Some(acting) = self.acting(host) else { continue };
                    if let Some(primary) = &mut acting.primary {
                        let answer = primary.handle_operator(now, Operator::Rehearse);
                        self.note(|_| format!("host {host}: rehearse: {answer:?}"));
                    } else if let Some(standby) = &mut acting.standby {
                        let answer = standby.handle_operator_rehearse(now);
                        self.note(|_| format!("host {host}: rehearse: {answer:?}"));
                    }
                    self.pump(host);
                }
            }
            Fault::GuestChanged => {
                if let Some(host) = runs(self) {
                    self.guest_event(host, GuestEvent::Changed { what: "a device was added".into() });
                }
            }
            Fault::Unprotect | Fault::Planned => {
                let ask = if fault == Fault::Planned { Operator::Failover } else { Operator::Unprotect };
                for host in 0..2 {
                    if let Some(primary) = self.acting(host).and_then(|host| host.primary.as_mut()) {
                        let answer = primary.handle_operator(now, ask);
                        self.hosts[host].unprotected |= fault == Fault::Unprotect && answer.is_ok();
                        self.note(|_| format!("host {host}: {ask:?}: {answer:?}"));
                        self.pump(host);
                    }
                }
            }
            Fault::TakeOver => {
                for host in 0..2 {
                    if let Some(standby) = self.acting(host).and_then(|host| host.standby.as_mut()) {
                        let answer = standby.handle_operator_failover(now);
                        self.note(|_| format!("host {host}: take over: {answer:?}"));
                        self.pump(host);
                    }
                }
            }
            Fault::PowerLoss(host, long) => self.power_off(host, long),
            Fault::Force(host, long) => self.force(host, long),
            Fault::Protect => {
                if let Some(host) = runs(self).filter(|&host| {
                    self.acting(host)
                        .is_some_and(|host| host.primary.is_none() && host.standby.is_none() && host.restart.is_none())
                }) {
                    // Nobody can be asked to stand by who has no power.
                    self.hosts[host].unprotected &= !self.hosts[1 - host].alive;
                    self.protect(host);
                }
            }
        }
    }

    pub(super) fn guest_event(&mut self, host: usize, event: GuestEvent) {
        let wait = self.rng.micros(10, 5_000);
        self.after(wait, Event::GuestSays(host, event));
    }

    pub(super) fn guest_is_gone(&mut self, host: usize) {
        let now = self.now;
        if let Some(restart) = &mut self.hosts[host].restart {
            restart.handle_gone(now);
        }
    }

    fn guest_runs_now(&self, host: usize) -> bool {
        self.hosts[host].guest.as_ref().is_some_and(|guest| guest.runs(self.now))
    }

    /// A witness whose write failed finds what the disk kept.
    pub(super) fn restart_witness(&mut self) {
        if let Some(record) = self.on_disk.take() {
            self.note(|_| format!("witness restarts with {:?}", record.map(|record| record.owner)));
            self.witness = Witness::new(STORE, record.map(|record| (VM, record)));
            self.checker.found(record);
        }
    }

    /// A host whose agent can be talked to.
    pub(super) fn acting(&mut self, host: usize) -> Option<&mut Host> {
        let now = self.now;
        let state = &mut self.hosts[host];
        (state.alive && state.frozen_until.max(state.agent_frozen_until) <= now).then_some(state)
    }

    /// The agent is killed and another life of it begins at once. What the former one was about to do does not happen, or has just
    /// happened.
    pub(super) fn restart(&mut self, host: usize) {
        self.counts.restarts += 1;
        self.kept_restarts(host);
        let (mut activating, mut marking, mut fencing, mut keeping) = (None, None, false, None);
        self.events.retain(|Reverse(queued)| match queued.event {
            Event::Activated(of, epoch, runs) if of == host => {
                activating = activating.or(Some((epoch, runs)));
                false
            }
            Event::Marked(of, generation) if of == host => {
                marking = Some(generation);
                false
            }
            Event::SwitchedOff(of, confirmed) if of == host => {
                fencing |= confirmed;
                false
            }
            Event::Kept(of, kept, durable) if of == host => {
                keeping = durable.then_some(kept).or(keeping);
                false
            }
            Event::Timer(of)
            | Event::KeptNoted(of, _)
            | Event::Synced(of)
            | Event::TryCapture(of)
            | Event::EndCapture(of)
            | Event::Sent(of, _)
            | Event::Prepared(of)
            | Event::Rehearsed(of, _)
            | Event::GenerationDurable(of, _)
            | Event::GuestSays(of, _)
            | Event::Lose(of)
            | Event::Again(of) => of != host,
            _ => true,
        });
        if fencing && self.rng.chance(500) {
            // It did its work a moment before, and nobody is left who was told.
            self.lose_power_by_fence(host);
        }
        if let Some(kept) = keeping
            && self.rng.chance(500)
        {
            self.hosts[host].kept = Some(kept);
        }
        if let Some(generation) = marking
            && self.rng.chance(500)
        {
            let state = &mut self.hosts[host];
            (state.marked, state.generation) = (marking, state.generation.max(generation));
        }
        if let Some((epoch, true)) = activating {
            let state = self.hosts[host].staged[&epoch];
            match self.rng.below(4) {
                // It was told to run a moment before, and does.
                0 | 1 => {
                    self.counts.activations += 1;
                    self.hosts[host].guest = Some(Guest::running(state));
                    (self.hosts[host].activated_from, self.hosts[host].destroyed) = (Some(state), false);
                    self.hosts[host].gate = super::host::Gate::default();
                    self.hosts[host].had_guest = true;
                }
                // It ran, was heard, and died with the agent. Nothing but the mark tells of it.
                2 => {
                    let input = self.rng.any();
                    let state = self.histories.step(state, input);
                    self.heard(host, state);
                }
                _ => {}
            }
        }
        self.activated_twice_by_mistake(host);
        let state = &mut self.hosts[host];
        (state.primary, state.standby, state.capture) = (None, None, None);
        state.staged.clear();
        state.captured.clear();
        // Nobody reads what the guest says: its gate stays as it is and drops everything.
        state.gate.held.clear();
        if state.gate.holding {
            state.gate.epoch = Epoch::BOUND;
        }
        state.next_epoch = Epoch(state.next_epoch.0 + 1_000_000);
        state.incarnation = state.incarnation.next();
        state.detector = Detector::new(DetectorConfig::default());
        (state.suspects, state.checks) = (false, false);
        if let Some(connection) = &mut self.connection {
            connection.lost[host] = true;
        }
        state.resumed = false;
        let found = if self.options.pair { self.pair.record() } else { self.witness.record(VM) };
        let marked = state.marked.filter(|_| self.wiring != Wiring::ForgetMark);
        let here = match (state.guest.is_some(), state.had_guest, state.kept) {
            (true, ..) => Here::Guest,
            (false, true, _) => Here::Gone,
            (false, false, Some(kept)) if self.wiring == Wiring::KeptIsEnough => Here::Kept {
                grant: found.map_or(kept.grant, |record| record.generation),
                marked: None,
                off_since: false,
            },
            (false, false, Some(kept)) => {
                let off_since = kept.boot != state.boots && self.wiring != Wiring::ForceAfterOff;
                Here::Kept { grant: kept.grant, marked, off_since }
            }
            (false, false, None) => Here::Copy { marked },
        };
        let mut config = OwnershipConfig::new(VM, super::host::party(host, state.incarnation));
        config.generation = state.generation;
        config.first_request = state.take_requests();
        config.store = self.options.pair.then(|| self.pair.store_of(host));
        let mut restart = Restart::new(config, here);
        restart.handle_start(self.now);
        if let (Wiring::FreeUnread, Some(guest)) = (self.wiring, &mut state.guest) {
            guest.running = true;
            state.gate = super::host::Gate::default();
        }
        self.hosts[host].restart = Some(restart);
        self.note(|_| format!("host {host}'s agent restarts and finds {here:?}"));
        self.pump(host);
    }

    pub(super) fn healed(&mut self) {
        self.note(|_| "healed".into());
        self.cuts.heal();
        (self.options.loss, self.options.doubled, self.options.straggle) = (0, 0, 0);
        (self.options.capture_failures, self.options.activation_failures, self.options.restarts) = (0, 0, 0);
        self.options.delay = self.options.delay.min(3_000);
        (self.options.disk_failures, self.options.fence_failures) = (0, 0);
        self.restart_witness();
        // Hosts and agents that stand wake by themselves, in time: to wake them here would turn the order of what waits for them.
        for host in 0..2 {
            let (now, state) = (self.now, &mut self.hosts[host]);
            let Some(guest) = state.guest.as_mut().filter(|guest| guest.frozen_until > now) else { continue };
            guest.frozen_until = now;
            // What waited for its guest waits no longer.
            if state.capture.is_some_and(|capture| capture.begun.is_some()) {
                self.events.retain(|Reverse(queued)| !matches!(queued.event, Event::EndCapture(of) if of == host));
                self.at(now, Event::EndCapture(host));
            }
        }
    }
}
