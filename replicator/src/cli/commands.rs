//! The commands that are clients of the control API.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::args::{AskCommand, DoctorArgs, EventsArgs, FailoverArgs, PairArgs, ProtectArgs, StatusArgs, VmArgs};
use super::exit::{CliError, Exit};
use super::progress::{Goal, follow};
use super::screen::Screen;
use super::{client, config, drill, microvm};
use crate::control::api::{
    DoctorReport, DoctorRequest, FailoverRequest, PairJoinRequest, PairOpenRequest, PeerKind, ProtectRequest, Role,
    VmRequest,
};
use crate::control::change::Change;
use crate::control::client::{Client, ClientError};
use crate::control::doctor;
use crate::status::render;

/// Time between two drawings of `status --watch`.
const DRAW_EVERY: Duration = Duration::from_secs(1);
/// How many events it shows of one VM.
const WATCHED_EVENTS: usize = 8;

/// Runs one of them.
pub(super) async fn run(command: AskCommand, control: Option<PathBuf>) -> Result<Exit, CliError> {
    match command {
        AskCommand::Pair(args) => pair(args, control).await,
        AskCommand::Doctor(args) => doctor_command(args, &client(control)).await,
        AskCommand::Run(args) => microvm::run(args, &client(control)).await,
        AskCommand::End(args) => microvm::end(args, &client(control)).await,
        AskCommand::Protect(args) => protect(args, &client(control)).await,
        AskCommand::Status(args) => status(args, &client(control)).await,
        AskCommand::Events(args) => events(args, &client(control)).await,
        AskCommand::Rehearse(args) => rehearse(args, &client(control)).await,
        AskCommand::Failover(args) => failover(args, &client(control)).await,
        AskCommand::Failback(args) => failback(args, &client(control)).await,
        AskCommand::Unprotect(args) => unprotect(args, &client(control)).await,
        AskCommand::Chaos(command) => drill::run(command, &client(control)).await,
        AskCommand::MayStart(args) => super::latch::may_start(args, &client(control)).await,
    }
}

/// Prints to standard output. A reader that is gone ends the program quietly, as other tools do.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(|error| CliError::of(Exit::Failed, &error)),
    }
}

fn json<T: Serialize>(value: &T, one_line: bool) -> String {
    let text = if one_line { serde_json::to_string(value) } else { serde_json::to_string_pretty(value) };
    let mut text = text.expect("answers are plain data");
    text.push('\n');
    text
}

async fn pair(args: PairArgs, control: Option<PathBuf>) -> Result<Exit, CliError> {
    if let (Some(host), Some(code)) = (args.host, args.code) {
        let port = host.port.unwrap_or(config::DEFAULT_PAIRING_PORT);
        let request = PairJoinRequest { host: host.host, port, code };
        let paired = client(control).pair_join(&request).await?;
        let kind = match paired.kind {
            PeerKind::Agent => "host",
            PeerKind::Witness => "witness",
        };
        print(&format!("paired with {kind} {} ({})\n", paired.name, paired.node_id))?;
        if args.witness && paired.kind != PeerKind::Witness {
            let message = format!("{} is a host, not a witness", paired.name);
            return Err(CliError::new(Exit::Refused, message).advise(
                "The pairing stands; open the window with `understudy pair --witness` on the witness's host.",
            ));
        }
        return Ok(Exit::Ok);
    }
    let control = match control {
        None if args.witness => Some(config::witness_socket(config::DEFAULT_WITNESS_RUN_DIR.as_ref())),
        other => other,
    };
    let window = client(control).pair_open(&PairOpenRequest { ttl_s: args.ttl.as_secs() }).await?;
    print(&format!(
        "code    {}\naddress {}\nvalid   {}, for one node\n\nRun this on the other host:\n    understudy pair HOST{} --code {}\n",
        window.code,
        window.address,
        humantime::format_duration(args.ttl),
        port_of(&window.address),
        window.code
    ))?;
    Ok(Exit::Ok)
}

/// `:PORT` if it is not the usual one.
fn port_of(address: &str) -> String {
    match address.rsplit_once(':') {
        Some((_, port)) if port != config::DEFAULT_PAIRING_PORT.to_string() => format!(":{port}"),
        _ => String::new(),
    }
}

/// Asks the agent, which knows the VMs that it protects; without an agent this process looks for itself.
async fn doctor_command(args: DoctorArgs, client: &Client) -> Result<Exit, CliError> {
    let answer = client.doctor(&DoctorRequest { vm: args.vm.clone() }).await;
    let report: DoctorReport = match answer {
        Ok(report) => report,
        Err(ClientError::NoAgent { .. }) => {
            let found = tokio::task::spawn_blocking(move || doctor::local(args.vm.as_deref())).await;
            found.expect("the checks do not panic")?
        }
        Err(error) => return Err(error.into()),
    };
    let text = if args.json { json(&report, false) } else { render::checklist(&report) };
    print(&text)?;
    Ok(if report.passed() { Exit::Ok } else { Exit::Refused })
}

pub(super) async fn protect(args: ProtectArgs, client: &Client) -> Result<Exit, CliError> {
    let request = ProtectRequest {
        vm: args.vm,
        to: args.to,
        epoch: args.epoch,
        shadow: args.shadow,
        durability: args.durability,
        witness: args.witness,
        standbys: args.standbys,
        once: args.once,
        without_witness: args.without_witness,
    };
    let accepted = client.protect(&request).await?;
    let status = follow(client, &accepted.vm, Goal::Protected).await?;
    for warning in &status.warnings {
        print(&format!("warning: {warning}\n"))?;
    }
    print(&format!("{} is protected; {} stands by\n", status.name, status.peer))?;
    Ok(Exit::Ok)
}

async fn status(args: StatusArgs, client: &Client) -> Result<Exit, CliError> {
    if !args.watch {
        print(&status_text(&args, client).await?)?;
        return Ok(Exit::Ok);
    }
    // From the beginning: one that comes while the agent is asked ends it too, and leaves the terminal as it was.
    let listen = |kind| signal(kind).map_err(|error| CliError::of(Exit::Failed, &error));
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let mut hang_up = listen(SignalKind::hangup())?;
    tokio::select! {
        outcome = watch(&args, client) => outcome,
        _ = hang_up.recv() => Ok(Exit::Ok),
        _ = interrupt.recv() => Ok(Exit::Ok),
        _ = terminate.recv() => Ok(Exit::Ok),
    }
}

/// Shows the status again and again, until it is dropped.
async fn watch(args: &StatusArgs, client: &Client) -> Result<Exit, CliError> {
    let drawn = !args.json && std::io::stdout().is_terminal();
    let mut screen = if drawn { Some(Screen::open()?) } else { None };
    let mut seen = String::new();
    loop {
        let text = match watched_text(args, client).await {
            Ok(text) if args.json => text,
            Ok(text) => {
                seen = format!("{}\n\n{text}", now());
                seen.clone()
            }
            Err(error) if args.json => return Err(error),
            // An agent that restarts comes back: keep watching, and keep what it said last in sight.
            Err(error) if seen.is_empty() => error.render(),
            Err(error) => format!("{}\nLast seen at {seen}", error.render()),
        };
        match &mut screen {
            Some(screen) => screen.draw(text)?,
            None => print(&text)?,
        }
        tokio::time::sleep(DRAW_EVERY).await;
    }
}

/// The status, and of one VM what happened last.
async fn watched_text(args: &StatusArgs, client: &Client) -> Result<String, CliError> {
    let mut text = status_text(args, client).await?;
    if let (Some(vm), false) = (&args.vm, args.json) {
        text.push('\n');
        for event in client.vm_events(vm, WATCHED_EVENTS).await? {
            text.push_str(&render::event(&event));
            text.push('\n');
        }
    }
    Ok(text)
}

fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

async fn status_text(args: &StatusArgs, client: &Client) -> Result<String, CliError> {
    Ok(match (&args.vm, args.json) {
        (None, true) => json(&client.status().await?, args.watch),
        (None, false) => render::agent(&client.status().await?),
        (Some(vm), true) => json(&client.vm_status(vm).await?, args.watch),
        (Some(vm), false) => render::vm(&client.vm_status(vm).await?),
    })
}

async fn events(args: EventsArgs, client: &Client) -> Result<Exit, CliError> {
    for event in client.vm_events(&args.vm, args.last).await? {
        print(&if args.json { json(&event, true) } else { format!("{}\n", render::event(&event)) })?;
    }
    Ok(Exit::Ok)
}

async fn rehearse(args: VmArgs, client: &Client) -> Result<Exit, CliError> {
    let report = client.rehearse(&VmRequest { vm: args.vm.clone() }).await?;
    print(&format!(
        "{}: epoch {} loads (launch {:.0} ms, load {:.1} ms)\n",
        args.vm, report.epoch, report.launch_ms, report.load_ms
    ))?;
    Ok(Exit::Ok)
}

async fn failover(args: FailoverArgs, client: &Client) -> Result<Exit, CliError> {
    let FailoverArgs { vm, planned, force, confirm_dead, give_back } = args;
    let request = FailoverRequest { vm, planned, back: false, force, confirm: confirm_dead, give_back };
    if give_back {
        let accepted = client.failover(&request).await?;
        print(&format!(
            "{} is given back to its other host; `understudy status` there says when it runs\n",
            accepted.vm
        ))?;
        return Ok(Exit::Ok);
    }
    hand_over(&request, client).await
}

async fn failback(args: VmArgs, client: &Client) -> Result<Exit, CliError> {
    let request =
        FailoverRequest { vm: args.vm, planned: true, back: true, force: false, confirm: None, give_back: false };
    hand_over(&request, client).await
}

async fn hand_over(request: &FailoverRequest, client: &Client) -> Result<Exit, CliError> {
    let accepted = client.failover(request).await?;
    let change = if request.force { Change::GoOn } else { Change::HandOver };
    let status = follow(client, &accepted.vm, Goal::Changed(change)).await?;
    let here = request.force || status.role == Role::Survivor;
    print(&match (here, status.peer.as_str()) {
        (true, _) => format!("{} runs here now\n", status.name),
        (false, "") => format!("{} runs on the other host now\n", status.name),
        (false, peer) => format!("{} runs on {peer} now\n", status.name),
    })?;
    if let Some(report) = &status.failover {
        print(&format!("{}\n", render::failover(report)))?;
    }
    Ok(Exit::Ok)
}

async fn unprotect(args: VmArgs, client: &Client) -> Result<Exit, CliError> {
    let status = client.unprotect(&VmRequest { vm: args.vm }).await?;
    print(&format!("{} is unprotected and runs on\n", status.name))?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_port_is_not_shown() {
        assert_eq!(port_of("0.0.0.0:7843"), "");
        assert_eq!(port_of("[::]:99"), ":99");
    }
}
