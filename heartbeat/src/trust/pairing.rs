//! Pairing: how two nodes come to pin each other's certificate, by a code that an operator carries.
//!
//! One side opens a [`PairWindow`] on a port of its own and shows a one-time code; the other calls
//! [`join`] with it. Over TLS 1.3 with certificates that nobody vouches for yet, both prove that they
//! know the code by an HMAC over their role, this connection's TLS exporter and both certificates. A man
//! in the middle sits on two connections with two exporters, so he can forward neither proof.
//!
//! Promises: the window ends after a success, at its time, or after its last attempt; a wrong code pins
//! nothing on either side; the window's owner has pinned the other side before it answers.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bincode::{Decode, Encode};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, VarInt};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::CertificateDer;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio::time::error::Elapsed;

use crate::quic::{
    EndpointOptions, MessageError, Profile, SERVER_NAME, Unpinned, certificate_of, client_config, close, open_socket,
    provider, read_message, server_config, transport, write_message,
};
use crate::trust::identity::{Identity, node_of};
use crate::trust::peers::{MAX_ADDRESSES, Peer, Peers, PeersError, Role};

/// The application protocol of pairing alone.
pub const PAIR_ALPN: &[u8] = b"understudy-pair/1";

/// Bytes of a code: 80 bits.
const CODE_BYTES: usize = 10;
/// Digits of a code as shown.
const CODE_DIGITS: usize = 16;
/// Digits of one group as shown.
const CODE_GROUP: usize = 4;
/// Base 32 without the digits that look alike (Crockford's).
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Bytes taken from the TLS exporter.
const EXPORTED: usize = 32;
/// Bytes of a proof.
const PROOF: usize = 32;
/// Largest pairing message.
const MESSAGE_LIMIT: usize = 4096;
/// Attempts that may be under way at once.
const MAX_AT_ONCE: usize = 4;
/// How long one attempt may take.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(5);

const EXPORTER_LABEL: &[u8] = b"EXPORTER-understudy-pair/1";
const JOINER: &[u8] = b"understudy pairing, joining side";
const OWNER: &[u8] = b"understudy pairing, window side";

/// A one-time code of 80 bits. Shown as `XXXX-XXXX-XXXX-XXXX`; read in any case and grouping.
#[derive(Clone, PartialEq, Eq)]
pub struct PairCode([u8; CODE_BYTES]);

impl PairCode {
    fn random() -> Self {
        let mut code = [0; CODE_BYTES];
        SystemRandom::new().fill(&mut code).expect("the system gives random numbers");
        Self(code)
    }
}

impl fmt::Debug for PairCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairCode(..)")
    }
}

impl fmt::Display for PairCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bits = [0; 16];
        bits[16 - CODE_BYTES..].copy_from_slice(&self.0);
        let number = u128::from_be_bytes(bits);
        for digit in 0..CODE_DIGITS {
            if digit > 0 && digit % CODE_GROUP == 0 {
                f.write_str("-")?;
            }
            let value = usize::try_from((number >> (5 * (CODE_DIGITS - 1 - digit))) & 31).expect("five bits");
            write!(f, "{}", char::from(DIGITS[value]))?;
        }
        Ok(())
    }
}

/// Why a text is no code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a pairing code is 16 letters and digits in groups of four, as the other side shows it")]
pub struct ParseCodeError;

impl FromStr for PairCode {
    type Err = ParseCodeError;

    fn from_str(text: &str) -> Result<Self, ParseCodeError> {
        let mut number = 0_u128;
        let mut digits = 0;
        for c in text.chars().filter(|c| !c.is_whitespace() && *c != '-') {
            let c = match c.to_ascii_uppercase() {
                'O' => '0',
                'I' | 'L' => '1',
                c => c,
            };
            let value = DIGITS.iter().position(|digit| char::from(*digit) == c);
            let value = u8::try_from(value.ok_or(ParseCodeError)?).expect("below 32");
            digits += 1;
            if digits > CODE_DIGITS {
                return Err(ParseCodeError);
            }
            number = number << 5 | u128::from(value);
        }
        if digits != CODE_DIGITS {
            return Err(ParseCodeError);
        }
        let mut code = [0; CODE_BYTES];
        code.copy_from_slice(&number.to_be_bytes()[16 - CODE_BYTES..]);
        Ok(Self(code))
    }
}

/// What a node tells of itself when it pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// What it is for.
    pub role: Role,
    /// Where it listens for connections. An unspecified address (`0.0.0.0`) is replaced by the one that
    /// the other side sees.
    pub addresses: Vec<SocketAddr>,
    /// Where it listens for heartbeats, one per path; the same rule.
    pub heartbeat: Vec<SocketAddr>,
}

/// The bounds of a window.
#[derive(Debug, Clone, Copy)]
pub struct WindowLimits {
    /// How long it stays open.
    pub open_for: Duration,
    /// How many codes may be tried.
    pub attempts: u32,
}

impl Default for WindowLimits {
    fn default() -> Self {
        Self { open_for: Duration::from_secs(300), attempts: 5 }
    }
}

/// Why a pairing did not come about.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The window cannot listen, or the joining side cannot open a socket.
    #[error("cannot open a socket on {address} for pairing")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Our own certificate or key is refused by the TLS library.
    #[error("this node's certificate cannot be used")]
    Tls(#[source] rustls::Error),
    /// The window's time is over.
    #[error("nobody paired before the window closed; nothing was changed; open another one")]
    Expired,
    /// The window's attempts are used up.
    #[error(
        "the pairing window closed after {attempts} wrong codes; nothing was changed; if those were not yours, somebody is guessing"
    )]
    TooManyAttempts {
        /// How many were tried.
        attempts: u32,
    },
    /// The other side does not know our code (or we do not know its code).
    #[error("the code is wrong; nothing was changed; read it again from the other side, it allows a few attempts")]
    WrongCode,
    /// The other side has no window open, or it closed.
    #[error("{address} has no pairing window open; nothing was changed; open one there and take its new code")]
    Closed {
        /// The dialed address.
        address: SocketAddr,
        /// What happened, `None` for silence.
        #[source]
        source: Option<ConnectionError>,
    },
    /// The other side cannot pin us, for instance because of a name it has already.
    #[error("the other side refused: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// We cannot pin the other side.
    #[error("the other side cannot be stored as a peer")]
    Peer(#[from] PeersError),
    /// A node was about to be paired with itself.
    #[error("this is the same node; give the address of the other one")]
    Myself,
    /// The connection broke or the other side broke the protocol.
    #[error("the pairing was cut off; look with `status` whether the peer is listed on both sides, else pair again")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
}

#[derive(Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct WireCard {
    name: String,
    role: Role,
    addresses: Vec<String>,
    heartbeat: Vec<String>,
}

#[derive(Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Join {
    proof: [u8; PROOF],
    card: WireCard,
}

#[derive(Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Reply {
    Accepted { proof: [u8; PROOF], card: WireCard },
    WrongCode,
    Closed,
    Refused { reason: String },
}

/// An open window. Dropping it closes it.
#[derive(Debug)]
pub struct PairWindow {
    quic: quinn::Endpoint,
    code: PairCode,
    deadline: Instant,
    attempts: u32,
    site: Arc<Site>,
}

/// How one attempt ended: with the pinned peer and its connection, or not.
type Attempt = Result<(Peer, quinn::Connection), PairError>;

/// What all attempts of a window share.
#[derive(Debug)]
struct Site {
    identity: Arc<Identity>,
    peers: Arc<Peers>,
    card: Card,
    left: AtomicU32,
}

impl Drop for PairWindow {
    fn drop(&mut self) {
        self.quic.close(VarInt::from_u32(close::DONE), b"");
    }
}

impl PairWindow {
    /// Opens a window at `bind` on the current tokio runtime. The time runs from now; [`PairWindow::wait`]
    /// does the work.
    ///
    /// # Errors
    /// [`PairError::Bind`], [`PairError::Tls`].
    pub fn open(
        identity: Arc<Identity>,
        peers: Arc<Peers>,
        card: Card,
        bind: SocketAddr,
        limits: WindowLimits,
    ) -> Result<Self, PairError> {
        let verifier = Arc::new(Unpinned { provider: provider() });
        let tls = server_config(&identity, verifier, PAIR_ALPN).map_err(PairError::Tls)?;
        let server = QuicServerConfig::try_from(tls).expect("the provider has AES-128-GCM");
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport(Profile::Control, None)).migration(false);
        let options = EndpointOptions { bind, profile: Profile::Control, mtu: None };
        let quic = open_socket(&identity, options, Some(server))
            .map_err(|source| PairError::Bind { address: bind, source })?;
        let left = AtomicU32::new(limits.attempts);
        Ok(Self {
            quic,
            code: PairCode::random(),
            deadline: Instant::now() + limits.open_for,
            attempts: limits.attempts,
            site: Arc::new(Site { identity, peers, card, left }),
        })
    }

    /// The code to carry to the other side.
    #[must_use]
    pub fn code(&self) -> &PairCode {
        &self.code
    }

    /// Where the window listens.
    ///
    /// # Errors
    /// [`PairError::Bind`] when the socket is gone.
    pub fn local_addr(&self) -> Result<SocketAddr, PairError> {
        let unspecified = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);
        self.quic.local_addr().map_err(|source| PairError::Bind { address: unspecified, source })
    }

    /// Serves attempts until one succeeds, and returns the peer, which is pinned by then.
    ///
    /// # Errors
    /// [`PairError::Expired`], [`PairError::TooManyAttempts`]; nothing is pinned then.
    pub async fn wait(self) -> Result<Peer, PairError> {
        let mut running: JoinSet<Result<Attempt, Elapsed>> = JoinSet::new();
        loop {
            let spent = self.site.left.load(Ordering::SeqCst) == 0;
            if spent && running.is_empty() {
                return Err(PairError::TooManyAttempts { attempts: self.attempts });
            }
            tokio::select! {
                () = tokio::time::sleep_until(self.deadline) => return Err(PairError::Expired),
                Some(done) = running.join_next() => match done.expect("an attempt does not panic") {
                    Ok(Ok((peer, quic))) => {
                        tracing::info!(peer = %peer.name, node = %peer.node, role = %peer.role, "paired");
                        // The joining side closes once it has pinned us; if it cannot, it says so to its operator.
                        let _ = tokio::time::timeout(ATTEMPT_DEADLINE, quic.closed()).await;
                        return Ok(peer);
                    }
                    Ok(Err(error)) => tracing::warn!(%error, "a pairing attempt failed"),
                    Err(_) => tracing::warn!("a pairing attempt took too long"),
                },
                Some(incoming) = self.quic.accept(), if !spent => {
                    if running.len() >= MAX_AT_ONCE {
                        incoming.refuse();
                        continue;
                    }
                    let (site, code) = (self.site.clone(), self.code.clone());
                    running.spawn(async move {
                        tokio::time::timeout(ATTEMPT_DEADLINE, site.attempt(incoming, &code)).await
                    });
                }
            }
        }
    }
}

impl Site {
    async fn attempt(
        &self,
        incoming: quinn::Incoming,
        code: &PairCode,
    ) -> Result<(Peer, quinn::Connection), PairError> {
        let quic = incoming.await.map_err(broken)?;
        let (mut send, mut recv) = quic.accept_bi().await.map_err(broken)?;
        let join: Join = read_message(&mut recv, MESSAGE_LIMIT).await.map_err(broken)?;
        let (reply, result) = self.judge(&quic, join, code);
        write_message(&mut send, &reply).await.map_err(broken)?;
        send.finish().map_err(broken)?;
        if result.is_err() {
            // Let the reply arrive before the connection goes.
            let _ = send.stopped().await;
            quic.close(VarInt::from_u32(close::PAIRING), b"refused");
        }
        result.map(|peer| (peer, quic))
    }

    fn judge(&self, quic: &quinn::Connection, join: Join, code: &PairCode) -> (Reply, Result<Peer, PairError>) {
        // The attempt is spent before it is looked at, so that attempts at once cannot exceed the bound.
        let spend = |left: u32| left.checked_sub(1);
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).is_err() {
            return (Reply::Closed, Err(PairError::Expired));
        }
        let Some(theirs) = certificate_of(quic) else {
            return (Reply::WrongCode, Err(PairError::WrongCode));
        };
        let ours = self.identity.certificate();
        let proofs = Proofs::new(quic, code, &theirs, ours);
        if !proofs.holds(JOINER, &join.proof) {
            return (Reply::WrongCode, Err(PairError::WrongCode));
        }
        if theirs == *ours {
            let reason = PairError::Myself.to_string();
            return (Reply::Refused { reason }, Err(PairError::Myself));
        }
        let pin = peer_from(join.card, theirs, quic.remote_address().ip())
            .and_then(|peer| self.peers.add(peer.clone()).map(|()| peer));
        let peer = match pin {
            Ok(peer) => peer,
            Err(error) => {
                return (Reply::Refused { reason: error.to_string() }, Err(error.into()));
            }
        };
        // One success ends the window, also for attempts that are under way.
        self.left.store(0, Ordering::SeqCst);
        let proof = proofs.make(OWNER);
        (Reply::Accepted { proof, card: wire_card(&self.identity, &self.card) }, Ok(peer))
    }
}

/// Pairs with the node whose window listens at `address`, using the code it shows. Returns the peer,
/// pinned. Takes at most about 10 s.
///
/// # Errors
/// [`PairError`]; nothing is pinned here then.
pub async fn join(
    identity: &Identity,
    peers: &Peers,
    card: &Card,
    address: SocketAddr,
    code: &PairCode,
) -> Result<Peer, PairError> {
    let verifier = Arc::new(Unpinned { provider: provider() });
    let tls = client_config(identity, verifier, PAIR_ALPN).map_err(PairError::Tls)?;
    let config = QuicClientConfig::try_from(tls).expect("the provider has AES-128-GCM");
    let mut config = quinn::ClientConfig::new(Arc::new(config));
    config.transport_config(transport(Profile::Control, None));
    let any: IpAddr =
        if address.is_ipv4() { std::net::Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let bind = SocketAddr::new(any, 0);
    let options = EndpointOptions { bind, profile: Profile::Control, mtu: None };
    let endpoint = open_socket(identity, options, None).map_err(|source| PairError::Bind { address: bind, source })?;
    let connecting = endpoint.connect_with(config, address, SERVER_NAME).map_err(broken)?;
    let quic = match tokio::time::timeout(ATTEMPT_DEADLINE, connecting).await {
        Ok(Ok(quic)) => quic,
        Ok(Err(source)) => return Err(PairError::Closed { address, source: Some(source) }),
        Err(_) => return Err(PairError::Closed { address, source: None }),
    };
    let talk = talk(identity, peers, card, code, &quic, address);
    let result = match tokio::time::timeout(ATTEMPT_DEADLINE, talk).await {
        Ok(result) => result,
        Err(_) => Err(PairError::Closed { address, source: None }),
    };
    quic.close(VarInt::from_u32(close::DONE), b"");
    endpoint.wait_idle().await;
    result
}

async fn talk(
    identity: &Identity,
    peers: &Peers,
    card: &Card,
    code: &PairCode,
    quic: &quinn::Connection,
    address: SocketAddr,
) -> Result<Peer, PairError> {
    let cut = |error: MessageError| match quic.close_reason() {
        Some(source @ ConnectionError::ApplicationClosed(_)) => PairError::Closed { address, source: Some(source) },
        _ => broken(error),
    };
    let theirs = certificate_of(quic).ok_or(PairError::WrongCode)?;
    if theirs == *identity.certificate() {
        return Err(PairError::Myself);
    }
    let proofs = Proofs::new(quic, code, identity.certificate(), &theirs);
    let (mut send, mut recv) = quic.open_bi().await.map_err(broken)?;
    let join = Join { proof: proofs.make(JOINER), card: wire_card(identity, card) };
    write_message(&mut send, &join).await.map_err(cut)?;
    match read_message::<Reply>(&mut recv, MESSAGE_LIMIT).await.map_err(cut)? {
        Reply::Accepted { proof, card } => {
            if !proofs.holds(OWNER, &proof) {
                return Err(PairError::WrongCode);
            }
            let peer = peer_from(card, theirs, address.ip())?;
            peers.add(peer.clone())?;
            Ok(peer)
        }
        Reply::WrongCode => Err(PairError::WrongCode),
        Reply::Closed => Err(PairError::Closed { address, source: None }),
        Reply::Refused { reason } => {
            let reason = reason.chars().filter(|c| !c.is_control()).take(200).collect();
            Err(PairError::Refused { reason })
        }
    }
}

/// The proofs of one connection: HMAC-SHA256, keyed by the code.
struct Proofs {
    key: hmac::Key,
    bound_to: Vec<u8>,
}

impl Proofs {
    fn new(quic: &quinn::Connection, code: &PairCode, joiner: &CertificateDer<'_>, owner: &CertificateDer<'_>) -> Self {
        let mut bound_to = vec![0; EXPORTED];
        quic.export_keying_material(&mut bound_to, EXPORTER_LABEL, b"")
            .expect("32 bytes can be exported from a finished handshake");
        for certificate in [joiner, owner] {
            let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
            bound_to.extend_from_slice(digest.as_ref());
        }
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, &code.0), bound_to }
    }

    fn message(&self, role: &[u8]) -> Vec<u8> {
        [role, &[0], &self.bound_to].concat()
    }

    fn make(&self, role: &[u8]) -> [u8; PROOF] {
        let tag = hmac::sign(&self.key, &self.message(role));
        let mut proof = [0; PROOF];
        proof.copy_from_slice(tag.as_ref());
        proof
    }

    /// Compares in constant time.
    fn holds(&self, role: &[u8], proof: &[u8; PROOF]) -> bool {
        hmac::verify(&self.key, &self.message(role), proof).is_ok()
    }
}

fn wire_card(identity: &Identity, card: &Card) -> WireCard {
    WireCard {
        name: identity.name().to_owned(),
        role: card.role,
        addresses: card.addresses.iter().map(ToString::to_string).collect(),
        heartbeat: card.heartbeat.iter().map(ToString::to_string).collect(),
    }
}

/// The peer that `card` describes, seen from here at `seen`. The peers' store checks the rest.
fn peer_from(card: WireCard, certificate: CertificateDer<'static>, seen: IpAddr) -> Result<Peer, PeersError> {
    let resolve = |addresses: Vec<String>| {
        let mut known: Vec<SocketAddr> = Vec::new();
        for text in addresses.iter().take(MAX_ADDRESSES) {
            let mut address: SocketAddr = text
                .parse()
                .map_err(|_| PeersError::Invalid { what: format!("{text:?} is no address with a port") })?;
            if address.ip().is_unspecified() {
                address.set_ip(seen.to_canonical());
            }
            if !known.contains(&address) {
                known.push(address);
            }
        }
        Ok(known)
    };
    Ok(Peer {
        name: card.name,
        node: node_of(&certificate),
        role: card.role,
        addresses: resolve(card.addresses)?,
        heartbeat: resolve(card.heartbeat)?,
        certificate,
    })
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> PairError {
    PairError::Broken(Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_as_it_is_shown_and_forgives_look_alikes() {
        for _ in 0..64 {
            let code = PairCode::random();
            let shown = code.to_string();
            assert_eq!(shown.len(), CODE_DIGITS + 3);
            assert_eq!(shown.parse(), Ok(code.clone()));
            let typed = shown.to_lowercase().replace('-', " ").replace('1', "l").replace('0', "o");
            assert_eq!(typed.parse(), Ok(code));
        }
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for text in ["", "0000-0000-0000-000", "0000-0000-0000-00000", "0000-0000-0000-000U"] {
            assert_eq!(text.parse::<PairCode>(), Err(ParseCodeError), "{text:?}");
        }
    }

    #[test]
    fn a_code_is_not_printed_by_debug() {
        let code = PairCode::random();
        assert!(!format!("{code:?}").contains(&code.to_string()));
    }

    struct Side {
        identity: Arc<Identity>,
        peers: Arc<Peers>,
        _dir: tempfile::TempDir,
    }

    fn side(name: &str) -> Side {
        let dir = tempfile::tempdir().expect("temporary directory");
        let identity = Arc::new(Identity::start(dir.path(), Some(name)).expect("identity"));
        let peers = Arc::new(Peers::open(&dir.path().join("peers")).expect("peers"));
        Side { identity, peers, _dir: dir }
    }

    const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    /// Takes one connection as a window would, and passes its words on over a connection of its own.
    async fn man_in_the_middle(mallory: Side, endpoint: quinn::Endpoint, window: SocketAddr) {
        let victim = endpoint.accept().await.expect("a victim").await.expect("handshake");
        let (mut to_victim, mut from_victim) = victim.accept_bi().await.expect("stream");
        let join: Join = read_message(&mut from_victim, MESSAGE_LIMIT).await.expect("join");

        let verifier = Arc::new(Unpinned { provider: provider() });
        let tls = client_config(&mallory.identity, verifier, PAIR_ALPN).expect("tls");
        let config = QuicClientConfig::try_from(tls).expect("suites");
        let config = quinn::ClientConfig::new(Arc::new(config));
        let forward = endpoint.connect_with(config, window, SERVER_NAME).expect("dial");
        let forward = forward.await.expect("handshake");
        let (mut to_window, mut from_window) = forward.open_bi().await.expect("stream");
        write_message(&mut to_window, &join).await.expect("forward");
        let reply: Reply = read_message(&mut from_window, MESSAGE_LIMIT).await.expect("reply");
        assert_eq!(reply, Reply::WrongCode, "the window saw through it");
        // Even a forged acceptance, with the victim's own proof thrown back at it, must not help.
        let forged = Reply::Accepted { proof: join.proof, card: join.card };
        write_message(&mut to_victim, &forged).await.expect("forge");
        victim.closed().await;
    }

    #[tokio::test]
    async fn a_man_in_the_middle_can_forward_neither_proof() {
        let (alice, bob, mallory) = (side("alice"), side("bob"), side("mallory"));
        let card = Card { role: Role::Agent, addresses: vec![LOOPBACK], heartbeat: Vec::new() };
        let limits = WindowLimits { attempts: 1, ..WindowLimits::default() };
        let window = PairWindow::open(alice.identity.clone(), alice.peers.clone(), card.clone(), LOOPBACK, limits)
            .expect("window");
        let code = window.code().clone();
        let at = window.local_addr().expect("bound");
        let waiting = tokio::spawn(window.wait());

        let verifier = Arc::new(Unpinned { provider: provider() });
        let tls = server_config(&mallory.identity, verifier, PAIR_ALPN).expect("tls");
        let server = QuicServerConfig::try_from(tls).expect("suites");
        let server = quinn::ServerConfig::with_crypto(Arc::new(server));
        let options = EndpointOptions { bind: LOOPBACK, profile: Profile::Control, mtu: None };
        let endpoint = open_socket(&mallory.identity, options, Some(server)).expect("socket");
        let trap = endpoint.local_addr().expect("bound");
        let attack = tokio::spawn(man_in_the_middle(mallory, endpoint, at));

        let victim = join(&bob.identity, &bob.peers, &card, trap, &code).await;
        assert!(matches!(victim, Err(PairError::WrongCode)), "{victim:?}");
        attack.await.expect("the attack ran to its end");
        let owner = waiting.await.expect("no panic");
        assert!(matches!(owner, Err(PairError::TooManyAttempts { attempts: 1 })), "{owner:?}");
        assert!(alice.peers.list().is_empty() && bob.peers.list().is_empty());
    }

    #[test]
    fn an_unspecified_address_becomes_the_one_that_is_seen() {
        let certificate = side("a").identity.certificate().clone();
        let card = |addresses: &[&str]| WireCard {
            name: "a".to_owned(),
            role: Role::Agent,
            addresses: addresses.iter().map(ToString::to_string).collect(),
            heartbeat: Vec::new(),
        };
        let seen: IpAddr = "10.0.0.7".parse().expect("address");
        let peer = peer_from(card(&["0.0.0.0:1", "10.0.0.7:1", "10.9.0.7:2"]), certificate.clone(), seen);
        let expected: Vec<SocketAddr> =
            ["10.0.0.7:1", "10.9.0.7:2"].iter().map(|text| text.parse().expect("address")).collect();
        assert_eq!(peer.expect("a good card").addresses, expected);
        assert!(matches!(peer_from(card(&["host:1"]), certificate, seen), Err(PeersError::Invalid { .. })));
    }
}
