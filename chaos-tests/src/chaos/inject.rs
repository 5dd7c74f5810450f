//! How each fault is done.
//!
//! Promise: when [`Fault::inject`] returns without an error the fault has really happened, which it has looked at itself, and is
//! over: every process that was killed was started again, every one that was stopped goes on, every link is whole.

use anyhow::{Result, ensure};
use replicator::control::api::{FailoverRequest, ProtectionState, Role};
use replicator::demo::lab::{GUEST, Host, REDIS, VM};
use replicator::demo::wait::until;
use rustix::process::Signal;

use super::fault::Fault;
use super::fault::Side::{Primary, Standby};
use super::field::{Field, PHASE, SOON, process_state, signal};
use super::guest::{ask_to_reboot, boot_again, redis_life, shut_down};

/// How often a slow disk hangs.
const SLOW_TIMES: usize = 20;

impl Fault {
    /// See the module.
    ///
    /// # Errors
    /// If it could not be done, or what it did could not be ended.
    pub async fn inject(self, field: &mut Field<'_>) -> Result<()> {
        match self {
            Self::KillAgent(side) => {
                let host = field.host(side);
                field.kill_agent(host).await?;
                field.hold().await;
                field.start_agent(host).await
            }
            Self::StopAgent(side) => {
                let host = field.host(side);
                let pid = field.lab.agent_pid(host)?;
                field.stop_and_go(&format!("the agent of {}", host.name()), pid).await
            }
            Self::RestartAgent(side) => {
                let host = field.host(side);
                field.note(format!("the agent of {} is told to end", host.name()));
                field.lab.stop_agent(host).await?;
                field.start_agent(host).await
            }
            Self::KillQemu(side) => {
                let host = field.host(side);
                let pid = field.qemu(host)?;
                field.note(format!("SIGKILL to the QEMU of {}", host.name()));
                signal(pid, Signal::KILL)?;
                until("the QEMU to end", SOON, async || {
                    let there = process_state(pid).is_ok_and(|state| state != 'Z');
                    Ok(if there { Err("it is there".to_owned()) } else { Ok(()) })
                })
                .await?;
                if side == Primary {
                    return Ok(());
                }
                field.without_twin().await
            }
            Self::StopQemu(side) => {
                let host = field.host(side);
                let pid = field.qemu(host)?;
                field.stop_and_go(&format!("the QEMU of {}", host.name()), pid).await
            }
            Self::KillHost(side) => {
                let host = field.host(side);
                field.kill_host(host)?;
                field.hold().await;
                field.raise_host(host).await
            }
            Self::KillAgents => {
                field.note("SIGKILL to both agents");
                field.lab.kill_agents().await?;
                field.hold().await;
                let first = if field.rng.chance(500) { Host::A } else { Host::B };
                field.start_agent(first).await?;
                field.moment(2_000).await;
                field.start_agent(first.other()).await
            }
            Self::KillWitness => {
                field.note("SIGKILL to the witness");
                field.lab.kill_witness().await?;
                field.hold().await;
                field.start_witness().await
            }
            Self::StopWitness => {
                let pid = field.lab.witness_pid()?;
                field.stop_and_go("the witness", pid).await
            }
            Self::KillHostWithoutWitness => {
                let host = field.host(Primary);
                field.kill_store().await?;
                field.kill_host(host)?;
                field.hold().await;
                field.start_store().await?;
                field.moment(4_000).await;
                field.raise_host(host).await
            }
            Self::KillMember(member) => field.kill_member(member).await,
            Self::StopMember(member) => field.stop_member(member).await,
            Self::CutMember(member) => field.cut_member(member).await,
            Self::KillSevered(means) => field.kill_severed(means).await,
            Self::CutHost(side) => field.cut(field.host(side).role()).await,
            Self::CutWitness => field.cut("w").await,
            Self::OneWay(from, to) => {
                field.deafen(from, to, true)?;
                field.hold().await;
                field.deafen(from, to, false)
            }
            Self::Apart(one, other) => {
                field.deafen(one, other, true)?;
                field.deafen(other, one, true)?;
                field.hold().await;
                field.deafen(one, other, false)?;
                field.deafen(other, one, false)
            }
            Self::KillWhileSyncing(side) => {
                let (primary, standby) = (field.host(Primary), field.host(Standby));
                field.kill_agent(standby).await?;
                field.start_agent(standby).await?;
                let syncs = |_: Role, state: &ProtectionState| matches!(state, ProtectionState::Syncing(_));
                field.until(primary, "syncing", syncs).await?;
                field.moment(2_500).await;
                let host = field.host(side);
                field.kill_agent(host).await?;
                field.hold().await;
                field.start_agent(host).await
            }
            Self::KillWhileActivating => {
                let (primary, standby) = (field.host(Primary), field.host(Standby));
                field.kill_agent(primary).await?;
                let begins = |role: Role, state: &ProtectionState| {
                    matches!(state, ProtectionState::FailingOver) || role == Role::Survivor
                };
                field.until(standby, "that it takes over", begins).await?;
                field.moment(60).await;
                field.kill_agent(standby).await?;
                field.moment(2_000).await;
                field.start_agent(standby).await?;
                field.moment(2_000).await;
                field.start_agent(primary).await
            }
            Self::KillWhileMoving(side) => {
                let (primary, host) = (field.host(Primary), field.host(side));
                let (client, most) = (field.lab.client(primary), field.rng.micros(0, 400_000));
                field.note("an operator moves the VM");
                let request = FailoverRequest {
                    vm: VM.to_owned(),
                    planned: true,
                    back: false,
                    force: false,
                    confirm: None,
                    give_back: false,
                };
                // The order itself may be what is cut off.
                let _ = tokio::time::timeout(most, async {
                    let _ = client.failover(&request).await;
                    std::future::pending::<()>().await;
                })
                .await;
                field.kill_agent(host).await?;
                field.hold().await;
                field.start_agent(host).await
            }
            Self::Move => {
                let primary = field.host(Primary);
                field.note("an operator moves the VM");
                field.lab.understudy(primary, &["failover", VM, "--planned"], PHASE).await?;
                field.note("it was moved");
                Ok(())
            }
            Self::HangRedis => {
                let steps = 1_000_000 * (1 + field.rng.below(10));
                field.note(format!("Redis does nothing but count to {steps}"));
                let say = format!(
                    "exec 3<>/dev/tcp/{GUEST}/{}; echo 'EVAL \"for i=1,{steps} do end return 7\" 0' >&3; read -u 3 -r line; [[ $line == :7* ]]",
                    REDIS.port()
                );
                let bound = SOON.as_secs().to_string();
                let status = tokio::process::Command::new("ip")
                    .args(["netns", "exec", &field.lab.namespace("c"), "timeout", &bound, "bash", "-c", &say])
                    .status()
                    .await?;
                ensure!(status.success(), "Redis did not count: {status}");
                field.note("Redis is done");
                Ok(())
            }
            Self::Weather(side, front) => field.weather(field.host(side), front).await,
            Self::FullDisk => {
                let host = field.host(Standby);
                let filler = field.storage.fill(host)?;
                field.note(format!("the disk of {} is full", host.name()));
                field.hold().await;
                drop(filler);
                field.note(format!("the disk of {} has room again", host.name()));
                Ok(())
            }
            Self::HangDisk => {
                let host = field.host(Standby);
                let frozen = field.storage.freeze(host)?;
                field.note(format!("the disk of {} hangs", host.name()));
                field.hold().await;
                frozen.thaw()?;
                field.note(format!("the disk of {} goes on", host.name()));
                Ok(())
            }
            Self::SlowDisk => {
                let host = field.host(Standby);
                let stall = field.rng.micros(20_000, 300_000);
                field.note(format!("the disk of {} hangs for {stall:?} again and again", host.name()));
                for _ in 0..SLOW_TIMES {
                    let frozen = field.storage.freeze(host)?;
                    tokio::time::sleep(stall).await;
                    frozen.thaw()?;
                    field.moment(40).await;
                }
                field.note(format!("the disk of {} is as fast as before", host.name()));
                Ok(())
            }
            Self::BrokenDisk(breakage) => field.break_disk(breakage).await,
            Self::ShortOfMemory(side) => field.short_of_memory(side).await,
            Self::JumpClock(party) => field.jump_clock(party).await,
            Self::Reboot => {
                let before = redis_life(field.lab).await?;
                field.note("the guest reboots itself");
                ask_to_reboot(field.lab)?;
                until("Redis to be another one", PHASE, async || {
                    Ok(match redis_life(field.lab).await {
                        Ok(now) if now != before => Ok(()),
                        Ok(_) => Err("it is the one before".to_owned()),
                        Err(error) => Err(error.to_string()),
                    })
                })
                .await?;
                field.note("it has booted from its disk");
                Ok(())
            }
            Self::Shutdown => {
                if field.primary == Host::B {
                    // It may be booted again only where it was stopped, and the laboratory boots on host A.
                    field.note("an operator moves the VM to host-a");
                    field.lab.understudy(Host::B, &["failover", VM, "--planned"], PHASE).await?;
                    let home = |role: Role, state: &ProtectionState| {
                        role == Role::Primary && matches!(state, ProtectionState::Protected)
                    };
                    field.until(Host::A, "that it is protected there", home).await?;
                }
                field.note("the guest shuts itself down");
                let image = shut_down(field.lab).await?;
                field.note("it is gone everywhere, and its file system is clean");
                boot_again(field.lab, &image).await?;
                field.note("its owner has booted it on host-a and asked for its protection");
                Ok(())
            }
        }
    }
}
