//! Requests about microVMs, as serialised: they are the only guests that an agent starts by itself.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `POST /v1/run`: start a microVM, unprotected, in a process of the agent.
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
    /// How KVM says which of its pages were written.
    #[serde(default)]
    pub dirty: DirtyPages,
}

/// How KVM says which pages of a microVM were written. Written `bitmap` or `ring`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyPages {
    /// One bit a page.
    #[default]
    Bitmap,
    /// One ring a vCPU: a harvest takes as long as there are dirty pages. Where a host's KVM does not keep rings whole, the bitmap.
    Ring,
}

/// A microVM runs. Answer of `POST /v1/run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Its name.
    pub vm: String,
    /// What is not as it was asked for, in one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
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
