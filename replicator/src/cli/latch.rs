//! `understudy may-start`: waits until somebody says whether a VM may be booted from its disks.

use std::path::absolute;
use std::time::{Duration, Instant};

use super::args::MayStartArgs;
use super::commands::print;
use super::config;
use super::exit::{CliError, Exit};
use crate::agent::latch_without_agent;
use crate::control::api::ErrorKind;
use crate::control::client::{Client, ClientError};
use crate::control::latch::MayStartRequest;

/// Time between two questions.
const AGAIN: Duration = Duration::from_millis(500);

/// Asks until there is an answer, or the time is over. Without an agent it is a no for what this host remembers as protected, and a yes for all else.
pub(super) async fn may_start(args: MayStartArgs, client: &Client) -> Result<Exit, CliError> {
    let MayStartArgs { vm, images, release, wait, state_dir } = args;
    let images =
        images.iter().map(absolute).collect::<Result<_, _>>().map_err(|error| CliError::of(Exit::Usage, &error))?;
    let request = MayStartRequest { vm, images, release };
    let deadline = Instant::now() + wait;
    loop {
        let error = match client.may_start(&request).await {
            Ok(answer) => {
                print(&format!("yes: {}\n", answer.reason))?;
                return Ok(Exit::Ok);
            }
            Err(error) => error,
        };
        let busy = matches!(&error, ClientError::Agent(body) if body.kind == ErrorKind::Busy);
        let error = CliError::from(error);
        let may_change = busy || matches!(error.exit, Exit::NoAgent | Exit::Unavailable | Exit::Failed);
        let over = Instant::now() >= deadline;
        if error.exit == Exit::NoAgent {
            let state_dir = match &state_dir {
                Some(dir) => dir.clone(),
                None => config::agent(None, config::AgentOverrides::default())?.state_dir,
            };
            match latch_without_agent(&state_dir, &request) {
                None => {
                    print("yes: no agent answers, and no VM that was ever protected here is meant\n")?;
                    return Ok(Exit::Ok);
                }
                Some(message) if over => return Err(CliError { message, ..error }),
                Some(_) => {}
            }
        }
        if !may_change || over {
            return Err(error);
        }
        tokio::time::sleep(AGAIN).await;
    }
}
