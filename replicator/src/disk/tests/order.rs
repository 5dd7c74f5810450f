//! What is durable before what: small histories, stopped at every write and sync, with every plain power loss at each.
//!
//! Each test is about one rule of `docs/protocol.md` P44 and fails when that rule is broken.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::crash::run;
use super::driver::{Driver, Op, W};
use super::model::{Fault, Model};
use crate::disk::{DiskError, Policy};

/// An epoch that takes one block of the journal, and is acknowledged or not.
fn small(at: usize, acked: bool) -> Op {
    Op::Epoch(vec![W { disk: 0, at, bytes: 700, fill: 1 }], acked)
}

/// An epoch that takes two blocks of the journal, and is acknowledged.
fn big() -> Op {
    Op::Epoch(vec![W { disk: 1, at: 300, bytes: 4200, fill: 2 }], true)
}

/// Stops a history at each of its calls, under both policies, and recovers from all that may be left.
fn at_every_call(ops: &[Op]) {
    for policy in [Policy::Disk, Policy::Memory] {
        let mut n = 1;
        while let Some(driver) = run(ops, policy, n, Fault::Crash) {
            driver.on(driver.model.after_kill()).check_restart(None, false).expect("recovers");
            for left in driver.model.after_plain_power_losses() {
                driver.on(left).check_restart(None, true).expect("recovers");
            }
            n += 1;
        }
        assert!(n > 20, "the history came to an end after {n} calls");
    }
}

#[test]
fn p44_images_are_on_the_disk_before_the_journal_is_trimmed() {
    at_every_call(&[
        small(0, true),
        Op::Commit,
        Op::Apply,
        Op::Flush,
        small(500, true),
        Op::Commit,
        Op::Apply,
        Op::Flush,
    ]);
    // When applying finds much to trim, and when appending finds the journal full.
    at_every_call(&[big(), small(0, true), Op::Commit, Op::Apply, big(), Op::Commit, small(900, true)]);
}

#[test]
fn p44_room_in_the_journal_is_used_again_after_the_mark_that_frees_it() {
    let mut ops: Vec<Op> = (0..4).map(|n| small(n * 100, true)).collect();
    ops.extend([Op::Commit, small(450, true), small(500, true), Op::Commit, Op::Flush, big(), small(550, false)]);
    at_every_call(&ops);
}

/// Somebody appends while another one applies and trims: as soon as there is said to be room, it is written to.
#[test]
fn p44_room_in_the_journal_is_not_given_away_while_the_mark_that_frees_it_is_written() {
    let mut n = 1;
    let mut appended = 0;
    loop {
        let mut driver = Driver::new(Model::default(), Policy::Disk);
        driver.start().expect("starts");
        for at in 0..4 {
            driver.step(&small(at * 100, true)).expect("appends");
        }
        driver.step(&Op::Commit).expect("commits");
        let model = driver.model.clone();
        let shared = Arc::new(Mutex::new(driver));
        let (early, taken) = (Arc::clone(&shared), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&taken);
        model.fail_at(n, Fault::Crash);
        let store = shared.lock().expect("not poisoned").shared();
        model.watch(move || {
            let mut driver = early.lock().expect("not poisoned");
            let progress = driver.store().progress();
            if progress.journal_bytes > progress.journal_used && progress.error.is_none() {
                count.fetch_add(1, Ordering::Relaxed);
                // It may be the call at which everything stops.
                let _ = driver.step(&small(600, true));
            }
        });
        let ended = store.apply().and_then(|_| store.flush());
        appended += taken.load(Ordering::Relaxed);
        let driver = shared.lock().expect("not poisoned");
        for left in model.after_plain_power_losses() {
            driver.on(left).check_restart(None, true).expect("recovers");
        }
        if !model.hit() {
            ended.expect("nothing failed");
            break;
        }
        n += 1;
    }
    assert!(n > 6, "applying came to an end after {n} calls");
    assert_eq!(appended, 0, "room was given away before the mark was on the disk");
}

#[test]
fn p44_p47_finishing_is_marked_before_what_is_later_is_dropped() {
    let later = [small(500, false), small(600, false)];
    let before = [
        vec![small(0, true)],
        vec![small(0, true), small(100, true), Op::Commit, Op::Apply, small(200, true)],
        vec![small(0, true), Op::Commit, small(100, true)],
        vec![],
    ];
    for before in before {
        at_every_call(&[&before[..], &later, &[Op::Failover]].concat());
    }
}

#[test]
fn p47_a_recovery_that_had_begun_is_not_taken_back_by_a_lower_limit() {
    for policy in [Policy::Disk, Policy::Memory] {
        let mut driver = Driver::new(Model::default(), policy);
        driver.start().expect("starts");
        for op in [small(0, true), Op::Commit, Op::Apply, small(100, true), small(200, false), small(50, false)] {
            driver.step(&op).expect("runs");
        }
        let (mut refused, mut done) = (0, 0);
        for fault in [Fault::Crash, Fault::Io] {
            let mut n = 1;
            loop {
                let model = driver.model.after_kill();
                model.fail_at(n, fault);
                if driver.on(model.clone()).check_restart(None, false).is_ok() {
                    break;
                }
                let losses = if policy == Policy::Disk { model.after_plain_power_losses() } else { Vec::new() };
                for left in losses.into_iter().chain([model.after_kill()]) {
                    let mut low = driver.on(left.clone());
                    match low.check_restart(Some(driver.truth.acked), false) {
                        Ok(()) => done += 1,
                        Err(DiskError::OutOfTurn { .. }) => {
                            refused += 1;
                            driver.on(left.after_kill()).check_restart(None, false).expect("goes on to what was begun");
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                n += 1;
            }
        }
        assert!(done > 0 && refused > 0, "{done} {refused}");
    }
}
