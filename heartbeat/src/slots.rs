//! Small files that one sync changes, and that survive a crash as [`crate::files`] do: two slots of one file, of which the older one is written, in place.
//!
//! Promises: a record is on the disk when [`write`] returns; after a power loss the reader finds it or the one before, whole. Soon after it was written both slots
//! have it, so that one that a disk has spoiled, or does not read, is read from the other; only what is spoiled before that is taken for one that was cut off, and
//! the record before counts. What cannot be told from a lost record is an error, never an older record: neither slot is whole, or they are not two that follow each
//! other.
//!
//! What is read of a file may never have come to the disk, and a slot may be only in the kernel's memory (a sync that failed leaves it there, and so does a life that
//! was ended before its sync). So only a file that this process made, and of which no sync has failed since, is changed in place, or in the background; of any other the
//! next record, and what [`adopt`] finds, is a new file.
//!
//! Replacing a file takes two syncs, each of which writes a journal, too; here no block is allocated and no name changes. (`fdatasync(2)`: of the file itself only
//! what is needed to read its data back is written.)

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

use crate::files;

/// First bytes of a slot; the digit is the format's version. The header is text, and as long as this one.
const HEADER: &str = "UNDERSTUDY SLOT 1 0000000000000000 00000000 00000000\n";
const MAGIC: &str = "UNDERSTUDY SLOT 1 ";
/// Slots are as long as so many bytes, or a multiple.
const BLOCK: usize = 4096;
/// Most bytes of a record.
const RECORD_MAX: usize = 1 << 20;
/// When that is tried again which could not be done.
const AGAIN: Duration = Duration::from_secs(5);
/// How long after a record the other slot gets it: what follows at once takes the turn instead, and its sync is not waited for behind this one's.
const REST: Duration = Duration::from_millis(100);

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}; restore the file, or what it is part of"))
}

/// What a slot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    /// Of the record: each is one more than the one before.
    number: u64,
    record: Vec<u8>,
}

impl Slot {
    fn first(record: &[u8]) -> Self {
        Self { number: 1, record: record.to_vec() }
    }

    fn checksum(number: u64, record: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&number.to_le_bytes());
        hasher.update(&(record.len() as u64).to_le_bytes());
        hasher.update(record);
        hasher.finalize()
    }

    fn bytes(&self, length: usize) -> Vec<u8> {
        let Self { number, record } = self;
        let checksum = Self::checksum(*number, record);
        let mut bytes = format!("{MAGIC}{number:016x} {:08x} {checksum:08x}\n", record.len()).into_bytes();
        bytes.extend_from_slice(record);
        assert!(bytes.len() <= length, "it was asked whether it fits");
        bytes.resize(length, b'\n');
        bytes
    }

    /// `None`: it is not whole.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (header, rest) = bytes.split_at_checked(HEADER.len())?;
        let header = std::str::from_utf8(header).ok()?.strip_prefix(MAGIC)?;
        let mut numbers = header.split([' ', '\n']).map(|text| u64::from_str_radix(text, 16).ok());
        let (number, length, checksum) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let record = rest.get(..usize::try_from(length).ok()?)?;
        let slot = Self { number, record: record.to_vec() };
        // All of it, so that a slot whose padding is spoiled is not whole either.
        let whole = checksum == u64::from(Self::checksum(number, record)) && slot.bytes(bytes.len()) == bytes;
        whole.then_some(slot)
    }
}

/// How long a slot for so many bytes is: with room to grow.
fn room_for(record: usize) -> usize {
    (HEADER.len() + record + record / 4).next_multiple_of(BLOCK)
}

/// Which file has a name.
type Inode = (u64, u64);

fn inode(of: &std::fs::Metadata) -> Inode {
    (of.dev(), of.ino())
}

/// The files that this process made, and that nothing was seen to go wrong with since, with the number of the record that each has.
fn own() -> MutexGuard<'static, BTreeMap<PathBuf, (Inode, u64)>> {
    static OWN: Mutex<BTreeMap<PathBuf, (Inode, u64)>> = Mutex::new(BTreeMap::new());
    OWN.lock().expect("nobody panics while it looks")
}

/// To be held by who makes a file where there is none, and so none that could be locked.
fn making() -> MutexGuard<'static, ()> {
    static MAKING: Mutex<()> = Mutex::new(());
    MAKING.lock().expect("nobody panics while it makes a file")
}

/// A file that nobody writes meanwhile.
struct Locked {
    file: File,
    inode: Inode,
    /// Bytes of a slot; zero if it is no file of slots.
    length: usize,
    slots: [Option<Slot>; 2],
    /// Of a file of this process: the number of the record that it has.
    known: Option<u64>,
}

impl Locked {
    /// Waits for whoever writes it, or, `to_write`, also reads it.
    fn open(path: &Path, to_write: bool) -> io::Result<Self> {
        let (file, inode) = loop {
            let file = OpenOptions::new().read(true).write(to_write).open(path)?;
            let lock = || if to_write { file.lock() } else { file.lock_shared() };
            while let Err(error) = lock() {
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            let opened = inode(&file.metadata()?);
            // It may have been replaced meanwhile.
            if inode(&std::fs::metadata(path)?) == opened {
                break (file, opened);
            }
        };
        let bytes = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let length = bytes / 2;
        if length == 0 || bytes % 2 != 0 || !length.is_multiple_of(BLOCK) || length > room_for(RECORD_MAX) {
            return Ok(Self { file, inode, length: 0, slots: [None, None], known: None });
        }
        let slot = |place: usize| {
            let mut bytes = vec![0; length];
            match file.read_exact_at(&mut bytes, (place * length) as u64) {
                Ok(()) => Ok(Slot::read(&bytes)),
                // A block that the disk cannot read is spoiled.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let slots = [slot(0)?, slot(1)?];
        let known = own().get(path).filter(|(own, _)| *own == inode).map(|&(_, number)| number);
        Ok(Self { file, inode, length, slots, known })
    }

    /// Whether it may be changed in place.
    fn is_own(&self, path: &Path) -> bool {
        own().get(path).is_some_and(|(own, _)| *own == self.inode)
    }

    /// The newest record, and which slot has it.
    fn newest(&self) -> io::Result<(usize, &Slot)> {
        let (place, newest) = self.newest_there()?;
        if self.known.is_some_and(|known| newest.number < known) {
            return Err(damaged("the record that was written last is not there any more"));
        }
        Ok((place, newest))
    }

    fn newest_there(&self) -> io::Result<(usize, &Slot)> {
        match &self.slots {
            [Some(first), Some(second)] if first == second => Ok((0, first)),
            [Some(first), Some(second)] if first.number == second.number.wrapping_add(1) => Ok((0, first)),
            [Some(first), Some(second)] if second.number == first.number.wrapping_add(1) => Ok((1, second)),
            [Some(_), Some(_)] => Err(damaged("its records are not two that follow each other: one was lost")),
            [Some(first), None] => Ok((0, first)),
            [None, Some(second)] => Ok((1, second)),
            [None, None] if self.length == 0 => Err(damaged("it is not as long as a file of records is")),
            [None, None] => Err(damaged("neither of its two records is whole")),
        }
    }

    /// Of a file of its own: if it fails the file is that no longer.
    fn put(&self, path: &Path, place: usize, slot: &Slot) -> io::Result<()> {
        let put = self.file.write_all_at(&slot.bytes(self.length), (place * self.length) as u64);
        put.and_then(|()| self.file.sync_data()).inspect_err(|_| {
            own().remove(path);
        })?;
        if let Some((_, number)) = own().get_mut(path) {
            *number = slot.number;
        }
        Ok(())
    }

    /// Gives both slots the newest record.
    fn mirror(&self, path: &Path) -> io::Result<()> {
        let (place, newest) = self.newest()?;
        if self.slots[1 - place].as_ref() == Some(newest) { Ok(()) } else { self.put(path, 1 - place, newest) }
    }
}

/// The record at `path`, as it is read: nothing is written, and it may not be on the disk.
///
/// # Errors
/// The system's reason; [`io::ErrorKind::NotFound`] if there is no file; [`io::ErrorKind::InvalidData`] if what is there cannot be told from a lost record.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    Ok(Locked::open(path, false)?.newest()?.1.record.clone())
}

/// The record at `path`, which is on the disk when this returns, to be relied upon. (What nobody can write, nobody can rely upon: it is only read then.)
///
/// # Errors
/// As [`read`].
pub fn adopt(path: &Path) -> io::Result<Vec<u8>> {
    let locked = match Locked::open(path, true) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => return read(path),
        opened => opened?,
    };
    let newest = locked.newest()?.1;
    if locked.is_own(path) {
        return Ok(newest.record.clone());
    }
    if locked.slots.contains(&None) {
        tracing::warn!(path = %path.display(), "one of two copies of a record is not whole, as when the power went while it was written; both are made anew from the other");
    }
    match make(path, newest) {
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            // Without room for a new file: what is not on the disk yet is brought there, and read from there.
            locked.file.sync_all()?;
            rustix::fs::fadvise(&locked.file, 0, None, rustix::fs::Advice::DontNeed)?;
            let record = newest.record.clone();
            drop(locked);
            if read(path)? == record { Ok(record) } else { Err(error) }
        }
        made => made.map(|()| newest.record.clone()),
    }
}

/// Makes `record` the one at `path`, whose directory must exist; durable when it returns.
///
/// # Errors
/// The system's reason, or as [`read`]. Nobody knows then which record a reader would find: before anything else is relied upon, [`renew`] or [`adopt`] it.
pub fn write(path: &Path, record: &[u8]) -> io::Result<()> {
    update(path, |_| Ok(record.to_vec()))
}

/// The same with what `next` makes of the record that is there (`None`: there is no file). Nobody else writes it meanwhile.
///
/// # Errors
/// As [`write`]; or what `next` answers, and then nothing is changed.
pub fn update(path: &Path, next: impl FnOnce(Option<&[u8]>) -> io::Result<Vec<u8>>) -> io::Result<()> {
    let locked = match Held::open(path)? {
        Held::Making(_making) => return make(path, &Slot::first(&next(None)?)),
        Held::File(locked) => locked,
    };
    let (place, newest) = locked.newest()?;
    let record = next(Some(&newest.record))?;
    if record == newest.record && locked.is_own(path) {
        return Ok(());
    }
    let fits = HEADER.len() + record.len() <= locked.length;
    let next = Slot { number: newest.number.wrapping_add(1), record };
    if !locked.is_own(path) || !fits {
        return make(path, &next);
    }
    locked.put(path, 1 - place, &next)?;
    drop(locked);
    later(path);
    Ok(())
}

/// Makes a new file, whatever is there, with what `record` makes of the record that is (`None`: none can be read).
///
/// # Errors
/// The system's; a record of more than a megabyte; or what `record` answers, and then nothing is changed.
pub fn renew(path: &Path, record: impl FnOnce(Option<&[u8]>) -> io::Result<Vec<u8>>) -> io::Result<()> {
    // Held until the new file is there.
    let held = Held::open(path)?;
    let there = match &held {
        Held::File(locked) => locked.newest().ok().map(|(_, newest)| &*newest.record),
        Held::Making(_) => None,
    };
    make(path, &Slot::first(&record(there)?))
}

/// The same with this record.
///
/// # Errors
/// The system's; a record of more than a megabyte.
pub fn replace(path: &Path, record: &[u8]) -> io::Result<()> {
    renew(path, |_| Ok(record.to_vec()))
}

/// What nobody else writes meanwhile.
enum Held {
    File(Locked),
    /// There is no file, and nobody else makes it.
    Making(MutexGuard<'static, ()>),
}

impl Held {
    fn open(path: &Path) -> io::Result<Self> {
        let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        match Locked::open(path, true) {
            Err(error) if absent(&error) => {
                let making = making();
                match Locked::open(path, true) {
                    Err(error) if absent(&error) => Ok(Self::Making(making)),
                    opened => opened.map(Self::File),
                }
            }
            opened => opened.map(Self::File),
        }
    }
}

/// Makes a new file. Who has the former one locked keeps it so until this returns: whoever waits for it then opens the new one.
fn make(path: &Path, slot: &Slot) -> io::Result<()> {
    if slot.record.len() > RECORD_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a record is at most a megabyte"));
    }
    own().remove(path);
    let file = files::replace(path, &slot.bytes(room_for(slot.record.len())).repeat(2))?;
    let made = inode(&file.metadata()?);
    own().insert(path.to_path_buf(), (made, slot.number));
    Ok(())
}

/// Whose second slot is to get its record.
static WRITTEN: LazyLock<Option<Mutex<Sender<PathBuf>>>> = LazyLock::new(|| {
    let (written, paths) = channel();
    match std::thread::Builder::new().name("us-slots".to_owned()).spawn(move || mirror_all(&paths)) {
        Ok(_) => Some(Mutex::new(written)),
        Err(error) => {
            tracing::warn!(%error, "records have one copy until their files are made anew");
            None
        }
    }
});

fn later(path: &Path) {
    if let Some(written) = &*WRITTEN {
        // Its thread does not end.
        let _ = written.lock().expect("nobody panics while it sends").send(path.to_path_buf());
    }
}

fn mirror_all(paths: &Receiver<PathBuf>) {
    let mut waiting = BTreeSet::new();
    loop {
        let next = if waiting.is_empty() { paths.recv().ok() } else { paths.recv_timeout(AGAIN).ok() };
        if next.is_some() {
            std::thread::sleep(REST);
        } else if waiting.is_empty() {
            return;
        }
        waiting.extend(next.into_iter().chain(paths.try_iter()));
        waiting.retain(|path| !has_two(path));
    }
}

/// Makes the second copy of a record; whether there are two, or none is needed.
fn has_two(path: &Path) -> bool {
    let mirrored = Locked::open(path, true)
        .and_then(|locked| if locked.is_own(path) { locked.mirror(path).map(|()| true) } else { Ok(false) });
    let done = match mirrored {
        Ok(true) => Ok(()),
        // Nobody knows what its disk has: a new file has both.
        Ok(false) => adopt(path).map(drop),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the second copy of a record could not be written; the record is on the disk, and its file is made anew");
            adopt(path).map(drop)
        }
    };
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), %error, "a record has one copy");
            false
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const OLD: &[u8] = b"the record before";
    const NEW: &[u8] = b"and the one that is written";

    fn path() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("record");
        (dir, path)
    }

    /// What is at `path` once both slots have it.
    fn mirrored(path: &Path) -> Vec<u8> {
        let locked = Locked::open(path, true).expect("it is there");
        assert!(locked.is_own(path));
        locked.mirror(path).expect("there is room");
        std::fs::read(path).expect("it is there")
    }

    /// As [`write`], and nobody mirrors it.
    fn put(path: &Path, record: &[u8]) -> Vec<u8> {
        let locked = Locked::open(path, true).expect("it is there");
        let (place, newest) = locked.newest().expect("it is whole");
        let next = Slot { number: newest.number + 1, record: record.to_vec() };
        locked.put(path, 1 - place, &next).expect("there is room");
        std::fs::read(path).expect("it is there")
    }

    /// What a reader finds if these are the bytes, and who adopts it.
    fn found(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let (_dir, path) = path();
        std::fs::write(&path, bytes).expect("there is room");
        let only_read = read(&path);
        assert_eq!(std::fs::read(&path).expect("it is there"), bytes, "reading writes nothing");
        let found = adopt(&path);
        assert_eq!(only_read.ok(), found.as_ref().ok().cloned());
        if found.is_ok() {
            let whole = std::fs::read(&path).expect("it is there");
            let half = whole.len() / 2;
            assert!(whole[..half] == whole[half..], "both have it");
        }
        found
    }

    fn file(path: &Path) -> Inode {
        inode(&std::fs::metadata(path).expect("it is there"))
    }

    #[test]
    fn a_record_reads_as_it_was_written_and_by_one_that_was_written_at_once_after() {
        let (_dir, path) = path();
        assert_eq!(read(&path).expect_err("nothing is there").kind(), io::ErrorKind::NotFound);
        for round in 0..50_usize {
            let record = vec![u8::try_from(round).expect("small"); round * 37];
            write(&path, &record).expect("there is room");
            assert_eq!(read(&path).expect("it is there"), record);
            if round % 3 == 0 {
                write(&path, b"").expect("there is room");
                write(&path, &record).expect("there is room");
                assert_eq!(adopt(&path).expect("it is there"), record);
            }
        }
    }

    #[test]
    fn a_second_copy_is_made_soon() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        write(&path, NEW).expect("there is room");
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let locked = Locked::open(&path, false).expect("it is there");
            if locked.slots[0] == locked.slots[1] {
                assert_eq!(locked.newest().expect("it is whole").1.record, NEW);
                return;
            }
            drop(locked);
            assert!(Instant::now() < until, "the second slot never gets it");
            std::thread::sleep(REST);
        }
    }

    #[test]
    fn a_write_that_was_cut_off_anywhere_leaves_the_record_before_or_the_new_one() {
        // What was written last may be in both slots, or in one.
        for settled in [true, false] {
            let (_dir, path) = path();
            write(&path, b"the first").expect("there is room");
            let mut before = put(&path, OLD);
            if settled {
                before = mirrored(&path);
            }
            let after = put(&path, NEW);
            let changed: Vec<usize> = (0..before.len()).filter(|&at| before[at] != after[at]).collect();
            let (first, last) = (changed[0], changed[changed.len() - 1]);
            assert!(first / (before.len() / 2) == last / (before.len() / 2), "one slot is written");
            for cut in first..=last + 1 {
                // From the front, and from behind: blocks may come to the disk in any order.
                let front = [&after[..cut], &before[cut..]].concat();
                let behind = [&before[..cut], &after[cut..]].concat();
                for (bytes, is_new) in [(front, cut > last), (behind, cut == first)] {
                    let expected = if is_new { NEW } else { OLD };
                    assert_eq!(found(&bytes).expect("one is whole"), expected, "cut at {cut}, settled: {settled}");
                }
            }
        }
    }

    #[test]
    fn a_slot_that_is_spoiled_is_read_from_the_other_and_two_are_an_error() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        put(&path, NEW);
        let whole = mirrored(&path);
        let half = whole.len() / 2;
        let places = || (0..HEADER.len() + NEW.len()).chain([half - 1]);
        for at in places() {
            let mut one = whole.clone();
            one[at] ^= 1;
            assert_eq!(found(&one).expect("the other is whole"), NEW, "byte {at}");
            one[at] ^= 1;
            one[half + at] ^= 1;
            assert_eq!(found(&one).expect("the other is whole"), NEW, "byte {at} of the second");
            let mut both = one;
            both[at] ^= 0x10;
            assert_eq!(found(&both).expect_err("neither is").kind(), io::ErrorKind::InvalidData, "byte {at}");
        }
        for length in [0, 1, half, whole.len() - 1] {
            assert_eq!(found(&whole[..length]).expect_err("cut").kind(), io::ErrorKind::InvalidData, "{length} bytes");
        }
    }

    #[test]
    fn a_record_that_a_disk_lost_is_an_error_and_no_older_record() {
        let (_dir, path) = path();
        write(&path, b"the first").expect("there is room");
        let first = std::fs::read(&path).expect("it is there");
        put(&path, OLD);
        mirrored(&path);
        // The disk said that it had the second one in both slots, and has the first in one of them still.
        let last = put(&path, NEW);
        let half = last.len() / 2;
        let lost = if Slot::read(&last[..half]).is_some_and(|slot| slot.record == NEW) {
            [&last[..half], &first[half..]].concat()
        } else {
            [&first[..half], &last[half..]].concat()
        };
        let error = found(&lost).expect_err("which one counts is not known");
        assert!(error.to_string().contains("one was lost"), "{error}");
        // Nor is a number that two records have.
        let slot = |record: &[u8]| Slot { number: 7, record: record.to_vec() }.bytes(BLOCK);
        assert!(found(&[slot(OLD), slot(NEW)].concat()).is_err());
    }

    #[test]
    fn what_does_not_fit_gets_a_larger_file_and_what_is_written_to_the_former_one_is_not_lost() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        let large = vec![7; 3 * BLOCK];
        write(&path, &large).expect("there is room");
        assert_eq!(read(&path).expect("it is there"), large);
        write(&path, NEW).expect("there is room");
        assert_eq!(read(&path).expect("it is there"), NEW);
        assert!(write(&path, &vec![7; RECORD_MAX + 1]).is_err());
        assert_eq!(read(&path).expect("it is as it was"), NEW);
        // Who waits while it is replaced finds the new file.
        let held = Locked::open(&path, true).expect("it is there");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| write(&path, OLD));
            make(&path, &Slot { number: 9, record: NEW.to_vec() }).expect("there is room");
            drop(held);
            waits.join().expect("no panic").expect("there is room");
        });
        assert_eq!(read(&path).expect("it is there"), OLD);
    }

    #[test]
    fn a_file_of_another_life_or_of_a_disk_that_failed_is_not_changed_in_place() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        let first = file(&path);
        write(&path, NEW).expect("there is room");
        assert_eq!(file(&path), first, "its own is");
        // As if another process had made it, or a sync of it had failed.
        own().remove(&path);
        write(&path, OLD).expect("there is room");
        let second = file(&path);
        assert_ne!(second, first);
        own().remove(&path);
        assert_eq!(adopt(&path).expect("it is there"), OLD);
        let third = file(&path);
        assert_ne!(third, second);
        // Nor is another file that took its place.
        let copy = path.with_extension("copy");
        std::fs::copy(&path, &copy).expect("there is room");
        std::fs::rename(&copy, &path).expect("in its place");
        let fourth = file(&path);
        write(&path, NEW).expect("there is room");
        assert_ne!(file(&path), fourth);
        assert_eq!(read(&path).expect("it is there"), NEW);
    }

    #[test]
    fn a_write_that_fails_leaves_a_file_that_is_not_changed_in_place() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        let mut locked = Locked::open(&path, true).expect("it is there");
        // One that cannot be written.
        locked.file = File::open(&path).expect("it is there");
        let next = Slot { number: 2, record: NEW.to_vec() };
        assert!(locked.put(&path, 1, &next).is_err());
        assert!(!locked.is_own(&path));
        drop(locked);
        assert_eq!(read(&path).expect("it is there"), OLD);
    }

    #[test]
    fn the_record_that_was_written_last_is_not_forgotten_for_the_one_before() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        let before = std::fs::read(&path).expect("it is there");
        let after = put(&path, NEW);
        let half = before.len() / 2;
        // The slot that has it is spoiled before the other one gets it: for a new life that looks like one that was cut off.
        let first = Slot::read(&after[..half]).is_some_and(|slot| slot.record == NEW);
        let spoiled =
            if first { [&[0; BLOCK], &after[half..]].concat() } else { [&after[..half], &[0; BLOCK]].concat() };
        std::fs::write(&path, &spoiled).expect("in place");
        for result in [read(&path).map(drop), adopt(&path).map(drop), write(&path, b"more")] {
            assert_eq!(result.expect_err("it is known that there was one").kind(), io::ErrorKind::InvalidData);
        }
        assert_eq!(found(&spoiled).expect("nobody knows of it"), OLD);
        replace(&path, NEW).expect("there is room");
        assert_eq!(read(&path).expect("it is there"), NEW);
    }

    #[test]
    fn of_many_that_make_the_same_file_each_is_answered_for() {
        let (_dir, path) = path();
        let all: BTreeSet<Vec<u8>> = (0..8_u8).map(|number| vec![number; 100]).collect();
        std::thread::scope(|scope| {
            for record in &all {
                scope.spawn(|| write(&path, record).expect("there is room"));
            }
        });
        assert!(all.contains(&read(&path).expect("it is there")));
    }

    #[test]
    fn what_is_made_of_a_record_is_made_of_the_one_before_it() {
        let (_dir, path) = path();
        let number =
            |record: Option<&[u8]>| record.map_or(0, |record| u64::from_le_bytes(record.try_into().expect("a number")));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        update(&path, |record| Ok((number(record) + 1).to_le_bytes().to_vec())).expect("there is room");
                    }
                });
            }
        });
        assert_eq!(number(Some(&read(&path).expect("it is there"))), 200, "none is lost");
        let before = std::fs::read(&path).expect("it is there");
        let refused = update(&path, |_| Err(io::Error::other("no")));
        assert_eq!(refused.expect_err("it was refused").to_string(), "no");
        assert!(
            renew(&path, |record| Err(io::Error::other(number(record).to_string())))
                .is_err_and(|error| error.to_string() == "200")
        );
        assert!(
            std::fs::read(&path).expect("it is there").len() == before.len()
                && number(Some(&read(&path).expect("there"))) == 200
        );
        std::fs::remove_file(&path).expect("it was there");
        assert!(
            update(&path, |record| Err(io::Error::other(record.is_none().to_string())))
                .is_err_and(|error| error.to_string() == "true")
        );
        assert_eq!(read(&path).expect_err("none is made").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_written_once_more_and_may_not_be_on_the_disk_is_a_new_file() {
        let (_dir, path) = path();
        write(&path, OLD).expect("there is room");
        let (first, bytes) = (file(&path), mirrored(&path));
        write(&path, OLD).expect("there is room");
        assert!(file(&path) == first && std::fs::read(&path).expect("there") == bytes, "it is on the disk");
        own().remove(&path);
        write(&path, OLD).expect("there is room");
        assert_ne!(file(&path), first);
    }

    #[test]
    fn a_record_may_be_written_while_its_second_copy_is() {
        let (_dir, path) = path();
        std::thread::scope(|scope| {
            let (stop, stopped) = channel::<()>();
            let path = &path;
            write(path, &0_u64.to_le_bytes()).expect("there is room");
            scope.spawn(move || {
                while stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
                    Locked::open(path, true).and_then(|locked| locked.mirror(path)).expect("it is there");
                }
            });
            for round in 1..200_u64 {
                write(path, &round.to_le_bytes()).expect("there is room");
                assert_eq!(read(path).expect("it is there"), round.to_le_bytes());
            }
            drop(stop);
        });
    }
}
