//! The network card, as smoltcp wants it.

use alloc::rc::Rc;
use core::cell::RefCell;

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::device::net::{RxBuffer, VirtIONet};
use virtio_drivers::transport::mmio::MmioTransport;

use crate::machine::{Hal, virtio};

/// Buffers in each direction.
const QUEUE: usize = 64;
/// Bytes of a buffer.
const BUFFER: usize = 2048;

type Net = Rc<RefCell<VirtIONet<Hal, MmioTransport<'static>, QUEUE>>>;

/// One card.
pub struct Card {
    net: Net,
    /// Whether a frame came since this was last asked.
    pub heard: bool,
}

impl Card {
    /// The card at `address`.
    pub fn new(address: u64) -> Self {
        let net = VirtIONet::new(virtio(address), BUFFER).expect("a card");
        Self { net: Rc::new(RefCell::new(net)), heard: false }
    }

    /// Its hardware address.
    pub fn mac(&self) -> [u8; 6] {
        self.net.borrow().mac_address()
    }

    /// Sends one frame.
    pub fn send(&mut self, frame: &[u8]) {
        Tx(self.net.clone()).consume(frame.len(), |buffer| buffer.copy_from_slice(frame));
    }
}

/// One frame that came.
pub struct Rx(Net, RxBuffer);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let result = read(self.1.packet());
        self.0.borrow_mut().recycle_rx_buffer(self.1).expect("there was room for it");
        result
    }
}

/// Leave to send one frame.
pub struct Tx(Net);

impl TxToken for Tx {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut net = self.0.borrow_mut();
        let mut buffer = net.new_tx_buffer(length);
        let result = write(buffer.packet_mut());
        net.send(buffer).expect("the card takes it");
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx)> {
        let buffer = self.net.borrow_mut().receive().ok()?;
        self.heard = true;
        Some((Rx(self.net.clone(), buffer), Tx(self.net.clone())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx> {
        Some(Tx(self.net.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}
