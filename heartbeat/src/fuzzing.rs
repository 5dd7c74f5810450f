//! Entry points for the fuzzer, and the replay of its kept inputs.
//!
//! Each target takes any bytes and asserts what the decoder promises; none of them may panic. `cargo xtask fuzz` drives
//! them with coverage, the tests run what it has kept (`docs/testing.md`). Not part of the API.

use std::fmt::Debug;

use bincode::{Decode, Encode};
use heartbeat_core::ids::VmId;
use heartbeat_core::store::{StoreAnswer, StoreRequest};
use heartbeat_core::wire::{self, MAX_STORE_MESSAGE, WireError};

use crate::beat::pulse::Pulse;
use crate::quic::hello::{Hello, Welcome, newest_common};
use crate::quic::{MessageError, decode, encode};
use crate::trust::pairing::{Join, Reply};
use crate::witness::disk;

/// A target's name and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of this crate.
pub const TARGETS: [Target; 2] = [("pulse", pulse), ("store", store)];

/// What nodes say to each other outside of replication: heartbeats, hellos, pairing. The first byte chooses.
fn pulse(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    match choice % 5 {
        0 => drop(message::<Pulse>(rest)),
        1 => {
            if let Some(hello) = message::<Hello>(rest) {
                let chosen = newest_common(&[3, 2, 1, 0], &hello.versions);
                assert!(chosen.is_none_or(|version| version != 0 && hello.versions.contains(&version)));
            }
        }
        2 => drop(message::<Welcome>(rest)),
        3 => drop(message::<Join>(rest)),
        _ => drop(message::<Reply>(rest)),
    }
}

/// A message has one form: what decodes encodes to the same bytes, and neither a byte more nor one less is the same message.
fn message<T: Encode + Decode<()> + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let decoded = decode::<T>(bytes).ok()?;
    assert_eq!(encode(&decoded), bytes, "{decoded:?} has two forms");
    let longer = [bytes, &[0]].concat();
    assert!(matches!(decode::<T>(&longer), Err(MessageError::Trailing(1) | MessageError::TooLong { .. })));
    if let Some((_, shorter)) = bytes.split_last() {
        assert!(decode::<T>(shorter).is_err(), "{decoded:?} decodes without its last byte");
    }
    Some(decoded)
}

/// What a store is asked and answers, and what a witness keeps on disk. The first byte chooses.
fn store(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    match choice % 4 {
        0 => store_message::<StoreRequest>(rest),
        1 => store_message::<StoreAnswer>(rest),
        2 => record(rest),
        _ => {
            // Past the checksum, which no fuzzer guesses.
            let checksum = crc32fast::hash(rest).to_le_bytes();
            record(&[rest, &checksum].concat());
        }
    }
}

fn store_message<T: Encode + Decode<()> + PartialEq + Debug>(bytes: &[u8]) {
    match wire::decode::<MAX_STORE_MESSAGE, T>(bytes) {
        Ok(decoded) => {
            assert_eq!(
                wire::encode::<MAX_STORE_MESSAGE, T>(&decoded).as_deref(),
                Ok(bytes),
                "{decoded:?} has two forms"
            );
            if let Some((_, shorter)) = bytes.split_last() {
                assert_eq!(wire::decode::<MAX_STORE_MESSAGE, T>(shorter), Err(WireError::Malformed));
            }
        }
        Err(WireError::TooLong { .. }) => assert!(bytes.len() > MAX_STORE_MESSAGE),
        Err(WireError::Trailing { extra }) => {
            let whole = &bytes[..bytes.len() - extra];
            assert!(extra > 0 && wire::decode::<MAX_STORE_MESSAGE, T>(whole).is_ok());
        }
        Err(WireError::Malformed) => {}
    }
}

/// A record is taken from the one file that it makes, and for its own VM alone.
fn record(bytes: &[u8]) {
    let vm = VmId([7; 16]);
    if let Ok(record) = disk::parse(vm, bytes) {
        assert_eq!(disk::file(vm, record), bytes);
        assert!(disk::parse(VmId([8; 16]), bytes).is_err());
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
