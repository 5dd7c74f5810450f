//! A run: a laboratory of each setting, rounds of faults, and the judges.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use replicator::control::api::{EventKind, ProtectionState, Role, VmEvent};
use replicator::demo::lab::{Host, Lab, Microvm, REDIS, VM};
use replicator::demo::wait::{now_ns, until};

use super::capture::Capture;
use super::clock::Clocks;
use super::counter::{self, Count};
use super::fault::Fault;
use super::field::Field;
use super::guest;
use super::leak::Leak;
use super::leaks::{Holdings, Leaks, interfaces};
use super::linear::{self, Action, Operation};
use super::memory::Memory;
use super::power::{self, Told};
use super::report::{Moment, Report, Round, seconds};
use super::setting::{Backend, Setting, Store};
use super::sniffer::{Heard, Judge, Sniffer};
use super::storage::Storage;
use super::workload::{Broken, KEYS, Workload};
use crate::etcd::Etcd;
use crate::sim::rng::Rng;

/// Bound on being protected for the first time, and again after a fault.
const PROTECT: Duration = Duration::from_secs(300);
/// Bound on the clients' next answers, and on the end of their last question.
const ANSWERS: Duration = Duration::from_secs(120);
/// Bound on the end of what was left to be cleaned up.
const CLEAN: Duration = Duration::from_secs(60);
/// How many answers every client must have had before a fault, and after it.
const UNDER_WAY: u64 = 10;
/// The longest time from the last round's answers to the loss of power, in microseconds.
const LAST_MICROS: u64 = 1_000_000;
/// How many events of a host are looked through for those of a round.
const EVENTS: usize = 300;

/// What the judges of clients' answers say.
const NOT_LINEARIZABLE: &str = "the history is not linearizable";
const WENT_BACK: &str = "the counter is not one that only goes on";

/// Whether a run failed since something was lost that a client had been told.
#[must_use]
pub fn was_lost(failure: &str) -> bool {
    [NOT_LINEARIZABLE, WENT_BACK].iter().any(|words| failure.contains(words))
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What everything that is left to chance is drawn from.
    pub seed: u64,
    /// The faults, round by round, and in what laboratory they are played.
    pub dealt: Vec<(Setting, Vec<Fault>)>,
    /// What was to be drawn, and cannot be played on this machine, and why.
    pub left_out: Vec<String>,
    /// Directory of the guest image.
    pub guest: PathBuf,
    /// The pilot's image.
    pub pilot: PathBuf,
    /// What the guest says on host A is heard before it is acknowledged ([`super::leak`]): the judges must find it.
    pub leak: bool,
    /// The program `understudy`.
    pub understudy: PathBuf,
    /// An empty directory for state, sockets and logs. Its path is short.
    pub dir: PathBuf,
}

/// Runs `plan`. What is wrong with the product is in the report, what is wrong with this machine is an error.
///
/// # Errors
/// If a laboratory cannot be built, or its VM not be protected at all.
pub async fn run(plan: &Plan, mut progress: impl FnMut(&Round)) -> Result<Report> {
    let begun = Instant::now();
    let rounds = plan.dealt.iter().map(|(_, faults)| faults.len() as u64).sum();
    let mut report = Report { seed: plan.seed, planned: rounds, left_out: plan.left_out.clone(), ..Report::default() };
    for (setting, faults) in &plan.dealt {
        if !faults.is_empty() && report.failure.is_none() {
            play(plan, *setting, faults, &mut report, &mut progress).await?;
        }
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// The rounds of one setting.
async fn play(
    plan: &Plan,
    setting: Setting,
    faults: &[Fault],
    report: &mut Report,
    progress: &mut impl FnMut(&Round),
) -> Result<()> {
    let dir = plan.dir.join(setting.dir());
    fs::create_dir_all(&dir)?;
    let mut lab = Lab::build(&dir, &plan.guest, &plan.understudy)?;
    let first = report.rounds.len() as u64 + 1;
    let arena = Arena::open(&mut lab, plan, setting, faults, first).await;
    let mut arena = arena.with_context(|| format!("the VM could not be protected at first, by {setting}"))?;
    for (number, &fault) in (first..).zip(faults) {
        let mut round = Round {
            number,
            setting: setting.to_string(),
            fault: fault.name(),
            kind: fault.kind().to_owned(),
            ..Round::default()
        };
        let played = arena.round(fault, &mut round).await;
        progress(&round);
        report.rounds.push(round);
        if let Err(error) = played {
            report.failure = Some(format!("round {number}, {setting}, {}: {error:#}", fault.name()));
            break;
        }
    }
    if report.failure.is_none() {
        match arena.close(first..=report.rounds.len() as u64).await {
            Ok(told) => *report.on_disk.get_or_insert(0) += told,
            Err(error) => report.failure = Some(format!("at the end of {setting}: {error:#}")),
        }
    }
    if report.failure.is_some() {
        arena.keep_events().await;
    }
    Ok(())
}

/// A laboratory whose VM is protected, with its clients and judges.
struct Arena<'a> {
    lab: &'a mut Lab,
    setting: Setting,
    /// The number of its first round.
    first: u64,
    etcd: Option<Etcd>,
    storage: Storage,
    clocks: Clocks,
    memory: Option<Memory>,
    rng: Rng,
    workload: Workload,
    sniffer: Sniffer,
    _capture: Capture,
    leaks: Leaks,
    /// By [`Plan::leak`].
    leaks_output: bool,
    /// Knows where the guest's frames came from.
    judge: Judge,
    /// What keys of earlier rounds hold: nobody writes them any more.
    settled: BTreeMap<u64, u64>,
    /// What clients were told in all rounds.
    told: Told,
    /// What the agents have noted and was looked at.
    noted: HashSet<String>,
}

/// Which host has which copy of a VM that is protected.
async fn protected(lab: &Lab) -> Result<Host, String> {
    let mut seen = Vec::new();
    for host in [Host::A, Host::B] {
        let status = lab.client(host).vm_status(VM).await.map_err(|error| format!("{}: {error}", host.name()))?;
        seen.push((status.role, matches!(status.state, ProtectionState::Protected), status));
    }
    match seen[..] {
        [(Role::Primary, true, _), (Role::Standby, true, _)] => Ok(Host::A),
        [(Role::Standby, true, _), (Role::Primary, true, _)] => Ok(Host::B),
        _ => Err(seen
            .iter()
            .zip([Host::A, Host::B])
            .map(|((role, _, status), host)| {
                format!("{}: {} as {} ({})", host.name(), status.state, role.word(), status.reason)
            })
            .collect::<Vec<_>>()
            .join("; ")),
    }
}

async fn until_protected(lab: &Lab) -> Result<Host> {
    until("the VM to be protected", PROTECT, async || Ok(protected(lab).await)).await
}

impl<'a> Arena<'a> {
    async fn open(lab: &'a mut Lab, plan: &Plan, setting: Setting, faults: &[Fault], first: u64) -> Result<Self> {
        let seed = plan.seed.wrapping_add(first);
        let storage = Storage::make(lab)?;
        let clocks = Clocks::make(lab)?;
        let limits = faults.iter().any(|fault| matches!(fault, Fault::ShortOfMemory(_)));
        let memory = if limits { Some(Memory::make(lab)?) } else { None };
        if setting.backend == Backend::Qemu {
            guest::boot(lab).await?;
        }
        let etcd = match setting.store {
            Store::Witness => {
                lab.start_daemons().await?;
                lab.pair().await?;
                None
            }
            Store::Etcd => {
                let etcd = Etcd::start(lab).await?;
                for host in [Host::A, Host::B] {
                    lab.start_agent(host).await?;
                }
                lab.pair_hosts().await?;
                Some(etcd)
            }
        };
        if setting.backend == Backend::Kvm {
            lab.run_microvm(&Microvm::new(&plan.pilot)).await?;
        }
        let switch = lab.namespace("s");
        let ports = interfaces(&switch)?;
        let port = |name: &str| ports.get(name).copied().with_context(|| format!("the switch has no port {name}"));
        let capture = Capture::start(&switch, port("to-c")?, lab.dir())?;
        let sniffer = Sniffer::start(&switch, [port("to-a")?, port("to-b")?])?;
        guest::protect(lab).await?;
        until_protected(lab).await?;
        let workload = Workload::start(&lab.namespace("c"), REDIS, seed)?;
        let mut arena = Self {
            lab,
            setting,
            first,
            etcd,
            storage,
            clocks,
            memory,
            rng: Rng::new(seed.rotate_left(32)),
            workload,
            sniffer,
            _capture: capture,
            leaks: Leaks::default(),
            leaks_output: plan.leak,
            judge: Judge::new(Host::A),
            settled: BTreeMap::new(),
            told: Told::default(),
            noted: HashSet::new(),
        };
        let events = arena.events().await;
        arena.noted.extend(events.iter().map(|(host, event)| noted(*host, event)));
        Ok(arena)
    }

    /// Every client has had some answers more.
    async fn answered(&self) -> Result<()> {
        let before = self.workload.answered();
        until("every client to be answered", ANSWERS, async || {
            let now = self.workload.answered();
            let all = now.iter().zip(before).all(|(now, before)| *now >= before + UNDER_WAY);
            Ok(if all { Ok(()) } else { Err(format!("{before:?} answers, then {now:?}")) })
        })
        .await
    }

    async fn round(&mut self, fault: Fault, round: &mut Round) -> Result<()> {
        let (begun_ns, begun_unix_ms) = (now_ns(), unix_ms());
        self.workload.go(round.number);
        let mut deeds = Vec::new();
        let played = self.play(fault, round, &mut deeds).await;
        self.workload.pause();
        round.deeds =
            deeds.into_iter().map(|(at_ns, what)| Moment { at_ms: ms_since(begun_ns, at_ns), what }).collect();
        let idle = until("the clients' last questions to be answered", ANSWERS, async || {
            Ok(if self.workload.idle() { Ok(()) } else { Err("they are not".to_owned()) })
        })
        .await;
        // What was heard is judged also if the VM does not come back.
        let heard = self.sniffer.take();
        // After it: whose copy was heard, that one's activation is known.
        let mut events = self.events().await;
        // Not by their time: clocks may have jumped.
        events.retain(|(host, event)| self.noted.insert(noted(*host, event)));
        round.events = events
            .iter()
            .map(|(host, event)| Moment {
                at_ms: i64::try_from(event.unix_ms).unwrap_or(i64::MAX)
                    - i64::try_from(begun_unix_ms).unwrap_or(i64::MAX),
                what: format!(
                    "{} {} as {}, generation {}: {}",
                    host.name(),
                    event.state,
                    event.role.word(),
                    event.generation,
                    event.text
                ),
            })
            .collect();
        round.activated = events.iter().filter(|(_, event)| event.kind == EventKind::Failover).count();
        let (history, broken) = self.workload.take();
        let counts = self.workload.take_counts();
        tell(round, begun_ns, &history, &counts, &broken, &heard);
        let spoke = self.judge.judge(&heard, round.activated);
        self.told.add(round.number, &history, &counts);
        // All that is wrong is said: one thing may explain another.
        let served = played.is_ok() && idle.is_ok();
        let mut wrong: Vec<_> = [spoke, played, idle].into_iter().filter_map(Result::err).collect();
        if let Some(broken) = broken.first().filter(|_| !fault.breaks_connections()) {
            let at_ms = ms_since(begun_ns, broken.at_ns);
            wrong.push(anyhow!("a client's connection broke {at_ms} ms into the round: {}", broken.why));
        }
        if served {
            wrong.extend(self.remembers(round.number, history, &counts).err());
        }
        if !wrong.is_empty() {
            let said: Vec<_> = wrong.iter().map(|error| format!("{error:#}")).collect();
            bail!("{}", said.join("; and "));
        }
        self.clean().await
    }

    /// The fault itself, and what comes after it, until the VM is protected and its clients are served.
    async fn play(&mut self, fault: Fault, round: &mut Round, deeds: &mut Vec<(u64, String)>) -> Result<()> {
        self.answered().await.context("before the fault")?;
        let primary = until_protected(self.lab).await.context("before the fault")?;
        round.hosts = (primary.name().to_owned(), "nowhere".to_owned());
        let mut field = Field {
            lab: self.lab,
            primary,
            etcd: self.etcd.as_mut(),
            storage: &self.storage,
            clocks: &self.clocks,
            memory: self.memory.as_ref(),
            rng: &mut self.rng,
            deeds: Vec::new(),
        };
        let leak =
            if self.leaks_output { Some(Leak::begin(field.lab).context("the mistake cannot be made")?) } else { None };
        let injected = fault.inject(&mut field).await;
        if let Some(leak) = leak {
            field.note(format!("{} frames were heard before they were acknowledged", leak.leaked()));
        }
        deeds.extend(field.deeds.into_iter().map(|deed| (deed.at_ns, deed.what)));
        injected.context("the fault could not be played")?;
        let over_ns = now_ns();
        let primary = until_protected(self.lab).await.context("after the fault")?;
        let now = now_ns();
        deeds.push((now, format!("protected again, on {}", primary.name())));
        round.restored_ms = (now - over_ns) / 1_000_000;
        primary.name().clone_into(&mut round.hosts.1);
        self.answered().await.context("after the fault")
    }

    /// The round's history, with a last look at its keys, is linearizable, its counter never went back; the keys of the round before hold what they held.
    fn remembers(&mut self, number: u64, mut history: Vec<Operation>, counts: &[Count]) -> Result<()> {
        let first = number.saturating_sub(1).max(self.first);
        let read = self.workload.read_all(first..=number).context("reading everything again")?;
        history.extend(read.iter().filter(|read| read.key / KEYS == number));
        if let Err(found) = linear::check(&history) {
            let _ = fs::write(self.lab.dir().join("history.txt"), format!("{history:#?}\n"));
            bail!("{NOT_LINEARIZABLE}: {found}");
        }
        let counted = self.workload.counted(number).context("reading the counter again")?;
        if let Err(found) = counter::judge(counts, counted) {
            let _ = fs::write(self.lab.dir().join("counts.txt"), format!("{counts:#?}\n"));
            bail!("{WENT_BACK}: {found}");
        }
        self.still_there(&read)
    }

    /// What was read is what was read last, where it was read before.
    fn still_there(&mut self, read: &[Operation]) -> Result<()> {
        for read in read {
            let Action::Read(value) = read.action else { continue };
            let known = *self.settled.entry(read.key).or_insert(value);
            ensure!(known == value, "key {:#x} was settled as {known:#x} and is {value:#x} now", read.key);
        }
        Ok(())
    }

    /// Reads everything again; then both hosts lose power while clients go on, and the disks are judged by themselves.
    async fn close(&mut self, rounds: RangeInclusive<u64>) -> Result<u64> {
        let after = rounds.end() + 1;
        let read = self.workload.read_all(rounds).context("reading everything again")?;
        self.still_there(&read)?;
        self.workload.go(after);
        self.answered().await?;
        let (primary, image) = guest::disk(self.lab).await?;
        tokio::time::sleep(self.rng.micros(0, LAST_MICROS)).await;
        // The primary first: what it says after its standby's death nobody else could know.
        self.lab.kill_host(primary)?;
        self.lab.kill_host(primary.other())?;
        self.workload.pause();
        let (history, _) = self.workload.take();
        self.told.add(after, &history, &self.workload.take_counts());
        let copy = power::recover_standby(self.lab, primary.other(), guest::disk_of(self.lab)).await;
        let copy = copy.with_context(|| format!("the standby's disk on {}", primary.other().name()))?;
        for image in [image, copy] {
            match self.setting.backend {
                Backend::Qemu => self.told.is_on(&image, &self.settled)?,
                Backend::Kvm => self.told.is_in_pilots(&image, &self.settled)?,
            }
        }
        Ok(self.told.len())
    }

    /// Waits until nothing is left of what was.
    async fn clean(&mut self) -> Result<()> {
        let (lab, leaks) = (&*self.lab, &mut self.leaks);
        until("the hosts to have no more than they need", CLEAN, async || {
            let Ok(primary) = protected(lab).await else { return Ok(Err("not protected".to_owned())) };
            let mut found = Vec::new();
            for host in [Host::A, Host::B] {
                found.extend(leaks.excess(host, host == primary, &Holdings::of(lab, host)?));
            }
            Ok(if found.is_empty() { Ok(()) } else { Err(found.join("; ")) })
        })
        .await?;
        [Host::A, Host::B].into_iter().try_for_each(|host| self.storage.delete_old_images(self.lab, host))
    }

    /// What the agents have noted, in order of time.
    async fn events(&self) -> Vec<(Host, VmEvent)> {
        let mut all = Vec::new();
        for host in [Host::A, Host::B] {
            let events = self.lab.client(host).vm_events(VM, EVENTS).await.unwrap_or_default();
            all.extend(events.into_iter().map(|event| (host, event)));
        }
        all.sort_by_key(|(_, event)| event.unix_ms);
        all
    }

    /// Writes down what the agents noted and say, for who looks at a failure.
    async fn keep_events(&self) {
        let mut text = self.lab.statuses().await;
        for (host, event) in self.events().await {
            text.push_str(&format!("{} {}\n", host.name(), serde_json::to_string(&event).unwrap_or_default()));
        }
        // Their disks are gone with the laboratory.
        for host in [Host::A, Host::B] {
            for entry in fs::read_dir(self.lab.state_dir(host).join("vms")).into_iter().flatten().flatten() {
                let durable = fs::read_to_string(entry.path()).unwrap_or_default();
                text.push_str(&format!("--- {}\n{durable}\n", entry.path().display()));
            }
        }
        let _ = fs::write(self.lab.dir().join("events.txt"), text);
    }
}

/// An event of a host, to be known again.
fn noted(host: Host, event: &VmEvent) -> String {
    format!("{} {event:?}", host.name())
}

fn tell(round: &mut Round, begun_ns: u64, history: &[Operation], counts: &[Count], broken: &[Broken], heard: &[Heard]) {
    let counted = || counts.iter().filter_map(|count| Some((count.called_ns, count.returned?.0)));
    let answers = || history.iter().filter_map(|op| Some((op.called_ns, op.returned_ns?))).chain(counted());
    round.answered = answers().count() as u64;
    round.unknown = (history.len() + counts.len()) as u64 - round.answered;
    round.broken = broken.len() as u64;
    round.frames = heard.len() as u64;
    round.longest_wait_ms = answers().map(|(asked, came)| (came - asked) / 1_000_000).max().unwrap_or(0);
    round.seconds = seconds(begun_ns, answers());
}

fn ms_since(begun_ns: u64, at_ns: u64) -> i64 {
    let ms = |ns: u64| i64::try_from(ns / 1_000_000).unwrap_or(i64::MAX);
    ms(at_ns) - ms(begun_ns)
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
