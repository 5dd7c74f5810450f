//! Protections that end because somebody asked.

use anyhow::{Result, ensure};
use replicator::control::api::{EventKind, FailoverCause, Role, VmEvent};
use replicator::demo::lab::{COMMAND, Host, VM};
use replicator::demo::wait::until;

use crate::stage::{SOON, play};

#[test]
fn unprotected_as_it_was_found_and_protected_again() {
    play("unprotect", async |stage| {
        stage.set().await?;
        let found = stage.appearance().await?;
        let mut client = stage.writer("u").await?;
        stage.protect().await?;
        client.goes_on().await?;
        for host in [Host::A, Host::B] {
            let said = stage.lab.understudy(host, &["rehearse", VM], COMMAND).await?;
            ensure!(said.contains("loads"), "{said}");
        }
        let of_it = |host| Ok::<_, anyhow::Error>(stage.metrics(host)?.matches(&format!("vm=\"{VM}\"")).count());
        ensure!(of_it(Host::A)? > 20 && of_it(Host::B)? > 20, "the VM is in no metrics");
        stage.lab.understudy(Host::A, &["unprotect", VM], COMMAND).await?;
        for host in [Host::A, Host::B] {
            until(&format!("{} to export nothing of it any more", host.name()), SOON, async || {
                let left = of_it(host)?;
                Ok(if left == 0 { Ok(()) } else { Err(format!("{left} series")) })
            })
            .await?;
        }
        let left = stage.appearance().await?;
        left.has_nothing_of_ours()?;
        ensure!(left == found, "found {found:?}, left {left:?}");
        client.goes_on().await?;
        stage.until_b_is_clean().await?;

        stage.protect().await?;
        client.goes_on().await?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        stage.until_survivor().await?;
        stage.nothing_lost(client).await?;

        // Its whole life on this host, both protections, also when the agent was started again.
        stage.lab.kill_agent(Host::B).await?;
        stage.lab.start_agent(Host::B).await?;
        let said = stage.lab.understudy(Host::B, &["events", VM, "--json"], COMMAND).await?;
        let events: Vec<VmEvent> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let protected = events.iter().filter(|event| event.kind == EventKind::State && event.state == "protected");
        ensure!(protected.count() == 2, "{said}");
        ensure!(events.iter().filter(|event| event.kind == EventKind::Rehearsal).count() >= 4, "{said}");
        let failovers: Vec<&VmEvent> = events.iter().filter(|event| event.kind == EventKind::Failover).collect();
        ensure!(matches!(failovers[..], [event] if event.role == Role::Survivor && event.epoch > 0), "{said}");
        let said = stage.lab.understudy(Host::B, &["events", VM, "--last", "1"], COMMAND).await?;
        ensure!(said.lines().count() == 1 && said.contains("generation"), "{said}");
        Ok(())
    });
}

#[test]
fn a_guest_that_shuts_down_ends_everywhere_and_can_be_started_again() {
    play("guest's shutdown", async |stage| {
        stage.set_protected().await?;
        stage.lab.shut_redis_down().await?;
        stage.lab.vm_ended(SOON).await?;
        let status = stage.until_state(Host::A, "unprotected").await?;
        ensure!(status.reason.contains("shut down") && status.failover.is_none(), "{status:?}");
        // Nobody revives it.
        stage.until_b_is_clean().await?;
        let other = stage.status(Host::B).await?;
        ensure!(other.survivor.is_none() && other.failover.is_none(), "{other:?}");

        stage.lab.boot().await?;
        let client = stage.writer("d").await?;
        stage.protect().await?;
        stage.outlives_host_a(client).await.map(drop)
    });
}

#[test]
fn a_planned_failover_loses_nothing() {
    play("planned failover", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("p").await?;
        let said = stage.lab.understudy(Host::A, &["failover", VM, "--planned"], SOON).await?;
        ensure!(said.contains("runs on host-b now"), "{said}");
        client.goes_on().await?;
        stage.lab.vm_ended(SOON).await?;
        stage.until_state(Host::A, "fenced").await?;
        let survivor = stage.until_survivor().await?;
        ensure!(survivor.state.word() == "degraded", "{survivor:?}");
        let cause = survivor.failover.as_ref().map(|report| report.cause);
        ensure!(cause == Some(FailoverCause::Planned), "{survivor:?}");
        client.goes_on().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}
