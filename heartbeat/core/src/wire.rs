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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, Incarnation, NodeId, Party, Revision, StoreId, VmId};
    use crate::record::{Owner, Record};
    use crate::store::{StoreAnswer, StoreOp, StoreRequest};
    use proptest::prelude::*;

    fn party() -> impl Strategy<Value = Party> {
        (any::<[u8; 16]>(), any::<u64>())
            .prop_map(|(node, life)| Party { node: NodeId(node), incarnation: Incarnation(life) })
    }

    fn owner() -> impl Strategy<Value = Owner> {
        prop_oneof![
            (party(), party()).prop_map(|(primary, standby)| Owner::Paired { primary, standby }),
            (party(), any::<bool>(), proptest::option::of(party())).prop_map(|(node, activated, other)| Owner::Solo {
                node,
                activated,
                other
            }),
            party().prop_map(|node| Owner::Stopped { node }),
        ]
    }

    fn record() -> impl Strategy<Value = Record> {
        (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), owner()).prop_map(|(store, revision, generation, owner)| {
            Record { store: StoreId(store), revision: Revision(revision), generation: Generation(generation), owner }
        })
    }

    proptest! {
        /// P30.
        #[test]
        fn store_messages_come_back_as_they_were(
            id in any::<u64>(), vm in any::<[u8; 16]>(), asker in party(), record in proptest::option::of(record()),
            owner in owner(), read in any::<bool>(), applied in any::<bool>()
        ) {
            let expect = record.map(|record| (record.store, record.revision));
            let op = if read { StoreOp::Read } else { StoreOp::Change { expect, owner } };
            let request = StoreRequest { id, vm: VmId(vm), asker, op };
            let bytes = encode::<MAX_STORE_MESSAGE, _>(&request).expect("fits");
            prop_assert_eq!(decode::<MAX_STORE_MESSAGE, StoreRequest>(&bytes), Ok(request));
            let answer = StoreAnswer { id, vm: VmId(vm), store: StoreId([3; 16]), record, applied };
            let mut bytes = encode::<MAX_STORE_MESSAGE, _>(&answer).expect("fits");
            prop_assert_eq!(decode::<MAX_STORE_MESSAGE, StoreAnswer>(&bytes), Ok(answer));
            prop_assert_eq!(decode::<MAX_STORE_MESSAGE, StoreAnswer>(&bytes[..bytes.len() - 1]), Err(WireError::Malformed));
            bytes.push(0);
            prop_assert_eq!(decode::<MAX_STORE_MESSAGE, StoreAnswer>(&bytes), Err(WireError::Trailing { extra: 1 }));
        }

        #[test]
        fn no_bytes_panic_or_allocate_without_bound(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let message = decode::<MAX_STORE_MESSAGE, StoreAnswer>(&bytes);
            let too_long = matches!(message, Err(WireError::TooLong { .. }));
            prop_assert_eq!(too_long, bytes.len() > MAX_STORE_MESSAGE);
            let list = decode::<MAX_STORE_MESSAGE, Vec<u64>>(&[0xff; 8]);
            prop_assert_eq!(list, Err(WireError::Malformed));
        }
    }
}
