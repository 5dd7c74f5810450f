//! `understudy run` and `understudy end`: microVMs.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bytesize::ByteSize;
use clap::Args;

use super::args::{ProtectArgs, VmArgs};
use super::commands::{print, protect};
use super::exit::{CliError, Exit};
use crate::control::api::VmRequest;
use crate::control::client::Client;
use crate::control::microvm::{DirtyPages, RunNet, RunRequest, Started};
use crate::control::policy::DurabilityPolicy;

/// `understudy run`
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// What the microVM is called
    pub name: String,
    /// What it boots: a Linux kernel (bzImage or vmlinux), or the pilot guest, which `cargo xtask setup` builds
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// A kernel's initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// A kernel's command line [default: a serial console]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// A raw image for its disk; the pilot keeps its log on it, from the start
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// The tap interface of its network card; made if it is not there
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// The bridge that the tap is put on; without it an existing tap stays where it is
    #[arg(long, value_name = "NAME", requires = "tap")]
    pub bridge: Option<String>,
    /// The card's address [default: one made of the name]
    #[arg(long, value_name = "MAC", requires = "tap")]
    pub mac: Option<Mac>,
    /// The pilot's own address, such as `10.0.0.2/24`
    #[arg(long, value_name = "IP/BITS", requires = "tap", conflicts_with_all = ["initrd", "cmdline"])]
    pub address: Option<Network>,
    /// The pilot's gateway
    #[arg(long, value_name = "IP", requires = "address")]
    pub gateway: Option<Ipv4Addr>,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    pub memory: ByteSize,
    /// Its vCPUs
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub cpus: u64,
    /// How KVM says which pages were written: by a bitmap, or by a ring a vCPU, whose harvest takes as long as there are dirty pages.
    /// Rings are tried first; where they cannot be relied on the bitmap is used all the same, and this command says so
    #[arg(long, value_name = "bitmap|ring", default_value = "bitmap", hide_possible_values = true)]
    pub dirty: DirtyPages,
    /// Protect it at once, with this standby, as `understudy protect NAME --to HOST` does
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| if part.len() == 2 { u8::from_str_radix(part, 16).ok() } else { None })
            .collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            Some(bytes) if bytes[0] & 1 == 0 => Ok(Self(bytes)),
            _ => Err("write the address of one card, such as `52:54:00:12:34:56`".to_owned()),
        }
    }
}

/// An address in its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: Ipv4Addr,
    prefix: u8,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (address, prefix) = text.split_once('/')?;
            let (address, prefix) = (address.parse().ok()?, prefix.parse().ok()?);
            (prefix <= 32).then_some(Self { address, prefix })
        };
        read().ok_or_else(|| "write an address and the bits of its network, such as `10.0.0.2/24`".to_owned())
    }
}

/// `understudy run`
pub(super) async fn run(args: RunArgs, client: &Client) -> Result<Exit, CliError> {
    let RunArgs { name, kernel, initrd, cmdline, disk, tap, bridge, mac, address, gateway, memory, cpus, dirty, to } =
        args;
    let net = tap.map(|tap| RunNet {
        tap,
        bridge,
        mac: mac.map(|mac| mac.0),
        address: address.map(|network| network.address),
        prefix: address.map_or(0, |network| network.prefix),
        gateway,
    });
    let request = RunRequest {
        name,
        kernel: absolute(&kernel)?,
        initrd: initrd.as_deref().map(absolute).transpose()?,
        cmdline,
        memory: memory.as_u64(),
        cpus,
        disk: disk.as_deref().map(absolute).transpose()?,
        net,
        dirty,
    };
    let Started { vm, note } = client.run(&request).await?;
    if let Some(note) = note {
        print(&format!("{vm}: {note}\n"))?;
    }
    let Some(to) = to else {
        print(&format!("{vm} runs, unprotected\n"))?;
        return Ok(Exit::Ok);
    };
    print(&format!("{vm} runs\n"))?;
    let args = ProtectArgs {
        vm,
        to,
        epoch: None,
        shadow: None,
        durability: DurabilityPolicy::default(),
        witness: None,
        without_witness: None,
        standbys: Vec::new(),
        once: false,
    };
    protect(args, client).await
}

/// `understudy end`
pub(super) async fn end(args: VmArgs, client: &Client) -> Result<Exit, CliError> {
    let ended = client.end(&VmRequest { vm: args.vm }).await?;
    print(&format!("{} has ended\n", ended.vm))?;
    Ok(Exit::Ok)
}

/// The agent has another working directory.
fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|error| CliError::of(Exit::Usage, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_wrong_ones_say_what_to_write() {
        assert_eq!("52:54:00:77:00:10".parse(), Ok(Mac([0x52, 0x54, 0, 0x77, 0, 0x10])));
        for wrong in ["", "52:54:00:77:00", "52:54:00:77:00:1", "52:54:00:77:00:100", "53:54:00:77:00:10"] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert_eq!("10.0.0.2/24".parse(), Ok(Network { address: Ipv4Addr::new(10, 0, 0, 2), prefix: 24 }));
        for wrong in ["10.0.0.2", "10.0.0.2/33", "10.0.0/24", "a/24"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
