//! The machine of a VM that a former life of this node's agent had: what may be done with what is found of it.
//!
//! Nothing of the former life's sessions is left: no acknowledgement will come for what its guest still says, and no staged epoch is there to
//! go on from. So only the record decides (`docs/protocol.md` P60 to P63):
//!
//! - it names this node, or nobody: this life makes the record its own first, and only then is the guest let free, or, if no guest is here,
//!   is the VM given back to the host that still has it;
//! - it names a pair whose primary is this node: the guest here has everything that was heard, so this life asks to go alone, as the
//!   standby does; whoever wins runs, and until that is read the guest stays mute, as it does when another node has won and does not run the VM yet;
//! - it says that another node runs the VM, or that it was stopped: the guest is destroyed;
//! - it names this node by the very grant that a copy was kept of, and nobody ran by that: this life makes the record its own and goes on with the copy.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use core::hash::{Hash, Hasher};

use heartbeat_core::ids::{Generation, NodeId, StoreId};
use heartbeat_core::ownership::{Ownership, OwnershipConfig, OwnershipOutput, Verdict, Want};
use heartbeat_core::record::Owner;
use heartbeat_core::store::StoreAnswer;
use heartbeat_core::time::Time;

use crate::state::ProtectionState;

/// What a new life of the agent finds of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Here {
    /// Its guest lives. If it was protected nobody hears it, and it may stand.
    Guest,
    /// The former life ran it and its guest is gone, and may have been heard to the last.
    Gone,
    /// The former life stood by for it. What it held is gone; no guest of it lives.
    Copy {
        /// The last grant by which a guest may have been let run: the mark "activating this generation" is durable. `None` also if it
        /// is known that none ran by it.
        marked: Option<Generation>,
    },
    /// The former life stood by for it, had won it, and had made its copy durable while it waited for the primary's host to be off.
    Kept {
        /// The grant that it is noted with: that by which it was won, or a later one of this node's by which nobody ran either.
        grant: Generation,
        /// As for [`Here::Copy`].
        marked: Option<Generation>,
        /// This host may have been off since it was noted: the other one may have forced it out meanwhile, and nobody was here to be told.
        off_since: bool,
    },
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The guest is this node's alone, and free.
    Ours,
    /// The VM is not this node's business any more.
    Theirs,
    /// Its guest shut down under the former life.
    Stopped,
    /// It was given back to the host that has it.
    GaveBack,
    /// The VM is this life's, nobody ever ran by its grant, and the kept copy is the newest there is: go on with
    /// [`crate::standby::Standby::resume`].
    Kept {
        /// The grant's.
        grant: Generation,
        /// The other host is dead, as was confirmed.
        forced: bool,
    },
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Ask the store; the answer comes by [`Restart::handle_answer`], or never.
    Ask(heartbeat_core::store::StoreRequest),
    /// Make this generation durable, then call [`Restart::handle_generation_persisted`].
    PersistGeneration(Generation),
    /// Note durably that the kept copy is of this grant, then call [`Restart::handle_kept`].
    Keep(Generation),
    /// The guest is this node's alone: take out what the former life left in it, and let it run.
    Free,
    /// Destroy the guest: it must not run any more.
    Fence,
    /// Show the operator.
    State {
        /// The state.
        state: ProtectionState,
        /// Why, in words.
        reason: String,
    },
    /// Nothing more comes.
    Finished(End),
}

/// See the module. Order of calls: as for [`crate::primary::Primary`].
#[derive(Clone, Debug)]
pub struct Restart {
    ownership: Ownership,
    here: Here,
    finished: bool,
    /// The record was made this life's to give it back.
    giving_back: bool,
    /// The kept copy is being noted with another grant.
    noting: Option<Generation>,
    /// The other host is dead.
    forced: bool,
    shown: String,
    outputs: VecDeque<Output>,
}

/// What decides how it goes on; what is shown is left out. For checkers that explore states.
impl Hash for Restart {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { ownership, here, finished, giving_back, noting, forced, shown: _, outputs } = self;
        (ownership, here, finished, giving_back, noting, forced, outputs).hash(state);
    }
}

impl Restart {
    /// A machine that did nothing yet.
    #[must_use]
    pub fn new(config: OwnershipConfig, here: Here) -> Self {
        let (ownership, outputs) = (Ownership::new(config), VecDeque::new());
        let (finished, giving_back, noting, forced) = (false, false, None, false);
        Self { ownership, here, finished, giving_back, noting, forced, shown: String::new(), outputs }
    }

    /// Begin.
    pub fn handle_start(&mut self, now: Time) {
        self.show("this agent was started again, and asks the witness who owns the VM");
        self.ownership.want(now, Want::Follow);
        self.advance(now);
    }

    /// An answer of the store.
    pub fn handle_answer(&mut self, now: Time, answer: &StoreAnswer) {
        self.ownership.handle_answer(now, answer);
        self.advance(now);
    }

    /// A generation that was output is durable.
    pub fn handle_generation_persisted(&mut self, now: Time, generation: Generation) {
        self.ownership.handle_generation_persisted(now, generation);
        self.advance(now);
    }

    /// The kept copy is noted with a grant that was output.
    pub fn handle_kept(&mut self, now: Time, noted: Generation) {
        if let Here::Kept { grant, off_since, .. } = &mut self.here
            && self.noting.take_if(|noting| *noting == noted).is_some()
        {
            // The record was read in this life, and named this node.
            (*grant, *off_since) = (noted, false);
        }
        self.advance(now);
    }

    /// The guest's process has ended.
    pub fn handle_gone(&mut self, now: Time) {
        if self.here == Here::Guest {
            self.here = Here::Gone;
        }
        self.advance(now);
    }

    /// Whether the guest that was found, or the copy that was kept, could go on if the other host were known to be dead (`docs/protocol.md` P13).
    ///
    /// # Errors
    /// One sentence for the operator: why not.
    pub fn may_be_forced(&self) -> Result<(), &'static str> {
        match self.here {
            Here::Guest => {}
            // Whatever was seen of the record since may have let the other host go on with it, and this one come after that.
            Here::Kept { off_since: true, .. } => {
                return Err(
                    "this host was off since its copy was kept, and the other one may have been told meanwhile to go on alone",
                );
            }
            Here::Kept { grant, marked, .. }
                if marked < Some(grant) && self.ownership.config().generation <= grant.next() => {}
            Here::Kept { .. } => return Err("the copy that was kept here is of an earlier time"),
            Here::Gone | Here::Copy { .. } => return Err("no guest of it is here"),
        }
        if self.finished { Err("it is known whose the VM is") } else { Ok(()) }
    }

    /// The other host is dead, as was confirmed, and the record names this node alone, durably, in `store`: see
    /// [`Ownership::handle_forced`].
    pub fn handle_forced(&mut self, now: Time, store: StoreId) {
        if self.may_be_forced().is_ok() {
            self.forced = true;
            self.ownership.handle_forced(now, store);
            self.ownership.want(now, Want::Solo { activated: self.here == Here::Guest });
        }
        self.advance(now);
    }

    /// Time has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.ownership.handle_timeout(now);
        self.advance(now);
    }

    /// When [`Restart::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.ownership.poll_timeout().filter(|_| !self.finished)
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// This node's side of the record.
    #[must_use]
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// The node that the record names beside this one, if it does: for words.
    #[must_use]
    pub fn other(&self) -> Option<NodeId> {
        let me = self.ownership.config().me.node;
        let named = match self.ownership.record()?.owner {
            Owner::Paired { primary, standby } => [Some(primary), Some(standby)],
            Owner::Solo { node, other, .. } => [Some(node), other],
            Owner::Stopped { node } => [Some(node), None],
        };
        named.into_iter().flatten().map(|party| party.node).find(|node| *node != me)
    }

    fn show(&mut self, reason: &str) {
        if self.shown != reason {
            self.shown = reason.to_string();
            self.outputs.push_back(Output::State { state: ProtectionState::FailingOver, reason: reason.into() });
        }
    }

    fn advance(&mut self, now: Time) {
        if self.finished {
            return;
        }
        self.follow(now);
        while let Some(output) = self.ownership.poll_output() {
            self.outputs.push_back(match output {
                OwnershipOutput::Ask(request) => Output::Ask(request),
                OwnershipOutput::PersistGeneration(generation) => Output::PersistGeneration(generation),
            });
        }
    }

    fn end(&mut self, now: Time, end: End) {
        self.ownership.want(now, Want::Nothing);
        self.outputs.push_back(Output::Finished(end));
        self.finished = true;
    }

    fn follow(&mut self, now: Time) {
        let me = self.ownership.config().me.node;
        let guest = self.here == Here::Guest;
        match self.ownership.verdict() {
            Verdict::Unknown => {}
            // No pair was ever recorded, so nobody else can have it.
            Verdict::Absent if guest => self.ownership.want(now, Want::Solo { activated: true }),
            Verdict::Absent => self.end(now, End::Theirs),
            Verdict::SoloMe { generation, .. } => self.mine(now, guest, generation),
            Verdict::SoloOther { node, .. } if node.node == me && guest => {
                self.ownership.want(now, Want::Solo { activated: true });
            }
            Verdict::SoloOther { node, generation, .. } if node.node == me && self.is_kept(generation) => {
                self.take_kept_over(now, generation);
            }
            Verdict::SoloOther { node, generation, .. } if node.node == me && self.is_returnable(generation) => {
                // A former life won it and never ran it: nobody else may, until it is given back.
                self.giving_back = true;
                self.ownership.want(now, Want::Solo { activated: false });
            }
            Verdict::SoloOther { node, .. } if node.node == me => self.end(now, End::Theirs),
            Verdict::SoloOther { .. } if self.ownership.wanted() == Want::GiveBack => self.end(now, End::GaveBack),
            Verdict::SoloOther { node, activated: true, .. } => {
                self.lost(now, guest, &format!("the VM runs on host {}", node.node));
            }
            Verdict::SoloOther { node, .. } if guest => {
                let winner = node.node;
                self.show(&format!("host {winner} owns the VM and does not run it yet; this copy is mute until it does, or gives it back"));
            }
            Verdict::Paired { primary, standby, .. } if primary.node == me && guest => {
                let standby = standby.node;
                self.show(&format!(
                    "this agent was started again while host {standby} stood by, and asks the witness to go on alone; this copy is mute until then"
                ));
                self.ownership.want(now, Want::Solo { activated: true });
            }
            // Only who runs the VM pairs it.
            Verdict::Paired { primary, .. } if primary.node != me => {
                self.lost(now, guest, &format!("the VM runs on host {}", primary.node));
            }
            Verdict::Stopped { .. } if guest && self.is_stopped_here() => self.end(now, End::Stopped),
            Verdict::Stopped { .. } => self.lost(now, guest, "the record says that the VM was stopped"),
            Verdict::SoloOther { .. } | Verdict::Paired { .. } => self.end(now, End::Theirs),
        }
    }

    /// The record names this life.
    fn mine(&mut self, now: Time, guest: bool, grant: Generation) {
        if guest {
            if self.ownership.may_run_alone() {
                self.outputs.push_back(Output::Free);
                self.end(now, End::Ours);
            }
        } else if self.giving_back {
            self.ownership.want(now, Want::GiveBack);
        } else if let Here::Kept { .. } = self.here {
            self.end(now, End::Kept { grant, forced: self.forced });
        } else {
            self.end(now, End::Theirs);
        }
    }

    /// The record is made this life's, which is a grant of its own. The copy is noted with the one before it first: so whichever life finds it
    /// next, the record has the generation that the copy is noted with or the next one, and no other change of the record can be between them.
    fn take_kept_over(&mut self, now: Time, found: Generation) {
        match self.here {
            Here::Kept { grant, .. } if grant == found => self.ownership.want(now, Want::Solo { activated: false }),
            _ if self.noting != Some(found) => {
                self.noting = Some(found);
                self.outputs.push_back(Output::Keep(found));
            }
            _ => {}
        }
    }

    fn lost(&mut self, now: Time, guest: bool, reason: &str) {
        if guest {
            self.outputs.push_back(Output::Fence);
        }
        self.outputs.push_back(Output::State { state: ProtectionState::Fenced, reason: reason.into() });
        self.end(now, End::Theirs);
    }

    /// The record says who has the VM besides this node, and no guest was ever let run here by this grant. (Who ran it as the primary
    /// was heard since it won; what the other host has is older then.)
    fn is_returnable(&self, grant: Generation) -> bool {
        let (Here::Copy { marked } | Here::Kept { marked, .. }) = self.here else { return false };
        let owner = self.ownership.record().map(|record| record.owner);
        marked != Some(grant) && matches!(owner, Some(Owner::Solo { activated: false, other: Some(_), .. }))
    }

    /// The record names this node by the grant that the copy is noted with, or by what a life of this node made of that alone, and nobody ran by either. Had
    /// it been anybody else's since, if only for a moment, its generation would be higher: whoever had it may have been heard.
    fn is_kept(&self, found: Generation) -> bool {
        let Here::Kept { grant, marked, .. } = self.here else { return false };
        let owner = self.ownership.record().map(|record| record.owner);
        let of_it = found == grant || found == grant.next();
        of_it && marked < Some(grant) && matches!(owner, Some(Owner::Solo { activated: false, .. }))
    }

    fn is_stopped_here(&self) -> bool {
        let me = self.ownership.config().me.node;
        self.ownership.record().is_some_and(|record| matches!(record.owner, Owner::Stopped { node } if node.node == me))
    }
}

#[cfg(test)]
mod tests;
