//! The thread that owns a twin on the standby, and its disks' end: applies committed epochs in order, rehearses, activates.
//!
//! Promise: commands are done in the order in which they came, so an activation finds exactly the last epoch that was
//! given before it. How many epochs may wait is bounded by the intake's room ([`super::intake`]).

use std::thread::JoinHandle;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vmm_hooks::guest::{Activation, GuestError, Rehearsal, Survivor, Twin};

use super::disks::DiskThreads;
use super::intake::Staged;
use crate::pages::staged::DeviceState;

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    /// Apply a part of the initial sync or a committed epoch.
    Apply(Box<Staged>),
    /// Prove that the state applied last loads.
    Rehearse,
    /// Go on from the state applied last, which is that of `epoch`, by the grant of `generation`.
    Activate {
        /// The epoch.
        epoch: u64,
        /// The grant's generation.
        generation: u64,
    },
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

/// The running thread. Dropping it ends it, and the runtime waits for that end: a twin that was not activated is destroyed
/// then, for nobody can acknowledge for it any more.
#[derive(Debug)]
pub(super) struct TwinThread {
    commands: Option<UnboundedSender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl TwinThread {
    /// Starts it.
    ///
    /// # Errors
    /// If the system has no thread; the twin is gone then.
    pub(super) fn start(
        twin: Box<dyn Twin>,
        disks: Option<DiskThreads>,
        reports: UnboundedSender<Report>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = unbounded_channel();
        let thread =
            std::thread::Builder::new().name("us-twin".into()).spawn(move || run(twin, disks, inbox, &reports))?;
        Ok(Self { commands: Some(commands), thread: Some(thread) })
    }

    /// Asks for something. A thread that has ended was told to: then there is nothing left to ask.
    pub(super) fn command(&self, command: Command) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }
}

impl Drop for TwinThread {
    fn drop(&mut self) {
        // The closed queue is what ends the thread.
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            let join = move || {
                if thread.join().is_err() {
                    tracing::error!("a twin's thread panicked");
                }
            };
            drop(tokio::task::spawn_blocking(join));
        }
    }
}

/// Runs until released or destroyed, or until nobody asks any more.
fn run(
    mut twin: Box<dyn Twin>,
    mut disks: Option<DiskThreads>,
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
            Command::Activate { epoch, generation } => {
                let finished = disks.as_mut().map_or(Ok(()), |disks| disks.finish(epoch, generation));
                let answer = finished.and_then(|()| twin.activate(&device));
                activated = answer.is_ok();
                Report::Activated(answer)
            }
            Command::Release => {
                let _ = reports.send(Report::Released(twin.release()));
                return;
            }
            Command::Destroy => {
                let destroyed = twin.destroy();
                if let Some(disks) = disks.take() {
                    disks.remove();
                }
                let _ = reports.send(Report::Destroyed(destroyed));
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
