//! A third host beside the two, and cuts between any two of them, one way.

use anyhow::{Context as _, Result};

use super::{COMMAND, Host, Lab};
use crate::control::api::PairOpenRequest;
use crate::demo::netns::ip;

/// Nobody has this hardware address.
const NOBODY: &str = "02:00:00:00:00:99";

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
