//! How the errors of this back end's parts become [`GuestError`]s.

use super::qmp::QmpError;
use super::ram::RamError;
use crate::guest::{GuestError, GuestErrorKind};
use crate::sys::process::ProcessError;
use crate::track::TrackError;

impl From<QmpError> for GuestError {
    fn from(error: QmpError) -> Self {
        let (kind, advice) = match &error {
            QmpError::Connect { .. } => (
                GuestErrorKind::Refused,
                "check the path and that QEMU runs; a QEMU without a QMP socket must be started with -qmp unix:PATH,server=on,wait=off",
            ),
            QmpError::NoGreeting { .. } => (
                GuestErrorKind::Refused,
                "a monitor serves one client: start QEMU with a second -qmp unix:PATH,server=on,wait=off and name that path",
            ),
            QmpError::Closed => (GuestErrorKind::Gone, ""),
            QmpError::TimedOut { .. } => {
                (GuestErrorKind::Failed, "QEMU may be stuck on a disk or network it waits for; it was not changed")
            }
            QmpError::Refused { .. } | QmpError::Malformed { .. } | QmpError::Io(_) => (GuestErrorKind::Failed, ""),
        };
        let mut message = error.to_string();
        if let QmpError::Connect { source, .. } | QmpError::Io(source) = &error {
            message = format!("{message}: {source}");
        }
        Self::new(kind, message).advise(advice).because(error)
    }
}

impl From<ProcessError> for GuestError {
    fn from(error: ProcessError) -> Self {
        let kind = match error {
            ProcessError::Gone { .. } | ProcessError::Reused { .. } => GuestErrorKind::Gone,
            _ => GuestErrorKind::Failed,
        };
        Self::new(kind, error.to_string()).because(error)
    }
}

impl From<TrackError> for GuestError {
    fn from(error: TrackError) -> Self {
        match error {
            TrackError::Process(error) => error.into(),
            error => Self::new(GuestErrorKind::Failed, error.to_string()).because(error),
        }
    }
}

impl From<RamError> for GuestError {
    fn from(error: RamError) -> Self {
        match error {
            RamError::Qmp(error) => error.into(),
            error => Self::new(GuestErrorKind::Refused, error.to_string())
                .advise("nothing was changed; a newer QEMU prints the addresses itself")
                .because(error),
        }
    }
}
