//! The thread that owns a twin on the standby: applies committed epochs in order, rehearses, activates.
//!
//! Promise: commands are done in the order in which they came, so an activation finds exactly the last epoch that was
//! given before it. How many epochs may wait is bounded by the intake's room ([`super::intake`]).

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use vmm_hooks::guest::{Activation, GuestError, Rehearsal, Survivor, Twin};

use super::intake::Staged;
use crate::pages::staged::DeviceState;

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    /// Apply a part of the initial sync or a committed epoch.
    Apply(Box<Staged>),
    /// Prove that the state applied last loads.
    Rehearse,
    /// Go on from the state applied last.
    Activate,
    /// Let the activated twin go on by itself, and end the thread.
    Release,
    /// End the twin, and the thread.
    Destroy,
}

/// What it answers.
#[derive(Debug)]
pub(super) enum Report {
    /// The answer to [`Command::Rehearse`].
    Rehearsed(Result<Rehearsal, GuestError>),
    /// The answer to [`Command::Activate`].
    Activated(Result<Activation, GuestError>),
    /// The answer to [`Command::Release`].
    Released(Result<Survivor, GuestError>),
    /// The answer to [`Command::Destroy`].
    Destroyed(Result<(), GuestError>),
}

/// Runs until released or destroyed. If its task is gone, a twin that was not activated is destroyed: nobody can
/// acknowledge for it any more.
pub(super) fn run(
    mut twin: Box<dyn Twin>,
    mut commands: UnboundedReceiver<Command>,
    reports: &UnboundedSender<Report>,
) {
    let memory = twin.memory();
    let mut device = DeviceState::default();
    let mut activated = false;
    while let Some(command) = commands.blocking_recv() {
        let report = match command {
            Command::Apply(staged) => {
                staged.epoch.apply(&*memory);
                // A part of the initial sync carries no device state.
                device = staged.epoch.device().unwrap_or(device);
                continue;
            }
            Command::Rehearse => Report::Rehearsed(twin.rehearse(&device)),
            Command::Activate => {
                let answer = twin.activate(&device);
                activated = answer.is_ok();
                Report::Activated(answer)
            }
            Command::Release => {
                let _ = reports.send(Report::Released(twin.release()));
                return;
            }
            Command::Destroy => {
                let _ = reports.send(Report::Destroyed(twin.destroy()));
                return;
            }
        };
        // A report that nobody waits for is dropped: the next receive sees that the task is gone.
        let _ = reports.send(report);
    }
    if activated {
        if let Err(error) = twin.release() {
            tracing::error!(%error, "an activated twin could not be let go");
        }
    } else if let Err(error) = twin.destroy() {
        tracing::error!(%error, "the twin could not be removed");
    }
}
