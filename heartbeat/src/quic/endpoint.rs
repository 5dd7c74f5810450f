//! Endpoints and connections: dialing a pinned peer, accepting one, and agreeing on purpose and version.
//!
//! Promises: a [`Connection`] that comes out of [`Endpoint::connect`] or [`Endpoint::accept`] is mutually
//! authenticated against the pinned certificates and has finished its hello. One slow or hostile
//! dialer cannot hold up another.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use heartbeat_core::ids::{Incarnation, NodeId};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ConnectionError, ConnectionId, ConnectionIdGenerator, EndpointConfig, RecvStream, SendStream, TokioRuntime,
    TransportConfig, VarInt,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::CertificateDer;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::hello::{HELLO_LIMIT, Hello, Purpose, VERSIONS, Welcome, newest_common};
use super::profile::{MAX_UDP_PAYLOAD, Profile, transport};
use super::tls::{PinnedClients, PinnedServer, client_config, provider, server_config};
use super::{ALPN, MessageError, SERVER_NAME, close, read_message, socket, write_message};
use crate::trust::{Identity, Peer, Peers};

/// Handshakes that may be under way at once; one more is refused.
const MAX_HANDSHAKES: usize = 32;
/// Accepted connections that may wait for [`Endpoint::accept`].
const MAX_ACCEPTED: usize = 16;
/// How long a handshake and its hello may take.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(3);
/// How long one address of a peer may be silent before the next one is dialed, too.
const NEXT_ADDRESS: Duration = Duration::from_millis(300);
/// Length of our connection ids, in bytes.
const CID_LENGTH: usize = 8;

/// How an endpoint is opened.
#[derive(Debug, Clone, Copy)]
pub struct EndpointOptions {
    /// Where to listen and send from; port 0 takes a free one.
    pub bind: SocketAddr,
    /// What it is tuned for.
    pub profile: Profile,
    /// The path's UDP payload in bytes if known for sure: [`super::mtu_towards`]. A value that the path
    /// does not carry makes connections fail. Without it QUIC discovers up to what Ethernet carries.
    pub mtu: Option<u16>,
}

/// Why a connection could not be had.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The socket cannot be opened.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// Our own certificate or key is refused by the TLS library.
    #[error("this node's certificate cannot be used")]
    Tls(#[source] rustls::Error),
    /// No such peer is pinned.
    #[error("node {0} is not paired with this one; pair with it first")]
    UnknownPeer(NodeId),
    /// The peer has no address that this endpoint can dial.
    #[error("no address of {name} can be dialed from here")]
    NoAddress {
        /// The peer's name.
        name: String,
    },
    /// One of the two does not accept the other's certificate.
    #[error("{name} at {address} and this node are not paired any more; remove the peer on both and pair again")]
    NotPaired {
        /// The peer's name.
        name: String,
        /// The dialed address.
        address: SocketAddr,
        /// The alert.
        source: ConnectionError,
    },
    /// The peer does not answer, or the connection broke before the hello was done.
    #[error("cannot reach {name} at {address}")]
    Unreachable {
        /// The peer's name.
        name: String,
        /// The dialed address.
        address: SocketAddr,
        /// What happened, `None` for silence.
        #[source]
        source: Option<ConnectionError>,
    },
    /// The two speak no common wire version.
    #[error("{name} speaks no wire version of {VERSIONS:?}; update the older of the two")]
    Version {
        /// The peer's name.
        name: String,
    },
    /// The peer broke the protocol in its hello.
    #[error("{name} broke the protocol")]
    Protocol {
        /// The peer's name.
        name: String,
        /// How.
        source: MessageError,
    },
    /// The endpoint is closed.
    #[error("this node's endpoint is closed")]
    Closed,
}

/// A connection with a pinned peer, hello done.
#[derive(Debug)]
pub struct Connection {
    /// The other end, as pinned when the connection was made.
    pub peer: Peer,
    /// What it is for.
    pub purpose: Purpose,
    /// The agreed wire version.
    pub version: u16,
    /// The incarnation that the other end says it is in.
    pub incarnation: Incarnation,
    /// The first bidirectional stream, after the hello: our direction.
    pub send: SendStream,
    /// The same stream: the peer's direction.
    pub recv: RecvStream,
    /// For more streams, datagrams, statistics and closing.
    pub quic: quinn::Connection,
}

impl Connection {
    /// Closes it with one of the codes of [`super::close`].
    pub fn close(&self, code: u32, reason: &str) {
        self.quic.close(VarInt::from_u32(code), reason.as_bytes());
    }
}

/// One UDP socket that dials and accepts. Closed when dropped.
#[derive(Debug)]
pub struct Endpoint {
    quic: quinn::Endpoint,
    peers: Arc<Peers>,
    dialer: Dialer,
    accepted: Mutex<mpsc::Receiver<Connection>>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.quic.close(VarInt::from_u32(close::DONE), b"");
    }
}

impl Endpoint {
    /// Opens an endpoint on the current tokio runtime, which must live as long as it.
    ///
    /// # Errors
    /// [`QuicError::Bind`], [`QuicError::Tls`].
    pub fn open(identity: Arc<Identity>, peers: Arc<Peers>, options: EndpointOptions) -> Result<Self, QuicError> {
        let transport = transport(options.profile, options.mtu);
        let verifier = PinnedClients { peers: peers.clone(), provider: provider() };
        let tls = server_config(&identity, Arc::new(verifier), ALPN).map_err(QuicError::Tls)?;
        let server = QuicServerConfig::try_from(tls).expect("the provider has AES-128-GCM");
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport.clone()).migration(false);
        let quic = open_socket(&identity, options, Some(server))
            .map_err(|source| QuicError::Bind { address: options.bind, source })?;
        let (sender, receiver) = mpsc::channel(MAX_ACCEPTED);
        tokio::spawn(accept_all(quic.clone(), identity.clone(), peers.clone(), sender));
        let dialer = Dialer { quic: quic.clone(), identity, transport };
        Ok(Self { quic, peers, dialer, accepted: Mutex::new(receiver) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// [`QuicError::Closed`].
    pub fn local_addr(&self) -> Result<SocketAddr, QuicError> {
        self.quic.local_addr().map_err(|_| QuicError::Closed)
    }

    /// Dials the peer at its addresses, best first. The next one is dialed, too, when one has failed or not answered for 300 ms;
    /// the first that answers counts. Takes at most 3 s after the last dial began.
    ///
    /// # Errors
    /// The [`QuicError`] of the dial that failed last.
    pub async fn connect(&self, node: NodeId, purpose: Purpose) -> Result<Connection, QuicError> {
        let peer = self.peers.by_node(node).ok_or(QuicError::UnknownPeer(node))?;
        let mut last = QuicError::NoAddress { name: peer.name.clone() };
        let mut addresses = peer.addresses.clone().into_iter();
        let mut dials = JoinSet::new();
        loop {
            let next = addresses.next();
            if let Some(address) = next {
                let (dialer, peer) = (self.dialer.clone(), peer.clone());
                dials.spawn(async move { dialer.connect_to(&peer, address, purpose).await });
            } else if dials.is_empty() {
                return Err(last);
            }
            tokio::select! {
                Some(dialed) = dials.join_next() => match dialed.expect("a dial does not panic") {
                    Ok(connection) => return Ok(connection),
                    Err(error) => last = error,
                },
                () = tokio::time::sleep(NEXT_ADDRESS), if addresses.len() > 0 => {}
            }
        }
    }

    /// Dials `peer` at this one address. Takes at most 3 s.
    ///
    /// # Errors
    /// [`QuicError`].
    pub async fn connect_to(
        &self,
        peer: &Peer,
        address: SocketAddr,
        purpose: Purpose,
    ) -> Result<Connection, QuicError> {
        self.dialer.connect_to(peer, address, purpose).await
    }

    /// The next connection of a peer; `None` when the endpoint is closed. Cancel-safe.
    pub async fn accept(&self) -> Option<Connection> {
        self.accepted.lock().await.recv().await
    }

    /// Closes the endpoint and all its connections.
    pub fn close(&self, code: u32, reason: &str) {
        self.quic.close(VarInt::from_u32(code), reason.as_bytes());
    }

    /// Waits until the closing of all connections was told to the peers.
    pub async fn wait_idle(&self) {
        self.quic.wait_idle().await;
    }
}

/// What dials: as the endpoint's own socket, also when several addresses are dialed at once.
#[derive(Debug, Clone)]
struct Dialer {
    quic: quinn::Endpoint,
    identity: Arc<Identity>,
    transport: Arc<TransportConfig>,
}

impl Dialer {
    /// See [`Endpoint::connect_to`].
    async fn connect_to(&self, peer: &Peer, address: SocketAddr, purpose: Purpose) -> Result<Connection, QuicError> {
        let verifier = PinnedServer { certificate: peer.certificate.clone(), provider: provider() };
        let tls = client_config(&self.identity, Arc::new(verifier), ALPN).map_err(QuicError::Tls)?;
        let config = QuicClientConfig::try_from(tls).expect("the provider has AES-128-GCM");
        let mut config = quinn::ClientConfig::new(Arc::new(config));
        config.transport_config(self.transport.clone());
        let connecting = self.quic.connect_with(config, address, SERVER_NAME).map_err(|error| {
            if error == quinn::ConnectError::EndpointStopping {
                QuicError::Closed
            } else {
                QuicError::NoAddress { name: peer.name.clone() }
            }
        })?;
        let greet = async {
            let quic = connecting.await.map_err(|source| lost(peer, address, source))?;
            greet_as_dialer(&self.identity, peer, address, quic, purpose).await
        };
        let silent = QuicError::Unreachable { name: peer.name.clone(), address, source: None };
        tokio::time::timeout(HANDSHAKE_DEADLINE, greet).await.unwrap_or(Err(silent))
    }
}

/// Opens the socket and the endpoint on it.
///
/// The stateless reset key is derived from the node's key and the address: a restarted node answers packets
/// of its former life with a reset, so that a peer learns at once and not after the idle timeout. It
/// differs by address, else one endpoint could be made to utter a reset for another's connection.
pub(crate) fn open_socket(
    identity: &Identity,
    options: EndpointOptions,
    server: Option<quinn::ServerConfig>,
) -> io::Result<quinn::Endpoint> {
    let socket = socket::bind(options.bind, options.profile, options.mtu)?;
    let seed = identity.derive(&format!("stateless reset of {}", socket.local_addr()?));
    let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &seed);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(|| Box::new(RandomIds(SystemRandom::new())));
    config.max_udp_payload_size(MAX_UDP_PAYLOAD).expect("at least 1200");
    quinn::Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
}

/// Random connection ids. Unlike quinn's own they are not bound to one life of the process, so that packets
/// for a former life are answered with a reset.
struct RandomIds(SystemRandom);

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; CID_LENGTH];
        self.0.fill(&mut bytes).expect("the system gives random numbers");
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CID_LENGTH
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

async fn greet_as_dialer(
    identity: &Identity,
    peer: &Peer,
    address: SocketAddr,
    quic: quinn::Connection,
    purpose: Purpose,
) -> Result<Connection, QuicError> {
    let failed = |source: MessageError| match (quic.close_reason(), source) {
        (Some(reason), _) => lost(peer, address, reason),
        (None, source) => {
            quic.close(VarInt::from_u32(close::PROTOCOL), b"no hello");
            QuicError::Protocol { name: peer.name.clone(), source }
        }
    };
    let (mut send, mut recv) = quic.open_bi().await.map_err(|source| lost(peer, address, source))?;
    let hello = Hello::new(purpose, identity.incarnation());
    write_message(&mut send, &hello).await.map_err(failed)?;
    let welcome: Welcome = read_message(&mut recv, HELLO_LIMIT).await.map_err(failed)?;
    if !VERSIONS.contains(&welcome.version) {
        quic.close(VarInt::from_u32(close::VERSION), b"no common version");
        return Err(QuicError::Version { name: peer.name.clone() });
    }
    Ok(Connection {
        peer: peer.clone(),
        purpose,
        version: welcome.version,
        incarnation: Incarnation(welcome.incarnation),
        send,
        recv,
        quic,
    })
}

/// TLS alerts by which one side refuses the other's certificate: bad, unsupported, revoked, expired, unknown,
/// unknown authority, access denied, required. They travel as transport errors from 0x100.
const CERTIFICATE_ALERTS: [u64; 8] = [0x12a, 0x12b, 0x12c, 0x12d, 0x12e, 0x130, 0x131, 0x174];

/// What a broken connection means.
fn lost(peer: &Peer, address: SocketAddr, source: ConnectionError) -> QuicError {
    let name = peer.name.clone();
    let alert = |code: quinn::TransportErrorCode| CERTIFICATE_ALERTS.contains(&u64::from(code));
    let not_paired = match &source {
        ConnectionError::TransportError(error) => alert(error.code),
        ConnectionError::ConnectionClosed(frame) => alert(frame.error_code),
        ConnectionError::ApplicationClosed(frame) => frame.error_code == VarInt::from_u32(close::NOT_PAIRED),
        _ => false,
    };
    let no_version = matches!(&source, ConnectionError::ApplicationClosed(frame)
        if frame.error_code == VarInt::from_u32(close::VERSION));
    if not_paired {
        QuicError::NotPaired { name, address, source }
    } else if no_version {
        QuicError::Version { name }
    } else {
        QuicError::Unreachable { name, address, source: Some(source) }
    }
}

async fn accept_all(
    quic: quinn::Endpoint,
    identity: Arc<Identity>,
    peers: Arc<Peers>,
    accepted: mpsc::Sender<Connection>,
) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = quic.accept().await {
        if handshakes.available_permits() < MAX_HANDSHAKES / 2 && incoming.may_retry() {
            // Under a flood of forged addresses only those who can hear us get a handshake.
            incoming.retry().expect("may_retry says so");
            continue;
        }
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let (identity, peers, accepted) = (identity.clone(), peers.clone(), accepted.clone());
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let greet = greet_as_acceptor(&identity, &peers, incoming);
            match tokio::time::timeout(HANDSHAKE_DEADLINE, greet).await {
                Ok(Ok(connection)) => {
                    if let Err(mpsc::error::TrySendError::Full(connection)) = accepted.try_send(connection) {
                        connection.close(close::BUSY, "too many connections wait");
                    }
                }
                Ok(Err(error)) => tracing::debug!(%from, %error, "a connection was refused"),
                Err(_) => tracing::debug!(%from, "a connection did not finish its hello in time"),
            }
            drop(permit);
        });
    }
}

/// Why a dialer was turned away; for the log alone.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the handshake failed: {0}")]
    Handshake(#[from] ConnectionError),
    #[error("the certificate is not pinned")]
    NotPinned,
    #[error("no common wire version among {0:?}")]
    Version(Vec<u16>),
    #[error("the hello broke the protocol: {0}")]
    Message(#[from] MessageError),
}

async fn greet_as_acceptor(
    identity: &Identity,
    peers: &Peers,
    incoming: quinn::Incoming,
) -> Result<Connection, Refused> {
    let quic = incoming.await?;
    let Some(peer) = peer_of(&quic, peers) else {
        quic.close(VarInt::from_u32(close::NOT_PAIRED), b"not paired");
        return Err(Refused::NotPinned);
    };
    let (mut send, mut recv) = quic.accept_bi().await?;
    let hello: Hello = match read_message(&mut recv, HELLO_LIMIT).await {
        Ok(hello) => hello,
        Err(error) => {
            quic.close(VarInt::from_u32(close::PROTOCOL), b"no hello");
            return Err(error.into());
        }
    };
    let Some(version) = newest_common(VERSIONS, &hello.versions) else {
        quic.close(VarInt::from_u32(close::VERSION), b"no common version");
        return Err(Refused::Version(hello.versions));
    };
    let welcome = Welcome { version, incarnation: identity.incarnation().0 };
    write_message(&mut send, &welcome).await?;
    let incarnation = Incarnation(hello.incarnation);
    Ok(Connection { peer, purpose: hello.purpose, version, incarnation, send, recv, quic })
}

/// The pinned peer at the other end.
fn peer_of(quic: &quinn::Connection, peers: &Peers) -> Option<Peer> {
    peers.by_certificate(&certificate_of(quic)?)
}

/// The certificate that the other end proved to own.
pub(crate) fn certificate_of(quic: &quinn::Connection) -> Option<CertificateDer<'static>> {
    let chain = quic.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().cloned()
}
