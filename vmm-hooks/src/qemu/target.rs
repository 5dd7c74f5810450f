//! Which QEMU the operator means: a name, a PID or a QMP socket, resolved through `/proc`.
//!
//! Promise: a name that fits two processes is refused, never guessed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::guest::{GuestError, GuestErrorKind};
use crate::tap::same_network;

/// One running QEMU on this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// By its process; the QMP socket is found on its command line.
    Pid(u32),
    /// By its QMP socket; the process is the one that listens there.
    QmpSocket(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "process {pid}"),
            Self::QmpSocket(path) => write!(f, "QMP socket {}", path.display()),
        }
    }
}

/// Finds what the operator calls `name`: a PID, the path of a QMP socket, or the name of a VM (`-name web-1` or
/// `-name guest=web-1`) among the `qemu-system-*` processes of this host.
///
/// # Errors
/// [`GuestErrorKind::Refused`] if nothing fits, or more than one process.
pub fn resolve(name: &str) -> Result<Target, GuestError> {
    if let Ok(pid) = name.parse::<u32>() {
        if Path::new(&format!("/proc/{pid}")).exists() {
            return Ok(Target::Pid(pid));
        }
        return Err(GuestError::new(GuestErrorKind::Refused, format!("there is no process {pid}")));
    }
    if name.contains('/') {
        if Path::new(name).exists() {
            return Ok(Target::QmpSocket(PathBuf::from(name)));
        }
        return Err(GuestError::new(GuestErrorKind::Refused, format!("there is no socket {name}")));
    }
    let mut found: Vec<u32> =
        running().into_iter().filter(|(_, vm)| vm.as_deref() == Some(name)).map(|(pid, _)| pid).collect();
    // Twins have the name of their primary, and so may a VM of another network on the same machine.
    prefer(&mut found, same_network);
    prefer(&mut found, |pid| argv(pid).is_some_and(|argv| !argv.iter().any(|arg| arg == "-incoming")));
    match found.as_slice() {
        [] => Err(GuestError::new(GuestErrorKind::Refused, format!("no running QEMU is called {name}"))
            .advise("start it with -name, or give its PID or the path of its QMP socket")),
        [pid] => Ok(Target::Pid(*pid)),
        many => Err(GuestError::new(
            GuestErrorKind::Refused,
            format!("{} running QEMUs are called {name}: {many:?}", many.len()),
        )
        .advise("give the PID instead")),
    }
}

/// Keeps those that fit, if any does.
fn prefer(found: &mut Vec<u32>, fits: impl Fn(u32) -> bool) {
    if found.iter().any(|&pid| fits(pid)) {
        found.retain(|&pid| fits(pid));
    }
}

/// All running `qemu-system-*` processes that this process can see, with the names of their VMs.
#[must_use]
pub fn running() -> Vec<(u32, Option<String>)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let argv = argv(pid)?;
            let program = Path::new(argv.first()?).file_name()?.to_str()?.to_owned();
            program.starts_with("qemu-system-").then(|| (pid, vm_name(&argv)))
        })
        .collect();
    found.sort_unstable_by_key(|(pid, _)| *pid);
    found
}

/// The command line of a process; `None` if it is gone, a kernel thread or not UTF-8.
#[must_use]
pub(super) fn argv(pid: u32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let text = text.strip_suffix('\0').unwrap_or(&text);
    (!text.is_empty()).then(|| text.split('\0').map(str::to_owned).collect())
}

/// The name that a command line gives its VM.
#[must_use]
pub(super) fn vm_name(argv: &[String]) -> Option<String> {
    let at = argv.iter().rposition(|arg| arg == "-name" || arg == "--name")?;
    let value = argv.get(at + 1)?;
    let mut guest = None;
    for (index, part) in value.split(',').enumerate() {
        match part.split_once('=') {
            Some(("guest", name)) => guest = Some(name),
            None if index == 0 => guest = Some(part),
            _ => {}
        }
    }
    guest.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(args: &[&str]) -> Option<String> {
        vm_name(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn finds_the_name_in_each_form_that_qemu_takes() {
        assert_eq!(name_of(&["qemu", "-name", "web-1"]).as_deref(), Some("web-1"));
        assert_eq!(name_of(&["qemu", "-name", "web-1,debug-threads=on"]).as_deref(), Some("web-1"));
        assert_eq!(name_of(&["qemu", "-name", "guest=web-1,process=x"]).as_deref(), Some("web-1"));
        assert_eq!(name_of(&["qemu", "--name", "debug-threads=on,guest=web-1"]).as_deref(), Some("web-1"));
        assert_eq!(name_of(&["qemu", "-name", "debug-threads=on"]), None);
        assert_eq!(name_of(&["qemu", "-name"]), None);
        assert_eq!(name_of(&["qemu", "-m", "64"]), None);
    }

    #[test]
    fn refuses_what_is_not_there() {
        let error = resolve("no-vm-has-this-name-7f3a").expect_err("nothing is called so");
        assert_eq!(error.kind, GuestErrorKind::Refused);
        assert!(resolve("/nonexistent/qmp.sock").is_err());
        assert_eq!(resolve(&std::process::id().to_string()).expect("we run"), Target::Pid(std::process::id()));
    }
}
