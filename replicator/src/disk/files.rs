//! The file system as the disks of a standby use it: few calls, so that a model can stand in for it.
//!
//! Promises of an implementation: what [`File::sync`] returned for is on the disk, content and length; a name is there
//! after a crash once [`Files::sync_dir`] returned; a rename is whole or not at all. Nothing else survives for sure.

use std::fmt::Debug;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

/// Zeroes that are written at once where a file system makes no holes.
const ZEROES: usize = 256 << 10;

/// An open file. Calls may come from several threads.
pub trait File: Send + Sync + Debug {
    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// The system's; `UnexpectedEof` past the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The system's; any part may be written then.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `bytes` bytes from `offset` on read as zeroes, as a hole where the file system makes one. Keeps the length.
    ///
    /// # Errors
    /// The system's; any part may be done then.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Sets the length. What is added reads as zeroes and takes no room.
    ///
    /// # Errors
    /// The system's.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Sets the length of an empty file and takes the room for it, where the file system can.
    ///
    /// # Errors
    /// The system's.
    fn reserve(&self, bytes: u64) -> io::Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// The system's.
    fn bytes(&self) -> io::Result<u64>;

    /// Brings content and length onto the disk. After an error nobody knows what is there, not even if a later call succeeds.
    ///
    /// # Errors
    /// The system's.
    fn sync(&self) -> io::Result<()>;

    /// Takes the file for this process alone until it is dropped. False if another one has it.
    ///
    /// # Errors
    /// The system's.
    fn lock(&self) -> io::Result<bool>;
}

/// A file system.
pub trait Files: Send + Sync + Debug {
    /// Opens a file to read and write; `None` if it is not there. Each open file is told of a failed write by itself.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn File>>>;

    /// Makes an empty file, in place of what bears its name, for the owner alone.
    ///
    /// # Errors
    /// The system's.
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Renames a file, over another one if there is one.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Brings the names of a directory onto the disk.
    ///
    /// # Errors
    /// The system's.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// The file system of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostFiles;

impl Files for HostFiles {
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn File>>> {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Some(Box::new(HostFile(file)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        // Not emptied in place: somebody may have the old one open.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Box::new(HostFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        heartbeat::files::sync_dir(dir)
    }
}

#[derive(Debug)]
struct HostFile(std::fs::File);

/// Whether the file system only says that it knows no such call.
fn unsupported(error: rustix::io::Errno) -> bool {
    matches!(error, rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::NODEV)
}

impl File for HostFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match fallocate(&self.0, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Err(error) if unsupported(error) => write_zeroes(self, offset, bytes),
            done => done.map_err(io::Error::from),
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        match fallocate(&self.0, FallocateFlags::empty(), 0, bytes) {
            Err(error) if unsupported(error) => self.0.set_len(bytes),
            done => done.map_err(io::Error::from),
        }
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn lock(&self) -> io::Result<bool> {
        match self.0.try_lock() {
            Ok(()) => Ok(true),
            Err(std::fs::TryLockError::WouldBlock) => Ok(false),
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

fn write_zeroes(file: &dyn File, offset: u64, bytes: u64) -> io::Result<()> {
    let zeroes = vec![0; ZEROES];
    let mut done = 0;
    while done < bytes {
        let piece = usize::try_from(bytes - done).map_or(ZEROES, |left| left.min(ZEROES));
        file.write_at(offset + done, &zeroes[..piece])?;
        done += piece as u64;
    }
    Ok(())
}

/// The directory that a name stands in.
pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn holes_are_made_and_stay_and_a_lock_is_for_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("image");
        let file = HostFiles.create(&path).expect("creates");
        file.set_len(4 << 20).expect("grows");
        let blocks = || std::fs::metadata(&path).expect("metadata").blocks();
        assert_eq!(blocks(), 0, "a new image is sparse");
        file.write_at(0, &vec![7; 2 << 20]).expect("writes");
        file.sync().expect("syncs");
        let full = blocks();
        file.zero(4096, 1 << 20).expect("punches");
        assert!(blocks() < full, "room is given back");
        let mut read = vec![1; 8192];
        file.read_at(0, &mut read).expect("reads");
        assert!(read[..4096].iter().all(|&b| b == 7) && read[4096..].iter().all(|&b| b == 0));
        assert_eq!(file.bytes().expect("length"), 4 << 20);
        write_zeroes(&HostFile(std::fs::File::options().write(true).open(&path).expect("opens")), 100, 600 << 10)
            .expect("without holes");
        file.read_at(0, &mut read).expect("reads");
        assert!(read[..100].iter().all(|&b| b == 7) && read[100..4096].iter().all(|&b| b == 0));
        assert!(file.lock().expect("locks"));
        let again = HostFiles.open(&path).expect("opens").expect("is there");
        assert!(!again.lock().expect("asks"));
    }
}
