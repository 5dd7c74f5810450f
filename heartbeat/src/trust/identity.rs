//! A node's own certificate, key, name and incarnation, kept in its state directory.
//!
//! Promises: the key is readable by its owner alone and is made once; a state directory serves one
//! process at a time; each [`Identity::start`] has a greater incarnation than all before it, durable
//! before it is used, so that a restarted node is another asker.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use heartbeat_core::ids::{Incarnation, NodeId};
use rustix::fs::FlockOperation;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::files;

/// Longest name of a node, in bytes.
pub const MAX_NAME: usize = 64;

const NODE_FILE: &str = "node.pem";
const NAME_FILE: &str = "name";
const INCARNATION_FILE: &str = "incarnation";
const LOCK_FILE: &str = "lock";

/// Why a node's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of the state directory cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process holds the state directory.
    #[error("the state directory {path} is in use by another process; stop that one first")]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// A file is there but does not hold what it should.
    #[error("{path} is damaged ({what}); restore it from a backup, or remove it and pair this node again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The name is empty, too long or has characters that would harm a table or a file name.
    #[error("{name:?} cannot be a node's name: use 1 to {MAX_NAME} letters, digits, '.', '_' or '-'")]
    Name {
        /// The refused name.
        name: String,
    },
    /// Making the certificate failed.
    #[error("cannot make a certificate")]
    Certificate(#[source] rcgen::Error),
}

/// This node: its name, certificate, key and incarnation. Holds the state directory's lock.
pub struct Identity {
    name: String,
    node: NodeId,
    incarnation: Incarnation,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    dir: PathBuf,
    _lock: File,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name)
            .field("node", &self.node)
            .field("incarnation", &self.incarnation)
            .finish_non_exhaustive()
    }
}

/// The id of the node with this certificate: the first 16 bytes of the SHA-256 of its DER.
#[must_use]
pub fn node_of(certificate: &CertificateDer<'_>) -> NodeId {
    let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
    let mut id = [0; 16];
    id.copy_from_slice(&digest.as_ref()[..16]);
    NodeId(id)
}

impl Identity {
    /// Opens the identity in `dir`, making it at the first start, and counts one more incarnation.
    ///
    /// `name` overrides the stored name; the first start takes the host's name without it.
    ///
    /// # Errors
    /// [`IdentityError`]: nothing was changed but for files that were missing.
    pub fn start(dir: &Path, name: Option<&str>) -> Result<Self, IdentityError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| IdentityError::Io { path, source }
        };
        files::make_dir(dir).map_err(at(dir))?;
        let lock = lock(dir)?;

        let name_path = dir.join(NAME_FILE);
        let stored = read_if_there(&name_path)?;
        let name = match (name, &stored) {
            (Some(name), _) => name.to_owned(),
            (None, Some(stored)) => stored.trim().to_owned(),
            (None, None) => host_name(),
        };
        check_name(&name)?;
        if stored.as_deref().map(str::trim) != Some(name.as_str()) {
            files::replace(&name_path, format!("{name}\n").as_bytes()).map_err(at(&name_path))?;
        }

        let node_path = dir.join(NODE_FILE);
        let pem = if let Some(pem) = read_if_there(&node_path)? {
            pem
        } else {
            let pem = make_certificate(&name).map_err(IdentityError::Certificate)?;
            files::replace(&node_path, pem.as_bytes()).map_err(at(&node_path))?;
            pem
        };
        let damaged = |error: rustls_pki_types::pem::Error| IdentityError::Damaged {
            path: node_path.clone(),
            what: error.to_string(),
        };
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(damaged)?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(damaged)?;
        let incarnation = next_incarnation(&dir.join(INCARNATION_FILE))?;
        let node = node_of(&certificate);
        Ok(Self { name, node, incarnation, certificate, key, dir: dir.to_path_buf(), _lock: lock })
    }

    /// The name shown to operators.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id, derived from the certificate.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Which start of this node this is; from 1.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The self-signed certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The state directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The private key.
    pub(crate) fn key(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.key
    }

    /// 32 bytes that stay the same over restarts and that nobody without the private key knows.
    pub(crate) fn derive(&self, label: &str) -> [u8; 32] {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, self.key.secret_pkcs8_der());
        let tag = ring::hmac::sign(&key, label.as_bytes());
        let mut bytes = [0; 32];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }
}

/// Whether `name` may be a node's name.
///
/// # Errors
/// [`IdentityError::Name`].
pub fn check_name(name: &str) -> Result<(), IdentityError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(fine) {
        return Err(IdentityError::Name { name: name.to_owned() });
    }
    Ok(())
}

fn lock(dir: &Path) -> Result<File, IdentityError> {
    let path = dir.join(LOCK_FILE);
    let at = |source| IdentityError::Io { path: path.clone(), source };
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(at)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(IdentityError::InUse { path: dir.to_path_buf() }),
        Err(error) => Err(at(error.into())),
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>, IdentityError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::Io { path: path.to_path_buf(), source }),
    }
}

fn host_name() -> String {
    let uname = rustix::system::uname();
    let fine = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String = uname.nodename().to_string_lossy().chars().filter(fine).take(MAX_NAME).collect();
    if name.is_empty() { "node".to_owned() } else { name }
}

fn make_certificate(name: &str) -> Result<String, rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(vec![crate::quic::SERVER_NAME.to_owned()])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let certificate = params.self_signed(&key)?;
    Ok(certificate.pem() + &key.serialize_pem())
}

fn next_incarnation(path: &Path) -> Result<Incarnation, IdentityError> {
    let damaged = |what: &str| IdentityError::Damaged { path: path.to_path_buf(), what: what.to_owned() };
    let last = match read_if_there(path)? {
        None => 0,
        Some(text) => text.trim().parse::<u64>().map_err(|_| damaged("not a number"))?,
    };
    let next = last.checked_add(1).ok_or_else(|| damaged("the number is used up"))?;
    files::replace(path, format!("{next}\n").as_bytes())
        .map_err(|source| IdentityError::Io { path: path.to_path_buf(), source })?;
    Ok(Incarnation(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_node_keeps_its_certificate_and_counts_its_incarnation() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let first = Identity::start(dir.path(), Some("host-a")).expect("first start");
        assert_eq!(first.incarnation(), Incarnation(1));
        let (node, certificate) = (first.node(), first.certificate().clone());
        drop(first);
        let second = Identity::start(dir.path(), None).expect("second start");
        assert_eq!(second.incarnation(), Incarnation(2));
        assert_eq!(second.node(), node);
        assert_eq!(second.certificate(), &certificate);
        assert_eq!(second.name(), "host-a");
        assert_eq!(node_of(&certificate), node);
    }

    #[test]
    fn a_state_directory_serves_one_process_at_a_time() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let _held = Identity::start(dir.path(), Some("a")).expect("first");
        let again = Identity::start(dir.path(), Some("a"));
        assert!(matches!(again, Err(IdentityError::InUse { .. })), "{again:?}");
    }

    #[test]
    fn a_damaged_incarnation_is_refused_and_not_reset() {
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(Identity::start(dir.path(), Some("a")).expect("first"));
        std::fs::write(dir.path().join(INCARNATION_FILE), "many\n").expect("damage");
        let again = Identity::start(dir.path(), None);
        assert!(matches!(again, Err(IdentityError::Damaged { .. })), "{again:?}");
    }

    #[test]
    fn names_that_would_harm_a_path_or_a_table_are_refused() {
        for name in ["", "a b", "../x", "tab\t", &"x".repeat(MAX_NAME + 1)] {
            assert!(matches!(check_name(name), Err(IdentityError::Name { .. })), "{name:?}");
        }
        check_name("host-a.example_1").expect("a good name");
    }
}
