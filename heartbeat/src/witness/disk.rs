//! The witness's records on disk: one file per VM ([`crate::slots`]), each record with a checksum.
//!
//! Promises: a record is durable when [`Disk::write`] returns; a file that cannot be trusted is reported as
//! damaged with its VM, never skipped; the store's id is made once, and records without it are
//! not adopted.

use std::io;
use std::path::{Path, PathBuf};

use bincode::{Decode, Encode};
use heartbeat_core::ids::{StoreId, VmId};
use heartbeat_core::record::Record;
use heartbeat_core::witness::MAX_VMS;

use crate::quic::{decode, encode};
use crate::{files, slots};

const STORE_FILE: &str = "store";
const RECORDS_DIR: &str = "records";
const EXTENSION: &str = "record";
/// First bytes of a record file; the digit is the format's version.
const MAGIC: &[u8; 8] = b"USRECRD1";
/// Bytes of the checksum at the end.
const CHECKSUM: usize = 4;

/// Why the records cannot be used as a whole.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file or directory cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something is in the directory that cannot be told from a lost record.
    #[error("{path} is not what a witness keeps ({what}); move it away, or restore the state directory")]
    Strange {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The store's id is gone but records are there.
    #[error(
        "{path} is missing but there are records; a store without its id is another store: restore that file, or remove all records if no VM is protected"
    )]
    NoStoreId {
        /// The id's file.
        path: PathBuf,
    },
}

/// What was found for one VM at the start: its record, or why it cannot be trusted.
pub(crate) type Found = (VmId, Result<Record, String>);

/// The directory of records.
#[derive(Debug)]
pub(crate) struct Disk {
    store: StoreId,
    dir: PathBuf,
}

#[derive(Encode, Decode)]
struct Body {
    vm: VmId,
    record: Record,
}

impl Disk {
    /// Opens the records below `state_dir`, making the store's id at the first start.
    pub(crate) fn open(state_dir: &Path) -> Result<(Self, Vec<Found>), DiskError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| DiskError::Io { path, source }
        };
        let dir = state_dir.join(RECORDS_DIR);
        files::make_dir(&dir).map_err(at(&dir))?;
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(at(&dir))? {
            let path = entry.map_err(at(&dir))?.path();
            // A file that was being written when the power went: its record was never answered.
            if path.to_string_lossy().ends_with(files::TEMPORARY) {
                continue;
            }
            paths.push(path);
        }
        let strange = |path: &Path, what: &str| DiskError::Strange { path: path.to_path_buf(), what: what.to_owned() };
        if paths.len() > MAX_VMS {
            return Err(strange(&dir, &format!("more than {MAX_VMS} records")));
        }
        let store = store_id(&state_dir.join(STORE_FILE), paths.is_empty())?;
        let disk = Self { store, dir };
        let mut found = Vec::with_capacity(paths.len());
        for path in paths {
            let vm = path
                .file_stem()
                .filter(|_| path.extension().is_some_and(|extension| extension == EXTENSION))
                .and_then(|stem| stem.to_str()?.parse().ok())
                .ok_or_else(|| strange(&path, "its name is not that of a record"))?;
            let record = match slots::adopt(&path) {
                Ok(bytes) => disk.parse(vm, &bytes),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => match disk.take_over(vm, &path) {
                    Some(taken) => Ok(taken.map_err(at(&path))?),
                    None => Err(error.to_string()),
                },
                Err(error) => return Err(at(&path)(error)),
            };
            found.push((vm, record.map_err(|what| format!("{}: {what}", path.display()))));
        }
        Ok((disk, found))
    }

    /// The store's id.
    pub(crate) fn store(&self) -> StoreId {
        self.store
    }

    /// Makes `record` durable. One call at a time per VM. After an error nobody knows which record a
    /// restart will find.
    pub(crate) fn write(&self, vm: VmId, record: Record) -> io::Result<()> {
        slots::write(&self.dir.join(format!("{vm}.{EXTENSION}")), &file(vm, record))
    }

    /// Takes over what an older program left: the record alone. `None`: it is not that.
    fn take_over(&self, vm: VmId, path: &Path) -> Option<io::Result<Record>> {
        let bytes = std::fs::read(path).ok()?;
        let record = self.parse(vm, &bytes).ok()?;
        Some(slots::replace(path, &bytes).map(|()| record))
    }

    fn parse(&self, vm: VmId, bytes: &[u8]) -> Result<Record, String> {
        let record = parse(vm, bytes)?;
        if record.store != self.store {
            return Err(format!("it belongs to the store {}", record.store));
        }
        Ok(record)
    }
}

/// The bytes of a record's file.
pub(crate) fn file(vm: VmId, record: Record) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&encode(&Body { vm, record }));
    let checksum = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Reads a record's file, of whatever store.
pub(crate) fn parse(vm: VmId, bytes: &[u8]) -> Result<Record, String> {
    let Some((content, checksum)) = bytes.split_last_chunk::<CHECKSUM>() else {
        return Err("it is too short".to_owned());
    };
    if crc32fast::hash(content) != u32::from_le_bytes(*checksum) {
        return Err("its checksum is wrong".to_owned());
    }
    let Some(body) = content.strip_prefix(MAGIC) else {
        return Err("it is of another kind or version".to_owned());
    };
    let body: Body = decode(body).map_err(|error| error.to_string())?;
    if body.vm != vm {
        return Err(format!("it is the record of {}", body.vm));
    }
    Ok(body.record)
}

fn store_id(path: &Path, may_make: bool) -> Result<StoreId, DiskError> {
    let at = |source| DiskError::Io { path: path.to_path_buf(), source };
    match std::fs::read_to_string(path) {
        Ok(text) => text
            .trim()
            .parse()
            .map_err(|_| DiskError::Strange { path: path.to_path_buf(), what: "it holds no store id".to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound && may_make => {
            let store = StoreId(*uuid::Uuid::new_v4().as_bytes());
            files::replace(path, format!("{store}\n").as_bytes()).map_err(at)?;
            Ok(store)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DiskError::NoStoreId { path: path.to_path_buf() }),
        Err(error) => Err(at(error)),
    }
}

#[cfg(test)]
mod tests {
    use heartbeat_core::ids::{Incarnation, NodeId, Party};
    use heartbeat_core::record::Owner;

    use super::*;

    const VM: VmId = VmId([3; 16]);

    fn record(store: StoreId) -> Record {
        let party = |n| Party { node: NodeId([n; 16]), incarnation: Incarnation(1) };
        Record::changed(store, None, Owner::Paired { primary: party(1), standby: party(2) })
    }

    fn file(dir: &Path) -> PathBuf {
        dir.join(RECORDS_DIR).join(format!("{VM}.{EXTENSION}"))
    }

    #[test]
    fn records_and_the_store_id_survive_a_restart() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, found) = Disk::open(dir.path()).expect("open");
        assert!(found.is_empty());
        disk.write(VM, record(disk.store())).expect("write");
        let (again, found) = Disk::open(dir.path()).expect("open again");
        assert_eq!(again.store(), disk.store());
        assert_eq!(found, vec![(VM, Ok(record(disk.store())))]);
        // As an older program kept it.
        std::fs::write(file(dir.path()), super::file(VM, record(disk.store()))).expect("room");
        for _ in 0..2 {
            let (_, found) = Disk::open(dir.path()).expect("open again");
            assert_eq!(found, vec![(VM, Ok(record(disk.store())))]);
            assert_eq!(slots::read(&file(dir.path())).expect("taken over"), super::file(VM, record(disk.store())));
        }
    }

    #[test]
    fn each_damage_of_a_record_is_found_and_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, _) = Disk::open(dir.path()).expect("open");
        disk.write(VM, record(disk.store())).expect("write");
        let good = slots::read(&file(dir.path())).expect("read");
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 1;
            assert!(disk.parse(VM, &bad).is_err(), "flipped byte {position}");
            assert!(disk.parse(VM, &good[..position]).is_err(), "cut at {position}");
        }
        assert!(disk.parse(VmId([4; 16]), &good).is_err(), "another VM's file");
        std::fs::write(file(dir.path()), b"").expect("empty it");
        let (_, found) = Disk::open(dir.path()).expect("open");
        assert!(matches!(&found[..], [(VM, Err(_))]), "{found:?}");
    }

    #[test]
    fn records_without_their_store_id_are_not_adopted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (disk, _) = Disk::open(dir.path()).expect("open");
        disk.write(VM, record(disk.store())).expect("write");
        std::fs::remove_file(dir.path().join(STORE_FILE)).expect("lose the id");
        assert!(matches!(Disk::open(dir.path()), Err(DiskError::NoStoreId { .. })));
    }

    #[test]
    fn a_file_left_half_written_is_ignored_and_a_strange_one_is_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (_, _) = Disk::open(dir.path()).expect("open");
        let half = file(dir.path()).with_extension("record.tmp");
        std::fs::write(&half, b"half").expect("half");
        let (_, found) = Disk::open(dir.path()).expect("open");
        assert!(found.is_empty());
        std::fs::write(dir.path().join(RECORDS_DIR).join("notes"), b"x").expect("strange");
        assert!(matches!(Disk::open(dir.path()), Err(DiskError::Strange { .. })));
    }
}
