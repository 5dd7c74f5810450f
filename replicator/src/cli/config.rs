//! Configuration of agent and witness: a TOML file, then flags over it, then checks.
//!
//! [`AgentConfig`] and [`WitnessConfig`] are complete and checked: who holds one need not check again. Unknown keys are
//! errors, so that a typo does not silently mean the default.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use heartbeat::beat::MAX_PATHS;
use heartbeat::etcd::{DEFAULT_PREFIX, EtcdConfig, EtcdUser};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use vmm_hooks::qemu::TrackerChoice;

use super::units::{Addresses, Listen, Span};
use crate::control::policy::{EpochPolicy, ShadowPolicy};

/// UDP port of replication and control between agents.
pub const DEFAULT_PORT: u16 = 7844;
/// UDP port of heartbeats: a socket of their own, so that bulk data does not delay them.
pub const DEFAULT_HEARTBEAT_PORT: u16 = 7845;
/// UDP port of a witness.
pub const DEFAULT_WITNESS_PORT: u16 = 7846;
/// UDP port of pairing windows, of agents and witnesses alike. Open only while a window is.
pub const DEFAULT_PAIRING_PORT: u16 = 7843;
/// Where the agent's files are looked for if `--config` is not given.
pub const DEFAULT_AGENT_FILE: &str = "/etc/understudy/agent.toml";
/// Where the witness's file is looked for if `--config` is not given.
pub const DEFAULT_WITNESS_FILE: &str = "/etc/understudy/witness.toml";
/// Directory of the agent's control socket.
pub const DEFAULT_RUN_DIR: &str = "/run/understudy";
/// Directory of the witness's control socket.
pub const DEFAULT_WITNESS_RUN_DIR: &str = "/run/understudy-witness";
/// The most epochs that may be unacknowledged.
pub const MAX_PIPELINE: u32 = 16;
/// The longest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what is expected; the source names line and key.
    #[error("the configuration file {path} is wrong")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("`{key}` = {value} cannot be: {why}")]
    Value {
        /// The key as written in the file.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        why: &'static str,
    },
}

/// A complete, checked configuration of an agent.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentConfig {
    /// The agent's name; `None` keeps the one it has, or takes the host's.
    pub name: Option<String>,
    /// UDP address of replication and control between agents.
    pub listen: SocketAddr,
    /// UDP address of pairing windows; bound only while one is open.
    pub pair_listen: SocketAddr,
    /// Where peers are told to reach `listen`, best first, instead of where they see this host; they dial these in turn.
    pub addresses: Vec<SocketAddr>,
    /// UDP addresses of heartbeats, one for each path, in the same order on all hosts.
    pub heartbeat_listen: Vec<SocketAddr>,
    /// What must survive a restart of the host: identity, pinned peers, generations.
    pub state_dir: PathBuf,
    /// What need not: the control socket, the twins' directories.
    pub run_dir: PathBuf,
    /// Where `/metrics` and the status page are served.
    pub metrics: Option<SocketAddr>,
    /// The witness that is asked if a request names none; `None`: the one that this agent is paired with.
    pub witness: Option<String>,
    /// The cluster that is asked instead of a witness.
    pub etcd: Option<EtcdConfig>,
    /// What switches another host off, or says that it is off.
    pub fence: Option<FenceConfig>,
    /// Failure detection.
    pub heartbeat: HeartbeatConfig,
    /// Epochs.
    pub epoch: EpochConfig,
    /// Bounds of held output.
    pub gate: GateConfig,
    /// What this host does for VMs of others.
    pub standby: StandbyConfig,
    /// How dirty pages are found.
    pub tracker: TrackerChoice,
}

impl AgentConfig {
    /// Where peers reach it for replication, best first.
    #[must_use]
    pub fn reachable_at(&self) -> Vec<SocketAddr> {
        if self.addresses.is_empty() { vec![self.listen] } else { self.addresses.clone() }
    }

    /// The control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        agent_socket(&self.run_dir)
    }
}

/// The control socket of an agent with this run directory.
#[must_use]
pub fn agent_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// The control socket of a witness with this run directory.
#[must_use]
pub fn witness_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("witness.sock")
}

/// When a peer is suspected. None of this is part of safety.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeartbeatConfig {
    /// Time between two heartbeats.
    pub interval: Duration,
    /// Silence after which the peer is suspected.
    pub silence: Duration,
    /// Age of the oldest unacknowledged epoch after which the standby is suspected.
    pub unacknowledged: Duration,
}

/// A program that switches another host off and confirms it, as the fence agents of cluster managers do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FenceConfig {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// How long it may take.
    pub timeout: Duration,
    /// A VM that comes to this host by a failover runs here only once its other host is confirmed to be off.
    pub required: bool,
}

/// When an epoch ends and how many may be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochConfig {
    /// Unless a request says otherwise.
    pub policy: EpochPolicy,
    /// Unless a request says otherwise.
    pub shadow: ShadowPolicy,
    /// Epochs that may be unacknowledged, 1 to [`MAX_PIPELINE`].
    pub pipeline: u32,
    /// `auto`: bound on the share of time paused while output waits, in percent, 1 to 90.
    pub busy_share: u8,
    /// `auto`: the same while output waits and the guest has nothing else to do; counts if it is above `busy_share`.
    pub waiting_share: u8,
    /// `auto`: the same while no output waits.
    pub idle_share: u8,
    /// `auto`: the longest epoch of an idle guest.
    pub longest: Duration,
    /// `auto`: how long output is gathered before a capture.
    pub gather: Duration,
}

/// Bounds of held output. What exceeds them is dropped, as a network may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateConfig {
    /// Bytes held per VM.
    pub bytes: u64,
    /// Age of a held frame.
    pub age: Duration,
}

/// What this host does for VMs of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandbyConfig {
    /// Bytes of epochs staged and not applied, per VM.
    pub staging: u64,
    /// Bridge of the primary's host to bridge of this host; one that is not listed keeps its name.
    pub bridges: BTreeMap<String, String>,
    /// The QEMU program to use instead of the one that the primary runs.
    pub qemu: Option<PathBuf>,
    /// Where copies of their disks are kept, a directory for each VM.
    pub images: PathBuf,
}

/// Values of flags of `understudy agent`; each beats the file's.
#[derive(Debug, Clone, Default)]
pub struct AgentOverrides {
    /// `--name`
    pub name: Option<String>,
    /// `--listen`
    pub listen: Option<SocketAddr>,
    /// `--heartbeat-listen`, once for each path; none: the file's
    pub heartbeat_listen: Vec<SocketAddr>,
    /// `--pair-listen`
    pub pair_listen: Option<SocketAddr>,
    /// `--state-dir`
    pub state_dir: Option<PathBuf>,
    /// `--run-dir`
    pub run_dir: Option<PathBuf>,
    /// `--metrics`
    pub metrics: Option<Listen>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct AgentFile {
    name: Option<String>,
    listen: Option<SocketAddr>,
    addresses: Option<Addresses>,
    heartbeat_listen: Option<Addresses>,
    pair_listen: Option<SocketAddr>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    metrics: Option<Listen>,
    witness: Option<String>,
    etcd: Option<EtcdFile>,
    fence: Option<FenceFile>,
    tracker: TrackerChoice,
    heartbeat: HeartbeatFile,
    epoch: EpochFile,
    gate: GateFile,
    standby: StandbyFile,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FenceFile {
    command: Vec<String>,
    timeout: Option<Span>,
    #[serde(default)]
    required: bool,
}

impl FenceFile {
    fn build(self) -> Result<FenceConfig, ConfigError> {
        let program = self.command.first().map(String::as_str).unwrap_or_default();
        if !program.starts_with('/') {
            return Err(value("fence.command", program, "write the absolute path of a program, then its arguments"));
        }
        let timeout = self.timeout.map_or(Duration::from_secs(60), |span| span.0);
        if timeout.is_zero() {
            return Err(value("fence.timeout", "0s", "a program that switches a host off needs some time"));
        }
        Ok(FenceConfig { command: self.command, timeout, required: self.required })
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EtcdFile {
    endpoints: Vec<String>,
    prefix: Option<String>,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
}

impl EtcdFile {
    fn build(self) -> Result<EtcdConfig, ConfigError> {
        let certificate = match (self.certificate, self.key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(path), None) | (None, Some(path)) => {
                return Err(value(
                    "etcd.certificate",
                    path.display(),
                    "write both `certificate` and `key`, or neither",
                ));
            }
        };
        let user = match (self.user, self.password_file) {
            (Some(name), Some(path)) => {
                let text = fs::read_to_string(&path).map_err(|source| ConfigError::Read { path, source })?;
                Some(EtcdUser { name, password: text.trim_end_matches(['\r', '\n']).to_owned() })
            }
            (None, None) => None,
            (Some(name), None) => {
                return Err(value("etcd.user", name, "write `password_file`, too: a file with the user's password"));
            }
            (None, Some(path)) => return Err(value("etcd.password_file", path.display(), "write `user`, too")),
        };
        let prefix = self.prefix.unwrap_or_else(|| DEFAULT_PREFIX.to_owned());
        Ok(EtcdConfig { endpoints: self.endpoints, prefix, ca: self.ca, certificate, user })
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HeartbeatFile {
    interval: Span,
    silence: Span,
    unacknowledged: Span,
}

impl Default for HeartbeatFile {
    fn default() -> Self {
        Self { interval: Span(ms(20)), silence: Span(ms(200)), unacknowledged: Span(ms(200)) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct EpochFile {
    policy: EpochPolicy,
    shadow: ShadowPolicy,
    pipeline: u32,
    busy_share: u8,
    waiting_share: u8,
    idle_share: u8,
    longest: Span,
    gather: Span,
}

impl Default for EpochFile {
    fn default() -> Self {
        Self {
            policy: EpochPolicy::Auto,
            shadow: ShadowPolicy::Full,
            pipeline: 2,
            busy_share: 25,
            waiting_share: 40,
            idle_share: 5,
            longest: Span(ms(100)),
            gather: Span(ms(3)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct GateFile {
    bytes: ByteSize,
    age: Span,
}

impl Default for GateFile {
    fn default() -> Self {
        Self { bytes: ByteSize::mib(64), age: Span(Duration::from_secs(5)) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StandbyFile {
    staging: ByteSize,
    bridges: BTreeMap<String, String>,
    qemu: Option<PathBuf>,
    images: Option<PathBuf>,
}

impl Default for StandbyFile {
    fn default() -> Self {
        Self { staging: ByteSize::gib(1), bridges: BTreeMap::new(), qemu: None, images: None }
    }
}

/// A complete, checked configuration of a witness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessConfig {
    /// The witness's name; `None` keeps the one it has, or takes the host's.
    pub name: Option<String>,
    /// UDP address.
    pub listen: SocketAddr,
    /// UDP address of pairing windows; bound only while one is open.
    pub pair_listen: SocketAddr,
    /// Records, attempts, identity. Losing it makes another witness.
    pub state_dir: PathBuf,
    /// The control socket's directory.
    pub run_dir: PathBuf,
}

impl WitnessConfig {
    /// The control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        witness_socket(&self.run_dir)
    }
}

/// Values of flags of `understudy witness`; each beats the file's.
#[derive(Debug, Clone, Default)]
pub struct WitnessOverrides {
    /// `--name`
    pub name: Option<String>,
    /// `--listen`
    pub listen: Option<SocketAddr>,
    /// `--pair-listen`
    pub pair_listen: Option<SocketAddr>,
    /// `--state-dir`
    pub state_dir: Option<PathBuf>,
    /// `--run-dir`
    pub run_dir: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct WitnessFile {
    name: Option<String>,
    listen: Option<SocketAddr>,
    pair_listen: Option<SocketAddr>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

/// The agent's configuration from `file` and flags. Without `file`, [`DEFAULT_AGENT_FILE`] if it exists.
///
/// # Errors
/// If the file cannot be read or understood, or a value cannot be.
pub fn agent(file: Option<&Path>, flags: AgentOverrides) -> Result<AgentConfig, ConfigError> {
    let file: AgentFile = read(file, DEFAULT_AGENT_FILE)?;
    let listen = flags.listen.or(file.listen).unwrap_or_else(|| any(DEFAULT_PORT));
    let state_dir = flags.state_dir.or(file.state_dir).unwrap_or_else(|| PathBuf::from("/var/lib/understudy/agent"));
    let config = AgentConfig {
        name: flags.name.or(file.name),
        listen,
        addresses: file.addresses.map(|addresses| addresses.0).unwrap_or_default(),
        heartbeat_listen: match file.heartbeat_listen {
            _ if !flags.heartbeat_listen.is_empty() => flags.heartbeat_listen,
            Some(addresses) => addresses.0,
            None => vec![SocketAddr::new(listen.ip(), DEFAULT_HEARTBEAT_PORT)],
        },
        pair_listen: pairing(flags.pair_listen.or(file.pair_listen), listen),
        run_dir: flags.run_dir.or(file.run_dir).unwrap_or_else(|| DEFAULT_RUN_DIR.into()),
        metrics: match flags.metrics.or(file.metrics) {
            Some(listen) => listen.address(),
            None => Some(SocketAddr::from(([127, 0, 0, 1], 9644))),
        },
        witness: file.witness,
        etcd: file.etcd.map(EtcdFile::build).transpose()?,
        fence: file.fence.map(FenceFile::build).transpose()?,
        heartbeat: HeartbeatConfig {
            interval: file.heartbeat.interval.0,
            silence: file.heartbeat.silence.0,
            unacknowledged: file.heartbeat.unacknowledged.0,
        },
        epoch: EpochConfig {
            policy: file.epoch.policy,
            shadow: file.epoch.shadow,
            pipeline: file.epoch.pipeline,
            busy_share: file.epoch.busy_share,
            waiting_share: file.epoch.waiting_share,
            idle_share: file.epoch.idle_share,
            longest: file.epoch.longest.0,
            gather: file.epoch.gather.0,
        },
        gate: GateConfig { bytes: file.gate.bytes.as_u64(), age: file.gate.age.0 },
        standby: StandbyConfig {
            staging: file.standby.staging.as_u64(),
            bridges: file.standby.bridges,
            qemu: file.standby.qemu,
            images: file.standby.images.unwrap_or_else(|| state_dir.join("images")),
        },
        state_dir,
        tracker: file.tracker,
    };
    check_agent(&config)?;
    Ok(config)
}

/// The witness's configuration from `file` and flags. Without `file`, [`DEFAULT_WITNESS_FILE`] if it exists.
///
/// # Errors
/// If the file cannot be read or understood, or a value cannot be.
pub fn witness(file: Option<&Path>, flags: WitnessOverrides) -> Result<WitnessConfig, ConfigError> {
    let file: WitnessFile = read(file, DEFAULT_WITNESS_FILE)?;
    let listen = flags.listen.or(file.listen).unwrap_or_else(|| any(DEFAULT_WITNESS_PORT));
    let config = WitnessConfig {
        name: flags.name.or(file.name),
        listen,
        pair_listen: pairing(flags.pair_listen.or(file.pair_listen), listen),
        state_dir: flags.state_dir.or(file.state_dir).unwrap_or_else(|| "/var/lib/understudy/witness".into()),
        run_dir: flags.run_dir.or(file.run_dir).unwrap_or_else(|| DEFAULT_WITNESS_RUN_DIR.into()),
    };
    check_name(config.name.as_deref())?;
    Ok(config)
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], port))
}

fn pairing(chosen: Option<SocketAddr>, listen: SocketAddr) -> SocketAddr {
    chosen.unwrap_or_else(|| SocketAddr::new(listen.ip(), DEFAULT_PAIRING_PORT))
}

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn read<T: DeserializeOwned + Default>(file: Option<&Path>, default: &str) -> Result<T, ConfigError> {
    let path = file.unwrap_or(Path::new(default));
    let failed = |source| ConfigError::Read { path: path.into(), source };
    let length = match fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if file.is_none() && error.kind() == io::ErrorKind::NotFound => {
            return Ok(T::default());
        }
        Err(error) => return Err(failed(error)),
    };
    if length > MAX_FILE {
        return Err(failed(io::Error::other("it is longer than 1 MiB")));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
}

fn check_agent(config: &AgentConfig) -> Result<(), ConfigError> {
    check_name(config.name.as_deref())?;
    let heartbeat = &config.heartbeat;
    let epoch = &config.epoch;
    check_addresses(config)?;
    within("heartbeat.interval", heartbeat.interval, ms(1), Duration::from_secs(1), "write 1ms to 1s")?;
    require(
        heartbeat.silence >= heartbeat.interval * 3,
        "heartbeat.silence",
        humantime::format_duration(heartbeat.silence),
        "one lost heartbeat would look like a dead host; write at least three times `heartbeat.interval`",
    )?;
    within("heartbeat.silence", heartbeat.silence, ms(3), Duration::from_secs(60), "write at most 60s")?;
    within("heartbeat.unacknowledged", heartbeat.unacknowledged, ms(10), Duration::from_secs(60), "write 10ms to 60s")?;
    require((1..=MAX_PIPELINE).contains(&epoch.pipeline), "epoch.pipeline", epoch.pipeline, "write 1 to 16 epochs")?;
    let share = |share: u8| (1..=90).contains(&share);
    require(share(epoch.busy_share), "epoch.busy_share", epoch.busy_share, "write 1 to 90 percent")?;
    require(share(epoch.waiting_share), "epoch.waiting_share", epoch.waiting_share, "write 1 to 90 percent")?;
    require(share(epoch.idle_share), "epoch.idle_share", epoch.idle_share, "write 1 to 90 percent")?;
    within("epoch.longest", epoch.longest, ms(5), Duration::from_secs(10), "write 5ms to 10s")?;
    require(
        epoch.gather <= epoch.longest,
        "epoch.gather",
        humantime::format_duration(epoch.gather),
        "output cannot be gathered for longer than the longest epoch",
    )?;
    require(
        config.gate.bytes >= 1 << 20,
        "gate.bytes",
        ByteSize(config.gate.bytes),
        "write at least 1MiB: less drops ordinary traffic",
    )?;
    require(
        usize::try_from(config.gate.bytes).is_ok(),
        "gate.bytes",
        ByteSize(config.gate.bytes),
        "it is more than this host can address",
    )?;
    within("gate.age", config.gate.age, ms(100), Duration::from_secs(60), "write 100ms to 60s")?;
    require(
        config.standby.staging >= 16 << 20,
        "standby.staging",
        ByteSize(config.standby.staging),
        "write at least 16MiB: an epoch must fit",
    )
}

fn check_addresses(config: &AgentConfig) -> Result<(), ConfigError> {
    let paths = &config.heartbeat_listen;
    let counted = |paths: usize| (1..=MAX_PATHS).contains(&paths);
    require(
        counted(paths.len()),
        "heartbeat_listen",
        format!("{paths:?}"),
        "write one to eight addresses, one for each path",
    )?;
    for (at, path) in paths.iter().enumerate() {
        require(
            config.listen != *path || path.port() == 0,
            "heartbeat_listen",
            path,
            "heartbeats need a socket of their own, other than `listen`",
        )?;
        require(
            paths.len() == 1 || !path.ip().is_unspecified(),
            "heartbeat_listen",
            path,
            "of several paths each needs this host's address on its own link",
        )?;
        require(
            !paths[..at].contains(path) || path.port() == 0,
            "heartbeat_listen",
            path,
            "it is there twice: a path needs a link of its own",
        )?;
    }
    require(config.addresses.len() <= MAX_PATHS, "addresses", config.addresses.len(), "write at most eight addresses")?;
    for address in &config.addresses {
        require(
            !address.ip().is_unspecified() && address.port() != 0,
            "addresses",
            address,
            "write an address and port where other hosts reach `listen`",
        )?;
    }
    Ok(())
}

fn check_name(name: Option<&str>) -> Result<(), ConfigError> {
    let Some(name) = name else { return Ok(()) };
    require(
        heartbeat::trust::identity::check_name(name).is_ok(),
        "name",
        format!("\"{name}\""),
        "write 1 to 64 letters, digits, `-`, `.` or `_`",
    )
}

fn within(
    key: &'static str,
    value: Duration,
    least: Duration,
    most: Duration,
    why: &'static str,
) -> Result<(), ConfigError> {
    require((least..=most).contains(&value), key, humantime::format_duration(value), why)
}

fn value(key: &'static str, value: impl std::fmt::Display, why: &'static str) -> ConfigError {
    ConfigError::Value { key, value: value.to_string(), why }
}

fn require(
    holds: bool,
    key: &'static str,
    value: impl std::fmt::Display,
    why: &'static str,
) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(self::value(key, value, why)) }
}

#[cfg(test)]
mod tests;
