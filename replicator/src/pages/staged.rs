//! A staged epoch: all of one stream, checked, ready to be applied any number of times.

use std::sync::Arc;

use vmm_hooks::disk::DiskWrite;
use vmm_hooks::guest::TwinMemory;
use vmm_hooks::layout::PAGE_SIZE;

use super::delta;
use super::frame::{StreamHead, StreamId};
use super::record::{self, Body};

/// A whole device state, shared between the epoch that carried it and the stager of the next one.
pub type DeviceState = Arc<Vec<u8>>;

/// One whole stream. Only a [`super::decode::Stager`] makes one, after it has checked everything: applying it cannot fail.
#[derive(Debug)]
pub struct StagedEpoch {
    pub(super) head: StreamHead,
    /// Records as in the wire form, LZ4 pages decompressed to raw ones.
    pub(super) records: Vec<u8>,
    pub(super) device: Option<DeviceState>,
    pub(super) disk: Vec<DiskWrite>,
    /// What the disk writes take in memory.
    pub(super) disk_bytes: usize,
    pub(super) pages: u64,
    pub(super) wire_bytes: u64,
}

impl StagedEpoch {
    /// Writes all pages of it. Applying again, from whatever point an earlier application stopped at, gives the same memory,
    /// as long as no later epoch was applied in between.
    ///
    /// # Panics
    /// If `memory` has not as many pages as the layout that the stream was staged for.
    pub fn apply(&self, memory: &dyn TwinMemory) {
        assert_eq!(memory.pages(), self.head.layout_pages, "an epoch applied to another layout's memory");
        let mut rest = self.records.as_slice();
        while !rest.is_empty() {
            let record = record::take(&mut rest).expect("checked when staged");
            match record.body {
                Body::Zero(run) => {
                    for page in record.page..record.page + u64::from(run) {
                        memory.zero(page);
                    }
                }
                Body::Delta(patch) => {
                    for (offset, bytes) in delta::runs(patch) {
                        memory.write(record.page, offset, bytes);
                    }
                }
                Body::Raw(bytes) => memory.write(record.page, 0, bytes),
                Body::Lz4(_) => unreachable!("decompressed when staged"),
            }
        }
    }

    /// Which stream it is.
    #[must_use]
    pub fn id(&self) -> &StreamId {
        &self.head.id
    }

    /// Its epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.head.id.epoch
    }

    /// The whole device state after this epoch; empty for a sync chunk, which carries none.
    #[must_use]
    pub fn device_state(&self) -> &[u8] {
        self.device.as_ref().map_or(&[], |device| device.as_slice())
    }

    /// The same, to give to the stager of the next stream; `None` for a sync chunk.
    #[must_use]
    pub fn device(&self) -> Option<DeviceState> {
        self.device.clone()
    }

    /// The disk writes of this epoch, in the order of completion.
    #[must_use]
    pub fn disk(&self) -> &[DiskWrite] {
        &self.disk
    }

    /// How many pages it writes.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes that it takes in memory, bounded by the stager's limit.
    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        (self.records.len() + self.disk_bytes + self.device.as_ref().map_or(0, |device| device.len())) as u64
    }

    /// Bytes of its stream, trailer included.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Gives the memory back for the next [`super::decode::Stager::reusing`].
    #[must_use]
    pub fn into_arena(self) -> Arena {
        Arena(self.records)
    }
}

/// Memory of an epoch that was applied, to be used again.
#[derive(Debug, Default)]
pub struct Arena(pub(super) Vec<u8>);

/// Blocks of a device state, the last one padded.
pub(super) fn padded(length: usize) -> usize {
    length.next_multiple_of(PAGE_SIZE)
}
