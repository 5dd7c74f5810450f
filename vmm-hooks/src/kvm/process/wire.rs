//! The messages between a microVM's process and its protector: bincode with fixed-width little-endian integers, one message a packet of at most
//! [`MESSAGE_MAX`] bytes, each with the number of its question.
//!
//! Both ends are one program, so versions never meet; that they are equal is looked at all the same.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

use crate::guest::{GuestError, GuestErrorKind, GuestEvent};

/// Changes with every change of a message or of the board.
pub(super) const VERSION: u32 = 3;
/// Longest message.
pub(super) const MESSAGE_MAX: usize = 64 << 10;
/// Longest sentence of an error.
const WORDS_MAX: usize = 2000;

fn config() -> Configuration<LittleEndian, Fixint, Limit<{ 4 * MESSAGE_MAX }>> {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<{ 4 * MESSAGE_MAX }>()
}

/// Writes a message to `into`; its length. `None`: it is too long.
pub(super) fn encode<T: Encode>(number: u32, message: &T, into: &mut [u8]) -> Option<usize> {
    bincode::encode_into_slice((number, message), into, config()).ok()
}

/// The number and the message that `bytes` are, all of them. `None`: they are no message.
pub(super) fn decode<T: Decode<()>>(bytes: &[u8]) -> Option<(u32, T)> {
    let (message, length) = bincode::decode_from_slice(bytes, config()).ok()?;
    (length == bytes.len()).then_some(message)
}

/// What a process is asked. Of number zero nobody waits for the answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Request {
    /// Make the machine. Descriptors: KVM, memory, board, bell, the gate's socket, then, unless it is a twin's, the wire, the kernel and the initramfs
    /// if there are such, and the disks.
    Start(Start),
    /// Make the rest of a twin's machine, and load the first so many bytes of the board's state into it. Descriptors: the wire if there is one, and the disks.
    Load {
        bytes: u64,
        wire: bool,
    },
    /// Stop it.
    Pause,
    /// Let it run.
    Resume,
    /// Stop it, seal its output (`begin`: hold it from now on) so that what comes is of epoch `next`, and capture. `go_on`: let it run again if
    /// what was captured is small enough ([`Captured::gone_on`]).
    Epoch {
        begin: bool,
        next: u64,
        go_on: bool,
    },
    /// Capture a machine that stands.
    Capture,
    /// The rest of a capture's disk writes.
    MoreWrites,
    Arm,
    Harvest,
    Mirror,
    Progress,
    /// Take disk writes, at most `bytes` of data; wait so long for the first.
    TakeWrites {
        bytes: u64,
        micros: u64,
    },
    Unmirror,
    /// End mirroring and tracking, let it run; `open`: open the gate before.
    Detach {
        open: bool,
    },
    Events,
    /// Nothing: what was asked before is done when this is answered.
    Look,
    /// Order the pilot to do something.
    Order {
        words: Vec<u32>,
        millis: u64,
    },
    /// What the guest wrote to its serial port last.
    Serial,
}

/// What the gate of a machine is asked, on a socket of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(super) enum GateRequest {
    Hold(u64),
    Seal(u64),
    Release(u64),
    Open,
    Shut,
    /// Tell the network where the machine is.
    Announce,
}

/// How a machine is made.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Start {
    pub(super) version: u32,
    /// JSON: a `Spec`, or for a twin the body of a recipe.
    pub(super) description: String,
    pub(super) what: What,
    /// Whether a wire is among the descriptors.
    pub(super) wire: bool,
    /// The gate's bounds.
    pub(super) held_bytes: u64,
    pub(super) held_millis: u64,
}

/// What a machine begins with.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum What {
    Pilot {
        path: String,
        address: u32,
        prefix: u8,
        gateway: Option<u32>,
        log: bool,
    },
    Linux {
        path: String,
        initrd: Option<String>,
        cmdline: String,
    },
    /// Nothing yet: it waits for a state. `scratch`: its memory is its own, and it only shows that the state loads.
    Twin {
        scratch: bool,
    },
}

/// What a process answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Answer {
    Done,
    Failed(Failure),
    Started(Started),
    Captured(Captured),
    Sealed(u64),
    Progress { done: u64, total: u64, ready: bool },
    Writes(Writes),
    Events(Vec<Event>),
    Text(String),
}

/// A machine that was made.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Started {
    /// The body of its recipe.
    pub(super) body: String,
    /// Its disks' sizes.
    pub(super) disks: Vec<u64>,
    pub(super) note: Option<String>,
}

/// An epoch that was captured: its pages, state and first writes are on the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(super) struct Captured {
    /// Frames that it holds.
    pub(super) held: u64,
    pub(super) harvest_nanos: u64,
    pub(super) device_nanos: u64,
    /// Bytes of its state.
    pub(super) state: u64,
    pub(super) writes: Writes,
    /// There if the machine was let run already: then copies of its pages are on the board, too, and its writes are there all.
    pub(super) gone_on: Option<GoneOn>,
}

/// A machine that was let run again before its capture was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(super) struct GoneOn {
    /// When, in nanoseconds of the monotonic clock.
    pub(super) at: u64,
    pub(super) copy_nanos: u64,
    pub(super) resume_nanos: u64,
    /// How many pages' copies are on the board, ascending: of all pages there that were found.
    pub(super) pages: u64,
}

/// Disk writes on the board.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub(super) struct Writes {
    pub(super) count: u32,
    /// Others wait, and are asked for.
    pub(super) more: bool,
}

/// See [`GuestError`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Failure {
    /// 0 refused, 1 failed, 2 gone.
    kind: u8,
    message: String,
    advice: String,
    causes: Vec<String>,
}

/// See [`GuestEvent`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Event {
    Shutdown,
    Died(String),
}

fn short(text: impl Into<String>) -> String {
    let mut text = text.into();
    text.truncate(text.floor_char_boundary(WORDS_MAX));
    text
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        let mut causes = Vec::new();
        let mut next = error.source.as_deref().map(|source| source as &dyn std::error::Error);
        while let Some(cause) = next.filter(|_| causes.len() < 4) {
            causes.push(short(cause.to_string()));
            next = cause.source();
        }
        let kind = match error.kind {
            GuestErrorKind::Refused => 0,
            GuestErrorKind::Failed => 1,
            GuestErrorKind::Gone => 2,
        };
        Self { kind, message: short(error.message), advice: short(error.advice), causes }
    }
}

impl From<Failure> for GuestError {
    fn from(failure: Failure) -> Self {
        let kind = match failure.kind {
            0 => GuestErrorKind::Refused,
            2 => GuestErrorKind::Gone,
            _ => GuestErrorKind::Failed,
        };
        let error = Self::new(kind, failure.message).advise(failure.advice);
        if failure.causes.is_empty() { error } else { error.because(failure.causes.join(": ")) }
    }
}

impl Event {
    pub(super) fn of(event: GuestEvent) -> Option<Self> {
        match event {
            GuestEvent::Shutdown => Some(Self::Shutdown),
            GuestEvent::Died { how } => Some(Self::Died(short(how))),
            // A microVM has no owner beside its protector, no reset and no hot-plug.
            GuestEvent::Reset | GuestEvent::Paused | GuestEvent::Resumed | GuestEvent::Changed { .. } => None,
        }
    }
}

impl From<Event> for GuestEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Shutdown => Self::Shutdown,
            Event::Died(how) => Self::Died { how },
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing {
    //! Target `microvm`: what comes from a microVM's process, in which a guest may have broken out: messages, and the disk writes on the board. Not
    //! part of the API.
    //!
    //! Holds: it is refused, or is written as the very bytes it was read from; no write is outside of its disk.

    use super::super::board::Board;
    use super::{Answer, GateRequest, MESSAGE_MAX, Request, decode, encode};
    use bincode::{Decode, Encode};

    const SIZES: [u64; 2] = [1 << 20, 4096];

    fn again<T: Encode + Decode<()>>(bytes: &[u8]) {
        let Some((number, message)) = decode::<T>(bytes) else { return };
        let mut written = vec![0; MESSAGE_MAX];
        let length = encode(number, &message, &mut written).expect("as long as it was");
        assert_eq!(&written[..length], bytes, "a message reads otherwise than it was written");
    }

    /// Does what one input says.
    pub(crate) fn run(input: &[u8]) {
        let input = &input[..input.len().min(MESSAGE_MAX)];
        again::<Answer>(input);
        again::<Request>(input);
        again::<GateRequest>(input);
        let Some((&count, rest)) = input.split_first() else { return };
        let board = Board::new("fuzz", 1, 64).expect("a small one");
        board.put_raw_writes(rest);
        let mut writes = Vec::new();
        if board.read_writes(count.into(), &SIZES, &mut writes).is_ok() {
            assert_eq!(writes.len(), usize::from(count));
        }
        for write in writes {
            let end = write.offset.checked_add(write.bytes()).expect("inside of its disk");
            assert!(write.bytes() > 0 && end <= SIZES[write.disk as usize], "a write outside of its disk");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round<T: Encode + Decode<()> + PartialEq + Clone + std::fmt::Debug>(message: &T) {
        let mut bytes = vec![0; MESSAGE_MAX];
        let length = encode(7, message, &mut bytes).expect("it is short");
        assert_eq!(decode::<T>(&bytes[..length]), Some((7, message.clone())));
        for cut in 0..length {
            assert_eq!(decode::<T>(&bytes[..cut]), None, "a part of a message");
        }
        assert_eq!(decode::<T>(&bytes[..=length]), None, "more than a message");
        fuzzing::run(&bytes[..length]);
    }

    #[test]
    fn messages_read_as_they_were_written_and_no_part_of_one_does() {
        let start = Start {
            version: VERSION,
            description: "{}".to_owned(),
            what: What::Linux { path: "/k".to_owned(), initrd: Some("/i".to_owned()), cmdline: "quiet".to_owned() },
            wire: true,
            held_bytes: 1,
            held_millis: 2,
        };
        for request in [
            Request::Start(start.clone()),
            Request::Start(Start { what: What::Twin { scratch: true }, ..start }),
            Request::Load { bytes: 9, wire: true },
            Request::Epoch { begin: false, next: u64::MAX, go_on: true },
            Request::TakeWrites { bytes: 1, micros: 2 },
            Request::Order { words: vec![1, 2], millis: 3 },
            Request::Serial,
        ] {
            round(&request);
        }
        let writes = Writes { count: 3, more: true };
        let stands = Captured { held: 1, harvest_nanos: 2, device_nanos: 3, state: 4, writes, gone_on: None };
        let gone_on = Some(GoneOn { at: 5, copy_nanos: 6, resume_nanos: 7, pages: 8 });
        for answer in [
            Answer::Done,
            Answer::Captured(stands),
            Answer::Captured(Captured { gone_on, ..stands }),
            Answer::Events(vec![Event::Shutdown, Event::Died("it fell".to_owned())]),
            Answer::Started(Started { body: "{}".to_owned(), disks: vec![1], note: None }),
        ] {
            round(&answer);
        }
        round(&GateRequest::Seal(5));
    }

    #[test]
    fn an_error_keeps_its_kind_its_words_and_its_causes() {
        let error = GuestError::new(GuestErrorKind::Gone, "é".repeat(WORDS_MAX)).advise("look").because("it fell");
        let error = GuestError::from(Failure::from(error));
        assert_eq!((error.kind, error.advice.as_str(), error.message.len()), (GuestErrorKind::Gone, "look", WORDS_MAX));
        assert_eq!(error.source.expect("it has a cause").to_string(), "it fell");
    }
}
