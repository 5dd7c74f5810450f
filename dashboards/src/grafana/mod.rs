//! The part of Grafana's dashboard model that we use, as types: what cannot be said here cannot be said wrongly.
//!
//! Field names and values are those of Grafana's published schema (`@grafana/schema`, dashboard schema version 39, which
//! Grafana 10.4 and newer read). There is no maintained builder for Rust; the model is small because the dashboards use six
//! kinds of panels. [`panel`] builds panels, [`board`] arranges them.

pub mod board;
pub mod options;
pub mod panel;

use serde::Serialize;

pub use board::Dashboard;
pub use panel::Panel;

/// The data source that each dashboard lets its reader choose.
pub const DATASOURCE: &str = "${datasource}";

/// Which data source answers a query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataSource {
    /// Its plug-in.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its identity.
    pub uid: &'static str,
}

impl DataSource {
    /// The Prometheus that the reader chose.
    #[must_use]
    pub fn chosen() -> Self {
        Self { kind: "prometheus", uid: DATASOURCE }
    }
}

/// One query of a panel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Names it within its panel.
    pub ref_id: String,
    /// Who answers.
    pub datasource: DataSource,
    /// PromQL, with template variables.
    pub expr: String,
    /// How its series are called.
    pub legend_format: String,
    /// How the answer is read.
    pub format: Format,
    /// Only the value of now.
    pub instant: bool,
    /// Values over the time range.
    pub range: bool,
    /// Grafana shows the query as text, not as blocks.
    pub editor_mode: &'static str,
}

/// How Grafana reads an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One line per series.
    TimeSeries,
    /// One row per series.
    Table,
    /// One row of cells per bucket.
    Heatmap,
}

/// Where a value begins to be bad.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Thresholds {
    mode: &'static str,
    /// From the lowest; the first has no value.
    pub steps: Vec<Step>,
}

/// From `value` on, `color`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    color: &'static str,
    /// `None`: from below everything.
    pub value: Option<f64>,
}

impl Thresholds {
    /// `first` below every one of `steps`.
    #[must_use]
    pub fn new(first: &'static str, steps: &[(f64, &'static str)]) -> Self {
        let rest = steps.iter().map(|&(value, color)| Step { color, value: Some(value) });
        let steps = std::iter::once(Step { color: first, value: None }).chain(rest).collect();
        Self { mode: "absolute", steps }
    }
}

/// Words and colours for values that are codes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ValueMapping {
    #[serde(rename = "type")]
    kind: &'static str,
    options: serde_json::Map<String, serde_json::Value>,
}

impl ValueMapping {
    /// From `(value, word, colour)`.
    #[must_use]
    pub fn words<'a>(words: impl IntoIterator<Item = (u32, &'a str, &'a str)>) -> Self {
        let options = words
            .into_iter()
            .map(|(value, text, color)| {
                (value.to_string(), serde_json::json!({ "text": text, "color": color, "index": value }))
            })
            .collect();
        Self { kind: "value", options }
    }
}

/// Where a panel stands: 24 columns, rows of 30 pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct GridPos {
    /// Height.
    pub h: u32,
    /// Width.
    pub w: u32,
    /// Column.
    pub x: u32,
    /// Row.
    pub y: u32,
}
