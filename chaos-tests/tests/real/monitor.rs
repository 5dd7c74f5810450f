//! What a QEMU looks like to somebody who knows nothing of us.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
pub(crate) use chaos_tests::chaos::monitor::Monitor;
use serde_json::{Value, json};

/// How everything of ours in a QEMU is called.
const OURS: &str = "understudy";

/// What a QEMU looks like from outside.
#[derive(Debug, PartialEq)]
pub(crate) struct Appearance {
    status: String,
    objects: Vec<String>,
    chardevs: Vec<String>,
    nodes: Vec<String>,
    jobs: Vec<String>,
    capabilities: Value,
    parameters: Value,
    userfaultfds: usize,
}

impl Appearance {
    pub(crate) fn of(socket: &Path, pid: u32) -> Result<Self> {
        let mut monitor = Monitor::connect(socket)?;
        let objects = monitor.ask("qom-list", &json!({ "path": "/objects" }))?;
        let chardevs = monitor.ask("query-chardev", &json!({}))?;
        let nodes = monitor.ask("query-named-block-nodes", &json!({ "flat": true }))?;
        let jobs = monitor.ask("query-block-jobs", &json!({}))?;
        Ok(Self {
            status: monitor.status()?,
            objects: names(&objects, "name"),
            chardevs: names(&chardevs, "label"),
            nodes: names(&nodes, "node-name"),
            jobs: names(&jobs, "device"),
            capabilities: monitor.ask("query-migrate-capabilities", &json!({}))?,
            parameters: monitor.ask("query-migrate-parameters", &json!({}))?,
            userfaultfds: userfaultfds(pid)?,
        })
    }

    /// An error if something of ours is in it.
    pub(crate) fn has_nothing_of_ours(&self) -> Result<()> {
        let all = [&self.objects, &self.chardevs, &self.nodes, &self.jobs].into_iter().flatten();
        let ours: Vec<_> = all.filter(|name| name.starts_with(OURS)).collect();
        if !ours.is_empty() || self.userfaultfds > 0 {
            bail!("left in QEMU: {ours:?}, {} userfaultfds", self.userfaultfds);
        }
        Ok(())
    }
}

fn names(list: &Value, key: &str) -> Vec<String> {
    let all = list.as_array().into_iter().flatten();
    let mut names: Vec<String> = all.filter_map(|entry| Some(entry[key].as_str()?.to_owned())).collect();
    names.sort();
    names
}

fn userfaultfds(pid: u32) -> Result<usize> {
    let mut found = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).context("looking at the VM's process")? {
        // A descriptor may be closed while the directory is read.
        let link = fs::read_link(entry?.path()).unwrap_or_default();
        found += usize::from(link.to_string_lossy().contains("userfaultfd"));
    }
    Ok(found)
}
