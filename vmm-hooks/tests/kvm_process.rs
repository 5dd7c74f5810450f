//! A microVM in a process of its own, from outside: how it is confined, and what is left of it when it, or its protector, is killed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmm_hooks::disk::DiskChange;
use vmm_hooks::guest::{After, Capture, Guest, GuestErrorKind, GuestEvent, PauseParts, TwinHost};
use vmm_hooks::kvm::pilot::{abi, check_worker};
use vmm_hooks::kvm::process::guest::Boot;
use vmm_hooks::kvm::process::{Microvm, ProcessTwinHost, Program, attach};
use vmm_hooks::kvm::{Dirty, DiskFile, GateBounds, LinuxOptions, NetCard, PilotOptions, Spec, TwinHostOptions, host};
use vmm_hooks::layout::{PAGE_SIZE, PageSet};
use vmm_hooks::sys::process::PidFd;

const PILOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/pilot/pilot");
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the number is in a frame that was emitted by order.
const NUMBER: std::ops::Range<usize> = 14..22;
/// The user that has no rights.
const NOBODY: &str = "65534";

fn missing() -> Option<String> {
    if let Err(error) = host() {
        return Some(format!("no /dev/kvm: {error}"));
    }
    (!Path::new(PILOT).exists()).then(|| "the pilot guest is not built; cargo xtask setup".to_owned())
}

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_microvm-process"), &[])
}

fn start(name: &str, wire: Option<OwnedFd>) -> Microvm {
    start_with(name, wire, Dirty::Bitmap)
}

fn start_with(name: &str, wire: Option<OwnedFd>, dirty: Dirty) -> Microvm {
    start_of(name, wire, dirty, Vec::new())
}

fn start_of(name: &str, wire: Option<OwnedFd>, dirty: Dirty, disks: Vec<DiskFile>) -> Microvm {
    // It is joined to neither.
    let (tap, bridge) = ("us-none".to_owned(), Some("us-br0".to_owned()));
    let card = NetCard { mac: [2, 0, 0, 0, 0, 8], tap, bridge };
    let spec = Spec {
        name: name.to_owned(),
        memory: abi::MEMORY_MIN,
        cpus: 2,
        net: wire.is_some().then_some(card),
        disks,
        dirty,
    };
    let options = PilotOptions { address: Ipv4Addr::new(10, 0, 0, 2), ..PilotOptions::default() };
    let boot = Boot::Pilot(PILOT.into(), options);
    let machine = Microvm::start(&program(), spec, &boot, wire, GateBounds::default()).expect("this host can");
    machine.resume().expect("it is new");
    machine
}

fn emit(machine: &Microvm, frames: u32) {
    machine.order(&[abi::order::EMIT, frames], PATIENCE).expect("the pilot works");
}

/// The lines of `/proc/PID/.../status`, by their first word.
fn status(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path.join("status")).expect("it lives");
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

fn signal(machine: &Microvm, signal: Signal) {
    let pid = i32::try_from(machine.process().pid()).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("it is ours");
}

#[test]
fn a_host_whose_rings_are_whole_is_found_to_be_so_in_a_confined_process() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let machine = start_with("rings", None, Dirty::Ring);
    let here =
        vmm_hooks::kvm::ring::check::of_host(&host().expect("asked above"), vmm_hooks::kvm::ring::check::Code::User);
    assert_eq!(machine.dirty_note().is_none(), here.is_ok(), "{:?}, and here {here:?}", machine.dirty_note());
    let mut guest = attach(&machine).expect("nobody is");
    guest.pause().and_then(|()| guest.arm()).and_then(|()| guest.resume()).expect("it runs");
    let page = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small");
    machine.order(&[abi::order::FILL, page, 7], PATIENCE).expect("it works");
    let mut capture = Capture::default();
    guest.capture_epoch(false, 1, After::Stand, &mut capture, &mut PauseParts::default()).expect("it runs");
    assert!(capture.pages.contains(&page.into()), "{:?}", capture.pages);
    machine.fence().fence().expect("it ends");
}

#[test]
fn it_has_no_file_no_user_no_capability_and_a_filter_in_every_thread() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let machine = start("confined", None);
    let process = Path::new("/proc").join(machine.process().pid().to_string());
    let tasks = fs::read_dir(process.join("task")).expect("it lives");
    let threads: Vec<_> = tasks.map(|task| status(&task.expect("it lives").path())).collect();
    assert!(threads.len() >= 4, "two vCPUs, the gate, and who answers: {threads:?}");
    for thread in &threads {
        let has = |name: &str| thread.get(name).map(String::as_str);
        assert_eq!(has("Seccomp"), Some("2"), "{thread:?}");
        assert_eq!(has("NoNewPrivs"), Some("1"), "{thread:?}");
        assert!(["CapInh", "CapPrm", "CapEff"].iter().all(|sets| has(sets) == Some("0000000000000000")), "{thread:?}");
        if rustix::process::geteuid().is_root() {
            assert!(has("Uid").is_some_and(|ids| ids.split_whitespace().all(|id| id == NOBODY)), "{thread:?}");
            assert_eq!(has("Groups"), Some(""), "{thread:?}");
        }
    }
    if rustix::process::geteuid().is_root() {
        let files = fs::read_dir(process.join("root")).expect("it lives").count();
        assert_eq!(files, 0, "its root is empty");
    }
    // Of what it has open nothing is a file on a disk: it has none, and its kernel is closed.
    let open = fs::read_dir(process.join("fd")).expect("it lives");
    let open: Vec<_> = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).collect();
    assert!(!open.iter().any(|path| path.ends_with("pilot")), "{open:?}");
    // What a terminal or a service manager sends to a whole group does not end it.
    for ending in [Signal::TERM, Signal::INT, Signal::HUP] {
        signal(&machine, ending);
    }
    machine
        .order(&[abi::order::FILL, u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small"), 7], PATIENCE)
        .expect("it works");
    machine.fence().fence().expect("it ends");
}

#[test]
fn a_process_that_is_killed_is_a_guest_that_died() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let (ours, _theirs) = UnixDatagram::pair().expect("a pair");
    let machine = start("killed", Some(ours.into()));
    let mut guest: Box<dyn Guest> = Box::new(attach(&machine).expect("nobody is attached"));
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    guest.hold_output(1).expect("it stands");
    guest.resume().expect("it stands");
    assert_eq!(guest.events(), []);
    // A release waits for nobody, also if the process stands still; it is done when that goes on.
    emit(&machine, 1);
    signal(&machine, Signal::STOP);
    guest.gate().release(1);
    signal(&machine, Signal::CONT);
    let deadline = Instant::now() + PATIENCE;
    while guest.gate().held().released < 1 {
        assert!(Instant::now() < deadline, "a release was lost: {:?}", guest.gate().held());
        std::thread::yield_now();
    }
    machine.process().kill_confirmed(PATIENCE).expect("it ends");
    let events = guest.events();
    assert!(matches!(&events[..], [GuestEvent::Died { how }] if how.contains("signal 9")), "{events:?}");
    assert_eq!(guest.events(), [], "it is told once");
    assert!(machine.is_over() && !machine.is_running());
    let mut capture = Capture::default();
    let error =
        guest.capture_epoch(false, 2, After::Run, &mut capture, &mut PauseParts::default()).expect_err("it is gone");
    assert_eq!(error.kind, GuestErrorKind::Gone, "{error}");
    assert!(error.message.contains("signal 9"), "{error}");
    // None of these waits or panics.
    guest.gate().release(7);
    guest.gate().shut();
    assert!(guest.gate().wait_output(Instant::now()).is_none() || guest.gate().held().frames > 0);
}

/// What a standby has of a guest's memory.
struct Copy(Vec<u8>);

impl Copy {
    fn page(&self, number: u64) -> Vec<u8> {
        let start = usize::try_from(number).expect("small") * PAGE_SIZE;
        self.0[start..start + PAGE_SIZE].to_vec()
    }

    fn apply(&mut self, capture: &Capture) {
        for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks(PAGE_SIZE)) {
            let start = usize::try_from(page).expect("small") * PAGE_SIZE;
            self.0[start..start + PAGE_SIZE].copy_from_slice(bytes);
        }
    }
}

/// The steps that two workers that write at once have done in memory of one moment.
fn steps(page: impl Fn(u64) -> Vec<u8>) -> [u64; 2] {
    let [zero, one] = [0, 1].map(|cpu| check_worker(cpu, &page).unwrap_or_else(|error| panic!("{error}")));
    assert!(zero.seen <= one.done && one.seen <= zero.done, "memory of two moments: {zero:?}, {one:?}");
    [zero.done, one.done]
}

/// The steps that the worker with this page has done.
fn done(page: &[u8]) -> u64 {
    let start = usize::try_from(abi::worker::DONE * 8).expect("inside a page");
    u64::from_le_bytes(page[start..start + 8].try_into().expect("eight"))
}

/// Tracks a guest from here on.
fn track(guest: &mut dyn Guest) {
    guest.pause().and_then(|()| guest.arm()).and_then(|()| guest.resume()).expect("it runs");
}

#[test]
fn a_guest_that_goes_on_by_itself_is_whole_in_each_epoch() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    // Few pages, of which the process copies what is dirty.
    let alone = whole_in_each_epoch("few", [40, 30]);
    assert!(alone >= 20, "{alone} of 40 went on by themselves");
    // And more, which its protector does.
    whole_in_each_epoch("many", [700, 500]);
}

/// Captures 40 epochs of a guest whose two workers have so many pages, and looks at each of them; how many it went on from by itself. A machine of
/// its own: a worker that is begun again while it works does its next steps in its former pages.
fn whole_in_each_epoch(name: &str, pages: [u32; 2]) -> u32 {
    let machine = start(name, None);
    let work = |cpu: u32, first: u32, pages: u32, pattern: u64| {
        let first = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small") + first;
        let order = [abi::order::WORK, cpu, first, pages, u32::try_from(pattern).expect("small"), 200];
        machine.order(&order, PATIENCE).expect("the pilot works");
    };
    let mut guest = attach(&machine).expect("nobody is");
    guest.pause().and_then(|()| guest.arm()).expect("it runs");
    let mut copy = Copy(Vec::new());
    let all: Vec<u64> = PageSet::full(guest.layout().pages()).iter().collect();
    guest.read_pages(&all, &mut copy.0).expect("it is there");
    guest.resume().expect("it stands");
    let (mut capture, mut alone, mut owed) = (Capture::default(), 0, false);
    work(0, 0, pages[0], abi::SCATTERED);
    work(1, 1000, pages[1], abi::SEQUENTIAL);
    for round in 0..40 {
        for cpu in [0, 1] {
            let (mut page, deadline) = (Vec::new(), Instant::now() + PATIENCE);
            let mut now = |guest: &mut dyn Guest| {
                guest.read_pages(&[abi::WORKERS / PAGE_SIZE as u64 + cpu], &mut page).expect("it is there");
                done(&page)
            };
            let before = now(&mut guest);
            while now(&mut guest) < before + 20 {
                assert!(Instant::now() < deadline, "worker {cpu} stands");
                std::thread::yield_now();
            }
        }
        let after = if round % 8 == 7 { After::Stand } else { After::Run };
        let mut parts = PauseParts::default();
        guest.capture_epoch(false, round, after, &mut capture, &mut parts).expect("it runs");
        let by_itself = parts.ran_again.is_some();
        assert_eq!(by_itself, after == After::Run && !owed && capture.pages.len() <= 128, "round {round}");
        if after == After::Stand {
            assert!(!machine.is_running(), "it was not let");
            let mut bytes = Vec::new();
            guest.read_pages(&capture.pages, &mut bytes).expect("it is there");
            assert!(bytes == capture.bytes, "it has run since");
        } else {
            assert_eq!(machine.is_running(), by_itself);
        }
        guest.resume().expect("it is there");
        assert!(machine.is_running());
        alone += u32::from(by_itself);
        // One that is not committed belongs to the next.
        owed = round % 8 == 3;
        if owed {
            let mut back = PageSet::empty(guest.layout().pages());
            capture.pages.iter().for_each(|&page| back.insert(page));
            guest.put_back(&back);
        } else {
            copy.apply(&capture);
            if round > 0 {
                steps(|number| copy.page(number));
            }
        }
    }
    machine.fence().fence().expect("it ends");
    alone
}

#[test]
fn a_guest_whose_capture_fails_or_is_long_stands_and_its_writes_come_in_their_order() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).expect("room");
    let disks = vec![DiskFile { name: "disk".to_owned(), path: path.clone() }];
    let machine = start_of("writes", None, Dirty::Bitmap, disks);
    let mut guest = attach(&machine).expect("nobody is");
    track(&mut guest);
    let first = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small");
    let fill = |page: u32| machine.order(&[abi::order::FILL, first + page, 7], PATIENCE).expect("the pilot works");
    let write = |sector: u32, sectors: u32, byte: u32| {
        machine.order(&[abi::order::WRITE, 0, sector, sectors, byte], PATIENCE).expect("the pilot works");
    };
    let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
    // Its first copy is missing.
    guest.mirror_disks().expect("it works");
    fill(1);
    guest.capture_epoch(false, 1, After::Run, &mut capture, &mut parts).expect_err("a disk is missing");
    assert!(!machine.is_running() && parts.ran_again.is_none(), "nothing of it could be sent");
    guest.resume().expect("it stands");
    assert!(machine.is_running());
    let mut writes = Vec::new();
    while !guest.mirror_progress().expect("it is whole").ready {
        guest.take_writes(&mut writes, 1, Duration::ZERO);
    }
    let mut disk = vec![0; 1 << 20];
    let mut apply = |writes: &mut Vec<vmm_hooks::disk::DiskWrite>| {
        for write in writes.drain(..) {
            let range = usize::try_from(write.offset).expect("small")..;
            match &write.change {
                DiskChange::Data(data) => disk[range][..data.len()].copy_from_slice(data),
                DiskChange::Zero(bytes) => disk[range][..usize::try_from(*bytes).expect("small")].fill(0),
            }
        }
        disk == fs::read(&path).expect("its image")
    };
    apply(&mut writes);
    // What it had found comes with the next one, which is therefore not its own to copy; then it is.
    for (number, alone) in [(2, false), (3, true)] {
        fill(number);
        write(number, 1, number);
        guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect("all is there");
        assert_eq!(parts.ran_again.is_some(), alone);
        guest.resume().expect("it is there");
        for page in if alone { vec![number] } else { vec![1, number] } {
            let at = capture.pages.binary_search(&u64::from(first + page)).expect("no page is lost");
            assert!(capture.bytes[at * PAGE_SIZE..][..PAGE_SIZE].iter().all(|&byte| byte == 7));
        }
        assert!(apply(&mut capture.disk), "a write is missing");
    }
    // More than there is room for at once.
    for number in 0..280 {
        write(64 * (number % 30), 64, 1 + number % 200);
    }
    guest.capture_epoch(false, 3, After::Run, &mut capture, &mut parts).expect("all is there");
    assert!(parts.ran_again.is_none() && capture.pages.len() <= 128, "{} pages", capture.pages.len());
    assert!(capture.disk.iter().map(vmm_hooks::disk::DiskWrite::bytes).sum::<u64>() > 8 << 20);
    guest.resume().expect("it stands");
    assert!(apply(&mut capture.disk), "a write is missing");
    machine.fence().fence().expect("it ends");
}

/// The processes of microVMs called `name`.
fn processes(name: &str) -> Vec<u32> {
    let wanted = [env!("CARGO_BIN_EXE_microvm-process"), name];
    let pids =
        fs::read_dir("/proc").expect("it is there").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| PidFd::open(pid).is_ok_and(|process| process.command_line().is_ok_and(|line| line == wanted)))
        .collect()
}

#[test]
fn a_twin_whose_waiting_process_dies_is_launched_again() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let machine = start("primary", None);
    let mut guest: Box<dyn Guest> = Box::new(attach(&machine).expect("nobody is attached"));
    let twins = ProcessTwinHost::new(program(), TwinHostOptions::default());
    let mut twin = twins.prepare("relaunched", guest.recipe(), guest.layout(), &[]).expect("this host can");
    let waiting = processes("relaunched");
    assert_eq!(waiting.len(), 1, "a process waits");
    let process = Path::new("/proc").join(waiting[0].to_string());
    let open = fs::read_dir(process.join("fd")).expect("it lives");
    let open: Vec<_> = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).collect();
    let vcpus = open.iter().filter(|path| path.to_string_lossy().contains("kvm-vcpu")).count();
    let threads = fs::read_dir(process.join("task")).expect("it lives").count();
    assert_eq!((vcpus, threads), (2, 1), "it has its processors, and nothing that could run them: {open:?}");
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    let mut capture = Capture::default();
    guest.capture(&mut capture, &mut PauseParts::default()).expect("it stands");
    let (memory, mut bytes) = (twin.memory(), Vec::new());
    for page in PageSet::full(memory.pages()).iter() {
        guest.read_pages(&[page], &mut bytes).expect("it is there");
        if bytes.iter().any(|&byte| byte != 0) {
            memory.write(page, 0, &bytes);
        }
    }
    twin.rehearse(&capture.device).expect("it loads");
    assert_eq!(processes("relaunched"), waiting, "a rehearsal is another process, which has ended");
    PidFd::open(waiting[0]).and_then(|process| process.kill_confirmed(PATIENCE)).expect("it ends");
    guest.fence().fence().expect("the primary ends");
    let activation = twin.activate(&capture.device).expect("its memory is whole");
    assert_eq!(activation.relaunched, 1);
    let survivor = twin.release().expect("it runs");
    let survivor_machine = twins.take("relaunched").expect("it was activated");
    assert_eq!(survivor.pid, survivor_machine.process().pid());
    survivor_machine
        .order(&[abi::order::FILL, u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small"), 7], PATIENCE)
        .expect("the pilot goes on");
    drop(survivor_machine);
    assert_eq!(processes("relaunched"), Vec::<u32>::new(), "it ends with its last handle");
}

/// What [`a_twin_goes_on_on_the_bridge_of_its_own_host`] does in a network of its own.
#[test]
#[ignore = "only the other tests start it, as another process"]
fn helper_on_another_bridge() {
    let bridge = Command::new("ip").args(["link", "add", "us-br7", "type", "bridge"]).status();
    assert!(bridge.expect("it is there").success());
    let (ours, _theirs) = UnixDatagram::pair().expect("a pair");
    let machine = start("there", Some(ours.into()));
    let mut guest: Box<dyn Guest> = Box::new(attach(&machine).expect("nobody is attached"));
    let (here, _others) = UnixDatagram::pair().expect("a pair");
    let options = TwinHostOptions {
        join: Arc::new(move |card| {
            assert_eq!(card.bridge.as_deref(), Some("us-br7"));
            Ok(here.try_clone()?.into())
        }),
        bounds: GateBounds::default(),
        bridges: Some(BTreeMap::from([("us-br0".to_owned(), "us-br7".to_owned())])),
    };
    let twins = ProcessTwinHost::new(program(), options);
    let mut twin = twins.prepare("here", guest.recipe(), guest.layout(), &[]).expect("this host can");
    guest.pause().and_then(|()| guest.arm()).expect("it runs");
    let (mut capture, memory) = (Capture::default(), twin.memory());
    guest.capture(&mut capture, &mut PauseParts::default()).expect("it stands");
    let (all, mut bytes) = (PageSet::full(memory.pages()).iter().collect::<Vec<_>>(), Vec::new());
    guest.read_pages(&all, &mut bytes).expect("it is there");
    all.iter().zip(bytes.chunks(PAGE_SIZE)).for_each(|(&page, bytes)| memory.write(page, 0, bytes));
    twin.rehearse(&capture.device).expect("it loads");
    let activation = twin.activate(&capture.device).expect("it is the machine that it is said to be");
    assert_eq!(activation.relaunched, 0);
    twin.destroy().expect("it ends");
    println!("\nwent on");
}

#[test]
fn a_twin_goes_on_on_the_bridge_of_its_own_host() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: a network of its own takes root");
    }
    let helper = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().expect("it is there"))
        .args(["--ignored", "--exact", "helper_on_another_bridge", "--nocapture", "--test-threads=1"])
        .output();
    let helper = match helper {
        Ok(helper) => helper,
        Err(error) => return println!("skipped: unshare cannot be run: {error}"),
    };
    let said = String::from_utf8_lossy(&helper.stdout);
    assert!(helper.status.success() && said.contains("went on"), "{said}{}", String::from_utf8_lossy(&helper.stderr));
}

#[test]
fn a_host_that_cannot_have_the_machine_says_so_before_it_is_needed() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let machine = start("elsewhere", None);
    let guest: Box<dyn Guest> = Box::new(attach(&machine).expect("nobody is attached"));
    let twins = ProcessTwinHost::new(Program::new("/bin/false", &[]), TwinHostOptions::default());
    let refused = twins.prepare("nowhere", guest.recipe(), guest.layout(), &[]).map(drop);
    let error = refused.expect_err("its process makes no machine");
    assert!(error.message.contains("the microVM nowhere cannot be used: its process ended with code 1"), "{error}");
    assert_eq!(twins.twins(), Vec::<String>::new());
}

/// Found out by waiting 15 s.
#[test]
fn an_answer_that_comes_too_late_loses_no_page() {
    if std::env::var_os("UNDERSTUDY_LONG").is_none() {
        return println!("skipped: UNDERSTUDY_LONG is not set");
    }
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let machine = start("late", None);
    let mut guest: Box<dyn Guest> = Box::new(attach(&machine).expect("nobody is attached"));
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    guest.resume().expect("it stands");
    let page = abi::FREE / PAGE_SIZE as u64 + 9;
    machine.order(&[abi::order::FILL, u32::try_from(page).expect("small"), 9], PATIENCE).expect("the pilot works");
    signal(&machine, Signal::STOP);
    let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
    let error = guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect_err("nobody answers");
    assert_eq!(error.kind, GuestErrorKind::Failed, "{error}");
    guest.resume().expect("it is only told");
    signal(&machine, Signal::CONT);
    assert!(machine.is_running(), "it was let run after what came too late");
    // Whether it had gone on by itself, or by what it was told.
    guest.capture_epoch(false, 2, After::Run, &mut capture, &mut parts).expect("it answers again");
    assert_eq!(parts.ran_again, None, "the process does not know what was lost");
    assert!(capture.pages.contains(&page), "a page of the lost answer was lost");
    guest.resume().expect("it stands");
    machine.fence().fence().expect("it ends");
}

/// What [`the_death_of_its_protector_leaves_nothing_that_is_heard`] kills. Its standard input is the wire.
#[test]
#[ignore = "only the other tests start it, as another process"]
fn helper_protector() {
    let wire = std::io::stdin().as_fd().try_clone_to_owned().expect("a descriptor");
    let machine = start("orphan", Some(wire));
    emit(&machine, 1);
    let mut guest = attach(&machine).expect("nobody is attached");
    guest.pause().expect("it runs");
    guest.hold_output(1).expect("it stands");
    guest.resume().expect("it stands");
    emit(&machine, 3);
    let gate = guest.gate();
    assert!(gate.wait_output(Instant::now() + PATIENCE).is_some());
    println!("\npid {}", machine.process().pid());
    loop {
        std::thread::park();
    }
}

#[test]
fn the_death_of_its_protector_leaves_nothing_that_is_heard() {
    if let Some(missing) = missing() {
        return println!("skipped: {missing}");
    }
    let (ours, theirs) = UnixDatagram::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("it can");
    let mut protector = Command::new(std::env::current_exe().expect("it is there"))
        .args(["--ignored", "--exact", "helper_protector", "--nocapture", "--test-threads=1"])
        .stdin(OwnedFd::from(ours))
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = BufReader::new(protector.stdout.take().expect("piped")).lines();
    let pid = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("pid ")?.parse().ok()).expect("it tells");
    let microvm = PidFd::open(pid).expect("it lives");
    // Also one that stands still cannot outlive it.
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(raw, Signal::STOP).expect("it is ours");
    protector.kill().expect("it is ours");
    protector.wait().expect("it ends");
    assert!(microvm.wait_exit(PATIENCE), "the microVM has outlived its protector");
    let (mut heard, mut frame) = (Vec::new(), [0; 2048]);
    while let Ok(bytes) = theirs.recv(&mut frame) {
        heard.push(frame[..bytes][NUMBER].to_vec());
    }
    assert_eq!(heard, [1_u64.to_be_bytes()], "what was emitted before it was protected is heard, and nothing else");
}

#[test]
fn a_kernel_is_loaded_from_what_is_passed_open() {
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let (kernel, initrd) = (image.join("vmlinuz"), image.join("initrd.img"));
    if let Err(error) = host() {
        return println!("skipped: no /dev/kvm: {error}");
    }
    if !kernel.exists() {
        return println!("skipped: there is no guest image; cargo xtask setup");
    }
    let spec = Spec {
        name: "kernel".to_owned(),
        memory: 256 << 20,
        cpus: 1,
        net: None,
        disks: Vec::new(),
        dirty: Dirty::Bitmap,
    };
    let options = LinuxOptions { kernel, initrd: Some(initrd), cmdline: "console=ttyS0".to_owned() };
    // It need not run, which not every KVM can have it do at speed.
    let machine = match Microvm::start(&program(), spec, &Boot::Linux(options), None, GateBounds::default()) {
        Ok(machine) => machine,
        Err(error) if error.message.contains("KVM could not") => return println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    let mut guest = attach(&machine).expect("nobody is attached");
    let mut bytes = Vec::new();
    // Where a compressed kernel is put.
    guest.read_pages(&[256], &mut bytes).expect("it is there");
    assert!(bytes.iter().any(|&byte| byte != 0), "no kernel is in its memory");
    assert!(!machine.is_running(), "a new machine stands");
}
