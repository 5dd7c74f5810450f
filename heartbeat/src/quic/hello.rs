//! The first words on a connection: what it is for, and which wire version both speak.

use bincode::{Decode, Encode};
use heartbeat_core::ids::Incarnation;

/// Wire versions this build speaks, newest first.
pub const VERSIONS: &[u16] = &[1];

/// Most versions that an offer may list.
const MAX_OFFER: usize = 32;
/// Largest hello or welcome, in bytes.
pub(crate) const HELLO_LIMIT: usize = 1024;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Purpose {
    /// Epochs from a primary to a standby, and control of protection.
    Replication,
    /// Heartbeat datagrams.
    Heartbeat,
    /// Questions to a witness, or to a host that keeps records in place of one.
    Witness,
    /// What does such a host keep, as it is?
    Kept,
}

/// Dialer's first message on the first bidirectional stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Hello {
    pub(crate) versions: Vec<u16>,
    pub(crate) purpose: Purpose,
    pub(crate) incarnation: u64,
}

/// The acceptor's answer. Version 0: none in common.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Welcome {
    pub(crate) version: u16,
    pub(crate) incarnation: u64,
}

impl Hello {
    pub(crate) fn new(purpose: Purpose, incarnation: Incarnation) -> Self {
        Self { versions: VERSIONS.to_vec(), purpose, incarnation: incarnation.0 }
    }
}

/// The newest version in both lists; version 0 is never chosen.
pub(crate) fn newest_common(ours: &[u16], offered: &[u16]) -> Option<u16> {
    let offered = &offered[..offered.len().min(MAX_OFFER)];
    ours.iter().copied().filter(|version| *version != 0 && offered.contains(version)).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quic::{decode, encode};

    #[test]
    fn the_newest_common_version_wins_and_zero_never() {
        assert_eq!(newest_common(&[3, 2, 1], &[1, 2, 9]), Some(2));
        assert_eq!(newest_common(&[1], &[2, 3]), None);
        assert_eq!(newest_common(&[0], &[0]), None);
    }

    #[test]
    fn hello_and_welcome_survive_the_round_trip() {
        for purpose in [Purpose::Replication, Purpose::Heartbeat, Purpose::Witness, Purpose::Kept] {
            let hello = Hello::new(purpose, Incarnation(7));
            assert_eq!(decode::<Hello>(&encode(&hello)).expect("hello"), hello);
        }
        let welcome = Welcome { version: 1, incarnation: 9 };
        assert_eq!(decode::<Welcome>(&encode(&welcome)).expect("welcome"), welcome);
    }
}
