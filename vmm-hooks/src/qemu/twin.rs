//! Twins on the standby.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::guest::{GuestError, GuestErrorKind, Recipe, Twin, TwinHost};
use crate::layout::Layout;

/// Where and how twins are made.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TwinHostOptions {
    /// Where each twin gets a directory of its own for its sockets and logs.
    pub run_dir: PathBuf,
    /// The QEMU program to use instead of the one that the primary runs.
    pub binary: Option<PathBuf>,
    /// Bridge of the primary's host to bridge of this host; one that is not listed keeps its name.
    pub bridges: BTreeMap<String, String>,
}

impl Default for TwinHostOptions {
    fn default() -> Self {
        Self { run_dir: PathBuf::from("/run/understudy/twins"), binary: None, bridges: BTreeMap::new() }
    }
}

/// Makes twins of QEMU guests on this host.
#[derive(Debug)]
pub struct QemuTwinHost {
    options: TwinHostOptions,
}

impl QemuTwinHost {
    /// A twin host with these options; does nothing yet.
    #[must_use]
    pub fn new(options: TwinHostOptions) -> Self {
        Self { options }
    }
}

impl TwinHost for QemuTwinHost {
    fn prepare(&self, name: &str, _recipe: &Recipe, _layout: &Layout) -> Result<Box<dyn Twin>, GuestError> {
        let run_dir = self.options.run_dir.display();
        Err(GuestError::new(GuestErrorKind::Refused, format!("cannot prepare a twin of {name} under {run_dir} yet")))
    }
}
