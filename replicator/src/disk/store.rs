//! The standby's copy of a VM's disks while epochs come in: journaled, acknowledged, then applied to the images.
//!
//! Promises (`docs/protocol.md` P40, P43 to P46): what [`DiskStore::append`] returned for outlives what its policy says; the
//! images never hold a write of an epoch that was not said to be committed; after an error that may have left anything
//! unknown, nothing more is taken. Appending waits for the disk, never for applying, as long as the journal has room.
//!
//! Locks are taken in the order of the fields. The tail's and the side's files are two open files of the same journal:
//! each is told of a failed write by itself, so neither can miss an error that the other one was told of.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use vmm_hooks::disk::{DiskSpec, DiskWrite};

use super::error::DiskError;
use super::files::File;
use super::images::{self, Images};
use super::journal::{self, Entry};
use super::mark::{Mark, State};
use super::record::{self, EpochId, Life};

/// When this part of the journal is applied and not yet trimmed, applying trims it: the n-th part.
const TRIM_AT: u64 = 2;
/// Most writes of one epoch; more are the peer's fault.
pub const MAX_WRITES: usize = 1 << 22;

const HELD: &str = "the copy is as of the last acknowledged epoch";

/// What an acknowledgement outlives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The host's power.
    Disk,
    /// The agent's process; after a power loss the copy is at a whole epoch, that may be older.
    Memory,
}

/// How far the store is, for status and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Whole or not.
    pub state: State,
    /// The last epoch taken.
    pub last: EpochId,
    /// The last epoch that may be applied.
    pub committed: u64,
    /// The last epoch that is in the images, though not yet surely on the disk.
    pub applied: u64,
    /// Bytes of the journal in use.
    pub journal_used: u64,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// The error that has latched.
    pub error: Option<String>,
}

#[derive(Debug)]
pub(super) struct Tail {
    pub(super) file: Box<dyn File>,
    pub(super) life: Life,
    pub(super) position: u64,
    pub(super) buffer: Vec<u8>,
}

/// The side that applies.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) file: Box<dyn File>,
    pub(super) images: Images,
    /// As on the disk.
    pub(super) mark: Mark,
    /// Up to here all records are in the images.
    pub(super) position: u64,
    pub(super) buffer: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) state: State,
    pub(super) last: EpochId,
    pub(super) committed: u64,
    pub(super) applied: u64,
    /// What lies before may be overwritten.
    pub(super) head: u64,
    /// What lies before is on the disk.
    pub(super) flushed: u64,
    pub(super) journaled: VecDeque<Entry>,
    pub(super) failed: Option<String>,
}

/// The disks of one VM on its standby. Shared by the one who appends and the one who applies.
#[derive(Debug)]
pub struct DiskStore {
    pub(super) path: PathBuf,
    pub(super) disks: Vec<(DiskSpec, PathBuf)>,
    pub(super) policy: Policy,
    pub(super) capacity: u64,
    pub(super) tail: Mutex<Tail>,
    pub(super) side: Mutex<Side>,
    pub(super) ledger: Mutex<Ledger>,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics while holding it")
}

impl DiskStore {
    /// Writes straight to the images: the first copy. Nothing of it is durable before [`DiskStore::begin`].
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`] after the first copy, [`DiskError::BadWrite`]; else a latched one.
    pub fn write(&self, writes: &[DiskWrite]) -> Result<(), DiskError> {
        images::check(&self.disks, writes)?;
        let mut side = locked(&self.side);
        self.require(State::Syncing)?;
        side.images.write(writes).map_err(|error| self.latch(error))
    }

    /// Marks the images as whole as of `id`, durably: the end of the first copy. Epochs of its session may follow.
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`] after the first copy; else a latched one.
    pub fn begin(&self, id: EpochId) -> Result<(), DiskError> {
        let tail = locked(&self.tail);
        let mut side = locked(&self.side);
        self.require(State::Syncing)?;
        side.images.sync().map_err(|error| self.latch(error))?;
        self.mark(&mut side, State::Whole, id, tail.position, tail.life)?;
        let mut ledger = locked(&self.ledger);
        ledger.last = id;
        (ledger.committed, ledger.applied) = (id.epoch, id.epoch);
        Ok(())
    }

    /// Takes all writes of an epoch. When it returns, the epoch may be acknowledged. An epoch without writes costs nothing: what
    /// is there is as of it, too.
    ///
    /// When the journal is full it first waits for applying, and applies and trims itself.
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`], [`DiskError::BadWrite`], [`DiskError::TooLarge`] and [`DiskError::Full`] change nothing; else a
    /// latched one, after which the copy is as of the last epoch that this returned for.
    pub fn append(&self, id: EpochId, writes: &[DiskWrite]) -> Result<(), DiskError> {
        images::check(&self.disks, writes)?;
        let mut tail = locked(&self.tail);
        let (needed, flushed) = {
            let mut ledger = self.expect(State::Whole)?;
            if !journal::follows(id, ledger.last) {
                return Err(DiskError::OutOfTurn { what: format!("{id:?} does not follow {:?}", ledger.last) });
            }
            if writes.is_empty() {
                ledger.last = id;
                return Ok(());
            }
            (record::bytes_of(writes), ledger.flushed)
        };
        if needed > self.capacity || writes.len() > MAX_WRITES {
            return Err(DiskError::TooLarge { needed, capacity: self.capacity });
        }
        if self.room(&tail) < needed {
            let mut side = locked(&self.side);
            self.apply_committed(&mut side)?;
            self.trim(&mut side)?;
            if self.room(&tail) < needed {
                return Err(DiskError::Full { needed, capacity: self.capacity });
            }
        }
        let tail = &mut *tail;
        record::put(&mut tail.buffer, tail.life, (tail.position, flushed), id, writes);
        let failed = |what| move |error| DiskError::io(what, &self.path, HELD, error);
        journal::write(tail.file.as_ref(), self.capacity, tail.position, &tail.buffer)
            .map_err(failed("write to"))
            .map_err(|error| self.latch(error))?;
        if self.policy == Policy::Disk {
            tail.file.sync().map_err(failed("sync")).map_err(|error| self.latch(error))?;
        }
        let entry = Entry { epoch: id.epoch, position: tail.position, bytes: needed };
        // An error of the other side that came meanwhile counts: nothing is acknowledged after it.
        let mut ledger = self.expect(State::Whole)?;
        tail.position = entry.end();
        ledger.journaled.push_back(entry);
        ledger.last = id;
        if self.policy == Policy::Disk {
            ledger.flushed = entry.end();
        }
        Ok(())
    }

    /// Says that an epoch, and all before it, may be applied: it was acknowledged, and no failover will go back behind it.
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`] if it was not taken.
    pub fn commit(&self, epoch: u64) -> Result<(), DiskError> {
        let mut ledger = locked(&self.ledger);
        if epoch > ledger.last.epoch {
            return Err(DiskError::OutOfTurn { what: format!("epoch {epoch} cannot be committed: it is not held") });
        }
        ledger.committed = ledger.committed.max(epoch);
        Ok(())
    }

    /// Brings all committed epochs into the images, and trims the journal when enough of it was applied. Returns the last
    /// epoch that is in the images. For a thread of its own: it waits for the disk, and [`DiskStore::append`] does not wait for it.
    ///
    /// # Errors
    /// A latched one.
    pub fn apply(&self) -> Result<u64, DiskError> {
        let mut side = locked(&self.side);
        let applied = self.apply_committed(&mut side)?;
        if side.position - side.mark.head > self.capacity / TRIM_AT {
            self.trim(&mut side)?;
        }
        Ok(applied)
    }

    /// Brings the images onto the disk and frees the journal of what is in them. Applying does it when it is needed; doing
    /// it when nothing else is to do shortens a recovery and a failover.
    ///
    /// # Errors
    /// A latched one.
    pub fn flush(&self) -> Result<(), DiskError> {
        let mut side = locked(&self.side);
        self.require(State::Whole)?;
        self.trim(&mut side)
    }

    /// Brings the images, durably, to exactly `epoch`: the last one that was acknowledged, which the twin goes on from. What was
    /// taken after it is dropped. Nothing is taken any more. Doing it again is no error.
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`] if `epoch` is not held, or a later one was committed; else a latched one.
    pub fn finish(&self, epoch: u64) -> Result<(), DiskError> {
        let mut tail = locked(&self.tail);
        let mut side = locked(&self.side);
        let (id, later) = {
            let mut ledger = self.unlatched()?;
            if ledger.state == State::Finished && ledger.last.epoch == epoch {
                return Ok(());
            }
            if ledger.state != State::Whole || epoch < ledger.committed || epoch > ledger.last.epoch {
                let what = format!(
                    "the images cannot be brought to epoch {epoch}: they are {:?}, committed to {}, the last one held is {}",
                    ledger.state, ledger.committed, ledger.last.epoch
                );
                return Err(DiskError::OutOfTurn { what });
            }
            ledger.committed = epoch;
            (EpochId { epoch, ..ledger.last }, ledger.journaled.back().is_some_and(|last| last.epoch > epoch))
        };
        if later {
            // A recovery would take what is journaled later for committed; and it will rely on what is journaled up to here.
            self.settle(&mut side, tail.position)?;
            let (mark, life) = (side.mark, tail.life);
            self.mark(&mut side, State::Finishing(epoch), mark.id, mark.head, life)?;
        }
        self.apply_committed(&mut side)?;
        side.images.sync().map_err(|error| self.latch(error))?;
        let life = Life { term: tail.life.term + 1, ..tail.life };
        let position = side.position;
        self.mark(&mut side, State::Finished, id, position, life)?;
        (tail.life, tail.position) = (life, position);
        let mut ledger = locked(&self.ledger);
        ledger.last = id;
        ledger.journaled.clear();
        ledger.flushed = position;
        Ok(())
    }

    /// Marks the images, durably, as the survivor's: after [`DiskStore::finish`], before the twin may write to them. From now on
    /// nobody opens them as a standby's copy, until they are given up by a reset. Doing it again is no error.
    ///
    /// # Errors
    /// [`DiskError::OutOfTurn`] before [`DiskStore::finish`]; else a latched one.
    pub fn activated(&self, generation: u64) -> Result<(), DiskError> {
        let tail = locked(&self.tail);
        let mut side = locked(&self.side);
        if self.unlatched()?.state == State::Activated(generation) {
            return Ok(());
        }
        let last = self.expect(State::Finished)?.last;
        self.mark(&mut side, State::Activated(generation), last, tail.position, tail.life)
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let ledger = locked(&self.ledger);
        Progress {
            state: ledger.state,
            last: ledger.last,
            committed: ledger.committed,
            applied: ledger.applied,
            journal_used: ledger.journaled.back().map_or(0, |last| last.end() - ledger.head),
            journal_bytes: self.capacity,
            error: ledger.failed.clone(),
        }
    }

    fn room(&self, tail: &Tail) -> u64 {
        self.capacity - (tail.position - locked(&self.ledger).head)
    }

    fn apply_committed(&self, side: &mut Side) -> Result<u64, DiskError> {
        let (entries, committed) = {
            let ledger = self.unlatched()?;
            let entries = ledger.journaled.iter().take_while(|entry| entry.epoch <= ledger.committed);
            let entries: Vec<Entry> = entries.skip_while(|entry| entry.end() <= side.position).copied().collect();
            (entries, ledger.committed)
        };
        let end = entries.last().map_or(side.position, Entry::end);
        // A record must outlive whatever happens to the images while it is applied to them.
        self.settle(side, end)?;
        for entry in entries {
            apply(side, &self.path, entry).map_err(|error| self.latch(error))?;
        }
        locked(&self.ledger).applied = committed;
        Ok(committed)
    }

    /// Brings the records up to `end` onto the disk, if they are not there for sure.
    fn settle(&self, side: &mut Side, end: u64) -> Result<(), DiskError> {
        if end > locked(&self.ledger).flushed {
            let synced = side.file.sync().map_err(|error| DiskError::io("sync", &self.path, HELD, error));
            synced.map_err(|error| self.latch(error))?;
            let mut ledger = locked(&self.ledger);
            ledger.flushed = ledger.flushed.max(end);
        }
        Ok(())
    }

    /// Frees what was applied, once the images are on the disk.
    fn trim(&self, side: &mut Side) -> Result<(), DiskError> {
        let (id, life) = {
            let ledger = self.unlatched()?;
            (EpochId { epoch: ledger.applied, ..ledger.last }, side.mark.life)
        };
        if side.position == side.mark.head {
            return Ok(());
        }
        side.images.sync().map_err(|error| self.latch(error))?;
        let position = side.position;
        self.mark(side, State::Whole, id, position, life)?;
        let mut ledger = locked(&self.ledger);
        while ledger.journaled.front().is_some_and(|entry| entry.end() <= position) {
            ledger.journaled.pop_front();
        }
        Ok(())
    }

    /// Writes a mark durably, and takes over what it says.
    fn mark(&self, side: &mut Side, state: State, id: EpochId, head: u64, life: Life) -> Result<(), DiskError> {
        let mark = Mark { sequence: side.mark.sequence + 1, life, head, state, id, ..side.mark };
        let written = journal::write_mark(side.file.as_ref(), mark);
        let written = written.map_err(|error| DiskError::io("mark the state in", &self.path, HELD, error));
        written.map_err(|error| self.latch(error))?;
        side.mark = mark;
        let mut ledger = locked(&self.ledger);
        ledger.state = state;
        ledger.head = head;
        Ok(())
    }

    fn unlatched(&self) -> Result<MutexGuard<'_, Ledger>, DiskError> {
        let ledger = locked(&self.ledger);
        match &ledger.failed {
            Some(first) => Err(DiskError::Latched { first: first.clone() }),
            None => Ok(ledger),
        }
    }

    fn expect(&self, state: State) -> Result<MutexGuard<'_, Ledger>, DiskError> {
        let ledger = self.unlatched()?;
        if ledger.state == state {
            return Ok(ledger);
        }
        Err(DiskError::OutOfTurn { what: format!("the copy is {:?}, not {state:?}", ledger.state) })
    }

    pub(super) fn require(&self, state: State) -> Result<(), DiskError> {
        self.expect(state).map(drop)
    }

    /// Remembers the first error.
    pub(super) fn latch(&self, error: DiskError) -> DiskError {
        let mut ledger = locked(&self.ledger);
        if ledger.failed.is_none() {
            let reason = std::error::Error::source(&error).map_or_else(String::new, |source| format!(" ({source})"));
            ledger.failed = Some(format!("{error}{reason}"));
        }
        error
    }
}

/// Applies one record to the images, from the journal: what is there is what was acknowledged.
pub(super) fn apply(side: &mut Side, path: &std::path::Path, entry: Entry) -> Result<(), DiskError> {
    let read = journal::read_record(side.file.as_ref(), &side.mark, entry.position, entry.bytes, &mut side.buffer);
    let head = read.map_err(|error| DiskError::io("read", path, HELD, error))?;
    let pieces = head.as_ref().and_then(|head| record::pieces(&side.buffer, head, entry.position));
    let Some(pieces) = pieces else {
        let what = format!("epoch {} was whole before", entry.epoch);
        return Err(DiskError::Strange { path: path.to_path_buf(), what });
    };
    side.images.apply(&pieces)?;
    side.position = entry.end();
    Ok(())
}
