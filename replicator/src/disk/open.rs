//! Making, giving up and recovering the standby's copy of a VM's disks.
//!
//! Promises (`docs/protocol.md` P41, P44, P47): a journal appears under its name whole or not at all; a recovery ends at the last
//! acknowledged epoch or a later whole one, never beyond the limit of an activation that had begun, whatever moment
//! the crash came at, also one during a recovery; a copy that belongs to a survivor is not opened.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use vmm_hooks::disk::{DiskSpec, MAX_DISKS};

use super::error::DiskError;
use super::files::{File, Files, parent};
use super::images::Images;
use super::journal::{self, RING, Scan};
use super::mark::{Mark, State, disks_mark};
use super::record::{BLOCK, EpochId, Life};
use super::store::{DiskStore, Ledger, Policy, Side, Tail, apply};

/// The journal's name in its directory.
pub const JOURNAL: &str = "disks.journal";
/// The smallest journal, in bytes.
pub const MIN_JOURNAL_BYTES: u64 = 16 << 10;
/// The journal of a VM whose operator says nothing, in bytes.
pub const DEFAULT_JOURNAL_BYTES: u64 = 256 << 20;
/// The biggest journal, in bytes.
pub const MAX_JOURNAL_BYTES: u64 = 64 << 30;

const _: () = assert!(MIN_JOURNAL_BYTES.is_multiple_of(BLOCK) && MIN_JOURNAL_BYTES <= DEFAULT_JOURNAL_BYTES);
const _: () = assert!(DEFAULT_JOURNAL_BYTES <= MAX_JOURNAL_BYTES);

/// One disk on the standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandbyDisk {
    /// The disk.
    pub spec: DiskSpec,
    /// Its image; `None`: in the store's directory, named by the disk's place.
    pub image: Option<PathBuf>,
}

/// What a store is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// The directory, which is there, of this VM alone.
    pub dir: PathBuf,
    /// The disks, in the order of the recipe; at most [`MAX_DISKS`].
    pub disks: Vec<StandbyDisk>,
    /// Bytes of the journal; brought between the bounds and to whole blocks. Of a journal that is there, its own counts.
    pub journal_bytes: u64,
    /// What an acknowledgement outlives.
    pub policy: Policy,
}

impl Setup {
    fn journal(&self) -> PathBuf {
        self.dir.join(JOURNAL)
    }

    /// The disks and where their images are.
    ///
    /// # Panics
    /// If there are more than [`MAX_DISKS`]: a recipe never has.
    #[must_use]
    pub fn images(&self) -> Vec<(DiskSpec, PathBuf)> {
        assert!(self.disks.len() <= MAX_DISKS, "more disks than a recipe has");
        let path = |(place, disk): (usize, &StandbyDisk)| {
            let image = disk.image.clone().unwrap_or_else(|| self.dir.join(format!("disk-{place}.raw")));
            (disk.spec.clone(), image)
        };
        self.disks.iter().enumerate().map(path).collect()
    }
}

/// What a recovery found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// The first copy was not complete: nobody may start from it.
    Syncing,
    /// The images are exactly as of this epoch, on the disk, and epochs of its session may follow.
    Whole(EpochId),
    /// The same, and an activation had begun: nothing may follow.
    Finished(EpochId),
}

/// What state the copy in a directory is in, without opening it; `None` if there is none, or its marks say nothing.
///
/// # Errors
/// If the journal cannot be read.
pub fn state_in(files: &dyn Files, dir: &Path) -> Result<Option<State>, DiskError> {
    let path = dir.join(JOURNAL);
    let file = files.open(&path).map_err(|error| DiskError::io("open", &path, UNTOUCHED, error))?;
    let Some(file) = file else { return Ok(None) };
    let mark = journal::read_mark(file.as_ref()).map_err(|error| DiskError::io("read", &path, UNTOUCHED, error))?;
    Ok(mark.map(|mark| mark.state))
}

const UNTOUCHED: &str = "the copy is as it was";

/// Makes a store whose first copy is to come. Images that are there are left as they are, to be compared.
///
/// # Errors
/// [`DiskError::Exists`] if there is a journal; [`DiskError::Strange`] for an image of another size; the system's.
pub fn create(files: &dyn Files, setup: &Setup) -> Result<DiskStore, DiskError> {
    let path = setup.journal();
    let there = files.open(&path).map_err(|error| DiskError::io("open", &path, UNTOUCHED, error))?;
    if there.is_some() {
        return Err(DiskError::Exists { path });
    }
    make(files, setup)
}

/// Gives up whatever copy is there, also a survivor's, and makes a store whose first copy is to come. Images stay as they are,
/// to be compared. The caller answers for it that no copy is lost by it (`docs/protocol.md` P9).
///
/// # Errors
/// [`DiskError::InUse`]; [`DiskError::Strange`] for an image of another size; the system's.
pub fn reset(files: &dyn Files, setup: &Setup) -> Result<DiskStore, DiskError> {
    let path = setup.journal();
    let old = files.open(&path).map_err(|error| DiskError::io("open", &path, UNTOUCHED, error))?;
    if let Some(old) = &old {
        lock(old.as_ref(), &path)?;
    }
    make(files, setup)
}

fn make(files: &dyn Files, setup: &Setup) -> Result<DiskStore, DiskError> {
    let path = setup.journal();
    let disks = setup.images();
    let images = Images::open(files, &disks, true)?;
    let capacity = setup.journal_bytes.clamp(MIN_JOURNAL_BYTES, MAX_JOURNAL_BYTES).next_multiple_of(BLOCK);
    let id = EpochId { generation: 0, incarnation: 0, epoch: 0 };
    let life = Life { salt: uuid::Uuid::new_v4().as_u128(), term: 1 };
    let disks_mark = disks_mark(disks.iter().map(|(spec, _)| spec));
    let mark = Mark { sequence: 1, life, capacity, head: 0, state: State::Syncing, id, disks: disks_mark };
    let temporary = setup.dir.join(format!("{JOURNAL}{}", heartbeat::files::TEMPORARY));
    let file = made(files, &temporary, &path, mark).map_err(|e| DiskError::io("make", &path, UNTOUCHED, e))?;
    store(files, setup, disks, file, images, mark)
}

/// Makes a journal beside its place, then puts it there. It is this process's from the first moment on.
fn made(files: &dyn Files, temporary: &Path, path: &Path, mark: Mark) -> std::io::Result<Box<dyn File>> {
    let file = files.create(temporary)?;
    if !file.lock()? {
        return Err(std::io::Error::other("a file that was just made is in use"));
    }
    file.reserve(RING + mark.capacity)?;
    journal::write_mark(file.as_ref(), mark)?;
    files.rename(temporary, path)?;
    files.sync_dir(&parent(path))?;
    Ok(file)
}

fn lock(file: &dyn File, path: &Path) -> Result<(), DiskError> {
    let locked = file.lock().map_err(|error| DiskError::io("lock", path, UNTOUCHED, error))?;
    if locked { Ok(()) } else { Err(DiskError::InUse { path: path.to_path_buf() }) }
}

/// Opens a store that is there and brings the images to the last epoch that is whole in the journal, or to the last that is
/// not later than `limit`: the epoch of an activation that the caller had begun, which is never earlier than what was committed.
///
/// Once it has begun to apply epochs there is no way back behind the last of them, also if it fails: a lower limit is refused then.
/// So is one lower than the epoch that a finish had begun with.
///
/// # Errors
/// [`DiskError::Missing`], [`DiskError::Activated`], [`DiskError::InUse`], [`DiskError::Strange`] if what is there cannot be
/// trusted, [`DiskError::OutOfTurn`] if the images are later than `limit`, or may be; the system's, after which it can be tried again.
pub fn recover(files: &dyn Files, setup: &Setup, limit: Option<u64>) -> Result<(DiskStore, Recovered), DiskError> {
    let path = setup.journal();
    let at = path.as_path();
    let failed = |what: &'static str| move |error| DiskError::io(what, at, UNTOUCHED, error);
    let strange = |what: &str| DiskError::Strange { path: path.clone(), what: what.to_owned() };
    let Some(file) = files.open(&path).map_err(failed("open"))? else {
        return Err(DiskError::Missing { path });
    };
    lock(file.as_ref(), &path)?;
    let Some(mark) = journal::read_mark(file.as_ref()).map_err(failed("read"))? else {
        return Err(strange("neither of its marks is whole"));
    };
    let disks = setup.images();
    if mark.disks != disks_mark(disks.iter().map(|(spec, _)| spec)) {
        return Err(strange("it is about other disks"));
    }
    if mark.capacity == 0
        || !mark.capacity.is_multiple_of(BLOCK)
        || mark.capacity > MAX_JOURNAL_BYTES
        || file.bytes().map_err(failed("look at"))? != RING + mark.capacity
    {
        return Err(strange("its length is not what its mark says"));
    }
    // After a failed sync the cache may show what the disk does not hold: what is relied upon is written again.
    journal::write_mark(file.as_ref(), mark).map_err(failed("mark the state in"))?;
    files.sync_dir(&setup.dir).map_err(failed("sync the directory of"))?;
    let (floor, limit) = match mark.state {
        State::Activated(generation) => return Err(DiskError::Activated { path, generation }),
        State::Finishing(epoch) => (epoch, limit.unwrap_or(epoch).min(epoch)),
        State::Recovering(epoch) => (epoch, limit.unwrap_or(u64::MAX)),
        State::Syncing | State::Whole | State::Finished => (mark.id.epoch, limit.unwrap_or(u64::MAX)),
    };
    let whole = mark.state != State::Syncing;
    if whole && floor > limit {
        let id = EpochId { epoch: floor, ..mark.id };
        return Err(DiskError::OutOfTurn {
            what: format!("the images are as of {id:?}, or on the way to it, later than {limit}"),
        });
    }
    let images = Images::open(files, &disks, false)?;
    let store = store(files, setup, disks, file, images, mark)?;
    let recovered = if whole { replay(&store, limit)? } else { Recovered::Syncing };
    Ok((store, recovered))
}

/// Brings the images to `limit` or the end of the journal, then begins a new life of the journal.
fn replay(store: &DiskStore, limit: u64) -> Result<Recovered, DiskError> {
    let mut tail = super::store::locked(&store.tail);
    let mut side = super::store::locked(&store.side);
    let side = &mut *side;
    let path = store.path.as_path();
    let failed = |what: &'static str| move |error| DiskError::io(what, path, UNTOUCHED, error);
    let mark = side.mark;
    let Scan { entries, gap } = journal::scan(side.file.as_ref(), &mark).map_err(failed("read"))?;
    if gap {
        let what = "an epoch that was on the disk is damaged".to_owned();
        return Err(DiskError::Strange { path: store.path.clone(), what });
    }
    let entries: Vec<_> = entries.into_iter().filter(|entry| entry.epoch <= limit).collect();
    for entry in &entries {
        let length = usize::try_from(entry.bytes).expect("it was read");
        side.buffer.resize(length, 0);
        journal::read(side.file.as_ref(), mark.capacity, entry.position, &mut side.buffer).map_err(failed("read"))?;
        journal::write(side.file.as_ref(), mark.capacity, entry.position, &side.buffer).map_err(failed("write to"))?;
    }
    if !entries.is_empty() {
        side.file.sync().map_err(failed("sync"))?;
    }
    let mut id = mark.id;
    // From here on there is no way back.
    if let Some(last) = entries.last().filter(|_| !matches!(mark.state, State::Finishing(_))) {
        let begun = Mark { sequence: mark.sequence + 1, state: State::Recovering(last.epoch), ..mark };
        journal::write_mark(side.file.as_ref(), begun).map_err(failed("mark the state in"))?;
        side.mark = begun;
    }
    for entry in entries {
        apply(side, &store.path, entry)?;
        id.epoch = entry.epoch;
    }
    side.images.sync()?;
    let (state, recovered) = match mark.state {
        State::Finishing(epoch) => {
            id.epoch = epoch;
            (State::Finished, Recovered::Finished(id))
        }
        State::Finished => (State::Finished, Recovered::Finished(id)),
        _ => (State::Whole, Recovered::Whole(id)),
    };
    let life = Life { term: mark.life.term + 1, ..mark.life };
    let next = Mark { sequence: side.mark.sequence + 1, life, head: side.position, state, id, ..mark };
    journal::write_mark(side.file.as_ref(), next).map_err(failed("mark the state in"))?;
    side.mark = next;
    (tail.life, tail.position) = (life, side.position);
    let mut ledger = super::store::locked(&store.ledger);
    *ledger = fresh(&next);
    Ok(recovered)
}

fn fresh(mark: &Mark) -> Ledger {
    Ledger {
        state: mark.state,
        last: mark.id,
        committed: mark.id.epoch,
        applied: mark.id.epoch,
        head: mark.head,
        flushed: mark.head,
        journaled: VecDeque::new(),
        failed: None,
    }
}

fn store(
    files: &dyn Files,
    setup: &Setup,
    disks: Vec<(DiskSpec, PathBuf)>,
    file: Box<dyn File>,
    images: Images,
    mark: Mark,
) -> Result<DiskStore, DiskError> {
    let path = setup.journal();
    let again = files.open(&path).map_err(|error| DiskError::io("open", &path, UNTOUCHED, error))?;
    let Some(again) = again else {
        return Err(DiskError::Missing { path });
    };
    Ok(DiskStore {
        path,
        disks,
        policy: setup.policy,
        capacity: mark.capacity,
        tail: Mutex::new(Tail { file, life: mark.life, position: mark.head, buffer: Vec::new() }),
        side: Mutex::new(Side { file: again, images, mark, position: mark.head, buffer: Vec::new() }),
        ledger: Mutex::new(fresh(&mark)),
    })
}
