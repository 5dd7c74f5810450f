//! A host comes back after its VM went on elsewhere, and something there boots the VM from its old disk.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use replicator::control::api::ProtectionState;
use replicator::demo::lab::{Host, Machine, VM};
use replicator::demo::wait::until;

use crate::stage::{SOON, Stage, play_long, program};

/// What a unit's `ExecCondition=` would ask on host A: whether it may, and what was said.
async fn may_start(stage: &Stage, words: &[&str]) -> Result<(bool, String)> {
    let state = stage.lab.state_dir(Host::A).display().to_string();
    let words = [["may-start"].as_slice(), words, &["--state-dir", &state]].concat();
    let ended = stage.lab.try_understudy(Host::A, &words, SOON).await?;
    Ok((ended.code == Some(0), format!("{}{}", ended.out, ended.err)))
}

/// A stock QEMU that somebody starts on host A from an image, without asking.
fn boot(stage: &Stage, image: &Path, control: &Path) -> Result<Child> {
    let drive = format!("file={},if=virtio,format=raw", image.display());
    let qmp = format!("unix:{},server=on,wait=off", control.display());
    let words = ["-S", "-m", "64", "-nodefaults", "-display", "none", "-drive", &drive, "-qmp", &qmp];
    let qemu = ["netns", "exec", &stage.lab.namespace(Host::A.role()), "setpriv", "--pdeathsig", "KILL"];
    let command = Command::new("ip")
        .args(qemu)
        .arg("qemu-system-x86_64")
        .args(words)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    command.context("cannot start QEMU")
}

/// That QEMU is refused by the image's lock.
async fn is_locked(stage: &Stage, image: &Path) -> Result<()> {
    let control = stage.lab.path("by-hand.sock");
    let mut child = boot(stage, image, &control)?;
    let ended = until("a QEMU on the old image to end", SOON, async || {
        Ok(child.try_wait()?.ok_or_else(|| "it runs".to_owned()))
    })
    .await;
    let _ = child.kill();
    let said = String::from_utf8(child.wait_with_output()?.stderr)?;
    ensure!(!ended?.success() && said.contains("Failed to get \"write\" lock"), "QEMU said: {said}");
    Ok(())
}

/// libvirt's hook, as libvirt calls it before it starts a domain.
fn hook(stage: &Stage, operation: &str, image: &Path) -> Result<(bool, String)> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../replicator/packaging/libvirt-qemu-hook");
    let socket = stage.lab.run_dir(Host::A).join("agent.sock");
    let mut child = Command::new("ip")
        .args(["netns", "exec", &stage.lab.namespace(Host::A.role())])
        .arg(script)
        // A domain may have another name than QEMU's: its image tells.
        .args(["a-domain", operation, "begin", "-"])
        .env("UNDERSTUDY", program()?)
        .env("UNDERSTUDY_CONTROL", socket)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run the hook")?;
    let domain = format!(
        "<domain type='kvm'>\n  <name>a-domain</name>\n  <devices>\n    <disk type='file' device='disk'>\n      \
         <driver name='qemu' type='raw'/>\n      <source file='{}' index='1'/>\n      <target dev='vda' bus='virtio'/>\n    \
         </disk>\n  </devices>\n</domain>\n",
        image.display()
    );
    child.stdin.take().context("piped")?.write_all(domain.as_bytes())?;
    let ended = child.wait_with_output()?;
    Ok((ended.status.success(), String::from_utf8(ended.stderr)?))
}

/// Host A's image is refused by every door, by a sentence with these words.
async fn is_refused(stage: &Stage, image: &Path, words: &[&str]) -> Result<()> {
    let path = image.display().to_string();
    for asked in [[VM].as_slice(), &["--image", &path], &[VM, "--image", &path]] {
        let (may, said) = may_start(stage, asked).await?;
        ensure!(!may && words.iter().all(|word| said.contains(word)), "{asked:?} was answered with: {said}");
    }
    let (may, said) = hook(stage, "prepare", image)?;
    ensure!(!may && words.iter().all(|word| said.contains(word)), "the hook said: {said}");
    is_locked(stage, image).await
}

#[test]
fn a_host_that_comes_back_does_not_boot_the_old_disk_beside_the_survivor() {
    play_long("the old disk is not booted beside the survivor", async |stage: &mut Stage| {
        stage.lab.boot_as(&Machine { disk_mib: Some(64), ..Machine::default() }).await?;
        stage.lab.start_daemons().await?;
        stage.lab.pair().await?;
        let image: PathBuf = stage.lab.vm_dir().join("disk.raw");
        let path = image.display().to_string();
        let (may, said) = may_start(stage, &[VM, "--image", &path]).await?;
        ensure!(may, "a VM that was never protected is nobody's business: {said}");
        stage.protect_for_good().await?;
        let (may, said) = may_start(stage, &[VM]).await?;
        ensure!(!may && said.contains("runs on this host already"), "{said}");

        // The host dies. When it is back, what boots VMs is faster than the agent.
        let mut client = stage.writer("latch").await?;
        stage.lab.kill_host(Host::A)?;
        stage.until_survivor().await?;
        client.goes_on().await?;
        let (may, said) = may_start(stage, &[VM, "--wait", "0s"]).await?;
        ensure!(!may && said.contains("start the agent"), "{said}");
        let (may, said) = may_start(stage, &["another-vm", "--wait", "0s"]).await?;
        ensure!(may, "{said}");
        stage.lab.raise_host(Host::A).await?;
        is_refused(stage, &image, &["host-b runs web-1"]).await?;
        client.goes_on().await?;

        // It comes home by the product's own way, which needs what is held, and has a newer disk since.
        stage.until(Host::B, "that it is protected again", |status| status.state == ProtectionState::Protected).await?;
        stage.until_state(Host::A, "protected").await?;
        is_refused(stage, &image, &["host-b runs web-1"]).await?;
        stage.lab.understudy(Host::B, &["failback", VM], SOON).await?;
        stage.until(Host::A, "that it runs there", |status| status.survivor.is_some()).await?;
        client.goes_on().await?;
        stage.nothing_lost(client).await?;
        let (may, said) = may_start(stage, &[VM]).await?;
        ensure!(!may && said.contains("runs on this host already"), "{said}");
        is_locked(stage, &image).await?;

        // Its protection is ended, and it shuts down: it is this host's, from its newest disk.
        stage.until(Host::A, "that it is protected there", |status| status.state == ProtectionState::Protected).await?;
        let pid = stage.status(Host::A).await?.survivor.context("it runs there")?.pid;
        stage.lab.understudy(Host::A, &["unprotect", VM], SOON).await?;
        stage.lab.shut_redis_down().await?;
        stage.lab.process_ended(pid, SOON).await?;
        let (may, said) = may_start(stage, &[VM]).await?;
        ensure!(may, "{said}");
        let newest = stage.lab.state_dir(Host::A).join("images").display().to_string();
        let (may, said) = may_start(stage, &[VM, "--image", &path]).await?;
        ensure!(!may && said.contains("no disk of web-1 any more") && said.contains(&newest), "{said}");
        is_locked(stage, &image).await?;

        // An operator may want the old one all the same.
        let (may, said) = may_start(stage, &[VM, "--image", &path, "--release"]).await?;
        ensure!(may, "{said}");
        let control = stage.lab.path("released.sock");
        let mut child = boot(stage, &image, &control)?;
        let started = until("a QEMU on the released image", SOON, async || {
            let ended = child.try_wait()?;
            ensure!(ended.is_none(), "it ended: {ended:?}");
            Ok(std::os::unix::net::UnixStream::connect(&control).map(drop).map_err(|error| error.to_string()))
        })
        .await;
        child.kill()?;
        child.wait()?;
        started
    });
}
