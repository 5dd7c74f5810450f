//! The simulated network: datagrams that are lost, late, doubled and out of order, and one replication connection at a time whose
//! streams are in order, stall while their way is cut, and break.

use std::collections::VecDeque;

use heartbeat_core::ids::{Epoch, Generation, Incarnation};
use heartbeat_core::record::Record;
use heartbeat_core::store::{StoreAnswer, StoreRequest};
use heartbeat_core::time::Time;
use replicator_core::message::PeerMessage;

use super::history::State;

/// The end of the network that the witness is at; hosts are 0 and 1.
pub(super) const WITNESS: usize = 2;

/// What travels by itself.
#[derive(Clone, Debug)]
pub(super) enum Datagram {
    Heartbeat(Incarnation),
    Request {
        from: usize,
        request: StoreRequest,
    },
    Answer(StoreAnswer),
    /// What does the other host keep of the VM? Of this life of the asker's agent: a connection does not outlive it.
    AskKept {
        life: Incarnation,
    },
    /// This, for that life.
    Kept {
        life: Incarnation,
        record: Option<Record>,
    },
}

/// What travels on a stream.
#[derive(Clone, Debug)]
pub(super) enum Streamed {
    Control(PeerMessage),
    Epoch {
        generation: Generation,
        incarnation: Incarnation,
        epoch: Epoch,
        state: State,
    },
    /// The end: the other side closed.
    Closed,
}

/// A replication connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: u64,
    /// By receiver, then stream (0 control, 1 pages): what is under way and when it can be there at the earliest.
    pub(super) queues: [[VecDeque<(Time, Streamed)>; 2]; 2],
    /// Which host lost it or closed it.
    pub(super) lost: [bool; 2],
    /// When each host last could hear the other.
    pub(super) heard: [Time; 2],
}

impl Connection {
    pub(super) fn new(id: u64, now: Time) -> Self {
        Self { id, queues: Default::default(), lost: [false; 2], heard: [now; 2] }
    }
}

/// Until when nothing passes, by sender and receiver.
#[derive(Debug, Default)]
pub(super) struct Cuts([[Time; 3]; 3]);

impl Cuts {
    pub(super) fn cut(&mut self, from: usize, to: usize, until: Time) {
        self.0[from][to] = self.0[from][to].max(until);
    }

    pub(super) fn passes(&self, now: Time, from: usize, to: usize) -> bool {
        now >= self.0[from][to]
    }

    pub(super) fn heal(&mut self) {
        *self = Self::default();
    }
}
