//! The microVM with Debian's kernel in it: boots, is protected, killed, goes on, and switches itself off.
//!
//! These need a KVM that runs kernels at speed, which `UNDERSTUDY_KERNELS` says by naming the directory of the guest image; the nested lane
//! (docs/testing.md) makes such a host of an emulated one. Elsewhere they say `skipped: ` and why.

#[path = "../kvm_pilot/protect.rs"]
mod protect;

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vmm_hooks::guest::{Guest, GuestEvent};
use vmm_hooks::kvm::{Dirty, GateBounds, KvmGuest, KvmTwinHost, LinuxOptions, Machine, Spec, attach, host};

use protect::Protected;

/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(600);

/// KVM and the guest image, if a kernel can be run here.
fn means() -> Option<(Arc<Kvm>, PathBuf)> {
    let Some(image) = env::var_os("UNDERSTUDY_KERNELS") else {
        println!("skipped: UNDERSTUDY_KERNELS does not say that this host's KVM runs kernels");
        return None;
    };
    let image = PathBuf::from(image);
    assert!(image.join("vmlinuz").exists(), "{} is no guest image", image.display());
    Some((host().expect("KVM is here"), image))
}

fn boot(kvm: &Arc<Kvm>, image: &Path, cpus: u64, init: &str) -> Machine {
    let spec =
        Spec { name: "linux".to_owned(), memory: 192 << 20, cpus, net: None, disks: Vec::new(), dirty: Dirty::Bitmap };
    let options = LinuxOptions {
        kernel: image.join("vmlinuz"),
        initrd: Some(image.join("initrd.img")),
        cmdline: format!("console=ttyS0 mitigations=off nokaslr nowatchdog panic=-1 rdinit=/tick {init}"),
    };
    let machine = Machine::linux(kvm, spec, &options, None, GateBounds::default()).expect("this host can");
    watch(&machine);
    machine.resume().expect("it is new");
    machine
}

/// Prints what a guest prints, as it does.
fn watch(machine: &Machine) {
    let machine = machine.clone();
    std::thread::spawn(move || {
        let mut shown = 0;
        while !machine.fence().ended() {
            let serial = machine.serial();
            // All of it again after its beginning was let go of.
            let from = if serial.len() < shown { 0 } else { shown };
            shown = serial.rfind('\n').map_or(from, |end| (end + 1).max(from));
            print!("{}", serial.get(from..shown).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

/// Waits until the guest has printed `text`.
fn until(machine: &Machine, text: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !machine.serial().contains(text) {
        assert!(Instant::now() < deadline && !machine.is_over(), "the guest has not printed {text:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The last tick that a guest has printed; panics if its memory was not what it had written.
fn ticks(machine: &Machine) -> u64 {
    let serial = machine.serial();
    assert!(!serial.contains("CORRUPT"), "{serial}");
    let whole = serial.rfind('\n').map_or("", |end| &serial[..end]);
    let tick = |line: &str| line.strip_prefix("TICK ")?.split(' ').next()?.parse().ok();
    whole.lines().rev().find_map(tick).unwrap_or(0)
}

/// Waits until a guest has ended; what its protector is told.
fn end(machine: &Machine, guest: &mut KvmGuest) -> Vec<GuestEvent> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let events = guest.events();
        if !events.is_empty() {
            machine.fence().fence().expect("its threads end");
            return events;
        }
        assert!(Instant::now() < deadline, "the guest does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_kernel_on_two_processors_is_killed_and_goes_on_until_it_switches_itself_off() {
    let Some((kvm, image)) = means() else { return };
    let machine = boot(&kvm, &image, 2, "us.ticks=24");
    until(&machine, "PROCESSORS 2");
    until(&machine, "TICK 3 ");
    let host = KvmTwinHost::default();
    let mut protected = Protected::begin(&machine, &host, "twin", Vec::new());
    let begun = ticks(&machine);
    while ticks(&machine) < begun + 6 {
        protected.epoch(Duration::from_millis(100));
    }
    println!("{}", protected.figures());
    let killed = ticks(&machine);
    let (twin, epochs) = protected.kill();
    println!("killed at tick {killed} after {epochs} epochs");
    let survivor = host.machine("twin").expect("it was activated");
    watch(&survivor);
    let mut guest = attach(&survivor).expect("nobody is attached");
    assert_eq!(end(&survivor, &mut guest), [GuestEvent::Shutdown]);
    // It went on where it was, at most one epoch back, and found its memory as it had left it.
    let serial = survivor.serial();
    let first = serial.lines().find_map(|line| line.strip_prefix("TICK ")?.split(' ').next()?.parse::<u64>().ok());
    let first = first.unwrap_or_else(|| panic!("it never ticked again: {serial}"));
    assert!(first <= killed + 1 && first + 10 > killed, "killed at {killed}, went on at {first}");
    assert_eq!(ticks(&survivor), 24);
    twin.destroy().expect("it can be ended");
}

#[test]
fn a_kernel_that_resets_its_machine_is_off() {
    let Some((kvm, image)) = means() else { return };
    let machine = boot(&kvm, &image, 1, "us.ticks=1 us.reset");
    let mut guest = attach(&machine).expect("nobody is attached");
    assert_eq!(end(&machine, &mut guest), [GuestEvent::Shutdown]);
    assert_eq!(ticks(&machine), 1);
}
