//! Three hosts: the VM is protected again by whoever is left, whatever is cut between whichever two of them, and a history of its clients over
//! all of it is one of a VM that was never moved.

use anyhow::{Context as _, Result, bail, ensure};
use chaos_tests::chaos::linear::{self, Operation};
use chaos_tests::chaos::workload::Workload;
use replicator::control::api::{ProtectionState, Role, VmStatus};
use replicator::demo::lab::{Host, REDIS, VM};
use replicator::demo::wait::until;

use crate::stage::{SOON, Stage, play_long};

const HOSTS: [Host; 3] = [Host::A, Host::B, Host::C];

/// Clients, by phases: each phase has keys of its own.
struct Clients {
    workload: Workload,
    round: u64,
    history: Vec<Operation>,
}

impl Clients {
    fn start(stage: &Stage) -> Result<Self> {
        let workload = Workload::start(&stage.lab.namespace("c"), REDIS, 3)?;
        workload.go(1);
        Ok(Self { workload, round: 1, history: Vec::new() })
    }

    /// Each of them is answered some times more.
    async fn go_on(&self) -> Result<()> {
        let before = self.workload.answered();
        until("every client to be answered again", SOON, async || {
            let now = self.workload.answered();
            let all = now.iter().zip(before).all(|(now, before)| *now > before + 3);
            Ok(if all { Ok(()) } else { Err(format!("{now:?} after {before:?}")) })
        })
        .await
    }

    /// They go on with other keys; what they were told of these is kept for the judgement.
    async fn next(&mut self) -> Result<()> {
        self.rest().await?;
        self.round += 1;
        self.workload.go(self.round);
        self.go_on().await
    }

    async fn rest(&mut self) -> Result<()> {
        self.workload.pause();
        until("the clients to rest", SOON, async || {
            Ok(if self.workload.idle() { Ok(()) } else { Err("a question is under way".to_owned()) })
        })
        .await?;
        let (history, broken) = self.workload.take();
        ensure!(broken.is_empty(), "connections broke: {broken:?}");
        self.history.extend(history);
        Ok(())
    }

    /// No answer contradicts another one, and what is there at the end contradicts none.
    async fn judge(mut self) -> Result<()> {
        self.rest().await?;
        self.history.extend(self.workload.read_all(1..=self.round)?);
        // Each of the clients, in each phase: before, across and after what happens in it.
        let least = 30 * self.round;
        ensure!(self.history.len() as u64 > least, "only {} operations", self.history.len());
        linear::check(&self.history).map_err(|found| anyhow::anyhow!("not linearizable: {found}"))
    }
}

/// What a host says of the VM, if it knows it and can be asked.
async fn asked(stage: &Stage, host: Host) -> Option<VmStatus> {
    stage.lab.client(host).vm_status(VM).await.ok()
}

/// Waits until one host runs the VM and another one protects it; which two.
async fn protected(stage: &Stage) -> Result<(Host, Host)> {
    until("the VM to be protected", SOON, async || {
        let (mut runs, mut stands_by, mut seen) = (None, None, Vec::new());
        for host in HOSTS {
            let Some(status) = asked(stage, host).await else { continue };
            seen.push(format!("{} as {}: {} {}", host.name(), status.role.word(), status.state, status.reason));
            if status.state == ProtectionState::Protected {
                *(if status.role == Role::Standby { &mut stands_by } else { &mut runs }) = Some((host, status.peer));
            }
        }
        // Each of the two says so, and says it of the other one.
        Ok(match (runs, stands_by) {
            (Some((one, to)), Some((two, from))) if to == two.name() && from == one.name() => Ok((one, two)),
            _ => Err(seen.join("; ")),
        })
    })
    .await
}

/// A VM on host A, three agents and a witness, all paired; protected by host B, with host C beside it.
async fn set(stage: &mut Stage) -> Result<()> {
    stage.lab.add_host_c()?;
    stage.set().await?;
    stage.lab.start_agent(Host::C).await?;
    stage.lab.pair_witness(Host::C).await?;
    for host in [Host::A, Host::B] {
        stage.lab.pair_two(host, Host::C).await?;
    }
    stage.protect_with(&["--standby", Host::C.name()]).await
}

/// Host A dies: host B runs the VM, and finds host C to protect it.
async fn a_dies(stage: &mut Stage) -> Result<Clients> {
    set(stage).await?;
    let mut clients = Clients::start(stage)?;
    clients.go_on().await?;
    stage.lab.kill_host_a().await?;
    clients.go_on().await?;
    let pair = protected(stage).await?;
    ensure!(pair == (Host::B, Host::C), "{pair:?}");
    clients.next().await?;
    Ok(clients)
}

#[test]
fn a_survivor_is_protected_by_the_third_host() {
    play_long("three hosts: A dies", async |stage| a_dies(stage).await?.judge().await);
}

#[test]
fn the_vm_goes_from_host_to_host_as_each_of_them_dies() {
    play_long("three hosts: A dies, then B", async |stage| {
        let mut clients = a_dies(stage).await?;
        stage.lab.kill_host(Host::B)?;
        clients.go_on().await?;
        stage.until(Host::C, "that the VM runs here", |status| status.survivor.is_some()).await?;
        clients.next().await?;
        stage.lab.raise_host(Host::B).await?;
        let pair = protected(stage).await?;
        ensure!(pair == (Host::C, Host::B), "{pair:?}");
        clients.next().await?;
        clients.judge().await
    });
}

#[test]
fn what_is_cut_between_any_two_of_three_hosts_loses_nothing() {
    play_long("three hosts: each way between each two is cut", async |stage| {
        set(stage).await?;
        let mut clients = Clients::start(stage)?;
        clients.go_on().await?;
        for (one, two) in [(Host::A, Host::B), (Host::B, Host::C), (Host::C, Host::A)] {
            for (from, to) in [(one, two), (two, one)] {
                let cut = async {
                    let (runs, stands_by) = protected(stage).await?;
                    let concerned = [runs, stands_by].contains(&from) && [runs, stands_by].contains(&to);
                    stage.lab.set_way(from, to, false)?;
                    // The pair that it is between is no pair any more: whoever has the VM finds the third host.
                    if concerned {
                        until("the pair to be another one", SOON, async || {
                            let now = protected(stage).await?;
                            Ok(if now == (runs, stands_by) { Err(format!("{now:?}")) } else { Ok(()) })
                        })
                        .await?;
                    }
                    clients.go_on().await?;
                    stage.lab.set_way(from, to, true)?;
                    protected(stage).await?;
                    clients.next().await
                };
                cut.await.with_context(|| format!("the way from {} to {} was cut", from.name(), to.name()))?;
            }
        }
        if clients.round != 7 {
            bail!("{} rounds", clients.round);
        }
        clients.judge().await
    });
}
