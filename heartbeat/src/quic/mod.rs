//! Connections between paired nodes: QUIC with mutual TLS 1.3, always.
//!
//! An [`Endpoint`] connects to and accepts from pinned peers alone; what comes out is a [`Connection`]
//! whose other end is known by its certificate, whose purpose and wire version are agreed, and whose
//! first bidirectional stream is open. There is no resumption and no early data: every connection
//! proves both keys.

mod endpoint;
pub(crate) mod hello;
mod message;
mod profile;
mod socket;
mod tls;

pub use endpoint::{Connection, Endpoint, EndpointOptions, QuicError};
pub use hello::{Purpose, VERSIONS};
pub use message::{MAX_MESSAGE, MessageError, decode, encode, read_message, write_message};
pub use profile::Profile;
pub use socket::mtu_towards;

pub(crate) use endpoint::{certificate_of, open_socket};
pub(crate) use profile::transport;
pub(crate) use tls::{Unpinned, client_config, provider, server_config};

/// The application protocol of all connections but pairing.
pub const ALPN: &[u8] = b"understudy/1";

/// The name that certificates carry and clients ask for; what is checked is the certificate itself.
pub(crate) const SERVER_NAME: &str = "understudy.internal";

/// Codes with which a connection is closed because of what the peer did (or because we are done).
pub mod close {
    /// Done; nothing is wrong.
    pub const DONE: u32 = 0;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 1;
    /// No common wire version.
    pub const VERSION: u32 = 2;
    /// The peer is not pinned (any more).
    pub const NOT_PAIRED: u32 = 3;
    /// Too many connections or requests at once.
    pub const BUSY: u32 = 4;
    /// A newer connection of the same kind took this one's place.
    pub const REPLACED: u32 = 5;
    /// Pairing was refused.
    pub const PAIRING: u32 = 6;
}
