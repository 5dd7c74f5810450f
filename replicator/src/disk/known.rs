//! What a standby's images hold before the first copy begins, told to the primary as digests of their pieces.
//!
//! A standby that has an older copy of a VM's disks begins its new images with it, and says for each [`PIECE`] what is in
//! it. The primary then leaves out what is there already ([`super::difference`]). Promise: a digest is that of bytes that were
//! written to the new image, so whatever the older copy was, or whoever changes it meanwhile, cannot make the two differ.
//!
//! On the wire, little-endian, one QUIC stream from the standby to the primary of a VM with disks:
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | `USKN` |
//! | 2 | version, 1 |
//! | 2 | number of disks |
//! | then for each disk, in the recipe's order: | |
//! | 8 | its pieces |
//! | runs until they are all told: 1 | kind: 0 zeroes, 1 digests |
//! | 4 | how many pieces, at least 1 |
//! | 16 each | their digests, if the kind is 1 |
//! | at the end: 4 | CRC32 of all before |

use ring::digest::{SHA256, digest};

/// Bytes of a piece: what QEMU's mirror copies at once at least, for most images.
pub const PIECE: u64 = 64 << 10;
/// Most pieces of all disks of a VM that are told about: one TiB of disks. What lies behind is sent whole.
pub const MAX_PIECES: usize = 1 << 24;
/// Longest encoding.
pub const MAX_BYTES: usize = 12 + MAX_PIECES * 21 + vmm_hooks::disk::MAX_DISKS * 8;

const MAGIC: &[u8; 4] = b"USKN";
const VERSION: u16 = 1;
const ZEROES: u8 = 0;
const DIGESTS: u8 = 1;

/// What is in a piece: the first half of its SHA-256; of one that reads as zeroes, zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 16]);

impl Digest {
    /// Of a piece that reads as zeroes.
    pub const ZEROES: Self = Self([0; 16]);

    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        if bytes.iter().all(|&byte| byte == 0) {
            return Self::ZEROES;
        }
        let whole = digest(&SHA256, bytes);
        let mut half = [0; 16];
        half.copy_from_slice(&whole.as_ref()[..16]);
        Self(half)
    }
}

/// What the images of a VM's disks hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known(pub Vec<Vec<Digest>>);

/// Why an encoding was refused: the peer's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what the standby says of its disks cannot be read: {0}")]
pub struct Unreadable(&'static str);

/// How many pieces a disk of so many bytes has.
#[must_use]
pub fn pieces(bytes: u64) -> u64 {
    bytes.div_ceil(PIECE)
}

impl Known {
    /// New images: all of them read as zeroes.
    #[must_use]
    pub fn empty(sizes: &[u64]) -> Self {
        Self(bounded(sizes).map(|pieces| vec![Digest::ZEROES; pieces]).collect())
    }

    /// How many pieces are not zeroes.
    #[must_use]
    pub fn filled(&self) -> usize {
        self.0.iter().flatten().filter(|&&digest| digest != Digest::ZEROES).count()
    }

    /// As it goes over the wire.
    ///
    /// # Panics
    /// If there are more disks or pieces than the bounds allow.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::from(MAGIC.as_slice());
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&u16::try_from(self.0.len()).expect("at most MAX_DISKS").to_le_bytes());
        for disk in &self.0 {
            bytes.extend_from_slice(&(disk.len() as u64).to_le_bytes());
            for run in disk.chunk_by(|a, b| (*a == Digest::ZEROES) == (*b == Digest::ZEROES)) {
                let zeroes = run[0] == Digest::ZEROES;
                bytes.push(if zeroes { ZEROES } else { DIGESTS });
                bytes.extend_from_slice(&u32::try_from(run.len()).expect("at most MAX_PIECES").to_le_bytes());
                if !zeroes {
                    run.iter().for_each(|digest| bytes.extend_from_slice(&digest.0));
                }
            }
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads what [`Known::encode`] wrote, about disks of these sizes.
    ///
    /// # Errors
    /// [`Unreadable`] for anything else.
    pub fn decode(bytes: &[u8], sizes: &[u64]) -> Result<Self, Unreadable> {
        let (mut rest, crc) = bytes.split_last_chunk::<4>().ok_or(Unreadable("it is too short"))?;
        if crc32fast::hash(rest) != u32::from_le_bytes(*crc) {
            return Err(Unreadable("its checksum is wrong"));
        }
        if take::<4>(&mut rest)? != *MAGIC || take::<2>(&mut rest)? != VERSION.to_le_bytes() {
            return Err(Unreadable("it is something else"));
        }
        if usize::from(u16::from_le_bytes(take(&mut rest)?)) != sizes.len() {
            return Err(Unreadable("it is about other disks"));
        }
        let mut disks = Vec::with_capacity(sizes.len());
        for expected in bounded(sizes) {
            if u64::from_le_bytes(take(&mut rest)?) != expected as u64 {
                return Err(Unreadable("it is about disks of other sizes"));
            }
            let mut disk = Vec::with_capacity(expected);
            while disk.len() < expected {
                let [kind] = take(&mut rest)?;
                let count = usize::try_from(u32::from_le_bytes(take(&mut rest)?)).expect("a u32 fits");
                if count == 0 || count > expected - disk.len() || kind > DIGESTS {
                    return Err(Unreadable("a run in it is malformed"));
                }
                if kind == ZEROES {
                    disk.resize(disk.len() + count, Digest::ZEROES);
                    continue;
                }
                for _ in 0..count {
                    disk.push(Digest(take(&mut rest)?));
                }
            }
            disks.push(disk);
        }
        if rest.is_empty() { Ok(Self(disks)) } else { Err(Unreadable("something follows it")) }
    }
}

/// The pieces of each disk that are told about.
fn bounded(sizes: &[u64]) -> impl Iterator<Item = usize> {
    sizes.iter().scan(MAX_PIECES, |left, &bytes| {
        let told = usize::try_from(pieces(bytes)).unwrap_or(usize::MAX).min(*left);
        *left -= told;
        Some(told)
    })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Unreadable> {
    let (taken, after) = rest.split_first_chunk::<N>().ok_or(Unreadable("it ends too early"))?;
    *rest = after;
    Ok(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece() -> impl Strategy<Value = Digest> {
        prop_oneof![Just(Digest::ZEROES), any::<[u8; 16]>().prop_map(Digest)]
    }

    proptest! {
        #[test]
        fn what_is_told_is_read_and_nothing_else(
            disks in prop::collection::vec(prop::collection::vec(piece(), 0..40), 0..4),
            flip in any::<prop::sample::Index>(),
        ) {
            let sizes: Vec<u64> = disks.iter().map(|disk| disk.len() as u64 * PIECE).collect();
            let known = Known(disks);
            let mut bytes = known.encode();
            prop_assert!(bytes.len() <= MAX_BYTES);
            prop_assert_eq!(Known::decode(&bytes, &sizes), Ok(known));
            let at = flip.index(bytes.len());
            bytes[at] ^= 0x10;
            prop_assert!(Known::decode(&bytes, &sizes).is_err());
            bytes[at] ^= 0x10;
            prop_assert!(Known::decode(&bytes[..at], &sizes).is_err());
        }
    }

    #[test]
    fn counts_that_lie_are_refused() {
        let sizes = [3 * PIECE];
        let lie = |body: &[u8]| {
            let mut bytes = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &1_u16.to_le_bytes(), body].concat();
            bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            Known::decode(&bytes, &sizes)
        };
        let run = |kind: u8, count: u32| [[kind].as_slice(), &count.to_le_bytes()].concat();
        let three = 3_u64.to_le_bytes();
        assert_eq!(lie(&[three.as_slice(), &run(ZEROES, 3)].concat()), Ok(Known::empty(&sizes)));
        for bad in [
            [u64::MAX.to_le_bytes().as_slice(), &run(ZEROES, 3)].concat(),
            [three.as_slice(), &run(ZEROES, 4)].concat(),
            [three.as_slice(), &run(ZEROES, 0)].concat(),
            [three.as_slice(), &run(2, 3)].concat(),
            [three.as_slice(), &run(DIGESTS, 3)].concat(),
            [three.as_slice(), &run(DIGESTS, u32::MAX)].concat(),
            [three.as_slice(), &run(ZEROES, 3), &[0]].concat(),
        ] {
            assert!(lie(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn more_than_the_bound_is_not_told_about() {
        let sizes = [(MAX_PIECES as u64 - 1) * PIECE, 5 * PIECE, PIECE];
        assert_eq!(bounded(&sizes).collect::<Vec<_>>(), [MAX_PIECES - 1, 1, 0]);
        assert_eq!(pieces(PIECE + 1), 2);
    }
}
