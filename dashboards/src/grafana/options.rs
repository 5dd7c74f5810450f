//! What the kinds of panels can be told, each with the values that all of our dashboards use.

use serde::Serialize;
use serde_json::{Value, json};

/// The kinds of panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One number in large type.
    Stat,
    /// Lines over time.
    Timeseries,
    /// Buckets over time.
    Heatmap,
    /// Coloured words over time.
    StateTimeline,
    /// Rows.
    Table,
    /// A headline.
    Row,
}

impl Kind {
    /// `options` of the kind's published schema. `unit` is for the heat map's axis.
    #[must_use]
    pub fn options(self, unit: &str) -> Value {
        let list = json!({ "displayMode": "list", "placement": "bottom", "showLegend": true, "calcs": [] });
        match self {
            Self::Stat => json!({
                "reduceOptions": { "calcs": ["lastNotNull"], "fields": "", "values": false },
                "colorMode": "background",
                "graphMode": "none",
                "justifyMode": "auto",
                "orientation": "auto",
                "textMode": "auto",
                "wideLayout": true,
                "showPercentChange": false,
                "percentChangeColorMode": "standard",
            }),
            Self::Timeseries => json!({
                "legend": { "displayMode": "table", "placement": "bottom", "showLegend": true, "calcs": ["lastNotNull", "max"] },
                "tooltip": { "mode": "multi", "sort": "desc" },
            }),
            Self::Heatmap => json!({
                "calculate": false,
                "color": {
                    "mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "scale": "exponential",
                    "exponent": 0.5, "reverse": false, "steps": 64,
                },
                "cellGap": 1,
                "exemplars": { "color": "rgba(255,0,255,0.7)" },
                "filterValues": { "le": 1e-9 },
                "legend": { "show": true },
                "rowsFrame": { "layout": "auto" },
                "showValue": "never",
                "tooltip": { "mode": "single", "yHistogram": true, "showColorScale": true },
                "yAxis": { "axisPlacement": "left", "reverse": false, "unit": unit },
            }),
            Self::StateTimeline => json!({
                "mergeValues": true,
                "showValue": "auto",
                "alignValue": "left",
                "rowHeight": 0.85,
                "legend": list,
                "tooltip": { "mode": "single", "sort": "none" },
            }),
            Self::Table => json!({
                "frameIndex": 0,
                "showHeader": true,
                "cellHeight": "sm",
            }),
            Self::Row => json!({}),
        }
    }

    /// `fieldConfig.defaults.custom` of the kind's published schema.
    #[must_use]
    pub fn custom(self, stacked: bool) -> Value {
        let nowhere = json!({ "legend": false, "tooltip": false, "viz": false });
        match self {
            Self::Timeseries => json!({
                "drawStyle": "line",
                "lineInterpolation": "linear",
                "lineWidth": 1,
                "fillOpacity": if stacked { 40 } else { 8 },
                "gradientMode": "none",
                "showPoints": "auto",
                "pointSize": 4,
                "spanNulls": false,
                "stacking": { "mode": if stacked { "normal" } else { "none" }, "group": "A" },
                "thresholdsStyle": { "mode": if stacked { "off" } else { "dashed" } },
                "axisPlacement": "auto",
                "axisLabel": "",
                "axisColorMode": "text",
                "scaleDistribution": { "type": "linear" },
                "hideFrom": nowhere,
            }),
            Self::StateTimeline => json!({ "lineWidth": 0, "fillOpacity": 75, "hideFrom": nowhere }),
            Self::Heatmap => json!({ "scaleDistribution": { "type": "linear" }, "hideFrom": nowhere }),
            Self::Table => json!({ "align": "auto", "cellOptions": { "type": "auto" }, "inspect": false }),
            Self::Stat | Self::Row => json!({}),
        }
    }
}
