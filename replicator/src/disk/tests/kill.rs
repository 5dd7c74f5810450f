//! A process that is killed at random moments, on this host's file system: what it acknowledged is there.
//!
//! The parent learns from the child's standard error what is begun and what is done, kills it after some line, and recovers a
//! copy of what is left. The next child goes on from the original, so recoveries are killed, too.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vmm_hooks::disk::{DiskChange, DiskSpec, DiskWrite};

use super::model::Dice;
use crate::disk::files::HostFiles;
use crate::disk::{DiskError, DiskStore, EpochId, Policy, Recovered, Setup, StandbyDisk, create, recover, reset};

/// Where the child works, and its number.
const DIR: &str = "UNDERSTUDY_DISK_KILL_DIR";
const ROUND: &str = "UNDERSTUDY_DISK_KILL_ROUND";
/// Most children, and the time after which there is no further one once each kind was there.
const ROUNDS: u64 = 24;
const TIME: Duration = Duration::from_secs(2);
/// After at most so many lines a child is killed.
const LINES: usize = 90;
/// So many epochs a child takes if nobody kills it.
const EPOCHS: u64 = 1000;
const BYTES: usize = 96 << 10;
/// Every n-th child ends its copy for a failover, as soon as it has taken some epochs.
const FAILOVER: u64 = 4;

type Content = [Vec<u8>; 2];

fn setup(dir: &Path, round: u64) -> Setup {
    let disk = |name: &str| StandbyDisk { spec: DiskSpec { name: name.into(), bytes: BYTES as u64 }, image: None };
    let policy = if round.is_multiple_of(3) { Policy::Memory } else { Policy::Disk };
    Setup { dir: dir.to_path_buf(), disks: vec![disk("root"), disk("data")], journal_bytes: 48 << 10, policy }
}

/// What the child of a round writes in an epoch.
fn writes(round: u64, epoch: u64) -> Vec<DiskWrite> {
    let mut dice = Dice(round << 32 | epoch);
    let one = |_| {
        let (disk, bytes) = (dice.below(2), 1 + dice.below(5000));
        let offset = dice.below(BYTES - bytes) as u64;
        let change = match dice.roll().to_le_bytes()[0] {
            0..64 => DiskChange::Zero(bytes as u64),
            fill => DiskChange::Data(vec![fill; bytes]),
        };
        DiskWrite { disk: u32::try_from(disk).expect("small"), offset, change }
    };
    (0..3).map(one).collect()
}

fn change(content: &mut Content, writes: &[DiskWrite]) {
    for write in writes {
        let at = usize::try_from(write.offset).expect("small");
        let bytes = usize::try_from(write.bytes()).expect("small");
        let into = &mut content[usize::try_from(write.disk).expect("small")][at..at + bytes];
        match &write.change {
            DiskChange::Data(data) => into.copy_from_slice(data),
            DiskChange::Zero(_) => into.fill(0),
        }
    }
}

fn say(what: &str, epoch: u64) {
    // A parent that is gone takes the child with it.
    std::io::stderr().write_all(format!("{what} {epoch}\n").as_bytes()).expect("somebody listens");
}

/// Takes epochs after `last`, commits some of them, and has them applied by another thread.
fn takes(store: &Arc<DiskStore>, last: EpochId, round: u64, kick: &mpsc::Sender<bool>) {
    let mut dice = Dice(round);
    let take = |epoch| {
        say("take", epoch);
        let id = EpochId { epoch, ..last };
        match store.append(id, &writes(round, epoch)) {
            Err(DiskError::Full { .. }) => {
                store.commit(epoch - 1).expect("commits");
                store.append(id, &writes(round, epoch)).expect("there is room now");
            }
            done => done.expect("appends"),
        }
    };
    for epoch in last.epoch + 1..last.epoch + EPOCHS {
        take(epoch);
        say("acked", epoch);
        if dice.below(3) > 0 {
            store.commit(epoch).expect("commits");
            kick.send(dice.below(4) == 0).expect("the other thread listens");
        }
        if round.is_multiple_of(FAILOVER) && dice.below(15) == 0 {
            take(epoch + 1);
            say("finishing", epoch);
            store.finish(epoch).expect("finishes");
            say("finished", epoch);
            return;
        }
    }
}

#[test]
#[ignore = "the other test runs it in a process of its own"]
fn child() {
    let (Ok(dir), Ok(round)) = (std::env::var(DIR), std::env::var(ROUND)) else { return };
    let round = round.parse().expect("a number");
    say("recovering", 0);
    let (store, found) = recover(&HostFiles, &setup(Path::new(&dir), round), None).expect("recovers");
    let Recovered::Whole(last) = found else { panic!("{found:?}") };
    say("recovered", last.epoch);
    let store = Arc::new(store);
    let (kick, kicked) = mpsc::channel();
    let other = Arc::clone(&store);
    let applier = std::thread::spawn(move || {
        while let Ok(flush) = kicked.recv() {
            let done = if flush { other.apply().and_then(|_| other.flush()) } else { other.apply().map(drop) };
            match done {
                Err(DiskError::OutOfTurn { .. }) => return,
                done => done.expect("applies"),
            }
        }
    });
    takes(&store, last, round, &kick);
    drop(kick);
    applier.join().expect("applies all");
}

/// What the parent knows.
struct Known {
    base: Content,
    generation: u64,
    /// Which round wrote each epoch of the session.
    taken: BTreeMap<u64, u64>,
    acked: u64,
    finishing: Option<u64>,
    finished: bool,
}

impl Known {
    fn content(&self, epoch: u64) -> Content {
        let mut content = self.base.clone();
        for (&epoch, &round) in self.taken.range(..=epoch) {
            change(&mut content, &writes(round, epoch));
        }
        content
    }

    /// Takes over a line of the child.
    fn hears(&mut self, line: &str, round: u64) {
        let (what, epoch) = line.trim_end().split_once(' ').unwrap_or_else(|| panic!("the child said {line}"));
        let epoch = epoch.parse().unwrap_or_else(|_| panic!("the child said {line}"));
        match what {
            "recovering" => {}
            "recovered" => {
                assert!(epoch >= self.acked, "recovered {epoch} is older than {}", self.acked);
                self.taken.retain(|&taken, _| taken <= epoch);
                self.acked = epoch;
            }
            "take" => drop(self.taken.insert(epoch, round)),
            "acked" => self.acked = epoch,
            "finishing" => self.finishing = Some(epoch),
            "finished" => self.finished = true,
            _ => panic!("the child said {line}"),
        }
    }

    /// Recovers a copy of what is left.
    fn check(&self, dir: &Path, round: u64) -> EpochId {
        let copy = tempfile::tempdir().expect("temporary directory");
        for entry in dir.read_dir().expect("lists") {
            let entry = entry.expect("lists");
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copies");
        }
        let setup = setup(copy.path(), round);
        let limit = (round % 2 == 1).then_some(self.acked);
        let (store, found) = match recover(&HostFiles, &setup, limit) {
            // The child had begun to go further.
            Err(DiskError::OutOfTurn { .. }) if limit.is_some() => recover(&HostFiles, &setup, None),
            done => done,
        }
        .expect("recovers");
        let (id, ended) = match found {
            Recovered::Whole(id) => (id, false),
            Recovered::Finished(id) => (id, true),
            Recovered::Syncing => panic!("a whole copy is lost"),
        };
        assert_eq!(id.generation, self.generation);
        assert!(id.epoch >= self.acked, "{found:?} is older than {}", self.acked);
        let last = self.taken.last_key_value().map_or(self.acked, |(&epoch, _)| epoch);
        assert!(id.epoch <= last, "{found:?} is later than {last}");
        assert!(ended || !self.finished, "{found:?} after a finish");
        assert!(!ended || self.finishing == Some(id.epoch), "{found:?} {:?}", self.finishing);
        store.finish(id.epoch).expect("finishes");
        let content = self.content(id.epoch);
        for ((_, path), content) in setup.images().iter().zip(&content) {
            assert!(std::fs::read(path).expect("reads") == *content, "{} is not as of {id:?}", path.display());
        }
        id
    }

    /// The first copy of a session that begins where the other one ended.
    fn begin(&mut self, store: &DiskStore, epoch: u64) {
        let whole =
            |(disk, content): (u32, &Vec<u8>)| DiskWrite { disk, offset: 0, change: DiskChange::Data(content.clone()) };
        store.write(&(0..).zip(&self.base).map(whole).collect::<Vec<_>>()).expect("copies");
        self.generation += 1;
        store.begin(EpochId { generation: self.generation, incarnation: 1, epoch }).expect("begins");
        (self.taken, self.acked, self.finishing, self.finished) = (BTreeMap::new(), epoch, None, false);
    }
}

#[test]
fn p45_p47_what_a_killed_process_acknowledged_is_there() {
    let began = Instant::now();
    let dir = tempfile::tempdir().expect("temporary directory");
    let base = [vec![3; BYTES], vec![4; BYTES]];
    let (taken, generation) = (BTreeMap::new(), 0);
    let mut known = Known { base, generation, taken, acked: 0, finishing: None, finished: false };
    known.begin(&create(&HostFiles, &setup(dir.path(), 0)).expect("creates"), 0);
    let mut dice = Dice(u64::from(std::process::id()));
    for round in 1..=ROUNDS {
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["disk::tests::kill::child", "--exact", "--ignored", "--nocapture"])
            .env(DIR, dir.path())
            .env(ROUND, round.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let most = 1 + dice.below(LINES);
        let mut heard = 0;
        let mut line = String::new();
        // What it said before it died counts, too. A line that is cut off was not said.
        while lines.read_line(&mut line).expect("reads") > 0 && line.ends_with('\n') {
            known.hears(&line, round);
            line.clear();
            heard += 1;
            if heard == most {
                child.kill().expect("kills");
            }
        }
        child.wait().expect("ends");
        assert!(heard > 0, "the child said nothing");
        let id = known.check(dir.path(), round);
        if known.finishing.is_some() {
            known.base = known.content(id.epoch);
            let store = reset(&HostFiles, &setup(dir.path(), round)).expect("gives up the old copy");
            known.begin(&store, id.epoch);
        }
        if round >= FAILOVER && began.elapsed() > TIME {
            break;
        }
    }
}
