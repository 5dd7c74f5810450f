//! Clauses on twins.

use vmm_hooks::guest::{Capture, Guest, GuestErrorKind, PauseParts, Recipe, Twin, TwinMemory};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use crate::fixture::World;

/// Pages that are copied at once.
const BATCH: usize = 256;

/// All memory and the device state of a guest that stands, copied to a new twin.
fn committed(world: &dyn World, guest: &mut dyn Guest) -> (Box<dyn Twin>, Vec<u8>) {
    world.fill(world.spare(8), 8);
    let twin = world.twins().prepare("contract", guest.recipe(), guest.layout(), &[]).expect("this host can");
    guest.pause().expect("pausing works");
    guest.arm().expect("arming works");
    let mut capture = Capture::default();
    guest.capture(&mut capture, &mut PauseParts::default()).expect("capturing works");
    let memory = twin.memory();
    assert_eq!(memory.pages(), guest.layout().pages());
    let all: Vec<u64> = PageSet::full(memory.pages()).iter().collect();
    let mut bytes = Vec::new();
    for pages in all.chunks(BATCH) {
        guest.read_pages(pages, &mut bytes).expect("reading works");
        for (&page, bytes) in pages.iter().zip(bytes.chunks(PAGE_SIZE)) {
            if bytes.iter().all(|&byte| byte == 0) { memory.zero(page) } else { memory.write(page, 0, bytes) }
        }
    }
    (twin, capture.device)
}

fn read(memory: &dyn TwinMemory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.pages()).expect("small") * PAGE_SIZE];
    for (page, bytes) in (0..).zip(bytes.chunks_mut(PAGE_SIZE)) {
        memory.read(page, bytes);
    }
    bytes
}

fn same(guest: &mut dyn Guest, memory: &[u8]) -> bool {
    let all: Vec<u64> = PageSet::full(guest.layout().pages()).iter().collect();
    let mut bytes = Vec::new();
    all.chunks(BATCH).zip(memory.chunks(BATCH * PAGE_SIZE)).all(|(pages, memory)| {
        guest.read_pages(pages, &mut bytes).expect("reading works");
        bytes == memory
    })
}

pub(crate) fn a_twin_goes_on_from_the_committed_memory(world: &dyn World) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    let (mut twin, device) = committed(world, guest.as_mut());
    assert!(twin.alive(), "a twin waits");
    let memory = twin.memory();
    assert!(same(guest.as_mut(), &read(memory.as_ref())), "the twin's memory is not the guest's");
    // Parts of pages, too.
    memory.write(world.spare(8), 4090, b"marked");
    guest.fence().fence().expect("the primary ends");
    twin.activate(&device).expect("it goes on");
    assert!(twin.alive());
    let mut page = [0; PAGE_SIZE];
    memory.read(world.spare(8), &mut page);
    assert!(page[..4090].iter().all(|&byte| byte == 8) && &page[4090..] == b"marked");
    let fence = twin.fence();
    let survivor = twin.release().expect("an activated twin can be released");
    assert!(!survivor.control.is_empty());
    assert!(!fence.ended(), "a released twin goes on");
    fence.fence().expect("it can be ended");
    assert!(fence.ended());
}

pub(crate) fn a_rehearsal_changes_nothing(world: &dyn World) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    let (mut twin, device) = committed(world, guest.as_mut());
    let memory = twin.memory();
    let before = read(memory.as_ref());
    for _ in 0..2 {
        twin.rehearse(&device).expect("this state loads");
        assert!(read(memory.as_ref()) == before, "a rehearsal changed committed memory");
    }
    assert!(twin.alive(), "a rehearsal must not disturb the twin");
    guest.fence().fence().expect("the primary ends");
    twin.activate(&device).expect("it goes on after rehearsals");
    twin.destroy().expect("destroying works");
}

pub(crate) fn a_device_state_that_does_not_load_harms_nothing(world: &dyn World) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    let (mut twin, device) = committed(world, guest.as_mut());
    let memory = twin.memory();
    let before = read(memory.as_ref());
    let broken = device[..device.len() / 2].to_vec();
    assert_eq!(twin.rehearse(&broken).expect_err("half a state does not load").kind, GuestErrorKind::Failed);
    assert!(read(memory.as_ref()) == before, "a failed rehearsal changed committed memory");
    assert!(twin.alive(), "a failed rehearsal must not end the twin");
    twin.rehearse(&device).expect("a whole state loads after that");
    twin.destroy().expect("destroying works");
    guest.detach().expect("detaching works");
}

pub(crate) fn a_destroyed_twin_leaves_nothing(world: &dyn World) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    let (twin, _) = committed(world, guest.as_mut());
    let fence = twin.fence();
    assert!(!fence.ended());
    assert!(!world.twin_traces().is_empty(), "a twin that is there can be seen");
    twin.destroy().expect("destroying works");
    assert!(fence.ended());
    assert_eq!(world.twin_traces(), Vec::<String>::new());
    let (twin, _) = committed(world, guest.as_mut());
    twin.fence().fence().expect("a twin can be ended by its fence");
    twin.destroy().expect("destroying what has ended works");
    assert_eq!(world.twin_traces(), Vec::<String>::new());
    guest.detach().expect("detaching works");
}

pub(crate) fn another_back_ends_recipe_is_refused(world: &dyn World) {
    let guest = world.attach().expect("a guest that can be attached to");
    let recipe = Recipe { backend: "another".to_owned(), ..guest.recipe().clone() };
    let refused = world.twins().prepare("contract", &recipe, guest.layout(), &[]).map(drop);
    assert_eq!(refused.expect_err("this host cannot").kind, GuestErrorKind::Refused);
    let recipe = Recipe { body: "{ not a recipe".to_owned(), ..guest.recipe().clone() };
    let refused = world.twins().prepare("contract", &recipe, guest.layout(), &[]).map(drop);
    assert_eq!(refused.expect_err("nobody can read this").kind, GuestErrorKind::Refused);
    assert_eq!(world.twin_traces(), Vec::<String>::new());
    guest.detach().expect("detaching works");
}
