//! The path between the two hosts: our connection against quinn as it comes and TCP, and the commit against an echo.
//!
//! Bulk: so many bytes and one byte back, kinds in turn. Commit: while the VM is protected and under load, a raw quinn echo
//! of as many bytes as an epoch has on the wire runs beside it, over the same veth pair and on the same processors.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use replicator::demo::lab::Host;

use crate::ends::{self, Kind};
use crate::row::{Better, Pairs, Report};
use crate::stage::{Stage, let_run};
use crate::stats::{count, length, median};

/// Ours at least, in terms of quinn as it comes.
const BULK_BUDGET: f64 = 0.8;
/// A commit at most, in terms of an echo of the same bytes.
const COMMIT_BUDGET: f64 = 1.5;
const BULK: usize = 64 << 20;
/// Between two echoes: about as far apart as epochs are.
const ECHO_GAP_MS: u64 = 15;
const CONNECTIONS: u32 = 50;

/// What later measurements compare with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speeds {
    /// Bytes per second of a raw quinn stream.
    pub(crate) quinn: f64,
}

/// Measures bulk, in a laboratory with an idle VM.
pub(crate) async fn bulk(stage: &Stage, quick: bool, report: &mut Report) -> Result<Speeds> {
    let rounds = if quick { 3 } else { 10 };
    println!("bulk: {rounds} rounds of {} MiB", BULK >> 20);
    ends::prepare(&stage.dir().join("ends"))?;
    let (mut ours, mut tcp, mut raw) = (Pairs::default(), Pairs::default(), Vec::new());
    let speed = |took: Vec<f64>| median(took.iter().map(|seconds| length(BULK) / seconds));
    for _ in 0..rounds {
        // The first of each is for the congestion window.
        let [quinn, product, plain] = [
            asked(stage, Kind::Quinn, BULK, 3, 0).await?,
            asked(stage, Kind::Ours, BULK, 3, 0).await?,
            asked(stage, Kind::Tcp, BULK, 3, 0).await?,
        ]
        .map(speed);
        if let (Some(quinn), Some(product), Some(plain)) = (quinn, product, plain) {
            ours.push(product / 1e9, quinn / 1e9);
            tcp.push(plain / 1e9, quinn / 1e9);
            raw.push(quinn);
        }
    }
    report.add("transport, bulk against raw quinn", "GB/s", Better::Higher, Some(BULK_BUDGET), &ours);
    report.add("TCP, bulk against raw quinn", "GB/s", Better::Higher, None, &tcp);
    Ok(Speeds { quinn: median(raw.into_iter()).unwrap_or_default() })
}

/// Measures the commit and the bytes of epochs, idle and under load. The VM is protected afterwards.
pub(crate) async fn commit(stage: &Stage, quick: bool, report: &mut Report) -> Result<()> {
    let seconds = if quick { 5 } else { 15 };
    println!("commit against echo: {seconds} s each, idle and under load");
    stage.protect("auto").await?;
    let_run(Duration::from_secs(seconds)).await;
    let idle = stage.epochs().await?;
    let per_epoch = |bytes: u64, epochs: u64| count(bytes) / count(epochs.max(1));
    let idle_bytes = per_epoch(idle.wire_bytes, idle.epochs);
    let idle_echo = asked(stage, Kind::Quinn, whole(idle_bytes), 100, ECHO_GAP_MS).await?;

    // Protected anew, so that the figures are those of the load alone; a little load tells how many bytes an epoch has.
    stage.unprotect().await?;
    stage.protect("auto").await?;
    stage.load(CONNECTIONS, 1).await?;
    let sample = stage.epochs().await?;
    let bytes = whole(per_epoch(sample.wire_bytes, sample.epochs));
    stage.unprotect().await?;
    stage.protect("auto").await?;
    // The load warms up for a second of its own.
    let echoes = u32::try_from((seconds + 1) * 1000 / (ECHO_GAP_MS + 5))?;
    let (loaded, echo) =
        tokio::join!(stage.load(CONNECTIONS, seconds), asked(stage, Kind::Quinn, bytes, echoes, ECHO_GAP_MS));
    loaded?;
    let busy = stage.epochs().await?;
    let busy_bytes = per_epoch(busy.wire_bytes, busy.epochs);
    let middle = |took: Vec<f64>| median(took.into_iter().map(|seconds| seconds * 1e3)).unwrap_or_default();
    let (idle_echo, echo) = (middle(idle_echo), middle(echo?));
    println!(
        "  busy: epoch {:.1} ms, pause {:.2} ms (stop {:.2}, harvest {:.2}, device {:.2}, copy {:.2}, resume {:.2}), \
         {} dirty pages, commit {:.2} ms",
        busy.epoch_ms_p50,
        busy.pause_ms_p50,
        busy.pause_parts_ms_p50.stop,
        busy.pause_parts_ms_p50.harvest,
        busy.pause_parts_ms_p50.device,
        busy.pause_parts_ms_p50.copy,
        busy.pause_parts_ms_p50.resume,
        busy.dirty_pages_p50,
        busy.commit_ms_p50,
    );
    let mut add = |name: &str, unit, budget, value, baseline| {
        report.add(name, unit, Better::Lower, budget, &Pairs::one(value, baseline));
    };
    add("commit against raw quinn echo, under load", "ms", Some(COMMIT_BUDGET), busy.commit_ms_p50, echo);
    add("commit against raw quinn echo, idle", "ms", None, idle.commit_ms_p50, idle_echo);
    add("bytes on the wire per epoch, busy against idle", "kB", None, busy_bytes / 1e3, idle_bytes / 1e3);
    add(
        "share of the time paused, idle",
        "ms",
        Some(IDLE_SHARE),
        idle.pause_ms_p50,
        idle.epoch_ms_p50.max(idle.pause_ms_p50),
    );
    add(
        "share of the time paused, under load",
        "ms",
        None,
        busy.pause_ms_p50,
        busy.epoch_ms_p50.max(busy.pause_ms_p50),
    );
    Ok(())
}

/// Pauses take at most this share of an idle guest's time.
const IDLE_SHARE: f64 = 0.05;

/// Starts an answerer on host B, asks it from host A, and lets it go.
async fn asked(stage: &Stage, kind: Kind, bytes: usize, count: u32, gap_ms: u64) -> Result<Vec<f64>> {
    let (word, port) = match kind {
        Kind::Quinn => ("quinn", 7901),
        Kind::Ours => ("ours", 7902),
        Kind::Tcp => ("tcp", 7903),
    };
    let to = SocketAddr::new(Stage::address(Host::B)?.into(), port).to_string();
    let dir = stage.dir().join("ends").display().to_string();
    let _server = stage.server("b", &["serve", "--kind", word, "--bind", &to, "--dir", &dir])?;
    let [bytes, count, gap] = [bytes.to_string(), count.to_string(), gap_ms.to_string()];
    let args = ["ask", "--kind", word, "--to", &to, "--dir", &dir];
    let more = ["--bytes", &bytes, "--count", &count, "--gap-ms", &gap];
    stage.worker("a", &[args.as_slice(), more.as_slice()].concat()).await
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a mean of lengths of epochs")]
fn whole(bytes: f64) -> usize {
    bytes.round() as usize
}
