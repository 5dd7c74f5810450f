//! The standby's intake: reads the primary's streams in order, checks them and stages them.
//!
//! Promise: what comes out was checked whole (`pages::decode`), belongs to this session, and comes in the order in which the
//! primary sent it. Anything else ends the intake with a reason and the connection with a code.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use quinn::{Connection, ReadToEndError, VarInt};
use replicator_core::message::CloseCode;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::encoder::Session;
use crate::disk::known::{self, Known};
use crate::pages::decode::Stager;
use crate::pages::staged::{DeviceState, StagedEpoch};

/// One stream may take so much of all room: the n-th part.
const SHARE: u32 = 2;
/// Room is counted in units of this many bytes.
const UNIT: u64 = 4096;

/// A staged stream. It takes up room until it is dropped, which is when it was applied or thrown away.
#[derive(Debug)]
pub(super) struct Staged {
    /// The stream.
    pub(super) epoch: StagedEpoch,
    _room: OwnedSemaphorePermit,
}

#[cfg(test)]
impl Staged {
    /// One that takes up no room.
    pub(super) fn of(epoch: StagedEpoch) -> Self {
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("nobody has it");
        Self { epoch, _room: room }
    }
}

/// Why the intake ended.
#[derive(Debug)]
pub(super) struct IntakeEnd {
    /// How the connection is to be closed; `None` if it broke by itself.
    pub(super) code: Option<CloseCode>,
    /// Why, in words.
    pub(super) reason: String,
}

/// Reads until the connection or the VM task is gone. `limit` bounds the bytes of all streams that are staged and not applied,
/// [`SHARE`] that of one. When room is short, no further stream is read: the standby acknowledges later.
pub(super) async fn run(
    connection: Connection,
    session: Session,
    limit: u64,
    staged: UnboundedSender<Staged>,
) -> IntakeEnd {
    let units = |bytes: u64| u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
    let share = (units(limit) / SHARE).max(1);
    let room = Arc::new(Semaphore::new(usize::try_from(share * SHARE).expect("a u32 fits")));
    let stream_limit = usize::try_from(u64::from(share) * UNIT).unwrap_or(usize::MAX);
    let mut previous: Option<DeviceState> = None;
    loop {
        let mut permit = Arc::clone(&room).acquire_many_owned(share).await.expect("the room is never closed");
        match next(&connection, &session, stream_limit, previous.clone()).await {
            Ok(epoch) => {
                previous = epoch.device().or(previous);
                // What it does not need is free at once: many small epochs may wait while a rehearsal runs.
                let needed = units(epoch.staged_bytes()).clamp(1, share);
                drop(permit.split(usize::try_from(share - needed).expect("a u32 fits")));
                if staged.send(Staged { epoch, _room: permit }).is_err() {
                    return IntakeEnd { code: None, reason: "the protection has ended".into() };
                }
            }
            Err(end) => return end,
        }
    }
}

/// The primary's one intake: what the standby has of the disks, whose sizes these are. Something else closes the connection;
/// whoever waits for it learns by a closed queue.
pub(super) async fn known(connection: Connection, sizes: Arc<[u64]>, tell: Sender<Known>) {
    // A connection that breaks tells everybody by itself.
    let Ok(mut stream) = connection.accept_uni().await else { return };
    match stream.read_to_end(known::MAX_BYTES).await {
        Ok(bytes) => match Known::decode(&bytes, &sizes) {
            Ok(known) => drop(tell.send(known)),
            Err(error) => close(&connection, CloseCode::Corrupt, &error.to_string()),
        },
        Err(ReadToEndError::TooLong) => {
            close(&connection, CloseCode::TooLarge, "what the standby says of its disks is too long")
        }
        Err(ReadToEndError::Read(_)) => {}
    }
}

/// The standby's side of it.
pub(super) async fn tell_known(connection: Connection, known: Known) {
    let told = async {
        let mut stream = connection.open_uni().await.map_err(|error| error.to_string())?;
        let bytes = known.encode();
        drop(known);
        stream.write_chunk(bytes.into()).await.map_err(|error| error.to_string())?;
        stream.finish().map_err(|error| error.to_string())
    };
    if let Err(reason) = told.await {
        tracing::debug!(reason, "the primary was not told what is here of its disks");
    }
}

fn close(connection: &Connection, code: CloseCode, reason: &str) {
    connection.close(VarInt::from_u32(code.code()), reason.as_bytes());
}

async fn next(
    connection: &Connection,
    session: &Session,
    limit: usize,
    previous: Option<DeviceState>,
) -> Result<StagedEpoch, IntakeEnd> {
    let broken = |reason: String| IntakeEnd { code: None, reason };
    let faulty = |code, reason: String| IntakeEnd { code: Some(code), reason };
    let mut stream = connection.accept_uni().await.map_err(|error| broken(error.to_string()))?;
    let mut stager = Stager::new(session.layout_pages, previous, limit).with_disks(Arc::clone(&session.disks));
    while let Some(chunk) = stream.read_chunk(usize::MAX, true).await.map_err(|error| broken(error.to_string()))? {
        stager.push(&chunk.bytes).map_err(|error| faulty(CloseCode::Corrupt, error.to_string()))?;
    }
    let epoch = stager.finish().map_err(|error| faulty(CloseCode::Corrupt, error.to_string()))?;
    let id = epoch.id();
    if id.vm != session.vm || id.generation != session.generation || id.incarnation != session.incarnation {
        return Err(faulty(CloseCode::WrongParty, "a stream of another session came".into()));
    }
    Ok(epoch)
}
