//! Small files that survive a crash: whole or not at all, and on the disk before the call returns.
//!
//! A file is written beside its place, synced, renamed, and its directory is synced: after a power
//! loss the reader finds the old text or the new one.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Suffix of a file that is being written; a left-over one means nothing.
pub const TEMPORARY: &str = ".tmp";

/// Makes `dir` and its parents, open to the owner alone; its entry is durable when it returns.
///
/// # Errors
/// The system's reason.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        sync_dir(parent)?;
    }
    Ok(())
}

/// Syncs a directory, so that renames in it are durable.
///
/// # Errors
/// The system's reason.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces `path` by `bytes` (mode 0600); durable when it returns. The file that is there now.
///
/// One writer at a time per `path`: the caller sees to that.
///
/// # Errors
/// The system's reason; `path` is as it was then, or already new. After an error of the last sync nobody knows which of them a power loss would leave.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let (temporary, dir) = neighbours(path)?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_dir(&dir)?;
    Ok(file)
}

/// Removes `path`; durable when it returns. A file that is not there is no error.
///
/// # Errors
/// The system's reason.
pub fn remove(path: &Path) -> io::Result<()> {
    let (_, dir) = neighbours(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_dir(&dir),
    }
}

fn neighbours(path: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "path without a file name");
    let mut name = path.file_name().ok_or_else(no_name)?.to_os_string();
    name.push(TEMPORARY);
    let dir = path.parent().ok_or_else(no_name)?.to_path_buf();
    Ok((dir.join(name), dir))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_replaced_file_is_whole_private_and_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("record");
        replace(&path, b"first, and longer").expect("first");
        replace(&path, b"second").expect("second");
        assert_eq!(std::fs::read(&path).expect("read"), b"second");
        let mode = std::fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
        remove(&path).expect("remove");
        remove(&path).expect("remove again");
        assert!(!path.exists());
    }
}
