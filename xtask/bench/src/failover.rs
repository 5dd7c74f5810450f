//! A failover, split into its parts: detection, grant, activation, first frame.
//!
//! Host A is killed while a client writes; a prober asks the guest each millisecond. The survivor's agent says when it
//! suspected, read its grant and ran; all instants are of one machine's monotonic clock.

use std::time::Duration;

use anyhow::{Context as _, Result};
use replicator::control::api::FailoverReport;
use replicator::demo::lab::{COMMAND, Host, Machine, REDIS, VM};
use replicator::demo::process::Helper;
use replicator::demo::wait::{now_ns, until};
use replicator::demo::worker::{FIRST_REPLY, FirstReply, Started, WRITE_ANSWER};

use crate::row::{Better, Pairs, Report};
use crate::stage::{Means, Stage, let_run, signed_ms};

/// What a failover may take beyond its detection.
const BEYOND_DETECTION_MS: f64 = 50.0;
/// How long the client writes before the kill.
const WRITES: Duration = Duration::from_secs(2);
/// Bound on the survivor's report.
const REPORT: Duration = Duration::from_secs(30);

/// One failover's parts in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    detection: f64,
    grant: f64,
    activation: f64,
    first_frame: f64,
    total: f64,
}

/// Measures one failover in `stage` and more in laboratories of their own.
pub(crate) async fn measure(stage: Stage, means: &Means, report: &mut Report) -> Result<()> {
    let more = if means.quick { 0 } else { 4 };
    println!("failover: {} times", more + 1);
    let mut all = vec![one(stage).await?];
    for number in 0..more {
        let stage = Stage::full(means, &format!("failover{number}"), &Machine::default()).await?;
        stage.protect("auto").await?;
        all.push(one(stage).await?);
    }
    rows("", BEYOND_DETECTION_MS, &all, report);
    Ok(())
}

/// The rows of these failovers of VMs of one kind, which may take `beyond` milliseconds more than their detection.
pub(crate) fn rows(kind: &str, beyond: f64, all: &[Parts], report: &mut Report) {
    let mut add = |name: &str, budget, value: &dyn Fn(&Parts) -> f64, baseline: &dyn Fn(&Parts) -> f64| {
        let mut pairs = Pairs::default();
        all.iter().for_each(|parts| pairs.push(value(parts), baseline(parts)));
        report.add(&format!("{kind}failover{name}"), "ms", Better::Lower, budget, &pairs);
    };
    let total = |parts: &Parts| parts.total;
    let name = format!(", kill to first reply, against detection + {beyond} ms");
    add(&name, Some(1.0), &total, &|parts| parts.detection + beyond);
    add(": detection, of the whole", None, &|parts| parts.detection, &total);
    add(": grant, of the whole", None, &|parts| parts.grant, &total);
    add(": activation, of the whole", None, &|parts| parts.activation, &total);
    add(": first frame after the survivor ran, of the whole", None, &|parts| parts.first_frame, &total);
}

/// Kills host A of a protected VM.
pub(crate) async fn one(mut stage: Stage) -> Result<Parts> {
    let to = REDIS.to_string();
    let mut writer = stage.lab.helper("the writing client", &["write", "--to", &to, "--tag", "bench"])?;
    let mut prober = stage.lab.helper("the prober", &["probe", "--to", &REDIS.ip().to_string()])?;
    writer.answer::<Started>(WRITE_ANSWER).await?;
    first_reply(&mut prober, now_ns()).await.context("before the kill")?;
    let_run(WRITES).await;
    let death = stage.lab.kill_host_a().await?;
    let reply = first_reply(&mut prober, death.over_ns).await.context("after the kill")?;
    prober.end();
    let client = stage.lab.client(Host::B);
    let report: FailoverReport = until("host-b to report its failover as complete", REPORT, async || {
        let status = client.vm_status(VM).await.context("asking host-b after the failover")?;
        let seen = format!("{}: {}", status.state, status.reason);
        Ok(status.failover.filter(|report| report.activation_ms.is_some()).ok_or(seen))
    })
    .await?;
    let granted = report.granted_monotonic_ns.context("the report has no grant")?;
    let running = report.running_monotonic_ns.context("the report has no end")?;
    Ok(Parts {
        detection: signed_ms(death.begun_ns, report.detected_monotonic_ns),
        grant: signed_ms(report.detected_monotonic_ns, granted),
        activation: signed_ms(granted, running),
        first_frame: signed_ms(running, reply),
        total: signed_ms(death.begun_ns, reply),
    })
}

/// When the first reply to a probe came that was sent after `after_ns`.
async fn first_reply(prober: &mut Helper, after_ns: u64) -> Result<u64> {
    prober.tell(&after_ns.to_string()).await?;
    let reply: FirstReply = prober.answer(FIRST_REPLY + COMMAND).await?;
    reply.received_ns.with_context(|| format!("the guest answered no probe within {FIRST_REPLY:?}"))
}
