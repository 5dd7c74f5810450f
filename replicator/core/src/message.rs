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
/// Bound on [`PeerMessage::Prepare`]'s `protection`, in bytes.
pub const MAX_PROTECTION: usize = 16 << 10;
/// Bound on a text (a name, a reason), in bytes. Longer ones are cut by [`clip`].
pub const MAX_TEXT: usize = 1024;
/// Bound on a version offer.
pub const MAX_VERSIONS: usize = 16;
/// Versions of this protocol that we speak, newest first. 0 is invalid.
pub const VERSIONS: [u16; 1] = [4];

const _: () = assert!(2 * MAX_OPAQUE + MAX_PROTECTION + 8 * MAX_TEXT < MAX_MESSAGE, "the longest Prepare fits");

/// How a rehearsal on the standby went.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
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
    /// It was not tried: another rehearsal is under way, or the standby takes no epochs any more. Says nothing about the copy.
    Busy,
}

/// When a standby may acknowledge an epoch's disk writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Durability {
    /// When they are on stable storage: they survive the loss of power on both hosts.
    #[default]
    Disk,
    /// When they are in its memory, as the guest's own memory is.
    Memory,
}

/// What the two sides of a replication connection tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
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
        /// What an acknowledgement promises of disk writes.
        durability: Durability,
        /// How whoever survives protects the VM again, opaque here.
        protection: Vec<u8>,
    },
    /// To the primary: the twin waits.
    Prepared,
    /// To the primary: this host cannot, or can no longer: it acknowledges nothing more.
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
    /// To the standby: the guest is of no use on the primary any more, it died or does not answer. Its agent lives and does not
    /// contest, unless the guest answers again.
    GuestDied {
        /// What happened to it, in words.
        how: String,
        /// Its process has ended: it cannot run again.
        ended: bool,
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
    /// To the primary: the operator here asked for a rehearsal, it begins, and acknowledgements may be late.
    Rehearsing {
        /// Which epoch.
        epoch: Epoch,
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

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use heartbeat_core::ids::{Generation, Incarnation};
    use proptest::prelude::*;

    fn party() -> impl Strategy<Value = Party> {
        (any::<[u8; 16]>(), any::<u64>())
            .prop_map(|(node, life)| Party { node: NodeId(node), incarnation: Incarnation(life) })
    }

    fn opaque() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..300)
    }

    fn rehearsal() -> impl Strategy<Value = RehearsalResult> {
        prop_oneof![
            (any::<u32>(), any::<u32>()).prop_map(|(launch, load)| RehearsalResult::Loads {
                launch: Duration::from_micros(launch.into()),
                load: Duration::from_micros(load.into()),
            }),
            ".{0,40}".prop_map(|reason| RehearsalResult::Fails { reason }),
            Just(RehearsalResult::Busy),
        ]
    }

    /// Every kind of message. A new kind that is missing here does not compile in `kind` below.
    fn message() -> impl Strategy<Value = PeerMessage> {
        let epoch = || any::<u64>().prop_map(Epoch);
        prop_oneof![
            (prop::collection::vec(any::<u16>(), 0..MAX_VERSIONS), party(), any::<[u8; 16]>())
                .prop_map(|(versions, party, vm)| PeerMessage::Hello { versions, party, vm: VmId(vm) }),
            (any::<[u8; 16]>(), ".{0,40}", any::<u64>(), opaque(), opaque(), any::<bool>(), opaque()).prop_map(
                |(vm, name, generation, recipe, layout, disk, protection)| PeerMessage::Prepare {
                    vm: VmId(vm),
                    name,
                    generation: Generation(generation),
                    recipe,
                    layout,
                    durability: if disk { Durability::Disk } else { Durability::Memory },
                    protection,
                }
            ),
            Just(PeerMessage::Prepared),
            ".{0,40}".prop_map(|reason| PeerMessage::Refused { reason }),
            (any::<u64>(), any::<u64>(), epoch()).prop_map(|(generation, incarnation, epoch)| {
                PeerMessage::Acknowledge {
                    generation: Generation(generation),
                    incarnation: Incarnation(incarnation),
                    epoch,
                }
            }),
            epoch().prop_map(|epoch| PeerMessage::Rehearse { epoch }),
            (epoch(), rehearsal()).prop_map(|(epoch, result)| PeerMessage::Rehearsed { epoch, result }),
            epoch().prop_map(|epoch| PeerMessage::Binding { epoch }),
            (".{0,40}", any::<bool>()).prop_map(|(how, ended)| PeerMessage::GuestDied { how, ended }),
            Just(PeerMessage::Unprotect),
            epoch().prop_map(|epoch| PeerMessage::Planned { epoch }),
            (0..ProtectionState::ALL.len(), ".{0,40}")
                .prop_map(|(state, reason)| PeerMessage::Status { state: ProtectionState::ALL[state], reason }),
            epoch().prop_map(|epoch| PeerMessage::Rehearsing { epoch }),
        ]
    }

    fn kind(message: &PeerMessage) -> usize {
        match message {
            PeerMessage::Hello { .. } => 0,
            PeerMessage::Prepare { .. } => 1,
            PeerMessage::Prepared => 2,
            PeerMessage::Refused { .. } => 3,
            PeerMessage::Acknowledge { .. } => 4,
            PeerMessage::Rehearse { .. } => 5,
            PeerMessage::Rehearsed { .. } => 6,
            PeerMessage::Binding { .. } => 7,
            PeerMessage::GuestDied { .. } => 8,
            PeerMessage::Unprotect => 9,
            PeerMessage::Planned { .. } => 10,
            PeerMessage::Status { .. } => 11,
            PeerMessage::Rehearsing { .. } => 12,
        }
    }

    proptest! {
        /// P30.
        #[test]
        fn messages_come_back_as_they_were(message in message()) {
            let bytes = message.encode().expect("within its bounds");
            // The kind is the number on the wire: adding one at the end keeps the others.
            prop_assert_eq!(usize::from(bytes[0]), kind(&message));
            prop_assert_eq!(PeerMessage::decode(&bytes), Ok(message));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(message) = PeerMessage::decode(&bytes) {
                // Not the same bytes: a duration may come with a second's worth of nanoseconds or more.
                let again = message.encode().expect("it fits where it came from");
                prop_assert_eq!(PeerMessage::decode(&again), Ok(message));
            }
        }

        #[test]
        fn texts_are_cut_at_a_character(text in ".{0,2000}") {
            let cut = clip(&text);
            prop_assert!(cut.len() <= MAX_TEXT && text.starts_with(&cut));
            prop_assert!(cut.len() == text.len() || cut.len() + 4 > MAX_TEXT);
        }
    }

    #[test]
    fn the_longest_prepare_fits_and_a_longer_message_does_not() {
        let prepare = |opaque: usize| PeerMessage::Prepare {
            vm: VmId::default(),
            name: "x".repeat(MAX_TEXT),
            generation: Generation(1),
            recipe: vec![1; opaque],
            layout: vec![2; opaque],
            durability: Durability::Disk,
            protection: vec![3; MAX_PROTECTION],
        };
        let bytes = prepare(MAX_OPAQUE).encode().expect("fits");
        assert_eq!(PeerMessage::decode(&bytes), Ok(prepare(MAX_OPAQUE)));
        assert!(matches!(prepare(MAX_MESSAGE / 2).encode(), Err(WireError::TooLong { .. })));
    }

    /// P31.
    #[test]
    fn the_newest_common_version_is_spoken_and_zero_never() {
        assert_eq!(newest_common(&[3, 2, 1], &[2, 1]), Some(2));
        assert_eq!(newest_common(&[1], &[2]), None);
        assert_eq!(newest_common(&[0], &[0]), None);
        assert_eq!(newest_common(&VERSIONS, &VERSIONS), Some(4));
    }

    #[test]
    fn close_codes_have_numbers_of_their_own_and_none_is_zero() {
        for code in CloseCode::ALL {
            assert_ne!(code.code(), 0);
            assert_eq!(CloseCode::from_code(code.code().into()), Some(code));
        }
        assert_eq!(CloseCode::from_code(0), None);
        assert_eq!(CloseCode::from_code(99), None);
    }
}
