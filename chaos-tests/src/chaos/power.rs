//! What is on the disks when all of it lost power at once: the VM, its twin, both agents.
//!
//! A guest that runs answers out of memory, and one that shuts down writes its state anew: neither shows what its disk would have
//! given it. So the last round ends with SIGKILL to both hosts while clients go on, and then only the disks are asked. On the primary's host that is
//! the image; on the standby's it is the image with what its journal holds. Promise: after the file system has replayed its own
//! journal it has no flaw, and Redis' log on it holds every write and each step of each counter that a client was told of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::demo::image;
use replicator::demo::lab::{Host, Lab, VM};
use replicator::demo::wait::until;
use replicator::disk::files::HostFiles;
use replicator::disk::{DiskError, Policy, Recovered, Setup, StandbyDisk, State, recover, state_in};
use vmm_hooks::disk::DiskSpec;

use super::counter::Count;
use super::linear::{Action, Operation};
use super::workload::{COUNTER, counter, name};

/// Bound on the end of the processes that were killed.
const LET_GO: Duration = Duration::from_secs(30);

/// What clients were told was done, in all rounds.
#[derive(Debug, Default)]
pub(super) struct Told {
    writes: BTreeSet<(u64, u64)>,
    /// By round.
    counted: BTreeMap<u64, u64>,
}

impl Told {
    /// Remembers the answers of a round.
    pub(super) fn add(&mut self, round: u64, history: &[Operation], counts: &[Count]) {
        for operation in history.iter().filter(|operation| operation.returned_ns.is_some()) {
            if let Action::Write(value) = operation.action {
                self.writes.insert((operation.key, value));
            }
        }
        let most = counts.iter().filter_map(|count| Some(count.returned?.1)).max().unwrap_or(0);
        let counted = self.counted.entry(round).or_default();
        *counted = most.max(*counted);
    }

    /// How many writes and steps those are.
    pub(super) fn len(&self) -> u64 {
        self.writes.len() as u64 + self.counted.values().sum::<u64>()
    }

    /// Whether what was logged is all of it, and ends with the values that keys had which nobody writes any more.
    fn is_all_in(&self, logged: &Logged<'_>, settled: &BTreeMap<u64, u64>) -> Result<()> {
        let Logged { written, values, counted } = logged;
        let missing: Vec<_> = self
            .writes
            .iter()
            .map(|(key, value)| (name(*key), value.to_string()))
            .filter(|(key, value)| !written.contains(&(key.as_str(), value.as_str())))
            .collect();
        if let Some(first) = missing.first() {
            bail!(
                "{} of {} writes that were answered are not there; the first is {first:?}",
                missing.len(),
                self.writes.len()
            );
        }
        for (&round, &most) in &self.counted {
            let there = counted.get(counter(round).as_str()).copied().unwrap_or(0);
            ensure!(there >= most, "in round {round} {most} was counted, of which {there} steps are there");
        }
        for (key, value) in settled.iter().filter(|(_, value)| **value != 0) {
            let there = values.get(name(*key).as_str()).copied();
            ensure!(there == Some(value.to_string().as_str()), "key {key:#x} was {value} and is {there:?}");
        }
        Ok(())
    }

    /// Whether Redis' log on an image has all of it, once the file system has replayed its own journal.
    ///
    /// # Errors
    /// What is not there.
    pub(super) fn is_on(&self, image: &Path, settled: &BTreeMap<u64, u64>) -> Result<()> {
        image::replay(image)?;
        let shown = image.display().to_string();
        let listed = image::tool("debugfs", &["-R", "ls -p /appendonlydir", &shown])?.out;
        let names = listed.lines().filter_map(|line| line.split('/').nth(5)).filter(|name| name.ends_with(".aof"));
        let mut log = String::new();
        for name in names {
            log.push_str(&image::tool("debugfs", &["-R", &format!("cat /appendonlydir/{name}"), &shown])?.out);
        }
        self.is_all_in(&Logged::by_redis(&log), settled).with_context(|| format!("the disk {shown}"))
    }

    /// Whether the pilot's log on an image has all of it.
    ///
    /// # Errors
    /// What is not there, or that the log is damaged.
    pub(super) fn is_in_pilots(&self, image: &Path, settled: &BTreeMap<u64, u64>) -> Result<()> {
        let disk = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
        let records = vmm_hooks::kvm::pilot::records(&disk).map_err(anyhow::Error::msg)?;
        let texts: Vec<String> = records.into_iter().map(String::from_utf8).collect::<Result<_, _>>()?;
        let logged = Logged::by_pilot(&texts);
        self.is_all_in(&logged, settled).with_context(|| format!("the disk {}", image.display()))
    }
}

/// What a log on a disk says.
#[derive(Debug, Default)]
struct Logged<'a> {
    written: BTreeSet<(&'a str, &'a str)>,
    /// The last ones.
    values: BTreeMap<&'a str, &'a str>,
    /// How often each was counted further.
    counted: BTreeMap<&'a str, u64>,
}

impl<'a> Logged<'a> {
    /// An append-only file: commands.
    fn by_redis(log: &'a str) -> Self {
        let mut logged = Self::default();
        for command in commands(log) {
            match command[..] {
                ["SET", key, value] => logged.write(key, value),
                ["INCR", key] => *logged.counted.entry(key).or_default() += 1,
                _ => {}
            }
        }
        logged
    }

    /// The pilot's log: what each key became, also one that is counted.
    fn by_pilot(records: &'a [String]) -> Self {
        let mut logged = Self::default();
        for (key, value) in records.iter().filter_map(|record| record.split_once('=')) {
            if key.starts_with(COUNTER) {
                *logged.counted.entry(key).or_default() += 1;
            } else {
                logged.write(key, value);
            }
        }
        logged
    }

    fn write(&mut self, key: &'a str, value: &'a str) {
        self.written.insert((key, value));
        self.values.insert(key, value);
    }
}

/// The commands of an append-only file, each as its words. What is cut off at its end was not answered.
fn commands(log: &str) -> Vec<Vec<&str>> {
    let mut lines = log.split("\r\n");
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let Some(words) = line.strip_prefix('*').and_then(|words| words.parse::<usize>().ok()) else { continue };
        let words: Vec<&str> = (0..words).map_while(|_| lines.next().and_then(|_| lines.next())).collect();
        found.push(words);
    }
    found
}

/// Brings the copy of a standby that was killed to the last epoch that its journal holds. Returns its image.
///
/// # Errors
/// If it has no whole copy, or it cannot be recovered.
pub(super) async fn recover_standby(lab: &Lab, host: Host, spec: DiskSpec) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(lab.state_dir(host).join("images").join(VM)).context("it has no images")? {
        let dir = entry?.path();
        match state_in(&HostFiles, &dir)? {
            Some(State::Activated(_)) | Some(State::Syncing) | None => {}
            Some(_) => found.push(dir),
        }
    }
    let [dir] = &found[..] else { bail!("{} has the whole copies {found:?}", host.name()) };
    let disks = vec![StandbyDisk { spec, image: None }];
    let setup = Setup { dir: dir.clone(), disks, journal_bytes: 0, policy: Policy::Disk };
    // A process that was killed may take a moment to let its files go.
    let (store, recovered) =
        until("the journal to be let go", LET_GO, async || match recover(&HostFiles, &setup, None) {
            Err(error @ DiskError::InUse { .. }) => Ok(Err(error.to_string())),
            done => Ok(Ok(done?)),
        })
        .await?;
    match recovered {
        Recovered::Whole(id) | Recovered::Finished(id) => store.finish(id.epoch)?,
        Recovered::Syncing => return Err(DiskError::Missing { path: dir.clone() }.into()),
    }
    let [(_, image)] = &setup.images()[..] else { bail!("it has one disk") };
    Ok(image.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n*3\r\n$3\r\nSET\r\n$3\r\nk12\r\n$2\r\n77\r\n*2\r\n$4\r\nINCR\r\n$2\r\nn2\r\n\
        *2\r\n$4\r\nINCR\r\n$2\r\nn2\r\n*3\r\n$3\r\nSET\r\n$3\r\nk12\r\n$2\r\n78\r\n*3\r\n$3\r\nSET\r\n$3\r\nk1";

    fn told(writes: &[(u64, u64)], counted: u64) -> Told {
        let operations: Vec<_> = writes
            .iter()
            .map(|&(key, value)| Operation {
                key,
                action: Action::Write(value),
                called_ns: 0,
                returned_ns: Some(1),
                client: 0,
            })
            .collect();
        let mut told = Told::default();
        told.add(2, &operations, &[Count { called_ns: 0, returned: Some((1, counted)), client: 4 }]);
        told
    }

    #[test]
    fn a_log_that_lacks_something_is_found() {
        let settled = |value| BTreeMap::from([(12, value), (13, 0)]);
        told(&[(12, 77), (12, 78)], 2).is_all_in(&Logged::by_redis(LOG), &settled(78)).unwrap();
        told(&[(12, 78)], 1).is_all_in(&Logged::by_redis(LOG), &BTreeMap::new()).unwrap();
        told(&[(12, 79)], 2).is_all_in(&Logged::by_redis(LOG), &BTreeMap::new()).unwrap_err();
        told(&[(1, 77)], 2).is_all_in(&Logged::by_redis(LOG), &BTreeMap::new()).unwrap_err();
        told(&[(12, 77)], 3).is_all_in(&Logged::by_redis(LOG), &BTreeMap::new()).unwrap_err();
        told(&[(12, 77)], 2).is_all_in(&Logged::by_redis(LOG), &settled(77)).unwrap_err();
    }
    #[test]
    fn a_pilots_log_that_lacks_something_is_found() {
        let records = ["k12=77", "n2=1", "k12=78", "n2=2"].map(str::to_owned);
        let logged = Logged::by_pilot(&records);
        let settled = |value| BTreeMap::from([(12, value), (13, 0)]);
        told(&[(12, 77), (12, 78)], 2).is_all_in(&logged, &settled(78)).unwrap();
        told(&[(12, 79)], 2).is_all_in(&logged, &BTreeMap::new()).unwrap_err();
        told(&[(12, 77)], 3).is_all_in(&logged, &BTreeMap::new()).unwrap_err();
        told(&[(12, 77)], 2).is_all_in(&logged, &settled(77)).unwrap_err();
    }
}
