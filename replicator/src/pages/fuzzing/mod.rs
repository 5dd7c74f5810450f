//! Entry points for the fuzzer, and the replay of its kept inputs.
//!
//! Each target takes any bytes and asserts what the decoders promise; none of them may panic. `cargo xtask fuzz` drives
//! them with coverage, the tests run what it has kept (`docs/testing.md`). Not part of the API.

mod epochs;
mod known;
mod stream;

use std::sync::Mutex;

use replicator_core::message::{CloseCode, MAX_MESSAGE, PeerMessage, RehearsalResult};
use vmm_hooks::guest::TwinMemory;
use vmm_hooks::layout::PAGE_SIZE;

/// A target's name and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of this crate.
pub const TARGETS: [Target; 4] =
    [("epochs", epochs::run), ("known", known::run), ("peer", peer), ("stream", stream::run)];

/// A message of the replication connection's control stream.
fn peer(bytes: &[u8]) {
    let Ok(message) = PeerMessage::decode(bytes) else { return };
    assert!(bytes.len() <= MAX_MESSAGE);
    let again = message.encode().expect("it fits where it came from");
    // A duration may come with a second's worth of nanoseconds or more; every other message has one form.
    if !matches!(message, PeerMessage::Rehearsed { result: RehearsalResult::Loads { .. }, .. }) {
        assert_eq!(again, bytes, "{message:?} has two forms");
    }
    assert_eq!(PeerMessage::decode(&again), Ok(message));
    assert!(PeerMessage::decode(&bytes[..bytes.len() - 1]).is_err());
    assert!(PeerMessage::decode(&[bytes, &[0]].concat()).is_err());
    assert!(CloseCode::ALL.iter().all(|code| CloseCode::from_code(code.code().into()) == Some(*code)));
}

/// Takes a test's choices off the input; zeroes at its end.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let (&first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        first
    }

    fn word(&mut self) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()]))
    }

    fn below(&mut self, bound: usize) -> usize {
        if bound <= 256 { usize::from(self.byte()) % bound.max(1) } else { self.word() % bound }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Standby memory that can be made to stop: after so many more writes it ignores everything, like an agent that has died.
#[derive(Debug)]
struct Memory(Mutex<(Vec<u8>, usize)>);

impl Memory {
    fn new(pages: usize) -> Self {
        // Not zeroes: what a stream does not say must not be taken for granted.
        Self(Mutex::new((vec![0xA5; pages * PAGE_SIZE], usize::MAX)))
    }

    fn die_after(&self, writes: usize) {
        self.0.lock().expect("no panic").1 = writes;
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().expect("no panic").0.clone()
    }

    fn put(&self, page: u64, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE_SIZE, "a write past the page");
        let mut inner = self.0.lock().expect("no panic");
        let start = usize::try_from(page).expect("small") * PAGE_SIZE + offset;
        assert!(start + bytes.len() <= inner.0.len(), "a write past the memory");
        if inner.1 > 0 {
            inner.1 -= 1;
            inner.0[start..start + bytes.len()].copy_from_slice(bytes);
        }
    }
}

impl TwinMemory for Memory {
    fn pages(&self) -> u64 {
        (self.0.lock().expect("no panic").0.len() / PAGE_SIZE) as u64
    }

    fn write(&self, page: u64, offset: usize, bytes: &[u8]) {
        self.put(page, offset, bytes);
    }

    fn read(&self, page: u64, into: &mut [u8]) {
        let start = usize::try_from(page).expect("small") * PAGE_SIZE;
        into.copy_from_slice(&self.0.lock().expect("no panic").0[start..start + PAGE_SIZE]);
    }

    fn zero(&self, page: u64) {
        self.put(page, 0, &[0; PAGE_SIZE]);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// One input a line, in hexadecimal digits.
    fn kept(target: &str) -> Vec<Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../chaos-tests/fuzz/corpus");
        let text = std::fs::read_to_string(dir.join(format!("{target}.hex"))).expect("each target has a corpus");
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).expect("ASCII"), 16).expect("two digits");
        text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
    }

    #[test]
    fn what_the_fuzzer_kept_still_holds() {
        for (name, run) in super::TARGETS {
            let inputs = kept(name);
            assert!(!inputs.is_empty(), "{name} has no kept input");
            for input in inputs {
                run(&input);
            }
        }
    }
}
