//! The node's side of one VM's record: what it wants of it, what it asked, what it knows.
//!
//! Promises (`docs/protocol.md` P6, P8): a lost answer is no answer; older answers never replace newer ones; a change that may still be
//! applied is never taken for one that failed; a generation is durable here before anything is done about it.

use alloc::collections::VecDeque;
use core::hash::{Hash, Hasher};
use core::time::Duration;

use crate::ids::{Generation, Party, Revision, StoreId, VmId};
use crate::record::{Owner, Record};
use crate::store::{StoreAnswer, StoreOp, StoreRequest};
use crate::time::Time;

/// How an [`Ownership`] asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnershipConfig {
    /// Whose record.
    pub vm: VmId,
    /// Who asks.
    pub me: Party,
    /// The store that this VM is known to be in; `None` if it never was in one. The first one that answers is taken then.
    pub store: Option<StoreId>,
    /// The highest generation that this node made durable.
    pub generation: Generation,
    /// The id of the first request. A node uses no id twice for one VM in one incarnation, so that an answer that was meant for
    /// an earlier machine is known: it may show what has changed since.
    pub first_request: u64,
    /// Unanswered requests are asked again after this long.
    pub retry: Duration,
    /// How often the record is read while there is nothing to change but something to learn.
    pub poll: Duration,
}

impl OwnershipConfig {
    /// Defaults: retry after 100 ms, read each 500 ms.
    #[must_use]
    pub fn new(vm: VmId, me: Party) -> Self {
        Self {
            vm,
            me,
            store: None,
            generation: Generation(0),
            first_request: 1,
            retry: Duration::from_millis(100),
            poll: Duration::from_millis(500),
        }
    }
}

/// What a node wants of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// Nothing: no request is sent.
    Nothing,
    /// To know it, again and again.
    Follow,
    /// To be the primary of this standby.
    Pair {
        /// The standby.
        standby: Party,
    },
    /// To own it alone. `activated` is what the record says then if it was not ours alone before.
    Solo {
        /// Whether the guest runs here already.
        activated: bool,
    },
    /// To have it say that the VM runs here.
    Activated,
    /// To give it back to the other party.
    GiveBack,
    /// To have it say that the VM ended on purpose.
    Stopped,
}

/// What the record says, as far as this node knows and made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was read yet.
    Unknown,
    /// There is no record. Grants nothing.
    Absent,
    /// A pair, of which this node may or may not be a party.
    Paired {
        /// Its generation.
        generation: Generation,
        /// Runs it.
        primary: Party,
        /// Holds a copy.
        standby: Party,
    },
    /// This node, in this incarnation, owns it alone.
    SoloMe {
        /// Its generation.
        generation: Generation,
        /// Whether it says that the VM runs here.
        activated: bool,
    },
    /// Another node, or this one in another incarnation, owns it alone.
    SoloOther {
        /// Its generation.
        generation: Generation,
        /// Who.
        node: Party,
        /// Whether it says that the VM runs there.
        activated: bool,
    },
    /// It ended on purpose.
    Stopped {
        /// Its generation.
        generation: Generation,
    },
}

/// What the driver must do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OwnershipOutput {
    /// Send it to the store.
    Ask(StoreRequest),
    /// Make this generation durable, then call [`Ownership::handle_generation_persisted`].
    PersistGeneration(Generation),
}

/// What a node read last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Known {
    Nothing,
    Absent,
    Record(Record),
}

impl Known {
    fn revision(&self) -> Option<u64> {
        match self {
            Self::Nothing => None,
            Self::Absent => Some(0),
            Self::Record(record) => Some(record.revision.0),
        }
    }

    fn expectation(&self) -> Option<(StoreId, Revision)> {
        match self {
            Self::Nothing | Self::Absent => None,
            Self::Record(record) => Some((record.store, record.revision)),
        }
    }
}

/// What the want asks for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It is fulfilled.
    Done,
    /// The record must be known first.
    Read,
    /// Nothing can be changed now, but it may change.
    Poll,
    /// Ask for this change.
    Change(Owner),
}

/// The machine. Call [`Ownership::want`] and `handle_*` as things happen, then [`Ownership::poll_output`] until it is `None`, then
/// look at [`Ownership::verdict`] and arrange for [`Ownership::poll_timeout`].
///
/// The stricter rule (`docs/protocol.md` P6): a change that was sent and whose answer was lost may still be applied, long after; any number of
/// reads that show the record as it was prove nothing. Only a record of a *newer revision* ends that. Hence
/// [`Ownership::may_run_alone`], and not the verdict, decides whether output may leave unacknowledged.
#[derive(Clone, Debug)]
pub struct Ownership {
    config: OwnershipConfig,
    want: Want,
    /// The newest that the store showed.
    seen: Known,
    /// The newest whose generation is durable here.
    acted: Known,
    /// A change that would let another node run was sent, and expects exactly `seen`.
    exposed: bool,
    persisting: Option<Generation>,
    in_flight: Option<u64>,
    next_id: u64,
    not_before: Time,
    outputs: VecDeque<OwnershipOutput>,
    stats: OwnershipStats,
}

/// What an [`Ownership`] counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnershipStats {
    /// Requests sent.
    pub asked: u64,
    /// Answers taken in.
    pub answers: u64,
    /// Answers of another store, or of one that went back in time: ignored.
    pub rejected: u64,
    /// When the last answer was taken in.
    pub last_answer: Option<Time>,
}

/// What decides how it goes on; counters are left out. For checkers that explore states.
impl Hash for Ownership {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { config, want, seen, acted, exposed, persisting, in_flight, next_id, not_before, outputs, stats } =
            self;
        (config, want, seen, acted, exposed, persisting).hash(state);
        (in_flight, next_id, not_before, outputs, stats.last_answer).hash(state);
    }
}

impl Ownership {
    /// A machine that wants nothing yet.
    #[must_use]
    pub fn new(config: OwnershipConfig) -> Self {
        Self {
            config,
            want: Want::Nothing,
            seen: Known::Nothing,
            acted: Known::Nothing,
            exposed: false,
            persisting: None,
            in_flight: None,
            next_id: config.first_request,
            not_before: Time::ZERO,
            outputs: VecDeque::new(),
            stats: OwnershipStats::default(),
        }
    }

    /// What is wanted from now on. A request that was sent for an earlier want may still be applied.
    pub fn want(&mut self, now: Time, want: Want) {
        if self.want != want {
            self.want = want;
            self.in_flight = None;
            self.not_before = now;
        }
        self.drive(now);
    }

    /// How it asks.
    #[must_use]
    pub fn config(&self) -> &OwnershipConfig {
        &self.config
    }

    /// What is wanted now.
    #[must_use]
    pub fn wanted(&self) -> Want {
        self.want
    }

    /// Whether the verdict is what is wanted. Never for [`Want::Follow`] and [`Want::Nothing`].
    #[must_use]
    pub fn is_fulfilled(&self) -> bool {
        !matches!(self.want, Want::Follow | Want::Nothing) && self.seen == self.acted && self.step() == Step::Done
    }

    /// An answer of the store, to whichever request, however late.
    pub fn handle_answer(&mut self, now: Time, answer: &StoreAnswer) {
        if answer.vm != self.config.vm || !(self.config.first_request..self.next_id).contains(&answer.id) {
            return;
        }
        let foreign = self.config.store.is_some_and(|store| store != answer.store)
            || answer.record.is_some_and(|record| record.store != answer.store);
        // A store that went back in time (restored from a backup under the same id) grants nothing.
        let back_in_time = match answer.record {
            Some(record) => self.seen.revision().is_none() && record.generation < self.config.generation,
            None => self.seen.revision().is_none() && self.config.generation > Generation(0),
        };
        if foreign || back_in_time {
            self.stats.rejected += 1;
            return;
        }
        self.config.store = Some(answer.store);
        self.stats.answers += 1;
        self.stats.last_answer = Some(now);
        if self.in_flight == Some(answer.id) {
            self.in_flight = None;
        }
        let news = answer.record.map_or(Known::Absent, Known::Record);
        let changed = news.revision() > self.seen.revision();
        if changed {
            self.seen = news;
            self.exposed = false;
            self.settle();
        }
        if self.in_flight.is_none() {
            self.not_before = match self.step() {
                Step::Poll => now + self.config.poll,
                _ if changed => now,
                _ => now + self.config.retry,
            };
        }
        self.drive(now);
    }

    /// A generation that was output is durable.
    pub fn handle_generation_persisted(&mut self, now: Time, generation: Generation) {
        self.config.generation = self.config.generation.max(generation);
        if self.persisting.is_some_and(|wanted| wanted <= self.config.generation) {
            self.persisting = None;
        }
        self.settle();
        self.drive(now);
    }

    /// The record goes on in another store, or was forced in the same one (`docs/protocol.md` P13): whoever calls this made durable that it names this
    /// node alone. What was read or asked before says nothing any more: the host that kept it, or that it named, is dead.
    pub fn handle_forced(&mut self, now: Time, store: StoreId) {
        self.config.store = Some(store);
        self.config.first_request = self.next_id;
        (self.seen, self.acted, self.exposed) = (Known::Nothing, Known::Nothing, false);
        (self.persisting, self.in_flight, self.not_before) = (None, None, now);
        self.drive(now);
    }

    /// What the record says.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let record = match self.acted {
            Known::Nothing => return Verdict::Unknown,
            Known::Absent => return Verdict::Absent,
            Known::Record(record) => record,
        };
        let generation = record.generation;
        match record.owner {
            Owner::Paired { primary, standby } => Verdict::Paired { generation, primary, standby },
            Owner::Solo { node, activated, .. } if node == self.config.me => Verdict::SoloMe { generation, activated },
            Owner::Solo { node, activated, .. } => Verdict::SoloOther { generation, node, activated },
            Owner::Stopped { .. } => Verdict::Stopped { generation },
        }
    }

    /// Whether this node may run the VM and be heard with nobody's acknowledgement, now and until it asks for something
    /// else itself: the record was read as solo(me), and no change of ours that could still be applied names another node.
    #[must_use]
    pub fn may_run_alone(&self) -> bool {
        matches!(self.verdict(), Verdict::SoloMe { .. }) && !self.exposed && self.seen == self.acted
    }

    /// Whether the newest record that was read names this node, in this incarnation, alone, by a grant of this generation, which is not durable here
    /// yet. Whoever makes it durable together with what it does by it reports that as any other ([`Ownership::handle_generation_persisted`]), and does
    /// nothing by it before.
    #[must_use]
    pub fn is_being_granted(&self, generation: Generation) -> bool {
        let named = |record: Record| {
            record.generation == generation
                && matches!(record.owner, Owner::Solo { node, .. } if node == self.config.me)
        };
        self.persisting == Some(generation)
            && !self.exposed
            && matches!(self.seen, Known::Record(record) if named(record))
    }

    /// Whether a change that would let another node run was sent and may still be applied.
    #[must_use]
    pub fn is_exposed(&self) -> bool {
        self.exposed
    }

    /// The record behind the verdict.
    #[must_use]
    pub fn record(&self) -> Option<&Record> {
        match &self.acted {
            Known::Record(record) => Some(record),
            Known::Nothing | Known::Absent => None,
        }
    }

    /// The store that answers.
    #[must_use]
    pub fn store(&self) -> Option<StoreId> {
        self.config.store
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> OwnershipStats {
        self.stats
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<OwnershipOutput> {
        self.outputs.pop_front()
    }

    /// When [`Ownership::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        (self.step() != Step::Done).then_some(self.not_before)
    }

    /// Time has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.drive(now);
    }

    /// Acts on what was seen once its generation is durable (`docs/protocol.md` P8).
    fn settle(&mut self) {
        match self.seen {
            Known::Record(record) if record.generation > self.config.generation => {
                if self.persisting != Some(record.generation) {
                    self.persisting = Some(record.generation);
                    self.outputs.push_back(OwnershipOutput::PersistGeneration(record.generation));
                }
            }
            seen => self.acted = seen,
        }
    }

    fn drive(&mut self, now: Time) {
        if now < self.not_before {
            return;
        }
        let op = match self.step() {
            Step::Done => return,
            Step::Read | Step::Poll => StoreOp::Read,
            Step::Change(owner) => StoreOp::Change { expect: self.seen.expectation(), owner },
        };
        if let StoreOp::Change { owner, .. } = op {
            self.exposed |= match owner {
                Owner::Paired { .. } => true,
                Owner::Solo { node, .. } => node != self.config.me,
                Owner::Stopped { .. } => false,
            };
        }
        let id = self.next_id;
        self.next_id += 1;
        self.in_flight = Some(id);
        self.not_before = now + self.config.retry;
        self.stats.asked += 1;
        let request = StoreRequest { id, vm: self.config.vm, asker: self.config.me, op };
        self.outputs.push_back(OwnershipOutput::Ask(request));
    }

    /// What the want asks for, as the record stands. While a generation is being made durable nothing is asked.
    fn step(&self) -> Step {
        let me = self.config.me;
        if self.want == Want::Nothing || self.persisting.is_some() {
            return Step::Done;
        }
        let owner = match self.acted {
            Known::Nothing => return Step::Read,
            Known::Absent => None,
            Known::Record(record) => Some(record.owner),
        };
        match (self.want, owner) {
            (Want::Nothing, _) => Step::Done,
            (Want::Follow, _) => Step::Poll,

            (Want::Pair { standby }, None | Some(Owner::Stopped { .. })) => {
                Step::Change(Owner::Paired { primary: me, standby })
            }
            (Want::Pair { standby }, Some(Owner::Solo { node, .. })) if node == me => {
                Step::Change(Owner::Paired { primary: me, standby })
            }
            (Want::Pair { standby: wanted }, Some(Owner::Paired { primary, standby }))
                if primary == me && standby == wanted =>
            {
                Step::Done
            }
            (Want::Pair { .. }, _) => Step::Poll,

            (Want::Solo { activated }, None) => Step::Change(Owner::Solo { node: me, activated, other: None }),
            // Also where a former life of this node was the primary: the guest is here all the same.
            (Want::Solo { activated }, Some(Owner::Paired { primary, standby }))
                if primary.node == me.node && primary.incarnation <= me.incarnation =>
            {
                Step::Change(Owner::Solo { node: me, activated, other: Some(standby) })
            }
            (Want::Solo { .. }, Some(Owner::Paired { primary, standby })) if standby == me => {
                Step::Change(Owner::Solo { node: me, activated: false, other: Some(primary) })
            }
            (Want::Solo { .. }, Some(Owner::Solo { node, activated, other })) if node == me => {
                // Writing the same once more makes a revision that the open ask does not expect.
                if self.exposed { Step::Change(Owner::Solo { node, activated, other }) } else { Step::Done }
            }
            (Want::Solo { activated }, Some(Owner::Solo { node, other, .. })) if node.node == me.node => {
                Step::Change(Owner::Solo { node: me, activated, other })
            }
            (Want::Solo { activated }, Some(Owner::Stopped { node })) if node == me => {
                Step::Change(Owner::Solo { node, activated, other: None })
            }
            (Want::Solo { .. }, _) => Step::Poll,

            (Want::Activated, Some(Owner::Solo { node, activated, other })) if node == me => {
                if activated {
                    Step::Done
                } else {
                    Step::Change(Owner::Solo { node, activated: true, other })
                }
            }
            (Want::Activated, _) => Step::Poll,

            (Want::GiveBack, Some(Owner::Solo { node, activated: false, other: Some(other) })) if node == me => {
                Step::Change(Owner::Solo { node: other, activated: false, other: Some(me) })
            }
            (Want::GiveBack, Some(Owner::Solo { node, .. })) if node != me => Step::Done,
            (Want::GiveBack, _) => Step::Poll,

            (Want::Stopped, Some(Owner::Stopped { .. })) => Step::Done,
            (Want::Stopped, Some(Owner::Paired { primary: node, .. } | Owner::Solo { node, .. })) if node == me => {
                Step::Change(Owner::Stopped { node: me })
            }
            (Want::Stopped, _) => Step::Poll,
        }
    }
}

#[cfg(test)]
mod tests;
