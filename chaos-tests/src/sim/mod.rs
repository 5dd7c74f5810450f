//! A deterministic simulator of both cores and the witness.
//!
//! Simulated guests emit frames, each tagged with the state it came from; a simulated network loses, delays, doubles and reorders, and is cut one
//! way or both; hosts and agents stand still, die and restart; virtual time. Two checkers outside the code under test
//! watch every frame (see [`history`]). After the faults a liveness phase: whoever may run must be heard again.
//! The same seed gives the same bytes.

mod driver;
mod fencing;
pub mod history;
mod host;
mod mistakes;
mod network;
pub mod options;
mod pair;
pub mod rng;
#[cfg(test)]
mod tests;
mod trouble;
mod world;

use std::fmt;
use std::time::Duration;

use self::options::Wiring;
pub use self::world::Counts;
use self::world::World;

/// In the last this long of a run somebody must be heard.
const QUIET: Duration = Duration::from_millis(1_500);

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The seed it was made of.
    pub seed: u64,
    /// What was broken, if anything.
    pub violation: Option<String>,
    /// Frames heard.
    pub heard: u64,
    /// What happened.
    pub counts: Counts,
    /// Every event of note in virtual time; empty unless asked for.
    pub trace: Vec<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            epochs,
            pairings,
            activations,
            fenced,
            opened,
            muted,
            given_back,
            rehearsed,
            latched,
            frozen,
            restarts,
            freed,
            returned,
            again,
            switched_off,
            unconfirmed,
            resumed,
            forced,
            learnt,
            rolled_back,
        } = self.counts;
        write!(
            f,
            "seed {}: {} heard={} epochs={epochs} pairings={pairings} activations={activations} fenced={fenced} opened={opened} muted={muted} given_back={given_back} rehearsed={rehearsed} latched={latched} frozen={frozen} restarts={restarts} freed={freed} returned={returned} again={again} switched_off={switched_off} unconfirmed={unconfirmed} resumed={resumed} forced={forced} learnt={learnt} rolled_back={rolled_back}",
            self.seed,
            self.violation.as_deref().unwrap_or("ok"),
            self.heard
        )
    }
}

/// Runs one seed.
#[must_use]
pub fn run(seed: u64, wiring: Wiring, traced: bool) -> Outcome {
    let mut world = World::new(seed, wiring, traced);
    world.run();
    world.judge(QUIET);
    Outcome {
        seed,
        violation: world.checker.violation.take(),
        heard: world.checker.heard,
        counts: world.counts,
        trace: world.trace.take().unwrap_or_default(),
    }
}

/// Runs seeds from `first` on; returns the sums and the first seed that failed, traced.
#[must_use]
pub fn run_many(first: u64, seeds: u64, wiring: Wiring) -> (Counts, Option<Outcome>) {
    let mut sums = Counts::default();
    for seed in first..first.saturating_add(seeds) {
        let outcome = run(seed, wiring, false);
        if outcome.violation.is_some() {
            return (sums, Some(run(seed, wiring, true)));
        }
        sums.epochs += outcome.counts.epochs;
        sums.pairings += outcome.counts.pairings;
        sums.activations += outcome.counts.activations;
        sums.fenced += outcome.counts.fenced;
        sums.opened += outcome.counts.opened;
        sums.muted += outcome.counts.muted;
        sums.given_back += outcome.counts.given_back;
        sums.rehearsed += outcome.counts.rehearsed;
        sums.latched += outcome.counts.latched;
        sums.frozen += outcome.counts.frozen;
        sums.restarts += outcome.counts.restarts;
        sums.freed += outcome.counts.freed;
        sums.returned += outcome.counts.returned;
        sums.forced += outcome.counts.forced;
        sums.switched_off += outcome.counts.switched_off;
        sums.unconfirmed += outcome.counts.unconfirmed;
        sums.resumed += outcome.counts.resumed;
        sums.learnt += outcome.counts.learnt;
        sums.rolled_back += outcome.counts.rolled_back;
        sums.again += outcome.counts.again;
    }
    (sums, None)
}
