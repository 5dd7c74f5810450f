//! Gives an unmodified, running process a userfaultfd that write-tracks its memory, and takes it away again.
//!
//! Promise: the process is unharmed, whatever happens, also if we are killed at any step. No byte of its code is changed. One
//! of its threads is stopped by ptrace for a moment and makes the calls itself (`chain.rs` tells how it comes back to itself
//! without us): `userfaultfd`, `ioctl` (`UFFDIO_API`, then `UFFDIO_REGISTER` for each range), and later `close`. An attachment
//! that is cut off leaves at most one idle userfaultfd, which the next one takes over.
//!
//! What a program may notice is what any debugger causes: calls that Linux does not restart after a stop (`epoll_wait`,
//! `KVM_RUN`) return `EINTR` once in that one thread.
//!
//! The userfaultfd is made with `UFFD_USER_MODE_ONLY`: any process may have such a one, and asynchronous write-tracking needs
//! no more, for the kernel resolves the faults itself, those of its own accesses included.

mod chain;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod seccomp;
mod tracee;
mod victim;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::process::{PidFd, ProcessError};
use chain::{Session, SessionError};
use victim::Userfaultfd;

/// Bound on the times all threads are tried.
const ROUNDS: u32 = 40;

/// Pause between two rounds.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(5);

/// Bound on the threads tried in one round.
const MAX_THREADS: usize = 64;

/// How long a userfaultfd that was not set up must stay so to be taken for one that nobody is about to set up.
const IDLE_FOR: Duration = Duration::from_millis(200);

const SYS_CLOSE: u64 = 3;
const SYS_IOCTL: u64 = 16;
const SYS_USERFAULTFD: u64 = 323;
/// `O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY`.
const UFFD_FLAGS: u64 = 0o2_000_000 | 0o4_000 | 1;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`, 24 bytes.
const UFFDIO_API: u64 = (3 << 30) | (24 << 16) | (0xaa << 8) | 0x3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`, 32 bytes.
const UFFDIO_REGISTER: u64 = (3 << 30) | (32 << 16) | (0xaa << 8);
const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_WP: u64 = 1 << 1;

/// Called at each step with its name. Tests kill the injector there.
type Observer<'a> = dyn FnMut(&'static str) + Send + 'a;

/// The userfaultfd in the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injected {
    /// Its descriptor number in the process.
    pub fd: u32,
    /// Whether it was there already, left by an earlier attachment of ours, and was taken over.
    pub reused: bool,
}

/// Why one thread could not be borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unsuitable {
    /// It ended meanwhile.
    Ended,
    /// It did not stop in time: it is in uninterruptible sleep.
    DoesNotStop,
    /// It waits in a call that only the kernel knows how to go on with (a sleep with a time limit).
    RestartBlock,
    /// It was within a restartable sequence (rseq).
    RestartableSequence,
    /// There is no room on its stack.
    SmallStack,
}

/// Why a process could not be given a userfaultfd, or not be freed of it. It is unharmed in each case.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// It is traced already.
    #[error("process {pid} is being traced by process {tracer}, such as a debugger; end that first")]
    Traced {
        /// The process.
        pid: u32,
        /// Who traces it.
        tracer: u32,
    },
    /// The kernel forbids us to trace it.
    #[error("process {pid} may not be traced: run as root (CAP_SYS_PTRACE), and see kernel.yama.ptrace_scope")]
    NotAllowed {
        /// The process.
        pid: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// It is no 64-bit program.
    #[error("process {pid} is no 64-bit x86 program")]
    Not64Bit {
        /// The process.
        pid: u32,
    },
    /// It runs with shadow stacks.
    #[error("process {pid} runs with shadow stacks (CET), under which no call can be borrowed from it")]
    ShadowStack {
        /// The process.
        pid: u32,
    },
    /// Its seccomp filter does not allow a call that is needed.
    #[error("the seccomp filter of process {pid} forbids a call that tracking needs (userfaultfd, ioctl, close)")]
    Seccomp {
        /// The process.
        pid: u32,
    },
    /// It has a seccomp filter that cannot be read.
    #[error("process {pid} has a seccomp filter that cannot be read, so it is not known what it forbids")]
    SeccompUnknown {
        /// The process.
        pid: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// It is stopped by job control.
    #[error("process {pid} is stopped by a signal; continue it (kill -CONT {pid}) and try again")]
    Stopped {
        /// The process.
        pid: u32,
    },
    /// Its code holds no instructions to borrow.
    #[error("process {pid} maps no code with `syscall; ret` and a signal restorer (is its C library linked in?)")]
    NoCode {
        /// The process.
        pid: u32,
    },
    /// Its floating point state is of no known form.
    #[error("the floating point state of process {pid} has {bytes} bytes, which is no known form")]
    FloatingPoint {
        /// The process.
        pid: u32,
        /// How long it is.
        bytes: usize,
    },
    /// A userfaultfd of its own is in the way.
    #[error("process {pid} has a userfaultfd of its own (descriptor {fd}), as for a background snapshot or postcopy")]
    ForeignUserfaultfd {
        /// The process.
        pid: u32,
        /// The descriptor.
        fd: u32,
    },
    /// No thread could be borrowed.
    #[error("no thread of process {pid} could be borrowed for a moment ({reasons:?}); try again")]
    NoThread {
        /// The process.
        pid: u32,
        /// What was in the way.
        reasons: BTreeSet<Unsuitable>,
    },
    /// The borrowed thread ended.
    #[error("the thread of process {pid} that was borrowed has ended; try again")]
    ThreadEnded {
        /// The process.
        pid: u32,
    },
    /// A call did not come to its end in time. It does so by itself, without us.
    #[error("a call borrowed from process {pid} did not end in time; it ends by itself, try again later")]
    Unfinished {
        /// The process.
        pid: u32,
    },
    /// A call in the process was refused by the kernel.
    #[error("the kernel refused {what} to process {pid}")]
    Refused {
        /// The process.
        pid: u32,
        /// Which call.
        what: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Tracing it failed.
    #[error("tracing process {pid} failed")]
    Trace {
        /// The process.
        pid: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// It could not be looked at, or has ended.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Gives the process a userfaultfd that write-tracks `ranges` (addresses, page-aligned), or takes over the one that an earlier
/// attachment of ours left. Blocks for some milliseconds.
///
/// # Errors
/// See [`InjectError`]. What was made until then is closed again where that is possible.
pub fn attach(process: &PidFd, ranges: &[Range<u64>]) -> Result<Injected, InjectError> {
    attach_observed(process, ranges, None, &mut |_| {})
}

/// Closes the userfaultfd again, and with it the tracking. A process that has none of ours any more is no error.
///
/// # Errors
/// See [`InjectError`]; the userfaultfd may then still be there.
pub fn detach(process: &PidFd, injected: &Injected) -> Result<(), InjectError> {
    detach_observed(process, injected, None, &mut |_| {})
}

/// The userfaultfd in the process that an attachment of ours left there, if there is one. Tells what is, and changes nothing.
///
/// # Errors
/// [`InjectError::ForeignUserfaultfd`] if the process has one of its own.
pub fn find_existing(process: &PidFd) -> Result<Option<Injected>, InjectError> {
    Ok(survey(process)?.first().map(|&(fd, _)| Injected { fd, reused: true }))
}

/// Whether this kernel gives asynchronous write-tracking to an ordinary process, by trying it on this one.
///
/// # Errors
/// The kernel's reason why not: `ENOSYS` without userfaultfd, `EINVAL` before Linux 6.7.
pub fn kernel_supports() -> io::Result<()> {
    let flags = libc::c_long::try_from(UFFD_FLAGS).expect("small");
    // SAFETY: userfaultfd takes one number and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the descriptor was just made, and nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = [UFFD_API, victim::FEATURES, 0];
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, three 64-bit words, through the pointer: `api`, alive and ours.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Our userfaultfds in the process (descriptor, whether it was set up).
fn survey(process: &PidFd) -> Result<Vec<(u32, bool)>, InjectError> {
    let mut found = victim::userfaultfds(process)?;
    if found.iter().any(|one| matches!(one, Userfaultfd::Idle(_))) {
        // The process might be about to set it up itself: look again.
        std::thread::sleep(IDLE_FOR);
        let later = victim::userfaultfds(process)?;
        found.retain(|one| !matches!(one, Userfaultfd::Idle(_)) || later.contains(one));
        found.extend(later.into_iter().filter(|one| matches!(one, Userfaultfd::Foreign(_))));
    }
    let ours = |one| match one {
        Userfaultfd::Ours(fd) => Ok((fd, true)),
        Userfaultfd::Idle(fd) => Ok((fd, false)),
        Userfaultfd::Foreign(fd) => Err(InjectError::ForeignUserfaultfd { pid: process.pid(), fd }),
    };
    found.into_iter().map(ours).collect()
}

fn attach_observed(
    process: &PidFd,
    ranges: &[Range<u64>],
    only: Option<u32>,
    observer: &mut Observer<'_>,
) -> Result<Injected, InjectError> {
    let existing = survey(process)?;
    borrow_thread(process, only, observer, |session| {
        let mut call = Calls { session, pid: process.pid() };
        let (fd, ready) = match existing.first() {
            Some(&found) => found,
            None => (call.open()?, false),
        };
        let result = existing.iter().skip(1).try_for_each(|&(extra, _)| call.close(extra));
        let result = result.and_then(|()| if ready { Ok(()) } else { call.set_up(fd) });
        let result = result.and_then(|()| ranges.iter().try_for_each(|range| call.register(fd, range)));
        if let Err(error) = result {
            // The first failure is the one to tell; a descriptor that stays is found by the next attachment.
            if let Err(second) = call.close(fd) {
                tracing::warn!(error = %second, "the userfaultfd could not be closed again");
            }
            return Err(error);
        }
        Ok(Injected { fd, reused: !existing.is_empty() })
    })
}

fn detach_observed(
    process: &PidFd,
    injected: &Injected,
    only: Option<u32>,
    observer: &mut Observer<'_>,
) -> Result<(), InjectError> {
    let ours = survey(process)?;
    if !ours.iter().any(|&(fd, _)| fd == injected.fd) {
        return Ok(());
    }
    borrow_thread(process, only, observer, |session| {
        let mut call = Calls { session, pid: process.pid() };
        ours.iter().try_for_each(|&(fd, _)| call.close(fd))
    })
}

/// The calls that are made in the process.
struct Calls<'s, 'o> {
    session: &'s mut Session<'o>,
    pid: u32,
}

impl Calls<'_, '_> {
    fn checked(&self, result: i64, what: impl FnOnce() -> String) -> Result<u64, InjectError> {
        u64::try_from(result).map_err(|_| {
            let source = io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EINVAL));
            InjectError::Refused { pid: self.pid, what: what(), source }
        })
    }

    fn open(&mut self) -> Result<u32, InjectError> {
        // What could not be closed again is not opened.
        self.session.check(SYS_CLOSE, [0; 3])?;
        let result = self.session.call(SYS_USERFAULTFD, [UFFD_FLAGS, 0, 0])?;
        let fd = self.checked(result, || "a userfaultfd".to_owned())?;
        Ok(u32::try_from(fd).expect("descriptors are small"))
    }

    fn set_up(&mut self, fd: u32) -> Result<(), InjectError> {
        let argument = self.session.argument(&words(&[UFFD_API, victim::FEATURES, 0]))?;
        let result = self.session.call(SYS_IOCTL, [fd.into(), UFFDIO_API, argument])?;
        self.checked(result, || "asynchronous write tracking (Linux 6.7 and newer have it)".to_owned()).map(|_| ())
    }

    fn register(&mut self, fd: u32, range: &Range<u64>) -> Result<(), InjectError> {
        let bytes = words(&[range.start, range.end - range.start, REGISTER_MODE_WP, 0]);
        let argument = self.session.argument(&bytes)?;
        let result = self.session.call(SYS_IOCTL, [fd.into(), UFFDIO_REGISTER, argument])?;
        self.checked(result, || format!("tracking of memory at {:#x}..{:#x}", range.start, range.end)).map(|_| ())
    }

    fn close(&mut self, fd: u32) -> Result<(), InjectError> {
        let result = self.session.call(SYS_CLOSE, [fd.into(), 0, 0])?;
        self.checked(result, || format!("closing descriptor {fd}")).map(|_| ())
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Runs `work` in the first thread of the process that can be borrowed (of all, or of `only` one).
fn borrow_thread<T: Send>(
    process: &PidFd,
    only: Option<u32>,
    observer: &mut Observer<'_>,
    work: impl Fn(&mut Session<'_>) -> Result<T, InjectError> + Sync,
) -> Result<T, InjectError> {
    let pid = process.pid();
    if let Some(tracer) = victim::tracer(pid) {
        return Err(InjectError::Traced { pid, tracer });
    }
    let mut reasons = BTreeSet::new();
    for round in 0..ROUNDS {
        if round > 0 {
            std::thread::sleep(BETWEEN_ROUNDS);
        }
        let threads = match only {
            Some(tid) => vec![tid],
            None => victim::threads(pid)?,
        };
        for tid in threads.into_iter().take(MAX_THREADS) {
            match try_thread(process, tid, observer, &work) {
                Ok(done) => return Ok(done),
                Err(SessionError::Unsuitable(reason)) => reasons.insert(reason),
                Err(SessionError::Failed(error)) => {
                    return Err(if process.has_exited() { ProcessError::Gone { pid }.into() } else { error });
                }
            };
        }
        if process.has_exited() {
            return Err(ProcessError::Gone { pid }.into());
        }
        // Each further round would wait as long again.
        if reasons.contains(&Unsuitable::DoesNotStop) {
            break;
        }
    }
    Err(InjectError::NoThread { pid, reasons })
}

/// One attempt with one thread, by a thread of ours that lives as long as the attempt: at its end the kernel lets go of whatever
/// could not be let go of otherwise.
fn try_thread<T: Send>(
    process: &PidFd,
    tid: u32,
    observer: &mut Observer<'_>,
    work: &(impl Fn(&mut Session<'_>) -> Result<T, InjectError> + Sync),
) -> Result<T, SessionError> {
    let attempt = move || {
        let mut observe = |step: &'static str| observer(step);
        let mut session = Session::begin(process, tid, &mut observe)?;
        let result = work(&mut session);
        // After these the thread is not ours to let go, or is gone.
        let gone = matches!(
            result,
            Err(InjectError::Stopped { .. } | InjectError::Unfinished { .. } | InjectError::ThreadEnded { .. })
        );
        if !gone {
            session.end()?;
        }
        Ok(result?)
    };
    std::thread::scope(|scope| {
        let attempt = std::thread::Builder::new().name("inject".to_owned()).spawn_scoped(scope, attempt);
        let attempt = attempt.map_err(|source| InjectError::Trace { pid: process.pid(), source })?;
        attempt.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
