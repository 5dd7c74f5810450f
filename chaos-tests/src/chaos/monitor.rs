//! A minimal QMP client: an owner's own monitor of the VM, beside the one that an agent uses.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(20);

/// A connection to a QEMU's monitor. QEMU serves one at a time: let go of it before an agent attaches.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects, and makes itself known.
    ///
    /// # Errors
    /// If nobody listens, or another client is served.
    pub fn connect(socket: &Path) -> Result<Self> {
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
    ///
    /// # Errors
    /// With what QEMU says.
    pub fn ask(&mut self, execute: &str, arguments: &Value) -> Result<Value> {
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
    ///
    /// # Errors
    /// With what QEMU says.
    pub fn status(&mut self) -> Result<String> {
        let status = self.ask("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }
}
