//! The last table of `docs/safety.md` says which tests hold each clause of `docs/protocol.md`: every clause is there, and every test.
//!
//! A row begins with a clause. In its cells a name in backticks that ends in `.rs` is a file, and every other one is a
//! test in the file before it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Source, clauses};

/// Where the table begins.
const HEADING: &str = "## Which test holds which clause";

/// Returns all breaches.
///
/// # Errors
/// If a document cannot be read.
pub(super) fn check(sources: &[Source], protocol: &Path, safety: &Path) -> Result<Vec<String>> {
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    Ok(breaches(sources, &read(protocol)?, &read(safety)?))
}

fn breaches(sources: &[Source], protocol: &str, safety: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let mut held = BTreeSet::new();
    let table = safety.lines().enumerate().skip_while(|(_, line)| *line != HEADING);
    for (number, line) in table.filter(|(_, line)| line.starts_with("| P")) {
        let mut says = |what: String| breaches.push(format!("docs/safety.md:{}: {what}", number + 1));
        held.extend(clauses::defined_by(line));
        let mut file = None;
        let mut tests = 0;
        for name in line.split('`').skip(1).step_by(2) {
            if name.ends_with(".rs") {
                file = sources.iter().find(|source| source.path == name);
                if file.is_none() {
                    says(format!("there is no {name}"));
                }
            } else if let Some(source) = file {
                tests += 1;
                if !source.text.contains(&format!("fn {name}(")) {
                    says(format!("{} has no test {name}", source.path));
                }
            }
        }
        if tests == 0 {
            says("no test holds this clause".to_owned());
        }
    }
    let missing = protocol.lines().filter_map(clauses::defined_by).filter(|clause| !held.contains(clause));
    breaches.extend(missing.map(|clause| format!("docs/safety.md: no row says which test holds {clause}")));
    breaches
}

#[cfg(test)]
mod tests {
    use super::{HEADING, breaches};
    use crate::tidy::Source;

    #[test]
    fn finds_clauses_without_tests_and_tests_that_are_not_there() {
        let sources = [Source {
            path: "a/src/tests.rs".to_owned(),
            text: "#[test]\nfn holds() {}\nfn holds_too() {}\n".to_owned(),
        }];
        // Put together here, so that these are no citations themselves.
        let (one, two) = (format!("P{}", 1), format!("P{}", 2));
        let protocol = format!("**{one}. x** y\n**{two}. z**\n");
        let with = |first: &str, second: &str| {
            let safety = format!("| {one} | elsewhere |\n{HEADING}\n| {one} | {first} |\n| {two} | {second} |\n");
            breaches(&sources, &protocol, &safety)
        };
        let good = "`a/src/tests.rs` `holds`; `a/src/tests.rs` `holds_too`";
        assert_eq!(with(good, good), Vec::<String>::new());
        assert_eq!(with(good, "`a/src/tests.rs` `hold`").len(), 1);
        assert_eq!(with(good, "`a/src/other.rs` `holds`").len(), 2);
        assert_eq!(with("`a/src/tests.rs`", good).len(), 1);
        assert_eq!(breaches(&sources, &protocol, &format!("{HEADING}\n| {one} | {good} |\n")).len(), 1);
        assert_eq!(breaches(&sources, &protocol, "").len(), 2);
    }
}
