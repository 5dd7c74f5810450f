//! Descriptors sent over a Unix socket (`SCM_RIGHTS`), as QMP's `add-fd` and `getfd` want them.

use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Bound on the descriptors sent with one message (the kernel's is 253).
pub const MAX_FDS: usize = 16;

/// Sends all of `bytes`, with `fds` attached to the first of them.
///
/// # Errors
/// What the socket says; the peer may then have got a part.
///
/// # Panics
/// If `bytes` is empty or there are more than [`MAX_FDS`] descriptors.
pub fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(!bytes.is_empty(), "descriptors travel with at least one byte");
    assert!(fds.len() <= MAX_FDS, "{} descriptors in one message", fds.len());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        assert!(fits, "the space was made for them");
    }
    let sent = loop {
        match sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut stream = stream;
    stream.write_all(&bytes[sent..])
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read, Seek};
    use std::os::fd::AsFd;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn the_peer_gets_the_bytes_and_the_open_file() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"inside").expect("room");
        file.rewind().expect("a file");
        send_with_fds(&ours, b"take this", &[file.as_fd()]).expect("the peer is there");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 20];
        let got = recvmsg(&theirs, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
        assert_eq!(&bytes[..got.expect("it was sent").bytes], b"take this");
        let mut files: Vec<std::fs::File> = Vec::new();
        for message in control.drain() {
            let RecvAncillaryMessage::ScmRights(fds) = message else { panic!("other rights") };
            files.extend(fds.map(std::fs::File::from));
        }
        let mut text = String::new();
        files[0].read_to_string(&mut text).expect("a file");
        assert_eq!((text.as_str(), files.len()), ("inside", 1));
    }
}
