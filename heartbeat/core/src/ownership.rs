//! The node's side of one VM's record.

use alloc::collections::VecDeque;
use core::time::Duration;

use crate::ids::{Generation, Party, StoreId, VmId};
use crate::record::Record;
use crate::store::{StoreAnswer, StoreRequest};
use crate::time::Time;

/// How an [`Ownership`] asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnershipConfig {
    /// Whose record.
    pub vm: VmId,
    /// Who asks.
    pub me: Party,
    /// The store that this VM is known to be in; `None` if it never was in one. The first one that answers is taken then.
    pub store: Option<StoreId>,
    /// The highest generation that this node made durable.
    pub generation: Generation,
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
            retry: Duration::from_millis(100),
            poll: Duration::from_millis(500),
        }
    }
}

/// What a node wants of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// A pair; this node is a party of it exactly if `mine`.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnershipOutput {
    /// Send it to the store.
    Ask(StoreRequest),
    /// Make this generation durable, then call [`Ownership::handle_generation_persisted`].
    PersistGeneration(Generation),
}

/// The machine.
#[derive(Debug)]
pub struct Ownership {
    config: OwnershipConfig,
    want: Want,
    record: Option<Record>,
    outputs: VecDeque<OwnershipOutput>,
    due: Option<Time>,
}

impl Ownership {
    /// A machine that wants nothing yet.
    #[must_use]
    pub fn new(config: OwnershipConfig) -> Self {
        Self { config, want: Want::Nothing, record: None, outputs: VecDeque::new(), due: None }
    }

    /// What is wanted from now on.
    pub fn want(&mut self, _now: Time, want: Want) {
        self.want = want;
    }

    /// An answer of the store.
    pub fn handle_answer(&mut self, _now: Time, _answer: &StoreAnswer) {}

    /// A generation that was output is durable.
    pub fn handle_generation_persisted(&mut self, _now: Time, generation: Generation) {
        self.config.generation = generation;
    }

    /// What the record says.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        Verdict::Unknown
    }

    /// The record behind the verdict.
    #[must_use]
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<OwnershipOutput> {
        self.outputs.pop_front()
    }

    /// When [`Ownership::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.due
    }

    /// Time has come.
    pub fn handle_timeout(&mut self, _now: Time) {}
}
