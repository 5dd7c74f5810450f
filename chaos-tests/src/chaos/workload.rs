//! Clients in the client's namespace that read and write the guest's Redis all the time, and remember each question and answer.
//! Some only count, with hardly a pause: what they are told never comes twice, so each answer that was lost is found ([`super::counter`]).
//!
//! Promise: a question that got no answer is remembered as one whose outcome is not known. A client keeps its connection as long
//! as it can; that it broke is remembered, with the reason.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::demo::wait::now_ns;

use super::counter::Count;
use super::linear::{Action, Operation};
use super::space;
use crate::sim::rng::Rng;

/// How many clients read and write.
pub const CLIENTS: u32 = 4;
/// How many count.
const COUNTERS: u32 = 2;
/// Both.
const ALL: usize = (CLIENTS + COUNTERS) as usize;
/// How many keys a round has.
pub const KEYS: u64 = 6;
/// How long an answer may take before the connection counts as broken.
const ANSWER: Duration = Duration::from_secs(90);
/// How long a connection may take before another one is tried.
const CONNECT: Duration = Duration::from_secs(5);
/// The longest time that a client thinks.
const THINK_MICROS: u64 = 30_000;
/// The same, of one that counts.
const COUNT_MICROS: u64 = 3_000;
/// How long a client that is told to pause sleeps between looks.
const LOOK: Duration = Duration::from_millis(5);

/// What the clients share.
#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    /// The round, which is part of each key.
    round: AtomicU64,
    pause: AtomicBool,
    end: AtomicBool,
    /// Clients that have no question under way, while they are to pause.
    idle: Mutex<[bool; ALL]>,
    answered: [AtomicU64; ALL],
    history: Mutex<Vec<Operation>>,
    counts: Mutex<Vec<Count>>,
    broken: Mutex<VecDeque<Broken>>,
}

/// A connection that broke.
#[derive(Debug, Clone)]
pub struct Broken {
    /// When.
    pub at_ns: u64,
    /// Whose, and why.
    pub why: String,
}

/// The clients. Dropping them ends them.
#[derive(Debug)]
pub struct Workload {
    shared: Arc<Shared>,
    space: String,
    threads: Vec<JoinHandle<()>>,
}

impl Workload {
    /// Starts the clients in namespace `space`; they ask the Redis at `to`.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(space: &str, to: SocketAddr, seed: u64) -> Result<Self> {
        let shared = Arc::new(Shared {
            to,
            round: AtomicU64::new(0),
            pause: AtomicBool::new(true),
            end: AtomicBool::new(false),
            idle: Mutex::new([false; ALL]),
            answered: Default::default(),
            history: Mutex::default(),
            counts: Mutex::default(),
            broken: Mutex::default(),
        });
        let mut threads = Vec::new();
        for client in 0..CLIENTS + COUNTERS {
            let shared = Arc::clone(&shared);
            let rng = Rng::new(seed ^ (u64::from(client) + 1).rotate_left(40));
            threads.push(space::spawn(space, || Ok(()), move |()| run(&shared, client, rng))?);
        }
        Ok(Self { shared, space: space.to_owned(), threads })
    }

    /// Lets the clients go, on the keys of `round`.
    pub fn go(&self, round: u64) {
        self.shared.round.store(round, Ordering::SeqCst);
        *lock(&self.shared.idle) = [false; ALL];
        self.shared.pause.store(false, Ordering::SeqCst);
    }

    /// Tells the clients to ask no more. They are idle when [`Workload::idle`] says so.
    pub fn pause(&self) {
        self.shared.pause.store(true, Ordering::SeqCst);
    }

    /// Whether no client has a question under way. They were told to pause.
    #[must_use]
    pub fn idle(&self) -> bool {
        lock(&self.shared.idle).iter().all(|&idle| idle)
    }

    /// How many answers each client has had, in all.
    #[must_use]
    pub fn answered(&self) -> [u64; ALL] {
        std::array::from_fn(|client| self.shared.answered[client].load(Ordering::SeqCst))
    }

    /// Takes what was remembered since it was last taken. The clients are idle.
    #[must_use]
    pub fn take(&self) -> (Vec<Operation>, Vec<Broken>) {
        (std::mem::take(&mut lock(&self.shared.history)), std::mem::take(&mut *lock(&self.shared.broken)).into())
    }

    /// The same of those that count.
    #[must_use]
    pub fn take_counts(&self) -> Vec<Count> {
        std::mem::take(&mut lock(&self.shared.counts))
    }

    /// How far was counted in `round`.
    ///
    /// # Errors
    /// If Redis cannot be asked.
    pub fn counted(&self, round: u64) -> Result<u64> {
        let to = self.shared.to;
        let read = move |mut connection: Connection| connection.get(&counter(round));
        let read = space::spawn(&self.space, move || Connection::open(to), read)?.join();
        read.ok().context("the reader has died")?
    }

    /// Reads every key of some rounds once, over one new connection.
    ///
    /// # Errors
    /// If Redis cannot be asked.
    pub fn read_all(&self, rounds: std::ops::RangeInclusive<u64>) -> Result<Vec<Operation>> {
        let to = self.shared.to;
        let reader = space::spawn(
            &self.space,
            move || Connection::open(to),
            move |mut connection| {
                let keys = rounds.flat_map(|round| (0..KEYS).map(move |key| round * KEYS + key));
                keys.map(|key| {
                    let called_ns = now_ns();
                    let action = Action::Read(connection.get(&name(key))?);
                    Ok(Operation { key, action, called_ns, returned_ns: Some(now_ns()), client: CLIENTS })
                })
                .collect()
            },
        );
        let read = reader?.join();
        read.ok().context("the reader has died")?
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::SeqCst);
        // Their threads end with their question, or with this process.
        self.threads.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One client, until it is told to end.
fn run(shared: &Shared, client: u32, mut rng: Rng) {
    let own = client as usize;
    let mut connection: Option<Connection> = None;
    // Every value is written once: who wrote it, and how often it had written.
    let mut value = (u64::from(client) + 1) << 40;
    while !shared.end.load(Ordering::SeqCst) {
        if shared.pause.load(Ordering::SeqCst) {
            lock(&shared.idle)[own] = true;
            std::thread::sleep(LOOK);
            continue;
        }
        if lock(&shared.idle)[own] {
            // Told to pause and to go on again before it looked.
            std::thread::sleep(LOOK);
            lock(&shared.idle)[own] = shared.pause.load(Ordering::SeqCst);
            continue;
        }
        let Some(open) = &mut connection else {
            match Connection::open(shared.to) {
                Ok(open) => connection = Some(open),
                Err(_) => std::thread::sleep(LOOK),
            }
            continue;
        };
        let round = shared.round.load(Ordering::SeqCst);
        if client >= CLIENTS {
            if let Err(error) = count(shared, open, round, client) {
                lock(&shared.broken).push_back(error);
                connection = None;
            }
            std::thread::sleep(rng.micros(0, COUNT_MICROS));
            continue;
        }
        let key = round * KEYS + rng.below(KEYS);
        let called_ns = now_ns();
        let writes = rng.chance(500);
        let answer = if writes {
            value += 1;
            open.set(&name(key), value).map(|()| value)
        } else {
            open.get(&name(key))
        };
        let returned_ns = now_ns();
        let action = |value| if writes { Action::Write(value) } else { Action::Read(value) };
        match answer {
            Ok(answer) => {
                let returned_ns = Some(returned_ns);
                lock(&shared.history).push(Operation { key, action: action(answer), called_ns, returned_ns, client });
                shared.answered[own].fetch_add(1, Ordering::SeqCst);
            }
            Err(error) => {
                let unknown = Operation { key, action: action(value), called_ns, returned_ns: None, client };
                lock(&shared.history).push(unknown);
                let why = format!("client {client}: {error:#}");
                lock(&shared.broken).push_back(Broken { at_ns: returned_ns, why });
                connection = None;
            }
        }
        std::thread::sleep(rng.micros(0, THINK_MICROS));
    }
}

/// Counts one further.
fn count(shared: &Shared, open: &mut Connection, round: u64, client: u32) -> Result<(), Broken> {
    let called_ns = now_ns();
    let answer = open.count(&counter(round));
    let at_ns = now_ns();
    let returned = answer.as_ref().ok().map(|&value| (at_ns, value));
    lock(&shared.counts).push(Count { called_ns, returned, client });
    if let Err(error) = answer {
        return Err(Broken { at_ns, why: format!("client {client}, which counts: {error:#}") });
    }
    shared.answered[client as usize].fetch_add(1, Ordering::SeqCst);
    Ok(())
}

/// What a key is called in Redis.
pub(super) fn name(key: u64) -> String {
    format!("k{key}")
}

/// What the name of everything that is counted begins with.
pub(super) const COUNTER: char = 'n';

/// What is counted in a round.
pub(super) fn counter(round: u64) -> String {
    format!("{COUNTER}{round}")
}

/// A connection to Redis: as much of its protocol as numbers under numbered keys need.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(to: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, CONNECT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.0.by_ref().take(256).read_line(&mut line).context("no answer")?;
        ensure!(read > 0, "the connection was closed");
        Ok(line.trim_end().to_owned())
    }

    fn set(&mut self, key: &str, value: u64) -> Result<()> {
        self.0.get_mut().write_all(format!("SET {key} {value}\r\n").as_bytes())?;
        match self.line()?.as_str() {
            "+OK" => Ok(()),
            other => bail!("Redis answered `{other}` to SET"),
        }
    }

    /// 0 if there is nothing.
    fn get(&mut self, key: &str) -> Result<u64> {
        self.0.get_mut().write_all(format!("GET {key}\r\n").as_bytes())?;
        match self.line()?.as_str() {
            "$-1" => Ok(0),
            length if length.starts_with('$') => self.line()?.parse().context("Redis answered no number"),
            other => bail!("Redis answered `{other}` to GET"),
        }
    }

    /// Adds one; how much it is then.
    fn count(&mut self, key: &str) -> Result<u64> {
        self.0.get_mut().write_all(format!("INCR {key}\r\n").as_bytes())?;
        let line = self.line()?;
        let number = line.strip_prefix(':').and_then(|number| number.parse().ok());
        number.with_context(|| format!("Redis answered `{line}` to INCR"))
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn numbers_go_to_redis_and_come_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let exchange = [
                ("SET k5 77\r\n", "+OK\r\n"),
                ("GET k5\r\n", "$2\r\n77\r\n"),
                ("GET k6\r\n", "$-1\r\n"),
                ("INCR n7\r\n", ":3\r\n"),
                ("INCR n7\r\n", "-ERR value is not an integer or out of range\r\n"),
                ("SET k5 78\r\n", "-MISCONF no disk\r\n"),
            ];
            for (asked, answer) in exchange {
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                assert_eq!(line, asked);
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut connection = Connection::open(to).unwrap();
        connection.set(&name(5), 77).unwrap();
        assert_eq!(connection.get(&name(5)).unwrap(), 77);
        assert_eq!(connection.get(&name(6)).unwrap(), 0);
        assert_eq!(connection.count(&counter(7)).unwrap(), 3);
        assert!(connection.count(&counter(7)).is_err());
        assert!(connection.set(&name(5), 78).unwrap_err().to_string().contains("MISCONF"));
        server.join().unwrap();
        assert!(connection.get(&name(5)).is_err(), "a closed connection is no answer");
    }
}
