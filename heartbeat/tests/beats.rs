//! Heartbeats between real sockets on 127.0.0.1, with relays that can cut a path.
//!
//! The silence is a second here, so that a busy machine does not look like a dead peer.

mod common;

use std::io::{BufRead, BufReader, Lines};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{ANY, Node, patiently};
use heartbeat::beat::{Beat, BeatOptions, DetectorConfig, GuestStatus, PathStats, PeerEvent};
use heartbeat::trust::{Identity, Peers};
use heartbeat_core::ids::{Incarnation, VmId};
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::UdpSocket;
use tokio::sync::mpsc::Receiver;

const SILENCE: Duration = Duration::from_secs(1);

fn options(paths: Vec<SocketAddr>) -> BeatOptions {
    let detector = DetectorConfig { silence: SILENCE, ..DetectorConfig::default() };
    BeatOptions { detector, ..BeatOptions::new(paths) }
}

fn start(node: &Node, paths: Vec<SocketAddr>) -> (Beat, Receiver<PeerEvent>) {
    Beat::start(node.identity.clone(), node.peers.clone(), options(paths), || {}).expect("heartbeats")
}

/// The next event but for those that only say that this machine is busy.
async fn next(events: &mut Receiver<PeerEvent>) -> PeerEvent {
    loop {
        match patiently(events.recv()).await.expect("heartbeats run") {
            PeerEvent::Starved { .. } => {}
            event => return event,
        }
    }
}

/// Waits until the numbers of one path are as wanted.
async fn until(beat: &Beat, path: usize, wanted: impl Fn(&PathStats) -> bool) {
    patiently(async {
        while !beat.stats().iter().any(|stats| stats.path == path && wanted(stats)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A path that can be cut: passes datagrams on to `target` and back.
struct Relay {
    address: SocketAddr,
    open: Arc<AtomicBool>,
}

impl Relay {
    async fn start(target: SocketAddr) -> Self {
        let front = UdpSocket::bind(ANY).await.expect("front");
        let back = UdpSocket::bind(ANY).await.expect("back");
        back.connect(target).await.expect("target");
        let (address, open) = (front.local_addr().expect("bound"), Arc::new(AtomicBool::new(true)));
        let passes = open.clone();
        tokio::spawn(async move {
            let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
            let mut client = None;
            loop {
                // Errors of UDP sockets tell of earlier datagrams: to the ends they are losses.
                tokio::select! {
                    Ok((length, from)) = front.recv_from(&mut there) => {
                        client = Some(from);
                        if passes.load(Ordering::SeqCst) {
                            let _ = back.send(&there[..length]).await;
                        }
                    }
                    Ok(length) = back.recv(&mut here) => {
                        if let (Some(client), true) = (client, passes.load(Ordering::SeqCst)) {
                            let _ = front.send_to(&here[..length], client).await;
                        }
                    }
                }
            }
        });
        Self { address, open }
    }

    fn pass(&self, open: bool) {
        self.open.store(open, Ordering::SeqCst);
    }
}

/// Two nodes that hear each other over this many relayed paths. Either may be the dialer.
struct Pair {
    a: Node,
    b: Node,
    beat_of_a: Beat,
    beat_of_b: Beat,
    at_a: Receiver<PeerEvent>,
    at_b: Receiver<PeerEvent>,
    relays: Vec<[Relay; 2]>,
}

impl Pair {
    async fn start(paths: usize) -> Self {
        let (a, b) = (Node::start("a"), Node::start("b"));
        let (beat_of_a, mut at_a) = start(&a, vec![ANY; paths]);
        let (beat_of_b, mut at_b) = start(&b, vec![ANY; paths]);
        let mut relays = Vec::new();
        for path in 0..paths {
            relays.push([
                Relay::start(beat_of_a.addresses()[path]).await,
                Relay::start(beat_of_b.addresses()[path]).await,
            ]);
        }
        let via = |side: usize| relays.iter().map(|pair| pair[side].address).collect();
        b.peers.add(a.as_peer(via(0))).expect("a at b");
        a.peers.add(b.as_peer(via(1))).expect("b at a");
        let heard =
            |node: &Node| PeerEvent::Heard { node: node.identity.node(), incarnation: node.identity.incarnation() };
        assert_eq!(next(&mut at_a).await, heard(&b));
        assert_eq!(next(&mut at_b).await, heard(&a));
        Self { a, b, beat_of_a, beat_of_b, at_a, at_b, relays }
    }

    fn pass(&self, path: usize, open: bool) {
        self.relays[path].iter().for_each(|relay| relay.pass(open));
    }
}

fn suspects(event: &PeerEvent, node: &Node) -> bool {
    matches!(event, PeerEvent::Suspected { node: whom, silence, .. }
        if *whom == node.identity.node() && *silence >= SILENCE)
}

fn hears_again(event: &PeerEvent, node: &Node) -> bool {
    matches!(event, PeerEvent::HeardAgain { node: whom, silence }
        if *whom == node.identity.node() && *silence >= SILENCE)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silence_is_suspected_once_and_its_end_is_told() {
    let mut pair = Pair::start(1).await;
    for _ in 0..2 {
        pair.pass(0, false);
        let (first, second) = (next(&mut pair.at_a).await, next(&mut pair.at_b).await);
        assert!(suspects(&first, &pair.b), "{first:?}");
        assert!(suspects(&second, &pair.a), "{second:?}");
        // Longer than any bound of the detector: nothing more is said in this silence.
        until(&pair.beat_of_a, 0, |path| path.silence > Some(SILENCE * 6)).await;
        pair.pass(0, true);
        let (first, second) = (next(&mut pair.at_a).await, next(&mut pair.at_b).await);
        assert!(hears_again(&first, &pair.b), "{first:?}");
        assert!(hears_again(&second, &pair.a), "{second:?}");
        until(&pair.beat_of_a, 0, |path| path.rtt.is_some() && !path.suspected).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_suspected_only_when_all_its_paths_are_silent() {
    let mut pair = Pair::start(2).await;
    for path in 0..2 {
        until(&pair.beat_of_a, path, |path| path.received > 0).await;
        until(&pair.beat_of_b, path, |path| path.received > 0).await;
    }
    pair.pass(0, false);
    let (node, at) = (pair.b.identity.node(), &mut pair.at_a);
    assert!(matches!(next(at).await, PeerEvent::PathDown { node: whom, path: 0, .. } if whom == node));
    until(&pair.beat_of_a, 0, |path| path.silence > Some(SILENCE * 4) && !path.up && !path.suspected).await;
    until(&pair.beat_of_a, 1, |path| path.up).await;
    pair.pass(1, false);
    let event = next(&mut pair.at_a).await;
    assert!(suspects(&event, &pair.b), "{event:?}");
    assert!(
        matches!(event, PeerEvent::Suspected { silence, .. } if silence < SILENCE * 4),
        "counted from the last path that was heard: {event:?}"
    );
    pair.pass(1, true);
    let event = next(&mut pair.at_a).await;
    assert!(hears_again(&event, &pair.b), "{event:?}");
    pair.pass(0, true);
    assert!(matches!(next(&mut pair.at_a).await, PeerEvent::PathUp { path: 0, .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_report_arrives_when_it_changes() {
    let mut pair = Pair::start(1).await;
    let vm = VmId([8; 16]);
    for status in [GuestStatus::Running, GuestStatus::Frozen, GuestStatus::Dead] {
        pair.beat_of_b.report(vm, status);
        let expected = PeerEvent::GuestReport { node: pair.b.identity.node(), vm, status };
        assert_eq!(next(&mut pair.at_a).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_peer_is_heard_as_its_next_incarnation() {
    let mut pair = Pair::start(1).await;
    let address = pair.beat_of_b.addresses().to_vec();
    let node = pair.b.identity.node();
    drop(pair.beat_of_b);
    let event = next(&mut pair.at_a).await;
    assert!(suspects(&event, &pair.b), "a closed connection is a silence: {event:?}");
    let Node { dir, identity, peers, endpoint } = pair.b;
    drop((identity, endpoint));
    let identity = Arc::new(common::restart(dir.path()).await);
    let (_beat, _events) = Beat::start(identity, peers, options(address), || {}).expect("again");
    let (old, new) = (Incarnation(1), Incarnation(2));
    assert_eq!(next(&mut pair.at_a).await, PeerEvent::Incarnation { node, old, new });
    assert!(matches!(next(&mut pair.at_a).await, PeerEvent::HeardAgain { .. }));
    drop(pair.a);
}

const CHILD: &str = "UNDERSTUDY_TEST_CHILD";

/// The node in another process, which `a_node_that_was_stopped_does_not_suspect_at_once` stops.
#[test]
#[ignore = "runs as a child of another test"]
fn child() {
    let dir = std::env::var_os(CHILD).expect("the parent says where");
    let dir = std::path::Path::new(&dir);
    let identity = Arc::new(Identity::start(dir, None).expect("identity"));
    let peers = Arc::new(Peers::open(&dir.join("peers")).expect("peers"));
    let (beat, mut events) = Beat::start(identity, peers, options(vec![ANY]), || {}).expect("heartbeats");
    println!("EVENT listens {}", beat.addresses()[0]);
    while let Some(event) = events.blocking_recv() {
        println!("EVENT {event:?}");
    }
}

/// Kills the child when the test ends, however it ends.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn next_line(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    loop {
        let line = lines.next().expect("the child runs").expect("readable");
        // The test harness may have written the start of the line.
        if let Some((_, event)) = line.split_once("EVENT ") {
            return event.to_owned();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_stopped_does_not_suspect_at_once() {
    let (parent, child) = (Node::start("parent"), Node::start("child"));
    let (beat, mut events) = start(&parent, vec![ANY]);
    child.peers.add(parent.as_peer(beat.addresses().to_vec())).expect("parent at child");
    let mut as_peer = child.as_peer(Vec::new());
    let Node { dir, identity, peers, endpoint } = child;
    drop((identity, peers, endpoint));
    drop(common::restart(dir.path()).await);

    let mut process = Command::new(std::env::current_exe().expect("this test's program"));
    process.args(["--exact", "child", "--ignored", "--nocapture"]).env(CHILD, dir.path());
    let mut process = Reaped(process.stdout(Stdio::piped()).spawn().expect("child"));
    let mut lines = BufReader::new(process.0.stdout.take().expect("piped")).lines();
    let address = next_line(&mut lines);
    let address = address.strip_prefix("listens ").expect("its address").parse().expect("address");
    as_peer.heartbeat.push(address);
    parent.peers.add(as_peer).expect("child at parent");
    assert!(next_line(&mut lines).starts_with("Heard "));
    assert!(matches!(next(&mut events).await, PeerEvent::Heard { .. }));

    let pid = Pid::from_child(&process.0);
    kill_process(pid, Signal::STOP).expect("stop it");
    until(&beat, 0, |path| path.silence > Some(SILENCE * 4)).await;
    assert!(matches!(next(&mut events).await, PeerEvent::Suspected { .. }), "the parent was awake");
    kill_process(pid, Signal::CONT).expect("let it run");
    assert!(matches!(next(&mut events).await, PeerEvent::HeardAgain { .. }));
    let received = beat.stats()[0].received;
    until(&beat, 0, |path| path.received > received + 50).await;
    drop(beat);
    let mut said = next_line(&mut lines);
    assert!(said.starts_with("Starved "), "{said}");
    while said.starts_with("Starved ") {
        said = next_line(&mut lines);
    }
    assert!(said.starts_with("Suspected "), "only of the parent that really went: {said}");
    assert!(process.0.try_wait().expect("waited").is_none(), "the child still runs");
}
