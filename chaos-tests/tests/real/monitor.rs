//! A minimal QMP client, and what a QEMU looks like to somebody who knows nothing of us.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(20);
/// How everything of ours in a QEMU is called.
const OURS: &str = "understudy";

/// A connection to a QEMU's monitor. QEMU serves one at a time: let go of it before an agent attaches.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Monitor {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut monitor = Self { answers: BufReader::new(stream.try_clone()?), stream };
        monitor.line().context("no greeting of the monitor: does somebody else hold it?")?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the monitor hung up");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Asks, and passes events over.
    pub(crate) fn ask(&mut self, execute: &str, arguments: &Value) -> Result<Value> {
        writeln!(self.stream, "{}", json!({ "execute": execute, "arguments": arguments }))?;
        loop {
            let mut answer = self.line().with_context(|| format!("asking {execute}"))?;
            if let Some(error) = answer.get("error") {
                bail!("{execute}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// `running`, `paused` and so on.
    pub(crate) fn status(&mut self) -> Result<String> {
        let status = self.ask("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }
}

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
