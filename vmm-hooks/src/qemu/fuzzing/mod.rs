//! Entry points for the fuzzer, and the replay of its kept inputs.
//!
//! Each target takes any bytes and asserts what the parser promises; none of them may panic. `cargo xtask fuzz` drives
//! them with coverage, the tests run what it has kept (`docs/testing.md`). Not part of the API.

mod network;
mod qmp;
mod ram;

/// A target's name and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of this crate.
pub const TARGETS: [Target; 8] = [
    ("cmdline", super::cmdline::fuzzing::run),
    ("microvm", crate::kvm::fuzzing::process),
    ("nbd", crate::nbd::fuzzing::run),
    ("network", network::run),
    ("qmp", qmp::run),
    ("ram", ram::run),
    ("snapshot", crate::kvm::fuzzing::snapshot),
    ("virtio", crate::kvm::fuzzing::virtio),
];

/// The bytes as text; what is no UTF-8 is replaced, as the callers of the parsers do.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
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
