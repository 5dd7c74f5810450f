//! SET throughput: many connections, one request in flight on each, as `redis-benchmark -t set` does it.

use std::cell::Cell;
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
}

/// Measures for `length` after a warm-up and answers with [`Loaded`].
///
/// # Errors
/// If a connection fails or Redis refuses a SET.
pub(super) async fn run(to: SocketAddr, connections: u32, length: Duration) -> Result<()> {
    let done = Rc::new(Cell::new(0_u64));
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
                    number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    bytes.clear();
                    request(&mut bytes, &[b"SET", format!("key:{:012}", (number >> 33) % KEYS).as_bytes(), b"xyz"]);
                    let reply = timeout(ANSWER, connection.ask(&bytes)).await.context("no answer in time")??;
                    if reply != Reply::Simple("OK".to_owned()) {
                        bail!("Redis answered {reply:?} to SET");
                    }
                    let now = Instant::now();
                    if now >= end {
                        return Ok(());
                    }
                    if now >= begin {
                        done.set(done.get() + 1);
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
    #[expect(clippy::cast_precision_loss, reason = "a count of seconds' worth of requests is far below 2^52")]
    let ops_per_s = done.get() as f64 / length.as_secs_f64();
    say(&Loaded { ops_per_s })
}
