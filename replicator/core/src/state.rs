//! The protection states that an operator sees.

use core::fmt;

use bincode::{Decode, Encode};

/// How well a VM is protected. Prints in kebab case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub enum ProtectionState {
    /// Runs, nobody protects it.
    #[default]
    Unprotected,
    /// The two hosts agree on it; nothing is copied yet.
    Pairing,
    /// The copy is being made; the VM is not protected yet.
    Syncing,
    /// A host may die now.
    Protected,
    /// Runs, was protected and is not any more.
    Degraded,
    /// One side asks to go alone, or activates.
    FailingOver,
    /// This copy lost and is mute, or was ended.
    Fenced,
    /// Nothing goes on without the operator.
    Error,
}

impl ProtectionState {
    /// Every state, in the order of a protection's life.
    pub const ALL: [Self; 8] = [
        Self::Unprotected,
        Self::Pairing,
        Self::Syncing,
        Self::Protected,
        Self::Degraded,
        Self::FailingOver,
        Self::Fenced,
        Self::Error,
    ];

    /// Its name, as operators and metrics see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Pairing => "pairing",
            Self::Syncing => "syncing",
            Self::Protected => "protected",
            Self::Degraded => "degraded",
            Self::FailingOver => "failing-over",
            Self::Fenced => "fenced",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for ProtectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::BTreeSet;
    use std::string::ToString;

    #[test]
    fn names_are_kebab_and_differ() {
        let names: BTreeSet<_> = ProtectionState::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), ProtectionState::ALL.len());
        assert!(names.iter().all(|name| name.chars().all(|letter| letter == '-' || letter.is_ascii_lowercase())));
        assert!(names.contains("failing-over"));
    }
}
