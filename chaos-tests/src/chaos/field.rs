//! Where a fault strikes, and the hands that it has there.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::control::api::{ProtectionState, Role};
use replicator::demo::lab::{Host, Lab, VM, WITNESS};
use replicator::demo::netns::{ip, processes_in};
use replicator::demo::wait::{now_ns, until};
use rustix::process::{Pid, Signal, kill_process};

use super::clock::Clocks;
use super::fault::{Breakage, Front, Means, Party, Side};
use super::memory::Memory;
use super::relay::Relay;
use super::storage::Storage;
use crate::etcd::{self, Etcd, MEMBERS};
use crate::sim::rng::Rng;

/// Bound on a process's end, and on its standing still.
pub(super) const SOON: Duration = Duration::from_secs(30);
/// Bound on what agents do by themselves before the second blow of a fault falls.
pub(super) const PHASE: Duration = Duration::from_secs(120);
/// How long a fault holds, in microseconds.
const HOLD_MICROS: (u64, u64) = (300_000, 6_000_000);
/// How long clients go on at a host that nobody acknowledges anything to, until it dies, in microseconds.
const SEVERED_MICROS: (u64, u64) = (40_000, 1_000_000);
/// How much of its memory a host that is short of it may have, in thousandths: from, and by how much more.
const SHORT: (u64, u64) = (300, 500);
/// How often a limit must have been met before it is lifted.
const MET: u64 = 20;
/// How often something must have been done to a frame before the weather is over.
const HIT: u64 = 20;

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
    /// The etcd that is asked in place of a witness, if there is one.
    pub etcd: Option<&'a mut Etcd>,
    /// The disks of the hosts.
    pub storage: &'a Storage,
    /// The clocks of the hosts and of the witness.
    pub clocks: &'a Clocks,
    /// The memory of the hosts, where it can be limited.
    pub memory: Option<&'a Memory>,
    /// What the fault leaves to chance.
    pub rng: &'a mut Rng,
    /// What was done.
    pub deeds: Vec<Deed>,
}

impl Field<'_> {
    pub(super) fn host(&self, side: Side) -> Host {
        match side {
            Side::Primary => self.primary,
            Side::Standby => self.primary.other(),
        }
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.deeds.push(Deed { at_ns: now_ns(), what: what.into() });
    }

    /// Lets the fault hold for a while.
    pub(super) async fn hold(&mut self) {
        let (from, to) = HOLD_MICROS;
        tokio::time::sleep(self.rng.micros(from, to)).await;
    }

    /// Lets up to so many milliseconds pass.
    pub(super) async fn moment(&mut self, most_ms: u64) {
        tokio::time::sleep(self.rng.micros(0, most_ms * 1_000)).await;
    }

    /// The one QEMU on a host.
    pub(super) fn qemu(&self, host: Host) -> Result<u32> {
        let all = vms(&self.lab.namespace(host.role()));
        match all[..] {
            [pid] => Ok(pid),
            _ => bail!("{} runs {} QEMUs", host.name(), all.len()),
        }
    }

    pub(super) async fn kill_agent(&mut self, host: Host) -> Result<()> {
        self.note(format!("SIGKILL to the agent of {}", host.name()));
        self.lab.kill_agent(host).await
    }

    pub(super) async fn start_agent(&mut self, host: Host) -> Result<()> {
        self.lab.start_agent(host).await?;
        self.note(format!("the agent of {} started again", host.name()));
        Ok(())
    }

    pub(super) async fn start_witness(&mut self) -> Result<()> {
        self.lab.start_witness().await?;
        self.note("the witness started again");
        Ok(())
    }

    pub(super) async fn raise_host(&mut self, host: Host) -> Result<()> {
        self.lab.raise_host(host).await?;
        self.note(format!("{} is back, empty", host.name()));
        Ok(())
    }

    pub(super) fn kill_host(&mut self, host: Host) -> Result<()> {
        self.note(format!("SIGKILL to everything on {}", host.name()));
        self.lab.kill_host(host)?;
        ensure!(processes_in(&self.lab.namespace(host.role())).is_empty(), "something lives on {}", host.name());
        Ok(())
    }

    /// Stops a process, lets that hold, and lets it go on.
    pub(super) async fn stop_and_go(&mut self, what: &str, pid: u32) -> Result<()> {
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

    /// Keeps acknowledgements away from the primary's host, and kills it after a moment. It cannot go alone meanwhile: it does not
    /// reach the witness, so that the standby alone may win, however long the moment is.
    pub(super) async fn kill_severed(&mut self, means: Means) -> Result<()> {
        let (primary, standby) = (Party::Host(Side::Primary), Party::Host(Side::Standby));
        let host = self.host(Side::Primary);
        self.deafen(primary, Party::Witness, true)?;
        let frozen = match means {
            Means::Silence => {
                self.deafen(primary, standby, true)?;
                None
            }
            Means::Disk => {
                self.note(format!("the disk of {} hangs", host.other().name()));
                Some(self.storage.freeze(host.other())?)
            }
        };
        let (from, to) = SEVERED_MICROS;
        tokio::time::sleep(self.rng.micros(from, to)).await;
        self.kill_host(host)?;
        self.deafen(primary, Party::Witness, false)?;
        if let Some(frozen) = frozen {
            self.moment(2_000).await;
            frozen.thaw()?;
            self.note(format!("the disk of {} goes on", host.other().name()));
        } else {
            self.deafen(primary, standby, false)?;
        }
        self.hold().await;
        self.raise_host(host).await
    }

    /// Takes the link to a part of the laboratory down, lets that hold, and takes it up.
    pub(super) async fn cut(&mut self, role: &str) -> Result<()> {
        self.note(format!("the link of {role} goes down"));
        self.set_port(role, false)?;
        self.hold().await;
        self.set_port(role, true)?;
        self.note(format!("the link of {role} is up"));
        Ok(())
    }

    pub(super) fn set_port(&self, role: &str, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set to-{role} {state}", self.lab.namespace("s")))
    }

    /// Where a party is: the namespaces, the interfaces of the addresses, the addresses.
    fn places(&self, party: Party) -> Vec<(String, &'static str, &'static str)> {
        match party {
            Party::Host(side) => {
                let host = self.host(side);
                vec![(self.lab.namespace(host.role()), "br0", host.address())]
            }
            Party::Witness if self.etcd.is_some() => {
                MEMBERS.map(|member| (self.lab.namespace(member), "uplink", etcd::address(member))).to_vec()
            }
            Party::Witness => vec![(self.lab.namespace("w"), "uplink", WITNESS)],
        }
    }

    /// What `from` sends to `to` goes to a hardware address that nobody has; or no more.
    pub(super) fn deafen(&mut self, from: Party, to: Party, on: bool) -> Result<()> {
        for (space, interface, _) in self.places(from) {
            for (_, _, address) in self.places(to) {
                set_deaf(&space, interface, address, on)?;
            }
        }
        let [from, to] = [from, to].map(|party| match party {
            Party::Witness if self.etcd.is_some() => "etcd",
            party => party.word(),
        });
        self.note(format!("the {from} {} the {to}", if on { "does not reach" } else { "reaches" }));
        Ok(())
    }

    /// Bad weather on a host's link, until it has hit some frames and held for a while.
    pub(super) async fn weather(&mut self, host: Host, front: Front) -> Result<()> {
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

    /// The standby's disk breaks, and is whole again after a while.
    pub(super) async fn break_disk(&mut self, breakage: Breakage) -> Result<()> {
        let host = self.host(Side::Standby);
        match breakage {
            Breakage::ReadOnly => {
                self.storage.abort(host)?;
                self.note(format!("the disk of {} is read-only", host.name()));
                self.hold().await;
            }
            Breakage::Errors => {
                let losing = self.storage.lose_writes(host)?;
                self.note(format!("the disk of {} loses what is written, and says so", host.name()));
                self.hold().await;
                losing.end()?;
                self.note(format!("the disk of {} has room again", host.name()));
                // The file system may not have outlived it.
                if self.storage.takes_writes(host)? {
                    return Ok(());
                }
            }
        }
        self.kill_host(host)?;
        self.storage.repair(host).await?;
        self.note(format!("an operator has repaired the disk of {}", host.name()));
        self.raise_host(host).await
    }

    /// A host may have only a part of its memory for a while. If the kernel kills somebody for it, that is a death like others.
    pub(super) async fn short_of_memory(&mut self, side: Side) -> Result<()> {
        let memory = self.memory.context("this machine has no control group for memory")?;
        let host = self.host(side);
        let (group, swap) = (memory.of(host), memory.swap()?);
        let (had, before, (from, more)) = (group.has()?, group.felt()?, SHORT);
        let limit = group.limit(had * (from + self.rng.below(more)) / 1000)?;
        self.note(format!("{} has {} MiB, and may have {}", host.name(), had >> 20, limit >> 20));
        self.hold().await;
        let felt = until("the limit to be felt", PHASE, async || {
            let felt = group.felt()?;
            let enough = felt.met >= before.met + MET || felt.killed > before.killed;
            Ok(if enough { Ok(felt) } else { Err(format!("{before:?}, then {felt:?}")) })
        })
        .await;
        let swapped = group.swapped()?;
        group.lift()?;
        // What went is read back: only then is it over.
        drop(swap);
        let felt = felt?;
        let (met, killed) = (felt.met - before.met, felt.killed - before.killed);
        self.note(format!(
            "it has all of its memory again; {} MiB were in swap, the limit was met {met} times",
            swapped >> 20
        ));
        if killed > 0 { self.outlive(side, killed).await } else { Ok(()) }
    }

    /// Starts again what the kernel has killed on a host, as systemd would; the VM is not begun again.
    async fn outlive(&mut self, side: Side, killed: u64) -> Result<()> {
        let host = self.host(side);
        self.note(format!("the kernel has killed {killed} processes of {}", host.name()));
        if process_state(self.lab.agent_pid(host)?).map_or(true, |state| state == 'Z') {
            self.lab.lose_agent(host, SOON).await?;
            return self.start_agent(host).await;
        }
        if side == Side::Standby && vms(&self.lab.namespace(host.role())).is_empty() {
            return self.without_twin().await;
        }
        Ok(())
    }

    /// A twin that died waiting is launched again when it is needed: now, since the primary's agent dies.
    pub(super) async fn without_twin(&mut self) -> Result<()> {
        self.hold().await;
        let primary = self.host(Side::Primary);
        self.kill_agent(primary).await?;
        self.hold().await;
        self.start_agent(primary).await
    }

    /// The wall clock of a party jumps, the primary's host dies, and the clock jumps back after a while.
    pub(super) async fn jump_clock(&mut self, party: Party) -> Result<()> {
        let role = match party {
            Party::Host(side) => self.host(side).role(),
            Party::Witness => "w",
        };
        let (off, back) = (Duration::from_secs(10_u64.pow(self.rng.index(9).try_into()?)), self.rng.chance(500));
        self.note(format!(
            "the clock of the {} is put {} by {} s",
            party.word(),
            if back { "back" } else { "forward" },
            off.as_secs()
        ));
        self.clocks.set(role, off, back)?;
        self.hold().await;
        let host = self.host(Side::Primary);
        let stands_by =
            |role: Role, state: &ProtectionState| role == Role::Standby && *state == ProtectionState::Protected;
        self.until(host.other(), "that its copy stands by", stands_by).await?;
        self.kill_host(host)?;
        self.hold().await;
        self.raise_host(host).await?;
        let read = until("the clock to be read", SOON, async || {
            let reads = self.clocks.reads(role)?;
            Ok(if reads > 0 { Ok(reads) } else { Err("nobody looks at it".to_owned()) })
        })
        .await?;
        self.clocks.set(role, Duration::ZERO, false)?;
        self.note(format!("the clock is right again; it was read {read} times and more"));
        Ok(())
    }

    /// Waits until a host's agent says something of the VM. One that does not answer says nothing.
    pub(super) async fn until(
        &self,
        host: Host,
        what: &str,
        is: impl Fn(Role, &ProtectionState) -> bool,
    ) -> Result<()> {
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

/// The processes in a namespace that are a VM: QEMUs, and those of microVMs.
#[must_use]
pub fn vms(space: &str) -> Vec<u32> {
    let is_vm = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.starts_with("qemu-system") || name.trim_end() == "us-microvm")
    };
    processes_in(space)
        .into_iter()
        .filter_map(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok())
        .filter(is_vm)
        .collect()
}

pub(super) fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process")?;
    kill_process(pid, signal).context("cannot signal a process")
}

/// `R`, `S`, `T` and so on.
pub(super) fn process_state(pid: u32) -> Result<char> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
    let (_, rest) = text.rsplit_once(')').context("no state")?;
    rest.trim_start().chars().next().context("no state")
}
