//! `understudy dashboards export DIR`: dashboards, rules, and how to start Prometheus and Grafana with them.
//!
//! The files are generated and checked by the crate `dashboards`, a leaf that imports this one; so they come in as the
//! committed files, embedded as text. Promise: nothing that somebody changed is written over unless it is asked for. What
//! was written is remembered beside the files ([`MEMORY`]), so that a newer program replaces what an older one wrote, and
//! all is checked before anything is written. Each file is replaced whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::exit::{CliError, Exit};

/// Where the sums of written files are kept, in the directory itself.
const MEMORY: &str = ".understudy-export.json";

/// The operator's own file: written once, then never again.
const YOURS: &str = "prometheus/targets.yml";

macro_rules! exported {
    ($($path:literal),* $(,)?) => {
        [$(($path, include_str!(concat!("../../../dashboards/export/", $path)))),*]
    };
}

/// Every file that is exported, by its path in the directory.
#[must_use]
pub fn files() -> Vec<(&'static str, &'static str)> {
    let mut files = exported![
        "compose.yml",
        "grafana/dashboards/understudy-failover.json",
        "grafana/dashboards/understudy-fleet.json",
        "grafana/dashboards/understudy-hosts.json",
        "grafana/dashboards/understudy-vm.json",
        "grafana/provisioning/dashboards/understudy.yml",
        "grafana/provisioning/datasources/understudy.yml",
        "prometheus/prometheus.yml",
        "prometheus/targets.yml",
        "prometheus/understudy.rules.test.yml",
        "prometheus/understudy.rules.yml",
    ]
    .to_vec();
    files.push(("metrics.md", include_str!("../../../docs/metrics.md")));
    files.push(("operations.md", include_str!("../../../docs/operations.md")));
    files
}

/// `understudy dashboards`
#[derive(Debug, Clone, Subcommand)]
pub enum DashboardsCommand {
    /// Write dashboards, alert rules, runbooks and a compose file for Prometheus and Grafana into a directory
    Export(ExportArgs),
}

/// `understudy dashboards export`
#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    /// Made if it is not there
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Also write over files that were changed since they were exported
    #[arg(long)]
    pub force: bool,
}

/// Why nothing, or not everything, was exported.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("these files in {} are not as they were exported; nothing was written: {}", dir.display(), changed.join(", "))]
    Changed { dir: PathBuf, changed: Vec<String> },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is no memory of an export", path.display())]
    Memory { path: PathBuf, source: serde_json::Error },
}

impl From<ExportError> for CliError {
    fn from(error: ExportError) -> Self {
        match &error {
            ExportError::Changed { .. } => Self::of(Exit::Refused, &error)
                .advise("Keep your changes elsewhere, then use --force, or another directory."),
            ExportError::Memory { .. } => Self::of(Exit::Failed, &error)
                .advise("Remove it and use --force; files that you changed are written over then."),
            ExportError::Read { .. } | ExportError::Write { .. } => Self::of(Exit::Failed, &error),
        }
    }
}

/// Runs one of them; returns what to print.
pub(super) fn run(command: &DashboardsCommand) -> Result<String, CliError> {
    let DashboardsCommand::Export(args) = command;
    let done = export(&args.dir, args.force, &files())?;
    let dir = args.dir.display();
    Ok(format!(
        "{} files written to {dir}, {} were there already\n\nName your hosts in {dir}/{YOURS}, then: cd {dir} && docker compose up --detach\n",
        done.written, done.kept
    ))
}

#[derive(Debug, PartialEq, Eq)]
struct Done {
    written: usize,
    kept: usize,
}

/// Length and checksum: enough to see an edit, no proof against forgery.
fn sum(text: &[u8]) -> String {
    format!("{}-{:08x}", text.len(), crc32fast::hash(text))
}

fn export(dir: &Path, force: bool, files: &[(&str, &str)]) -> Result<Done, ExportError> {
    let memory_path = dir.join(MEMORY);
    let remembered: BTreeMap<String, String> = match read(&memory_path)? {
        Some(text) => serde_json::from_slice(&text)
            .or_else(|source| if force { Ok(BTreeMap::new()) } else { Err(source) })
            .map_err(|source| ExportError::Memory { path: memory_path.clone(), source })?,
        None => BTreeMap::new(),
    };
    let mut due = Vec::new();
    let mut changed = Vec::new();
    let mut memory = BTreeMap::new();
    for &(name, text) in files {
        memory.insert(name.to_owned(), sum(text.as_bytes()));
        match read(&dir.join(name))? {
            Some(there) if there == text.as_bytes() || name == YOURS => {}
            Some(there) if !force && remembered.get(name) != Some(&sum(&there)) => changed.push(name.to_owned()),
            _ => due.push((name, text)),
        }
    }
    if !changed.is_empty() {
        return Err(ExportError::Changed { dir: dir.to_path_buf(), changed });
    }
    for (name, text) in &due {
        write(&dir.join(name), text)?;
    }
    write(&memory_path, &(serde_json::to_string_pretty(&memory).expect("names and sums are plain data") + "\n"))?;
    Ok(Done { written: due.len(), kept: files.len() - due.len() })
}

/// What is in a file, or `None` if there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, ExportError> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ExportError::Read { path: path.to_path_buf(), source }),
    }
}

fn write(path: &Path, text: &str) -> Result<(), ExportError> {
    let failed = |source| ExportError::Write { path: path.to_path_buf(), source };
    fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(failed)?;
    let mut half = path.as_os_str().to_owned();
    half.push(".new");
    fs::write(&half, text).and_then(|()| fs::rename(&half, path)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [(&str, &str); 3] = [("a.yml", "old a"), ("sub/b.yml", "old b"), (YOURS, "yours")];
    const NEW: [(&str, &str); 3] = [("a.yml", "new a"), ("sub/b.yml", "old b"), (YOURS, "other")];

    #[test]
    fn a_newer_program_replaces_what_an_older_one_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made");
        assert_eq!(export(&dir, false, &OLD).unwrap(), Done { written: 3, kept: 0 });
        assert_eq!(export(&dir, false, &OLD).unwrap(), Done { written: 0, kept: 3 });
        assert_eq!(export(&dir, false, &NEW).unwrap(), Done { written: 1, kept: 2 });
        assert_eq!(fs::read_to_string(dir.join("a.yml")).unwrap(), "new a");
        assert_eq!(fs::read_to_string(dir.join(YOURS)).unwrap(), "yours");
    }

    #[test]
    fn what_was_changed_is_kept_until_it_is_forced() {
        let dir = tempfile::tempdir().unwrap();
        export(dir.path(), false, &OLD).unwrap();
        fs::write(dir.path().join("sub/b.yml"), "mine").unwrap();
        let error = export(dir.path(), false, &NEW).unwrap_err();
        let text = CliError::from(error).render();
        assert!(text.contains("nothing was written: sub/b.yml") && text.contains("--force"), "{text}");
        assert_eq!(fs::read_to_string(dir.path().join("a.yml")).unwrap(), "old a", "nothing was written");
        assert_eq!(export(dir.path(), true, &NEW).unwrap(), Done { written: 2, kept: 1 });
        assert_eq!(fs::read_to_string(dir.path().join("sub/b.yml")).unwrap(), "old b");
    }

    #[test]
    fn what_was_never_exported_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.yml"), "of another program").unwrap();
        assert!(matches!(export(dir.path(), false, &OLD), Err(ExportError::Changed { .. })));
        assert!(!dir.path().join("sub").exists());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = export(&dir.path().join("file"), false, &OLD).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
        fs::write(dir.path().join(MEMORY), "{").unwrap();
        assert!(matches!(export(dir.path(), false, &OLD), Err(ExportError::Memory { .. })));
        assert_eq!(export(dir.path(), true, &OLD).unwrap().written, 3);
    }

    #[test]
    fn everything_that_is_to_be_exported_is_embedded() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards/export");
        let mut there = Vec::new();
        let mut dirs = vec![root.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    there.push(path.strip_prefix(&root).unwrap().display().to_string());
                }
            }
        }
        let names: Vec<&str> = files().iter().map(|&(name, _)| name).collect();
        let missing: Vec<_> = there.iter().filter(|name| !names.contains(&name.as_str())).collect();
        assert!(missing.is_empty(), "not embedded: {missing:?}");
    }
}
