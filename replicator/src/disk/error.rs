//! What can go wrong with a standby's disks, in the words that its operator reads: what happened, what is safe, what to do.

use std::io;
use std::path::PathBuf;

/// Why a standby's disks cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file or directory cannot be used. Latches.
    #[error("cannot {what} {path}; {safe}; mend the disk, then protect the VM again", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What can be relied upon.
        safe: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The file system is full, or a quota is. Latches.
    #[error("no space left to {what} {path}; {safe}; free some space, then protect the VM again", path = path.display())]
    NoSpace {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What can be relied upon.
        safe: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// An earlier error has latched.
    #[error("nothing more is taken since an earlier error: {first}")]
    Latched {
        /// The first error.
        first: String,
    },
    /// The images belong to a VM that runs, or ran, from them.
    #[error(
        "the disks of {path} belong to the survivor of generation {generation} and are not a standby's any more; \
         they are untouched; end or move that VM before its disks are given up by a reset", path = path.display()
    )]
    Activated {
        /// The journal.
        path: PathBuf,
        /// Of the grant.
        generation: u64,
    },
    /// There is a journal already.
    #[error("there is a copy already: {path}; it is untouched; recover it, or give it up by a reset", path = path.display())]
    Exists {
        /// The journal.
        path: PathBuf,
    },
    /// A file is not there.
    #[error("{path} is missing; there is no copy that could be used; protect the VM again", path = path.display())]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// Somebody else has it open.
    #[error("{path} is in use by another process; it is untouched; end that one first", path = path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// A file is not what was left there.
    #[error("{path} is not as it was left ({what}); the copy is not used; protect the VM again from its primary", path = path.display())]
    Strange {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// What was asked does not fit the state; nothing was changed.
    #[error("{what}; nothing was changed")]
    OutOfTurn {
        /// What does not fit.
        what: String,
    },
    /// A write that does not fit its disk: the peer's fault. Nothing was changed.
    #[error("a write of {bytes} bytes at {offset} of disk {disk} is refused ({what}); nothing was changed")]
    BadWrite {
        /// The disk's place.
        disk: u32,
        /// In bytes.
        offset: u64,
        /// In bytes.
        bytes: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The journal is full of epochs that are not committed; nothing was changed.
    #[error(
        "the journal of {capacity} bytes is full of epochs that are not committed, {needed} more do not fit; nothing was \
         changed; commit, then try again"
    )]
    Full {
        /// Bytes that the epoch needs.
        needed: u64,
        /// Bytes of the journal.
        capacity: u64,
    },
    /// An epoch that does not fit into the journal, even an empty one; nothing was changed.
    #[error(
        "an epoch takes {needed} bytes and the journal has {capacity}; nothing was changed; make the journal bigger or \
         the epochs shorter"
    )]
    TooLarge {
        /// Bytes that the epoch needs.
        needed: u64,
        /// Bytes of the journal.
        capacity: u64,
    },
}

impl DiskError {
    /// Makes the error of a failed call.
    pub(super) fn io(what: &'static str, path: &std::path::Path, safe: &'static str, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { what, path, safe, source },
            _ => Self::Io { what, path, safe, source },
        }
    }
}
