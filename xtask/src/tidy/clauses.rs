//! Every clause of `docs/protocol.md` that code cites exists there, and no number is given twice.
//!
//! A clause is a `P` with a number, such as `P` + `4`, or with a second one after a dot. It is defined where a line of
//! the document begins with it (after `#`, `-`, `*` or `|`), and cited wherever it stands as a word in a Rust file.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Source;

/// Words of the same shape that are percentiles.
const NO_CLAUSES: [&str; 4] = ["P50", "P90", "P95", "P99"];

/// Returns all breaches.
///
/// # Errors
/// If the document cannot be read.
pub(super) fn check(sources: &[Source], document: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(document).with_context(|| format!("cannot read {}", document.display()))?;
    Ok(breaches(sources, &text))
}

fn breaches(sources: &[Source], document: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let mut defined = BTreeSet::new();
    for (number, line) in document.lines().enumerate() {
        if let Some(clause) = defined_by(line)
            && !defined.insert(clause)
        {
            breaches.push(format!("docs/protocol.md:{}: clause {clause} is defined twice", number + 1));
        }
    }
    for source in sources {
        for (number, line) in source.text.lines().enumerate() {
            for clause in clauses(line).filter(|clause| !defined.contains(clause)) {
                breaches.push(format!("{}:{}: docs/protocol.md has no clause {clause}", source.path, number + 1));
            }
        }
    }
    breaches
}

/// The clause that a line of a document begins with.
pub(super) fn defined_by(line: &str) -> Option<&str> {
    let line = line.trim_start_matches(['#', '-', '*', '|', ' ']);
    clauses(line).next().filter(|clause| line.starts_with(clause))
}

fn clauses(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '_')
        .map(|word| word.trim_matches('.'))
        .filter(|word| !NO_CLAUSES.contains(word) && is_clause(word))
}

fn is_clause(word: &str) -> bool {
    let Some(numbers) = word.strip_prefix('P') else {
        return false;
    };
    let mut parts = numbers.split('.');
    let all = parts.all(|part| !part.is_empty() && part.len() <= 2 && part.bytes().all(|b| b.is_ascii_digit()));
    all && numbers.split('.').count() <= 2
}

#[cfg(test)]
mod tests {
    use super::breaches;
    use crate::tidy::Source;

    // Put together here, so that these are no citations themselves.
    fn cite(numbers: &str) -> String {
        format!("//! Promise (`docs/protocol.md` P{numbers}).\n")
    }

    #[test]
    fn finds_citations_of_clauses_that_are_not_there_and_numbers_given_twice() {
        let document = format!("# Protocol\n## P{0}\n- **P{0}.1** x\n| P{0}.2 | y |\n", 3);
        let source = |text: String| [Source { path: "a/src/lib.rs".to_owned(), text }];
        assert!(breaches(&source(cite("3")), &document).is_empty());
        assert!(breaches(&source(cite("3.2")), &document).is_empty());
        assert_eq!(breaches(&source(cite("3.4")), &document).len(), 1);
        assert_eq!(breaches(&source(cite("4")), &document).len(), 1);
        assert_eq!(breaches(&source(cite("3")), &format!("{document}## P{}\n", 3)).len(), 1);
        assert!(breaches(&source("//! the p99, HTTP2, P99, IP4 and P2P\n".to_owned()), &document).is_empty());
    }
}
