//! Target `network`: the text of `info network`.
//!
//! Holds: no card out of nothing, no card on two netdevs, and what was read can be printed and read again.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::qemu::network::{Netdev, Network, parse};

pub(super) fn run(bytes: &[u8]) {
    let text = super::text(bytes);
    let network = parse(&text);
    let queues: usize = network.nics.iter().map(|nic| nic.queues).sum();
    let lines = text.lines().count();
    assert!(network.nics.iter().all(|nic| nic.queues > 0));
    assert!(queues + network.others.len() <= lines, "more queues and netdevs than lines");
    for netdev in network.nics.iter().filter_map(|nic| nic.netdev.as_ref()).chain(&network.others) {
        assert!(text.contains(netdev.id.as_str()) && text.contains(netdev.detail.as_str()));
        if let Some(ifname) = netdev.ifname() {
            assert!(!ifname.contains(','));
        }
        let _ = netdev.fd();
    }
    let ids: BTreeSet<&str> = network.nics.iter().filter_map(|nic| Some(nic.netdev.as_ref()?.id.as_str())).collect();
    let joined = network.nics.iter().filter(|nic| nic.netdev.is_some()).count();
    // A hub's port that is printed as a plain netdev would be taken for one more queue of its namesake. `\r` ends a line.
    if ids.len() == joined && !text.contains('\r') {
        assert_eq!(parse(&print(&network)), network);
    }
}

/// In the form without hubs.
fn print(network: &Network) -> String {
    let mut text = String::new();
    let mut line = |start: &str, id: &str, kind: &str, detail: &str| {
        writeln!(text, "{start}{id}: index=0,type={kind},{detail}").expect("a string grows");
    };
    for Netdev { id, kind, detail } in &network.others {
        line(" \\ ", id, kind, detail);
    }
    for nic in &network.nics {
        for _ in 0..nic.queues {
            line("  ", &nic.name, "nic", "");
            if let Some(Netdev { id, kind, detail }) = &nic.netdev {
                line(" \\ ", id, kind, detail);
            }
        }
    }
    text
}
