//! Network namespaces, and removing what a laboratory left in the kernel.
//!
//! Promise: every name carries its maker's pid (`us-PID-x`), so a laboratory finds its own and those of dead makers by
//! name alone. [`sweep`] needs no memory of what was made, so it also serves a panic and the next start.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
/// Bound on waiting for killed processes to leave a namespace.
const LEAVE: Duration = Duration::from_secs(5);

/// A namespace's full name: `us-PID-ROLE`.
#[must_use]
pub fn full_name(maker: u32, role: &str) -> String {
    format!("{}{role}", prefix(maker))
}

fn prefix(maker: u32) -> String {
    format!("us-{maker}-")
}

/// Runs `ip WORDS...`, words separated by blanks.
///
/// # Errors
/// With what `ip` said.
pub fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(words.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .context("cannot start `ip` (Debian package iproute2)")?;
    if !output.status.success() {
        bail!("`ip {words}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The processes whose network namespace is `name`. None if there is no such namespace.
pub fn processes_in(name: &str) -> Vec<Pid> {
    let Ok(namespace) = fs::metadata(Path::new(NAMES).join(name)) else {
        return Vec::new();
    };
    let Ok(all) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    all.filter_map(|entry| {
        let entry = entry.ok()?;
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let its = fs::metadata(entry.path().join("ns/net")).ok()?;
        ((its.dev(), its.ino()) == (namespace.dev(), namespace.ino())).then(|| Pid::from_raw(pid))?
    })
    .collect()
}

/// Kills every process in the namespace and returns when none is left.
///
/// # Errors
/// If one stays for longer than [`LEAVE`].
pub fn kill_all(name: &str) -> Result<()> {
    let deadline = Instant::now() + LEAVE;
    loop {
        let left = processes_in(name);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("processes {left:?} in namespace {name} do not end");
        }
        for pid in left {
            // It may have ended by itself since; the next look tells.
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Removes everything that the laboratory of process `maker` made in the kernel. Best effort, says what it could not do.
pub fn sweep(maker: u32) {
    let names = match names() {
        Ok(names) => names,
        Err(error) => {
            eprintln!("cannot list {NAMES}: {error}");
            return;
        }
    };
    for name in names.iter().filter(|name| name.starts_with(&prefix(maker))) {
        if let Err(error) = kill_all(name).and_then(|()| ip(&format!("netns del {name}"))) {
            eprintln!("cannot remove namespace {name}: {error:#}");
        }
    }
}

/// Removes what makers left that are no more. Returns their pids.
///
/// # Errors
/// If the names cannot be listed.
pub fn sweep_leftovers() -> io::Result<Vec<u32>> {
    let mut dead: Vec<u32> = names()?.iter().filter_map(|name| maker(name)).filter(|&pid| !is_maker(pid)).collect();
    dead.sort_unstable();
    dead.dedup();
    for &pid in &dead {
        sweep(pid);
    }
    Ok(dead)
}

fn names() -> io::Result<Vec<String>> {
    match fs::read_dir(NAMES) {
        Ok(all) => all.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The pid in `us-PID-ROLE`.
fn maker(name: &str) -> Option<u32> {
    let (pid, role) = name.strip_prefix("us-")?.split_once('-')?;
    (role.len() == 1).then(|| pid.parse().ok())?
}

/// Whether there is a process of this pid. Laboratories are made by more than one program, so its name says nothing; a pid
/// that is used again only keeps what was left until the next start.
fn is_maker(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::{full_name, maker};

    #[test]
    fn only_names_of_ours_have_a_maker() {
        assert_eq!(maker(&full_name(4711, "a")), Some(4711));
        assert_eq!(maker("us-labt"), None);
        assert_eq!(maker("us-12-other"), None);
        assert_eq!(maker("us-x-a"), None);
        assert_eq!(maker("12-a"), None);
    }
}
