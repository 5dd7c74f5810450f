//! One thread of another process, under ptrace: each request checked, each wait bounded.
//!
//! A tracee must be used from the thread that seized it. When that thread ends, or its process is killed, the kernel lets the
//! tracee run on by itself (no `PTRACE_O_EXITKILL`).

use std::io;
use std::time::{Duration, Instant};

use libc::{c_int, c_long, c_uint, c_void};

use super::seccomp::{Instruction, MAX_INSTRUCTIONS};

/// The general registers, within one page: the kernel reads them register by register, and a page that went missing half way
/// would leave half of them set.
#[repr(C, align(256))]
#[derive(Debug, Clone, Copy)]
pub(super) struct Registers(pub libc::user_regs_struct);

/// How a traced thread stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Interrupted on our demand.
    Interrupted,
    /// Entering or leaving a system call.
    Syscall,
    /// About to get this signal.
    Signal(c_int),
    /// The whole process is stopped by job control.
    Group,
    /// It has ended.
    Ended,
}

/// What `PTRACE_GET_SYSCALL_INFO` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SyscallStop {
    Entry { ip: u64, sp: u64, number: u64 },
    Exit { ip: u64, sp: u64, result: i64 },
    Other,
}

/// `struct ptrace_syscall_info` of `linux/ptrace.h`; `values` is its union: number and arguments, or result and error flag.
#[repr(C)]
#[derive(Default)]
struct SyscallInfo {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    ip: u64,
    sp: u64,
    values: [u64; 8],
}

/// `struct ptrace_rseq_configuration` of `linux/ptrace.h`.
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

const NT_X86_XSTATE: usize = 0x202;
const PTRACE_SECCOMP_GET_FILTER: c_uint = 0x420c;
const PTRACE_GETSIGMASK: c_uint = 0x420a;
const PTRACE_GET_SYSCALL_INFO: c_uint = 0x420e;
const PTRACE_GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const PTRACE_EVENT_STOP: c_int = 128;

/// Bound on the XSAVE image that is read; with AMX it has 11 KiB.
const MAX_XSTATE: usize = 64 << 10;

/// Bound on the seccomp filters of one thread.
const MAX_FILTERS: usize = 64;

/// How long a wait spins before it sleeps between looks.
const SPIN: Duration = Duration::from_micros(200);
/// How long it then sleeps.
const NAP: Duration = Duration::from_micros(100);

/// A seized thread.
#[derive(Debug)]
pub(super) struct Tracee {
    tid: libc::pid_t,
}

impl Tracee {
    /// Seizes thread `tid`; it runs on.
    pub(super) fn seize(tid: u32) -> io::Result<Self> {
        let tid = libc::pid_t::try_from(tid).map_err(io::Error::other)?;
        let tracee = Self { tid };
        let options = usize::try_from(libc::PTRACE_O_TRACESYSGOOD).expect("a flag");
        tracee.plain(libc::PTRACE_SEIZE, options)?;
        Ok(tracee)
    }

    /// A request whose fourth argument is a number.
    fn plain(&self, request: c_uint, data: usize) -> io::Result<()> {
        let none = std::ptr::null_mut::<c_void>();
        // SAFETY: the requests given here (SEIZE, INTERRUPT, SYSCALL, DETACH) take numbers and access no memory of ours.
        let result = unsafe { libc::ptrace(request, self.tid, none, data) };
        checked(result).map(|_| ())
    }

    /// A request that reads or writes one `T` of ours. `address` is what the request says it is.
    ///
    /// # Safety
    /// The request must access no more than one `T`, and any bytes must be a valid `T`.
    unsafe fn with<T>(&self, request: c_uint, address: usize, value: &mut T) -> io::Result<usize> {
        // SAFETY: `value` is initialised and exclusively borrowed during the call; the caller promises that the request stays
        // within it and leaves a valid value.
        let result = unsafe { libc::ptrace(request, self.tid, address, std::ptr::from_mut(value)) };
        checked(result)
    }

    /// Asks it to stop.
    pub(super) fn interrupt(&self) -> io::Result<()> {
        self.plain(libc::PTRACE_INTERRUPT, 0)
    }

    /// Waits for its next stop, at most until `deadline`. The stop is looked at, not collected: from a tracee that stands with a
    /// signal that was collected, the kernel takes the signal away if its tracer dies then.
    pub(super) fn wait(&self, deadline: Instant) -> io::Result<Option<Stop>> {
        let start = Instant::now();
        let id = libc::id_t::try_from(self.tid).expect("thread ids are positive");
        loop {
            // SAFETY: all bits zero are a valid `siginfo_t`, which holds integers and pointers that are never followed.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            let options = libc::WSTOPPED | libc::WEXITED | libc::__WALL | libc::WNOHANG | libc::WNOWAIT;
            // SAFETY: waitid writes one `siginfo_t` through the pointer, which is ours and alive during the call.
            let result = unsafe { libc::waitid(libc::P_PID, id, &raw mut info, options) };
            if result < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    Some(libc::ECHILD) => return Ok(Some(Stop::Ended)),
                    _ => return Err(error),
                }
            }
            if info.si_code != 0 {
                // SAFETY: waitid filled in a SIGCHLD's information, which has a status.
                let status = unsafe { info.si_status() };
                return Ok(Some(decode(info.si_code, status)));
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            if now - start < SPIN { std::thread::yield_now() } else { std::thread::sleep(NAP) }
        }
    }

    /// Lets it run to its next system call entry or exit, and gives it `signal` (0: none).
    pub(super) fn run_to_syscall(&self, signal: c_int) -> io::Result<()> {
        self.plain(libc::PTRACE_SYSCALL, usize::try_from(signal).expect("signals are positive"))
    }

    /// Lets it go, and gives it `signal` (0: none). It must stand.
    pub(super) fn detach(&self, signal: c_int) -> io::Result<()> {
        self.plain(libc::PTRACE_DETACH, usize::try_from(signal).expect("signals are positive"))
    }

    /// Its general registers.
    pub(super) fn registers(&self) -> io::Result<Registers> {
        // SAFETY: all bits zero are a valid `user_regs_struct`, which holds integers only.
        let mut registers = Registers(unsafe { std::mem::zeroed() });
        // SAFETY: GETREGS writes one `user_regs_struct`, the first and only field; integers take any bytes.
        unsafe { self.with(libc::PTRACE_GETREGS, 0, &mut registers) }?;
        Ok(registers)
    }

    /// Sets all its general registers at once.
    pub(super) fn set_registers(&self, mut registers: Registers) -> io::Result<()> {
        // SAFETY: SETREGS reads one `user_regs_struct`.
        unsafe { self.with(libc::PTRACE_SETREGS, 0, &mut registers) }.map(|_| ())
    }

    /// Its signal mask, as it will be when the current system call has ended.
    pub(super) fn signal_mask(&self) -> io::Result<u64> {
        let mut mask = 0_u64;
        // SAFETY: GETSIGMASK writes as many bytes as `address` says, eight.
        unsafe { self.with(PTRACE_GETSIGMASK, size_of::<u64>(), &mut mask) }?;
        Ok(mask)
    }

    /// Its XSAVE image in the standard format.
    pub(super) fn xstate(&self) -> io::Result<Vec<u8>> {
        let mut image = vec![0_u8; MAX_XSTATE];
        let mut vector = libc::iovec { iov_base: image.as_mut_ptr().cast(), iov_len: image.len() };
        // SAFETY: GETREGSET reads and writes one `iovec` and writes at most `iov_len` bytes at `iov_base`: `image`, which is
        // alive, not otherwise borrowed, and takes any bytes.
        unsafe { self.with(libc::PTRACE_GETREGSET, NT_X86_XSTATE, &mut vector) }?;
        image.truncate(vector.iov_len);
        Ok(image)
    }

    /// What system call stop it is in.
    pub(super) fn syscall_stop(&self) -> io::Result<SyscallStop> {
        let mut info = SyscallInfo::default();
        // SAFETY: GET_SYSCALL_INFO writes at most as many bytes as `address` says; the fields are integers.
        unsafe { self.with(PTRACE_GET_SYSCALL_INFO, size_of::<SyscallInfo>(), &mut info) }?;
        Ok(match info.op {
            1 => SyscallStop::Entry { ip: info.ip, sp: info.sp, number: info.values[0] },
            2 => SyscallStop::Exit { ip: info.ip, sp: info.sp, result: info.values[0].cast_signed() },
            _ => SyscallStop::Other,
        })
    }

    /// Its seccomp filters. Needs CAP_SYS_ADMIN.
    pub(super) fn seccomp_filters(&self) -> io::Result<Vec<Vec<Instruction>>> {
        let mut filters = Vec::new();
        for index in 0..MAX_FILTERS {
            let mut room = Box::new([Instruction::default(); MAX_INSTRUCTIONS]);
            // SAFETY: SECCOMP_GET_FILTER writes one filter, at most BPF_MAXINSNS instructions, for which there is room.
            match unsafe { self.with(PTRACE_SECCOMP_GET_FILTER, index, &mut *room) } {
                Ok(count) => filters.push(room[..count].to_vec()),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(filters),
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("too many seccomp filters"))
    }

    /// Where its `struct rseq` lies; `None` if it registered none.
    pub(super) fn rseq(&self) -> io::Result<Option<u64>> {
        let mut rseq = RseqConfiguration::default();
        // SAFETY: GET_RSEQ_CONFIGURATION writes one `ptrace_rseq_configuration` if `address` is its size; integers only.
        let result = unsafe { self.with(PTRACE_GET_RSEQ_CONFIGURATION, size_of::<RseqConfiguration>(), &mut rseq) };
        match result {
            Ok(_) => Ok(Some(rseq.pointer).filter(|&pointer| pointer != 0)),
            // A kernel without rseq, or without the request: 5.13 and older, which have no PAGEMAP_SCAN either.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn checked(result: c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `status` is a signal with an event in the byte above it.
fn decode(code: c_int, status: c_int) -> Stop {
    if code != libc::CLD_TRAPPED && code != libc::CLD_STOPPED {
        return Stop::Ended;
    }
    match (status & 0xff, status >> 8) {
        (signal, 0) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        (signal, 0) => Stop::Signal(signal),
        (libc::SIGTRAP, PTRACE_EVENT_STOP) => Stop::Interrupted,
        (_, PTRACE_EVENT_STOP) => Stop::Group,
        (signal, event) => unreachable!("no ptrace event was asked for: {event}, {signal}"),
    }
}
