//! Has another host switched off, by the program that the operator configured, and believes it only if it says so.
//!
//! It is called as fence agents are: what to do and to whom is in lines on its standard input and in its environment; exit status 0 means that the host is
//! confirmed off. Anything else, and silence beyond the timeout, confirms nothing.

use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::mpsc::UnboundedSender;

use super::protection::HostRef;
use crate::cli::config::FenceConfig;
use crate::control::api::{ErrorBody, ErrorKind};
use crate::metrics::{FenceOutcome, Metrics};

/// How much of what it says is shown, in bytes.
const SHOWN: usize = 400;

/// Switches one host off, as often as it takes, for a VM that runs nowhere before.
#[derive(Debug, Clone)]
pub(super) struct Fencer {
    /// The command.
    pub(super) config: FenceConfig,
    /// Which host.
    pub(super) host: HostRef,
    /// Where its words are counted.
    pub(super) metrics: Metrics,
}

impl Fencer {
    /// Begins; its one word comes when the command has ended.
    pub(super) fn start(&self, word: UnboundedSender<Result<(), ErrorBody>>) {
        let fencer = self.clone();
        tokio::spawn(async move {
            // Who does not wait for it any more has ended.
            let _ = word.send(switch_off(&fencer.config, &fencer.host, &fencer.metrics).await);
        });
    }
}

/// Switches `host` off and returns when that is confirmed.
///
/// # Errors
/// One sentence: why it is not confirmed.
pub(super) async fn switch_off(config: &FenceConfig, host: &HostRef, metrics: &Metrics) -> Result<(), ErrorBody> {
    let began = std::time::Instant::now();
    let outcome = run(config, host).await;
    let kind = match &outcome {
        Ok(()) => FenceOutcome::Confirmed,
        Err(_) => FenceOutcome::Failed,
    };
    metrics.fenced(kind, began.elapsed());
    outcome.map_err(|why| {
        ErrorBody::new(
            ErrorKind::Failed,
            format!("{} is not confirmed to be off: the fence command {why}", host.name),
        )
        .advise("nothing was changed, and nobody runs the VM who did not before; see to the fence device, or switch the host off by hand and use --confirm-dead")
    })
}

async fn run(config: &FenceConfig, host: &HostRef) -> Result<(), String> {
    let (program, arguments) = config.command.split_first().expect("the configuration names a program");
    let mut child = Command::new(program)
        .args(arguments)
        .env("UNDERSTUDY_FENCE_ACTION", "off")
        .env("UNDERSTUDY_FENCE_HOST", &host.name)
        .env("UNDERSTUDY_FENCE_NODE", &host.node)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{program} could not be started: {error}"))?;
    let mut stdin = child.stdin.take().expect("it is piped");
    let lines = format!("action=off\nplug={}\nnodename={}\n", host.name, host.name);
    let work = async {
        // One that does not read it may end early; its exit status says the rest.
        let _ = stdin.write_all(lines.as_bytes()).await;
        drop(stdin);
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(config.timeout, work).await {
        Ok(output) => output.map_err(|error| format!("could not be waited for: {error}"))?,
        Err(_) => return Err(format!("did not end within {:?}", config.timeout)),
    };
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr });
    let said: String = said.trim().chars().take(SHOWN).collect();
    Err(format!("ended with {}{}{said}", output.status, if said.is_empty() { "" } else { ": " }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(script: &str, timeout: Duration) -> FenceConfig {
        FenceConfig { command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(), timeout, required: false }
    }

    fn host() -> HostRef {
        HostRef { node: "00".repeat(16), name: "host-a".to_owned() }
    }

    #[tokio::test]
    async fn only_status_zero_in_time_confirms() {
        let (long, metrics) = (Duration::from_secs(60), Metrics::new());
        let asked =
            "read a; read p; [ $a = action=off ] && [ $p = plug=host-a ] && [ $UNDERSTUDY_FENCE_HOST = host-a ]";
        switch_off(&shell(asked, long), &host(), &metrics).await.expect("confirmed");
        for (script, says) in [("echo no power switch >&2; exit 3", "no power switch"), ("kill -9 $$", "signal: 9")] {
            let error = switch_off(&shell(script, long), &host(), &metrics).await.unwrap_err();
            assert!(
                error.message.contains("host-a is not confirmed to be off") && error.message.contains(says),
                "{error:?}"
            );
        }
        let slow = switch_off(&shell("sleep 1000", Duration::from_millis(50)), &host(), &metrics).await.unwrap_err();
        assert!(slow.message.contains("did not end within 50ms"), "{slow:?}");
        let none = FenceConfig { command: vec!["/nonexistent/fence".to_owned()], ..shell("", long) };
        let missing = switch_off(&none, &host(), &metrics).await.unwrap_err();
        assert!(missing.message.contains("could not be started"), "{missing:?}");
        let text = metrics.encode();
        assert!(text.contains("understudy_fence_seconds_count{outcome=\"confirmed\"} 1"), "{text}");
        assert!(text.contains("understudy_fence_seconds_count{outcome=\"failed\"} 4"), "{text}");
    }
}
