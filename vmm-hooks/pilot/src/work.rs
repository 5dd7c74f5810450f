//! Workers: write pages at a rate and in a pattern, so that a copy of memory from another moment, or with a page missing, shows.
//!
//! A step says in the worker's page that it begins, writes the first and the last word of its page, notes how far the next
//! worker is, and says that it is done. So in one moment of all memory: at most one page is half written, the one of the step
//! that has begun; every other page holds the last step that the pattern gave to it; and nobody has seen another further than it is.

use crate::abi::{WORKERS, page_of, seal_of, worker};
use crate::machine::{clock, load, store};

/// Steps between two looks at the clock or at the network.
const BATCH: u64 = 256;

/// When a worker goes on.
pub enum Next {
    /// At once.
    Now,
    /// In so many microseconds.
    In(u32),
}

fn word(cpu: u64, index: u64) -> u64 {
    WORKERS + cpu * 4096 + index * 8
}

/// Lets the worker of `cpu` begin.
pub fn begin(cpu: u64, first: u64, pages: u64, pattern: u64, rate: u64) {
    assert!(pages > 0 && first * 4096 >= crate::abi::FREE, "pages that are not free");
    store(word(cpu, worker::RUN), 0);
    for (index, value) in
        [(worker::FIRST, first), (worker::PAGES, pages), (worker::PATTERN, pattern), (worker::RATE, rate)]
    {
        store(word(cpu, index), value);
    }
    for index in [worker::BEGUN, worker::DONE, worker::SEEN] {
        store(word(cpu, index), 0);
    }
    store(word(cpu, worker::RUN), 1);
}

/// Some steps of the worker of `cpu`, if it is to work.
pub fn turn(cpu: u64, cpus: u64) -> Next {
    let get = |index| load(word(cpu, index));
    if get(worker::RUN) == 0 {
        return Next::In(u32::MAX);
    }
    let (first, pages, pattern, rate) =
        (get(worker::FIRST), get(worker::PAGES), get(worker::PATTERN), get(worker::RATE));
    let other = word((cpu + 1) % cpus, worker::DONE);
    let started = if rate == 0 { 0 } else { clock() };
    for _ in 0..if rate == 0 { BATCH } else { rate } {
        let step = get(worker::DONE) + 1;
        let page = (first + page_of(pattern, step, pages)) * 4096;
        store(word(cpu, worker::BEGUN), step);
        store(page, step);
        store(page + 4088, seal_of(step));
        store(word(cpu, worker::SEEN), load(other));
        store(word(cpu, worker::DONE), step);
    }
    if rate == 0 {
        return Next::Now;
    }
    let spent = u32::try_from((clock() - started) / 1000).unwrap_or(u32::MAX);
    if spent >= 1000 { Next::Now } else { Next::In(1000 - spent) }
}
