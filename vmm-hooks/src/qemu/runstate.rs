//! What a QEMU is doing, asked from outside of a protection.

use serde_json::json;

use super::Target;
use super::discover::connect;
use crate::guest::{GuestError, GuestErrorKind};

/// QEMU's own word for it: `running`, `paused`, `inmigrate` (a twin that waits), `shutdown`, ...
///
/// # Errors
/// If there is no such process, or its monitor does not answer.
pub fn run_state(target: &Target) -> Result<String, GuestError> {
    let (mut qmp, _) = connect(target)?;
    let status = qmp.execute("query-status", json!({}))?;
    let word = status["status"].as_str().map(str::to_owned);
    word.ok_or_else(|| GuestError::new(GuestErrorKind::Failed, "QEMU does not say whether it runs"))
}
