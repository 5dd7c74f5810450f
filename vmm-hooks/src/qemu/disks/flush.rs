//! Keeps what the guest wrote on its way to the host's disk, so that a pause finds little to flush.
//!
//! QEMU's `stop` flushes every image, and the guest stands meanwhile: about 2 ms for each MiB that is not flushed yet, whether
//! it is in this host's page cache or in the disk's own. A thread of ours flushes the same image from outside while the
//! guest runs, as soon as [`FLUSH_AFTER`] were written. It changes nothing in the image and QEMU does not notice it.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::thread;

use super::log::WriteLog;
use super::seen_by;

/// Bytes written to all disks together after which they are flushed.
const FLUSH_AFTER: u64 = 1 << 20;

/// Flushes these images after writes that come to `log`, which is open, until it is closed.
pub(super) fn start(images: Vec<File>, log: &Arc<WriteLog>) {
    if images.is_empty() {
        return;
    }
    let (log, opening) = (Arc::clone(log), log.opening());
    let spawned = thread::Builder::new().name("disk-flush".to_owned()).spawn(move || {
        let mut flushed = 0;
        while let Some(written) = log.wait_written(opening, flushed + FLUSH_AFTER) {
            flushed = written;
            for image in &images {
                // What cannot be flushed is found out by whoever wrote it.
                let _ = image.sync_data();
            }
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot flush the guest's images from outside, so its pauses get longer as it writes");
    }
}

/// A handle of our own on a process's file. `None` if it cannot be had, which costs longer pauses alone.
pub(super) fn open(pid: u32, file: &str) -> Option<File> {
    let path = seen_by(pid, file);
    let metadata = std::fs::metadata(&path).ok()?;
    let plain = metadata.is_file() || metadata.file_type().is_block_device();
    plain.then(|| File::open(&path).ok())?
}
