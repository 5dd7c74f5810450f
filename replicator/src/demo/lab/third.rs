//! A third host beside the two, and cuts between any two of them, one way.

use anyhow::{Context as _, Result};

use super::{COMMAND, Host, Lab};
use crate::control::api::PairOpenRequest;
use crate::demo::netns::ip;

/// Nobody has this hardware address.
const NOBODY: &str = "02:00:00:00:00:99";

/// A host's bridge. It has an address of its own: else it has that of a port, and when that port goes it gets another one, and the kernel forgets which ways are cut.
pub(super) fn bridge(name: &str, host: Host) -> Result<()> {
    let address = match host {
        Host::A => "02:75:73:00:00:0a",
        Host::B => "02:75:73:00:00:0b",
        Host::C => "02:75:73:00:00:0c",
    };
    ip(&format!("-n {name} link add br0 address {address} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"))
}

impl Lab {
    /// Adds host C, without an agent.
    ///
    /// # Errors
    /// If `ip` refuses.
    pub fn add_host_c(&self) -> Result<()> {
        self.plug_host(Host::C)
    }

    /// Pairs two hosts with each other.
    ///
    /// # Errors
    /// If the window cannot be opened or joined.
    pub async fn pair_two(&self, one: Host, two: Host) -> Result<()> {
        let window = PairOpenRequest { ttl_s: 60 };
        let opened = self.client(two).pair_open(&window).await;
        let code = opened.with_context(|| format!("{} opens no window", two.name()))?.code;
        self.understudy(one, &["pair", two.address(), "--code", &code], COMMAND).await?;
        Ok(())
    }

    /// Nothing that `from` itself says arrives at host `to` from now on, or it does again. Frames of guests pass, and so does the other way.
    ///
    /// # Errors
    /// If `ip` refuses.
    pub fn set_way(&self, from: Host, to: Host, open: bool) -> Result<()> {
        let (name, address) = (self.namespace(from.role()), to.address());
        if open {
            // Whoever was told a wrong one asks anew.
            ip(&format!("-n {name} neigh del {address} dev br0"))
        } else {
            ip(&format!("-n {name} neigh replace {address} lladdr {NOBODY} dev br0 nud permanent"))
        }
    }
}
