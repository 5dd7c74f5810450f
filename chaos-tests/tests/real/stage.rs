//! The stage of a scenario: a laboratory, a client that writes, and questions with bounds.

use std::env;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use replicator::control::api::{ProtectionState, Role, VmStatus};
use replicator::demo::lab::{COMMAND, GUEST, Host, Lab, MAC, Machine, Microvm, REDIS, VM};
use replicator::demo::netns::{self, ip};
use replicator::demo::process::{Helper, log_tails};
use replicator::demo::wait::until;
use replicator::demo::worker::{Checked, Started, WRITE_ANSWER, Written};
use rustix::fs::{FlockOperation, flock};

use crate::monitor::{Appearance, Monitor};

/// Bound on one scenario, far above what it takes.
const SCENARIO: Duration = Duration::from_secs(300);
/// Bound on becoming protected.
const PROTECT: Duration = Duration::from_secs(120);
/// Bound on anything that an agent does by itself.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Questions that must have reached a guest before its silence means something.
const QUESTIONS: u64 = 300;

/// One scenario at a time in this process; a file's lock does the same between processes.
static ALONE: Mutex<()> = Mutex::new(());

/// What asks for scenarios that take long.
const LONG: &str = "UNDERSTUDY_LONG";

/// Plays one scenario that takes long. Skips it, and says so, unless such were asked for.
///
/// # Panics
/// See [`play`].
pub(crate) fn play_long(name: &str, scenario: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    if takes_time(name) {
        play(name, scenario);
    }
}

/// The same with a microVM.
///
/// # Panics
/// See [`play`].
pub(crate) fn play_microvm_long(name: &str, scenario: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    if takes_time(name) {
        play_microvm(name, scenario);
    }
}

/// Whether scenarios that take long were asked for; says so if not.
fn takes_time(name: &str) -> bool {
    let asked = env::var_os(LONG).is_some();
    if !asked {
        println!("skipped: {name}: takes long, set {LONG}=1");
    }
    asked
}

/// Plays one scenario. Skips it, and says so, where it cannot be played.
///
/// # Panics
/// If it fails, after everything it made was removed.
pub(crate) fn play(name: &str, scenario: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    play_unless(name, missing(&guest), &guest, scenario);
}

/// Plays one scenario with a microVM. Skips it, and says so, where it cannot be played.
///
/// # Panics
/// See [`play`].
pub(crate) fn play_microvm(name: &str, scenario: impl AsyncFnOnce(&mut Stage) -> Result<()>) {
    let missing = without(&["ip"]).or_else(|| Microvm::missing(&pilot()));
    play_unless(name, missing, Path::new("no guest image"), scenario);
}

fn pilot() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/pilot/pilot")
}

fn play_unless(
    name: &str,
    missing: Option<String>,
    guest: &Path,
    scenario: impl AsyncFnOnce(&mut Stage) -> Result<()>,
) {
    if let Some(missing) = missing {
        println!("skipped: {name}: {missing}");
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let lock = File::create(env::temp_dir().join("understudy-real.lock")).expect("a lock file can be made");
    flock(&lock, FlockOperation::LockExclusive).expect("the lock can be had");
    let dir = env::temp_dir().join(format!("us-real-{}", std::process::id()));
    for maker in netns::sweep_leftovers().expect("namespaces can be listed") {
        let _ = fs::remove_dir_all(env::temp_dir().join(format!("us-real-{maker}")));
    }
    let outcome = runtime().block_on(perform(&dir, guest, scenario));
    fs::remove_dir_all(&dir).expect("the scenario's directory can be removed");
    if let Err(error) = outcome {
        panic!("{name}: {error:#}");
    }
    for role in ["s", "a", "b", "d", "w", "c"] {
        let left = Path::new("/run/netns").join(netns::full_name(std::process::id(), role));
        assert!(!left.exists(), "{name} left {}", left.display());
    }
}

/// What a scenario is played in.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made")
}

async fn perform(dir: &Path, guest: &Path, scenario: impl AsyncFnOnce(&mut Stage) -> Result<()>) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    let mut stage = Stage { lab: Lab::build(dir, guest, &program()?)? };
    let outcome = match tokio::time::timeout(SCENARIO, scenario(&mut stage)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(anyhow::anyhow!("the scenario took longer than {SCENARIO:?}")),
    };
    if outcome.is_err() {
        eprintln!("{}{}", log_tails(dir), stage.lab.statuses().await);
    }
    outcome
}

/// What is missing on this machine, if anything.
fn missing(guest: &Path) -> Option<String> {
    if let Some(missing) = without(&["qemu-system-x86_64", "ip"]) {
        return Some(missing);
    }
    let files = ["vmlinuz", "initrd.img", "cmdline"];
    let absent = files.into_iter().find(|file| !guest.join(file).is_file())?;
    Some(format!("{} is missing: run `cargo xtask setup`", guest.join(absent).display()))
}

/// The same of rights and programs.
fn without(programs: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root, for network namespaces".to_owned());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let absent = programs.iter().find(|program| !env::split_paths(&path).any(|dir| dir.join(program).is_file()))?;
    Some(format!("{absent} is not installed"))
}

/// The program, as it was built beside this test.
pub(crate) fn program() -> Result<PathBuf> {
    let path = match env::var_os("UNDERSTUDY_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let own = env::current_exe()?;
            let profile = own.parent().and_then(Path::parent).context("the test lies in no target directory")?;
            profile.join("understudy")
        }
    };
    ensure!(
        path.is_file(),
        "{} is missing: `cargo test --workspace` or `cargo build -p replicator` builds it",
        path.display()
    );
    Ok(path.canonicalize()?)
}

/// See the module.
pub(crate) struct Stage {
    /// The laboratory.
    pub(crate) lab: Lab,
}

impl Stage {
    /// A VM that runs on host A, two agents and a witness, all paired.
    pub(crate) async fn set(&mut self) -> Result<()> {
        self.lab.boot().await?;
        self.lab.start_daemons().await?;
        self.lab.pair().await
    }

    /// The same, with a microVM.
    pub(crate) async fn set_microvm(&mut self) -> Result<()> {
        self.lab.start_daemons().await?;
        self.lab.pair().await?;
        let microvm = self.microvm();
        self.lab.run_microvm(&microvm).await.map(drop)
    }

    /// What a microVM is made of.
    pub(crate) fn microvm(&self) -> Microvm {
        Microvm::new(&pilot())
    }

    /// The same as [`Stage::set`], with a monitor of the VM's owner beside the one that the agent uses.
    pub(crate) async fn set_with_owner(&mut self) -> Result<()> {
        let second = format!("unix:{},server=on,wait=off", self.lab.vm_second().display());
        self.lab.boot_as(&Machine { more: vec!["-qmp".to_owned(), second], ..Machine::default() }).await?;
        self.lab.start_daemons().await?;
        self.lab.pair().await
    }

    /// The VM's owner, at that monitor.
    pub(crate) fn owner(&self) -> Result<Monitor> {
        Monitor::connect(&self.lab.vm_second())
    }

    /// `running` and so on, by the monitor that the agent uses: it must not be attached.
    pub(crate) fn run_state(&self) -> Result<String> {
        Monitor::connect(&self.lab.vm_control())?.status()
    }

    /// The same, and the VM is protected.
    pub(crate) async fn set_protected(&mut self) -> Result<()> {
        self.set().await?;
        self.protect().await
    }

    /// What an operator calls the VM: other VMs of its name may run on this machine.
    pub(crate) fn vm(&self) -> Result<String> {
        if self.lab.is_microvm() {
            return Ok(VM.to_owned());
        }
        Ok(self.lab.vm_pid()?.to_string())
    }

    /// `understudy protect` on host A, to its end: once, so that what a failure leaves can be looked at.
    pub(crate) async fn protect(&self) -> Result<()> {
        self.protect_with(&["--once"]).await
    }

    /// The same, as operators do: what ends by a failure begins again by itself.
    pub(crate) async fn protect_for_good(&self) -> Result<()> {
        self.protect_with(&[]).await
    }

    /// `understudy protect` on host A with more words, to its end.
    pub(crate) async fn protect_with(&self, more: &[&str]) -> Result<()> {
        let vm = self.vm()?;
        let words = [["protect", &vm, "--to", Host::B.name()].as_slice(), more].concat();
        self.lab.understudy(Host::A, &words, PROTECT).await?;
        let status = self.status(Host::A).await?;
        ensure!(status.state == ProtectionState::Protected, "protect returned while the VM is {status:?}");
        self.until_state(Host::B, "protected").await?;
        Ok(())
    }

    /// What a host's agent says of the VM.
    pub(crate) async fn status(&self, host: Host) -> Result<VmStatus> {
        self.lab.client(host).vm_status(VM).await.with_context(|| format!("asking {} about the VM", host.name()))
    }

    /// Waits until a host's agent says something of the VM.
    pub(crate) async fn until(&self, host: Host, what: &str, is: impl Fn(&VmStatus) -> bool) -> Result<VmStatus> {
        until(&format!("{} to say {what} of the VM", host.name()), SOON, async || {
            let status = self.status(host).await?;
            let seen = format!("{} as {}: {}", status.state, status.role.word(), status.reason);
            Ok(if is(&status) { Ok(status) } else { Err(seen) })
        })
        .await
    }

    /// The same, for a state's word.
    pub(crate) async fn until_state(&self, host: Host, word: &str) -> Result<VmStatus> {
        self.until(host, word, |status| status.state.word() == word).await
    }

    /// Waits until host B's agent says that its copy runs, and returns its report.
    pub(crate) async fn until_survivor(&self) -> Result<VmStatus> {
        self.until(Host::B, "where the survivor runs", |status| status.survivor.is_some()).await
    }

    /// Waits until nothing of the twin is left on host B: no process but the agent, no link but the host's own, no directory.
    pub(crate) async fn until_b_is_clean(&self) -> Result<()> {
        until("host-b to be as it was before", SOON, async || {
            let agent = self.lab.agent_pid(Host::B).ok();
            let namespace = self.lab.namespace(Host::B.role());
            let mut left: Vec<String> = Vec::new();
            for pid in netns::processes_in(&namespace) {
                let pid = u32::try_from(pid.as_raw_nonzero().get())?;
                if Some(pid) != agent {
                    left.push(format!("process {pid}"));
                }
            }
            let links: serde_json::Value = serde_json::from_str(&ip_says(&format!("-n {namespace} -j link show"))?)?;
            for link in links.as_array().into_iter().flatten() {
                let name = link["ifname"].as_str().unwrap_or_default();
                if !["lo", "br0", "uplink"].contains(&name) {
                    left.push(format!("link {name}"));
                }
            }
            for entry in fs::read_dir(self.lab.run_dir(Host::B).join("twins")).into_iter().flatten() {
                left.push(entry?.path().display().to_string());
            }
            Ok(if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) })
        })
        .await
    }

    /// How the QEMU on host A looks from outside. Nobody else may hold its monitor.
    pub(crate) async fn appearance(&self) -> Result<Appearance> {
        Appearance::of(&self.lab.vm_control(), self.lab.vm_pid()?)
    }

    /// Starts a client that writes over one connection, and waits until it is under way.
    pub(crate) async fn writer(&self, tag: &'static str) -> Result<Writer> {
        let helper = self.lab.helper("the writing client", &["write", "--to", &REDIS.to_string(), "--tag", tag])?;
        let mut writer = Writer { helper, tag };
        writer.answers().await?;
        Ok(writer)
    }

    /// Ends the client: its one connection is whole, and everything that it was promised is there.
    pub(crate) async fn nothing_lost(&self, writer: Writer) -> Result<Written> {
        let Writer { mut helper, tag } = writer;
        helper.end();
        let written: Written = helper.answer(WRITE_ANSWER + COMMAND).await?;
        ensure!(written.broken.is_none(), "the client's connection broke: {written:?}");
        let (to, acked) = (REDIS.to_string(), written.acked.to_string());
        let args = ["check", "--to", &to, "--tag", tag, "--acked", &acked];
        let checked: Checked = self.lab.helper("the comparison", &args)?.answer(WRITE_ANSWER).await?;
        ensure!(checked.lost == 0, "of {acked} acknowledged writes {} are lost: {checked:?}", checked.lost);
        Ok(written)
    }

    /// Host A dies; the client goes on, and nothing that it was promised is lost.
    pub(crate) async fn outlives_host_a(&mut self, mut client: Writer) -> Result<Written> {
        client.goes_on().await?;
        self.lab.kill_host_a().await?;
        client.goes_on().await?;
        self.nothing_lost(client).await
    }

    /// Host A is back and stands by for its survivor on host B.
    pub(crate) async fn stands_by_again(&mut self, client: &mut Writer) -> Result<()> {
        self.lab.raise_host_a().await?;
        let again = self.until_state(Host::B, "protected").await?;
        ensure!(again.role == Role::Primary && again.survivor.is_some(), "{again:?}");
        client.goes_on().await.map(drop)
    }

    /// The VM is brought home to host A, and protected there.
    pub(crate) async fn goes_home(&self, client: &mut Writer) -> Result<()> {
        let said = self.lab.understudy(Host::B, &["failback", VM], SOON).await?;
        ensure!(said.contains("runs on host-a now"), "{said}");
        client.goes_on().await?;
        let home = self.until_state(Host::A, "protected").await?;
        ensure!(home.role == Role::Primary, "{home:?}");
        self.until_state(Host::B, "protected").await?;
        client.goes_on().await.map(drop)
    }

    /// What a host's agent exports.
    pub(crate) fn metrics(&self, host: Host) -> Result<String> {
        let at: std::net::SocketAddr = host.metrics().parse()?;
        let say = format!(
            "exec 3<>/dev/tcp/{}/{}; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
            at.ip(),
            at.port()
        );
        let namespace = self.lab.namespace(host.role());
        let said = std::process::Command::new("ip")
            .args(["netns", "exec", &namespace, "timeout", &SOON.as_secs().to_string(), "bash", "-c", &say])
            .output()?;
        let text = String::from_utf8(said.stdout)?;
        ensure!(text.contains("understudy_build_info"), "{} exports no metrics: {text}", host.name());
        Ok(text)
    }

    /// The VM's process on host A stands still.
    pub(crate) fn freeze_the_vm(&self) -> Result<()> {
        let pid = i32::try_from(self.lab.vm_pid()?).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.context("no process")?, rustix::process::Signal::STOP)?;
        Ok(())
    }

    /// Frames that went through host A's tap: from the guest, to the guest.
    pub(crate) fn frames(&self) -> Result<(u64, u64)> {
        let text = ip_says(&format!("-n {} -s -j link show tap0", self.lab.namespace(Host::A.role())))?;
        let links: serde_json::Value = serde_json::from_str(&text)?;
        let count = |way: &str| links[0]["stats64"][way]["packets"].as_u64().context("no count of frames");
        Ok((count("rx")?, count("tx")?))
    }

    /// Asks the guest on host A from host A itself, which is cut off from all others, until enough questions have reached it.
    /// It must run; nobody else may hold its monitor.
    pub(crate) async fn ask_on_host_a(&self) -> Result<()> {
        let mut monitor = Monitor::connect(&self.lab.vm_control())?;
        if monitor.status()? != "running" {
            // Its agent died within a pause. Who lets it run must not make it heard.
            monitor.ask("cont", &serde_json::json!({}))?;
        }
        self.lab.set_link(Host::A, false)?;
        let namespace = self.lab.namespace(Host::A.role());
        ip(&format!("-n {namespace} neigh replace {GUEST} lladdr {MAC} dev br0"))?;
        let args = ["probe", "--to", &GUEST.to_string()].map(str::to_owned);
        let _prober = Helper::start("the prober on host-a", &namespace, &program()?, &args)?;
        let (_, before) = self.frames()?;
        until("questions to reach the guest on host-a", SOON, async || {
            let (_, now) = self.frames()?;
            Ok(if now - before >= QUESTIONS { Ok(()) } else { Err(format!("{} of them", now - before)) })
        })
        .await
    }
}

/// A client that writes numbered keys over one connection, and never opens another one.
pub(crate) struct Writer {
    helper: Helper,
    tag: &'static str,
}

impl Writer {
    /// Waits until it was answered some times more, over that connection.
    pub(crate) async fn goes_on(&mut self) -> Result<u64> {
        self.helper.tell("").await?;
        self.answers().await
    }

    async fn answers(&mut self) -> Result<u64> {
        let answer: Result<Started> = self.helper.answer(WRITE_ANSWER + COMMAND).await;
        Ok(answer.context("the client does not go on")?.acked)
    }
}

fn ip_says(words: &str) -> Result<String> {
    let output = std::process::Command::new("ip").args(words.split_whitespace()).output()?;
    if !output.status.success() {
        bail!("`ip {words}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}
