//! Framed messages on streams, and the same codec for datagrams and files.
//!
//! A frame is a little-endian `u32` length and that many bytes of bincode with fixed-width integers.
//! A reader names its limit before anything is allocated, a decoder cannot be made to reserve more than
//! a small multiple of the frame, and every byte of a frame must be used.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::error::DecodeError;
use bincode::{Decode, Encode};
use quinn::{ReadExactError, RecvStream, SendStream, WriteError};

/// Largest message of all: bigger things go as raw bytes on a stream of their own.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Decoding claims the memory size of elements, which may exceed their encoded size by this factor.
const GROWTH: usize = 16;

/// Why a message could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The peer's message is longer than this reader allows.
    #[error("a message of {length} bytes came where {limit} are allowed")]
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The bytes are no message of the expected type.
    #[error("a message cannot be decoded: {0:?}")]
    Malformed(DecodeError),
    /// Bytes are left over after the message.
    #[error("a message has {0} bytes too many")]
    Trailing(usize),
    /// The peer ended the stream in place of a message.
    #[error("the peer ended the stream")]
    Ended,
    /// The stream or its connection broke while reading.
    #[error("the connection broke while reading")]
    Read(#[source] quinn::ReadError),
    /// The stream or its connection broke while writing.
    #[error("the connection broke while writing")]
    Write(#[source] WriteError),
}

impl MessageError {
    /// Whether the peer is to blame: its connection is to be closed with [`super::close::PROTOCOL`].
    #[must_use]
    pub fn is_peers_fault(&self) -> bool {
        matches!(self, Self::TooLong { .. } | Self::Malformed(_) | Self::Trailing(_))
    }
}

const SMALL: usize = 64 << 10;
const MEDIUM: usize = 1 << 20;

fn config<const LIMIT: usize>() -> Configuration<LittleEndian, Fixint, Limit<LIMIT>> {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<LIMIT>()
}

/// The bytes of `message`, without a length before them.
///
/// # Panics
/// If the message cannot be encoded or is longer than [`MAX_MESSAGE`]: our own bug.
#[must_use]
pub fn encode<T: Encode>(message: &T) -> Vec<u8> {
    let bytes =
        bincode::encode_to_vec(message, config::<{ MAX_MESSAGE * GROWTH }>()).expect("our own messages can be encoded");
    assert!(bytes.len() <= MAX_MESSAGE, "a message of {} bytes", bytes.len());
    bytes
}

/// The message that `bytes` are, all of them.
///
/// # Errors
/// [`MessageError::TooLong`], [`MessageError::Malformed`], [`MessageError::Trailing`].
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, MessageError> {
    let length = bytes.len();
    let decoded = if length <= SMALL / GROWTH {
        bincode::decode_from_slice(bytes, config::<SMALL>())
    } else if length <= MEDIUM / GROWTH {
        bincode::decode_from_slice(bytes, config::<MEDIUM>())
    } else if length <= MAX_MESSAGE {
        bincode::decode_from_slice(bytes, config::<{ MAX_MESSAGE * GROWTH }>())
    } else {
        return Err(MessageError::TooLong { length, limit: MAX_MESSAGE });
    };
    let (message, consumed) = decoded.map_err(MessageError::Malformed)?;
    if consumed == length { Ok(message) } else { Err(MessageError::Trailing(length - consumed)) }
}

/// Reads one framed message of at most `limit` bytes.
///
/// # Errors
/// [`MessageError`]; the stream is of no use afterwards. Not cancel-safe.
pub async fn read_message<T: Decode<()>>(stream: &mut RecvStream, limit: usize) -> Result<T, MessageError> {
    let mut length = [0; 4];
    read_exact(stream, &mut length).await?;
    let length = usize::try_from(u32::from_le_bytes(length)).expect("usize has at least 32 bits");
    if length > limit {
        return Err(MessageError::TooLong { length, limit });
    }
    let mut bytes = vec![0; length];
    read_exact(stream, &mut bytes).await?;
    decode(&bytes)
}

/// Writes one framed message.
///
/// # Errors
/// [`MessageError::Write`]; the stream is of no use afterwards. Not cancel-safe.
pub async fn write_message<T: Encode>(stream: &mut SendStream, message: &T) -> Result<(), MessageError> {
    let body = encode(message);
    let length = u32::try_from(body.len()).expect("at most MAX_MESSAGE");
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    stream.write_all(&frame).await.map_err(MessageError::Write)
}

async fn read_exact(stream: &mut RecvStream, bytes: &mut [u8]) -> Result<(), MessageError> {
    stream.read_exact(bytes).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(_) => MessageError::Ended,
        ReadExactError::ReadError(error) => MessageError::Read(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_the_round_trip_at_every_size_class() {
        for length in [0_usize, 1, SMALL / GROWTH, MEDIUM / GROWTH, MAX_MESSAGE - 8] {
            let message = vec![7_u8; length];
            let bytes = encode(&message);
            assert_eq!(decode::<Vec<u8>>(&bytes).expect("decode"), message);
        }
    }

    #[test]
    fn a_short_frame_cannot_reserve_much_memory() {
        let mut hostile = u64::MAX.to_le_bytes().to_vec();
        assert!(matches!(decode::<Vec<u8>>(&hostile), Err(MessageError::Malformed(_))));
        hostile[..8].copy_from_slice(&(1_u64 << 20).to_le_bytes());
        let refused = decode::<Vec<[u64; 8]>>(&hostile);
        assert!(matches!(refused, Err(MessageError::Malformed(DecodeError::LimitExceeded))), "{refused:?}");
    }

    #[test]
    fn left_over_bytes_are_refused() {
        let mut bytes = encode(&5_u32);
        bytes.push(0);
        assert!(matches!(decode::<u32>(&bytes), Err(MessageError::Trailing(1))));
    }
}
