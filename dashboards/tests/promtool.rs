//! Prometheus' own checker reads what we export: rules, their unit tests, the configuration.
//!
//! Without `promtool` (Debian package prometheus, which `cargo xtask setup` installs) each says `skipped: ...` and passes.

use std::path::Path;
use std::process::{Command, Output};

/// Runs `promtool` in the exported directory; `None` without it.
fn promtool(args: &[&str]) -> Option<Output> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("export/prometheus");
    match Command::new("promtool").args(args).current_dir(dir).output() {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: promtool {}: {error}", args.join(" "));
            None
        }
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn passes(args: &[&str]) {
    if let Some(output) = promtool(args) {
        assert!(output.status.success(), "promtool {}: {}", args.join(" "), text(&output));
    }
}

#[test]
fn the_rules_are_rules() {
    passes(&["check", "rules", "understudy.rules.yml"]);
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    passes(&["test", "rules", "understudy.rules.test.yml"]);
}

#[test]
fn the_configuration_is_one() {
    passes(&["check", "config", "prometheus.yml"]);
}

/// The unit tests would notice: with thresholds out of reach they fail.
#[test]
fn unit_tests_fail_for_rules_that_never_fire() {
    let dir = tempfile::tempdir().unwrap();
    let rules = dashboards::rules::rules().replace(" == 1", " == 77").replace(" > 0.5", " > 77");
    std::fs::write(dir.path().join("understudy.rules.yml"), rules).unwrap();
    let tests = dir.path().join("understudy.rules.test.yml");
    std::fs::write(&tests, dashboards::rules::unit_tests()).unwrap();
    if let Some(output) = promtool(&["test", "rules", tests.to_str().unwrap()]) {
        assert!(!output.status.success(), "{}", text(&output));
        assert!(text(&output).contains("UnderstudyVmError"), "{}", text(&output));
    }
}
