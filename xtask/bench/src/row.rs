//! Rows: what was measured, against what, and whether that is within its budget.
//!
//! Promise: a row's value and baseline come from the same run, and its ratio from pairs that were measured close together.
//! What could not be measured is listed as skipped, with the reason, and never as a row.

use std::fmt::Write as _;

use serde::Serialize;

use crate::stats::median;

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// One measured number.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What it is measured against, in the same unit.
    pub(crate) baseline: f64,
    /// The value in terms of the baseline: the median of all pairs.
    pub(crate) ratio: f64,
    pub(crate) better: Better,
    /// Bound on the ratio; none where nothing is promised.
    pub(crate) budget: Option<f64>,
    pub(crate) within_budget: Option<bool>,
    /// How many pairs.
    pub(crate) pairs: usize,
}

/// Something that was not measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Skipped {
    pub(crate) name: String,
    pub(crate) reason: String,
}

/// Values and the baselines that were measured beside them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pairs(Vec<(f64, f64)>);

impl Pairs {
    pub(crate) fn push(&mut self, value: f64, baseline: f64) {
        self.0.push((value, baseline));
    }

    pub(crate) fn one(value: f64, baseline: f64) -> Self {
        Self(vec![(value, baseline)])
    }

    /// The row of these pairs; `None` if there are none.
    pub(crate) fn row(
        &self,
        name: impl Into<String>,
        unit: &'static str,
        better: Better,
        budget: Option<f64>,
    ) -> Option<Row> {
        let value = median(self.0.iter().map(|pair| pair.0))?;
        let baseline = median(self.0.iter().map(|pair| pair.1))?;
        let ratio = median(self.0.iter().map(|pair| pair.0 / pair.1).filter(|ratio| ratio.is_finite()))?;
        let within = |budget| match better {
            Better::Lower => ratio <= budget,
            Better::Higher => ratio >= budget,
        };
        let within_budget = budget.map(within);
        Some(Row {
            name: name.into(),
            value,
            unit,
            baseline,
            ratio,
            better,
            budget,
            within_budget,
            pairs: self.0.len(),
        })
    }
}

/// Where it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) kernel: String,
    pub(crate) qemu: String,
}

/// Everything that a run measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<Row>,
    pub(crate) skipped: Vec<Skipped>,
}

impl Report {
    pub(crate) fn new(machine: Machine) -> Self {
        Self { machine, rows: Vec::new(), skipped: Vec::new() }
    }

    /// Adds a row and says so at once; what has no pairs is skipped.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, better: Better, budget: Option<f64>, pairs: &Pairs) {
        match pairs.row(name, unit, better, budget) {
            Some(row) => {
                println!("  {}", line(&row));
                self.rows.push(row);
            }
            None => self.skip(name, "nothing was measured"),
        }
    }

    pub(crate) fn skip(&mut self, name: &str, reason: impl Into<String>) {
        let reason = reason.into();
        println!("  skipped: {name}: {reason}");
        self.skipped.push(Skipped { name: name.to_owned(), reason });
    }

    /// The rows that are out of their budget.
    pub(crate) fn broken(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.within_budget == Some(false))
    }

    /// The table for people.
    pub(crate) fn table(&self) -> String {
        let Machine { processor, processors, kernel, qemu } = &self.machine;
        let mut text = format!("{processors} x {processor}, kernel {kernel}, {qemu}\n\n");
        text.push_str("| what | value | baseline | unit | ratio | budget | |\n|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let budget = row.budget.map_or("-".to_owned(), |budget| format!("{} {budget}", sign(row.better)));
            let verdict = row.within_budget.map_or("", |within| if within { "ok" } else { "OUT" });
            let (value, baseline) = (number(row.value), number(row.baseline));
            let (name, unit, ratio) = (&row.name, row.unit, number(row.ratio));
            writeln!(text, "| {name} | {value} | {baseline} | {unit} | {ratio} | {budget} | {verdict} |")
                .expect("a string takes everything");
        }
        for Skipped { name, reason } in &self.skipped {
            writeln!(text, "skipped: {name}: {reason}").expect("a string takes everything");
        }
        text
    }
}

fn sign(better: Better) -> &'static str {
    match better {
        Better::Lower => "<=",
        Better::Higher => ">=",
    }
}

fn line(row: &Row) -> String {
    let verdict = match row.within_budget {
        Some(true) => ", within budget",
        Some(false) => ", OUT OF BUDGET",
        None => "",
    };
    let Row { name, unit, pairs, .. } = row;
    let [value, baseline, ratio] = [row.value, row.baseline, row.ratio].map(number);
    format!("{name}: {value} {unit} against {baseline}: {ratio} ({pairs} pairs){verdict}")
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_pairs_and_not_of_medians() {
        let mut pairs = Pairs::default();
        for (value, baseline) in [(1.0, 2.0), (10.0, 10.0), (300.0, 100.0)] {
            pairs.push(value, baseline);
        }
        let row = pairs.row("x", "s", Better::Lower, Some(1.0)).expect("three pairs");
        assert_eq!((row.value, row.baseline, row.ratio, row.within_budget), (10.0, 10.0, 1.0, Some(true)));
        let row = pairs.row("x", "s", Better::Higher, Some(1.1)).expect("three pairs");
        assert_eq!(row.within_budget, Some(false));
        assert_eq!(Pairs::default().row("x", "s", Better::Lower, None), None);
        assert_eq!(Pairs::one(1.0, 0.0).row("x", "s", Better::Lower, None), None, "no ratio to nothing");
    }

    #[test]
    fn the_json_has_the_promised_keys() {
        let row = Pairs::one(1.0, 2.0).row("x", "s", Better::Higher, None).expect("a pair");
        let json = serde_json::to_value(&row).expect("plain data");
        for key in ["name", "value", "unit", "baseline", "ratio", "better", "budget", "within_budget"] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
        assert_eq!(json["better"], "higher");
    }
}
