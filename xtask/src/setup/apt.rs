//! Debian's package tools, called with the least they need.
//!
//! Promise: package lists are fetched at most once in a run, and only when something is missing or out of date.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// Bound on the packages of one closure; more means that the filter of [`Apt::closure`] went wrong.
const MAX_CLOSURE: usize = 64;

/// The tools, and whether the lists were fetched by us.
#[derive(Debug)]
pub(crate) struct Apt {
    updated: bool,
}

impl Apt {
    pub(crate) fn new() -> Self {
        Self { updated: false }
    }

    fn get() -> Command {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "Dpkg::Use-Pty=0"]);
        command
    }

    /// Fetches the package lists; an error if that was done already, so that callers retry once.
    fn update(&mut self) -> Result<()> {
        if self.updated {
            bail!("the package lists are fresh");
        }
        if !shell::is_root() {
            bail!("fetching package lists needs the superuser");
        }
        self.updated = true;
        println!("setup: apt-get update");
        shell::output(Self::get().arg("update")).map(drop)
    }

    /// Installs `packages` without recommended ones. Lists that were fetched in this run are not fetched again.
    ///
    /// # Errors
    /// Without apt-get, without root, or if it fails.
    pub(crate) fn install(&mut self, packages: &[&str]) -> Result<()> {
        if shell::find("apt-get").is_none() {
            bail!("there is no apt-get here");
        }
        if !shell::is_root() {
            bail!("installing needs the superuser");
        }
        if !self.updated {
            self.update()?;
        }
        println!("setup: apt-get install {}", packages.join(" "));
        let mut command = Self::get();
        command.args(["install", "-y", "--no-install-recommends"]).args(packages);
        for name in removed(&shell::output(&mut command)?) {
            println!("setup: apt removed {name}, which cannot stand beside that");
        }
        Ok(())
    }

    /// Runs `ask`; if it fails, once more with fresh lists.
    fn with_fresh_lists<T>(&mut self, ask: impl Fn() -> Result<T>) -> Result<T> {
        match ask() {
            Ok(answer) => Ok(answer),
            Err(first) => match self.update() {
                Ok(()) => ask(),
                Err(_) => Err(first),
            },
        }
    }

    /// The packages that `packages` depend on, the first of each group of alternatives.
    ///
    /// # Errors
    /// If a package is not known here.
    pub(crate) fn depends(&mut self, packages: &[String]) -> Result<Vec<String>> {
        self.with_fresh_lists(|| {
            let mut command = Command::new("apt-cache");
            command.args(["depends", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
            command.args(["--no-replaces", "--no-enhances"]).args(packages);
            let text = shell::output(&mut command)?;
            if text.is_empty() {
                bail!("apt does not know {}", packages.join(", "));
            }
            Ok(first_alternatives(&text))
        })
    }

    /// `packages` and all libraries (packages called `lib...`) below them.
    ///
    /// # Errors
    /// If a package is not known here.
    pub(crate) fn closure(&mut self, packages: &[&str]) -> Result<Vec<String>> {
        let mut all: Vec<String> = packages.iter().map(|&name| name.to_owned()).collect();
        let mut layer = all.clone();
        while !layer.is_empty() {
            let mut below = self.depends(&layer)?;
            below.sort();
            below.dedup();
            below.retain(|name| name.starts_with("lib") && !all.contains(name));
            all.extend_from_slice(&below);
            if all.len() > MAX_CLOSURE {
                bail!("more than {MAX_CLOSURE} packages below {}", packages.join(", "));
            }
            layer = below;
        }
        Ok(all)
    }

    /// Downloads `packages` into `dir` and returns the files.
    ///
    /// # Errors
    /// If one cannot be had.
    pub(crate) fn download(&mut self, packages: &[String], dir: &Path) -> Result<Vec<PathBuf>> {
        self.with_fresh_lists(|| {
            let mut command = Self::get();
            // Not as the user _apt, who may not write here.
            command.args(["-o", "APT::Sandbox::User=root", "download"]).args(packages).current_dir(dir);
            shell::output(&mut command)
        })?;
        let mut files = Vec::new();
        for entry in dir.read_dir().with_context(|| format!("cannot list {}", dir.display()))? {
            let file = entry?.path();
            if file.extension().is_some_and(|ext| ext == "deb") {
                files.push(file);
            }
        }
        files.sort();
        Ok(files)
    }
}

/// Reads what `apt-get install` says: a line `Removing name (version) ...` for each package that had to go.
fn removed(text: &str) -> Vec<String> {
    let gone = text.lines().filter_map(|line| line.strip_prefix("Removing ")?.strip_suffix(" ..."));
    gone.map(str::to_owned).collect()
}

/// Reads `apt-cache depends`: a line `  Depends: x`, or `  |Depends: x` when another alternative follows.
fn first_alternatives(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside_group = false;
    for line in text.lines() {
        let line = line.trim_start();
        let (more, rest) = line.strip_prefix('|').map_or((false, line), |rest| (true, rest));
        let Some(name) = rest.strip_prefix("Depends: ").or_else(|| rest.strip_prefix("PreDepends: ")) else {
            continue;
        };
        if !inside_group && !name.starts_with('<') {
            found.push(name.trim().to_owned());
        }
        inside_group = more;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{first_alternatives, removed};

    #[test]
    fn tells_what_had_to_go() {
        let text = "Reading package lists...\nThe following packages will be REMOVED:\n  qemu-utils\n\
            Removing qemu-utils (1:10.0.2+ds-2) ...\nSelecting previously unselected package seabios.\n";
        assert_eq!(removed(text), ["qemu-utils (1:10.0.2+ds-2)"]);
    }

    #[test]
    fn takes_the_first_of_each_group_of_alternatives() {
        let text = "redis-tools\n  PreDepends: init\n |Depends: a\n |Depends: b\n  Depends: c\n  Depends: d\n    virtual\n  Breaks: e\n";
        assert_eq!(first_alternatives(text), ["init", "a", "d"]);
    }
}
