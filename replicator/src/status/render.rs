//! Text for people: the table of all VMs, one VM in detail, a checklist, progress.

use std::fmt::Write as _;

use bytesize::ByteSize;

use crate::control::api::{
    AgentStatus, DoctorReport, EpochSummary, FailoverReport, PeerKind, PeerStatus, ProtectionState, SyncProgress,
    Verdict, VmEvent, VmStatus,
};
use crate::control::paths::PathStatus;

/// An agent's VMs and peers, as tables.
#[must_use]
pub fn agent(status: &AgentStatus) -> String {
    let mut text =
        format!("agent {} (version {}, incarnation {})\n\n", status.name, status.version, status.incarnation);
    if status.vms.is_empty() {
        text.push_str("No VM is protected here. Protect one with `understudy protect VM --to HOST`.\n");
    } else {
        let mut rows =
            vec![row(["VM", "ROLE", "STATE", "PEER", "GEN", "COMMITTED", "EPOCH", "PAUSE p50/p99", "COMMIT", "HELD"])];
        rows.extend(status.vms.iter().map(vm_row));
        text.push_str(&table(&rows));
    }
    for vm in status.vms.iter().filter(|vm| !vm.reason.is_empty()) {
        let _ = writeln!(text, "\n{}: {}", vm.name, vm.reason);
        if !vm.advice.is_empty() {
            let _ = writeln!(text, "  {}", vm.advice);
        }
    }
    text.push('\n');
    if status.peers.is_empty() {
        text.push_str("Paired with nobody. Pair with `understudy pair`.\n");
    } else {
        let mut rows = vec![row(["PEER", "KIND", "ADDRESS", "CONNECTED", "SILENCE", "PHI", "RTT"])];
        rows.extend(status.peers.iter().map(peer_row));
        text.push_str(&table(&rows));
    }
    let many = |peer: &&PeerStatus| peer.paths.len() > 1;
    if status.peers.iter().any(|peer| many(&peer)) {
        let mut rows = vec![row(["PATH", "TO", "FROM", "ADDRESS", "HEARD", "SILENCE", "PHI", "RTT"])];
        for peer in status.peers.iter().filter(many) {
            rows.extend(peer.paths.iter().map(|path| path_row(peer, path)));
        }
        text.push('\n');
        text.push_str(&table(&rows));
        for peer in status.peers.iter().filter(|peer| many(peer) && peer.paths.iter().any(|path| path.up)) {
            for path in peer.paths.iter().filter(|path| !path.up) {
                let _ = writeln!(
                    text,
                    "\n{} is not heard on path {} ({}), but on another one: nothing fails over for that.\n  Mend that link: while it is \
                     down the others must not fail, too.",
                    peer.name, path.path, path.address
                );
            }
        }
    }
    text
}

fn path_row(peer: &PeerStatus, path: &PathStatus) -> Vec<String> {
    vec![
        path.path.to_string(),
        peer.name.clone(),
        path.local.clone(),
        path.address.clone(),
        if path.up { "yes" } else { "no" }.into(),
        path.silence_ms.map_or("never".into(), ms),
        format!("{:.1}", path.phi),
        path.rtt_ms.map_or("-".into(), ms),
    ]
}

fn vm_row(vm: &VmStatus) -> Vec<String> {
    let epochs = vm.epochs.as_ref();
    vec![
        vm.name.clone(),
        vm.role.word().into(),
        state(&vm.state),
        dash(&vm.peer),
        vm.generation.to_string(),
        vm.epoch_committed.to_string(),
        epochs.map_or("-".into(), |e| ms(e.epoch_ms_p50)),
        epochs.map_or("-".into(), |e| format!("{} / {}", ms(e.pause_ms_p50), ms(e.pause_ms_p99))),
        epochs.map_or("-".into(), |e| ms(e.commit_ms_p50)),
        vm.held.as_ref().map_or("-".into(), |held| held.frames.to_string()),
    ]
}

fn peer_row(peer: &PeerStatus) -> Vec<String> {
    let kind = match peer.kind {
        PeerKind::Agent => "agent",
        PeerKind::Witness => "witness",
    };
    let suspicion = peer.suspicion.as_ref();
    vec![
        peer.name.clone(),
        kind.into(),
        dash(&peer.address),
        if peer.connected { "yes" } else { "no" }.into(),
        suspicion.map_or("-".into(), |s| ms(s.silence_ms)),
        suspicion.map_or("-".into(), |s| format!("{:.1}", s.phi)),
        peer.rtt_ms.map_or("-".into(), ms),
    ]
}

/// One VM in detail.
#[must_use]
pub fn vm(vm: &VmStatus) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<14}{value}");
    };
    line("VM", format!("{} ({})", vm.name, vm.vm_id));
    let reason = if vm.reason.is_empty() { String::new() } else { format!(": {}", vm.reason) };
    line("state", format!("{}{reason}", state(&vm.state)));
    if !vm.advice.is_empty() {
        line("", vm.advice.clone());
    }
    let peer = if vm.peer.is_empty() { String::new() } else { format!(", with {}", vm.peer) };
    line("role", format!("{}{peer}, generation {}", vm.role.word(), vm.generation));
    if let Some(at) = &vm.survivor {
        line("runs as", format!("process {}, {}", at.pid, at.control));
    }
    if let Some(s) = &vm.suspicion {
        let judged = if s.suspected { ", suspected" } else { "" };
        line("peer", format!("silent for {}, phi {:.1}{judged}", ms(s.silence_ms), s.phi));
    }
    line("epoch", format!("{} committed, {} under way", vm.epoch_committed, vm.epoch_current));
    if let Some(epochs) = &vm.epochs {
        epoch_lines(&mut line, epochs);
    }
    if let Some(clock) = &vm.guest_clock {
        let share = clock.pause_share * 100.0;
        line(
            "guest's clock",
            format!("lost {:.1} s in our pauses, which take {share:.1} % of the time", clock.lag_seconds),
        );
    }
    if let Some(held) = &vm.held {
        let age = if held.frames == 0 { String::new() } else { format!(", oldest {}", ms(held.oldest_ms)) };
        let now = format!("{} frames, {}{age}", held.frames, ByteSize(held.bytes));
        line("held output", format!("{now} ({} released, {} dropped)", held.released, held.dropped));
    }
    if let Some(report) = &vm.failover {
        line("failover", failover(report));
    }
    for warning in &vm.warnings {
        line("warning", warning.clone());
    }
    text
}

fn epoch_lines(line: &mut impl FnMut(&str, String), epochs: &EpochSummary) {
    let parts = &epochs.pause_parts_ms_p50;
    line(
        "epochs",
        format!("{}, {} each, {} dirty pages", epochs.epochs, ms(epochs.epoch_ms_p50), epochs.dirty_pages_p50),
    );
    line("pause", format!("{} (p99 {})", ms(epochs.pause_ms_p50), ms(epochs.pause_ms_p99)));
    line(
        "",
        format!(
            "stop {}, harvest {}, device {}, copy {}, resume {}",
            ms(parts.stop),
            ms(parts.harvest),
            ms(parts.device),
            ms(parts.copy),
            ms(parts.resume)
        ),
    );
    line("commit", format!("{} (p99 {})", ms(epochs.commit_ms_p50), ms(epochs.commit_ms_p99)));
    let by: Vec<String> = epochs
        .bytes
        .named()
        .into_iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(encoding, bytes)| format!("{encoding} {}", ByteSize(bytes)))
        .collect();
    let by = if by.is_empty() { String::new() } else { format!(" ({})", by.join(", ")) };
    line("sent", format!("{}{by}", ByteSize(epochs.wire_bytes)));
}

/// A failover in one line.
#[must_use]
pub fn failover(report: &FailoverReport) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(report.detected_unix_ms);
    let mut text = format!(
        "{}, {}, epoch {}, generation {}: detection {}",
        humantime::format_rfc3339_millis(at),
        report.cause.word(),
        report.epoch,
        report.generation,
        ms(report.detection_ms)
    );
    if let Some(grant) = report.grant_ms {
        let _ = write!(text, ", grant {}", ms(grant));
    }
    if let Some(a) = report.activation_ms {
        let _ = write!(text, ", activation {} (load {}, resume {})", ms(a.total), ms(a.load), ms(a.resume));
    }
    text
}

/// Something that happened, in one line.
#[must_use]
pub fn event(event: &VmEvent) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(event.unix_ms);
    format!(
        "{}  {:<8}  {:<12}  generation {}, epoch {}: {}",
        humantime::format_rfc3339_millis(at),
        event.role.word(),
        event.state,
        event.generation,
        event.epoch,
        event.text
    )
}

/// The checklist of `understudy doctor`.
#[must_use]
pub fn checklist(report: &DoctorReport) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Refused => "REFUSED",
        };
        let _ = writeln!(text, "{mark}  {}: {}", check.name, check.found);
        if !check.advice.is_empty() {
            let _ = writeln!(text, "         {}", check.advice);
        }
    }
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let (refused, warnings) = (count(Verdict::Refused), count(Verdict::Warning));
    let _ = match (refused, warnings) {
        (0, 0) => writeln!(text, "\nNothing stands in the way of protection."),
        (0, n) => writeln!(text, "\nProtection works; {}.", plural(n, "warning")),
        (n, _) => writeln!(text, "\nProtection would be refused: {}.", plural(n, "reason")),
    };
    text
}

fn plural(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A state, with its progress while syncing.
#[must_use]
pub fn state(state: &ProtectionState) -> String {
    match state {
        ProtectionState::Syncing(progress) if progress.round == 0 && progress.total_pages > 0 => {
            format!("syncing {}% (disks)", percent(progress))
        }
        ProtectionState::Syncing(progress) => {
            format!("syncing {}% (round {})", percent(progress), progress.round)
        }
        other => other.word().into(),
    }
}

/// How much of its round is done; 0 before the round is known.
#[must_use]
pub fn percent(progress: &SyncProgress) -> u64 {
    let SyncProgress { done_pages, total_pages, .. } = *progress;
    (done_pages.min(total_pages) * 100).checked_div(total_pages).unwrap_or(0)
}

/// Milliseconds with three digits that matter, at most.
fn ms(value: f64) -> String {
    match value {
        v if v >= 10_000.0 => format!("{:.0} s", v / 1e3),
        v if v >= 100.0 => format!("{v:.0} ms"),
        v if v >= 10.0 => format!("{v:.1} ms"),
        v => format!("{v:.2} ms"),
    }
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(String::from).to_vec()
}

/// Rows of equal length as columns, two spaces apart, without spaces at the ends of lines.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
