//! A cluster of etcd in place of the witness: three members that ask for TLS and a password, some of which die when a host does.

use anyhow::{Context as _, ensure};
use chaos_tests::etcd::{self, Etcd, MEMBERS};
use replicator::control::api::{Role, VmStatus};
use replicator::demo::lab::Host;

use crate::stage::play_long;

#[test]
fn hosts_and_members_of_etcd_die_together_and_nothing_is_lost() {
    if let Some(missing) = etcd::missing() {
        println!("skipped: {missing}");
        return;
    }
    play_long("etcd: hosts die, and members with them", async |stage| {
        let mut etcd = Etcd::start(&stage.lab).await?;
        etcd.lock(&stage.lab)?;
        stage.lab.boot().await?;
        stage.lab.start_agent(Host::A).await?;
        stage.lab.start_agent(Host::B).await?;
        stage.lab.pair_hosts().await?;
        stage.protect_for_good().await?;
        let mut client = stage.writer("e").await?;

        // One member is dead already when the primary's host dies.
        let leader = etcd.leader(&stage.lab).await?;
        let follower = MEMBERS.into_iter().find(|member| *member != leader).context("there are three")?;
        etcd.kill(follower).await?;
        client.goes_on().await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        let survivor = stage.until_survivor().await?;
        ensure!(survivor.role == Role::Survivor || survivor.role == Role::Primary, "{survivor:?}");
        etcd.run(&stage.lab, follower)?;
        stage.stands_by_again(&mut client).await?;

        // The leader dies in the middle: the host that asks is granted the VM by its successor.
        let leader = etcd.leader(&stage.lab).await?;
        stage.lab.kill_host(Host::B)?;
        etcd.kill(leader).await?;
        client.goes_on().await?;
        let survives = |status: &VmStatus| status.survivor.is_some() && status.generation > survivor.generation;
        stage.until(Host::A, "that the VM runs here again", survives).await?;
        ensure!(etcd.leader(&stage.lab).await? != leader, "the dead member leads");
        stage.nothing_lost(client).await.map(drop)
    });
}
