//! An attached QEMU.

use super::{AttachOptions, Target};
use crate::guest::{GuestError, GuestErrorKind};

/// A running QEMU that we are attached to; a [`crate::guest::Guest`].
#[derive(Debug)]
pub struct QemuGuest {}

/// Attaches to a running QEMU, after every check that [`super::doctor`] does. The guest goes on running; its output passes
/// as before and nothing is tracked yet.
///
/// # Errors
/// [`GuestErrorKind::Refused`] with the first refusal of the checklist, or [`GuestErrorKind::Failed`]; QEMU is as it was.
pub fn attach(target: &Target, options: &AttachOptions) -> Result<QemuGuest, GuestError> {
    Err(GuestError::new(GuestErrorKind::Refused, format!("cannot attach to {target} with {options:?} yet")))
}
