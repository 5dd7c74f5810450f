//! The stager: takes a stream in any pieces and trusts nothing in it.
//!
//! What it checks before [`Stager::finish`] gives a [`StagedEpoch`], so that the epoch may be acknowledged: every frame's
//! fields and CRC, the order of frames, that pages lie inside the layout, ascend and come once, that every delta is
//! well-formed and every LZ4 block gives exactly one page, that disk writes lie inside their disks, the device state against its base and its CRC, the totals and
//! the digest over all frames, and that nothing follows the trailer. It never holds more than its limit and one frame.
//!
//! An error is the peer's fault (or damage on the way) and final: the connection is to be closed, the stager refuses
//! everything from then on.

use std::sync::Arc;

use vmm_hooks::disk::DiskWrite;
use vmm_hooks::layout::PAGE_SIZE;

use super::delta;
use super::disk::{self, WriteError};
use super::frame::{
    DeviceBase, FRAME_HEADER, FrameError, FrameHeader, FrameKind, HEAD_BYTES, StreamHead, TRAILER_BYTES, Totals,
    Trailer,
};
use super::record::{self, Body, Record, RecordError, RecordKind};
use super::staged::{Arena, DeviceState, StagedEpoch, padded};

/// Why a stream was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// A frame's own bytes are wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A record's own bytes are wrong.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A disk write's own bytes are wrong.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A frame of this kind may not come here.
    #[error("a {kind:?} frame came out of order")]
    Order {
        /// Its kind.
        kind: FrameKind,
    },
    /// The stream is for another memory layout.
    #[error("the stream is for a layout of {theirs} pages, ours has {ours}")]
    Layout {
        /// The stream's.
        theirs: u64,
        /// Ours.
        ours: u64,
    },
    /// A page (or device state block) past the end, not above the one before it, or not what its frame announced.
    #[error("page {page} is out of order or out of range")]
    Page {
        /// Its number.
        page: u64,
    },
    /// The device state builds on one that this side does not hold.
    #[error("the device state builds on a state that is not held here")]
    DeviceBase,
    /// The decoded device state is not what was sent.
    #[error("the device state does not match its checksum")]
    DeviceCrc,
    /// The trailer's totals are not those of the stream.
    #[error("the stream does not match its trailer")]
    Totals,
    /// The stream needs more memory than is granted to it.
    #[error("the stream needs more than the {limit} bytes that an epoch may take")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// Bytes after the trailer.
    #[error("bytes follow the end of the stream")]
    Trailing,
    /// The stream ended before its trailer.
    #[error("the stream ended before its trailer")]
    Unfinished,
}

/// How far the stream is.
#[derive(Debug)]
enum Phase {
    Head,
    Disk(StreamHead),
    Pages(StreamHead),
    Device(StreamHead),
    Done(StreamHead),
    Failed(StageError),
}

/// Decodes one stream.
///
/// Order of calls: [`Stager::new`], then [`Stager::push`] with whatever arrives, then [`Stager::finish`] when the peer
/// has finished the stream.
#[derive(Debug)]
pub struct Stager {
    layout_pages: u64,
    previous: Option<DeviceState>,
    limit: usize,
    phase: Phase,
    /// The beginning of a frame whose end has not come yet.
    pending: Vec<u8>,
    totals: Totals,
    records: Vec<u8>,
    /// Pages so far.
    pages: u64,
    /// The lowest page (device: block) that the next record may be about.
    next: u64,
    /// The device state in the making, padded to whole blocks.
    device: Vec<u8>,
    /// Sizes of the disks, in bytes.
    disks: Arc<[u64]>,
    writes: Vec<DiskWrite>,
    /// What the writes take in memory.
    write_bytes: usize,
}

impl Stager {
    /// A stager for one stream over a layout of `layout_pages` pages.
    ///
    /// `previous` is the device state of the last epoch that was staged before this stream, applied or not; `limit` bounds
    /// the bytes that the staged epoch may take.
    #[must_use]
    pub fn new(layout_pages: u64, previous: Option<DeviceState>, limit: usize) -> Self {
        Self::reusing(layout_pages, previous, limit, Arena::default())
    }

    /// The same, in the memory of an epoch that is no longer needed.
    #[must_use]
    pub fn reusing(layout_pages: u64, previous: Option<DeviceState>, limit: usize, arena: Arena) -> Self {
        let mut records = arena.0;
        records.clear();
        Self {
            layout_pages,
            previous,
            limit,
            phase: Phase::Head,
            pending: Vec::new(),
            totals: Totals::default(),
            records,
            pages: 0,
            next: 0,
            device: Vec::new(),
            disks: Arc::default(),
            writes: Vec::new(),
            write_bytes: 0,
        }
    }

    /// The same, for a guest with disks of these sizes in bytes.
    #[must_use]
    pub fn with_disks(self, disks: Arc<[u64]>) -> Self {
        Self { disks, ..self }
    }

    /// The stream's head, once it has come.
    #[must_use]
    pub fn head(&self) -> Option<&StreamHead> {
        match &self.phase {
            Phase::Disk(head) | Phase::Pages(head) | Phase::Device(head) | Phase::Done(head) => Some(head),
            Phase::Head | Phase::Failed(_) => None,
        }
    }

    /// Takes the next piece of the stream, of any length.
    ///
    /// # Errors
    /// [`StageError`]; the same one at every later call.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), StageError> {
        if let Phase::Failed(error) = self.phase {
            return Err(error);
        }
        let result = self.frames(bytes);
        if let Err(error) = result {
            self.phase = Phase::Failed(error);
            self.records = Vec::new();
            self.device = Vec::new();
            self.writes = Vec::new();
            self.pending = Vec::new();
        }
        result
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// [`StageError::Unfinished`] if the trailer has not come, or the error that [`Stager::push`] gave.
    pub fn finish(self) -> Result<StagedEpoch, StageError> {
        let head = match self.phase {
            Phase::Done(head) => head,
            Phase::Failed(error) => return Err(error),
            Phase::Head | Phase::Disk(_) | Phase::Pages(_) | Phase::Device(_) => return Err(StageError::Unfinished),
        };
        let device = head.device.is_some().then(|| Arc::new(self.device));
        Ok(StagedEpoch {
            head,
            records: self.records,
            device,
            disk: self.writes,
            disk_bytes: self.write_bytes,
            pages: self.pages,
            wire_bytes: self.totals.bytes(),
        })
    }

    fn frames(&mut self, mut bytes: &[u8]) -> Result<(), StageError> {
        while !bytes.is_empty() {
            if matches!(self.phase, Phase::Done(_)) {
                return Err(StageError::Trailing);
            }
            if self.pending.is_empty()
                && let Some(header) = bytes.first_chunk::<FRAME_HEADER>()
            {
                let length = FRAME_HEADER + FrameHeader::parse(header)?.length as usize;
                if let Some((frame, rest)) = bytes.split_at_checked(length) {
                    self.frame(frame)?;
                    bytes = rest;
                    continue;
                }
            }
            let want = match self.pending.first_chunk::<FRAME_HEADER>() {
                Some(header) => FRAME_HEADER + FrameHeader::parse(header)?.length as usize,
                None => FRAME_HEADER,
            };
            let (piece, rest) = bytes.split_at((want - self.pending.len()).min(bytes.len()));
            self.pending.reserve_exact(want - self.pending.len());
            self.pending.extend_from_slice(piece);
            bytes = rest;
            if let (Some(header), true) = (self.pending.first_chunk::<FRAME_HEADER>(), want == FRAME_HEADER) {
                // Known at once to be wrong, not only when the next piece comes.
                FrameHeader::parse(header)?;
            }
            if self.pending.len() == want && want > FRAME_HEADER {
                let mut frame = std::mem::take(&mut self.pending);
                self.frame(&frame)?;
                frame.clear();
                self.pending = frame;
            }
        }
        Ok(())
    }

    /// Takes one whole frame.
    fn frame(&mut self, frame: &[u8]) -> Result<(), StageError> {
        let (header_bytes, payload) = frame.split_first_chunk::<FRAME_HEADER>().expect("cut to a whole frame");
        let header = FrameHeader::parse(header_bytes)?;
        header.verify(header_bytes, payload)?;
        match (&self.phase, header.kind) {
            (Phase::Head, FrameKind::Head) => self.begin(payload.try_into().expect("checked with the header"))?,
            (Phase::Disk(_), FrameKind::Disk) => self.writes(&header, payload)?,
            (&Phase::Disk(head) | &Phase::Pages(head), FrameKind::Pages) => {
                self.phase = Phase::Pages(head);
                self.records(&header, payload, Self::page)?;
            }
            (&Phase::Disk(head) | &Phase::Pages(head), FrameKind::Device) if head.device.is_some() => {
                self.phase = Phase::Device(head);
                self.next = 0;
                self.records(&header, payload, Self::block)?;
            }
            (Phase::Device(_), FrameKind::Device) => self.records(&header, payload, Self::block)?,
            (&Phase::Disk(head) | &Phase::Pages(head) | &Phase::Device(head), FrameKind::Trailer) => {
                self.end(head, payload.try_into().expect("checked with the header"))?;
            }
            (_, kind) => return Err(StageError::Order { kind }),
        }
        self.totals.add(frame.len(), header.crc);
        Ok(())
    }

    fn begin(&mut self, payload: &[u8; HEAD_BYTES]) -> Result<(), StageError> {
        let head = StreamHead::parse(payload)?;
        if head.layout_pages != self.layout_pages {
            return Err(StageError::Layout { theirs: head.layout_pages, ours: self.layout_pages });
        }
        if let Some(device) = head.device {
            let length = padded(device.length as usize);
            if length > self.limit {
                return Err(StageError::TooLarge { limit: self.limit });
            }
            let mut state = Vec::with_capacity(length);
            if let Some(base) = device.base {
                let previous = self.previous.as_ref().ok_or(StageError::DeviceBase)?;
                if DeviceBase::of(previous) != base {
                    return Err(StageError::DeviceBase);
                }
                state.extend_from_slice(&previous[..previous.len().min(length)]);
            }
            state.resize(length, 0);
            self.device = state;
        }
        self.phase = Phase::Disk(head);
        Ok(())
    }

    /// Takes the disk writes of one frame.
    fn writes(&mut self, header: &FrameHeader, payload: &[u8]) -> Result<(), StageError> {
        let (mut rest, mut count) = (payload, 0_u32);
        while !rest.is_empty() {
            let left = rest.len();
            let write = disk::take(&mut rest, &self.disks)?;
            self.write_bytes += disk::OVERHEAD + (left - rest.len());
            if self.write_bytes + self.device.len() + self.records.len() > self.limit {
                return Err(StageError::TooLarge { limit: self.limit });
            }
            self.writes.push(write);
            count += 1;
        }
        if count == header.count { Ok(()) } else { Err(WriteError::Malformed.into()) }
    }

    /// Takes the records of one frame, each through `take`.
    fn records(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        take: fn(&mut Self, Record<'_>) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let (mut rest, mut first, mut count) = (payload, None, 0);
        while !rest.is_empty() {
            let record = record::take(&mut rest)?;
            if record.page < self.next {
                return Err(StageError::Page { page: record.page });
            }
            first.get_or_insert(record.page);
            count += record.pages();
            self.next = record.page + record.pages();
            take(self, record)?;
        }
        if first != Some(header.first) || count != u64::from(header.count) {
            return Err(StageError::Page { page: header.first });
        }
        Ok(())
    }

    fn page(&mut self, record: Record<'_>) -> Result<(), StageError> {
        if self.next > self.layout_pages {
            return Err(StageError::Page { page: record.page });
        }
        self.pages += record.pages();
        match record.body {
            Body::Zero(run) => self.stage(record.page, RecordKind::Zero, run, &[]),
            Body::Delta(patch) => self.stage(record.page, RecordKind::Delta, record::body_u16(patch.len()), patch),
            Body::Raw(bytes) => self.stage(record.page, RecordKind::Raw, record::body_u16(PAGE_SIZE), bytes),
            Body::Lz4(packed) => {
                let page = unpack(record.page, packed)?;
                self.stage(record.page, RecordKind::Raw, record::body_u16(PAGE_SIZE), &page)
            }
        }
    }

    /// Keeps one record, within the limit.
    fn stage(&mut self, page: u64, kind: RecordKind, n: u16, body: &[u8]) -> Result<(), StageError> {
        let limit = self.limit - self.device.len() - self.write_bytes;
        let need = self.records.len() + record::RECORD_HEADER + body.len();
        if need > limit {
            return Err(StageError::TooLarge { limit: self.limit });
        }
        if need > self.records.capacity() {
            // Grows by doubling as a vector does, but never past the limit.
            let capacity = (self.records.capacity() * 2).clamp(need, limit);
            self.records.reserve_exact(capacity - self.records.len());
        }
        self.records.extend_from_slice(&record::header(page, kind, n));
        self.records.extend_from_slice(body);
        Ok(())
    }

    /// Applies one record to the device state in the making.
    fn block(&mut self, record: Record<'_>) -> Result<(), StageError> {
        let (blocks, _) = self.device.as_chunks_mut::<PAGE_SIZE>();
        if self.next > blocks.len() as u64 {
            return Err(StageError::Page { page: record.page });
        }
        let first = usize::try_from(record.page).expect("below the number of blocks");
        match record.body {
            Body::Zero(run) => blocks[first..first + usize::from(run)].as_flattened_mut().fill(0),
            Body::Delta(patch) => delta::apply(patch, &mut blocks[first]),
            Body::Raw(bytes) => blocks[first] = *bytes,
            Body::Lz4(packed) => blocks[first] = unpack(record.page, packed)?,
        }
        Ok(())
    }

    fn end(&mut self, head: StreamHead, payload: &[u8; TRAILER_BYTES]) -> Result<(), StageError> {
        let trailer = Trailer::parse(payload)?;
        self.device.truncate(head.device.map_or(0, |device| device.length as usize));
        let device_crc = if head.device.is_some() { crc32fast::hash(&self.device) } else { 0 };
        if trailer.device_crc != device_crc {
            return Err(StageError::DeviceCrc);
        }
        if trailer != self.totals.trailer(self.pages, device_crc) {
            return Err(StageError::Totals);
        }
        self.phase = Phase::Done(head);
        Ok(())
    }
}

/// Decompresses one page.
fn unpack(page: u64, packed: &[u8]) -> Result<[u8; PAGE_SIZE], RecordError> {
    let mut bytes = [0; PAGE_SIZE];
    match lz4_flex::block::decompress_into(packed, &mut bytes) {
        Ok(PAGE_SIZE) => Ok(bytes),
        Ok(_) | Err(_) => Err(RecordError::Lz4 { page }),
    }
}
