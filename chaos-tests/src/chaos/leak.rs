//! A mistake of the laboratory's own, by which the judges are judged: what the guest says is heard at once, and nothing waits for
//! an acknowledgement.
//!
//! The product is as it is, and holds the guest's output. But the VM's owner, at a monitor of his own, has QEMU copy each frame to
//! us before it comes to the gate, and we emit it beside the VM's card. A run with it must fail as soon as the host dies with an epoch that
//! nobody acknowledged. Only the VM that the laboratory booted, on host A, has such a monitor.

use std::fs::File;
use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use replicator::demo::lab::{Host, Lab};
use replicator::demo::netns::ip;
use serde_json::json;
use vmm_hooks::sys::tap;

use super::monitor::Monitor;
use super::space;

/// The interface beside the VM's.
const BESIDE: &str = "beside";
/// Where the headers of IPv4, without options, and of TCP begin, and where TCP's checksum is.
const IP: usize = 14;
const TCP: usize = IP + 20;
const CHECKSUM: usize = TCP + 16;

/// See the module. It ends with the VM.
#[derive(Debug)]
pub(super) struct Leak {
    leaked: Arc<AtomicU64>,
}

impl Leak {
    /// Begins. The gate is in place: the filter that is made last sees frames first.
    ///
    /// # Errors
    /// If QEMU refuses, or the interface cannot be made.
    pub(super) fn begin(lab: &Lab) -> Result<Self> {
        let space = lab.namespace(Host::A.role());
        let path = lab.path("leak.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).context("cannot listen for the guest's frames")?;
        let mut owner = Monitor::connect(&lab.vm_second()).context("the VM's owner has no monitor")?;
        let address = json!({ "type": "unix", "data": { "path": path } });
        let backend = json!({ "type": "socket", "data": { "server": false, "addr": address } });
        owner.ask("chardev-add", &json!({ "id": "leak", "backend": backend }))?;
        let (from, _) = listener.accept()?;
        let leaked: Arc<AtomicU64> = Arc::default();
        let counts = Arc::clone(&leaked);
        space::spawn(&space, || Ok(File::from(tap::open(BESIDE)?)), move |to| carry(from, to, &counts))?;
        // The bridge must go on looking for the guest behind its own card.
        ip(&format!("-n {space} link set {BESIDE} master br0 up"))?;
        ip(&format!("-n {space} link set dev {BESIDE} type bridge_slave learning off"))?;
        let mirror = json!({ "qom-type": "filter-mirror", "id": "leak", "netdev": "net0", "queue": "rx",
            "outdev": "leak", "vnet_hdr_support": true });
        owner.ask("object-add", &mirror)?;
        Ok(Self { leaked })
    }

    /// How many frames were heard before their time.
    pub(super) fn leaked(&self) -> u64 {
        self.leaked.load(Ordering::SeqCst)
    }
}

/// Emits what QEMU copies, until it ends: the length of all that follows, the length of virtio's header, that header, the frame.
fn carry(from: UnixStream, mut to: File, leaked: &AtomicU64) {
    let mut from = BufReader::new(from);
    let mut one = || -> std::io::Result<Vec<u8>> {
        let mut lengths = [0; 8];
        from.read_exact(&mut lengths)?;
        let [all, header] = [&lengths[..4], &lengths[4..]]
            .map(|bytes| bytes.iter().fold(0, |number, &byte| number << 8 | usize::from(byte)));
        let mut frame = vec![0; all];
        from.read_exact(&mut frame)?;
        Ok(frame.split_off(header.min(all)))
    };
    while let Ok(mut frame) = one() {
        sum(&mut frame);
        // A bridge that is not up yet takes no frame.
        if to.write_all(&frame).is_ok() {
            leaked.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Fills in TCP's checksum, which the guest leaves to its card.
fn sum(frame: &mut [u8]) {
    const IPV4: [u8; 3] = [8, 0, 0x45];
    if frame.len() < CHECKSUM + 2 || frame[12..=IP] != IPV4 || frame[IP + 9] != 6 {
        return;
    }
    let end = (IP + usize::from(u16::from_be_bytes([frame[IP + 2], frame[IP + 3]]))).clamp(TCP, frame.len());
    frame[CHECKSUM..CHECKSUM + 2].fill(0);
    // Both addresses, the protocol, the length, and all of the segment.
    let words = |bytes: &[u8]| -> u32 {
        let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        bytes.chunks(2).map(word).sum()
    };
    let length = u32::try_from(end - TCP).unwrap_or(0);
    let mut sum = words(&frame[IP + 12..TCP]) + 6 + length + words(&frame[TCP..end]);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).unwrap_or(0);
    frame[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_what_tcp_says() {
        // One byte from 10.77.0.100 to 10.77.0.10, with what a card was to replace.
        let mut frame = vec![0; IP];
        frame[12] = 8;
        frame.extend([0x45, 0, 0, 41, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 77, 0, 100, 10, 77, 0, 10]);
        frame.extend([0x12, 0x34, 0x18, 0xeb, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0xff, 0xff, 0, 0, 7]);
        frame.push(0);
        sum(&mut frame);
        // Summed with its checksum all of it is minus nothing.
        let mut all: u32 = 6 + 21;
        for pair in frame[IP + 12..TCP + 21].chunks(2) {
            all += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        }
        assert_eq!((all & 0xffff) + (all >> 16), 0xffff);
        assert_ne!(frame[CHECKSUM..CHECKSUM + 2], [0, 0]);
        let before = frame.clone();
        frame[IP + 9] = 17;
        sum(&mut frame);
        assert_eq!(frame[TCP..], before[TCP..], "what is no TCP is left alone");
    }
}
