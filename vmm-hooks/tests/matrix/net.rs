//! Two hosts and a client as network namespaces, with a bridge each; removed at the end.

use std::fs;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Addresses of the client, one for each of the guest's cards.
const CLIENTS: [&str; 2] = ["10.77.3.1/24", "10.77.4.1/24"];

/// Namespaces `a` and `b` with a bridge each, and `c` with the client.
#[derive(Debug)]
pub(crate) struct Net {
    prefix: String,
}

impl Net {
    /// Makes them, with as many taps on host `a` as the guest has cards. `owner` may open these, too.
    pub(crate) fn make(row: usize, cards: usize, owner: Option<&str>) -> Self {
        let net = Self { prefix: format!("qemu-t{}-{row}", std::process::id()) };
        for name in ["a", "b", "c"] {
            ip(&format!("netns add {}", net.name(name)));
            ip(&format!("-n {} link set lo up", net.name(name)));
            ip(&format!("-n {} link add br0 type bridge forward_delay 0 mcast_snooping 0", net.name(name)));
            ip(&format!("-n {} link set br0 up", net.name(name)));
        }
        for host in ["a", "b"] {
            let (host_net, client) = (net.name(host), net.name("c"));
            ip(&format!("-n {host_net} link add up0 type veth peer name to{host} netns {client}"));
            ip(&format!("-n {host_net} link set up0 master br0 up"));
            ip(&format!("-n {client} link set to{host} master br0 up"));
        }
        for address in &CLIENTS[..cards] {
            ip(&format!("-n {} addr add {address} dev br0", net.name("c")));
        }
        let owner = owner.map(|owner| format!(" user {owner}")).unwrap_or_default();
        for card in 0..cards {
            ip(&format!("-n {} tuntap add dev tap{card} mode tap{owner}", net.name("a")));
            ip(&format!("-n {} link set tap{card} master br0 up", net.name("a")));
        }
        net
    }

    fn name(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// Puts the calling thread, and what it starts, into a namespace.
    pub(crate) fn enter(&self, host: &str) {
        let namespace = fs::File::open(format!("/run/netns/{}", self.name(host))).expect("just made");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may");
    }

    /// Makes the client forget where its neighbours are: it must ask them again, and they must answer.
    pub(crate) fn forget_neighbours(&self) {
        ip(&format!("-n {} neigh flush dev br0", self.name("c")));
    }

    /// The number of the client's bridge, as the scope of a link-local address.
    pub(crate) fn scope(&self) -> u32 {
        let shown = said(&["-n", &self.name("c"), "-j", "link", "show", "dev", "br0"]);
        let links: serde_json::Value = serde_json::from_slice(&shown).expect("JSON");
        u32::try_from(links[0]["ifindex"].as_u64().expect("a number")).expect("a small number")
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in ["a", "b", "c"] {
            let _ = Command::new("ip").args(["netns", "delete", &self.name(name)]).stderr(Stdio::null()).status();
        }
    }
}

fn said(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("ip").args(arguments).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments:?}");
    output.stdout
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip runs");
    assert!(status.success(), "ip {arguments}");
}
