//! Guest states as a hash chain, and the two checkers. They know nothing of epochs, acknowledgements or asks.
//!
//! Checker one (`docs/protocol.md` P3), never two audible copies: all frames that were ever heard lie on one history, and so does
//! whoever runs at the end. Checker two (P1), no output before commit: when a frame is heard, either another host holds a copy with the frame in
//! its history, or the durable record does not let any other host run. Beside them: the witness knows after a restart what it showed (P8).

use heartbeat_core::record::{Owner, Record};

use super::rng::mix;

/// A state that some guest was in: an index into the [`Histories`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct State(usize);

#[derive(Debug)]
struct Node {
    parent: usize,
    depth: u64,
    hash: u64,
}

/// Every state that any guest was ever in.
#[derive(Debug)]
pub struct Histories {
    nodes: Vec<Node>,
}

impl Histories {
    /// One state: the guest as it was booted.
    #[must_use]
    pub fn new() -> Self {
        Self { nodes: vec![Node { parent: 0, depth: 0, hash: mix(0) }] }
    }

    /// The state it was booted in.
    #[must_use]
    pub fn boot(&self) -> State {
        State(0)
    }

    /// The guest goes on from `state` with this input.
    pub fn step(&mut self, state: State, input: u64) -> State {
        let from = &self.nodes[state.0];
        let node = Node { parent: state.0, depth: from.depth + 1, hash: mix(from.hash ^ input) };
        self.nodes.push(node);
        State(self.nodes.len() - 1)
    }

    /// The state's hash.
    #[must_use]
    pub fn hash(&self, state: State) -> u64 {
        self.nodes[state.0].hash
    }

    /// Whether `earlier` is `later` or in its history.
    #[must_use]
    pub fn contains(&self, later: State, earlier: State) -> bool {
        let depth = self.nodes[earlier.0].depth;
        let mut at = later.0;
        while self.nodes[at].depth > depth {
            at = self.nodes[at].parent;
        }
        at == earlier.0
    }
}

impl Default for Histories {
    fn default() -> Self {
        Self::new()
    }
}

/// The checkers. They keep the first violation.
#[derive(Debug, Default)]
pub struct Checker {
    /// The newest state that was heard; every heard state is in its history.
    newest: Option<State>,
    /// The state that each host held a whole copy of last. A host that died held it all the same: it was safe to be heard.
    held: [Option<State>; 2],
    /// The newest record that the witness showed anybody.
    shown: Option<Record>,
    /// What was broken first.
    pub violation: Option<String>,
    /// Frames heard.
    pub heard: u64,
}

/// What the durable record says of who may run.
#[must_use]
pub fn may_only_run_on(owner: Option<&Owner>, is_host: impl Fn(&heartbeat_core::ids::NodeId) -> bool) -> bool {
    match owner {
        None => true,
        Some(Owner::Solo { node, .. } | Owner::Stopped { node }) => is_host(&node.node),
        Some(Owner::Paired { .. }) => false,
    }
}

impl Checker {
    /// Keeps a violation, if it is the first.
    pub fn broken(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(what());
        }
    }

    /// `host` holds a whole copy of `state` from now on, in place of its earlier one.
    pub fn holds(&mut self, host: usize, state: Option<State>) {
        self.held[host] = state;
    }

    /// A frame that a guest on `host` emitted in `state` is heard. `alone`: the durable record lets no other host run.
    pub fn heard(&mut self, histories: &Histories, host: usize, state: State, alone: bool) {
        self.heard += 1;
        let other_holds = self.held[1 - host].is_some_and(|held| histories.contains(held, state));
        if !alone && !other_holds {
            self.broken(|| format!("output before commit: host {host} was heard in state {:x}", histories.hash(state)));
        }
        match self.newest {
            Some(newest) if histories.contains(newest, state) => {}
            Some(newest) if !histories.contains(state, newest) => {
                let (a, b) = (histories.hash(newest), histories.hash(state));
                self.broken(|| {
                    format!("two audible copies: {a:x} was heard, and now {b:x} of host {host}, of another history")
                });
            }
            _ => self.newest = Some(state),
        }
    }

    /// The VM goes on from `state` by force. Whether something is lost by it that was heard. That may be only where the dead host had gone `alone`.
    pub fn forced(&mut self, histories: &Histories, state: State, alone: bool) -> bool {
        let lost = self.newest.is_some_and(|newest| !histories.contains(state, newest));
        if lost && !alone {
            self.broken(|| "by force something was lost that a copy was held of".into());
        }
        if lost {
            self.newest = None;
        }
        lost
    }

    /// The witness tells somebody of this record.
    pub fn shows(&mut self, record: Option<Record>) {
        if record.map(|record| record.revision) > self.shown.map(|record| record.revision) {
            self.shown = record;
        }
    }

    /// The witness restarted and found this record (`docs/protocol.md` P8).
    pub fn found(&mut self, record: Option<Record>) {
        let shown = self.shown;
        let newer = record.map(|record| record.revision) > shown.map(|record| record.revision);
        if !newer && record != shown {
            self.broken(|| format!("the witness forgot: it showed {shown:?} and has {record:?}"));
        }
    }

    /// A guest on `host` runs in `state` at the end: it must remember everything that was heard.
    pub fn survives(&mut self, histories: &Histories, host: usize, state: State) {
        if self.newest.is_some_and(|newest| !histories.contains(state, newest)) {
            self.broken(|| format!("the survivor on host {host} does not remember what was heard"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_that_is_heard_is_found() {
        let mut histories = Histories::new();
        let common = histories.step(histories.boot(), 1);
        let (left, right) = (histories.step(common, 2), histories.step(common, 3));
        let mut checker = Checker::default();
        for state in [common, left, common] {
            checker.heard(&histories, 0, state, true);
        }
        assert_eq!(checker.violation, None);
        checker.heard(&histories, 1, right, true);
        assert!(checker.violation.is_some_and(|what| what.starts_with("two audible copies")));
    }

    #[test]
    fn output_that_nobody_else_holds_is_found() {
        let mut histories = Histories::new();
        let held = histories.step(histories.boot(), 1);
        let ahead = histories.step(held, 2);
        let mut checker = Checker::default();
        checker.holds(1, Some(held));
        checker.heard(&histories, 0, held, false);
        assert_eq!(checker.violation, None);
        checker.heard(&histories, 0, ahead, false);
        assert!(checker.violation.is_some_and(|what| what.starts_with("output before commit")));
    }
}
