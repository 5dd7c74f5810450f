//! The server: a thread that lets clients in, and one for each of them.

use std::fmt;
use std::fs;
use std::io::{BufReader, BufWriter, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::{Export, NbdError, handshake, transmission};

/// Bound on connections at a time; more are closed at once.
pub const CONNECTIONS_MAX: usize = 64;

/// How long a client may take to read a reply or, before it has chosen, to say something.
const PATIENCE: Duration = Duration::from_secs(30);

/// What one read of a socket asks for at least, so that a small write comes with its head.
const READ_SIZE: usize = 64 << 10;

/// Serves exports on a socket until it is dropped. Dropping it closes all connections and waits for their threads, which
/// a backend must let go.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    accepting: Option<Accepting>,
}

#[derive(Debug)]
struct Accepting {
    listener: Arc<UnixListener>,
    path: PathBuf,
    thread: JoinHandle<()>,
}

struct Shared {
    exports: Vec<Export>,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    open: Vec<(u64, Arc<UnixStream>)>,
    threads: Vec<JoinHandle<()>>,
    number: u64,
    /// No more are let in.
    over: bool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} exports, {} connections", self.exports.len(), self.lock().open.len())
    }
}

impl Server {
    /// Listens at `path`, which must not exist. Who connects is shown to `admit` and let in if it says so.
    ///
    /// # Errors
    /// If the socket or its thread cannot be made.
    pub fn listen(
        path: &Path,
        exports: Vec<Export>,
        admit: impl Fn(&UnixStream) -> bool + Send + 'static,
    ) -> Result<Self, NbdError> {
        let listener = Arc::new(UnixListener::bind(path)?);
        let shared = Arc::new(Shared { exports, connections: Mutex::default() });
        let thread = thread::Builder::new().name("nbd".to_owned()).spawn({
            let (shared, listener) = (Arc::clone(&shared), Arc::clone(&listener));
            move || shared.accept(&listener, admit)
        })?;
        Ok(Self { shared, accepting: Some(Accepting { listener, path: path.to_owned(), thread }) })
    }

    /// Lets nobody in any more and removes the socket; those that are in stay.
    pub fn stop_listening(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        // Ends the thread's `accept`.
        let _ = rustix::net::shutdown(accepting.listener.as_fd(), rustix::net::Shutdown::Both);
        // A panic there was reported by the panic hook.
        let _ = accepting.thread.join();
        // Somebody may have removed it before.
        let _ = fs::remove_file(&accepting.path);
    }

    /// Hangs up on everybody who is in.
    pub fn hang_up(&self) {
        for (_, stream) in &self.shared.lock().open {
            // Only fails if the other side has.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether so many are in and none of their sockets is closed at either side, at this moment.
    #[must_use]
    pub fn is_whole(&self, connections: usize) -> bool {
        let connected = self.shared.lock();
        connected.open.len() == connections && connected.open.iter().all(|(_, stream)| !hung_up(stream))
    }

    /// How many are in.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.lock().open.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.stop_listening();
        self.hang_up();
        let threads = std::mem::take(&mut self.shared.lock().threads);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener, admit: impl Fn(&UnixStream) -> bool) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    if admit(&stream) {
                        self.let_in(stream);
                    } else {
                        tracing::warn!("a stranger was turned away from the NBD socket");
                    }
                }
                // It went before it was let in, or there are too many open files for a moment.
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                // The socket was shut down: we are done.
                Err(error) if error.kind() == ErrorKind::InvalidInput => return,
                Err(error) => {
                    tracing::error!(%error, "cannot let anybody in to the NBD socket any more");
                    return;
                }
            }
        }
    }

    fn let_in(self: &Arc<Self>, stream: UnixStream) {
        let mut connections = self.lock();
        connections.threads.retain(|thread| !thread.is_finished());
        if connections.over || connections.open.len() >= CONNECTIONS_MAX {
            return;
        }
        let number = connections.number;
        connections.number += 1;
        let stream = Arc::new(stream);
        let spawned = thread::Builder::new().name(format!("nbd-{number}")).spawn({
            let (shared, stream) = (Arc::clone(self), Arc::clone(&stream));
            move || {
                if let Err(error) = serve(&stream, &shared.exports) {
                    tracing::debug!(error = &error as &dyn std::error::Error, "an NBD connection ended");
                }
                // Others hold the socket, too: whoever is at its other end must see that nobody answers.
                let _ = stream.shutdown(Shutdown::Both);
                shared.lock().open.retain(|(other, _)| *other != number);
            }
        });
        match spawned {
            Ok(thread) => {
                connections.threads.push(thread);
                connections.open.push((number, stream));
            }
            Err(error) => tracing::error!(%error, "cannot start a thread for an NBD connection"),
        }
    }
}

/// Whether the other side has closed it, whether or not its thread has noticed.
fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let none = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        match poll(&mut fds, Some(&none)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => return false,
            Ok(_) | Err(_) => return true,
        }
    }
}

/// One connection from its beginning to its end.
fn serve(stream: &UnixStream, exports: &[Export]) -> Result<(), NbdError> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut from, mut to) = (BufReader::with_capacity(READ_SIZE, stream), BufWriter::new(stream));
    let Some(agreed) = handshake::negotiate(&mut from, &mut to, exports)? else { return Ok(()) };
    // A client that has chosen may be silent as long as it likes.
    stream.set_read_timeout(None)?;
    transmission::serve(&mut from, &mut to, agreed.open.backend(), agreed.structured)
}
