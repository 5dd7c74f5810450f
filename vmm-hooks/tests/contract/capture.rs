//! Clauses on pausing, harvesting and capturing.

use vmm_hooks::guest::{Capture, GuestErrorKind, PauseParts};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use crate::fixture::{Step, World, harvest, page, tracked};

pub(crate) fn pausing_twice_is_one_pause(world: &dyn World) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    assert!(world.is_running());
    guest.pause().expect("pausing works");
    guest.pause().expect("pausing what this side has paused is no error");
    assert!(!world.is_running());
    guest.resume().expect("resuming works");
    assert!(world.is_running(), "one resume ends any number of pauses");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_written_page_is_found_once(world: &dyn World) {
    let mut guest = tracked(world);
    let written = [world.spare(0), world.spare(5), world.spare(6)];
    written.iter().for_each(|&page| world.fill(page, 1));
    let dirty = harvest(guest.as_mut());
    assert!(written.iter().all(|&page| dirty.contains(page)), "a written page was not found");
    assert!(!dirty.contains(world.spare(3)), "a page that nobody wrote was found");
    world.fill(written[1], 2);
    let dirty = harvest(guest.as_mut());
    assert!(dirty.contains(written[1]), "a page written again after a harvest was not found");
    assert!(!dirty.contains(written[0]), "a page was found twice");
    guest.detach().expect("detaching works");
}

pub(crate) fn what_is_put_back_comes_again(world: &dyn World) {
    let mut guest = tracked(world);
    world.fill(world.spare(1), 1);
    let first = harvest(guest.as_mut());
    guest.put_back(&first);
    world.fill(world.spare(2), 1);
    let mut missing = first;
    missing.insert(world.spare(2));
    let second = harvest(guest.as_mut());
    missing.subtract(&second);
    assert!(missing.is_empty(), "pages were lost: {:?}", missing.iter().collect::<Vec<_>>());
    assert!(!harvest(guest.as_mut()).contains(world.spare(1)), "what was put back comes once");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_capture_is_ascending_unique_and_true(world: &dyn World) {
    let mut guest = tracked(world);
    for index in [9, 3, 4, 60] {
        world.fill(world.spare(index), u8::try_from(index).expect("small"));
    }
    let mut capture = Capture { pages: vec![1, 2], bytes: vec![3], device: vec![4], disk: Vec::new() };
    let mut parts = PauseParts::default();
    guest.pause().expect("pausing works");
    guest.capture(&mut capture, &mut parts).expect("capturing works");
    assert!(capture.pages.is_sorted_by(|a, b| a < b), "pages must ascend and come once");
    assert_eq!(capture.bytes.len(), capture.pages.len() * PAGE_SIZE);
    assert!(capture.device.len() > 1, "a guest has device state");
    for index in [3, 4, 9, 60] {
        let at = capture.pages.binary_search(&world.spare(index)).expect("a written page is in the capture");
        let bytes = &capture.bytes[at * PAGE_SIZE..][..PAGE_SIZE];
        assert!(bytes.iter().all(|&byte| u64::from(byte) == index), "the bytes of another page");
    }
    // What was captured is what stands in memory, page by page.
    let mut bytes = Vec::new();
    guest.read_pages(&capture.pages, &mut bytes).expect("reading works");
    assert!(bytes == capture.bytes, "memory changed while the guest stood");
    let mut again = Capture::default();
    guest.capture(&mut again, &mut parts).expect("capturing works");
    assert!(!again.pages.contains(&world.spare(9)), "a captured page came again");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_capture_that_fails_loses_nothing(world: &dyn World) {
    let mut guest = tracked(world);
    let mut parts = PauseParts::default();
    for step in [Step::Harvest, Step::Device, Step::Copy] {
        let written: Vec<u64> = (10..20).map(|index| world.spare(index)).collect();
        written.iter().for_each(|&page| world.fill(page, 7));
        if !world.fail_next(step) {
            println!("skipped: no failure of {step:?} can be ordered here");
            continue;
        }
        let mut capture = Capture::default();
        guest.pause().expect("pausing works");
        let error = guest.capture(&mut capture, &mut parts).expect_err("the failure that was ordered");
        assert_eq!(error.kind, GuestErrorKind::Failed, "{step:?}");
        guest.resume().expect("the guest is unharmed");
        // And the next one fails, too, at the same step.
        world.fail_next(step);
        guest.pause().expect("pausing works");
        guest.capture(&mut capture, &mut parts).expect_err("the failure that was ordered");
        guest.capture(&mut capture, &mut parts).expect("no failure any more");
        guest.resume().expect("resuming works");
        assert!(written.iter().all(|page| capture.pages.contains(page)), "pages were lost at {step:?}");
        assert_eq!(capture.bytes.len(), capture.pages.len() * PAGE_SIZE, "{step:?}");
    }
    guest.detach().expect("detaching works");
}

pub(crate) fn pages_are_read_in_the_order_asked_for(world: &dyn World) {
    let mut guest = tracked(world);
    world.fill(world.spare(2), 2);
    world.fill(world.spare(7), 7);
    let mut bytes = vec![9; 10];
    guest.read_pages(&[world.spare(7), world.spare(2)], &mut bytes).expect("reading a running guest works");
    assert!(bytes == [[7; PAGE_SIZE], [2; PAGE_SIZE]].concat());
    let mut dirty = PageSet::empty(guest.layout().pages());
    guest.read_pages(&[], &mut bytes).expect("reading nothing works");
    assert!(bytes.is_empty());
    guest.pause().expect("pausing works");
    guest.harvest(&mut dirty).expect("harvesting works");
    assert!(dirty.contains(world.spare(7)), "reading a page does not make it clean");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_failed_pause_or_resume_changes_nothing(world: &dyn World) {
    let mut guest = tracked(world);
    if !world.fail_next(Step::Pause) {
        println!("skipped: no failure of pausing can be ordered here");
        return;
    }
    guest.pause().expect_err("the failure that was ordered");
    assert!(world.is_running(), "after a failed pause the guest runs on");
    world.fill(world.spare(4), 4);
    guest.pause().expect("pausing works");
    assert!(world.fail_next(Step::Resume));
    guest.resume().expect_err("the failure that was ordered");
    assert!(!world.is_running(), "after a failed resume the guest stands");
    guest.resume().expect("resuming works");
    assert!(harvest(guest.as_mut()).contains(world.spare(4)));
    assert!(page(guest.as_mut(), world.spare(4)).iter().all(|&byte| byte == 4));
    guest.detach().expect("detaching works");
}
