//! Whether the answers of clients that count together could have come from one counter that only ever goes on by one.
//!
//! A read or a write that was lost may be covered by the next write before anybody looks; an answer of a counter cannot: what was lost is
//! counted again, and so answered twice. Promise: a history is refused exactly if no order of it explains every answer.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

/// A question of a client that counts. The counter was 0 before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// When it was asked.
    pub called_ns: u64,
    /// When it was answered, and how far was counted then; `None`: nobody knows whether it was counted.
    pub returned: Option<(u64, u64)>,
    /// Who asked.
    pub client: u32,
}

/// Judges the history of a counter that was read as `at_the_end` when nobody counted any more.
///
/// # Errors
/// With what cannot be.
pub fn judge(counts: &[Count], at_the_end: u64) -> Result<()> {
    let mut answered: BTreeMap<u64, (u64, u64, u32)> = BTreeMap::new();
    for count in counts {
        let Some((returned_ns, value)) = count.returned else { continue };
        ensure!(value > 0, "client {} counted, and was told that it is 0", count.client);
        if let Some((_, _, other)) = answered.insert(value, (count.called_ns, returned_ns, count.client)) {
            anyhow::bail!(
                "{value} was answered twice, to clients {other} and {}: what one of them was told was lost",
                count.client
            );
        }
    }
    // From the highest down: what is below was not asked after it was answered.
    let mut least_returned = u64::MAX;
    for (value, (called_ns, returned_ns, client)) in answered.iter().rev() {
        ensure!(
            *called_ns <= least_returned,
            "client {client} was told {value}, after more than that had been told: the counter went back"
        );
        least_returned = least_returned.min(*returned_ns);
    }
    let most = answered.last_key_value().map_or(0, |(value, _)| *value);
    ensure!(at_the_end >= most, "{most} was counted, and at the end it is {at_the_end}");
    // Below the end each number was given to somebody, and only who has no answer may have taken one that nobody knows.
    let unknown = counts.iter().filter(|count| count.returned.is_none()).count() as u64;
    let nobody = at_the_end - answered.len() as u64;
    ensure!(nobody <= unknown, "it counts {at_the_end}, of which {nobody} are nobody's, and {unknown} have no answer");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(called_ns: u64, returned_ns: u64, value: u64) -> Count {
        Count { called_ns, returned: Some((returned_ns, value)), client: 1 }
    }

    fn unknown(called_ns: u64) -> Count {
        Count { called_ns, returned: None, client: 2 }
    }

    #[test]
    fn a_counter_that_goes_on_is_fine() {
        judge(&[], 0).unwrap();
        judge(&[count(0, 5, 1), count(6, 9, 2)], 2).unwrap();
        judge(&[count(0, 9, 2), count(1, 8, 1)], 2).unwrap();
        judge(&[count(0, 5, 1), unknown(3), count(6, 9, 3)], 3).unwrap();
        judge(&[count(0, 5, 1), unknown(3), unknown(4)], 2).unwrap();
    }

    #[test]
    fn each_way_to_lose_an_answer_is_found() {
        let bad: [(&str, &[Count], u64); 6] = [
            ("twice", &[count(0, 5, 1), count(6, 9, 1)], 1),
            ("went back", &[count(0, 5, 2), count(6, 9, 1)], 2),
            ("at the end", &[count(0, 5, 1), count(6, 9, 2)], 1),
            ("nobody's", &[count(0, 5, 1), count(6, 9, 3)], 3),
            ("nobody's", &[count(0, 5, 1), unknown(2)], 3),
            ("is 0", &[count(0, 5, 0)], 1),
        ];
        for (what, counts, at_the_end) in bad {
            let found = judge(counts, at_the_end).unwrap_err().to_string();
            assert!(found.contains(what), "{found}");
        }
    }
}
