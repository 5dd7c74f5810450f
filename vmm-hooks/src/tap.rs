//! Tap interfaces of twins: made if missing, put on their bridge, removed again. Uses the `ip` program.
//!
//! Promise: only what was made here is removed.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::guest::{GuestError, GuestErrorKind};

/// A tap interface that was made here.
#[derive(Debug)]
pub(crate) struct Tap {
    ifname: String,
}

impl Tap {
    /// Sees to it that there is a tap of this name, up and on `bridge`. `None` if it was there before.
    pub(crate) fn ensure(ifname: &str, bridge: Option<&str>, mtu: Option<u32>) -> Result<Option<Self>, GuestError> {
        let existing = look(&["-j", "link", "show", "dev", ifname]);
        let made = match existing {
            Some(_) => None,
            None => {
                ip(&["tuntap", "add", "dev", ifname, "mode", "tap"])?;
                let made = Self { ifname: ifname.to_owned() };
                raise_address(ifname)?;
                Some(made)
            }
        };
        if let Some(bridge) = bridge {
            if look(&["-j", "link", "show", "dev", bridge]).is_none() {
                return Err(GuestError::new(
                    GuestErrorKind::Refused,
                    format!("this host has no bridge {bridge} for {ifname}"),
                )
                .advise("make the bridge, or map it to another one in the agent's configuration"));
            }
            ip(&["link", "set", "dev", ifname, "master", bridge])?;
        }
        if let Some(mtu) = mtu {
            ip(&["link", "set", "dev", ifname, "mtu", &mtu.to_string()])?;
        }
        ip(&["link", "set", "dev", ifname, "up"])?;
        Ok(made)
    }

    /// Leaves the interface in place.
    pub(crate) fn keep(mut self) {
        self.ifname.clear();
    }

    /// Removes the interface.
    pub(crate) fn remove(mut self) -> Result<(), GuestError> {
        let ifname = std::mem::take(&mut self.ifname);
        ip(&["link", "delete", "dev", &ifname])
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.ifname.is_empty() {
            return;
        }
        if let Err(error) = ip(&["link", "delete", "dev", &self.ifname]) {
            tracing::warn!(ifname = self.ifname, %error, "a tap interface was left behind");
        }
    }
}

/// Gives a new tap a hardware address that is higher than others. A bridge without an address of its own takes its ports'
/// lowest: when such a tap came and went, the host itself would change its address and be unreachable for seconds.
fn raise_address(ifname: &str) -> Result<(), GuestError> {
    let shown = look(&["-j", "link", "show", "dev", ifname]);
    let address = shown.as_ref().and_then(|shown| shown.pointer("/0/address")).and_then(Value::as_str);
    match address.and_then(raised) {
        Some(address) => ip(&["link", "set", "dev", ifname, "address", &address]),
        None => Ok(()),
    }
}

/// The address with the highest first byte that a single, locally administered interface can have.
fn raised(address: &str) -> Option<String> {
    let (_, rest) = address.split_once(':')?;
    Some(format!("fe:{rest}"))
}

/// Whether there is an interface of this name.
pub(crate) fn exists(ifname: &str) -> bool {
    look(&["-j", "link", "show", "dev", ifname]).is_some()
}

/// Removes a tap that was made for a process that is gone. One that a process holds again stays.
pub(crate) fn remove_unused(ifname: &str) -> Result<(), GuestError> {
    let Some(shown) = look(&["-j", "link", "show", "dev", ifname]) else { return Ok(()) };
    // The kernel gives a tap its carrier while a process holds it.
    let flags = shown.pointer("/0/flags").and_then(Value::as_array);
    if flags.is_some_and(|flags| flags.iter().any(|flag| flag == "LOWER_UP")) {
        return Ok(());
    }
    ip(&["link", "delete", "dev", ifname])
}

/// The bridge and the MTU of an interface in the network of process `pid`.
pub(crate) fn describe(pid: u32, ifname: &str) -> (Option<String>, Option<u32>) {
    let shown = if same_network(pid) {
        look(&["-j", "link", "show", "dev", ifname])
    } else {
        let net = format!("--net=/proc/{pid}/ns/net");
        parse(run("nsenter", &[&net, "ip", "-j", "link", "show", "dev", ifname]).ok())
    };
    let field = |name: &str| shown.as_ref().and_then(|shown| shown.pointer(&format!("/0/{name}")));
    let bridge = field("master").and_then(Value::as_str).map(str::to_owned);
    let mtu = field("mtu").and_then(Value::as_u64).and_then(|mtu| u32::try_from(mtu).ok());
    (bridge, mtu)
}

/// Whether a process looks at the same network as this thread.
pub(crate) fn same_network(pid: u32) -> bool {
    let namespace = |path: &str| fs::read_link(Path::new(path)).ok();
    namespace("/proc/thread-self/ns/net").is_some_and(|ours| namespace(&format!("/proc/{pid}/ns/net")) == Some(ours))
}

fn look(arguments: &[&str]) -> Option<Value> {
    parse(run("ip", arguments).ok())
}

fn parse(output: Option<Output>) -> Option<Value> {
    let output = output.filter(|output| output.status.success())?;
    serde_json::from_slice(&output.stdout).ok()
}

fn run(program: &str, arguments: &[&str]) -> std::io::Result<Output> {
    Command::new(program).args(arguments).stdin(Stdio::null()).output()
}

fn ip(arguments: &[&str]) -> Result<(), GuestError> {
    let shown = format!("ip {}", arguments.join(" "));
    let output = run("ip", arguments).map_err(|error| {
        GuestError::new(GuestErrorKind::Refused, format!("cannot run `{shown}`: {error}")).advise("install iproute2")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(GuestError::new(GuestErrorKind::Refused, format!("`{shown}` failed: {reason}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_address_keeps_what_makes_it_unique() {
        assert_eq!(raised("0a:b1:c2:d3:e4:f5").as_deref(), Some("fe:b1:c2:d3:e4:f5"));
        assert_eq!(raised("none"), None);
    }
}
