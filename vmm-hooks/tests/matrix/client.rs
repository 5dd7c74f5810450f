//! A client of the guest's Redis that writes over one connection, and at the end looks for every write that was acknowledged.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::machine::SOON;
use crate::net::Net;

/// A client under way.
#[derive(Debug)]
pub(crate) struct Client<'scope> {
    address: SocketAddr,
    thread: ScopedJoinHandle<'scope, ()>,
}

/// What its starter and its thread tell each other.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    acknowledged: AtomicU64,
    enough: AtomicBool,
}

impl Progress {
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Lets the client stop writing.
    pub(crate) fn enough(&self) {
        self.enough.store(true, Ordering::SeqCst);
    }
}

impl<'scope> Client<'scope> {
    /// Starts one.
    pub(crate) fn start<'env>(
        scope: &'scope thread::Scope<'scope, 'env>,
        net: &'env Net,
        address: SocketAddr,
        progress: &'env Progress,
    ) -> Self {
        let thread = scope.spawn(move || {
            net.enter("c");
            write(address, progress);
        });
        Self { address, thread }
    }

    /// Panics if it has ended before its time.
    pub(crate) fn check(&self) {
        assert!(!self.thread.is_finished(), "the client of {} has ended", self.address);
    }

    /// Waits for its judgement.
    pub(crate) fn end(self) {
        assert!(self.thread.join().is_ok(), "the client of {} lost something", self.address);
    }
}

fn write(address: SocketAddr, progress: &Progress) {
    let mut connection = Connection::open(address);
    let (mut number, mut longest) = (0_u64, Duration::ZERO);
    let key = |number: u64| format!("{}-{number}", address.to_string().replace([':', '%'], "_"));
    while !progress.enough.load(Ordering::SeqCst) {
        let asked = Instant::now();
        assert_eq!(connection.ask(&format!("SET {} value{number}", key(number))), "+OK");
        longest = longest.max(asked.elapsed());
        number += 1;
        progress.acknowledged.store(number, Ordering::SeqCst);
    }
    for number in 0..number {
        assert_eq!(connection.ask(&format!("GET {}", key(number))), format!("value{number}"));
    }
    println!("{address}: {number} acknowledged writes, all there; longest wait {longest:?}");
}

struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Opens the one connection. A link-local address of the guest is not usable in its first second.
    fn open(address: SocketAddr) -> Self {
        let deadline = Instant::now() + SOON;
        let stream = loop {
            match TcpStream::connect_timeout(&address, SOON) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "cannot connect to {address}: {error}"),
            }
            thread::yield_now();
        };
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        Self { stream: BufReader::new(stream) }
    }

    fn ask(&mut self, command: &str) -> String {
        self.stream.get_mut().write_all(format!("{command}\r\n").as_bytes()).expect("connected");
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the connection lives");
        if line.starts_with('$') && line.trim() != "$-1" {
            line.clear();
            self.stream.read_line(&mut line).expect("the connection lives");
        }
        line.trim().to_owned()
    }
}
