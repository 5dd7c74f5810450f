//! `cargo xtask setup`: what the real lanes need beyond Rust.
//!
//! Promise: idempotent, silent about nothing, and never an error for means that this machine lacks: those are
//! listed in [`Means`], and whoever needs them decides. Nothing of the guest is installed into the host.

mod apt;
mod cpio;
mod guest;
pub(crate) mod newer;
mod pilot;
pub(crate) mod postgres;

use std::fs::File;
use std::path::PathBuf;

use anyhow::Result;

use crate::shell;

/// Programs the real lanes call, and the Debian packages they come from.
const PROGRAMS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("ip", "iproute2"),
    ("mkfs.ext4", "e2fsprogs"),
];
/// Programs that single tests call, which say `skipped` without them.
const FOR_TESTS: [(&str, &str); 6] = [
    ("prometheus", "prometheus"),
    ("promtool", "prometheus"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
];
/// The same, for long tests alone: a browser is a download of 120 MB.
const FOR_LONG_TESTS: [(&str, &str); 1] = [("chromium", "chromium")];

/// What this machine can do, after the set-up.
#[derive(Debug)]
pub(crate) struct Means {
    /// Programs that are not there, with why they could not be installed.
    missing: Vec<String>,
    /// The directory of the guest image, or why there is none.
    guest: Result<PathBuf, String>,
}

impl Means {
    /// The guest image's directory if a real demo can run here, or all reasons why not.
    pub(crate) fn demo(&self) -> Result<PathBuf, String> {
        let mut reasons = self.missing.clone();
        if !shell::is_root() {
            reasons.push("network namespaces need the superuser".to_owned());
        }
        match &self.guest {
            Ok(dir) if reasons.is_empty() => return Ok(dir.clone()),
            Ok(_) => {}
            Err(reason) => reasons.push(reason.clone()),
        }
        Err(reasons.join("; "))
    }

    /// The pilot's image if a demo with a microVM can run here, or all reasons why not.
    pub(crate) fn microvm(&self) -> Result<PathBuf, String> {
        let mut reasons = Vec::new();
        if !shell::is_root() {
            reasons.push("network namespaces need the superuser".to_owned());
        }
        if shell::find("ip").is_none() {
            reasons.push("ip (Debian package iproute2) is missing".to_owned());
        }
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            reasons.push(format!("/dev/kvm cannot be used: {error}"));
        }
        let pilot = shell::target().join("pilot/pilot");
        if !pilot.is_file() {
            reasons.push(format!("{} was not built", pilot.display()));
        }
        if reasons.is_empty() { Ok(pilot) } else { Err(reasons.join("; ")) }
    }

    /// Says what will run here.
    pub(crate) fn print(&self) {
        match self.demo() {
            Ok(dir) => println!("setup: complete, the guest image is in {}", dir.display()),
            Err(reasons) => println!("setup: the demo and the lanes on a real VM will be skipped here: {reasons}"),
        }
    }
}

/// Installs and builds what is missing.
///
/// # Errors
/// If the build directory cannot be written.
pub(crate) fn run(refresh: bool) -> Result<Means> {
    let mut apt = apt::Apt::new();
    let missing = programs(&mut apt, &PROGRAMS);
    for (program, service) in [("prometheus", "prometheus"), ("etcd", "etcd")] {
        if shell::find(program).is_none() {
            println!("setup: where systemd runs, Debian also starts its {program} (systemctl disable --now {service})");
        }
    }
    for what in programs(&mut apt, &FOR_TESTS) {
        println!(
            "setup: the tests of dashboards and alerts, of etcd, or of disks, will be skipped here in part: {what}"
        );
    }
    pilot::build()?;
    let guest = guest::build(&mut apt, refresh)?;
    Ok(Means { missing, guest })
}

/// Installs what only long tests need.
pub(crate) fn for_long_tests() {
    for what in programs(&mut apt::Apt::new(), &FOR_LONG_TESTS) {
        println!("setup: the tests of the status page in a browser will be skipped here: {what}");
    }
}

/// Installs what is not there of `wanted`; returns what is still missing.
fn programs(apt: &mut apt::Apt, wanted: &[(&str, &str)]) -> Vec<String> {
    let absent = || wanted.iter().filter(|(program, _)| shell::find(program).is_none());
    let names: Vec<_> = wanted.iter().map(|&(program, _)| program).collect();
    let mut asked: Vec<&str> = Vec::new();
    let mut outcome = Ok(());
    // Once more for what the first installation took away: Debian's packages of one program at two versions exclude
    // each other, and a machine may have had a part of it from elsewhere.
    while let packages @ [_, ..] = packages(absent().filter(|(_, package)| !asked.contains(package))).as_slice() {
        asked.extend_from_slice(packages);
        outcome = apt.install(packages);
        if outcome.is_err() {
            break;
        }
    }
    if asked.is_empty() {
        println!("setup: programs are there: {}", names.join(", "));
    }
    absent()
        .map(|(program, package)| {
            let why = outcome.as_ref().err().map_or_else(String::new, |error| format!(": {error:#}"));
            format!("{program} (Debian package {package}) is missing{why}")
        })
        .collect()
}

/// The packages of `programs`, each once.
fn packages<'a>(programs: impl Iterator<Item = &'a (&'a str, &'a str)>) -> Vec<&'a str> {
    let mut packages: Vec<_> = programs.map(|&(_, package)| package).collect();
    packages.dedup();
    packages
}
