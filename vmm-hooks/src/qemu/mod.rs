//! Back end `qemu`: a running, unmodified QEMU is attached to, captured, gated and left again as it was found.
//!
//! The primary's side is [`attach`], which gives a [`QemuGuest`]; the standby's side is [`QemuTwinHost`]. [`doctor`] says
//! beforehand what would stop protection. Nothing here needs a patched QEMU or a special option on its command line but
//! a QMP socket.
//!
//! | module | promise |
//! | --- | --- |
//! | `target` | finds the QEMU that the operator means |
//! | `qmp` | speaks to its monitor, never longer than a bound |
//! | `discover`, `network`, `ram` | find out what it is made of, or say that it is not clear |
//! | `checks`, `clock` | say what stops protection and what it costs, in words for operators |
//! | `gate`, `filters` | hold and release its frames by epochs |
//! | `disks` | mirror what the guest writes to its disks, and prove that none is missing |
//! | `image_hold` | keeps every stock QEMU from opening an image for writing |
//! | `state` | takes its device state in a form that loads |
//! | `guest` | pauses, captures, and loses no dirty page |
//! | `idle` | says whether the guest has nothing to do |
//! | `cmdline`, `recipe` | make a twin's command line out of the primary's |
//! | `twin` | launch, rehearse, activate and remove twins |

mod checks;
mod clock;
mod cmdline;
mod discover;
mod disks;
mod fault;
mod filters;
#[doc(hidden)]
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod gate;
mod guest;
mod idle;
mod image_hold;
mod network;
mod qmp;
mod ram;
mod recipe;
mod runstate;
mod state;
mod target;
mod twin;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::guest::GuestError;

pub use filters::remove_leftovers;
pub use guest::{QemuGuest, attach};
pub use image_hold::{HoldError, ImageHold};
pub use runstate::{let_run, run_state};
pub use target::{Target, resolve, running};
pub use twin::{QemuTwinHost, TwinHostOptions};

/// How everything of ours in a QEMU is called.
const OUR_PREFIX: &str = "understudy-";

/// Default bound on the bytes of held frames: 64 MiB.
pub const DEFAULT_HELD_BYTES_MAX: usize = 64 << 20;

/// Default bound on the age of a held frame; older ones are dropped rather than released late.
pub const DEFAULT_HELD_AGE_MAX: Duration = Duration::from_secs(5);

/// How to attach to a QEMU.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttachOptions {
    /// Bound on the bytes of held frames; at the bound the newest frames are dropped and counted.
    pub held_bytes_max: usize,
    /// Bound on the age of a held frame; what is older is dropped and counted.
    pub held_age_max: Duration,
    /// How dirty pages are found.
    pub tracker: TrackerChoice,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            held_bytes_max: DEFAULT_HELD_BYTES_MAX,
            held_age_max: DEFAULT_HELD_AGE_MAX,
            tracker: TrackerChoice::Auto,
        }
    }
}

/// How dirty pages are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerChoice {
    /// PAGEMAP_SCAN if the kernel has it, else soft-dirty bits if it has these and all memory is private, full comparison otherwise.
    #[default]
    Auto,
    /// PAGEMAP_SCAN on an injected userfaultfd, or refuse.
    PagemapScan,
    /// Soft-dirty bits, or refuse.
    SoftDirty,
    /// Comparison of all memory with a copy of it: slow, works everywhere.
    Compare,
}

/// How one point of the checklist stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckLevel {
    /// Good.
    Ok,
    /// Protection works; the operator must know this.
    Warning,
    /// Stops protection.
    Refusal,
}

/// One point of the checklist that [`doctor`] prints and [`attach`] obeys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at, in a few words: `kernel tracker`, `network net0`.
    pub name: String,
    /// How it stands.
    pub level: CheckLevel,
    /// One sentence: what was found.
    pub message: String,
    /// One sentence: what to do. Empty if there is nothing to do.
    pub advice: String,
}

/// The checklist of this host, and of one QEMU if `target` is given. Changes nothing in the guest; the QMP monitor is
/// used for a moment.
#[must_use]
pub fn doctor(target: Option<&Target>) -> Vec<Check> {
    let tracker = TrackerChoice::Auto;
    let mut checks = checks::host(tracker);
    if let Some(target) = target {
        match examine(target, tracker) {
            Ok(of_target) => checks.extend(of_target),
            Err(error) => checks.push(Check {
                name: "monitor".to_owned(),
                level: CheckLevel::Refusal,
                message: error.message,
                advice: error.advice,
            }),
        }
    }
    checks
}

fn examine(target: &Target, tracker: TrackerChoice) -> Result<Vec<Check>, GuestError> {
    let (mut qmp, process) = discover::connect(target)?;
    let found = discover::discover(&mut qmp, &process)?;
    Ok(checks::examine(&qmp, &found, tracker))
}
