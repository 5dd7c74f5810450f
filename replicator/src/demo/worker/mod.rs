//! What runs inside the client's namespace: this program, started again as `understudy demo worker ...`.
//!
//! Each worker answers in JSON, one line each, on its standard output. Its maker ends it by closing its standard input.

mod check;
mod clock;
mod load;
mod probe;
mod resp;
mod write;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

pub use check::Checked;
pub use clock::Ticked;
pub use load::Loaded;
pub use probe::{FIRST_REPLY, FirstReply, Prober};
pub use write::{ANSWER as WRITE_ANSWER, Started, Written};

/// Bound on opening a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// The workers.
#[derive(Debug, Clone, Subcommand)]
pub enum Worker {
    /// Wait until Redis answers PING.
    Ping {
        /// Redis.
        #[arg(long)]
        to: SocketAddr,
        /// For how long.
        #[arg(long)]
        seconds: u64,
    },
    /// Measure SET throughput.
    Load {
        /// Redis.
        #[arg(long)]
        to: SocketAddr,
        /// Connections.
        #[arg(long)]
        connections: u32,
        /// Requests in flight on each.
        #[arg(long, default_value_t = 1)]
        pipeline: u32,
        /// How long.
        #[arg(long)]
        seconds: u64,
    },
    /// Measure what the guest's clock loses.
    Clock {
        /// Redis.
        #[arg(long)]
        to: SocketAddr,
        /// Over how long.
        #[arg(long)]
        seconds: u64,
    },
    /// Write numbered keys over one connection until told to end.
    Write {
        /// Redis.
        #[arg(long)]
        to: SocketAddr,
        /// Distinguishes the keys of one round.
        #[arg(long)]
        tag: String,
    },
    /// Compare what is there with what was acknowledged.
    Check {
        /// Redis.
        #[arg(long)]
        to: SocketAddr,
        /// As given to the writer.
        #[arg(long)]
        tag: String,
        /// How many writes were acknowledged.
        #[arg(long)]
        acked: u64,
    },
    /// Ask for an ICMP echo each millisecond.
    Probe {
        /// The guest.
        #[arg(long)]
        to: Ipv4Addr,
    },
}

/// Runs a worker to its end.
///
/// # Errors
/// If it cannot do its work at all. What it measures goes to its answer.
pub(super) fn run(worker: Worker) -> Result<()> {
    if let Worker::Probe { to } = worker {
        return probe::run(to);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match worker {
            Worker::Ping { to, seconds } => ping(to, Duration::from_secs(seconds)).await,
            Worker::Load { to, connections, pipeline, seconds } => {
                load::run(to, connections, pipeline, Duration::from_secs(seconds)).await
            }
            Worker::Clock { to, seconds } => clock::run(to, Duration::from_secs(seconds)).await,
            Worker::Write { to, tag } => write::run(to, &tag).await,
            Worker::Check { to, tag, acked } => check::run(to, &tag, acked).await,
            Worker::Probe { .. } => unreachable!("answered above"),
        }
    })
}

/// Prints one answer.
fn say<T: Serialize>(answer: &T) -> Result<()> {
    // `println!` flushes at the line's end.
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}

async fn connect(to: SocketAddr) -> Result<resp::Connection> {
    match timeout(CONNECT, TcpStream::connect(to)).await {
        Ok(stream) => resp::Connection::new(stream.with_context(|| format!("cannot connect to {to}"))?),
        Err(_) => bail!("no connection to {to} within {CONNECT:?}"),
    }
}

/// Asks until Redis answers: it is booting, so every failure is looked over until `bound`.
async fn ping(to: SocketAddr, bound: Duration) -> Result<()> {
    let mut request = Vec::new();
    resp::request(&mut request, &[b"PING"]);
    let ask = async || -> Result<resp::Reply> {
        let mut connection = connect(to).await?;
        timeout(CONNECT, connection.ask(&request)).await.context("no answer in time")?
    };
    super::wait::until("Redis to answer PING", bound, async || {
        Ok(match ask().await {
            Ok(resp::Reply::Simple(text)) if text == "PONG" => Ok(()),
            other => Err(format!("{other:?}")),
        })
    })
    .await?;
    say(&"PONG")
}

/// The key of the numbered write `number`.
pub(super) fn key(tag: &str, number: u64) -> String {
    format!("write:{tag}:{number:010}")
}

/// What the pilot logs of the numbered write `number`.
#[must_use]
pub fn logged(tag: &str, number: u64) -> String {
    format!("{}={}", key(tag, number), value(tag, number))
}

/// What the numbered write `number` writes: differs from key to key.
fn value(tag: &str, number: u64) -> String {
    format!("{:016x}{tag}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
