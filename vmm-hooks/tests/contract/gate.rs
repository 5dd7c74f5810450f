//! Clauses on the gate. A back end may emit frames of its own accord at any time while it runs.

use std::time::{Duration, Instant};

use vmm_hooks::guest::{Gate, Guest};

use crate::fixture::World;

/// Far above what any guest here needs to emit a frame.
const PATIENCE: Duration = Duration::from_secs(60);

/// Attaches and holds output from epoch `epoch` on.
fn held(world: &dyn World, epoch: u64) -> Box<dyn Guest> {
    let mut guest = world.attach().expect("a guest that can be attached to");
    guest.pause().expect("pausing works");
    guest.hold_output(epoch).expect("holding works");
    guest.resume().expect("resuming works");
    guest
}

/// Lets the guest emit until the unsealed epoch holds a frame.
fn emit(world: &dyn World, gate: &dyn Gate) {
    world.emit();
    assert!(gate.wait_output(Instant::now() + PATIENCE).is_some(), "no frame came to the gate");
}

/// Waits until `heard` frames reached the wire: releasing does not wait for the guest.
fn hear(world: &dyn World, heard: u64) {
    let deadline = Instant::now() + PATIENCE;
    while world.heard() < heard {
        assert!(Instant::now() < deadline, "{} of {heard} frames reached the wire", world.heard());
        std::thread::yield_now();
    }
}

pub(crate) fn output_is_held_sealed_and_released_in_order(world: &dyn World) {
    let mut guest = held(world, 5);
    let gate = guest.gate();
    let before = world.heard();
    emit(world, gate.as_ref());
    guest.pause().expect("pausing works");
    let of_five = gate.seal(6);
    assert!(of_five >= 1, "the frame that waited belongs to the sealed epoch");
    assert_eq!(gate.held().frames, of_five);
    assert!(gate.wait_output(Instant::now()).is_none(), "an epoch that has just begun holds nothing");
    guest.resume().expect("resuming works");
    emit(world, gate.as_ref());
    guest.pause().expect("pausing works");
    let of_six = gate.seal(7);
    assert!(of_six >= 1);
    assert_eq!(gate.held().frames, of_five + of_six, "what was emitted after the seal is not of the sealed epoch");
    assert_eq!(world.heard(), before, "a held frame was heard");
    assert!(gate.held().bytes > 0 && gate.held().oldest.is_some());
    gate.release(4);
    assert_eq!(gate.held().frames, of_five + of_six, "an epoch that is not acknowledged was released");
    // What is released while the guest stands may wait for it. From here on it may also emit frames of epoch 7.
    guest.resume().expect("resuming works");
    gate.release(5);
    hear(world, before + of_five);
    assert_eq!(gate.held().released, of_five);
    gate.release(6);
    hear(world, before + of_five + of_six);
    assert_eq!(world.heard(), before + of_five + of_six, "more frames were heard than were released");
    assert!(world.heard_in_order());
    let held = gate.held();
    assert_eq!((held.released, held.dropped), (of_five + of_six, 0));
    gate.release(6);
    assert_eq!(world.heard(), before + of_five + of_six, "releasing twice emits once");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_gate_that_is_opened_releases_and_lets_pass(world: &dyn World) {
    let mut guest = held(world, 1);
    let gate = guest.gate();
    let before = world.heard();
    emit(world, gate.as_ref());
    guest.pause().expect("pausing works");
    let waiting = gate.seal(2);
    guest.resume().expect("resuming works");
    guest.open_output().expect("opening works");
    hear(world, before + waiting);
    world.emit();
    hear(world, before + waiting + 1);
    assert!(world.heard_in_order());
    assert_eq!(gate.held().frames, 0, "an open gate holds nothing");
    // And it can be put in again.
    guest.pause().expect("pausing works");
    guest.hold_output(9).expect("holding works");
    let heard = world.heard();
    guest.resume().expect("resuming works");
    emit(world, guest.gate().as_ref());
    assert_eq!(world.heard(), heard, "a held frame was heard");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_gate_that_is_shut_is_silent_for_ever(world: &dyn World) {
    let mut guest = held(world, 1);
    let gate = guest.gate();
    let before = world.heard();
    emit(world, gate.as_ref());
    gate.shut();
    assert_eq!(gate.held().frames, 0, "what was held is dropped");
    let dropped = gate.held().dropped;
    assert!(dropped >= 1);
    world.emit();
    let deadline = Instant::now() + PATIENCE;
    while gate.held().dropped == dropped {
        assert!(Instant::now() < deadline, "a frame that came to a shut gate was not counted as dropped");
        std::thread::yield_now();
    }
    guest.pause().expect("pausing works");
    gate.seal(2);
    gate.release(u64::MAX);
    assert_eq!(gate.held().frames, 0, "a shut gate holds nothing");
    assert_eq!(gate.held().released, 0);
    assert_eq!(world.heard(), before, "a shut gate was heard");
}

pub(crate) fn waiting_for_output_ends_at_the_deadline(world: &dyn World) {
    let mut guest = held(world, 1);
    let gate = guest.gate();
    guest.pause().expect("pausing works");
    gate.seal(2);
    let start = Instant::now();
    assert!(gate.wait_output(start + Duration::from_millis(20)).is_none(), "a guest that stands emits nothing");
    assert!(start.elapsed() >= Duration::from_millis(20), "it did not wait");
    let began = Instant::now();
    guest.resume().expect("resuming works");
    let waiter = {
        let gate = gate.clone();
        std::thread::spawn(move || gate.wait_output(Instant::now() + PATIENCE))
    };
    world.emit();
    let emitted = waiter.join().expect("no panic").expect("the frame wakes the waiter");
    assert!(emitted >= began, "a frame cannot be older than the guest's running");
    guest.detach().expect("detaching works");
}
