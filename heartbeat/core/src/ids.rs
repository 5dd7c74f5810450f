//! Names and counters that go on the wire and into logs.
//!
//! The 16-byte names print as 32 hex digits and parse from them. The counters start at 0, which means "none yet".

use core::fmt;
use core::str::FromStr;

use bincode::{Decode, Encode};

/// Why a text is not a 16-byte name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a name is 32 hex digits")]
pub struct ParseIdError;

fn parse_hex(text: &str) -> Result<[u8; 16], ParseIdError> {
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return Err(ParseIdError);
    }
    let mut bytes = [0_u8; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let mut value = 0_u8;
        for &digit in pair {
            let nibble = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                b'A'..=b'F' => digit - b'A' + 10,
                _ => return Err(ParseIdError),
            };
            value = value << 4 | nibble;
        }
        *byte = value;
    }
    Ok(bytes)
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_hex(text).map(Self)
            }
        }
    };
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name(pub u64);

        impl $name {
            /// The next one.
            ///
            /// # Panics
            /// After 2^64 steps.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("2^64 steps were taken"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

name! {
    /// A host that runs an agent.
    NodeId
}
name! {
    /// A virtual machine, wherever it runs.
    VmId
}
name! {
    /// One life of an ownership store. A store restored from a backup has another one.
    StoreId
}
counter! {
    /// Which life of an agent: a node that restarted is another asker.
    Incarnation
}
counter! {
    /// Grows with each change of who may run.
    Generation
}
counter! {
    /// Grows with each change of a record.
    Revision
}
counter! {
    /// The unit of replication. Epoch N ends with its capture: what the guest emitted before belongs to N, later to N+1.
    Epoch
}

impl Epoch {
    /// No epoch is numbered this high or higher: a peer's number that is, is its fault. At 1000 epochs a second it takes 290
    /// million years.
    pub const BOUND: Self = Self(u64::MAX / 2);
}

/// A node in one of its lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Party {
    /// The host.
    pub node: NodeId,
    /// Its agent's life.
    pub incarnation: Incarnation,
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.node, self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    proptest! {
        #[test]
        fn names_print_and_parse(bytes in any::<[u8; 16]>()) {
            let name = NodeId(bytes);
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert_eq!(name.to_string().to_uppercase().parse(), Ok(name));
        }

        #[test]
        fn nothing_else_parses(text in "\\PC{0,40}") {
            if let Ok(name) = text.parse::<VmId>() {
                prop_assert_eq!(name.to_string(), text.to_lowercase());
            }
        }
    }
}
