//! The nested lane: hosts that QEMU emulates, with a KVM in them that runs kernels, where this machine's own does not.
//!
//! `cargo xtask test --all` runs all of it: it names the programs (`UNDERSTUDY_NESTED_PROGRAMS`). What is missing here is said: `skipped: ` and why.

mod host;

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use host::{Disk, Host, PLAIN, WIDE};

/// Far above what a run takes on a busy machine: everything in it is emulated.
const PATIENCE: Duration = Duration::from_secs(900);

/// Programs of this name that the lane was given, if it can run here.
fn programs(name: &str) -> Option<Vec<PathBuf>> {
    let Some(given) = env::var_os("UNDERSTUDY_NESTED_PROGRAMS") else {
        println!("skipped: a lane of its own; cargo xtask test --all");
        return None;
    };
    if let Some(why) = host::missing() {
        println!("skipped: {why}");
        return None;
    }
    let named = |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    let found: Vec<PathBuf> = env::split_paths(&given).filter(named).collect();
    assert!(!found.is_empty(), "the lane was not given {name}");
    Some(found)
}

/// Runs test programs on an emulated host; they must pass, and nothing of theirs be skipped.
fn run_tests(names: &[&str], cpu: &str) {
    let Some(tests) = names.iter().map(|name| programs(name)).collect::<Option<Vec<_>>>() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(directory.path());
    let mut script =
        format!("export TMPDIR=/run UNDERSTUDY_KERNELS={} RUST_BACKTRACE=1\nset -e\n", host::guest().display());
    for test in tests.iter().flatten() {
        disk.add_program(test);
        script.push_str(&format!("{} --test-threads 1 --nocapture\n", test.display()));
    }
    disk.add_guest();
    let mut host = Host::start(directory.path(), "host", cpu, &disk.finish(&script), &[]);
    let (code, console) = host.ended(PATIENCE);
    println!("{console}");
    assert_eq!(code, 0, "a test failed on the emulated host");
    let results = console.lines().filter(|line| line.starts_with("test result: ok. ")).count();
    assert_eq!(results, names.len(), "not every test program came to its end");
    assert!(!console.contains("skipped: "), "what the lane is for was skipped");
}

#[test]
fn a_microvm_with_linux_under_kvm() {
    run_tests(&["kvm_linux"], PLAIN);
}

#[test]
fn a_microvm_with_linux_under_kvm_on_a_wide_processor() {
    run_tests(&["kvm_linux"], WIDE);
}

#[test]
fn a_microvm_with_redis_goes_on_after_the_death_of_its_agent_and_nothing_is_lost() {
    let Some(understudy) = programs("understudy") else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(directory.path());
    disk.add_program(&understudy[0]);
    disk.add_guest();
    let places = format!("UNDERSTUDY={}\nGUEST={}\n", understudy[0].display(), host::guest().display());
    let path = format!("export PATH={}:$PATH TMPDIR=/run RUST_BACKTRACE=1\n", disk.add_named("ip").display());
    let script = format!("{path}{places}{}", include_str!("failover.sh"));
    let mut host = Host::start(directory.path(), "host", PLAIN, &disk.finish(&script), &[]);
    let (code, console) = host.ended(PATIENCE);
    println!("{console}");
    assert_eq!(code, 0, "the failover did not come to its end");
    let answer = |word: &str| -> serde_json::Value {
        let line = console.lines().find_map(|line| line.strip_prefix(word));
        serde_json::from_str(line.unwrap_or_else(|| panic!("there is no {word}"))).expect("an answer")
    };
    let written = answer("WRITTEN ");
    assert!(written["broken"].is_null(), "the client's connection broke: {written}");
    assert!(written["acked"].as_u64() > Some(150), "the client did not go on: {written}");
    assert_eq!(answer("CHECKED ")["lost"], 0);
}
