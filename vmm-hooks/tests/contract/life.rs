//! Clauses on attaching, detaching and fencing.

use vmm_hooks::guest::GuestErrorKind;

use crate::fixture::{World, tracked};

pub(crate) fn a_detached_guest_runs_and_can_be_attached_again(world: &dyn World) {
    for round in 0..2 {
        let mut guest = tracked(world);
        guest.pause().expect("pausing works");
        guest.hold_output(1).expect("holding works");
        // Detached in the middle of a pause in the first round, while it runs in the second.
        if round == 1 {
            guest.resume().expect("resuming works");
        }
        guest.detach().expect("detaching works");
        assert!(world.is_running(), "a detached guest runs");
        assert_eq!(world.traces(), Vec::<String>::new());
        let heard = world.heard();
        world.emit();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while world.heard() == heard {
            assert!(std::time::Instant::now() < deadline, "a detached guest must be heard");
            std::thread::yield_now();
        }
    }
}

pub(crate) fn a_second_attachment_is_refused(world: &dyn World) {
    let guest = tracked(world);
    let refused = world.attach().map(drop);
    assert_eq!(refused.expect_err("somebody is attached").kind, GuestErrorKind::Refused);
    assert!(world.is_running(), "the refusal harmed the guest");
    guest.detach().expect("detaching works");
    world.attach().expect("nobody is attached any more").detach().expect("detaching works");
}

pub(crate) fn a_fence_ends_the_guest_and_says_so(world: &dyn World) {
    let mut guest = tracked(world);
    let fence = guest.fence();
    assert!(!fence.ended() && world.is_there());
    let other = guest.fence();
    std::thread::spawn(move || other.fence()).join().expect("no panic").expect("any thread may fence");
    assert!(fence.ended(), "a fence returns when the end is confirmed");
    assert!(!world.is_there(), "the guest is gone");
    fence.fence().expect("fencing what has ended is no error");
    let error = guest.pause().expect_err("a guest that has ended cannot be paused");
    assert_eq!(error.kind, GuestErrorKind::Gone, "{error}");
}
