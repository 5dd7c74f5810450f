//! The encoder: turns captured pages and device state into the frames of a stream.
//!
//! For each page, in this order: all zeroes, or equal to what the standby will have (then nothing is sent but the
//! zero run), or a word delta against that if it is at most [`MAX_DELTA`](super::delta::MAX_DELTA) bytes, or LZ4 if that
//! takes at most seven eighths, or raw. LZ4 is forty times slower than the rest: it is only tried where a delta does not
//! do, and hardly while the last tries did not pay.

use bytes::{Bytes, BytesMut};
use lz4_flex::block::CompressTable;
use vmm_hooks::disk::DiskWrite;
use vmm_hooks::guest::Capture;
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use super::delta::{self, Compared, DeltaBuffer};
use super::disk::{self, WRITE_HEADER};
use super::frame::{self, DeviceBase, DeviceHead, FRAME_HEADER, FrameKind, StreamHead, StreamId, Totals};
use super::record::{self, MAX_LZ4, RECORD_HEADER, RecordKind};
use super::shadow::{Base, Shadow, ShadowMode};
use super::staged::padded;
use super::{MAX_DEVICE_BYTES, MAX_PAYLOAD, Page, ZERO_PAGE, as_pages, bounded_u32};

/// Memory for frames is taken in pieces of this size.
const BUFFER: usize = 4 * (FRAME_HEADER + MAX_PAYLOAD);

/// LZ4 is held to pay while it saves, on average, at least this much of a page.
const LZ4_PAYS: u32 = 4096 / 8;

/// While LZ4 does not pay, one page in so many is tried, to notice when it does again.
const LZ4_PROBE: u32 = 32;

/// Why a capture could not be encoded: the guest is not one that this form can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The device state is above [`MAX_DEVICE_BYTES`].
    #[error(
        "the guest's device state has {length} bytes, at most {MAX_DEVICE_BYTES} can be replicated; the guest runs on unprotected"
    )]
    DeviceTooLarge {
        /// Its bytes.
        length: usize,
    },
}

/// Pages sent one way (or disk writes), and what they took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages (or disk writes).
    pub pages: u64,
    /// Their bytes in the stream, record headers included.
    pub bytes: u64,
}

/// What one stream held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeStats {
    /// Pages of zeroes.
    pub zero: Tally,
    /// Pages skipped because the standby will have them: no bytes.
    pub same: Tally,
    /// Pages sent as word deltas.
    pub delta: Tally,
    /// Pages sent as LZ4.
    pub lz4: Tally,
    /// Pages sent whole.
    pub raw: Tally,
    /// Length of the device state.
    pub device_bytes: u64,
    /// What it took in the stream, record headers included.
    pub device_wire_bytes: u64,
    /// Disk writes, and their bytes in the stream.
    pub disk: Tally,
    /// Bytes of the whole stream.
    pub wire_bytes: u64,
    /// Frames of the whole stream.
    pub frames: u64,
}

/// Encodes one VM's streams.
///
/// **What the shadow means.** After a stream has been written, the shadow equals, for each page that it knows, what the
/// standby's page will be once the standby has applied *every* stream that this encoder wrote, in order, except those
/// whose pages were forgotten. So a stream that will never be applied must be forgotten before the next one is encoded:
/// [`Encoder::forget`] with all of its capture's pages (pages skipped as unchanged may be among them), and the same for
/// every stream written after it, because streams are applied in order or not at all. With another standby, or one that
/// has lost what it had: [`Encoder::forget_all`].
#[derive(Debug)]
pub struct Encoder {
    layout_pages: u64,
    shadow: Shadow,
    chooser: Chooser,
    buffer: BytesMut,
    /// The last sent device state, padded to whole blocks, and its name.
    device: Option<(Vec<u8>, DeviceBase)>,
    /// Memory for the next one.
    spare: Vec<u8>,
}

impl Encoder {
    /// An encoder for a layout of `layout_pages` pages, with a standby of which nothing is known.
    #[must_use]
    pub fn new(layout_pages: u64, shadow: ShadowMode) -> Self {
        Self {
            layout_pages,
            shadow: Shadow::new(layout_pages, shadow),
            chooser: Chooser::default(),
            buffer: BytesMut::new(),
            device: None,
            spare: Vec::new(),
        }
    }

    /// Writes the stream of one epoch into `sink`, frame by frame. The `sync` mark of `id` is ignored: an epoch is none.
    ///
    /// # Errors
    /// [`EncodeError`]; then nothing was written and the shadow is as before.
    ///
    /// # Panics
    /// If the capture's pages do not ascend, leave the layout, or do not match its bytes: a bug of the back end.
    pub fn encode_epoch(
        &mut self,
        id: &StreamId,
        capture: &Capture,
        sink: &mut dyn FnMut(Bytes),
    ) -> Result<EncodeStats, EncodeError> {
        if capture.device.len() > MAX_DEVICE_BYTES {
            return Err(EncodeError::DeviceTooLarge { length: capture.device.len() });
        }
        let base = self.device.as_ref().map(|(_, base)| *base);
        let device = Some(DeviceHead { length: bounded_u32(capture.device.len()), base });
        let head = StreamHead { id: StreamId { sync: false, ..*id }, layout_pages: self.layout_pages, device };
        let mut stats = EncodeStats::default();
        let mut writer = Writer::begin(&mut self.buffer, sink, &head);
        write_disks(&mut writer, &capture.disk, &mut stats);
        write_pages(&mut writer, &mut self.chooser, &mut self.shadow, &capture.pages, &capture.bytes, &mut stats);
        let name = DeviceBase::of(&capture.device);
        let mut next = std::mem::take(&mut self.spare);
        next.clear();
        next.extend_from_slice(&capture.device);
        next.resize(padded(next.len()), 0);
        let old = self.device.take().map_or(Vec::new(), |(old, _)| old);
        stats.device_bytes = capture.device.len() as u64;
        stats.device_wire_bytes = write_device(&mut writer, &mut self.chooser, &old, &next);
        self.spare = old;
        self.device = Some((next, name));
        writer.end(name.crc, &mut stats);
        Ok(stats)
    }

    /// Writes one piece of the initial sync into `sink`: pages alone. The `sync` mark of `id` is set for you.
    ///
    /// # Panics
    /// If the pages do not ascend, leave the layout, or do not match the bytes.
    pub fn encode_chunk(
        &mut self,
        id: &StreamId,
        pages: &[u64],
        bytes: &[u8],
        sink: &mut dyn FnMut(Bytes),
    ) -> EncodeStats {
        let head = StreamHead { id: StreamId { sync: true, ..*id }, layout_pages: self.layout_pages, device: None };
        let mut stats = EncodeStats::default();
        let mut writer = Writer::begin(&mut self.buffer, sink, &head);
        write_pages(&mut writer, &mut self.chooser, &mut self.shadow, pages, bytes, &mut stats);
        writer.end(0, &mut stats);
        stats
    }

    /// Writes one piece of the first copy of the disks into `sink`. The `sync` mark of `id` is set for you.
    pub fn encode_writes(&mut self, id: &StreamId, writes: &[DiskWrite], sink: &mut dyn FnMut(Bytes)) -> EncodeStats {
        let head = StreamHead { id: StreamId { sync: true, ..*id }, layout_pages: self.layout_pages, device: None };
        let mut stats = EncodeStats::default();
        let mut writer = Writer::begin(&mut self.buffer, sink, &head);
        write_disks(&mut writer, writes, &mut stats);
        writer.end(0, &mut stats);
        stats
    }

    /// A stream with these pages will not be applied: they, and the device state, are sent whole next time.
    ///
    /// # Panics
    /// If `pages` ranges over another layout.
    pub fn forget(&mut self, pages: &PageSet) {
        assert_eq!(pages.capacity(), self.layout_pages, "a page set of another layout");
        for page in pages.iter() {
            self.shadow.forget(page);
        }
        self.device = None;
    }

    /// Nothing is known of the standby any more.
    pub fn forget_all(&mut self) {
        self.shadow.forget_all();
        self.device = None;
    }
}

fn write_disks(writer: &mut Writer<'_>, writes: &[DiskWrite], stats: &mut EncodeStats) {
    writer.kind(FrameKind::Disk);
    for write in writes {
        disk::records(write, |header, data| stats.disk.bytes += writer.write(header, data));
        stats.disk.pages += 1;
    }
    writer.flush();
}

fn write_pages(
    writer: &mut Writer<'_>,
    chooser: &mut Chooser,
    shadow: &mut Shadow,
    pages: &[u64],
    bytes: &[u8],
    stats: &mut EncodeStats,
) {
    let contents = as_pages(bytes);
    assert_eq!(pages.len(), contents.len(), "a page list that does not match its bytes");
    writer.kind(FrameKind::Pages);
    for (&page, content) in pages.iter().zip(contents) {
        let choice = chooser.choose(shadow.base(page), content);
        let sent = writer.record(page, &choice, content);
        let tally = match choice {
            Choice::Same => &mut stats.same,
            Choice::Zero => &mut stats.zero,
            Choice::Delta(_) => &mut stats.delta,
            Choice::Lz4(_) => &mut stats.lz4,
            Choice::Raw => &mut stats.raw,
        };
        tally.pages += 1;
        tally.bytes += sent;
        match choice {
            Choice::Same => {}
            Choice::Zero => shadow.set_zero(page),
            Choice::Delta(patch) => shadow.patch(page, patch, content),
            Choice::Lz4(_) | Choice::Raw => shadow.set(page, content),
        }
    }
    stats.zero.bytes = writer.flush();
}

/// Writes the blocks of `new` that differ from `old`; what `old` lacks counts as zeroes. Returns the bytes it took.
fn write_device(writer: &mut Writer<'_>, chooser: &mut Chooser, old: &[u8], new: &[u8]) -> u64 {
    let old = as_pages(old).iter().map(Base::Known).chain(std::iter::repeat(Base::Zero));
    writer.kind(FrameKind::Device);
    let mut sent = 0;
    for ((block, old), new) in (0..).zip(old).zip(as_pages(new)) {
        sent += writer.record(block, &chooser.choose(old, new), new);
    }
    sent + writer.flush()
}

/// How a page is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice<'a> {
    Same,
    Zero,
    Delta(&'a [u8]),
    Lz4(&'a [u8]),
    Raw,
}

/// Chooses, with the memory that choosing needs.
struct Chooser {
    delta: DeltaBuffer,
    table: CompressTable,
    packed: Vec<u8>,
    /// Moving average of the bytes that a try of LZ4 saved.
    saved: u32,
    /// Pages since LZ4 was last tried.
    untried: u32,
}

impl Default for Chooser {
    fn default() -> Self {
        let packed = vec![0; lz4_flex::block::get_maximum_output_size(PAGE_SIZE)];
        // Starts in favour of LZ4: the first streams are whole pages of a guest's memory, which packs well.
        Self { delta: DeltaBuffer::default(), table: CompressTable::small(), packed, saved: 2 * LZ4_PAYS, untried: 0 }
    }
}

impl std::fmt::Debug for Chooser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chooser(lz4 saves {} bytes a page)", self.saved)
    }
}

impl Chooser {
    fn choose(&mut self, base: Base<'_>, new: &Page) -> Choice<'_> {
        if *new == ZERO_PAGE {
            return if matches!(base, Base::Zero) { Choice::Same } else { Choice::Zero };
        }
        let old = match base {
            Base::Unknown => None,
            Base::Zero => Some(&ZERO_PAGE),
            Base::Known(page) => Some(page),
        };
        match old.map(|old| delta::encode(old, new, &mut self.delta)) {
            Some(Compared::Same) => return Choice::Same,
            Some(Compared::Delta) => return Choice::Delta(self.delta.bytes()),
            Some(Compared::TooLong) | None => {}
        }
        if self.saved < LZ4_PAYS && self.untried < LZ4_PROBE {
            self.untried += 1;
            return Choice::Raw;
        }
        self.untried = 0;
        let packed = lz4_flex::block::compress_into_with_table(new, &mut self.packed, &mut self.table)
            .expect("the buffer holds the longest output");
        let saved = bounded_u32(PAGE_SIZE.saturating_sub(packed));
        self.saved = (self.saved * 15 + saved) / 16;
        if packed <= MAX_LZ4 { Choice::Lz4(&self.packed[..packed]) } else { Choice::Raw }
    }
}

/// Writes records into frames and frames into the sink.
struct Writer<'a> {
    buffer: &'a mut BytesMut,
    sink: &'a mut dyn FnMut(Bytes),
    totals: Totals,
    kind: FrameKind,
    /// Of the frame in the making: its first page, and how many.
    first: u64,
    count: u32,
    /// Where pages may go on.
    next: u64,
    /// Zero pages that no record was written for yet: the first, and how many.
    zeroes: (u64, u16),
    /// What zero records took since the last flush.
    zero_bytes: u64,
    /// Pages in finished pages frames.
    pages: u64,
}

impl<'a> Writer<'a> {
    fn begin(buffer: &'a mut BytesMut, sink: &'a mut dyn FnMut(Bytes), head: &StreamHead) -> Self {
        let totals = Totals::default();
        let kind = FrameKind::Head;
        let mut writer =
            Self { buffer, sink, totals, kind, first: 0, count: 0, next: 0, zeroes: (0, 0), zero_bytes: 0, pages: 0 };
        writer.open();
        writer.buffer.extend_from_slice(&head.to_bytes());
        writer.close();
        writer
    }

    /// Records from now on go into frames of this kind.
    fn kind(&mut self, kind: FrameKind) {
        self.kind = kind;
        self.next = 0;
    }

    /// Starts a frame: room for its header, and enough memory for all of it.
    fn open(&mut self) {
        if self.buffer.capacity() < FRAME_HEADER + MAX_PAYLOAD {
            self.buffer.reserve(BUFFER);
        }
        self.buffer.extend_from_slice(&[0; FRAME_HEADER]);
    }

    /// Ends the frame in the making.
    fn close(&mut self) {
        let crc = frame::seal(self.buffer, self.kind, self.first, self.count);
        self.totals.add(self.buffer.len(), crc);
        if self.kind == FrameKind::Pages {
            self.pages += u64::from(self.count);
        }
        (self.first, self.count) = (0, 0);
        (self.sink)(self.buffer.split().freeze());
    }

    /// Writes one page. Returns the bytes that it took; what zero pages took comes with [`Writer::flush`].
    fn record(&mut self, page: u64, choice: &Choice<'_>, content: &Page) -> u64 {
        assert!(page >= self.next, "page {page} does not ascend");
        self.next = page + 1;
        let (kind, body): (_, &[u8]) = match *choice {
            Choice::Same => return 0,
            Choice::Zero => {
                self.zero(page);
                return 0;
            }
            Choice::Delta(body) => (RecordKind::Delta, body),
            Choice::Lz4(body) => (RecordKind::Lz4, body),
            Choice::Raw => (RecordKind::Raw, content),
        };
        self.zero_record();
        self.put(page, kind, record::body_u16(body.len()), body)
    }

    fn zero(&mut self, page: u64) {
        let (first, run) = self.zeroes;
        if run > 0 && run < u16::MAX && first + u64::from(run) == page {
            self.zeroes.1 += 1;
        } else {
            self.zero_record();
            self.zeroes = (page, 1);
        }
    }

    /// Writes the record of the zero pages that wait.
    fn zero_record(&mut self) {
        let (first, run) = std::mem::take(&mut self.zeroes);
        if run > 0 {
            self.zero_bytes += self.put(first, RecordKind::Zero, run, &[]);
        }
    }

    fn put(&mut self, page: u64, kind: RecordKind, n: u16, body: &[u8]) -> u64 {
        let length = RECORD_HEADER + body.len();
        if self.count > 0 && self.buffer.len() + length > FRAME_HEADER + MAX_PAYLOAD {
            self.close();
        }
        if self.count == 0 {
            self.open();
            self.first = page;
        }
        self.count += if kind == RecordKind::Zero { u32::from(n) } else { 1 };
        self.buffer.extend_from_slice(&record::header(page, kind, n));
        self.buffer.extend_from_slice(body);
        length as u64
    }

    /// Writes one disk write's record. Returns the bytes that it took.
    fn write(&mut self, header: &[u8; WRITE_HEADER], data: &[u8]) -> u64 {
        let length = WRITE_HEADER + data.len();
        if self.count > 0 && self.buffer.len() + length > FRAME_HEADER + MAX_PAYLOAD {
            self.close();
        }
        if self.count == 0 {
            self.open();
        }
        self.count += 1;
        self.buffer.extend_from_slice(header);
        self.buffer.extend_from_slice(data);
        length as u64
    }

    /// Writes what waits. Returns the bytes that zero pages took since the last flush.
    fn flush(&mut self) -> u64 {
        self.zero_record();
        if self.count > 0 {
            self.close();
        }
        std::mem::take(&mut self.zero_bytes)
    }

    /// Writes the trailer.
    fn end(mut self, device_crc: u32, stats: &mut EncodeStats) {
        let trailer = self.totals.trailer(self.pages, device_crc);
        self.kind = FrameKind::Trailer;
        self.open();
        self.buffer.extend_from_slice(&trailer.to_bytes());
        self.close();
        stats.wire_bytes = self.totals.bytes();
        stats.frames = u64::from(self.totals.frames());
    }
}
