//! The demo's guest: Debian's cloud kernel, busybox and Redis in an initramfs, built from Debian's packages.
//!
//! Promise: `target/guest` holds `vmlinuz`, `initrd.img`, `cmdline` (kernel arguments without `us.ip=`), `nested.img` (an
//! initramfs that makes a host with KVM of an emulated machine) and `manifest` (what it was made of), all of one build; it is
//! replaced as a whole or not at all. A second build with the same rules does nothing, without network.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::cpio::{self, Entry};
use crate::shell;

/// Changes when the way the image is put together does.
const RULES: u32 = 2;
/// Depends on the newest cloud kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
const PACKAGES: [&str; 3] = ["redis-server", "redis-tools", "busybox-static"];
/// Kernel modules in the order they must be loaded: each before those that need it.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_mmio",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
];
/// The same of an emulated host, beside those of the processor's maker.
const HOST_MODULES: [&str; 15] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "tun",
    "llc",
    "stp",
    "bridge",
    "veth",
    "irqbypass",
];
/// Loaded last, by name.
const HOST_KVM: [&str; 3] = ["kvm", "kvm-amd", "kvm-intel"];
const APPLETS: [&str; 18] = [
    "sh", "mount", "insmod", "cat", "ip", "echo", "printf", "nc", "grep", "usleep", "poweroff", "mkdir", "umount",
    "chroot", "dd", "md5sum", "reboot", "rm",
];
const INIT: &str = include_str!("init.sh");
const TICK: &str = include_str!("tick.sh");
const HOST_INIT: &str = include_str!("nested.sh");
/// Boots in two to three seconds under emulation.
const CMDLINE: &str = "console=ttyS0 quiet mitigations=off nokaslr ipv6.disable=1 nowatchdog panic=-1";
const LIBRARY_DIRS: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const REDIS: &str = "usr/bin/redis-server";

/// Builds the image unless it is there; the directory, or why this machine cannot build it.
///
/// # Errors
/// If the build directory cannot be written.
pub(crate) fn build(apt: &mut Apt, refresh: bool) -> Result<Result<PathBuf, String>> {
    let target = shell::target();
    let dir = target.join("guest");
    let rules = rules();
    let manifest = fs::read_to_string(dir.join("manifest")).unwrap_or_default();
    if !refresh && manifest.lines().next() == Some(rules.as_str()) {
        println!("setup: the guest image is there: {}", dir.display());
        return Ok(Ok(dir));
    }
    if !cfg!(target_arch = "x86_64") {
        return Ok(Err("the guest image is for x86-64 only".to_owned()));
    }
    for program in ["apt-get", "apt-cache", "dpkg-deb"] {
        if shell::find(program).is_none() {
            return Ok(Err(format!("the guest image is built from Debian packages, and {program} is not here")));
        }
    }
    // A directory of this process, so that two set-ups at once do not meet.
    let work = target.join(format!("guest-{}.partial", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let made = make(apt, &work, &rules).and_then(|image| replace(&image, &dir));
    let cleaned = fs::remove_dir_all(&work);
    match made {
        Ok(()) => {
            cleaned.with_context(|| format!("cannot remove {}", work.display()))?;
            Ok(Ok(dir))
        }
        Err(error) => Ok(Err(format!("the guest image could not be built: {error:#}"))),
    }
}

/// The manifest's first line: differs whenever another image would come out of the same packages.
fn rules() -> String {
    let mut hasher = DefaultHasher::new();
    (RULES, KERNEL, PACKAGES, MODULES, APPLETS, INIT, CMDLINE, TICK, HOST_MODULES, HOST_KVM, HOST_INIT)
        .hash(&mut hasher);
    format!("rules {:016x}", hasher.finish())
}

fn replace(image: &Path, dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    fs::rename(image, dir).with_context(|| format!("cannot put the image to {}", dir.display()))
}

/// Downloads, unpacks and puts together; returns the directory of the finished image, within `work`.
fn make(apt: &mut Apt, work: &Path, rules: &str) -> Result<PathBuf> {
    let kernel = apt
        .depends(&[KERNEL.to_owned()])?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{KERNEL} names no kernel: is this Debian?"))?;
    let mut packages = apt.closure(&PACKAGES)?;
    packages.push(kernel);
    let (debs, tree, image) = (work.join("debs"), work.join("tree"), work.join("image"));
    for dir in [&debs, &tree, &image] {
        fs::create_dir_all(dir)?;
    }
    println!("setup: downloading {} packages for the guest", packages.len());
    let files = apt.download(&packages, &debs)?;
    let mut manifest = format!("{rules}\n");
    for file in &files {
        shell::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(&tree))?;
        let mut ask = Command::new("dpkg-deb");
        ask.args(["--show", "--showformat", "${Package} ${Version}\n"]).arg(file);
        manifest.push_str(&shell::output(&mut ask)?);
    }
    let kernel = only_file_starting_with(&tree.join("boot"), "vmlinuz-")?;
    fs::copy(&kernel, image.join("vmlinuz"))?;
    let entries = entries(&tree)?;
    let mut archive = Vec::new();
    cpio::write(&mut archive, &entries)?;
    fs::write(image.join("initrd.img"), &archive)?;
    let mut host = Vec::new();
    cpio::write(&mut host, &host_entries(&tree)?)?;
    fs::write(image.join("nested.img"), &host)?;
    fs::write(image.join("cmdline"), format!("{CMDLINE}\n"))?;
    fs::write(image.join("manifest"), manifest)?;
    println!("setup: built the guest image, initrd of {} KiB", archive.len() / 1024);
    Ok(image)
}

fn only_file_starting_with(dir: &Path, prefix: &str) -> Result<PathBuf> {
    for entry in dir.read_dir().with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("no {prefix}* in {}", dir.display());
}

/// The files of an emulated host's initramfs, parents first.
fn host_entries(tree: &Path) -> Result<Vec<(String, Entry)>> {
    let dirs = ["bin", "dev", "lib", "lib/modules", "mnt", "proc", "sys"];
    let mut entries: Vec<(String, Entry)> = dirs.map(|dir| (dir.to_owned(), Entry::Directory)).into();
    let busybox = tree.join("bin/busybox");
    let bytes = fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    entries.push(("bin/busybox".to_owned(), Entry::File(bytes, true)));
    let mut modules = BTreeMap::new();
    find_modules(&tree.join("lib/modules"), &mut modules)?;
    for name in HOST_MODULES.into_iter().chain(HOST_KVM) {
        let path = modules.get(name).with_context(|| format!("the kernel package has no module {name}"))?;
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        entries.push((format!("lib/modules/{name}.ko"), Entry::File(bytes, false)));
    }
    let order = [&HOST_MODULES[..], &HOST_KVM[..1]].concat().join("\n");
    entries.push(("lib/modules/order".to_owned(), Entry::File(order.into_bytes(), false)));
    for applet in APPLETS {
        entries.push((format!("bin/{applet}"), Entry::Link("busybox".to_owned())));
    }
    entries.push(("init".to_owned(), Entry::File(HOST_INIT.as_bytes().to_vec(), true)));
    Ok(entries)
}

/// The files of the initramfs, parents first.
fn entries(tree: &Path) -> Result<Vec<(String, Entry)>> {
    let mut entries: Vec<(String, Entry)> =
        ["bin", "dev", "lib", "lib/modules", "lib/x86_64-linux-gnu", "lib64", "proc", "sys", "usr", "usr/bin"]
            .map(|dir| (dir.to_owned(), Entry::Directory))
            .into();
    let mut file = |path: &str, from: &Path, executable: bool| -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        entries.push((path.to_owned(), Entry::File(bytes, executable)));
        Ok(())
    };
    file("bin/busybox", &tree.join("bin/busybox"), true)?;
    file(REDIS, &tree.join(REDIS), true)?;
    file("lib64/ld-linux-x86-64.so.2", &tree.join(LOADER), true)?;
    for (name, path) in libraries(tree)? {
        file(&format!("lib/x86_64-linux-gnu/{name}"), &path, true)?;
    }
    let mut modules = BTreeMap::new();
    find_modules(&tree.join("lib/modules"), &mut modules)?;
    for name in MODULES {
        let path = modules.get(name).with_context(|| format!("the kernel package has no module {name}"))?;
        file(&format!("lib/modules/{name}.ko"), path, false)?;
    }
    entries.push(("lib/modules/order".to_owned(), Entry::File(MODULES.join("\n").into_bytes(), false)));
    for applet in APPLETS {
        entries.push((format!("bin/{applet}"), Entry::Link("busybox".to_owned())));
    }
    entries.push(("tick".to_owned(), Entry::File(TICK.as_bytes().to_vec(), true)));
    entries.push(("init".to_owned(), Entry::File(INIT.as_bytes().to_vec(), true)));
    Ok(entries)
}

/// The shared libraries of Redis, by the name they are asked for, as the unpacked loader itself finds them.
fn libraries(tree: &Path) -> Result<Vec<(String, PathBuf)>> {
    let path = LIBRARY_DIRS.map(|dir| tree.join(dir).display().to_string()).join(":");
    let mut loader = Command::new(tree.join(LOADER));
    loader.args(["--inhibit-cache", "--library-path", &path, "--list"]).arg(tree.join(REDIS));
    let mut found = Vec::new();
    for line in shell::output(&mut loader)?.lines() {
        // `name => path (address)`; the loader itself and the kernel's own page are not wanted.
        let Some((name, rest)) = line.trim().split_once(" => ") else {
            continue;
        };
        let file = PathBuf::from(rest.rsplit_once(" (").map_or(rest, |(file, _)| file));
        if name.starts_with('/') {
            continue;
        }
        if !file.starts_with(tree) {
            bail!("no package of the guest has the library {name} ({rest})");
        }
        found.push((name.to_owned(), file));
    }
    if found.is_empty() {
        bail!("the loader listed no library of {REDIS}");
    }
    Ok(found)
}

/// All kernel modules below `dir`, by name.
fn find_modules(dir: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in dir.read_dir().with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_modules(&entry.path(), found)?;
        } else if let Some(name) = entry.file_name().to_string_lossy().strip_suffix(".ko") {
            found.insert(name.to_owned(), entry.path());
        }
    }
    Ok(())
}
