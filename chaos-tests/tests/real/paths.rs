//! Two links between the hosts: what it takes to look dead.

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::ProtectionState;
use replicator::demo::lab::Host;
use replicator::demo::wait::until;

use crate::stage::{SOON, Stage, play_long};

/// The cable's path; 0 is the one through the switch.
const CABLE: usize = 1;

/// Waits until both agents say of each path to the other one whether they are heard there, in status and metrics.
async fn until_paths(stage: &Stage, expected: [bool; 2]) -> Result<()> {
    for host in [Host::A, Host::B] {
        until(&format!("{} to hear its peer on {expected:?}", host.name()), SOON, async || {
            let status = stage.lab.client(host).status().await?;
            let peer = status.peers.iter().find(|peer| peer.name == host.other().name()).context("not paired")?;
            let up: Vec<bool> = peer.paths.iter().map(|path| path.up).collect();
            let metrics = stage.metrics(host)?;
            let shown = expected.iter().enumerate().all(|(path, up)| {
                let series = format!("understudy_peer_path_up{{path=\"{path}\",peer=\"{}\"}} ", host.other().name());
                metrics.lines().any(|line| line.strip_prefix(series.as_str()) == Some(if *up { "1" } else { "0" }))
            });
            Ok(if up == expected && shown { Ok(()) } else { Err(format!("{:?}, in metrics: {shown}", peer.paths)) })
        })
        .await?;
    }
    Ok(())
}

/// No copy was ever activated on a host: the counters of all causes.
fn failovers(stage: &Stage, host: Host) -> Result<f64> {
    let metrics = stage.metrics(host)?;
    let counts = metrics.lines().filter(|line| line.starts_with("understudy_failovers_total{"));
    counts.map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<f64>().context("a count")).sum()
}

#[test]
fn one_link_of_two_that_fails_moves_nothing_and_both_are_a_partition() {
    play_long("one_link_of_two_that_fails_moves_nothing_and_both_are_a_partition", async |stage: &mut Stage| {
        stage.lab.lay_cable()?;
        stage.set().await?;
        stage.protect_for_good().await?;
        until_paths(stage, [true, true]).await?;
        let mut writer = stage.writer("links").await?;
        let first = stage.status(Host::A).await?;

        // The cable fails, and replication was on it: the VM stays, goes on, and is protected again over the switch.
        stage.lab.set_cable(false)?;
        until_paths(stage, [true, false]).await?;
        writer.goes_on().await?;
        let again = stage
            .until(Host::A, "that it is protected again", |status| {
                status.state == ProtectionState::Protected && status.generation > first.generation
            })
            .await?;
        stage.until_state(Host::B, "protected").await?;
        ensure!(failovers(stage, Host::B)? == 0.0, "a link of two failed, and the VM moved");
        let words = stage.lab.understudy(Host::A, &["status"], SOON).await?;
        ensure!(words.contains(&format!("host-b is not heard on path {CABLE} (10.78.0.2:7845)")), "{words}");

        // It is mended, and fails again, while replication is on the other one: nothing happens at all.
        stage.lab.set_cable(true)?;
        until_paths(stage, [true, true]).await?;
        stage.lab.set_cable(false)?;
        until_paths(stage, [true, false]).await?;
        writer.goes_on().await?;
        let same = stage.status(Host::A).await?;
        ensure!(same.state == ProtectionState::Protected && same.generation == again.generation, "{same:?}");
        stage.until(Host::A, "that it commits", |status| status.epoch_committed > same.epoch_committed).await?;

        // Both: host A cannot be told from a dead one.
        stage.lab.set_link(Host::A, false)?;
        let survivor = stage.until_survivor().await?;
        ensure!(survivor.generation > same.generation, "{survivor:?}");
        writer.goes_on().await?;
        stage.lab.set_link(Host::A, true)?;
        stage.lab.vm_ended(SOON).await?;
        stage.nothing_lost(writer).await?;
        until_paths(stage, [true, false]).await
    });
}
