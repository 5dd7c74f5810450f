//! The disks of a standby: between the intake and the VM task, so that an epoch counts as staged only when its disk writes
//! are held as the policy says.
//!
//! Two threads serve one [`DiskStore`]: the keeper takes the streams in order and journals each epoch's writes before it passes
//! the epoch on; the applier brings committed epochs into the images, and waits for the disk meanwhile, which the keeper
//! does not. Promise: after an error nothing more is passed on, and what was passed on before stays held (`docs/protocol.md` P28, P29).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use replicator_core::message::Durability;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vmm_hooks::disk::{DiskImage, DiskSpec, DiskWrite};
use vmm_hooks::guest::{GuestError, GuestErrorKind};

use super::intake::Staged;
use crate::disk::files::HostFiles;
use crate::disk::known::Known;
use crate::disk::older;
use crate::disk::open::DEFAULT_JOURNAL_BYTES;
use crate::disk::{
    DiskError, DiskStore, EpochId, Policy, Recovered, Setup, StandbyDisk, State, create, recover, state_in,
};
use crate::metrics::VmMetrics;

/// An epoch whose disk writes are held, or the error after which none is.
pub(super) type Held = Result<Staged, DiskError>;

/// When nothing is to be applied for so long, the images are brought onto the disk.
const IDLE: Duration = Duration::from_millis(500);
/// How long a full journal waits for a commit that makes room.
const ROOM_WITHIN: Duration = Duration::from_secs(5);
/// Bound on directories of one VM.
const DIRS_MAX: u32 = 1000;

/// In the directory of a survivor's disks: the VM was seen to run elsewhere since.
const LEFT: &str = "left";

/// A VM's disks on this host, before and after their threads ran.
#[derive(Debug)]
pub(super) struct StandbyDisks {
    setup: Setup,
    store: DiskStore,
    known: Known,
}

impl StandbyDisks {
    /// Makes a place for the disks of the VM `name` under `parent`. Copies of earlier sessions stay until this one is whole; it begins
    /// with what is in the latest of them, or else in `old`, the disks that the VM had when it last ran here. That may take as
    /// long as reading them.
    ///
    /// # Errors
    /// If this host has no room; nothing is left behind.
    pub(super) fn make(
        parent: &Path,
        name: &str,
        specs: &[DiskSpec],
        durability: Durability,
        old: &[DiskImage],
    ) -> Result<Self, GuestError> {
        let parent = parent.join(plain(name));
        let earlier = earlier(&parent);
        let dir = make_dir(&parent)?;
        let setup = setup(dir, specs, durability);
        let images: Vec<_> = setup.images().into_iter().map(|(spec, path)| (spec.bytes, path)).collect();
        let candidates = |index: usize| -> Vec<DiskImage> {
            let name = images[index].1.file_name().unwrap_or_default();
            let copies = earlier.iter().map(|dir| DiskImage { path: dir.join(name), format: older::RAW.to_owned() });
            copies.chain(old.get(index).cloned()).collect()
        };
        let made = create(&HostFiles, &setup).map_err(refused).and_then(|store| {
            let candidates: Vec<_> = (0..images.len()).map(candidates).collect();
            let known = older::fill(&images, &candidates).map_err(|error| {
                GuestError::new(GuestErrorKind::Refused, "the new images of the VM's disks cannot be used")
                    .because(error)
            })?;
            Ok((store, known))
        });
        match made {
            Ok((store, known)) => Ok(Self { setup, store, known }),
            Err(error) => {
                remove(&setup.dir);
                Err(error)
            }
        }
    }

    /// What the images hold, for the primary.
    pub(super) fn take_known(&mut self) -> Known {
        std::mem::take(&mut self.known)
    }

    /// The images, one for each disk.
    pub(super) fn images(&self) -> Vec<PathBuf> {
        self.setup.images().into_iter().map(|(_, path)| path).collect()
    }

    /// The same, as a VM's disks.
    pub(super) fn as_images(&self) -> Vec<DiskImage> {
        as_images(&self.setup)
    }

    /// Where they are.
    pub(super) fn dir(&self) -> &Path {
        &self.setup.dir
    }

    /// Removes them.
    pub(super) fn remove(self) {
        drop(self.store);
        remove(&self.setup.dir);
    }

    /// Starts the threads. What comes in by `staged` goes out by the returned queue once it is held; an error is told by the
    /// same queue, once, and nothing comes after it.
    ///
    /// # Errors
    /// If the system has no thread.
    pub(super) fn start(
        self,
        staged: UnboundedReceiver<Staged>,
        metrics: VmMetrics,
    ) -> std::io::Result<(DiskThreads, Committer, UnboundedReceiver<Held>)> {
        let store = Arc::new(self.store);
        let (held, passed_on) = unbounded_channel();
        let (to_applier, for_applier) = channel();
        let (to_keeper, for_keeper) = channel();
        let keeper = Keeper {
            store: Arc::clone(&store),
            committed: for_keeper,
            dir: self.setup.dir.clone(),
            begun: false,
            metrics: metrics.clone(),
        };
        let (applying, errors, shown) = (Arc::clone(&store), held.clone(), metrics.clone());
        let committer = Committer { store: Arc::downgrade(&store), wake: [to_applier, to_keeper] };
        let keeper = Builder::new().name("us-disks".into()).spawn(move || keeper.run(staged, &held))?;
        let applier = Builder::new()
            .name("us-disk-apply".into())
            .spawn(move || apply(&applying, &for_applier, &errors, &shown))?;
        Ok((
            DiskThreads {
                setup: self.setup,
                store: Some(store),
                threads: vec![keeper, applier],
                metrics,
                finished: None,
            },
            committer,
            passed_on,
        ))
    }
}

fn setup(dir: PathBuf, specs: &[DiskSpec], durability: Durability) -> Setup {
    Setup {
        disks: specs.iter().map(|spec| StandbyDisk { spec: spec.clone(), image: None }).collect(),
        journal_bytes: DEFAULT_JOURNAL_BYTES,
        policy: match durability {
            Durability::Disk => Policy::Disk,
            Durability::Memory => Policy::Memory,
        },
        dir,
    }
}

fn as_images(setup: &Setup) -> Vec<DiskImage> {
    let raw = |(_, path)| DiskImage { path, format: older::RAW.to_owned() };
    setup.images().into_iter().map(raw).collect()
}

/// Says what may be applied. Dropping it lets the threads end, once the intake has ended too.
#[derive(Debug)]
pub(super) struct Committer {
    store: Weak<DiskStore>,
    wake: [Sender<()>; 2],
}

impl Committer {
    /// The epoch is acknowledged: it may be applied.
    pub(super) fn commit(&self, epoch: u64) {
        let Some(store) = self.store.upgrade() else { return };
        if let Err(error) = store.commit(epoch) {
            // The threads tell of a store that failed; this one alone keeps the journal from being trimmed.
            tracing::error!(%error, "an epoch cannot be applied to the disks");
        }
        drop(store);
        for wake in &self.wake {
            let _ = wake.send(());
        }
    }
}

/// The running threads. Dropping it ends them and leaves the images and the journal where they are.
#[derive(Debug)]
pub(super) struct DiskThreads {
    setup: Setup,
    store: Option<Arc<DiskStore>>,
    threads: Vec<JoinHandle<()>>,
    metrics: VmMetrics,
    /// The epoch that the images are at, and the grant that they are marked with, once they are the survivor's.
    finished: Option<(u64, u64)>,
}

impl Drop for DiskThreads {
    fn drop(&mut self) {
        self.metrics.remove_disk_journal();
    }
}

impl DiskThreads {
    /// Brings the images to exactly `epoch`, which was acknowledged, and marks them as the survivor's. Blocks until the threads
    /// have ended: the intake is aborted and the committer dropped by then. What was done already by this grant, and whose twin could not
    /// be activated, is not done again: nothing was written since.
    ///
    /// # Errors
    /// If they cannot be brought there; they are kept.
    pub(super) fn finish(&mut self, epoch: u64, generation: u64) -> Result<(), GuestError> {
        if self.finished != Some((epoch, generation)) {
            self.bring_to(epoch, generation)?;
            self.finished = Some((epoch, generation));
        }
        Ok(())
    }

    /// Brings the images to exactly `epoch`, durably, so that another life of the agent finds them there ([`DiskThreads::found`]). As for
    /// [`DiskThreads::finish`], which may follow.
    ///
    /// # Errors
    /// If they cannot be brought there; they are kept.
    pub(super) fn hold(&mut self, epoch: u64) -> Result<(), GuestError> {
        self.end();
        let store = self.store.as_ref();
        store.map_or(Ok(()), |store| store.finish(epoch)).map_err(refused)
    }

    /// The disks in `dir`, which a former life of the agent held at `epoch`.
    ///
    /// # Errors
    /// If they are not there, or as of another epoch.
    pub(super) fn found(
        dir: PathBuf,
        specs: &[DiskSpec],
        durability: Durability,
        epoch: u64,
        metrics: VmMetrics,
    ) -> Result<Self, GuestError> {
        let setup = setup(dir, specs, durability);
        let (store, recovered) = recover(&HostFiles, &setup, Some(epoch)).map_err(refused)?;
        match recovered {
            Recovered::Finished(id) if id.epoch == epoch => {
                Ok(Self { setup, store: Some(Arc::new(store)), threads: Vec::new(), metrics, finished: None })
            }
            found => Err(GuestError::new(
                GuestErrorKind::Refused,
                format!("the copy's disks in {} are not as of epoch {epoch}: {found:?}", setup.dir.display()),
            )),
        }
    }

    /// The images, as a VM's disks.
    pub(super) fn as_images(&self) -> Vec<DiskImage> {
        as_images(&self.setup)
    }

    fn bring_to(&mut self, epoch: u64, generation: u64) -> Result<(), GuestError> {
        self.end();
        let Some(store) = self.store.take().and_then(Arc::into_inner) else {
            return Err(GuestError::new(GuestErrorKind::Failed, "the disks' threads have not ended"));
        };
        let done = store.finish(epoch).and_then(|()| store.activated(generation));
        let Err(error) = done else { return Ok(()) };
        tracing::error!(%error, "the disks could not be finished at once; they are recovered from their journal");
        drop(store);
        let recovered = recover(&HostFiles, &self.setup, Some(epoch)).and_then(|(store, recovered)| {
            // Epochs without writes are not in the journal: the last one with some is what the disks are as of.
            if let Recovered::Whole(id) | Recovered::Finished(id) = recovered {
                store.finish(id.epoch)?;
            }
            store.activated(generation)
        });
        recovered.map_err(|error| GuestError { kind: GuestErrorKind::Failed, ..refused(error) })
    }

    /// Ends the threads and removes the images.
    pub(super) fn remove(mut self) {
        self.end();
        drop(self.store.take());
        remove(&self.setup.dir);
    }

    fn end(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the disks panicked");
            }
        }
    }
}

/// The thread that holds what comes in.
struct Keeper {
    store: Arc<DiskStore>,
    /// Something was committed.
    committed: Receiver<()>,
    dir: PathBuf,
    /// The first epoch was held: the images are whole.
    begun: bool,
    metrics: VmMetrics,
}

impl Keeper {
    /// Ends when the intake has ended, or nobody takes what it passes on.
    fn run(mut self, mut staged: UnboundedReceiver<Staged>, held: &UnboundedSender<Held>) {
        let mut failed = false;
        while let Some(next) = staged.blocking_recv() {
            if failed {
                // Taken and dropped, so that the connection goes on until the primary has gone alone.
                continue;
            }
            let done = self.hold(&next);
            failed = done.is_err();
            if held.send(done.map(|()| next)).is_err() {
                return;
            }
        }
    }

    fn hold(&mut self, staged: &Staged) -> Result<(), DiskError> {
        let stream = &staged.epoch;
        let id = stream.id();
        let epoch = EpochId { generation: id.generation, incarnation: id.incarnation, epoch: id.epoch };
        if !self.begun || id.sync {
            self.store.write(stream.disk())?;
            if !id.sync {
                self.store.begin(epoch)?;
                self.begun = true;
                forget_older(&self.dir);
            }
            return Ok(());
        }
        self.committed.try_iter().for_each(drop);
        let came = Instant::now();
        loop {
            match self.store.append(epoch, stream.disk()) {
                // What was passed on is about to be committed, which makes room.
                Err(full @ DiskError::Full { .. }) => {
                    if self.committed.recv_timeout(ROOM_WITHIN).is_err() {
                        return Err(full);
                    }
                }
                done => {
                    done?;
                    self.metrics.observe_disks_held(came.elapsed(), stream.disk().iter().map(DiskWrite::bytes).sum());
                    show(&self.store, &self.metrics);
                    return Ok(());
                }
            }
        }
    }
}

/// The applier. Ends when nothing is committed any more; an error it tells, and the store takes nothing after it.
fn apply(store: &DiskStore, committed: &Receiver<()>, errors: &UnboundedSender<Held>, metrics: &VmMetrics) {
    let mut flushed = true;
    loop {
        let done = match committed.recv_timeout(IDLE) {
            Ok(()) => {
                committed.try_iter().for_each(drop);
                flushed = false;
                store.apply().map(drop)
            }
            Err(RecvTimeoutError::Timeout) if flushed => Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                flushed = true;
                store.flush()
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        show(store, metrics);
        if let Err(error) = done {
            // A task that has ended does not mind.
            let _ = errors.send(Err(error));
            return;
        }
    }
}

fn show(store: &DiskStore, metrics: &VmMetrics) {
    let progress = store.progress();
    metrics.set_disk_journal(progress.journal_used, progress.journal_bytes);
}

/// The copies of a VM that are here, the latest first.
fn earlier(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.path();
            // A copy whose first copy never came to its end is worth something, too: what is in it is looked at, not believed.
            let changed =
                path.read_dir().ok()?.flatten().filter_map(|file| file.metadata().ok()?.modified().ok()).max()?;
            Some((changed, path))
        })
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

/// Notes of the disks of a survivor of the VM `name` that the VM runs elsewhere now. They stay, and go when the next copy here is
/// whole, which is begun only when the survivor has ended.
pub(super) fn survivor_left(parent: &Path, name: &str) {
    for dir in earlier(&parent.join(plain(name))) {
        if let Ok(Some(State::Activated(_))) = state_in(&HostFiles, &dir)
            && let Err(error) = fs::write(dir.join(LEFT), "")
        {
            tracing::warn!(path = %dir.display(), %error, "a survivor's disks will stay until somebody deletes them");
        }
    }
}

/// Copies of earlier sessions of the same VM, which the one that is whole now replaces. Those that belong to a survivor stay, unless the VM
/// was seen to run elsewhere after it.
fn forget_older(dir: &Path) {
    let Some(parent) = dir.parent() else { return };
    let Ok(entries) = fs::read_dir(parent) else { return };
    for old in entries.flatten().map(|entry| entry.path()).filter(|path| path != dir) {
        match state_in(&HostFiles, &old) {
            Ok(Some(State::Activated(_))) if old.join(LEFT).exists() => remove(&old),
            Ok(Some(State::Activated(_)) | None) => {}
            Ok(Some(_)) => remove(&old),
            Err(error) => tracing::warn!(path = %old.display(), %error, "an older copy of the disks is left alone"),
        }
    }
}

fn make_dir(parent: &Path) -> Result<PathBuf, GuestError> {
    let cannot = |path: &Path, error: std::io::Error| {
        GuestError::new(GuestErrorKind::Refused, format!("cannot make the directory {}: {error}", path.display()))
            .advise("see to the standby's image directory, or choose another one (`standby.images`)")
    };
    heartbeat::files::make_dir(parent).map_err(|error| cannot(parent, error))?;
    for number in 0..DIRS_MAX {
        let dir = parent.join(number.to_string());
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(cannot(&dir, error)),
        }
    }
    Err(cannot(parent, ErrorKind::AlreadyExists.into()))
}

fn remove(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::warn!(path = %dir.display(), %error, "a copy of a VM's disks was left behind");
    }
    // The VM's own directory goes with the last copy in it.
    if let Some(parent) = dir.parent() {
        let _ = fs::remove_dir(parent);
    }
}

fn plain(name: &str) -> String {
    name.chars().map(|char| if char.is_ascii_alphanumeric() || "-_.".contains(char) { char } else { '_' }).collect()
}

fn refused(error: DiskError) -> GuestError {
    GuestError::new(GuestErrorKind::Refused, error.to_string()).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::known::Digest;
    use crate::metrics::Metrics;
    use crate::pages::decode::Stager;
    use crate::pages::encode::Encoder;
    use crate::pages::frame::StreamId;
    use crate::pages::shadow::ShadowMode;
    use vmm_hooks::disk::DiskChange;
    use vmm_hooks::guest::Capture;

    const BYTES: u64 = 1 << 16;

    fn specs() -> Vec<DiskSpec> {
        ["a", "b"].map(|name| DiskSpec { name: name.to_owned(), bytes: BYTES }).into()
    }

    fn write(disk: u32, offset: u64, byte: u8) -> DiskWrite {
        DiskWrite { disk, offset, change: DiskChange::Data(vec![byte; 512]) }
    }

    /// As it comes from the wire; `None`: a part of the first copy.
    fn staged(epoch: Option<u64>, writes: &[DiskWrite]) -> Staged {
        let mut encoder = Encoder::new(1, ShadowMode::Off);
        let mut stager = Stager::new(1, None, 1 << 20).with_disks(Arc::from([BYTES; 2]));
        let mut sink = |frame: bytes::Bytes| stager.push(&frame).expect("our own stream");
        let id = |epoch| StreamId { vm: [1; 16], generation: 1, incarnation: 1, epoch, binding: false, sync: false };
        match epoch {
            None => drop(encoder.encode_writes(&id(1), writes, &mut sink)),
            Some(epoch) => {
                let capture = Capture { disk: writes.to_vec(), ..Capture::default() };
                encoder.encode_epoch(&id(epoch), &capture, &mut sink).expect("small");
            }
        }
        Staged::of(stager.finish().expect("whole"))
    }

    fn running(dir: &Path) -> (UnboundedSender<Staged>, DiskThreads, Committer, UnboundedReceiver<Held>, Vec<PathBuf>) {
        let disks = StandbyDisks::make(dir, "vm/1", &specs(), Durability::Disk, &[]).expect("room");
        let images = disks.images();
        let (to_disks, for_disks) = unbounded_channel();
        let (threads, committer, held) = disks.start(for_disks, Metrics::new().vm("vm/1")).expect("threads");
        (to_disks, threads, committer, held, images)
    }

    /// P29: the images are at the epoch that is activated, whatever came after it.
    #[test]
    fn the_images_end_at_the_epoch_that_goes_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let (to_disks, mut threads, committer, mut held, images) = running(dir.path());
        let parts = [
            staged(None, &[write(0, 0, 1), write(1, 512, 1)]),
            staged(Some(5), &[write(0, 512, 2)]),
            staged(Some(6), &[write(0, 0, 3), write(0, 0, 4)]),
            staged(Some(7), &[]),
            staged(Some(8), &[write(0, 0, 9), write(1, 512, 9)]),
        ];
        for part in parts {
            to_disks.send(part).expect("it is taken");
            let passed_on = held.blocking_recv().expect("passed on").expect("held");
            // The last one is held and was never acknowledged.
            if !passed_on.epoch.id().sync && passed_on.epoch.epoch() < 8 {
                committer.commit(passed_on.epoch.epoch());
            }
        }
        drop((to_disks, committer));
        // A grant waits for its fence, and another life of the agent goes on waiting.
        threads.hold(7).expect("it is held");
        let (dir, metrics) = (images[0].parent().expect("a directory").to_path_buf(), Metrics::new().vm("vm/1"));
        let found = |epoch| DiskThreads::found(dir.clone(), &specs(), Durability::Disk, epoch, metrics.clone());
        assert!(found(7).is_err(), "they are in use");
        drop(threads);
        assert!(found(8).is_err() && found(6).is_err(), "as of another epoch");
        let mut threads = found(7).expect("they are there");
        threads.finish(7, 2).expect("it is held");
        let read = |image: &PathBuf| fs::read(image).expect("an image");
        let (a, b) = (read(&images[0]), read(&images[1]));
        assert!(a[..512] == [4; 512] && a[512..1024] == [2; 512] && a[1024..].iter().all(|&byte| byte == 0));
        assert!(b[512..1024] == [1; 512]);
        assert_eq!(
            state_in(&HostFiles, images[0].parent().expect("a directory")).ok(),
            Some(Some(State::Activated(2)))
        );
    }

    #[test]
    fn an_error_is_told_once_and_nothing_is_passed_on_after_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let (to_disks, threads, committer, mut held, _) = running(dir.path());
        // Epoch 4 does not follow 5.
        for part in [staged(Some(5), &[]), staged(Some(4), &[write(0, 0, 1)]), staged(Some(6), &[])] {
            to_disks.send(part).expect("it is taken");
        }
        assert!(held.blocking_recv().expect("passed on").is_ok());
        assert!(held.blocking_recv().expect("told").is_err());
        drop((to_disks, committer));
        assert!(held.blocking_recv().is_none());
        threads.remove();
        assert!(fs::read_dir(dir.path()).expect("a directory").next().is_none(), "nothing is left");
    }

    #[test]
    fn an_older_copy_stays_until_the_new_one_is_whole_and_a_survivors_for_good() {
        let dir = tempfile::tempdir().expect("a directory");
        let (to_disks, mut threads, committer, mut held, survivors) = running(dir.path());
        to_disks.send(staged(Some(1), &[])).expect("it is taken");
        held.blocking_recv().expect("passed on").expect("held");
        drop((to_disks, committer));
        threads.finish(1, 1).expect("it is held");
        drop(threads);
        let (.., older) = running(dir.path());
        let (to_disks, _threads, _committer, mut held, newer) = running(dir.path());
        assert!(older[0].exists() && older[0] != newer[0]);
        to_disks.send(staged(None, &[write(0, 0, 1)])).expect("it is taken");
        held.blocking_recv().expect("passed on").expect("held");
        assert!(older[0].exists(), "the new one is not whole");
        to_disks.send(staged(Some(1), &[])).expect("it is taken");
        held.blocking_recv().expect("passed on").expect("held");
        assert!(!older[0].exists() && newer[0].exists() && survivors[0].exists());
        // The VM has moved on, and the next copy of it here is whole.
        survivor_left(dir.path(), "vm/1");
        assert!(survivors[0].exists());
        let (to_disks, _threads, _committer, mut held, newest) = running(dir.path());
        to_disks.send(staged(Some(1), &[])).expect("it is taken");
        held.blocking_recv().expect("passed on").expect("held");
        assert!(!survivors[0].exists() && !newer[0].exists() && newest[0].exists());
    }

    #[test]
    fn a_new_copy_begins_with_the_latest_one_or_with_the_disks_the_vm_had_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let make = |old: &[DiskImage]| {
            StandbyDisks::make(&dir.path().join("images"), "vm/1", &specs(), Durability::Disk, old).expect("room")
        };
        let old = dir.path().join("old.raw");
        fs::write(&old, vec![1; usize::try_from(BYTES).expect("small")]).expect("a file");
        let mut first = make(&[DiskImage::default(), DiskImage { path: old.clone(), format: older::RAW.to_owned() }]);
        let (images, known) = (first.images(), first.take_known());
        assert_eq!((known.0[0][0], known.filled()), (Digest::ZEROES, 1));
        assert!(fs::read(&images[1]).expect("an image") == fs::read(&old).expect("the disk"));
        fs::write(&images[0], vec![2; usize::try_from(BYTES).expect("small")]).expect("an image");
        let mut second = make(&[]);
        assert_eq!(second.take_known().filled(), 2);
        for (first, second) in images.iter().zip(second.images()) {
            assert!(fs::read(first).expect("an image") == fs::read(second).expect("an image"));
        }
        second.remove();
        first.remove();
        assert!(old.exists());
    }
}
