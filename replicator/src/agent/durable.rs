//! What a host remembers of a VM over restarts: one small file each ([`heartbeat::slots`]), on the disk before the caller goes on.
//!
//! It holds what docs/protocol.md wants durable on a node: the VM's identity, the store it is recorded in, the highest
//! generation seen, and the mark "activating this generation at this epoch". And what a later life of the agent needs to take up
//! its work: how the VM is to be protected, and which process is its guest here.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use heartbeat::{files, slots};
use heartbeat_core::ids::{Generation, NodeId, StoreId, VmId};
use serde::{Deserialize, Serialize};
use vmm_hooks::disk::DiskImage;

use super::protection::Protection;

/// Numbers of two sessions of a VM differ by this much: more epochs than a session can use in thirty years.
const SESSION_NUMBERS: u64 = 1_000_000_000_000;

/// Of their names. In files that an older program left, the text is all there is.
const EXTENSION: &str = "toml";

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
    /// What the VM is called.
    #[serde(default)]
    name: String,
    #[serde(default)]
    store: Option<String>,
    /// Which of the VM's hosts keeps the record, where no third one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keeper: Option<String>,
    #[serde(default)]
    generation: u64,
    #[serde(default)]
    sessions: u64,
    #[serde(default)]
    mark: Option<Mark>,
    #[serde(default)]
    guest: Option<GuestAt>,
    #[serde(default)]
    protection: Option<Protection>,
    /// The images that the VM's disks had when it last ran here, in the recipe's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    disks: Vec<DiskImage>,
    /// It is not to be started here before this host was asked: since before its first pairing, until the record was made this node's alone.
    #[serde(default)]
    latched: bool,
    /// `disks`, as they were found when it was latched.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    own: Vec<ImageFile>,
    /// A copy that waits for its fence. Of use only while the record is by the grant that it is noted with, or by what this node made of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kept: Option<KeptAt>,
    /// Images that it had here before it ran elsewhere, and that are not its disks any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    former: Vec<ImageFile>,
}

/// An image that is known again: another file that takes its place, as when an operator moves a newer disk there, is another image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Which file; none for a block device, whose node is made anew with each boot.
    #[serde(default)]
    inode: Option<u64>,
}

impl ImageFile {
    fn of(image: &DiskImage) -> Self {
        Self { path: image.path.clone(), inode: Self::inode_at(&image.path).flatten() }
    }

    /// `None`: nothing is there.
    fn inode_at(path: &Path) -> Option<Option<u64>> {
        let found = std::fs::metadata(path).ok()?;
        Some(found.is_file().then(|| found.ino()))
    }

    /// Whether it is there, and no other file in its place.
    pub(super) fn is_there(&self) -> bool {
        Self::inode_at(&self.path) == Some(self.inode)
    }
}

/// Which process is the VM's guest on this host. Only one that an agent attached to, or activated, is noted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GuestAt {
    /// The VM's name.
    pub(super) name: String,
    /// Its process.
    pub(super) pid: u32,
    /// When that started, in the kernel's clock ticks since boot: a pid is used again.
    pub(super) started: u64,
    /// Its QMP socket, if it was named by that.
    #[serde(default)]
    pub(super) control: Option<PathBuf>,
    /// The agent is attached to it, and so may have left it paused and with things of ours in it.
    pub(super) attached: bool,
    /// It is a microVM, whose process ends with the agent's that started it.
    #[serde(default)]
    pub(super) microvm: bool,
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

/// A copy that is on this host's disk: see [`super::kept`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeptAt {
    /// By which it may be gone on with.
    pub(super) grant: u64,
    /// Where.
    pub(super) dir: PathBuf,
    /// Since when the host was on as this was noted, as the kernel names it.
    boot: String,
}

impl KeptAt {
    /// A note of now.
    pub(super) fn now(grant: Generation, dir: PathBuf) -> Self {
        Self { grant: grant.0, dir, boot: boot() }
    }

    /// Whether the host may have been off since. (What the kernel does not say is as good as that.)
    pub(super) fn off_since(&self) -> bool {
        self.boot.is_empty() || self.boot != boot()
    }
}

/// The kernel's name of the time since it was started (`Documentation/admin-guide/sysctl/kernel.rst`, random).
fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl Text {
    fn fresh(vm: VmId, name: String) -> Self {
        let (store, keeper, mark, guest, protection, kept) = (None, None, None, None, None, None);
        let (sessions, disks, latched, own, former) = (0, Vec::new(), false, Vec::new(), Vec::new());
        let vm = vm.to_string();
        Self {
            vm,
            name,
            store,
            keeper,
            generation: 0,
            sessions,
            mark,
            guest,
            protection,
            disks,
            latched,
            own,
            kept,
            former,
        }
    }

    /// What was written, and whose it is.
    fn parse(bytes: &[u8]) -> io::Result<(Self, VmId)> {
        let invalid =
            |error: Box<dyn std::error::Error + Send + Sync>| io::Error::new(io::ErrorKind::InvalidData, error);
        let text = std::str::from_utf8(bytes).map_err(|error| invalid(error.into()))?;
        let text: Self = toml::from_str(text).map_err(|error| invalid(error.into()))?;
        let vm = text.vm.parse().map_err(|error: heartbeat_core::ids::ParseIdError| invalid(error.into()))?;
        Ok((text, vm))
    }

    /// Its disks are these from now on; those that it had are former ones.
    fn turn_to(&mut self, disks: Vec<DiskImage>) {
        let own = disks.iter().map(ImageFile::of).collect();
        self.disks = disks;
        self.former.extend(std::mem::replace(&mut self.own, own));
        self.former.retain(|image| !self.own.contains(image) && image.is_there());
        self.former.sort();
        self.former.dedup();
    }
}

/// The memory of one VM on this host, as it was when this was read or written last. Several may be of one VM: each changes what is there by then, and
/// nothing else of it. Errors latch: after a failed write it refuses all further ones, because nobody knows
/// what is on the disk, until [`Durable::mend`] has written all of it anew.
#[derive(Debug)]
pub(super) struct Durable {
    path: PathBuf,
    text: Text,
    vm: VmId,
    failed: bool,
    /// What could not be written.
    lost: Option<Text>,
}

impl Durable {
    /// What is remembered of the VM called `name`, if anything is.
    ///
    /// # Errors
    /// As [`Durable::open`].
    pub(super) fn find(state_dir: &Path, name: &str) -> io::Result<Option<Self>> {
        match Self::adopt(Self::path(state_dir, name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            found => found.map(Some),
        }
    }

    fn path(state_dir: &Path, name: &str) -> PathBuf {
        state_dir.join("vms").join(format!("{}.{EXTENSION}", escape(name)))
    }

    /// Reads what is remembered of the VM called `name`; if nothing is, remembers it under `fresh`.
    ///
    /// # Errors
    /// If the file cannot be read, written or understood. It is never taken for absent then.
    pub(super) fn open(state_dir: &Path, name: &str, fresh: VmId) -> io::Result<Self> {
        files::make_dir(&state_dir.join("vms"))?;
        if let Some(found) = Self::find(state_dir, name)? {
            return Ok(found);
        }
        let (path, text) = (Self::path(state_dir, name), Text::fresh(fresh, name.to_owned()));
        slots::write(&path, &bytes(&text)?)?;
        Ok(Self { path, text, vm: fresh, failed: false, lost: None })
    }

    /// Every VM that this host has, or had, a part in: one that it remembers a guest of, or how it is to be protected.
    pub(super) fn with_parts(state_dir: &Path) -> Vec<Self> {
        let known = all(state_dir, Self::adopt).inspect_err(|error| {
            tracing::error!(%error, "what this host remembers of its VMs cannot be read: none of them is taken up");
        });
        let mut all = known.unwrap_or_default().vms;
        all.retain(|durable| durable.text.guest.is_some() || durable.text.protection.is_some());
        all
    }

    /// Every VM that is remembered, to look at: it may not be on the disk as it is read.
    ///
    /// # Errors
    /// If it is not known which there are.
    pub(super) fn all(state_dir: &Path) -> io::Result<Known> {
        all(state_dir, Self::look)
    }

    /// What is remembered, on the disk.
    fn adopt(path: PathBuf) -> io::Result<Self> {
        let text = match slots::adopt(&path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let text = Self::older(&path).ok_or(error)?;
                slots::replace(&path, &text)?;
                text
            }
            adopted => adopted?,
        };
        Self::parse(path, text)
    }

    fn look(path: PathBuf) -> io::Result<Self> {
        let text = match slots::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Self::older(&path).ok_or(error)?,
            read => read?,
        };
        Self::parse(path, text)
    }

    /// What an older program left there, if it is that.
    fn older(path: &Path) -> Option<Vec<u8>> {
        let text = std::fs::read(path).ok()?;
        Self::parse(path.to_owned(), text.clone()).is_ok().then_some(text)
    }

    fn parse(path: PathBuf, text: Vec<u8>) -> io::Result<Self> {
        let (text, vm) = Text::parse(&text)?;
        Ok(Self { path, text, vm, failed: false, lost: None })
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

    /// Changes what is remembered of this VM by now.
    fn change(&mut self, change: impl FnOnce(&mut Text)) -> io::Result<()> {
        let vm = self.vm.to_string();
        self.update(|text| {
            if text.vm != vm {
                return Err(io::Error::other("another VM is remembered by this name by now"));
            }
            change(text);
            Ok(())
        })
    }

    /// The same if nobody else has written it since this was read or written last; whether that is so.
    fn change_unchanged(&mut self, change: impl FnOnce(&mut Text)) -> io::Result<bool> {
        let known = self.text.clone();
        let mut unchanged = false;
        self.update(|text| {
            unchanged = *text == known;
            if unchanged {
                change(text);
            }
            Ok(())
        })?;
        if !unchanged {
            // It is not what its user has looked at.
            self.text = known;
        }
        Ok(unchanged)
    }

    /// Writes what `change` makes of what is there, whoever wrote that, unless it refuses to.
    fn update(&mut self, change: impl FnOnce(&mut Text) -> io::Result<()>) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier write of this VM's state failed"));
        }
        let (mut refused, mut next) = (false, None);
        let written = slots::update(&self.path, |record| {
            let mut text = match record {
                Some(record) => Text::parse(record)?.0,
                None => self.text.clone(),
            };
            change(&mut text).inspect_err(|_| refused = true)?;
            bytes(next.insert(text))
        });
        match (written, next) {
            (Ok(()), Some(text)) => self.text = text,
            (Ok(()), None) => {}
            (Err(error), lost) => {
                if !refused {
                    (self.failed, self.lost) = (true, lost);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether an earlier write failed, so that nothing more is taken.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Writes anew, as a whole, what was remembered before the write that failed, or what somebody else wrote since; then it is known again what is on
    /// the disk, and more is taken. Of what that write was about nothing may have been acted upon: it is not remembered.
    pub(super) fn mend(&mut self) -> io::Result<()> {
        let mut next = self.text.clone();
        slots::renew(&self.path, |record| {
            if let Some(Ok((there, _))) = record.map(Text::parse)
                && Some(&there) != self.lost.as_ref()
            {
                if there.vm != self.text.vm {
                    return Err(io::Error::other("another VM is remembered by this name by now"));
                }
                next = there;
            }
            bytes(&next)
        })?;
        (self.text, self.failed, self.lost) = (next, false, None);
        Ok(())
    }

    /// Takes on another identity: a standby learns it from its primary.
    pub(super) fn set_vm(&mut self, vm: VmId) -> io::Result<()> {
        self.update(|text| {
            if text.vm != vm.to_string() {
                let (sessions, latched) = (text.sessions, text.latched);
                text.turn_to(Vec::new());
                let former = std::mem::take(&mut text.former);
                *text = Text { sessions, latched, former, ..Text::fresh(vm, std::mem::take(&mut text.name)) };
            }
            Ok(())
        })?;
        self.vm = vm;
        Ok(())
    }

    /// Remembers the highest generation seen.
    pub(super) fn set_generation(&mut self, generation: u64) -> io::Result<()> {
        self.change(|text| text.generation = text.generation.max(generation))
    }

    /// The same unless somebody else has written it since; whether that is not so.
    pub(super) fn set_generation_unchanged(&mut self, generation: u64) -> io::Result<bool> {
        self.change_unchanged(|text| text.generation = text.generation.max(generation))
    }

    /// Remembers the store.
    pub(super) fn set_store(&mut self, store: &str) -> io::Result<()> {
        self.change(|text| text.store = Some(store.to_owned()))
    }

    /// Which of the VM's hosts keeps its record, where no third one does.
    pub(super) fn keeper(&self) -> Option<NodeId> {
        self.text.keeper.as_ref()?.parse().ok()
    }

    /// Remembers who keeps the record from now on, and the store's identity if it is known.
    pub(super) fn set_keeper(&mut self, keeper: NodeId, store: Option<StoreId>) -> io::Result<()> {
        self.change(|text| {
            if text.keeper.as_deref() != Some(keeper.to_string().as_str()) || store.is_some() {
                text.keeper = Some(keeper.to_string());
                text.store = store.map(|store| store.to_string());
            }
        })
    }

    /// Remembers an activation before it begins, and where the disks are from then on.
    pub(super) fn set_mark(&mut self, mark: Mark, disks: Vec<DiskImage>) -> io::Result<()> {
        self.change(|text| {
            text.mark = Some(mark);
            text.kept = None;
            text.latched = true;
            text.turn_to(disks);
            text.generation = text.generation.max(mark.generation);
        })
    }

    /// A copy that waits for its fence, if one is noted.
    pub(super) fn kept(&self) -> Option<&KeptAt> {
        self.text.kept.as_ref()
    }

    /// Notes one that is on the disk, or that none is of use.
    pub(super) fn set_kept(&mut self, kept: Option<KeptAt>) -> io::Result<()> {
        self.change(|text| text.kept = kept)
    }

    /// Where copies of this VM that wait for a fence are.
    pub(super) fn copies(&self) -> PathBuf {
        let state_dir = self.path.parent().and_then(Path::parent).expect("it is below the state directory");
        state_dir.join("copies").join(escape(&self.text.name))
    }

    /// How the VM is to be protected, if it is.
    pub(super) fn protection(&self) -> Option<&Protection> {
        self.text.protection.as_ref()
    }

    /// Remembers how it is to be protected, or that it is not any more.
    pub(super) fn set_protection(&mut self, protection: Option<Protection>) -> io::Result<()> {
        self.change(|text| text.protection = protection)
    }

    /// Where the VM's disks were when it last ran here.
    pub(super) fn disks(&self) -> &[DiskImage] {
        &self.text.disks
    }

    /// Remembers where its disks are while it runs here, and that it must not be started here unasked from now on.
    pub(super) fn latch(&mut self, disks: Vec<DiskImage>) -> io::Result<()> {
        self.change(|text| {
            text.latched = true;
            text.turn_to(disks);
        })
    }

    /// Remembers the same on a host that stands by: what it had of the VM before is another host's to succeed.
    pub(super) fn latch_as_standby(&mut self) -> io::Result<()> {
        self.change(|text| text.latched = true)
    }

    /// Whether it must not be started here unasked.
    pub(super) fn is_latched(&self) -> bool {
        self.text.latched
    }

    /// Its disks, as files.
    pub(super) fn own(&self) -> &[ImageFile] {
        &self.text.own
    }

    /// Images that were its disks before it ran elsewhere.
    pub(super) fn former(&self) -> &[ImageFile] {
        &self.text.former
    }

    /// It may be started here from its disks, without asking, unless somebody else has written it since; whether that is not so. The record is this
    /// node's alone, and nothing that was asked can change that.
    pub(super) fn unlatch(&mut self) -> io::Result<bool> {
        self.change_unchanged(|text| text.latched = false)
    }

    /// An operator wants this image to be started from all the same.
    pub(super) fn release(&mut self, image: &Path) -> io::Result<()> {
        self.change(|text| text.former.retain(|former| former.path != image))
    }

    /// Has nothing of the VM for a later life to take up. At once: one that stood by and ran nothing is not what it was.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        self.change(|text| (text.guest, text.protection, text.kept) = (None, None, None))
    }

    /// The copy that was here is gone. Its disks and files may go, too.
    pub(super) fn forget_copy(&mut self) -> io::Result<()> {
        self.change(|text| (text.protection, text.kept) = (None, None))?;
        super::kept::forget(&self.copies());
        Ok(())
    }

    /// Which process is its guest here, as far as it was noted.
    pub(super) fn guest(&self) -> Option<&GuestAt> {
        self.text.guest.as_ref()
    }

    /// What the VM is called.
    pub(super) fn name(&self) -> &str {
        &self.text.name
    }

    /// Remembers which process is its guest here, or that none is.
    pub(super) fn set_guest(&mut self, guest: Option<GuestAt>) -> io::Result<()> {
        self.change(|text| text.guest = guest)
    }

    /// The activation that was about to happen, or happened.
    pub(super) fn mark(&self) -> Option<Mark> {
        self.text.mark
    }

    /// Begins a session: its numbers are higher than any of an earlier session.
    pub(super) fn begin_session(&mut self) -> io::Result<Numbers> {
        self.change(|text| text.sessions += 1)?;
        let first = (self.text.sessions - 1) * SESSION_NUMBERS + 1;
        Ok(Numbers { first_epoch: first, first_request: first })
    }
}

/// What a host remembers of its VMs.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Those of which it can be read.
    pub(super) vms: Vec<Durable>,
    /// The names, as [`escape`] writes them, of those of which it cannot be: nobody knows what their images are, or whose they are.
    pub(super) unreadable: BTreeSet<String>,
}

impl Known {
    /// A VM of which what is remembered cannot be used, and that who asks for a VM of this name, or for images, may mean.
    pub(super) fn unusable(&self, vm: Option<&str>, images: bool) -> Option<&str> {
        let named = vm.and_then(|vm| self.unreadable.get(&escape(vm)));
        named.or_else(|| self.unreadable.first().filter(|_| images)).map(String::as_str)
    }
}

/// All that is remembered, read by `by`. What cannot be read is said in the log and left; an error if it is not known what there is.
fn all(state_dir: &Path, by: impl Fn(PathBuf) -> io::Result<Durable>) -> io::Result<Known> {
    let mut known = Known::default();
    let entries = match std::fs::read_dir(state_dir.join("vms")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(known),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        match by(path.clone()) {
            Ok(durable) => known.vms.push(durable),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "what this host remembers of a VM cannot be used");
                known.unreadable.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
            }
        }
    }
    Ok(known)
}

fn bytes(text: &Text) -> io::Result<Vec<u8>> {
    toml::to_string(text).map(String::into_bytes).map_err(io::Error::other)
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
        memory.set_mark(Mark { generation: 8, epoch: 5 }, Vec::new()).expect("writes");
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
    fn a_copy_is_kept_until_it_is_marked() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut memory = Durable::open(dir.path(), "a/1", VmId([1; 16])).expect("opens");
        assert_eq!(memory.copies(), dir.path().join("copies/a%2f1"));
        let kept = |grant| KeptAt::now(Generation(grant), dir.path().join("copies/a%2f1/7"));
        assert!(!kept(7).off_since());
        assert!(KeptAt { boot: "another".into(), ..kept(7) }.off_since());
        memory.set_kept(Some(kept(7))).expect("writes");
        memory.set_kept(Some(kept(8))).expect("another life has it");
        let on_disk = || Durable::open(dir.path(), "a/1", VmId([2; 16])).expect("opens");
        assert_eq!(on_disk().kept(), Some(&kept(8)));
        memory.set_mark(Mark { generation: 8, epoch: 9 }, Vec::new()).expect("writes");
        assert_eq!((on_disk().kept(), on_disk().mark().map(|mark| mark.generation)), (None, Some(8)));
        // Nor is it kept for another VM, or for one that is not this host's business.
        memory.set_kept(Some(kept(9))).expect("writes");
        memory.set_vm(VmId([3; 16])).expect("writes");
        assert_eq!(on_disk().kept(), None);
        memory.set_kept(Some(kept(9))).expect("writes");
        memory.settle().expect("writes");
        assert_eq!(on_disk().kept(), None);
    }

    #[test]
    fn what_is_settled_is_not_taken_up() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
        let guest = GuestAt { name: "a".into(), pid: 7, started: 1, control: None, attached: true, microvm: false };
        memory.set_guest(Some(guest)).expect("writes");
        memory.set_protection(Some(Protection::default())).expect("writes");
        assert_eq!(Durable::with_parts(dir.path()).len(), 1);
        memory.settle().expect("writes");
        assert_eq!(Durable::with_parts(dir.path()).len(), 0);
        assert_eq!(memory.vm(), VmId([1; 16]), "what it is called in the record stays known");
    }

    #[test]
    fn what_an_older_program_remembered_is_taken_over() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut memory = Durable::open(dir.path(), "a.b", VmId([1; 16])).expect("opens");
        memory.set_mark(Mark { generation: 4, epoch: 9 }, Vec::new()).expect("writes");
        let text = toml::to_string(&memory.text).expect("plain data");
        std::fs::write(&memory.path, &text).expect("room");
        let all = Durable::all(dir.path()).expect("reads");
        assert_eq!(all.vms.iter().map(|vm| vm.text.clone()).collect::<Vec<_>>(), [memory.text.clone()]);
        assert_eq!(std::fs::read_to_string(&memory.path).expect("there"), text, "who looks changes nothing");
        for _ in 0..2 {
            let found = Durable::find(dir.path(), "a.b").expect("reads").expect("is there");
            assert_eq!(found.text, memory.text);
            assert_ne!(std::fs::read_to_string(&memory.path).expect("there"), text, "it is taken over");
        }
    }

    #[test]
    fn a_damaged_file_is_never_taken_for_absent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens"));
        std::fs::write(dir.path().join("vms/a.toml"), "generation = 1").expect("damage");
        assert!(Durable::open(dir.path(), "a", VmId([1; 16])).is_err());
        assert!(Durable::find(dir.path(), "a").is_err());
        let all = Durable::all(dir.path()).expect("the directory can be read");
        assert!(all.vms.is_empty());
        assert_eq!(
            [(Some("a"), false), (None, true), (Some("b"), true)].map(|(vm, images)| all.unusable(vm, images)),
            [Some("a"); 3]
        );
        assert_eq!(all.unusable(Some("b"), false), None, "that one was not asked for");
        std::fs::remove_dir_all(dir.path().join("vms")).expect("remove");
        assert!(Durable::all(dir.path()).expect("nothing is there").vms.is_empty());
        std::fs::write(dir.path().join("vms"), "").expect("room");
        assert!(Durable::all(dir.path()).is_err(), "what there is, is not known");
    }

    #[test]
    fn what_was_its_disk_before_it_ran_elsewhere_is_a_former_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let image = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").expect("room");
            DiskImage { path, format: "raw".to_owned() }
        };
        let (first, copy, second) = (image("first"), image("copy"), image("second"));
        let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
        assert!(!memory.is_latched());
        memory.latch(vec![first.clone()]).expect("writes");
        memory.latch(vec![first.clone()]).expect("again, by the next session");
        assert!(memory.is_latched() && memory.former().is_empty());
        memory.set_mark(Mark { generation: 3, epoch: 9 }, vec![copy.clone()]).expect("it comes back");
        let stale = ImageFile::of(&first);
        assert_eq!((memory.disks(), memory.former()), ([copy.clone()].as_slice(), [stale.clone()].as_slice()));
        assert!(memory.unlatch().expect("writes"));
        drop(memory);
        let mut memory = Durable::find(dir.path(), "a").expect("reads").expect("is there");
        assert!(!memory.is_latched(), "its own disks are free");
        assert_eq!(memory.former(), std::slice::from_ref(&stale), "and the stale one is not");
        std::fs::remove_file(&copy.path).expect("its copy is made anew");
        memory.set_mark(Mark { generation: 5, epoch: 20 }, vec![second]).expect("once more");
        assert_eq!(memory.former(), std::slice::from_ref(&stale), "what is gone need not be kept from anybody");
        std::fs::copy(&first.path, dir.path().join("newer")).expect("room");
        std::fs::rename(dir.path().join("newer"), &first.path).expect("in its place");
        assert!(!stale.is_there(), "another file is another image");
        memory.release(&first.path).expect("an operator knows better");
        assert!(memory.former().is_empty() && memory.is_latched());
    }

    #[test]
    fn of_two_that_remember_a_vm_each_changes_what_the_other_wrote() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let vm = VmId([1; 16]);
        let open = || Durable::open(dir.path(), "a", vm).expect("opens");
        let (mut one, mut other) = (open(), open());
        one.set_generation(7).expect("writes");
        one.set_mark(Mark { generation: 8, epoch: 5 }, Vec::new()).expect("writes");
        other.set_generation(3).expect("writes");
        other.set_protection(Some(Protection::default())).expect("writes");
        assert_eq!((other.generation(), other.mark()), (8, Some(Mark { generation: 8, epoch: 5 })));
        assert_eq!((open().text, open().protection()), (other.text.clone(), Some(&Protection::default())));
        let first = other.begin_session().expect("writes").first_epoch;
        assert_ne!(one.begin_session().expect("writes").first_epoch, first);
        // What was decided by what one has read is not done over what the other wrote since.
        let on_disk = open().text;
        for _ in 0..2 {
            assert!(!other.unlatch().expect("reads") && !other.set_generation_unchanged(99).expect("reads"));
        }
        assert_eq!((&open().text, open().is_latched()), (&on_disk, true));
        assert!(one.set_generation_unchanged(99).expect("writes") && one.unlatch().expect("writes"));
        assert_eq!((open().generation(), open().is_latched()), (99, false));
        // Nor is another VM's memory written, and nothing has failed.
        other.set_vm(VmId([2; 16])).expect("writes");
        for _ in 0..2 {
            assert!(one.set_mark(Mark { generation: 100, epoch: 1 }, Vec::new()).is_err() && !one.has_failed());
        }
        assert_eq!((open().vm(), open().mark()), (VmId([2; 16]), None));
    }

    #[test]
    fn what_somebody_else_wrote_since_a_write_failed_is_not_mended_away() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let open = || Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
        let vms = dir.path().join("vms");
        let (mut one, mut other) = (open(), open());
        std::fs::rename(&vms, dir.path().join("away")).expect("moves");
        assert!(one.set_generation(1).is_err());
        std::fs::rename(dir.path().join("away"), &vms).expect("moves back");
        other.set_generation(9).expect("writes");
        one.mend().expect("writes");
        assert_eq!((one.generation(), open().generation()), (9, 9));
        // What could not be written is on the disk, as far as anybody can tell, and nobody has acted upon it.
        let mut lost = one.text.clone();
        lost.generation = 12;
        slots::write(&one.path, &bytes(&lost).expect("plain data")).expect("writes");
        (one.failed, one.lost) = (true, Some(lost));
        one.mend().expect("writes");
        assert_eq!((one.generation(), open().generation()), (9, 9));
        other.set_vm(VmId([2; 16])).expect("writes");
        one.failed = true;
        assert!(one.mend().is_err() && one.has_failed());
        assert_eq!(open().vm(), VmId([2; 16]));
    }

    #[test]
    fn a_failed_write_latches() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
        std::fs::remove_dir_all(dir.path().join("vms")).expect("remove");
        assert!(memory.set_generation(1).is_err());
        std::fs::create_dir(dir.path().join("vms")).expect("back again");
        assert!(memory.has_failed() && memory.set_generation(2).is_err(), "what is on the disk is not known");
    }

    #[test]
    fn a_latched_memory_takes_more_once_all_of_it_was_written_anew() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let vms = dir.path().join("vms");
        let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
        memory.set_generation(3).expect("writes");
        std::fs::remove_dir_all(&vms).expect("remove");
        assert!(memory.set_mark(Mark { generation: 4, epoch: 9 }, Vec::new()).is_err());
        assert!(memory.mend().is_err() && memory.has_failed(), "there is still no room");
        std::fs::create_dir(&vms).expect("back again");
        memory.mend().expect("writes");
        let on_disk = || Durable::open(dir.path(), "a", VmId([2; 16])).expect("opens");
        assert_eq!((on_disk().generation(), on_disk().mark()), (3, None), "the failed write was not acted upon");
        memory.set_mark(Mark { generation: 4, epoch: 9 }, Vec::new()).expect("writes");
        assert_eq!((on_disk().generation(), on_disk().mark()), (4, Some(Mark { generation: 4, epoch: 9 })));
    }
}
