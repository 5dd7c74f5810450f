//! The filters and sockets in QEMU that a gate is made of, and their removal.
//!
//! Two `filter-redirector`s on each netdev: one gives us every frame that the guest emits, the other emits what we give it. They
//! reach us through socket pairs whose ends are passed to QEMU, so that no path has to be agreed on. If our ends close, QEMU
//! drops the guest's frames: the guest is mute, which is the safe side.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
use serde_json::{Value, json};

use super::discover::{OBJECTS, children, connect};
use super::gate::Port;
use super::qmp::{Qmp, QmpError};
use super::state::StateFile;
use super::{OUR_PREFIX, Target, cmdline, disks};
use crate::guest::GuestError;
use crate::sys::inject::{self, Injected};
use crate::sys::process::PidFd;

/// What QEMU may write into a capture socket before it must wait for us.
const CAPTURE_BUFFER: usize = 4 << 20;

/// Puts the filters of each netdev in, while the guest stands; from then on its frames come to us.
pub(super) fn install(qmp: &mut Qmp, netdevs: &[String]) -> Result<Vec<Port>, QmpError> {
    netdevs.iter().enumerate().map(|(index, netdev)| install_one(qmp, index, netdev)).collect()
}

fn install_one(qmp: &mut Qmp, index: usize, netdev: &str) -> Result<Port, QmpError> {
    let ours = |what: &str| format!("{OUR_PREFIX}{what}-{index}");
    let (captured, theirs) = UnixStream::pair().map_err(QmpError::Io)?;
    // A larger buffer keeps QEMU from waiting; the default one does, too, only less well.
    if set_socket_send_buffer_size_force(&theirs, CAPTURE_BUFFER).is_err() {
        let _ = set_socket_send_buffer_size(&theirs, CAPTURE_BUFFER);
    }
    add_chardev(qmp, &ours("out"), &theirs)?;
    let (released, theirs) = UnixStream::pair().map_err(QmpError::Io)?;
    add_chardev(qmp, &ours("in"), &theirs)?;
    // Frames pass the filters in reverse order of their making: what the first injects, the second does not see.
    for (name, key, chardev) in [("release", "indev", "in"), ("capture", "outdev", "out")] {
        let mut arguments =
            json!({ "qom-type": "filter-redirector", "id": ours(name), "netdev": netdev, "queue": "rx" });
        arguments[key] = ours(chardev).into();
        qmp.execute("object-add", arguments)?;
    }
    Ok(Port { captured, released })
}

fn add_chardev(qmp: &mut Qmp, name: &str, theirs: &UnixStream) -> Result<(), QmpError> {
    qmp.execute_with_fd("getfd", json!({ "fdname": name }), theirs.as_fd())?;
    let address = json!({ "type": "fd", "data": { "str": name } });
    let backend = json!({ "type": "socket", "data": { "server": false, "addr": address } });
    let added = qmp.execute("chardev-add", json!({ "id": name, "backend": backend }));
    if added.is_err() {
        // The descriptor is the chardev's if it was made, else it still lies there.
        let _ = qmp.execute("closefd", json!({ "fdname": name }));
    }
    added.map(drop)
}

/// Takes everything out that [`install`] put in, as far as it is there: what it was, and the first failure.
pub(super) fn remove(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    let mut removed = Vec::new();
    let mut result = Ok(());
    let objects = children(qmp, OBJECTS)?.into_iter().map(|(name, _)| name).filter(|name| name.starts_with(OUR_PREFIX));
    let mut objects: Vec<String> = objects.collect();
    // The capturing ones first: what comes after that passes by itself, behind what was released.
    objects.sort();
    for name in objects {
        let done = qmp.execute("object-del", json!({ "id": name })).map(drop);
        result = result.and(done);
        removed.push(name);
    }
    for (name, _) in chardevs(qmp)? {
        if name.starts_with(OUR_PREFIX) {
            let done = qmp.execute("chardev-remove", json!({ "id": name })).map(drop);
            result = result.and(done);
            removed.push(name);
        }
    }
    result.map(|()| removed)
}

/// Waits until QEMU has read our half-closed sockets to their end and so emitted all; `false` if it has not until `deadline`.
pub(super) fn wait_drained(qmp: &mut Qmp, deadline: Instant) -> Result<bool, QmpError> {
    let start = format!("{OUR_PREFIX}in-");
    loop {
        let chardevs = chardevs(qmp)?;
        if chardevs.iter().all(|(label, filename)| !label.starts_with(&start) || filename.starts_with("disconnected")) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
    }
}

fn chardevs(qmp: &mut Qmp) -> Result<Vec<(String, String)>, QmpError> {
    let listed = qmp.execute("query-chardev", json!({}))?;
    let text = |chardev: &Value, name: &str| chardev.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(listed
        .as_array()
        .into_iter()
        .flatten()
        .map(|chardev| (text(chardev, "label"), text(chardev, "filename")))
        .collect())
}

/// Removes what an agent that died left in a QEMU: filters, sockets, mirrors, tracking. Says what it was. The guest's output passes
/// by itself afterwards, so the caller must know that no twin of it runs. A guest that the agent left paused runs again.
///
/// # Errors
/// If something had to be left in it.
pub fn remove_leftovers(target: &Target) -> Result<Vec<String>, GuestError> {
    let (mut qmp, process) = connect(target)?;
    let mut removed = remove(&mut qmp)?;
    // Whoever answered them is gone, so nothing in QEMU waits for an answer.
    removed.extend(disks::remove(&mut qmp, || ())?);
    removed.extend(StateFile::leftovers(&mut qmp)?);
    for fd in userfaultfds(&process) {
        inject::detach(&process, &Injected { fd, reused: false })
            .map_err(|error| GuestError::from(crate::track::TrackError::from(error)))?;
        removed.push(format!("userfaultfd {fd}"));
    }
    if !removed.is_empty() && qmp.has("set-action") && !cmdline::shutdown_pauses(&process.command_line()?) {
        qmp.execute("set-action", json!({ "shutdown": "poweroff" }))?;
    }
    // A protected guest runs but for our pauses, and without its agent nobody ends one.
    if !removed.is_empty() && qmp.execute("query-status", json!({}))?["status"] == "paused" {
        qmp.execute("cont", json!({}))?;
        removed.push("a pause: the guest runs again".to_owned());
    }
    Ok(removed)
}

fn userfaultfds(process: &PidFd) -> Vec<u32> {
    let dir = format!("/proc/{}/fd", process.pid());
    let listed = std::fs::read_dir(dir).into_iter().flatten().filter_map(io::Result::ok);
    listed
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("[userfaultfd]")))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
