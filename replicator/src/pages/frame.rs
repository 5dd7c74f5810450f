//! Frames: the fixed little-endian layout of an epoch stream.
//!
//! A stream is one `Head` frame, any number of `Disk` frames, of `Pages` frames and of `Device` frames in this order, one
//! `Trailer` frame, and nothing after it. Every frame starts with [`FRAME_HEADER`] bytes:
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0..4 | magic | `55 50 47 45` (`UPGE`) |
//! | 4 | version | 1; another version is refused |
//! | 5 | kind | 1 head, 2 pages, 3 device, 4 trailer, 5 disk; 0 is invalid |
//! | 6 | encoding | 0: the payload is a fixed structure; 1: the payload is [records](super::record), of a disk frame [disk writes](super::disk) |
//! | 7 | reserved | 0 |
//! | 8..16 | first | u64: the first page (device: block) of the run that the records touch; else 0 |
//! | 16..20 | count | u32: how many pages (blocks, disk writes) the records hold, at least 1; else 0 |
//! | 20..24 | length | u32: payload bytes, at most [`MAX_PAYLOAD`] |
//! | 24..28 | crc | u32: CRC-32 (IEEE) of bytes 0..24 and then the payload |
//!
//! Payload of `Head`, [`HEAD_BYTES`] long:
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..16 | vm id |
//! | 16..24 | generation, u64 |
//! | 24..32 | incarnation of the sender, u64 |
//! | 32..40 | epoch, u64, below 2^63 - 1 |
//! | 40..48 | pages of the whole memory layout, u64 |
//! | 48..52 | flags, u32: bit 0 binding, bit 1 sync chunk, bit 2 device state present (exactly if bit 1 is not set), bit 3 device state is a delta; others 0 |
//! | 52..56 | device state bytes, u32, at most [`MAX_DEVICE_BYTES`](super::MAX_DEVICE_BYTES); 0 without bit 2 |
//! | 56..60 | CRC-32 of the device state that the delta builds on; 0 without bit 3 |
//! | 60..64 | its length, u32; 0 without bit 3 |
//!
//! Payload of `Trailer`, [`TRAILER_BYTES`] long:
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | pages in all `Pages` frames, u64 |
//! | 8..16 | bytes of all frames before this one, their headers included, u64 |
//! | 16..20 | number of frames before this one, u32 |
//! | 20..24 | digest, u32: CRC-32 over the crc fields of all frames before this one, 4 little-endian bytes each, in order |
//! | 24..28 | CRC-32 of the whole device state, u32; 0 without device state |
//! | 28..32 | reserved, 0 |

use heartbeat_core::ids::Epoch;

use super::MAX_PAYLOAD;

/// What every frame starts with.
pub const MAGIC: [u8; 4] = *b"UPGE";

/// The version of this layout.
pub const VERSION: u8 = 1;

/// Bytes of a frame's header.
pub const FRAME_HEADER: usize = 28;

/// Payload bytes of the head frame.
pub const HEAD_BYTES: usize = 64;

/// Payload bytes of the trailer frame.
pub const TRAILER_BYTES: usize = 32;

/// Bytes of a header that its CRC covers.
const CRC_AT: usize = 24;

const FLAG_BINDING: u32 = 1;
const FLAG_SYNC: u32 = 2;
const FLAG_DEVICE: u32 = 4;
const FLAG_DEVICE_DELTA: u32 = 8;
const FLAGS: u32 = FLAG_BINDING | FLAG_SYNC | FLAG_DEVICE | FLAG_DEVICE_DELTA;

/// Why a frame's bytes were refused. Always the peer's fault, or damage on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It does not start with [`MAGIC`].
    #[error("a frame does not start with the magic bytes")]
    Magic,
    /// A version that this program does not speak.
    #[error("a frame of version {version}, only version {VERSION} is known")]
    Version {
        /// The one it has.
        version: u8,
    },
    /// An unknown kind.
    #[error("a frame of unknown kind {kind}")]
    Kind {
        /// The one it has.
        kind: u8,
    },
    /// A length above [`MAX_PAYLOAD`].
    #[error("a frame announces {length} payload bytes, the bound is {MAX_PAYLOAD}")]
    TooLong {
        /// The length.
        length: u32,
    },
    /// A field that does not fit the frame's kind, or reserved bits that are set.
    #[error("a frame's {field} field is not valid")]
    Field {
        /// Its name in the tables above.
        field: &'static str,
    },
    /// The CRC does not match.
    #[error("a frame's checksum is {found:#010x}, its content gives {computed:#010x}")]
    Crc {
        /// In the frame.
        found: u32,
        /// Over what arrived.
        computed: u32,
    },
}

/// The kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Starts a stream.
    Head = 1,
    /// Page records.
    Pages = 2,
    /// Device state records.
    Device = 3,
    /// Ends a stream.
    Trailer = 4,
    /// Disk write records.
    Disk = 5,
}

impl FrameKind {
    /// Whether its payload is records.
    fn has_records(self) -> bool {
        matches!(self, Self::Pages | Self::Device | Self::Disk)
    }
}

/// A frame's header, but for its CRC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: FrameKind,
    /// First page or block of the run.
    pub first: u64,
    /// How many pages or blocks.
    pub count: u32,
    /// Payload bytes.
    pub length: u32,
    /// CRC as it was read; [`seal`] computes it.
    pub crc: u32,
}

impl FrameHeader {
    /// Reads a header and checks each field by itself. The CRC is checked by [`FrameHeader::verify`].
    ///
    /// # Errors
    /// [`FrameError`] but for `Crc`.
    pub fn parse(bytes: &[u8; FRAME_HEADER]) -> Result<Self, FrameError> {
        if bytes[0..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        if bytes[4] != VERSION {
            return Err(FrameError::Version { version: bytes[4] });
        }
        let kind = match bytes[5] {
            1 => FrameKind::Head,
            2 => FrameKind::Pages,
            3 => FrameKind::Device,
            4 => FrameKind::Trailer,
            5 => FrameKind::Disk,
            kind => return Err(FrameError::Kind { kind }),
        };
        let records = kind.has_records();
        if bytes[6] != u8::from(records) {
            return Err(FrameError::Field { field: "encoding" });
        }
        if bytes[7] != 0 {
            return Err(FrameError::Field { field: "reserved" });
        }
        let (first, count) = (get_u64(bytes, 8), get_u32(bytes, 16));
        if (!records || kind == FrameKind::Disk) && first != 0 {
            return Err(FrameError::Field { field: "first" });
        }
        if records == (count == 0) {
            return Err(FrameError::Field { field: "count" });
        }
        let length = get_u32(bytes, 20);
        let fits = match kind {
            FrameKind::Head => length as usize == HEAD_BYTES,
            FrameKind::Trailer => length as usize == TRAILER_BYTES,
            FrameKind::Pages | FrameKind::Device | FrameKind::Disk if length as usize > MAX_PAYLOAD => {
                return Err(FrameError::TooLong { length });
            }
            FrameKind::Pages | FrameKind::Device | FrameKind::Disk => length > 0,
        };
        if !fits {
            return Err(FrameError::Field { field: "length" });
        }
        Ok(Self { kind, first, count, length, crc: get_u32(bytes, CRC_AT) })
    }

    /// Checks the CRC of the header it was parsed from and its payload.
    ///
    /// # Errors
    /// [`FrameError::Crc`].
    pub fn verify(&self, header: &[u8; FRAME_HEADER], payload: &[u8]) -> Result<(), FrameError> {
        let computed = checksum(header, payload);
        if computed == self.crc { Ok(()) } else { Err(FrameError::Crc { found: self.crc, computed }) }
    }
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..CRC_AT]);
    hasher.update(payload);
    hasher.finalize()
}

/// Writes the header into the first [`FRAME_HEADER`] bytes of `frame`, whose rest is the payload. Returns the CRC.
///
/// # Panics
/// If `frame` is shorter than a header.
pub fn seal(frame: &mut [u8], kind: FrameKind, first: u64, count: u32) -> u32 {
    let (header, payload) = frame.split_at_mut(FRAME_HEADER);
    header[0..4].copy_from_slice(&MAGIC);
    header[4] = VERSION;
    header[5] = kind as u8;
    header[6] = u8::from(kind.has_records());
    header[7] = 0;
    header[8..16].copy_from_slice(&first.to_le_bytes());
    header[16..20].copy_from_slice(&count.to_le_bytes());
    header[20..24].copy_from_slice(&super::bounded_u32(payload.len()).to_le_bytes());
    let crc = checksum(header, payload);
    header[CRC_AT..FRAME_HEADER].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// Which stream this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamId {
    /// The VM.
    pub vm: [u8; 16],
    /// The generation under which it was captured.
    pub generation: u64,
    /// The sender's incarnation.
    pub incarnation: u64,
    /// The epoch; of a sync chunk, whatever the sender numbers them by.
    pub epoch: u64,
    /// Whether output waits for this epoch: its acknowledgement releases held output.
    pub binding: bool,
    /// Whether it is a piece of the initial sync: pages alone, no state that a guest could go on from.
    pub sync: bool,
}

/// The head of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamHead {
    /// Which stream this is.
    pub id: StreamId,
    /// Pages of the whole layout.
    pub layout_pages: u64,
    /// Device state, if the stream carries it.
    pub device: Option<DeviceHead>,
}

/// What a stream's head says of its device state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceHead {
    /// Its bytes once decoded.
    pub length: u32,
    /// What the blocks that are not sent are equal to; without it, zeroes.
    pub base: Option<DeviceBase>,
}

/// Names a device state by length and CRC-32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBase {
    /// Bytes.
    pub length: u32,
    /// CRC-32 of all of it.
    pub crc: u32,
}

impl DeviceBase {
    /// The name of `state`.
    ///
    /// # Panics
    /// If it is longer than 4 GiB; the bound is far below.
    #[must_use]
    pub fn of(state: &[u8]) -> Self {
        Self { length: super::bounded_u32(state.len()), crc: crc32fast::hash(state) }
    }
}

impl StreamHead {
    /// The payload of the head frame.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEAD_BYTES] {
        let base = self.device.and_then(|device| device.base);
        let mut flags = 0;
        for (set, flag) in [
            (self.id.binding, FLAG_BINDING),
            (self.id.sync, FLAG_SYNC),
            (self.device.is_some(), FLAG_DEVICE),
            (base.is_some(), FLAG_DEVICE_DELTA),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut bytes = [0; HEAD_BYTES];
        bytes[0..16].copy_from_slice(&self.id.vm);
        bytes[16..24].copy_from_slice(&self.id.generation.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.id.incarnation.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.id.epoch.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.layout_pages.to_le_bytes());
        bytes[48..52].copy_from_slice(&flags.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.device.map_or(0, |device| device.length).to_le_bytes());
        bytes[56..60].copy_from_slice(&base.map_or(0, |base| base.crc).to_le_bytes());
        bytes[60..64].copy_from_slice(&base.map_or(0, |base| base.length).to_le_bytes());
        bytes
    }

    /// Reads the payload of a head frame.
    ///
    /// # Errors
    /// [`FrameError::Field`].
    pub fn parse(bytes: &[u8; HEAD_BYTES]) -> Result<Self, FrameError> {
        let flags = get_u32(bytes, 48);
        let set = |flag| flags & flag != 0;
        // An epoch has device state, a sync chunk has none: memory that is newer than its device state is of no use.
        if flags & !FLAGS != 0 || set(FLAG_SYNC) == set(FLAG_DEVICE) || (set(FLAG_DEVICE_DELTA) && !set(FLAG_DEVICE)) {
            return Err(FrameError::Field { field: "flags" });
        }
        if get_u64(bytes, 32) >= Epoch::BOUND.0 {
            return Err(FrameError::Field { field: "epoch" });
        }
        let length = get_u32(bytes, 52);
        if length as usize > super::MAX_DEVICE_BYTES || (length != 0 && !set(FLAG_DEVICE)) {
            return Err(FrameError::Field { field: "device state bytes" });
        }
        let base = DeviceBase { length: get_u32(bytes, 60), crc: get_u32(bytes, 56) };
        if !set(FLAG_DEVICE_DELTA) && base != (DeviceBase { length: 0, crc: 0 }) {
            return Err(FrameError::Field { field: "device state base" });
        }
        let mut vm = [0; 16];
        vm.copy_from_slice(&bytes[0..16]);
        Ok(Self {
            id: StreamId {
                vm,
                generation: get_u64(bytes, 16),
                incarnation: get_u64(bytes, 24),
                epoch: get_u64(bytes, 32),
                binding: set(FLAG_BINDING),
                sync: set(FLAG_SYNC),
            },
            layout_pages: get_u64(bytes, 40),
            device: set(FLAG_DEVICE).then(|| DeviceHead { length, base: set(FLAG_DEVICE_DELTA).then_some(base) }),
        })
    }
}

/// The totals at the end of a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trailer {
    /// Pages in all pages frames.
    pub pages: u64,
    /// Bytes of all frames before the trailer.
    pub bytes: u64,
    /// Number of those frames.
    pub frames: u32,
    /// Digest over their CRCs.
    pub digest: u32,
    /// CRC of the whole device state.
    pub device_crc: u32,
}

impl Trailer {
    /// The payload of the trailer frame.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[0..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.frames.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.digest.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.device_crc.to_le_bytes());
        bytes
    }

    /// Reads the payload of a trailer frame.
    ///
    /// # Errors
    /// [`FrameError::Field`].
    pub fn parse(bytes: &[u8; TRAILER_BYTES]) -> Result<Self, FrameError> {
        if get_u32(bytes, 28) != 0 {
            return Err(FrameError::Field { field: "reserved" });
        }
        Ok(Self {
            pages: get_u64(bytes, 0),
            bytes: get_u64(bytes, 8),
            frames: get_u32(bytes, 16),
            digest: get_u32(bytes, 20),
            device_crc: get_u32(bytes, 24),
        })
    }
}

/// Running totals of a stream: the sender fills its trailer from it, the receiver compares.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    bytes: u64,
    frames: u32,
    digest: crc32fast::Hasher,
}

impl Totals {
    /// Counts one frame of `length` bytes, header included.
    pub fn add(&mut self, length: usize, crc: u32) {
        self.bytes += length as u64;
        self.frames += 1;
        self.digest.update(&crc.to_le_bytes());
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Frames so far.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// The trailer of a stream with these frames.
    #[must_use]
    pub fn trailer(&self, pages: u64, device_crc: u32) -> Trailer {
        Trailer { pages, bytes: self.bytes, frames: self.frames, digest: self.digest.clone().finalize(), device_crc }
    }
}

fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
