//! What a back end tells of a guest's disks: which there are, and what was written to them.
//!
//! Disks are named by their place in [`crate::guest::Recipe::disks`], which does not change while a guest is attached.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Most disks of one guest.
pub const MAX_DISKS: usize = 32;

/// A disk that is replicated with its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its name in the guest's hypervisor, for people and for file names.
    pub name: String,
    /// Its size in bytes, as the guest sees it.
    pub bytes: u64,
}

/// The file, or the block device, that a disk is in on its host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskImage {
    /// Its path; empty if it is not known.
    pub path: PathBuf,
    /// How the disk is in it: `raw`, byte for byte, or `qcow2`.
    pub format: String,
}

/// One write of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWrite {
    /// Which disk, by its place in the recipe.
    pub disk: u32,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// What was written. The whole write lies inside the disk, and is not empty.
    pub change: DiskChange,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskChange {
    /// These bytes.
    Data(Vec<u8>),
    /// So many zeroes, or a discard, which reads as zeroes afterwards. The image may have a hole there.
    Zero(u64),
}

impl DiskWrite {
    /// How many bytes of the disk it covers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.change {
            DiskChange::Data(data) => data.len() as u64,
            DiskChange::Zero(bytes) => *bytes,
        }
    }
}

/// How far the first copy of all disks is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MirrorProgress {
    /// Bytes copied, over all disks.
    pub done: u64,
    /// Bytes to copy, over all disks. May grow while the guest writes.
    pub total: u64,
    /// Whether every disk's copy is complete: from now on each write goes to both.
    pub ready: bool,
}
