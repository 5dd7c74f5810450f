//! Dashboards: panels in reading order, template variables, annotations and links to the other dashboards.

use serde::Serialize;
use serde_json::{Value, json};

use super::options::Kind;
use super::{DataSource, Panel};

/// Columns of a dashboard.
const COLUMNS: u32 = 24;
/// The version of the schema that the model is written against.
const SCHEMA: u32 = 39;
/// What all of our dashboards are tagged with; it links them.
const TAG: &str = "understudy";

/// A whole dashboard.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dashboard {
    /// Its identity, also its file's name.
    pub uid: String,
    /// Its title.
    pub title: String,
    /// What it answers.
    pub description: String,
    tags: Vec<&'static str>,
    editable: bool,
    graph_tooltip: u32,
    schema_version: u32,
    version: u32,
    refresh: &'static str,
    timezone: &'static str,
    time: Value,
    templating: List,
    annotations: List,
    links: Vec<Value>,
    /// In reading order.
    pub panels: Vec<Panel>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct List {
    list: Vec<Value>,
}

impl Dashboard {
    /// An empty one that lets its reader choose the data source.
    #[must_use]
    pub fn new(uid: &str, title: &str, description: &str) -> Self {
        let source = json!({
            "name": "datasource", "type": "datasource", "label": "Data source", "query": "prometheus",
            "regex": "", "hide": 0, "includeAll": false, "multi": false, "options": [], "refresh": 1,
        });
        let link = json!({
            "title": "Understudy", "type": "dashboards", "tags": [TAG], "asDropdown": true, "includeVars": true,
            "keepTime": true, "targetBlank": false, "icon": "external link", "tooltip": "", "url": "",
        });
        Self {
            uid: uid.to_owned(),
            title: title.to_owned(),
            description: description.to_owned(),
            tags: vec![TAG],
            editable: true,
            graph_tooltip: 1,
            schema_version: SCHEMA,
            version: 1,
            refresh: "10s",
            timezone: "browser",
            time: json!({ "from": "now-1h", "to": "now" }),
            templating: List { list: vec![source] },
            annotations: List { list: Vec::new() },
            links: vec![link],
            panels: Vec::new(),
        }
    }

    /// A variable with the values of `label` of the series `selector`; several may be chosen.
    #[must_use]
    pub fn variable(mut self, name: &str, title: &str, selector: &str, label: &str) -> Self {
        let query = format!("label_values({selector}, {label})");
        self.templating.list.push(json!({
            "name": name, "type": "query", "label": title, "datasource": DataSource::chosen(),
            "query": { "query": query, "refId": format!("variable-{name}") },
            "regex": "", "hide": 0, "includeAll": true, "allValue": ".*", "multi": true, "refresh": 2, "sort": 1,
            "skipUrlSync": false, "options": [], "current": { "selected": true, "text": ["All"], "value": ["$__all"] },
        }));
        self
    }

    /// Marks the instants at which `expr` has a value.
    #[must_use]
    pub fn annotation(mut self, name: &str, color: &str, expr: &str, text: &str) -> Self {
        self.annotations.list.push(json!({
            "name": name, "datasource": DataSource::chosen(), "enable": true, "hide": false, "iconColor": color,
            "target": { "expr": expr, "refId": "Anno", "interval": "10s" }, "titleFormat": name, "textFormat": text, "tagKeys": "instance,vm",
            "useValueForTime": false,
        }));
        self
    }

    /// Adds panels: each stands right of the one before while there is room, else below.
    #[must_use]
    pub fn panels(mut self, panels: impl IntoIterator<Item = Panel>) -> Self {
        let (mut x, mut y, mut h) = (0, 0, 0);
        for mut panel in panels {
            let size = panel.grid_pos;
            if panel.kind == Kind::Row || x + size.w > COLUMNS {
                (x, y, h) = (0, y + h, 0);
            }
            (panel.grid_pos.x, panel.grid_pos.y) = (x, y);
            panel.id = u32::try_from(self.panels.len()).expect("a dashboard has few panels") + 1;
            x += size.w;
            h = h.max(size.h);
            self.panels.push(panel);
        }
        self
    }

    /// The file's text.
    ///
    /// # Panics
    /// Never: it is plain data.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a dashboard is plain data") + "\n"
    }

    /// The expressions of its annotations.
    #[must_use]
    pub fn annotation_queries(&self) -> Vec<&str> {
        self.annotations.list.iter().filter_map(|annotation| annotation["target"]["expr"].as_str()).collect()
    }

    /// The series that its variables take their values from, with the label.
    #[must_use]
    pub fn variable_queries(&self) -> Vec<(&str, &str)> {
        let queries = self.templating.list.iter().filter_map(|variable| variable["query"]["query"].as_str());
        queries.filter_map(|query| query.strip_prefix("label_values(")?.strip_suffix(')')?.rsplit_once(", ")).collect()
    }
}
