//! Pairing and mutual TLS between real endpoints on 127.0.0.1.

mod common;

use std::time::Duration;

use common::{ANY, Node, introduce, patiently};
use heartbeat::quic::{Profile, Purpose, QuicError, read_message, write_message};
use heartbeat::trust::pairing::join;
use heartbeat::trust::{PairCode, PairError, PairWindow, WindowLimits};

fn window(node: &Node, limits: WindowLimits) -> PairWindow {
    PairWindow::open(node.identity.clone(), node.peers.clone(), node.card(), ANY, limits).expect("window")
}

fn other_code(code: &PairCode) -> PairCode {
    let text = code.to_string();
    let first = if text.starts_with('0') { '1' } else { '0' };
    format!("{first}{}", &text[1..]).parse().expect("a code")
}

#[tokio::test]
async fn the_right_code_pins_both_sides_and_closes_the_window() {
    let (a, b) = (Node::start("a"), Node::start("b"));
    let window = window(&a, WindowLimits::default());
    let (address, code) = (window.local_addr().expect("open"), window.code().clone());
    let waiting = tokio::spawn(window.wait());

    let wrong = join(&b.identity, &b.peers, &b.card(), address, &other_code(&code)).await;
    assert!(matches!(wrong, Err(PairError::WrongCode)), "{wrong:?}");
    assert!(a.peers.list().is_empty() && b.peers.list().is_empty(), "a wrong code pins nothing");

    let peer = join(&b.identity, &b.peers, &b.card(), address, &code).await.expect("paired");
    assert_eq!(peer, a.as_peer(Vec::new()));
    let peer = patiently(waiting).await.expect("no panic").expect("paired");
    assert_eq!(peer, b.as_peer(Vec::new()));
    assert_eq!(a.peers.by_name("b").expect("pinned"), peer);
    assert_eq!(b.peers.by_name("a").expect("pinned").node, a.identity.node());

    let late = Node::start("late");
    let closed = join(&late.identity, &late.peers, &late.card(), address, &code).await;
    assert!(matches!(closed, Err(PairError::Closed { .. })), "{closed:?}");
    assert!(late.peers.list().is_empty());

    // And the pinned certificates carry a connection.
    let (dialed, accepted) =
        tokio::join!(b.endpoint.connect(a.identity.node(), Purpose::Replication), a.endpoint.accept());
    let (mut dialed, mut accepted) = (dialed.expect("dialed"), accepted.expect("accepted"));
    assert_eq!(accepted.peer.node, b.identity.node());
    assert_eq!(accepted.purpose, Purpose::Replication);
    assert_eq!(dialed.incarnation, a.identity.incarnation());
    write_message(&mut dialed.send, &7_u32).await.expect("write");
    assert_eq!(patiently(read_message::<u32>(&mut accepted.recv, 4)).await.expect("read"), 7);
}

#[tokio::test]
async fn attempts_are_bounded() {
    let (a, b) = (Node::start("a"), Node::start("b"));
    let window = window(&a, WindowLimits { open_for: Duration::from_secs(3600), attempts: 3 });
    let (address, code) = (window.local_addr().expect("open"), window.code().clone());
    let waiting = tokio::spawn(window.wait());
    for _ in 0..3 {
        let wrong = join(&b.identity, &b.peers, &b.card(), address, &other_code(&code)).await;
        assert!(matches!(wrong, Err(PairError::WrongCode)), "{wrong:?}");
    }
    let outcome = patiently(waiting).await.expect("no panic");
    assert!(matches!(outcome, Err(PairError::TooManyAttempts { attempts: 3 })), "{outcome:?}");
    let closed = join(&b.identity, &b.peers, &b.card(), address, &code).await;
    assert!(matches!(closed, Err(PairError::Closed { .. })), "the right code is too late: {closed:?}");
    assert!(a.peers.list().is_empty() && b.peers.list().is_empty());
}

#[tokio::test]
async fn a_window_expires() {
    let a = Node::start("a");
    let outcome = window(&a, WindowLimits { open_for: Duration::ZERO, attempts: 3 }).wait().await;
    assert!(matches!(outcome, Err(PairError::Expired)), "{outcome:?}");
}

#[tokio::test]
async fn a_name_that_is_taken_is_refused_on_both_sides() {
    let (a, b, second) = (Node::start("a"), Node::start("b"), Node::start("b"));
    introduce(&a, &b);
    let window = window(&a, WindowLimits::default());
    let (address, code) = (window.local_addr().expect("open"), window.code().clone());
    let _waiting = tokio::spawn(window.wait());
    let refused = join(&second.identity, &second.peers, &second.card(), address, &code).await;
    assert!(matches!(refused, Err(PairError::Refused { .. })), "{refused:?}");
    assert!(second.peers.list().is_empty());
    assert_eq!(a.peers.list().len(), 1);
}

#[tokio::test]
async fn a_certificate_that_is_not_pinned_is_refused_by_the_acceptor() {
    let (a, stranger) = (Node::start("a"), Node::start("stranger"));
    stranger.peers.add(a.as_peer(Vec::new())).expect("the stranger knows a");
    let refused = stranger.endpoint.connect(a.identity.node(), Purpose::Witness).await;
    assert!(matches!(refused, Err(QuicError::NotPaired { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_certificate_that_is_not_the_pinned_one_is_refused_by_the_dialer() {
    let (a, b, impostor) = (Node::start("a"), Node::start("b"), Node::start("b"));
    introduce(&a, &b);
    introduce(&Node::start("c"), &impostor);
    impostor.peers.add(a.as_peer(Vec::new())).expect("the impostor knows a");
    let address = impostor.endpoint.local_addr().expect("open");
    let peer = a.peers.by_name("b").expect("b");
    let refused = a.endpoint.connect_to(&peer, address, Purpose::Heartbeat).await;
    assert!(matches!(refused, Err(QuicError::NotPaired { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_removed_peer_is_refused() {
    let (a, b) = (Node::start("a"), Node::start("b"));
    introduce(&a, &b);
    a.endpoint.connect(b.identity.node(), Purpose::Witness).await.expect("paired");
    b.peers.remove("a").expect("remove");
    let refused = a.endpoint.connect(b.identity.node(), Purpose::Witness).await;
    assert!(matches!(refused, Err(QuicError::NotPaired { .. })), "{refused:?}");
    let unknown = b.endpoint.connect(a.identity.node(), Purpose::Witness).await;
    assert!(matches!(unknown, Err(QuicError::UnknownPeer(_))), "{unknown:?}");
}

#[tokio::test]
async fn a_peer_whose_first_addresses_are_dead_is_reached_at_the_next() {
    let (a, b) = (Node::start("a"), Node::start("b"));
    // Sockets that nobody reads: what is sent there is lost.
    let dead: Vec<_> = (0..3).map(|_| std::net::UdpSocket::bind(ANY).expect("a socket")).collect();
    let mut peer = b.as_peer(Vec::new());
    let alive = peer.addresses[0];
    peer.addresses = dead.iter().map(|socket| socket.local_addr().expect("bound")).chain([alive]).collect();
    a.peers.add(peer.clone()).expect("b at a");
    b.peers.add(a.as_peer(Vec::new())).expect("a at b");
    let connection = patiently(a.endpoint.connect(b.identity.node(), Purpose::Witness)).await.expect("by the last one");
    assert_eq!(connection.quic.remote_address(), alive);
    peer.addresses.pop();
    a.peers.add(peer).expect("b at a, nowhere");
    let silent = patiently(a.endpoint.connect(b.identity.node(), Purpose::Witness)).await;
    assert!(matches!(silent, Err(QuicError::Unreachable { .. })), "{silent:?}");
}

#[tokio::test]
async fn an_endpoint_on_the_unspecified_ipv6_address_speaks_ipv4_too() {
    use heartbeat::quic::{Endpoint, EndpointOptions};
    let bind = "[::]:0".parse().expect("address");
    if std::net::UdpSocket::bind(bind).is_err() {
        println!("skipped: this machine has no IPv6");
        return;
    }
    let (a, b) = (Node::start("a"), Node::start("b"));
    introduce(&a, &b);
    let options = EndpointOptions { bind, profile: Profile::Control, mtu: None };
    let both = Endpoint::open(a.identity.clone(), a.peers.clone(), options).expect("endpoint");
    both.connect(b.identity.node(), Purpose::Witness).await.expect("out by IPv4");
    let port = both.local_addr().expect("open").port();
    let peer = b.peers.by_name("a").expect("a");
    for address in [format!("127.0.0.1:{port}"), format!("[::1]:{port}")] {
        let address: std::net::SocketAddr = address.parse().expect("address");
        let options = EndpointOptions { bind: if address.is_ipv4() { ANY } else { bind }, ..options };
        let from = Endpoint::open(b.identity.clone(), b.peers.clone(), options).expect("endpoint");
        from.connect_to(&peer, address, Purpose::Witness).await.expect("in by both");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_data_passes_at_every_mtu() {
    const BYTES: usize = 8 << 20;
    use heartbeat::quic::{Endpoint, EndpointOptions};
    let (a, b) = (Node::start_with("a", Profile::Bulk), Node::start_with("b", Profile::Bulk));
    introduce(&a, &b);
    for mtu in [None, Some(1_472), Some(8_972), Some(65_507), Some(u16::MAX)] {
        let open = |node: &Node| {
            let options = EndpointOptions { bind: ANY, profile: Profile::Bulk, mtu };
            Endpoint::open(node.identity.clone(), node.peers.clone(), options).expect("endpoint")
        };
        let (from, to) = (open(&a), open(&b));
        let address = to.local_addr().expect("open");
        let peer = a.peers.by_name("b").expect("b");
        let (dialed, accepted) = tokio::join!(from.connect_to(&peer, address, Purpose::Replication), to.accept());
        let (mut dialed, mut accepted) = (dialed.expect("dialed"), accepted.expect("accepted"));
        let sending = tokio::spawn(async move {
            dialed.send.write_all(&vec![7; BYTES]).await.expect("write");
            dialed.send.finish().expect("finish");
            dialed.quic.closed().await;
        });
        let received = patiently(accepted.recv.read_to_end(BYTES)).await.expect("read");
        assert_eq!(received.len(), BYTES, "mtu {mtu:?}");
        accepted.close(heartbeat::quic::close::DONE, "");
        patiently(sending).await.expect("sent");
    }
}

#[test]
fn a_restarted_peer_ends_the_connections_of_its_former_life_by_a_reset() {
    use heartbeat::quic::{Endpoint, EndpointOptions};
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let ours = runtime();
    let (a, b) = ours.block_on(async { (Node::start("a"), Node::start("b")) });
    introduce(&a, &b);
    let first_life = runtime();
    let options = EndpointOptions { bind: ANY, profile: Profile::Control, mtu: None };
    let endpoint =
        first_life.block_on(async { Endpoint::open(b.identity.clone(), b.peers.clone(), options) }).expect("endpoint");
    let address = endpoint.local_addr().expect("open");
    let peer = a.peers.by_name("b").expect("b");
    let dialed = ours.block_on(a.endpoint.connect_to(&peer, address, Purpose::Replication)).expect("connected");
    // Killed: its tasks have ended before its socket goes, so nothing is said.
    first_life.shutdown_timeout(std::time::Duration::from_secs(60));
    drop(endpoint);
    let reason = ours.block_on(async {
        let options = EndpointOptions { bind: address, ..options };
        let _again = patiently(async {
            loop {
                match Endpoint::open(b.identity.clone(), b.peers.clone(), options) {
                    Ok(endpoint) => return endpoint,
                    Err(QuicError::Bind { .. }) => tokio::task::yield_now().await,
                    Err(error) => panic!("{error}"),
                }
            }
        })
        .await;
        patiently(dialed.quic.closed()).await
    });
    assert_eq!(reason, quinn::ConnectionError::Reset);
}
