//! The backend of one mirrored disk's export: everything goes to the log, nothing can be read.
//!
//! One client in its life: a connection that was lost and made anew could hide lost writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::log::WriteLog;
use crate::disk::{DiskChange, DiskWrite};
use crate::nbd::{Backend, BackendError, Features};

/// One disk.
#[derive(Debug)]
pub(super) struct LogExport {
    disk: u32,
    bytes: u64,
    log: Arc<WriteLog>,
    opened: AtomicBool,
    closed: AtomicBool,
}

impl LogExport {
    pub(super) fn new(disk: u32, bytes: u64, log: Arc<WriteLog>) -> Self {
        Self { disk, bytes, log, opened: AtomicBool::new(false), closed: AtomicBool::new(false) }
    }

    /// Whether its one client is in.
    pub(super) fn connected(&self) -> bool {
        self.opened.load(Ordering::SeqCst) && !self.closed.load(Ordering::SeqCst)
    }

    fn append(&self, offset: u64, change: DiskChange) {
        self.log.append(DiskWrite { disk: self.disk, offset, change });
    }
}

impl Backend for LogExport {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is in the log is as safe as it gets before the standby has it, so there is nothing to flush.
    fn features(&self) -> Features {
        Features { flush: false, fua: false, ..Features::default() }
    }

    fn opened(&self) -> Result<(), BackendError> {
        if self.opened.swap(true, Ordering::SeqCst) { Err(BackendError::Invalid) } else { Ok(()) }
    }

    fn closed(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    fn read(&self, _offset: u64, _into: &mut [u8]) -> Result<(), BackendError> {
        Err(BackendError::Io)
    }

    fn write(&self, offset: u64, data: Vec<u8>, _durable: bool) -> Result<(), BackendError> {
        self.append(offset, DiskChange::Data(data));
        Ok(())
    }

    fn zero(&self, offset: u64, bytes: u64, _hole: bool, _durable: bool) -> Result<(), BackendError> {
        self.append(offset, DiskChange::Zero(bytes));
        Ok(())
    }

    fn trim(&self, offset: u64, bytes: u64, _durable: bool) -> Result<(), BackendError> {
        self.append(offset, DiskChange::Zero(bytes));
        Ok(())
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }
}
