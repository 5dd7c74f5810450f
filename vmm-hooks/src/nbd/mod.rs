//! A Network Block Device server on a Unix socket, for a hypervisor on the same host that writes a guest's disk to us.
//!
//! Follows <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle negotiation (`EXPORT_NAME`,
//! `ABORT`, `LIST`, `INFO`, `GO`, `STRUCTURED_REPLY`) and `READ`, `WRITE`, `WRITE_ZEROES`, `TRIM`, `FLUSH`, `DISC`. Neither TLS
//! nor metadata contexts, which a Unix socket between two processes of one host does not need.
//!
//! Promise: every size and count that a client can name is bounded before anything is allocated for it; no bytes make the
//! server panic; a request outside the export changes nothing. Requests of one connection are done one after the
//! other in the order in which they came, and each reply is sent after its request was done. What the server blocks on is the
//! client's socket and the [`Backend`], nothing else.
//!
//! | module | promise |
//! | --- | --- |
//! | `wire` | the protocol's numbers, and reading and writing them |
//! | `handshake` | a connection chooses one export, or ends |
//! | `transmission` | requests become calls of the backend, each answered once |
//! | `server` | one thread for each connection, ended with the server |

mod handshake;
mod server;
mod transmission;
mod wire;

#[doc(hidden)]
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
#[cfg(any(test, feature = "fuzzing"))]
mod memory;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use server::{CONNECTIONS_MAX, Server};
pub use wire::{NAME_MAX, OPTION_DATA_MAX, OPTIONS_MAX, PAYLOAD_MAX};

/// What is behind an export.
///
/// Calls come from one thread for each connection. Every range lies inside the export and is not empty.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Its size. Does not change.
    fn bytes(&self) -> u64;

    /// What is offered to clients.
    fn features(&self) -> Features {
        Features::default()
    }

    /// A client chose this export. An error ends the connection.
    ///
    /// # Errors
    /// If it may not have it now.
    fn opened(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// The connection of a client that was let in has ended, however.
    fn closed(&self) {}

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// If it cannot.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), BackendError>;

    /// Writes; `durable`: it must survive a loss of power when this returns.
    ///
    /// # Errors
    /// If it cannot; what the range holds is then not known.
    fn write(&self, offset: u64, data: Vec<u8>, durable: bool) -> Result<(), BackendError>;

    /// Makes a range read as zeroes; `hole`: it need not keep room for it.
    ///
    /// # Errors
    /// As in [`Backend::write`].
    fn zero(&self, offset: u64, bytes: u64, hole: bool, durable: bool) -> Result<(), BackendError>;

    /// The content of a range is not needed any more.
    ///
    /// # Errors
    /// As in [`Backend::write`].
    fn trim(&self, offset: u64, bytes: u64, durable: bool) -> Result<(), BackendError>;

    /// Makes everything that was answered survive a loss of power.
    ///
    /// # Errors
    /// If it cannot.
    fn flush(&self) -> Result<(), BackendError>;
}

/// What an export offers. A client that asks for what is not offered is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Nothing can be written.
    pub read_only: bool,
    /// `FLUSH`.
    pub flush: bool,
    /// Durable writes (`FUA`).
    pub fua: bool,
    /// `TRIM`.
    pub trim: bool,
    /// `WRITE_ZEROES`.
    pub zeroes: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self { read_only: false, flush: true, fua: true, trim: true, zeroes: true }
    }
}

/// Why a backend could not do a request; each becomes the protocol's error of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// `EIO`
    #[error("the request failed")]
    Io,
    /// `ENOSPC`
    #[error("there is no room left")]
    NoSpace,
    /// `EINVAL`
    #[error("the request makes no sense here")]
    Invalid,
}

impl From<io::Error> for BackendError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::InvalidInput => Self::Invalid,
            _ => Self::Io,
        }
    }
}

/// Something that a client can choose.
#[derive(Debug, Clone)]
pub struct Export {
    /// Its name, at most [`NAME_MAX`] bytes.
    pub name: String,
    /// What is behind it.
    pub backend: Arc<dyn Backend>,
}

/// Why a connection ended other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket broke, or ended in the middle of a message.
    #[error("the connection to the NBD client broke")]
    Io(#[from] io::Error),
    /// The client does not follow the protocol.
    #[error("the NBD client sent {what}")]
    Protocol {
        /// What it was.
        what: String,
    },
}

impl NbdError {
    fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }
}
