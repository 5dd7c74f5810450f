//! The two ends of a measured path: this program, started again in a host's namespace.
//!
//! Three kinds of connection: quinn as it comes, tuned for bulk by the same windows and no more; ours, with its mutual TLS
//! and its pinned peers; and TCP. On each the asker sends so many bytes and waits for one byte, which the answerer sends when
//! it has read them all.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::ValueEnum;
use heartbeat::quic::{self, EndpointOptions, Profile, Purpose};
use heartbeat::trust::{Identity, Peer, Peers, Role};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, TransportConfig, VarInt};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

/// Bytes given to a stream at once.
const CHUNK: usize = 64 << 10;
/// Flow control of quinn as it comes: what our bulk profile has.
const WINDOW: u32 = 16 << 20;
const IDLE: Duration = Duration::from_secs(10);
/// Bound on reaching the other end, which may be starting.
const CONNECT: Duration = Duration::from_secs(10);
/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(30);
const NAME: &str = "bench.internal";

/// What is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// quinn as it comes.
    Quinn,
    /// What the agents use.
    Ours,
    /// TCP.
    Tcp,
}

/// What the asker does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Questions {
    pub(crate) bytes: usize,
    pub(crate) count: u32,
    pub(crate) gap: Duration,
}

/// Makes the certificates of both ends below `dir`.
pub(crate) fn prepare(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    fs::write(dir.join("certificate"), made.cert.der())?;
    fs::write(dir.join("key"), made.signing_key.serialize_der())?;
    let ((a, peers_of_a), (b, peers_of_b)) = (node(dir, "a")?, node(dir, "b")?);
    peers_of_a.add(agent(&b))?;
    peers_of_b.add(agent(&a))?;
    Ok(())
}

fn node(dir: &Path, name: &str) -> Result<(Arc<Identity>, Arc<Peers>)> {
    let dir = dir.join(name);
    Ok((Arc::new(Identity::start(&dir, Some(name))?), Arc::new(Peers::open(&dir.join("peers"))?)))
}

fn agent(identity: &Identity) -> Peer {
    Peer {
        name: identity.name().to_owned(),
        node: identity.node(),
        role: Role::Agent,
        addresses: Vec::new(),
        heartbeat: Vec::new(),
        certificate: identity.certificate().clone(),
    }
}

/// Answers until it is killed.
pub(crate) async fn serve(kind: Kind, bind: SocketAddr, dir: &Path) -> Result<()> {
    match kind {
        Kind::Quinn => {
            let endpoint = quinn::Endpoint::server(plain_server(dir)?, bind)?;
            let incoming = endpoint.accept().await.context("a connection")?;
            answer_quic(&incoming.await?).await
        }
        Kind::Ours => {
            let (identity, peers) = node(dir, "b")?;
            let endpoint = quic::Endpoint::open(identity, peers, options(bind))?;
            let connection = endpoint.accept().await.context("a connection")?;
            answer_quic(&connection.quic).await
        }
        Kind::Tcp => {
            let (mut stream, _) = TcpListener::bind(bind).await?.accept().await?;
            stream.set_nodelay(true)?;
            let mut buffer = vec![0; 256 << 10];
            while let Ok(mut left) = stream.read_u64().await {
                while left > 0 {
                    let want = usize::try_from(left)?.min(buffer.len());
                    let read = stream.read(&mut buffer[..want]).await?;
                    if read == 0 {
                        bail!("the stream ended within a question");
                    }
                    left -= u64::try_from(read)?;
                }
                stream.write_u8(1).await?;
            }
            Ok(())
        }
    }
}

async fn answer_quic(connection: &quinn::Connection) -> Result<()> {
    while let Ok((mut send, mut recv)) = connection.accept_bi().await {
        while recv.read_chunk(usize::MAX, true).await?.is_some() {}
        send.write_all(&[1]).await?;
        send.finish()?;
    }
    Ok(())
}

/// Asks, and says how many seconds each answer took.
pub(crate) async fn ask(kind: Kind, to: SocketAddr, dir: &Path, questions: Questions) -> Result<Vec<f64>> {
    let bytes = Bytes::from(vec![7_u8; questions.bytes]);
    let local = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);
    match kind {
        Kind::Quinn => {
            let mut endpoint = quinn::Endpoint::client(local)?;
            endpoint.set_default_client_config(plain_client(dir)?);
            let connection = endpoint.connect(to, NAME)?.await.context("quinn does not connect")?;
            ask_quic(&connection, &bytes, questions).await
        }
        Kind::Ours => {
            let (identity, peers) = node(dir, "a")?;
            let endpoint = quic::Endpoint::open(identity, peers.clone(), options_towards(local, to))?;
            let connection = endpoint.connect_to(&peers.by_name("b")?, to, Purpose::Replication).await?;
            ask_quic(&connection.quic, &bytes, questions).await
        }
        Kind::Tcp => {
            let mut stream = connect_tcp(to).await?;
            stream.set_nodelay(true)?;
            let mut took = Vec::new();
            for _ in 0..questions.count {
                sleep(questions.gap).await;
                let begun = Instant::now();
                stream.write_u64(u64::try_from(bytes.len())?).await?;
                for chunk in bytes.chunks(256 << 10) {
                    stream.write_all(chunk).await?;
                }
                timeout(ANSWER, stream.read_u8()).await.context("no answer in time")??;
                took.push(begun.elapsed().as_secs_f64());
            }
            Ok(took)
        }
    }
}

/// The server may not listen yet: TCP is refused then, where QUIC asks again by itself.
async fn connect_tcp(to: SocketAddr) -> Result<TcpStream> {
    let deadline = Instant::now() + CONNECT;
    loop {
        match TcpStream::connect(to).await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(error).context("TCP does not connect"),
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn ask_quic(connection: &quinn::Connection, bytes: &Bytes, questions: Questions) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    for _ in 0..questions.count {
        sleep(questions.gap).await;
        let begun = Instant::now();
        let (mut send, mut recv) = connection.open_bi().await?;
        let mut rest = bytes.clone();
        while !rest.is_empty() {
            let chunk = rest.split_to(rest.len().min(CHUNK));
            send.write_chunk(chunk).await?;
        }
        send.finish()?;
        timeout(ANSWER, recv.read_exact(&mut [0])).await.context("no answer in time")??;
        took.push(begun.elapsed().as_secs_f64());
    }
    Ok(took)
}

fn options(bind: SocketAddr) -> EndpointOptions {
    EndpointOptions { bind, profile: Profile::Bulk, mtu: quic::mtu_towards(bind) }
}

fn options_towards(bind: SocketAddr, to: SocketAddr) -> EndpointOptions {
    EndpointOptions { bind, profile: Profile::Bulk, mtu: quic::mtu_towards(to) }
}

fn crypto() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn plain_transport() -> Result<Arc<TransportConfig>> {
    let mut config = TransportConfig::default();
    config
        .send_window(u64::from(WINDOW))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(2 * WINDOW))
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE)?));
    Ok(Arc::new(config))
}

fn plain_server(dir: &Path) -> Result<quinn::ServerConfig> {
    let certificate = CertificateDer::from(fs::read(dir.join("certificate"))?);
    let key = PrivatePkcs8KeyDer::from(fs::read(dir.join("key"))?);
    let tls = rustls::ServerConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(plain_transport()?);
    Ok(config)
}

fn plain_client(dir: &Path) -> Result<quinn::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(fs::read(dir.join("certificate"))?))?;
    let tls = rustls::ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(plain_transport()?);
    Ok(config)
}
