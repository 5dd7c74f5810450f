//! A host that is itself emulated: QEMU without acceleration, a processor with virtualisation, Debian's kernel with KVM, and a read-only disk with
//! what is to run on it. Its console is a file.
//!
//! Promise: a host ends with its value, and everything waited for has a bound and a name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
/// Boots soonest of those that have what is needed; with instructions for AES, without which encrypting is most of what agents do there.
pub(crate) const PLAIN: &str = "qemu64,+svm,+npt,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq";
/// What a newer processor has, without what makes emulation slow: vector state of more than 512 bytes.
pub(crate) const WIDE: &str = "max,-la57,-erms,-smap,-smep,-umip,-pku,-mpx";
/// Room on a disk beside its files.
const SPARE: u64 = 16 << 20;

/// What is missing here to make a host, in words.
pub(crate) fn missing() -> Option<String> {
    for program in ["qemu-system-x86_64", "mke2fs", "ldd", "ip"] {
        let there = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if there.is_err() {
            return Some(format!("{program} is not installed"));
        }
    }
    let image = Path::new(GUEST).join("nested.img");
    (!image.exists()).then(|| "the image of an emulated host is not built; cargo xtask setup".to_owned())
}

/// The directory of the guest image, here and, by [`Disk::add_guest`], on a host.
pub(crate) fn guest() -> PathBuf {
    fs::canonicalize(GUEST).expect("asked by `missing`")
}

/// A disk that is being filled.
pub(crate) struct Disk {
    root: PathBuf,
    image: PathBuf,
}

impl Disk {
    /// An empty one, in `directory`.
    pub(crate) fn new(directory: &Path) -> Self {
        let disk = Self { root: directory.join("root"), image: directory.join("disk.ext4") };
        for dir in ["bin", "dev", "proc", "run", "sys", "var"] {
            fs::create_dir_all(disk.root.join(dir)).expect("room");
        }
        disk
    }

    /// Adds a file, at the place that it has here.
    pub(crate) fn add(&self, path: &Path) {
        let at = self.root.join(path.strip_prefix("/").expect("absolute"));
        if !at.exists() {
            fs::create_dir_all(at.parent().expect("it has one")).expect("room");
            fs::copy(path, &at).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }

    /// Adds a program and the libraries that it is linked with.
    pub(crate) fn add_program(&self, path: &Path) {
        self.add(path);
        // Debug information is most of a test, and nobody looks at it there.
        let at = self.root.join(path.strip_prefix("/").expect("absolute"));
        let stripped = Command::new("strip").arg("--strip-debug").arg(&at).status();
        if !stripped.is_ok_and(|status| status.success()) {
            println!("{} is copied whole: it cannot be stripped here", path.display());
        }
        let listed = Command::new("ldd").arg(path).output().expect("asked by `missing`");
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        // `name => path (address)`, or `path (address)` of the loader itself.
        let files: BTreeSet<&str> =
            listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))).collect();
        assert!(!files.is_empty(), "{} is linked with nothing: {listed}", path.display());
        for file in files {
            self.add(Path::new(file));
        }
    }

    /// Adds a program of this machine by its name; the directory that it is in.
    pub(crate) fn add_named(&self, name: &str) -> PathBuf {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.exists());
        let found = found.unwrap_or_else(|| panic!("{name} is not installed"));
        let file = fs::canonicalize(found).expect("it is there");
        self.add_program(&file);
        file.parent().expect("it has one").to_owned()
    }

    /// Adds the guest image.
    pub(crate) fn add_guest(&self) {
        for name in ["vmlinuz", "initrd.img", "cmdline"] {
            self.add(&guest().join(name));
        }
    }

    /// Makes the disk. `script` is run when the host is up, by a shell without any file of the host's but these; its exit code is the host's.
    pub(crate) fn finish(self, script: &str) -> PathBuf {
        fs::write(self.root.join("run.sh"), script).expect("room");
        let bytes = size(&self.root) * 21 / 20 + SPARE;
        let kib = format!("{}k", bytes.div_ceil(1024));
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"]).arg(&self.root).arg(&self.image).arg(kib);
        let made = make.output().expect("asked by `missing`");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        fs::remove_dir_all(&self.root).expect("it is ours");
        self.image
    }
}

fn size(path: &Path) -> u64 {
    let metadata = fs::symlink_metadata(path).expect("it is ours");
    if !metadata.is_dir() {
        return metadata.len();
    }
    fs::read_dir(path).expect("it is ours").map(|entry| size(&entry.expect("it is ours").path())).sum()
}

/// An emulated host.
pub(crate) struct Host {
    name: String,
    console: PathBuf,
    process: Child,
}

impl Host {
    /// Starts one with `disk`.
    pub(crate) fn start(directory: &Path, name: &str, cpu: &str, disk: &Path, more: &[&str]) -> Self {
        let console = directory.join(format!("{name}.console"));
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", cpu, "-smp", "2", "-m", "1024"]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.arg("-kernel").arg(guest().join("vmlinuz")).arg("-initrd").arg(guest().join("nested.img"));
        qemu.args(["-append", "console=ttyS0 quiet mitigations=off nokaslr nowatchdog panic=-1"]);
        qemu.arg("-drive").arg(format!("file={},if=none,id=disk,format=raw,readonly=on", disk.display()));
        qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
        qemu.arg("-serial").arg(format!("file:{}", console.display())).args(more);
        let errors = fs::File::create(directory.join(format!("{name}.errors"))).expect("room");
        let process = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn();
        Self { name: name.to_owned(), console, process: process.expect("asked by `missing`") }
    }

    /// What its console has shown.
    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).replace('\r', "")
    }

    /// Waits until a whole line of its console satisfies `wanted`; the line.
    pub(crate) fn line(&mut self, what: &str, most: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + most;
        loop {
            let over = !matches!(self.process.try_wait(), Ok(None));
            let console = self.console();
            let whole = console.rfind('\n').map_or("", |end| &console[..end]);
            if let Some(line) = whole.lines().find(|line| wanted(line)) {
                return line.to_owned();
            }
            let name = &self.name;
            assert!(!over, "{name} has ended without {what}:\n{console}");
            assert!(Instant::now() < deadline, "{name} has not shown {what} in {most:?}:\n{console}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until what it was to run has ended; its exit code and all that was shown.
    pub(crate) fn ended(&mut self, most: Duration) -> (i32, String) {
        let line = self.line("its end", most, |line| line.starts_with("HOST-ENDED "));
        let code = line.trim_start_matches("HOST-ENDED ").parse().unwrap_or(-1);
        (code, self.console())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
