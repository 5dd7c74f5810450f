//! A directory with a socket in it that one QEMU can reach, whichever user it runs as, and nobody else but root.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::sockopt::socket_peercred;

/// Where the directories are. Everybody may go through it, nobody may look around in it.
const PARENT: &str = "/run/understudy-disks";

/// Removed with everything in it when this is dropped, which may be as soon as QEMU has connected.
#[derive(Debug)]
pub(super) struct SocketDir(PathBuf);

impl SocketDir {
    /// Makes one that only its maker and `owner` (user and group) may enter.
    pub(super) fn make(owner: (u32, u32)) -> io::Result<Self> {
        let parent = Path::new(PARENT);
        fs::create_dir_all(parent)?;
        fs::set_permissions(parent, Permissions::from_mode(0o711))?;
        for number in 0_u32.. {
            let path = parent.join(format!("{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => {
                    let made = Self(path);
                    fs::set_permissions(&made.0, Permissions::from_mode(0o700))?;
                    chown(&made.0, Some(owner.0), Some(owner.1))?;
                    return Ok(made);
                }
                // Of another guest of ours, or left over by a process of the same number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1024 => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Where the socket is to be.
    pub(super) fn socket(&self) -> PathBuf {
        self.0.join("nbd")
    }

    /// Gives the socket to its user, once it is there.
    pub(super) fn hand_over(&self, owner: (u32, u32)) -> io::Result<()> {
        chown(self.socket(), Some(owner.0), Some(owner.1))
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        // A leftover is empty and harmless.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether it is this process that connected.
pub(super) fn is_of(peer: &UnixStream, pid: u32) -> bool {
    socket_peercred(peer).is_ok_and(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()) == Ok(pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_socket_is_its_users_and_goes_with_its_directory() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root");
            return;
        }
        let dir = SocketDir::make((12345, 12346)).expect("root may");
        let other = SocketDir::make((1, 1)).expect("another one");
        let listener = UnixListener::bind(dir.socket()).expect("it can be made there");
        dir.hand_over((12345, 12346)).expect("root may");
        for path in [&dir.0, &dir.socket()] {
            let metadata = fs::metadata(path).expect("there");
            assert_eq!((metadata.uid(), metadata.gid()), (12345, 12346));
            assert_eq!(metadata.mode() & 0o002, 0, "nobody else may write");
        }
        let client = UnixStream::connect(dir.socket()).expect("it listens");
        let (peer, _) = listener.accept().expect("it connects");
        assert!(is_of(&peer, std::process::id()) && !is_of(&peer, 1));
        drop((client, peer));
        let path = dir.0.clone();
        drop(dir);
        assert!(!path.exists() && other.0.exists());
    }
}
