//! Messages of the replication connection's control stream.
//!
//! bincode with fixed-width little-endian integers, one message per length-prefixed frame of at most [`MAX_MESSAGE`] bytes.

use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use bincode::{Decode, Encode};
use heartbeat_core::ids::{Epoch, Generation, Incarnation, NodeId, Party, VmId};
use heartbeat_core::wire::{self, WireError};

use crate::state::ProtectionState;

/// Bound on one encoded message, the recipe and the layout included.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Bound on an opaque part ([`PeerMessage::Prepare`]'s recipe or layout), in bytes.
pub const MAX_OPAQUE: usize = 400 << 10;
/// Bound on a text (a name, a reason), in bytes. Longer ones are cut by [`clip`].
pub const MAX_TEXT: usize = 1024;
/// Bound on a version offer.
pub const MAX_VERSIONS: usize = 16;
/// Versions of this protocol that we speak, newest first. 0 is invalid.
pub const VERSIONS: [u16; 1] = [1];

const _: () = assert!(2 * MAX_OPAQUE + 8 * MAX_TEXT < MAX_MESSAGE, "the longest Prepare fits");

/// How a rehearsal on the standby went.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum RehearsalResult {
    /// The state loads.
    Loads {
        /// From starting the scratch twin to its answer.
        launch: Duration,
        /// Loading the device state.
        load: Duration,
    },
    /// It does not.
    Fails {
        /// Why, in words.
        reason: String,
    },
}

/// What the two sides of a replication connection tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PeerMessage {
    /// Both ways, first. The newest version in both offers is spoken.
    Hello {
        /// Offered versions, newest first.
        versions: Vec<u16>,
        /// Who speaks, in which life.
        party: Party,
        /// Which VM this connection is for.
        vm: VmId,
    },
    /// To the standby: build a twin.
    Prepare {
        /// Which VM.
        vm: VmId,
        /// Its name, for people.
        name: String,
        /// The generation that the session's epochs carry.
        generation: Generation,
        /// The back end's recipe, opaque here.
        recipe: Vec<u8>,
        /// The memory layout, opaque here.
        layout: Vec<u8>,
    },
    /// To the primary: the twin waits.
    Prepared,
    /// To the primary: this host cannot.
    Refused {
        /// Why, in words.
        reason: String,
    },
    /// To the primary: all of this epoch and of all before is held.
    Acknowledge {
        /// The session's generation.
        generation: Generation,
        /// The standby's life.
        incarnation: Incarnation,
        /// Which epoch.
        epoch: Epoch,
    },
    /// To the standby: prove that the state as of this epoch loads.
    Rehearse {
        /// Which epoch.
        epoch: Epoch,
    },
    /// To the primary: it does or does not.
    Rehearsed {
        /// Which epoch.
        epoch: Epoch,
        /// How it went.
        result: RehearsalResult,
    },
    /// To the standby: from this epoch on the primary holds its output; a copy as of this or a later epoch is whole.
    Binding {
        /// Which epoch.
        epoch: Epoch,
    },
    /// To the standby: the guest died, its agent lives and will not contest.
    GuestDied {
        /// How, in words.
        how: String,
    },
    /// To the standby: protection ends; the copy may go once the record agrees.
    Unprotect,
    /// To the standby: a planned failover. The guest stands still at this epoch, which was acknowledged; ask now.
    Planned {
        /// Which epoch.
        epoch: Epoch,
    },
    /// Both ways: what the other side may show its operator.
    Status {
        /// The sender's state.
        state: ProtectionState,
        /// Why, in words.
        reason: String,
    },
}

impl PeerMessage {
    /// The bytes of one frame.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if a part is over its bound.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        wire::encode::<MAX_MESSAGE, _>(self)
    }

    /// The message of one frame.
    ///
    /// # Errors
    /// See [`WireError`]; always the peer's fault: close with [`CloseCode::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        wire::decode::<MAX_MESSAGE, _>(bytes)
    }
}

/// The newest version in both offers; `None` if there is none.
#[must_use]
pub fn newest_common(ours: &[u16], theirs: &[u16]) -> Option<u16> {
    ours.iter().copied().filter(|version| *version != 0 && theirs.contains(version)).max()
}

/// `text` cut to at most [`MAX_TEXT`] bytes, at a character's border.
#[must_use]
pub fn clip(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}

/// Why a side closes a replication connection. The number goes on the wire; 0 is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CloseCode {
    /// All is said.
    Done = 1,
    /// No common version.
    Version = 2,
    /// A message or frame that is none.
    Malformed = 3,
    /// Something over its bound.
    TooLarge = 4,
    /// A message that does not fit what went before.
    Unexpected = 5,
    /// Page data that fails its checks.
    Corrupt = 6,
    /// Not the node, incarnation or VM that this connection is for.
    WrongParty = 7,
    /// The sender's own trouble, told in the reason text.
    Internal = 8,
}

impl CloseCode {
    /// Every code.
    pub const ALL: [Self; 8] = [
        Self::Done,
        Self::Version,
        Self::Malformed,
        Self::TooLarge,
        Self::Unexpected,
        Self::Corrupt,
        Self::WrongParty,
        Self::Internal,
    ];

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The code of a number; `None` if there is none.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|known| u64::from(known.code()) == code)
    }
}

/// Who a hello must come from.
#[must_use]
pub fn hello(node: NodeId, incarnation: Incarnation, vm: VmId) -> PeerMessage {
    PeerMessage::Hello { versions: VERSIONS.to_vec(), party: Party { node, incarnation }, vm }
}
