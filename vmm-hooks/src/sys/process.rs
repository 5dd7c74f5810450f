//! Another process: a handle that stays true when its pid is reused, its death, its memory, what it is.
//!
//! Promise: a [`PidFd`] names one process for good. What [`ProcessMemory`] returns came from that process, because a pid
//! is not reused before its process has ended, and the end is looked for after each read.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::layout::PAGE_SIZE;

/// Bound on the memory pieces named in one system call (the kernel's `UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Why a process could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no such process, or it has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// Its pid.
        pid: u32,
    },
    /// The pid belongs to a process that started at another time.
    #[error("process {pid} is not the one that was meant: its pid was reused")]
    Reused {
        /// The pid.
        pid: u32,
    },
    /// It was killed, but its end was not confirmed in time.
    #[error("process {pid} was sent SIGKILL but had not ended after {waited:?}")]
    NotConfirmed {
        /// Its pid.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// Part of its memory cannot be read or written.
    #[error("memory of process {pid} at {address:#x} cannot be accessed")]
    Memory {
        /// Its pid.
        pid: u32,
        /// The first address that failed.
        address: u64,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Another system call failed.
    #[error("cannot {what} of process {pid}")]
    Os {
        /// Its pid.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// A handle on one process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PidFd {
    fd: Arc<OwnedFd>,
    pid: u32,
    start_time: u64,
}

impl PidFd {
    /// Opens the process that has `pid` now.
    ///
    /// # Errors
    /// [`ProcessError::Gone`] if there is none.
    pub fn open(pid: u32) -> Result<Self, ProcessError> {
        let gone = ProcessError::Gone { pid };
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Err(gone) };
        let fd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => Arc::new(fd),
            Err(rustix::io::Errno::SRCH) => return Err(gone),
            Err(error) => return Err(os(pid, "open a handle", error.into())),
        };
        // Read after the handle was opened, believed only if the process still lives: then both are of one process.
        let start_time = start_time(pid);
        let handle = Self { fd, pid, start_time: *start_time.as_ref().unwrap_or(&0) };
        if handle.has_exited() {
            return Err(gone);
        }
        // One that lives and is not shown (`hidepid`) is not gone.
        start_time.map(|_| handle).map_err(|error| os(pid, "read the start time", error))
    }

    /// Opens the process that has `pid` and started at `start_time`, as [`PidFd::start_time`] told earlier.
    ///
    /// # Errors
    /// [`ProcessError::Reused`] if another process has the pid now.
    pub fn open_same(pid: u32, start_time: u64) -> Result<Self, ProcessError> {
        let handle = Self::open(pid)?;
        if handle.start_time == start_time { Ok(handle) } else { Err(ProcessError::Reused { pid }) }
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it started, in clock ticks since boot. With the pid it names a process until the next boot.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether it has ended (all its threads; reaped or not).
    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.wait_exit(Duration::ZERO)
    }

    /// Waits until it has ended, at most `timeout`; whether it has.
    #[must_use]
    pub fn wait_exit(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("a timeout fits in a timespec");
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll of a pidfd failed: {error}"),
            }
        }
    }

    /// Kills it and waits until its end is confirmed. A process that has ended is no error.
    ///
    /// # Errors
    /// [`ProcessError::NotConfirmed`] if it has not ended after `timeout`.
    pub fn kill_confirmed(&self, timeout: Duration) -> Result<(), ProcessError> {
        match pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(os(self.pid, "kill", error.into())),
        }
        if self.wait_exit(timeout) {
            Ok(())
        } else {
            Err(ProcessError::NotConfirmed { pid: self.pid, waited: timeout })
        }
    }

    /// Its command line, one string an argument. Bytes that are no UTF-8 are replaced.
    ///
    /// # Errors
    /// If it has ended.
    pub fn command_line(&self) -> Result<Vec<String>, ProcessError> {
        let bytes = self.file("cmdline", "read the command line")?;
        let bytes = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
        Ok(bytes.split(|&b| b == 0).map(|argument| String::from_utf8_lossy(argument).into_owned()).collect())
    }

    /// The path of its program, as the kernel tells it (` (deleted)` is appended if it was replaced).
    ///
    /// # Errors
    /// If it has ended or may not be looked at.
    pub fn executable(&self) -> Result<PathBuf, ProcessError> {
        let path = fs::read_link(format!("/proc/{}/exe", self.pid)).map_err(|e| os(self.pid, "read the executable", e));
        self.still(path)
    }

    /// The user it runs as (effective uid).
    ///
    /// # Errors
    /// If it has ended.
    pub fn uid(&self) -> Result<u32, ProcessError> {
        self.effective("Uid:", "read the user")
    }

    /// The group it runs as (effective gid).
    ///
    /// # Errors
    /// If it has ended.
    pub fn gid(&self) -> Result<u32, ProcessError> {
        self.effective("Gid:", "read the group")
    }

    /// The second number of a line of its status.
    fn effective(&self, line: &str, what: &'static str) -> Result<u32, ProcessError> {
        let status = self.file("status", "read the status")?;
        let status = String::from_utf8_lossy(&status);
        let id = status.lines().find_map(|text| text.strip_prefix(line)?.split_whitespace().nth(1)?.parse().ok());
        id.ok_or_else(|| os(self.pid, what, io::Error::from(io::ErrorKind::InvalidData)))
    }

    /// The bytes of `/proc/PID/NAME`, of this process for sure.
    fn file(&self, name: &str, what: &'static str) -> Result<Vec<u8>, ProcessError> {
        let bytes = fs::read(format!("/proc/{}/{name}", self.pid)).map_err(|e| os(self.pid, what, e));
        self.still(bytes)
    }

    /// Passes on what was read by pid if the process had not ended by then.
    fn still<T>(&self, result: Result<T, ProcessError>) -> Result<T, ProcessError> {
        if self.has_exited() { Err(ProcessError::Gone { pid: self.pid }) } else { result }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn os(pid: u32, what: &'static str, source: io::Error) -> ProcessError {
    ProcessError::Os { pid, what, source }
}

/// When the process with `pid` started: field 22 of `/proc/PID/stat`, counted after the name in parentheses.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    let time = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok());
    time.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The memory of another process. Needs the right to trace it.
#[derive(Debug, Clone)]
pub struct ProcessMemory {
    process: PidFd,
    pid: nix::unistd::Pid,
}

impl ProcessMemory {
    /// The memory of `process`. Nothing is opened; rights are checked at each access.
    #[must_use]
    pub fn new(process: PidFd) -> Self {
        let raw = i32::try_from(process.pid()).expect("checked when it was opened");
        Self { process, pid: nix::unistd::Pid::from_raw(raw) }
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> &PidFd {
        &self.process
    }

    /// Fills `into` from `address`.
    ///
    /// # Errors
    /// If any byte cannot be read; `into` is then partly written.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), ProcessError> {
        let length = u64::try_from(into.len()).expect("a length fits in 64 bits");
        self.read_runs(&[(address, length)], into)
    }

    /// Fills `into` with the pages that start at `addresses`, in that order.
    ///
    /// # Errors
    /// If any page cannot be read; `into` is then partly written.
    ///
    /// # Panics
    /// If `into` is not as long as the pages.
    pub fn read_pages(&self, addresses: &[u64], into: &mut [u8]) -> Result<(), ProcessError> {
        assert_eq!(into.len(), addresses.len() * PAGE_SIZE, "the buffer must be as long as the pages");
        let page = PAGE_SIZE as u64;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for &address in addresses {
            match runs.last_mut() {
                Some((start, length)) if *start + *length == address => *length += page,
                _ => runs.push((address, page)),
            }
        }
        self.read_runs(&runs, into)
    }

    /// Fills `into` with the bytes of `runs` (address, length), in that order.
    ///
    /// # Errors
    /// If any byte cannot be read; `into` is then partly written.
    ///
    /// # Panics
    /// If `into` is not as long as the runs.
    pub fn read_runs(&self, runs: &[(u64, u64)], into: &mut [u8]) -> Result<(), ProcessError> {
        let mut pieces: Vec<RemoteIoVec> = runs.iter().map(|&(address, length)| piece(address, length)).collect();
        let total: usize = pieces.iter().map(|piece| piece.len).sum();
        assert_eq!(into.len(), total, "the buffer must be as long as the runs");
        let mut rest = &mut pieces[..];
        let mut done = 0;
        while done < total {
            skip_empty(&mut rest);
            let batch = &rest[..rest.len().min(MAX_PIECES)];
            match process_vm_readv(self.pid, &mut [IoSliceMut::new(&mut into[done..])], batch) {
                Ok(0) => return Err(self.refused(batch[0].base, nix::errno::Errno::EFAULT)),
                Ok(moved) => {
                    done += moved;
                    advance(&mut rest, moved);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(self.refused(batch[0].base, error)),
            }
        }
        // The pid was this process's all along if it is now.
        if self.process.has_exited() { Err(ProcessError::Gone { pid: self.process.pid() }) } else { Ok(()) }
    }

    /// Writes `bytes` at `address`, where the process itself may write.
    ///
    /// # Errors
    /// If any byte cannot be written; a part may have been.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), ProcessError> {
        // Looked at before too: unlike a read, a write to the wrong process does harm.
        if self.process.has_exited() {
            return Err(ProcessError::Gone { pid: self.process.pid() });
        }
        let mut pieces = [piece(address, u64::try_from(bytes.len()).expect("a length fits in 64 bits"))];
        let mut rest = &mut pieces[..];
        let mut done = 0;
        while done < bytes.len() {
            match process_vm_writev(self.pid, &[IoSlice::new(&bytes[done..])], rest) {
                Ok(0) => return Err(self.refused(rest[0].base, nix::errno::Errno::EFAULT)),
                Ok(moved) => {
                    done += moved;
                    advance(&mut rest, moved);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(self.refused(rest[0].base, error)),
            }
        }
        Ok(())
    }

    fn refused(&self, base: usize, error: nix::errno::Errno) -> ProcessError {
        let pid = self.process.pid();
        if error == nix::errno::Errno::ESRCH || self.process.has_exited() {
            return ProcessError::Gone { pid };
        }
        ProcessError::Memory { pid, address: base as u64, source: error.into() }
    }
}

fn piece(address: u64, length: u64) -> RemoteIoVec {
    let base = usize::try_from(address).expect("addresses are 64 bits wide");
    RemoteIoVec { base, len: usize::try_from(length).expect("lengths are 64 bits wide") }
}

fn skip_empty(rest: &mut &mut [RemoteIoVec]) {
    while rest.first().is_some_and(|piece| piece.len == 0) {
        *rest = &mut std::mem::take(rest)[1..];
    }
}

/// Takes `moved` bytes off the front of `rest`. The kernel may stop between two pieces or within one.
fn advance(rest: &mut &mut [RemoteIoVec], mut moved: usize) {
    while moved > 0 {
        let first = &mut rest[0];
        let step = moved.min(first.len);
        first.base += step;
        first.len -= step;
        moved -= step;
        skip_empty(rest);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn me() -> PidFd {
        PidFd::open(std::process::id()).expect("this process lives")
    }

    /// A process that waits for its standard input.
    fn child() -> Child {
        let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("cat is installed");
        // In the middle of `exec` it has no command line, and before it another program's.
        let process = PidFd::open(child.id()).expect("it lives");
        let deadline = Instant::now() + Duration::from_secs(30);
        while process.command_line().expect("it lives") != ["cat"] {
            assert!(Instant::now() < deadline, "the program does not start");
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn reads_more_scattered_pages_than_one_call_takes() {
        let count = 2 * MAX_PIECES + 100;
        let byte = |i: usize| u8::try_from((i / 7 + i / PAGE_SIZE) % 256).expect("small");
        let bytes: Vec<u8> = (0..count * 2 * PAGE_SIZE).map(byte).collect();
        let start = bytes.as_ptr() as u64;
        // Every second page, the last one first.
        let addresses: Vec<u64> = (0..count as u64).rev().map(|i| start + i * 2 * PAGE_SIZE as u64).collect();
        let mut into = vec![0; count * PAGE_SIZE];
        ProcessMemory::new(me()).read_pages(&addresses, &mut into).expect("it is ours");
        for (index, page) in into.chunks_exact(PAGE_SIZE).enumerate() {
            let at = (count - 1 - index) * 2 * PAGE_SIZE;
            assert!(page == &bytes[at..at + PAGE_SIZE], "page {index}");
        }
    }

    #[test]
    fn a_hole_in_the_memory_is_an_error_with_its_address() {
        let page = [7_u8; PAGE_SIZE];
        let hole = 0x1000;
        let mut into = vec![0; 2 * PAGE_SIZE];
        let result = ProcessMemory::new(me()).read_pages(&[page.as_ptr() as u64, hole], &mut into);
        assert!(matches!(result, Err(ProcessError::Memory { address, .. }) if address == hole), "{result:?}");
        let result = ProcessMemory::new(me()).write(hole, &page);
        assert!(matches!(result, Err(ProcessError::Memory { address, .. }) if address == hole), "{result:?}");
    }

    #[test]
    fn a_killed_process_is_confirmed_dead_and_its_memory_gone() {
        let mut child = child();
        let process = PidFd::open(child.id()).expect("it lives");
        assert!(!process.has_exited());
        assert_eq!(process.command_line().expect("it lives"), ["cat"]);
        assert_eq!(process.uid().expect("it lives"), me().uid().expect("this process lives"));
        let same = PidFd::open_same(process.pid(), process.start_time()).expect("it is the same");
        let other = PidFd::open_same(process.pid(), process.start_time() + 1);
        assert!(matches!(other, Err(ProcessError::Reused { .. })), "{other:?}");
        same.kill_confirmed(Duration::from_secs(30)).expect("it can be killed");
        assert!(process.has_exited(), "also before it is reaped");
        let mut byte = [0];
        let read = ProcessMemory::new(process.clone()).read(0x1000, &mut byte);
        assert!(matches!(read, Err(ProcessError::Gone { .. })), "{read:?}");
        child.wait().expect("it is our child");
        process.kill_confirmed(Duration::from_secs(30)).expect("killing the dead is no error");
        let gone = process.command_line();
        assert!(matches!(gone, Err(ProcessError::Gone { .. })), "{gone:?}");
    }

    #[test]
    fn writes_where_it_is_told() {
        let child = child();
        let process = PidFd::open(child.id()).expect("it lives");
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid())).expect("it lives");
        let stack = maps.lines().find(|line| line.ends_with("[stack]") && line.contains("rw-p")).expect("a stack");
        let start = u64::from_str_radix(stack.split('-').next().expect("a range"), 16).expect("an address");
        let memory = ProcessMemory::new(process.clone());
        memory.write(start + 5, b"understudy").expect("its stack can be written");
        let mut back = [0; 10];
        memory.read(start + 5, &mut back).expect("its stack can be read");
        assert_eq!(&back, b"understudy");
        process.kill_confirmed(Duration::from_secs(30)).expect("it can be killed");
        drop(child.wait_with_output());
    }
}
