//! The laboratory: two hosts, a client and a witness on one machine.
//!
//! ```text
//!   namespace us-PID-a      us-PID-b      us-PID-w     us-PID-c
//!   10.77.0.1               10.77.0.2     10.77.0.3    10.77.0.100
//!   br0 -- tap0 -- guest    br0 (twin)    uplink       uplink
//!    |     10.77.0.10        |             |            |
//!    uplink                  uplink        |            |
//!    +------------ br0 in us-PID-s: the switch ---------+
//! ```
//!
//! Each host has state and run directories of its own; all share one file system and one set of process numbers.
//! Promise: dropping the laboratory ends every process in it and removes everything it made in the kernel.

mod cable;
mod group;
mod microvm;
mod third;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::netns::{full_name, ip, kill_all, processes_in, sweep};
use super::postgres;
use super::process::{Daemon, Ended, Helper, outcome};
use super::wait::{now_ns, until};
use crate::control::api::PairOpenRequest;
use crate::control::client::Client;

pub use microvm::Microvm;

/// The guest's hardware address.
pub const MAC: &str = "52:54:00:77:00:10";
/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// Its Redis.
pub const REDIS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(GUEST), 6379);
/// The VM's name.
pub const VM: &str = "web-1";
/// The witness's address.
pub const WITNESS: &str = "10.77.0.3";

/// Bound on booting the guest; it takes 3 s on an idle machine.
const BOOT: Duration = Duration::from_secs(120);
/// Bound on a daemon's start.
const START: Duration = Duration::from_secs(20);
/// Bound on a command of the CLI that answers at once.
pub const COMMAND: Duration = Duration::from_secs(30);
/// Bound on the end of a killed process.
const END: Duration = Duration::from_secs(10);

/// A host of the laboratory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Where the VM runs first.
    A,
    /// The standby.
    B,
    /// Only where [`Lab::add_host_c`] made it.
    C,
}

impl Host {
    /// The other one of the first two.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B | Self::C => Self::A,
        }
    }

    /// The letter that its namespace has.
    #[must_use]
    pub fn role(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::C => "d",
        }
    }

    /// The name its agent has.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "host-a",
            Self::B => "host-b",
            Self::C => "host-c",
        }
    }

    /// Where its agent serves metrics, to the whole laboratory.
    #[must_use]
    pub fn metrics(self) -> String {
        format!("{}:9644", self.address())
    }

    /// Its address.
    #[must_use]
    pub fn address(self) -> &'static str {
        match self {
            Self::A => "10.77.0.1",
            Self::B => "10.77.0.2",
            Self::C => "10.77.0.4",
        }
    }
}

/// What the VM is made of.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its memory.
    pub memory_mib: u32,
    /// More words for its kernel: `mem=256M` leaves it no more than that of the memory.
    pub kernel: String,
    /// Size of a virtio disk with an ext4 file system, in which Redis keeps every write before it says that it is done.
    pub disk_mib: Option<u64>,
    /// More arguments for QEMU.
    pub more: Vec<String>,
    /// A directory with a database's disk (`cargo xtask setup`): it is served in place of Redis.
    pub database: Option<PathBuf>,
}

impl Default for Machine {
    fn default() -> Self {
        Self { memory_mib: 256, kernel: String::new(), disk_mib: None, more: Vec::new(), database: None }
    }
}

/// The instants of a host's death.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    /// Before the first signal was sent.
    pub begun_ns: u64,
    /// The VM's process had ended: nothing that is answered to a later question comes from it.
    pub over_ns: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Lab {
    maker: u32,
    dir: PathBuf,
    guest: PathBuf,
    understudy: PathBuf,
    vm: Option<Daemon>,
    /// The VM is a part of host A's agent.
    microvm: bool,
    /// The hosts have a link of their own beside the switch.
    cable: bool,
    agents: Vec<(Host, Daemon)>,
    witness: Option<Daemon>,
    /// By namespace: what its daemons find in their environment beside the log level.
    environment: Vec<(String, (&'static str, String))>,
    /// By namespace: the control groups that its daemons are born in.
    groups: Vec<(String, PathBuf)>,
}

impl Lab {
    /// Builds the network. `dir` is empty, `guest` holds the guest image, `understudy` is the program.
    ///
    /// # Errors
    /// If `ip` refuses; what was built is removed again.
    pub fn build(dir: &Path, guest: &Path, understudy: &Path) -> Result<Self> {
        let lab = Self {
            maker: std::process::id(),
            dir: dir.to_path_buf(),
            guest: guest.to_path_buf(),
            understudy: understudy.to_path_buf(),
            vm: None,
            microvm: false,
            cable: false,
            agents: Vec::new(),
            witness: None,
            environment: Vec::new(),
            groups: Vec::new(),
        };
        lab.network().context("cannot build the laboratory's network")?;
        Ok(lab)
    }

    fn network(&self) -> Result<()> {
        let switch = self.namespace("s");
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for role in ["w", "c"] {
            self.plug(role)?;
        }
        for host in [Host::A, Host::B] {
            self.plug_host(host)?;
        }
        let a = self.namespace("a");
        ip(&format!("-n {a} tuntap add dev tap0 mode tap"))?;
        ip(&format!("-n {a} link set tap0 master br0 up"))?;
        ip(&format!("-n {} addr add {WITNESS}/24 dev uplink", self.namespace("w")))?;
        ip(&format!("-n {} addr add 10.77.0.100/24 dev uplink", self.namespace("c")))
    }

    /// A namespace at the switch.
    fn plug(&self, role: &str) -> Result<()> {
        let (switch, name) = (self.namespace("s"), self.namespace(role));
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {switch} link add to-{role} type veth peer name uplink netns {name}"))?;
        ip(&format!("-n {switch} link set to-{role} master br0 up"))?;
        ip(&format!("-n {name} link set uplink up"))
    }

    fn plug_host(&self, host: Host) -> Result<()> {
        self.plug(host.role())?;
        let name = self.namespace(host.role());
        third::bridge(&name, host)?;
        ip(&format!("-n {name} link set uplink master br0"))?;
        ip(&format!("-n {name} link set br0 up"))?;
        ip(&format!("-n {name} addr add {}/24 dev br0", host.address()))
    }

    /// The full name of a namespace.
    #[must_use]
    pub fn namespace(&self, role: &str) -> String {
        full_name(self.maker, role)
    }

    /// The directory of one part of the laboratory, made if it is not there.
    fn part(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    /// Starts the VM on host A, as anybody would, and waits until its Redis answers. Returns how long that took.
    ///
    /// # Errors
    /// If it does not within a bound.
    pub async fn boot(&mut self) -> Result<Duration> {
        self.boot_as(&Machine::default()).await
    }

    /// The same, with another machine.
    ///
    /// # Errors
    /// If its Redis does not answer within a bound.
    pub async fn boot_as(&mut self, machine: &Machine) -> Result<Duration> {
        let dir = self.part("vm")?;
        let cmdline = self.guest.join("cmdline");
        let cmdline = fs::read_to_string(&cmdline).with_context(|| format!("cannot read {}", cmdline.display()))?;
        let image = match (&machine.database, machine.disk_mib) {
            (Some(database), _) => Some(copy_disk(&database.join("disk.raw"), &dir)?),
            (None, Some(mib)) => Some(make_disk(&dir, mib)?),
            (None, None) => None,
        };
        let disk = if image.is_some() { "us.disk=/dev/vda" } else { "" };
        let serve = if machine.database.is_some() { "us.serve=postgres" } else { "" };
        let shown = |name: &str| self.guest.join(name).display().to_string();
        let mut args: Vec<String> = [
            "-name",
            VM,
            // One processor, translated as if another could be plugged in: else QEMU's TCG (7.2 and 10.0) leaves out the barrier between the guest's
            // making of a request and its look whether a notification is wanted. One that is lost so stops a virtio queue for good.
            "-smp",
            "1,maxcpus=2",
            "-m",
            &machine.memory_mib.to_string(),
            "-kernel",
            &shown("vmlinuz"),
            "-initrd",
            &shown("initrd.img"),
            "-append",
            &format!("{} us.ip={GUEST}/24 {disk} {serve} {}", cmdline.trim(), machine.kernel),
            "-netdev",
            "tap,id=net0,ifname=tap0,script=no,downscript=no",
            "-device",
            &format!("virtio-net-pci,netdev=net0,mac={MAC}"),
            "-qmp",
            &format!("unix:{},server=on,wait=off", self.vm_control().display()),
            "-serial",
            &format!("file:{}", dir.join("console.log").display()),
            "-display",
            "none",
        ]
        .map(str::to_owned)
        .into();
        if let Some(image) = image {
            args.extend(["-drive".to_owned(), format!("file={},if=virtio,format=raw,cache=none", image.display())]);
        }
        args.extend_from_slice(&machine.more);
        let begun = now_ns();
        let (qemu, args) = self.born("a", Path::new("qemu-system-x86_64"), args);
        let mut vm = Daemon::start("the VM", &self.namespace("a"), &qemu, &args, &[], &dir.join("qemu.log"))?;
        let ready = async {
            if let Some(database) = &machine.database {
                return postgres::until_ready(&self.namespace("c"), database, BOOT).await;
            }
            let (to, seconds) = (REDIS.to_string(), BOOT.as_secs().to_string());
            let mut ping = self.helper("the first PING", &["ping", "--to", &to, "--seconds", &seconds])?;
            ping.answer::<String>(BOOT + COMMAND).await.map(drop)
        };
        tokio::select! {
            answer = ready => answer.context("the guest did not boot")?,
            error = vm.ends_by_itself() => return Err(error),
        };
        self.vm = Some(vm);
        Ok(Duration::from_nanos(now_ns() - begun))
    }

    /// Starts a worker in the client's namespace.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn helper(&self, what: &str, args: &[&str]) -> Result<Helper> {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        Helper::start(what, &self.namespace("c"), &self.understudy, &args)
    }

    /// Starts the witness and both agents, and waits until each answers on its control socket.
    ///
    /// # Errors
    /// If one does not within a bound.
    pub async fn start_daemons(&mut self) -> Result<()> {
        self.start_witness().await?;
        self.start_agent(Host::A).await?;
        self.start_agent(Host::B).await
    }

    /// Starts the witness, for the first time or again, and waits until it answers on its control socket.
    ///
    /// # Errors
    /// If it does not within a bound.
    pub async fn start_witness(&mut self) -> Result<()> {
        let dir = self.part("witness")?;
        let mut args: Vec<String> = ["witness", "--name", "witness", "--listen"].map(str::to_owned).into();
        args.push(format!("{WITNESS}:7846"));
        args.extend(["--state-dir".to_owned(), dir.join("state").display().to_string()]);
        args.extend(["--run-dir".to_owned(), dir.join("run").display().to_string()]);
        let log = dir.join("witness.log");
        let mut witness =
            Daemon::start("the witness", &self.namespace("w"), &self.understudy, &args, &self.env("w"), &log)?;
        let client = self.witness_client();
        until("the witness to answer on its control socket", START, async || {
            witness.check()?;
            Ok(client.witness_status().await.map_err(|error| error.to_string()))
        })
        .await?;
        self.witness = Some(witness);
        Ok(())
    }

    /// Starts a host's agent, for the first time or again, and waits until it answers on its control socket.
    ///
    /// # Errors
    /// If it does not within a bound.
    pub async fn start_agent(&mut self, host: Host) -> Result<()> {
        let dir = self.part(host.name())?;
        let mut args: Vec<String> = ["agent", "--name", host.name(), "--listen"].map(str::to_owned).into();
        // Of several links each must be served.
        args.push(format!("{}:7844", if self.cable { "0.0.0.0" } else { host.address() }));
        args.extend(["--state-dir".to_owned(), dir.join("state").display().to_string()]);
        args.extend(["--run-dir".to_owned(), dir.join("run").display().to_string()]);
        args.extend(["--metrics".to_owned(), host.metrics()]);
        let config = self.agent_config(host)?;
        if config.is_file() {
            args.extend(["--config".to_owned(), config.display().to_string()]);
        }
        let what = format!("the agent of {}", host.name());
        let (namespace, log) = (self.namespace(host.role()), dir.join("agent.log"));
        let (program, args) = self.born(host.role(), &self.understudy, args);
        let mut agent = Daemon::start(&what, &namespace, &program, &args, &self.env(host.role()), &log)?;
        let client = self.client(host);
        until(&format!("{what} to answer on its control socket"), START, async || {
            agent.check()?;
            Ok(client.status().await.map_err(|error| error.to_string()))
        })
        .await?;
        self.agents.push((host, agent));
        Ok(())
    }

    /// Kills a host's agent alone.
    ///
    /// # Errors
    /// If it does not run, or does not end.
    pub async fn kill_agent(&mut self, host: Host) -> Result<()> {
        let at = self.agents.iter().position(|(its, _)| *its == host);
        let (_, mut agent) = self.agents.swap_remove(at.with_context(|| format!("{} runs no agent", host.name()))?);
        agent.check()?;
        agent.kill();
        agent.ended(END).await.map(drop)
    }

    /// Waits until a host's agent has ended, whoever kills it: it can be started again then.
    ///
    /// # Errors
    /// If it did not run, or does not end within `bound`.
    pub async fn lose_agent(&mut self, host: Host, bound: Duration) -> Result<()> {
        let at = self.agents.iter().position(|(its, _)| *its == host);
        let at = at.with_context(|| format!("{} runs no agent", host.name()))?;
        self.agents[at].1.ended(bound).await?;
        self.agents.swap_remove(at);
        Ok(())
    }

    /// Kills every agent at once.
    ///
    /// # Errors
    /// If one does not end.
    pub async fn kill_agents(&mut self) -> Result<()> {
        for (_, agent) in &mut self.agents {
            agent.check()?;
            agent.kill();
        }
        for (_, mut agent) in self.agents.drain(..) {
            agent.ended(END).await?;
        }
        Ok(())
    }

    /// Kills the witness.
    ///
    /// # Errors
    /// If it does not run, or does not end.
    pub async fn kill_witness(&mut self) -> Result<()> {
        let mut witness = self.witness.take().context("no witness runs")?;
        witness.check()?;
        witness.kill();
        witness.ended(END).await.map(drop)
    }

    /// Kills the VM's process on host A alone.
    ///
    /// # Errors
    /// If it had ended before, or does not end.
    pub async fn kill_vm(&mut self) -> Result<()> {
        let mut vm = self.vm.take().context("no VM was booted")?;
        vm.check()?;
        vm.kill();
        vm.ended(END).await.map(drop)
    }

    /// Waits until the VM's process on host A has ended by another hand; how it did.
    ///
    /// # Errors
    /// If it does not within `bound`.
    pub async fn vm_ended(&mut self, bound: Duration) -> Result<ExitStatus> {
        let status = self.vm.as_mut().context("no VM was booted")?.ended(bound).await?;
        self.vm = None;
        Ok(status)
    }

    /// Connects a host with the switch, or cuts it off: nothing passes in either direction.
    ///
    /// # Errors
    /// If `ip` refuses.
    pub fn set_link(&self, host: Host, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set to-{} {state}", self.namespace("s"), host.role()))
    }

    /// What the agent of a host (`a`, `b`), or the witness (`w`), finds in its environment from its next start on.
    pub fn set_environment(&mut self, role: &str, name: &'static str, value: String) {
        self.environment.push((role.to_owned(), (name, value)));
    }

    /// The environment of a daemon. Its log level is ours unless somebody says otherwise.
    fn env(&self, role: &str) -> Vec<(&'static str, String)> {
        let level = std::env::var("UNDERSTUDY_LOG").unwrap_or_else(|_| "info".to_owned());
        let more = self.environment.iter().filter(|(its, _)| its == role).map(|(_, variable)| variable.clone());
        std::iter::once(("RUST_LOG", level)).chain(more).collect()
    }

    /// The directory of the whole laboratory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of the VM on host A.
    #[must_use]
    pub fn vm_dir(&self) -> PathBuf {
        self.dir.join("vm")
    }

    /// The QMP socket of the VM on host A. QEMU serves one client at a time.
    #[must_use]
    pub fn vm_control(&self) -> PathBuf {
        self.vm_dir().join("qmp.sock")
    }

    /// Where an operator's own monitor of the VM on host A would be.
    #[must_use]
    pub fn vm_second(&self) -> PathBuf {
        self.vm_dir().join("second.sock")
    }

    /// The pid of a host's agent.
    ///
    /// # Errors
    /// If it does not run.
    pub fn agent_pid(&self, host: Host) -> Result<u32> {
        let agent = self.agents.iter().find(|(its, _)| *its == host).and_then(|(_, agent)| agent.pid());
        agent.with_context(|| format!("{} runs no agent", host.name()))
    }

    /// The configuration file of a host's agent, which it reads if there is one.
    ///
    /// # Errors
    /// If its directory cannot be made.
    pub fn agent_config(&self, host: Host) -> Result<PathBuf> {
        Ok(self.part(host.name())?.join("agent.toml"))
    }

    /// A path in the laboratory's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What a host's agent keeps over restarts.
    #[must_use]
    pub fn state_dir(&self, host: Host) -> PathBuf {
        self.dir.join(host.name()).join("state")
    }

    /// Where a host's agent keeps its sockets and twins.
    #[must_use]
    pub fn run_dir(&self, host: Host) -> PathBuf {
        self.dir.join(host.name()).join("run")
    }

    fn control(&self, host: Host) -> PathBuf {
        self.run_dir(host).join("agent.sock")
    }

    /// A client of a host's agent.
    #[must_use]
    pub fn client(&self, host: Host) -> Client {
        Client::new(self.control(host))
    }

    /// A client of the witness.
    #[must_use]
    pub fn witness_client(&self) -> Client {
        Client::new(self.dir.join("witness/run/witness.sock"))
    }

    /// What the agents say about themselves, for an error's reader.
    pub async fn statuses(&self) -> String {
        let mut text = String::new();
        for host in [Host::A, Host::B] {
            let status = match self.client(host).status().await {
                Ok(status) => serde_json::to_string_pretty(&status).unwrap_or_default(),
                Err(error) => error.to_string(),
            };
            text.push_str(&format!("--- status of {}\n{status}\n", host.name()));
        }
        text
    }

    /// Runs the CLI on a host, as its operator would.
    ///
    /// # Errors
    /// With what it said, if it fails or takes longer than `bound`.
    pub async fn understudy(&self, host: Host, args: &[&str], bound: Duration) -> Result<String> {
        let Ended { code, out, err } = self.try_understudy(host, args, bound).await?;
        if code == Some(0) {
            return Ok(out);
        }
        let code = code.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
        bail!("`understudy {}` on {} ended with {code}: {}{}", args.join(" "), host.name(), out, err.trim())
    }

    /// The same, however it ends.
    ///
    /// # Errors
    /// If it cannot be started or takes longer than `bound`.
    pub async fn try_understudy(&self, host: Host, args: &[&str], bound: Duration) -> Result<Ended> {
        self.beside(host, args, bound).await
    }

    /// The same, while the laboratory changes. Begins when it is first polled.
    pub fn beside(&self, host: Host, args: &[&str], bound: Duration) -> impl Future<Output = Result<Ended>> + use<> {
        let what = format!("`understudy {}` on {}", args.join(" "), host.name());
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let env = [("UNDERSTUDY_CONTROL", self.control(host).display().to_string())];
        let (namespace, understudy) = (self.namespace(host.role()), self.understudy.clone());
        async move { outcome(&what, &namespace, &understudy, &args, &env, bound).await }
    }

    /// Pairs both hosts with the witness, and with each other.
    ///
    /// # Errors
    /// If a window cannot be opened or joined.
    pub async fn pair(&self) -> Result<()> {
        for host in [Host::A, Host::B] {
            self.pair_witness(host).await?;
        }
        self.pair_hosts().await
    }

    /// Pairs a host with the witness.
    ///
    /// # Errors
    /// If the window cannot be opened or joined.
    pub async fn pair_witness(&self, host: Host) -> Result<()> {
        let window = PairOpenRequest { ttl_s: 60 };
        let code = self.witness_client().pair_open(&window).await.context("the witness opens no window")?.code;
        self.understudy(host, &["pair", WITNESS, "--code", &code, "--witness"], COMMAND).await?;
        Ok(())
    }

    /// Pairs both hosts with each other.
    ///
    /// # Errors
    /// If the window cannot be opened or joined.
    pub async fn pair_hosts(&self) -> Result<()> {
        self.pair_two(Host::A, Host::B).await
    }

    /// Kills host A: its VM and its agent at once, then its link, then whatever else ran there.
    ///
    /// # Errors
    /// If the VM had ended before, or a process does not end.
    pub async fn kill_host_a(&mut self) -> Result<Death> {
        let mut vm = self.vm.take();
        match &mut vm {
            Some(vm) => vm.check().context("before its host was killed")?,
            None => ensure!(self.microvm, "no VM was booted"),
        }
        let agent = self.agents.iter().find(|(host, _)| *host == Host::A).and_then(|(_, agent)| agent.pid());
        let pids: Vec<Pid> = [vm.as_ref().and_then(Daemon::pid), agent]
            .into_iter()
            .flatten()
            .filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
            .collect();
        let begun_ns = now_ns();
        for pid in pids {
            kill_process(pid, Signal::KILL).context("cannot kill host A")?;
        }
        match &mut vm {
            Some(vm) => drop(vm.ended(END).await?),
            None => self.agent_ended(Host::A).await?,
        }
        let over_ns = now_ns();
        ip(&format!("-n {} link set to-a down", self.namespace("s")))?;
        kill_all(&self.namespace("a"))?;
        Ok(Death { begun_ns, over_ns })
    }

    /// Host A is back after its death: its link, and its agent. Nothing of what ran there is.
    ///
    /// # Errors
    /// If the agent does not answer within a bound.
    pub async fn raise_host_a(&mut self) -> Result<()> {
        self.raise_host(Host::A).await
    }

    /// Kills everything that runs on a host at once, whatever it is, then its link, then what had been started meanwhile.
    ///
    /// # Errors
    /// If a process does not end.
    pub fn kill_host(&mut self, host: Host) -> Result<()> {
        let namespace = self.namespace(host.role());
        for pid in processes_in(&namespace) {
            // One that has ended meanwhile is as dead as the others.
            let _ = kill_process(pid, Signal::KILL);
        }
        self.set_link(host, false)?;
        kill_all(&namespace)?;
        self.agents.retain(|(its, _)| *its != host);
        if host == Host::A {
            self.vm = None;
        }
        Ok(())
    }

    /// A host is back after its death: its link, and its agent. Nothing of what ran there is.
    ///
    /// # Errors
    /// If the agent does not answer within a bound.
    pub async fn raise_host(&mut self, host: Host) -> Result<()> {
        self.agents.retain(|(its, _)| *its != host);
        self.set_link(host, true)?;
        self.start_agent(host).await
    }

    /// The pid of the witness.
    ///
    /// # Errors
    /// If none runs.
    pub fn witness_pid(&self) -> Result<u32> {
        self.witness.as_ref().and_then(Daemon::pid).context("no witness runs")
    }

    /// Has Redis end, and with it its guest, in good order.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub async fn shut_redis_down(&self) -> Result<()> {
        let say = format!("exec 3<>/dev/tcp/{}/{}; echo SHUTDOWN NOSAVE >&3", REDIS.ip(), REDIS.port());
        let args = ["-c".to_owned(), say];
        let said = outcome("SHUTDOWN", &self.namespace("c"), Path::new("bash"), &args, &[], COMMAND).await?;
        ensure!(said.code == Some(0), "Redis did not take its leave: {said:?}");
        Ok(())
    }

    /// Waits until a process has ended that is not the laboratory's own.
    ///
    /// # Errors
    /// If it does not within `bound`.
    pub async fn process_ended(&self, pid: u32, bound: Duration) -> Result<()> {
        until(&format!("process {pid} to end"), bound, async || {
            Ok(if Path::new(&format!("/proc/{pid}")).exists() { Err("it runs".to_owned()) } else { Ok(()) })
        })
        .await
    }

    /// Ends a host's agent in good order, as for an upgrade.
    ///
    /// # Errors
    /// If it does not run, or does not end.
    pub async fn stop_agent(&mut self, host: Host) -> Result<()> {
        let at = self.agents.iter().position(|(its, _)| *its == host);
        let (_, mut agent) = self.agents.swap_remove(at.with_context(|| format!("{} runs no agent", host.name()))?);
        agent.check()?;
        let pid = agent.pid().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).context("no process")?;
        kill_process(pid, Signal::TERM)?;
        agent.ended(COMMAND).await.map(drop)
    }

    /// An error if a process that should run has ended.
    ///
    /// # Errors
    /// See above.
    pub fn check(&mut self, hosts: &[Host]) -> Result<()> {
        for (host, agent) in &mut self.agents {
            if hosts.contains(host) {
                agent.check()?;
            }
        }
        if let Some(witness) = &mut self.witness {
            witness.check()?;
        }
        match &mut self.vm {
            Some(vm) if hosts.contains(&Host::A) => vm.check(),
            _ => Ok(()),
        }
    }

    /// The process of the VM on host A.
    ///
    /// # Errors
    /// If it has ended.
    pub fn vm_pid(&self) -> Result<u32> {
        match self.vm.as_ref().and_then(Daemon::pid) {
            Some(pid) => Ok(pid),
            None => bail!("the VM does not run on host A"),
        }
    }
}

/// A copy of a disk; holes stay holes.
fn copy_disk(from: &Path, dir: &Path) -> Result<PathBuf> {
    let image = dir.join("disk.raw");
    let copied = Command::new("cp").arg("--sparse=always").arg(from).arg(&image).output().context("cannot run cp")?;
    ensure!(copied.status.success(), "cp failed: {}", String::from_utf8_lossy(&copied.stderr).trim());
    Ok(image)
}

/// A sparse raw image with an empty file system.
fn make_disk(dir: &Path, mib: u64) -> Result<PathBuf> {
    let image = dir.join("disk.raw");
    let file = fs::File::create(&image).with_context(|| format!("cannot create {}", image.display()))?;
    file.set_len(mib << 20).with_context(|| format!("cannot size {}", image.display()))?;
    let search = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let made = Command::new("mkfs.ext4")
        .env("PATH", search)
        .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(&image)
        .output()
        .context("cannot run mkfs.ext4")?;
    ensure!(made.status.success(), "mkfs.ext4 failed: {}", String::from_utf8_lossy(&made.stderr).trim());
    Ok(image)
}

impl Drop for Lab {
    fn drop(&mut self) {
        let daemons = self.vm.iter_mut().chain(self.witness.iter_mut());
        for daemon in daemons.chain(self.agents.iter_mut().map(|(_, agent)| agent)) {
            daemon.kill();
        }
        sweep(self.maker);
    }
}
