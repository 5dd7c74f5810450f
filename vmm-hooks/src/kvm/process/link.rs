//! One message a packet, with descriptors; and questions that wait for their answers.
//!
//! Promises: an answer is taken for its own question alone: one that comes after its question was given up is dropped. No question waits much longer than it
//! may, whatever comes. Sending and receiving allocate
//! nothing but what a message itself holds.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::wire::{MESSAGE_MAX, decode, encode};

/// Most descriptors with one message.
pub(super) const FDS_MAX: usize = 64;

/// Why a message did not get through.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// Nobody is at the other end.
    #[error("nobody is at the other end")]
    Closed,
    /// No answer came in time.
    #[error("no answer came within {0:?}")]
    Late(Duration),
    /// What came, or what was to be sent, is no message.
    #[error("what came is no message that belongs there")]
    Invalid,
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] io::Error),
}

/// Two ends that keep messages apart.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn lost(error: rustix::io::Errno) -> LinkError {
    match error {
        rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => LinkError::Closed,
        error => LinkError::Os(error.into()),
    }
}

/// Sends one packet. `wait`: until there is room for it.
pub(super) fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>], wait: bool) -> Result<(), LinkError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && (fds.len() > FDS_MAX || !control.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(LinkError::Invalid);
    }
    let flags = if wait { SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL | SendFlags::DONTWAIT };
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(lost(error)),
        }
    }
}

/// Waits for one packet; its length. Its descriptors are put into `fds`.
pub(super) fn receive(socket: &OwnedFd, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, LinkError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            got => break got.map_err(lost)?,
        }
    };
    fds.clear();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(got) = message {
            fds.extend(got);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(LinkError::Invalid);
    }
    // No message is empty: this is the end.
    if got.bytes == 0 { Err(LinkError::Closed) } else { Ok(got.bytes) }
}

/// The end that asks.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    number: u32,
    out: Vec<u8>,
    inbox: Vec<u8>,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, number: 0, out: vec![0; MESSAGE_MAX], inbox: vec![0; MESSAGE_MAX] }
    }

    /// Sends what nobody answers. Does not wait.
    pub(super) fn post(&mut self, request: &impl Encode) -> Result<(), LinkError> {
        let length = encode(0, request, &mut self.out).ok_or(LinkError::Invalid)?;
        send(&self.socket, &self.out[..length], &[], false)
    }

    /// Asks, and waits for the answer.
    pub(super) fn ask<A: Decode<()>>(
        &mut self,
        request: &impl Encode,
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<A, LinkError> {
        self.number = self.number.checked_add(1).unwrap_or(1);
        let length = encode(self.number, request, &mut self.out).ok_or(LinkError::Invalid)?;
        send(&self.socket, &self.out[..length], fds, false)?;
        let deadline = Instant::now() + within;
        let mut none = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| LinkError::Invalid)?;
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Err(LinkError::Late(within)),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(lost(error)),
            }
            let length = receive(&self.socket, &mut self.inbox, &mut none)?;
            // Looked at apart: an old answer may be of another kind.
            let number = self.inbox[..length].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
            if number == Some(self.number) {
                let (_, answer) = decode(&self.inbox[..length]).ok_or(LinkError::Invalid)?;
                return Ok(answer);
            }
            // Else one that sends without end would be listened to without end.
            if Instant::now() >= deadline {
                return Err(LinkError::Late(within));
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_without_end_is_not_listened_to_without_end() {
        let (ours, theirs) = pair().expect("sockets");
        let mut link = Link::new(ours);
        // As one that sends without end leaves it: whenever one is read there is another.
        for _ in 0..3 {
            send(&theirs, &[0; 4], &[], false).expect("room");
        }
        let late = link.ask::<u64>(&1_u8, &[], Duration::ZERO).expect_err("none of it is an answer");
        assert!(matches!(late, LinkError::Late(_)), "{late}");
        let unread = poll(&mut [PollFd::new(&link, PollFlags::IN)], Some(&Timespec::default()));
        assert_eq!(unread, Ok(1), "all of it was read");
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next_questions() {
        let (ours, theirs) = pair().expect("sockets");
        let mut link = Link::new(ours);
        let (mut buffer, mut fds) = (vec![0; MESSAGE_MAX], Vec::new());
        let short = Duration::from_millis(1);
        let late = link.ask::<u64>(&1_u8, &[], short).expect_err("nobody answered");
        assert!(matches!(late, LinkError::Late(_)), "{late}");
        let length = receive(&theirs, &mut buffer, &mut fds).expect("it was sent");
        let (first, one) = decode::<u8>(&buffer[..length]).expect("a message");
        let answer = |number, value: u64| {
            let mut bytes = vec![0; 100];
            let length = encode(number, &value, &mut bytes).expect("short");
            send(&theirs, &bytes[..length], &[], true).expect("somebody is there");
        };
        answer(first, 11);
        answer(first + 1, 22);
        assert_eq!(link.ask::<u64>(&2_u8, &[theirs.as_fd()], short).expect("it was answered"), 22);
        receive(&theirs, &mut buffer, &mut fds).expect("it was sent");
        assert_eq!((one, fds.len()), (1, 1));
        drop(fds);
        drop(theirs);
        assert!(matches!(link.post(&3_u8), Err(LinkError::Closed)));
        assert!(matches!(link.ask::<u64>(&3_u8, &[], short), Err(LinkError::Closed)));
    }
}
