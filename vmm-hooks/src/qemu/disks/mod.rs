//! The disks of a QEMU, mirrored write by write into a log of ours while the guest runs.
//!
//! For each disk a `blockdev-mirror` job with `write-blocking` is added to the running QEMU. It copies the whole disk to an NBD
//! socket of this process once, and from then on the guest is told that a write is done only when our answer came. What
//! comes goes to one log for all disks, in the order of completion; captures take it from there.
//!
//! Promise: a capture contains every write that the guest was told is done, or fails. A connection that breaks is
//! invisible to the guest and, for a moment, to QEMU's job; so each capture asks for proof, after QEMU has stopped and answered
//! every write: each job is there, healthy and ready, none told of an error, each connection is the first one and whole, and
//! the log has dropped nothing. What failed once stays failed until mirroring is begun anew. The threads that
//! answer QEMU wait for nothing but room in the log, and that only within bounds (see `log`). Nothing here writes to the guest's
//! own images.
//!
//! | module | promise |
//! | --- | --- |
//! | `find` | which drives must be mirrored, and which cannot be |
//! | `log` | keeps writes in order and in bounds, or says that it does not |
//! | `export` | what QEMU writes over NBD goes to the log before it is answered |
//! | `jobs` | the jobs in QEMU: added, looked at, removed |
//! | `flush` | keeps pauses short by flushing images before them |
//! | `socket` | a socket that one QEMU can reach and nobody else |

mod export;
mod find;
mod flush;
mod jobs;
mod log;
mod socket;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Pending, Qmp, QmpError, QmpEvent};
use crate::disk::{DiskImage, DiskWrite, MirrorProgress};
use crate::guest::{GuestError, GuestErrorKind};
use crate::nbd::{Backend, Export, NbdError, Server};
use crate::sys::process::PidFd;
use export::LogExport;
pub(super) use find::{Drive, Storage, find};
use jobs::Names;
pub(super) use jobs::remove;
use log::{BOUNDS, LogBounds, WriteLog};
use socket::SocketDir;

/// What is safe and what to do when a mirror broke.
const BROKEN_ADVICE: &str =
    "nothing of this epoch is committed and the guest's own disks are unharmed; its disks must be copied anew";

/// A path as a process sees it, for us to open.
fn seen_by(pid: u32, file: &str) -> PathBuf {
    let start = if file.starts_with('/') { "root" } else { "cwd" };
    PathBuf::from(format!("/proc/{pid}/{start}/{file}"))
}

/// The mirrors of one QEMU.
#[derive(Debug)]
pub(super) struct Mirrors {
    disks: Vec<Disk>,
    log: Arc<WriteLog>,
    process: PidFd,
    /// How often mirroring was begun.
    generation: u64,
    running: Option<Running>,
}

#[derive(Debug)]
struct Disk {
    /// For messages.
    name: String,
    /// Its top node.
    node: String,
    bytes: u64,
    /// Its image, if QEMU flushes it when it stops.
    flushed: Option<String>,
    /// Its image.
    image: DiskImage,
}

/// What there is while disks are mirrored.
#[derive(Debug)]
struct Running {
    names: Vec<Names>,
    exports: Vec<Arc<LogExport>>,
    server: Server,
    /// Every job has said that its first copy is complete.
    ready: bool,
    /// Why a write may be missing. Stays.
    broken: Option<String>,
}

impl Mirrors {
    /// For these drives; changes nothing yet.
    pub(super) fn new(storage: &Storage, process: PidFd) -> Self {
        let pid = process.pid();
        // One that cannot be found from here is not one that others can read later.
        let found = |drive: &Drive| fs::canonicalize(seen_by(pid, &drive.file)).unwrap_or_default();
        let disk = |drive: &Drive| Disk {
            name: drive.name.clone(),
            node: drive.node.clone(),
            bytes: drive.bytes,
            flushed: drive.flushed.then(|| drive.file.clone()),
            image: DiskImage { path: found(drive), format: drive.format.clone() },
        };
        Self {
            disks: storage.disks().map(disk).collect(),
            log: Arc::new(WriteLog::new(BOUNDS)),
            process,
            generation: 0,
            running: None,
        }
    }

    /// See [`crate::guest::Guest::disk_images`].
    pub(super) fn images(&self) -> Vec<DiskImage> {
        self.disks.iter().map(|disk| disk.image.clone()).collect()
    }

    /// There is nothing to mirror.
    pub(super) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Mirroring was begun and not ended.
    pub(super) fn are_running(&self) -> bool {
        self.running.is_some()
    }

    /// Begins to mirror, while the guest stands; does not wait for the first copy. On an error nothing is mirrored.
    pub(super) fn start(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        if self.is_empty() || self.are_running() {
            return Ok(());
        }
        self.generation += 1;
        // Adding a mirror waits for writes of the ones added before.
        let _lifted = Lifted::new(&self.log);
        self.log.open();
        let started = self.start_all(qmp);
        if started.is_err() {
            // What cannot be removed now is removed before the next try, or found as left over.
            let _ = self.stop(qmp);
        }
        started
    }

    fn start_all(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        if self.generation > 1 {
            // An earlier removal may have failed half way.
            jobs::remove(qmp, || ())?;
        }
        let failed = |error: NbdError| {
            GuestError::new(GuestErrorKind::Failed, "cannot listen for QEMU's disk writes").because(error)
        };
        let owner = (self.process.uid()?, self.process.gid()?);
        let dir = SocketDir::make(owner).map_err(|error| failed(error.into()))?;
        let number = |index: usize| u32::try_from(index).expect("at most MAX_DISKS");
        let exports: Vec<Arc<LogExport>> = (0..)
            .zip(&self.disks)
            .map(|(index, disk)| Arc::new(LogExport::new(number(index), disk.bytes, Arc::clone(&self.log))))
            .collect();
        let offered = exports
            .iter()
            .enumerate()
            .map(|(index, export)| Export { name: index.to_string(), backend: Arc::clone(export) as Arc<dyn Backend> });
        let pid = self.process.pid();
        let server =
            Server::listen(&dir.socket(), offered.collect(), move |peer| socket::is_of(peer, pid)).map_err(failed)?;
        dir.hand_over(owner).map_err(|error| failed(error.into()))?;
        let names: Vec<Names> = (0..self.disks.len()).map(|disk| Names::new(self.generation, disk)).collect();
        let running = Running { names, exports, server, ready: false, broken: None };
        let running = self.running.insert(running);
        for (index, (disk, names)) in self.disks.iter().zip(&running.names).enumerate() {
            jobs::add(qmp, names, &disk.node, &dir.socket(), &index.to_string()).map_err(|error| match error {
                QmpError::Refused { .. } => GuestError::new(
                    GuestErrorKind::Failed,
                    format!("QEMU does not mirror the disk {}: {error}", disk.name),
                )
                .advise(format!(
                    "the guest runs on unharmed; QEMU must be able to reach {} (see its AppArmor or SELinux rules)",
                    dir.socket().display()
                ))
                .because(error),
                error => error.into(),
            })?;
        }
        if !jobs::wait_begun(qmp, &running.names)? {
            let message = "QEMU does not begin to copy the guest's disks in the time that the guest may stand for it";
            return Err(GuestError::new(GuestErrorKind::Failed, message).advise(
                "the guest runs on unharmed; QEMU looks through a large qcow2 image first: convert it to raw, or take its \
                 device out of its I/O thread",
            ));
        }
        // Whoever connects from here on is no first connection. The directory goes with `dir`.
        running.server.stop_listening();
        Ok(())
    }

    /// Everything is answered at once from here on; what was not taken is dropped.
    pub(super) fn give_up(&self) {
        self.log.close();
    }

    /// Ends mirroring, while the guest stands. The guest's writes wait for us no longer, whatever is returned.
    pub(super) fn stop(&mut self, qmp: &mut Qmp) -> Result<(), QmpError> {
        self.give_up();
        let Some(running) = self.running.take() else { return Ok(()) };
        let removed = jobs::remove(qmp, || running.server.hang_up());
        drop(running);
        match removed {
            // With the connection gone, nothing in QEMU can wait for it.
            Err(QmpError::TimedOut { .. } | QmpError::Refused { .. }) => jobs::remove(qmp, || ()).map(drop),
            other => other.map(drop),
        }
    }

    /// How far the first copy is.
    pub(super) fn progress(&mut self, qmp: &mut Qmp) -> Result<MirrorProgress, GuestError> {
        if self.disks.is_empty() {
            return Ok(MirrorProgress { ready: true, ..MirrorProgress::default() });
        }
        let jobs = qmp.execute("query-block-jobs", json!({}))?;
        let ready = self.look(&jobs)?;
        let names = self.running.iter().flat_map(|running| &running.names);
        let each = names.map(|names| jobs::progress(&jobs, &names.job));
        let (done, total) = each.fold((0, 0), |(done, total), (more, of)| (done + more, total + of));
        Ok(MirrorProgress { done, total, ready })
    }

    /// Whether every job is healthy and ready; an error if one broke.
    fn look(&mut self, jobs: &Value) -> Result<bool, GuestError> {
        let Some(running) = &mut self.running else {
            return Err(GuestError::new(GuestErrorKind::Failed, "the guest's disks are not mirrored")
                .advise("begin to mirror them first"));
        };
        let mut ready = true;
        for ((disk, names), export) in self.disks.iter().zip(&running.names).zip(&running.exports) {
            let whole = jobs::whole(jobs, &names.job);
            let found = match whole {
                Ok(_) if !export.connected() => Err("QEMU's connection to us was lost".to_owned()),
                Ok(false) if running.ready => Err("its job is not synchronous any more".to_owned()),
                other => other,
            };
            match found {
                Ok(whole) => ready &= whole,
                Err(why) => {
                    running.broken.get_or_insert(format!("the mirror of the disk {} broke: {why}", disk.name));
                }
            }
        }
        if !running.server.is_whole(running.exports.len()) {
            running.broken.get_or_insert_with(|| "a connection to QEMU for mirroring disks was lost".to_owned());
        }
        if self.log.overrun() {
            running.broken.get_or_insert_with(|| {
                "the guest wrote to its disks faster than the writes were taken for too long".to_owned()
            });
        }
        if let Some(why) = &running.broken {
            // Nobody can use the rest, and the guest need not wait for us.
            self.log.close();
            return Err(GuestError::new(GuestErrorKind::Failed, why.clone()).advise(BROKEN_ADVICE));
        }
        if ready && !running.ready {
            // From here on pauses matter.
            running.ready = true;
            let images = self.disks.iter().filter_map(|disk| flush::open(self.process.pid(), disk.flushed.as_ref()?));
            flush::start(images.collect(), &self.log);
        }
        Ok(ready)
    }

    /// What QEMU told of its jobs.
    pub(super) fn take_event(&mut self, event: &QmpEvent) {
        let Some(running) = &mut self.running else { return };
        let device = event.data.get("device").and_then(Value::as_str).unwrap_or_default();
        let Some(index) = running.names.iter().position(|names| names.job == device) else { return };
        // Becoming ready is what is waited for; a change of state comes with every stop.
        if event.name.starts_with("BLOCK_JOB_") && event.name != "BLOCK_JOB_READY" {
            let error = event.data.get("error").and_then(Value::as_str).unwrap_or("no reason given");
            let what = event.name.trim_start_matches("BLOCK_JOB_").to_lowercase();
            let disk = &self.disks[index].name;
            running.broken.get_or_insert(format!("the mirror of the disk {disk} broke: QEMU reports {what} ({error})"));
        }
    }

    /// QEMU is about to stop, and will wait for every answer.
    pub(super) fn lift(&self) {
        self.log.lift();
    }

    /// QEMU has stopped. What still comes is the first copy, which would run over without a bound.
    pub(super) fn stopped(&self) {
        if self.copying() {
            self.log.lower();
        }
    }

    fn copying(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.ready)
    }

    /// Before QEMU is asked to save its state, for which it waits for every answer again: an error if the first copy goes on.
    pub(super) fn before_capture(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        if self.copying() {
            let jobs = qmp.execute("query-block-jobs", json!({}))?;
            self.prove(Some(jobs))?;
            self.log.lift();
        }
        Ok(())
    }

    /// The guest runs.
    pub(super) fn lower(&self) {
        self.log.lower();
    }

    /// While QEMU stands: asks it for proof that no write is missing, without waiting. `None` if nothing is mirrored.
    pub(super) fn ask(&self, qmp: &mut Qmp) -> Result<Option<Pending>, QmpError> {
        self.running.is_some().then(|| qmp.send("query-block-jobs", json!({}))).transpose()
    }

    /// Judges the answer, once all events before it were taken in.
    pub(super) fn prove(&mut self, answer: Option<Value>) -> Result<(), GuestError> {
        let Some(jobs) = answer else { return Ok(()) };
        if self.look(&jobs)? {
            return Ok(());
        }
        Err(GuestError::new(GuestErrorKind::Failed, "the first copy of the guest's disks is not complete")
            .advise("nothing is lost; wait until it is"))
    }

    /// Everything that was not taken.
    pub(super) fn take_all(&self, into: &mut Vec<DiskWrite>) {
        self.log.take_all(into);
    }

    /// Some of it, for the first copy.
    pub(super) fn take(&self, into: &mut Vec<DiskWrite>, bytes: usize, wait: Duration) {
        self.log.take(into, bytes, wait);
    }

    /// What was taken and not sent.
    pub(super) fn put_back(&self, writes: Vec<DiskWrite>) {
        self.log.put_back(writes);
    }

    /// Other bounds, and what may happen to a connection; for tests.
    pub(super) fn bound(&self, soft: usize, hard: usize, stall: Duration) {
        self.log.bound(LogBounds { soft, hard, stall });
    }

    /// Cuts the connections, for tests.
    pub(super) fn cut(&self) {
        if let Some(running) = &self.running {
            running.server.hang_up();
        }
    }
}

impl Drop for Mirrors {
    fn drop(&mut self) {
        // So that no thread of the server waits for room.
        self.log.close();
    }
}

/// Nobody waits for room in the log while this lives.
struct Lifted(Arc<WriteLog>);

impl Lifted {
    fn new(log: &Arc<WriteLog>) -> Self {
        log.lift();
        Self(Arc::clone(log))
    }
}

impl Drop for Lifted {
    fn drop(&mut self) {
        self.0.lower();
    }
}
