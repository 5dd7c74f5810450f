//! A newer QEMU beside the installed one, from the backports of the Debian release that runs here: nothing is installed.
//!
//! Promise: its packages come by apt, which checks their signatures, with lists and sources of our own; what the host has is
//! not changed. [`Newer::command`] runs a command with it in the place of the installed QEMU, in a mount namespace that ends with
//! the command.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::shell;

/// The packages that a QEMU for our guests is made of.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
/// What of them takes the place of what is installed.
const PLACES: [&str; 4] =
    ["usr/bin/qemu-system-x86_64", "usr/lib/x86_64-linux-gnu/qemu", "usr/share/qemu", "usr/share/seabios"];
/// Debian's keys.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// It lies in a directory of its own.
#[derive(Debug)]
pub(crate) struct Newer {
    root: PathBuf,
    /// What it says of itself.
    pub(crate) version: String,
}

/// Makes it, or finds the one that was made before.
///
/// # Errors
/// Why there is none here.
pub(crate) fn make() -> Result<Newer> {
    let dir = shell::target().join("newer-qemu");
    let root = dir.join("root");
    if !PLACES.iter().all(|place| root.join(place).exists()) {
        fetch(&dir, &root)?;
    }
    if let Some(place) = PLACES.iter().find(|place| !Path::new("/").join(place).exists()) {
        bail!("there is no /{place} here whose place it could take");
    }
    // Of its own libraries it has none: those of the installed one must do.
    let said = shell::output(Command::new(root.join(PLACES[0])).arg("--version"))?;
    let version = said.lines().next().unwrap_or_default().to_owned();
    let installed = shell::output(Command::new(Path::new("/").join(PLACES[0])).arg("--version"))?;
    if installed.lines().next() == Some(&version) {
        bail!("the installed one is as new: {version}");
    }
    Ok(Newer { root, version })
}

fn fetch(dir: &Path, root: &Path) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").context("this is no Debian")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite = format!("{}-backports", codename.context("this release has no name")?);
    let (lists, debs) = (dir.join("lists"), dir.join("debs"));
    // What was begun and did not come to its end is of no use.
    for made in [root, &debs] {
        if made.exists() {
            fs::remove_dir_all(made).with_context(|| format!("cannot remove {}", made.display()))?;
        }
    }
    for made in [&lists.join("partial"), &debs] {
        fs::create_dir_all(made).with_context(|| format!("cannot make {}", made.display()))?;
    }
    let sources = dir.join("sources.list");
    let line = format!("deb [signed-by={KEYS}] http://deb.debian.org/debian {suite} main\n");
    fs::write(&sources, line).with_context(|| format!("cannot write {}", sources.display()))?;
    let apt = || {
        let mut command = Command::new("apt-get");
        command.args(["-q", "-o", "APT::Sandbox::User=root", "-o", "Dir::Etc::SourceParts=/dev/null"]);
        command.arg("-o").arg(format!("Dir::Etc::SourceList={}", sources.display()));
        command.arg("-o").arg(format!("Dir::State::Lists={}", lists.display()));
        command.current_dir(&debs);
        command
    };
    println!("setup: downloading a newer QEMU from {suite}");
    shell::output(apt().arg("update"))?;
    shell::output(apt().args(["-t", &suite, "download"]).args(PACKAGES))?;
    let unpacked = dir.join("unpacked");
    for deb in fs::read_dir(&debs).context("what was downloaded cannot be listed")? {
        shell::output(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(&unpacked))?;
    }
    fs::rename(&unpacked, root).with_context(|| format!("cannot make {}", root.display()))
}

impl Newer {
    /// `command`, to be run with it.
    pub(crate) fn command(&self, command: &Command) -> Command {
        let script = r#"root=$1; shift; places=$1; shift
            for place in $places; do mount --bind "$root/$place" "/$place" || exit; done; exec "$@""#;
        let mut inside = Command::new("unshare");
        inside.args(["--mount", "sh", "-c", script, "sh"]).arg(&self.root).arg(PLACES.join(" "));
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside.current_dir(command.get_current_dir().unwrap_or(Path::new(".")));
        inside
    }
}
