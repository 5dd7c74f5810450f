//! The control API's requests and answers, as serialised.
//!
//! Units are in the names: `_ms` are milliseconds, `_ns` nanoseconds of `CLOCK_MONOTONIC` on the answering host, `_unix_ms`
//! milliseconds since 1970. Unknown fields of requests are refused, unknown fields of answers ignored, so an older CLI can
//! read a newer agent.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use super::policy::{DurabilityPolicy, EpochPolicy, ShadowPolicy, WithoutWitness};

/// The highest phi that is reported: more means nothing more, and JSON has no infinity.
pub const MAX_PHI: f64 = 1_000.0;

/// Which copy of a VM this agent has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The copy that runs and is replicated.
    Primary,
    /// The copy that waits.
    Standby,
    /// A former standby that took over and runs now.
    Survivor,
}

impl Role {
    /// The word that operators see.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::Survivor => "survivor",
        }
    }
}

/// How far a VM's protection is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "state", content = "progress", rename_all = "kebab-case")]
pub enum ProtectionState {
    /// Runs by itself, nobody stands by.
    #[default]
    Unprotected,
    /// Standby and witness are being asked; nothing is copied yet.
    Pairing,
    /// Memory is being copied for the first time, or again.
    Syncing(SyncProgress),
    /// The standby holds a whole, rehearsed copy; output waits for its acknowledgements.
    Protected,
    /// Runs, but a failure of this host would lose it now.
    Degraded,
    /// Ownership is changing hands.
    FailingOver,
    /// Another copy owns the VM; this one is mute and stands, or is gone.
    Fenced,
    /// Stopped by an error that needs an operator.
    Error,
}

/// How far the initial synchronisation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SyncProgress {
    /// Pages sent in this round; while the disks are copied, blocks of 4 KiB.
    pub done_pages: u64,
    /// Pages that this round will send.
    pub total_pages: u64,
    /// The round, from 1: all pages in the first, in later ones what was written meanwhile. 0 while the disks are copied, which
    /// comes first.
    pub round: u32,
}

impl ProtectionState {
    /// The words of all states, in the order of a protection's life.
    pub const WORDS: [&'static str; 8] =
        ["unprotected", "pairing", "syncing", "protected", "degraded", "failing-over", "fenced", "error"];

    /// The word that operators see.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Pairing => "pairing",
            Self::Syncing(_) => "syncing",
            Self::Protected => "protected",
            Self::Degraded => "degraded",
            Self::FailingOver => "failing-over",
            Self::Fenced => "fenced",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for ProtectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// One VM as this agent sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name: QEMU's `-name`, or what it was protected as.
    pub name: String,
    /// Its identity in the ownership store.
    pub vm_id: String,
    /// Which copy this agent has.
    pub role: Role,
    /// How far its protection is. Serialised as `state`, and `progress` while syncing.
    #[serde(flatten)]
    pub state: ProtectionState,
    /// Why it is in that state, one sentence; empty if there is nothing to say.
    #[serde(default)]
    pub reason: String,
    /// What to do about it; empty if nothing.
    #[serde(default)]
    pub advice: String,
    /// Grows with each change of who may run.
    pub generation: u64,
    /// The last epoch that the standby acknowledged (standby: that it holds whole).
    pub epoch_committed: u64,
    /// The epoch that runs now (standby: that it receives now).
    pub epoch_current: u64,
    /// The other side's name; empty if there is none.
    #[serde(default)]
    pub peer: String,
    /// How alive the other side looks, if heartbeats are exchanged for this VM.
    #[serde(default)]
    pub suspicion: Option<Suspicion>,
    /// The recent epochs, if there were any.
    #[serde(default)]
    pub epochs: Option<EpochSummary>,
    /// Output held until its epoch is acknowledged, if a gate is in place.
    #[serde(default)]
    pub held: Option<HeldOutput>,
    /// What our pauses do to the guest's clock; on the primary alone.
    #[serde(default)]
    pub guest_clock: Option<GuestClock>,
    /// What this protection does not hold or cover, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The last failover that this agent took part in.
    #[serde(default)]
    pub failover: Option<FailoverReport>,
    /// Where the survivor runs, once this agent activated it.
    #[serde(default)]
    pub survivor: Option<SurvivorAt>,
    /// The hosts that may hold it, by name: the one that it was first protected on, then those that may stand by, best first.
    #[serde(default)]
    pub hosts: Vec<String>,
}

impl VmStatus {
    /// A VM of which nothing but name, identity and role is known yet.
    #[must_use]
    pub fn new(name: impl Into<String>, vm_id: impl Into<String>, role: Role) -> Self {
        Self {
            name: name.into(),
            vm_id: vm_id.into(),
            role,
            state: ProtectionState::Unprotected,
            reason: String::new(),
            advice: String::new(),
            generation: 0,
            epoch_committed: 0,
            epoch_current: 0,
            peer: String::new(),
            suspicion: None,
            epochs: None,
            held: None,
            guest_clock: None,
            warnings: Vec::new(),
            failover: None,
            survivor: None,
            hosts: Vec::new(),
        }
    }
}

/// What the failure detector thinks of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Suspicion {
    /// The accrual detector's value, at most [`MAX_PHI`]: 1 means one chance in ten to be wrong about a failure, 2 one in
    /// a hundred.
    pub phi: f64,
    /// Time since a heartbeat was last heard.
    pub silence_ms: f64,
    /// Whether that is enough to act on.
    pub suspected: bool,
}

impl Suspicion {
    /// Bounds `phi` to what can be reported.
    #[must_use]
    pub fn new(phi: f64, silence_ms: f64, suspected: bool) -> Self {
        let phi = if phi.is_nan() { 0.0 } else { phi.clamp(0.0, MAX_PHI) };
        Self { phi, silence_ms: if silence_ms.is_finite() { silence_ms.max(0.0) } else { 0.0 }, suspected }
    }
}

/// The recent epochs in numbers. `p50` and `p99` are over the last [`crate::status::WINDOW`] committed epochs, totals since
/// the protection began.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct EpochSummary {
    /// Committed epochs, in all.
    pub epochs: u64,
    /// Start of an epoch to the start of the next, pause included.
    pub epoch_ms_p50: f64,
    /// Call of pause to return of resume.
    pub pause_ms_p50: f64,
    /// The same, 99th percentile.
    pub pause_ms_p99: f64,
    /// Where the pause goes.
    pub pause_parts_ms_p50: PausePartsMs,
    /// Pages found dirty in an epoch.
    pub dirty_pages_p50: u64,
    /// End of the pause until the standby's acknowledgement was read.
    pub commit_ms_p50: f64,
    /// The same, 99th percentile.
    pub commit_ms_p99: f64,
    /// Encoded bytes by encoding, in all.
    pub bytes: EncodedBytes,
    /// Bytes given to the transport, in all.
    pub wire_bytes: u64,
}

/// What pauses do to the guest's clock, which stands in each of them.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct GuestClock {
    /// How long this agent has made the guest stand since protection began: about what its clock lost, unless something in
    /// the guest sets it right. Pauses by its owner do not count.
    pub lag_seconds: f64,
    /// The part of the time that the guest stood, over the last [`crate::status::WINDOW`] committed epochs.
    pub pause_share: f64,
}

/// Where a pause goes, in milliseconds. Parts may overlap.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PausePartsMs {
    /// Until the vCPUs stood and I/O was drained.
    pub stop: f64,
    /// Finding dirty pages and arming the tracker again.
    pub harvest: f64,
    /// Saving device state.
    pub device: f64,
    /// Copying the dirty pages aside.
    pub copy: f64,
    /// Until the guest ran again.
    pub resume: f64,
}

/// Encoded bytes by encoding, frame headers included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EncodedBytes {
    /// Pages of zeroes.
    pub zero: u64,
    /// Pages found dirty that equal what was sent last.
    pub same: u64,
    /// Changed words against what was sent last.
    pub delta: u64,
    /// LZ4.
    pub lz4: u64,
    /// Whole pages.
    pub raw: u64,
    /// Device state, however encoded.
    pub device: u64,
}

impl EncodedBytes {
    /// The fields with their names, in a fixed order.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 6] {
        [
            ("zero", self.zero),
            ("same", self.same),
            ("delta", self.delta),
            ("lz4", self.lz4),
            ("raw", self.raw),
            ("device", self.device),
        ]
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl std::ops::AddAssign for EncodedBytes {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.same += other.same;
        self.delta += other.delta;
        self.lz4 += other.lz4;
        self.raw += other.raw;
        self.device += other.device;
    }
}

/// Output that waits for its epoch's acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct HeldOutput {
    /// Frames.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Age of the oldest; 0 if none is held.
    pub oldest_ms: f64,
    /// Frames released since the gate was made.
    pub released: u64,
    /// Frames dropped since the gate was made.
    pub dropped: u64,
}

impl From<vmm_hooks::guest::Held> for HeldOutput {
    fn from(held: vmm_hooks::guest::Held) -> Self {
        Self {
            frames: held.frames,
            bytes: held.bytes,
            oldest_ms: held.oldest.map_or(0.0, |at| at.elapsed().as_secs_f64() * 1e3),
            released: held.released,
            dropped: held.dropped,
        }
    }
}

/// Why a copy asked to go on alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverCause {
    /// No heartbeat came for too long.
    Silence,
    /// An epoch stayed unacknowledged for too long.
    Unacknowledged,
    /// The peer's agent started again and remembers nothing.
    PeerRestarted,
    /// The peer's agent says that its guest has died.
    GuestDied,
    /// An operator asked for a switch-over.
    Planned,
    /// An operator forced the other host out, which was confirmed to be dead.
    Forced,
}

impl FailoverCause {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Silence, Self::Unacknowledged, Self::PeerRestarted, Self::GuestDied, Self::Planned, Self::Forced];

    /// The word that operators and metrics use.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Silence => "silence",
            Self::Unacknowledged => "unacknowledged",
            Self::PeerRestarted => "peer-restarted",
            Self::GuestDied => "guest-died",
            Self::Forced => "forced",
            Self::Planned => "planned",
        }
    }
}

/// How a failover went on this host. Instants are `CLOCK_MONOTONIC` nanoseconds of this host; a phase that has not come
/// yet is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// Why.
    pub cause: FailoverCause,
    /// The generation that was won or lost.
    pub generation: u64,
    /// The epoch that was activated.
    pub epoch: u64,
    /// When the failure was detected, by the wall clock.
    pub detected_unix_ms: u64,
    /// The last heartbeat heard from the other side.
    pub last_heard_monotonic_ns: u64,
    /// The failure was detected, or the operator asked.
    pub detected_monotonic_ns: u64,
    /// The ownership grant was read.
    #[serde(default)]
    pub granted_monotonic_ns: Option<u64>,
    /// Device state and memory were loaded.
    #[serde(default)]
    pub loaded_monotonic_ns: Option<u64>,
    /// The survivor ran and had announced itself.
    #[serde(default)]
    pub running_monotonic_ns: Option<u64>,
    /// Last heartbeat heard to detection.
    pub detection_ms: f64,
    /// Detection to the grant.
    #[serde(default)]
    pub grant_ms: Option<f64>,
    /// The grant to the running survivor, in its parts.
    #[serde(default)]
    pub activation_ms: Option<ActivationMs>,
}

#[cfg(test)]
impl FailoverReport {
    /// One of which every phase has come.
    pub(crate) fn example() -> Self {
        Self {
            cause: FailoverCause::Silence,
            generation: 2,
            epoch: 9,
            detected_unix_ms: 1,
            last_heard_monotonic_ns: 1,
            detected_monotonic_ns: 2,
            granted_monotonic_ns: Some(3),
            loaded_monotonic_ns: Some(4),
            running_monotonic_ns: Some(5),
            detection_ms: 200.0,
            grant_ms: Some(2.0),
            activation_ms: Some(ActivationMs { load: 30.0, resume: 1.0, total: 32.0 }),
        }
    }
}

/// How long an activation took, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ActivationMs {
    /// Loading device state, relaunches included.
    pub load: f64,
    /// From there until the guest ran.
    pub resume: f64,
    /// The grant read until the guest ran: `load`, `resume`, and finishing the last epoch's application before them.
    pub total: f64,
}

/// Where a survivor runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SurvivorAt {
    /// Where it can be attached to (QEMU: its QMP socket).
    pub control: String,
    /// Its process.
    pub pid: u32,
}

/// A paired node, seen from this agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Its pinned identity.
    pub node_id: String,
    /// `agent` or `witness`.
    pub kind: PeerKind,
    /// Where it was reached last; empty if never.
    #[serde(default)]
    pub address: String,
    /// Whether a connection is up.
    pub connected: bool,
    /// How alive it looks, if heartbeats are exchanged with it.
    #[serde(default)]
    pub suspicion: Option<Suspicion>,
    /// The round trip on the path that is heard best.
    #[serde(default)]
    pub rtt_ms: Option<f64>,
    /// Each path that heartbeats take.
    #[serde(default)]
    pub paths: Vec<super::paths::PathStatus>,
}

/// What a paired node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerKind {
    /// A host's agent.
    Agent,
    /// An ownership store.
    Witness,
}

/// An agent and all it knows. Answer of `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's name.
    pub name: String,
    /// Its identity: what peers pin.
    pub node_id: String,
    /// Grows with each start of the agent.
    pub incarnation: u64,
    /// The program's version.
    pub version: String,
    /// Its VMs, by name.
    pub vms: Vec<VmStatus>,
    /// The nodes it is paired with.
    pub peers: Vec<PeerStatus>,
}

/// A witness and what it keeps. Answer of a witness's `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessStatus {
    /// The witness's name.
    pub name: String,
    /// Its identity: what peers pin.
    pub node_id: String,
    /// The store's identity: changes when the store is made anew.
    pub store_id: String,
    /// The program's version.
    pub version: String,
    /// Names of the nodes it is paired with.
    pub peers: Vec<String>,
}

/// `POST /v1/protect`: start to protect a VM. Answered with [`Accepted`] once discovery and refusals are through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    /// A name, a QMP socket's path or a PID.
    pub vm: String,
    /// The standby's name, as paired.
    pub to: String,
    /// When an epoch ends; the agent's default if absent.
    #[serde(default)]
    pub epoch: Option<EpochPolicy>,
    /// How much memory the copy of sent pages may take.
    #[serde(default)]
    pub shadow: Option<ShadowPolicy>,
    /// What an acknowledgement promises of disk writes.
    #[serde(default)]
    pub durability: DurabilityPolicy,
    /// The witness's name; the agent's default if absent.
    #[serde(default)]
    pub witness: Option<String>,
    /// More hosts that may stand by later, as paired, best first: whoever runs the VM protects it again with one of them, with
    /// `to` or with this host.
    #[serde(default)]
    pub standbys: Vec<String>,
    /// Protect it once: when the protection ends by a failure, nobody looks for another standby.
    #[serde(default)]
    pub once: bool,
    /// There is no third host: the record is kept by one of the two, this one at first. What is done if that one is lost.
    #[serde(default)]
    pub without_witness: Option<WithoutWitness>,
}

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The protection's state or its reason changed.
    State,
    /// Who may run changed: another generation was read.
    Ownership,
    /// A copy was activated here.
    Failover,
    /// The standby's copy was tried.
    Rehearsal,
    /// A first copy was made.
    Sync,
    /// An operator began to break something on purpose.
    Drill,
}

/// Something that happened to a VM on this host: `GET /v1/vms/NAME/events?last=N`, oldest first. Kept over restarts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEvent {
    /// When, in milliseconds since 1970 by this host's clock.
    pub unix_ms: u64,
    /// What kind of thing.
    pub kind: EventKind,
    /// Which copy this host had then.
    pub role: Role,
    /// The protection's state after it, as [`ProtectionState::word`].
    pub state: String,
    /// The generation known then.
    pub generation: u64,
    /// The last committed epoch then.
    pub epoch: u64,
    /// In words.
    pub text: String,
}

/// A request that names a VM and nothing else: `POST /v1/unprotect`, `POST /v1/rehearse`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRequest {
    /// The VM's name.
    pub vm: String,
}

/// `POST /v1/failover`: ask for a change of hands. Answered with [`Accepted`]; progress is in the VM's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// The VM's name.
    pub vm: String,
    /// On the primary: stop here, commit the last epoch, go on there, nothing lost and nobody suspected. If false, the
    /// standby asks for ownership at once, as if the primary were silent.
    #[serde(default)]
    pub planned: bool,
    /// Only to the VM's first host: refused, with nothing changed, unless the VM is protected there now.
    #[serde(default)]
    pub back: bool,
    /// Without a third host and without the other one, which is dead: go on here. The agent's fence command must say so, or `confirm`.
    #[serde(default)]
    pub force: bool,
    /// The name of the host that the operator knows to be dead.
    #[serde(default)]
    pub confirm: Option<String>,
    /// The VM is this host's and waits for the other one to be switched off, which is well: give it back.
    #[serde(default)]
    pub give_back: bool,
}

/// `POST /v1/pair/open`: let one node pair with this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairOpenRequest {
    /// How long the window stays open, in seconds.
    pub ttl_s: u64,
}

/// An open pairing window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairWindow {
    /// This node's name.
    pub name: String,
    /// The one-time code.
    pub code: String,
    /// Where the other node must connect to.
    pub address: String,
    /// When the window closes.
    pub expires_unix_ms: u64,
}

/// `POST /v1/pair/join`: pair with a node whose window is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairJoinRequest {
    /// Host name or address.
    pub host: String,
    /// UDP port.
    pub port: u16,
    /// The one-time code that the other side printed.
    pub code: String,
}

/// A pairing that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paired {
    /// The other node's name.
    pub name: String,
    /// Its pinned identity.
    pub node_id: String,
    /// What it is.
    pub kind: PeerKind,
}

/// `POST /v1/doctor`: what would stop protection here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DoctorRequest {
    /// A name, a QMP socket's path or a PID; the host alone if absent.
    #[serde(default)]
    pub vm: Option<String>,
}

/// What was checked and found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DoctorReport {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl DoctorReport {
    /// Whether nothing found would stop protection.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.verdict != Verdict::Refused)
    }
}

/// One thing that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked, in a few words.
    pub name: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found, one sentence.
    pub found: String,
    /// What to do about it; empty if nothing.
    #[serde(default)]
    pub advice: String,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// Protection works, with a limit that the operator should know.
    Warning,
    /// Protection would be refused.
    Refused,
}

/// Work was started; its progress is in the VM's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The VM's name, by which its status is found.
    pub vm: String,
}

/// How a rehearsal went. Answer of `POST /v1/rehearse`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RehearsalReport {
    /// The epoch that was loaded.
    pub epoch: u64,
    /// Starting the scratch twin until it answered.
    pub launch_ms: f64,
    /// Loading the device state.
    pub load_ms: f64,
}

/// Why a request failed, in words for its operator. Body of every answer that is not 200 or 202.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct ErrorBody {
    /// Which kind: decides the HTTP status and the CLI's exit code.
    pub kind: ErrorKind,
    /// What happened.
    pub message: String,
    /// What is safe and what to do; empty if there is nothing to add.
    #[serde(default)]
    pub advice: String,
    /// What caused it, outermost first.
    #[serde(default)]
    pub causes: Vec<String>,
}

/// The kinds of [`ErrorBody`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request itself is wrong.
    Invalid,
    /// There is no such VM, peer or witness.
    NotFound,
    /// It cannot be done with this VM, or in its present state; nothing was changed.
    Refused,
    /// The VM is not protected, and the request needs that.
    NotProtected,
    /// Other work on this VM is under way.
    Busy,
    /// A peer or a witness did not answer.
    Unavailable,
    /// Something else failed.
    Failed,
}

impl ErrorBody {
    /// An error without advice and causes.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), advice: String::new(), causes: Vec::new() }
    }

    /// Adds what is safe and what to do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// Adds the cause and its causes.
    #[must_use]
    pub fn because(mut self, cause: &dyn std::error::Error) -> Self {
        let mut next = Some(cause);
        while let Some(error) = next {
            self.causes.push(error.to_string());
            next = error.source();
        }
        self
    }
}

impl From<vmm_hooks::guest::GuestError> for ErrorBody {
    fn from(error: vmm_hooks::guest::GuestError) -> Self {
        use vmm_hooks::guest::GuestErrorKind as Kind;
        let kind = match error.kind {
            Kind::Refused => ErrorKind::Refused,
            Kind::Gone => ErrorKind::NotFound,
            Kind::Failed => ErrorKind::Failed,
        };
        let mut body = Self::new(kind, error.message).advise(error.advice);
        if let Some(source) = error.source {
            body = body.because(source.as_ref());
        }
        body
    }
}
