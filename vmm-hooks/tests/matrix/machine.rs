//! A row's QEMU: how it is started, and how it looks to somebody who knows nothing of us.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Row, Starter};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const IMAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");

/// The user and group `nobody` of every Debian.
pub(crate) const NOBODY: u32 = 65534;

/// Bound on every wait for something that must happen.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// What this machine lacks for any row.
pub(crate) fn missing() -> Option<&'static str> {
    if !Path::new(QEMU).exists() {
        return Some("no QEMU");
    }
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    if !Path::new(IMAGE).join("manifest").exists() {
        return Some("no guest image: run `cargo xtask setup`");
    }
    Command::new("ip").arg("-V").stdout(Stdio::null()).status().is_err().then_some("no `ip` program")
}

/// How many cards a row has.
pub(crate) fn cards(row: &Row) -> usize {
    row.arguments.split_whitespace().filter(|word| card(word).is_some()).count()
}

/// The number of a card and the end of its device's name.
fn card(word: &str) -> Option<(&'static str, &'static str)> {
    match word {
        "PCI0" => Some(("0", "pci")),
        "PCI1" => Some(("1", "pci")),
        "MMIO0" => Some(("0", "device")),
        _ => None,
    }
}

/// The card's hardware address, which its link-local address is made of.
pub(crate) const LINK_LOCAL: &str = "fe80::5054:ff:fe77:300";

/// The QEMU of a row, ended with it.
#[derive(Debug)]
pub(crate) struct Machine {
    child: Child,
    dir: PathBuf,
}

impl Machine {
    /// Boots the row in the calling thread's network, with what it needs in `dir`.
    pub(crate) fn boot(row: &Row, dir: &Path) -> Self {
        let image = |name: &str| format!("{IMAGE}/{name}");
        let cmdline = fs::read_to_string(image("cmdline")).expect("the image has one").replace("ipv6.disable=1", "");
        let append = format!("{} us.ip=10.77.3.2/24 us.ip1=10.77.4.2/24", cmdline.trim());
        // A microVM has no timer that the guest could measure its clock against, unless it is told how fast that is.
        let append =
            if row.arguments.contains("microvm") { format!("{append} tsc_early_khz={}", khz()) } else { append };
        let append = if cards(row) < 2 { append.replace(" us.ip1=10.77.4.2/24", "") } else { append };
        let shown = dir.display();
        let mut command = match row.starter {
            Starter::Root => {
                // One whose test is killed goes, too.
                let mut command = Command::new("setpriv");
                command.args(["--pdeathsig", "KILL", QEMU]);
                command
            }
            Starter::Nobody => as_nobody(dir),
        };
        command.args(["-name", row.name, "-display", "none", "-append", &append]);
        command.args(["-kernel", &image("vmlinuz"), "-initrd", &image("initrd.img")]);
        command.args(["-serial", &format!("file:{shown}/console")]);
        for monitor in ["qmp", "second"] {
            command.args(["-qmp", &format!("unix:{shown}/{monitor},server=on,wait=off")]);
        }
        let arguments = if has_runas() {
            row.arguments.to_owned()
        } else {
            row.arguments.replace("-runas nobody", "-run-with user=nobody")
        };
        for word in arguments.split_whitespace() {
            match card(word) {
                Some((number, end)) => {
                    let tap = format!("tap,id=net{number},ifname=tap{number},script=no,downscript=no");
                    let device = format!("virtio-net-{end},netdev=net{number},mac=52:54:00:77:03:0{number}");
                    command.args(["-netdev", &tap, "-device", &device])
                }
                None => command.arg(word.replace("DIR", &shown.to_string())),
            };
        }
        let log = fs::File::create(dir.join("log")).expect("room");
        let child = command.stdin(Stdio::null()).stderr(log).spawn().expect("QEMU starts");
        let mut machine = Self { child, dir: dir.to_owned() };
        let deadline = Instant::now() + SOON;
        while !fs::read_to_string(dir.join("console")).is_ok_and(|console| console.contains("READY")) {
            let said = || fs::read_to_string(dir.join("log")).unwrap_or_default();
            assert!(machine.child.try_wait().expect("ours").is_none(), "QEMU ended: {}", said());
            assert!(Instant::now() < deadline, "the guest does not boot: {}", said());
            thread::yield_now();
        }
        machine
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }

    /// How it looks from outside.
    pub(crate) fn appearance(&self) -> Appearance {
        let mut monitor = Monitor::connect(&self.dir.join("second"));
        let mut files: Vec<String> = fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("it runs")
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok())
            // Sockets have numbers for names; who is connected to a monitor is none of the machine's own.
            .filter(|file| !file.starts_with("socket:"))
            .collect();
        files.sort();
        let asked = [
            ("query-status", ""),
            ("qom-list", r#","arguments":{"path":"/objects"}"#),
            ("qom-list", r#","arguments":{"path":"/machine/peripheral"}"#),
            ("query-fdsets", ""),
            ("query-block-jobs", ""),
            ("query-migrate-capabilities", ""),
            ("query-migrate-parameters", ""),
        ];
        let mut answers: Vec<Value> =
            asked.iter().map(|(command, arguments)| monitor.ask(command, arguments)).collect();
        let mut chardevs: Vec<String> = monitor
            .ask("query-chardev", "")
            .as_array()
            .expect("a list")
            .iter()
            .map(|chardev| chardev["label"].to_string())
            .collect();
        chardevs.sort();
        answers.push(chardevs.into());
        Appearance { files, answers }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a QEMU has open, and what it says of itself.
#[derive(Debug, PartialEq)]
pub(crate) struct Appearance {
    files: Vec<String>,
    answers: Vec<Value>,
}

/// A client of a monitor.
struct Monitor {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("QEMU listens");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        let mut monitor = Self { answers: BufReader::new(stream.try_clone().expect("a second handle")), stream };
        monitor.ask("qmp_capabilities", "");
        monitor
    }

    fn ask(&mut self, command: &str, arguments: &str) -> Value {
        writeln!(self.stream, r#"{{"execute":"{command}"{arguments}}}"#).expect("QEMU reads");
        loop {
            let mut line = String::new();
            self.answers.read_line(&mut line).expect("QEMU answers");
            let mut answer: Value = serde_json::from_str(&line).expect("JSON");
            assert!(answer.get("error").is_none(), "{line}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }
}

/// `running` and so on, by another monitor.
pub(crate) fn status(socket: &Path) -> String {
    Monitor::connect(socket).ask("query-status", "")["status"].as_str().expect("a status").to_owned()
}

/// Starts QEMU as `nobody`, with a tap device that this user may open, as on most systems everybody may.
fn as_nobody(dir: &Path) -> Command {
    chown(dir, Some(NOBODY), Some(NOBODY)).expect("root may");
    let mut command = Command::new("unshare");
    let script = r#"mknod -m 666 "$0/tun" c 10 200 && mount --bind "$0/tun" /dev/net/tun &&
        exec setpriv --reuid nobody --regid nogroup --clear-groups --pdeathsig KILL "$@""#;
    command.args(["--mount", "sh", "-c", script]).arg(dir).arg(QEMU);
    command
}

/// Whether QEMU is told its user by `-runas`, as up to 9.2.
fn has_runas() -> bool {
    let help = Command::new(QEMU).arg("--help").output().expect("QEMU starts");
    String::from_utf8_lossy(&help.stdout).contains("-runas")
}

/// How fast this machine's clock is, which is a guest's under emulation.
fn khz() -> u64 {
    let cpus = fs::read_to_string("/proc/cpuinfo").expect("Linux");
    let mhz = cpus.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(['.', ':']).nth(1)?.trim().parse().ok());
    mhz.unwrap_or(2000_u64) * 1000
}

/// Makes a directory that every user may pass through.
pub(crate) fn directory() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("qemu-mx").tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("ours");
    dir
}
