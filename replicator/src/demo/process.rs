//! Programs of the laboratory: started in a namespace, with a log, killed when let go.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// How many bytes of a log's end are shown.
const TAIL: usize = 3_000;

/// The command `argv` inside a namespace, in a process group of its own, so that a terminal's interrupt reaches us alone.
fn command<S: AsRef<OsStr>>(namespace: &str, program: &Path, args: &[S]) -> Command {
    let mut command = Command::new("ip");
    // `ip netns exec` becomes the program: same pid.
    command.args(["netns", "exec", namespace]).arg(program).args(args);
    command.stdin(Stdio::null()).process_group(0).kill_on_drop(true);
    command
}

/// A daemon of the laboratory.
#[derive(Debug)]
pub struct Daemon {
    what: String,
    child: Child,
}

impl Daemon {
    /// Starts `program` in `namespace`; its output is added to `log`, which tells of its earlier lives too.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        what: &str,
        namespace: &str,
        program: &Path,
        args: &[String],
        env: &[(&str, String)],
        log: &Path,
    ) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = command(namespace, program, args);
        command.envs(env.iter().map(|(key, value)| (key, value)));
        command.stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        Ok(Self { what: what.to_owned(), child })
    }

    /// Its pid, if it was not seen to end.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends SIGKILL. One that has ended already is no error.
    pub fn kill(&mut self) {
        let _ = self.child.start_kill();
    }

    /// Waits until it has ended; how it did.
    ///
    /// # Errors
    /// If it does not within `bound`.
    pub async fn ended(&mut self, bound: Duration) -> Result<ExitStatus> {
        match timeout(bound, self.child.wait()).await {
            Ok(status) => status.with_context(|| format!("cannot wait for {}", self.what)),
            Err(_) => bail!("{} did not end within {bound:?}", self.what),
        }
    }

    /// Waits until it ends, which it should not: the error says how.
    pub async fn ends_by_itself(&mut self) -> anyhow::Error {
        let status = self.child.wait().await;
        anyhow::anyhow!("{} has ended by itself: {status:?}", self.what)
    }

    /// An error if it has ended.
    ///
    /// # Errors
    /// See above.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => bail!("{} has ended by itself: {status}", self.what),
            Err(error) => bail!("cannot ask for {}: {error}", self.what),
        }
    }
}

/// A program of the laboratory that is talked to line by line; killed when let go.
#[derive(Debug)]
pub(super) struct Talker {
    what: String,
    _child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Talker {
    /// Starts `program` in `namespace`; what it says besides goes to `log`.
    pub(super) fn start(what: &str, namespace: &str, program: &Path, args: &[String], log: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log);
        let mut command = command(namespace, program, args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(file.with_context(|| format!("cannot open {}", log.display()))?);
        let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        let (stdin, stdout) = child.stdin.take().zip(child.stdout.take()).expect("they were asked for");
        Ok(Self { what: what.to_owned(), _child: child, stdin, lines: BufReader::new(stdout).lines() })
    }

    /// Says `words` and reads lines up to the one that is `last`, which is left out.
    ///
    /// # Errors
    /// If it ends first, or takes longer than `bound`.
    pub(super) async fn ask(&mut self, words: &str, last: &str, bound: Duration) -> Result<Vec<String>> {
        let asked = async {
            self.stdin.write_all(words.as_bytes()).await?;
            let mut said = Vec::new();
            while let Some(line) = self.lines.next_line().await? {
                if line == last {
                    return Ok(said);
                }
                said.push(line);
            }
            bail!("it has ended")
        };
        match timeout(bound, asked).await {
            Ok(said) => said.with_context(|| format!("asking {}", self.what)),
            Err(_) => bail!("{} gave no answer within {bound:?}", self.what),
        }
    }
}

/// How a program ended, and what it said.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// Runs a program in a namespace to its end, however it ends.
///
/// # Errors
/// If it cannot be started or takes longer than `bound`.
pub async fn outcome(
    what: &str,
    namespace: &str,
    program: &Path,
    args: &[String],
    env: &[(&str, String)],
    bound: Duration,
) -> Result<Ended> {
    let mut command = command(namespace, program, args);
    command.envs(env.iter().map(|(key, value)| (key, value)));
    let output = match timeout(bound, command.output()).await {
        Ok(output) => output.with_context(|| format!("cannot start {what}"))?,
        Err(_) => bail!("{what} took longer than {bound:?}"),
    };
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Ended { code: output.status.code(), out, err })
}

/// A helper of ours in a namespace: answers in JSON, one line each, and takes lines.
#[derive(Debug)]
pub struct Helper {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Helper {
    /// Starts the program `understudy` in `namespace` as `understudy demo worker ARGS`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(what: &str, namespace: &str, understudy: &Path, args: &[String]) -> Result<Self> {
        let mut all = vec!["demo".to_owned(), "worker".to_owned()];
        all.extend_from_slice(args);
        let mut command = command(namespace, understudy, &all);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        let stdout = child.stdout.take().expect("it was asked for");
        let stdin = child.stdin.take();
        Ok(Self { what: what.to_owned(), child, stdin, answers: BufReader::new(stdout).lines() })
    }

    /// Gives it a line.
    ///
    /// # Errors
    /// If it has ended.
    pub async fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("{} was told to end", self.what))?;
        let line = format!("{line}\n");
        stdin.write_all(line.as_bytes()).await.with_context(|| format!("{} does not listen", self.what))
    }

    /// Tells it to come to its end.
    pub fn end(&mut self) {
        self.stdin = None;
    }

    /// Its next answer.
    ///
    /// # Errors
    /// If none comes within `bound`, or it is none.
    pub async fn answer<T: DeserializeOwned>(&mut self, bound: Duration) -> Result<T> {
        let line = match timeout(bound, self.answers.next_line()).await {
            Ok(line) => line.with_context(|| format!("cannot read what {} says", self.what))?,
            Err(_) => bail!("{} gave no answer within {bound:?}", self.what),
        };
        let Some(line) = line else {
            let status = self.child.wait().await;
            bail!("{} ended without an answer: {status:?}", self.what);
        };
        serde_json::from_str(&line).with_context(|| format!("{} answered `{line}`", self.what))
    }
}

/// The ends of all logs below `dir`, for an error's reader.
pub fn log_tails(dir: &Path) -> String {
    let mut logs: Vec<PathBuf> = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|ext| ext == "log") {
                logs.push(path);
            }
        }
    }
    logs.sort();
    let mut text = String::new();
    for log in logs {
        let bytes = fs::read(&log).unwrap_or_default();
        let end = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL)..]);
        text.push_str(&format!("--- end of {}\n{}\n", log.display(), end.trim_end()));
    }
    text
}
