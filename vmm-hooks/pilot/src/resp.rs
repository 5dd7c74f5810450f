//! The requests of RESP, the protocol of Redis: arrays of bulk strings, or a line of words.

use alloc::vec::Vec;

/// Most words of a request.
const WORDS_MAX: usize = 1024;
/// Longest word.
const WORD_MAX: usize = 1 << 20;

/// What the start of a stream holds.
pub enum Parsed<'a> {
    /// The request has not come whole.
    Partial,
    /// Its words, and how many bytes it took.
    Request(Vec<&'a [u8]>, usize),
    /// No request.
    Broken(&'static str),
}

/// Reads the first request of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let Some((head, mut at)) = line(bytes, 0) else {
        return if bytes.len() > WORD_MAX { Parsed::Broken("too long a line") } else { Parsed::Partial };
    };
    let Some(count) = head.strip_prefix(b"*") else {
        let words = head.split(|&byte| byte == b' ').filter(|word| !word.is_empty()).collect();
        return Parsed::Request(words, at);
    };
    let Some(count) = number(count).filter(|&count| count <= WORDS_MAX) else {
        return Parsed::Broken("a request of too many words");
    };
    let mut words = Vec::with_capacity(count);
    for _ in 0..count {
        let Some((head, start)) = line(bytes, at) else { return Parsed::Partial };
        let Some(length) = head.strip_prefix(b"$").and_then(number).filter(|&length| length <= WORD_MAX) else {
            return Parsed::Broken("a word that is no bulk string");
        };
        let Some(word) = bytes.get(start..start + length) else { return Parsed::Partial };
        at = start + length + 2;
        match bytes.get(start + length..at) {
            None => return Parsed::Partial,
            Some(b"\r\n") => words.push(word),
            Some(_) => return Parsed::Broken("a bulk string without an end"),
        }
    }
    Parsed::Request(words, at)
}

/// The line from `at` on, without its end, and where the next one begins.
fn line(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|&byte| byte == b'\n')?;
    let text = &rest[..end];
    Some((text.strip_suffix(b"\r").unwrap_or(text), at + end + 1))
}

fn number(text: &[u8]) -> Option<usize> {
    core::str::from_utf8(text).ok()?.parse().ok()
}
