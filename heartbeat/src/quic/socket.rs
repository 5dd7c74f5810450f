//! UDP sockets under the endpoints: big buffers, and send calls that the kernel accepts.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};

use super::profile::{MAX_MTU, Profile, max_segments};

/// Bytes of an IPv4 and a UDP header.
const IPV4_UDP_HEADERS: u32 = 28;
/// Bytes of an IPv6 and a UDP header.
const IPV6_UDP_HEADERS: u32 = 48;

/// Binds a UDP socket to `address` with the buffers of `profile`, for quinn on the current tokio runtime.
pub(crate) fn bind(address: SocketAddr, profile: Profile, mtu: Option<u16>) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // `[::]` serves IPv4 too.
        socket.set_only_v6(false)?;
    }
    grow_buffers(&socket, profile.socket_buffer());
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    let inner = TokioRuntime.wrap_udp_socket(socket.into())?;
    Ok(Arc::new(Capped { inner, segments: max_segments(mtu) }))
}

/// The UDP payload of one packet towards `address`, in bytes: what the kernel knows of the path, which
/// is the interface's MTU less the headers. `None` if there is no route. Sends nothing.
#[must_use]
pub fn mtu_towards(address: SocketAddr) -> Option<u16> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP)).ok()?;
    // Port 0 cannot be connected to; any other gives the same route.
    let port = if address.port() == 0 { 9 } else { address.port() };
    socket.connect(&SocketAddr::new(address.ip(), port).into()).ok()?;
    let (packet, headers) = if address.is_ipv4() {
        (rustix::net::sockopt::ip_mtu(&socket).ok()?, IPV4_UDP_HEADERS)
    } else {
        (rustix::net::sockopt::ipv6_mtu(&socket).ok()?, IPV6_UDP_HEADERS)
    };
    let payload = packet.checked_sub(headers)?.min(u32::from(MAX_MTU));
    u16::try_from(payload).ok()
}

/// Asks for buffers of `bytes` each way: past the system's limit as root, up to it otherwise.
fn grow_buffers(socket: &Socket, bytes: usize) {
    use rustix::net::sockopt;
    let received = sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes));
    let sent = sockopt::set_socket_send_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, bytes));
    if let Err(error) = received.and(sent) {
        tracing::warn!(%error, bytes, "cannot grow the socket buffers; replication may lose packets");
    }
}

/// A socket that offers fewer segments per send call than the kernel claims to take.
struct Capped {
    inner: Arc<dyn AsyncUdpSocket>,
    segments: usize,
}

impl fmt::Debug for Capped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capped").field("segments", &self.segments).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Capped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_carries_more_than_ethernet() {
        let address = "127.0.0.1:0".parse().expect("address");
        let mtu = mtu_towards(address).expect("there is a route");
        assert!((1_472..=MAX_MTU).contains(&mtu), "{mtu}");
    }
}
