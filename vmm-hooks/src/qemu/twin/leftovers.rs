//! Twins that a former life of the agent left behind when it was killed.
//!
//! Such a copy is of no use: what it lacks was in the agent's memory, and no record lets a later life of the agent activate
//! it. But its process holds memory and the tap, so that no new twin could be made.
//!
//! Promise: only what certainly never ran is ended: a QEMU that still waits for its device state, and scratch copies of
//! rehearsals, which never run. One that was activated is not touched, nor one whose monitor somebody else holds.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::QemuTwinHost;
use super::machine::KILL_TIMEOUT;
use crate::guest::GuestError;
use crate::qemu::Target;
use crate::qemu::cmdline::qmp_path;
use crate::qemu::discover;
use crate::qemu::qmp::QmpError;
use crate::qemu::tap;

/// Within a twin's directory: the taps that were made for it, one a line.
const TAPS: &str = "taps";

impl QemuTwinHost {
    /// Removes what a former life of the agent left of twins that never ran: processes, taps, directories. To be called once,
    /// before the first twin is made. Returns the removed directories; what cannot be removed is logged and left.
    #[must_use]
    pub fn remove_leftovers(&self) -> Vec<PathBuf> {
        let removed = |path: &PathBuf| match remove(path) {
            Ok(removed) => removed,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a former twin is left as it is");
                false
            }
        };
        directories(&self.options.run_dir).into_iter().filter(removed).collect()
    }
}

/// Notes in a twin's directory which taps are about to be made for it.
pub(super) fn note_taps<'a>(run_dir: &Path, taps: impl Iterator<Item = &'a str>) -> std::io::Result<()> {
    let text: String = taps.map(|tap| format!("{tap}\n")).collect();
    fs::write(run_dir.join(TAPS), text)
}

fn directories(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Removes one twin's directory and what belongs to it. `false` if the twin was activated, and so is none any more.
fn remove(run_dir: &Path) -> Result<bool, GuestError> {
    if !end(run_dir, |status| status == "inmigrate")? {
        return Ok(false);
    }
    for scratch in directories(run_dir) {
        end(&scratch, |_| true)?;
    }
    for ifname in fs::read_to_string(run_dir.join(TAPS)).unwrap_or_default().lines() {
        tap::remove_unused(ifname)?;
    }
    let left = |error| GuestError::new(crate::guest::GuestErrorKind::Failed, "its directory stays").because(error);
    fs::remove_dir_all(run_dir).map_err(|error: std::io::Error| left(error))?;
    Ok(true)
}

/// Ends the QEMU whose monitor is in `run_dir`, if its state allows. Whether none runs any more.
fn end(run_dir: &Path, may_end: impl Fn(&str) -> bool) -> Result<bool, GuestError> {
    let socket = qmp_path(run_dir);
    match std::os::unix::net::UnixStream::connect(&socket) {
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => return Ok(true),
        Err(error) => return Err(QmpError::Io(error).into()),
        // QEMU serves one client at a time: this one goes before the next line asks.
        Ok(stream) => drop(stream),
    }
    let (mut qmp, process) = discover::connect(&Target::QmpSocket(socket))?;
    let status = qmp.execute("query-status", json!({}))?;
    if !status["status"].as_str().is_some_and(may_end) {
        return Ok(false);
    }
    process.kill_confirmed(KILL_TIMEOUT)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::TwinHostOptions;

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
        assert_eq!(host.remove_leftovers(), [dir.clone()]);
        assert!(!dir.exists());
        assert!(host.remove_leftovers().is_empty());
    }
}
