//! The rules of the house that no compiler checks.
//!
//! Each check returns every breach it found, as `file:line: what`, so that one run shows all of them.

mod clauses;
mod crates;
mod safety;
mod sources;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::shell;

/// Directories that are not ours to check.
const NOT_OURS: [&str; 2] = ["target", ".git"];

/// One Rust file of the workspace.
#[derive(Debug)]
struct Source {
    /// Relative to the workspace's root, with `/`.
    path: String,
    text: String,
}

/// Runs all checks.
///
/// # Errors
/// If one is broken; all breaches were printed before.
pub(crate) fn run() -> Result<()> {
    let root = shell::root();
    let mut sources = Vec::new();
    collect(&root, &root, &mut sources)?;
    let mut breaches = crates::check(&crates::metadata()?);
    breaches.extend(sources::check(&sources));
    breaches.extend(clauses::check(&sources, &root.join("docs/protocol.md"))?);
    breaches.extend(safety::check(&sources, &root.join("docs/protocol.md"), &root.join("docs/safety.md"))?);
    for breach in &breaches {
        println!("{breach}");
    }
    if !breaches.is_empty() {
        bail!("{} breaches of the house rules", breaches.len());
    }
    println!("tidy: {} files keep the house rules", sources.len());
    Ok(())
}

fn collect(root: &Path, dir: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let mut entries: Vec<PathBuf> = dir
        .read_dir()
        .with_context(|| format!("cannot list {}", dir.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if !NOT_OURS.contains(&name.as_ref()) {
                collect(root, &path, sources)?;
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let path = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            sources.push(Source { path, text });
        }
    }
    Ok(())
}
