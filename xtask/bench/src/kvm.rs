//! The microVM with its pilot: the pause and its parts by dirty pages, epochs a second, and what a client sees.
//!
//! The client, the throughput and the failover are measured on real agents, as for QEMU. A microVM without a disk: what a standby's
//! disk takes to sync is the disk's, not the microVM's.

use anyhow::{Context as _, Result};
use replicator::control::api::EpochSummary;
use replicator::demo::worker::Loaded;
use vmm_hooks::kvm::host;

use crate::row::{Better, Pairs, Report};
use crate::stage::{Means, Stage};
use crate::{failover, kvm_pause};

/// A protected client's latency: so many times the unprotected one, and this many milliseconds.
const TIMES: f64 = 4.0;
const BEYOND_MS: f64 = 0.3;
/// The part of the throughput that is kept with many requests in flight.
const KEPT: f64 = 0.8;
/// Connections, and requests in flight on each.
const MANY: (u32, u32) = (50, 16);
/// What a failover may take beyond its detection.
const BEYOND_DETECTION_MS: f64 = 10.0;

/// What this machine lacks, if anything.
pub(crate) fn lacking(means: &Means) -> Option<String> {
    match host() {
        Err(error) => Some(error.message),
        Ok(_) if !means.pilot.is_file() => Some("the pilot guest is not built: `cargo xtask setup`".to_owned()),
        Ok(_) => None,
    }
}

/// Its pause, and its epochs a second.
pub(crate) async fn pause(means: &Means, report: &mut Report) -> Result<()> {
    let (pilot, understudy) = (means.pilot.canonicalize()?, means.understudy.canonicalize()?);
    let quick = means.quick;
    let measured = tokio::task::spawn_blocking(move || kvm_pause::measure(&pilot, &understudy, quick));
    kvm_pause::rows(&measured.await.context("the measuring thread failed")??, report);
    Ok(())
}

/// Its failover.
pub(crate) async fn failover(means: &Means, report: &mut Report) -> Result<()> {
    let rounds = if means.quick { 1 } else { 5 };
    println!("failover of a microVM: {rounds} times");
    let mut all = Vec::new();
    for number in 0..rounds {
        let stage = Stage::microvm(means, &format!("kvm-failover{number}")).await?;
        stage.protect("auto").await?;
        all.push(failover::one(stage).await?);
    }
    failover::rows("kvm ", BEYOND_DETECTION_MS, &all, report);
    Ok(())
}

/// Latency of one client and throughput of many, unprotected and protected in turn.
pub(crate) async fn clients(means: &Means, report: &mut Report) -> Result<()> {
    let (rounds, seconds) = if means.quick { (1, 2) } else { (4, 4) };
    println!("clients of a microVM: {rounds} rounds");
    let stage = Stage::microvm(means, "kvm").await?;
    let measured = async {
        let (mut one, mut many, mut some) = (Pairs::default(), Pairs::default(), Pairs::default());
        let (mut p50, mut plain) = (Pairs::default(), Pairs::default());
        for _ in 0..rounds {
            let (connections, pipeline) = MANY;
            let alone = stage.load(1, seconds).await.context("unprotected")?;
            let crowd = stage.pipelined(connections, pipeline, seconds).await.context("unprotected")?;
            let single = stage.load(connections, seconds).await.context("unprotected")?;
            stage.protect("auto").await?;
            let protected = stage.load(1, seconds).await.context("protected")?;
            said("1 connection", &protected, &stage.epochs().await?);
            one.push(protected.p50_ms, TIMES * alone.p50_ms + BEYOND_MS);
            p50.push(protected.p50_ms, alone.p50_ms);
            let with = stage.pipelined(connections, pipeline, seconds).await.context("protected")?;
            said("many in flight", &with, &stage.epochs().await?);
            many.push(with.ops_per_s, crowd.ops_per_s);
            let with = stage.load(connections, seconds).await.context("protected")?;
            let epochs = stage.epochs().await?;
            said("many connections", &with, &epochs);
            some.push(with.ops_per_s, single.ops_per_s);
            plain.push(epochs.commit_ms_p50, epochs.pause_ms_p50);
            stage.unprotect().await?;
        }
        let latency = "kvm SET latency p50, 1 connection, auto, against 4 x unprotected + 300 us";
        report.add(latency, "ms", Better::Lower, Some(1.0), &one);
        report.add("kvm SET latency p50, 1 connection, auto", "ms", Better::Lower, None, &p50);
        let throughput = "kvm SET throughput, 50 connections with 16 in flight on each, auto";
        report.add(throughput, "SET/s", Better::Higher, Some(KEPT), &many);
        report.add("kvm SET throughput, 50 connections, auto", "SET/s", Better::Higher, None, &some);
        report.add("kvm commit against pause, under load", "ms", Better::Lower, None, &plain);
        anyhow::Ok(())
    };
    let measured = measured.await;
    stage.explained(measured).await
}

/// The last epochs under a load, and what it saw.
fn said(load: &str, loaded: &Loaded, epochs: &EpochSummary) {
    println!(
        "  {load}: {:.0} SET/s, {:.2} ms (99 %: {:.2}); epochs of {:.2} ms, pause {:.3} ms (99 %: {:.3}), commit {:.3} ms (99 %: {:.3}), \
         {} pages",
        loaded.ops_per_s,
        loaded.p50_ms,
        loaded.p99_ms,
        epochs.epoch_ms_p50,
        epochs.pause_ms_p50,
        epochs.pause_ms_p99,
        epochs.commit_ms_p50,
        epochs.commit_ms_p99,
        epochs.dirty_pages_p50
    );
}
