//! A stock QEMU under the contract: SeaBIOS that finds nothing to boot is guest enough, iPXE that asks for an address
//! over and over is network enough.
//!
//! A second monitor stands in for what no trait offers.

use std::cell::RefCell;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_hooks::guest::{Guest, GuestError, TwinHost};
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::qemu::{AttachOptions, QemuTwinHost, Target, TwinHostOptions, attach};

use crate::fixture::{DISK_BYTES, Fixture, Needs, SPARES, Step, World};

const PROGRAM: &str = "qemu-system-x86_64";

/// Far above what starting QEMU, or one round of iPXE, takes.
const PATIENCE: Duration = Duration::from_secs(90);

/// Guest memory from here on is used neither by SeaBIOS nor by iPXE.
const SPARE_ADDRESS: u64 = 24 << 20;

/// Its disks, and how they are joined to it.
const DISKS: [(&str, &str); 2] = [("one", "if=virtio"), ("two", "if=ide,discard=unmap")];

pub(crate) struct Qemu;

impl Fixture for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn boot(&self, needs: Needs) -> Result<Box<dyn World>, String> {
        let network = needs == Needs::Network;
        if !rustix::process::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        if Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return Err(format!("{PROGRAM} is not installed"));
        }
        if network && !Path::new("/dev/net/tun").exists() {
            return Err("/dev/net/tun is not there".to_owned());
        }
        Ok(Box::new(QemuWorld::boot(needs)))
    }
}

struct QemuWorld {
    child: RefCell<Child>,
    directory: tempfile::TempDir,
    monitor: RefCell<BufReader<UnixStream>>,
    tap: Option<String>,
    /// Where the spare pages are in QEMU's address space.
    host_address: u64,
}

impl QemuWorld {
    fn boot(needs: Needs) -> Self {
        let network = needs == Needs::Network;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::Builder::new().prefix("pages-contract-").tempdir().expect("a directory");
        let socket = |name: &str| format!("unix:{},server=on,wait=off", directory.path().join(name).display());
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let tap = network.then(|| format!("pgs{}x{number}", std::process::id()));
        // One whose test is killed goes, too.
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            PROGRAM,
            "-name",
            "contract",
            "-M",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "64",
            "-display",
            "none",
        ]);
        command.args(["-serial", "none", "-monitor", "none", "-qmp", &socket("ours"), "-qmp", &socket("other")]);
        match &tap {
            Some(tap) => {
                let netdev = format!("tap,id=n0,ifname={tap},script=no,downscript=no");
                command.args(["-netdev", &netdev, "-device", "e1000,netdev=n0", "-boot", "order=n,reboot-timeout=100"]);
            }
            None => drop(command.args(["-nic", "none"])),
        }
        let disks = if needs == Needs::Disks { &DISKS[..] } else { &[] };
        for (id, form) in disks {
            let path = directory.path().join(id);
            fs::write(&path, vec![0; DISK_BYTES]).expect("room");
            command.args(["-drive", &format!("id={id},file={},format=raw,{form}", path.display())]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("QEMU starts");
        let stream = connect(&directory.path().join("other"));
        let mut world =
            Self { child: RefCell::new(child), directory, monitor: RefCell::new(stream), tap, host_address: 0 };
        world.line();
        world.ask("qmp_capabilities", json!({}));
        if let Some(tap) = &world.tap {
            let up = Command::new("ip").args(["link", "set", "dev", tap, "up"]).status().expect("ip is installed");
            assert!(up.success());
        }
        let line = format!("gpa2hva {SPARE_ADDRESS:#x}");
        let answer = world.ask("human-monitor-command", json!({ "command-line": line }));
        let address = answer.as_str().and_then(|text| text.trim().rsplit("0x").next());
        world.host_address = address.and_then(|hex| u64::from_str_radix(hex, 16).ok()).expect("an address");
        world
    }

    fn line(&self) -> Value {
        let mut line = String::new();
        self.monitor.borrow_mut().read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line:?}"))
    }

    /// Asks the second monitor.
    fn ask(&self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.borrow_mut().get_mut(), "{request}").expect("QEMU listens");
        loop {
            let mut line = self.line();
            if line.get("event").is_none() {
                return line.get_mut("return").map(Value::take).unwrap_or_else(|| panic!("{command}: {line}"));
            }
        }
    }

    fn pid(&self) -> u32 {
        self.child.borrow().id()
    }
}

fn connect(path: &Path) -> BufReader<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
                return BufReader::new(stream);
            }
            Err(error) => assert!(Instant::now() < deadline, "QEMU's monitor does not come up: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl World for QemuWorld {
    fn attach(&self) -> Result<Box<dyn Guest>, GuestError> {
        let target = Target::QmpSocket(self.directory.path().join("ours"));
        Ok(Box::new(attach(&target, &AttachOptions::default())?))
    }

    fn spare(&self, index: u64) -> u64 {
        assert!(index < SPARES);
        // `pc.ram` is the first block of the layout; below 3 GiB addresses are offsets into it.
        SPARE_ADDRESS / PAGE_SIZE as u64 + index
    }

    fn fill(&self, page: u64, byte: u8) {
        let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", self.pid())).expect("we are root");
        let address = self.host_address + (page - self.spare(0)) * PAGE_SIZE as u64;
        memory.write_all_at(&[byte; PAGE_SIZE], address).expect("guest memory can be written");
    }

    fn write_disk(&self, disk: usize, offset: usize, byte: u8, bytes: usize) {
        let pattern = if byte == 0 { "-z".to_owned() } else { format!("-P {byte}") };
        let line = format!("qemu-io {} \"write {pattern} {offset} {bytes}\"", DISKS[disk].0);
        let answer = self.ask("human-monitor-command", json!({ "command-line": line })).to_string();
        assert!(!answer.contains("rror") && !answer.contains("ailed"), "{line}: {answer}");
    }

    fn disk(&self, disk: usize) -> Vec<u8> {
        fs::read(self.directory.path().join(DISKS[disk].0)).expect("its image")
    }

    fn is_running(&self) -> bool {
        self.ask("query-status", json!({}))["running"] == true
    }

    fn is_there(&self) -> bool {
        self.child.borrow_mut().try_wait().expect("it is our child").is_none()
    }

    fn traces(&self) -> Vec<String> {
        let mut found = Vec::new();
        for list in ["/objects", "/chardevs"] {
            let entries = self.ask("qom-list", json!({ "path": list }));
            let names = entries.as_array().into_iter().flatten().filter_map(|entry| entry["name"].as_str());
            found.extend(names.filter(|name| name.starts_with("understudy")).map(str::to_owned));
        }
        for (command, key) in [("query-block-jobs", "device"), ("query-named-block-nodes", "node-name")] {
            let entries = self.ask(command, json!({}));
            let names = entries.as_array().into_iter().flatten().filter_map(|entry| entry[key].as_str());
            found.extend(names.filter(|name| name.starts_with("understudy")).map(str::to_owned));
        }
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it is there");
        let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        found.extend(links.map(|link| link.display().to_string()).filter(|link| link.contains("userfaultfd")));
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it is there");
        found.extend(
            status.lines().filter(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")).map(str::to_owned),
        );
        found
    }

    fn emit(&self) {
        // iPXE does it by itself, again and again; the clause waits for what it needs.
        assert!(self.tap.is_some(), "a guest without a network card cannot emit");
    }

    fn heard(&self) -> u64 {
        let tap = self.tap.as_ref().expect("a guest with a network card");
        let text = fs::read_to_string(format!("/sys/class/net/{tap}/statistics/rx_packets")).expect("the tap is there");
        text.trim().parse().expect("a number")
    }

    fn heard_in_order(&self) -> bool {
        true
    }

    fn fail_next(&self, _step: Step) -> bool {
        false
    }

    fn twins(&self) -> Box<dyn TwinHost> {
        let run_dir = self.directory.path().join("twins");
        Box::new(QemuTwinHost::new(TwinHostOptions { run_dir, ..TwinHostOptions::default() }))
    }

    fn twin_traces(&self) -> Vec<String> {
        let run_dir = self.directory.path().join("twins");
        let entries = fs::read_dir(&run_dir).into_iter().flatten();
        let mut found: Vec<String> =
            entries.filter_map(|entry| Some(entry.ok()?.path().display().to_string())).collect();
        let needle = run_dir.display().to_string();
        for process in fs::read_dir("/proc").expect("there are processes").flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&needle) {
                found.push(process.path().display().to_string());
            }
        }
        found
    }
}

impl Drop for QemuWorld {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.borrow_mut().kill();
        let _ = self.child.borrow_mut().wait();
    }
}
