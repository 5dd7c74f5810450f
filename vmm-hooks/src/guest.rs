//! The traits that every back end offers, and what passes through them.
//!
//! The primary's side is a [`Guest`] with a [`Gate`] in front of its network; the standby's side is a
//! [`TwinHost`] that prepares a [`Twin`]. One contract test suite holds all back ends to what is said here.
//!
//! Calls on a [`Guest`] block and come from one thread, the pause path's; a [`Gate`] is used from any thread.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::disk::{DiskImage, DiskSpec, DiskWrite, MirrorProgress};
use crate::layout::{Layout, PageSet};

/// What went wrong with a guest, in words for its operator.
///
/// `message` says what happened, `advice` what is safe and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// Which kind it is: decides what the caller may do next.
    pub kind: GuestErrorKind,
    /// One sentence: what happened.
    pub message: String,
    /// One sentence: what is safe, what to do. Empty if there is nothing to add.
    pub advice: String,
    /// What caused it.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The kinds of [`GuestError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GuestErrorKind {
    /// The guest cannot be protected as it is; nothing was changed.
    Refused,
    /// This call failed, the guest is unharmed, and the call may be tried again.
    Failed,
    /// The guest is gone: its process has ended.
    Gone,
}

impl GuestError {
    /// An error of `kind` without advice and cause.
    #[must_use]
    pub fn new(kind: GuestErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), advice: String::new(), source: None }
    }

    /// Adds what is safe and what to do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

/// What the standby needs to build a twin: opaque to everyone between the two back ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The back end that wrote it and can read it: `qemu`, `kvm`, `sim`.
    pub backend: String,
    /// The back end's own description, as JSON text.
    pub body: String,
    /// The disks that are replicated with the guest, at most [`crate::disk::MAX_DISKS`].
    pub disks: Vec<DiskSpec>,
}

/// Everything of one epoch, copied aside. Reused between epochs, so that a pause allocates little.
#[derive(Debug, Default)]
pub struct Capture {
    /// Page numbers, ascending, without duplicates.
    pub pages: Vec<u64>,
    /// The pages' bytes in the same order, [`crate::layout::PAGE_SIZE`] each.
    pub bytes: Vec<u8>,
    /// Device and CPU state, in the back end's own form.
    pub device: Vec<u8>,
    /// What was written to the disks since the capture before, in the order of completion. Empty without mirrored disks.
    pub disk: Vec<DiskWrite>,
}

/// What becomes of a guest whose epoch was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// It stands until it is resumed.
    Stand,
    /// It is resumed next, and may go on by itself before that, as soon as nothing of the epoch has to be taken from it any more.
    Run,
}

/// Where a capture's pause went. Parts may overlap; `total` is from the call of pause until the guest ran again: to `ran_again`, or else to the return
/// of resume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PauseParts {
    /// Until the vCPUs stood and I/O was drained.
    pub stop: Duration,
    /// Finding the dirty pages and arming the tracker again.
    pub harvest: Duration,
    /// Saving device state.
    pub device: Duration,
    /// Copying the dirty pages aside.
    pub copy: Duration,
    /// Until the guest ran again.
    pub resume: Duration,
    /// The whole pause.
    pub total: Duration,
    /// When the guest went on by itself, if it did: its capture returned later.
    pub ran_again: Option<Instant>,
}

impl PauseParts {
    /// Fills `resume` and `total` of a pause that was called for at `start`, after the call of resume at `resuming` has returned; when the guest
    /// ran again.
    pub fn end(&mut self, start: Instant, resuming: Instant) -> Instant {
        let ran = self.ran_again.unwrap_or_else(|| {
            let now = Instant::now();
            self.resume = now.saturating_duration_since(resuming);
            now
        });
        self.total = ran.saturating_duration_since(start);
        ran
    }
}

/// What a guest did that its protector must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest shut itself down on purpose.
    Shutdown,
    /// The guest rebooted itself; it stays protected.
    Reset,
    /// Somebody else paused it.
    Paused,
    /// Somebody else resumed it.
    Resumed,
    /// Its process has ended without a shutdown.
    Died {
        /// How, in words.
        how: String,
    },
    /// Its devices or memory are not what they were when it was attached.
    Changed {
        /// What, in words.
        what: String,
    },
}

/// A running guest that can be paused, captured, gated and left again.
pub trait Guest: Send {
    /// Its memory. Does not change while it is attached.
    fn layout(&self) -> &Layout;

    /// What the standby needs to build its twin.
    fn recipe(&self) -> &Recipe;

    /// What protection does not hold or cover in it, one sentence each, for its operator.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// The gate in front of its network output. The same one at each call.
    fn gate(&self) -> Arc<dyn Gate>;

    /// Stops the vCPUs and drains I/O. Pausing a guest that this side has paused is no error.
    ///
    /// # Errors
    /// If it fails the guest runs on.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Lets the guest run again.
    ///
    /// # Errors
    /// If it fails the guest stands.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Whether the guest is seen to have nothing to do, at this look and since the one before. Cheap, never blocks, and no more
    /// than a hint: nothing is unsafe if it is wrong.
    fn idle(&mut self) -> bool {
        false
    }

    /// Waits until the guest is [`Guest::idle`], for at most so long; whether it is. A back end that is not told looks once more at the end.
    fn wait_idle(&mut self, most: Duration) -> bool {
        self.idle() || {
            std::thread::sleep(most);
            self.idle()
        }
    }

    /// Whether a pause is the work of the thread that asks for it alone. If not, others do most of it, and it gains nothing by going before them.
    fn pauses_alone(&self) -> bool {
        false
    }

    /// Starts tracking, while paused: from now on every written page is found by the next harvest.
    /// The caller must send all memory once after this.
    ///
    /// # Errors
    /// If it fails, nothing is tracked.
    fn arm(&mut self) -> Result<(), GuestError>;

    /// While paused: adds to `dirty` every page written since the last arming or harvest and every page that was
    /// put back, and arms the tracker again. On error nothing is lost: the next harvest returns these pages.
    ///
    /// # Errors
    /// See above.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError>;

    /// Gives pages back that were harvested and not committed; the next harvest returns them again.
    fn put_back(&mut self, dirty: &PageSet);

    /// Gives the disk writes of a capture back that is not sent: the next capture begins with them.
    fn put_back_writes(&mut self, _writes: Vec<DiskWrite>) {}

    /// Copies pages to `bytes` (cleared first), in the given order, paused or running. While it runs a page may be torn; it
    /// is then dirty and comes again.
    ///
    /// # Errors
    /// If a page cannot be read.
    fn read_pages(&mut self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError>;

    /// While paused: harvests, saves device state and copies the dirty pages aside, overlapped as the back end can, and takes
    /// the writes to mirrored disks, after it proved that no write is missing. Fills `parts` but for `stop`, `resume` and
    /// `total`. On error every harvested page has been put back, and disk writes come again.
    ///
    /// # Errors
    /// See above.
    fn capture(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError>;

    /// Pauses, seals the epoch's output (`begin`: holds output from now on), so that what is emitted later is of epoch `next`, and captures: a back end
    /// that has a way to its guest goes it once. Fills `parts` but for `total`, and for `resume` if the guest stands still. How many frames the sealed
    /// epoch holds.
    ///
    /// # Errors
    /// As for [`Guest::pause`] and [`Guest::capture`]; the guest may stand then, and is to be resumed.
    fn capture_epoch(
        &mut self,
        begin: bool,
        next: u64,
        _after: After,
        into: &mut Capture,
        parts: &mut PauseParts,
    ) -> Result<u64, GuestError> {
        let start = Instant::now();
        parts.ran_again = None;
        self.pause()?;
        parts.stop = start.elapsed();
        let held = if begin {
            self.hold_output(next)?;
            0
        } else {
            self.gate().seal(next)
        };
        self.capture(into, parts)?;
        Ok(held)
    }

    /// While paused: from now on output is held, tagged with `epoch`, until the gate releases it.
    ///
    /// # Errors
    /// If it fails, output passes as before.
    fn hold_output(&mut self, epoch: u64) -> Result<(), GuestError>;

    /// Releases what is held, in order, and lets output pass by itself from now on; takes the gate out of the way.
    ///
    /// # Errors
    /// If it fails, output may go on being held.
    fn open_output(&mut self) -> Result<(), GuestError>;

    /// Where the disks of the recipe are on this host, in its order. For somebody who only reads them when this guest is gone.
    fn disk_images(&self) -> Vec<DiskImage> {
        Vec::new()
    }

    /// Begins to mirror every disk of the recipe; a guest that runs may stand for a moment: all of its content, zeroes too, and every
    /// write from now on, comes as writes of [`Guest::take_writes`]. Does not wait for the copy.
    ///
    /// # Errors
    /// If it fails, nothing is mirrored.
    fn mirror_disks(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// How far the first copy is. Cheap; to be asked until it is ready. A guest without disks is ready at once.
    ///
    /// # Errors
    /// If a mirror broke; it has to be begun again.
    fn mirror_progress(&mut self) -> Result<MirrorProgress, GuestError> {
        Ok(MirrorProgress { ready: true, ..MirrorProgress::default() })
    }

    /// Moves what was written to the disks since the last call or capture to the end of `into`, in the order of completion,
    /// at most `bytes` of data but at least one write if there is any. For the first copy; afterwards captures take the
    /// writes. Waits for a first write until `wait` is over. The guest's disk writes wait while nobody takes them and a bound
    /// is reached.
    fn take_writes(&mut self, _into: &mut Vec<DiskWrite>, _bytes: usize, _wait: Duration) {}

    /// Ends mirroring, paused or running (it may stand for a moment); the guest's own disks are untouched. What was not taken is dropped.
    ///
    /// # Errors
    /// If something of ours had to be left in it; the guest's writes no longer wait for us in any case.
    fn unmirror_disks(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// What happened since the last call. Never blocks.
    fn events(&mut self) -> Vec<GuestEvent>;

    /// A handle that other threads use to end the guest at once.
    fn fence(&self) -> Arc<dyn Fence>;

    /// Leaves the guest as it was found and running: no gate, no tracking, nothing of ours in it. Held output is released.
    ///
    /// # Errors
    /// If something of ours had to be left in it; says what.
    fn detach(self: Box<Self>) -> Result<(), GuestError>;
}

/// Ends a guest for good.
pub trait Fence: Send + Sync + fmt::Debug {
    /// Kills the guest and returns when its end is confirmed. Fencing a guest that has ended is no error.
    ///
    /// # Errors
    /// If its end could not be confirmed.
    fn fence(&self) -> Result<(), GuestError>;

    /// Whether the guest has ended.
    fn ended(&self) -> bool;
}

/// What a gate holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames held, sealed or not.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When the oldest of them was emitted.
    pub oldest: Option<Instant>,
    /// Frames released since the gate was made.
    pub released: u64,
    /// Frames dropped since the gate was made: at the bound, at [`Gate::shut`], or too old.
    pub dropped: u64,
}

/// Holds a guest's output by epochs.
///
/// The promise that everything hangs on: a frame that the guest emitted after the capture of epoch N is never tagged N or
/// lower. [`Gate::seal`] is therefore called while the guest is paused; being late is safe, being early is not.
pub trait Gate: Send + Sync + fmt::Debug {
    /// While the guest is paused: everything emitted so far belongs to the current epoch, everything later to `next`.
    /// Returns how many frames the sealed epoch holds.
    fn seal(&self, next: u64) -> u64;

    /// Emits every held frame tagged `through` or lower, in order. Does not block on the guest.
    fn release(&self, through: u64);

    /// Drops what is held and holds, then drops, whatever comes: this copy is never heard again.
    fn shut(&self);

    /// What is held now.
    fn held(&self) -> Held;

    /// Waits until a frame of the epoch that is not sealed yet waits, or `deadline`. Returns when the first such frame was
    /// emitted, or `None` at the deadline.
    fn wait_output(&self, deadline: Instant) -> Option<Instant>;
}

/// How a rehearsal went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rehearsal {
    /// From starting the scratch twin to its answer.
    pub launch: Duration,
    /// Loading the device state.
    pub load: Duration,
}

/// How an activation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activation {
    /// Loading the device state, relaunches included.
    pub load: Duration,
    /// From there until the guest ran.
    pub resume: Duration,
    /// How many twins died while loading and were launched again.
    pub relaunched: u32,
}

/// Where the survivor is, once activated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survivor {
    /// Its process.
    pub pid: u32,
    /// Where it can be attached to (QEMU: its QMP socket).
    pub control: String,
}

/// Prepares twins on the standby.
pub trait TwinHost: Send + Sync + fmt::Debug {
    /// Builds a twin of the guest that `recipe` describes, called `name`, with `layout`. It waits, and emits nothing.
    /// `images` are raw images, one for each disk of the recipe, in its order and of its size; the twin does not read or
    /// write them before it is activated.
    ///
    /// # Errors
    /// [`GuestErrorKind::Refused`] if this host cannot; nothing is left behind.
    fn prepare(
        &self,
        name: &str,
        recipe: &Recipe,
        layout: &Layout,
        images: &[PathBuf],
    ) -> Result<Box<dyn Twin>, GuestError>;
}

/// A guest that waits on the standby to go on where the primary stood.
pub trait Twin: Send {
    /// The committed memory. The same one at each call; outlives the twin's process.
    fn memory(&self) -> Arc<dyn TwinMemory>;

    /// Loads `device` and the committed memory into a scratch twin, to prove that it loads. Changes nothing. The caller
    /// keeps memory still meanwhile.
    ///
    /// # Errors
    /// If it does not load, with the reason.
    fn rehearse(&mut self, device: &[u8]) -> Result<Rehearsal, GuestError>;

    /// Goes on from the committed memory and `device`, and announces itself to the network. A twin that dies while loading
    /// is launched again, a bounded number of times.
    ///
    /// # Errors
    /// [`GuestErrorKind::Failed`] if it does not run; memory is unharmed then.
    fn activate(&mut self, device: &[u8]) -> Result<Activation, GuestError>;

    /// Whether its process is there.
    fn alive(&mut self) -> bool;

    /// A handle that other threads use to end it.
    fn fence(&self) -> Arc<dyn Fence>;

    /// Ends the twin and removes what belongs to it.
    ///
    /// # Errors
    /// If something had to be left.
    fn destroy(self: Box<Self>) -> Result<(), GuestError>;

    /// Lets an activated twin go on without its maker, as an ordinary guest.
    ///
    /// # Errors
    /// If it was not activated or has ended.
    fn release(self: Box<Self>) -> Result<Survivor, GuestError>;
}

/// Committed guest memory on the standby. Out of range is a caller's bug and panics.
pub trait TwinMemory: Send + Sync + fmt::Debug {
    /// How many pages it has.
    fn pages(&self) -> u64;

    /// Copies `bytes` to byte `offset` of `page`; must stay inside the page.
    fn write(&self, page: u64, offset: usize, bytes: &[u8]);

    /// Copies the page to `into`, which is [`crate::layout::PAGE_SIZE`] long.
    fn read(&self, page: u64, into: &mut [u8]);

    /// Sets the page to zeroes, giving its memory back where that is possible.
    fn zero(&self, page: u64);
}
