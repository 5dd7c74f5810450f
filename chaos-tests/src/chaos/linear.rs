//! Whether a history of reads and writes could have come from one register that does one thing at a time: Wing and Gong's
//! search with Lowe's memory of what was tried, key by key.
//!
//! A write without an answer may have happened at any time after it was asked, or never. Promise: a history is refused exactly if
//! no order of its operations explains every answer and keeps each operation between its call and its return. No value is written
//! twice to a key, so a write without an answer is either known by who read it, or of no account: a search that had to try each of a hundred of
//! them, as there are after a guest that was switched off, would not end.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

/// What was asked of a key, and what was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// This was written; 0 is never written.
    Write(u64),
    /// This was read; 0 is nothing.
    Read(u64),
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// The key.
    pub key: u64,
    /// What was asked and answered.
    pub action: Action,
    /// When it was asked, in nanoseconds of any one clock.
    pub called_ns: u64,
    /// When the answer was read; `None` if there was none.
    pub returned_ns: Option<u64>,
    /// Who asked.
    pub client: u32,
}

/// A key whose history nothing explains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inexplicable {
    /// The key.
    pub key: u64,
    /// How many of its operations were explained at most, in order of time.
    pub explained: usize,
    /// All of them.
    pub operations: usize,
    /// The operation whose answer could not be explained, on the way that went furthest.
    pub at: Operation,
}

impl fmt::Display for Inexplicable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, explained, operations, at } = self;
        let what = match at.action {
            Action::Write(value) => format!("the write of {value:#x}"),
            Action::Read(0) => "the read of nothing".to_owned(),
            Action::Read(value) => format!("the read of {value:#x}"),
        };
        write!(
            f,
            "key {key:#x}: {what} by client {} ({} to {}) fits into no order; {explained} of {operations} operations do",
            at.client,
            at.called_ns,
            at.returned_ns.map_or_else(|| "no answer".to_owned(), |at| at.to_string()),
        )
    }
}

/// Looks for an order that explains all of `history`. Reads without an answer say nothing.
///
/// # Errors
/// With the first key, by number, for which there is none.
pub fn check(history: &[Operation]) -> Result<(), Inexplicable> {
    let mut keys: BTreeMap<u64, Vec<Operation>> = BTreeMap::new();
    for &operation in history {
        if operation.returned_ns.is_some() || matches!(operation.action, Action::Write(_)) {
            keys.entry(operation.key).or_default().push(operation);
        }
    }
    keys.into_values().map(known).try_for_each(check_key)
}

/// The same history of one key without what can be told apart from it without a search. A write without an answer that nobody read may
/// as well not have happened: in any order that has it, only a write can follow it. One that was read happened before that read returned.
fn known(operations: Vec<Operation>) -> Vec<Operation> {
    let mut read: HashMap<u64, u64> = HashMap::new();
    for operation in &operations {
        if let (Action::Read(value), Some(returned)) = (operation.action, operation.returned_ns) {
            read.entry(value).and_modify(|first| *first = returned.min(*first)).or_insert(returned);
        }
    }
    let bounded = |operation: Operation| match (operation.action, operation.returned_ns) {
        (Action::Write(value), None) => {
            // Who read it before it was asked is found by the search.
            let returned = |&first: &u64| Operation { returned_ns: Some(first.max(operation.called_ns)), ..operation };
            read.get(&value).map(returned)
        }
        _ => Some(operation),
    };
    operations.into_iter().filter_map(bounded).collect()
}

/// A call or a return in the list of what is not yet placed in the order.
#[derive(Clone, Copy)]
struct Entry {
    operation: usize,
    /// Where the return of this call is; `None` for a return.
    returns: Option<usize>,
    previous: usize,
    next: usize,
}

/// The entries in order of time, as a list from which calls are taken with their returns, and put back. Entry 0 is its head.
struct Entries(Vec<Entry>);

/// After the last entry.
const END: usize = usize::MAX;

impl Entries {
    fn new(operations: &[Operation]) -> Self {
        let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * operations.len());
        for (at, operation) in operations.iter().enumerate() {
            events.push((operation.called_ns, false, at));
            events.push((operation.returned_ns.expect("`known` left no other"), true, at));
        }
        // A call at the instant of a return counts as before it: that allows more orders, never fewer.
        events.sort_unstable();
        let mut entries = vec![Entry { operation: END, returns: None, previous: END, next: 1 }];
        let mut called = vec![0; operations.len()];
        for (_, is_return, operation) in events {
            let at = entries.len();
            if is_return {
                entries[called[operation]].returns = Some(at);
            } else {
                called[operation] = at;
            }
            entries.push(Entry { operation, returns: None, previous: at - 1, next: at + 1 });
        }
        entries.last_mut().expect("there is a head").next = END;
        Self(entries)
    }

    fn first(&self) -> usize {
        self.0[0].next
    }

    fn unlink(&mut self, at: usize) {
        let Entry { previous, next, .. } = self.0[at];
        self.0[previous].next = next;
        if next != END {
            self.0[next].previous = previous;
        }
    }

    fn link(&mut self, at: usize) {
        let Entry { previous, next, .. } = self.0[at];
        self.0[previous].next = at;
        if next != END {
            self.0[next].previous = at;
        }
    }

    fn take(&mut self, call: usize) {
        self.unlink(call);
        self.unlink(self.0[call].returns.expect("only calls are taken"));
    }

    fn put_back(&mut self, call: usize) {
        self.link(self.0[call].returns.expect("only calls were taken"));
        self.link(call);
    }
}

/// What the register holds after `action`; `None` if it cannot have answered so.
fn step(holds: u64, action: Action) -> Option<u64> {
    match action {
        Action::Write(value) => Some(value),
        Action::Read(value) => (value == holds).then_some(holds),
    }
}

fn check_key(operations: Vec<Operation>) -> Result<(), Inexplicable> {
    let Some(&first) = operations.first() else { return Ok(()) };
    let mut entries = Entries::new(&operations);
    let mut placed = vec![0_u64; operations.len().div_ceil(64)];
    let mut tried: HashSet<(Vec<u64>, u64)> = HashSet::new();
    let mut stack: Vec<(usize, u64)> = Vec::new();
    let (mut holds, mut furthest) = (0, (0, first));
    let mut at = entries.first();
    while at != END {
        let Entry { operation, returns, next, .. } = entries.0[at];
        if returns.is_some() {
            if let Some(then) = step(holds, operations[operation].action) {
                placed[operation / 64] |= 1 << (operation % 64);
                if tried.insert((placed.clone(), then)) {
                    stack.push((at, holds));
                    holds = then;
                    entries.take(at);
                    at = entries.first();
                    continue;
                }
                placed[operation / 64] &= !(1 << (operation % 64));
            }
            at = next;
            continue;
        }
        // It returned before anything could be placed that lets it: the last choice was wrong.
        if stack.len() >= furthest.0 {
            furthest = (stack.len(), operations[operation]);
        }
        at = loop {
            let Some((call, held)) = stack.pop() else {
                let (explained, at) = furthest;
                return Err(Inexplicable { key: first.key, explained, operations: operations.len(), at });
            };
            let undone = entries.0[call].operation;
            placed[undone / 64] &= !(1 << (undone % 64));
            holds = held;
            entries.put_back(call);
            // A read that could be placed may always be placed first: it changes nothing. Only another write can help.
            if matches!(operations[undone].action, Action::Write(_)) {
                break entries.0[call].next;
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::rng::Rng;

    fn write(value: u64, called_ns: u64, returned_ns: impl Into<Option<u64>>) -> Operation {
        Operation { key: 1, action: Action::Write(value), called_ns, returned_ns: returned_ns.into(), client: 0 }
    }

    fn read(value: u64, called_ns: u64, returned_ns: impl Into<Option<u64>>) -> Operation {
        Operation { key: 1, action: Action::Read(value), called_ns, returned_ns: returned_ns.into(), client: 1 }
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let history = [write(1, 0, 10), write(2, 20, 30), read(1, 40, 50)];
        let found = check(&history).unwrap_err();
        assert_eq!((found.key, found.at), (1, history[2]));
        assert!(check(&[write(1, 0, 10), read(0, 20, 30)]).is_err(), "nothing is left of it");
    }

    #[test]
    fn a_stale_read_is_found() {
        // Both values are seen while the second write is under way, but the old one not after the new one.
        assert!(check(&[write(1, 0, 1), write(2, 10, 50), read(1, 12, 14), read(2, 16, 18), read(1, 20, 22)]).is_err());
        check(&[write(1, 0, 1), write(2, 10, 50), read(1, 12, 14), read(2, 16, 18), read(2, 20, 22)]).unwrap();
    }

    #[test]
    fn a_write_without_an_answer_may_have_happened_late_or_never_but_once() {
        let lost = write(7, 5, None);
        check(&[write(1, 0, 1), lost, read(1, 10, 11), read(1, 90, 91)]).unwrap();
        check(&[write(1, 0, 1), lost, read(1, 10, 11), read(7, 90, 91)]).unwrap();
        assert!(check(&[write(1, 0, 1), lost, read(7, 10, 11), read(1, 90, 91)]).is_err());
        assert!(check(&[lost, read(7, 1, 3)]).is_err(), "not before it was asked");
    }

    #[test]
    fn what_was_never_written_is_found() {
        assert!(check(&[write(1, 0, 1), read(9, 2, 3)]).is_err());
    }

    #[test]
    fn keys_are_apart_and_the_bad_one_is_named() {
        let other = |operation: Operation| Operation { key: 2, ..operation };
        let history = [write(1, 0, 1), other(write(2, 2, 3)), read(1, 4, 5), other(read(1, 6, 7))];
        assert_eq!(check(&history).unwrap_err().key, 2);
    }

    /// A history of a real register: each operation happens at an instant between its call and its return.
    fn honest(seed: u64, operations: u64) -> Vec<Operation> {
        let mut rng = Rng::new(seed);
        let mut plan: Vec<(u64, u64, u64, u64, bool)> = (1..=operations)
            .map(|number| {
                let called = rng.below(operations * 10);
                let at = called + 1 + rng.below(40);
                (at, called, at + 1 + rng.below(40), number, rng.chance(500))
            })
            .collect();
        plan.sort_unstable();
        let mut holds = [0; 4];
        plan.into_iter()
            .map(|(_, called_ns, returned, number, writes)| {
                let key = number % 4;
                let slot = &mut holds[usize::try_from(key).unwrap()];
                let action = if writes { Action::Write(number) } else { Action::Read(*slot) };
                // Some writes are lost on the way, some answers.
                let (happens, returned_ns) = match (writes, rng.below(20)) {
                    (true, 0) => (false, None),
                    (true, 1) => (true, None),
                    (writes, _) => (writes, Some(returned)),
                };
                if happens {
                    *slot = number;
                }
                Operation { key, action, called_ns, returned_ns, client: 0 }
            })
            .collect()
    }

    #[test]
    fn every_honest_history_is_explained_and_each_forged_read_found() {
        for seed in 1..=20 {
            let history = honest(seed, 300);
            check(&history).unwrap_or_else(|found| panic!("seed {seed}: {found}"));
            let mut forged = history.clone();
            // The last acknowledged write of key 1 is lost: what a reader sees at the end is the value before it.
            let end = 1_000_000;
            let last = history
                .iter()
                .filter(|op| op.key == 1 && matches!(op.action, Action::Write(_)) && op.returned_ns.is_some())
                .max_by_key(|op| op.called_ns)
                .expect("somebody wrote");
            let older = history
                .iter()
                .filter(|op| op.key == 1 && op.returned_ns.is_some_and(|end| end < last.called_ns))
                .find_map(|op| match op.action {
                    Action::Write(value) => Some(value),
                    Action::Read(_) => None,
                })
                .expect("somebody wrote earlier");
            forged.push(Operation {
                key: 1,
                action: Action::Read(older),
                called_ns: end,
                returned_ns: Some(end + 1),
                client: 9,
            });
            let found = check(&forged).expect_err("a lost write");
            assert_eq!((found.key, found.at.client), (1, 9), "seed {seed}: {found}");
        }
    }

    #[test]
    fn a_hundred_writes_without_an_answer_are_no_matter() {
        // A guest is switched off, and each client tries again and again until it is back.
        let mut history: Vec<Operation> = honest(7, 300).into_iter().filter(|op| op.key == 1).collect();
        let last = Operation { called_ns: 10_000, returned_ns: Some(10_001), ..write(900, 0, 1) };
        history.push(last);
        history.extend((0..100).map(|number| write(1000 + number, 10_010 + number, None)));
        history.extend((0..100).map(|number| read(900, 10_100 + number, 10_200 + number)));
        // One of them happened, late.
        history.extend([read(1050, 20_000, 20_001), write(901, 20_002, 20_003), read(901, 20_004, 20_005)]);
        check(&history).unwrap();
        let forged = read(900, 30_000, 30_001);
        history.push(forged);
        assert_eq!(check(&history).unwrap_err().at, forged);
    }

    /// Whether some order of some of `left` explains them, by trying all: those with an answer must be in it.
    fn explained(holds: u64, left: &[Operation]) -> bool {
        let must = |operation: &Operation| operation.returned_ns.is_some();
        if !left.iter().any(must) {
            return true;
        }
        let bound = left.iter().filter_map(|operation| operation.returned_ns).min().unwrap_or(u64::MAX);
        (0..left.len()).any(|at| {
            let mut rest = left.to_vec();
            let next = rest.remove(at);
            let then = if next.called_ns <= bound { step(holds, next.action) } else { None };
            then.is_some_and(|then| explained(then, &rest))
        })
    }

    #[test]
    fn it_says_what_trying_all_orders_says() {
        let mut rng = Rng::new(3);
        let mut refused = 0;
        for _ in 0..3_000 {
            let writes = 1 + rng.below(4);
            let mut history: Vec<Operation> = (1..=writes + rng.below(4))
                .map(|number| {
                    let called = rng.below(20);
                    let returned = (number > writes || rng.chance(600)).then(|| called + 1 + rng.below(12));
                    if number <= writes {
                        write(number, called, returned)
                    } else {
                        read(rng.below(writes + 1), called, returned)
                    }
                })
                .collect();
            history.sort_unstable_by_key(|operation| operation.called_ns);
            let right = explained(0, &history);
            refused += u32::from(!right);
            assert_eq!(check(&history).is_ok(), right, "{history:#?}");
        }
        assert!((500..2_500).contains(&refused), "{refused} of 3000 are refused: they are not mixed");
    }

    #[test]
    fn many_operations_on_one_key_are_quick_enough() {
        // Four clients at a time, all on one key: what a round of the laboratory has at most.
        let history: Vec<Operation> = honest(5, 8_000).into_iter().filter(|op| op.key == 1).collect();
        assert!(history.len() >= 2_000);
        check(&history).unwrap();
    }
}
