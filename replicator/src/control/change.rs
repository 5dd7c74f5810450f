//! Changes of hands that an operator asks for, and by what they have ended.

use super::api::{ProtectionState, Role, VmStatus};

/// A change of hands that an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The VM is to run on the other host than now.
    HandOver,
    /// The VM is to go on here, whichever copy this is.
    GoOn,
}

impl Change {
    /// Whether it is brought about where `status` is.
    #[must_use]
    pub fn is_done(self, status: &VmStatus) -> bool {
        use ProtectionState as State;
        let survives = status.role == Role::Survivor && !matches!(status.state, State::FailingOver | State::Error);
        let alone = matches!(status.state, State::Degraded | State::Unprotected);
        match self {
            Self::HandOver => survives || status.state == State::Fenced,
            // It was this host's guest that waited.
            Self::GoOn => survives || (status.role == Role::Primary && alone),
        }
    }
}
