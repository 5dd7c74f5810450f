//! The thread that owns a twin on the standby, and its disks' end: applies committed epochs in order, rehearses, activates.
//!
//! Promise: commands are done in the order in which they came, so an activation finds exactly the last epoch that was
//! given before it, and so does what is kept. Nothing waits for the latter: it has a thread of its own, which ends when the memory is to change. How many epochs may wait is bounded by the intake's room ([`super::intake`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use heartbeat_core::ids::Generation;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vmm_hooks::guest::{Activation, GuestError, Rehearsal, Survivor, Twin, TwinMemory};

use super::disks::DiskThreads;
use super::intake::Staged;
use super::kept::{self, About};
use crate::pages::staged::DeviceState;

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    /// Apply a part of the initial sync or a committed epoch.
    Apply(Box<Staged>),
    /// Prove that the state applied last loads.
    Rehearse,
    /// Make the state applied last, which is that of the epoch named, durable in a directory.
    Keep {
        /// By which grant.
        grant: Generation,
        /// What it is of.
        about: Box<About>,
        /// Where.
        dir: PathBuf,
    },
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
    /// The answer to [`Command::Keep`], of this grant: where it is.
    Kept(Generation, Result<PathBuf, String>),
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
        device: DeviceState,
        reports: UnboundedSender<Report>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("us-twin".into())
            .spawn(move || run(twin, disks, device, inbox, &reports))?;
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

/// What is to be kept.
struct Writes {
    grant: Generation,
    about: Box<About>,
    dir: PathBuf,
    memory: Arc<dyn TwinMemory>,
    device: DeviceState,
}

/// A thread that writes a copy. Dropping it ends that soon, and does not wait for it.
struct Writer(Arc<AtomicBool>);

impl Writer {
    fn start(writes: Writes, reports: UnboundedSender<Report>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stops, grant, no_thread) = (Arc::clone(&stop), writes.grant, reports.clone());
        let write = move || {
            let Writes { grant, about, dir, memory, device } = writes;
            let written = kept::write(&dir, *about, &memory, &device, &stops);
            let _ = reports.send(Report::Kept(grant, written.map(|()| dir).map_err(|error| error.to_string())));
        };
        if let Err(error) = std::thread::Builder::new().name("us-keep".into()).spawn(write) {
            let _ = no_thread.send(Report::Kept(grant, Err(format!("the system has no thread: {error}"))));
        }
        Self(stop)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs until released or destroyed, or until nobody asks any more.
fn run(
    mut twin: Box<dyn Twin>,
    mut disks: Option<DiskThreads>,
    mut device: DeviceState,
    mut commands: UnboundedReceiver<Command>,
    reports: &UnboundedSender<Report>,
) {
    let memory = twin.memory();
    let mut activated = false;
    let mut writer: Option<Writer> = None;
    while let Some(command) = commands.blocking_recv() {
        let report = match command {
            Command::Apply(staged) => {
                staged.epoch.apply(&*memory);
                // A part of the initial sync carries no device state.
                device = staged.epoch.device().unwrap_or(device);
                continue;
            }
            Command::Rehearse => Report::Rehearsed(twin.rehearse(&device)),
            Command::Keep { grant, about, dir } => {
                let held = disks.as_mut().map_or(Ok(()), |disks| disks.hold(about.epoch));
                match held {
                    Ok(()) => {
                        let writes = Writes { grant, about, dir, memory: Arc::clone(&memory), device: device.clone() };
                        drop(writer.replace(Writer::start(writes, reports.clone())));
                    }
                    Err(error) => drop(reports.send(Report::Kept(grant, Err(error.message)))),
                }
                continue;
            }
            Command::Activate { epoch, generation } => {
                // From here on the guest may change it.
                drop(writer.take());
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
