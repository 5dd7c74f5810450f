//! The second part of a connection: requests, one after the other, each answered once it was done.

use std::io::{Read, Write};

use super::wire::{self, Request, exactly, read_data, simple_reply, skip, structured_reply};
use super::{Backend, BackendError, NbdError};

/// Answers requests until the client says that it goes, which is the only end without an error.
pub(super) fn serve(
    from: &mut impl Read,
    to: &mut impl Write,
    backend: &dyn Backend,
    structured: bool,
) -> Result<(), NbdError> {
    let mut answer = Vec::new();
    loop {
        let request = exactly(from)?;
        let Some(request) = Request::decode(&request) else {
            return Err(NbdError::protocol(format!("{:02x?} where a request begins", &request[..4])));
        };
        let done = match request.command {
            wire::CMD_DISC => return Ok(()),
            wire::CMD_READ => {
                let read = read(&request, backend, structured, &mut answer);
                reply_to_read(to, &request, read, structured, &answer)?;
                continue;
            }
            wire::CMD_WRITE => write(from, &request, backend)?,
            _ => without_data(&request, backend),
        };
        simple_reply(to, done.map_or_else(|error| error, |()| 0), request.cookie)?;
        to.flush()?;
    }
}

/// What the protocol calls an error of the backend.
fn number(error: BackendError) -> u32 {
    match error {
        BackendError::Io => wire::EIO,
        BackendError::NoSpace => wire::ENOSPC,
        BackendError::Invalid => wire::EINVAL,
    }
}

/// Whether a request's range is one: inside the export, and not empty, which the protocol leaves undefined.
fn inside(request: &Request, bytes: u64) -> bool {
    request.length > 0 && request.offset.checked_add(u64::from(request.length)).is_some_and(|end| end <= bytes)
}

/// `true` if no flag is set but these.
fn only(request: &Request, flags: u16) -> bool {
    request.flags & !flags == 0
}

fn read(request: &Request, backend: &dyn Backend, structured: bool, into: &mut Vec<u8>) -> Result<(), u32> {
    let flags = if structured { wire::CMD_FLAG_DF } else { 0 };
    // FUA means nothing for a read, and clients may set it.
    if !only(request, flags | wire::CMD_FLAG_FUA)
        || request.length > wire::PAYLOAD_MAX
        || !inside(request, backend.bytes())
    {
        return Err(wire::EINVAL);
    }
    into.resize(request.length as usize, 0);
    backend.read(request.offset, into).map_err(number)
}

fn reply_to_read(
    to: &mut impl Write,
    request: &Request,
    read: Result<(), u32>,
    structured: bool,
    answer: &[u8],
) -> Result<(), NbdError> {
    match (read, structured) {
        (Ok(()), false) => {
            simple_reply(to, 0, request.cookie)?;
            to.write_all(answer)?;
        }
        (Ok(()), true) => {
            structured_reply(to, wire::REPLY_OFFSET_DATA, request.cookie, request.length + 8)?;
            to.write_all(&request.offset.to_be_bytes())?;
            to.write_all(answer)?;
        }
        (Err(error), false) => simple_reply(to, error, request.cookie)?,
        (Err(error), true) => {
            structured_reply(to, wire::REPLY_ERROR, request.cookie, 6)?;
            to.write_all(&error.to_be_bytes())?;
            // The length of a message that is not there.
            to.write_all(&[0; 2])?;
        }
    }
    to.flush()?;
    Ok(())
}

/// The outer error ends the connection, the inner one is the reply's.
fn write(from: &mut impl Read, request: &Request, backend: &dyn Backend) -> Result<Result<(), u32>, NbdError> {
    let bytes = request.length;
    if bytes > wire::PAYLOAD_MAX {
        return Err(NbdError::protocol(format!("a write of {bytes} bytes")));
    }
    let features = backend.features();
    let refused = if features.read_only {
        Some(wire::EPERM)
    } else if !only(request, fua(backend)) || bytes == 0 {
        Some(wire::EINVAL)
    } else if !inside(request, backend.bytes()) {
        Some(wire::ENOSPC)
    } else {
        None
    };
    if let Some(error) = refused {
        skip(from, bytes)?;
        return Ok(Err(error));
    }
    let data = read_data(from, bytes)?;
    Ok(backend.write(request.offset, data, request.flags & wire::CMD_FLAG_FUA != 0).map_err(number))
}

fn fua(backend: &dyn Backend) -> u16 {
    if backend.features().fua { wire::CMD_FLAG_FUA } else { 0 }
}

fn without_data(request: &Request, backend: &dyn Backend) -> Result<(), u32> {
    let features = backend.features();
    let durable = request.flags & wire::CMD_FLAG_FUA != 0;
    let (offset, bytes) = (request.offset, u64::from(request.length));
    let done = match request.command {
        wire::CMD_FLUSH if features.flush => {
            // Offset and length must be zero; flags mean nothing.
            if offset != 0 || bytes != 0 || !only(request, wire::CMD_FLAG_FUA) {
                return Err(wire::EINVAL);
            }
            backend.flush()
        }
        wire::CMD_TRIM if features.trim => {
            changes(request, backend, fua(backend), wire::EINVAL)?;
            backend.trim(offset, bytes, durable)
        }
        wire::CMD_WRITE_ZEROES if features.zeroes => {
            changes(request, backend, fua(backend) | wire::CMD_FLAG_NO_HOLE, wire::ENOSPC)?;
            backend.zero(offset, bytes, request.flags & wire::CMD_FLAG_NO_HOLE == 0, durable)
        }
        _ => return Err(wire::EINVAL),
    };
    done.map_err(number)
}

/// Whether a request that changes something may.
fn changes(request: &Request, backend: &dyn Backend, flags: u16, outside: u32) -> Result<(), u32> {
    if backend.features().read_only {
        return Err(wire::EPERM);
    }
    if !only(request, flags) || request.length == 0 {
        return Err(wire::EINVAL);
    }
    if inside(request, backend.bytes()) { Ok(()) } else { Err(outside) }
}
