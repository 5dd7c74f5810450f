//! SET throughput: many connections, one request in flight on each or several, as `redis-benchmark -t set -P` does it.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::resp::{Reply, request};
use super::{connect, say};

/// How many different keys are written.
const KEYS: u64 = 10_000;
/// Not counted at the start.
const WARM_UP: Duration = Duration::from_secs(1);
/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Loaded {
    /// Acknowledged SETs per second.
    pub ops_per_s: f64,
    /// From sending a SET, or those that go together, to the last answer, median.
    pub p50_ms: f64,
    /// The same, 99th percentile.
    pub p99_ms: f64,
}

/// Measures for `length` after a warm-up and answers with [`Loaded`].
///
/// # Errors
/// If a connection fails or Redis refuses a SET.
pub(super) async fn run(to: SocketAddr, connections: u32, pipeline: u32, length: Duration) -> Result<()> {
    let done = Rc::new(RefCell::new(Vec::<Duration>::new()));
    let opened = {
        let mut all = Vec::new();
        for _ in 0..connections {
            all.push(connect(to).await?);
        }
        all
    };
    let local = LocalSet::new();
    let begin = Instant::now() + WARM_UP;
    let end = begin + length;
    let tasks: Vec<_> = (0_u64..)
        .zip(opened)
        .map(|(seed, mut connection)| {
            let done = Rc::clone(&done);
            local.spawn_local(async move {
                let mut number = seed.wrapping_mul(7_919);
                let mut bytes = Vec::new();
                loop {
                    bytes.clear();
                    for _ in 0..pipeline {
                        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        request(&mut bytes, &[b"SET", format!("key:{:012}", (number >> 33) % KEYS).as_bytes(), b"xyz"]);
                    }
                    let asked = Instant::now();
                    let mut reply = timeout(ANSWER, connection.ask(&bytes)).await.context("no answer in time")??;
                    for more in (0..pipeline).rev() {
                        if reply != Reply::Simple("OK".to_owned()) {
                            bail!("Redis answered {reply:?} to SET");
                        }
                        if more > 0 {
                            reply = timeout(ANSWER, connection.reply()).await.context("no answer in time")??;
                        }
                    }
                    let now = Instant::now();
                    if now >= end {
                        return Ok(());
                    }
                    if now >= begin {
                        done.borrow_mut().push(now - asked);
                    }
                }
            })
        })
        .collect();
    local
        .run_until(async {
            for task in tasks {
                task.await.context("a connection's task ended badly")??;
            }
            anyhow::Ok(())
        })
        .await?;
    let mut took = done.take();
    took.sort_unstable();
    #[expect(clippy::cast_precision_loss, reason = "a count of seconds' worth of requests is far below 2^52")]
    let ops_per_s = took.len() as f64 * f64::from(pipeline) / length.as_secs_f64();
    let ms = |percent| percentile(&took, percent).as_secs_f64() * 1e3;
    say(&Loaded { ops_per_s, p50_ms: ms(50), p99_ms: ms(99) })
}

/// The smallest value that at least `percent` of the sorted values do not exceed; nothing of nothing.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&values, 50), Duration::from_millis(100));
        assert_eq!(percentile(&values, 99), Duration::from_millis(198));
        assert_eq!(percentile(&values[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
