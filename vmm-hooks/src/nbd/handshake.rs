//! The first part of a connection: the client asks what there is and chooses one export.

use std::io::{Read, Write};
use std::sync::Arc;

use super::wire::{self, read_data, read_u32, read_u64, skip};
use super::{Backend, BackendError, Export, Features, NbdError};

/// What was agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    /// What the client chose.
    pub(super) open: Open,
    /// Whether `READ` is answered by structured replies.
    pub(super) structured: bool,
}

/// A backend that a client was let in to: whoever was told of the opening is told of the end, too.
#[derive(Debug)]
pub(super) struct Open(Arc<dyn Backend>);

impl Open {
    fn begin(export: &Export) -> Result<Self, BackendError> {
        export.backend.opened()?;
        Ok(Self(Arc::clone(&export.backend)))
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.closed();
    }
}

/// Goes through the options until one chooses; `None` if the client gives up in good order.
pub(super) fn negotiate(
    from: &mut impl Read,
    to: &mut impl Write,
    exports: &[Export],
) -> Result<Option<Agreed>, NbdError> {
    to.write_all(&wire::NBD_MAGIC.to_be_bytes())?;
    to.write_all(&wire::OPTION_MAGIC.to_be_bytes())?;
    to.write_all(&(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes())?;
    to.flush()?;
    let flags = read_u32(from)?;
    let known = u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(NbdError::protocol(format!("the unknown handshake flags {flags:#x}")));
    }
    let zeroes = flags & u32::from(wire::FLAG_NO_ZEROES) == 0;
    let mut structured = false;
    for _ in 0..wire::OPTIONS_MAX {
        let magic = read_u64(from)?;
        if magic != wire::OPTION_MAGIC {
            return Err(NbdError::protocol(format!("{magic:#x} where an option begins")));
        }
        let (option, length) = (read_u32(from)?, read_u32(from)?);
        if length > wire::OPTION_DATA_MAX {
            if option == wire::OPT_EXPORT_NAME || length > wire::OPTION_SKIP_MAX {
                return Err(NbdError::protocol(format!("option {option} with {length} bytes")));
            }
            skip(from, length)?;
            reply(to, option, wire::REP_ERR_TOO_BIG, b"too long")?;
            continue;
        }
        let data = read_data(from, length)?;
        match option {
            wire::OPT_EXPORT_NAME => {
                // There is no way to say no but to hang up.
                let export =
                    find(exports, &data).ok_or_else(|| NbdError::protocol("the name of an export that is not here"))?;
                let open = Open::begin(export)
                    .map_err(|_| NbdError::protocol("the name of an export that it may not have"))?;
                let backend = open.backend();
                to.write_all(&backend.bytes().to_be_bytes())?;
                to.write_all(&flags_of(backend.features(), structured).to_be_bytes())?;
                if zeroes {
                    to.write_all(&[0; 124])?;
                }
                to.flush()?;
                return Ok(Some(Agreed { open, structured }));
            }
            wire::OPT_ABORT => {
                // The client may have gone without waiting for it.
                let _ = reply(to, option, wire::REP_ACK, &[]);
                return Ok(None);
            }
            wire::OPT_LIST if !data.is_empty() => reply(to, option, wire::REP_ERR_INVALID, b"data in a list")?,
            wire::OPT_LIST => {
                for Export { name, .. } in exports {
                    let length = u32::try_from(name.len()).expect("names are short");
                    reply(to, option, wire::REP_SERVER, &[&length.to_be_bytes(), name.as_bytes()].concat())?;
                }
                reply(to, option, wire::REP_ACK, &[])?;
            }
            wire::OPT_STRUCTURED_REPLY if !data.is_empty() => {
                reply(to, option, wire::REP_ERR_INVALID, b"data with it")?;
            }
            wire::OPT_STRUCTURED_REPLY => {
                structured = true;
                reply(to, option, wire::REP_ACK, &[])?;
            }
            wire::OPT_INFO | wire::OPT_GO => {
                let Some(name) = name_in(&data) else {
                    reply(to, option, wire::REP_ERR_INVALID, b"lengths that do not fit")?;
                    continue;
                };
                let Some(export) = find(exports, name) else {
                    reply(to, option, wire::REP_ERR_UNKNOWN, b"no such export")?;
                    continue;
                };
                if option == wire::OPT_INFO {
                    inform(to, option, export, structured)?;
                    continue;
                }
                let Ok(open) = Open::begin(export) else {
                    reply(to, option, wire::REP_ERR_POLICY, b"this export is in use")?;
                    continue;
                };
                inform(to, option, export, structured)?;
                return Ok(Some(Agreed { open, structured }));
            }
            _ => reply(to, option, wire::REP_ERR_UNSUP, b"not supported")?,
        }
    }
    Err(NbdError::protocol(format!("more than {} options", wire::OPTIONS_MAX)))
}

/// The empty name is the first export.
fn find<'a>(exports: &'a [Export], name: &[u8]) -> Option<&'a Export> {
    exports.iter().find(|export| name.is_empty() || export.name.as_bytes() == name)
}

/// The name in the data of `INFO` and `GO`; `None` if its lengths do not add up.
fn name_in(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_first_chunk()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok().filter(|length| *length <= wire::NAME_MAX)?;
    let (name, rest) = rest.split_at_checked(length)?;
    let (asked, rest) = rest.split_first_chunk()?;
    // What is asked for in particular does not matter: both kinds that there are are always told.
    (rest.len() == usize::from(u16::from_be_bytes(*asked)) * 2).then_some(name)
}

fn inform(to: &mut impl Write, option: u32, export: &Export, structured: bool) -> Result<(), NbdError> {
    let mut about = wire::INFO_EXPORT.to_be_bytes().to_vec();
    about.extend(export.backend.bytes().to_be_bytes());
    about.extend(flags_of(export.backend.features(), structured).to_be_bytes());
    reply(to, option, wire::REP_INFO, &about)?;
    let mut sizes = wire::INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [wire::BLOCK_MIN, wire::BLOCK_PREFERRED, wire::PAYLOAD_MAX] {
        sizes.extend(size.to_be_bytes());
    }
    reply(to, option, wire::REP_INFO, &sizes)?;
    reply(to, option, wire::REP_ACK, &[])
}

fn flags_of(features: Features, structured: bool) -> u16 {
    let mut flags = wire::EXPORT_HAS_FLAGS;
    for (offered, flag) in [
        (features.read_only, wire::EXPORT_READ_ONLY),
        (features.flush, wire::EXPORT_SEND_FLUSH),
        (features.fua, wire::EXPORT_SEND_FUA),
        (features.trim, wire::EXPORT_SEND_TRIM),
        (features.zeroes, wire::EXPORT_SEND_WRITE_ZEROES),
        (structured, wire::EXPORT_SEND_DF),
    ] {
        if offered {
            flags |= flag;
        }
    }
    flags
}

fn reply(to: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> Result<(), NbdError> {
    let length = u32::try_from(data.len()).expect("replies are short");
    to.write_all(&wire::OPTION_REPLY_MAGIC.to_be_bytes())?;
    for word in [option, kind, length] {
        to.write_all(&word.to_be_bytes())?;
    }
    to.write_all(data)?;
    to.flush()?;
    Ok(())
}
