//! The control stream of a replication connection: peer messages in order, both ways.
//!
//! A reader and a writer task turn the stream into two queues. A broken stream or connection is told once, by
//! [`Received::Lost`], and nothing comes after it. What is sent after the loss is dropped: the peer would not act on it.

use std::time::Duration;

use heartbeat::quic::{self, MessageError, close};
use heartbeat_core::ids::{Party, VmId};
use quinn::{RecvStream, SendStream, VarInt};
use replicator_core::message::{CloseCode, MAX_MESSAGE, PeerMessage, VERSIONS, newest_common};
use tokio::sync::mpsc;

/// Messages that may wait in either direction. The protocol has a handful under way at most.
const WAITING: usize = 64;

/// How long a closing connection waits for its last messages to arrive.
const LINGER: Duration = Duration::from_secs(1);

/// What comes in.
#[derive(Debug)]
pub(super) enum Received {
    /// A message.
    Message(PeerMessage),
    /// Nothing comes any more.
    Lost {
        /// Why, in words.
        reason: String,
    },
}

/// What the writer is given.
#[derive(Debug)]
enum Outgoing {
    Message(PeerMessage),
    /// Close the connection once everything before this has arrived.
    Close(CloseCode, String),
}

/// One end of the control stream.
#[derive(Debug)]
pub(super) struct Link {
    connection: quinn::Connection,
    outgoing: mpsc::Sender<Outgoing>,
    incoming: mpsc::Receiver<Received>,
}

/// Why a link could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The stream broke.
    #[error("the replication connection broke before both sides had introduced themselves")]
    Broken(#[from] MessageError),
    /// Something else than a hello came.
    #[error("the peer did not introduce itself")]
    NoHello,
    /// No common version.
    #[error("the peer speaks replication versions {theirs:?}, this agent {VERSIONS:?}: update the older of the two")]
    Version {
        /// The peer's offer.
        theirs: Vec<u16>,
    },
    /// It is not the one that the connection was authenticated as.
    #[error("the peer says it is {said}, its certificate says {is}")]
    Party {
        /// What it said.
        said: Party,
        /// What is known.
        is: Party,
    },
}

/// Exchanges hellos on a fresh stream. Returns the VM that the other side names.
///
/// # Errors
/// [`LinkError`]; the connection is closed with a code then.
pub(super) async fn greet(
    connection: &mut quic::Connection,
    me: Party,
    vm: VmId,
    dialer: bool,
) -> Result<VmId, LinkError> {
    let result = exchange(connection, me, vm, dialer).await;
    if let Err(error) = &result {
        let code = match error {
            LinkError::Broken(_) | LinkError::NoHello => CloseCode::Malformed,
            LinkError::Version { .. } => CloseCode::Version,
            LinkError::Party { .. } => CloseCode::WrongParty,
        };
        connection.quic.close(VarInt::from_u32(code.code()), error.to_string().as_bytes());
    }
    result
}

async fn exchange(connection: &mut quic::Connection, me: Party, vm: VmId, dialer: bool) -> Result<VmId, LinkError> {
    let hello = |vm| PeerMessage::Hello { versions: VERSIONS.to_vec(), party: me, vm };
    if dialer {
        quic::write_message(&mut connection.send, &hello(vm)).await?;
    }
    let theirs: PeerMessage = quic::read_message(&mut connection.recv, MAX_MESSAGE).await?;
    let PeerMessage::Hello { versions, party, vm: named } = theirs else { return Err(LinkError::NoHello) };
    if newest_common(&VERSIONS, &versions).is_none() {
        return Err(LinkError::Version { theirs: versions });
    }
    let is = Party { node: connection.peer.node, incarnation: connection.incarnation };
    if party != is {
        return Err(LinkError::Party { said: party, is });
    }
    if !dialer {
        quic::write_message(&mut connection.send, &hello(named)).await?;
    }
    Ok(named)
}

impl Link {
    /// Starts the two tasks on the current runtime.
    pub(super) fn start(connection: quinn::Connection, send: SendStream, recv: RecvStream) -> Self {
        let (outgoing, outbox) = mpsc::channel(WAITING);
        let (inbox, incoming) = mpsc::channel(WAITING);
        tokio::spawn(write(connection.clone(), send, outbox));
        tokio::spawn(read(connection.clone(), recv, inbox));
        Self { connection, outgoing, incoming }
    }

    /// What comes next. Cancel-safe. After [`Received::Lost`] it waits for ever.
    pub(super) async fn next(&mut self) -> Received {
        match self.incoming.recv().await {
            Some(received) => received,
            None => std::future::pending().await,
        }
    }

    /// Sends a message, in order.
    pub(super) fn send(&self, message: PeerMessage) {
        self.queue(Outgoing::Message(message));
    }

    /// Closes the connection once the messages before this have arrived, or could not for [`LINGER`].
    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        self.queue(Outgoing::Close(code, reason.to_owned()));
    }

    /// A peer that takes no message any more has its connection closed, which the reader tells. A writer that has ended
    /// has closed it.
    fn queue(&self, outgoing: Outgoing) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.outgoing.try_send(outgoing) {
            let code = VarInt::from_u32(CloseCode::Internal.code());
            self.connection.close(code, b"the peer does not read its control messages");
        }
    }

    /// The path's round trip.
    pub(super) fn rtt(&self) -> Duration {
        self.connection.rtt()
    }
}

async fn write(connection: quinn::Connection, mut send: SendStream, mut outbox: mpsc::Receiver<Outgoing>) {
    let (code, reason) = loop {
        match outbox.recv().await {
            Some(Outgoing::Message(message)) => {
                // The reader learns of a broken connection too, and tells.
                if quic::write_message(&mut send, &message).await.is_err() {
                    return;
                }
            }
            Some(Outgoing::Close(code, reason)) => break (code, reason),
            None => break (CloseCode::Done, String::new()),
        }
    };
    // Closing throws away what is on its way: first wait until the peer has everything.
    if send.finish().is_ok() {
        let _ = tokio::time::timeout(LINGER, send.stopped()).await;
    }
    connection.close(VarInt::from_u32(code.code()), reason.as_bytes());
}

async fn read(connection: quinn::Connection, mut recv: RecvStream, inbox: mpsc::Sender<Received>) {
    loop {
        match quic::read_message(&mut recv, MAX_MESSAGE).await {
            Ok(message) => {
                if inbox.send(Received::Message(message)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                if error.is_peers_fault() {
                    connection.close(VarInt::from_u32(close::PROTOCOL), error.to_string().as_bytes());
                }
                let reason = match connection.close_reason() {
                    Some(why) => why.to_string(),
                    None => error.to_string(),
                };
                // Nobody waits for it if the protection has ended.
                let _ = inbox.send(Received::Lost { reason }).await;
                return;
            }
        }
    }
}
