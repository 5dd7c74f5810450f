//! Compares what the survivor holds with what the client was promised.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::resp::{Connection, Reply, request};
use super::{CONNECT, connect, key, say, value};

/// Keys asked for at once.
const BATCH: u64 = 500;
/// How many lost writes are named.
const NAMED: usize = 10;

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checked {
    /// Acknowledged writes that are not there, or not as they were written.
    pub lost: u64,
    /// The first of them.
    pub first_lost: Vec<u64>,
}

/// Checks the writes `0..acked` over a new connection and answers with [`Checked`].
///
/// # Errors
/// If Redis cannot be asked.
pub(super) async fn run(to: SocketAddr, tag: &str, acked: u64) -> Result<()> {
    say(&compare(&mut connect(to).await?, tag, acked).await?)
}

pub(super) async fn compare(connection: &mut Connection, tag: &str, acked: u64) -> Result<Checked> {
    let mut checked = Checked { lost: 0, first_lost: Vec::new() };
    let mut from = 0;
    while from < acked {
        let batch = from..acked.min(from + BATCH);
        let keys: Vec<String> = batch.clone().map(|number| key(tag, number)).collect();
        let mut words: Vec<&[u8]> = vec![b"MGET"];
        words.extend(keys.iter().map(|key| key.as_bytes()));
        let mut bytes = Vec::new();
        request(&mut bytes, &words);
        let reply = timeout(CONNECT, connection.ask(&bytes)).await.context("no answer to MGET in time")??;
        let Reply::List(found) = reply else { bail!("Redis answered {reply:?} to MGET") };
        if found.len() != keys.len() {
            bail!("Redis answered with {} values to MGET of {}", found.len(), keys.len());
        }
        for (number, found) in batch.clone().zip(found) {
            if found.as_deref() != Some(value(tag, number).as_bytes()) {
                checked.lost += 1;
                if checked.first_lost.len() < NAMED {
                    checked.first_lost.push(number);
                }
            }
        }
        from = batch.end;
    }
    Ok(checked)
}
