//! Requests about microVMs, as serialised: they are the only guests that an agent starts by itself.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `POST /v1/run`: start a microVM, unprotected, inside of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// What it is called from now on.
    pub name: String,
    /// What it boots, by its path on the agent's host: a Linux kernel, or the pilot guest. A vmlinux without `initrd` and `cmdline` is taken for the pilot.
    pub kernel: PathBuf,
    /// A kernel's initramfs, by its path on the agent's host.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// A kernel's command line; a serial console if absent.
    #[serde(default)]
    pub cmdline: Option<String>,
    /// Its memory, in bytes.
    pub memory: u64,
    /// Its vCPUs.
    pub cpus: u64,
    /// A raw image for its disk, by its path on the agent's host.
    #[serde(default)]
    pub disk: Option<PathBuf>,
    /// Its network card, if it has one.
    #[serde(default)]
    pub net: Option<RunNet>,
}

/// A microVM's network card, and what the pilot is told of the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunNet {
    /// The tap interface; made if it is not there.
    pub tap: String,
    /// The bridge that it is put on; else it stays where it is.
    #[serde(default)]
    pub bridge: Option<String>,
    /// The card's address; one that is made of the name if absent.
    #[serde(default)]
    pub mac: Option<[u8; 6]>,
    /// The pilot's own address; a Linux guest is told by its command line, or asks its network.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
    /// Bits of the pilot's network's prefix.
    #[serde(default)]
    pub prefix: u8,
    /// The pilot's gateway.
    #[serde(default)]
    pub gateway: Option<Ipv4Addr>,
}
