//! Clauses on mirrored disks.

use std::time::{Duration, Instant};

use vmm_hooks::disk::{DiskChange, DiskWrite};
use vmm_hooks::guest::{Capture, Guest, GuestErrorKind, PauseParts};

use crate::fixture::{DISK_BYTES, Step, World};

/// Far above what copying two small disks takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes that are taken at once.
const BATCH: usize = 64 << 10;

/// What a standby has of the disks.
struct Images([Vec<u8>; 2]);

impl Images {
    /// Nothing is known of them before the first copy.
    fn unknown() -> Self {
        Self([vec![0xee; DISK_BYTES], vec![0xee; DISK_BYTES]])
    }

    fn apply(&mut self, writes: &[DiskWrite]) {
        for write in writes {
            let start = usize::try_from(write.offset).expect("small");
            let end = start + usize::try_from(write.bytes()).expect("small");
            assert!(end > start, "an empty write");
            let range = &mut self.0[write.disk as usize][start..end];
            match &write.change {
                DiskChange::Data(data) => range.copy_from_slice(data),
                DiskChange::Zero(_) => range.fill(0),
            }
        }
    }

    fn are_those_of(&self, world: &dyn World) {
        for (disk, image) in self.0.iter().enumerate() {
            let truth = world.disk(disk);
            let differing = truth.iter().zip(image).position(|(truth, copy)| truth != copy);
            assert!(truth.len() == image.len() && differing.is_none(), "disk {disk} differs at {differing:?}");
        }
    }
}

/// A guest whose disks are mirrored, and their copies when the first copy was complete.
fn mirrored(world: &dyn World) -> (Box<dyn Guest>, Images) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    assert_eq!(guest.recipe().disks.len(), 2);
    assert!(guest.recipe().disks.iter().all(|disk| disk.bytes == DISK_BYTES as u64));
    world.write_disk(0, 4096, 1, 8192);
    world.write_disk(1, DISK_BYTES - 512, 2, 512);
    guest.mirror_disks().expect("mirroring works");
    let mut images = Images::unknown();
    // In the middle of it, before and after the place that is copied.
    world.write_disk(0, 0, 3, 512);
    world.write_disk(0, DISK_BYTES - 4096, 4, 4096);
    first_copy(guest.as_mut(), &mut images);
    (guest, images)
}

fn first_copy(guest: &mut dyn Guest, images: &mut Images) {
    let deadline = Instant::now() + PATIENCE;
    while !guest.mirror_progress().expect("a healthy mirror").ready {
        assert!(Instant::now() < deadline, "the first copy does not end");
        take(guest, images);
    }
    while take(guest, images) {}
}

/// Whether there was anything.
fn take(guest: &mut dyn Guest, images: &mut Images) -> bool {
    let mut writes = Vec::new();
    guest.take_writes(&mut writes, BATCH, Duration::from_millis(1));
    images.apply(&writes);
    !writes.is_empty()
}

/// A tracked guest's capture, in a pause of its own.
fn capture(guest: &mut dyn Guest) -> Vec<DiskWrite> {
    let mut capture =
        Capture { disk: vec![DiskWrite { disk: 9, offset: 9, change: DiskChange::Zero(9) }], ..Capture::default() };
    guest.pause().expect("pausing works");
    guest.capture(&mut capture, &mut PauseParts::default()).expect("capturing works");
    guest.resume().expect("resuming works");
    capture.disk
}

fn arm(guest: &mut dyn Guest) {
    guest.pause().expect("pausing works");
    guest.arm().expect("arming works");
    guest.resume().expect("resuming works");
}

pub(crate) fn a_guest_without_disks_is_mirrored_at_once(world: &dyn World) {
    let mut guest = world.attach().expect("a guest that can be attached to");
    assert!(guest.recipe().disks.is_empty());
    guest.mirror_disks().expect("there is nothing to do");
    assert!(guest.mirror_progress().expect("nothing is broken").ready);
    arm(guest.as_mut());
    assert!(capture(guest.as_mut()).is_empty());
    guest.unmirror_disks().expect("there is nothing to do");
    guest.detach().expect("detaching works");
}

pub(crate) fn the_first_copy_and_the_writes_after_it_are_the_disks(world: &dyn World) {
    let (mut guest, mut images) = mirrored(world);
    images.are_those_of(world);
    world.write_disk(1, 512, 5, 4096);
    world.write_disk(1, 1024, 0, 512);
    world.write_disk(1, 1536, 6, 512);
    while take(guest.as_mut(), &mut images) {}
    images.are_those_of(world);
    guest.detach().expect("detaching works");
}

pub(crate) fn a_capture_has_the_writes_up_to_the_stop(world: &dyn World) {
    let (mut guest, mut images) = mirrored(world);
    arm(guest.as_mut());
    for round in 1..5 {
        world.write_disk(0, 512 * usize::from(round), 10 + round, 1024);
        world.write_disk(1, 8192, round, 512);
        world.write_disk(0, 65536, 0, 4096);
        let writes = capture(guest.as_mut());
        let order: Vec<_> = writes.iter().map(|write| (write.disk, write.offset, write.bytes())).collect();
        assert_eq!(order, [(0, 512 * u64::from(round), 1024), (1, 8192, 512), (0, 65536, 4096)]);
        images.apply(&writes);
        images.are_those_of(world);
    }
    assert!(capture(guest.as_mut()).is_empty(), "nothing was written since");
    guest.detach().expect("detaching works");
}

pub(crate) fn writes_that_are_put_back_come_first(world: &dyn World) {
    let (mut guest, mut images) = mirrored(world);
    arm(guest.as_mut());
    world.write_disk(0, 0, 1, 512);
    world.write_disk(0, 512, 2, 512);
    let writes = capture(guest.as_mut());
    assert_eq!(writes.len(), 2);
    guest.put_back_writes(writes);
    world.write_disk(0, 0, 3, 512);
    let writes = capture(guest.as_mut());
    assert_eq!(writes.iter().map(|write| write.offset).collect::<Vec<_>>(), [0, 512, 0]);
    images.apply(&writes);
    images.are_those_of(world);
    guest.detach().expect("detaching works");
}

pub(crate) fn a_capture_that_fails_keeps_the_writes(world: &dyn World) {
    let (mut guest, mut images) = mirrored(world);
    arm(guest.as_mut());
    for step in [Step::Harvest, Step::Device, Step::Copy] {
        world.write_disk(1, 0, 7, 512);
        world.fill(world.spare(1), 7);
        if !world.fail_next(step) {
            println!("skipped: no failure of {step:?} can be ordered here");
            continue;
        }
        guest.pause().expect("pausing works");
        guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect_err("the failure that was ordered");
        guest.resume().expect("resuming works");
        let writes = capture(guest.as_mut());
        assert_eq!(writes.len(), 1, "{step:?}");
        images.apply(&writes);
        images.are_those_of(world);
    }
    // A write that is lost is never passed over in silence, and not forgotten either.
    if world.fail_next(Step::DiskWrite) {
        for _ in 0..2 {
            guest.pause().expect("pausing works");
            let failed = guest.capture(&mut Capture::default(), &mut PauseParts::default());
            assert_eq!(failed.expect_err("a write is missing").kind, GuestErrorKind::Failed);
            guest.resume().expect("resuming works");
            guest.mirror_progress().expect_err("it has to be begun anew");
        }
        guest.unmirror_disks().expect("it works");
        guest.mirror_disks().expect("it works");
        images = Images::unknown();
        first_copy(guest.as_mut(), &mut images);
        images.apply(&capture(guest.as_mut()));
        images.are_those_of(world);
    } else {
        println!("skipped: no loss of a write can be ordered here");
    }
    guest.detach().expect("detaching works");
}

pub(crate) fn unmirroring_leaves_the_disks_alone(world: &dyn World) {
    let (mut guest, _) = mirrored(world);
    let before = [world.disk(0), world.disk(1)];
    world.write_disk(0, 0, 0, 512);
    guest.unmirror_disks().expect("unmirroring works");
    let mut nothing = Vec::new();
    guest.take_writes(&mut nothing, BATCH, Duration::ZERO);
    assert!(nothing.is_empty(), "what was not taken is dropped");
    assert!(world.disk(0)[512..] == before[0][512..] && world.disk(1) == before[1]);
    world.write_disk(0, 512, 9, 512);
    arm(guest.as_mut());
    assert!(capture(guest.as_mut()).is_empty(), "nobody mirrors");
    guest.unmirror_disks().expect("unmirroring twice is no error");
    // And again, from the beginning; this time it is left to detaching, in a pause.
    guest.mirror_disks().expect("mirroring works");
    let mut images = Images::unknown();
    first_copy(guest.as_mut(), &mut images);
    images.are_those_of(world);
    guest.pause().expect("pausing works");
    guest.detach().expect("detaching works");
    assert!(world.is_running());
    assert_eq!(world.traces(), Vec::<String>::new());
    images.are_those_of(world);
    world.write_disk(1, 0, 1, 512);
}
