//! Orders of the microVM: what tests and benchmarks let the guest do.

use alloc::vec;

use crate::abi::{self, order, port};
use crate::disk::Disk;
use crate::machine::{exit, fill, inp, out};
use crate::serve::Server;
use crate::work;

/// Carries out the next order, if there is one.
pub fn turn(server: Option<&mut Server>, disks: &mut [Disk]) -> bool {
    let next = || inp(port::ORDER);
    let kind = next();
    match kind {
        0 => return false,
        order::FILL => {
            let page = next();
            fill(u64::from(page) * 4096, next() as u8);
        }
        order::EMIT => server.expect("an order to emit needs a network").emit(next()),
        order::WRITE => {
            let (disk, first, sectors, byte) = (next(), next(), next(), next());
            disks[disk as usize].write(first as usize, &vec![byte as u8; sectors as usize * abi::SECTOR]);
        }
        order::WORK => {
            let cpu = next();
            let (first, pages, pattern, rate) = (next(), next(), next(), next());
            work::begin(cpu.into(), first.into(), pages.into(), pattern.into(), rate.into());
        }
        order::EXIT => exit(next()),
        other => panic!("an unknown order: {other}"),
    }
    out(port::DONE, kind);
    true
}
