//! A network namespace with a bridge, two taps on it for two hosts' machines, and a client's address; removed at the end.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The client's address.
const CLIENT: &str = "10.77.9.1/24";

#[derive(Debug, Clone)]
pub(crate) struct Net(Arc<Name>);

#[derive(Debug)]
struct Name(String);

impl Net {
    /// Whether one can be made here, or what is missing.
    pub(crate) fn possible() -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        if !Path::new("/dev/net/tun").exists() {
            return Err("/dev/net/tun is not there".to_owned());
        }
        let ip = Command::new("ip").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        ip.map(drop).map_err(|_| "ip is not installed".to_owned())
    }

    pub(crate) fn make() -> Self {
        let name = format!("pilot-t{}", std::process::id());
        let net = Self(Arc::new(Name(name.clone())));
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        ip(&format!("-n {name} link add br0 type bridge forward_delay 0 mcast_snooping 0"));
        ip(&format!("-n {name} link set br0 up"));
        ip(&format!("-n {name} addr add {CLIENT} dev br0"));
        for tap in ["tap0", "tap1"] {
            ip(&format!("-n {name} tuntap add dev {tap} mode tap"));
            ip(&format!("-n {name} link set {tap} master br0 up"));
        }
        net
    }

    /// Puts the calling thread, and what it starts, into it.
    pub(crate) fn enter(&self) {
        let namespace = fs::File::open(format!("/run/netns/{}", self.0.0)).expect("just made");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may");
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).stderr(Stdio::null()).status();
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip runs");
    assert!(status.success(), "ip {arguments}");
}
