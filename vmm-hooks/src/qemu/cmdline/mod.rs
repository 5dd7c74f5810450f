//! A primary's command line, rewritten for its twin. Pure.
//!
//! What makes the machine (type, CPU, devices, firmware) is kept word for word. Guest memory goes into files that the twin
//! maps; what the primary listens on or writes to (monitors, serial lines, VNC, logs) moves into the twin's run directory, because
//! both may share a file system or a host. What cannot be carried over is refused by name.

mod disks;
mod drives;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod options;
mod rewrite;

use std::path::PathBuf;

pub(super) use disks::{Disk, Image};
pub(super) use drives::{DriveArgument, drive_arguments};
use options::Keys;
pub(super) use rewrite::{Backend, Network, Plan, qmp_path, rewrite};

/// Why a command line cannot be carried over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CmdlineError {
    /// An argument that is no option: a disk image.
    #[error("the command line has {argument}, which is no option")]
    Positional { argument: String },
    /// An option that this program does not know.
    #[error("the option {option} is not known, so a twin cannot be made with it")]
    Unknown { option: String },
    /// An option without the value it needs.
    #[error("the option -{option} has no value")]
    NoValue { option: String },
    /// An option that binds the guest to this host.
    #[error("the option -{option} {value} binds the guest to its host: {reason}")]
    Bound { option: String, value: String, reason: &'static str },
    /// A value in a form that is not read.
    #[error("the value of -{option} cannot be read: {value}")]
    Unreadable { option: String, value: String },
    /// A replicated disk that no option names.
    #[error("no drive on the command line is in {}", file.display())]
    NoDrive { file: PathBuf },
    /// A tap whose interface is not known.
    #[error("the interface of netdev {netdev} is not known")]
    NoInterface { netdev: String },
}

/// The QMP sockets on a command line, in order: `-qmp unix:PATH` and `-mon mode=control` on a socket chardev.
pub(super) fn qmp_sockets(argv: &[String]) -> Vec<PathBuf> {
    let values = |name: &'static str| {
        argv.windows(2)
            .filter(move |pair| pair[0].trim_start_matches('-') == name && pair[0].starts_with('-'))
            .map(|pair| pair[1].as_str())
    };
    let mut found: Vec<PathBuf> = values("qmp")
        .chain(values("qmp-pretty"))
        .filter_map(|value| Keys::parse(value.strip_prefix("unix:")?, "path")?.remove("path"))
        .map(PathBuf::from)
        .collect();
    for mon in values("mon").filter_map(|value| Keys::parse(value, "chardev")) {
        if mon.get("mode") != Some("control") {
            continue;
        }
        let chardev = values("chardev")
            .filter_map(|value| Keys::parse(value, "backend"))
            .find(|chardev| chardev.get("id").is_some() && chardev.get("id") == mon.get("chardev"));
        found.extend(chardev.and_then(|mut chardev| chardev.remove("path")).map(PathBuf::from));
    }
    found
}

/// What the guest's RTC follows, if the command line says so: `host`, `rt` or `vm`.
pub(super) fn rtc_clock(argv: &[String]) -> Option<String> {
    let pair = argv.windows(2).rfind(|pair| pair[0].starts_with('-') && pair[0].trim_start_matches('-') == "rtc")?;
    Keys::parse(&pair[1], "")?.remove("clock")
}

/// Whether a guest's shutdown pauses this QEMU instead of ending it, by its owner's wish.
pub(super) fn shutdown_pauses(argv: &[String]) -> bool {
    let no_shutdown = |arg: &String| arg.trim_start_matches('-') == "no-shutdown" && arg.starts_with('-');
    let action = |pair: &[String]| {
        pair[0].starts_with('-')
            && pair[0].trim_start_matches('-') == "action"
            && Keys::parse(&pair[1], "").is_some_and(|keys| keys.get("shutdown") == Some("pause"))
    };
    argv.iter().any(no_shutdown) || argv.windows(2).any(action)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_qmp_sockets_in_both_forms() {
        let argv: Vec<String> = [
            "qemu",
            "-qmp",
            "unix:/a,server=on,wait=off",
            "-qmp",
            "tcp:localhost:1",
            "-chardev",
            "socket,id=c,path=/b,server=on",
            "-mon",
            "chardev=c,mode=control",
            "-chardev",
            "socket,id=h,path=/h",
            "-mon",
            "h",
        ]
        .map(str::to_owned)
        .to_vec();
        assert_eq!(qmp_sockets(&argv), [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn knows_who_wants_a_shutdown_to_pause() {
        let pauses = |args: &[&str]| shutdown_pauses(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
        assert!(pauses(&["qemu", "-no-shutdown"]) && pauses(&["qemu", "-action", "reboot=reset,shutdown=pause"]));
        assert!(!pauses(&["qemu", "-append", "no-shutdown", "-action", "shutdown=poweroff"]));
    }
}
