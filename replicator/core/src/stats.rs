//! What the machines count, as plain structs; exporting is the driver's.

use core::time::Duration;

/// What a primary counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrimaryStats {
    /// Epochs captured.
    pub captured: u64,
    /// Captures that failed.
    pub capture_failures: u64,
    /// Epochs acknowledged.
    pub acknowledged: u64,
    /// Epochs put back.
    pub put_back: u64,
    /// Pages captured in epochs.
    pub pages: u64,
    /// Bytes captured in epochs, before encoding.
    pub bytes: u64,
    /// Time in pauses.
    pub pause: Duration,
    /// The last epoch's commit: from the end of its capture to its acknowledgement.
    pub last_commit: Duration,
    /// Acknowledgements that were not of this session, and ignored.
    pub stale_acknowledgements: u64,
    /// Times the peer was suspected.
    pub suspicions: u64,
    /// Epochs captured and not acknowledged now.
    pub in_flight: u64,
}

/// What a standby counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StandbyStats {
    /// Epochs committed.
    pub committed: u64,
    /// Epochs acknowledged.
    pub acknowledged: u64,
    /// Staged epochs that were thrown away: stale, or after the grant.
    pub discarded: u64,
    /// Rehearsals that went well.
    pub rehearsals: u64,
    /// Times the peer was suspected.
    pub suspicions: u64,
}
