//! What one heartbeat carries.

use bincode::{Decode, Encode};
use heartbeat_core::ids::{NodeId, VmId};

/// Guests reported in one heartbeat; more take turns. Keeps a heartbeat within the smallest QUIC datagram.
pub const MAX_REPORTS: usize = 32;
/// Largest heartbeat, in bytes.
pub(crate) const MAX_PULSE: usize = 1100;

/// How a guest is, as its own node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub enum GuestStatus {
    /// It runs.
    Running,
    /// It waits as a standby's twin.
    Standby,
    /// Its process lives but does not answer.
    Frozen,
    /// Its process is gone without a shutdown.
    Dead,
    /// It was shut down on purpose.
    Stopped,
}

/// A heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Pulse {
    /// The sender; must be the connection's peer.
    pub(crate) node: NodeId,
    /// Which life of it.
    pub(crate) incarnation: u64,
    /// Grows with each tick of that life; the same on all paths.
    pub(crate) sequence: u64,
    /// The sender's monotonic clock, in nanoseconds.
    pub(crate) sent: u64,
    /// The last heartbeat that the sender got on this path.
    pub(crate) echo: Option<Echo>,
    /// At most [`MAX_REPORTS`].
    pub(crate) reports: Vec<Report>,
}

/// What measures the round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Echo {
    /// `sent` of the echoed heartbeat.
    pub(crate) sent: u64,
    /// How long it was held before this one left, in nanoseconds.
    pub(crate) held: u64,
}

/// One guest's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Report {
    pub(crate) vm: VmId,
    pub(crate) status: GuestStatus,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quic::{decode, encode};

    #[test]
    fn the_largest_pulse_fits_a_datagram_and_survives_the_round_trip() {
        let report = Report { vm: VmId([9; 16]), status: GuestStatus::Frozen };
        let pulse = Pulse {
            node: NodeId([1; 16]),
            incarnation: 3,
            sequence: u64::MAX,
            sent: 5,
            echo: Some(Echo { sent: 6, held: 7 }),
            reports: vec![report; MAX_REPORTS],
        };
        let bytes = encode(&pulse);
        assert!(bytes.len() <= MAX_PULSE, "{}", bytes.len());
        assert_eq!(decode::<Pulse>(&bytes).expect("decode"), pulse);
    }
}
