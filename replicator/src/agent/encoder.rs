//! The encoder thread of one protection, and the task that writes its streams to the connection.
//!
//! Jobs come in order and leave in order, one QUIC stream each; older streams have priority. Two bounds keep memory small:
//! [`JOBS`] waiting captures or chunks, and [`FRAMES`] encoded frames that the connection has not taken.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};

use bytes::Bytes;
use quinn::Connection;
use tokio::sync::mpsc::{self, UnboundedSender};
use vmm_hooks::disk::DiskWrite;
use vmm_hooks::guest::Capture;
use vmm_hooks::layout::PageSet;

use super::pause::Chunk;
use crate::disk::difference::{Difference, Incomplete};
use crate::disk::known::Known;
use crate::pages::encode::{EncodeError, EncodeStats, Encoder};
use crate::pages::frame::StreamId;
use crate::pages::shadow::ShadowMode;

/// Jobs that may wait for the encoder: twice the longest pipeline with its put-backs, or 64 MiB of the initial sync.
pub(super) const JOBS: usize = 64;
/// Encoded frames that may wait for the connection: 16 MiB at most.
const FRAMES: usize = 64;

/// Ranges of zeroes that the standby is still owed, in one stream.
const OWED: usize = 1 << 14;

/// What the thread is given.
#[derive(Debug)]
pub(super) enum Job {
    /// The session's generation is known: everything from here on carries it.
    Begin {
        /// The generation.
        generation: u64,
    },
    /// A part of the initial sync.
    Chunk(Chunk),
    /// What the standby's images hold: comes before any part of the first copy of the disks.
    Known(Known),
    /// A part of that.
    Writes(Vec<DiskWrite>),
    /// Tell when everything before this was encoded.
    Flush(Sender<()>),
    /// A whole epoch.
    Epoch {
        /// Its number.
        epoch: u64,
        /// Whether output waits for its acknowledgement.
        binding: bool,
        /// Its contents.
        capture: Capture,
    },
    /// These pages will not be what the standby was sent: send them whole when they come again.
    Forget(Vec<u64>),
}

/// What it answers.
#[derive(Debug)]
pub(super) enum Report {
    /// An epoch was handed to the transport.
    Sent {
        /// Which.
        epoch: u64,
        /// What it took.
        stats: EncodeStats,
    },
    /// An epoch cannot be encoded.
    Unencodable {
        /// Which.
        epoch: u64,
        /// Why.
        error: EncodeError,
    },
    /// Of the first copy of the disks only what the standby did not have was sent; all of it is there with the next epoch.
    Spared {
        /// Bytes that it had.
        bytes: u64,
    },
    /// The first copy of the disks is not whole: no epoch can follow it.
    Incomplete(Incomplete),
    /// The connection takes no more.
    Broken {
        /// Why.
        reason: String,
    },
}

/// What passes from the thread to the writer.
enum Piece {
    Begin,
    Frame(Bytes),
    End { epoch: Option<u64>, stats: EncodeStats },
}

/// What every stream of this protection carries.
#[derive(Debug, Clone)]
pub(super) struct Session {
    /// The VM.
    pub(super) vm: [u8; 16],
    /// The session's generation; 0 until it is known.
    pub(super) generation: u64,
    /// The primary's incarnation.
    pub(super) incarnation: u64,
    /// Pages of the layout.
    pub(super) layout_pages: u64,
    /// Sizes of the replicated disks, in bytes.
    pub(super) disks: Arc<[u64]>,
}

/// Starts the thread and the writer on the current runtime. Both end when the returned sender is dropped or the connection
/// breaks. Used captures come back through `spare`.
pub(super) fn start(
    session: Session,
    shadow: ShadowMode,
    connection: Connection,
    spare: Sender<Capture>,
    reports: UnboundedSender<Report>,
) -> std::io::Result<SyncSender<Job>> {
    let (jobs, inbox) = sync_channel(JOBS);
    let (pieces, outbox) = mpsc::channel(FRAMES);
    let thread_reports = reports.clone();
    std::thread::Builder::new().name("us-encoder".into()).spawn(move || {
        encode(session, shadow, &inbox, &pieces, &spare, &thread_reports);
    })?;
    tokio::spawn(async move {
        if let Err(reason) = write(&connection, outbox, &reports).await {
            let _ = reports.send(Report::Broken { reason });
        }
    });
    Ok(jobs)
}

/// The thread. Ends when the writer has ended or nobody gives jobs any more. A report or a spare that nobody takes any more is
/// dropped: its task has ended.
fn encode(
    mut session: Session,
    shadow: ShadowMode,
    jobs: &Receiver<Job>,
    pieces: &mpsc::Sender<Piece>,
    spare: &Sender<Capture>,
    reports: &UnboundedSender<Report>,
) {
    let mut encoder = Encoder::new(session.layout_pages, shadow);
    let mut chunks = 0;
    let mut difference: Option<Difference> = None;
    while let Ok(job) = jobs.recv() {
        let mut id = StreamId {
            vm: session.vm,
            generation: session.generation,
            incarnation: session.incarnation,
            epoch: 0,
            binding: false,
            sync: false,
        };
        let mut sink = |frame| {
            let _ = pieces.blocking_send(Piece::Frame(frame));
        };
        let end = match job {
            Job::Begin { generation } => {
                session.generation = generation;
                continue;
            }
            Job::Flush(done) => {
                let _ = done.send(());
                continue;
            }
            Job::Forget(pages) => {
                let mut set = PageSet::empty(session.layout_pages);
                pages.iter().for_each(|&page| set.insert(page));
                encoder.forget(&set);
                continue;
            }
            Job::Chunk(chunk) => {
                chunks += 1;
                id.epoch = chunks;
                if pieces.blocking_send(Piece::Begin).is_err() {
                    return;
                }
                let stats = encoder.encode_chunk(&id, &chunk.pages, &chunk.bytes, &mut sink);
                Piece::End { epoch: None, stats }
            }
            Job::Known(known) => {
                difference = Some(Difference::new(&session.disks, known));
                continue;
            }
            Job::Writes(writes) => {
                let writes = match &mut difference {
                    Some(difference) => difference.filter(writes),
                    None => writes,
                };
                if writes.is_empty() {
                    continue;
                }
                chunks += 1;
                id.epoch = chunks;
                if pieces.blocking_send(Piece::Begin).is_err() {
                    return;
                }
                Piece::End { epoch: None, stats: encoder.encode_writes(&id, &writes, &mut sink) }
            }
            Job::Epoch { epoch, binding, mut capture } => {
                if let Some(difference) = difference.take() {
                    // The mirror has told everything: the first epoch is captured when it is ready, and what it holds comes later.
                    let bytes = difference.left_out();
                    let owed = match difference.finish() {
                        Ok(owed) => owed,
                        Err(incomplete) => {
                            let _ = reports.send(Report::Incomplete(incomplete));
                            return;
                        }
                    };
                    for writes in owed.chunks(OWED) {
                        chunks += 1;
                        id.epoch = chunks;
                        if pieces.blocking_send(Piece::Begin).is_err() {
                            return;
                        }
                        let stats = encoder.encode_writes(&id, writes, &mut sink);
                        if pieces.blocking_send(Piece::End { epoch: None, stats }).is_err() {
                            return;
                        }
                    }
                    let _ = reports.send(Report::Spared { bytes });
                }
                id.epoch = epoch;
                id.binding = binding;
                if pieces.blocking_send(Piece::Begin).is_err() {
                    return;
                }
                let result = encoder.encode_epoch(&id, &capture, &mut sink);
                capture.disk = Vec::new();
                let _ = spare.send(capture);
                match result {
                    Ok(stats) => Piece::End { epoch: Some(epoch), stats },
                    Err(error) => {
                        let _ = reports.send(Report::Unencodable { epoch, error });
                        return;
                    }
                }
            }
        };
        if pieces.blocking_send(end).is_err() {
            return;
        }
    }
}

async fn write(
    connection: &Connection,
    mut pieces: mpsc::Receiver<Piece>,
    reports: &UnboundedSender<Report>,
) -> Result<(), String> {
    let mut stream = None;
    let mut opened = 0_i32;
    while let Some(piece) = pieces.recv().await {
        match piece {
            Piece::Begin => {
                let next = connection.open_uni().await.map_err(|error| error.to_string())?;
                // Older first; the numbers wrap after 2^31 streams, which then only costs latency.
                opened = opened.wrapping_sub(1);
                next.set_priority(opened).map_err(|error| error.to_string())?;
                stream = Some(next);
            }
            Piece::Frame(frame) => {
                let open = stream.as_mut().expect("frames come between begin and end");
                open.write_chunk(frame).await.map_err(|error| error.to_string())?;
            }
            Piece::End { epoch, stats } => {
                let mut done = stream.take().expect("an end comes after a begin");
                done.finish().map_err(|error| error.to_string())?;
                if let Some(epoch) = epoch {
                    let _ = reports.send(Report::Sent { epoch, stats });
                }
            }
        }
    }
    Ok(())
}
