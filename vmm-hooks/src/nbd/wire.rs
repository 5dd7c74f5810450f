//! The protocol's numbers, as its document names them, and how they are read and written: everything big-endian.

use std::io::{self, Read, Write};

/// `NBDMAGIC`, the server's first word.
pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, its second, and the client's before each option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags; the client's have the same numbers.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const REP_ERR_POLICY: u32 = (1 << 31) + 2;
pub(super) const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags.
pub(super) const EXPORT_HAS_FLAGS: u16 = 1 << 0;
pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_SEND_FLUSH: u16 = 1 << 2;
pub(super) const EXPORT_SEND_FUA: u16 = 1 << 3;
pub(super) const EXPORT_SEND_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const EXPORT_SEND_DF: u16 = 1 << 7;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;

pub(super) const REPLY_FLAG_DONE: u16 = 1;
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_ERROR: u16 = (1 << 15) + 1;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;

/// Bytes of a request before its data.
pub(super) const REQUEST_BYTES: usize = 28;

/// Bound on the data of one `READ` or `WRITE`, told to clients as the largest block: 32 MiB, what QEMU uses at most.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Smallest block, told to clients: any byte may be written, so that no client reads before it writes.
pub(super) const BLOCK_MIN: u32 = 1;

/// Preferred block, told to clients.
pub(super) const BLOCK_PREFERRED: u32 = 4096;

/// Bound on the name of an export; the protocol's own.
pub const NAME_MAX: usize = 4096;

/// Bound on the data of one option. Larger ones are read past and refused.
pub const OPTION_DATA_MAX: u32 = 16 << 10;

/// Bound on the data of an option that is read past; after larger ones the connection ends.
pub(super) const OPTION_SKIP_MAX: u32 = 1 << 20;

/// Bound on the options of one connection.
pub const OPTIONS_MAX: u32 = 64;

/// What must be read as a whole.
pub(super) fn exactly<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    exactly(from).map(u32::from_be_bytes)
}

pub(super) fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    exactly(from).map(u64::from_be_bytes)
}

/// Reads `length` bytes into memory that is claimed as they come.
pub(super) fn read_data(from: &mut impl Read, length: u32) -> io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(length as usize);
    if from.take(u64::from(length)).read_to_end(&mut data)? < length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(data)
}

/// Reads past `length` bytes.
pub(super) fn skip(from: &mut impl Read, length: u32) -> io::Result<()> {
    if io::copy(&mut from.take(u64::from(length)), &mut io::sink())? < u64::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// One request, its data apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    /// The client's mark; comes back in the reply.
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Request {
    /// `None` if it does not begin as a request does.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let part = |at: usize, length: usize| &bytes[at..at + length];
        let small = |at| u16::from_be_bytes(part(at, 2).try_into().expect("two bytes"));
        let word = |at| u32::from_be_bytes(part(at, 4).try_into().expect("four bytes"));
        let long = |at| u64::from_be_bytes(part(at, 8).try_into().expect("eight bytes"));
        (word(0) == REQUEST_MAGIC).then(|| Self {
            flags: small(4),
            command: small(6),
            cookie: long(8),
            offset: long(16),
            length: word(24),
        })
    }
}

/// A simple reply, without its data.
pub(super) fn simple_reply(to: &mut impl Write, error: u32, cookie: u64) -> io::Result<()> {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    to.write_all(&bytes)
}

/// The head of the only chunk of a structured reply, which `length` bytes follow.
pub(super) fn structured_reply(to: &mut impl Write, kind: u16, cookie: u64, length: u32) -> io::Result<()> {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&REPLY_FLAG_DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    to.write_all(&bytes)
}
