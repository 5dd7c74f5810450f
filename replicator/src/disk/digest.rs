//! Comparing a disk with what is left of it on the standby, so that only what differs is copied again.
//!
//! Promise: two blocks with the same [`Digest`] are the same (SHA-256), and what was hashed is what the disk holds, as far as the
//! system lets its cache be dropped: after a failed sync the cache may show more than that.

use std::ops::Range;
use std::sync::Arc;

use ring::digest::{SHA256, digest};

use super::error::DiskError;
use super::mark::State;
use super::store::{DiskStore, locked};

/// Bytes of a block. The last one of a disk may be shorter.
pub const DIGEST_BLOCK: u64 = 64 << 10;
/// Most blocks that are asked for at once: 256 MiB of a disk, and 128 KiB of digests.
pub const MAX_DIGESTS: u64 = 4096;
/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 32;

const _: () = assert!(MAX_DIGESTS * DIGEST_BYTES as u64 <= 1 << 20, "an answer fits into a control message");

/// What a block is compared by.
pub type Digest = [u8; DIGEST_BYTES];

/// The digest of a block.
#[must_use]
pub fn digest_of(block: &[u8]) -> Digest {
    digest(&SHA256, block).as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

/// How many blocks a disk of so many bytes has.
#[must_use]
pub const fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(DIGEST_BLOCK)
}

impl DiskStore {
    /// The digests of some blocks of a disk, before the first copy. Takes long: for a thread that may wait. What is written
    /// meanwhile to those blocks may or may not be in them.
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`] after the first copy, or for blocks that the disk has not, or more than [`MAX_DIGESTS`]; else a
    /// latched one.
    pub fn digests(&self, disk: u32, blocks: Range<u64>) -> Result<Vec<Digest>, DiskError> {
        let spec = usize::try_from(disk).ok().and_then(|place| Some((place, &self.disks.get(place)?.0)));
        let fits = |bytes| {
            blocks.start <= blocks.end && blocks.end <= blocks_of(bytes) && blocks.end - blocks.start <= MAX_DIGESTS
        };
        let Some((place, spec)) = spec.filter(|(_, spec)| fits(spec.bytes)) else {
            return Err(DiskError::OutOfTurn { what: format!("disk {disk} has no blocks {blocks:?}, or too many") });
        };
        let (file, path) = {
            let mut side = locked(&self.side);
            self.require(State::Syncing)?;
            side.images.sync().map_err(|error| self.latch(error))?;
            let (file, path) = side.images.image(place);
            (file, path.to_path_buf())
        };
        file.uncache();
        let mut block = vec![0; usize::try_from(DIGEST_BLOCK).expect("a block is small")];
        blocks
            .map(|number| {
                let at = number * DIGEST_BLOCK;
                let length = usize::try_from((spec.bytes - at).min(DIGEST_BLOCK)).expect("a block is small");
                file.read_at(at, &mut block[..length])
                    .map_err(|error| self.latch(DiskError::io("read", &path, "it is not whole yet", error)))?;
                Ok(digest_of(&block[..length]))
            })
            .collect()
    }

    /// The same on a thread that may wait.
    ///
    /// # Errors
    /// As [`DiskStore::digests`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn digests_aside(self: Arc<Self>, disk: u32, blocks: Range<u64>) -> Result<Vec<Digest>, DiskError> {
        tokio::task::spawn_blocking(move || self.digests(disk, blocks)).await.expect("hashing does not panic")
    }
}
