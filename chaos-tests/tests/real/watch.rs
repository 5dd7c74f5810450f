//! What an operator sees of it: a real Prometheus scrapes both agents while a real VM is protected and fails over, with the
//! rules that are exported; then it is asked every query of every panel and of every alert.
//!
//! Promise: no query fails, none is empty, and a few figures that are known from elsewhere are right. An alert that must not
//! fire is asked for the series that it looks at. What is empty for a reason is listed with it in [`EMPTY`].

mod prometheus;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use promql_parser::parser::{Expr, VectorSelector, parse};
use promql_parser::util::{ExprVisitor, walk_expr};
use replicator::demo::lab::Host;
use replicator::demo::wait::until;

use self::prometheus::Prometheus;
use crate::stage::{SOON, Stage, play};

/// Queries that have no answer in this scenario, by panel and query, each with the reason.
const EMPTY: [(&str, &str, &str); 0] = [];

/// Alerts that fire in this scenario.
const FIRES: [&str; 1] = ["UnderstudyFailover"];

/// A query, and where it stands.
struct Query {
    place: String,
    target: String,
    expr: String,
}

/// The queries of all dashboards, with Grafana's variables replaced as Grafana does.
fn panels() -> Result<Vec<Query>> {
    let dir = prometheus::exported().join("grafana/dashboards");
    let mut queries = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        let board: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        let title = board["title"].as_str().context("a dashboard has a title")?;
        let panels = board["panels"].as_array().context("a dashboard has panels")?;
        let targets = panels.iter().flat_map(|panel| {
            let of = panel["targets"].as_array().into_iter().flatten();
            of.map(|target| (panel["title"].as_str().unwrap_or_default(), target))
        });
        for (panel, target) in targets {
            let expr = target["expr"].as_str().context("a query has an expression")?;
            queries.push(Query {
                place: format!("{title}: {panel}"),
                target: target["refId"].as_str().unwrap_or_default().to_owned(),
                expr: replaced(expr),
            });
        }
        for mark in board["annotations"]["list"].as_array().into_iter().flatten() {
            let expr = mark["target"]["expr"].as_str().context("a mark has an expression")?;
            let target = mark["name"].as_str().unwrap_or_default().to_owned();
            queries.push(Query { place: format!("{title}: marks"), target, expr: replaced(expr) });
        }
    }
    Ok(queries)
}

fn replaced(expr: &str) -> String {
    let all = [("$__rate_interval", "4s"), ("$__range", "60s"), ("$instance", ".*"), ("$vm", ".*")];
    all.iter().fold(expr.to_owned(), |text, (variable, value)| text.replace(variable, value))
}

/// The series that an expression looks at, now: whether there were some an hour ago is not asked.
struct Selectors(BTreeSet<String>);

impl Selectors {
    fn add(&mut self, selector: &VectorSelector) {
        self.0.insert(VectorSelector { offset: None, ..selector.clone() }.to_string());
    }
}

impl ExprVisitor for Selectors {
    type Error = std::convert::Infallible;

    fn pre_visit(&mut self, expr: &Expr) -> Result<bool, Self::Error> {
        match expr {
            Expr::VectorSelector(selector) => self.add(selector),
            Expr::MatrixSelector(selector) => self.add(&selector.vs),
            _ => {}
        }
        Ok(true)
    }
}

fn selectors(expr: &str) -> Result<BTreeSet<String>> {
    let parsed = parse(expr).map_err(anyhow::Error::msg).with_context(|| format!("cannot parse {expr}"))?;
    let mut found = Selectors(BTreeSet::new());
    let Ok(_) = walk_expr(&mut found, &parsed);
    Ok(found.0)
}

#[test]
fn every_panel_and_every_alert_sees_a_failover() {
    if let Some(missing) = prometheus::missing() {
        println!("skipped: a failover as Prometheus sees it: {missing}");
        return;
    }
    play("a failover as Prometheus sees it", async |stage| {
        stage.set_with_disk(64).await?;
        let prometheus = Prometheus::start(stage).await?;
        stage.protect().await?;
        let mut client = stage.writer("p").await?;
        // Rates need some scrapes of each phase.
        let committed = |at_least: f64| format!("sum(rate(understudy_epochs_total[4s])) > {at_least}");
        prometheus.until(stage, "epochs to be committed", &committed(1.0)).await?;
        prometheus.until(stage, "both agents to be up", "sum(up) == 2").await?;
        client.goes_on().await?;
        the_pair_is_seen(stage, &prometheus)?;
        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        prometheus.until(stage, "the failover", "increase(understudy_failovers_total[60s]) > 0").await?;
        prometheus.until(stage, "the alert of the failover", "ALERTS{alertname=\"UnderstudyFailover\"}").await?;
        prometheus.until(stage, "the old host to be down", "min(up) == 0").await?;
        prometheus.until(stage, "the VM to be at risk", "max(vm:understudy_vm_protected:max) == 0").await?;

        let mut faults = Vec::new();
        for query in panels()? {
            let reason = EMPTY.iter().find(|(place, target, _)| *place == query.place && *target == query.target);
            match (prometheus.over_all(stage, &query.expr), reason) {
                (Err(error), _) => faults.push(format!("{} {}: {error:#}", query.place, query.target)),
                (Ok(0), None) => faults.push(format!("{} {} is empty: {}", query.place, query.target, query.expr)),
                (Ok(0), Some(_)) | (Ok(1..), None) => {}
                (Ok(1..), Some((_, _, why))) => {
                    faults.push(format!("{} {} is not empty, though: {why}", query.place, query.target));
                }
            }
        }
        let alerts = prometheus.alerts(stage)?;
        ensure!(alerts.len() > 15, "only {} alerts are loaded", alerts.len());
        for (name, expr) in alerts {
            let values = prometheus.over_all(stage, &expr).with_context(|| name.clone())?;
            if FIRES.contains(&name.as_str()) && values == 0 {
                faults.push(format!("{name} has nothing to fire: {expr}"));
            }
            for selector in selectors(&expr)? {
                if prometheus.over_all(stage, &selector).with_context(|| name.clone())? == 0 {
                    faults.push(format!("{name} looks at nothing: {selector}"));
                }
            }
        }
        ensure!(faults.is_empty(), "{}", faults.join("\n"));
        the_failover_is_seen(stage, &prometheus)?;
        stage.nothing_lost(client).await.map(drop)
    });
}

/// What must be true while the pair is whole.
fn the_pair_is_seen(stage: &Stage, prometheus: &Prometheus) -> Result<()> {
    for (query, expected) in [
        ("sum(understudy_vm_role{role=\"primary\",instance=\"10.77.0.1:9644\"})", 1.0),
        ("sum(understudy_vm_role{role=\"standby\",instance=\"10.77.0.2:9644\"})", 1.0),
        ("max(vm:understudy_vm_protected:max)", 1.0),
        ("sum(understudy_witness_reachable)", 2.0),
        ("sum(understudy_failovers_total)", 0.0),
        ("count(understudy_rehearsal_timestamp_seconds{outcome=\"loads\"} > 0)", 1.0),
    ] {
        let value = prometheus.now(stage, query)?;
        ensure!(value == Some(expected), "{query} is {value:?}, not {expected}");
    }
    for (query, below) in [
        ("max(understudy_replication_lag_seconds)", 5.0),
        ("max(understudy_guest_pause_share_ratio)", 1.0),
        ("max(instance_vm:understudy_epoch_pause_seconds:p99_5m)", 2.0),
    ] {
        let value = prometheus.now(stage, query)?;
        ensure!(value.is_some_and(|value| value > 0.0 && value < below), "{query} is {value:?}");
    }
    Ok(())
}

/// What must be true after it.
fn the_failover_is_seen(stage: &Stage, prometheus: &Prometheus) -> Result<()> {
    for (query, expected) in [
        ("sum(understudy_failovers_total{instance=\"10.77.0.2:9644\"})", 1.0),
        ("sum(understudy_vm_role{role=\"survivor\"})", 1.0),
        ("sum(up)", 1.0),
        ("count(understudy_failover_phase_seconds_count == 1)", 5.0),
    ] {
        let value = prometheus.now(stage, query)?;
        ensure!(value == Some(expected), "{query} is {value:?}, not {expected}");
    }
    Ok(())
}

impl Prometheus {
    /// Waits until a query has an answer.
    async fn until(&self, stage: &Stage, what: &str, query: &str) -> Result<()> {
        until(&format!("Prometheus to see {what}"), SOON, async || {
            Ok(self.now(stage, query)?.map(drop).ok_or_else(|| format!("nothing for {query}")))
        })
        .await
    }
}

/// Time between two scrapes; the rates above are over eight of them.
const SCRAPE: Duration = Duration::from_millis(500);

/// The hosts' agents.
const HOSTS: [Host; 2] = [Host::A, Host::B];
