//! What the pilot and its microVM agree on: addresses, ports, orders, and what a worker leaves in memory.
//!
//! This file is part of both programs. Numbers are little-endian; addresses are guest-physical, and the pilot's own.

/// Where the image is linked to.
pub const IMAGE: u64 = 0x10_0000;
/// The first byte that the image does not use.
pub const IMAGE_END: u64 = 0x80_0000;
/// The pilot's heap.
pub const HEAP: u64 = IMAGE_END;
/// The heap's length.
pub const HEAP_BYTES: u64 = 0x200_0000;
/// From here on memory is written by workers and by orders alone.
pub const FREE: u64 = HEAP + HEAP_BYTES;
/// Least memory of a pilot.
pub const MEMORY_MIN: u64 = FREE + 0x80_0000;

/// One page of words, written by the microVM before the start: see [`param`].
pub const PARAMS: u64 = 0x7000;
/// One page a vCPU: see [`worker`].
pub const WORKERS: u64 = 0x1_0000;
/// Most vCPUs of a pilot.
pub const CPUS_MAX: u64 = 8;

/// Bytes of a virtio-mmio device.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Where the first of them is.
pub const MMIO: u64 = 0xd000_0000;

/// Words of the page at [`PARAMS`].
pub mod param {
    /// [`MAGIC_VALUE`].
    pub const MAGIC: u64 = 0;
    /// What [`MAGIC`] holds.
    pub const MAGIC_VALUE: u64 = 0x746f_6c69_7075_7375;
    /// How many vCPUs there are.
    pub const CPUS: u64 = 1;
    /// Where the network card is; 0 without one.
    pub const NET: u64 = 2;
    /// Where the disk with the append-only log is; 0 without one.
    pub const LOG: u64 = 3;
    /// How many disks there are, at [`DISK`] and after.
    pub const DISKS: u64 = 4;
    /// The network address, big-endian in the low 32 bits.
    pub const ADDRESS: u64 = 5;
    /// Bits of the network's prefix.
    pub const PREFIX: u64 = 6;
    /// The gateway, as the address; 0 without one.
    pub const GATEWAY: u64 = 7;
    /// A random number.
    pub const SEED: u64 = 8;
    /// Where the first disk is, and so on.
    pub const DISK: u64 = 16;
}

/// Ports of 32 bits.
pub mod port {
    /// Out: waits so many microseconds at most, or until there is a frame or an order.
    pub const WAIT: u16 = 0x510;
    /// In: the next word of orders; 0 if there is none.
    pub const ORDER: u16 = 0x514;
    /// Out: the order is carried out.
    pub const DONE: u16 = 0x518;
    /// In: the low half of the time in nanoseconds that the machine has run; keeps the high half for [`CLOCK_HIGH`].
    pub const CLOCK: u16 = 0x51c;
    /// In: the high half.
    pub const CLOCK_HIGH: u16 = 0x520;
    /// Out: the end; 0 is a shutdown on purpose, all else a failure.
    pub const EXIT: u16 = 0x524;
    /// Out, 8 bits: the serial port.
    pub const SERIAL: u16 = 0x3f8;
}

/// First words of orders, and what follows.
pub mod order {
    /// Page, byte: fills the page.
    pub const FILL: u32 = 1;
    /// Count: emits so many numbered frames of the type [`super::FRAME_TYPE`].
    pub const EMIT: u32 = 2;
    /// Disk, first sector, sectors, byte: writes to the disk, and waits until it is done.
    pub const WRITE: u32 = 3;
    /// CPU, first page, pages, pattern, steps in a millisecond (0: as many as it can): lets a worker begin anew.
    pub const WORK: u32 = 4;
    /// Code: ends as [`super::port::EXIT`] does.
    pub const EXIT: u32 = 5;
}

/// The Ethernet type of frames that are emitted by order; their payload is a number of 64 bits, big-endian, from 1 on.
pub const FRAME_TYPE: u16 = 0x88b5;

/// Words of a worker's page.
pub mod worker {
    /// 1 while it works.
    pub const RUN: u64 = 0;
    /// The first page that it writes.
    pub const FIRST: u64 = 1;
    /// How many pages it writes.
    pub const PAGES: u64 = 2;
    /// See [`super::page_of`].
    pub const PATTERN: u64 = 3;
    /// Steps in a millisecond.
    pub const RATE: u64 = 4;
    /// The step that has begun.
    pub const BEGUN: u64 = 5;
    /// The last step that is done.
    pub const DONE: u64 = 6;
    /// What the next worker's [`DONE`] was in this step.
    pub const SEEN: u64 = 7;
}

/// The pattern that writes one page after the other.
pub const SEQUENTIAL: u64 = 0;
/// The pattern that writes pages all over the place.
pub const SCATTERED: u64 = 1;

/// Which of `pages` pages is written in `step`, which begins with 1.
#[must_use]
pub fn page_of(pattern: u64, step: u64, pages: u64) -> u64 {
    if pattern == SEQUENTIAL { (step - 1) % pages } else { mix(step) % pages }
}

/// What the last word of a page holds that was last written in `step`; the first word holds the step.
#[must_use]
pub fn seal_of(step: u64) -> u64 {
    mix(step)
}

/// The finaliser of splitmix64.
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// First bytes of a record of the append-only log.
pub const RECORD_MAGIC: u32 = 0x474f_4c50;
/// Bytes before a record's text: magic, length of the text (32 bits each), number from 1 on, [`sum`] of the text (64 bits each).
pub const RECORD_HEADER: usize = 24;
/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The checksum of a record's text (FNV-1a).
#[must_use]
pub fn sum(text: &[u8]) -> u64 {
    text.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
