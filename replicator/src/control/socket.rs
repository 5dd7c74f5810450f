//! The control socket: one process answers on it, and only root may connect.
//!
//! A lock file beside the socket says who owns it; the kernel releases the lock when its owner ends, however it ends. So a
//! socket whose lock can be taken is stale and is replaced, and two agents that start at once do not both get it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::UnixListener;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// The socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process has it.
    #[error("another process answers on {path}: only one agent can run with this run directory")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in the way.
    #[error("{path} exists and is not a socket: it was left as it is")]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot open the control socket {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening control socket. Removed when dropped.
#[derive(Debug)]
pub struct ControlSocket {
    pub(super) listener: UnixListener,
    guard: Guard,
}

/// Owns the path: removes the socket, then lets go of the lock.
#[derive(Debug)]
pub(super) struct Guard {
    path: PathBuf,
    _lock: File,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Best effort: a socket that stays is stale and is replaced by the next start.
        let _ = fs::remove_file(&self.path);
    }
}

impl ControlSocket {
    /// Opens the socket, mode 0600 from its first moment; makes its directory, replaces a stale socket. Called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// If another process has it, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source: io::Error| SocketError::Io { path: path.into(), source };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let lock = take_lock(path)?;
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(SocketError::InUse { path: path.into() });
                }
                fs::remove_file(path).map_err(failed)?;
            }
            Ok(_) => return Err(SocketError::NotASocket { path: path.into() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = open(path).map_err(|errno| failed(errno.into()))?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self { listener, guard: Guard { path: path.into(), _lock: lock } })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.guard.path
    }

    pub(super) fn into_parts(self) -> (UnixListener, Guard) {
        (self.listener, self.guard)
    }
}

fn take_lock(path: &Path) -> Result<File, SocketError> {
    let lock_path = path.with_extension("lock");
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|source| SocketError::Io { path: lock_path.clone(), source })?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => Err(SocketError::InUse { path: path.into() }),
        Err(errno) => Err(SocketError::Io { path: lock_path, source: errno.into() }),
    }
}

fn open(path: &Path) -> Result<std::os::unix::net::UnixListener, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before bind: Linux gives the file the socket's mode, so nobody else can connect even for a moment.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn only_root_can_open_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(socket);
        assert!(!path.exists(), "the socket is removed");
    }

    #[tokio::test]
    async fn a_second_agent_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let _first = ControlSocket::bind(&path).unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse { .. })));
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind, as a killed agent does");
        ControlSocket::bind(&path).unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_someone_answers_on_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse { .. })));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
