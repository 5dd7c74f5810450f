//! What every source file keeps to: length, a header, where unsafe code may be, purity of the cores.

use super::Source;

/// No file is longer.
const MAX_LINES: usize = 800;
/// The only places of unsafe code: system calls, and the machine that the pilot guest has no system under.
const UNSAFE_HOMES: [&str; 2] = ["vmm-hooks/src/sys/", "vmm-hooks/pilot/src/machine.rs"];
const PURE_ROOTS: [&str; 2] = ["heartbeat/core/src/lib.rs", "replicator/core/src/lib.rs"];
const PURE_DIRS: [&str; 2] = ["heartbeat/core/src/", "replicator/core/src/"];

/// Returns all breaches.
pub(super) fn check(sources: &[Source]) -> Vec<String> {
    let mut breaches = Vec::new();
    for source in sources {
        let path = &source.path;
        let lines = source.text.lines().count();
        if lines > MAX_LINES {
            breaches.push(format!("{path}:{lines}: {lines} lines, the bound is {MAX_LINES}"));
        }
        // By custom these are modules under `#[cfg(test)]`, named by what they test.
        let for_tests = path.ends_with("/tests.rs") || path.contains("/tests/");
        if path.contains("/src/") && !for_tests && !source.text.trim_start().starts_with("//!") {
            breaches.push(format!("{path}:1: no `//!` header that says what the file is for and what it promises"));
        }
        let code = code_only(&source.text);
        if !UNSAFE_HOMES.iter().any(|home| path.starts_with(home)) {
            for (number, line) in code.lines().enumerate() {
                let allowed = line.contains("allow(unsafe_code)") || line.contains("expect(unsafe_code)");
                if allowed || words(line).any(|word| word == "unsafe") {
                    breaches.push(format!(
                        "{path}:{}: unsafe code outside of {}",
                        number + 1,
                        UNSAFE_HOMES.join(" and ")
                    ));
                }
            }
        }
        if !for_tests && PURE_DIRS.iter().any(|dir| path.starts_with(dir)) {
            breaches.extend(impurities(path, &code));
        }
    }
    for root in PURE_ROOTS {
        let text = sources.iter().find(|source| source.path == root).map_or("", |source| source.text.as_str());
        let pure = text.contains("#![no_std]") || text.contains("#![cfg_attr(not(test), no_std)]");
        if !pure || !text.contains("#![forbid(unsafe_code)]") {
            breaches.push(format!("{root}:1: a pure core is `#![no_std]` and `#![forbid(unsafe_code)]`"));
        }
    }
    breaches
}

/// `std` in a core outside of its tests, which stand at the end of a file.
fn impurities(path: &str, code: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let mut previous = "";
    for (number, line) in code.lines().enumerate() {
        let line = line.trim();
        if line.starts_with("mod tests") && previous.starts_with("#[cfg(test)]") {
            break;
        }
        let for_tests = previous.starts_with("#[cfg(test)]");
        if line.starts_with("extern crate std") && !for_tests {
            breaches.push(format!("{path}:{}: a pure core does not bring in std", number + 1));
        }
        previous = line;
    }
    breaches
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// The text with comments, strings and characters blanked; lines stay where they are.
fn code_only(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest, &out) {
            length
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        out.extend(rest[..skip].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[skip..];
    }
    out
}

/// The length of the block comment at the start, which may hold others.
fn block_comment(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of the raw string at the start, if there is one and it is no end of a word.
fn raw_string(text: &str, before: &str) -> Option<usize> {
    if before.ends_with(|c: char| c.is_alphanumeric() && c != 'b' || c == '_') {
        return None;
    }
    let hashes = text.strip_prefix('r')?.chars().take_while(|&c| c == '#').count();
    let body = text[1 + hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(body.find(&end).map_or(text.len(), |at| 2 + hashes + at + end.len()))
}

/// Whether a quote at the start opens a character rather than a lifetime.
fn is_character(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

/// The length of the literal at the start, up to its closing `quote`.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == quote {
            return at + 1;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::{check, code_only};
    use crate::tidy::Source;

    fn breaches(path: &str, text: &str) -> Vec<String> {
        let core = "//! x\n#![no_std]\n#![forbid(unsafe_code)]\n";
        let mut sources: Vec<Source> = super::PURE_ROOTS
            .map(|root| Source { path: root.to_owned(), text: core.to_owned() })
            .into_iter()
            .filter(|source| source.path != path)
            .collect();
        sources.push(Source { path: path.to_owned(), text: text.to_owned() });
        check(&sources)
    }

    #[test]
    fn blanks_comments_and_literals_only() {
        let text =
            "let a = \"un\\\"safe\"; // unsafe\nlet b: &'a str = r#\"unsafe\"#; /* a /* unsafe */ b */ c('\\'', 'x')";
        let code = code_only(text);
        assert!(!code.contains("safe"));
        assert!(code.contains("&'a str"));
        assert!(code.ends_with("c(    ,    )"));
        assert_eq!(code.lines().count(), 2);
    }

    #[test]
    fn finds_unsafe_code_outside_of_its_home() {
        let text = "//! x\nfn f() { unsafe { g() } }\n";
        assert_eq!(breaches("replicator/src/f.rs", text).len(), 1);
        assert!(breaches("vmm-hooks/src/sys/f.rs", text).is_empty());
        assert!(breaches("replicator/src/f.rs", "//! x\n// unsafe {}\nconst A: &str = \"unsafe\";\n").is_empty());
        assert_eq!(breaches("replicator/src/f.rs", "//! x\n#![allow(unsafe_code)]\n").len(), 1);
    }

    #[test]
    fn finds_long_files_missing_headers_and_impure_cores() {
        assert_eq!(breaches("replicator/src/f.rs", &format!("//! x\n{}", "\n".repeat(800))).len(), 1);
        assert_eq!(breaches("replicator/src/f.rs", "fn f() {}\n").len(), 1);
        assert_eq!(breaches("heartbeat/core/src/lib.rs", "//! x\n#![forbid(unsafe_code)]\n").len(), 1);
        assert_eq!(breaches("heartbeat/core/src/f.rs", "//! x\nextern crate std;\n").len(), 1);
        assert!(breaches("heartbeat/core/src/f.rs", "//! x\n#[cfg(test)]\nextern crate std;\n").is_empty());
    }
}
