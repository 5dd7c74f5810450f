//! What a laboratory is made of, and which faults can be played in it.

use std::fmt;

use clap::ValueEnum;

use super::fault::{Fault, Front, Party, Side};

/// What runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// A stock QEMU with Linux and Redis.
    Qemu,
    /// `understudy run`, with the pilot guest.
    Kvm,
}

/// Who is asked who may run the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Store {
    /// The built-in witness.
    Witness,
    /// Three members of etcd.
    Etcd,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// What runs the VM.
    pub backend: Backend,
    /// Who is asked.
    pub store: Store,
}

impl Setting {
    /// What is played if nobody says otherwise.
    pub const MIX: [Self; 3] = [
        Self { backend: Backend::Qemu, store: Store::Witness },
        Self { backend: Backend::Qemu, store: Store::Etcd },
        Self { backend: Backend::Kvm, store: Store::Witness },
    ];

    /// Whether a fault can be played in it.
    #[must_use]
    pub fn plays(self, fault: Fault) -> bool {
        let of_etcd = matches!(fault, Fault::KillMember(_) | Fault::StopMember(_) | Fault::CutMember(_));
        let of_witness = matches!(
            fault,
            Fault::KillWitness | Fault::StopWitness | Fault::CutWitness | Fault::JumpClock(Party::Witness)
        );
        let store = match self.store {
            Store::Witness => !of_etcd,
            Store::Etcd => !of_witness,
        };
        store && (self.backend == Backend::Qemu || Self::a_microvm_stands(fault))
    }

    /// A microVM ends with its host's agent, and so for good when every copy's agent ends; its own process is killed by a scenario. The pilot
    /// cannot shut down, and its TCP has no timestamps by which frames of an acknowledged epoch are known that weather brought late, or that
    /// an agent lets go which stood still meanwhile.
    fn a_microvm_stands(fault: Fault) -> bool {
        !matches!(
            fault,
            Fault::KillQemu(_)
                | Fault::StopQemu(_)
                | Fault::KillAgents
                | Fault::StopAgent(Side::Primary)
                | Fault::KillWhileSyncing(Side::Primary)
                | Fault::KillWhileActivating
                | Fault::KillWhileMoving(_)
                | Fault::ShortOfMemory(_)
                | Fault::HangRedis
                | Fault::Reboot
                | Fault::Shutdown
                | Fault::Weather(_, Front::Delay | Front::Double | Front::Overtake | Front::Narrow)
        )
    }

    /// The name of its part of a run's directory: short, since sockets below it must fit in 107 bytes.
    #[must_use]
    pub fn dir(self) -> &'static str {
        match (self.backend, self.store) {
            (Backend::Qemu, Store::Witness) => "w",
            (Backend::Qemu, Store::Etcd) => "e",
            (Backend::Kvm, Store::Witness) => "k",
            (Backend::Kvm, Store::Etcd) => "m",
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = if self.backend == Backend::Qemu { "qemu" } else { "kvm" };
        write!(f, "{backend}+{}", if self.store == Store::Witness { "witness" } else { "etcd" })
    }
}
