//! What a QEMU is doing, asked from outside of a protection; and letting one run that a dead agent left standing.

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

/// Lets a guest run that is paused. Whether it was. The caller must know that no other copy of it may run, and that no owner of it
/// paused it.
///
/// # Errors
/// If there is no such process, or its monitor does not answer.
pub fn let_run(target: &Target) -> Result<bool, GuestError> {
    let (mut qmp, _) = connect(target)?;
    if qmp.execute("query-status", json!({}))?["status"] != "paused" {
        return Ok(false);
    }
    qmp.execute("cont", json!({}))?;
    Ok(true)
}
