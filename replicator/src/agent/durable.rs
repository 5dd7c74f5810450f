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

use super::aside::aside;
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

    /// If this is another VM's that has the name by now: it is `known` again, but for the number of sessions.
    fn take_back(&mut self, known: &Self) {
        if self.vm != known.vm {
            tracing::warn!(vm = known.name, "another VM of this name was remembered here, and is not any more");
            *self = Self { sessions: self.sessions.max(known.sessions), ..known.clone() };
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
    fn turn_to(&mut self, Turn { disks, own, gone }: Turn) {
        self.disks = disks;
        self.former.extend(std::mem::replace(&mut self.own, own));
        self.former.retain(|image| !self.own.contains(image) && !gone.contains(image));
        self.former.sort();
        self.former.dedup();
    }
}

/// Other disks of a VM, looked at: a file system that does not answer may keep its caller, and nobody else ([`aside`]).
#[derive(Default)]
struct Turn {
    disks: Vec<DiskImage>,
    own: Vec<ImageFile>,
    /// Of those that it had, images that are not there any more.
    gone: BTreeSet<ImageFile>,
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
        match aside(|| Self::adopt(Self::path(state_dir, name))) {
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
        aside(|| files::make_dir(&state_dir.join("vms")))?;
        if let Some(found) = Self::find(state_dir, name)? {
            return Ok(found);
        }
        let (path, text) = (Self::path(state_dir, name), Text::fresh(fresh, name.to_owned()));
        let record = bytes(&text)?;
        aside(|| slots::write(&path, &record))?;
        Ok(Self { path, text, vm: fresh, failed: false, lost: None })
    }

    /// Every VM that this host has, or had, a part in: one that it remembers a guest of, or how it is to be protected.
    pub(super) fn with_parts(state_dir: &Path) -> Vec<Self> {
        let known = aside(|| all(state_dir, Self::adopt)).inspect_err(|error| {
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
        aside(|| all(state_dir, Self::look))
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

    /// A turn to these disks.
    fn turn(&self, disks: Vec<DiskImage>) -> Turn {
        let own = disks.iter().map(ImageFile::of).collect();
        let had = self.text.own.iter().chain(&self.text.former);
        let gone = aside(|| had.filter(|image| !image.is_there()).cloned().collect());
        Turn { disks, own, gone }
    }

    /// Changes what is remembered of this VM by now. Another one of its name is not remembered any more then.
    fn change(&mut self, change: impl FnOnce(&mut Text)) -> io::Result<()> {
        let known = self.text.clone();
        self.update(|text| {
            text.take_back(&known);
            change(text);
        })
    }

    /// The same if nobody else has written it since this was read or written last; whether it was done.
    fn change_unchanged(&mut self, change: impl FnOnce(&mut Text)) -> io::Result<bool> {
        let known = self.text.clone();
        let mut unchanged = false;
        self.update(|text| {
            unchanged = *text == known;
            if unchanged {
                change(text);
            }
        })?;
        if !unchanged {
            // It is not what its user has looked at.
            self.text = known;
        }
        Ok(unchanged)
    }

    /// Writes what `change` makes of what is there, whoever wrote that.
    fn update(&mut self, change: impl FnOnce(&mut Text)) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier write of this VM's state failed"));
        }
        let (mut there, mut next) = (None, None);
        let made = |record: Option<&[u8]>| {
            let base = match record {
                Some(record) => &*there.insert(Text::parse(record)?.0),
                None => &self.text,
            };
            let next = next.insert(base.clone());
            change(next);
            bytes(next)
        };
        let written = aside(|| slots::update(&self.path, made));
        match written {
            Ok(()) => self.text = next.expect("it was made"),
            Err(_) => {
                // What it falls back to is what was there, if that is of this VM.
                if let Some(there) = there.filter(|there| there.vm == self.text.vm) {
                    self.text = there;
                }
                (self.failed, self.lost) = (true, next);
            }
        }
        written
    }

    /// Whether an earlier write failed, so that nothing more is taken.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Writes anew, as a whole, what was remembered before the write that failed, or what somebody else wrote since; then it is known again what is on
    /// the disk, and more is taken. Of what that write was about nothing may have been acted upon: it is not remembered.
    pub(super) fn mend(&mut self) -> io::Result<()> {
        let mut next = self.text.clone();
        let made = |record: Option<&[u8]>| {
            if let Some(Ok((there, _))) = record.map(Text::parse)
                && Some(&there) != self.lost.as_ref()
            {
                let known = std::mem::replace(&mut next, there);
                next.take_back(&known);
            }
            bytes(&next)
        };
        aside(|| slots::renew(&self.path, made))?;
        (self.text, self.failed, self.lost) = (next, false, None);
        Ok(())
    }

    /// Takes on another identity: a standby learns it from its primary.
    pub(super) fn set_vm(&mut self, vm: VmId) -> io::Result<()> {
        // Of the same VM nothing is looked at: where its images are may not answer.
        let none = if self.vm == vm { Turn::default() } else { self.turn(Vec::new()) };
        self.update(|text| {
            if text.vm != vm.to_string() {
                let (sessions, latched) = (text.sessions, text.latched);
                text.turn_to(none);
                let former = std::mem::take(&mut text.former);
                *text = Text { sessions, latched, former, ..Text::fresh(vm, std::mem::take(&mut text.name)) };
            }
        })?;
        self.vm = vm;
        Ok(())
    }

    /// Remembers the highest generation seen.
    pub(super) fn set_generation(&mut self, generation: u64) -> io::Result<()> {
        self.change(|text| text.generation = text.generation.max(generation))
    }

    /// The same unless somebody else has written it since; whether it is remembered.
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
        let turn = self.turn(disks);
        self.change(|text| {
            text.mark = Some(mark);
            text.kept = None;
            text.latched = true;
            text.turn_to(turn);
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
        let turn = self.turn(disks);
        self.change(|text| {
            text.latched = true;
            text.turn_to(turn);
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

    /// It may be started here from its disks, without asking, unless somebody else has written it since; whether it may. The record is this
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

    /// Which of the VM's sessions here this is.
    pub(super) fn session(&self) -> u64 {
        self.text.sessions
    }

    /// The copy that was here in this session is gone. Its disks and files may go, too, unless there has been another one since.
    pub(super) fn forget_copy(&mut self, session: u64) -> io::Result<()> {
        let mut last = false;
        self.change(|text| {
            last = text.sessions == session;
            if last {
                (text.protection, text.kept) = (None, None);
            }
        })?;
        if last {
            super::kept::forget(&self.copies());
        }
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
        Ok(self.numbers())
    }

    /// The same, `None` if somebody else has written it since.
    pub(super) fn begin_session_unchanged(&mut self) -> io::Result<Option<Numbers>> {
        let unchanged = self.change_unchanged(|text| text.sessions += 1)?;
        Ok(unchanged.then(|| self.numbers()))
    }

    fn numbers(&self) -> Numbers {
        let first = (self.text.sessions - 1) * SESSION_NUMBERS + 1;
        Numbers { first_epoch: first, first_request: first }
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
mod tests;
