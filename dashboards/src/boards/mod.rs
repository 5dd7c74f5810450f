//! The dashboards, one file each: what an operator asks, from the fleet down to one failover.
//!
//! Queries name `$instance` and `$vm`; `$__rate_interval` and `$__range` are Grafana's own. Every panel's description says
//! what to do when it looks bad.

mod failover;
mod fleet;
mod hosts;
mod vm;

use replicator::control::api::{ProtectionState, Role};

use crate::grafana::{Dashboard, Panel, ValueMapping};
use crate::rules::failovers;

/// All of them.
#[must_use]
pub fn all() -> Vec<Dashboard> {
    vec![fleet::board(), vm::board(), failover::board(), hosts::board()]
}

/// An agent's series have this selector's variable.
fn with_hosts(board: Dashboard) -> Dashboard {
    board.variable("instance", "Host", "understudy_build_info", "instance")
}

/// VMs of the chosen hosts.
fn with_vms(board: Dashboard) -> Dashboard {
    with_hosts(board).variable("vm", "VM", "understudy_vm_state{instance=~\"$instance\"}", "vm")
}

/// How long a mark lasts. Grafana asks for the marks of a week every 55 s, and Prometheus scrapes every minute unless it is told
/// otherwise: what lasts shorter than two of either can be missed.
const MARKED: &str = "2m";

/// Marks failovers and lost protection.
fn with_marks(board: Dashboard) -> Dashboard {
    let picked = "instance=~\"$instance\",vm=~\"$vm\"";
    board
        .annotation("Failover", "red", &failovers(picked, MARKED), "{{vm}} went on on {{instance}}: {{cause}}")
        .annotation(
            "State changed",
            "blue",
            &format!("changes(instance_vm:understudy_vm_state:code{{{picked}}}[{MARKED}]) > 0"),
            "{{vm}} on {{instance}}",
        )
}

/// Codes of the states: their place among the words, from 1. The recording rule uses the same.
fn state_words() -> ValueMapping {
    let colors = ["purple", "super-light-blue", "light-blue", "green", "orange", "yellow", "text", "red"];
    ValueMapping::words((1..).zip(ProtectionState::WORDS).zip(colors).map(|((code, word), color)| (code, word, color)))
}

/// The copies, in the order of [`role_words`].
const ROLES: [Role; 3] = [Role::Primary, Role::Standby, Role::Survivor];

fn role_words() -> ValueMapping {
    let colors = ["green", "blue", "orange"];
    ValueMapping::words((1..).zip(ROLES).zip(colors).map(|((code, role), color)| (code, role.word(), color)))
}

/// The state of each copy over time.
fn states() -> Panel {
    Panel::timeline(
        "State of each copy",
        "The protection state that each host reports of its copy. Green is protected. After a failover the old host is \
         fenced and the new one degraded until it is protected again. Degraded or error for longer than a failover takes: \
         `understudy status VM` on that host says why and what to do.",
        state_words(),
    )
    .query("instance_vm:understudy_vm_state:code{instance=~\"$instance\",vm=~\"$vm\"}", "{{vm}} on {{instance}}")
}

/// Which copy each host has, as a code.
fn roles() -> Panel {
    let code: Vec<String> = (1..)
        .zip(ROLES)
        .map(|(code, role)| {
            let role = role.word();
            format!("understudy_vm_role{{instance=~\"$instance\",vm=~\"$vm\",role=\"{role}\"}} * {code}")
        })
        .collect();
    Panel::timeline(
        "Which copy runs where",
        "Primary runs and is replicated, standby waits, survivor took over. Two hosts that both run one VM would be a split \
         brain: look at the states, the losing one must be fenced or failing over.",
        role_words(),
    )
    .query(&format!("max by (instance, vm) ({})", code.join(" or ")), "{{vm}} on {{instance}}")
}

/// A quantile of a histogram over the picked series.
fn quantile(q: f64, name: &str, by: &str) -> String {
    let by = if by.is_empty() { "le".to_owned() } else { format!("{by}, le") };
    format!(
        "histogram_quantile({q}, sum by ({by}) (rate({name}_bucket{{instance=~\"$instance\",vm=~\"$vm\"}}[$__rate_interval])))"
    )
}

/// The buckets of a histogram over the picked series.
fn buckets(name: &str, more: &str) -> String {
    format!("sum by (le) (rate({name}_bucket{{instance=~\"$instance\",vm=~\"$vm\"{more}}}[$__rate_interval]))")
}
