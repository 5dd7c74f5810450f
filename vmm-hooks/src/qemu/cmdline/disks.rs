//! The drives of a rewritten command line: a replicated one gets its image on this host, which is raw; the others stay.
//!
//! A drive is recognised by the file that it names, on `-drive`, `-hda` and its like, and on `-blockdev`, flat or as JSON, with its
//! format on top or in an option of its own. What only the primary's format knows is left out with it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::options::Keys;

/// A disk that is replicated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// The primary's file of it: an absolute path.
    pub(crate) source: PathBuf,
    /// What it is on this host.
    pub(crate) image: Image,
}

/// What a disk is on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Image {
    /// A raw image.
    File(PathBuf),
    /// Nothing, with this size in bytes: for a machine that never runs.
    Null(u64),
}

/// Formats that a raw image can stand in for.
const FORMATS: &[&str] = &["raw", "qcow2", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc", "parallels"];

/// What a format's node keeps when it becomes raw. `offset` and `size` are not among it: the image is the disk as the guest sees it.
const FORMAT_KEPT: &[&str] =
    &["driver", "node-name", "file", "read-only", "auto-read-only", "discard", "detect-zeroes", "cache", "force-share"];

/// What a file's node keeps when it becomes a file of this host.
const FILE_KEPT: &[&str] = &[
    "driver",
    "filename",
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "cache",
    "force-share",
    "aio",
    "locking",
];

/// What it keeps when it becomes nothing.
const NULL_KEPT: &[&str] =
    &["node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "cache", "force-share"];

/// What `-drive` knows of a medium and its use, whatever its format.
const DRIVE_KEPT: &[&str] = &[
    "if",
    "bus",
    "unit",
    "index",
    "media",
    "id",
    "node-name",
    "cache",
    "cache.writeback",
    "cache.direct",
    "cache.no-flush",
    "aio",
    "werror",
    "rerror",
    "readonly",
    "read-only",
    "auto-read-only",
    "copy-on-read",
    "discard",
    "detect-zeroes",
    "force-share",
    "serial",
    "file.locking",
    "file.aio",
];

/// The drives of one command line.
#[derive(Debug)]
pub(super) struct Drives<'a> {
    disks: &'a [Disk],
    cwd: &'a Path,
    /// Nodes that are a replicated disk, or its format.
    replaced: BTreeSet<String>,
    /// Files that were found.
    found: BTreeSet<&'a Path>,
}

impl<'a> Drives<'a> {
    pub(super) fn new(disks: &'a [Disk], cwd: &'a Path) -> Self {
        Self { disks, cwd, replaced: BTreeSet::new(), found: BTreeSet::new() }
    }

    /// The replicated disk that is in this file.
    pub(super) fn of_file(&self, file: &str) -> Option<&'a Disk> {
        let path = self.cwd.join(file.strip_prefix("file:").unwrap_or(file));
        self.disks.iter().find(|disk| disk.source == path)
    }

    /// The first replicated disk that no option named.
    pub(super) fn missing(&self) -> Option<&'a Path> {
        self.disks.iter().map(|disk| disk.source.as_path()).find(|source| !self.found.contains(source))
    }

    /// Rewrites a `-drive`. Whether it is a replicated disk.
    pub(super) fn drive(&mut self, keys: &mut Keys) -> bool {
        let named = ["file", "file.filename", "file.file.filename"];
        let Some(disk) = named.iter().find_map(|key| self.of_file(keys.get(key)?)) else { return false };
        self.found.insert(&disk.source);
        keys.keep_if(|key| DRIVE_KEPT.contains(&key) || key.starts_with("throttling."));
        match &disk.image {
            Image::File(path) => keys.set("file", path.to_string_lossy()),
            Image::Null(bytes) => {
                for key in ["aio", "file.aio", "file.locking"] {
                    keys.remove(key);
                }
                keys.set("file.driver", "null-co");
                keys.set("file.size", bytes.to_string());
                keys.set("file.read-zeroes", "on");
            }
        }
        keys.set("format", "raw");
        true
    }

    /// Rewrites a `-blockdev`; `None` if it stays as it is.
    pub(super) fn blockdev(&mut self, value: &str) -> Option<String> {
        let json = value.starts_with('{');
        let mut node = if json { serde_json::from_str(value).ok()? } else { nest(&Keys::parse(value, "driver")?)? };
        let before = node.clone();
        self.node(node.as_object_mut()?, json);
        if node == before {
            return None;
        }
        if json {
            return Some(node.to_string());
        }
        let mut keys = Keys::default();
        flatten("", &node, &mut keys);
        Some(keys.print("driver"))
    }

    /// Whether this node is, or stands on, a replicated disk.
    fn node(&mut self, node: &mut Map<String, Value>, json: bool) -> bool {
        let text = |node: &Map<String, Value>, key: &str| node.get(key).and_then(Value::as_str).map(str::to_owned);
        let found = text(node, "filename").and_then(|file| self.of_file(&file));
        if let Some(disk) = found {
            self.found.insert(&disk.source);
            match &disk.image {
                Image::File(path) => {
                    node.retain(|key, _| FILE_KEPT.contains(&key.as_str()));
                    node.insert("driver".to_owned(), "file".into());
                    node.insert("filename".to_owned(), path.to_string_lossy().into());
                }
                Image::Null(bytes) => {
                    node.retain(|key, _| NULL_KEPT.contains(&key.as_str()));
                    node.insert("driver".to_owned(), "null-co".into());
                    let (size, on) =
                        if json { ((*bytes).into(), true.into()) } else { (bytes.to_string().into(), "on".into()) };
                    node.insert("size".to_owned(), size);
                    node.insert("read-zeroes".to_owned(), on);
                }
            }
        } else {
            let below = match node.get_mut("file") {
                Some(Value::String(name)) => self.replaced.contains(name.as_str()),
                Some(Value::Object(child)) => self.node(child, json),
                _ => false,
            };
            let format = text(node, "driver").is_some_and(|driver| FORMATS.contains(&driver.as_str()));
            if !below || !format {
                return false;
            }
            node.retain(|key, _| FORMAT_KEPT.contains(&key.as_str()));
            node.insert("driver".to_owned(), "raw".into());
        }
        self.replaced.extend(text(node, "node-name"));
        true
    }
}

/// Dotted keys as a tree of texts; `None` if a key is both a text and a tree.
fn nest(keys: &Keys) -> Option<Value> {
    let mut root = Map::new();
    for (key, value) in keys.pairs() {
        let mut parts = key.split('.').collect::<Vec<_>>();
        let last = parts.pop()?;
        let mut place = &mut root;
        for part in parts {
            place = place.entry(part).or_insert_with(|| Value::Object(Map::new())).as_object_mut()?;
        }
        if place.get(last).is_some_and(Value::is_object) {
            return None;
        }
        place.insert(last.to_owned(), value.into());
    }
    Some(Value::Object(root))
}

fn flatten(prefix: &str, value: &Value, into: &mut Keys) {
    match value {
        Value::Object(parts) => {
            for (key, value) in parts {
                let dotted = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&dotted, value, into);
            }
        }
        Value::String(text) => into.set(prefix, text.as_str()),
        other => into.set(prefix, other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(null: bool) -> Vec<Disk> {
        let image = |name: &str| if null { Image::Null(1 << 20) } else { Image::File(format!("/img/{name}").into()) };
        vec![
            Disk { source: "/vm/a,b.qcow2".into(), image: image("0,.raw") },
            Disk { source: "/vm/data".into(), image: image("1.raw") },
        ]
    }

    fn drive(value: &str, null: bool) -> Option<String> {
        let disks = disks(null);
        let mut keys = Keys::parse(value, "file").expect("flat");
        Drives::new(&disks, Path::new("/vm")).drive(&mut keys).then(|| keys.print(""))
    }

    fn blockdevs(values: &[&str], null: bool) -> Vec<Option<String>> {
        let disks = disks(null);
        let mut drives = Drives::new(&disks, Path::new("/vm"));
        values.iter().map(|value| drives.blockdev(value)).collect()
    }

    #[test]
    fn a_drive_keeps_its_place_and_its_use_and_gets_our_image() {
        let done = |value| drive(value, false);
        assert_eq!(
            done("file=a,,b.qcow2,if=none,id=d0,format=qcow2,cache=none,aio=native,l2-cache-size=1M,discard=unmap")
                .as_deref(),
            Some("if=none,id=d0,cache=none,aio=native,discard=unmap,file=/img/0,,.raw,format=raw")
        );
        assert_eq!(
            done("driver=qcow2,file.driver=file,file.filename=/vm/data,file.locking=off,if=virtio,throttling.iops-total=9").as_deref(),
            Some("file.locking=off,if=virtio,throttling.iops-total=9,file=/img/1.raw,format=raw")
        );
        assert_eq!(done("file:/vm/data,if=ide").as_deref(), Some("if=ide,file=/img/1.raw,format=raw"));
        assert_eq!(done("file=/vm/other,if=ide"), None);
        assert_eq!(
            drive("file=data,if=virtio,cache=none,aio=native", true).as_deref(),
            Some("if=virtio,cache=none,file.driver=null-co,file.size=1048576,file.read-zeroes=on,format=raw")
        );
    }

    #[test]
    fn block_nodes_are_followed_from_the_file_to_its_format() {
        let flat = [
            "file,filename=data,node-name=f0,pr-manager=x",
            "driver=qcow2,file=f0,node-name=d0,lazy-refcounts=on,cache.direct=on",
            "driver=throttle,throttle-group=g,file=d0,node-name=t0",
            "driver=qcow2,file.driver=host_device,file.filename=/vm/data,node-name=d1",
            "driver=file,filename=/vm/other,node-name=f1",
            "driver=qcow2,file=f1,node-name=d2,lazy-refcounts=on",
        ];
        let done = blockdevs(&flat, false);
        let text: Vec<_> = done.iter().map(|value| value.as_deref()).collect();
        assert_eq!(
            text,
            [
                Some("file,filename=/img/1.raw,node-name=f0"),
                Some("raw,cache.direct=on,file=f0,node-name=d0"),
                None,
                Some("raw,file.driver=file,file.filename=/img/1.raw,node-name=d1"),
                None,
                None,
            ]
        );
        let disks = disks(false);
        let mut drives = Drives::new(&disks, Path::new("/vm"));
        assert_eq!(drives.missing(), Some(Path::new("/vm/a,b.qcow2")));
        drives.blockdev("file,filename=a,,b.qcow2,node-name=x");
        assert_eq!(drives.missing(), Some(Path::new("/vm/data")));
        drives.blockdev(flat[0]);
        assert_eq!(drives.missing(), None);
        assert_eq!(blockdevs(&flat[..1], true)[0].as_deref(), Some("null-co,node-name=f0,read-zeroes=on,size=1048576"));
    }

    #[test]
    fn block_nodes_in_json_keep_their_types() {
        let json = [
            r#"{"driver":"file","filename":"/vm/data","node-name":"s","auto-read-only":true,"cache":{"direct":true}}"#,
            r#"{"node-name":"f","read-only":false,"driver":"qcow2","file":"s","backing":null}"#,
        ];
        let done: Vec<Value> = blockdevs(&json, false)
            .into_iter()
            .map(|value| serde_json::from_str(&value.expect("rewritten")).expect("JSON"))
            .collect();
        let expected = serde_json::json!([
            { "driver": "file", "filename": "/img/1.raw", "node-name": "s", "auto-read-only": true, "cache": { "direct": true } },
            { "driver": "raw", "file": "s", "node-name": "f", "read-only": false },
        ]);
        assert_eq!(Value::from(done), expected);
        let null = blockdevs(&json[..1], true)[0].clone().expect("rewritten");
        let null: Value = serde_json::from_str(&null).expect("JSON");
        assert_eq!((&null["size"], &null["read-zeroes"]), (&(1_u64 << 20).into(), &true.into()));
    }
}
