//! `understudy chaos drill`: a real pair, a fault on purpose, and a report of how the VM stood it.
//!
//! Promise: nothing is broken before the operator has confirmed it, the copy has been proven to load, and the agent has said that
//! everything that would be hit is whole elsewhere. An agent that is stopped is let go on, also when the drill is interrupted.

mod report;

use std::io::{BufRead as _, IsTerminal as _};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use vmm_hooks::sys::process::{PidFd, ProcessError};

use self::report::Report;
use super::commands::print;
use super::exit::{CliError, Exit};
use crate::control::api::{AgentStatus, ProtectionState, Role, VmRequest, VmStatus};
use crate::control::client::{Client, ClientError};
use crate::control::drill::{DrillFault, DrillPlan, DrillRequest, ProcessAt};
use crate::demo::wait::{ms_between, now_ns};
use crate::demo::worker::{FirstReply, Prober};

/// Time between two looks at the agent.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Bound on the end of a killed process.
const END: Duration = Duration::from_secs(10);
/// Bound on the guest's first answer to an echo, before anything is broken.
const FIRST_ECHO: Duration = Duration::from_secs(5);
/// Epochs that must be committed after an agent went on, to be sure that they were made after it.
const FRESH_EPOCHS: u64 = 3;
/// The longest time for which an agent is stopped.
const MAX_STOP: Duration = Duration::from_secs(60);
/// The longest time for which is waited.
const MAX_WITHIN: Duration = Duration::from_secs(3_600);

/// `understudy chaos`
#[derive(Debug, Clone, Subcommand)]
pub enum ChaosCommand {
    /// Break something of a protected VM on this host, wait until it is protected again, and report
    ///
    /// The standby's copy is loaded in a rehearsal first. Clients lose nothing; they wait as they would if the host had failed.
    Drill(DrillArgs),
}

/// `understudy chaos drill`
#[derive(Debug, Clone, Args)]
pub struct DrillArgs {
    /// The VM's name; it must run on this host and be protected
    pub vm: String,
    /// What is broken
    #[arg(long, value_enum)]
    pub fault: DrillFault,
    /// The VM's name again, instead of being asked for it
    #[arg(long, value_name = "VM")]
    pub confirm: Option<String>,
    /// How long the agent stands with `stop-agent`
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = stop_time)]
    pub stop: Duration,
    /// How long the VM may take to be protected again
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = within_time)]
    pub within: Duration,
    /// An address of the guest: it is asked for an echo each millisecond, and its silence is measured
    #[arg(long, value_name = "IP")]
    pub probe: Option<Ipv4Addr>,
    /// Also write the report there, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

fn stop_time(text: &str) -> Result<Duration, String> {
    bounded(text, MAX_STOP, "an agent is stopped for 100ms to 60s")
}

fn within_time(text: &str) -> Result<Duration, String> {
    bounded(text, MAX_WITHIN, "a drill takes 100ms to 1h")
}

fn bounded(text: &str, most: Duration, otherwise: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|_| "write a time such as `10s`".to_owned())?;
    if time < Duration::from_millis(100) || time > most { Err(otherwise.to_owned()) } else { Ok(time) }
}

/// Runs a subcommand of `chaos`.
pub(super) async fn run(command: ChaosCommand, client: &Client) -> Result<Exit, CliError> {
    let ChaosCommand::Drill(args) = command;
    let mut request = DrillRequest { vm: args.vm.clone(), fault: args.fault, confirmed: false };
    let plan = client.drill(&request).await?;
    let loads = client.rehearse(&VmRequest { vm: args.vm.clone() }).await?;
    print(&announcement(&args, &plan, loads.epoch))?;
    confirm(&args)?;
    let probe = match args.probe {
        Some(to) => Some(Probe::start(to).await?),
        None => None,
    };
    // Asked again: what was true before the question need not be true now.
    request.confirmed = true;
    let plan = client.drill(&request).await?;
    let mut report = Report::new(&args.vm, args.fault, &plan);
    let outcome = drill(&args, &plan, client, probe, &mut report).await;
    report.end(outcome.as_ref().err().map(String::as_str));
    print(&report.conclusion())?;
    if let Some(path) = &args.json {
        let failed =
            |error| CliError::of(Exit::Failed, &error).advise(format!("The report is not in {}.", path.display()));
        std::fs::write(path, report.json()).map_err(failed)?;
    }
    match outcome {
        Ok(()) => Ok(Exit::Ok),
        Err(message) => Err(CliError::new(Exit::Failed, message).advise(format!(
            "See `understudy status {0}` and `understudy events {0}` here and on {1}.",
            args.vm, plan.peer
        ))),
    }
}

fn announcement(args: &DrillArgs, plan: &DrillPlan, epoch: u64) -> String {
    let DrillPlan { host, peer, agent, .. } = plan;
    let (name, agent) = (&args.vm, format!("the agent of {host} (process {})", agent.pid));
    let guest = plan.vm.map_or_else(|| name.clone(), |at| format!("{name} (process {})", at.pid));
    let mut text = format!("{name} is protected; its copy on {peer} loads (epoch {epoch}).\n\n");
    text += &match args.fault {
        DrillFault::KillPrimary => format!("This kills {guest} and {agent} at once."),
        DrillFault::KillVm => format!("This kills {guest}."),
        DrillFault::KillAgent => format!("This kills {agent}; {guest} is left running beside it, and is mute."),
        DrillFault::StopAgent => {
            format!("This stops {agent} for {} and lets it go on then.", humantime::format_duration(args.stop))
        }
    };
    text += &format!(
        "\n{peer} goes on with {name}, if {host} is not back before it is missed. Clients wait that long, and lose nothing.\n"
    );
    if matches!(args.fault, DrillFault::KillPrimary | DrillFault::KillAgent) {
        text += "Something must start the agent again (systemd does, if it runs as its service); it is waited for.\n";
    }
    if !plan.others.is_empty() {
        text += &format!("The same happens to {}.\n", plan.others.join(", "));
    }
    for warning in &plan.warnings {
        text += &format!("warning: {warning}\n");
    }
    text.push('\n');
    text
}

fn confirm(args: &DrillArgs) -> Result<(), CliError> {
    let refused = |message: String| Err(CliError::new(Exit::Refused, message).advise("Nothing was broken."));
    let typed = match &args.confirm {
        Some(typed) => typed.clone(),
        None if std::io::stdin().is_terminal() => {
            print(&format!("Type {} to begin: ", args.vm))?;
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).map_err(|error| CliError::of(Exit::Failed, &error))?;
            line.trim().to_owned()
        }
        None => return refused(format!("the drill was not confirmed: give `--confirm {}`", args.vm)),
    };
    if typed == args.vm { Ok(()) } else { refused(format!("`{typed}` is not {}", args.vm)) }
}

/// Who listens to the guest.
#[derive(Debug)]
struct Probe(Prober);

impl Probe {
    /// Begins, and waits until the guest answers.
    async fn start(to: Ipv4Addr) -> Result<Self, CliError> {
        let cannot =
            |error: anyhow::Error| CliError::new(Exit::Failed, format!("{error:#}")).advise("Nothing was broken.");
        let prober = Prober::start(to).map_err(cannot)?;
        let (prober, first) = Self(prober).after(now_ns(), FIRST_ECHO).await.expect("asking for echoes does not panic");
        if first.map_err(cannot)?.received_ns.is_none() {
            return Err(cannot(anyhow::anyhow!("{to} answers no echo from here")));
        }
        Ok(prober)
    }

    /// The first reply to what was asked after that instant.
    fn after(self, after_ns: u64, bound: Duration) -> JoinHandle<(Self, anyhow::Result<FirstReply>)> {
        tokio::task::spawn_blocking(move || {
            let reply = self.0.first_reply(after_ns, bound);
            (self, reply)
        })
    }
}

/// A process that stands still, until this is dropped.
#[derive(Debug)]
struct Stopped(PidFd);

impl Stopped {
    fn new(process: &PidFd) -> Result<Self, String> {
        let cannot = |error| format!("process {} cannot be stopped: {error}", process.pid());
        pidfd_send_signal(process, Signal::STOP).map_err(cannot)?;
        Ok(Self(process.clone()))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // One that has ended in the meantime needs nothing.
        let _ = pidfd_send_signal(&self.0, Signal::CONT);
    }
}

/// Breaks it and waits until the VM is protected again. The error is the sentence that says what did not come.
async fn drill(
    args: &DrillArgs,
    plan: &DrillPlan,
    client: &Client,
    probe: Option<Probe>,
    report: &mut Report,
) -> Result<(), String> {
    let listen = |kind| signal(kind).map_err(|error| error.to_string());
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let work = async {
        let over_ns = injure(args, plan, report).await?;
        let reply = probe.map(|probe| probe.after(over_ns, args.within));
        let recovered = recover(args, plan, client, report).await;
        if let Some(reply) = reply {
            let (_, reply) = reply.await.map_err(|error| error.to_string())?;
            let reply = reply.map_err(|error| format!("{error:#}"))?;
            let received = reply.received_ns.ok_or("the guest answered no echo any more")?;
            report.replied(ms_between(report.began_ns, received));
        }
        recovered
    };
    tokio::select! {
        outcome = work => outcome,
        _ = interrupt.recv() => Err("the drill was interrupted; what was broken mends itself or not without it".into()),
        _ = terminate.recv() => Err("the drill was told to end; what was broken mends itself or not without it".into()),
    }
}

fn open(at: ProcessAt) -> Result<PidFd, String> {
    PidFd::open_same(at.pid, at.started).map_err(|error| format!("nothing was broken: {error}"))
}

/// Breaks it, makes sure that it is broken, and says when that was over.
async fn injure(args: &DrillArgs, plan: &DrillPlan, report: &mut Report) -> Result<u64, String> {
    let guest = plan.vm.filter(|_| args.fault.hits_vm()).map(open).transpose()?;
    let agent = if args.fault.hits_agent() { Some(open(plan.agent)?) } else { None };
    report.begin();
    if let (DrillFault::StopAgent, Some(agent)) = (args.fault, &agent) {
        let stopped = Stopped::new(agent)?;
        report.step(format!("the agent (process {}) stands still", agent.pid()));
        print_last(report);
        tokio::time::sleep(args.stop).await;
        drop(stopped);
        report.step("the agent goes on".into());
        print_last(report);
        return Ok(report.began_ns);
    }
    // As a host's death: the agent must not see its VM die, nor say anything more. One that is not killed after all goes on.
    let _stopped = agent.as_ref().map(Stopped::new).transpose()?;
    let killed = (|| {
        for process in guest.iter().chain(&agent) {
            process.kill_confirmed(END)?;
        }
        Ok(())
    })();
    killed.map_err(|error: ProcessError| error.to_string())?;
    let names = guest.iter().map(|at| format!("{} (process {})", args.vm, at.pid()));
    let names = names.chain(agent.iter().map(|at| format!("the agent (process {})", at.pid())));
    report.step(format!("killed, and ended: {}", names.collect::<Vec<_>>().join(" and ")));
    print_last(report);
    Ok(now_ns())
}

fn print_last(report: &Report) {
    // The report has it, whether or not somebody reads along.
    let _ = print(&report.last());
}

/// Waits until the VM is protected again.
async fn recover(args: &DrillArgs, plan: &DrillPlan, client: &Client, report: &mut Report) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + args.within;
    let (mut seen, mut away, mut first) = (String::new(), false, None);
    loop {
        let missing = match client.status().await {
            Ok(agent) => {
                if std::mem::take(&mut away) {
                    report.agent_back();
                    report.step(format!("the agent of {} answers again", plan.host));
                    print_last(report);
                }
                let vm = agent.vms.iter().find(|vm| vm.name == args.vm);
                let now = vm.map_or_else(|| "is not known to the agent yet".to_owned(), described);
                if now != seen {
                    report.step(format!("{} {now}", args.vm));
                    print_last(report);
                    seen.clone_from(&now);
                }
                match vm {
                    Some(vm) => {
                        let base = *first.get_or_insert(vm.epoch_committed);
                        match missing(args.fault, plan, &agent, vm, base) {
                            None => {
                                report.protected(vm);
                                return Ok(());
                            }
                            Some(missing) => missing,
                        }
                    }
                    None => now,
                }
            }
            Err(ClientError::NoAgent { .. } | ClientError::Io { .. } | ClientError::Http(_)) => {
                away = true;
                format!("no agent answers on {}: nothing has started it again", plan.host)
            }
            Err(error) => error.to_string(),
        };
        if tokio::time::Instant::now() >= deadline {
            let within = humantime::format_duration(args.within);
            return Err(format!("{} was not protected again within {within}: {missing}", args.vm));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Where it is and how it is.
fn described(vm: &VmStatus) -> String {
    let place = match vm.role {
        Role::Standby => format!("runs on {}", vm.peer),
        Role::Primary | Role::Survivor => "is here".to_owned(),
    };
    let reason = if vm.reason.is_empty() { String::new() } else { format!(" ({})", vm.reason) };
    format!("{place}, {}, generation {}{reason}", vm.state.word(), vm.generation)
}

/// What is missing before the VM has stood it; nothing if it has.
fn missing(fault: DrillFault, plan: &DrillPlan, agent: &AgentStatus, vm: &VmStatus, base: u64) -> Option<String> {
    let restarts = matches!(fault, DrillFault::KillPrimary | DrillFault::KillAgent);
    if restarts && agent.incarnation == plan.incarnation {
        return Some(format!("the agent of {} is the one from before", plan.host));
    }
    if vm.state != ProtectionState::Protected {
        return Some(described(vm));
    }
    if fault.hits_vm() && vm.generation <= plan.generation {
        return Some(format!("{} has not gone on with it", plan.peer));
    }
    let unmoved = vm.role != Role::Standby && vm.generation == plan.generation;
    if fault == DrillFault::StopAgent && unmoved && vm.epoch_committed < base + FRESH_EPOCHS {
        return Some("no epoch was committed since".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> DrillPlan {
        let at = ProcessAt { pid: 1, started: 1 };
        DrillPlan {
            host: "host-a".into(),
            peer: "host-b".into(),
            incarnation: 4,
            generation: 7,
            agent: at,
            vm: Some(at),
            others: vec!["web-2".into()],
            warnings: Vec::new(),
        }
    }

    fn seen(incarnation: u64, generation: u64, role: Role, state: ProtectionState) -> (AgentStatus, VmStatus) {
        let mut vm = VmStatus::new("web-1", "1", role);
        (vm.state, vm.generation) = (state, generation);
        "host-b".clone_into(&mut vm.peer);
        let (name, node_id, version) = ("host-a".into(), String::new(), String::new());
        (AgentStatus { name, node_id, incarnation, version, vms: vec![vm.clone()], peers: Vec::new() }, vm)
    }

    #[test]
    fn a_drill_is_not_over_before_what_it_broke_was_noticed() {
        use DrillFault as Fault;
        use ProtectionState as State;
        for (fault, incarnation, generation, role, state, over) in [
            // The same agent, not yet dead or seen from before.
            (Fault::KillPrimary, 4, 8, Role::Standby, State::Protected, false),
            (Fault::KillPrimary, 5, 7, Role::Standby, State::Protected, false),
            (Fault::KillPrimary, 5, 8, Role::Standby, State::Pairing, false),
            (Fault::KillPrimary, 5, 8, Role::Standby, State::Protected, true),
            // Nobody has noticed yet.
            (Fault::KillVm, 4, 7, Role::Primary, State::Protected, false),
            (Fault::KillVm, 4, 8, Role::Standby, State::Protected, true),
            // It may have come back before it was missed.
            (Fault::KillAgent, 5, 7, Role::Primary, State::Protected, true),
            (Fault::KillAgent, 4, 7, Role::Primary, State::Protected, false),
            (Fault::StopAgent, 4, 8, Role::Standby, State::Protected, true),
            (Fault::StopAgent, 4, 7, Role::Primary, State::Protected, false),
        ] {
            let (agent, vm) = seen(incarnation, generation, role, state);
            let missing = missing(fault, &plan(), &agent, &vm, 0);
            assert_eq!(missing.is_none(), over, "{fault} {incarnation} {generation}: {missing:?}");
        }
        let (agent, mut vm) = seen(4, 7, Role::Primary, State::Protected);
        vm.epoch_committed = 103;
        assert_eq!(missing(Fault::StopAgent, &plan(), &agent, &vm, 100), None);
        assert!(missing(Fault::StopAgent, &plan(), &agent, &vm, 101).is_some());
    }

    fn args(fault: DrillFault, confirm: Option<&str>) -> DrillArgs {
        DrillArgs {
            vm: "web-1".into(),
            fault,
            confirm: confirm.map(str::to_owned),
            stop: Duration::from_secs(10),
            within: Duration::from_secs(300),
            probe: None,
            json: None,
        }
    }

    #[test]
    fn it_says_before_what_it_will_hit() {
        let text = announcement(&args(DrillFault::KillPrimary, None), &plan(), 12);
        for part in [
            "host-b loads (epoch 12)",
            "kills web-1 (process 1) and the agent",
            "start the agent again",
            "happens to web-2",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = announcement(&args(DrillFault::StopAgent, None), &plan(), 12);
        assert!(text.contains("for 10s and lets it go on"), "{text}");
    }

    #[test]
    fn another_name_confirms_nothing() {
        assert_eq!(confirm(&args(DrillFault::KillVm, Some("web-1"))), Ok(()));
        let error = confirm(&args(DrillFault::KillVm, Some("web-2"))).unwrap_err();
        assert_eq!((error.exit, error.advice.as_str()), (Exit::Refused, "Nothing was broken."));
    }

    #[test]
    fn times_have_bounds() {
        assert_eq!(stop_time("2s"), Ok(Duration::from_secs(2)));
        assert!(stop_time("2m").is_err() && stop_time("soon").is_err() && within_time("2h").is_err());
    }
}
