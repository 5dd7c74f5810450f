//! Word delta of one page against another, as *replacement runs*.
//!
//! Form: any number of runs, each `first word: u16, words: u16` (little-endian, in 8-byte words of the page) and then
//! `words * 8` new bytes. Runs ascend, do not touch each other, and stay inside the page. Applying a delta twice gives the
//! same page as applying it once, which an XOR would not: a standby may repeat an interrupted application.

use super::Page;

/// Bytes in a word.
pub const WORD: usize = 8;

/// Words in a page.
pub const WORDS: usize = size_of::<Page>() / WORD;

/// Bytes of a run's header.
pub const RUN_HEADER: usize = 4;

/// The longest delta that [`encode`] makes: 3 KiB. Above it, whole pages are as good.
pub const MAX_DELTA: usize = 3072;

/// Bytes that are compared at once before words are. The comparison of equal chunks runs at the speed of `memcmp`.
const CHUNK: usize = 512;
const CHUNK_WORDS: usize = CHUNK / WORD;

/// A delta being built; reused between pages.
#[derive(Debug)]
pub struct DeltaBuffer {
    bytes: [u8; MAX_DELTA],
    length: usize,
}

impl Default for DeltaBuffer {
    fn default() -> Self {
        Self { bytes: [0; MAX_DELTA], length: 0 }
    }
}

impl DeltaBuffer {
    /// What the last [`encode`] made.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// What comparing two pages gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// They are equal.
    Same,
    /// The buffer holds the delta.
    Delta,
    /// The delta would be longer than [`MAX_DELTA`].
    TooLong,
}

/// Makes the delta that turns `old` into `new`.
pub fn encode(old: &Page, new: &Page, into: &mut DeltaBuffer) -> Compared {
    let differing = compare(old, new);
    into.length = 0;
    let mut at = 0;
    while let Some(first) = next(&differing, at, true) {
        let end = next(&differing, first, false).unwrap_or(WORDS);
        let body = into.length + RUN_HEADER;
        let length = body + (end - first) * WORD;
        if length > MAX_DELTA {
            return Compared::TooLong;
        }
        into.bytes[into.length..into.length + 2].copy_from_slice(&word_u16(first).to_le_bytes());
        into.bytes[into.length + 2..body].copy_from_slice(&word_u16(end - first).to_le_bytes());
        into.bytes[body..length].copy_from_slice(&new[first * WORD..end * WORD]);
        into.length = length;
        at = end;
    }
    if into.length == 0 { Compared::Same } else { Compared::Delta }
}

fn word_u16(word: usize) -> u16 {
    u16::try_from(word).expect("a page has 512 words")
}

/// One bit for each word that differs.
fn compare(old: &Page, new: &Page) -> [u64; WORDS / CHUNK_WORDS] {
    let (old, _) = old.as_chunks::<CHUNK>();
    let (new, _) = new.as_chunks::<CHUNK>();
    let mut differing = [0; WORDS / CHUNK_WORDS];
    for ((bits, old), new) in differing.iter_mut().zip(old).zip(new) {
        if old != new {
            let (old, _) = old.as_chunks::<WORD>();
            let (new, _) = new.as_chunks::<WORD>();
            for (word, (old, new)) in old.iter().zip(new).enumerate() {
                *bits |= u64::from(u64::from_ne_bytes(*old) != u64::from_ne_bytes(*new)) << word;
            }
        }
    }
    differing
}

/// The first word at or after `from` that differs (or, with `differs` false, is equal).
fn next(differing: &[u64; WORDS / CHUNK_WORDS], from: usize, differs: bool) -> Option<usize> {
    let mut at = from;
    while at < WORDS {
        let bits = differing[at / CHUNK_WORDS];
        let rest = (if differs { bits } else { !bits }) >> (at % CHUNK_WORDS);
        if rest != 0 {
            return Some(at + rest.trailing_zeros() as usize);
        }
        at = (at / CHUNK_WORDS + 1) * CHUNK_WORDS;
    }
    None
}

/// Whether `delta` has the form that [`runs`] may walk: at least one run, whole, ascending, apart and inside the page.
#[must_use]
pub fn valid(delta: &[u8]) -> bool {
    let mut rest = delta;
    let mut free = 0;
    while let Some((header, body)) = rest.split_first_chunk::<RUN_HEADER>() {
        let (first, words) = run_header(*header);
        if first < free || words == 0 || first + words > WORDS || body.len() < words * WORD {
            return false;
        }
        free = first + words + 1;
        rest = &body[words * WORD..];
    }
    rest.is_empty() && !delta.is_empty()
}

fn run_header(header: [u8; RUN_HEADER]) -> (usize, usize) {
    let [a, b, c, d] = header;
    (usize::from(u16::from_le_bytes([a, b])), usize::from(u16::from_le_bytes([c, d])))
}

/// The runs of a delta as (byte offset in the page, new bytes).
///
/// # Panics
/// When walked, if the delta is not [`valid`].
pub fn runs(delta: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut rest = delta;
    std::iter::from_fn(move || {
        let (header, body) = rest.split_first_chunk::<RUN_HEADER>()?;
        let (first, words) = run_header(*header);
        let (bytes, after) = body.split_at(words * WORD);
        rest = after;
        Some((first * WORD, bytes))
    })
}

/// Writes a [`valid`] delta over `page`.
pub fn apply(delta: &[u8], page: &mut Page) {
    for (offset, bytes) in runs(delta) {
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_pages_have_no_delta_and_unlike_ones_are_too_long() {
        let mut buffer = DeltaBuffer::default();
        assert_eq!(encode(&[7; 4096], &[7; 4096], &mut buffer), Compared::Same);
        assert_eq!(encode(&[7; 4096], &[8; 4096], &mut buffer), Compared::TooLong);
    }

    #[test]
    fn runs_cross_chunks_and_reach_the_last_word() {
        let old = [0; 4096];
        let mut new = old;
        new[500..600].fill(1);
        new[4095] = 9;
        let mut buffer = DeltaBuffer::default();
        assert_eq!(encode(&old, &new, &mut buffer), Compared::Delta);
        let found: Vec<_> = runs(buffer.bytes()).map(|(at, bytes)| (at, bytes.len())).collect();
        assert_eq!(found, [(496, 104), (4088, 8)]);
    }

    #[test]
    fn refuses_runs_that_overlap_touch_or_leave_the_page() {
        let run = |first: u16, words: u16| {
            let mut bytes = [first.to_le_bytes(), words.to_le_bytes()].concat();
            bytes.resize(bytes.len() + usize::from(words) * WORD, 1);
            bytes
        };
        assert!(valid(&[run(0, 1), run(2, 3), run(511, 1)].concat()));
        assert!(!valid(&[]));
        assert!(!valid(&run(3, 0)));
        assert!(!valid(&run(510, 3)));
        assert!(!valid(&run(600, 1)));
        assert!(!valid(&[run(4, 2), run(5, 1)].concat()));
        assert!(!valid(&[run(4, 2), run(6, 1)].concat()));
        assert!(!valid(&[run(4, 2), run(1, 1)].concat()));
        assert!(!valid(&run(0, 2)[..19]));
        assert!(!valid(&[run(0, 2), vec![1, 0, 0]].concat()));
    }

    proptest! {
        #[test]
        fn a_delta_gives_the_new_page_once_and_twice(
            changes in prop::collection::vec((0_usize..4096, 1_usize..90, any::<u8>()), 0..40), seed in any::<u8>(),
        ) {
            let mut old = [0; 4096];
            for (at, byte) in old.iter_mut().enumerate() { *byte = (at / 11).to_le_bytes()[0] ^ seed; }
            let mut new = old;
            for (at, length, value) in changes { new[at..(at + length).min(4096)].fill(value); }
            let mut buffer = DeltaBuffer::default();
            let differing = old.chunks(8).zip(new.chunks(8)).filter(|(a, b)| a != b).count();
            match encode(&old, &new, &mut buffer) {
                Compared::Same => prop_assert_eq!(differing, 0),
                Compared::TooLong => prop_assert!(differing * (WORD + RUN_HEADER) > MAX_DELTA),
                Compared::Delta => {
                    prop_assert!(valid(buffer.bytes()));
                    let sent: usize = runs(buffer.bytes()).map(|(_, bytes)| bytes.len()).sum();
                    prop_assert_eq!(sent, differing * WORD);
                    let mut page = old;
                    apply(buffer.bytes(), &mut page);
                    prop_assert!(page == new);
                    apply(buffer.bytes(), &mut page);
                    prop_assert!(page == new);
                }
            }
        }

        #[test]
        fn what_is_valid_can_be_applied(delta in prop::collection::vec(prop_oneof![Just(0_u8), 0_u8..3, any::<u8>()], 0..64)) {
            if valid(&delta) { apply(&delta, &mut [0; 4096]); }
        }
    }
}
