//! Crashes and failures at every call of random histories.

use proptest::prelude::*;

use super::driver::{Driver, Op, W, ops};
use super::model::{Dice, Fault, Model};
use crate::disk::Policy;

/// Histories; for a long run set `UNDERSTUDY_DISK_CASES`.
fn cases() -> u32 {
    std::env::var("UNDERSTUDY_DISK_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// Power losses that are tried at each call.
const LOSSES: u64 = 4;

/// Runs a history with a fault at the `n`-th call. False if the history has fewer calls.
pub(super) fn run(ops: &[Op], policy: Policy, n: usize, fault: Fault) -> Option<Driver> {
    let mut driver = Driver::new(Model::default(), policy);
    driver.model.fail_at(n, fault);
    let mut ended = driver.start();
    for op in ops {
        if ended.is_err() {
            break;
        }
        ended = driver.step(op);
    }
    if !driver.model.hit() {
        ended.expect("nothing failed");
        return None;
    }
    assert!(ended.is_err(), "a call failed and nobody was told");
    Some(driver)
}

/// Recovers from what is left, crashes again while recovering, recovers for good, goes on, crashes, recovers.
fn recovers(driver: &Driver, left: &Model, power_lost: bool, dice: &mut Dice) {
    let again = left.after_kill();
    again.fail_at(1 + dice.below(16), Fault::Crash);
    let mut interrupted = driver.on(again.clone());
    let mut last = if interrupted.check_restart(None, power_lost).is_err() {
        driver.on(again.after_power_loss(dice))
    } else {
        driver.on(left.after_kill())
    };
    last.check_restart(None, power_lost || again.hit()).expect("recovers");
    last.go_on().expect("goes on");
    let mut end = last.on(last.model.after_power_loss(dice));
    end.check_restart(None, true).expect("recovers at last");
}

fn crashes(ops: &[Op], policy: Policy, seed: u64) {
    let mut n = 1;
    while let Some(driver) = run(ops, policy, n, Fault::Crash) {
        let mut dice = Dice(seed ^ ((n as u64) << 20));
        for _ in 0..LOSSES {
            recovers(&driver, &driver.model.after_power_loss(&mut dice), true, &mut dice);
        }
        recovers(&driver, &driver.model.after_kill(), false, &mut dice);
        driver.on(driver.model.after_kill()).finishes_at_acknowledged(&mut dice);
        n += 1;
    }
}

/// One call fails: the store takes nothing more, and a new process finds what was acknowledged, though the system's cache shows
/// it things that never reached the disk.
fn failures(ops: &[Op], policy: Policy, fault: Fault, seed: u64) {
    let mut n = 1;
    while let Some(driver) = run(ops, policy, n, fault) {
        driver.check_latched();
        let mut dice = Dice(seed ^ ((n as u64) << 20));
        recovers(&driver, &driver.model.after_power_loss(&mut dice), true, &mut dice);
        recovers(&driver, &driver.model.after_kill(), false, &mut dice);
        // The way to go on from the copy all the same: exactly the last acknowledged epoch.
        let mut survivor = driver.on(driver.model.after_kill());
        survivor.finishes_at_acknowledged(&mut dice);
        n += 1;
    }
}

/// Found by a long run: the mark of a finish reached the disk, and records that it relied upon did not.
#[test]
fn p44_p47_seed_4520398410459024686_a_finish_marks_what_is_journaled_durably() {
    let epoch = |bytes, fill, acked| Op::Epoch(vec![W { disk: 0, at: 0, bytes, fill }], acked);
    crashes(&[epoch(1405, 1, true), epoch(1, 0, false), Op::Failover], Policy::Memory, 4_520_398_410_459_024_686);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn p44_p47_a_crash_at_any_call_leaves_a_whole_epoch(ops in ops(12), seed in any::<u64>()) {
        crashes(&ops, Policy::Disk, seed);
    }

    #[test]
    fn p44_p47_without_syncs_a_crash_leaves_a_whole_epoch_that_may_be_older(ops in ops(12), seed in any::<u64>()) {
        crashes(&ops, Policy::Memory, seed);
    }

    #[test]
    fn p45_a_failed_call_latches_and_what_was_acknowledged_is_kept(ops in ops(10), seed in any::<u64>(), full in any::<bool>()) {
        let fault = if full { Fault::NoSpace } else { Fault::Io };
        failures(&ops, Policy::Disk, Fault::Read, seed);
        failures(&ops, Policy::Disk, fault, seed);
        failures(&ops, Policy::Memory, fault, seed);
    }
}
