//! What happened to a VM on this host: one line for each change, kept over restarts and protections.
//!
//! Promise: the newest [`FILE_MAX`] bytes of lines at least are kept, and at most twice as many. A line that cannot be written is
//! told once in the agent's log. Who adds a line waits for it a moment at most, also when the disk has hung: then lines wait in a
//! bounded queue, and a VM's task goes on. A line that was torn by a power loss is left out when it is read.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use super::aside::aside;
use super::durable::escape;
use crate::control::api::VmEvent;

/// Bytes after which a file is set aside, in place of the one that was set aside before.
const FILE_MAX: u64 = if cfg!(test) { 1 << 14 } else { 1 << 20 };

/// How long who adds a line waits for it.
const WRITTEN_WITHIN: Duration = Duration::from_millis(50);
/// Lines that may wait for a disk.
const WAITING: usize = 256;

/// The thread that writes the lines of all VMs of an agent. It ends with the last [`Writer`] and the last log.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: SyncSender<Job>,
    /// One took too long, and is not written yet: nobody waits until it is.
    hung: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Job {
    /// A line; `None`: nothing but to say that all before it are written.
    line: Option<(Arc<File>, VmEvent)>,
    written: SyncSender<()>,
}

impl Writer {
    /// Starts it.
    ///
    /// # Errors
    /// If the system has no thread.
    pub(super) fn start() -> io::Result<Self> {
        let (queue, jobs) = sync_channel::<Job>(WAITING);
        let hung = Arc::new(AtomicBool::new(false));
        let hangs = Arc::clone(&hung);
        std::thread::Builder::new().name("us-events".into()).spawn(move || {
            for Job { line, written } in jobs {
                if let Some((log, event)) = line {
                    log.append(&event);
                }
                if hangs.swap(false, Ordering::Relaxed) {
                    tracing::warn!("the disk under the state directory goes on");
                }
                // Nobody waits any more.
                let _ = written.try_send(());
            }
        })?;
        Ok(Self { queue, hung })
    }

    /// Waits until what was added before is written, for a bounded time. Blocks.
    pub(super) fn catch_up(&self, within: Duration) {
        let (written, done) = sync_channel(1);
        if self.queue.try_send(Job { line: None, written }).is_ok() {
            // A disk that has hung shows what it has.
            let _ = done.recv_timeout(within);
        }
    }
}

/// The event log of one VM.
#[derive(Debug)]
pub(super) struct EventLog {
    file: Arc<File>,
    writer: Writer,
}

impl EventLog {
    /// The log of the VM called `name`; touches nothing yet.
    pub(super) fn new(writer: &Writer, state_dir: &Path, name: &str) -> Self {
        Self { file: Arc::new(File::new(state_dir, name)), writer: writer.clone() }
    }

    /// Adds a line.
    pub(super) fn append(&self, event: &VmEvent) {
        let (written, done) = sync_channel(1);
        let line = Some((Arc::clone(&self.file), event.clone()));
        if self.writer.queue.try_send(Job { line, written }).is_err() {
            self.file.complain(&io::Error::other("the disk has hung, and too many events wait for it"));
        } else if !self.writer.hung.load(Ordering::Relaxed)
            && aside(|| done.recv_timeout(WRITTEN_WITHIN)) == Err(RecvTimeoutError::Timeout)
            && !self.writer.hung.swap(true, Ordering::Relaxed)
        {
            tracing::error!(path = %self.file.path.display(), "the disk under the state directory does not answer; events wait for it");
        }
    }
}

/// Where lines go.
#[derive(Debug)]
struct File {
    path: PathBuf,
    failed: AtomicBool,
}

impl File {
    fn new(state_dir: &Path, name: &str) -> Self {
        Self { path: path(state_dir, name), failed: AtomicBool::new(false) }
    }

    fn append(&self, event: &VmEvent) {
        if let Err(error) = self.write(event) {
            self.complain(&error);
        }
    }

    fn complain(&self, error: &io::Error) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(path = %self.path.display(), %error, "events of a VM cannot be kept");
        }
    }

    fn write(&self, event: &VmEvent) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            heartbeat::files::make_dir(dir)?;
        }
        if fs::metadata(&self.path).is_ok_and(|data| data.len() >= FILE_MAX) {
            fs::rename(&self.path, older(&self.path))?;
        }
        // Begins with the end of the line before, so that one that was torn spoils nothing after it.
        let line = format!("\n{}", serde_json::to_string(event)?);
        OpenOptions::new().append(true).create(true).open(&self.path)?.write_all(line.as_bytes())
    }
}

/// The last `last` events of the VM called `name`, oldest first. None if nothing is known of it.
///
/// # Errors
/// If a file is there and cannot be read.
pub(super) fn read(state_dir: &Path, name: &str, last: usize) -> io::Result<Vec<VmEvent>> {
    let path = path(state_dir, name);
    let mut events = Vec::new();
    for file in [older(&path), path] {
        match fs::read(&file) {
            Ok(bytes) => {
                let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
                events.extend(lines.filter_map(|line| serde_json::from_slice::<VmEvent>(line).ok()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    events.drain(..events.len().saturating_sub(last));
    Ok(events)
}

fn path(state_dir: &Path, name: &str) -> PathBuf {
    state_dir.join("events").join(format!("{}.jsonl", escape(name)))
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("jsonl.1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{EventKind, Role};

    fn event(number: u64) -> VmEvent {
        VmEvent {
            unix_ms: number,
            kind: EventKind::State,
            role: Role::Primary,
            state: "protected".to_owned(),
            generation: 3,
            epoch: number,
            text: "a line\nof two".to_owned(),
        }
    }

    #[test]
    fn events_are_read_back_oldest_first_also_by_another_life() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(read(dir.path(), "../web 1", 9).expect("no file is no error"), []);
        (1..=2).for_each(|number| File::new(dir.path(), "../web 1").append(&event(number)));
        assert_eq!(read(dir.path(), "../web 1", 9).expect("readable"), [event(1), event(2)]);
        assert_eq!(read(dir.path(), "../web 1", 1).expect("readable"), [event(2)]);
        assert_eq!(read(dir.path(), "web-2", 9).expect("readable"), []);
    }

    #[test]
    fn a_torn_line_is_left_out_and_spoils_none_after_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = File::new(dir.path(), "web-1");
        log.append(&event(1));
        let whole = fs::read(&log.path).expect("written");
        fs::write(&log.path, &whole[..whole.len() - 5]).expect("room");
        log.append(&event(2));
        assert_eq!(read(dir.path(), "web-1", 9).expect("readable"), [event(2)]);
    }

    #[test]
    fn the_newest_are_kept_and_the_rest_is_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = File::new(dir.path(), "web-1");
        let line = serde_json::to_string(&event(1)).expect("plain data").len() as u64;
        let enough = 4 * FILE_MAX / line;
        (0..enough).for_each(|number| log.append(&event(number)));
        let kept = read(dir.path(), "web-1", usize::MAX).expect("readable");
        assert_eq!(kept.last().map(|event| event.epoch), Some(enough - 1));
        assert!(kept.windows(2).all(|pair| pair[0].epoch + 1 == pair[1].epoch), "none is missing in between");
        let bytes = kept.len() as u64 * line;
        assert!(bytes >= FILE_MAX && bytes <= 2 * FILE_MAX + 2 * line, "{bytes}");
    }

    #[test]
    fn a_log_that_cannot_be_written_holds_nothing_up() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("events"), "in the way").expect("room");
        let log = File::new(dir.path(), "web-1");
        log.append(&event(1));
        log.append(&event(2));
        assert!(log.failed.load(Ordering::Relaxed));
        read(dir.path(), "web-1", 9).expect_err("not a directory");
    }

    #[test]
    fn a_disk_that_hangs_holds_nobody_up_and_gets_its_lines_later() {
        let dir = tempfile::tempdir().expect("a directory");
        let writer = Writer::start().expect("a thread");
        let log = EventLog::new(&writer, dir.path(), "web-1");
        fs::create_dir(dir.path().join("events")).expect("room");
        // Opening it for writing waits for a reader.
        make_fifo(&log.file.path);
        (1..=3).for_each(|number| log.append(&event(number)));
        writer.catch_up(Duration::from_millis(1));
        let more = (4..=WAITING as u64 + 10).map(event).collect::<Vec<_>>();
        more.iter().for_each(|event| log.append(event));
        assert!(
            writer.hung.load(Ordering::Relaxed) && log.file.failed.load(Ordering::Relaxed),
            "it is told, and bounded"
        );
        let path = log.file.path.clone();
        let reader = std::thread::spawn(move || {
            // Each line is written by an opening of its own.
            let mut lines = Vec::new();
            while lines.len() < 3 {
                let text = fs::read_to_string(&path).expect("readable");
                lines.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned));
            }
            lines
        });
        let lines = reader.join().expect("it reads");
        let first: VmEvent = serde_json::from_str(&lines[0]).expect("a line");
        assert_eq!(first, event(1), "in order");
    }

    fn make_fifo(path: &Path) {
        let made = std::process::Command::new("mkfifo").arg(path).status().expect("mkfifo runs");
        assert!(made.success());
    }
}
