//! One QEMU process that we started to load a guest into.
//!
//! It lives in a session of its own and writes to files, so that it survives its maker; it is ended through its pidfd.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::leftovers::note_process;
use crate::guest::{Fence, GuestError, GuestErrorKind};
use crate::layout::{Layout, PAGE_SIZE};
use crate::qemu::OUR_PREFIX;
use crate::qemu::cmdline::qmp_path;
use crate::qemu::qmp::{Qmp, QmpError};
use crate::qemu::ram::{self, RamBlock};
use crate::sys::memory::{BlockMemory, SharedMemory};
use crate::sys::process::{PidFd, ProcessError, ProcessMemory};

/// How long a QEMU may take until its monitor answers.
pub(super) const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to load device state.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a killed one may take to end.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a QEMU that must not run is killed again, and its maker says that it waits.
const KILL_AGAIN: Duration = Duration::from_secs(5);

/// The longest that the end of a QEMU that was let go is waited for at once.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);

/// How often a QEMU that starts is asked whether it listens.
pub(super) const RETRY: Duration = Duration::from_millis(2);

/// Bytes of a log that are quoted in an error.
const LOG_TAIL: u64 = 1000;

/// What a QEMU process writes to.
const LOG: &str = "qemu.log";

/// Ends whatever process a twin has at the moment, and keeps it from starting another.
#[derive(Debug, Default)]
pub(super) struct TwinFence {
    state: Mutex<FenceState>,
}

#[derive(Debug, Default)]
struct FenceState {
    current: Option<PidFd>,
    fenced: bool,
}

impl TwinFence {
    fn lock(&self) -> MutexGuard<'_, FenceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on this is the process to end. `false` if the twin was fenced.
    fn follow(&self, process: &PidFd) -> bool {
        let mut state = self.lock();
        state.current = Some(process.clone());
        !state.fenced
    }

    /// Whether it was fenced.
    pub(super) fn asked(&self) -> bool {
        self.lock().fenced
    }
}

impl Fence for TwinFence {
    fn fence(&self) -> Result<(), GuestError> {
        let current = {
            let mut state = self.lock();
            state.fenced = true;
            state.current.clone()
        };
        current.map_or(Ok(()), |process| process.kill_confirmed(KILL_TIMEOUT).map_err(GuestError::from))
    }

    fn ended(&self) -> bool {
        self.lock().current.as_ref().is_none_or(PidFd::has_exited)
    }
}

/// What to start.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    /// For messages.
    pub(super) name: &'a str,
    /// The program.
    pub(super) binary: &'a Path,
    /// Its arguments.
    pub(super) arguments: &'a [String],
    /// Where its monitor and log are.
    pub(super) run_dir: &'a Path,
    /// The version that it must have.
    pub(super) version: &'a str,
    /// The memory that it must have.
    pub(super) layout: &'a Layout,
}

/// A QEMU that waits for device state, or that has loaded it. Ended when it is dropped, unless it is let go.
#[derive(Debug)]
pub(super) struct Machine {
    name: String,
    run_dir: PathBuf,
    process: PidFd,
    child: Option<Child>,
    qmp: Qmp,
    blocks: Vec<RamBlock>,
}

impl Machine {
    /// Starts a QEMU and waits until it waits for us.
    pub(super) fn launch(launch: &Launch<'_>, fence: Option<&TwinFence>) -> Result<Self, GuestError> {
        let socket = qmp_path(launch.run_dir);
        let _ = fs::remove_file(&socket);
        let log_path = launch.run_dir.join(LOG);
        let refused = |what: String| GuestError::new(GuestErrorKind::Refused, what);
        let open_log = || OpenOptions::new().create(true).append(true).open(&log_path);
        let log = open_log().map_err(|error| refused(format!("cannot write {}: {error}", log_path.display())))?;
        let errors =
            log.try_clone().map_err(|error| refused(format!("cannot write {}: {error}", log_path.display())))?;
        // `setsid` replaces itself by QEMU in a session of its own, so that no signal to ours reaches it.
        let child = Command::new("setsid")
            .arg(launch.binary)
            .args(launch.arguments)
            .current_dir(launch.run_dir)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|error| refused(format!("cannot start {}: {error}", launch.binary.display())))?;
        let process = match PidFd::open(child.id()) {
            Ok(process) => process,
            Err(error) => return Err(reap(child, error.into())),
        };
        if let Err(error) = note_process(launch.run_dir, &process) {
            let error = refused(format!("cannot write to {}: {error}", launch.run_dir.display()));
            let _ = process.kill_confirmed(KILL_TIMEOUT);
            return Err(reap(child, error));
        }
        let allowed = fence.is_none_or(|fence| fence.follow(&process));
        let greeted = if allowed {
            greet(&socket, &process)
        } else {
            Err(GuestError::new(GuestErrorKind::Gone, "the twin was fenced"))
        };
        let qmp = match greeted {
            Ok(qmp) => qmp,
            Err(error) => {
                let error = with_log(error, launch.name, launch.run_dir);
                let _ = process.kill_confirmed(KILL_TIMEOUT);
                return Err(reap(child, error));
            }
        };
        let mut machine = Self {
            name: launch.name.to_owned(),
            run_dir: launch.run_dir.to_owned(),
            process,
            child: Some(child),
            qmp,
            blocks: Vec::new(),
        };
        machine.check(launch)?;
        Ok(machine)
    }

    fn check(&mut self, launch: &Launch<'_>) -> Result<(), GuestError> {
        if self.qmp.version != launch.version {
            let message = format!("this host's QEMU is {}, the primary's is {}", self.qmp.version, launch.version);
            return Err(
                GuestError::new(GuestErrorKind::Refused, message).advise("install the same version on both hosts")
            );
        }
        let capability = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.qmp.execute("migrate-set-capabilities", capability)?;
        self.blocks = ram::find(&mut self.qmp, self.process.pid())?;
        let mut ours: Vec<(&str, u64)> =
            self.blocks.iter().map(|block| (block.name.as_str(), block.total.div_ceil(PAGE_SIZE as u64))).collect();
        let mut theirs: Vec<(&str, u64)> =
            launch.layout.blocks().iter().map(|block| (block.name.as_str(), block.pages)).collect();
        ours.sort_unstable();
        theirs.sort_unstable();
        if let Some(block) = theirs
            .iter()
            .find(|block| !ours.contains(block))
            .or_else(|| ours.iter().find(|block| !theirs.contains(block)))
        {
            let message = format!("the twin's memory differs from the primary's in {} ({} pages)", block.0, block.1);
            return Err(
                GuestError::new(GuestErrorKind::Refused, message).advise("install the same firmware on both hosts")
            );
        }
        Ok(())
    }

    /// Loads device state. The guest stands afterwards.
    pub(super) fn load(&mut self, device: &[u8]) -> Result<(), GuestError> {
        self.try_load(device).map_err(|error| with_log(error, &self.name, &self.run_dir))
    }

    fn try_load(&mut self, device: &[u8]) -> Result<(), GuestError> {
        let failed = |error: io::Error| {
            GuestError::new(GuestErrorKind::Failed, "cannot keep the device state in memory").because(error)
        };
        let stream =
            memfd_create(format!("{OUR_PREFIX}load"), MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let mut stream = File::from(stream);
        stream.write_all(device).and_then(|()| stream.seek(SeekFrom::Start(0)).map(drop)).map_err(failed)?;
        let fd_name = format!("{OUR_PREFIX}load");
        self.qmp.execute_with_fd("getfd", json!({ "fdname": fd_name }), stream.as_fd())?;
        self.qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{fd_name}") }))?;
        let deadline = Instant::now() + LOAD_TIMEOUT;
        let ended = self.qmp.wait_event(deadline, |event| {
            event.name == "MIGRATION" && matches!(event.data["status"].as_str(), Some("completed" | "failed"))
        })?;
        let Some(ended) = ended else {
            return Err(QmpError::TimedOut { command: "migrate-incoming".to_owned(), after: LOAD_TIMEOUT }.into());
        };
        if ended.data["status"] == "failed" {
            return Err(GuestError::new(GuestErrorKind::Failed, "QEMU could not load the device state"));
        }
        // The event comes a moment before the state changes.
        while self.status()? == "inmigrate" {
            if Instant::now() >= deadline {
                return Err(QmpError::TimedOut { command: "migrate-incoming".to_owned(), after: LOAD_TIMEOUT }.into());
            }
        }
        Ok(())
    }

    fn status(&mut self) -> Result<String, QmpError> {
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Copies the blocks that `is_shared` does not name from `memory` into QEMU.
    pub(super) fn write_blocks(
        &self,
        memory: &BlockMemory,
        is_shared: impl Fn(&str) -> bool,
    ) -> Result<(), GuestError> {
        let target = ProcessMemory::new(self.process.clone());
        for (index, block) in memory.layout().blocks().iter().enumerate().filter(|(_, block)| !is_shared(&block.name)) {
            let theirs = self.blocks.iter().find(|theirs| theirs.name == block.name);
            let (Some(theirs), Some(ours)) = (theirs, memory.block(index)) else { continue };
            write_block(&target, theirs.host, ours)?;
        }
        Ok(())
    }

    /// Lets the guest run.
    ///
    /// A QEMU that was told so and does not say yes may run at any later time, beside the primary. It is killed, and
    /// this returns only once its end is confirmed, however long that takes: so an error means that it does not run.
    pub(super) fn run(mut self) -> Result<Self, GuestError> {
        let Err(error) = self.qmp.execute("cont", json!({})) else { return Ok(self) };
        let error = GuestError::from(error);
        self.kill_for_sure();
        let message = format!("twin {} was told to run and did not confirm it: {}", self.name, error.message);
        Err(GuestError { message, kind: GuestErrorKind::Failed, ..error }.advise("it was ended and does not run"))
    }

    fn kill_for_sure(&mut self) {
        while let Err(error) = self.process.kill_confirmed(KILL_AGAIN) {
            let pid = self.process.pid();
            tracing::error!(twin = self.name, pid, %error, "a twin that must not run has not ended; killing it again");
            if !matches!(error, ProcessError::NotConfirmed { .. }) {
                let _ = self.process.wait_exit(KILL_AGAIN);
            }
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    /// Tells the network where the guest is now, a few times.
    pub(super) fn announce(&mut self) -> Result<(), GuestError> {
        self.qmp.execute("announce-self", json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 }))?;
        Ok(())
    }

    /// Its process.
    pub(super) fn process(&self) -> &PidFd {
        &self.process
    }

    /// Kills it and confirms its end.
    pub(super) fn end(mut self) -> Result<(), GuestError> {
        self.kill()
    }

    fn kill(&mut self) -> Result<(), GuestError> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        self.process.kill_confirmed(KILL_TIMEOUT)?;
        child.wait().map_err(|error| GuestError::new(GuestErrorKind::Failed, "cannot reap QEMU").because(error))?;
        Ok(())
    }

    /// Lets it go on without us. Its end is still reaped while this process is there.
    pub(super) fn let_go(mut self) {
        if let Some(mut child) = self.child.take() {
            let process = self.process.clone();
            // It must not be waited for before it has ended: such a wait, by whatever thread of this process, takes the stops away
            // that the next attachment to it waits for.
            let reap = move || {
                while !process.wait_exit(LOOK_AGAIN) {}
                child.wait()
            };
            // Without the thread its end would leave a zombie, which harms nobody.
            let _ = thread::Builder::new().name("reaper".to_owned()).spawn(reap);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!(pid = self.process.pid(), %error, "a QEMU of ours was left behind");
        }
    }
}

/// Waits until the monitor greets, while the process lives.
fn greet(socket: &Path, process: &PidFd) -> Result<Qmp, GuestError> {
    let deadline = Instant::now() + LAUNCH_TIMEOUT;
    loop {
        let error = match Qmp::connect(socket) {
            Ok(qmp) => return Ok(qmp),
            Err(error) => error,
        };
        let starting = matches!(error, QmpError::Connect { .. } | QmpError::NoGreeting { .. });
        // One that gives up while it starts closes its monitor a moment before it has ended.
        let broke = matches!(error, QmpError::Closed | QmpError::Io(_));
        if process.wait_exit(if broke { KILL_TIMEOUT } else { RETRY }) {
            return Err(GuestError::new(GuestErrorKind::Refused, "QEMU ended while it started"));
        }
        if !starting || Instant::now() >= deadline {
            return Err(error.into());
        }
    }
}

fn reap(mut child: Child, error: GuestError) -> GuestError {
    let _ = child.kill();
    let _ = child.wait();
    error
}

/// Adds the end of QEMU's log to an error.
fn with_log(error: GuestError, name: &str, run_dir: &Path) -> GuestError {
    let tail = || -> io::Result<String> {
        let mut log = File::open(run_dir.join(LOG))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        log.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().replace('\n', "; "))
    };
    let said =
        tail().ok().filter(|said| !said.is_empty()).map(|said| format!("; QEMU said: {said}")).unwrap_or_default();
    let message = format!("twin {name}: {}{said}", error.message);
    GuestError { message, ..error }
}

/// Copies a block to `host` in QEMU. Holes are zeroes there as here, because the QEMU is new, but for what its own start wrote;
/// that is found by reading.
fn write_block(target: &ProcessMemory, host: u64, ours: &SharedMemory) -> Result<(), GuestError> {
    const CHUNK: usize = 256 * PAGE_SIZE;
    let (mut mine, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < ours.length() {
        let length = usize::try_from(ours.length() - at).map_or(CHUNK, |left| left.min(CHUNK));
        ours.read(at, &mut mine[..length]);
        target.read(host + at, &mut theirs[..length])?;
        for page in (0..length).step_by(PAGE_SIZE) {
            let range = page..(page + PAGE_SIZE).min(length);
            if mine[range.clone()] != theirs[range.clone()] {
                target.write(host + at + page as u64, &mine[range])?;
            }
        }
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn one_that_was_let_go_can_be_attached_to_by_the_process_that_made_it() {
        let machine = breaks_at_cont(Path::new("/"));
        let process = machine.process().clone();
        machine.let_go();
        for round in 0..100 {
            let attached = crate::sys::inject::attach(&process, &[]);
            let attached = attached.unwrap_or_else(|error| panic!("round {round}: {error}"));
            crate::sys::inject::detach(&process, &attached).unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
        process.kill_confirmed(KILL_TIMEOUT).expect("ours");
        let deadline = Instant::now() + KILL_TIMEOUT;
        while Path::new(&format!("/proc/{}", process.pid())).exists() {
            assert!(Instant::now() < deadline, "its end is not reaped");
            thread::yield_now();
        }
    }

    /// A process whose monitor closes instead of answering `cont`, while the process lives.
    pub(in crate::qemu::twin) fn breaks_at_cont(run_dir: &Path) -> Machine {
        let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("cat is installed");
        let process = PidFd::open(child.id()).expect("it lives");
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        thread::spawn(move || {
            writeln!(theirs, r#"{{"QMP":{{"version":{{}}}}}}"#).expect("the client reads");
            for line in BufReader::new(theirs.try_clone().expect("a second handle")).lines() {
                let request: Value = serde_json::from_str(&line.expect("a line")).expect("the client sends JSON");
                if request["execute"] == "cont" {
                    return;
                }
                writeln!(theirs, "{}", json!({ "return": [], "id": request["id"] })).expect("the client reads");
            }
        });
        let qmp = Qmp::over(ours).expect("it greets");
        let name = "test".to_owned();
        Machine { name, run_dir: run_dir.to_owned(), process, child: Some(child), qmp, blocks: Vec::new() }
    }

    #[test]
    fn what_does_not_confirm_that_it_runs_is_dead_before_anybody_hears_of_it() {
        let machine = breaks_at_cont(Path::new("/"));
        let process = machine.process().clone();
        let error = machine.run().expect_err("it did not say yes");
        assert!(process.has_exited(), "it may run later");
        assert_eq!(error.kind, GuestErrorKind::Failed);
    }
}
