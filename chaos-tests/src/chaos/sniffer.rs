//! Hears what the guest says at the switch, and from which host: the proof that never two copies are heard.
//!
//! One packet socket in the switch's namespace takes the beginnings of the frames that come in at the ports of hosts A and B and bear the
//! guest's address.
//!
//! A network, or weather, may bring a frame late: one that the copy before said, and that its survivor remembers having said, because its
//! epoch was acknowledged (docs/protocol.md P3). Its TCP timestamp, which the guest's own clock made, tells: it is not later than
//! the first one of the survivor on the same connection. A copy that runs on beside its survivor soon says what is later than that; what
//! it says before is left to the judges of the history.

use std::collections::HashMap;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{LinkAddr, recvfrom};
use replicator::demo::lab::{Host, MAC};
use replicator::demo::wait::now_ns;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::space;

/// Bytes kept of a frame: its headers.
const KEPT: u32 = 128;
/// Classic BPF: the instructions that are needed.
pub(super) const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
pub(super) const EQUAL: u16 = 0x15;
pub(super) const RETURN: u16 = 0x06;
/// What the kernel knows beside the frame: its way, and its interface.
const WAY: u32 = 0xffff_f000 + 4;
pub(super) const INTERFACE: u32 = 0xffff_f000 + 8;
/// The way of what leaves.
const OUTGOING: u32 = 4;
/// How long the thread waits for a frame before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// Bound on the frames that the kernel keeps for us.
const QUEUE: usize = 8 << 20;

/// A frame of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// From where.
    pub from: Host,
    /// When it was read.
    pub at_ns: u64,
    /// If it is a TCP segment that has one.
    pub stamp: Option<Stamp>,
}

/// When a TCP segment was made, by its guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The client's address and port, and the guest's port.
    pub connection: (u32, u16, u16),
    /// The timestamp: counts from an offset of each connection's own.
    pub value: u32,
}

impl Stamp {
    /// Of the beginning of a frame: IPv4, TCP, with a timestamp among its options.
    fn read(frame: &[u8]) -> Option<Self> {
        let half = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_be_bytes(frame.get(at..at + 4)?.try_into().ok()?));
        let ip = 14;
        if half(12)? != 0x0800 || *frame.get(ip + 9)? != 6 {
            return None;
        }
        let tcp = ip + usize::from(frame[ip] & 0x0f) * 4;
        let end = tcp + usize::from(frame.get(tcp + 12)? >> 4) * 4;
        let connection = (word(ip + 16)?, half(tcp + 2)?, half(tcp)?);
        let mut at = tcp + 20;
        while at < end {
            match *frame.get(at)? {
                0 => return None,
                1 => at += 1,
                8 => return Some(Self { connection, value: word(at + 2)? }),
                _ => at += usize::from(*frame.get(at + 1)?).max(2),
            }
        }
        None
    }
}

/// Frames in a row from one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// From where.
    pub from: Host,
    /// When the first was read.
    pub first_ns: u64,
    /// When the last was read.
    pub last_ns: u64,
    /// How many.
    pub frames: u64,
    /// All of them were late.
    pub late: bool,
}

/// Knows whose copy is heard, and from when on.
#[derive(Debug)]
pub struct Judge {
    speaks: Host,
    /// The first timestamp that it said on a connection.
    began: HashMap<(u32, u16, u16), u32>,
    /// Copies that were activated last time, and not heard until then.
    unheard: usize,
}

impl Judge {
    /// One who knows that the copy of a host speaks.
    #[must_use]
    pub fn new(speaks: Host) -> Self {
        Self { speaks, began: HashMap::new(), unheard: 0 }
    }

    /// Another copy speaks from here on.
    fn begin(&mut self, speaks: Host) {
        (self.speaks, self.began) = (speaks, HashMap::new());
    }

    /// Whether what was heard since can come from one copy at a time, of which `activated` more were activated; those were asked for after
    /// what was heard, so that one of them may only be heard the next time.
    ///
    /// # Errors
    /// With what was heard, if not.
    pub fn judge(&mut self, heard: &[Heard], activated: usize) -> Result<()> {
        let mut changes = 0;
        let mut runs: Vec<Run> = Vec::new();
        for (at, frame) in heard.iter().enumerate() {
            let other = frame.from != self.speaks;
            let late = other && self.is_late(frame.stamp, &heard[at..]);
            if other && !late {
                self.begin(frame.from);
                changes += 1;
            }
            if let (Some(stamp), false) = (frame.stamp, late) {
                self.began.entry(stamp.connection).or_insert(stamp.value);
            }
            match runs.last_mut() {
                Some(run) if run.from == frame.from && run.late == late => {
                    run.last_ns = frame.at_ns;
                    run.frames += 1;
                }
                _ => runs.push(Run { from: frame.from, first_ns: frame.at_ns, last_ns: frame.at_ns, frames: 1, late }),
            }
        }
        let most = activated + self.unheard;
        self.unheard = activated.min(most.saturating_sub(changes));
        ensure!(
            changes <= most,
            "two copies were heard: the guest's frames changed hosts {changes} times, and {most} copies were activated: {runs:?}"
        );
        Ok(())
    }

    /// Whether a frame of the other host is older than all that the speaking copy said on its connection, or says there after it.
    fn is_late(&self, stamp: Option<Stamp>, after: &[Heard]) -> bool {
        let Some(stamp) = stamp else { return false };
        let says = || {
            let its = after.iter().filter(|frame| frame.from == self.speaks).filter_map(|frame| frame.stamp);
            its.filter(|its| its.connection == stamp.connection).map(|its| its.value).next()
        };
        let began = self.began.get(&stamp.connection).copied().or_else(says);
        // Timestamps wrap.
        began.is_some_and(|began| began.wrapping_sub(stamp.value) < 1 << 31)
    }
}

/// See the module. Dropping it ends it.
#[derive(Debug)]
pub struct Sniffer {
    heard: Arc<Mutex<Vec<Heard>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Listens in namespace `space` at two interfaces, by their numbers: those to host A and to host B.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(space: &str, ports: [u32; 2]) -> Result<Self> {
        let heard: Arc<Mutex<Vec<Heard>>> = Arc::default();
        let end: Arc<AtomicBool> = Arc::default();
        let (its, ends) = (Arc::clone(&heard), Arc::clone(&end));
        let open = move || open(&filter(ports)?);
        let thread = space::spawn(space, open, move |socket| {
            let mut frame = [0; KEPT as usize];
            while !ends.load(Ordering::SeqCst) {
                let Ok((length, Some(way))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) else { continue };
                let from = if way.ifindex() == ports[0] as usize { Host::A } else { Host::B };
                let said = Heard { from, at_ns: now_ns(), stamp: Stamp::read(&frame[..length]) };
                its.lock().unwrap_or_else(PoisonError::into_inner).push(said);
            }
        })?;
        Ok(Self { heard, end, thread: Some(thread) })
    }

    /// Takes what was heard since it was last taken.
    #[must_use]
    pub fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A packet socket in this thread's namespace, with a filter.
///
/// # Errors
/// If it cannot be made.
pub(super) fn open(filter: &[SockFilter]) -> Result<Socket> {
    // `ETH_P_ALL`, in the network's order.
    let all = Protocol::from(i32::from(3_u16.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all)).context("cannot open a packet socket")?;
    socket.attach_filter(filter).context("cannot set the filter")?;
    socket.set_recv_buffer_size(QUEUE)?;
    socket.set_read_timeout(Some(LOOK))?;
    // What came in before the filter was set.
    socket.set_nonblocking(true)?;
    let mut frame = [0; 64];
    while (&socket).read(&mut frame).is_ok() {}
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// Classic BPF: incoming, from one of the ports, with the guest's address as its source.
fn filter(ports: [u32; 2]) -> Result<[SockFilter; 11]> {
    let bytes: Vec<u8> = MAC.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    let address: [u8; 6] = bytes.try_into().ok().context("an address has six bytes")?;
    let high = u32::from_be_bytes([address[0], address[1], address[2], address[3]]);
    let low = u32::from(u16::from_be_bytes([address[4], address[5]]));
    Ok([
        SockFilter::new(LOAD_WORD, 0, 0, WAY),
        SockFilter::new(EQUAL, 7, 0, OUTGOING),
        SockFilter::new(LOAD_WORD, 0, 0, 6),
        SockFilter::new(EQUAL, 0, 5, high),
        SockFilter::new(LOAD_HALF, 0, 0, 10),
        SockFilter::new(EQUAL, 0, 3, low),
        SockFilter::new(LOAD_WORD, 0, 0, INTERFACE),
        SockFilter::new(EQUAL, 2, 0, ports[0]),
        SockFilter::new(EQUAL, 1, 0, ports[1]),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, KEPT),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of hosts, some with the timestamp of a segment on the one connection.
    fn frames(said: &[(Host, Option<u32>)]) -> Vec<Heard> {
        let connection = (1, 2, 3);
        let frame = |(at_ns, &(from, value)): (u64, &(Host, Option<u32>))| Heard {
            from,
            at_ns,
            stamp: value.map(|value| Stamp { connection, value }),
        };
        (0..).zip(said).map(frame).collect()
    }

    #[test]
    fn one_copy_after_the_other_is_fine_and_two_at_a_time_are_found() {
        use Host::{A, B};
        let judged = |said: &[Host], activated| {
            let said: Vec<_> = said.iter().map(|&host| (host, None)).collect();
            Judge::new(A).judge(&frames(&said), activated)
        };
        judged(&[], 0).unwrap();
        judged(&[A, A, B, B], 1).unwrap();
        judged(&[B, A], 2).unwrap();
        judged(&[A, B], 0).unwrap_err();
        let found = judged(&[A, B, A, B], 1).unwrap_err().to_string();
        assert!(found.contains("changed hosts 3 times"), "{found}");
    }

    #[test]
    fn a_frame_is_late_if_its_survivor_remembers_it_and_only_then() {
        use Host::{A, B};
        let judged = |said: &[(Host, Option<u32>)]| Judge::new(A).judge(&frames(said), 1);
        judged(&[(A, Some(5)), (B, Some(9)), (A, Some(8)), (B, Some(10))]).unwrap();
        // Before the survivor has said anything on that connection.
        judged(&[(A, Some(5)), (B, None), (A, Some(8)), (B, Some(9))]).unwrap();
        // Over the end of the numbers.
        judged(&[(A, Some(u32::MAX - 1)), (B, Some(3)), (A, Some(u32::MAX)), (B, Some(4))]).unwrap();
        // The copy before ran on: what it says is younger than what its survivor said first.
        judged(&[(A, Some(5)), (B, Some(9)), (A, Some(10)), (B, Some(11))]).unwrap_err();
        judged(&[(A, Some(5)), (B, Some(9)), (A, None), (B, Some(11))]).unwrap_err();
        // Nobody knows that connection but the copy before.
        judged(&[(A, Some(5)), (B, None), (A, Some(8)), (B, None)]).unwrap_err();
    }

    #[test]
    fn what_a_survivor_said_first_is_known_in_later_rounds() {
        use Host::{A, B};
        let mut judge = Judge::new(A);
        judge.judge(&frames(&[(A, Some(5)), (B, Some(9))]), 1).unwrap();
        judge.judge(&frames(&[(B, Some(20)), (A, Some(9)), (B, Some(21))]), 0).unwrap();
        judge.judge(&frames(&[(B, Some(30)), (A, Some(10)), (B, Some(31))]), 0).unwrap_err();
    }

    #[test]
    fn a_timestamp_is_found_among_the_options() {
        let mut frame = vec![0; 14 + 20];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 6;
        frame[30..34].copy_from_slice(&[10, 0, 0, 9]);
        let mut tcp = vec![0; 20];
        tcp[0..4].copy_from_slice(&[0x18, 0xeb, 0x99, 1]);
        tcp[12] = 10 << 4;
        tcp.extend([2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 1, 2, 0, 0, 0, 0, 1, 3, 3, 7]);
        frame.extend(tcp);
        let stamp = Stamp { connection: (0x0a00_0009, 0x9901, 0x18eb), value: 0x0102 };
        assert_eq!(Stamp::read(&frame), Some(stamp));
        for length in 0..frame.len() - 12 {
            assert_eq!(Stamp::read(&frame[..length]), None, "{length}");
        }
        frame[23] = 17;
        assert_eq!(Stamp::read(&frame), None);
    }
    #[test]
    fn a_copy_that_was_activated_at_the_end_may_be_heard_next_time_and_not_later() {
        use Host::{A, B};
        let mut judge = Judge::new(A);
        judge.judge(&frames(&[(A, Some(5))]), 1).unwrap();
        judge.judge(&frames(&[(B, Some(9))]), 0).unwrap();
        judge.judge(&frames(&[(A, Some(20))]), 0).unwrap_err();
        let mut judge = Judge::new(A);
        judge.judge(&frames(&[(A, Some(5))]), 1).unwrap();
        judge.judge(&frames(&[(A, Some(6))]), 0).unwrap();
        judge.judge(&frames(&[(B, Some(9))]), 0).unwrap_err();
    }
}
