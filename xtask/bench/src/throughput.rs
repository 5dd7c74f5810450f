//! SET throughput and latency: unprotected, with epochs of 25 ms, and with `auto`.
//!
//! One round measures each policy once in the same guest, next to an unprotected measurement; ratios are of one round. The
//! real agents protect and unprotect between them, so the guest's age, its data and the machine's mood hit all alike.

use anyhow::{Context as _, Result};
use replicator::demo::worker::Loaded;

use crate::row::{Better, Pairs, Report};
use crate::stage::Stage;

/// What is promised of 50 connections with `auto`.
const BUDGET: f64 = 0.6;
/// Each count of connections, and whether a quick run measures it in every round.
const CONNECTIONS: [(u32, bool); 3] = [(50, true), (10, false), (1, false)];
const POLICIES: [&str; 2] = ["auto", "25ms"];

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) rounds: u32,
    pub(crate) seconds: u64,
    /// 50 connections alone, and these policies of the two.
    pub(crate) many_only: bool,
}

#[derive(Default)]
struct Series {
    throughput: Pairs,
    p50: Pairs,
    p99: Pairs,
}

impl Series {
    fn push(&mut self, protected: &Loaded, unprotected: &Loaded) {
        self.throughput.push(protected.ops_per_s, unprotected.ops_per_s);
        self.p50.push(protected.p50_ms, unprotected.p50_ms);
        self.p99.push(protected.p99_ms, unprotected.p99_ms);
    }
}

/// Measures, in a laboratory whose VM is not protected. It is not afterwards.
pub(crate) async fn measure(stage: &Stage, plan: Plan, quick: bool, report: &mut Report) -> Result<()> {
    println!("SET throughput: {} rounds of {} s", plan.rounds, plan.seconds);
    let mut series: [[Series; 3]; 2] = Default::default();
    for round in 0..plan.rounds {
        let wanted: Vec<(usize, u32)> = CONNECTIONS
            .iter()
            .enumerate()
            .filter(|(_, (_, always))| *always || !(plan.many_only || quick && round > 0))
            .map(|(at, (connections, _))| (at, *connections))
            .collect();
        for (policy, series) in POLICIES.iter().zip(&mut series) {
            if plan.many_only && *policy != "auto" {
                continue;
            }
            // Before and after in turn, so that a drift of the guest or the machine cancels out.
            let unprotected_first = round % 2 == 0;
            let mut unprotected = Vec::new();
            if unprotected_first {
                unprotected = loads(stage, &wanted, plan.seconds).await.context("unprotected")?;
            }
            stage.protect(policy).await?;
            let protected = loads(stage, &wanted, plan.seconds).await.context("protected")?;
            stage.unprotect().await?;
            if !unprotected_first {
                unprotected = loads(stage, &wanted, plan.seconds).await.context("unprotected")?;
            }
            for (((at, connections), protected), unprotected) in wanted.iter().zip(&protected).zip(&unprotected) {
                let (with, without) = (protected.ops_per_s, unprotected.ops_per_s);
                println!(
                    "  round {}, {policy}, {connections}: {with:.0} of {without:.0}: {:.3}",
                    round + 1,
                    with / without
                );
                series[*at].push(protected, unprotected);
            }
        }
    }
    for (policy, series) in POLICIES.iter().zip(&series) {
        for ((connections, _), series) in CONNECTIONS.iter().zip(series) {
            let promised = *connections == 50 && *policy == "auto";
            if plan.many_only && !promised {
                continue;
            }
            let name = |what| format!("redis SET {what}, {connections} connections, {policy}");
            let budget = promised.then_some(BUDGET);
            report.add(&name("throughput"), "SET/s", Better::Higher, budget, &series.throughput);
            report.add(&name("latency p50"), "ms", Better::Lower, None, &series.p50);
            report.add(&name("latency p99"), "ms", Better::Lower, None, &series.p99);
        }
    }
    Ok(())
}

async fn loads(stage: &Stage, wanted: &[(usize, u32)], seconds: u64) -> Result<Vec<Loaded>> {
    let mut all = Vec::new();
    for (_, connections) in wanted {
        all.push(stage.load(*connections, seconds).await?);
    }
    Ok(all)
}
