//! The server against raw bytes and against the clients that are in use.

mod bytes;
mod clients;

use std::io::Read;
use std::sync::Arc;

use super::memory::Memory;
use super::{Backend, Export, NbdError, handshake, transmission};

/// An export of memory.
fn export(memory: &Arc<Memory>) -> Vec<Export> {
    vec![Export { name: "disk".to_owned(), backend: Arc::clone(memory) as Arc<dyn Backend> }]
}

/// A whole connection of a client that says all this at once: what it hears after the greeting, and how it ended.
fn converse(memory: &Arc<Memory>, mut said: impl Read) -> (Vec<u8>, Result<(), NbdError>) {
    let mut heard = Vec::new();
    let ended = handshake::negotiate(&mut said, &mut heard, &export(memory)).and_then(|agreed| match agreed {
        Some(agreed) => transmission::serve(&mut said, &mut heard, agreed.open.backend(), agreed.structured),
        None => Ok(()),
    });
    assert_eq!(&heard[..18], b"NBDMAGICIHAVEOPT\0\x03");
    heard.drain(..18);
    (heard, ended)
}
