//! Hears what the guest says at the switch, and from which host: the proof that never two copies are heard.
//!
//! One packet socket in the switch's namespace takes the frames that come in at the ports of hosts A and B and bear the guest's
//! address; its filter cuts them to a length that names the port, so that their order is the kernel's own.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use replicator::demo::lab::{Host, MAC};
use replicator::demo::wait::now_ns;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::space;

/// Bytes kept of a frame from host A, and from host B. No frame of Ethernet over veth is shorter than an ARP message.
const KEPT: [u32; 2] = [38, 40];
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
}

/// Adds a frame to the runs.
fn heard(runs: &mut Vec<Run>, from: Host, at_ns: u64) {
    match runs.last_mut() {
        Some(run) if run.from == from => {
            run.last_ns = at_ns;
            run.frames += 1;
        }
        _ => runs.push(Run { from, first_ns: at_ns, last_ns: at_ns, frames: 1 }),
    }
}

/// Whether what was heard since `before` spoke last can come from one copy at a time, of which `activated` more were activated.
///
/// # Errors
/// With what was heard, if not.
pub fn judge(before: Host, runs: &[Run], activated: usize) -> Result<()> {
    let mut at = before;
    let mut changes = 0;
    for run in runs {
        changes += usize::from(run.from != at);
        at = run.from;
    }
    ensure!(
        changes <= activated,
        "two copies were heard: the guest's frames changed hosts {changes} times, and {activated} copies were activated: {runs:?}"
    );
    Ok(())
}

/// See the module. Dropping it ends it.
#[derive(Debug)]
pub struct Sniffer {
    runs: Arc<Mutex<Vec<Run>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Listens in namespace `space` at two interfaces, by their numbers: those to host A and to host B.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(space: &str, ports: [u32; 2]) -> Result<Self> {
        let runs: Arc<Mutex<Vec<Run>>> = Arc::default();
        let end: Arc<AtomicBool> = Arc::default();
        let (its, ends) = (Arc::clone(&runs), Arc::clone(&end));
        let open = move || open(&filter(ports)?);
        let thread = space::spawn(space, open, move |mut socket| {
            let mut frame = [0; 64];
            while !ends.load(Ordering::SeqCst) {
                let Ok(length) = socket.read(&mut frame) else { continue };
                let from = if length == KEPT[0] as usize { Host::A } else { Host::B };
                heard(&mut its.lock().unwrap_or_else(PoisonError::into_inner), from, now_ns());
            }
        })?;
        Ok(Self { runs, end, thread: Some(thread) })
    }

    /// Takes what was heard since it was last taken.
    #[must_use]
    pub fn take(&self) -> Vec<Run> {
        std::mem::take(&mut self.runs.lock().unwrap_or_else(PoisonError::into_inner))
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
fn filter(ports: [u32; 2]) -> Result<[SockFilter; 12]> {
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
        SockFilter::new(EQUAL, 2, 0, ports[1]),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, KEPT[0]),
        SockFilter::new(RETURN, 0, 0, KEPT[1]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(hosts: &[Host]) -> Vec<Run> {
        let mut runs = Vec::new();
        for (at, &host) in (0..).zip(hosts) {
            heard(&mut runs, host, at);
        }
        runs
    }

    #[test]
    fn one_copy_after_the_other_is_fine_and_two_at_a_time_are_found() {
        judge(Host::A, &[], 0).unwrap();
        judge(Host::A, &runs(&[Host::A, Host::A, Host::B, Host::B]), 1).unwrap();
        judge(Host::A, &runs(&[Host::B, Host::A]), 2).unwrap();
        judge(Host::A, &runs(&[Host::A, Host::B]), 0).unwrap_err();
        let found = judge(Host::A, &runs(&[Host::A, Host::B, Host::A, Host::B]), 1).unwrap_err().to_string();
        assert!(found.contains("changed hosts 3 times"), "{found}");
    }
}
