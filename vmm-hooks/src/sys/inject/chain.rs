//! Runs single system calls in a stopped thread so that it comes back to itself with or without us.
//!
//! ```text
//! low  frame     return address = restorer, then all registers, signal mask, pointer to fp     <- rsp during the call
//!      argument  what an ioctl reads and writes
//!      fp        the whole XSAVE image
//!      red zone  128 bytes, not touched
//! high original stack
//! ```
//!
//! One `PTRACE_SETREGS` points the thread at a `syscall; ret` of its own code with `rsp` at the frame. The call returns into the
//! restorer, which is `rt_sigreturn` on that frame: the thread is what it was. Before that one request nothing has changed
//! but bytes below the red zone, where any signal may write at any time; after it the thread needs nobody. A signal that comes
//! meanwhile is handled below the frame; it is passed on, also by our death.

use std::time::{Duration, Instant};

use super::super::process::{PidFd, ProcessError, ProcessMemory};
use super::frame::{self, Place, Resume};
use super::seccomp::{self, Call, Instruction};
use super::tracee::{Registers, Stop, SyscallStop, Tracee};
use super::victim::{self, Code};
use super::{InjectError, Observer, Unsuitable};

/// How long a thread may take to stop when it is asked to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one call may take, handlers of signals that come between included.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Bound on the stops during one call.
const MAX_STOPS: u32 = 10_000;

/// Stack that must be there below what we lay: a signal's own frame on top of it.
const SLACK: u64 = 16 << 10;

const SYSCALL_BYTES: u64 = 2;
const RT_SIGRETURN: u64 = 15;
const USER_CS: u64 = 0x33;

/// Results of an interrupted system call that a thread never sees (`include/linux/errno.h`).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Why a session with one thread failed.
#[derive(Debug)]
pub(super) enum SessionError {
    /// Not this thread, not now. It is unharmed and was let go.
    Unsuitable(Unsuitable),
    /// It makes no sense to try another thread.
    Failed(InjectError),
}

impl From<InjectError> for SessionError {
    fn from(error: InjectError) -> Self {
        Self::Failed(error)
    }
}

impl From<ProcessError> for SessionError {
    fn from(error: ProcessError) -> Self {
        Self::Failed(error.into())
    }
}

/// A stopped thread that calls can be run in.
pub(super) struct Session<'a> {
    tracee: Tracee,
    pid: u32,
    memory: ProcessMemory,
    code: Code,
    place: Place,
    resume: Resume,
    filters: Vec<Vec<Instruction>>,
    observer: &'a mut Observer<'a>,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("tracee", &self.tracee).field("place", &self.place).finish_non_exhaustive()
    }
}

impl<'a> Session<'a> {
    /// Stops thread `tid` of `process` and lays its frame. On error it was let go unharmed, or is let go when the calling thread
    /// ends.
    pub(super) fn begin(process: &PidFd, tid: u32, observer: &'a mut Observer<'a>) -> Result<Self, SessionError> {
        let pid = process.pid();
        let step = |source| SessionError::Failed(InjectError::Trace { pid, source });
        let memory = ProcessMemory::new(process.clone());
        let maps = victim::maps(pid)?;
        let code = victim::find_code(&memory, &maps)?.ok_or(InjectError::NoCode { pid })?;
        let tracee = seize(pid, tid)?;
        observer("seized");
        tracee.interrupt().map_err(step)?;
        observer("interrupt asked for");
        stop(&tracee, pid, observer)?;
        observer("stopped");
        match prepare(&tracee, pid, tid, &memory, code) {
            Ok((place, resume, filters)) => {
                observer("frame laid");
                Ok(Self { tracee, pid, memory, code, place, resume, filters, observer })
            }
            Err(error) => {
                tracee.detach(0).map_err(step)?;
                Err(error)
            }
        }
    }

    fn trace(&self, source: std::io::Error) -> InjectError {
        InjectError::Trace { pid: self.pid, source }
    }

    /// Where `bytes` of an argument lie for the next call.
    pub(super) fn argument(&mut self, bytes: &[u8]) -> Result<u64, InjectError> {
        assert!(bytes.len() as u64 <= frame::ARGUMENT_BYTES, "room is made for {} bytes", frame::ARGUMENT_BYTES);
        self.memory.write(self.place.argument, bytes)?;
        (self.observer)("argument laid");
        Ok(self.place.argument)
    }

    /// Checks that the process may make this call, and come back from it, without being ended for it.
    pub(super) fn check(&self, number: u64, arguments: [u64; 3]) -> Result<(), InjectError> {
        let r = &self.resume.regs;
        let [rdi, rsi, rdx] = arguments;
        let arguments = [rdi, rsi, rdx, r.r10, r.r8, r.r9];
        let call = Call { number, ip: self.code.syscall + SYSCALL_BYTES, arguments };
        let back = Call { number: RT_SIGRETURN, ip: self.code.restored_at, arguments };
        let allowed = [call, back].iter().all(|call| seccomp::allows(&self.filters, call));
        if allowed { Ok(()) } else { Err(InjectError::Seccomp { pid: self.pid }) }
    }

    /// Runs one system call and returns what it returned. Afterwards the thread stands where it stood, itself again.
    pub(super) fn call(&mut self, number: u64, arguments: [u64; 3]) -> Result<i64, InjectError> {
        self.check(number, arguments)?;
        let mut registers = Registers(self.resume.regs);
        let r = &mut registers.0;
        [r.rdi, r.rsi, r.rdx] = arguments;
        (r.rax, r.rip, r.rsp) = (number, self.code.syscall, self.place.frame);
        // No system call is being left: the kernel must not restart one when a signal comes.
        r.orig_rax = u64::MAX;
        self.tracee.set_registers(registers).map_err(|e| self.trace(e))?;
        (self.observer)("call set");
        let deadline = Instant::now() + CALL_TIMEOUT;
        let called = self.code.syscall + SYSCALL_BYTES;
        let frame = self.place.frame;
        let entry =
            |stop| matches!(stop, SyscallStop::Entry { ip, sp, number: n } if (ip, sp, n) == (called, frame, number));
        self.run_until(deadline, entry)?;
        (self.observer)("call entered");
        // The same place again without an exit: the kernel restarted it for a signal.
        let exit = |stop| matches!(stop, SyscallStop::Exit { ip, sp, .. } if (ip, sp) == (called, frame));
        let SyscallStop::Exit { result, .. } = self.run_until(deadline, exit)? else { unreachable!("just matched") };
        (self.observer)("call left");
        let back = frame + 8;
        let leaving =
            |stop| matches!(stop, SyscallStop::Entry { sp, number, .. } if (sp, number) == (back, RT_SIGRETURN));
        self.run_until(deadline, leaving)?;
        (self.observer)("restore entered");
        let (ip, sp) = (self.resume.regs.rip, self.resume.regs.rsp);
        let restored = |stop| matches!(stop, SyscallStop::Exit { ip: i, sp: s, .. } if (i, s) == (ip, sp));
        self.run_until(deadline, restored)?;
        (self.observer)("restored");
        let now = self.tracee.registers().map_err(|e| self.trace(e))?.0;
        assert!(same(&now, &self.resume.regs), "the kernel restored other registers than were laid: {now:?}");
        Ok(result)
    }

    /// Lets the thread run from system call stop to system call stop until `wanted`; signals on their way are passed on.
    fn run_until(
        &mut self,
        deadline: Instant,
        wanted: impl Fn(SyscallStop) -> bool,
    ) -> Result<SyscallStop, InjectError> {
        let mut signal = 0;
        for _ in 0..MAX_STOPS {
            self.tracee.run_to_syscall(signal).map_err(|e| self.trace(e))?;
            (self.observer)("running");
            let stop = self.tracee.wait(deadline).map_err(|e| self.trace(e))?;
            (self.observer)("stop seen");
            match stop {
                Some(Stop::Syscall) => {
                    let stop = self.tracee.syscall_stop().map_err(|e| self.trace(e))?;
                    if wanted(stop) {
                        return Ok(stop);
                    }
                    signal = 0;
                }
                Some(Stop::Signal(number)) => signal = number,
                Some(Stop::Interrupted) => signal = 0,
                Some(Stop::Group) => {
                    self.tracee.detach(0).map_err(|e| self.trace(e))?;
                    return Err(InjectError::Stopped { pid: self.pid });
                }
                Some(Stop::Ended) => return Err(self.ended()),
                None => return Err(InjectError::Unfinished { pid: self.pid }),
            }
        }
        Err(InjectError::Unfinished { pid: self.pid })
    }

    fn ended(&self) -> InjectError {
        InjectError::ThreadEnded { pid: self.pid }
    }

    /// Lets the thread go.
    pub(super) fn end(self) -> Result<(), InjectError> {
        (self.observer)("about to detach");
        self.tracee.detach(0).map_err(|e| self.trace(e))?;
        (self.observer)("detached");
        Ok(())
    }
}

fn seize(pid: u32, tid: u32) -> Result<Tracee, SessionError> {
    Tracee::seize(tid).map_err(|source| match source.raw_os_error() {
        Some(libc::ESRCH) => SessionError::Unsuitable(Unsuitable::Ended),
        Some(libc::EPERM) => match victim::tracer(pid) {
            Some(tracer) => InjectError::Traced { pid, tracer }.into(),
            // A main thread that has ended stays as a zombie while the others run.
            None if zombie(pid, tid) => SessionError::Unsuitable(Unsuitable::Ended),
            None => InjectError::NotAllowed { pid, source }.into(),
        },
        _ => InjectError::Trace { pid, source }.into(),
    })
}

fn zombie(pid: u32, tid: u32) -> bool {
    victim::status(&format!("/proc/{pid}/task/{tid}/status"), "State").is_none_or(|state| state.starts_with(['Z', 'X']))
}

/// Waits until the thread stands on our demand; signals that come first are passed on.
pub(super) fn stop(tracee: &Tracee, pid: u32, observer: &mut Observer<'_>) -> Result<(), SessionError> {
    let step = |source| SessionError::Failed(InjectError::Trace { pid, source });
    let deadline = Instant::now() + STOP_TIMEOUT;
    for _ in 0..MAX_STOPS {
        let stop = tracee.wait(deadline).map_err(step)?;
        observer("first stop seen");
        match stop {
            Some(Stop::Interrupted) => return Ok(()),
            Some(Stop::Signal(signal)) => tracee.run_to_syscall(signal).map_err(step)?,
            Some(Stop::Syscall) => tracee.run_to_syscall(0).map_err(step)?,
            Some(Stop::Group) => {
                tracee.detach(0).map_err(step)?;
                return Err(InjectError::Stopped { pid }.into());
            }
            Some(Stop::Ended) => return Err(SessionError::Unsuitable(Unsuitable::Ended)),
            // It cannot be let go while it does not stand; the end of our thread does that.
            None => break,
        }
    }
    Err(SessionError::Unsuitable(Unsuitable::DoesNotStop))
}

/// Checks that the stopped thread can be borrowed, and lays its frame.
fn prepare(
    tracee: &Tracee,
    pid: u32,
    tid: u32,
    memory: &ProcessMemory,
    code: Code,
) -> Result<(Place, Resume, Vec<Vec<Instruction>>), SessionError> {
    let step = |source| SessionError::Failed(InjectError::Trace { pid, source });
    let regs = tracee.registers().map_err(step)?.0;
    if regs.cs != USER_CS {
        return Err(InjectError::Not64Bit { pid }.into());
    }
    let features = victim::status(&format!("/proc/{pid}/task/{tid}/status"), "x86_Thread_features");
    if features.is_some_and(|features| features.split_whitespace().any(|feature| feature == "shstk")) {
        return Err(InjectError::ShadowStack { pid }.into());
    }
    let filters = match victim::status(&format!("/proc/{pid}/task/{tid}/status"), "Seccomp").as_deref() {
        None | Some("0") => Vec::new(),
        Some("2") => tracee.seccomp_filters().map_err(|source| InjectError::SeccompUnknown { pid, source })?,
        Some(_) => return Err(InjectError::Seccomp { pid }.into()),
    };
    if in_rseq(tracee, memory, regs.rip).map_err(step)? {
        return Err(SessionError::Unsuitable(Unsuitable::RestartableSequence));
    }
    let regs = restarted(regs).ok_or(SessionError::Unsuitable(Unsuitable::RestartBlock))?;
    let image = tracee.xstate().map_err(step)?;
    let fp = frame::fp_image(&image).ok_or(InjectError::FloatingPoint { pid, bytes: image.len() })?;
    let sigmask = tracee.signal_mask().map_err(step)?;
    let place = frame::place(regs.rsp, fp.len());
    let place = place.ok_or(SessionError::Unsuitable(Unsuitable::SmallStack))?;
    let needed = place.frame.saturating_sub(SLACK)..regs.rsp;
    if !victim::writable(&victim::maps(pid)?, &needed) {
        return Err(SessionError::Unsuitable(Unsuitable::SmallStack));
    }
    if !victim::code_is_there(memory, code)? {
        return Err(InjectError::NoCode { pid }.into());
    }
    let resume = Resume { regs, sigmask, fp };
    let bytes = frame::build(place, code.restorer, &resume);
    memory.write(place.frame, &bytes)?;
    let mut laid = vec![0; bytes.len()];
    memory.read(place.frame, &mut laid)?;
    assert!(laid == bytes, "memory of a stopped thread's stack reads other than it was written");
    Ok((place, resume, filters))
}

/// The registers as they are to be restored: an interrupted system call is made again, as the kernel would have it when no
/// handler runs. `None` if only the kernel knows how to go on with it.
fn restarted(mut regs: libc::user_regs_struct) -> Option<libc::user_regs_struct> {
    if regs.orig_rax.cast_signed() >= 0 {
        match regs.rax.cast_signed() {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
                regs.rax = regs.orig_rax;
                regs.rip -= SYSCALL_BYTES;
            }
            ERESTART_RESTARTBLOCK => return None,
            _ => {}
        }
    }
    regs.orig_rax = u64::MAX;
    Some(regs)
}

/// Whether the thread is inside a restartable sequence, which the kernel would abort where we would not.
fn in_rseq(tracee: &Tracee, memory: &ProcessMemory, rip: u64) -> std::io::Result<bool> {
    let Some(area) = tracee.rseq()? else { return Ok(false) };
    let word = |address: u64| -> std::io::Result<u64> {
        let mut bytes = [0; 8];
        memory.read(address, &mut bytes).map_err(std::io::Error::other)?;
        Ok(u64::from_le_bytes(bytes))
    };
    // `struct rseq` has its `rseq_cs` at 8; `struct rseq_cs` has `start_ip` at 8 and `post_commit_offset` at 16.
    let sequence = word(area + 8)?;
    if sequence == 0 {
        return Ok(false);
    }
    Ok(rip.wrapping_sub(word(sequence + 8)?) < word(sequence + 16)?)
}

/// Whether two register sets are the same to the program. `orig_rax` belongs to the kernel; bit 1 of the flags is always set.
fn same(a: &libc::user_regs_struct, b: &libc::user_regs_struct) -> bool {
    let words = |r: &libc::user_regs_struct| {
        [
            r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx,
            r.rsp, r.rip, r.cs, r.ss, r.ds, r.es, r.fs, r.gs, r.fs_base, r.gs_base,
        ]
    };
    words(a) == words(b) && a.eflags | 2 == b.eflags | 2
}
