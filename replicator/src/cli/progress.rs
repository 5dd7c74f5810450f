//! Long work, followed by asking the agent how far it is until it has ended.

use std::io::{IsTerminal as _, Write};
use std::time::Duration;

use super::exit::{CliError, Exit};
use crate::control::api::{ProtectionState, VmStatus};
use crate::control::change::Change;
use crate::control::client::Client;
use crate::status::render;

/// Time between two looks at the status.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The VM is protected.
    Protected,
    /// The VM has changed hands.
    Changed(Change),
}

/// How far a goal is.
#[derive(Debug, PartialEq)]
enum Stage {
    UnderWay,
    Reached,
    Missed,
}

/// Shows the state of `vm` until the goal is reached or missed. The work goes on if this is interrupted.
pub(super) async fn follow(client: &Client, vm: &str, goal: Goal) -> Result<VmStatus, CliError> {
    let mut display = Display::new();
    loop {
        let status = match goal {
            Goal::Protected => client.vm_status(vm).await?,
            Goal::Changed(_) => client.vm_change(vm).await?,
        };
        display.show(&status);
        match stage(&status, goal) {
            Stage::UnderWay => tokio::time::sleep(LOOK_EVERY).await,
            Stage::Reached => {
                display.end();
                return Ok(status);
            }
            Stage::Missed => {
                display.end();
                return Err(missed(&status, goal));
            }
        }
    }
}

fn stage(status: &VmStatus, goal: Goal) -> Stage {
    use ProtectionState as State;
    let stage = |reached: bool, under_way: bool| match (reached, under_way) {
        (true, _) => Stage::Reached,
        (false, true) => Stage::UnderWay,
        (false, false) => Stage::Missed,
    };
    match goal {
        Goal::Protected => {
            stage(status.state == State::Protected, matches!(status.state, State::Pairing | State::Syncing(_)))
        }
        Goal::Changed(change) => stage(change.is_done(status), status.state == State::FailingOver),
    }
}

fn missed(status: &VmStatus, goal: Goal) -> CliError {
    let what = match goal {
        Goal::Protected => "is not protected",
        Goal::Changed(Change::HandOver) => "did not change hands",
        Goal::Changed(Change::GoOn) => "does not go on here",
    };
    let mut error = CliError::new(Exit::Failed, format!("{} {what}: it is {}", status.name, status.state));
    if !status.reason.is_empty() {
        error.causes.push(status.reason.clone());
    }
    error.advise(status.advice.clone())
}

/// One line that is rewritten on a terminal; one line per new state elsewhere.
struct Display {
    terminal: bool,
    last: String,
}

impl Display {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), last: String::new() }
    }

    fn show(&mut self, status: &VmStatus) {
        let mut text = format!("{}: {}", status.name, render::state(&status.state));
        if !status.reason.is_empty() {
            text.push_str(": ");
            text.push_str(&status.reason);
        }
        if text == self.last {
            return;
        }
        let mut out = std::io::stderr().lock();
        // Progress is a courtesy: a terminal that is gone does not end the work.
        let _ = if self.terminal {
            write!(out, "\r\x1b[K{text}").and_then(|()| out.flush())
        } else {
            writeln!(out, "{text}")
        };
        self.last = text;
    }

    fn end(&self) {
        if self.terminal {
            let _ = writeln!(std::io::stderr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{Role, SyncProgress};

    fn at(state: ProtectionState, role: Role) -> VmStatus {
        let mut status = VmStatus::new("web-1", "1", role);
        status.state = state;
        status.reason = "host-b is silent".into();
        status.advice = "web-1 runs on.".into();
        status
    }

    #[test]
    fn protecting_ends_protected_or_missed() {
        use ProtectionState as State;
        for (state, expected) in [
            (State::Pairing, Stage::UnderWay),
            (State::Syncing(SyncProgress::default()), Stage::UnderWay),
            (State::Protected, Stage::Reached),
            (State::Unprotected, Stage::Missed),
            (State::Degraded, Stage::Missed),
            (State::FailingOver, Stage::Missed),
            (State::Fenced, Stage::Missed),
            (State::Error, Stage::Missed),
        ] {
            assert_eq!(stage(&at(state.clone(), Role::Primary), Goal::Protected), expected, "{state}");
        }
    }

    #[test]
    fn a_failover_ends_with_a_survivor_here_or_there() {
        use ProtectionState as State;
        for (state, role, expected) in [
            (State::FailingOver, Role::Primary, Stage::UnderWay),
            (State::FailingOver, Role::Survivor, Stage::UnderWay),
            (State::Fenced, Role::Primary, Stage::Reached),
            (State::Unprotected, Role::Survivor, Stage::Reached),
            (State::Error, Role::Survivor, Stage::Missed),
            (State::Protected, Role::Primary, Stage::Missed),
            (State::Protected, Role::Standby, Stage::Missed),
        ] {
            assert_eq!(stage(&at(state.clone(), role), Goal::Changed(Change::HandOver)), expected, "{state} {role:?}");
        }
    }

    #[test]
    fn a_forced_vm_goes_on_here_as_either_copy() {
        use ProtectionState as State;
        for (state, role, expected) in [
            (State::FailingOver, Role::Standby, Stage::UnderWay),
            (State::Degraded, Role::Survivor, Stage::Reached),
            (State::Degraded, Role::Primary, Stage::Reached),
            (State::Degraded, Role::Standby, Stage::Missed),
            (State::Fenced, Role::Primary, Stage::Missed),
            (State::Error, Role::Survivor, Stage::Missed),
        ] {
            assert_eq!(stage(&at(state.clone(), role), Goal::Changed(Change::GoOn)), expected, "{state} {role:?}");
        }
    }

    #[test]
    fn a_missed_goal_says_why_and_what_is_safe() {
        let error = missed(&at(ProtectionState::Degraded, Role::Primary), Goal::Protected);
        assert_eq!(
            error.render(),
            "error: web-1 is not protected: it is degraded\n  because host-b is silent\n  web-1 runs on.\n"
        );
    }
}
