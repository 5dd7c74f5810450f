//! Every query parses, and names metrics, labels and label values that exist; every metric has a panel.

use std::collections::{BTreeMap, BTreeSet};

use dashboards::{WITHOUT_PANEL, boards, rules};
use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{Expr, LabelModifier, VectorSelector, parse};
use promql_parser::util::{ExprVisitor, walk_expr};
use replicator::metrics::{Kind, families, label_values};

/// Labels that Prometheus adds to what it scrapes.
const ADDED: [&str; 2] = ["instance", "job"];

/// What series there are, with their labels.
fn series() -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for family in families() {
        let labels: BTreeSet<String> = family.labels.iter().copied().chain(ADDED).map(str::to_owned).collect();
        if family.kind == Kind::Histogram {
            let mut with_le = labels.clone();
            with_le.insert("le".to_owned());
            all.insert(format!("{}_bucket", family.name), with_le);
            all.insert(format!("{}_sum", family.name), labels.clone());
            all.insert(format!("{}_count", family.name), labels);
        } else {
            all.insert(family.name, labels);
        }
    }
    all.insert("up".to_owned(), ADDED.map(str::to_owned).into());
    for rule in rules::recorded() {
        all.insert(rule.name.to_owned(), rule.labels.iter().map(|&label| label.to_owned()).collect());
    }
    all
}

/// A query with Grafana's variables replaced as Grafana does.
fn replaced(expr: &str) -> String {
    let all = [("$__rate_interval", "20s"), ("$__range", "1h"), ("$instance", ".*"), ("$vm", ".*")];
    all.iter().fold(expr.to_owned(), |text, (variable, value)| text.replace(variable, value))
}

/// Every query of dashboards and rules, with where it stands.
fn queries() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for board in boards::all() {
        for panel in &board.panels {
            let of = |target: &dashboards::grafana::Target| {
                (format!("{}: {} {}", board.uid, panel.title, target.ref_id), target.expr.clone())
            };
            all.extend(panel.targets.iter().map(of));
        }
        all.extend(
            board.annotation_queries().into_iter().map(|expr| (format!("{}: mark", board.uid), expr.to_owned())),
        );
        for (selector, label) in board.variable_queries() {
            all.push((format!("{}: variable", board.uid), format!("sum by ({label}) ({selector})")));
        }
    }
    all.extend(rules::recorded().into_iter().map(|rule| (rule.name.to_owned(), rule.expr)));
    all.extend(rules::alerts().into_iter().map(|alert| (alert.name.to_owned(), alert.expr)));
    all
}

/// Finds what does not exist.
struct Check<'a> {
    series: &'a BTreeMap<String, BTreeSet<String>>,
    used: BTreeSet<String>,
    labels: BTreeSet<String>,
    grouped: BTreeSet<String>,
    faults: Vec<String>,
}

impl Check<'_> {
    fn selector(&mut self, selector: &VectorSelector) {
        let Some(name) = &selector.name else {
            self.faults.push(format!("{selector} names no metric"));
            return;
        };
        let Some(labels) = self.series.get(name) else {
            self.faults.push(format!("{name} does not exist"));
            return;
        };
        self.used.insert(name.clone());
        self.labels.extend(labels.iter().cloned());
        for matcher in &selector.matchers.matchers {
            if labels.contains(&matcher.name) {
                self.values(name, matcher);
            } else {
                self.faults.push(format!("{name} has no label {}", matcher.name));
            }
        }
    }

    fn values(&mut self, name: &str, matcher: &Matcher) {
        let Some(known) = label_values(name, &matcher.name) else { return };
        let asked: Vec<&str> = match &matcher.op {
            MatchOp::Equal | MatchOp::NotEqual => vec![&matcher.value],
            // Ours are only lists of words.
            MatchOp::Re(_) | MatchOp::NotRe(_) => matcher.value.split('|').collect(),
        };
        for value in asked.into_iter().filter(|value| *value != ".*" && !known.contains(value)) {
            self.faults.push(format!("{name}: {} is never {value}", matcher.name));
        }
    }

    fn modifier(&mut self, modifier: Option<&LabelModifier>) {
        if let Some(modifier) = modifier {
            self.grouped.extend(modifier.labels().labels.iter().cloned());
        }
    }
}

impl ExprVisitor for Check<'_> {
    type Error = std::convert::Infallible;

    fn pre_visit(&mut self, expr: &Expr) -> Result<bool, Self::Error> {
        match expr {
            Expr::VectorSelector(selector) => self.selector(selector),
            Expr::MatrixSelector(selector) => self.selector(&selector.vs),
            Expr::Aggregate(aggregate) => self.modifier(aggregate.modifier.as_ref()),
            Expr::Binary(binary) => {
                self.modifier(binary.modifier.as_ref().and_then(|modifier| modifier.matching.as_ref()));
            }
            _ => {}
        }
        Ok(true)
    }
}

fn check<'a>(series: &'a BTreeMap<String, BTreeSet<String>>, query: &str) -> Check<'a> {
    let mut check =
        Check { series, used: BTreeSet::new(), labels: BTreeSet::new(), grouped: BTreeSet::new(), faults: Vec::new() };
    match parse(&replaced(query)) {
        Ok(expr) => {
            let Ok(_) = walk_expr(&mut check, &expr);
        }
        Err(error) => check.faults.push(error),
    }
    let strange: Vec<String> = check.grouped.difference(&check.labels).cloned().collect();
    check.faults.extend(strange.into_iter().map(|label| format!("groups by {label}, which no metric in it has")));
    check
}

#[test]
fn every_query_names_what_exists() {
    let series = series();
    let mut faults = Vec::new();
    for (place, query) in queries() {
        faults.extend(check(&series, &query).faults.into_iter().map(|fault| format!("{place}: {fault}")));
        assert!(!replaced(&query).contains('$'), "{place}: an unknown variable in {query}");
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn the_check_finds_each_kind_of_fault() {
    let series = series();
    for query in [
        "understudy_epoch_total",
        "understudy_epoch_seconds",
        "rate(understudy_epochs_total{host=\"a\"}[1m])",
        "understudy_vm_state{state=\"save\"}",
        "understudy_vm_role{role=~\"primary|master\"}",
        "sum by (peer) (understudy_held_output_bytes)",
        "understudy_held_output_bytes / on (witness) understudy_held_output_frames",
        "sum(rate(understudy_epochs_total[1m])",
    ] {
        assert_eq!(check(&series, query).faults.len(), 1, "{query}");
    }
}

#[test]
fn every_metric_has_a_panel_or_a_reason() {
    let series = series();
    let mut shown = BTreeSet::new();
    for board in boards::all() {
        for target in board.panels.iter().flat_map(|panel| &panel.targets) {
            shown.extend(check(&series, &target.expr).used);
        }
    }
    // A panel of a recorded series shows what that is made of.
    for rule in rules::recorded() {
        if shown.contains(rule.name) {
            shown.extend(check(&series, &rule.expr).used);
        } else {
            let alerts = rules::alerts();
            assert!(alerts.iter().any(|alert| alert.expr.contains(rule.name)), "nobody reads {}", rule.name);
        }
    }
    let is_shown =
        |name: &str| ["", "_bucket", "_sum", "_count"].iter().any(|end| shown.contains(&format!("{name}{end}")));
    for family in families() {
        let excused = WITHOUT_PANEL.iter().any(|(name, reason)| *name == family.name && !reason.is_empty());
        assert!(
            is_shown(&family.name) != excused,
            "{}: shown {}, excused {excused}",
            family.name,
            is_shown(&family.name)
        );
    }
}

#[test]
fn every_recorded_series_has_the_labels_it_is_said_to_have() {
    for rule in rules::recorded() {
        let by = rule.expr.split_once("by (").and_then(|(_, rest)| rest.split_once(')')).map_or("", |(by, _)| by);
        let by: BTreeSet<&str> = by.split(", ").filter(|label| *label != "le").collect();
        assert_eq!(by, rule.labels.iter().copied().collect(), "{}", rule.name);
    }
}
