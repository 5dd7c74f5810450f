//! The pilot: a guest without an operating system, small enough to be understood and busy enough to show every fault of its host.
//!
//! It runs wholly at CPL 3, so that it runs natively also where a software KVM emulates everything else. The first vCPU answers a
//! subset of RESP over TCP, logs every change to its disk before it answers, carries out orders of the microVM, and waits by a
//! port when it has nothing to do; every vCPU writes pages when it is ordered to (see [`work`]). There are no interrupts.
#![no_std]
#![no_main]

extern crate alloc;

#[allow(dead_code, reason = "the other half is for the machine, which is built with the same file")]
mod abi;
mod card;
mod disk;
mod machine;
mod orders;
mod resp;
mod serve;
mod store;
mod work;

use core::fmt::Write;

use machine::{Serial, out, param};

/// Longest wait of a vCPU with nothing to do, in microseconds: so long that a wake-up that is lost is found out, and not made good by a timer.
const IDLE_MAX: u32 = 600_000_000;

/// The life of the first vCPU.
fn first(cpus: u64) -> ! {
    assert_eq!(param(abi::param::MAGIC), abi::param::MAGIC_VALUE, "no parameters");
    let mut disks: alloc::vec::Vec<disk::Disk> =
        (0..param(abi::param::DISKS)).map(|index| disk::Disk::new(param(abi::param::DISK + index))).collect();
    let log = param(abi::param::LOG);
    let mut log = (log != 0).then(|| disk::Log::new(disk::Disk::new(log)));
    let net = param(abi::param::NET);
    let mut server = (net != 0).then(|| serve::Server::new(net));
    let _ = writeln!(
        Serial,
        "pilot: up, {cpus} vCPUs, {} disks, network {}, log {}",
        disks.len(),
        server.is_some(),
        log.is_some()
    );
    loop {
        let mut busy = false;
        let mut wait = IDLE_MAX;
        if let Some(server) = &mut server {
            let (worked, next) = server.turn(log.as_mut());
            busy |= worked;
            wait = wait.min(next);
        }
        busy |= orders::turn(server.as_mut(), &mut disks);
        match work::turn(0, cpus) {
            work::Next::Now => busy = true,
            work::Next::In(microseconds) => wait = wait.min(microseconds),
        }
        if !busy {
            out(abi::port::WAIT, wait);
        }
    }
}

/// The life of every other vCPU.
fn other(cpu: u64) -> ! {
    let cpus = param(abi::param::CPUS);
    loop {
        if let work::Next::In(microseconds) = work::turn(cpu, cpus) {
            out(abi::port::WAIT, microseconds.min(IDLE_MAX));
        }
    }
}
