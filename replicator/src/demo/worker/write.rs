//! The client whose writes must not get lost: numbered keys, one after the other, over one connection, never another one.

use std::io::BufRead as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::resp::{Connection, Reply, request};
use super::{connect, key, say, value};
use crate::demo::wait::now_ns;

/// How long one answer may take before the connection counts as broken.
pub const ANSWER: Duration = Duration::from_secs(30);
/// Gaps between answers that are at least this long are remembered.
const GAP: Duration = Duration::from_millis(20);
/// Bound on remembered gaps: the longest are kept.
const MAX_GAPS: usize = 10_000;
/// After this many answers the writer counts as under way, and as going on.
const UNDER_WAY: u64 = 50;

/// The first answer of the writer, and the one to each line of its input, which asks whether it goes on.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Started {
    /// Acknowledged so far.
    pub acked: u64,
}

/// The last answer of the writer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Written {
    /// Acknowledged writes: the keys `0..acked`.
    pub acked: u64,
    /// Why the connection broke, if it did.
    pub broken: Option<String>,
    /// When the last answer came.
    pub last_ns: u64,
    /// Long gaps between two answers: from, to. The last may be open, ending with the writer.
    pub gaps_ns: Vec<(u64, u64)>,
}

impl Written {
    /// The longest gap that was not over at `instant_ns`, in nanoseconds; 0 if none was long enough to be remembered.
    pub fn longest_gap_after(&self, instant_ns: u64) -> u64 {
        self.gaps_ns.iter().filter(|(_, to)| *to >= instant_ns).map(|(from, to)| to - from).max().unwrap_or(0)
    }
}

/// Writes until its input is closed or the connection breaks; answers with [`Started`] once and to each line, then with
/// [`Written`].
///
/// # Errors
/// If the connection cannot be opened.
pub(super) async fn run(to: SocketAddr, tag: &str) -> Result<()> {
    let mut connection = connect(to).await?;
    let (tell, told_to_end) = oneshot::channel();
    let asked = Arc::new(AtomicU64::new(0));
    let asks = Arc::clone(&asked);
    // Ends with its input, or with the process.
    thread::spawn(move || {
        for _ in std::io::stdin().lock().lines() {
            asks.fetch_add(1, Ordering::SeqCst);
        }
        let _ = tell.send(());
    });
    let (mut answered, mut goal) = (0, Some(UNDER_WAY));
    let started = |acked| {
        if goal.is_none() && asked.load(Ordering::SeqCst) > answered {
            answered += 1;
            goal = Some(acked + UNDER_WAY);
        }
        if goal != Some(acked) {
            return Ok(());
        }
        goal = None;
        say(&Started { acked })
    };
    say(&write(&mut connection, tag, told_to_end, started).await?)
}

/// Writes until told to end or the connection breaks; tells `progress` how many writes are acknowledged after each.
async fn write(
    connection: &mut Connection,
    tag: &str,
    mut told_to_end: oneshot::Receiver<()>,
    mut progress: impl FnMut(u64) -> Result<()>,
) -> Result<Written> {
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
        progress(written.acked)?;
    }
    note_gap(&mut written, now_ns());
    Ok(written)
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
    use std::collections::HashMap;

    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::oneshot;

    use super::super::check::compare;
    use super::{Connection, Written, write};

    /// Answers SET and MGET like Redis; forgets what `forget` says; closes after `requests`.
    async fn redis(listener: TcpListener, mut requests: u32, forget: fn(&str) -> bool) {
        let mut stored: HashMap<String, String> = HashMap::new();
        loop {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            while requests > 0 {
                let Some(words) = words(&mut stream).await else {
                    break;
                };
                requests -= 1;
                let mut answer = String::new();
                if words[0] == "SET" {
                    if !forget(&words[1]) {
                        stored.insert(words[1].clone(), words[2].clone());
                    }
                    answer.push_str("+OK\r\n");
                } else {
                    answer.push_str(&format!("*{}\r\n", words.len() - 1));
                    for key in &words[1..] {
                        match stored.get(key) {
                            Some(value) => answer.push_str(&format!("${}\r\n{value}\r\n", value.len())),
                            None => answer.push_str("$-1\r\n"),
                        }
                    }
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            if requests == 0 {
                return;
            }
        }
    }

    async fn words(stream: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok().filter(|&read| read > 0)?;
        let count: usize = line.trim_end()[1..].parse().unwrap();
        let mut words = Vec::new();
        for _ in 0..count {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            let mut word = vec![0; line.trim_end()[1..].parse::<usize>().unwrap() + 2];
            stream.read_exact(&mut word).await.unwrap();
            word.truncate(word.len() - 2);
            words.push(String::from_utf8(word).unwrap());
        }
        Some(words)
    }

    /// Writes 1200 keys to such a Redis and compares.
    async fn write_and_compare(forget: fn(&str) -> bool) -> (Written, u64, Vec<u64>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(redis(listener, 10_000, forget));
        let connect = async || Connection::new(TcpStream::connect(address).await.unwrap()).unwrap();
        let (tell, told) = oneshot::channel();
        let mut tell = Some(tell);
        let progress = |acked| {
            if acked == 1_200 {
                tell.take().unwrap().send(()).unwrap();
            }
            Ok(())
        };
        let mut first = connect().await;
        let written = write(&mut first, "t", told, progress).await.unwrap();
        drop(first);
        let checked = compare(&mut connect().await, "t", written.acked).await.unwrap();
        (written, checked.lost, checked.first_lost)
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_found() {
        let (written, lost, _) = write_and_compare(|_| false).await;
        assert!(written.acked >= 1_200 && written.broken.is_none(), "{written:?}");
        assert_eq!(lost, 0);
    }

    #[tokio::test]
    async fn a_lost_write_is_counted_and_named() {
        let (_, lost, first) =
            write_and_compare(|key| key.ends_with("0000000007") || key.ends_with("0000001003")).await;
        assert_eq!((lost, first), (2, vec![7, 1_003]));
    }

    #[tokio::test]
    async fn a_closed_connection_is_a_broken_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(redis(listener, 5, |_| false));
        let mut connection = Connection::new(TcpStream::connect(address).await.unwrap()).unwrap();
        let (_tell, told) = oneshot::channel();
        let written = write(&mut connection, "t", told, |_| Ok(())).await.unwrap();
        assert_eq!(written.acked, 5);
        assert!(written.broken.is_some());
    }

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
