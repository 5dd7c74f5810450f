//! Virtio devices by memory-mapped registers (virtio 1.2, 4.2): the transport that all of them share.
//!
//! A device is worked on by the vCPU that notifies it, in that exit, or by the machine's network thread; always under the
//! device's lock. So a machine whose vCPUs stand and whose network thread is told to wait has no request in flight: what was not begun is
//! still in the guest's queue, which the device looks into again when the machine runs.

pub(super) mod block;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
pub(super) mod log;
pub(super) mod net;
#[cfg(test)]
mod tests;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as mmio;
use virtio_queue::{Queue, QueueT};

use super::chips::Line;
use super::ram::Memory;
use super::state::{Reader, StateError, Writer};

/// Entries of each queue.
pub(super) const QUEUE_SIZE: u16 = 256;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5253_5355;

/// What a write to a register asks of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// Nothing.
    Nothing,
    /// To look into this queue.
    Look(usize),
    /// To forget what it was doing.
    Reset,
}

/// The registers of one device.
#[derive(Debug)]
pub(super) struct Transport {
    id: u32,
    features: u64,
    config: Vec<u8>,
    pub(super) queues: Vec<Queue>,
    driver_features: u64,
    features_select: u32,
    driver_select: u32,
    queue_select: u32,
    status: u32,
    interrupt: u32,
    /// Up as long as `interrupt` is not zero; `None`: the driver polls.
    line: Option<Line>,
    up: bool,
}

/// What is there of a value, at `offset` of it.
fn part(value: &[u8], offset: usize, into: &mut [u8]) {
    into.fill(0);
    for (byte, from) in into.iter_mut().zip(value.get(offset..).unwrap_or_default()) {
        *byte = *from;
    }
}

impl Transport {
    pub(super) fn new(id: u32, features: u64, config: Vec<u8>, queues: usize) -> Self {
        let queue = || Queue::new(QUEUE_SIZE).expect("a power of two");
        Self {
            id,
            features: features | 1 << VIRTIO_F_VERSION_1,
            config,
            queues: (0..queues).map(|_| queue()).collect(),
            driver_features: 0,
            features_select: 0,
            driver_select: 0,
            queue_select: 0,
            status: 0,
            interrupt: 0,
            line: None,
            up: false,
        }
    }

    /// Joins it to an interrupt line that is down.
    pub(super) fn interrupt_by(&mut self, line: Line) {
        self.line = Some(line);
    }

    /// Sets what the driver finds as reasons of an interrupt.
    fn interrupt(&mut self, reasons: u32) {
        self.interrupt = reasons;
        let up = reasons != 0;
        if let Some(line) = self.line.as_ref().filter(|_| up != self.up) {
            line.set(up);
            self.up = up;
        }
    }

    /// Whether the driver lets the device work.
    pub(super) fn runs(&self) -> bool {
        let needs = VIRTIO_CONFIG_S_DRIVER_OK;
        self.status & (needs | VIRTIO_CONFIG_S_NEEDS_RESET) == needs
    }

    /// The driver broke the rules of a queue: the device stops until it is reset.
    pub(super) fn break_down(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!(device = self.id, %why, "the guest's driver broke a virtio queue; the device waits to be reset");
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt(self.interrupt | mmio::VIRTIO_MMIO_INT_CONFIG);
    }

    /// Buffers were used.
    pub(super) fn used(&mut self) {
        self.interrupt(self.interrupt | mmio::VIRTIO_MMIO_INT_VRING);
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// A read of `into.len()` bytes at `offset`.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        let Ok(offset) = u32::try_from(offset) else { return into.fill(0) };
        if let Some(at) = offset.checked_sub(mmio::VIRTIO_MMIO_CONFIG) {
            return part(&self.config, at as usize, into);
        }
        let value = match offset {
            mmio::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            mmio::VIRTIO_MMIO_VERSION => VERSION,
            mmio::VIRTIO_MMIO_DEVICE_ID => self.id,
            mmio::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            mmio::VIRTIO_MMIO_DEVICE_FEATURES => half(self.features, self.features_select),
            mmio::VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size().into()),
            mmio::VIRTIO_MMIO_QUEUE_READY => self.queue().is_some_and(QueueT::ready).into(),
            mmio::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt,
            mmio::VIRTIO_MMIO_STATUS => self.status,
            _ => 0,
        };
        part(&value.to_le_bytes(), 0, into);
    }

    /// A write of `bytes` at `offset`. Only registers of 32 bits are written; all else is ignored.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], memory: &Memory) -> Ask {
        let (Ok(offset), Ok(bytes)) = (u32::try_from(offset), <[u8; 4]>::try_from(bytes)) else { return Ask::Nothing };
        let value = u32::from_le_bytes(bytes);
        let negotiating = self.status & VIRTIO_CONFIG_S_DRIVER_OK == 0;
        match offset {
            mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_select = value,
            mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_select = value,
            mmio::VIRTIO_MMIO_DRIVER_FEATURES if negotiating => match self.driver_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            mmio::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            mmio::VIRTIO_MMIO_QUEUE_NOTIFY if self.runs() && (value as usize) < self.queues.len() => {
                return Ask::Look(value as usize);
            }
            mmio::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt(self.interrupt & !value),
            mmio::VIRTIO_MMIO_STATUS => return self.set_status(value),
            mmio::VIRTIO_MMIO_QUEUE_READY if negotiating => self.set_ready(value, memory),
            // Where a queue is stands once it is ready: so what was valid then still is.
            _ if negotiating && !self.queue().is_some_and(QueueT::ready) => self.set_queue(offset, value),
            _ => {}
        }
        Ask::Nothing
    }

    fn set_status(&mut self, value: u32) -> Ask {
        if value == 0 {
            self.queues.iter_mut().for_each(QueueT::reset);
            (self.driver_features, self.status) = (0, 0);
            self.interrupt(0);
            return Ask::Reset;
        }
        self.status = value | self.status & VIRTIO_CONFIG_S_NEEDS_RESET;
        let acceptable =
            self.driver_features & !self.features == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            self.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        Ask::Nothing
    }

    fn set_ready(&mut self, value: u32, memory: &Memory) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        queue.set_ready(value == 1);
        if value == 1 && !queue.is_valid(memory) {
            queue.set_ready(false);
        }
    }

    fn set_queue(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        match offset {
            mmio::VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            mmio::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            mmio::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            mmio::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            mmio::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            mmio::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// Writes the registers.
    pub(super) fn save(&self, into: &mut Writer<'_>) {
        let words = [self.features_select, self.driver_select, self.queue_select, self.status, self.interrupt];
        words.into_iter().for_each(|word| into.u32(word));
        into.u64(self.driver_features);
        for queue in &self.queues {
            let state = queue.state();
            [state.size, state.next_avail, state.next_used, u16::from(state.ready)]
                .into_iter()
                .for_each(|value| into.u32(value.into()));
            [state.desc_table, state.avail_ring, state.used_ring].into_iter().for_each(|value| into.u64(value));
        }
    }

    /// Reads them again, into the transport of the same device of another machine with the same memory.
    pub(super) fn load(&mut self, from: &mut Reader<'_>, memory: &Memory) -> Result<(), StateError> {
        let words = [
            &mut self.features_select,
            &mut self.driver_select,
            &mut self.queue_select,
            &mut self.status,
            &mut self.interrupt,
        ];
        for word in words {
            *word = from.u32()?;
        }
        self.driver_features = from.u64()?;
        // The line of this machine is down, whatever it was on the other.
        self.interrupt(self.interrupt);
        for queue in &mut self.queues {
            let mut state = queue.state();
            let mut small = || -> Result<u16, StateError> {
                u16::try_from(from.u32()?).map_err(|_| StateError::Invalid { what: "a virtio queue" })
            };
            (state.size, state.next_avail, state.next_used) = (small()?, small()?, small()?);
            state.ready = match small()? {
                0 => false,
                1 => true,
                _ => return Err(StateError::Invalid { what: "a virtio queue" }),
            };
            (state.desc_table, state.avail_ring, state.used_ring) = (from.u64()?, from.u64()?, from.u64()?);
            *queue = Queue::try_from(state).map_err(|_| StateError::Invalid { what: "a virtio queue" })?;
            if state.ready && !queue.is_valid(memory) {
                return Err(StateError::Invalid { what: "a virtio queue" });
            }
        }
        Ok(())
    }
}

fn half(value: u64, select: u32) -> u32 {
    let low = value & 0xffff_ffff;
    let high = value >> 32;
    u32::try_from(match select {
        0 => low,
        1 => high,
        _ => 0,
    })
    .expect("32 bits")
}
