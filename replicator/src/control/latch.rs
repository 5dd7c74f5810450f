//! May a VM be started here by something else than its agent?

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `POST /v1/may-start`: asked before a VM is booted from its disks. Answered with [`MayStart`] if it may be; else the error says why not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MayStartRequest {
    /// The VM's name, if it is known.
    #[serde(default)]
    pub vm: Option<String>,
    /// The images that it is to be started from.
    #[serde(default)]
    pub images: Vec<PathBuf>,
    /// Start from these images even if the VM has other disks by now.
    #[serde(default)]
    pub release: bool,
}

/// It may be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MayStart {
    /// Why, in one sentence.
    pub reason: String,
}
