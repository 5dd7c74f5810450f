//! Device and CPU state: taken from QEMU through a memfd, completed so that `migrate-incoming` loads it.
//!
//! QEMU knows the memfd as `/dev/fdset/...`, a name of its own: it opens nothing. A path to it would need a `/dev/fd` or a `/proc` where QEMU lives,
//! and leave from whatever confines it; libvirt gives its QEMUs a `/dev` without. (Its docs/interop/qmp: `add-fd`; `qemu_open` in util/osdep.c.)
//!
//! `xen-save-devices-state` needs no Xen. Its stream lacks the two sections that the loader of a migration asks for: the
//! configuration (the machine type's canonical name) after the header, and the description at the end. Both are added here.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::OUR_PREFIX;
use super::qmp::{Pending, Qmp, QmpError};

/// Magic and version, with which each stream starts.
const HEADER: &[u8] = b"QEVM\0\0\0\x03";

/// Type of the section with the machine type's name.
const CONFIGURATION: u8 = 7;

/// Type of the section that describes the stream for debuggers.
const DESCRIPTION: u8 = 6;

/// An empty description.
const NO_DESCRIPTION: &[u8] = b"{}";

/// Bound on device state: 256 MiB.
const STATE_MAX: u64 = 256 << 20;

/// Why device state could not be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("the file with the device state cannot be used")]
    Read(#[source] io::Error),
    #[error("QEMU's device state is {what}")]
    Malformed { what: String },
}

/// The file that one QEMU saves its device state to.
#[derive(Debug)]
pub(super) struct StateFile {
    file: File,
    /// The same, opened to be written, which is what QEMU looks for in the set. It writes to a duplicate, from wherever this one is.
    written: File,
    fdset: u64,
    /// A save was asked for, and what came of it was not read: it may still go on.
    asked: bool,
    arguments: Value,
    machine: String,
}

impl StateFile {
    /// Gives QEMU a file to save to. `machine` is the machine type's canonical name.
    pub(super) fn open(qmp: &mut Qmp, machine: &str) -> Result<Self, StateError> {
        let (file, written) = memory().map_err(StateError::Read)?;
        let opaque = json!({ "opaque": format!("{OUR_PREFIX}device-state") });
        let added = qmp.execute_with_fd("add-fd", opaque, written.as_fd())?;
        let Some(fdset) = added.get("fdset-id").and_then(Value::as_u64) else {
            return Err(StateError::Malformed { what: "not taken: add-fd gave no number".to_owned() });
        };
        let arguments = json!({ "filename": format!("/dev/fdset/{fdset}"), "live": false });
        Ok(Self { file, written, fdset, asked: false, arguments, machine: machine.to_owned() })
    }

    /// Asks QEMU to save, without waiting. Waits for an earlier save whose answer was late, and which would write into this one.
    pub(super) fn start(&mut self, qmp: &mut Qmp) -> Result<Pending, StateError> {
        if self.asked {
            // QEMU does one command after the other.
            qmp.execute("query-status", json!({}))?;
        }
        self.asked = true;
        self.written.set_len(0).and_then(|()| self.written.rewind()).map_err(StateError::Read)?;
        Ok(qmp.send("xen-save-devices-state", self.arguments.clone())?)
    }

    /// Reads what QEMU saved and has said so, completed, into `into`.
    pub(super) fn read(&mut self, into: &mut Vec<u8>) -> Result<(), StateError> {
        self.asked = false;
        let length = self.file.metadata().map_err(StateError::Read)?.len();
        if length > STATE_MAX {
            return Err(StateError::Malformed { what: format!("{length} bytes long, the bound is {STATE_MAX}") });
        }
        let length = usize::try_from(length).expect("bounded above");
        into.clear();
        into.resize(length.min(HEADER.len()), 0);
        self.file.read_exact_at(into, 0).map_err(StateError::Read)?;
        put_configuration(into, &self.machine);
        let head = into.len();
        into.resize(head + length - HEADER.len().min(length), 0);
        self.file.read_exact_at(&mut into[head..], HEADER.len() as u64).map_err(StateError::Read)?;
        if into.get(head) == Some(&CONFIGURATION) {
            // This QEMU writes the section itself.
            into.drain(HEADER.len()..head);
        }
        if !into.starts_with(HEADER) || length <= HEADER.len() || into.last() != Some(&0) {
            return Err(StateError::Malformed { what: format!("no whole stream ({length} bytes)") });
        }
        put_description(into);
        Ok(())
    }

    /// Takes files of ours out of QEMU that somebody left there: one of 9.1 or newer keeps them when their monitor is gone. Says which.
    pub(super) fn leftovers(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
        let sets = qmp.execute("query-fdsets", json!({}))?;
        let files = |set: &Value| set.get("fds").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut removed = Vec::new();
        for set in sets.as_array().into_iter().flatten() {
            for file in files(set) {
                if file["opaque"].as_str().is_some_and(|opaque| opaque.starts_with(OUR_PREFIX)) {
                    qmp.execute("remove-fd", json!({ "fdset-id": set["fdset-id"], "fd": file["fd"] }))?;
                    removed.push(format!("file {}", file["opaque"].as_str().unwrap_or_default()));
                }
            }
        }
        Ok(removed)
    }

    /// Takes the file out of QEMU.
    pub(super) fn close(&self, qmp: &mut Qmp) -> Result<(), QmpError> {
        qmp.execute("remove-fd", json!({ "fdset-id": self.fdset })).map(drop)
    }
}

/// A file in memory: to be read, and to be written.
fn memory() -> io::Result<(File, File)> {
    let file = File::from(memfd_create(format!("{OUR_PREFIX}device-state"), MemfdFlags::CLOEXEC)?);
    let written = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok((file, written))
}

fn put_configuration(stream: &mut Vec<u8>, machine: &str) {
    stream.push(CONFIGURATION);
    stream.extend_from_slice(&u32::try_from(machine.len()).expect("a short name").to_be_bytes());
    stream.extend_from_slice(machine.as_bytes());
}

fn put_description(stream: &mut Vec<u8>) {
    stream.push(DESCRIPTION);
    stream.extend_from_slice(&u32::try_from(NO_DESCRIPTION.len()).expect("two bytes").to_be_bytes());
    stream.extend_from_slice(NO_DESCRIPTION);
}

/// Whether a stream is one that a loader of `machine` may be given: a bad one makes QEMU abort.
pub(super) fn is_loadable(stream: &[u8], machine: &str) -> bool {
    let mut start = HEADER.to_vec();
    put_configuration(&mut start, machine);
    let mut end = vec![0];
    put_description(&mut end);
    stream.len() > start.len() + end.len() && stream.starts_with(&start) && stream.ends_with(&end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &[u8]) -> Result<Vec<u8>, StateError> {
        let (file, written) = memory().expect("a memfd");
        written.write_all_at(stream, 0).expect("memory");
        let mut state =
            StateFile { file, written, fdset: 0, asked: true, arguments: json!({}), machine: "pc-q35-7.2".to_owned() };
        let mut into = vec![9; 3];
        state.read(&mut into).map(|()| into)
    }

    #[test]
    fn a_stream_is_completed_and_then_loadable() {
        let done = read(b"QEVM\0\0\0\x03\x04abc\0").expect("a whole stream");
        assert_eq!(done, b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x04abc\0\x06\0\0\0\x02{}");
        assert!(is_loadable(&done, "pc-q35-7.2"));
        assert!(!is_loadable(&done, "pc-q35-8.0"));
        assert!(!is_loadable(&done[..done.len() - 1], "pc-q35-7.2"));
        assert!(!is_loadable(b"", "pc-q35-7.2"));
    }

    #[test]
    fn a_configuration_that_is_there_is_kept() {
        let done = read(b"QEVM\0\0\0\x03\x07\0\0\0\x01x\x04abc\0").expect("a whole stream");
        assert_eq!(done, b"QEVM\0\0\0\x03\x07\0\0\0\x01x\x04abc\0\x06\0\0\0\x02{}");
    }

    #[test]
    fn half_a_stream_is_an_error() {
        for stream in [&b""[..], b"QEV", b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x02\x04abc\0", b"QEVM\0\0\0\x03\x04abc"] {
            assert!(read(stream).is_err(), "{stream:?}");
        }
    }
}
