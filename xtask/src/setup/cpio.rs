//! Writes the `newc` archives that Linux unpacks as its first file system.
//!
//! Promise: the same entries give the same bytes; owner is root and times are 0.

use std::io::{self, Write};

/// What an entry is.
#[derive(Debug, Clone)]
pub(crate) enum Entry {
    Directory,
    /// Its bytes, and whether it may be executed.
    File(Vec<u8>, bool),
    /// Where it points to.
    Link(String),
}

/// Writes `entries`, given by path without a leading slash, parents first, with the trailer.
///
/// # Errors
/// If `out` fails, or a file is longer than the format can say (4 GiB).
pub(crate) fn write(out: &mut impl Write, entries: &[(String, Entry)]) -> io::Result<()> {
    let nothing = Vec::new();
    for (index, (path, entry)) in (1_u32..).zip(entries) {
        match entry {
            Entry::Directory => record(out, index, path, 0o040_755, &nothing)?,
            Entry::File(bytes, false) => record(out, index, path, 0o100_644, bytes)?,
            Entry::File(bytes, true) => record(out, index, path, 0o100_755, bytes)?,
            Entry::Link(to) => record(out, index, path, 0o120_777, to.as_bytes())?,
        }
    }
    record(out, 0, "TRAILER!!!", 0, &nothing)
}

fn record(out: &mut impl Write, inode: u32, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is too long for an archive"));
    let length = u32::try_from(bytes.len()).map_err(too_long)?;
    let name = u32::try_from(path.len() + 1).map_err(too_long)?;
    // Inode, mode, owner, group, links, time, length, four device numbers, name's length with its end, checksum.
    let fields = [inode, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name, 0];
    out.write_all(b"070701")?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    out.write_all(path.as_bytes())?;
    out.write_all(b"\0")?;
    pad(out, 110 + path.len() + 1)?;
    out.write_all(bytes)?;
    pad(out, bytes.len())
}

/// Fills up to a multiple of 4.
fn pad(out: &mut impl Write, length: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..length.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::{Entry, write};

    #[test]
    fn headers_and_data_are_aligned_and_carry_lengths() {
        let entries =
            [("etc".to_owned(), Entry::Directory), ("etc/x".to_owned(), Entry::File(b"hello".to_vec(), true))];
        let mut bytes = Vec::new();
        write(&mut bytes, &entries).expect("a vector takes everything");
        assert_eq!(bytes.len() % 4, 0);
        // The first record is 110 + "etc\0" = 114 bytes, filled up to 116.
        let second = &bytes[116..];
        assert_eq!(&second[..6], b"070701");
        assert_eq!(&second[14..22], b"000081ed");
        assert_eq!(&second[54..62], b"00000005");
        assert_eq!(&second[110..116], b"etc/x\0");
        assert_eq!(&second[116..121], b"hello");
        assert_eq!(&second[124..130], b"070701");
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }
}
