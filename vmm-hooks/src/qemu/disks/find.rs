//! The drives of a QEMU, and which of them can be mirrored. Changes nothing.
//!
//! A drive that the guest can write to is mirrored or refused, never left alone: what is not known to be mirrored whole
//! would be lost with this host.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::{Value, json};

use super::super::OUR_PREFIX;
use super::super::cmdline::{DriveArgument, drive_arguments};
use super::super::qmp::{Qmp, QmpError};
use super::seen_by;

/// Devices (by how their type begins) whose drives are mirrored.
const DEVICES: [&str; 4] = ["virtio-blk", "scsi-hd", "ide-hd", "scsi-disk"];

/// Image formats that are mirrored.
const FORMATS: [&str; 2] = ["raw", "qcow2"];

/// Longest name of a disk.
const NAME_MAX: usize = 64;

/// A drive of the guest with a medium in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::qemu) struct Drive {
    /// Its name, for people and for files; no other drive has it.
    pub(in crate::qemu) name: String,
    /// What QEMU calls it if it was made with `-drive`, else empty.
    pub(in crate::qemu) id: String,
    /// Its image.
    pub(in crate::qemu) file: String,
    /// Whether the guest may write to it.
    pub(in crate::qemu) writable: bool,
    /// Its top node in QEMU's graph of block devices; begins with `#` if QEMU made it up.
    pub(in crate::qemu) node: String,
    /// The driver of that node, such as `qcow2`.
    pub(in crate::qemu) format: String,
    /// Its size as the guest sees it.
    pub(in crate::qemu) bytes: u64,
    /// Where its device is in QEMU's tree of objects.
    pub(in crate::qemu) device: String,
    /// The device's type.
    pub(in crate::qemu) kind: String,
    /// Others may write to it, by its owner's wish.
    pub(in crate::qemu) shared: bool,
    /// It is encrypted.
    pub(in crate::qemu) encrypted: bool,
    /// QEMU flushes it when it stops.
    pub(in crate::qemu) flushed: bool,
    /// Where it is on the command line.
    pub(in crate::qemu) argument: Option<DriveArgument>,
    /// Its image's path, as far as it is seen from here, is closed to the user that QEMU runs as.
    pub(in crate::qemu) closed: bool,
    /// Another process has its image open for writing.
    pub(in crate::qemu) opened_by: Option<u32>,
}

/// What else holds the drives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::qemu) struct Storage {
    /// The drives that have a medium, in QEMU's order, which is that of their making.
    pub(in crate::qemu) drives: Vec<Drive>,
    /// Block jobs that are not ours: what they are.
    pub(in crate::qemu) jobs: Vec<String>,
    /// Nodes that QEMU exports to others.
    pub(in crate::qemu) exports: Vec<String>,
    /// Mirrors of ours that are in it already.
    pub(in crate::qemu) leftovers: Vec<String>,
    /// Whether this QEMU can mirror. Not asked if there is nothing to mirror.
    pub(in crate::qemu) mirrors: bool,
}

/// Asks everything about drives.
pub(in crate::qemu) fn find(qmp: &mut Qmp, pid: u32, argv: &[String]) -> Result<Storage, QmpError> {
    let mut drives = parse(&qmp.execute("query-block", json!({}))?);
    let arguments = drive_arguments(argv);
    for drive in drives.iter_mut().filter(|drive| drive.writable) {
        if !drive.device.is_empty() {
            drive.kind = property(qmp, &drive.device, "type")?.as_str().unwrap_or_default().to_owned();
            drive.shared = property(qmp, &drive.device, "share-rw")? == true;
        }
        drive.argument = argument_of(drive, &arguments);
    }
    other_writers(pid, &mut drives);
    let user = User::of(pid);
    for drive in drives.iter_mut().filter(|drive| drive.writable) {
        drive.closed = user.as_ref().is_some_and(|user| user.is_shut_out(pid, &drive.file));
    }
    let mut storage = Storage { leftovers: super::jobs::leftovers(qmp)?, drives, ..Storage::default() };
    if storage.disks().next().is_none() {
        return Ok(storage);
    }
    storage.mirrors = super::jobs::supported(qmp)?;
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if qmp.has("query-block-jobs") {
        let jobs = qmp.execute("query-block-jobs", json!({}))?;
        let foreign = array(&jobs).filter(|job| !text(job, "device").starts_with(OUR_PREFIX));
        storage.jobs = foreign.map(|job| format!("{} ({})", text(job, "device"), text(job, "type"))).collect();
    }
    if qmp.has("query-block-exports") {
        let exports = qmp.execute("query-block-exports", json!({}))?;
        storage.exports = array(&exports).map(|export| text(export, "node-name")).collect();
    }
    Ok(storage)
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A property of an object; null if it has none of that name.
fn property(qmp: &mut Qmp, path: &str, name: &str) -> Result<Value, QmpError> {
    match qmp.execute("qom-get", json!({ "path": path, "property": name })) {
        Err(QmpError::Refused { .. }) => Ok(Value::Null),
        other => other,
    }
}

impl Storage {
    /// The drives that have to be mirrored.
    pub(in crate::qemu) fn disks(&self) -> impl Iterator<Item = &Drive> {
        self.drives.iter().filter(|drive| drive.writable)
    }

    /// Why a drive that has to be mirrored cannot be, and what to do.
    pub(in crate::qemu) fn refuse(&self, drive: &Drive) -> Option<(String, &'static str)> {
        let file = &drive.file;
        if let Some(job) = self.jobs.first() {
            return Some((format!("a block job is under way in QEMU: {job}"), "let it end, or cancel it"));
        }
        if self.exports.contains(&drive.node) {
            return Some((format!("QEMU exports {file} to others"), "end the export; a disk has one writer"));
        }
        if let Some(pid) = drive.opened_by {
            return Some((format!("process {pid} has {file} open for writing, too"), "a disk has one writer: end it"));
        }
        if drive.closed {
            return Some((
                format!("QEMU's user may not open {file}, and QEMU would end when a mirror of it is removed"),
                "let its user and group read and write the image and enter its directory",
            ));
        }
        if drive.shared {
            return Some((
                format!("{file} may be written by others (share-rw=on)"),
                "start the guest without share-rw; a disk has one writer",
            ));
        }
        if drive.encrypted {
            return Some((
                format!("{file} is encrypted by QEMU, and its copy would not be"),
                "let the guest encrypt its disk instead",
            ));
        }
        if !DEVICES.iter().any(|kind| drive.kind.starts_with(kind)) {
            let kind = if drive.kind.is_empty() { "no device" } else { &drive.kind };
            return Some((
                format!("the guest can write to {file} through {kind}, which is not mirrored"),
                "make it read-only, or attach it as virtio-blk, virtio-scsi or IDE disk",
            ));
        }
        if drive.node.is_empty() || !FORMATS.contains(&drive.format.as_str()) {
            return Some((
                format!("{file} is of format {}, which is not mirrored", drive.format),
                "use a raw or qcow2 image without filters above it",
            ));
        }
        if drive.bytes == 0 {
            return Some((format!("{file} has no size"), "use an image that has one"));
        }
        if drive.argument.is_none() {
            return Some((
                format!("{file} is not on QEMU's command line, so a twin would not have it"),
                "start the guest with it; a disk that was plugged in later is not carried over",
            ));
        }
        None
    }
}

/// The drives that have a medium, without what other commands tell.
fn parse(listed: &Value) -> Vec<Drive> {
    let mut found: Vec<Drive> = Vec::new();
    for drive in array(listed) {
        let Some(inserted) = drive.get("inserted") else { continue };
        let named = |of: &Value, key: &str| of.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (id, device, node) = (named(drive, "device"), named(drive, "qdev"), named(inserted, "node-name"));
        let name = name(&id, &device, &node, found.len(), |name| found.iter().any(|other| other.name == name));
        found.push(Drive {
            name,
            id,
            file: named(inserted, "file"),
            // What does not say that it is read-only is not.
            writable: inserted.get("ro") != Some(&Value::Bool(true)),
            node,
            format: named(inserted, "drv"),
            bytes: inserted.pointer("/image/virtual-size").and_then(Value::as_u64).unwrap_or_default(),
            device,
            encrypted: inserted.get("encrypted") == Some(&Value::Bool(true))
                || inserted.pointer("/image/encrypted") == Some(&Value::Bool(true)),
            flushed: inserted.pointer("/cache/no-flush") != Some(&Value::Bool(true)),
            ..Drive::default()
        });
    }
    found
}

/// What a drive is called: its id, its device's, or its node's, in letters that a file may have.
fn name(id: &str, device: &str, node: &str, index: usize, taken: impl Fn(&str) -> bool) -> String {
    let of_device = device.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
    let node = if node.starts_with('#') { "" } else { node };
    let candidates = [id, of_device.unwrap_or_else(|| if device.starts_with('/') { "" } else { device }), node];
    let chosen = candidates.into_iter().find(|name| !name.is_empty()).unwrap_or("drive");
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    let name: String = chosen.chars().take(NAME_MAX).map(|letter| if plain(letter) { letter } else { '_' }).collect();
    if name.starts_with('.') || taken(&name) { format!("disk{index}-{name}") } else { name }
}

/// Where a drive is on the command line: by its node, its id, or its image.
fn argument_of(drive: &Drive, arguments: &[DriveArgument]) -> Option<DriveArgument> {
    let by_node = arguments.iter().find(|argument| argument.node.as_ref() == Some(&drive.node));
    let by_id = || arguments.iter().find(|argument| !drive.id.is_empty() && argument.id.as_ref() == Some(&drive.id));
    let by_file = || {
        let same = |argument: &&DriveArgument| {
            argument.id.is_none() && argument.node.is_none() && argument.file.as_ref() == Some(&drive.file)
        };
        let mut fitting = arguments.iter().filter(same);
        fitting.next().filter(|_| fitting.next().is_none())
    };
    by_node.or_else(by_id).or_else(by_file).cloned()
}

/// What an open file is, whatever its path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    let kind = metadata.file_type();
    if kind.is_block_device() {
        return Some((u64::MAX, metadata.rdev()));
    }
    kind.is_file().then(|| (metadata.dev(), metadata.ino()))
}

/// Whom a process is to the file system.
struct User {
    user: u32,
    groups: Vec<u32>,
}

impl User {
    /// `None` if it cannot be told.
    fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let numbers = |key: &str| -> Vec<u32> {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            line.split_whitespace().filter_map(|number| number.parse().ok()).collect()
        };
        // The last one of four is the file system's.
        let user = *numbers("Uid:").get(3)?;
        let groups = [numbers("Gid:").get(3).copied().into_iter().collect(), numbers("Groups:")].concat();
        Some(Self { user, groups })
    }

    /// Whether it could not open the image again by its path. Only what the modes say; a path that is not seen passes.
    fn is_shut_out(&self, pid: u32, file: &str) -> bool {
        if self.user == 0 {
            return false;
        }
        let Ok(path) = fs::canonicalize(seen_by(pid, file)) else { return false };
        let lacks = |path: &Path, wanted: u32| {
            fs::metadata(path).is_ok_and(|metadata| {
                let shift = match () {
                    () if metadata.uid() == self.user => 6,
                    () if self.groups.contains(&metadata.gid()) => 3,
                    () => 0,
                };
                metadata.mode() >> shift & wanted != wanted
            })
        };
        lacks(&path, 0o6) || path.ancestors().skip(1).any(|dir| lacks(dir, 0o1))
    }
}

/// Notes which images other processes have open for writing.
fn other_writers(pid: u32, drives: &mut [Drive]) {
    let of = |drive: &Drive| drive.writable.then(|| identity(&seen_by(pid, &drive.file)))?;
    let wanted: Vec<_> = drives.iter().map(of).collect();
    if wanted.iter().all(Option::is_none) {
        return;
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for other in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if other == pid {
            continue;
        }
        // A process that is gone, or not ours to look at, has nothing to tell.
        for fd in fs::read_dir(format!("/proc/{other}/fd")).into_iter().flatten().flatten() {
            let Some(path) = fd.path().to_str().map(str::to_owned) else { continue };
            let Some(found) = identity(Path::new(&path)) else { continue };
            for (drive, wanted) in drives.iter_mut().zip(&wanted) {
                if *wanted == Some(found) && writes(&path) {
                    drive.opened_by.get_or_insert(other);
                }
            }
        }
    }
}

/// Whether an open file, given by its path in `/proc`, may be written.
fn writes(path: &str) -> bool {
    let info = fs::read_to_string(path.replacen("/fd/", "/fdinfo/", 1)).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_none_or(|flags| flags & 3 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_drives_do_not_count_and_what_is_not_read_only_is_writable() {
        let listed = json!([
            { "device": "ide1-cd0", "removable": true },
            { "device": "virtio0", "inserted": { "ro": true, "file": "/a" } },
            { "device": "", "qdev": "/machine/peripheral/vb/virtio-backend", "inserted": {
                "ro": false, "file": "/b", "node-name": "b", "drv": "qcow2", "encrypted": false,
                "image": { "virtual-size": 4096 }, "cache": { "direct": false, "no-flush": false } } },
            { "device": "", "qdev": "/machine/unattached/device[3]", "inserted": { "node-name": "n/1", "file": "/c" } },
            { "device": "virtio0", "inserted": { "node-name": "#block3", "cache": { "no-flush": true } } },
        ]);
        let found = parse(&listed);
        let names: Vec<_> = found.iter().map(|drive| (drive.name.as_str(), drive.writable, drive.flushed)).collect();
        assert_eq!(
            names,
            [("virtio0", false, true), ("vb", true, true), ("n_1", true, true), ("disk3-virtio0", true, false)]
        );
        assert_eq!((found[1].bytes, found[1].format.as_str(), found[1].node.as_str()), (4096, "qcow2", "b"));
    }

    fn good() -> Drive {
        Drive {
            node: "#block1".to_owned(),
            file: "/a".to_owned(),
            format: "raw".to_owned(),
            kind: "virtio-blk-device".to_owned(),
            bytes: 1,
            writable: true,
            argument: Some(DriveArgument::default()),
            ..Drive::default()
        }
    }

    #[test]
    fn what_cannot_be_mirrored_is_refused_in_words() {
        let storage = Storage::default();
        assert_eq!(storage.refuse(&good()), None);
        let refusals: [(&str, Drive); 10] = [
            ("may not open", Drive { closed: true, ..good() }),
            ("share-rw", Drive { shared: true, ..good() }),
            ("encrypted", Drive { encrypted: true, ..good() }),
            ("process 7", Drive { opened_by: Some(7), ..good() }),
            ("floppy", Drive { kind: "floppy".to_owned(), ..good() }),
            ("no device", Drive { kind: String::new(), ..good() }),
            ("vmdk", Drive { format: "vmdk".to_owned(), ..good() }),
            ("format", Drive { node: String::new(), ..good() }),
            ("no size", Drive { bytes: 0, ..good() }),
            ("command line", Drive { argument: None, ..good() }),
        ];
        for (words, drive) in refusals {
            let (message, advice) = storage.refuse(&drive).expect(words);
            assert!(message.contains(words) && !advice.is_empty(), "{message}");
        }
        let busy = Storage { jobs: vec!["b (backup)".to_owned()], ..Storage::default() };
        assert!(busy.refuse(&good()).expect("refused").0.contains("backup"));
        let exporting = Storage { exports: vec!["#block1".to_owned()], ..Storage::default() };
        assert!(exporting.refuse(&good()).expect("refused").0.contains("exports"));
    }

    #[test]
    fn an_image_that_another_process_writes_is_noticed() {
        let file = tempfile::NamedTempFile::new().expect("room");
        let mut drives = [Drive { file: file.path().display().to_string(), writable: true, ..Drive::default() }];
        // Seen from a process that is not the writer.
        let init = 1;
        other_writers(init, &mut drives);
        if fs::metadata("/proc/1/root").is_err() {
            println!("skipped: process 1 may not be looked at");
            return;
        }
        assert_eq!(drives[0].opened_by, Some(std::process::id()));
        drives[0].opened_by = None;
        other_writers(std::process::id(), &mut drives);
        assert_eq!(drives[0].opened_by, None);
    }
}
