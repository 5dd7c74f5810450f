//! How much the guest's clock loses against this machine's, by Redis' TIME.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::resp::{Connection, Reply, request};
use super::{connect, say};

/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ticked {
    /// The part of the time that the guest's clock lost, in percent; below 0 if it gained.
    pub lost_percent: f64,
}

/// Compares the clocks over `length` and answers with [`Ticked`].
///
/// # Errors
/// If Redis does not tell the time.
pub(super) async fn run(to: SocketAddr, length: Duration) -> Result<()> {
    let mut connection = connect(to).await?;
    // The first answer takes what is not there yet: an address to resolve, a page to load.
    look(&mut connection).await?;
    let (begun, first) = look(&mut connection).await?;
    // The time that passes is what is measured: there is no condition to wait for.
    tokio::time::sleep(length).await;
    let (ended, last) = look(&mut connection).await?;
    let here = ended.duration_since(begun).as_secs_f64();
    say(&Ticked { lost_percent: (1.0 - (last - first) / here) * 100.0 })
}

/// When it was asked, and the guest's time in seconds. The answer may be held for a while, the question is not.
async fn look(connection: &mut Connection) -> Result<(Instant, f64)> {
    let mut bytes = Vec::new();
    request(&mut bytes, &[b"TIME"]);
    let asked = Instant::now();
    let reply = timeout(ANSWER, connection.ask(&bytes)).await.context("no answer in time")??;
    let Reply::List(parts) = &reply else { bail!("Redis answered {reply:?} to TIME") };
    let number = |at: usize| -> Option<f64> { str::from_utf8(parts.get(at)?.as_ref()?).ok()?.parse().ok() };
    match (number(0), number(1)) {
        (Some(seconds), Some(micros)) => Ok((asked, seconds + micros / 1e6)),
        _ => bail!("Redis answered {reply:?} to TIME"),
    }
}
