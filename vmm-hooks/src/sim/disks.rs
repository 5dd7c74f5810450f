//! The simulated machine's disks, and the mirror that somebody attached may have begun.
//!
//! The first copy is made piece by piece as it is taken, so that a guest's writes fall into the middle of it.

use std::collections::VecDeque;

use crate::disk::{DiskChange, DiskWrite, MirrorProgress};

/// Bytes of one piece of the first copy.
const PIECE: usize = 4096;

/// All disks of one machine.
#[derive(Debug, Default)]
pub(super) struct Disks {
    pub(super) images: Vec<Vec<u8>>,
    mirror: Option<Mirror>,
}

#[derive(Debug)]
struct Mirror {
    /// Disk and offset of the pieces that are still to be copied.
    left: VecDeque<(u32, usize)>,
    pieces: usize,
    log: VecDeque<DiskWrite>,
    broken: bool,
}

impl Disks {
    /// Empty ones of these sizes.
    pub(super) fn new(bytes: &[usize]) -> Self {
        Self { images: bytes.iter().map(|&bytes| vec![0; bytes]).collect(), mirror: None }
    }

    /// The guest writes.
    pub(super) fn write(&mut self, disk: usize, offset: usize, change: DiskChange) {
        let number = u32::try_from(disk).expect("few disks");
        let write = DiskWrite { disk: number, offset: offset as u64, change };
        let end = offset + usize::try_from(write.bytes()).expect("a simulated disk is small");
        let range = &mut self.images[disk][offset..end];
        match &write.change {
            DiskChange::Data(data) => range.copy_from_slice(data),
            DiskChange::Zero(_) => range.fill(0),
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.log.push_back(write);
        }
    }

    pub(super) fn mirrored(&self) -> bool {
        self.mirror.is_some()
    }

    pub(super) fn start(&mut self) {
        if self.mirrored() || self.images.is_empty() {
            return;
        }
        let left: VecDeque<_> = (0..)
            .zip(&self.images)
            .flat_map(|(disk, image)| (0..image.len()).step_by(PIECE).map(move |offset| (disk, offset)))
            .collect();
        self.mirror = Some(Mirror { pieces: left.len(), left, log: VecDeque::new(), broken: false });
    }

    pub(super) fn stop(&mut self) {
        self.mirror = None;
    }

    /// A write may be missing from now on.
    pub(super) fn break_mirror(&mut self) {
        if let Some(mirror) = &mut self.mirror {
            mirror.broken = true;
            mirror.log.clear();
        }
    }

    /// `None` if the mirror is broken or was never begun.
    pub(super) fn progress(&self) -> Option<MirrorProgress> {
        if self.images.is_empty() {
            return Some(MirrorProgress { ready: true, ..MirrorProgress::default() });
        }
        let mirror = self.mirror.as_ref().filter(|mirror| !mirror.broken)?;
        let bytes = |pieces: usize| (pieces * PIECE) as u64;
        let done = bytes(mirror.pieces - mirror.left.len());
        Some(MirrorProgress { done, total: bytes(mirror.pieces), ready: mirror.left.is_empty() })
    }

    /// Writes of at most `bytes` of data, but one at least; what is still to be copied comes after what is written.
    pub(super) fn take(&mut self, into: &mut Vec<DiskWrite>, bytes: usize) {
        let Some(mirror) = self.mirror.as_mut().filter(|mirror| !mirror.broken) else { return };
        if let Some((disk, offset)) = mirror.left.pop_front() {
            let image = &self.images[usize::try_from(disk).expect("few disks")];
            let piece = &image[offset..image.len().min(offset + PIECE)];
            let change = if piece.iter().all(|&byte| byte == 0) {
                DiskChange::Zero(piece.len() as u64)
            } else {
                DiskChange::Data(piece.to_vec())
            };
            mirror.log.push_back(DiskWrite { disk, offset: offset as u64, change });
        }
        let mut taken = 0;
        while let Some(write) = mirror.log.front() {
            let data = match &write.change {
                DiskChange::Data(data) => data.len(),
                DiskChange::Zero(_) => 1,
            };
            if taken > 0 && taken + data > bytes {
                break;
            }
            taken += data;
            into.extend(mirror.log.pop_front());
        }
    }

    /// Everything that was written, for a capture. False if it is not whole.
    pub(super) fn capture(&mut self, into: &mut Vec<DiskWrite>) -> bool {
        into.clear();
        let Some(mirror) = &mut self.mirror else { return true };
        if mirror.broken || !mirror.left.is_empty() {
            return false;
        }
        into.extend(mirror.log.drain(..));
        true
    }

    pub(super) fn put_back(&mut self, writes: Vec<DiskWrite>) {
        if let Some(mirror) = self.mirror.as_mut().filter(|mirror| !mirror.broken) {
            writes.into_iter().rev().for_each(|write| mirror.log.push_front(write));
        }
    }
}
