//! The server: TCP connections on port 6379, each answered in the order of its requests.
//!
//! An answer leaves only when the log that it speaks of is written: answers of one turn are sent after the turn's flush, and
//! acknowledge what they answer, so that no frame is spent on that alone.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};

use crate::abi;
use crate::card::Card;
use crate::disk::Log;
use crate::machine::{clock, param};
use crate::resp::{Parsed, parse};
use crate::store::Store;

const PORT: u16 = 6379;
/// Most connections at once.
const CONNECTIONS: usize = 64;
/// Bytes of a connection's buffers.
const RECEIVE: usize = 16 << 10;
const SEND: usize = 32 << 10;
/// Most frames that are received in one turn.
const FRAMES: usize = 64;
/// While so many bytes of answers wait, no more requests of their connection are read.
const ANSWERS_MAX: usize = 64 << 10;

struct Connection {
    handle: SocketHandle,
    requests: Vec<u8>,
    answers: Vec<u8>,
    /// It sent what is no request, and is closed when the answers are sent.
    broken: bool,
}

/// The network, and who is connected.
pub struct Server {
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    store: Store,
    emitted: u64,
}

fn now() -> Instant {
    Instant::from_micros(i64::try_from(clock() / 1000).expect("years"))
}

impl Server {
    /// A server on the card at `address`.
    pub fn new(address: u64) -> Self {
        let mut card = Card::new(address);
        let mut config = Config::new(EthernetAddress(card.mac()).into());
        config.random_seed = param(abi::param::SEED);
        let mut interface = Interface::new(config, &mut card, now());
        let ip = |word| Ipv4Address::from_bits(param(word) as u32);
        interface.update_ip_addrs(|addresses| {
            let cidr = IpCidr::new(IpAddress::Ipv4(ip(abi::param::ADDRESS)), param(abi::param::PREFIX) as u8);
            addresses.push(cidr).expect("room for one");
        });
        if param(abi::param::GATEWAY) != 0 {
            interface.routes_mut().add_default_ipv4_route(ip(abi::param::GATEWAY)).expect("room for one");
        }
        let mut sockets = SocketSet::new(Vec::new());
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
            let mut socket = tcp::Socket::new(buffer(RECEIVE), buffer(SEND));
            socket.set_nagle_enabled(false);
            socket.set_ack_delay(None);
            socket.listen(PORT).expect("it is new");
            let handle = sockets.add(socket);
            connections.push(Connection { handle, requests: Vec::new(), answers: Vec::new(), broken: false });
        }
        Self { card, interface, sockets, connections, store: Store::default(), emitted: 0 }
    }

    /// Receives, answers, sends. Whether there was anything to do, and else in how many microseconds there may be.
    pub fn turn(&mut self, mut log: Option<&mut Log>) -> (bool, u32) {
        let time = now();
        self.interface.poll_maintenance(time);
        for _ in 0..FRAMES {
            let result = self.interface.poll_ingress_single(time, &mut self.card, &mut self.sockets);
            if matches!(result, PollIngressSingleResult::None) {
                break;
            }
        }
        let mut busy = core::mem::take(&mut self.card.heard);
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket>(connection.handle);
            busy |= connection.read(socket, &mut self.store, log.as_deref_mut());
        }
        if let Some(log) = log {
            log.flush();
        }
        let mut written = false;
        for connection in &mut self.connections {
            written |= connection.write(self.sockets.get_mut::<tcp::Socket>(connection.handle));
        }
        while !matches!(self.interface.poll_egress(time, &mut self.card, &mut self.sockets), PollResult::None) {}
        let delay = self.interface.poll_delay(time, &self.sockets);
        let delay = delay.map_or(u32::MAX, |delay| u32::try_from(delay.total_micros()).unwrap_or(u32::MAX));
        (busy || written, delay)
    }

    /// Emits `count` numbered frames to everybody.
    pub fn emit(&mut self, count: u32) {
        for _ in 0..count {
            self.emitted += 1;
            let mut frame = [0; 60];
            frame[..6].fill(0xff);
            frame[6..12].copy_from_slice(&self.card.mac());
            frame[12..14].copy_from_slice(&abi::FRAME_TYPE.to_be_bytes());
            frame[14..22].copy_from_slice(&self.emitted.to_be_bytes());
            self.card.send(&frame);
        }
    }
}

impl Connection {
    /// Reads what came and answers the requests that are whole.
    fn read(&mut self, socket: &mut tcp::Socket, store: &mut Store, mut log: Option<&mut Log>) -> bool {
        if !socket.is_open() {
            self.requests.clear();
            self.answers.clear();
            self.broken = false;
            socket.listen(PORT).expect("it is closed");
            return true;
        }
        if self.answers.len() > ANSWERS_MAX || self.broken {
            return false;
        }
        let mut busy = false;
        while socket.can_recv() {
            busy = true;
            let requests = &mut self.requests;
            let received = socket.recv(|bytes| {
                requests.extend_from_slice(bytes);
                (bytes.len(), ())
            });
            if received.is_err() {
                break;
            }
        }
        let mut done = 0;
        loop {
            match parse(&self.requests[done..]) {
                Parsed::Request(words, bytes) => {
                    store.answer(&words, log.as_deref_mut(), &mut self.answers);
                    done += bytes;
                }
                Parsed::Partial => break,
                Parsed::Broken(why) => {
                    self.answers.extend_from_slice(b"-ERR ");
                    self.answers.extend_from_slice(why.as_bytes());
                    self.answers.extend_from_slice(b"\r\n");
                    self.broken = true;
                    break;
                }
            }
        }
        self.requests.drain(..done);
        busy
    }

    /// Sends what is answered, and closes what the peer closed or broke.
    fn write(&mut self, socket: &mut tcp::Socket) -> bool {
        let mut written = false;
        if !self.answers.is_empty() && socket.can_send() {
            let sent = socket.send_slice(&self.answers).unwrap_or(0);
            self.answers.drain(..sent);
            written = sent > 0;
        }
        let over = self.broken || (socket.may_send() && !socket.may_recv() && socket.is_active());
        if over && self.answers.is_empty() && socket.may_send() {
            socket.close();
            written = true;
        }
        written
    }
}
