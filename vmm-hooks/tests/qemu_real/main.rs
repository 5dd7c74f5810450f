//! The back end `qemu` with real QEMUs under TCG: the firmware is the guest. It runs code, draws on the screen and asks for an
//! address on the network, so memory, video memory and frames all change.
//!
//! Skipped, with a line that says so, where QEMU or root is missing.

mod disks;
mod standby;
mod troubles;

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm_hooks::guest::{Capture, Guest, GuestErrorKind, GuestEvent, PauseParts, TwinHost, TwinMemory};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};
use vmm_hooks::qemu::{
    AttachOptions, CheckLevel, QemuGuest, QemuTwinHost, Target, TrackerChoice, TwinHostOptions, attach, doctor,
    remove_leftovers, resolve,
};
use vmm_hooks::sys::process::PidFd;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// A monitor beside the one that we attach to.
const SECOND: &str = "unix:DIR/second,server=on,wait=off";

/// Bound on every wait for something that must happen.
const SOON: Duration = Duration::from_secs(60);

/// A QEMU of the test, ended with it.
struct Qemu {
    child: Child,
    dir: tempfile::TempDir,
}

impl Qemu {
    /// Starts one, or says why not.
    fn start(arguments: &[&str]) -> Option<Self> {
        Self::start_with(&[], arguments)
    }

    /// The same in this environment.
    fn start_with(env: &[(&str, &str)], arguments: &[&str]) -> Option<Self> {
        if !Path::new(QEMU).exists() {
            println!("skipped: no {QEMU}");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("qemu-test").tempdir().expect("a directory");
        let qmp = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let arguments: Vec<String> =
            arguments.iter().map(|argument| argument.replace("DIR", &dir.path().display().to_string())).collect();
        let log = fs::File::create(dir.path().join("log")).expect("room");
        // One whose test is killed goes, too.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", QEMU, "-display", "none", "-m", "64", "-qmp", &qmp])
            .args(&arguments)
            .current_dir(dir.path())
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("QEMU starts");
        let qemu = Self { child, dir };
        wait_for("the QMP socket", || std::os::unix::net::UnixStream::connect(qemu.socket()).is_ok());
        // The socket is there long before QEMU has opened its images; its greeting comes after.
        let mut monitor = std::os::unix::net::UnixStream::connect(qemu.socket()).expect("QEMU listens");
        monitor.set_read_timeout(Some(SOON)).expect("a socket");
        monitor.read_exact(&mut [0]).expect("QEMU greets");
        Some(qemu)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn second(&self) -> PathBuf {
        self.dir.path().join("second")
    }

    /// What it says.
    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn target(&self) -> Target {
        Target::QmpSocket(self.socket())
    }

    fn attach(&self) -> QemuGuest {
        attach(&self.target(), &AttachOptions::default()).expect("it can be attached to")
    }

    fn kill(&mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::yield_now();
    }
}

fn qmp(socket: &Path, command: &str) -> serde_json::Value {
    use std::io::{BufRead, BufReader, Write};
    // A second monitor may come up after the one by which QEMU was seen to run.
    let mut connected = None;
    wait_for("QEMU's monitor", || {
        connected = std::os::unix::net::UnixStream::connect(socket).ok();
        connected.is_some()
    });
    let mut stream = connected.expect("it was waited for");
    stream.set_read_timeout(Some(SOON)).expect("a socket");
    writeln!(stream, r#"{{"execute":"qmp_capabilities"}}{command}"#).expect("QEMU reads");
    let mut answers = BufReader::new(stream).lines();
    let mut returned = 0;
    loop {
        let line = answers.next().expect("QEMU answers").expect("QEMU answers");
        let answer: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        if let Some(value) = answer.get("return") {
            returned += 1;
            if returned == 2 {
                return value.clone();
            }
        }
        assert!(answer.get("error").is_none(), "{line}");
    }
}

fn status(socket: &Path) -> String {
    qmp(socket, r#"{"execute":"query-status"}"#)["status"].as_str().expect("a status").to_owned()
}

/// What QEMU holds that could be of ours.
fn traces(qemu: &Qemu, socket: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for command in [
        r#"{"execute":"qom-list","arguments":{"path":"/objects"}}"#,
        r#"{"execute":"query-chardev"}"#,
        r#"{"execute":"query-fdsets"}"#,
    ] {
        for thing in qmp(socket, command).as_array().expect("a list") {
            let thing = thing.to_string();
            if thing.contains("understudy") || command.contains("fdsets") {
                found.push(thing);
            }
        }
    }
    for file in fs::read_dir(format!("/proc/{}/fd", qemu.child.id())).expect("it runs").flatten() {
        let file = fs::read_link(file.path()).unwrap_or_default();
        if file.to_string_lossy().contains("userfaultfd") || file.to_string_lossy().contains("understudy") {
            found.push(file.display().to_string());
        }
    }
    found
}

/// A copy of all memory on the standby's side, as an engine would keep it.
fn apply(twin: &dyn TwinMemory, capture: &Capture) {
    for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks_exact(PAGE_SIZE)) {
        twin.write(page, 0, bytes);
    }
}

fn all_pages(guest: &QemuGuest) -> Vec<u64> {
    (0..guest.layout().pages()).collect()
}

/// Everything that the guest holds now, while it stands.
fn read_all(guest: &mut QemuGuest) -> Vec<u8> {
    let mut bytes = Vec::new();
    guest.read_pages(&all_pages(guest), &mut bytes).expect("readable");
    bytes
}

fn sync(guest: &mut QemuGuest, twin: &dyn TwinMemory) {
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.resume().expect("resumes");
    let mut capture = Capture { pages: all_pages(guest), ..Capture::default() };
    guest.read_pages(&capture.pages.clone(), &mut capture.bytes).expect("readable");
    apply(twin, &capture);
}

fn epoch(guest: &mut QemuGuest, capture: &mut Capture) -> PauseParts {
    let mut parts = PauseParts::default();
    let started = Instant::now();
    guest.pause().expect("pauses");
    parts.stop = started.elapsed();
    guest.capture(capture, &mut parts).expect("captures");
    let resuming = Instant::now();
    guest.resume().expect("resumes");
    parts.resume = resuming.elapsed();
    parts.total = started.elapsed();
    parts
}

fn first_difference(twin: &dyn TwinMemory, guest: &QemuGuest, bytes: &[u8]) -> Option<String> {
    let mut page = vec![0; PAGE_SIZE];
    (0..twin.pages()).zip(bytes.chunks_exact(PAGE_SIZE)).find_map(|(number, theirs)| {
        twin.read(number, &mut page);
        let (block, inner) = guest.layout().locate(number).expect("in range");
        (page != theirs).then(|| format!("page {inner} of {}", guest.layout().blocks()[block].name))
    })
}

fn survives_a_kill(machine: &str, tracker: TrackerChoice) {
    let arguments = [
        "-M",
        machine,
        "-name",
        "guest=survivor",
        "-netdev",
        "hubport,id=n0,hubid=0",
        "-device",
        "virtio-net-pci,netdev=n0",
    ];
    let Some(mut qemu) = Qemu::start(&arguments) else { return };
    let options = AttachOptions { tracker, ..AttachOptions::default() };
    let mut guest = attach(&qemu.target(), &options).expect("it can be attached to");
    let run_dir = tempfile::Builder::new().prefix("qemu-twin").tempdir().expect("a directory");
    let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.path().to_owned(), ..TwinHostOptions::default() });
    let mut twin = host.prepare("t", guest.recipe(), guest.layout(), &[]).expect("a twin");
    let memory = twin.memory();
    sync(&mut guest, &*memory);
    let mut capture = Capture::default();
    let mut dirty = 0;
    for _ in 0..8 {
        epoch(&mut guest, &mut capture);
        assert!(capture.pages.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(capture.bytes.len(), capture.pages.len() * PAGE_SIZE);
        dirty += capture.pages.len();
        apply(&*memory, &capture);
    }
    assert!(dirty > 0, "firmware that runs writes memory");
    let rehearsal = twin.rehearse(&capture.device).expect("the state loads");
    println!("{machine}: rehearsal {rehearsal:?}");

    // The last epoch: what the twin holds after it must be what the guest held when it stood.
    guest.pause().expect("pauses");
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    apply(&*memory, &capture);
    let truth = read_all(&mut guest);
    assert_eq!(first_difference(&*memory, &guest, &truth), None, "a dirty page was lost");

    qemu.kill();
    assert!(guest.events().iter().any(|event| matches!(event, GuestEvent::Died { .. })));
    assert_eq!(guest.resume().expect_err("it is dead").kind, GuestErrorKind::Gone);

    let activation = twin.activate(&capture.device).expect("goes on");
    println!("{machine}: activation {activation:?}");
    let survivor = twin.release().expect("it runs");
    assert_eq!(status(Path::new(&survivor.control)), "running");
    // What holds no code and no data that the guest writes at once must be there byte by byte: the firmware's ROMs.
    let bios = guest.layout().blocks().iter().position(|block| block.name == "pc.bios").expect("a PC has one");
    let range = guest.layout().block_pages(bios);
    let again = attach(&Target::QmpSocket(survivor.control.clone().into()), &options)
        .expect("a survivor can be protected again");
    let mut theirs = Vec::new();
    let mut again: Box<QemuGuest> = Box::new(again);
    again.read_pages(&range.clone().collect::<Vec<_>>(), &mut theirs).expect("readable");
    let start = usize::try_from(range.start).expect("small") * PAGE_SIZE;
    assert!(theirs == truth[start..start + theirs.len()], "the firmware is not what it was");
    again.detach().expect("leaves it");
    assert_eq!(status(Path::new(&survivor.control)), "running");
    PidFd::open(survivor.pid).expect("it runs").kill_confirmed(SOON).expect("ours");
}

#[test]
fn a_pc_survives_the_kill_of_its_qemu() {
    survives_a_kill("pc", TrackerChoice::PagemapScan);
}

#[test]
fn a_q35_survives_the_kill_of_its_qemu() {
    survives_a_kill("q35", TrackerChoice::PagemapScan);
}

#[test]
fn soft_dirty_bits_do_as_well() {
    if !vmm_hooks::track::soft_dirty::supported() {
        println!("skipped: this kernel has no soft-dirty bits");
        return;
    }
    survives_a_kill("pc", TrackerChoice::SoftDirty);
}

#[test]
fn comparing_all_memory_does_as_well() {
    survives_a_kill("pc", TrackerChoice::Compare);
}

#[test]
fn memory_arrives_whole_in_a_twin_that_is_launched_again() {
    let Some(mut qemu) = Qemu::start(&["-M", "q35", "-nic", "none"]) else { return };
    let mut guest = qemu.attach();
    let run_dir = tempfile::Builder::new().prefix("qemu-twin").tempdir().expect("a directory");
    let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.path().to_owned(), ..TwinHostOptions::default() });
    let mut twin = host.prepare("again", guest.recipe(), guest.layout(), &[]).expect("a twin");
    let memory = twin.memory();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    let truth = read_all(&mut guest);
    let mut capture = Capture::default();
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    apply(&*memory, &Capture { pages: all_pages(&guest), bytes: truth.clone(), ..Capture::default() });
    twin.rehearse(&capture.device).expect("the state loads");
    assert!(twin.rehearse(&capture.device[..capture.device.len() / 2]).is_err(), "half a state does not load");
    assert_eq!(first_difference(&*memory, &guest, &truth), None, "a rehearsal changes nothing");

    // The twin dies before it is needed.
    let first = twin_pid(run_dir.path());
    PidFd::open(first).expect("it waits").kill_confirmed(SOON).expect("ours");
    assert!(!twin.alive());
    qemu.kill();
    let activation = twin.activate(&capture.device).expect("a second one goes on");
    assert_eq!(activation.relaunched, 1);
    assert!(twin.alive());
    assert!(twin.activate(&capture.device).is_err(), "it goes on once");
    twin.destroy().expect("nothing is left");
    assert_eq!(fs::read_dir(run_dir.path()).expect("a directory").count(), 0);
}

/// The process that listens in the only directory under `run_dir`.
fn twin_pid(run_dir: &Path) -> u32 {
    let dir = fs::read_dir(run_dir).expect("a directory").next().expect("a twin").expect("a twin").path();
    let needle = format!("unix:{}/qmp.sock,server=on,wait=off", dir.display());
    let has_it = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&needle))
    };
    vmm_hooks::qemu::running().into_iter().map(|(pid, _)| pid).find(has_it).expect("it runs")
}

#[test]
fn a_twins_memory_is_what_was_committed() {
    let Some(mut qemu) = Qemu::start(&["-M", "pc", "-nic", "none"]) else { return };
    let mut guest = qemu.attach();
    let run_dir = tempfile::Builder::new().prefix("qemu-twin").tempdir().expect("a directory");
    let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.path().to_owned(), ..TwinHostOptions::default() });
    let mut twin = host.prepare("same", guest.recipe(), guest.layout(), &[]).expect("a twin");
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    let truth = read_all(&mut guest);
    let mut capture = Capture::default();
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    apply(&*twin.memory(), &Capture { pages: all_pages(&guest), bytes: truth.clone(), ..Capture::default() });
    qemu.kill();
    twin.activate(&capture.device).expect("goes on");
    let pid = twin_pid(run_dir.path());
    let survivor = twin.release().expect("it runs");
    assert_eq!(survivor.pid, pid);
    // Its own view of its memory, by attaching to it: all but the few pages that the guest wrote since are equal.
    let mut again = attach(&Target::Pid(pid), &AttachOptions::default()).expect("its socket is on its command line");
    again.pause().expect("pauses");
    let theirs = read_all(&mut again);
    let differing = truth.chunks_exact(PAGE_SIZE).zip(theirs.chunks_exact(PAGE_SIZE)).filter(|(a, b)| a != b).count();
    assert!(differing * 20 < truth.len() / PAGE_SIZE, "{differing} pages differ");
    assert_eq!(again.layout(), guest.layout());
    again.fence().fence().expect("ended");
    assert!(again.fence().ended());
}

#[test]
fn detaching_leaves_no_trace_and_a_second_attachment_is_refused() {
    let Some(qemu) = Qemu::start(&["-M", "pc", "-netdev", "hubport,id=n0,hubid=0", "-device", "e1000,netdev=n0"])
    else {
        return;
    };
    assert!(traces(&qemu, &qemu.socket()).is_empty());
    for round in 0..3 {
        let mut guest = qemu.attach();
        guest.pause().expect("pauses");
        guest.hold_output(1).expect("holds");
        guest.arm().expect("arms");
        guest.resume().expect("resumes");
        let mut capture = Capture::default();
        epoch(&mut guest, &mut capture);
        if round == 1 {
            guest.pause().expect("pauses");
        }
        assert_eq!(
            attach(&qemu.target(), &AttachOptions::default()).expect_err("one at a time").kind,
            GuestErrorKind::Refused
        );
        assert!(guest.events().is_empty(), "nothing but us touched it");
        Box::new(guest).detach().expect("leaves it");
        assert_eq!(traces(&qemu, &qemu.socket()), Vec::<String>::new());
        assert_eq!(status(&qemu.socket()), "running");
    }
}

/// A card on a datagram socket, so that the test hears what the guest emits.
const HEARD: [&str; 6] = [
    "-M",
    "pc",
    "-netdev",
    "dgram,id=n0,local.type=unix,local.path=DIR/local,remote.type=unix,remote.path=DIR/remote",
    "-device",
    "virtio-net-pci,netdev=n0",
];

#[test]
fn what_a_dead_agent_left_keeps_the_guest_mute_until_it_is_removed() {
    let Some(qemu) = Qemu::start(&HEARD) else { return };
    let heard = UnixDatagram::bind(qemu.dir.path().join("remote")).expect("a socket");
    heard.set_read_timeout(Some(SOON)).expect("a socket");
    let mut guest = qemu.attach();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.hold_output(1).expect("holds");
    drop(guest);
    let refused = attach(&qemu.target(), &AttachOptions::default()).expect_err("something was left");
    assert!(refused.message.contains("understudy-"), "{refused}");
    while_drained(&heard);
    assert_eq!(status(&qemu.socket()), "paused");
    qmp(&qemu.socket(), r#"{"execute":"cont"}"#);
    // QEMU says so when it has a frame and nobody to give it to.
    wait_for("a frame", || {
        fs::read_to_string(qemu.log()).is_ok_and(|log| log.contains("filter redirector send failed"))
    });
    assert_eq!(while_drained(&heard), 0, "nobody released it");

    let removed = remove_leftovers(&qemu.target()).expect("removes them");
    assert!(removed.iter().any(|what| what.contains("understudy-capture-0")), "{removed:?}");
    assert_eq!(traces(&qemu, &qemu.socket()), Vec::<String>::new());
    assert!(heard.recv(&mut [0; 4096]).is_ok(), "frames pass again");
    assert_eq!(remove_leftovers(&qemu.target()).expect("nothing to do"), Vec::<String>::new());
    Box::new(qemu.attach()).detach().expect("leaves it");
}

/// Reads what is there, without waiting; how many frames.
fn while_drained(heard: &UnixDatagram) -> usize {
    heard.set_nonblocking(true).expect("a socket");
    let mut frames = 0;
    let mut frame = [0; 4096];
    loop {
        match heard.recv(&mut frame) {
            Ok(_) => frames += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    heard.set_nonblocking(false).expect("a socket");
    frames
}

#[test]
fn frames_wait_for_their_epoch_and_pass_by_themselves_afterwards() {
    let Some(qemu) = Qemu::start(&[&HEARD[..], &["-qmp", SECOND]].concat()) else { return };
    let heard = UnixDatagram::bind(qemu.dir.path().join("remote")).expect("a socket");
    heard.set_read_timeout(Some(SOON)).expect("a socket");
    let mut guest = qemu.attach();
    let gate = guest.gate();
    guest.pause().expect("pauses");
    guest.hold_output(1).expect("holds");
    guest.resume().expect("resumes");
    while_drained(&heard);
    // The boot ROM asks for an address.
    assert!(gate.wait_output(Instant::now() + SOON).is_some(), "the boot ROM emits frames");
    guest.pause().expect("pauses");
    let sealed = gate.seal(2);
    assert!(sealed > 0);
    guest.resume().expect("resumes");
    assert_eq!(while_drained(&heard), 0, "nothing leaves before it is released");
    gate.release(1);
    let mut frame = [0; 4096];
    for _ in 0..sealed {
        let length = heard.recv(&mut frame).expect("released frames leave");
        assert!(length >= 14, "a whole frame");
    }
    assert_eq!(gate.held().released, sealed);
    guest.open_output().expect("opens");
    let filters = traces(&qemu, &qemu.second()).into_iter().filter(|trace| trace.contains("-0"));
    assert_eq!(filters.collect::<Vec<_>>(), Vec::<String>::new());
    while_drained(&heard);
    assert!(heard.recv(&mut frame).is_ok(), "frames pass by themselves");
    // And it can be held again.
    guest.pause().expect("pauses");
    guest.hold_output(7).expect("holds");
    guest.resume().expect("resumes");
    assert!(gate.wait_output(Instant::now() + SOON).is_some());
    Box::new(guest).detach().expect("leaves it");
    assert!(heard.recv(&mut frame).is_ok(), "frames pass by themselves");
}

#[test]
fn a_failed_capture_loses_no_page() {
    let Some(mut qemu) = Qemu::start(&["-M", "pc", "-nic", "none", "-qmp", SECOND]) else { return };
    let mut guest = qemu.attach();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    let mut image = read_all(&mut guest);
    guest.resume().expect("resumes");
    // The device state's file is taken away behind our back, so that every save fails, after the harvest.
    let sets = qmp(&qemu.second(), r#"{"execute":"query-fdsets"}"#);
    let set = &sets[0]["fdset-id"];
    qmp(&qemu.second(), &format!(r#"{{"execute":"remove-fd","arguments":{{"fdset-id":{set}}}}}"#));
    for _ in 0..5 {
        guest.pause().expect("pauses");
        let error = guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect_err("it cannot save");
        assert_eq!(error.kind, GuestErrorKind::Failed);
        guest.resume().expect("resumes");
    }
    guest.pause().expect("pauses");
    let mut dirty = PageSet::empty(guest.layout().pages());
    guest.harvest(&mut dirty).expect("harvests");
    let pages: Vec<u64> = dirty.iter().collect();
    let mut bytes = Vec::new();
    guest.read_pages(&pages, &mut bytes).expect("readable");
    for (page, copy) in pages.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
        let start = usize::try_from(*page).expect("small") * PAGE_SIZE;
        image[start..start + PAGE_SIZE].copy_from_slice(copy);
    }
    assert!(image == read_all(&mut guest), "a dirty page was lost");
    qemu.kill();
    let error = guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect_err("it is dead");
    assert_eq!(error.kind, GuestErrorKind::Gone);
}

#[test]
fn the_owners_pause_and_reset_are_events() {
    let Some(qemu) = Qemu::start(&["-M", "pc", "-nic", "none", "-qmp", SECOND]) else { return };
    let second = qemu.second();
    let mut guest = qemu.attach();
    qmp(&second, r#"{"execute":"stop"}"#);
    assert_eq!(guest.events(), [GuestEvent::Paused]);
    // Our pause and resume do not let it run against its owner's will.
    let mut capture = Capture::default();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    guest.resume().expect("nothing to do");
    assert_eq!(status(&second), "paused");
    assert_eq!(guest.events(), []);
    qmp(&second, r#"{"execute":"cont"}"#);
    assert_eq!(guest.events(), [GuestEvent::Resumed]);
    qmp(&second, r#"{"execute":"system_reset"}"#);
    wait_for("the reset", || guest.events().contains(&GuestEvent::Reset));
    // Somebody lets it run in the middle of a capture.
    guest.pause().expect("pauses");
    qmp(&second, r#"{"execute":"cont"}"#);
    let error = guest.capture(&mut capture, &mut PauseParts::default()).expect_err("it ran");
    assert_eq!(error.kind, GuestErrorKind::Failed);
    epoch(&mut guest, &mut capture);
    assert_eq!(status(&second), "running");
    qmp(&second, r#"{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"late"}}"#);
    // The very next epoch tells.
    epoch(&mut guest, &mut capture);
    wait_for("the new device", || guest.events().iter().any(|event| matches!(event, GuestEvent::Changed { .. })));
    // It is told once.
    epoch(&mut guest, &mut capture);
    epoch(&mut guest, &mut capture);
    assert_eq!(guest.events(), []);
    Box::new(guest).detach().expect("leaves it");
}

#[test]
fn the_checklist_names_what_stops_protection() {
    let refusals = |target: &Target| -> Vec<String> {
        doctor(Some(target))
            .into_iter()
            .filter(|check| check.level == CheckLevel::Refusal)
            .map(|check| check.message)
            .collect()
    };
    let disk = ["-M", "pc", "-S", "-drive", "file=DIR/disk,format=raw,if=floppy", "-nic", "user"];
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk");
    fs::write(&image, [0; 4096]).expect("room");
    let arguments = disk.map(|argument| argument.replace("DIR/disk", &image.display().to_string()));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some(qemu) = Qemu::start(&arguments) else { return };
    let found = refusals(&qemu.target());
    for wanted in ["user-mode networking", "which is not mirrored", "paused by its owner", "-nic user"] {
        assert!(found.iter().any(|message| message.contains(wanted)), "{wanted} in {found:?}");
    }
    assert_eq!(attach(&qemu.target(), &AttachOptions::default()).expect_err("refused").kind, GuestErrorKind::Refused);

    let Some(good) = Qemu::start(&["-M", "pc", "-nic", "none", "-name", "a-good-one-41"]) else { return };
    assert_eq!(refusals(&good.target()), Vec::<String>::new());
    assert_eq!(resolve("a-good-one-41").expect("one of that name"), Target::Pid(good.child.id()));
    let busy = std::os::unix::net::UnixStream::connect(good.socket()).expect("QEMU listens");
    assert!(refusals(&good.target()).iter().any(|message| message.contains("another program")));
    drop(busy);
}

#[test]
fn pause_parts_of_an_idle_guest() {
    let Some(qemu) = Qemu::start(&["-M", "q35", "-nic", "none"]) else { return };
    let mut guest = qemu.attach();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.resume().expect("resumes");
    let mut capture = Capture::default();
    let mut all: Vec<(PauseParts, usize)> = (0..100)
        .map(|_| {
            let parts = epoch(&mut guest, &mut capture);
            std::thread::yield_now();
            (parts, capture.pages.len())
        })
        .collect();
    for (parts, _) in &all {
        assert!(parts.total >= parts.stop + parts.device + parts.resume);
        assert!(parts.harvest + parts.copy > Duration::ZERO);
    }
    all.sort_by_key(|(parts, _)| parts.total);
    println!("p50 {:?}\np99 {:?}\ndevice state {} bytes", all[50], all[98], capture.device.len());
    Box::new(guest).detach().expect("leaves it");
}
