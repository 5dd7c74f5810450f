//! The client whose writes must not get lost: numbered keys, one after the other, over one connection, never another one.

use std::io::Read as _;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::resp::{Reply, request};
use super::{connect, key, say, value};
use crate::demo::wait::now_ns;

/// How long one answer may take before the connection counts as broken.
pub(in crate::demo) const ANSWER: Duration = Duration::from_secs(30);
/// Gaps between answers that are at least this long are remembered.
const GAP: Duration = Duration::from_millis(5);
/// Bound on remembered gaps: the longest are kept.
const MAX_GAPS: usize = 10_000;
/// After this many answers the writer counts as under way.
const UNDER_WAY: u64 = 50;

/// The first answer of the writer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(in crate::demo) struct Started {
    /// Acknowledged so far.
    pub(in crate::demo) acked: u64,
}

/// The last answer of the writer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::demo) struct Written {
    /// Acknowledged writes: the keys `0..acked`.
    pub(in crate::demo) acked: u64,
    /// Why the connection broke, if it did.
    pub(in crate::demo) broken: Option<String>,
    /// When the last answer came.
    pub(in crate::demo) last_ns: u64,
    /// Long gaps between two answers: from, to. The last may be open, ending with the writer.
    pub(in crate::demo) gaps_ns: Vec<(u64, u64)>,
}

impl Written {
    /// The longest gap that was not over at `instant_ns`, in nanoseconds; 0 if none was long enough to be remembered.
    pub(in crate::demo) fn longest_gap_after(&self, instant_ns: u64) -> u64 {
        self.gaps_ns.iter().filter(|(_, to)| *to >= instant_ns).map(|(from, to)| to - from).max().unwrap_or(0)
    }
}

/// Writes until its input is closed or the connection breaks; answers with [`Started`], then [`Written`].
///
/// # Errors
/// If the connection cannot be opened.
pub(super) async fn run(to: SocketAddr, tag: &str) -> Result<()> {
    let mut connection = connect(to).await?;
    let (tell, mut told_to_end) = oneshot::channel();
    // Ends with its input, or with the process.
    thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0; 1]);
        let _ = tell.send(());
    });
    let mut written = Written { acked: 0, broken: None, last_ns: now_ns(), gaps_ns: Vec::new() };
    let mut bytes = Vec::new();
    loop {
        let number = written.acked;
        bytes.clear();
        request(&mut bytes, &[b"SET", key(tag, number).as_bytes(), value(tag, number).as_bytes()]);
        let reply = tokio::select! {
            reply = timeout(ANSWER, connection.ask(&bytes)) => reply,
            _ = &mut told_to_end => break,
        };
        let now = now_ns();
        match reply {
            Ok(Ok(Reply::Simple(text))) if text == "OK" => {}
            Ok(Ok(other)) => written.broken = Some(format!("Redis answered {other:?}")),
            Ok(Err(error)) => written.broken = Some(format!("{error:#}")),
            Err(_) => written.broken = Some(format!("no answer within {ANSWER:?}")),
        }
        note_gap(&mut written, now);
        if written.broken.is_some() {
            break;
        }
        written.acked += 1;
        written.last_ns = now;
        if written.acked == UNDER_WAY {
            say(&Started { acked: written.acked })?;
        }
    }
    note_gap(&mut written, now_ns());
    say(&written)
}

fn note_gap(written: &mut Written, now: u64) {
    if Duration::from_nanos(now - written.last_ns) >= GAP {
        if written.gaps_ns.len() == MAX_GAPS {
            let shortest = (0..MAX_GAPS).min_by_key(|&at| written.gaps_ns[at].1 - written.gaps_ns[at].0);
            written.gaps_ns.remove(shortest.expect("there are gaps"));
        }
        written.gaps_ns.push((written.last_ns, now));
    }
}

#[cfg(test)]
mod tests {
    use super::Written;

    #[test]
    fn the_stall_is_the_longest_gap_that_reaches_past_the_kill() {
        let ms = 1_000_000;
        let gaps_ns = vec![(0, 900 * ms), (1_000 * ms, 1_400 * ms), (2_000 * ms, 2_010 * ms)];
        let written = Written { acked: 1, broken: None, last_ns: 0, gaps_ns };
        assert_eq!(written.longest_gap_after(1_100 * ms), 400 * ms);
        assert_eq!(written.longest_gap_after(1_900 * ms), 10 * ms);
        assert_eq!(written.longest_gap_after(3_000 * ms), 0);
    }
}
