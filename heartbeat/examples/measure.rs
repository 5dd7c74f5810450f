//! Measures on 127.0.0.1 what the heartbeats and the witness cost: `cargo run -p heartbeat --example measure`.
//!
//! Prints the delay from a peer's falling silent to its suspicion, and the round trips of a heartbeat, of a
//! witness's read (memory) and of its change (synced to the disk of the working directory), and how fast the bulk
//! profile carries data at several MTUs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use heartbeat::beat::{Beat, BeatOptions, PeerEvent};
use heartbeat::quic::{Endpoint, EndpointOptions, Profile, Purpose};
use heartbeat::store::{OwnershipStore, WitnessClient};
use heartbeat::trust::{Card, Identity, Peer, Peers, Role, WindowLimits, pairing};
use heartbeat::witness::{WitnessConfig, WitnessDaemon};
use heartbeat_core::ids::{Party, VmId};
use heartbeat_core::record::Owner;
use heartbeat_core::store::{StoreOp, StoreRequest};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const ROUNDS: u8 = 20;
const ASKS: u32 = 200;
const BULK: usize = 1 << 30;
const CHUNK: usize = 64 << 10;

fn node(dir: &std::path::Path, name: &str) -> Result<(Arc<Identity>, Arc<Peers>)> {
    let dir = dir.join(name);
    Ok((Arc::new(Identity::start(&dir, Some(name))?), Arc::new(Peers::open(&dir.join("peers"))?)))
}

fn line(what: &str, mut samples: Vec<Duration>) {
    samples.sort();
    let at = |share: usize| samples[(samples.len() - 1) * share / 100];
    println!("{what:<44} p50 {:>9.3?}  p99 {:>9.3?}  max {:>9.3?}", at(50), at(99), at(100));
}

fn agent(identity: &Identity, heartbeat: &[SocketAddr]) -> Peer {
    Peer {
        name: identity.name().to_owned(),
        node: identity.node(),
        role: Role::Agent,
        addresses: Vec::new(),
        heartbeat: heartbeat.to_vec(),
        certificate: identity.certificate().clone(),
    }
}

fn beats() -> Result<()> {
    let (mut delays, mut trips) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let dir = tempfile::tempdir()?;
        let ((a, peers_of_a), (b, peers_of_b)) = (node(dir.path(), "a")?, node(dir.path(), "b")?);
        let (beat_of_a, mut events) = Beat::start(a.clone(), peers_of_a.clone(), BeatOptions::new(vec![ANY]), || {})?;
        let (beat_of_b, _events) = Beat::start(b.clone(), peers_of_b.clone(), BeatOptions::new(vec![ANY]), || {})?;
        peers_of_b.add(agent(&a, beat_of_a.addresses()))?;
        peers_of_a.add(agent(&b, beat_of_b.addresses()))?;
        // Enough heartbeats for the detector to know the peer.
        while beat_of_a.stats().first().is_none_or(|path| path.received < 100) {
            std::thread::sleep(Duration::from_millis(10));
        }
        trips.extend(beat_of_a.stats()[0].rtt);
        let silent = Instant::now();
        drop(beat_of_b);
        loop {
            if let PeerEvent::Suspected { .. } = events.blocking_recv().context("heartbeats run")? {
                delays.push(silent.elapsed());
                break;
            }
        }
    }
    line("heartbeat round trip", trips);
    line("last sign of life to suspicion (200 ms set)", delays);
    Ok(())
}

async fn witness() -> Result<()> {
    let dir = tempfile::tempdir_in(".")?;
    let state_dir = dir.path().join("w");
    let daemon = WitnessDaemon::start(&WitnessConfig { state_dir, listen: ANY, name: Some("w".to_owned()) })?;
    let (identity, peers) = node(dir.path(), "a")?;
    let options = EndpointOptions { bind: ANY, profile: Profile::Control, mtu: None };
    let endpoint = Arc::new(Endpoint::open(identity.clone(), peers.clone(), options)?);
    let window = daemon.open_pairing(ANY, WindowLimits::default())?;
    let card = Card { role: Role::Agent, addresses: vec![endpoint.local_addr()?], heartbeat: Vec::new() };
    let (address, code) = (window.local_addr()?, window.code().clone());
    let (owner, joined) = tokio::join!(window.wait(), pairing::join(&identity, &peers, &card, address, &code));
    owner?;
    let client = WitnessClient::new(endpoint, joined?.node, Duration::from_secs(5));
    let me = Party { node: identity.node(), incarnation: identity.incarnation() };
    let vm = VmId([1; 16]);
    let ask = |id, op| client.ask(StoreRequest { id, vm, asker: me, op });
    let (mut reads, mut changes) = (Vec::new(), Vec::new());
    for _ in 0..ASKS {
        let start = Instant::now();
        let seen = ask(0, StoreOp::Read).await?;
        reads.push(start.elapsed());
        let expect = seen.record.map(|record| (record.store, record.revision));
        let owner = Owner::Solo { node: me, activated: true, other: None };
        let start = Instant::now();
        let seen = ask(1, StoreOp::Change { expect, owner }).await?;
        changes.push(start.elapsed());
        anyhow::ensure!(seen.applied, "refused: {seen:?}");
    }
    line("witness read", reads);
    line("witness change, synced", changes);
    Ok(())
}

/// Processor time of this process so far, in seconds.
fn cpu() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("a stat line")?.split_whitespace().collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}

/// One direction, one stream, both ends in this process on a thread each.
fn bulk(mtu: Option<u16>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ((a, peers_of_a), (b, peers_of_b)) = (node(dir.path(), "a")?, node(dir.path(), "b")?);
    peers_of_a.add(agent(&b, &[]))?;
    peers_of_b.add(agent(&a, &[]))?;
    let options = EndpointOptions { bind: ANY, profile: Profile::Bulk, mtu };
    let (ready, address) = std::sync::mpsc::channel();
    let receiver = std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let endpoint = Endpoint::open(b, peers_of_b, options)?;
            ready.send(endpoint.local_addr()?)?;
            let mut connection = endpoint.accept().await.context("a connection")?;
            while connection.recv.read_chunk(usize::MAX, true).await?.is_some() {}
            connection.close(heartbeat::quic::close::DONE, "");
            endpoint.wait_idle().await;
            Ok(())
        })
    });
    let address = address.recv()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let endpoint = Endpoint::open(a, peers_of_a.clone(), options)?;
        let peer = peers_of_a.by_name("b")?;
        let mut connection = endpoint.connect_to(&peer, address, Purpose::Replication).await?;
        let chunk = bytes::Bytes::from(vec![7_u8; CHUNK]);
        let (start, before) = (Instant::now(), cpu()?);
        for _ in 0..BULK / CHUNK {
            connection.send.write_chunk(chunk.clone()).await?;
        }
        connection.send.finish()?;
        connection.quic.closed().await;
        let path = connection.quic.stats().path;
        let gigabytes = BULK as f64 / 1e9;
        println!(
            "bulk, mtu {mtu:?}: {:.2} GB/s, {:.2} CPU s/GB, lost {} of {} packets, MTU {}",
            gigabytes / start.elapsed().as_secs_f64(),
            (cpu()? - before) / gigabytes,
            path.lost_packets,
            path.sent_packets,
            path.current_mtu
        );
        anyhow::Ok(())
    })?;
    receiver.join().expect("the receiver does not panic")?;
    Ok(())
}

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() != Some("bulk") {
        beats()?;
        tokio::runtime::Runtime::new()?.block_on(witness())?;
    }
    for mtu in [None, Some(1_472), Some(8_972), heartbeat::quic::mtu_towards(ANY)] {
        bulk(mtu)?;
    }
    Ok(())
}
