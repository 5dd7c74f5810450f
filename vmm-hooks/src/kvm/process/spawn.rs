//! Starting a microVM's process.
//!
//! Promises: it is started by a thread that lives as long as this process, since the kernel ends it with the thread that started it
//! (`PR_SET_PDEATHSIG`). Its only descriptors are its socket, as standard input, and standard error. It is in a process group of its own, so that what
//! a terminal sends to this process does not end it. Dropping a handle kills the process, and waits for its end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::link::{Link, pair};
use crate::guest::{GuestError, GuestErrorKind};
use crate::sys::process::PidFd;

/// Longest wait for the end of a process that was killed.
const END_MAX: Duration = Duration::from_secs(10);

/// What is started as the process of a microVM: it calls [`super::child::main`].
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<String>,
}

impl Program {
    /// A program that takes these arguments, and after them the microVM's name.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, arguments: &[&str]) -> Self {
        Self { path: path.into(), arguments: arguments.iter().map(|&argument| argument.to_owned()).collect() }
    }

    /// The program of this process, also if its file was replaced since.
    #[must_use]
    pub fn own(arguments: &[&str]) -> Self {
        Self::new("/proc/self/exe", arguments)
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Has `work` done by the thread that does not end.
fn by_the_lasting_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    static JOBS: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let jobs = match JOBS.get() {
        Some(jobs) => jobs,
        None => {
            let (sender, jobs) = channel::<Job>();
            let body = move || jobs.iter().for_each(|job| job());
            std::thread::Builder::new().name("us-spawner".to_owned()).spawn(body)?;
            // Whoever was first is taken; the other thread ends, and has started nothing.
            JOBS.get_or_init(|| Mutex::new(sender))
        }
    };
    let ended = || io::Error::other("the thread that starts microVMs has ended");
    let (done, wait) = channel();
    let job: Job = Box::new(move || {
        // Nobody waits only if this process ends.
        let _ = done.send(work());
    });
    jobs.lock().unwrap_or_else(PoisonError::into_inner).send(job).map_err(|_| ended())?;
    wait.recv().map_err(|_| ended())
}

/// A process that was started.
#[derive(Debug)]
pub(super) struct Process {
    handle: PidFd,
    child: Mutex<Child>,
    killed: AtomicBool,
}

impl Process {
    /// Starts one for the microVM called `name`, and the link to it.
    pub(super) fn start(program: &Program, name: &str) -> Result<(Self, Link), GuestError> {
        let failed = |error: io::Error| {
            GuestError::new(GuestErrorKind::Failed, format!("the process of the microVM {name} cannot be started"))
                .because(error)
        };
        let (ours, theirs) = pair().map_err(failed)?;
        let mut command = Command::new(&program.path);
        command.args(&program.arguments).arg(name).current_dir("/").process_group(0);
        command.stdin(theirs).stdout(Stdio::null());
        // The command has our copy of the other end, and is dropped there.
        let spawned = by_the_lasting_thread(move || command.spawn());
        let mut child = spawned.and_then(|child| child).map_err(failed)?;
        let handle = PidFd::open(child.id()).map_err(|error| {
            // It cannot be waited for later. It fails if it has ended, which is as good.
            let _ = child.kill();
            let how = how_it_ended(child.wait().ok());
            let message = format!("the process of the microVM {name} cannot be used: {how}");
            GuestError { message, ..GuestError::from(error) }
        })?;
        let process = Self { handle, child: Mutex::new(child), killed: AtomicBool::new(false) };
        Ok((process, Link::new(ours)))
    }

    pub(super) fn handle(&self) -> &PidFd {
        &self.handle
    }

    /// How it ended, in words; `None`: it has not.
    pub(super) fn end(&self) -> Option<String> {
        if !self.handle.has_exited() {
            return None;
        }
        let status = self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait().ok().flatten();
        Some(how_it_ended(status))
    }

    /// Whether it was ended from here.
    pub(super) fn was_killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    /// Kills it; returns when its end is confirmed.
    pub(super) fn kill(&self) -> Result<(), GuestError> {
        self.killed.store(true, Ordering::SeqCst);
        self.handle.kill_confirmed(END_MAX).map_err(|error| {
            GuestError::from(error).advise("it is mute if it was protected; look whether the host's kernel hangs")
        })?;
        self.end();
        Ok(())
    }
}

fn how_it_ended(status: Option<ExitStatus>) -> String {
    match status.map(|status| (status.signal(), status.code())) {
        Some((Some(signal), _)) => format!("its process was ended by signal {signal}"),
        Some((None, Some(code))) => format!("its process ended with code {code}"),
        _ => "its process has ended".to_owned(),
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::error!(pid = self.handle.pid(), %error, "the process of a microVM could not be ended");
        }
    }
}

/// A descriptor of `/dev/kvm`, to be passed on.
pub(super) fn open_kvm() -> Result<OwnedFd, GuestError> {
    // Says in words what is missing.
    crate::kvm::host()?;
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let refused =
        |error: io::Error| GuestError::new(GuestErrorKind::Refused, "/dev/kvm cannot be opened").because(error);
    Ok(opened.map_err(refused)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_killed_with_its_handle_and_says_how_it_ended() {
        let (process, mut link) =
            Process::start(&Program::new("/bin/sh", &["-c", "exec sleep 1000"]), "none").expect("it is there");
        assert_eq!(process.end(), None);
        let handle = process.handle().clone();
        process.kill().expect("it ends");
        process.kill().expect("it has ended");
        assert_eq!(process.end().as_deref(), Some("its process was ended by signal 9"));
        link.post(&1_u8).expect_err("nobody is there");
        let (process, link) =
            Process::start(&Program::new("/bin/sh", &["-c", "read word; exit 3"]), "none").expect("it is there");
        drop(link);
        assert!(process.handle().wait_exit(Duration::from_secs(30)), "there is nothing to read");
        assert_eq!(process.end().as_deref(), Some("its process ended with code 3"));
        assert!(handle.has_exited());
        // Whether it is over before or after it was looked at.
        match Process::start(&Program::new("/bin/false", &[]), "none") {
            Ok((process, _link)) => assert!(process.handle().wait_exit(Duration::from_secs(30)), "it does nothing"),
            Err(error) => {
                let message = "the process of the microVM none cannot be used: its process ended with code 1";
                assert_eq!((error.kind, error.message.as_str()), (GuestErrorKind::Gone, message));
            }
        }
        Process::start(&Program::new("/nothing/here", &[]), "none").map(drop).expect_err("there is none");
    }
}
