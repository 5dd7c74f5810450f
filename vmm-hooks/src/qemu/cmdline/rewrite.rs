//! The rewriting itself, option by option.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::CmdlineError;
use super::disks::{Disk, Drives};
use super::options::{Keys, Opt, parse};

/// One memory backend of the machine, to be put in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backend {
    /// The object's id. The machine's default RAM has the machine's own name for it, such as `pc.ram`.
    pub(crate) id: String,
    /// Its size in bytes.
    pub(crate) size: u64,
    /// The file to map.
    pub(crate) path: String,
}

/// What the network of the new machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Network {
    /// The same netdevs: tap interfaces by netdev id, bridges by the primary's name for them.
    Same { taps: BTreeMap<String, String>, bridges: BTreeMap<String, String> },
    /// Cards that are joined to nothing.
    Null,
}

/// What to make of a command line.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// The primary's arguments, the program included.
    pub(crate) argv: &'a [String],
    /// The user and the group that the primary runs as.
    pub(crate) user: (u32, u32),
    /// Its QEMU's version, as it tells it.
    pub(crate) version: &'a str,
    /// The directory that its relative paths start from.
    pub(crate) cwd: &'a Path,
    /// The machine type's canonical name.
    pub(crate) machine: &'a str,
    /// Every memory backend.
    pub(crate) memory: &'a [Backend],
    /// Whether writes to the memory files are seen by others.
    pub(crate) share: bool,
    /// Its network.
    pub(crate) network: Network,
    /// Its replicated disks.
    pub(crate) disks: &'a [Disk],
    /// Where its sockets and logs go.
    pub(crate) run_dir: &'a Path,
}

/// A rewritten command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rewritten {
    /// The arguments, without the program.
    pub(crate) arguments: Vec<String>,
    /// Files that it opens and that must be there.
    pub(crate) needs: Vec<PathBuf>,
    /// What was left out, in words.
    pub(crate) left_out: Vec<String>,
}

/// The QMP socket of a machine in `run_dir`.
pub(crate) fn qmp_path(run_dir: &Path) -> PathBuf {
    run_dir.join("qmp.sock")
}

struct Rewriter<'a> {
    plan: &'a Plan<'a>,
    out: Rewritten,
    drives: Drives<'a>,
    machine: Keys,
    placed: Vec<&'a str>,
    serials: usize,
    nodefaults: bool,
    nographic: bool,
    vnc: bool,
    runas: bool,
    next_hub: u32,
}

/// Whether a QEMU of this version is told its user by `-run-with user=`: `-runas` is deprecated since 9.1 and gone in 10.0
/// (QEMU's `docs/about/removed-features.rst`).
fn has_run_with_user(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(9), Some(1))
}

/// Hub numbers for cards that are joined to nothing; far from what users take.
const FIRST_NULL_HUB: u32 = 90_000;

/// Rewrites a command line.
pub(crate) fn rewrite(plan: &Plan<'_>) -> Result<Rewritten, CmdlineError> {
    let arguments = plan.argv.get(1..).unwrap_or_default();
    let mut rewriter = Rewriter {
        plan,
        out: Rewritten { arguments: Vec::new(), needs: Vec::new(), left_out: Vec::new() },
        drives: Drives::new(plan.disks, plan.cwd),
        machine: Keys::default(),
        placed: Vec::new(),
        serials: 0,
        nodefaults: false,
        nographic: false,
        vnc: false,
        runas: plan.argv.iter().any(|argument| matches!(argument.as_str(), "-runas" | "--runas")),
        next_hub: FIRST_NULL_HUB,
    };
    for option in parse(arguments)? {
        rewriter.option(option)?;
    }
    rewriter.finish()
}

impl Rewriter<'_> {
    fn option(&mut self, option: Opt) -> Result<(), CmdlineError> {
        let name = option.name;
        let value = option.value.unwrap_or_default();
        let bound = |reason| Err(CmdlineError::Bound { option: name.to_owned(), value: value.clone(), reason });
        match name {
            // What makes the machine.
            "accel" | "action" | "append" | "boot" | "compat" | "cpu" | "device" | "global" | "k" | "m" | "msg"
            | "name" | "numa" | "overcommit" | "rtc" | "runas" | "seed" | "set" | "smp" | "usbdevice" | "uuid"
            | "vga" | "watchdog" | "watchdog-action" | "iscsi" | "tb-size" => self.push(name, value),
            "enable-kvm" | "no-acpi" | "no-fd-bootchk" | "no-hpet" | "no-reboot" | "no-shutdown" | "no-user-config"
            | "only-migratable" | "snapshot" | "usb" | "win2k-hack" => self.flag(name),
            "nodefaults" => {
                self.nodefaults = true;
                self.flag(name);
            }
            "machine" => self.machine(&value)?,
            "sandbox" => self.sandbox(&value)?,
            "object" => self.object(&value)?,
            "icount" if value.contains("rr=") => return bound("record and replay"),
            "icount" => self.push(name, value),
            "hda" | "hdb" | "hdc" | "hdd" if self.drives.of_file(&value).is_some() => self.hard_disk(name, &value),
            // Files that are read.
            "kernel" | "initrd" | "dtb" | "cdrom" | "fda" | "fdb" | "hda" | "hdb" | "hdc" | "hdd" | "mtdblock"
            | "pflash" | "sd" => {
                let path = self.needed(&value);
                self.push(name, path);
            }
            "bios" | "option-rom" | "L" => {
                let value = if value.contains('/') { self.absolute(&value) } else { value };
                self.push(name, value);
            }
            "drive" | "blockdev" => self.drive(name, &value)?,
            "fw_cfg" | "smbios" | "acpitable" => self.tables(name, &value)?,
            // The network.
            "netdev" => self.netdev(&value)?,
            "nic" | "net" => self.nic(name, &value)?,
            // What it listens on and writes to.
            "serial" => {
                let moved = self.serial(&value);
                self.push(name, moved);
            }
            "parallel" => self.push(name, if value == "none" { "none" } else { "null" }),
            "debugcon" => self.push(name, format!("file:{}", self.in_run_dir("debugcon.log"))),
            "chardev" => self.chardev(&value)?,
            "vnc" => self.vnc |= value != "none",
            "display" => self.vnc |= value.starts_with("vnc"),
            "nographic" => self.nographic = true,
            "audiodev" | "audio" => {
                let implied = "driver";
                let mut keys = Keys::parse(&value, implied).ok_or_else(|| unreadable(name, &value))?;
                keys.set(implied, "none");
                keys.keep(&[implied, "id", "model"]);
                self.push(name, keys.print(implied));
            }
            // Ours, or of no use in a twin.
            "S"
            | "daemonize"
            | "incoming"
            | "loadvm"
            | "mem-path"
            | "mem-prealloc"
            | "monitor"
            | "mon"
            | "qmp"
            | "qmp-pretty"
            | "pidfile"
            | "portrait"
            | "rotate"
            | "full-screen"
            | "no-quit"
            | "echr"
            | "enable-sync-profile"
            | "async-teardown" => {}
            // Of a user that it names the twin takes on the rights by itself.
            "run-with" if Keys::parse(&value, "").is_none_or(|keys| keys.get("chroot").is_some()) => {
                return bound("its paths are in another root directory");
            }
            "run-with" => {}
            "D" | "d" | "dfilter" | "trace" | "gdb" | "s" | "singlestep" | "spice" | "dump-vmstate" => {
                self.out.left_out.push(format!("-{name} {value}").trim_end().to_owned());
            }
            "fsdev" | "virtfs" => return bound("a directory of this host is shared with the guest"),
            "tpmdev" => return bound("the TPM's state is outside of QEMU"),
            "add-fd" => return bound("it uses a file that only its starter can open"),
            "chroot" => return bound("its paths are in another root directory"),
            "readconfig" | "writeconfig" => return bound("a part of the machine is described in a file"),
            "plugin" => return bound("a plugin has state of its own"),
            "preconfig" => return bound("the machine is finished by its starter"),
            _ => return bound("it is not supported"),
        }
        Ok(())
    }

    fn push(&mut self, name: &str, value: impl Into<String>) {
        self.out.arguments.extend([format!("-{name}"), value.into()]);
    }

    fn flag(&mut self, name: &str) {
        self.out.arguments.push(format!("-{name}"));
    }

    fn absolute(&self, path: &str) -> String {
        self.plan.cwd.join(path).to_string_lossy().into_owned()
    }

    fn needed(&mut self, path: &str) -> String {
        let path = self.absolute(path);
        self.out.needs.push(PathBuf::from(&path));
        path
    }

    fn in_run_dir(&self, name: &str) -> String {
        self.plan.run_dir.join(name).to_string_lossy().into_owned()
    }

    fn machine(&mut self, value: &str) -> Result<(), CmdlineError> {
        let keys = Keys::parse(value, "type").ok_or_else(|| unreadable("machine", value))?;
        self.machine.extend(keys);
        Ok(())
    }

    /// Whether the primary was started by another user than root, whose rights its twin takes on by itself.
    fn steps_down(&self) -> bool {
        self.plan.user.0 != 0 && !self.runas
    }

    fn sandbox(&mut self, value: &str) -> Result<(), CmdlineError> {
        let mut keys = Keys::parse(value, "enable").ok_or_else(|| unreadable("sandbox", value))?;
        // The sandbox is closed before the user is changed, and that is what this part of it forbids.
        if self.steps_down() {
            let denied = keys.remove("elevateprivileges").filter(|denied| denied != "allow");
            self.out.left_out.extend(denied.map(|denied| format!("-sandbox elevateprivileges={denied}")));
        }
        self.push("sandbox", keys.print("enable"));
        Ok(())
    }

    fn object(&mut self, value: &str) -> Result<(), CmdlineError> {
        let Some(keys) = Keys::parse(value, "qom-type") else {
            // Memory is described without nested parts; what has them is something else.
            if value.contains("memory-backend") {
                return Err(unreadable("object", value));
            }
            self.push("object", value);
            return Ok(());
        };
        let kind = keys.get("qom-type").unwrap_or_default();
        if kind.starts_with("filter-") || matches!(kind, "colo-compare" | "input-linux" | "input-barrier") {
            let value = value.to_owned();
            return Err(CmdlineError::Bound {
                option: "object".to_owned(),
                value,
                reason: "it joins the guest to something on its host",
            });
        }
        if !kind.starts_with("memory-backend-") {
            self.push("object", value);
            return Ok(());
        }
        let id = keys.get("id").unwrap_or_default();
        let Some(backend) = self.plan.memory.iter().find(|backend| backend.id == id) else {
            return Err(unreadable("object", value));
        };
        let canonical = keys.get("x-use-canonical-path-for-ramblock-id").map(str::to_owned);
        self.backend(backend, canonical);
        self.placed.push(&backend.id);
        Ok(())
    }

    fn backend(&mut self, backend: &Backend, canonical: Option<String>) {
        let mut keys = Keys::default();
        keys.set("qom-type", "memory-backend-file");
        keys.set("id", &*backend.id);
        keys.set("size", backend.size.to_string());
        keys.set("mem-path", &*backend.path);
        keys.set("share", if self.plan.share { "on" } else { "off" });
        if let Some(canonical) = canonical {
            keys.set("x-use-canonical-path-for-ramblock-id", canonical);
        }
        self.push("object", keys.print("qom-type"));
    }

    /// `-hda` and its like, which cannot say that an image is raw.
    fn hard_disk(&mut self, name: &'static str, file: &str) {
        let mut keys = Keys::default();
        let index = ["hda", "hdb", "hdc", "hdd"].iter().position(|known| *known == name).unwrap_or_default();
        keys.set("index", index.to_string());
        keys.set("media", "disk");
        keys.set("file", file);
        self.drives.drive(&mut keys);
        self.push("drive", keys.print(""));
    }

    fn drive(&mut self, name: &'static str, value: &str) -> Result<(), CmdlineError> {
        if name == "blockdev"
            && let Some(rewritten) = self.drives.blockdev(value)
        {
            self.push(name, rewritten);
            return Ok(());
        }
        // The file may be nested in JSON; then it must be absolute already.
        let Some(mut keys) = Keys::parse(value, if name == "drive" { "file" } else { "driver" }) else {
            self.push(name, value);
            return Ok(());
        };
        if name == "drive" && self.drives.drive(&mut keys) {
            self.push(name, keys.print(""));
            return Ok(());
        }
        for key in ["file", "filename", "file.filename"] {
            let Some(file) = keys.get(key).map(str::to_owned) else { continue };
            let protocol = file.split_once(':').is_some_and(|(start, _)| !start.contains('/'));
            // In -blockdev `file` names another node.
            let names_a_node = name == "blockdev" && key == "file";
            if !file.is_empty() && !protocol && !names_a_node {
                let file = self.needed(&file);
                keys.set(key, file);
            }
        }
        self.push(name, keys.print(if name == "drive" { "" } else { "driver" }));
        Ok(())
    }

    fn tables(&mut self, name: &'static str, value: &str) -> Result<(), CmdlineError> {
        let implied = if name == "fw_cfg" { "name" } else { "" };
        let mut keys = Keys::parse(value, implied).ok_or_else(|| unreadable(name, value))?;
        for key in ["file", "data", "path"] {
            let Some(files) = keys.get(key).map(str::to_owned) else { continue };
            let files: Vec<String> = files.split(':').map(|file| self.needed(file)).collect();
            keys.set(key, files.join(":"));
        }
        self.push(name, keys.print(implied));
        Ok(())
    }

    fn netdev(&mut self, value: &str) -> Result<(), CmdlineError> {
        let mut keys = Keys::parse(value, "type").ok_or_else(|| unreadable("netdev", value))?;
        let Some(id) = keys.get("id").filter(|id| !id.is_empty()).map(str::to_owned) else {
            return Err(unreadable("netdev", value));
        };
        if self.plan.network == Network::Null {
            let id = id.replace(',', ",,");
            if matches!(keys.get("type"), Some("tap" | "bridge")) {
                // The saved state of a card on a tap only loads on a host side that takes the same headers, which is a tap: one
                // that the kernel names, that is on no bridge and never up, and that ends with the scratch twin.
                self.push("netdev", format!("tap,id={id},script=no,downscript=no"));
            } else {
                let hub = self.next_hub;
                self.next_hub += 1;
                self.push("netdev", format!("hubport,id={id},hubid={hub}"));
            }
            return Ok(());
        }
        self.host_side("netdev", value, &mut keys, &id)?;
        self.push("netdev", keys.print("type"));
        Ok(())
    }

    /// `-nic` and `-net`, which are a card, a host side, or both.
    fn nic(&mut self, name: &'static str, value: &str) -> Result<(), CmdlineError> {
        let mut keys = Keys::parse(value, "type").ok_or_else(|| unreadable(name, value))?;
        let kind = keys.get("type").unwrap_or_default().to_owned();
        if kind == "none" || (name == "net" && kind == "nic") {
            self.push(name, value);
            return Ok(());
        }
        if self.plan.network == Network::Null {
            // The card's own keys stay; user-mode networking of a guest that never runs emits nothing.
            keys.keep(&["type", "id", "model", "mac", "macaddr", "name", "addr", "vectors"]);
            keys.set("type", "user");
            keys.set("restrict", "on");
        } else {
            let id = keys.get("id").or_else(|| keys.get("ifname")).unwrap_or_default().to_owned();
            self.host_side(name, value, &mut keys, &id)?;
        }
        self.push(name, keys.print("type"));
        Ok(())
    }

    fn host_side(&mut self, option: &str, value: &str, keys: &mut Keys, id: &str) -> Result<(), CmdlineError> {
        let Network::Same { taps, bridges } = &self.plan.network else { return Ok(()) };
        match keys.get("type").unwrap_or_default() {
            "tap" => {
                let ifname = keys.get("ifname").or_else(|| taps.get(id).map(String::as_str)).map(str::to_owned);
                let Some(ifname) = ifname else {
                    return Err(CmdlineError::NoInterface { netdev: id.to_owned() });
                };
                for key in ["fd", "fds", "vhostfd", "vhostfds", "helper", "br"] {
                    keys.remove(key);
                }
                keys.set("ifname", ifname);
                keys.set("script", "no");
                keys.set("downscript", "no");
            }
            "bridge" => {
                let bridge = keys.get("br").unwrap_or("br0").to_owned();
                if let Some(mapped) = bridges.get(&bridge) {
                    keys.set("br", &**mapped);
                }
            }
            "hubport" => {}
            "socket" | "stream" | "dgram" if !value.contains("fd=") => {}
            _ => {
                return Err(CmdlineError::Bound {
                    option: option.to_owned(),
                    value: value.to_owned(),
                    reason: "this kind of network cannot follow the guest",
                });
            }
        }
        Ok(())
    }

    fn serial(&mut self, value: &str) -> String {
        let number = self.serials;
        self.serials += 1;
        let kind = value.strip_prefix("mon:").unwrap_or(value);
        match kind.split([':', ',']).next().unwrap_or_default() {
            "none" | "null" | "vc" | "chardev" => kind.to_owned(),
            "unix" | "tcp" | "telnet" | "websocket" => {
                format!("unix:{},server=on,wait=off", self.in_run_dir(&format!("serial{number}.sock")))
            }
            _ => format!("file:{}", self.in_run_dir(&format!("serial{number}.log"))),
        }
    }

    fn chardev(&mut self, value: &str) -> Result<(), CmdlineError> {
        let mut keys = Keys::parse(value, "backend").ok_or_else(|| unreadable("chardev", value))?;
        let id = keys.get("id").unwrap_or_default().to_owned();
        // An id may hold what a file name may not.
        let plain: String = id.chars().map(|char| if char.is_ascii_alphanumeric() { char } else { '_' }).collect();
        match keys.get("backend").unwrap_or_default() {
            "null" | "vc" | "ringbuf" | "msmouse" | "wctablet" => keys.remove("logfile").map_or((), drop),
            "socket" => {
                let path = self.in_run_dir(&format!("chardev-{plain}.sock"));
                keys.keep(&["backend", "id", "mux"]);
                keys.set("path", path);
                keys.set("server", "on");
                keys.set("wait", "off");
            }
            "file" => {
                let path = self.in_run_dir(&format!("chardev-{plain}.log"));
                keys.keep(&["backend", "id", "mux"]);
                keys.set("path", path);
            }
            _ => {
                keys.keep(&["backend", "id", "mux"]);
                keys.set("backend", "null");
                self.out.left_out.push(format!("-chardev {value}"));
            }
        }
        self.push("chardev", keys.print("backend"));
        Ok(())
    }

    fn finish(mut self) -> Result<Rewritten, CmdlineError> {
        if let Some(file) = self.drives.missing() {
            return Err(CmdlineError::NoDrive { file: file.to_owned() });
        }
        if self.nographic && self.serials == 0 && !self.nodefaults {
            let moved = self.serial("stdio");
            self.push("serial", moved);
        }
        let rest: Vec<&Backend> =
            self.plan.memory.iter().filter(|backend| !self.placed.contains(&&*backend.id)).collect();
        match rest.as_slice() {
            [] => {}
            [default] if self.machine.get("memory-backend").is_none() => {
                self.backend(default, None);
                self.machine.set("memory-backend", &*default.id);
            }
            [first, ..] => {
                return Err(CmdlineError::Unreadable {
                    option: "object".to_owned(),
                    value: format!("no object {}", first.id),
                });
            }
        }
        self.machine.set("type", self.plan.machine);
        let machine = self.machine.print("type");
        self.push("machine", machine);
        if self.steps_down() {
            let (user, group) = self.plan.user;
            match has_run_with_user(self.plan.version) {
                true => self.push("run-with", format!("user={user}:{group}")),
                false => self.push("runas", format!("{user}:{group}")),
            }
        }
        self.push("display", "none");
        if self.vnc {
            let socket = self.in_run_dir("vnc.sock").replace(',', ",,");
            self.push("vnc", format!("unix:{socket}"));
        }
        self.push("monitor", "none");
        let qmp = qmp_path(self.plan.run_dir).to_string_lossy().replace(',', ",,");
        self.push("qmp", format!("unix:{qmp},server=on,wait=off"));
        self.flag("S");
        self.push("incoming", "defer");
        Ok(self.out)
    }
}

fn unreadable(option: &str, value: &str) -> CmdlineError {
    CmdlineError::Unreadable { option: option.to_owned(), value: value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::Image;
    use super::*;
    use proptest::prelude::*;

    fn backend(id: &str) -> Backend {
        Backend { id: id.to_owned(), size: 64 << 20, path: "/proc/1/fd/9".to_owned() }
    }

    fn rewritten(arguments: &str, memory: &[Backend], network: Network) -> Result<String, CmdlineError> {
        let argv: Vec<String> =
            std::iter::once("qemu").chain(arguments.split_whitespace()).map(str::to_owned).collect();
        let (cwd, run_dir) = (Path::new("/home/vm"), Path::new("/run/t"));
        let user = (0, 0);
        let plan = Plan {
            argv: &argv,
            user,
            version: "7.2.22",
            cwd,
            machine: "pc-q35-7.2",
            memory,
            share: true,
            network,
            disks: &[],
            run_dir,
        };
        rewrite(&plan).map(|done| done.arguments.join(" "))
    }

    fn same() -> Network {
        Network::Same {
            taps: BTreeMap::from([("n1".to_owned(), "vnet7".to_owned())]),
            bridges: BTreeMap::from([("br0".to_owned(), "lan".to_owned())]),
        }
    }

    const TAIL: &str = "-display none -monitor none -qmp unix:/run/t/qmp.sock,server=on,wait=off -S -incoming defer";
    const OBJECT: &str = "size=67108864,mem-path=/proc/1/fd/9,share=on";

    #[test]
    fn default_memory_goes_into_a_file_and_the_machine_gets_its_own_name() {
        let done = rewritten(
            "-M q35,accel=tcg -m 64 -kernel vmlinuz -append x,y -nographic -S -daemonize",
            &[backend("pc.ram")],
            same(),
        );
        let expected = format!(
            "-m 64 -kernel /home/vm/vmlinuz -append x,y -serial file:/run/t/serial0.log -object memory-backend-file,id=pc.ram,{OBJECT} \
             -machine pc-q35-7.2,accel=tcg,memory-backend=pc.ram {TAIL}"
        );
        assert_eq!(done, Ok(expected));
    }

    #[test]
    fn memory_objects_are_replaced_in_place() {
        let arguments = "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"m0\",\"size\":67108864} -machine q35,memory-backend=m0";
        let expected =
            format!("-object memory-backend-file,id=m0,{OBJECT} -machine pc-q35-7.2,memory-backend=m0 {TAIL}");
        assert_eq!(rewritten(arguments, &[backend("m0")], same()), Ok(expected));
        assert!(rewritten("-object memory-backend-ram,id=other,size=1", &[backend("m0")], same()).is_err());
    }

    #[test]
    fn taps_keep_their_name_and_rehearsals_have_none() {
        let arguments = "-netdev tap,id=n0,ifname=tap0,script=/x,vhost=off -netdev tap,id=n1,fd=28 -netdev bridge,id=n2 -device e1000,netdev=n0";
        let expected = format!(
            "-netdev tap,id=n0,ifname=tap0,script=no,vhost=off,downscript=no -netdev tap,id=n1,ifname=vnet7,script=no,downscript=no \
             -netdev bridge,id=n2,br=lan -device e1000,netdev=n0 -machine pc-q35-7.2 {TAIL}"
        );
        assert_eq!(rewritten(arguments, &[], same()), Ok(expected));
        assert!(rewritten("-netdev bridge,id=n2,br=other", &[], same()).expect("carried over").contains("br=other"));
        let null = rewritten(arguments, &[], Network::Null).expect("carried over");
        assert!(null.contains("-netdev tap,id=n0,script=no,downscript=no -netdev tap,id=n1,script"), "{null}");
        assert!(!null.contains("ifname"), "{null}");
        let unknown = rewritten("-netdev tap,id=n9,fd=3", &[], same());
        assert_eq!(unknown, Err(CmdlineError::NoInterface { netdev: "n9".to_owned() }));
    }

    #[test]
    fn a_twin_has_the_rights_of_its_primary_and_no_more() {
        let rewritten_by = |version, arguments: &[&str], user: (u32, u32)| {
            let argv: Vec<String> = ["qemu"].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
            let (cwd, run_dir, network) = (Path::new("/"), Path::new("/run/t"), same());
            let plan = Plan {
                argv: &argv,
                user,
                version,
                cwd,
                machine: "pc",
                memory: &[],
                share: true,
                network,
                disks: &[],
                run_dir,
            };
            let done = rewrite(&plan).expect("carried over");
            (done.arguments.join(" "), done.left_out)
        };
        let rewritten = |arguments: &[&str], user| rewritten_by("7.2.22 (Debian)", arguments, user);
        let sandbox = ["-sandbox", "on,elevateprivileges=deny,spawn=deny"];
        let (line, left_out) = rewritten(&sandbox, (0, 0));
        assert!(line.contains("-sandbox on,elevateprivileges=deny,spawn=deny") && !line.contains("-runas"), "{line}");
        assert_eq!(left_out, Vec::<String>::new());
        let (line, left_out) = rewritten(&sandbox, (64055, 994));
        assert!(line.contains("-sandbox on,spawn=deny") && line.contains("-runas 64055:994"), "{line}");
        assert_eq!(left_out, ["-sandbox elevateprivileges=deny"]);
        let (line, _) = rewritten(&["-runas", "nobody"], (65534, 65534));
        assert_eq!(line.matches("-runas").count(), 1, "it steps down by itself: {line}");
        for newer in ["9.1.0", "10.0.2 (Debian 1:10.0.2+ds-2)"] {
            let (line, _) = rewritten_by(newer, &["-run-with", "async-teardown=on,user=vm"], (64055, 994));
            assert!(line.contains("-run-with user=64055:994") && !line.contains("-runas"), "{line}");
        }
        assert!(!rewritten_by("9.0.4", &[], (1, 1)).0.contains("-run-with"));
    }

    #[test]
    fn a_machine_in_another_root_directory_is_refused() {
        for arguments in ["-chroot /jail", "-run-with chroot=/jail", "-run-with user=vm,chroot=/jail"] {
            let refused = rewritten(arguments, &[], same()).expect_err("its files are elsewhere");
            assert!(refused.to_string().contains("another root directory"), "{refused}");
        }
    }

    #[test]
    fn what_the_primary_listens_on_moves() {
        let arguments = "-qmp unix:/q -monitor stdio -serial mon:stdio -serial unix:/s,server -serial none -vnc :1 -pidfile /p -D /log \
                         -chardev socket,id=qga,path=/g,server=on -chardev pty,id=p0 -drive file=cd.iso,readonly=on,if=virtio";
        let done = rewritten(arguments, &[], same()).expect("carried over");
        for part in [
            "-serial file:/run/t/serial0.log -serial unix:/run/t/serial1.sock,server=on,wait=off -serial none",
            "-chardev socket,id=qga,path=/run/t/chardev-qga.sock,server=on,wait=off -chardev null,id=p0",
            "-vnc unix:/run/t/vnc.sock",
            "-drive file=/home/vm/cd.iso,readonly=on,if=virtio",
        ] {
            assert!(done.contains(part), "{part} in {done}");
        }
        for gone in ["/q ", "stdio", "/p ", "/log", ":1"] {
            assert!(!done.contains(gone), "{gone} in {done}");
        }
    }

    #[test]
    fn replicated_drives_get_the_images_of_this_host_and_none_is_forgotten() {
        let argv: Vec<String> =
            ["qemu", "-hdb", "b.img", "-cdrom", "cd.iso", "-drive", "file=a.qcow2,if=virtio,cache=none"]
                .map(str::to_owned)
                .to_vec();
        let disk = |name: &str| Disk {
            source: Path::new("/home/vm").join(name),
            image: Image::File(format!("/img/{name}").into()),
        };
        let rewritten = |disks: &[Disk]| {
            let (cwd, run_dir, network) = (Path::new("/home/vm"), Path::new("/run/t"), same());
            let plan = Plan {
                argv: &argv,
                user: (0, 0),
                version: "7.2.22",
                cwd,
                machine: "pc",
                memory: &[],
                share: true,
                network,
                disks,
                run_dir,
            };
            rewrite(&plan)
        };
        let done = rewritten(&[disk("a.qcow2"), disk("b.img")]).expect("both are there");
        let line = done.arguments.join(" ");
        assert!(line.starts_with("-drive index=1,media=disk,file=/img/b.img,format=raw -cdrom /home/vm/cd.iso -drive if=virtio,cache=none,file=/img/a.qcow2,format=raw "), "{line}");
        assert_eq!(done.needs, [PathBuf::from("/home/vm/cd.iso")], "nothing of the primary's is opened");
        let missing = rewritten(&[disk("a.qcow2"), disk("c.img")]);
        assert_eq!(missing, Err(CmdlineError::NoDrive { file: "/home/vm/c.img".into() }));
    }

    #[test]
    fn what_cannot_be_carried_over_is_refused_by_name() {
        for arguments in [
            "-fsdev local,id=x,path=/",
            "-netdev user,id=n",
            "-readconfig f",
            "-add-fd fd=3,set=1",
            "-tpmdev emulator,id=t",
            "-net user",
            "-new",
        ] {
            let error = rewritten(arguments, &[], same()).expect_err("bound to the host").to_string();
            let option = arguments.split_whitespace().next().expect("an option");
            assert!(error.contains(option), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_command_line_makes_it_panic(argv in prop::collection::vec(prop_oneof![
            "-[a-zA-Z]{1,10}",
            "-(netdev|chardev|object|machine|drive|nic|serial|smbios|fw_cfg|M|net)",
            "(tap|socket|q35|memory-backend-ram|file)?(,[a-z]{1,6}(=[ -~]{0,9})?){0,4}",
            "\\{[ -~]{0,40}\\}",
            "[ -~]{0,20}",
        ], 0..12)) {
            for network in [same(), Network::Null] {
                let plan = Plan { argv: &argv, user: (1, 1), version: "9.1.0", cwd: Path::new("/c"), machine: "pc", memory: &[backend("pc.ram")], share: false,
                    network, disks: &[], run_dir: Path::new("/r") };
                if let Ok(done) = rewrite(&plan) {
                    prop_assert!(done.arguments.join(" ").ends_with("-S -incoming defer"));
                }
            }
        }
    }
}
