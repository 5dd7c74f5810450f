//! The faults: what is done, to whom, and for how long.
//!
//! Promise: when [`Fault::inject`] returns without an error the fault has really happened, which it has looked at itself, and is
//! over: every process that was killed was started again, every one that was stopped goes on, every link is whole.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::control::api::{FailoverRequest, ProtectionState, Role};
use replicator::demo::lab::{GUEST, Host, Lab, REDIS, VM, WITNESS};
use replicator::demo::netns::{ip, processes_in};
use replicator::demo::wait::{now_ns, until};
use rustix::process::{Pid, Signal, kill_process};

use super::guest::{boot_again, shut_down};
use super::relay::{Relay, Weather};
use super::storage::Storage;
use crate::sim::rng::Rng;

/// Bound on a process's end, and on its standing still.
const SOON: Duration = Duration::from_secs(30);
/// Bound on what agents do by themselves before the second blow of a fault falls.
const PHASE: Duration = Duration::from_secs(120);
/// How long a fault holds, in microseconds.
const HOLD_MICROS: (u64, u64) = (300_000, 6_000_000);
/// How often something must have been done to a frame before the weather is over.
const HIT: u64 = 20;
/// How often a slow disk hangs.
const SLOW_TIMES: usize = 20;

/// Which host of the pair, by what it is when the fault begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the VM runs.
    Primary,
    /// Where its twin waits.
    Standby,
}

/// Who can be cut off from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// A host.
    Host(Side),
    /// The witness.
    Witness,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to a host's agent, which starts again after a while.
    KillAgent(Side),
    /// SIGSTOP to a host's agent, SIGCONT after a while.
    StopAgent(Side),
    /// A host's agent ends in good order and starts again at once, as for an upgrade.
    RestartAgent(Side),
    /// SIGKILL to a host's QEMU. If it was the twin, the primary's agent dies after it, and starts again.
    KillQemu(Side),
    /// SIGSTOP to a host's QEMU, SIGCONT after a while.
    StopQemu(Side),
    /// SIGKILL to everything on a host at once, and its link goes down; the host comes back empty after a while.
    KillHost(Side),
    /// SIGKILL to both agents at once.
    KillAgents,
    /// SIGKILL to the witness, which starts again after a while.
    KillWitness,
    /// SIGSTOP to the witness, SIGCONT after a while.
    StopWitness,
    /// The witness is dead when the primary's host dies; it comes back, and then the host.
    KillHostWithoutWitness,
    /// A host's link goes down for a while: nothing passes, also not for the VM's clients.
    CutHost(Side),
    /// The witness's link goes down for a while.
    CutWitness,
    /// Nothing of the first party reaches the second for a while; the other way is open.
    OneWay(Party, Party),
    /// Neither of two parties reaches the other for a while; both reach the third.
    Apart(Party, Party),
    /// The standby's agent dies and starts again; while it is given the first copy, the agent of a host dies.
    KillWhileSyncing(Side),
    /// The primary's agent dies; while the standby takes over, its agent dies too. Both start again.
    KillWhileActivating,
    /// An operator moves the VM to the standby; the agent of a host dies within it.
    KillWhileMoving(Side),
    /// The VM's operator moves it to the standby, and nothing goes wrong.
    Move,
    /// Redis in the guest answers nobody for a while.
    HangRedis,
    /// Bad weather on a host's link for a while.
    Weather(Side, Front),
    /// The standby's disk for state, journals and images is full for a while.
    FullDisk,
    /// The standby's disk takes no write for a while; who syncs waits.
    HangDisk,
    /// The standby's disk takes writes in short moments only for a while, so that each sync is slow.
    SlowDisk,
    /// The guest shuts itself down, and its owner boots it from its disk and protects it again.
    Shutdown,
}

/// A kind of bad weather.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// Frames are lost.
    Lose,
    /// Frames come late, and not evenly.
    Delay,
    /// Frames come twice.
    Double,
    /// Frames overtake others.
    Overtake,
    /// Frames are damaged.
    Damage,
    /// The link is narrow.
    Narrow,
}

use Front::{Damage, Delay, Double, Lose, Narrow, Overtake};
use Party::{Host as On, Witness};
use Side::{Primary, Standby};

impl Fault {
    /// All of them.
    pub const ALL: [Self; 51] = [
        Self::KillAgent(Primary),
        Self::KillAgent(Standby),
        Self::StopAgent(Primary),
        Self::StopAgent(Standby),
        Self::RestartAgent(Primary),
        Self::RestartAgent(Standby),
        Self::KillQemu(Primary),
        Self::KillQemu(Standby),
        Self::StopQemu(Primary),
        Self::StopQemu(Standby),
        Self::KillHost(Primary),
        Self::KillHost(Standby),
        Self::KillAgents,
        Self::KillWitness,
        Self::StopWitness,
        Self::KillHostWithoutWitness,
        Self::CutHost(Primary),
        Self::CutHost(Standby),
        Self::CutWitness,
        Self::OneWay(On(Primary), On(Standby)),
        Self::OneWay(On(Standby), On(Primary)),
        Self::OneWay(On(Primary), Witness),
        Self::OneWay(On(Standby), Witness),
        Self::OneWay(Witness, On(Primary)),
        Self::OneWay(Witness, On(Standby)),
        Self::Apart(On(Primary), On(Standby)),
        Self::Apart(On(Primary), Witness),
        Self::Apart(On(Standby), Witness),
        Self::KillWhileSyncing(Primary),
        Self::KillWhileSyncing(Standby),
        Self::KillWhileActivating,
        Self::KillWhileMoving(Primary),
        Self::KillWhileMoving(Standby),
        Self::Move,
        Self::HangRedis,
        Self::Weather(Primary, Lose),
        Self::Weather(Standby, Lose),
        Self::Weather(Primary, Delay),
        Self::Weather(Standby, Delay),
        Self::Weather(Primary, Double),
        Self::Weather(Standby, Double),
        Self::Weather(Primary, Overtake),
        Self::Weather(Standby, Overtake),
        Self::Weather(Primary, Damage),
        Self::Weather(Standby, Damage),
        Self::Weather(Primary, Narrow),
        Self::Weather(Standby, Narrow),
        Self::FullDisk,
        Self::HangDisk,
        Self::SlowDisk,
        Self::Shutdown,
    ];

    /// What happens, to whomever: faults of one kind are drawn as often as those of any other.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::KillAgent(_) => "kill-agent",
            Self::StopAgent(_) => "stop-agent",
            Self::RestartAgent(_) => "restart-agent",
            Self::KillQemu(_) => "kill-qemu",
            Self::StopQemu(_) => "stop-qemu",
            Self::KillHost(_) => "kill-host",
            Self::KillAgents => "kill-both-agents",
            Self::KillWitness => "kill-witness",
            Self::StopWitness => "stop-witness",
            Self::KillHostWithoutWitness => "kill-witness-then-host",
            Self::CutHost(_) | Self::CutWitness => "cut",
            Self::OneWay(..) => "deaf",
            Self::Apart(..) => "apart",
            Self::KillWhileSyncing(_) => "kill-while-syncing",
            Self::KillWhileActivating => "kill-while-activating",
            Self::KillWhileMoving(_) => "kill-while-moving",
            Self::Move => "move",
            Self::HangRedis => "hang-redis",
            Self::Weather(_, Lose) => "lose",
            Self::Weather(_, Delay) => "delay",
            Self::Weather(_, Double) => "double",
            Self::Weather(_, Overtake) => "overtake",
            Self::Weather(_, Damage) => "damage",
            Self::Weather(_, Narrow) => "narrow",
            Self::FullDisk => "full-disk",
            Self::HangDisk => "hang-disk",
            Self::SlowDisk => "slow-disk",
            Self::Shutdown => "shutdown",
        }
    }

    /// What operators call it: the kind, and to whom.
    #[must_use]
    pub fn name(self) -> String {
        let kind = self.kind();
        match self {
            Self::KillAgent(side)
            | Self::StopAgent(side)
            | Self::RestartAgent(side)
            | Self::KillQemu(side)
            | Self::StopQemu(side)
            | Self::KillHost(side)
            | Self::CutHost(side)
            | Self::KillWhileSyncing(side)
            | Self::KillWhileMoving(side)
            | Self::Weather(side, _) => format!("{kind}-{}", side.word()),
            Self::CutWitness => format!("{kind}-witness"),
            Self::OneWay(from, to) => format!("{kind}-{}-to-{}", to.word(), from.word()),
            Self::Apart(one, other) => format!("{kind}-{}-{}", one.word(), other.word()),
            _ => kind.to_owned(),
        }
    }

    /// Whether a client's connection cannot outlive it.
    #[must_use]
    pub fn breaks_connections(self) -> bool {
        self == Self::Shutdown
    }
}

impl Side {
    fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
        }
    }
}

impl Party {
    fn word(self) -> &'static str {
        match self {
            Self::Host(side) => side.word(),
            Self::Witness => "witness",
        }
    }
}

/// Something that was done, for the report.
#[derive(Debug, Clone)]
pub struct Deed {
    /// When, by the monotonic clock.
    pub at_ns: u64,
    /// What.
    pub what: String,
}

/// Where a fault strikes.
#[derive(Debug)]
pub struct Field<'a> {
    /// The laboratory, whose VM is protected.
    pub lab: &'a mut Lab,
    /// Where the VM runs when the fault begins.
    pub primary: Host,
    /// The disks of the hosts.
    pub storage: &'a Storage,
    /// What the fault leaves to chance.
    pub rng: &'a mut Rng,
    /// What was done.
    pub deeds: Vec<Deed>,
}

impl Field<'_> {
    fn host(&self, side: Side) -> Host {
        match side {
            Side::Primary => self.primary,
            Side::Standby => self.primary.other(),
        }
    }

    fn note(&mut self, what: impl Into<String>) {
        self.deeds.push(Deed { at_ns: now_ns(), what: what.into() });
    }

    /// Lets the fault hold for a while.
    async fn hold(&mut self) {
        let (from, to) = HOLD_MICROS;
        tokio::time::sleep(self.rng.micros(from, to)).await;
    }

    /// Lets up to so many milliseconds pass.
    async fn moment(&mut self, most_ms: u64) {
        tokio::time::sleep(self.rng.micros(0, most_ms * 1_000)).await;
    }

    /// The one QEMU on a host.
    fn qemu(&self, host: Host) -> Result<u32> {
        let all = qemus(&self.lab.namespace(host.role()));
        match all[..] {
            [pid] => Ok(pid),
            _ => bail!("{} runs {} QEMUs", host.name(), all.len()),
        }
    }

    async fn kill_agent(&mut self, host: Host) -> Result<()> {
        self.note(format!("SIGKILL to the agent of {}", host.name()));
        self.lab.kill_agent(host).await
    }

    async fn start_agent(&mut self, host: Host) -> Result<()> {
        self.lab.start_agent(host).await?;
        self.note(format!("the agent of {} started again", host.name()));
        Ok(())
    }

    async fn start_witness(&mut self) -> Result<()> {
        self.lab.start_witness().await?;
        self.note("the witness started again");
        Ok(())
    }

    async fn raise_host(&mut self, host: Host) -> Result<()> {
        self.lab.raise_host(host).await?;
        self.note(format!("{} is back, empty", host.name()));
        Ok(())
    }

    fn kill_host(&mut self, host: Host) -> Result<()> {
        self.note(format!("SIGKILL to everything on {}", host.name()));
        self.lab.kill_host(host)?;
        ensure!(processes_in(&self.lab.namespace(host.role())).is_empty(), "something lives on {}", host.name());
        Ok(())
    }

    /// Stops a process, lets that hold, and lets it go on.
    async fn stop_and_go(&mut self, what: &str, pid: u32) -> Result<()> {
        self.note(format!("SIGSTOP to {what}"));
        signal(pid, Signal::STOP)?;
        until(&format!("{what} to stand still"), SOON, async || {
            let state = process_state(pid)?;
            Ok(if state == 'T' { Ok(()) } else { Err(format!("state {state}")) })
        })
        .await?;
        self.hold().await;
        // One that stood for too long may have been ended by another hand.
        let gone = signal(pid, Signal::CONT).is_err();
        self.note(if gone { format!("{what} was ended meanwhile") } else { format!("SIGCONT to {what}") });
        Ok(())
    }

    /// Takes the link to a part of the laboratory down, lets that hold, and takes it up.
    async fn cut(&mut self, role: &str) -> Result<()> {
        let port = format!("-n {} link set to-{role}", self.lab.namespace("s"));
        self.note(format!("the link of {role} goes down"));
        ip(&format!("{port} down"))?;
        self.hold().await;
        ip(&format!("{port} up"))?;
        self.note(format!("the link of {role} is up"));
        Ok(())
    }

    /// Where a party is: its namespace, the interface of its address, its address.
    fn place(&self, party: Party) -> (String, &'static str, &'static str) {
        match party {
            Party::Host(side) => (self.lab.namespace(self.host(side).role()), "br0", self.host(side).address()),
            Party::Witness => (self.lab.namespace("w"), "uplink", WITNESS),
        }
    }

    /// What `from` sends to `to` goes to a hardware address that nobody has; or no more.
    fn deafen(&mut self, from: Party, to: Party, on: bool) -> Result<()> {
        let (space, interface, _) = self.place(from);
        let (_, _, address) = self.place(to);
        set_deaf(&space, interface, address, on)?;
        let what = if on { "does not reach" } else { "reaches" };
        self.note(format!("the {} {what} the {}", from.word(), to.word()));
        Ok(())
    }

    /// Bad weather on a host's link, until it has hit some frames and held for a while.
    async fn weather(&mut self, host: Host, front: Front) -> Result<()> {
        let weather = front.draw(self.rng);
        let (space, switch, cable) =
            (self.lab.namespace(host.role()), self.lab.namespace("s"), format!("to-{}", host.role()));
        self.note(format!("on the link of {}: {weather:?}", host.name()));
        let relay = Relay::start(&space, &switch, &cable, weather, self.rng.any() >> 1)?;
        self.hold().await;
        let hit = until("the weather to hit frames", SOON, async || {
            let (carried, hit) = relay.counts();
            Ok(if hit >= HIT { Ok((carried, hit)) } else { Err(format!("{hit} of {carried}")) })
        })
        .await;
        drop(relay);
        let (carried, hit) = hit?;
        self.note(format!("fair again; {carried} frames passed, {hit} times something was done to one"));
        Ok(())
    }

    /// What an operator does about an agent that could not write down what it had to: it stays in its error until it starts again.
    async fn mend(&mut self, host: Host) -> Result<()> {
        // An agent that knows no VM has nothing to mend.
        let status = self.lab.client(host).vm_status(VM).await.ok();
        let Some(status) = status.filter(|status| status.state == ProtectionState::Error) else { return Ok(()) };
        self.note(format!("an operator reads `{}` on {}, and starts its agent again", status.reason, host.name()));
        self.lab.stop_agent(host).await?;
        self.start_agent(host).await
    }

    /// Waits until a host's agent says something of the VM. One that does not answer says nothing.
    async fn until(&self, host: Host, what: &str, is: impl Fn(Role, &ProtectionState) -> bool) -> Result<()> {
        until(&format!("{} to say {what} of the VM", host.name()), PHASE, async || {
            Ok(match self.lab.client(host).vm_status(VM).await {
                Ok(status) if is(status.role, &status.state) => Ok(()),
                Ok(status) => Err(format!("{} as {}: {}", status.state, status.role.word(), status.reason)),
                Err(error) => Err(error.to_string()),
            })
        })
        .await
    }
}

/// What `address` is sent from namespace `space` through `interface` goes to a hardware address that nobody has; or no more.
///
/// # Errors
/// If `ip` refuses.
pub fn set_deaf(space: &str, interface: &str, address: &str, on: bool) -> Result<()> {
    if on {
        ip(&format!("-n {space} neigh replace {address} lladdr 02:00:00:00:00:01 nud permanent dev {interface}"))
    } else {
        ip(&format!("-n {space} neigh del {address} dev {interface}"))
    }
}

/// The QEMUs in a namespace.
#[must_use]
pub fn qemus(space: &str) -> Vec<u32> {
    let is_qemu =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"));
    processes_in(space)
        .into_iter()
        .filter_map(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok())
        .filter(is_qemu)
        .collect()
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process")?;
    kill_process(pid, signal).context("cannot signal a process")
}

/// `R`, `S`, `T` and so on.
fn process_state(pid: u32) -> Result<char> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
    let (_, rest) = text.rsplit_once(')').context("no state")?;
    rest.trim_start().chars().next().context("no state")
}

impl Front {
    /// How bad it is, this time.
    fn draw(self, rng: &mut Rng) -> Weather {
        let fair = Weather::default();
        match self {
            Self::Lose => Weather { lose: 5 + rng.below(150), ..fair },
            Self::Delay => Weather { delay: rng.micros(1_000, 60_000), jitter: rng.micros(0, 20_000), ..fair },
            Self::Double => Weather { double: 20 + rng.below(400), ..fair },
            Self::Overtake => Weather { overtake: 20 + rng.below(300), ..fair },
            Self::Damage => Weather { damage: 5 + rng.below(100), ..fair },
            Self::Narrow => Weather { rate: Some(250_000 + rng.below(4_000_000)), ..fair },
        }
    }
}

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
                // A twin that died waiting is launched again when it is needed: now.
                field.hold().await;
                let primary = field.host(Primary);
                field.kill_agent(primary).await?;
                field.hold().await;
                field.start_agent(primary).await
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
                field.note("SIGKILL to the witness");
                field.lab.kill_witness().await?;
                field.kill_host(host)?;
                field.hold().await;
                field.start_witness().await?;
                field.moment(4_000).await;
                field.raise_host(host).await
            }
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
                let request =
                    FailoverRequest { vm: VM.to_owned(), planned: true, back: false, force: false, confirm: None };
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
                field.mend(host).await
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
