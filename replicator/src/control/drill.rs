//! Drills: what an operator breaks on purpose, and what the agent says before it is broken.
//!
//! The agent injures nothing. It says whether a drill may begin and what would be hit, and notes it among the VM's events; whoever
//! asked does the rest.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What is broken, on the host that runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DrillFault {
    /// The VM and this host's agent are killed at once, as the death of the host would
    KillPrimary,
    /// The VM is killed; the agent lives
    KillVm,
    /// The agent is killed; the VM is left running beside it, and is mute
    KillAgent,
    /// The agent stands still for a while (SIGSTOP), then goes on
    StopAgent,
}

impl DrillFault {
    /// As it is written on the command line.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::KillPrimary => "kill-primary",
            Self::KillVm => "kill-vm",
            Self::KillAgent => "kill-agent",
            Self::StopAgent => "stop-agent",
        }
    }

    /// Whether the VM's process is killed.
    #[must_use]
    pub fn hits_vm(self) -> bool {
        matches!(self, Self::KillPrimary | Self::KillVm)
    }

    /// Whether the agent is hit, and with it whatever else it has.
    #[must_use]
    pub fn hits_agent(self) -> bool {
        self != Self::KillVm
    }
}

impl fmt::Display for DrillFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// `POST /v1/drill`: say whether a drill may begin. Answered with [`DrillPlan`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillRequest {
    /// The VM's name.
    pub vm: String,
    /// What would be broken.
    pub fault: DrillFault,
    /// The operator has confirmed it: note it among the VM's events.
    pub confirmed: bool,
}

/// A process that stays the same one when its number is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessAt {
    /// Its number.
    pub pid: u32,
    /// When it started, in the kernel's clock ticks since boot.
    pub started: u64,
}

/// A drill that may begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillPlan {
    /// This host's name.
    pub host: String,
    /// Who goes on with the VM.
    pub peer: String,
    /// This life of the agent.
    pub incarnation: u64,
    /// Who may run is counted by it.
    pub generation: u64,
    /// The agent.
    pub agent: ProcessAt,
    /// The VM's process; absent if an agent of an earlier version had it inside.
    pub vm: Option<ProcessAt>,
    /// Other VMs of this agent that go through it, too.
    pub others: Vec<String>,
    /// What the operator should know before, one sentence each.
    pub warnings: Vec<String>,
}
