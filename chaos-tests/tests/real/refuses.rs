//! What is refused: with an exit code of its own and in one sentence.

use anyhow::{Result, ensure};
use replicator::demo::lab::{COMMAND, Host, VM};

use crate::stage::{Stage, play};

/// Runs a command that must fail: with this code, these words in its first line, and nothing on standard output.
pub(crate) async fn refused(stage: &Stage, host: Host, args: &[&str], code: i32, words: &str) -> Result<()> {
    let ended = stage.lab.try_understudy(host, args, COMMAND).await?;
    let first = ended.err.lines().next().unwrap_or_default();
    ensure!(
        ended.code == Some(code) && first.starts_with("error: ") && first.contains(words) && ended.out.is_empty(),
        "expected code {code} and `{words}` of {args:?}: {ended:?}"
    );
    Ok(())
}

#[test]
fn what_cannot_be_done_is_refused_in_words() {
    play("refusals", async |stage| {
        stage.lab.boot().await?;
        stage.lab.start_daemons().await?;
        let vm = stage.vm()?;
        let found = stage.appearance().await?;
        let protect = ["protect", vm.as_str(), "--to", "host-b"];
        refused(stage, Host::A, &protect, 7, "host-b").await?;
        refused(stage, Host::A, &["unprotect", "nobody"], 5, "nobody").await?;
        refused(stage, Host::A, &["failover", "nobody"], 5, "nobody").await?;
        stage.lab.pair_hosts().await?;
        refused(stage, Host::A, &protect, 7, "witness").await?;
        let window =
            stage.lab.client(Host::B).pair_open(&replicator::control::api::PairOpenRequest { ttl_s: 60 }).await?;
        let wrong = if window.code.starts_with('2') {
            window.code.replacen('2', "3", 1)
        } else {
            format!("2{}", &window.code[1..])
        };
        refused(stage, Host::A, &["pair", Host::B.address(), "--code", &wrong], 6, "pairing").await?;
        for host in [Host::A, Host::B] {
            stage.lab.pair_witness(host).await?;
        }
        refused(stage, Host::A, &["protect", vm.as_str(), "--to", "nobody"], 7, "nobody").await?;
        refused(stage, Host::A, &["protect", vm.as_str(), "--to", "witness"], 3, "witness").await?;
        let left = stage.appearance().await?;
        ensure!(left == found, "a refusal changed the VM: found {found:?}, left {left:?}");
        stage.protect().await?;
        refused(stage, Host::A, &protect, 3, "protected already").await?;
        refused(stage, Host::B, &["unprotect", VM], 3, "").await?;
        refused(stage, Host::A, &["failover", VM], 3, "runs here").await?;
        refused(stage, Host::B, &["failover", VM, "--planned"], 3, "does not run on this host").await?;
        stage.lab.understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        // Asked again it is done already: that is no error.
        stage.lab.understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        stage.appearance().await?.has_nothing_of_ours()
    });
}
