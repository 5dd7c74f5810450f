//! What a back end must offer to be held to the contract.

use vmm_hooks::guest::{Guest, GuestError, TwinHost};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

/// A step of a guest that may be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Pause,
    Resume,
    Harvest,
    Device,
    Copy,
    /// A write to a mirrored disk is lost.
    DiskWrite,
}

/// What a clause needs beside a processor and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    Network,
    /// Two disks of [`DISK_BYTES`], empty, to which the guest writes nothing of its own accord.
    Disks,
}

/// The size of each disk.
pub(crate) const DISK_BYTES: usize = 1 << 20;

/// Boots guests of one back end.
pub(crate) trait Fixture {
    /// How the back end is called.
    fn name(&self) -> &'static str;

    /// A running guest with what is needed. The error says what is missing here.
    fn boot(&self, needs: Needs) -> Result<Box<dyn World>, String>;
}

/// One guest, from outside of the traits. Dropping it ends the guest.
pub(crate) trait World {
    /// Attaches to the guest.
    fn attach(&self) -> Result<Box<dyn Guest>, GuestError>;

    /// Page number `index`, below [`SPARES`], of those that the guest leaves alone; ascending.
    fn spare(&self, index: u64) -> u64;

    /// Fills a spare page as the guest would.
    fn fill(&self, page: u64, byte: u8);

    /// Writes this byte so often to a disk as the guest would, and returns when it is told that it is done.
    fn write_disk(&self, disk: usize, offset: usize, byte: u8, bytes: usize);

    /// What is on a disk.
    fn disk(&self, disk: usize) -> Vec<u8>;

    /// Whether the vCPUs run.
    fn is_running(&self) -> bool;

    /// Whether the guest's process is there.
    fn is_there(&self) -> bool;

    /// What is left of an attachment in the guest; empty if nothing is.
    fn traces(&self) -> Vec<String>;

    /// Lets the running guest emit at least one frame and returns once it has.
    fn emit(&self);

    /// How many frames of the guest reached the wire so far.
    fn heard(&self) -> u64;

    /// Whether they came in the order in which the guest emitted them, without a gap; true if the back end cannot tell.
    fn heard_in_order(&self) -> bool;

    /// Makes the next such step fail, once. False if this back end cannot.
    fn fail_next(&self, step: Step) -> bool;

    /// A standby for this guest's twins.
    fn twins(&self) -> Box<dyn TwinHost>;

    /// What twins have left on that standby; empty if nothing.
    fn twin_traces(&self) -> Vec<String>;
}

/// How many spare pages a world has.
pub(crate) const SPARES: u64 = 64;

/// Holds one back end to one clause.
pub(crate) fn hold(fixture: &dyn Fixture, needs: Needs, clause: fn(&dyn World)) {
    match fixture.boot(needs) {
        Ok(world) => clause(world.as_ref()),
        Err(missing) => println!("skipped: {}: {missing}", fixture.name()),
    }
}

/// Attaches, pauses, arms and lets run again.
pub(crate) fn tracked(world: &dyn World) -> Box<dyn Guest> {
    let mut guest = world.attach().expect("a guest that can be attached to");
    guest.pause().expect("pausing works");
    guest.arm().expect("arming works");
    guest.resume().expect("resuming works");
    guest
}

/// The pages of one harvest, in a pause of its own.
pub(crate) fn harvest(guest: &mut dyn Guest) -> PageSet {
    let mut dirty = PageSet::empty(guest.layout().pages());
    guest.pause().expect("pausing works");
    guest.harvest(&mut dirty).expect("harvesting works");
    guest.resume().expect("resuming works");
    dirty
}

/// One page of a guest.
pub(crate) fn page(guest: &mut dyn Guest, page: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    guest.read_pages(&[page], &mut bytes).expect("a page that is there can be read");
    assert_eq!(bytes.len(), PAGE_SIZE);
    bytes
}
