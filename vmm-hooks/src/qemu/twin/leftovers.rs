//! Twins that a former life of the agent left behind when it was killed.
//!
//! Such a copy is of no use: what it lacks was in the agent's memory, and no record lets a later life of the agent activate
//! it. But its process holds memory and the tap, so that no new twin could be made.
//!
//! Promise: only what certainly never ran is ended: a QEMU that still waits for its device state, or has loaded it and was not told to
//! run, and scratch copies of rehearsals, which never run. One that was activated is not touched, nor one whose monitor somebody
//! else holds.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{FlockOperation, flock};
use serde_json::json;

use super::QemuTwinHost;
use super::machine::{KILL_TIMEOUT, LAUNCH_TIMEOUT, RETRY};
use crate::guest::{GuestError, GuestErrorKind, Survivor};
use crate::qemu::Target;
use crate::qemu::cmdline::qmp_path;
use crate::qemu::discover;
use crate::qemu::qmp::QmpError;
use crate::qemu::runstate::run_state;

use crate::sys::process::PidFd;
use crate::tap;

/// Within a twin's directory: the taps that were made for it, one a line.
const TAPS: &str = "taps";

/// Within a directory that a QEMU runs in: its pid and when it started.
const PROCESS: &str = "process";

/// What a former life of the agent left of twins, and is no more.
#[derive(Debug, Default)]
pub struct Removed {
    /// The directories.
    pub paths: Vec<PathBuf>,
    /// Names of VMs whose twin lived, had not run, and was ended before it could.
    pub never_ran: Vec<String>,
}

impl QemuTwinHost {
    /// Removes what a former life of the agent left of twins that never ran: processes, taps, directories. To be called once,
    /// before the first twin is made. What cannot be removed is logged and left.
    #[must_use]
    pub fn remove_leftovers(&self) -> Removed {
        let mut all = Removed::default();
        for path in directories(&self.options.run_dir) {
            match remove(&path) {
                Ok(Ended::Runs) => {}
                Ok(Ended::Gone) => all.paths.push(path),
                Ok(Ended::NeverRan(name)) => {
                    all.paths.push(path);
                    all.never_ran.extend(name);
                }
                Err(error) => tracing::warn!(path = %path.display(), %error, "a former twin is left as it is"),
            }
        }
        all
    }
}

impl QemuTwinHost {
    /// The twins of a former life of the agent that run: by the VM's name, where each can be attached to.
    #[must_use]
    pub fn survivors(&self) -> Vec<(String, Survivor)> {
        let survivor = |path: PathBuf| {
            let process = noted_process(&path)?;
            let (control, argv) = (qmp_path(&path), process.command_line().ok()?);
            let runs = run_state(&Target::QmpSocket(control.clone())).ok()? == "running";
            let name = crate::qemu::target::vm_name(&argv)?;
            let survivor = Survivor { pid: process.pid(), control: control.to_string_lossy().into_owned() };
            (runs && !process.has_exited()).then_some((name, survivor))
        };
        directories(&self.options.run_dir).into_iter().filter_map(survivor).collect()
    }
}

/// Notes in a twin's directory which taps are about to be made for it.
pub(super) fn note_taps<'a>(run_dir: &Path, taps: impl Iterator<Item = &'a str>) -> std::io::Result<()> {
    let text: String = taps.map(|tap| format!("{tap}\n")).collect();
    fs::write(run_dir.join(TAPS), text)
}

/// A twin that runs is no twin any more: its taps are its own.
pub(super) fn forget_taps(run_dir: &Path) {
    if let Err(error) = fs::remove_file(run_dir.join(TAPS)) {
        tracing::warn!(path = %run_dir.display(), %error, "the taps of a twin that runs are still noted as ours");
    }
}

/// Refuses if a former twin in `run_dir` lives and has gone on, or has loaded what it would go on from. Changes nothing.
pub(super) fn refuse_gone_on(run_dir: &Path, name: &str) -> Result<(), GuestError> {
    let Some(process) = noted_process(run_dir) else { return Ok(()) };
    // One that cannot be asked is held by somebody, who knows what it does.
    let Ok(status) = run_state(&Target::QmpSocket(qmp_path(run_dir))) else { return Ok(()) };
    if status == "inmigrate" || process.has_exited() {
        return Ok(());
    }
    let message = format!("process {} on this host is an earlier copy of {name}, in state `{status}`", process.pid());
    Err(GuestError::new(GuestErrorKind::Refused, message)
        .advise("it was not touched; if no other host needs it, end that process and protect the VM again"))
}

/// Notes in a directory which process was started there, so that one that does not listen yet is not taken for none.
pub(super) fn note_process(run_dir: &Path, process: &PidFd) -> std::io::Result<()> {
    let new = run_dir.join("process.new");
    fs::write(&new, format!("{} {}\n", process.pid(), process.start_time()))?;
    fs::rename(new, run_dir.join(PROCESS))
}

/// Locks a twin's directory until the file is dropped.
pub(super) fn lock(run_dir: &Path) -> std::io::Result<File> {
    let dir = File::open(run_dir)?;
    flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
    Ok(dir)
}

/// Removes the directory of a twin that was activated and whose QEMU has ended since: nobody else does before this agent starts
/// again, and there is only so much room for directories of one name. One that a twin of this agent is in stays.
pub(super) fn remove_dead(run_dir: &Path) {
    // Without a note its process is about to be started.
    if !run_dir.join(PROCESS).exists() || noted_process(run_dir).is_some() {
        return;
    }
    let Ok(_lock) = lock(run_dir) else { return };
    match remove(run_dir) {
        Ok(Ended::Gone | Ended::NeverRan(_)) => {
            tracing::info!(path = %run_dir.display(), "removed what a copy that has ended had left");
        }
        Ok(Ended::Runs) => {}
        Err(error) => tracing::warn!(path = %run_dir.display(), %error, "a former twin is left as it is"),
    }
}

/// The process that was noted, if it still lives.
fn noted_process(run_dir: &Path) -> Option<PidFd> {
    let text = fs::read_to_string(run_dir.join(PROCESS)).ok()?;
    let (pid, start_time) = text.trim().split_once(' ')?;
    PidFd::open_same(pid.parse().ok()?, start_time.parse().ok()?).ok()
}

fn directories(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// How a former twin's QEMU is now.
#[derive(Debug)]
enum Ended {
    /// It was activated: it is none any more, and lives on.
    Runs,
    /// It has ended by itself, and may have run before.
    Gone,
    /// It never ran and was ended; of this VM, if its command line says.
    NeverRan(Option<String>),
}

/// Removes one twin's directory and what belongs to it, unless it was activated.
fn remove(run_dir: &Path) -> Result<Ended, GuestError> {
    // The taps are forgotten as soon as it runs, and until then nobody else has its monitor who could pause it.
    let noted = run_dir.join(TAPS).exists();
    let never_ran = |status: &str| status == "inmigrate" || (noted && matches!(status, "paused" | "prelaunch"));
    let ended = end(run_dir, never_ran)?;
    if let Ended::Runs = ended {
        return Ok(ended);
    }
    for scratch in directories(run_dir) {
        end(&scratch, |_| true)?;
    }
    for ifname in fs::read_to_string(run_dir.join(TAPS)).unwrap_or_default().lines() {
        tap::remove_unused(ifname)?;
    }
    let left = |error| GuestError::new(GuestErrorKind::Failed, "its directory stays").because(error);
    fs::remove_dir_all(run_dir).map_err(|error: std::io::Error| left(error))?;
    Ok(ended)
}

/// Ends the QEMU whose monitor is in `run_dir`, if its state allows.
fn end(run_dir: &Path, may_end: impl Fn(&str) -> bool) -> Result<Ended, GuestError> {
    let socket = qmp_path(run_dir);
    let deadline = Instant::now() + LAUNCH_TIMEOUT;
    loop {
        match std::os::unix::net::UnixStream::connect(&socket) {
            // QEMU serves one client at a time: this one goes before the next line asks.
            Ok(stream) => break drop(stream),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {}
            Err(error) => return Err(QmpError::Io(error).into()),
        }
        let Some(process) = noted_process(run_dir) else { return Ok(Ended::Gone) };
        if process.wait_exit(RETRY) {
            return Ok(Ended::Gone);
        }
        if Instant::now() >= deadline {
            let message = format!("process {} was started there and has no monitor", process.pid());
            return Err(GuestError::new(GuestErrorKind::Failed, message));
        }
    }
    let (mut qmp, process) = discover::connect(&Target::QmpSocket(socket))?;
    let status = qmp.execute("query-status", json!({}))?;
    if !status["status"].as_str().is_some_and(may_end) {
        return Ok(Ended::Runs);
    }
    let name = process.command_line().ok().and_then(|argv| crate::qemu::target::vm_name(&argv));
    process.kill_confirmed(KILL_TIMEOUT)?;
    Ok(Ended::NeverRan(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::TwinHostOptions;
    use crate::qemu::twin::RunDir;

    #[test]
    fn a_process_is_known_again_by_its_start() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(noted_process(dir.path()).is_none());
        let me = PidFd::open(std::process::id()).expect("it lives");
        note_process(dir.path(), &me).expect("room");
        assert_eq!(noted_process(dir.path()).expect("it lives").pid(), me.pid());
        fs::write(dir.path().join(PROCESS), format!("{} {}\n", me.pid(), me.start_time() + 1)).expect("room");
        assert!(noted_process(dir.path()).is_none(), "its pid was reused");
    }

    #[test]
    fn the_directory_of_a_copy_that_has_ended_is_used_again_and_no_other() {
        let parent = tempfile::tempdir().expect("a directory");
        let make = || RunDir::make(parent.path(), "web-1").expect("room");
        let mut first = make();
        let (mut child, path) =
            (std::process::Command::new("sleep").arg("60").spawn().expect("it starts"), first.path.clone());
        let process = PidFd::open(child.id()).expect("it lives");
        note_process(&path, &process).expect("room");
        assert_eq!(make().path, parent.path().join("web-1.1"), "its process lives");
        child.kill().expect("it lives");
        child.wait().expect("it ends");
        assert_eq!(make().path, parent.path().join("web-1.1"), "its twin may start it again");
        first.keep = true;
        drop(first);
        fs::write(path.join("qemu.log"), "of old").expect("room");
        assert_eq!(make().path, path);
        assert!(!path.exists(), "it was made anew, and removed with its twin");
        let unborn = make();
        assert_eq!(make().path, parent.path().join("web-1.1"), "its process is about to start");
        drop(unborn);
    }

    #[test]
    fn a_directory_whose_process_is_gone_is_removed() {
        let parent = tempfile::tempdir().expect("a directory");
        let options = TwinHostOptions { run_dir: parent.path().to_owned(), ..TwinHostOptions::default() };
        let host = QemuTwinHost::new(options);
        let dir = parent.path().join("web-1");
        fs::create_dir_all(dir.join("r1")).expect("room");
        note_taps(&dir, std::iter::empty()).expect("room");
        // A socket nobody listens to, as a killed process leaves it.
        drop(std::os::unix::net::UnixListener::bind(qmp_path(&dir)).expect("a socket"));
        let removed = host.remove_leftovers();
        assert_eq!(removed.paths, std::slice::from_ref(&dir));
        assert!(removed.never_ran.is_empty(), "it may have run before");
        assert!(!dir.exists());
        assert!(host.remove_leftovers().paths.is_empty());
    }
}
