//! Panels and how they are built.
//!
//! A panel cannot be made without a title and a description; the description says what to do when it looks bad.

use serde::Serialize;
use serde_json::{Value, json};

use super::options::Kind;
use super::{DataSource, Format, GridPos, Target, Thresholds, ValueMapping};

/// A panel, not yet placed.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Panel {
    /// Set when it is placed.
    pub id: u32,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// What it shows.
    pub title: String,
    /// What it means, and what to do when it looks bad.
    pub description: String,
    /// Set when it is placed; before, its size.
    pub grid_pos: GridPos,
    datasource: DataSource,
    /// Its queries.
    pub targets: Vec<Target>,
    field_config: FieldConfig,
    options: Value,
    transformations: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct FieldConfig {
    defaults: Defaults,
    overrides: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Defaults {
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<f64>,
    color: Value,
    thresholds: Thresholds,
    mappings: Vec<ValueMapping>,
    no_value: &'static str,
    custom: Value,
}

impl Panel {
    fn new(kind: Kind, title: &str, description: &str, unit: &'static str, w: u32, h: u32) -> Self {
        let color = match kind {
            Kind::Stat | Kind::StateTimeline | Kind::Table => json!({ "mode": "thresholds" }),
            _ => json!({ "mode": "palette-classic" }),
        };
        Self {
            id: 0,
            kind,
            title: title.to_owned(),
            description: description.to_owned(),
            grid_pos: GridPos { h, w, x: 0, y: 0 },
            datasource: DataSource::chosen(),
            targets: Vec::new(),
            field_config: FieldConfig {
                defaults: Defaults {
                    unit,
                    min: Some(0.0),
                    color,
                    thresholds: Thresholds::new("green", &[]),
                    mappings: Vec::new(),
                    no_value: "no data",
                    custom: kind.custom(false),
                },
                overrides: Vec::new(),
            },
            options: kind.options(unit),
            transformations: Vec::new(),
        }
    }

    /// One number.
    #[must_use]
    pub fn stat(title: &str, description: &str, unit: &'static str) -> Self {
        Self::new(Kind::Stat, title, description, unit, 4, 4)
    }

    /// Lines over time.
    #[must_use]
    pub fn lines(title: &str, description: &str, unit: &'static str) -> Self {
        Self::new(Kind::Timeseries, title, description, unit, 12, 8)
    }

    /// The buckets of a histogram over time; `buckets` sums rates `by (le)`.
    #[must_use]
    pub fn heat(title: &str, description: &str, unit: &'static str, buckets: &str) -> Self {
        let mut panel = Self::new(Kind::Heatmap, title, description, unit, 12, 8).query(buckets, "{{le}}");
        panel.targets[0].format = Format::Heatmap;
        panel
    }

    /// Words over time; the queries give codes.
    #[must_use]
    pub fn timeline(title: &str, description: &str, words: ValueMapping) -> Self {
        let mut panel = Self::new(Kind::StateTimeline, title, description, "none", 24, 7);
        panel.field_config.defaults.mappings.push(words);
        panel.field_config.defaults.min = None;
        panel
    }

    /// One row per series of now, with these labels as columns.
    #[must_use]
    pub fn table(title: &str, description: &str, expr: &str, columns: &[&str], value: Option<&str>) -> Self {
        let mut panel = Self::new(Kind::Table, title, description, "none", 12, 8).now(expr, "");
        panel.targets[0].format = Format::Table;
        let mut include: Vec<&str> = columns.to_vec();
        include.extend(value.map(|_| "Value"));
        let order: serde_json::Map<String, Value> =
            include.iter().enumerate().map(|(at, name)| ((*name).to_owned(), json!(at))).collect();
        let renamed: serde_json::Map<String, Value> =
            value.map(|name| ("Value".to_owned(), json!(name))).into_iter().collect();
        panel.transformations = vec![
            json!({ "id": "filterFieldsByName", "options": { "include": { "names": include } } }),
            json!({ "id": "organize", "options": { "excludeByName": {}, "indexByName": order, "renameByName": renamed } }),
        ];
        panel
    }

    /// A headline above what follows.
    #[must_use]
    pub fn row(title: &str) -> Self {
        let mut row = Self::new(Kind::Row, title, "", "none", 24, 1);
        row.field_config.defaults.no_value = "";
        row
    }

    /// Adds a query over the time range.
    #[must_use]
    pub fn query(self, expr: &str, legend: &str) -> Self {
        self.target(expr, legend, false)
    }

    /// Adds a query of now.
    #[must_use]
    pub fn now(self, expr: &str, legend: &str) -> Self {
        self.target(expr, legend, true)
    }

    fn target(mut self, expr: &str, legend: &str, instant: bool) -> Self {
        let letter = char::from(b'A' + u8::try_from(self.targets.len()).expect("a panel has few queries"));
        self.targets.push(Target {
            ref_id: letter.to_string(),
            datasource: DataSource::chosen(),
            expr: expr.split_whitespace().collect::<Vec<_>>().join(" "),
            legend_format: legend.to_owned(),
            format: Format::TimeSeries,
            instant,
            range: !instant,
            editor_mode: "code",
        });
        self
    }

    /// Bad from `warning` on, worse from `critical` on.
    #[must_use]
    pub fn bad_from(mut self, warning: f64, critical: f64) -> Self {
        let steps =
            if warning < critical { vec![(warning, "orange"), (critical, "red")] } else { vec![(critical, "red")] };
        self.field_config.defaults.thresholds = Thresholds::new("green", &steps);
        self
    }

    /// Bad below `good`.
    #[must_use]
    pub fn good_from(mut self, good: f64) -> Self {
        self.field_config.defaults.thresholds = Thresholds::new("red", &[(good, "green")]);
        self
    }

    /// A number that is neither good nor bad.
    #[must_use]
    pub fn plain(mut self) -> Self {
        self.field_config.defaults.thresholds = Thresholds::new("blue", &[]);
        self
    }

    /// Stacked, with a filled area.
    #[must_use]
    pub fn stacked(mut self) -> Self {
        self.field_config.defaults.custom = self.kind.custom(true);
        self
    }

    /// Says something else than `no data` where there is nothing.
    #[must_use]
    pub fn or_say(mut self, words: &'static str) -> Self {
        self.field_config.defaults.no_value = words;
        self
    }

    /// Another size.
    #[must_use]
    pub fn size(mut self, w: u32, h: u32) -> Self {
        (self.grid_pos.w, self.grid_pos.h) = (w, h);
        self
    }
}
