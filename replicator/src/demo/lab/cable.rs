//! A link from host to host beside the switch.

use std::fs;

use anyhow::{Context as _, Result};

use super::{Host, Lab};
use crate::demo::netns::ip;

impl Host {
    /// Its address on the cable of [`Lab::lay_cable`], which ends at the first two hosts.
    #[must_use]
    pub fn cable_address(self) -> &'static str {
        match self {
            Self::A => "10.78.0.1",
            Self::B => "10.78.0.2",
            Self::C => "10.78.0.4",
        }
    }
}

impl Lab {
    /// Lays a cable from host to host beside the switch, before their agents start: heartbeats go over both, replication over the cable as long
    /// as it can.
    ///
    /// # Errors
    /// If `ip` refuses, or a configuration file cannot be written.
    pub fn lay_cable(&mut self) -> Result<()> {
        let [a, b] = [Host::A, Host::B].map(|host| self.namespace(host.role()));
        ip(&format!("-n {a} link add cable type veth peer name cable netns {b}"))?;
        for host in [Host::A, Host::B] {
            let (name, direct, address) = (self.namespace(host.role()), host.cable_address(), host.address());
            ip(&format!("-n {name} addr add {direct}/24 dev cable"))?;
            ip(&format!("-n {name} link set cable up"))?;
            let text = format!(
                "heartbeat_listen = [\"{address}:7845\", \"{direct}:7845\"]\naddresses = [\"{direct}:7844\", \"{address}:7844\"]\n"
            );
            fs::write(self.agent_config(host)?, text).context("cannot configure an agent")?;
        }
        self.cable = true;
        Ok(())
    }

    /// Connects or cuts that cable.
    ///
    /// # Errors
    /// If `ip` refuses.
    pub fn set_cable(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set cable {state}", self.namespace("a")))
    }
}
