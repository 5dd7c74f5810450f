//! Looks into the image of a disk whose guest has shut down, by the programs of e2fsprogs: nothing is mounted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// What a program said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Whether it ended well.
    pub success: bool,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// Runs a program of the superuser's to its end.
///
/// # Errors
/// If it cannot be started.
pub fn tool(program: &str, args: &[&str]) -> Result<Said> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let ended = Command::new(program).env("PATH", path).args(args).output();
    let ended = ended.with_context(|| format!("cannot run {program}"))?;
    let [out, err] = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Said { success: ended.status.success(), out, err })
}

/// The images below a directory.
#[must_use]
pub fn below(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut rest) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = rest.pop() {
        for path in std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                rest.push(path);
            } else if path.extension().is_some_and(|extension| extension == "raw") {
                found.push(path);
            }
        }
    }
    found
}

/// The file system has no flaw, and its guest took leave of it.
///
/// # Errors
/// What is wrong with it.
pub fn is_sound(image: &Path) -> Result<()> {
    let shown = image.display().to_string();
    // With its journal still to be replayed, what is read of it would be older than what it holds.
    let features = tool("debugfs", &["-R", "feature", &shown])?;
    ensure!(features.out.contains("has_journal"), "cannot read the file system in {shown}: {features:?}");
    ensure!(!features.out.contains("needs_recovery"), "the guest did not unmount the file system in {shown}");
    let checked = tool("e2fsck", &["-f", "-n", &shown])?;
    ensure!(checked.success, "the file system in {shown} is not clean: {}", checked.out);
    Ok(())
}

/// Does what a guest does that mounts the file system after its machine has lost power: what its journal holds is brought into it.
///
/// # Errors
/// If that leaves something wrong.
pub fn replay(image: &Path) -> Result<()> {
    let shown = image.display().to_string();
    // It ends with 1 if it had something to do, so the check after it decides.
    let replayed = tool("e2fsck", &["-p", &shown])?;
    is_sound(image).with_context(|| format!("after its journal was replayed: {replayed:?}"))
}

/// Redis' append-only files hold the keys `0..acked` of a writer.
///
/// # Errors
/// Which are missing.
pub fn redis_holds(image: &Path, tag: &str, acked: u64) -> Result<()> {
    let shown = image.display().to_string();
    let listed = tool("debugfs", &["-R", "ls -p /appendonlydir", &shown])?.out;
    let mut log = String::new();
    for name in listed.lines().filter_map(|line| line.split('/').nth(5)).filter(|name| name.ends_with(".aof")) {
        log.push_str(&tool("debugfs", &["-R", &format!("cat /appendonlydir/{name}"), &shown])?.out);
    }
    let keys: HashSet<&str> = log.lines().map(str::trim_end).collect();
    let missing: Vec<u64> =
        (0..acked).filter(|&number| !keys.contains(super::worker::key(tag, number).as_str())).collect();
    if !missing.is_empty() {
        bail!("{} of {acked} acknowledged writes are not on the disk {shown}: {missing:?}", missing.len());
    }
    Ok(())
}
