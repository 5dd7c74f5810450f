//! A hold on a disk image that keeps every stock QEMU from opening it for writing, while whoever holds it lives.
//!
//! QEMU guards images by locks of open file descriptions (`block/file-posix.c`, since 2.10, on by default): byte 100 + N is locked, shared, by
//! whoever has permission N on the image, byte 200 + N by whoever does not let others have it; each then looks whether somebody
//! stands against it. A hold has no permission and lets nobody write or resize: QEMU says `Failed to get "write" lock` and ends. Reading is
//! let be, by anybody. The locks are advisory: `file.locking=off` passes them by, and other programs do not look.
//!
//! Promise: what is open for writing is never held, and nothing that has it open is disturbed; a hold that was refused leaves no lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};

/// QEMU's first byte of those who have a permission.
const HAVE: libc::off_t = 100;
/// Its first byte of those who keep others from having it.
const KEEP: libc::off_t = 200;
/// Its permissions to write and to resize, as bits of `BLK_PERM_*`.
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// Why an image is not held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// A process has it open for writing, by QEMU's locks.
    #[error("{0} is in use: a process has it open for writing")]
    InUse(PathBuf),
    /// It is neither a file nor a block device.
    #[error("{0} is no disk image")]
    NoImage(PathBuf),
    /// It cannot be opened or locked.
    #[error("{path} cannot be held")]
    Io {
        /// The image.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// See the module. Dropping it lets the image go.
#[derive(Debug)]
pub struct ImageHold {
    file: File,
    path: PathBuf,
}

impl ImageHold {
    /// Holds the image at `path`.
    ///
    /// # Errors
    /// [`HoldError`].
    pub fn take(path: &Path) -> Result<Self, HoldError> {
        let failed = |source: io::Error| HoldError::Io { path: path.into(), source };
        // Something else by that name, a pipe for example, would be waited for.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(HoldError::NoImage(path.into()));
        }
        // QEMU's own order: first the lock, then the look, so that of two that come at once at least one sees the other.
        for permission in [WRITE, RESIZE] {
            let lock = byte(KEEP + permission, libc::F_RDLCK);
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).map_err(|errno| failed(errno.into()))?;
        }
        for permission in [WRITE, RESIZE] {
            let mut other = byte(HAVE + permission, libc::F_WRLCK);
            fcntl(&file, FcntlArg::F_OFD_GETLK(&mut other)).map_err(|errno| failed(errno.into()))?;
            if libc::c_int::from(other.l_type) != libc::F_UNLCK {
                return Err(HoldError::InUse(path.into()));
            }
        }
        Ok(Self { file, path: path.into() })
    }

    /// Whether its path still leads to what is held: an image that was removed need not be held.
    #[must_use]
    pub fn is_current(&self) -> bool {
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(held), Ok(there)) => (held.dev(), held.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }
}

/// One byte's lock of that kind.
fn byte(at: libc::off_t, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).expect("kinds of locks are small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("0"),
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a QEMU that writes holds it.
    fn writer(path: &Path) -> File {
        let file = OpenOptions::new().read(true).write(true).open(path).expect("opens");
        fcntl(&file, FcntlArg::F_OFD_SETLK(&byte(HAVE + WRITE, libc::F_RDLCK))).expect("locks");
        file
    }

    /// Whether a QEMU may write beside what is there: what it looks at after it locked.
    fn may_write(path: &Path) -> bool {
        let file = File::open(path).expect("opens");
        let mut other = byte(KEEP + WRITE, libc::F_WRLCK);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut other)).expect("asks");
        libc::c_int::from(other.l_type) == libc::F_UNLCK
    }

    #[test]
    fn an_image_is_held_until_it_is_let_go_and_not_while_it_is_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, [0; 4096]).expect("room");
        let used = writer(&path);
        assert!(matches!(ImageHold::take(&path), Err(HoldError::InUse(_))));
        assert!(may_write(&path), "a hold that was refused leaves nothing");
        drop(used);
        let hold = ImageHold::take(&path).expect("nobody has it");
        let second = ImageHold::take(&path).expect("two holds are no contradiction");
        assert!(!may_write(&path) && hold.is_current());
        drop(hold);
        assert!(!may_write(&path));
        drop(second);
        assert!(may_write(&path));
        let hold = ImageHold::take(&path).expect("again");
        std::fs::rename(dir.path().join("disk.raw"), dir.path().join("moved")).expect("moves");
        assert!(!hold.is_current());
        assert!(matches!(ImageHold::take(&path), Err(HoldError::Io { .. })));
        assert!(matches!(ImageHold::take(dir.path()), Err(HoldError::NoImage(_))));
    }
}
