//! What a host remembers of a VM over restarts: one small file each, on the disk before the caller goes on.
//!
//! It holds what docs/protocol.md wants durable on a node: the VM's identity, the store it is recorded in, the highest
//! generation seen, and the mark "activating this generation at this epoch".

use std::io;
use std::path::{Path, PathBuf};

use heartbeat::files;
use heartbeat_core::ids::VmId;
use serde::{Deserialize, Serialize};

/// Numbers of two sessions of a VM differ by this much: more epochs than a session can use in thirty years.
const SESSION_NUMBERS: u64 = 1_000_000_000_000;

/// Where a session's numbers begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Numbers {
    /// Its first epoch.
    pub(super) first_epoch: u64,
    /// Its first question to the store.
    pub(super) first_request: u64,
}

/// What the file holds. Ids are hex text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    vm: String,
    #[serde(default)]
    store: Option<String>,
    #[serde(default)]
    generation: u64,
    #[serde(default)]
    sessions: u64,
    #[serde(default)]
    mark: Option<Mark>,
}

/// A copy that was about to be activated, or was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mark {
    /// Of the grant.
    pub(super) generation: u64,
    /// It goes on from.
    pub(super) epoch: u64,
}

/// The memory of one VM on this host. Errors latch: after a failed write it refuses all further ones, because nobody knows
/// what is on the disk.
#[derive(Debug)]
pub(super) struct Durable {
    path: PathBuf,
    text: Text,
    vm: VmId,
    failed: bool,
}

impl Durable {
    /// What is remembered of the VM called `name`, if anything is.
    ///
    /// # Errors
    /// As [`Durable::open`].
    pub(super) fn find(state_dir: &Path, name: &str) -> io::Result<Option<Self>> {
        if Self::path(state_dir, name).try_exists()? {
            // Not used: the file has an identity.
            return Self::open(state_dir, name, VmId::default()).map(Some);
        }
        Ok(None)
    }

    fn path(state_dir: &Path, name: &str) -> PathBuf {
        state_dir.join("vms").join(format!("{}.toml", escape(name)))
    }

    /// Reads what is remembered of the VM called `name`; if nothing is, remembers it under `fresh`.
    ///
    /// # Errors
    /// If the file cannot be read, written or understood. It is never taken for absent then.
    pub(super) fn open(state_dir: &Path, name: &str, fresh: VmId) -> io::Result<Self> {
        files::make_dir(&state_dir.join("vms"))?;
        let path = Self::path(state_dir, name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = Text { vm: fresh.to_string(), store: None, generation: 0, sessions: 0, mark: None };
                write(&path, &text)?;
                text
            }
            Err(error) => return Err(error),
        };
        let vm = text.vm.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Self { path, text, vm, failed: false })
    }

    /// The VM's identity.
    pub(super) fn vm(&self) -> VmId {
        self.vm
    }

    /// The highest generation seen.
    pub(super) fn generation(&self) -> u64 {
        self.text.generation
    }

    /// The store that the VM was recorded in, as hex.
    pub(super) fn store(&self) -> Option<&str> {
        self.text.store.as_deref()
    }

    fn change(&mut self, change: impl FnOnce(&mut Text)) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier write of this VM's state failed"));
        }
        let mut text = self.text.clone();
        change(&mut text);
        if text == self.text {
            return Ok(());
        }
        if let Err(error) = write(&self.path, &text) {
            self.failed = true;
            return Err(error);
        }
        self.text = text;
        Ok(())
    }

    /// Takes on another identity: a standby learns it from its primary.
    pub(super) fn set_vm(&mut self, vm: VmId) -> io::Result<()> {
        self.change(|text| {
            if text.vm != vm.to_string() {
                *text = Text { vm: vm.to_string(), store: None, generation: 0, sessions: text.sessions, mark: None };
            }
        })?;
        self.vm = vm;
        Ok(())
    }

    /// Remembers the highest generation seen.
    pub(super) fn set_generation(&mut self, generation: u64) -> io::Result<()> {
        self.change(|text| text.generation = text.generation.max(generation))
    }

    /// Remembers the store.
    pub(super) fn set_store(&mut self, store: &str) -> io::Result<()> {
        self.change(|text| text.store = Some(store.to_owned()))
    }

    /// Remembers an activation before it begins.
    pub(super) fn set_mark(&mut self, mark: Mark) -> io::Result<()> {
        self.change(|text| {
            text.mark = Some(mark);
            text.generation = text.generation.max(mark.generation);
        })
    }

    /// Begins a session: its numbers are higher than any of an earlier session.
    pub(super) fn begin_session(&mut self) -> io::Result<Numbers> {
        self.change(|text| text.sessions += 1)?;
        let first = (self.text.sessions - 1) * SESSION_NUMBERS + 1;
        Ok(Numbers { first_epoch: first, first_request: first })
    }
}

fn write(path: &Path, text: &Text) -> io::Result<()> {
    let text = toml::to_string(text).map_err(io::Error::other)?;
    files::replace(path, text.as_bytes())
}

/// A file name for any VM name: what could mean something to a file system is written as its code.
pub(super) fn escape(name: &str) -> String {
    let mut escaped = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02x}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_over_restarts() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (first, other) = (VmId([1; 16]), VmId([2; 16]));
        let mut memory = Durable::open(dir.path(), "../web 1", first).expect("opens");
        assert_eq!(memory.begin_session().expect("writes").first_epoch, 1);
        memory.set_generation(7).expect("writes");
        memory.set_generation(3).expect("never lower");
        memory.set_mark(Mark { generation: 8, epoch: 5 }).expect("writes");
        drop(memory);
        let mut again = Durable::open(dir.path(), "../web 1", other).expect("opens again");
        assert_eq!((again.vm(), again.generation()), (first, 8));
        assert_eq!(again.text.mark, Some(Mark { generation: 8, epoch: 5 }));
        assert_eq!(again.begin_session().expect("writes").first_epoch, SESSION_NUMBERS + 1);
        assert_eq!(
            std::fs::read_dir(dir.path().join("vms")).expect("list").count(),
            1,
            "nothing escapes the directory"
        );
    }

    #[test]
    fn a_damaged_file_is_never_taken_for_absent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens"));
        std::fs::write(dir.path().join("vms/a.toml"), "generation = 1").expect("damage");
        assert!(Durable::open(dir.path(), "a", VmId([1; 16])).is_err());
    }

    #[test]
    fn a_failed_write_latches() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
        std::fs::remove_dir_all(dir.path().join("vms")).expect("remove");
        assert!(memory.set_generation(1).is_err());
        std::fs::create_dir(dir.path().join("vms")).expect("back again");
        assert!(memory.set_generation(2).is_err(), "what is on the disk is not known");
    }
}
