//! What a host has while its VM is protected and nothing else happens: no more after many rounds than after the first.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use replicator::demo::lab::{Host, Lab};
use replicator::demo::netns::processes_in;

use super::field::vms;

/// How many descriptors or threads more than at its leanest an agent may have: connections come and go.
const SLACK: usize = 40;

/// What one host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    /// Processes that are neither the agent nor a VM.
    pub strangers: usize,
    /// VMs: the VM, or its twin.
    pub vms: usize,
    /// Interfaces, by name.
    pub interfaces: Vec<String>,
    /// Directories of twins.
    pub twins: usize,
    /// The agent's descriptors.
    pub descriptors: usize,
    /// The agent's threads.
    pub threads: usize,
}

impl Holdings {
    /// What a host has now.
    ///
    /// # Errors
    /// If it cannot be seen.
    pub fn of(lab: &Lab, host: Host) -> Result<Self> {
        let space = lab.namespace(host.role());
        let agent = lab.agent_pid(host)?;
        let vms = vms(&space).len();
        let count = |what: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{agent}/{what}")).context("the agent has ended")?.count())
        };
        Ok(Self {
            strangers: processes_in(&space).len().saturating_sub(1 + vms),
            vms,
            interfaces: interfaces(&space)?.into_keys().collect(),
            twins: fs::read_dir(lab.run_dir(host).join("twins")).map_or(0, Iterator::count),
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// What is too much of it, or not there. Its own tap belongs to host A for good.
    fn excess(&self, host: Host) -> Vec<String> {
        let mut found = Vec::new();
        if self.strangers != 0 {
            found.push(format!("{} processes that are neither agent nor VM", self.strangers));
        }
        if self.vms != 1 {
            found.push(format!("{} VMs", self.vms));
        }
        let taps = self.interfaces.iter().filter(|name| !["lo", "br0", "uplink", "tap0"].contains(&name.as_str()));
        if taps.count() > 1 {
            found.push(format!("the interfaces {:?}", self.interfaces));
        }
        if self.twins > 1 {
            found.push(format!("{} directories of twins", self.twins));
        }
        found.into_iter().map(|what| format!("{} has {what}", host.name())).collect()
    }
}

/// The interfaces of a namespace, with their numbers.
///
/// # Errors
/// If `ip` refuses.
pub fn interfaces(space: &str) -> Result<BTreeMap<String, u32>> {
    let output = std::process::Command::new("ip").args(["-n", space, "-j", "link", "show"]).output()?;
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).context("`ip` printed no JSON")?;
    let named =
        links.as_array().into_iter().flatten().filter_map(|link| {
            Some((link["ifname"].as_str()?.to_owned(), u32::try_from(link["ifindex"].as_u64()?).ok()?))
        });
    Ok(named.collect())
}

/// Compares what hosts have with the least they had.
#[derive(Debug, Default)]
pub struct Leaks {
    /// By host and whether it was the primary: descriptors, threads.
    least: Vec<((Host, bool), (usize, usize))>,
}

impl Leaks {
    /// What is too much on a host.
    pub fn excess(&mut self, host: Host, primary: bool, has: &Holdings) -> Vec<String> {
        let mut found = has.excess(host);
        let key = (host, primary);
        let at = self.least.iter().position(|(its, _)| *its == key).unwrap_or_else(|| {
            self.least.push((key, (has.descriptors, has.threads)));
            self.least.len() - 1
        });
        let least = &mut self.least[at].1;
        *least = (least.0.min(has.descriptors), least.1.min(has.threads));
        for (what, now, least) in [("descriptors", has.descriptors, least.0), ("threads", has.threads, least.1)] {
            if now > least + SLACK {
                found.push(format!("the agent of {} has {now} {what}, and had {least}", host.name()));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_behind_is_found() {
        let fine = Holdings {
            strangers: 0,
            vms: 1,
            interfaces: ["br0", "lo", "uplink", "us1"].map(str::to_owned).into(),
            twins: 1,
            descriptors: 60,
            threads: 20,
        };
        let mut leaks = Leaks::default();
        assert!(leaks.excess(Host::B, true, &fine).is_empty());
        let more = |change: fn(&mut Holdings)| {
            let mut has = fine.clone();
            change(&mut has);
            has
        };
        let bad = [
            more(|has| has.strangers = 1),
            more(|has| has.vms = 2),
            more(|has| has.vms = 0),
            more(|has| has.interfaces.push("us2".to_owned())),
            more(|has| has.twins = 2),
            more(|has| has.descriptors += SLACK + 1),
            more(|has| has.threads += SLACK + 1),
        ];
        for has in bad {
            assert_eq!(leaks.excess(Host::B, true, &has).len(), 1, "{has:?}");
        }
    }
}
