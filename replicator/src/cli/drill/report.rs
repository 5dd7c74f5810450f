//! What a drill found: steps with their times, as text while they happen and as JSON at the end.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::control::api::VmStatus;
use crate::control::drill::{DrillFault, DrillPlan};
use crate::demo::wait::{ms_between, now_ns};

/// Something that was seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Step {
    /// Since the fault began, in milliseconds.
    at_ms: f64,
    what: String,
}

/// The report. Times are in milliseconds since the fault began.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    vm: String,
    fault: DrillFault,
    host: String,
    peer: String,
    /// By this host's clock.
    began_unix_ms: u64,
    /// By the monotonic clock.
    #[serde(skip)]
    pub(super) began_ns: u64,
    steps: Vec<Step>,
    /// The guest's first reply to an echo that was asked for after the fault; absent if none was asked for, or came.
    first_reply_ms: Option<f64>,
    agent_back_ms: Option<f64>,
    protected_ms: Option<f64>,
    generation_before: u64,
    generation_after: Option<u64>,
    passed: bool,
    /// What did not come.
    failure: Option<String>,
}

impl Report {
    /// Of a drill that begins.
    pub(super) fn new(vm: &str, fault: DrillFault, plan: &DrillPlan) -> Self {
        let mut report = Self {
            vm: vm.to_owned(),
            fault,
            host: plan.host.clone(),
            peer: plan.peer.clone(),
            began_unix_ms: 0,
            began_ns: 0,
            steps: Vec::new(),
            first_reply_ms: None,
            agent_back_ms: None,
            protected_ms: None,
            generation_before: plan.generation,
            generation_after: None,
            passed: false,
            failure: None,
        };
        report.begin();
        report
    }

    /// The fault begins now.
    pub(super) fn begin(&mut self) {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.began_unix_ms = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        self.began_ns = now_ns();
    }

    fn now_ms(&self) -> f64 {
        ms_between(self.began_ns, now_ns())
    }

    /// Something was seen now.
    pub(super) fn step(&mut self, what: String) {
        self.steps.push(Step { at_ms: self.now_ms(), what });
    }

    /// The last step, as a line.
    pub(super) fn last(&self) -> String {
        self.steps.last().map_or_else(String::new, |step| format!("{:>9.3} s  {}\n", step.at_ms / 1e3, step.what))
    }

    /// When the guest was heard again.
    pub(super) fn replied(&mut self, at_ms: f64) {
        self.first_reply_ms = Some(at_ms);
    }

    /// The agent answers again.
    pub(super) fn agent_back(&mut self) {
        self.agent_back_ms = Some(self.now_ms());
    }

    /// The VM is protected again.
    pub(super) fn protected(&mut self, vm: &VmStatus) {
        (self.protected_ms, self.generation_after) = (Some(self.now_ms()), Some(vm.generation));
    }

    /// It is over.
    pub(super) fn end(&mut self, failure: Option<&str>) {
        (self.passed, self.failure) = (failure.is_none(), failure.map(str::to_owned));
    }

    /// What came of it, in lines.
    pub(super) fn conclusion(&self) -> String {
        let verdict = if self.passed { "passed" } else { "FAILED" };
        let mut text = format!("\n{verdict}: {} of {}\n", self.fault, self.vm);
        let mut line = |name: &str, ms: Option<f64>| {
            if let Some(ms) = ms {
                let _ = writeln!(text, "  {name:<42}{:>9.3} s", ms / 1e3);
            }
        };
        line("the guest answered an echo again after", self.first_reply_ms);
        line("the agent answered again after", self.agent_back_ms);
        line("the VM was protected again after", self.protected_ms);
        if let Some(after) = self.generation_after {
            let _ = writeln!(text, "  generation {} before, {after} after", self.generation_before);
        }
        if self.passed && self.generation_after != Some(self.generation_before) {
            let _ = writeln!(
                text,
                "  `understudy events {0}` on {1} has the failover's phases; `understudy failback {0}` there brings it home",
                self.vm, self.peer
            );
        }
        text
    }

    /// All of it.
    pub(super) fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is plain data") + "\n"
    }
}
