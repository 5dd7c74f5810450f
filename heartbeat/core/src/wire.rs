//! How control messages become bytes: bincode, fixed-width little-endian integers, always with a size limit.

use alloc::vec::Vec;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

/// Bound on one encoded message of any kind in this crate (store requests and answers), in bytes.
pub const MAX_STORE_MESSAGE: usize = 512;

/// Why bytes are not the message they should be. Always the peer's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// More bytes than the bound on this message.
    #[error("a message of {length} bytes is over the bound of {limit}")]
    TooLong {
        /// How many there are.
        length: usize,
        /// The bound.
        limit: usize,
    },
    /// Not this message, or cut short.
    #[error("the bytes are not a message of this kind")]
    Malformed,
    /// Bytes after the message.
    #[error("{extra} bytes follow the message")]
    Trailing {
        /// How many.
        extra: usize,
    },
}

fn configuration<const LIMIT: usize>() -> Configuration<LittleEndian, Fixint, Limit<LIMIT>> {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<LIMIT>()
}

/// Encodes a message of at most `LIMIT` bytes.
///
/// # Errors
/// [`WireError::TooLong`] (with `length` 0 if it was not worked out) when it does not fit.
pub fn encode<const LIMIT: usize, T: Encode>(message: &T) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::encode_to_vec(message, configuration::<LIMIT>())
        .map_err(|_| WireError::TooLong { length: 0, limit: LIMIT })?;
    if bytes.len() > LIMIT {
        return Err(WireError::TooLong { length: bytes.len(), limit: LIMIT });
    }
    Ok(bytes)
}

/// Decodes exactly one message from exactly these bytes. Allocates at most `LIMIT` bytes, whatever the bytes say.
///
/// # Errors
/// See [`WireError`].
pub fn decode<const LIMIT: usize, T: Decode<()>>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > LIMIT {
        return Err(WireError::TooLong { length: bytes.len(), limit: LIMIT });
    }
    let (message, used) =
        bincode::decode_from_slice(bytes, configuration::<LIMIT>()).map_err(|_| WireError::Malformed)?;
    match bytes.len() - used {
        0 => Ok(message),
        extra => Err(WireError::Trailing { extra }),
    }
}
