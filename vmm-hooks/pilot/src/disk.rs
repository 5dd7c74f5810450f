//! Disks, and the append-only log on one of them.

use alloc::vec::Vec;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::mmio::MmioTransport;

use crate::abi::{RECORD_HEADER, RECORD_MAGIC, SECTOR, sum};
use crate::machine::{Hal, virtio};

/// Most sectors of one request.
const REQUEST_MAX: usize = 128;

/// One disk.
pub struct Disk(VirtIOBlk<Hal, MmioTransport<'static>>);

impl Disk {
    /// The disk at `address`.
    pub fn new(address: u64) -> Self {
        Self(VirtIOBlk::new(virtio(address)).expect("a disk"))
    }

    /// Writes whole sectors, and returns when the device says that they are written.
    pub fn write(&mut self, sector: usize, bytes: &[u8]) {
        for (index, bytes) in bytes.chunks(REQUEST_MAX * SECTOR).enumerate() {
            self.0.write_blocks(sector + index * REQUEST_MAX, bytes).expect("the disk takes it");
        }
    }
}

/// The append-only log: records one after the other from sector 0 on, and zeroes after them.
pub struct Log {
    disk: Disk,
    /// Number of the last record.
    last: u64,
    /// The sector that `tail` begins in.
    sector: usize,
    /// What is to be written: the start of a sector that was written before, and records after it.
    tail: Vec<u8>,
    fresh: bool,
}

impl Log {
    /// An empty log.
    pub fn new(disk: Disk) -> Self {
        Self { disk, last: 0, sector: 0, tail: Vec::new(), fresh: false }
    }

    /// Appends a record; false if the disk is full. It is on the disk after [`Log::flush`].
    pub fn append(&mut self, text: &[u8]) -> bool {
        let end = self.tail.len() + RECORD_HEADER + text.len();
        if self.sector as u64 + end.div_ceil(SECTOR) as u64 > self.disk.0.capacity() {
            return false;
        }
        self.last += 1;
        let length = u32::try_from(text.len()).expect("a text is short");
        self.tail.extend_from_slice(&RECORD_MAGIC.to_le_bytes());
        self.tail.extend_from_slice(&length.to_le_bytes());
        self.tail.extend_from_slice(&self.last.to_le_bytes());
        self.tail.extend_from_slice(&sum(text).to_le_bytes());
        self.tail.extend_from_slice(text);
        self.fresh = true;
        true
    }

    /// Writes what was appended.
    pub fn flush(&mut self) {
        if !core::mem::take(&mut self.fresh) {
            return;
        }
        let used = self.tail.len();
        self.tail.resize(used.next_multiple_of(SECTOR), 0);
        self.disk.write(self.sector, &self.tail);
        let whole = used / SECTOR;
        self.sector += whole;
        self.tail.truncate(used);
        self.tail.drain(..whole * SECTOR);
    }
}
