//! One program for all targets: the environment variable `FUZZ_TARGET` names the one that libFuzzer drives.
//!
//! With no such target it lists them and ends with code 2. Its arguments are libFuzzer's.
#![no_main]

use std::sync::OnceLock;

use chaos_fuzz::targets::all;
use libfuzzer_sys::fuzz_target;

/// Chosen once, before the first input.
static BODY: OnceLock<fn(&[u8])> = OnceLock::new();

fn chosen() -> fn(&[u8]) {
    let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
    match all().find(|(name, _)| *name == wanted) {
        Some((_, body)) => body,
        None => {
            let names: Vec<&str> = all().map(|(name, _)| name).collect();
            eprintln!("FUZZ_TARGET must be one of: {}", names.join(" "));
            std::process::exit(2);
        }
    }
}

fuzz_target!(
    init: {
        BODY.get_or_init(chosen);
    },
    |data: &[u8]| BODY.get_or_init(chosen)(data)
);
