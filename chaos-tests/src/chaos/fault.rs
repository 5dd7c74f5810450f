//! The faults: what each is called, to whom it is done. How is in [`super::inject`].

use super::relay::Weather;
use crate::sim::rng::Rng;

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
    /// The witness, or all members of etcd.
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
    /// SIGKILL to a member of etcd, which starts again after a while.
    KillMember(Member),
    /// SIGSTOP to a member of etcd, SIGCONT after a while.
    StopMember(Member),
    /// The witness, or most members of etcd, are dead when the primary's host dies; they come back, and then the host.
    KillHostWithoutWitness,
    /// Nothing is acknowledged to the primary's host any more, nor does it reach the witness; its VM's clients go on. Then it dies
    /// as a whole, with all that nobody has acknowledged.
    KillSevered(Means),
    /// A host's link goes down for a while: nothing passes, also not for the VM's clients.
    CutHost(Side),
    /// The witness's link goes down for a while.
    CutWitness,
    /// The link of a member of etcd goes down for a while.
    CutMember(Member),
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
    /// The standby's disk breaks.
    BrokenDisk(Breakage),
    /// A host may have only a part of the memory that it has, for a while.
    ShortOfMemory(Side),
    /// The wall clock of a party jumps, by seconds or by years, forward or back; the primary's host dies; the clock jumps back.
    JumpClock(Party),
    /// The guest reboots itself.
    Reboot,
    /// The guest shuts itself down, and its owner boots it from its disk and protects it again.
    Shutdown,
}

/// Which member of etcd, by what it is when the fault begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    /// The one that leads.
    Leader,
    /// One of the others.
    Follower,
}

/// What keeps acknowledgements away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Means {
    /// What the host sends does not reach the standby.
    Silence,
    /// The standby's disk takes no write.
    Disk,
}

/// How a disk breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breakage {
    /// It turns read-only; its host is restarted with the disk repaired.
    ReadOnly,
    /// What is written is lost, and each sync says so, until that is over by itself.
    Errors,
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
    pub const ALL: [Self; 67] = [
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
        Self::KillMember(Member::Leader),
        Self::KillMember(Member::Follower),
        Self::StopMember(Member::Leader),
        Self::StopMember(Member::Follower),
        Self::KillHostWithoutWitness,
        Self::KillSevered(Means::Silence),
        Self::KillSevered(Means::Disk),
        Self::CutHost(Primary),
        Self::CutHost(Standby),
        Self::CutWitness,
        Self::CutMember(Member::Leader),
        Self::CutMember(Member::Follower),
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
        Self::BrokenDisk(Breakage::ReadOnly),
        Self::BrokenDisk(Breakage::Errors),
        Self::ShortOfMemory(Primary),
        Self::ShortOfMemory(Standby),
        Self::JumpClock(On(Primary)),
        Self::JumpClock(On(Standby)),
        Self::JumpClock(Witness),
        Self::Reboot,
        Self::Shutdown,
    ];

    /// What happens, to whomever: faults of one kind are drawn as often as those of any other.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::KillAgent(_) | Self::KillAgents => "kill-agent",
            Self::StopAgent(_) => "stop-agent",
            Self::RestartAgent(_) => "restart-agent",
            Self::KillQemu(_) => "kill-qemu",
            Self::StopQemu(_) => "stop-qemu",
            Self::KillHost(_) => "kill-host",
            Self::KillWitness => "kill-witness",
            Self::StopWitness => "stop-witness",
            Self::KillMember(_) => "kill-member",
            Self::StopMember(_) => "stop-member",
            Self::KillHostWithoutWitness => "kill-witness-then-host",
            Self::KillSevered(_) => "kill-severed",
            Self::CutHost(_) | Self::CutWitness | Self::CutMember(_) => "cut",
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
            Self::HangDisk | Self::SlowDisk => "slow-disk",
            Self::BrokenDisk(_) => "broken-disk",
            Self::ShortOfMemory(_) => "short-of-memory",
            Self::JumpClock(_) => "jump-clock",
            Self::Reboot => "reboot",
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
            | Self::ShortOfMemory(side)
            | Self::Weather(side, _) => format!("{kind}-{}", side.word()),
            Self::KillAgents => format!("{kind}-both"),
            Self::HangDisk => "hang-disk".to_owned(),
            Self::KillMember(member) | Self::StopMember(member) => format!("{kind}-{}", member.word()),
            Self::CutMember(member) => format!("{kind}-member-{}", member.word()),
            Self::KillSevered(Means::Silence) => format!("{kind}-by-silence"),
            Self::KillSevered(Means::Disk) => format!("{kind}-by-disk"),
            Self::BrokenDisk(Breakage::ReadOnly) => format!("{kind}-read-only"),
            Self::BrokenDisk(Breakage::Errors) => format!("{kind}-errors"),
            Self::JumpClock(party) => format!("{kind}-{}", party.word()),
            Self::CutWitness => format!("{kind}-witness"),
            Self::OneWay(from, to) => format!("{kind}-{}-to-{}", to.word(), from.word()),
            Self::Apart(one, other) => format!("{kind}-{}-{}", one.word(), other.word()),
            _ => kind.to_owned(),
        }
    }

    /// Whether a client's connection cannot outlive it.
    #[must_use]
    pub fn breaks_connections(self) -> bool {
        matches!(self, Self::Shutdown | Self::Reboot)
    }
}

impl Side {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
        }
    }
}

impl Member {
    fn word(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Follower => "follower",
        }
    }

    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Leader => "which leads",
            Self::Follower => "which follows",
        }
    }
}

impl Party {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Host(side) => side.word(),
            Self::Witness => "witness",
        }
    }
}

impl Front {
    /// How bad it is, this time.
    pub(super) fn draw(self, rng: &mut Rng) -> Weather {
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
