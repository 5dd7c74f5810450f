//! Target `nbd`: what a client may send, from its first byte on. Not part of the API.
//!
//! Holds: the connection ends; no request outside the export reaches the backend; whoever was let in is let out; what is
//! said back is whole messages.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::memory::Memory;
use super::{Backend, Export, Features, handshake, transmission};

/// Odd, so that ranges at its end are.
const BYTES: usize = 70_001;

/// The first byte chooses what the export offers, the rest is the client's.
pub fn run(bytes: &[u8]) {
    let Some((&choice, mut said)) = bytes.split_first() else { return };
    let bit = |number: u8| choice >> number & 1 == 0;
    let mut memory = Memory::new(BYTES);
    memory.features = Features { read_only: !bit(0), flush: bit(1), fua: bit(2), trim: bit(3), zeroes: bit(4) };
    let memory = Arc::new(memory);
    let exports = [Export { name: "disk".to_owned(), backend: Arc::clone(&memory) as Arc<dyn Backend> }];
    let mut heard = Vec::new();
    let agreed = handshake::negotiate(&mut said, &mut heard, &exports);
    assert!(heard.len() >= 18, "a server greets first");
    if let Ok(Some(agreed)) = agreed {
        assert_eq!(memory.clients.load(Ordering::SeqCst), 1);
        heard.clear();
        let requests = said.len() / 28;
        // Ends in any case: by the client's wish or with its last byte.
        let _ = transmission::serve(&mut said, &mut heard, agreed.open.backend(), agreed.structured);
        let most = requests * (super::PAYLOAD_MAX as usize + 64);
        assert!(heard.len() <= most, "more was said than was asked for");
        if memory.features.read_only {
            assert!(memory.content().iter().all(|&byte| byte == 0), "a read-only export was written");
        }
    }
    assert_eq!(memory.clients.load(Ordering::SeqCst), 0);
}
