//! How a connection is tuned: for bulk (replication), for control (witness) or for heartbeats.
//!
//! The values for bulk were measured on loopback; the windows hold several epochs, so that the
//! congestion controller and not flow control sets the pace. Control and heartbeats send a few kilobytes
//! a second: their window is fixed, so that losses of a short outage do not delay the first words after it.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// Largest UDP payload accepted: what IPv4 and IPv6 can carry at most without jumbograms.
pub(crate) const MAX_UDP_PAYLOAD: u16 = 65_527;
/// Largest MTU used: the UDP payload of the largest IPv4 packet.
pub(crate) const MAX_MTU: u16 = 65_507;
/// Smallest MTU that QUIC works on.
const MIN_MTU: u16 = 1_200;
/// Highest MTU that discovery tries if the interface's is not known: Ethernet less IPv4 and UDP.
const DISCOVER_UP_TO: u16 = 1_472;
/// Bytes of one send call with segmentation offload; the kernel takes no more than 64 KiB.
const MAX_SEND_CALL: usize = 65_507;
/// Most segments of one send call.
const MAX_SEGMENTS: usize = 10;

const BULK_WINDOW: u32 = 16 << 20;
const BULK_INITIAL_WINDOW: u64 = 2 << 20;
const BULK_SOCKET_BUFFER: usize = 16 << 20;
/// The failure detector decides when a silent peer is given up, and a restarted one answers with a reset; this only
/// ends what nobody else ended. On a machine short of processor time four seconds were too few.
const BULK_IDLE: Duration = Duration::from_secs(10);
const BULK_KEEP_ALIVE: Duration = Duration::from_secs(1);
const BULK_STREAMS: u32 = 256;

const CONTROL_WINDOW: u32 = 1 << 20;
const CONTROL_SOCKET_BUFFER: usize = 1 << 20;
const CONTROL_IDLE: Duration = Duration::from_secs(4);
const CONTROL_KEEP_ALIVE: Duration = Duration::from_millis(400);
const CONTROL_STREAMS: u32 = 64;
/// Bytes in flight on a control or heartbeat connection: more than ten seconds of heartbeats.
const CONTROL_IN_FLIGHT: u64 = 256 << 10;
/// A heartbeat connection outlives a frozen peer: a restarted one answers with a reset at once.
const HEARTBEAT_IDLE: Duration = Duration::from_secs(10);

/// Round trip assumed before the first is measured: peers are on a local network.
const INITIAL_RTT: Duration = Duration::from_millis(1);
/// Largest datagram queue of one connection: a few heartbeats; the oldest goes when it is full.
const DATAGRAM_BUFFER: usize = 8 << 10;

/// What an endpoint is tuned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Replication: windows and socket buffers of many MiB.
    Bulk,
    /// The witness: small, and quick to notice that the other end is gone.
    Control,
    /// Heartbeats: small, and slow to give up a connection.
    Heartbeat,
}

impl Profile {
    /// Bytes of socket buffer to ask for, each way.
    pub(crate) fn socket_buffer(self) -> usize {
        match self {
            Self::Bulk => BULK_SOCKET_BUFFER,
            Self::Control | Self::Heartbeat => CONTROL_SOCKET_BUFFER,
        }
    }
}

/// Segments of one send call, so that they stay under 64 KiB together.
///
/// Without this cap a large MTU makes the kernel refuse the call, which looks like loss on the path.
pub(crate) fn max_segments(mtu: Option<u16>) -> usize {
    let mtu = usize::from(mtu.unwrap_or(DISCOVER_UP_TO).clamp(MIN_MTU, MAX_MTU));
    (MAX_SEND_CALL / mtu).clamp(1, MAX_SEGMENTS)
}

/// The transport parameters of `profile`. `mtu`: UDP payload of the path if known, else it is discovered.
pub(crate) fn transport(profile: Profile, mtu: Option<u16>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    match mtu {
        Some(mtu) => {
            let mtu = mtu.clamp(MIN_MTU, MAX_MTU);
            config.initial_mtu(mtu).min_mtu(MIN_MTU);
            discovery.upper_bound(mtu);
        }
        None => {
            discovery.upper_bound(DISCOVER_UP_TO);
        }
    }
    let (window, streams, idle, keep_alive) = match profile {
        Profile::Bulk => (BULK_WINDOW, BULK_STREAMS, BULK_IDLE, BULK_KEEP_ALIVE),
        Profile::Control => (CONTROL_WINDOW, CONTROL_STREAMS, CONTROL_IDLE, CONTROL_KEEP_ALIVE),
        Profile::Heartbeat => (CONTROL_WINDOW, CONTROL_STREAMS, HEARTBEAT_IDLE, CONTROL_KEEP_ALIVE),
    };
    let controller: Arc<dyn ControllerFactory + Send + Sync> = if profile == Profile::Bulk {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(BULK_INITIAL_WINDOW);
        Arc::new(cubic)
    } else {
        Arc::new(FixedWindow)
    };
    let idle = IdleTimeout::try_from(idle).expect("a few seconds fit QUIC's idle timeout");
    config
        .mtu_discovery_config(Some(discovery))
        .initial_rtt(INITIAL_RTT)
        .congestion_controller_factory(controller)
        .send_window(u64::from(window))
        .stream_receive_window(VarInt::from_u32(window))
        .receive_window(VarInt::from_u32(window * 2))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(streams))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(keep_alive))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER);
    Arc::new(config)
}

/// A congestion controller that does not react; for connections of a few kilobytes a second alone.
#[derive(Debug, Clone, Copy)]
struct FixedWindow;

impl ControllerFactory for FixedWindow {
    fn build(self: Arc<Self>, _now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Self)
    }
}

impl Controller for FixedWindow {
    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, _: u16) {}

    fn window(&self) -> u64 {
        CONTROL_IN_FLIGHT
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        CONTROL_IN_FLIGHT
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_of_a_send_call_stay_below_64_kib() {
        for mtu in [1_200_u16, 1_472, 1_500, 6_550, 6_551, 8_972, 32_000, MAX_MTU, u16::MAX] {
            let segments = max_segments(Some(mtu));
            assert!(segments == 1 || segments * usize::from(mtu) <= MAX_SEND_CALL, "{mtu}");
            assert!((1..=MAX_SEGMENTS).contains(&segments));
        }
        assert_eq!(max_segments(Some(8_972)), 7);
    }
}
