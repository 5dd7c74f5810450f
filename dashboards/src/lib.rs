//! What the operator sees: Grafana dashboards and Prometheus rules as code, checked against the metrics that exist.
//!
//! | module | what it makes |
//! | --- | --- |
//! | [`grafana`] | the part of Grafana's model that we use, as types |
//! | [`boards`] | the dashboards |
//! | [`rules`] | recording rules, alert rules, and unit tests of each alert |
//! | [`docs`] | `docs/metrics.md`, from the metric families themselves |
//!
//! [`generated`] is all of it as files; `cargo xtask dashboards` writes them into the repository, where they are committed
//! and embedded into the program `understudy`, which can then write them without this crate: leaves are imported by nobody.
//! Promises, each held by a test here: committed files are what this code makes; every query parses and names metrics,
//! labels and label values that exist; each metric has a panel or a written reason why not; each alert has a runbook, fires
//! when it should and is quiet when it should be.

pub mod boards;
pub mod docs;
pub mod grafana;
pub mod rules;

/// A generated file, by its path from the workspace's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// Where it is committed.
    pub path: String,
    /// What it holds.
    pub text: String,
}

/// Every generated file.
#[must_use]
pub fn generated() -> Vec<Generated> {
    let file = |path: &str, text: String| Generated { path: path.to_owned(), text };
    let mut files: Vec<Generated> = boards::all()
        .iter()
        .map(|board| file(&format!("dashboards/export/grafana/dashboards/{}.json", board.uid), board.json()))
        .collect();
    files.push(file("dashboards/export/prometheus/understudy.rules.yml", rules::rules()));
    files.push(file("dashboards/export/prometheus/understudy.rules.test.yml", rules::unit_tests()));
    files.push(file("docs/metrics.md", docs::metrics()));
    files
}

/// Metrics that no panel shows, each with the reason. Empty is best.
pub const WITHOUT_PANEL: [(&str, &str); 0] = [];
