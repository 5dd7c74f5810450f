//! What is there to know about a running QEMU, asked of its monitor and of `/proc`. Changes nothing.

use std::fs;
use std::path::PathBuf;

use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};

use super::disks::{self, Storage};
use super::network::{self, Network};
use super::qmp::{Qmp, QmpError};
use super::ram::{self, RamBlock, RamError};
use super::recipe::RecipeTap;
use super::{Target, cmdline, target};
use crate::guest::{GuestError, GuestErrorKind};
use crate::sys::process::PidFd;

/// Where QEMU keeps the objects that a user made.
pub(super) const OBJECTS: &str = "/objects";

/// A way out of QEMU that is no network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Channel {
    /// Its name in QEMU.
    pub(super) name: String,
    /// Where it goes.
    pub(super) filename: String,
}

/// Everything that is known about one QEMU.
#[derive(Debug)]
pub(super) struct Discovered {
    pub(super) pid: u32,
    pub(super) exe: PathBuf,
    pub(super) cwd: PathBuf,
    /// The user and the group that it runs as.
    pub(super) user: (u32, u32),
    pub(super) argv: Vec<String>,
    pub(super) version: String,
    /// The machine type's canonical name, such as `pc-q35-7.2`.
    pub(super) machine: String,
    /// `running`, `paused`, `inmigrate`, ...
    pub(super) status: String,
    pub(super) blocks: Result<Vec<RamBlock>, RamError>,
    pub(super) network: Network,
    pub(super) storage: Storage,
    pub(super) channels: Vec<Channel>,
    /// Name and type of what the user made with `-object`.
    pub(super) objects: Vec<(String, String)>,
    /// Types of what the user made with `-device`.
    pub(super) devices: Vec<String>,
    /// What QEMU's open files point to.
    pub(super) files: Vec<String>,
    /// Why QEMU itself could not migrate, in its words.
    pub(super) blocked: Vec<String>,
    /// Whether KVM runs the guest.
    pub(super) kvm: bool,
    /// Whether its threads use shadow stacks.
    pub(super) shadow_stack: bool,
    /// Whether a display server is listening, by name.
    pub(super) displays: Vec<&'static str>,
}

/// Connects to the monitor of `target` and opens its process.
pub(super) fn connect(target: &Target) -> Result<(Qmp, PidFd), GuestError> {
    match target {
        Target::QmpSocket(path) => {
            let qmp = Qmp::connect(path)?;
            let peer = socket_peercred(&qmp).map_err(|error| QmpError::Io(error.into()))?;
            let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).map_err(|_| {
                GuestError::new(GuestErrorKind::Refused, "the monitor's process is not visible from here")
            })?;
            Ok((qmp, PidFd::open(pid)?))
        }
        Target::Pid(pid) => {
            let process = PidFd::open(*pid)?;
            let argv = process.command_line()?;
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let sockets = cmdline::qmp_sockets(&argv);
            let mut first_error = None;
            for path in &sockets {
                match Qmp::connect(&cwd.join(path)) {
                    Ok(qmp) => return Ok((qmp, process)),
                    Err(error) => first_error.get_or_insert(error),
                };
            }
            Err(first_error.map_or_else(
                || {
                    if let Some(program) = no_qemu(&process, &argv) {
                        return GuestError::new(
                            GuestErrorKind::Refused,
                            format!("process {pid} is no QEMU but {program}"),
                        )
                        .advise("see `ps` for the PID of a qemu-system process, or name the VM or its QMP socket");
                    }
                    GuestError::new(
                        GuestErrorKind::Refused,
                        format!("process {pid} has no QMP socket on its command line"),
                    )
                    .advise(
                        "start QEMU with -qmp unix:PATH,server=on,wait=off, or name the socket instead of the process",
                    )
                },
                GuestError::from,
            ))
        }
    }
}

/// What a process is, if it is for sure no QEMU. One may have any name, but its program or its arguments tell.
fn no_qemu(process: &PidFd, argv: &[String]) -> Option<String> {
    let exe = process.executable().unwrap_or_default();
    let first = argv.first().map(String::as_str).unwrap_or_default();
    if exe.to_string_lossy().contains("qemu") || first.contains("qemu") {
        return None;
    }
    let name = [exe.to_string_lossy().as_ref(), first].into_iter().find(|name| !name.is_empty()).map(str::to_owned);
    Some(name.unwrap_or_else(|| "a thread of the kernel".to_owned()))
}

/// Asks everything. `process` must be the one that `qmp` speaks to.
pub(super) fn discover(qmp: &mut Qmp, process: &PidFd) -> Result<Discovered, GuestError> {
    let pid = process.pid();
    let text =
        |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let status = text(&qmp.execute("query-status", json!({}))?, "/status");
    let machine = qmp.execute("qom-get", json!({ "path": "/machine", "property": "type" }))?;
    let machine = machine.as_str().unwrap_or_default().trim_end_matches("-machine").to_owned();
    let blocks = ram::find(qmp, pid);
    if let Err(RamError::Qmp(QmpError::Closed)) = blocks {
        return Err(QmpError::Closed.into());
    }
    let network = network::parse(&qmp.hmp("info network")?);
    let argv = process.command_line()?;
    let storage = disks::find(qmp, pid, &argv)?;
    let channels = array(&qmp.execute("query-chardev", json!({}))?)
        .map(|channel| Channel { name: text(channel, "/label"), filename: text(channel, "/filename") })
        .collect();
    let objects = children(qmp, OBJECTS)?;
    let mut devices = Vec::new();
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        devices.extend(children(qmp, path)?.into_iter().map(|(_, kind)| kind));
    }
    let migrate = qmp.execute("query-migrate", json!({}))?;
    let blocked = migrate
        .get("blocked-reasons")
        .map(|reasons| array(reasons).filter_map(Value::as_str).map(str::to_owned).collect());
    let kvm = qmp.has("query-kvm") && qmp.execute("query-kvm", json!({}))?.get("enabled") == Some(&Value::Bool(true));
    let mut displays = Vec::new();
    for (command, name) in [("query-vnc", "VNC"), ("query-spice", "SPICE")] {
        if qmp.has(command) && qmp.execute(command, json!({}))?.get("enabled") == Some(&Value::Bool(true)) {
            displays.push(name);
        }
    }
    let proc_error = |what: &str, error: std::io::Error| {
        GuestError::new(GuestErrorKind::Refused, format!("cannot read /proc/{pid}/{what}: {error}"))
            .advise("run as root")
    };
    let files = fs::read_dir(format!("/proc/{pid}/fd")).map_err(|error| proc_error("fd", error))?;
    let files =
        files.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()?.into_os_string().into_string().ok()).collect();
    let thread_features =
        fs::read_to_string(format!("/proc/{pid}/status")).map_err(|error| proc_error("status", error))?;
    Ok(Discovered {
        pid,
        exe: process.executable()?,
        cwd: fs::read_link(format!("/proc/{pid}/cwd")).map_err(|error| proc_error("cwd", error))?,
        user: (process.uid()?, process.gid()?),
        argv,
        version: qmp.version.clone(),
        machine,
        status,
        blocks,
        network,
        storage,
        channels,
        objects,
        devices,
        files,
        blocked: blocked.unwrap_or_default(),
        kvm,
        shadow_stack: thread_features
            .lines()
            .any(|line| line.starts_with("x86_Thread_features:") && line.contains("shstk")),
        displays,
    })
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Name and type of each child of a QOM path; none if there is no such path.
pub(super) fn children(qmp: &mut Qmp, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let listed = match qmp.execute("qom-list", json!({ "path": path })) {
        Err(QmpError::Refused { .. }) => return Ok(Vec::new()),
        other => other?,
    };
    Ok(array(&listed)
        .filter_map(|property| {
            let kind = property.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
            Some((property.get("name")?.as_str()?.to_owned(), kind.to_owned()))
        })
        .collect())
}

/// The taps of a QEMU with their netdevs, in the order of its cards.
pub(super) fn taps(pid: u32, network: &Network) -> Vec<RecipeTap> {
    let mut found: Vec<RecipeTap> = Vec::new();
    let netdevs = network.nics.iter().filter_map(|nic| nic.netdev.as_ref()).chain(&network.others);
    for netdev in netdevs.filter(|netdev| netdev.kind == "tap") {
        let ifname = netdev.ifname().map(str::to_owned).or_else(|| tap_of_fd(pid, netdev.fd()?));
        let Some(ifname) = ifname.filter(|name| found.iter().all(|tap| tap.ifname != *name)) else { continue };
        let (bridge, mtu) = crate::tap::describe(pid, &ifname);
        found.push(RecipeTap { netdev: netdev.id.clone(), ifname, bridge, mtu });
    }
    found
}

fn tap_of_fd(pid: u32, fd: u32) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    Some(info.lines().find_map(|line| line.strip_prefix("iff:"))?.trim().to_owned())
}

/// The name of the VM, or the PID if it has none.
pub(super) fn display_name(argv: &[String], pid: u32) -> String {
    target::vm_name(argv).unwrap_or_else(|| format!("process {pid}"))
}
