//! The floor of a pause: `stop`, `xen-save-devices-state` and `cont` over a monitor of our own, and nothing else.
//!
//! As bare as it can be: one blocking socket, lines compared as text. What QEMU needs for these three commands nobody who
//! attaches from outside can get below.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

/// Bound on an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// One monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    out: UnixStream,
    lines: BufReader<UnixStream>,
    /// What QEMU saves to; it opens the file by our name for it.
    _file: OwnedFd,
    save: String,
}

/// How long each command took until its answer was read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Floor {
    pub(crate) stop: Duration,
    pub(crate) save: Duration,
    pub(crate) cont: Duration,
}

impl Floor {
    pub(crate) fn total(&self) -> Duration {
        self.stop + self.save + self.cont
    }
}

impl Monitor {
    /// Connects to a monitor that nobody else uses.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let out = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        out.set_read_timeout(Some(ANSWER))?;
        let file = memfd_create("bench-device-state", MemfdFlags::CLOEXEC).context("cannot make a memfd")?;
        let name = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let save = format!(
            "{{\"execute\":\"xen-save-devices-state\",\"arguments\":{{\"filename\":\"{name}\",\"live\":false}}}}\n"
        );
        let mut monitor = Self { lines: BufReader::new(out.try_clone()?), out, _file: file, save };
        monitor.line()?;
        monitor.ask("{\"execute\":\"qmp_capabilities\"}\n")?;
        Ok(monitor)
    }

    /// Stops the guest, saves its device state and lets it go on.
    pub(crate) fn floor(&mut self) -> Result<Floor> {
        let save = self.save.clone();
        let begun = Instant::now();
        self.ask("{\"execute\":\"stop\"}\n")?;
        let stopped = Instant::now();
        self.ask(&save)?;
        let saved = Instant::now();
        self.ask("{\"execute\":\"cont\"}\n")?;
        Ok(Floor { stop: stopped - begun, save: saved - stopped, cont: saved.elapsed() })
    }

    /// Runs any other command; `Null`: without arguments. What QEMU returns.
    pub(crate) fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let mut command = json!({ "execute": name });
        if !arguments.is_null() {
            command["arguments"] = arguments.clone();
        }
        let answer = self.ask(&format!("{command}\n"))?;
        let mut answer: Value = serde_json::from_str(&answer).context("QEMU answered something else than JSON")?;
        Ok(answer["return"].take())
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        self.out.write_all(command.as_bytes())?;
        loop {
            let line = self.line()?;
            if line.starts_with("{\"return\"") {
                return Ok(line);
            }
            if line.starts_with("{\"error\"") {
                bail!("QEMU answered {} to {}", line.trim(), command.trim());
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.lines.read_line(&mut line).context("no answer from QEMU")? == 0 {
            bail!("QEMU closed its monitor");
        }
        Ok(line)
    }
}
