//! A backend in memory, for tests and the fuzzer: fails on demand, and asserts what the server promises a backend.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Backend, BackendError, Features};

/// Bytes that can be read and written.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) bytes: Mutex<Vec<u8>>,
    /// What is offered.
    pub(super) features: Features,
    /// What every request fails with.
    pub(super) fails: Option<BackendError>,
    /// How many clients are in.
    pub(super) clients: AtomicUsize,
    /// How many may be.
    pub(super) clients_max: usize,
}

impl Memory {
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            bytes: Mutex::new(vec![0; bytes]),
            features: Features::default(),
            fails: None,
            clients: AtomicUsize::new(0),
            clients_max: usize::MAX,
        }
    }

    pub(super) fn content(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, offset: u64, length: usize, apply: impl FnOnce(&mut [u8])) -> Result<(), BackendError> {
        assert!(length > 0, "an empty range reached the backend");
        let start = usize::try_from(offset).expect("a range outside the export reached the backend");
        apply(self.content().get_mut(start..start + length).expect("a range outside the export reached the backend"));
        self.fails.map_or(Ok(()), Err)
    }

    fn clear(&self, offset: u64, bytes: u64) -> Result<(), BackendError> {
        assert!(!self.features.read_only);
        self.range(offset, usize::try_from(bytes).expect("small"), |range| range.fill(0))
    }
}

impl Backend for Memory {
    fn bytes(&self) -> u64 {
        self.content().len() as u64
    }

    fn features(&self) -> Features {
        self.features
    }

    fn opened(&self) -> Result<(), BackendError> {
        if self.clients.load(Ordering::SeqCst) >= self.clients_max {
            return Err(BackendError::Invalid);
        }
        self.clients.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn closed(&self) {
        self.clients.fetch_sub(1, Ordering::SeqCst);
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), BackendError> {
        self.range(offset, into.len(), |range| into.copy_from_slice(range))
    }

    fn write(&self, offset: u64, data: Vec<u8>, durable: bool) -> Result<(), BackendError> {
        assert!(!self.features.read_only && (self.features.fua || !durable));
        self.range(offset, data.len(), |range| range.copy_from_slice(&data))
    }

    fn zero(&self, offset: u64, bytes: u64, _hole: bool, _durable: bool) -> Result<(), BackendError> {
        assert!(self.features.zeroes);
        self.clear(offset, bytes)
    }

    fn trim(&self, offset: u64, bytes: u64, _durable: bool) -> Result<(), BackendError> {
        assert!(self.features.trim);
        self.clear(offset, bytes)
    }

    fn flush(&self) -> Result<(), BackendError> {
        assert!(self.features.flush);
        self.fails.map_or(Ok(()), Err)
    }
}
