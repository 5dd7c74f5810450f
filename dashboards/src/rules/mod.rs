//! Prometheus' recording and alert rules, and the proof of each alert.
//!
//! An alert is made of what fires it, how long that must last, what it says, and [`Case`]s: series that make it fire and
//! series that do not, for `promtool test rules`. Its runbook is the section of `docs/operations.md` with its name.

mod alerts;
mod recorded;
mod yaml;

use replicator::control::api::ProtectionState;

pub use alerts::all as alerts;
pub use recorded::all as recorded;
pub use yaml::{rules, unit_tests};

/// The file with a section for each alert. It is exported beside the rules.
pub const RUNBOOKS: &str = "operations.md";

/// Time between two values of a case, and between two evaluations.
pub const STEP: &str = "15s";

/// A series that is computed once for many queries.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Its name: level, metric, operation.
    pub name: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it is.
    pub expr: String,
}

/// Who must react, and how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Now: a VM may be lost, stalled, or unseen.
    Critical,
    /// Today: protection works, but not as it should.
    Warning,
    /// For the record.
    Info,
}

impl Severity {
    /// The label's value.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Warning => "warning",
            Self::Info => "info",
        }
    }
}

/// An alert rule.
#[derive(Debug, Clone)]
pub struct Alert {
    /// Its name, also the name of its section in the runbooks.
    pub name: &'static str,
    /// Who must react.
    pub severity: Severity,
    /// What fires it.
    pub expr: String,
    /// How long that must last.
    pub hold: &'static str,
    /// One line; `{{ $labels.x }}` stands for a label.
    pub summary: &'static str,
    /// What it means, in a sentence or two.
    pub description: &'static str,
    /// Series that make it fire and series that do not; at least one of each.
    pub cases: Vec<Case>,
}

impl Alert {
    /// Where its runbook is.
    #[must_use]
    pub fn runbook(&self) -> String {
        format!("{RUNBOOKS}#{}", self.name.to_ascii_lowercase())
    }
}

/// Some series and what comes of them.
#[derive(Debug, Clone)]
pub struct Case {
    /// What it shows.
    pub name: &'static str,
    /// Series and their values, one every [`STEP`], in promtool's notation.
    pub series: Vec<(String, &'static str)>,
    /// When the alert is looked at.
    pub at: &'static str,
    /// The labels of each alert that fires then, beside the severity; none if it must not.
    pub fires: Vec<Vec<(&'static str, &'static str)>>,
}

impl Case {
    fn new(name: &'static str, at: &'static str, series: &[(&str, &'static str)]) -> Self {
        let series = series.iter().map(|&(series, values)| (series.to_owned(), values)).collect();
        Self { name, series, at, fires: Vec::new() }
    }

    fn fires(mut self, labels: &[(&'static str, &'static str)]) -> Self {
        self.fires.push(labels.to_vec());
        self
    }
}

/// The failovers in the last `range`, by series; `matchers` pick them.
///
/// `increase` sees a counter grow, not appear. An agent has its counters at 0 before it can fail anything over, but one that
/// started or paired less than a scrape ago may be seen with a failover in them at once. Such a series counts what it has, if its
/// host was scraped before, and answered: a Prometheus that is new, or a host that was not reached, tells nothing of what happened before.
pub(crate) fn failovers(matchers: &str, range: &str) -> String {
    let counted = if matchers.is_empty() { FAILOVERS.to_owned() } else { format!("{FAILOVERS}{{{matchers}}}") };
    format!(
        "increase({counted}[{range}]) > 0\n  or ({counted} > 0 unless {counted} offset {range}) and on (instance, job) (up offset \
         {range} == 1)"
    )
}

const FAILOVERS: &str = "understudy_failovers_total";

/// The state of each copy as a number: its place among the words, from 1.
fn state_code() -> String {
    let codes = (1..)
        .zip(ProtectionState::WORDS)
        .map(|(code, word)| format!("understudy_vm_state{{state=\"{word}\"}} * {code}"));
    format!("max by (instance, job, vm) (\n  {}\n)", codes.collect::<Vec<_>>().join("\n  or "))
}
