//! The millisecond prober: asks for an ICMP echo each millisecond and knows when which request was answered.
//!
//! A request carries its own time of sending, so a reply tells which request it answers without a table.
//!
//! A guest that answers late is asked less often, so that what is asked here never fills the queue in front of it: on a host without time to
//! spare, a thousand requests a second took the place of the TCP client's segments there, and the client waited for its own growing timer.

use std::io::{BufRead as _, ErrorKind, Read as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::say;
use crate::demo::wait::now_ns;

/// Time between two requests.
const INTERVAL: Duration = Duration::from_millis(1);
/// The same, to a guest that answers very late.
const LONGEST: Duration = Duration::from_millis(100);
/// Most requests in the time that the last answer took.
const UNDER_WAY: u32 = 16;
/// Bound on waiting for a first reply.
pub const FIRST_REPLY: Duration = Duration::from_secs(60);
/// Marks our requests among all echoes.
const MAGIC: [u8; 8] = *b"undrstdy";
/// Type, code, checksum, identifier, sequence number, magic, time of sending.
const LENGTH: usize = 24;

/// The first reply to a request that was sent after a given instant.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct FirstReply {
    /// When the answered request was sent.
    pub sent_ns: u64,
    /// When the reply came; absent if none came in time.
    pub received_ns: Option<u64>,
}

/// Asks a guest each millisecond, until the process ends.
#[derive(Debug)]
pub struct Prober {
    arrived: Receiver<(u64, u64)>,
}

impl Prober {
    /// Begins.
    ///
    /// # Errors
    /// If it may not open a raw socket.
    pub fn start(to: Ipv4Addr) -> Result<Self> {
        let socket =
            Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).context("cannot open a raw ICMP socket")?;
        socket.set_recv_buffer_size(1 << 20)?;
        socket.connect(&SockAddr::from(SocketAddrV4::new(to, 0))).with_context(|| format!("{to} cannot be reached"))?;
        let receiver = socket.try_clone()?;
        let (replies, arrived) = channel();
        let took = Arc::new(AtomicU64::new(0));
        let last_took = Arc::clone(&took);
        // Both threads end with the process.
        thread::spawn(move || {
            let mut packet = [0_u8; 2048];
            loop {
                match (&receiver).read(&mut packet) {
                    Ok(length) => {
                        if let Some(sent_ns) = parse_reply(&packet[..length]) {
                            let now = now_ns();
                            took.store(now.saturating_sub(sent_ns), Ordering::Relaxed);
                            if replies.send((sent_ns, now)).is_err() {
                                return;
                            }
                        }
                    }
                    // The guest's host may be unreachable for a while: that is what we are here to see.
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => thread::sleep(INTERVAL),
                }
            }
        });
        thread::spawn(move || {
            let mut next = Instant::now();
            for sequence in (0..=u16::MAX).cycle() {
                // An unreachable guest and a full queue are lost requests, as on any network.
                let _ = socket.send(&request(sequence, now_ns()));
                let now = Instant::now();
                // What was not asked in time is not asked all at once.
                next = (next + interval(Duration::from_nanos(last_took.load(Ordering::Relaxed)))).max(now);
                thread::sleep(next.saturating_duration_since(now));
            }
        });
        Ok(Self { arrived })
    }

    /// The first reply to a request that was sent after `after_ns`. Waits for it, at most `bound`.
    ///
    /// # Errors
    /// If replies cannot be received any more.
    pub fn first_reply(&self, after_ns: u64, bound: Duration) -> Result<FirstReply> {
        let deadline = Instant::now() + bound;
        loop {
            match self.arrived.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((sent_ns, received_ns)) if sent_ns > after_ns => {
                    return Ok(FirstReply { sent_ns, received_ns: Some(received_ns) });
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Ok(FirstReply { sent_ns: after_ns, received_ns: None });
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the receiving thread has ended"),
            }
        }
    }
}

/// Probes until its input is closed. Each line of input is an instant in nanoseconds, answered with [`FirstReply`].
///
/// # Errors
/// If it may not open a raw socket.
pub(super) fn run(to: Ipv4Addr) -> Result<()> {
    let prober = Prober::start(to)?;
    for line in std::io::stdin().lock().lines() {
        let after: u64 = line?.trim().parse().context("an instant in nanoseconds was expected")?;
        say(&prober.first_reply(after, FIRST_REPLY)?)?;
    }
    Ok(())
}

/// The time between two requests, if the last answer took so long.
fn interval(took: Duration) -> Duration {
    (took / UNDER_WAY).clamp(INTERVAL, LONGEST)
}

/// An echo request that carries `sent_ns`.
fn request(sequence: u16, sent_ns: u64) -> [u8; LENGTH] {
    let mut packet = [0; LENGTH];
    packet[0] = 8;
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    packet[8..16].copy_from_slice(&MAGIC);
    packet[16..24].copy_from_slice(&sent_ns.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The Internet checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

/// When the request was sent that this IPv4 packet answers, if it is a reply to one of ours.
fn parse_reply(packet: &[u8]) -> Option<u64> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let echo = packet.get(header..header + LENGTH)?;
    let ours = echo[0] == 0 && echo[8..16] == MAGIC;
    ours.then(|| u64::from_be_bytes(echo[16..24].try_into().expect("eight bytes")))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{INTERVAL, LONGEST, checksum, interval, parse_reply, request};

    #[test]
    fn who_answers_in_time_is_asked_each_millisecond_and_who_is_late_is_not_flooded() {
        assert_eq!(interval(Duration::ZERO), INTERVAL, "nothing was answered yet");
        assert_eq!(interval(Duration::from_millis(16)), INTERVAL);
        assert_eq!(interval(Duration::from_millis(160)), Duration::from_millis(10));
        assert_eq!(interval(Duration::from_secs(9)), LONGEST);
    }

    #[test]
    fn a_reply_tells_when_its_request_was_sent() {
        let sent = request(7, 123_456_789_012);
        assert_eq!(checksum(&sent), 0, "a packet with its checksum sums to zero");
        let mut packet = vec![0x45; 20];
        packet.extend_from_slice(&sent);
        assert_eq!(parse_reply(&packet), None, "a request is no reply");
        packet[20] = 0;
        assert_eq!(parse_reply(&packet), Some(123_456_789_012));
        packet[30] ^= 1;
        assert_eq!(parse_reply(&packet), None, "another program's echo");
        assert_eq!(parse_reply(&packet[..30]), None);
        assert_eq!(parse_reply(&[]), None);
    }
}
