//! One HTTP exchange with an etcd member, over TLS where it is not on this very machine.
//!
//! Each is a connection of its own: the store is asked rarely, and a member that died is found by the next one.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{EtcdConfig, EtcdConfigError, EtcdError};
use crate::quic::provider;

/// The port of etcd's clients.
const DEFAULT_PORT: u16 = 2379;
/// The longest answer that is read, in bytes: two keys of less than a kilobyte each.
const MAX_ANSWER: usize = 64 << 10;

/// Where a member is.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    host: String,
    port: u16,
    /// The name that its certificate must have; `None`: no TLS.
    tls: Option<ServerName<'static>>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

impl Endpoint {
    pub(super) fn parse(text: &str) -> Result<Self, EtcdConfigError> {
        let wrong = |why| EtcdConfigError::Endpoint { endpoint: text.to_owned(), why };
        let uri: Uri = text.parse().map_err(|_| wrong("write https://HOST:PORT"))?;
        let host = uri.host().ok_or_else(|| wrong("write https://HOST:PORT"))?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong("it has a path"));
        }
        let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = match uri.scheme_str() {
            Some("https") => Some(ServerName::try_from(bare.clone()).map_err(|_| wrong("no name of a host"))?),
            Some("http") => {
                let here = bare == "localhost" || bare.parse().is_ok_and(|address: IpAddr| address.is_loopback());
                if !here {
                    return Err(wrong("without TLS anybody on the way could grant ownership; use https"));
                }
                None
            }
            _ => return Err(wrong("write https://HOST:PORT")),
        };
        Ok(Self { host: bare, port: uri.port_u16().unwrap_or(DEFAULT_PORT), tls })
    }
}

/// Makes connections.
pub(super) struct Transport {
    tls: Option<TlsConnector>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("tls", &self.tls.is_some()).finish()
    }
}

impl Transport {
    /// Reads the certificates, if any endpoint needs them.
    pub(super) fn new(endpoints: &[Endpoint], config: &EtcdConfig) -> Result<Self, EtcdConfigError> {
        let Some(secure) = endpoints.iter().find(|endpoint| endpoint.tls.is_some()) else {
            return Ok(Self { tls: None });
        };
        let Some(ca) = &config.ca else {
            let why = "https needs the certificate authority that the members' certificates are signed by (`ca`)";
            return Err(EtcdConfigError::Endpoint { endpoint: secure.to_string(), why });
        };
        let mut roots = rustls::RootCertStore::empty();
        for certificate in certificates(ca)? {
            roots.add(certificate)?;
        }
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        let config = match &config.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let read = PrivateKeyDer::from_pem_file(key).map_err(|source| EtcdConfigError::File {
                    path: key.clone(),
                    what: "private key",
                    source,
                })?;
                builder.with_client_auth_cert(certificates(certificate)?, read)?
            }
        };
        Ok(Self { tls: Some(TlsConnector::from(Arc::new(config))) })
    }

    /// Sends `body`; returns whether the member did what it was asked, and what it answered.
    pub(super) async fn post(
        &self,
        endpoint: &Endpoint,
        path: &'static str,
        body: Vec<u8>,
        token: Option<&str>,
    ) -> Result<(bool, Vec<u8>), EtcdError> {
        let unreachable = |source| EtcdError::Unreachable { endpoint: endpoint.to_string(), source };
        let broken = |why: String| EtcdError::Broken { endpoint: endpoint.to_string(), why };
        let mut request = Request::post(path)
            .header(HOST, format!("{}:{}", endpoint.host, endpoint.port))
            .header(CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| broken(error.to_string()))?;
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        match (&endpoint.tls, &self.tls) {
            (Some(name), Some(tls)) => {
                let stream = tls.connect(name.clone(), stream).await.map_err(unreachable)?;
                exchange(stream, request).await
            }
            _ => exchange(stream, request).await,
        }
        .map_err(broken)
    }
}

fn certificates(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, EtcdConfigError> {
    let wrong = |source| EtcdConfigError::File { path: path.to_path_buf(), what: "certificate", source };
    let found: Vec<_> = CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if found.is_empty() {
        return Err(wrong(rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(found)
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Result<(bool, Vec<u8>), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // It ends with the sender.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let ok = response.status().is_success();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| error.to_string())?;
    Ok((ok, body.to_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_secure_or_on_this_machine() {
        for (text, shown) in [
            ("https://etcd-1.example:2379", "https://etcd-1.example:2379"),
            ("https://10.0.0.1", "https://10.0.0.1:2379"),
            ("http://127.0.0.1:4001/", "http://127.0.0.1:4001"),
            ("http://localhost", "http://localhost:2379"),
            ("http://[::1]:9", "http://::1:9"),
        ] {
            assert_eq!(Endpoint::parse(text).expect(text).to_string(), shown);
        }
        for text in
            ["", "etcd-1", "http://10.0.0.1:2379", "http://example", "ftp://localhost", "https://h/v3", "https://"]
        {
            assert!(Endpoint::parse(text).is_err(), "{text}");
        }
    }
}
