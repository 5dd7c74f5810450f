//! The committed files are what the code makes, and are whole: ids, places, words for each panel, a runbook for each alert.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dashboards::grafana::options::Kind;
use dashboards::{boards, generated, rules};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn committed_files_are_what_the_code_makes() {
    let differ: Vec<String> = generated()
        .into_iter()
        .filter(|file| fs::read_to_string(root().join(&file.path)).ok().as_deref() != Some(file.text.as_str()))
        .map(|file| file.path)
        .collect();
    assert!(differ.is_empty(), "run `cargo xtask dashboards` and commit {differ:?}");
}

#[test]
fn the_program_exports_what_is_committed() {
    let exported = replicator::cli::dashboards::files();
    for file in generated() {
        let name = file.path.strip_prefix("dashboards/export/").or_else(|| file.path.strip_prefix("docs/")).unwrap();
        let embedded =
            exported.iter().find(|(path, _)| *path == name).unwrap_or_else(|| panic!("{name} is not exported"));
        assert_eq!(embedded.1, file.text, "{name}");
    }
}

#[test]
fn panels_are_whole_and_stand_apart() {
    let mut uids = BTreeSet::new();
    for board in boards::all() {
        assert!(uids.insert(board.uid.clone()), "{} is there twice", board.uid);
        let mut ids = BTreeSet::new();
        let mut titles = BTreeSet::new();
        let mut cells = BTreeSet::new();
        for panel in &board.panels {
            let (at, name) = (panel.grid_pos, format!("{}: {}", board.uid, panel.title));
            assert!(ids.insert(panel.id), "{name}: id {}", panel.id);
            assert!(titles.insert(panel.title.as_str()), "{name}: there is another of this title");
            assert!(at.x + at.w <= 24 && at.w > 0 && at.h > 0, "{name}: {at:?}");
            for (x, y) in (at.x..at.x + at.w).flat_map(|x| (at.y..at.y + at.h).map(move |y| (x, y))) {
                assert!(cells.insert((x, y)), "{name} stands on another panel");
            }
            if panel.kind == Kind::Row {
                continue;
            }
            assert!(!panel.targets.is_empty(), "{name} asks nothing");
            assert!(panel.description.len() > 20, "{name}: no description of what to do when it looks bad");
            let json = serde_json::to_value(panel).unwrap();
            let defaults = &json["fieldConfig"]["defaults"];
            assert!(defaults["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "{name}: no unit");
            let steps = defaults["thresholds"]["steps"].as_array().unwrap();
            assert!(steps[0]["value"].is_null(), "{name}: thresholds begin below everything");
            let values: Vec<f64> = steps.iter().filter_map(|step| step["value"].as_f64()).collect();
            assert!(values.is_sorted(), "{name}: {values:?}");
        }
    }
}

#[test]
fn every_alert_has_a_runbook_and_both_kinds_of_cases() {
    let text = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let mut names = BTreeSet::new();
    for alert in rules::alerts() {
        let name = alert.name;
        assert!(names.insert(name), "{name} is there twice");
        let section = text.split_once(&format!("\n### {name}\n")).unwrap_or_else(|| panic!("{name} has no section")).1;
        let section = section.split("\n#").next().unwrap();
        for part in ["**Means**", "**Safe**", "**Do**"] {
            assert!(section.contains(part), "the section of {name} has no {part}");
        }
        assert!(alert.cases.iter().any(|case| !case.fires.is_empty()), "{name} is never shown to fire");
        assert!(alert.cases.iter().any(|case| case.fires.is_empty()), "{name} is never shown to be quiet");
    }
    for line in text.lines().filter_map(|line| line.strip_prefix("### Understudy")) {
        assert!(names.contains(format!("Understudy{line}").as_str()), "no alert has the section Understudy{line}");
    }
}
