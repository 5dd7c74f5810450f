//! Deliberate mistakes: what the checker must find.

/// How the cores are joined to the world. All but the first are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wiring {
    /// As it should be.
    Faithful,
    /// The primary releases an epoch's output when the epoch is sent (`docs/protocol.md` P1).
    ReleaseOnSent,
    /// The standby goes on acknowledging after its grant (P4).
    AcknowledgeAfterGrant,
    /// The primary opens its output when it asks to go alone, not when it was granted (P2, P3).
    AloneWithoutGrant,
    /// The witness answers a change before it is durable (P8).
    WitnessForgets,
    /// The witness shows a record to a reader while it is being made durable (P6, P8).
    ReadUndurable,
    /// The primary takes a refused ask for its defeat and destroys its guest (P6).
    RefusalIsDefeat,
    /// The loser destroys its guest when it falls mute, before the winner is known to run (P5).
    DestroyEarly,
    /// Output is held from one capture after the first that the standby will hold (P10).
    HoldLate,
    /// An agent that restarts loads a copy that it marked as activated once more (P62).
    ActivateTwice,
    /// The standby activates the epoch before the last that it acknowledged (P4).
    ActivateOlder,
    /// Frames emitted after a capture are tagged as before it (P1).
    SealEarly,
    /// A new life of an agent frees the guest that it finds before it has read the record (P61).
    FreeUnread,
    /// A new life takes a record that names a former life of its node, or none, for leave to free the guest (P61): what the former one asked may still be applied.
    FreeFormerLife,
    /// A new life gives a grant back without a look at its mark (P62).
    ForgetMark,
    /// An operator forces a host out that lives (P13).
    ForceUnconfirmed,
    /// A host's own store answers in a new life before it was shown what the other host has (P13).
    AnswerUnconfirmed,
    /// A host shows the other one the record of before while it is writing that it forces it out (P13).
    ShowWhileForcing,
    /// A host shows the other one the record of before between having it confirmed dead and forcing it out (P13).
    ShowWhileFencing,
    /// A winner that must have the other host switched off activates without waiting for that (P15).
    ActivateUnfenced,
    /// A new life goes on with a copy that a former one kept while it waited for its fence, whatever grant it is of and whoever ran by that (P62).
    KeptIsEnough,
}

impl Wiring {
    /// Every mistake.
    pub const MUTANTS: [Self; 20] = [
        Self::ReleaseOnSent,
        Self::AcknowledgeAfterGrant,
        Self::AloneWithoutGrant,
        Self::WitnessForgets,
        Self::ReadUndurable,
        Self::RefusalIsDefeat,
        Self::DestroyEarly,
        Self::HoldLate,
        Self::ActivateTwice,
        Self::ActivateOlder,
        Self::SealEarly,
        Self::FreeUnread,
        Self::FreeFormerLife,
        Self::ForgetMark,
        Self::ForceUnconfirmed,
        Self::AnswerUnconfirmed,
        Self::ShowWhileForcing,
        Self::ShowWhileFencing,
        Self::ActivateUnfenced,
        Self::KeptIsEnough,
    ];
}
