//! A copy that waits for its fence, on this host's disk, so that another life of the agent can go on waiting with it (docs/protocol.md P15, P62).
//!
//! A directory for each: the guest's memory (with holes where it is zero), the device state, and what both are of. Its disks are where they were, brought
//! to the same epoch. Promise: a copy is whole and on the disk when [`write`] returns, and counts only once [`super::durable`] names it, which alone says
//! by which grant it is; [`load`] gives what was written, or an error. Writing never waits for anybody, and nobody for it: it ends
//! within [`CHUNK`] when it is not wanted any more.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use heartbeat::files;
use heartbeat_core::ids::{Incarnation, Party};
use serde::{Deserialize, Serialize};
use vmm_hooks::guest::{Recipe, TwinMemory};
use vmm_hooks::layout::{Layout, PAGE_SIZE};

use crate::control::api::DurabilityPolicy;

/// Pages that are read, looked at and written at once.
const CHUNK: usize = 256;
/// After so many bytes the disk is waited for, so that it never has more than that to do for this.
const SYNC_EACH: u64 = 64 << 20;
/// Bytes that a file system must have left besides: the agent has more important things to write there.
const RESERVE: u64 = 256 << 20;
/// Bound on the description of a copy.
const ABOUT_MAX: u64 = 4 << 20;

const MEMORY: &str = "memory";
const DEVICE: &str = "device";
const ABOUT: &str = "about.json";

/// Of what guest a copy is: what its twin is built from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Described {
    /// How to build it.
    pub(super) recipe: Recipe,
    /// Its memory.
    pub(super) layout: Layout,
    /// What an acknowledgement promised of its disks.
    pub(super) durability: DurabilityPolicy,
    /// Where they are, if it has any.
    pub(super) disks: Option<PathBuf>,
}

/// What a copy is of.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    /// The guest.
    pub(super) of: Described,
    /// As of which epoch.
    pub(super) epoch: u64,
    /// The generation of the session that it came by.
    pub(super) session: u64,
    /// Whose session that was: the node, as hex.
    primary: String,
    /// In which life.
    incarnation: u64,
    /// Of the device state.
    device_bytes: u64,
    device_crc: u32,
    /// Of all of the memory.
    memory_crc: u32,
}

impl About {
    /// One of which nothing is written yet.
    pub(super) fn new(of: Described, epoch: u64, session: u64, primary: Party) -> Self {
        let (incarnation, primary) = (primary.incarnation.0, primary.node.to_string());
        Self { of, epoch, session, primary, incarnation, device_bytes: 0, device_crc: 0, memory_crc: 0 }
    }

    /// The primary of that session.
    ///
    /// # Errors
    /// If it is no node.
    pub(super) fn primary(&self) -> io::Result<Party> {
        let node = self.primary.parse().map_err(|_| damaged("its primary is no node"))?;
        Ok(Party { node, incarnation: Incarnation(self.incarnation) })
    }

    /// Bytes that it may take.
    fn bytes(&self) -> u64 {
        self.of.layout.pages() * PAGE_SIZE as u64 + self.device_bytes
    }
}

/// Why a copy could not be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    /// Nobody wants it any more.
    #[error("it is not needed any more")]
    Stopped,
    /// There is no room for it.
    #[error("it may take {needed} MiB, and {} has {free} MiB free", .dir.display())]
    NoRoom {
        /// In MiB, with what must stay free.
        needed: u64,
        /// In MiB.
        free: u64,
        /// Where.
        dir: PathBuf,
    },
    /// The system's.
    #[error("{} cannot be written: {source}", .dir.display())]
    Io {
        /// Where.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// Writes a copy to the directory `dir`, which is made, and removed again if it cannot be all written. `memory` and `device` must stay as they are
/// until then, or `stop` be set before they do not.
///
/// # Errors
/// [`KeepError`]; nothing is left then.
pub(super) fn write(
    dir: &Path,
    mut about: About,
    memory: &Arc<dyn TwinMemory>,
    device: &[u8],
    stop: &AtomicBool,
) -> Result<(), KeepError> {
    about.device_bytes = device.len() as u64;
    about.device_crc = crc32fast::hash(device);
    let failed = |source| KeepError::Io { dir: dir.to_path_buf(), source };
    let parent = dir.parent().expect("it is below the state directory");
    forget(parent);
    files::make_dir(parent).map_err(failed)?;
    let (needed, free) = (about.bytes() + RESERVE, room(parent).map_err(failed)?);
    if needed > free {
        return Err(KeepError::NoRoom { needed: needed >> 20, free: free >> 20, dir: parent.to_path_buf() });
    }
    let written = files::make_dir(dir).map_err(failed).and_then(|()| {
        files::replace(&dir.join(DEVICE), device).map_err(failed)?;
        about.memory_crc = write_memory(&dir.join(MEMORY), &**memory, stop)
            .map_err(|error| if error.kind() == ErrorKind::Interrupted { KeepError::Stopped } else { failed(error) })?;
        let text = serde_json::to_vec(&about).expect("it is plain data");
        files::replace(&dir.join(ABOUT), &text).map_err(failed)?;
        files::sync_dir(parent).map_err(failed)
    });
    if written.is_err() {
        remove(dir);
    }
    written
}

/// Bytes that are free where `dir` is.
fn room(dir: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Returns the checksum. Ends as interrupted when it is not wanted any more.
fn write_memory(path: &Path, memory: &dyn TwinMemory, stop: &AtomicBool) -> io::Result<u32> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK * PAGE_SIZE];
    let (mut page, mut unsynced) = (0, 0);
    while page < memory.pages() {
        if stop.load(Ordering::Relaxed) {
            return Err(ErrorKind::Interrupted.into());
        }
        let pages = usize::try_from(memory.pages() - page).map_or(CHUNK, |left| left.min(CHUNK));
        let chunk = &mut buffer[..pages * PAGE_SIZE];
        for (number, into) in (page..).zip(chunk.chunks_exact_mut(PAGE_SIZE)) {
            memory.read(number, into);
        }
        hasher.update(chunk);
        for (number, bytes) in (page..).zip(chunk.chunks_exact(PAGE_SIZE)).filter(|(_, bytes)| !is_zero(bytes)) {
            file.write_all_at(bytes, number * PAGE_SIZE as u64)?;
            unsynced += PAGE_SIZE as u64;
        }
        if unsynced >= SYNC_EACH {
            file.sync_data()?;
            unsynced = 0;
        }
        page += pages as u64;
    }
    file.set_len(memory.pages() * PAGE_SIZE as u64)?;
    file.sync_all()?;
    Ok(hasher.finalize())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// What the copy in `dir` is of.
///
/// # Errors
/// If there is none, or what is there cannot be understood.
pub(super) fn about(dir: &Path) -> io::Result<About> {
    let mut text = Vec::new();
    File::open(dir.join(ABOUT))?.take(ABOUT_MAX).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// Fills `memory`, which is zero, and returns the device state.
///
/// # Errors
/// If it cannot be read, or is not what was written; `memory` is of no use then.
pub(super) fn load(dir: &Path, about: &About, memory: &dyn TwinMemory) -> io::Result<Vec<u8>> {
    if memory.pages() != about.of.layout.pages() {
        return Err(damaged("the twin's memory is of another size"));
    }
    let device = fs::read(dir.join(DEVICE))?;
    if device.len() as u64 != about.device_bytes || crc32fast::hash(&device) != about.device_crc {
        return Err(damaged("its device state is not what was written"));
    }
    let mut file = File::open(dir.join(MEMORY))?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK * PAGE_SIZE];
    let mut page = 0;
    while page < memory.pages() {
        let pages = usize::try_from(memory.pages() - page).map_or(CHUNK, |left| left.min(CHUNK));
        let chunk = &mut buffer[..pages * PAGE_SIZE];
        file.read_exact(chunk)?;
        hasher.update(chunk);
        for (number, bytes) in (page..).zip(chunk.chunks_exact(PAGE_SIZE)).filter(|(_, bytes)| !is_zero(bytes)) {
            memory.write(number, 0, bytes);
        }
        page += pages as u64;
    }
    if hasher.finalize() != about.memory_crc {
        return Err(damaged("its memory is not what was written"));
    }
    Ok(device)
}

/// Removes a copy, and the directory of its VM if it was the last one.
pub(super) fn remove(dir: &Path) {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "a copy that is of no use was left behind");
        }
        _ => {
            if let Some(parent) = dir.parent() {
                // Another one may be in it.
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// Removes the copies in `parent`, which is a VM's.
pub(super) fn forget(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        remove(&entry.path());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use heartbeat_core::ids::NodeId;
    use vmm_hooks::layout::Block;

    use super::*;

    const PAGES: u64 = 600;

    #[derive(Debug)]
    struct Ram(Mutex<Vec<u8>>);

    impl Ram {
        fn new(pages: u64) -> Self {
            Self(Mutex::new(vec![0; usize::try_from(pages).expect("small") * PAGE_SIZE]))
        }

        fn place(page: u64) -> usize {
            usize::try_from(page).expect("small") * PAGE_SIZE
        }
    }

    impl TwinMemory for Ram {
        fn pages(&self) -> u64 {
            (self.0.lock().expect("whole").len() / PAGE_SIZE) as u64
        }

        fn write(&self, page: u64, offset: usize, bytes: &[u8]) {
            let at = Self::place(page) + offset;
            self.0.lock().expect("whole")[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn read(&self, page: u64, into: &mut [u8]) {
            into.copy_from_slice(&self.0.lock().expect("whole")[Self::place(page)..][..PAGE_SIZE]);
        }

        fn zero(&self, page: u64) {
            self.write(page, 0, &[0; PAGE_SIZE]);
        }
    }

    fn described(pages: u64) -> Described {
        let layout = Layout::new(vec![Block { name: "ram".into(), pages }]).expect("a layout");
        let recipe = Recipe { backend: "sim".into(), body: "{}".into(), disks: Vec::new() };
        Described { recipe, layout, durability: DurabilityPolicy::Disk, disks: None }
    }

    fn of(pages: u64) -> About {
        About::new(described(pages), 9, 3, Party { node: NodeId([4; 16]), incarnation: Incarnation(7) })
    }

    fn filled() -> Arc<dyn TwinMemory> {
        let ram = Ram::new(PAGES);
        for page in [0, 1, 255, 256, 511, PAGES - 1] {
            ram.write(page, 100, &[u8::try_from(page % 251).expect("small") + 1; 77]);
        }
        Arc::new(ram)
    }

    #[test]
    fn what_is_kept_comes_back_as_it_was_and_takes_no_room_for_zeroes() {
        use std::os::unix::fs::MetadataExt as _;

        let state = tempfile::tempdir().expect("a directory");
        let (parent, older) = (state.path().join("copies/vm"), state.path().join("copies/vm/2"));
        let (dir, memory) = (parent.join("5"), filled());
        write(&older, of(PAGES), &memory, b"", &AtomicBool::new(false)).expect("room");
        write(&dir, of(PAGES), &memory, b"devices", &AtomicBool::new(false)).expect("room");
        assert!(!older.exists(), "one at a time");
        let kept = about(&dir).expect("it is whole");
        assert_eq!((kept.epoch, kept.session, kept.of.layout.pages()), (9, 3, PAGES));
        assert_eq!(kept.primary().ok(), of(1).primary().ok());
        let into = Ram::new(PAGES);
        assert_eq!(load(&dir, &kept, &into).expect("it is whole"), b"devices");
        let (mut was, mut is) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
        for page in 0..PAGES {
            memory.read(page, &mut was);
            into.read(page, &mut is);
            assert!(was == is, "page {page}");
        }
        let blocks = fs::metadata(dir.join(MEMORY)).expect("it is there").blocks();
        assert!(blocks * 512 < PAGES * PAGE_SIZE as u64 / 4, "{blocks} blocks");
        remove(&dir);
        assert!(!parent.exists(), "nothing is left");
    }

    #[test]
    fn a_copy_that_is_not_whole_is_none() {
        let state = tempfile::tempdir().expect("a directory");
        let (dir, memory) = (state.path().join("copies/vm/5"), filled());
        let stopped = write(&dir, of(PAGES), &memory, b"devices", &AtomicBool::new(true));
        assert!(matches!(stopped, Err(KeepError::Stopped)) && !dir.exists(), "{stopped:?}");
        assert_eq!(about(&dir).expect_err("there is none").kind(), ErrorKind::NotFound);
        for (file, at) in [(MEMORY, 256 * PAGE_SIZE as u64 + 110), (MEMORY, 2 * PAGE_SIZE as u64), (DEVICE, 3)] {
            write(&dir, of(PAGES), &memory, b"devices", &AtomicBool::new(false)).expect("room");
            let damage = OpenOptions::new().write(true).open(dir.join(file)).expect("it is there");
            damage.write_all_at(b"!", at).expect("it is written");
            let kept = about(&dir).expect("that is whole");
            let found = load(&dir, &kept, &Ram::new(PAGES)).expect_err("it is damaged");
            assert_eq!(found.kind(), ErrorKind::InvalidData, "{file} at {at}: {found}");
        }
        let kept = about(&dir).expect("that is whole");
        assert!(load(&dir, &kept, &Ram::new(PAGES + 1)).is_err());
        fs::write(dir.join(ABOUT), "{}").expect("damage");
        assert_eq!(about(&dir).expect_err("it says nothing").kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn what_has_no_room_is_refused_before_anything_is_written() {
        let state = tempfile::tempdir().expect("a directory");
        let dir = state.path().join("copies/vm/5");
        let refused = write(&dir, of(1 << 32), &filled(), b"", &AtomicBool::new(false)).expect_err("16 TiB");
        assert!(matches!(refused, KeepError::NoRoom { .. }) && !dir.exists(), "{refused:?}");
        assert!(refused.to_string().contains("it may take 16777472 MiB"), "{refused}");
    }
}
