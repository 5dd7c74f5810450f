//! The checklist: what stops protection of a QEMU, and what its operator must know. [`super::attach`] obeys it and
//! [`super::doctor`] prints it.
//!
//! Outputs are held by allow-list: what is not known to be held, or to write guest memory only where it is tracked, is refused.

use super::clock;
use super::discover::{Channel, Discovered};
use super::network::Netdev;
use super::qmp::Qmp;
use super::{Check, CheckLevel, OUR_PREFIX, TrackerChoice, recipe};
use crate::disk::MAX_DISKS;
use crate::sys::pagemap;
use crate::track::soft_dirty;

/// QMP commands that protection cannot do without.
const COMMANDS: &[&str] = &[
    "add-fd",
    "chardev-add",
    "chardev-remove",
    "cont",
    "getfd",
    "human-monitor-command",
    "object-add",
    "object-del",
    "query-chardev",
    "query-status",
    "remove-fd",
    "stop",
    "xen-save-devices-state",
];

/// Netdevs whose output a filter sees.
const NETDEVS: &[&str] = &["tap", "hubport", "socket", "stream", "dgram"];

/// Device types (by how they begin) whose output is held or that have none, and that write guest memory by QEMU's own hand.
const DEVICES: &[&str] = &[
    "AC97",
    "ES1370",
    "VGA",
    "ahci",
    "ati-vga",
    "bochs-display",
    "cirrus-vga",
    "e1000",
    "floppy",
    "generic-sdhci",
    "hda-",
    "i82",
    "i6300esb",
    "ib700",
    "ich9-",
    "ide-",
    "intel-hda",
    "intel-iommu",
    "isa-",
    "lsi",
    "megasas",
    "mptsas",
    "ne2k_pci",
    "nec-usb-xhci",
    "nvdimm",
    "nvme",
    "pc-dimm",
    "pci-bridge",
    "pci-ohci",
    "pci-serial",
    "pcie-pci-bridge",
    "pcie-root-port",
    "pcnet",
    "piix",
    "pvpanic",
    "pvscsi",
    "pxb",
    "qemu-xhci",
    "qxl",
    "ramfb",
    "rtl8139",
    "sb16",
    "scsi-",
    "sdhci-pci",
    "secondary-vga",
    "sga",
    "smbus-eeprom",
    "usb-audio",
    "usb-ehci",
    "usb-hub",
    "usb-kbd",
    "usb-mouse",
    "usb-storage",
    "usb-tablet",
    "virtconsole",
    "virtio-balloon",
    "virtio-blk",
    "virtio-gpu",
    "virtio-keyboard",
    "virtio-mouse",
    "virtio-net",
    "virtio-rng",
    "virtio-scsi",
    "virtio-serial",
    "virtio-tablet",
    "virtio-vga",
    "virtserialport",
    "vmcoreinfo",
    "vmgenid",
    "vmware-svga",
    "vmxnet3",
    "x3130",
    "xio3130",
];

/// Device types that begin like an allowed one and are refused all the same.
const DEVICES_NOT: &[&str] = &["scsi-block", "scsi-generic", "virtio-gpu-gl", "virtio-vga-gl", "virtio-gpu-rutabaga"];

/// Open files of QEMU that betray a helper, and what it is.
const HELPERS: &[(&str, &str)] = &[
    ("/dev/vhost-net", "vhost-net: the kernel moves the guest's frames past QEMU"),
    ("/dev/vhost-vdpa", "vDPA: hardware writes guest memory and emits frames past QEMU"),
    ("/dev/vhost-vsock", "vsock: the kernel moves the guest's data past QEMU"),
    ("/dev/vhost-scsi", "vhost-scsi: the kernel writes guest memory past QEMU"),
    ("/dev/vfio/", "VFIO: hardware writes guest memory past QEMU"),
    ("/dev/bus/usb/", "host USB: a device of this host is passed to the guest"),
];

fn check(name: impl Into<String>, level: CheckLevel, message: impl Into<String>, advice: &str) -> Check {
    Check { name: name.into(), level, message: message.into(), advice: advice.to_owned() }
}

/// Whether this host can track dirty pages, and how.
pub(super) fn host(tracker: TrackerChoice) -> Vec<Check> {
    let mut checks = Vec::new();
    let scan = pagemap::supported();
    let bits = soft_dirty::supported();
    checks.push(match (scan, tracker) {
        (true, TrackerChoice::Auto | TrackerChoice::PagemapScan) => {
            check("dirty tracking", CheckLevel::Ok, "the kernel has PAGEMAP_SCAN", "")
        }
        (false, TrackerChoice::Auto) if bits => {
            check("dirty tracking", CheckLevel::Ok, "the kernel has no PAGEMAP_SCAN, but soft-dirty bits", "")
        }
        (_, TrackerChoice::SoftDirty) if bits => {
            check("dirty tracking", CheckLevel::Ok, "the kernel has soft-dirty bits", "")
        }
        (_, TrackerChoice::SoftDirty) => check(
            "dirty tracking",
            CheckLevel::Refusal,
            "this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)",
            "use another kernel, or let the tracker be `auto`",
        ),
        (false, TrackerChoice::PagemapScan) => check(
            "dirty tracking",
            CheckLevel::Refusal,
            "this kernel has no PAGEMAP_SCAN",
            "use Linux 6.7 or newer, or let the tracker be `compare`",
        ),
        (false, TrackerChoice::Auto) => check(
            "dirty tracking",
            CheckLevel::Warning,
            "this kernel has neither PAGEMAP_SCAN nor soft-dirty bits: all memory is compared at each epoch, which makes pauses long",
            "use Linux 6.7 or newer",
        ),
        (_, TrackerChoice::Compare) => check(
            "dirty tracking",
            CheckLevel::Warning,
            "all memory is compared at each epoch, as configured, which makes pauses long",
            "",
        ),
    });
    if !rustix::process::geteuid().is_root() {
        checks.push(check("rights", CheckLevel::Refusal, "the agent does not run as root", "run it as root"));
    }
    checks
}

/// How dirty pages of this guest are to be found: with a balloon `auto` compares, because what a balloon discards leaves
/// no trace in the page map; and soft-dirty bits are good for private memory alone.
pub(super) fn tracker_for(found: &Discovered, choice: TrackerChoice) -> TrackerChoice {
    match choice {
        TrackerChoice::Auto if has_balloon(found) => TrackerChoice::Compare,
        TrackerChoice::Auto if pagemap::supported() && !found.shadow_stack => TrackerChoice::PagemapScan,
        TrackerChoice::Auto if soft_dirty::supported() && shared(found).is_none() => TrackerChoice::SoftDirty,
        TrackerChoice::Auto => TrackerChoice::Compare,
        chosen => chosen,
    }
}

fn has_balloon(found: &Discovered) -> bool {
    found.devices.iter().any(|kind| kind.starts_with("virtio-balloon"))
}

/// A block of memory that is not private to QEMU.
fn shared(found: &Discovered) -> Option<&str> {
    found.blocks.iter().flatten().find(|block| block.shared).map(|block| block.name.as_str())
}

/// Everything about one QEMU, refusals and warnings and what is fine.
pub(super) fn examine(qmp: &Qmp, found: &Discovered, tracker: TrackerChoice) -> Vec<Check> {
    let missing: Vec<&str> = COMMANDS.iter().copied().filter(|command| !qmp.has(command)).collect();
    let mut checks = vec![commands(&found.version, &missing)];
    // Before the run state: a guest that a dead agent left paused is not its owner's doing.
    checks.extend(attached(found));
    checks.push(run_state(&found.status));
    checks.push(memory(found));
    checks.extend(tracking(found, tracker));
    checks.extend(network(found));
    checks.extend(drives(found));
    checks.extend(devices(found));
    checks.extend(not_held(found));
    checks.push(clock::check(found.kvm, &found.argv));
    checks.push(command_line(found));
    checks
}

fn command_line(found: &Discovered) -> Check {
    match recipe::try_out(found) {
        Ok(left_out) if left_out.is_empty() => check("command line", CheckLevel::Ok, "a twin can be made from it", ""),
        Ok(left_out) => check(
            "command line",
            CheckLevel::Warning,
            format!("a twin can be made from it, without {}", left_out.join(", ")),
            "",
        ),
        Err(message) => check("command line", CheckLevel::Refusal, message, "start the guest without it"),
    }
}

fn commands(version: &str, missing: &[&str]) -> Check {
    if missing.is_empty() {
        return check("QEMU", CheckLevel::Ok, format!("QEMU {version} has every command that is needed"), "");
    }
    let message = format!("QEMU {version} has no {}", missing.join(", "));
    check("QEMU", CheckLevel::Refusal, message, "use a QEMU that is built with them, such as your distribution's")
}

fn run_state(status: &str) -> Check {
    let (message, advice) = match status {
        "running" => return check("run state", CheckLevel::Ok, "the guest runs", ""),
        "paused" | "prelaunch" => ("the guest is paused by its owner", "let it run first"),
        "inmigrate" | "postmigrate" | "finish-migrate" => {
            ("the guest is being migrated", "wait for the end of the migration")
        }
        "shutdown" => ("the guest is shut down", "start it first"),
        other => {
            return check(
                "run state",
                CheckLevel::Refusal,
                format!("the guest does not run: {other}"),
                "let it run first",
            );
        }
    };
    check("run state", CheckLevel::Refusal, message, advice)
}

fn attached(found: &Discovered) -> Option<Check> {
    let ours = found.objects.iter().map(|(name, _)| name).chain(found.channels.iter().map(|channel| &channel.name));
    let ours = ours.chain(&found.storage.leftovers);
    if let Some(name) = ours.into_iter().find(|name| name.starts_with(OUR_PREFIX)) {
        return Some(check(
            "attachment",
            CheckLevel::Refusal,
            format!("an agent is attached already, or died while it was: QEMU holds {name}"),
            "unprotect the guest with that agent; if it is gone, remove what it left with `understudy unprotect`",
        ));
    }
    let tracked = found.files.iter().any(|file| file.contains("[userfaultfd]"));
    tracked.then(|| {
        check(
            "attachment",
            CheckLevel::Warning,
            "QEMU has a userfaultfd: an attachment to it was cut off and will be taken over, or it is in a post-copy migration",
            "let a migration end first",
        )
    })
}

fn memory(found: &Discovered) -> Check {
    let blocks = match &found.blocks {
        Ok(blocks) => blocks,
        Err(error) => {
            return check(
                "memory",
                CheckLevel::Refusal,
                error.to_string(),
                "a newer QEMU prints the addresses of its memory itself",
            );
        }
    };
    if let Some(block) = blocks.iter().find(|block| block.page_size > 4096) {
        let message = format!("the memory block {} is in huge pages of {} KiB", block.name, block.page_size >> 10);
        return check("memory", CheckLevel::Refusal, message, "start the guest without huge pages");
    }
    let bytes: u64 = blocks.iter().map(|block| block.total).sum();
    check("memory", CheckLevel::Ok, format!("{} memory blocks, {} MiB in all", blocks.len(), bytes >> 20), "")
}

/// What stands against the tracker that is asked for, or that `auto` would have on this kernel.
fn tracking(found: &Discovered, choice: TrackerChoice) -> Option<Check> {
    let bits = match choice {
        TrackerChoice::SoftDirty => true,
        TrackerChoice::Auto => !pagemap::supported() && soft_dirty::supported(),
        TrackerChoice::PagemapScan | TrackerChoice::Compare => false,
    };
    let reason = if found.shadow_stack && !bits {
        "QEMU runs with shadow stacks, under which nothing can be injected".to_owned()
    } else if has_balloon(found) {
        "the guest has a balloon, which discards memory without a trace in the page map".to_owned()
    } else if let Some(name) = shared(found).filter(|_| bits) {
        format!("the memory block {name} is shared, and the kernel may forget the soft-dirty bits of such memory")
    } else {
        return None;
    };
    let comparing = tracker_for(found, choice) == TrackerChoice::Compare;
    Some(match choice {
        TrackerChoice::PagemapScan | TrackerChoice::SoftDirty => {
            check("tracker", CheckLevel::Refusal, reason, "remove the cause, or let the tracker be `auto` or `compare`")
        }
        TrackerChoice::Auto | TrackerChoice::Compare if comparing => check(
            "tracker",
            CheckLevel::Warning,
            format!("{reason}; all memory is compared at each epoch, which makes pauses long"),
            "",
        ),
        TrackerChoice::Auto | TrackerChoice::Compare => {
            check("tracker", CheckLevel::Ok, format!("{reason}; soft-dirty bits are used"), "")
        }
    })
}

fn network(found: &Discovered) -> Vec<Check> {
    let mut checks = Vec::new();
    for nic in &found.network.nics {
        let name = format!("network card {}", nic.name);
        let Some(netdev) = &nic.netdev else {
            checks.push(check(name, CheckLevel::Ok, "joined to nothing", ""));
            continue;
        };
        checks.push(match refuse_netdev(netdev) {
            Some((message, advice)) => check(name, CheckLevel::Refusal, message, advice),
            None if nic.queues > 1 => check(
                name,
                CheckLevel::Refusal,
                format!("{} has {} queues, and QEMU takes no filter on more than one", netdev.id, nic.queues),
                "start the guest with one queue",
            ),
            None => check(name, CheckLevel::Ok, format!("{} ({}) can be held", netdev.id, netdev.kind), ""),
        });
    }
    for netdev in &found.network.others {
        if let Some((message, advice)) = refuse_netdev(netdev) {
            checks.push(check(format!("network {}", netdev.id), CheckLevel::Refusal, message, advice));
        }
    }
    if found.network.nics.is_empty() {
        checks.push(check("network", CheckLevel::Ok, "the guest has no network card", ""));
    }
    checks
}

fn refuse_netdev(netdev: &Netdev) -> Option<(String, &'static str)> {
    match netdev.kind.as_str() {
        kind if NETDEVS.contains(&kind) => None,
        "user" => Some((
            format!(
                "{} is user-mode networking: its connections live in this host's QEMU and would die with it",
                netdev.id
            ),
            "use a tap on a bridge, or -nic none",
        )),
        "vhost-user" | "vhost-vdpa" => Some((
            format!("{} is {}: another program moves the guest's frames past QEMU", netdev.id, netdev.kind),
            "use a tap on a bridge without vhost",
        )),
        kind => Some((
            format!("{} is of type {kind}, whose output is not known to be held", netdev.id),
            "use a tap on a bridge",
        )),
    }
}

fn drives(found: &Discovered) -> Vec<Check> {
    let storage = &found.storage;
    let mut checks = Vec::new();
    for drive in &storage.drives {
        let name = format!("drive {}", drive.name);
        checks.push(if !drive.writable {
            let message = format!("read-only; the standby needs {} with the same content", drive.file);
            check(name, CheckLevel::Warning, message, "copy it there")
        } else if !storage.mirrors {
            let message = format!("the guest can write to {}, and this QEMU cannot mirror it", drive.file);
            check(
                name,
                CheckLevel::Refusal,
                message,
                "use a QEMU whose blockdev-mirror has copy-mode, which is 3.0 or newer",
            )
        } else if let Some((message, advice)) = storage.refuse(drive) {
            check(name, CheckLevel::Refusal, message, advice)
        } else {
            let message = format!("{} will be mirrored: {} ({})", drive.file, size(drive.bytes), drive.format);
            check(name, CheckLevel::Ok, message, "")
        });
    }
    if storage.disks().count() > MAX_DISKS {
        let message = format!("the guest has more than {MAX_DISKS} disks that it can write to");
        checks.push(check("drives", CheckLevel::Refusal, message, "start the guest with fewer"));
    }
    checks
}

/// In the largest unit that it is at least ten of.
fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 10 << 30 => format!("{} GiB", bytes >> 30),
        bytes if bytes >= 10 << 20 => format!("{} MiB", bytes >> 20),
        bytes if bytes >= 10 << 10 => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} bytes"),
    }
}

fn devices(found: &Discovered) -> Vec<Check> {
    let mut checks = Vec::new();
    for (path, what) in HELPERS {
        if found.files.iter().any(|file| file.starts_with(path)) {
            checks.push(check("helper", CheckLevel::Refusal, *what, "start the guest without it"));
        }
    }
    let mut unknown: Vec<&String> = found.devices.iter().filter(|kind| !device_allowed(kind)).collect();
    unknown.dedup();
    for kind in unknown {
        let message = format!("{kind} is not known to be safe: it may write guest memory or emit output past us");
        checks.push(check(format!("device {kind}"), CheckLevel::Refusal, message, "start the guest without it"));
    }
    for (name, kind) in &found.objects {
        if !name.starts_with(OUR_PREFIX) && (kind.starts_with("filter-") || kind == "colo-compare") {
            let message = format!("{name} ({kind}) changes the way of the guest's frames");
            checks.push(check("network filter", CheckLevel::Refusal, message, "remove it first"));
        }
    }
    for reason in &found.blocked {
        checks.push(check(
            "device state",
            CheckLevel::Refusal,
            format!("QEMU cannot save its state: {reason}"),
            "remove the cause",
        ));
    }
    checks
}

fn device_allowed(kind: &str) -> bool {
    let begins = |list: &[&str]| list.iter().any(|start| kind.starts_with(start));
    begins(DEVICES) && !begins(DEVICES_NOT) || kind.ends_with("-x86_64-cpu")
}

fn not_held(found: &Discovered) -> Vec<Check> {
    let inner = |channel: &&Channel| {
        let quiet = ["vc", "null", "ringbuf"].iter().any(|kind| channel.filename == *kind);
        let monitor = channel.name.contains("monitor") || channel.name.contains("qmp");
        !quiet && !monitor && !channel.name.starts_with(OUR_PREFIX)
    };
    let channels = found.channels.iter().filter(inner).map(|channel| {
        let message =
            format!("{} ({}) is not held: what the guest writes there leaves at once", channel.name, channel.filename);
        check(
            format!("channel {}", channel.name),
            CheckLevel::Warning,
            message,
            "trust nothing that was read there during a failover",
        )
    });
    let displays = found.displays.iter().map(|name| {
        check(
            *name,
            CheckLevel::Warning,
            format!("{name} is not held: its viewers see what may be undone by a failover"),
            "",
        )
    });
    channels.chain(displays).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_taken_by_allow_list_only() {
        for kind in ["virtio-net-pci", "e1000", "VGA", "pcie-root-port", "qemu64-x86_64-cpu", "virtio-vga"] {
            assert!(device_allowed(kind), "{kind}");
        }
        for kind in [
            "vfio-pci",
            "vhost-user-fs-pci",
            "vhost-vsock-pci",
            "ivshmem-plain",
            "usb-host",
            "usb-redir",
            "virtio-9p-pci",
            "virtio-vga-gl",
            "scsi-generic",
            "tpm-tis",
            "something-new",
        ] {
            assert!(!device_allowed(kind), "{kind}");
        }
    }

    #[test]
    fn netdevs_are_taken_by_allow_list_only() {
        let netdev = |kind: &str| Netdev { id: "n".to_owned(), kind: kind.to_owned(), detail: String::new() };
        assert!(refuse_netdev(&netdev("tap")).is_none());
        for kind in ["user", "vhost-user", "vhost-vdpa", "vde", "l2tpv3", "something-new"] {
            assert!(refuse_netdev(&netdev(kind)).is_some(), "{kind}");
        }
    }

    #[test]
    fn only_a_running_guest_is_taken() {
        assert_eq!(run_state("running").level, CheckLevel::Ok);
        for status in ["paused", "inmigrate", "postmigrate", "shutdown", "io-error", "guest-panicked"] {
            assert_eq!(run_state(status).level, CheckLevel::Refusal, "{status}");
        }
    }

    #[test]
    fn a_missing_command_is_named() {
        let refused = commands("7.2", &["xen-save-devices-state"]);
        assert_eq!(refused.level, CheckLevel::Refusal);
        assert!(refused.message.contains("xen-save-devices-state"));
    }
}
