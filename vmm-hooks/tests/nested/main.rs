//! The nested lane: hosts that QEMU emulates, with a KVM in them that runs kernels, where this machine's own does not.
//!
//! `cargo xtask test` names the programs (`UNDERSTUDY_NESTED_PROGRAMS`) and, without `--all`, runs what one host can show. What is missing here is said: `skipped: ` and why.

mod host;

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::{Disk, Host, PLAIN, WIDE};

/// Far above what a run takes on a busy machine: everything in it is emulated.
const PATIENCE: Duration = Duration::from_secs(900);

/// What the scripts below begin with.
const COMMON: &str = include_str!("common.sh");

/// Programs of this name that the lane was given, if it can run here.
fn programs(name: &str) -> Option<Vec<PathBuf>> {
    let Some(given) = env::var_os("UNDERSTUDY_NESTED_PROGRAMS") else {
        println!("skipped: a lane of its own; cargo xtask test");
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

/// An emulated host's disk with test programs, and the script that runs them.
fn tests(directory: &Path, names: &[&str]) -> Option<(Disk, String)> {
    let tests = names.iter().map(|name| programs(name)).collect::<Option<Vec<_>>>()?;
    let disk = Disk::new(directory);
    let mut script =
        format!("export TMPDIR=/run UNDERSTUDY_KERNELS={} RUST_BACKTRACE=1\nset -e\n", host::guest().display());
    for test in tests.iter().flatten() {
        disk.add_program(test);
        script.push_str(&format!("{} --test-threads 1 --nocapture\n", test.display()));
    }
    disk.add_guest();
    Some((disk, script))
}

/// Runs `script` on an emulated host, with `tests` test programs in it, which must pass, and nothing of theirs be skipped; what was shown.
fn run(directory: &Path, cpu: &str, disk: Disk, script: &str, tests: usize, more: &[&str]) -> String {
    let mut host = Host::start(directory, "host", cpu, &disk.finish(script), more);
    let (code, console) = host.ended(PATIENCE);
    println!("{console}");
    assert_eq!(code, 0, "what ran on the emulated host failed");
    let results = console.lines().filter(|line| line.starts_with("test result: ok. ")).count();
    assert_eq!(results, tests, "not every test program came to its end");
    assert!(!console.contains("skipped: "), "what the lane is for was skipped");
    console
}

/// The client's connection was the first one in the end, and all that was acknowledged is there.
fn nothing_was_lost(console: &str) {
    let answer = |word: &str| -> serde_json::Value {
        let line = console.lines().find_map(|line| line.strip_prefix(word));
        serde_json::from_str(line.unwrap_or_else(|| panic!("there is no {word}"))).expect("an answer")
    };
    let written = answer("WRITTEN ");
    assert!(written["broken"].is_null(), "the client's connection broke: {written}");
    assert!(written["acked"].as_u64() >= Some(100), "the client did not go on: {written}");
    assert_eq!(answer("CHECKED ")["lost"], 0);
}

/// One host for all: it takes as long to start as a guest on it. Its kernel also has the soft-dirty bits that this machine's may lack.
#[test]
fn linux_under_kvm_and_a_failover_between_agents() {
    let directory = tempfile::tempdir().expect("a directory");
    let (Some((disk, mut script)), Some(understudy), Some(units)) =
        (tests(directory.path(), &["kvm_linux"]), programs("understudy"), programs("vmm_hooks"))
    else {
        return;
    };
    disk.add_program(&units[0]);
    script.push_str(&format!("{} --nocapture track::soft_dirty\n", units[0].display()));
    disk.add_program(&understudy[0]);
    let ip = disk.add_named("ip");
    script.push_str(&format!("export PATH={}:$PATH\n", ip.display()));
    script.push_str(&format!("UNDERSTUDY={}\nGUEST={}\n", understudy[0].display(), host::guest().display()));
    script.push_str(COMMON);
    script.push_str(include_str!("failover.sh"));
    let console = run(directory.path(), PLAIN, disk, &script, 2, &[]);
    nothing_was_lost(&console);
}

#[test]
fn a_microvm_with_linux_under_kvm_on_a_wide_processor() {
    let directory = tempfile::tempdir().expect("a directory");
    let Some((disk, script)) = tests(directory.path(), &["kvm_linux"]) else { return };
    run(directory.path(), WIDE, disk, &script, 1, &[]);
}

/// Firmware of a stock machine under a kernel that it is given.
const FIRMWARE: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/linuxboot_dma.bin"];

/// The host's kernel is older than `PAGEMAP_SCAN`, so dirty pages are found by soft-dirty bits.
#[test]
fn a_stock_qemu_under_kvm_goes_on_after_its_host_and_nothing_is_lost() {
    let Some(understudy) = programs("understudy") else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(directory.path());
    disk.add_program(&understudy[0]);
    disk.add_guest();
    FIRMWARE.iter().for_each(|file| disk.add(Path::new(file)));
    let (ip, qemu) = (disk.add_named("ip"), disk.add_named("qemu-system-x86_64"));
    let mut script = format!("export PATH={}:{}:$PATH TMPDIR=/run RUST_BACKTRACE=1\n", ip.display(), qemu.display());
    script.push_str(&format!("UNDERSTUDY={} IP={}/ip CPU=host\n", understudy[0].display(), ip.display()));
    script.push_str(&format!("GUEST={}\n", host::guest().display()));
    script.push_str(COMMON);
    script.push_str(include_str!("attached.sh"));
    let console = run(directory.path(), PLAIN, disk, &script, 0, &["-m", "1792"]);
    assert!(console.contains("the kernel has no PAGEMAP_SCAN, but soft-dirty bits"), "another tracker was used");
    nothing_was_lost(&console);
}
