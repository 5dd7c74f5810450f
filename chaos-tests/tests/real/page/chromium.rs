//! A headless Chromium, driven through its DevTools protocol over two pipes: JSON, each message ended by a zero byte.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use replicator::demo::wait::until;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::stage::SOON;

/// Bound on one answer.
const ANSWER: Duration = Duration::from_secs(60);
/// A directory for pictures of what was looked at, if a person wants to look too.
const PICTURES: &str = "UNDERSTUDY_PICTURES";
/// The pipes are at the shell's own input and output; Chromium wants them at 3 and 4.
const PIPES: &str = "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null";

/// What is missing on this machine, if anything.
pub(super) fn missing() -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join("chromium").is_file());
    (!found).then(|| "chromium is not installed (`cargo xtask test --all` installs it)".to_owned())
}

/// A running browser with one page. It ends with the value; [`Chromium::close`] waits for that.
#[derive(Debug)]
pub(super) struct Chromium {
    child: Child,
    dir: PathBuf,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    session: Option<String>,
    asked: u64,
    /// What the page's console and its policy complained of.
    complaints: Vec<String>,
}

impl Chromium {
    /// Starts it, in a namespace if one is named.
    pub(super) async fn start(namespace: Option<&str>, name: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("us-chromium-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let mut words: Vec<String> = Vec::new();
        if let Some(namespace) = namespace {
            words.extend(["ip", "netns", "exec", namespace].map(str::to_owned));
        }
        words.extend(
            ["sh", "-c", PIPES, "sh", "chromium", "--headless=new", "--remote-debugging-pipe"].map(str::to_owned),
        );
        // Its sandbox needs a user other than root; what it loads here is ours.
        words.extend(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"].map(str::to_owned));
        words.extend(["--disable-background-networking".to_owned(), format!("--user-data-dir={}", dir.display())]);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env("HOME", &dir).process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(dir.join("chromium.log"))?);
        let mut child = command.spawn().context("cannot start chromium")?;
        let to = child.stdin.take().context("it was asked for")?;
        let from = BufReader::new(child.stdout.take().context("it was asked for")?);
        let mut this = Self { child, dir, to, from, session: None, asked: 0, complaints: Vec::new() };
        let target = this.ask("Target.createTarget", json!({ "url": "about:blank" })).await?["targetId"].take();
        let attached = this.ask("Target.attachToTarget", json!({ "targetId": target, "flatten": true })).await?;
        this.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Log.enable", "Runtime.enable"] {
            this.ask(domain, json!({})).await?;
        }
        Ok(this)
    }

    /// Ends it and removes its files; its helpers may write to them a moment longer than it lives.
    pub(super) async fn close(mut self) -> Result<()> {
        self.session = None;
        self.ask("Browser.close", json!({})).await?;
        timeout(SOON, self.child.wait()).await.context("chromium does not end")??;
        until("chromium's files to be removed", SOON, async || {
            Ok(fs::remove_dir_all(&self.dir).map_err(|error| error.to_string()))
        })
        .await
    }

    /// Goes to an address.
    pub(super) async fn go(&mut self, url: &str) -> Result<()> {
        let answer = self.ask("Page.navigate", json!({ "url": url })).await?;
        match answer["errorText"].as_str() {
            None => Ok(()),
            Some(error) => bail!("chromium cannot load {url}: {error}"),
        }
    }

    /// The value of a JavaScript expression in the page.
    pub(super) async fn value(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({ "expression": expression, "returnByValue": true });
        let mut answer = self.ask("Runtime.evaluate", asked).await?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            bail!("{expression} throws: {thrown}");
        }
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression is true; `seen` is one that says what there is instead.
    pub(super) async fn until(&mut self, what: &str, expression: &str, seen: &str) -> Result<()> {
        until(&format!("the page to show {what}"), SOON, async || {
            // A page that is being loaded has no such elements yet.
            match self.value(expression).await {
                Ok(Value::Bool(true)) => Ok(Ok(())),
                Ok(_) => {
                    Ok(Err(self.value(seen).await.map_or_else(|error| error.to_string(), |seen| seen.to_string())))
                }
                Err(error) => Ok(Err(format!("{error:#}"))),
            }
        })
        .await
    }

    /// Looks as somebody who prefers `scheme` and has a window of this size.
    pub(super) async fn look_as(&mut self, scheme: &str, width: u32, height: u32) -> Result<()> {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.ask("Emulation.setEmulatedMedia", json!({ "features": features })).await?;
        let mobile = width < 600;
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile });
        self.ask("Emulation.setDeviceMetricsOverride", metrics).await.map(drop)
    }

    /// Keeps a picture of the whole page, if pictures are wanted.
    pub(super) async fn picture(&mut self, name: &str) -> Result<()> {
        let Some(dir) = std::env::var_os(PICTURES) else { return Ok(()) };
        let asked = json!({ "format": "png", "captureBeyondViewport": true });
        let answer = self.ask("Page.captureScreenshot", asked).await?;
        let data = answer["data"].as_str().context("no picture")?;
        let picture = base64::engine::general_purpose::STANDARD.decode(data)?;
        fs::create_dir_all(&dir)?;
        Ok(fs::write(Path::new(&dir).join(format!("{name}.png")), picture)?)
    }

    /// What was complained of since it was asked last.
    pub(super) fn complaints(&mut self) -> Vec<String> {
        std::mem::take(&mut self.complaints)
    }

    async fn ask(&mut self, method: &str, params: Value) -> Result<Value> {
        self.asked += 1;
        let mut message = json!({ "id": self.asked, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.to.write_all(&bytes).await.context("chromium does not listen")?;
        match timeout(ANSWER, self.answer(self.asked)).await {
            Ok(answer) => answer.with_context(|| format!("asking chromium for {method}")),
            Err(_) => bail!("chromium gave no answer to {method} within {ANSWER:?}"),
        }
    }

    async fn answer(&mut self, id: u64) -> Result<Value> {
        loop {
            let mut bytes = Vec::new();
            self.from.read_until(0, &mut bytes).await?;
            if bytes.pop() != Some(0) {
                bail!("chromium has ended; see its log");
            }
            let mut message: Value = serde_json::from_slice(&bytes)?;
            if message["id"] == id {
                return match message.get("error") {
                    Some(error) => bail!("{error}"),
                    None => Ok(message["result"].take()),
                };
            }
            let complaint = match message["method"].as_str() {
                Some("Log.entryAdded") => &message["params"]["entry"],
                Some("Runtime.exceptionThrown") => &message["params"]["exceptionDetails"],
                _ => continue,
            };
            self.complaints.push(complaint.to_string());
        }
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // After a failure: what was not closed is killed, and its files go as far as they can.
        let _ = self.child.start_kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}
