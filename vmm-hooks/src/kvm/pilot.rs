//! What is known of the pilot from outside: its agreement with the microVM, and how to tell from its memory and its disk that they are
//! whole.
//!
//! [`check_worker`] and [`records`] read a copy, on a standby or after a failover, and say what is wrong with it.

/// The agreement itself; the same file that the pilot is built with.
#[path = "../../pilot/src/abi.rs"]
pub mod abi;

use crate::layout::PAGE_SIZE;

/// What a worker's part of memory shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Worked {
    /// The last step that is done.
    pub done: u64,
    /// How far the worker had seen the next one.
    pub seen: u64,
}

/// Checks that a worker's pages are of one moment: `page` gives any page of the copy.
///
/// # Errors
/// What is wrong, in words.
pub fn check_worker(cpu: u64, mut page: impl FnMut(u64) -> Vec<u8>) -> Result<Worked, String> {
    use abi::worker;
    let word = |bytes: &[u8], index: u64| {
        let start = usize::try_from(index * 8).expect("inside a page");
        u64::from_le_bytes(bytes[start..start + 8].try_into().expect("eight"))
    };
    let own = page(abi::WORKERS / PAGE_SIZE as u64 + cpu);
    let [first, pages, pattern, begun, done, seen] =
        [worker::FIRST, worker::PAGES, worker::PATTERN, worker::BEGUN, worker::DONE, worker::SEEN]
            .map(|index| word(&own, index));
    if pages == 0 {
        return Err(format!("worker {cpu} was never begun"));
    }
    if begun != done && begun != done + 1 {
        return Err(format!("worker {cpu} has begun step {begun} and done {done}"));
    }
    let mut last = vec![0; usize::try_from(pages).expect("fits memory")];
    for step in 1..=done {
        last[usize::try_from(abi::page_of(pattern, step, pages)).expect("fits memory")] = step;
    }
    let open = (begun > done).then(|| abi::page_of(pattern, begun, pages));
    for (number, &step) in (0..pages).zip(&last) {
        let bytes = page(first + number);
        let (head, tail) = (word(&bytes, 0), word(&bytes, PAGE_SIZE as u64 / 8 - 1));
        let seal = |step| if step == 0 { 0 } else { abi::seal_of(step) };
        let whole = head == step && tail == seal(step);
        let half = open == Some(number) && (head == begun && (tail == seal(step) || tail == seal(begun)));
        if !whole && !half {
            return Err(format!(
                "worker {cpu}: page {number} of {pages} is of step {head}, it must be of step {step} ({done} steps are done)"
            ));
        }
    }
    Ok(Worked { done, seen })
}

/// The texts of the append-only log on `disk`, in order, up to where it ends.
///
/// # Errors
/// If a record is damaged or out of its order.
pub fn records(disk: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut records = Vec::new();
    let mut rest = disk;
    while let Some((head, after)) = rest.split_at_checked(abi::RECORD_HEADER) {
        let number32 = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four"));
        let number64 = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight"));
        if head.iter().all(|&byte| byte == 0) {
            return Ok(records);
        }
        let number = records.len() as u64 + 1;
        let text = after.get(..number32(4) as usize);
        let text = text
            .filter(|text| number32(0) == abi::RECORD_MAGIC && number64(8) == number && number64(16) == abi::sum(text));
        let Some(text) = text else { return Err(format!("record {number} of the log is damaged")) };
        records.push(text.to_vec());
        rest = &after[text.len()..];
    }
    Ok(records)
}
