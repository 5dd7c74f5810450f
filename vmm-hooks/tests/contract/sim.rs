//! The simulated back end under the contract, and what only it can show.

use std::cell::RefCell;

use vmm_hooks::disk::DiskChange;
use vmm_hooks::guest::{Capture, Fence, Guest, GuestError, GuestEvent, PauseParts, Twin, TwinHost};
use vmm_hooks::layout::{Block, Layout, PAGE_SIZE};
use vmm_hooks::sim::{ANNOUNCEMENT, Fault, MAX_RELAUNCHES, SimHost, SimMachine, TwinFault, attach};

use crate::fixture::{DISK_BYTES, Fixture, Needs, SPARES, Step, World};

pub(crate) struct Sim;

impl Fixture for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn boot(&self, needs: Needs) -> Result<Box<dyn World>, String> {
        Ok(Box::new(SimWorld {
            machine: if needs == Needs::Disks { machine(1).with_disks(&[DISK_BYTES; 2]) } else { machine(1) },
            host: SimHost::new(),
            wire: RefCell::default(),
            frames: RefCell::default(),
        }))
    }
}

fn machine(seed: u64) -> SimMachine {
    let block = |name: &str, pages| Block { name: name.to_owned(), pages };
    SimMachine::boot(seed, Layout::new(vec![block("rom", 3), block("ram", SPARES + 10)]).expect("a good layout"))
}

struct SimWorld {
    machine: SimMachine,
    host: SimHost,
    wire: RefCell<Vec<Vec<u8>>>,
    frames: RefCell<u64>,
}

impl World for SimWorld {
    fn attach(&self) -> Result<Box<dyn Guest>, GuestError> {
        Ok(Box::new(attach(&self.machine)?))
    }

    fn spare(&self, index: u64) -> u64 {
        assert!(index < SPARES);
        3 + index
    }

    fn fill(&self, page: u64, byte: u8) {
        self.machine.write(page, 0, &[byte; PAGE_SIZE]);
    }

    fn write_disk(&self, disk: usize, offset: usize, byte: u8, bytes: usize) {
        let change = if byte == 0 { DiskChange::Zero(bytes as u64) } else { DiskChange::Data(vec![byte; bytes]) };
        self.machine.write_disk(disk, offset, change);
    }

    fn disk(&self, disk: usize) -> Vec<u8> {
        self.machine.disk(disk)
    }

    fn is_running(&self) -> bool {
        self.machine.is_running()
    }

    fn is_there(&self) -> bool {
        !self.machine.fence().ended()
    }

    fn traces(&self) -> Vec<String> {
        if self.machine.is_touched() { vec!["a gate or a tracker".to_owned()] } else { Vec::new() }
    }

    fn emit(&self) {
        for _ in 0..3 {
            *self.frames.borrow_mut() += 1;
            self.machine.emit(self.frames.borrow().to_le_bytes().to_vec());
        }
    }

    fn heard(&self) -> u64 {
        self.wire.borrow_mut().extend(self.machine.take_wire());
        self.wire.borrow().len() as u64
    }

    fn heard_in_order(&self) -> bool {
        (1_u64..).zip(self.wire.borrow().iter()).all(|(number, frame)| frame == &number.to_le_bytes())
    }

    fn fail_next(&self, step: Step) -> bool {
        self.machine.fail_once(match step {
            Step::Pause => Fault::Pause,
            Step::Resume => Fault::Resume,
            Step::Harvest => Fault::Harvest,
            Step::Device => Fault::Device,
            Step::Copy => Fault::Copy,
            Step::DiskWrite => Fault::DiskWrite,
        });
        true
    }

    fn twins(&self) -> Box<dyn TwinHost> {
        Box::new(self.host.clone())
    }

    fn twin_traces(&self) -> Vec<String> {
        self.host.twins()
    }
}

/// Protects `machine` for some epochs, then kills it, and gives the twin that goes on.
fn fail_over(machine: &SimMachine, host: &SimHost, epochs: u64) -> Box<dyn Twin> {
    let mut guest = attach(machine).expect("nobody is attached");
    let mut twin = host.prepare("twin", guest.recipe(), guest.layout(), &[]).expect("a free name");
    guest.pause().expect("it works");
    guest.arm().expect("it works");
    guest.hold_output(1).expect("it works");
    let all: Vec<u64> = (0..guest.layout().pages()).collect();
    let mut capture = Capture::default();
    let mut bytes = Vec::new();
    guest.read_pages(&all, &mut bytes).expect("it works");
    for (&page, bytes) in all.iter().zip(bytes.chunks(PAGE_SIZE)) {
        twin.memory().write(page, 0, bytes);
    }
    for epoch in 1..=epochs {
        guest.resume().expect("it works");
        machine.run(50);
        guest.pause().expect("it works");
        guest.gate().seal(epoch + 1);
        guest.capture(&mut capture, &mut PauseParts::default()).expect("it works");
        for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks(PAGE_SIZE)) {
            twin.memory().write(page, 0, bytes);
        }
        guest.gate().release(epoch);
    }
    guest.resume().expect("it works");
    machine.run(50);
    guest.fence().fence().expect("it works");
    twin.activate(&capture.device).expect("it goes on");
    twin
}

#[test]
fn the_same_seed_lives_the_same_life_and_another_seed_another() {
    let life = |seed| {
        let machine = machine(seed);
        machine.run(1000);
        (machine.take_wire(), machine.memory())
    };
    assert!(life(3) == life(3));
    assert!(life(3).0 != life(4).0);
}

#[test]
fn a_twin_emits_what_the_primary_would_have_emitted() {
    let alone = machine(7);
    alone.run(20 * 50 + 300);
    let (protected, host) = (machine(7), SimHost::new());
    let twin = fail_over(&protected, &host, 20);
    let survivor = host.machine("twin").expect("it was activated");
    assert_eq!(survivor.steps(), 20 * 50, "it goes on where the last capture stood");
    survivor.run(300);
    assert!(survivor.memory() == alone.memory());
    let mut heard = protected.take_wire();
    assert!(!heard.is_empty());
    let after = survivor.take_wire();
    assert_eq!(after[0], ANNOUNCEMENT);
    heard.extend_from_slice(&after[1..]);
    assert!(heard == alone.take_wire(), "the world must not notice the failover");
    twin.destroy().expect("it works");
}

#[test]
fn a_twin_with_one_wrong_byte_is_found_out_by_its_frames() {
    let (one, other) = (machine(7), machine(7));
    other.write(40, 0, &[1; PAGE_SIZE]);
    one.run(3000);
    other.run(3000);
    assert!(one.take_wire() != other.take_wire());
}

#[test]
fn a_twin_that_dies_while_loading_is_launched_again_so_many_times() {
    let (primary, host) = (machine(1), SimHost::new());
    let guest = attach(&primary).expect("nobody is attached");
    let mut capture = Capture::default();
    let mut guest: Box<dyn Guest> = Box::new(guest);
    guest.pause().expect("it works");
    guest.arm().expect("it works");
    guest.capture(&mut capture, &mut PauseParts::default()).expect("it works");
    let mut twin = host.prepare("twin", guest.recipe(), guest.layout(), &[]).expect("a free name");
    host.fail(TwinFault::DiesLoading, MAX_RELAUNCHES + 1);
    twin.activate(&capture.device).expect_err("it died each time");
    host.fail(TwinFault::DiesLoading, MAX_RELAUNCHES);
    let activation = twin.activate(&capture.device).expect("it ran at last");
    assert_eq!(activation.relaunched, MAX_RELAUNCHES);
    assert!(twin.release().is_ok());
}

#[test]
fn what_happens_to_a_guest_is_told_once() {
    let machine = machine(1);
    let mut guest = attach(&machine).expect("nobody is attached");
    machine.raise(GuestEvent::Reset);
    machine.raise(GuestEvent::Died { how: "killed".to_owned() });
    assert_eq!(guest.events(), [GuestEvent::Reset, GuestEvent::Died { how: "killed".to_owned() }]);
    assert_eq!(guest.events(), []);
    assert!(guest.fence().ended());
}

#[test]
#[should_panic(expected = "a harvest of a guest that was not paused")]
fn harvesting_a_running_guest_is_a_bug() {
    let machine = machine(1);
    let mut guest = attach(&machine).expect("nobody is attached");
    let mut dirty = vmm_hooks::layout::PageSet::empty(guest.layout().pages());
    let _ = guest.harvest(&mut dirty);
}
