//! The microVM with its pilot guest, protected by a loop of epochs and killed: every page, every byte of the disk, every answer.
//!
//! What is missing here is said: `skipped: ` and why.

mod net;
mod protect;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vmm_hooks::disk::DiskChange;
use vmm_hooks::guest::{Capture, Guest, GuestErrorKind, GuestEvent, PauseParts, Twin, TwinHost};
use vmm_hooks::kvm::pilot::{abi, check_worker, records};
use vmm_hooks::kvm::ring;
use vmm_hooks::kvm::twin::Join;
use vmm_hooks::kvm::{
    Dirty, DiskFile, GateBounds, KvmTwinHost, Machine, NetCard, PilotOptions, Spec, TwinHostOptions, attach, host,
};
use vmm_hooks::layout::PAGE_SIZE;

use net::Net;
use protect::Protected;

const PILOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/pilot/pilot");
/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 9, 2);
const MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];
/// The taps that a machine and its twin are on in turns.
const TAPS: [&str; 2] = ["tap0", "tap1"];

/// KVM, if the pilot can be run here.
fn means() -> Option<Arc<Kvm>> {
    let kvm = match host() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: no /dev/kvm: {error}");
            return None;
        }
    };
    if !Path::new(PILOT).exists() {
        println!("skipped: the pilot guest is not built; cargo xtask setup");
        return None;
    }
    Some(kvm)
}

fn spec(cpus: u64) -> Spec {
    Spec { name: "pilot".to_owned(), memory: abi::MEMORY_MIN, cpus, net: None, disks: Vec::new(), dirty: Dirty::Bitmap }
}

fn boot(kvm: &Arc<Kvm>, spec: Spec) -> Machine {
    let options = PilotOptions::default();
    let machine = Machine::pilot(kvm, spec, Path::new(PILOT), &options, None, GateBounds::default());
    let machine = machine.expect("this host can");
    machine.resume().expect("it is new");
    machine
}

/// Lets a worker write `pages` pages from `first` free page on.
fn work(machine: &Machine, cpu: u32, first: u32, pages: u32, pattern: u64, rate: u32) {
    let first = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small") + first;
    let pattern = u32::try_from(pattern).expect("small");
    let order = [abi::order::WORK, cpu, first, pages, pattern, rate];
    machine.order(&order, PATIENCE).unwrap_or_else(|error| panic!("{error}; {}", machine.serial()));
}

/// Checks two workers that write at once.
fn check_two(page: &mut dyn FnMut(u64) -> Vec<u8>) -> [u64; 2] {
    let [zero, one] = [0, 1].map(|cpu| check_worker(cpu, &mut *page).unwrap_or_else(|error| panic!("{error}")));
    assert!(zero.seen <= one.done && one.seen <= zero.done, "memory of two moments: {zero:?}, {one:?}");
    [zero.done, one.done]
}

#[test]
fn a_guest_that_writes_without_pause_is_whole_in_each_epoch_and_goes_on_after_a_kill() {
    let Some(kvm) = means() else { return };
    let machine = boot(&kvm, spec(2));
    work(&machine, 0, 0, 700, abi::SCATTERED, 200);
    work(&machine, 1, 1000, 500, abi::SEQUENTIAL, 200);
    whole_in_each_epoch(&machine, 40, Duration::from_millis(5));
}

#[test]
fn rings_that_become_full_within_an_epoch_lose_no_page() {
    let Some(kvm) = means() else { return };
    if let Err(why) = ring::check::of_host(&kvm, ring::check::Code::User) {
        println!("skipped: the rings of this host's KVM cannot be relied on: {why}");
        return;
    }
    // Each worker has more pages than a ring has entries.
    let memory = abi::FREE + 16_000 * PAGE_SIZE as u64;
    let machine = boot(&kvm, Spec { memory, dirty: Dirty::Ring, ..spec(2) });
    assert_eq!(machine.dirty_note(), None);
    work(&machine, 0, 0, 8000, abi::SCATTERED, 0);
    work(&machine, 1, 8000, 8000, abi::SEQUENTIAL, 0);
    whole_in_each_epoch(&machine, 8, Duration::from_millis(200));
    assert!(machine.rings_filled() > 0, "no ring was ever full");
}

/// Protects a machine with two workers, reads the copy of each epoch, ends it and lets the survivor go on.
fn whole_in_each_epoch(machine: &Machine, epochs: u32, length: Duration) {
    let host = KvmTwinHost::default();
    let mut protected = Protected::begin(machine, &host, "twin", Vec::new());
    let mut last = [0; 2];
    for _ in 0..epochs {
        protected.epoch(length);
        let memory = protected.memory();
        let done = check_two(&mut |number| {
            let mut page = vec![0; PAGE_SIZE];
            memory.read(number, &mut page);
            page
        });
        assert!(done[0] >= last[0] && done[1] >= last[1]);
        last = done;
    }
    assert!(last[0] > 100 && last[1] > 100, "the workers do not work: {last:?}");
    println!("{}", protected.figures());
    let (twin, _) = protected.kill();
    let survivor = host.machine("twin").expect("it was activated");
    let mut guest = attach(&survivor).expect("nobody is attached");
    let deadline = Instant::now() + PATIENCE;
    loop {
        guest.pause().expect("it runs");
        let done = check_two(&mut |number| {
            let mut page = Vec::new();
            guest.read_pages(&[number], &mut page).expect("it is there");
            page
        });
        guest.resume().expect("it stands");
        if done[0] > last[0] + 100 && done[1] > last[1] + 100 {
            break;
        }
        assert!(Instant::now() < deadline, "the survivor's workers stand at {done:?}; {}", survivor.serial());
    }
    twin.destroy().expect("it can be ended");
    assert!(host.twins().is_empty());
}

#[test]
fn no_kick_and_no_wake_up_is_lost_however_late_the_threads_come() {
    let Some(kvm) = means() else { return };
    let machine = boot(&kvm, spec(2));
    let mut guest = attach(&machine).expect("nobody is attached");
    let stop = AtomicBool::new(false);
    let first = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small");
    // The guest's longest wait is longer than any patience here: what is lost stays lost.
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
            });
        }
        for round in 0..400 {
            // Pauses of a guest that works, of one that begins to wait, and of one that waits.
            if round % 3 == 0 {
                machine.order(&[abi::order::FILL, first, round % 256], PATIENCE).expect("no wake-up is lost");
            }
            if round % 40 == 0 {
                // For the other vCPU, which the first one wakes.
                work(&machine, 1, 1, 8, abi::SEQUENTIAL, 1);
            }
            guest.pause().expect("no kick is lost");
            guest.resume().expect("it stands");
        }
        stop.store(true, Ordering::SeqCst);
    });
    let deadline = Instant::now() + PATIENCE;
    let mut page = Vec::new();
    while {
        guest.read_pages(&[abi::WORKERS / PAGE_SIZE as u64 + 1], &mut page).expect("it is there");
        page[40] == 0
    } {
        assert!(Instant::now() < deadline, "the second vCPU was not woken");
        std::thread::yield_now();
    }
    machine.fence().fence().expect("it ends");
}

/// What the kernel says of the threads called `vcpu...` and `net` of this process: their numbers, and whether each is confined.
fn machine_threads() -> Vec<(String, bool)> {
    let tasks = fs::read_dir("/proc/self/task").expect("a process has threads");
    let confined = |task: &Path| {
        let name = fs::read_to_string(task.join("comm")).ok()?;
        let status = fs::read_to_string(task.join("status")).ok()?;
        let is = |line: &str| status.lines().any(|its| its.split_whitespace().eq(line.split(' ')));
        let ours = name.starts_with("vcpu") || name == "net\n";
        let confined = is("Seccomp: 2") && is("NoNewPrivs: 1") && is("CapEff: 0000000000000000");
        ours.then(|| (task.file_name().unwrap_or_default().to_string_lossy().into_owned(), confined))
    };
    tasks.filter_map(|task| confined(&task.ok()?.path())).collect()
}

/// At least so many threads of machines are there, and each is confined, or will be: other tests' machines begin and end meanwhile.
fn all_are_confined(least: usize) {
    let seen = machine_threads();
    assert!(seen.len() >= least, "{seen:?}");
    let deadline = Instant::now() + PATIENCE;
    for (thread, _) in seen {
        while machine_threads().contains(&(thread.clone(), false)) {
            assert!(Instant::now() < deadline, "thread {thread} is not confined");
            std::thread::yield_now();
        }
    }
}

#[test]
fn the_threads_of_a_machine_may_do_nothing_but_run_it() {
    let Some(kvm) = means() else { return };
    let machine = boot(&kvm, spec(2));
    let page = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small");
    machine.order(&[abi::order::FILL, page, 3], PATIENCE).expect("the pilot works");
    all_are_confined(2);
    machine.fence().fence().expect("its threads end");
}

#[test]
fn a_guest_that_ends_itself_is_gone_in_words() {
    let Some(kvm) = means() else { return };
    let machine = boot(&kvm, spec(2));
    let mut guest = attach(&machine).expect("nobody is attached");
    machine.order(&[abi::order::EXIT, 7], PATIENCE).expect_err("it ends before it can say that it did");
    let error = guest.pause().expect_err("it has ended");
    assert_eq!(error.kind, GuestErrorKind::Gone);
    assert!(error.message.contains("code 7"), "{error}");
    let events = guest.events();
    let [GuestEvent::Died { how }] = &events[..] else { panic!("{events:?}") };
    assert!(how.contains("code 7"), "{how}");
    machine.fence().fence().expect("its threads end");
}

#[test]
fn a_guest_that_shuts_itself_down_stands_and_can_be_captured_a_last_time() {
    let Some(kvm) = means() else { return };
    let machine = boot(&kvm, spec(2));
    let mut guest = attach(&machine).expect("nobody is attached");
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    guest.resume().expect("it stands");
    let page = abi::FREE / PAGE_SIZE as u64;
    let fill = [abi::order::FILL, u32::try_from(page).expect("small"), 3];
    machine.order(&fill, PATIENCE).expect("the pilot works");
    machine.order(&[abi::order::EXIT, 0], PATIENCE).expect_err("it is off before it can say that it is");
    assert_eq!(guest.events(), [GuestEvent::Shutdown]);
    assert!(!machine.is_running() && !guest.fence().ended());
    guest.pause().expect("it stands already");
    let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
    guest.capture(&mut capture, &mut parts).expect("it is whole");
    assert!(capture.pages.contains(&page), "what it wrote last is there");
    Box::new(guest).detach().expect("there is nothing to leave");
    assert!(!machine.is_running(), "what is off stays off");
    machine.fence().fence().expect("its threads end");
}

#[test]
fn a_capture_that_fails_gives_pages_and_writes_to_the_next_one() {
    let Some(kvm) = means() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).expect("room");
    let disks = vec![DiskFile { name: "disk".to_owned(), path }];
    let machine = boot(&kvm, Spec { disks, ..spec(2) });
    let mut guest = attach(&machine).expect("nobody is attached");
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    guest.resume().expect("it stands");
    // The first copy is not there yet: a capture harvests, saves, copies, and then finds that it is not whole.
    guest.mirror_disks().expect("it works");
    let page = u32::try_from(abi::FREE / PAGE_SIZE as u64).expect("small");
    let (mut capture, mut parts) = (Capture::default(), PauseParts::default());
    for (number, byte) in (0..).zip([5, 6]) {
        machine.order(&[abi::order::FILL, page + number, byte], PATIENCE).expect("the pilot works");
        machine.order(&[abi::order::WRITE, 0, number, 1, byte], PATIENCE).expect("the pilot works");
        guest.pause().expect("it runs");
        let error = guest.capture(&mut capture, &mut parts).expect_err("the disk's first copy is missing");
        assert_eq!(error.kind, GuestErrorKind::Failed);
        guest.resume().expect("it stands");
    }
    let mut writes = Vec::new();
    while !guest.mirror_progress().expect("it is whole").ready {
        guest.take_writes(&mut writes, 1, Duration::ZERO);
    }
    guest.pause().expect("it runs");
    guest.capture(&mut capture, &mut parts).expect("all is there");
    for (number, byte) in (0..).zip([5, 6]) {
        let at = capture.pages.binary_search(&u64::from(page + number)).expect("no page is lost");
        assert!(capture.bytes[at * PAGE_SIZE..][..PAGE_SIZE].iter().all(|&found| found == byte));
    }
    writes.append(&mut capture.disk);
    let mut disk = vec![9; 1 << 20];
    for write in &writes {
        let range = usize::try_from(write.offset).expect("small")..;
        match &write.change {
            DiskChange::Data(data) => disk[range][..data.len()].copy_from_slice(data),
            DiskChange::Zero(bytes) => disk[range][..usize::try_from(*bytes).expect("small")].fill(0),
        }
    }
    let truth = fs::read(directory.path().join("disk")).expect("its image");
    assert!(disk == truth && truth[0] == 5 && truth[512] == 6, "the writes do not make the disk");
    machine.fence().fence().expect("it ends");
}

/// A client that sets one key after the other; each is counted when it is acknowledged.
fn client(net: &Net, acknowledged: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let enter = net.clone();
    std::thread::spawn(move || {
        enter.enter();
        // Its first copy takes its time on a busy machine, and it answers nobody meanwhile.
        let since = Instant::now();
        let stream = loop {
            match TcpStream::connect((ADDRESS, 6379)) {
                Ok(stream) => break stream,
                Err(error) => assert!(since.elapsed() < PATIENCE, "the pilot does not listen: {error}"),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
        let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
        let mut stream = stream;
        while !stop.load(Ordering::SeqCst) {
            let number = acknowledged.load(Ordering::SeqCst) + 1;
            let (key, value) = (format!("key{number}"), format!("value{number}"));
            let request = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n{value}\r\n", key.len(), value.len());
            stream.write_all(request.as_bytes()).expect("the connection lives");
            let mut answer = String::new();
            reader.read_line(&mut answer).expect("the connection lives");
            assert_eq!(answer, "+OK\r\n");
            acknowledged.store(number, Ordering::SeqCst);
        }
        // What was acknowledged is there, also after a failover, on the same connection.
        let number = acknowledged.load(Ordering::SeqCst);
        stream.write_all(b"DBSIZE\r\n").expect("the connection lives");
        let mut answer = String::new();
        reader.read_line(&mut answer).expect("the connection lives");
        assert_eq!(answer, format!(":{number}\r\n"));
        for number in [1, number / 2, number] {
            stream.write_all(format!("GET key{number}\r\n").as_bytes()).expect("the connection lives");
            let mut lines = [String::new(), String::new()];
            for line in &mut lines {
                reader.read_line(line).expect("the connection lives");
            }
            assert_eq!(lines[1], format!("value{number}\r\n"));
        }
    })
}

#[test]
fn no_acknowledged_write_and_no_connection_is_lost_in_failovers_in_a_row_and_the_disks_log_tells_the_same() {
    let Some(kvm) = means() else { return };
    if let Err(missing) = Net::possible() {
        println!("skipped: {missing}");
        return;
    }
    let net = Net::make();
    net.enter();
    let directory = tempfile::tempdir().expect("a directory");
    let image = |name: &str| -> PathBuf {
        let path = directory.path().join(name);
        fs::File::create(&path).and_then(|file| file.set_len(4 << 20)).expect("room");
        path
    };
    let mut image_now = image("first");
    let spec = Spec {
        net: Some(NetCard { mac: MAC, tap: TAPS[0].to_owned(), bridge: None }),
        disks: vec![DiskFile { name: "log".to_owned(), path: image_now.clone() }],
        ..spec(1)
    };
    let options = PilotOptions { address: ADDRESS, prefix: 24, gateway: None, log: true };
    let wire = vmm_hooks::sys::tap::open(TAPS[0]).expect("the tap is ours");
    let bounds = GateBounds::default();
    let mut machine =
        Machine::pilot(&kvm, spec, Path::new(PILOT), &options, Some(wire), bounds).expect("this host can");
    machine.resume().expect("it is new");
    let (acknowledged, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let client = client(&net, Arc::clone(&acknowledged), Arc::clone(&stop));
    let written = || acknowledged.load(Ordering::SeqCst);
    let healthy = |since: Instant, machine: &Machine| {
        assert!(since.elapsed() < PATIENCE, "{} writes; {}", written(), machine.serial());
        assert!(!client.is_finished(), "the client failed");
    };
    let (mut twin_now, mut epochs) = (None::<Box<dyn Twin>>, 0);
    let failovers = if std::env::var_os("UNDERSTUDY_LONG").is_some() { 100 } else { 3 };
    for round in 0..failovers {
        let name = format!("twin{round}");
        let tap = TAPS[(round + 1) % TAPS.len()];
        let join: Join = Arc::new(move |_| vmm_hooks::sys::tap::open(tap));
        let host = KvmTwinHost::new(TwinHostOptions { join, ..TwinHostOptions::default() });
        image_now = image(&name);
        let mut protected = Protected::begin(&machine, &host, &name, vec![image_now.clone()]);
        // A vCPU, and the one that receives.
        all_are_confined(2);
        let (goal, since) = (written() + 60, Instant::now());
        while written() < goal {
            protected.epoch(Duration::from_millis(20));
            healthy(since, &machine);
        }
        println!("{}", protected.figures());
        let (twin, count) = protected.kill();
        epochs += count;
        // Its own tap is free again when nobody has it any more.
        machine = host.machine(&name).expect("it was activated");
        if let Some(killed) = twin_now.replace(twin) {
            killed.destroy().expect("it has ended");
        }
    }
    let (goal, since) = (written() + 60, Instant::now());
    while written() < goal {
        healthy(since, &machine);
        std::thread::yield_now();
    }
    stop.store(true, Ordering::SeqCst);
    client.join().expect("no acknowledged write was lost");
    twin_now.expect("there was a failover").destroy().expect("it can be ended");
    let log = records(&fs::read(image_now).expect("its image")).expect("a whole log");
    println!(
        "{} writes acknowledged over {epochs} epochs and {failovers} failovers, {} in the log",
        written(),
        log.len()
    );
    assert_eq!(log.len() as u64, written());
    for (number, record) in (1..).zip(&log) {
        assert_eq!(String::from_utf8_lossy(record), format!("key{number}=value{number}"));
    }
}

#[test]
fn a_twin_without_its_network_is_refused_and_can_be_activated_later() {
    let Some(kvm) = means() else { return };
    let (ours, _theirs) = std::os::unix::net::UnixDatagram::pair().expect("a pair");
    let card = NetCard { mac: MAC, tap: "nowhere".to_owned(), bridge: None };
    let spec = Spec { net: Some(card), ..spec(1) };
    let options = PilotOptions::default();
    let bounds = GateBounds::default();
    let machine = Machine::pilot(&kvm, spec, Path::new(PILOT), &options, Some(ours.into()), bounds);
    let machine = machine.expect("this host can");
    machine.resume().expect("it is new");
    let there = Arc::new(AtomicBool::new(false));
    let join: Join = {
        let there = Arc::clone(&there);
        Arc::new(move |_: &NetCard| {
            if !there.load(Ordering::SeqCst) {
                return Err(std::io::Error::other("no such interface"));
            }
            std::os::unix::net::UnixDatagram::pair().map(|(ours, _)| ours.into())
        })
    };
    let host = KvmTwinHost::new(TwinHostOptions { join, ..TwinHostOptions::default() });
    let mut guest = attach(&machine).expect("nobody is attached");
    let mut twin = host.prepare("twin", guest.recipe(), guest.layout(), &[]).expect("this host can");
    guest.pause().expect("it runs");
    guest.arm().expect("it stands");
    let (mut capture, mut parts) = Default::default();
    guest.capture(&mut capture, &mut parts).expect("it stands");
    protect::copy_all(&mut guest, twin.memory().as_ref());
    guest.fence().fence().expect("it ends");
    let error = twin.activate(&capture.device).expect_err("there is no network");
    assert_eq!(error.kind, GuestErrorKind::Failed);
    assert!(error.message.contains("no such interface"), "{error}");
    there.store(true, Ordering::SeqCst);
    twin.activate(&capture.device).expect("now there is");
    twin.destroy().expect("it can be ended");
}
