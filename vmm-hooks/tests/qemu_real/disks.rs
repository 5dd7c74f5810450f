//! Mirrored disks of real QEMUs: what was taken is what is on the disk at every stop, or the capture says that it is not.
//!
//! The guest is the project's own image (`cargo xtask setup`) with another first program that writes to its disk; where it
//! is not there, and for buses that it has no driver for, QEMU writes by itself on order of a second monitor.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_hooks::disk::{DiskChange, DiskWrite};
use vmm_hooks::guest::{Capture, Guest, GuestErrorKind, PauseParts};
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::qemu::{AttachOptions, CheckLevel, QemuGuest, attach, doctor, remove_leftovers};

use crate::{QEMU, Qemu, SECOND, SOON, qmp, read_all, status, wait_for};

/// The size of each disk: odd in MiB, so that its end is not aligned to anything large.
const BYTES: usize = 17 << 20;

/// Bytes that are taken at once.
const BATCH: usize = 1 << 20;

/// Stops of one test.
const STOPS: usize = 12;

fn image(dir: &Path, name: &str, format: &str) -> Option<PathBuf> {
    let path = dir.join(name);
    if format == "raw" {
        let file = fs::File::create(&path).expect("room");
        file.set_len(BYTES as u64).expect("room");
        // Something in the middle of a hole.
        file.write_all_at(&[7; 70_000], 5_000_000).expect("room");
        return Some(path);
    }
    let made = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg(BYTES.to_string()).status();
    match made {
        Ok(status) if status.success() => Some(path),
        _ => {
            println!("skipped: no qemu-img");
            None
        }
    }
}

/// What the guest sees on a disk of a QEMU that stands.
fn content(path: &Path, format: &str) -> Vec<u8> {
    if format == "raw" {
        return fs::read(path).expect("an image");
    }
    let raw = path.with_extension("raw");
    let done = Command::new("qemu-img").args(["convert", "-U", "-f", format, "-O", "raw"]).arg(path).arg(&raw).status();
    assert!(done.expect("it was there").success());
    fs::read(raw).expect("just made")
}

/// Images and their formats.
type Disks = Vec<(PathBuf, &'static str)>;

/// What a standby holds, and what it was told, in order: disk, offset, bytes, whether they are zeroes.
struct Images(Vec<Vec<u8>>, Vec<(u32, u64, u64, bool)>);

impl Images {
    fn unknown(disks: usize) -> Self {
        Self(vec![vec![0xee; BYTES]; disks], Vec::new())
    }

    fn apply(&mut self, writes: &[DiskWrite]) {
        for write in writes {
            self.1.push((write.disk, write.offset, write.bytes(), matches!(write.change, DiskChange::Zero(_))));
            let start = usize::try_from(write.offset).expect("small");
            let range = &mut self.0[write.disk as usize][start..start + usize::try_from(write.bytes()).expect("small")];
            match &write.change {
                DiskChange::Data(data) => range.copy_from_slice(data),
                DiskChange::Zero(_) => range.fill(0),
            }
        }
    }

    fn are(&self, disks: &[(PathBuf, &str)]) {
        for (copy, (path, format)) in self.0.iter().zip(disks) {
            let truth = content(path, format);
            assert_eq!(truth.len(), copy.len());
            let differs = |from: usize| truth[from..].iter().zip(&copy[from..]).position(|(truth, copy)| truth != copy);
            if let Some(at) = differs(0) {
                let bytes = truth[at..].iter().zip(&copy[at..]).take_while(|(truth, copy)| truth != copy).count();
                let (path, was, is) = (path.display(), truth[at], copy[at]);
                panic!("{path} differs at {at} for {bytes} bytes: {was} became {is}; told was {:?}", self.1);
            }
        }
    }
}

/// What a guest could not do while it stands, the load does not either.
fn held<T>(load: Option<&Load>, act: impl FnOnce() -> T) -> T {
    let _held = load.map(|load| load.holds.lock().expect("no panic there"));
    act()
}

/// Takes until the first copy is complete.
fn first_copy(guest: &mut QemuGuest, images: &mut Images) {
    let deadline = Instant::now() + SOON;
    while !guest.mirror_progress().expect("a healthy mirror").ready {
        assert!(Instant::now() < deadline, "the first copy does not end");
        let mut writes = Vec::new();
        guest.take_writes(&mut writes, BATCH, Duration::from_millis(5));
        images.apply(&writes);
    }
}

fn arm(guest: &mut QemuGuest) {
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.resume().expect("resumes");
}

/// A stop at which the copies must be the disks. How many writes it had. What orders the load would go on meanwhile, but it
/// holds back; what it has ordered is under way.
fn stop_and_compare(
    guest: &mut QemuGuest,
    images: &mut Images,
    disks: &[(PathBuf, &str)],
    load: Option<&Load>,
) -> usize {
    let _held = load.map(|load| load.holds.lock().expect("no panic there"));
    let mut capture = Capture::default();
    guest.pause().expect("pauses");
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    images.apply(&capture.disk);
    images.are(disks);
    guest.resume().expect("resumes");
    capture.disk.len()
}

/// Writes on order of a second monitor, several at a time, until it is dropped.
struct Load {
    over: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    /// Whoever has it keeps the load from ordering more.
    holds: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn start(qemu: &Qemu, drives: &[&str]) -> Self {
        let (over, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let drives: Vec<String> = drives.iter().map(|&drive| drive.to_owned()).collect();
        let socket = qemu.second();
        let holds = Arc::new(Mutex::new(()));
        let thread = thread::spawn({
            let (over, rounds, holds) = (Arc::clone(&over), Arc::clone(&rounds), Arc::clone(&holds));
            move || {
                use std::io::{BufRead, BufReader, Write};
                let stream = std::os::unix::net::UnixStream::connect(socket).expect("QEMU listens");
                stream.set_read_timeout(Some(SOON)).expect("a socket");
                let mut answers = BufReader::new(stream.try_clone().expect("a handle"));
                let mut line = String::new();
                let mut ask = |text: &str| {
                    writeln!(&stream, "{text}").expect("QEMU reads");
                    loop {
                        line.clear();
                        answers.read_line(&mut line).expect("QEMU answers");
                        if line.contains("\"return\"") || line.contains("\"error\"") {
                            return;
                        }
                    }
                };
                ask(r#"{"execute":"qmp_capabilities"}"#);
                let mut random = 1_u64;
                let mut next = |below: u64| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (random >> 33) % below
                };
                while !over.load(Ordering::SeqCst) {
                    let held = holds.lock();
                    let drive = &drives[usize::try_from(next(drives.len() as u64)).expect("few")];
                    let offset = next(BYTES as u64 / 512 - 256) * 512;
                    let bytes = (1 + next(128)) * 512;
                    let write = match next(4) {
                        0 => format!("aio_write -z {offset} {bytes}"),
                        1 => format!("discard {offset} {bytes}"),
                        _ => format!("aio_write -P {} {offset} {bytes}", 1 + next(255)),
                    };
                    ask(&format!(
                        r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"qemu-io {drive} \"{write}\""}}}}"#
                    ));
                    rounds.fetch_add(1, Ordering::SeqCst);
                    drop(held);
                    // Whoever waits for it has its turn.
                    thread::yield_now();
                }
            }
        });
        let load = Self { over, rounds, holds, thread: Some(thread) };
        load.goes_on();
        load
    }

    /// Returns once more was written.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        wait_for("a write", || self.rounds.load(Ordering::SeqCst) > before + 8);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the load failed");
        }
    }
}

/// Has the second monitor do this.
fn order(qemu: &Qemu, line: &str) {
    let line = format!(r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"{line}"}}}}"#);
    qmp(&qemu.second(), &line);
}

/// A guest whose disks are joined to it in this way, under writes that QEMU makes.
fn equal_at_every_stop(arguments: &[&str], drives: &[&str], formats: &[&'static str]) {
    let dir = tempfile::Builder::new().prefix("qemu-disks").tempdir().expect("a directory");
    let disks: Option<Vec<(PathBuf, &str)>> = formats
        .iter()
        .enumerate()
        .map(|(at, &format)| Some((image(dir.path(), &format!("d{at}"), format)?, format)))
        .collect();
    let Some(disks) = disks else { return };
    let arguments: Vec<String> =
        arguments.iter().map(|argument| argument.replace("IMAGES", &dir.path().display().to_string())).collect();
    let mut all = vec!["-M", "pc", "-nic", "none", "-qmp", SECOND];
    all.extend(arguments.iter().map(String::as_str));
    let Some(qemu) = Qemu::start(&all) else { return };
    let nodes = || {
        let mut nodes = qmp(&qemu.second(), r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#);
        // How it is cached and how large it has grown are no trace.
        for node in nodes.as_array_mut().expect("a list") {
            node["image"].take();
        }
        nodes
    };
    let before = nodes();
    let mut guest = qemu.attach();
    assert_eq!(guest.recipe().disks.len(), disks.len());
    assert!(guest.recipe().disks.iter().all(|disk| disk.bytes == BYTES as u64));
    let load = Load::start(&qemu, drives);
    let mut images = Images::unknown(disks.len());
    held(Some(&load), || guest.mirror_disks()).expect("mirrors");
    first_copy(&mut guest, &mut images);
    arm(&mut guest);
    let mut writes = 0;
    for _ in 0..STOPS {
        load.goes_on();
        writes += stop_and_compare(&mut guest, &mut images, &disks, Some(&load));
    }
    assert!(writes >= STOPS, "{writes} writes");
    held(Some(&load), || guest.unmirror_disks()).expect("unmirrors");
    load.goes_on();
    drop(load);
    assert_eq!(nodes(), before);
    let jobs = qmp(&qemu.second(), r#"{"execute":"query-block-jobs"}"#);
    assert_eq!(jobs.as_array().map(Vec::len), Some(0));
    // A second time, left to detaching.
    guest.mirror_disks().expect("mirrors");
    let mut images = Images::unknown(disks.len());
    first_copy(&mut guest, &mut images);
    stop_and_compare(&mut guest, &mut images, &disks, None);
    Box::new(guest).detach().expect("leaves it");
    assert_eq!(nodes(), before);
    assert_eq!(status(&qemu.second()), "running");
}

#[test]
fn a_raw_virtio_disk_is_its_copy_at_every_stop() {
    equal_at_every_stop(
        &["-drive", "file=IMAGES/d0,format=raw,if=virtio,id=a,cache=none,discard=unmap"],
        &["a"],
        &["raw"],
    );
}

#[test]
fn a_qcow2_virtio_disk_is_its_copy_at_every_stop() {
    equal_at_every_stop(&["-drive", "file=IMAGES/d0,format=qcow2,if=virtio,id=a"], &["a"], &["qcow2"]);
}

#[test]
fn two_disks_on_ide_and_scsi_are_their_copies_at_every_stop() {
    let arguments = [
        "-drive",
        "file=IMAGES/d0,format=raw,if=ide",
        "-device",
        "virtio-scsi-pci,id=s",
        "-drive",
        "file=IMAGES/d1,format=raw,if=none,id=b,cache=unsafe",
        "-device",
        "scsi-hd,drive=b,bus=s.0",
    ];
    equal_at_every_stop(&arguments, &["ide0-hd0", "b"], &["raw", "raw"]);
}

#[test]
fn disks_made_with_blockdev_are_their_copies_at_every_stop() {
    let arguments = [
        "-blockdev",
        "driver=file,node-name=f0,filename=IMAGES/d0",
        "-blockdev",
        "driver=qcow2,node-name=q0,file=f0",
        "-device",
        "virtio-blk-pci,drive=q0,id=v0",
        "-object",
        "iothread,id=io",
        "-blockdev",
        r#"{"driver":"raw","node-name":"r1","file":{"driver":"file","filename":"IMAGES/d1"}}"#,
        "-device",
        "virtio-blk-pci,drive=r1,id=v1,iothread=io",
    ];
    // By their devices: QEMU would write to a node past the mirror above it.
    let drives = ["-d /machine/peripheral/v0/virtio-backend", "-d /machine/peripheral/v1/virtio-backend"];
    equal_at_every_stop(&arguments, &drives, &["qcow2", "raw"]);
}

/// A machine with one raw virtio disk and a second monitor, attached, and its image.
fn one_disk(more: &[&str]) -> Option<(tempfile::TempDir, Qemu, Disks)> {
    one_disk_that_holds(None, more)
}

/// The same full of this byte. An image is made before its QEMU is: one that opens it meanwhile takes it for as long as it is
/// at that moment, for good.
fn one_disk_that_holds(byte: Option<u8>, more: &[&str]) -> Option<(tempfile::TempDir, Qemu, Disks)> {
    let dir = tempfile::Builder::new().prefix("qemu-disks").tempdir().expect("a directory");
    let path = image(dir.path(), "d0", "raw")?;
    if let Some(byte) = byte {
        fs::write(&path, vec![byte; BYTES]).expect("room");
    }
    let drive = format!("file={},format=raw,if=virtio,id=a", path.display());
    let qemu = Qemu::start(&[&["-M", "pc", "-nic", "none", "-qmp", SECOND, "-drive", &drive], more].concat())?;
    Some((dir, qemu, vec![(path, "raw")]))
}

#[test]
fn a_connection_that_is_cut_fails_every_capture_until_the_mirror_is_begun_anew() {
    let Some((_dir, qemu, disks)) = one_disk(&[]) else { return };
    let mut guest = qemu.attach();
    let load = Load::start(&qemu, &["a"]);
    held(Some(&load), || guest.mirror_disks()).expect("mirrors");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    arm(&mut guest);
    stop_and_compare(&mut guest, &mut images, &disks, Some(&load));
    guest.cut_disk_mirrors();
    for _ in 0..3 {
        guest.pause().expect("QEMU is not frozen");
        let failed = guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect_err("a write may miss");
        assert_eq!(failed.kind, GuestErrorKind::Failed);
        assert!(failed.message.contains("mirror") && failed.advice.contains("anew"), "{failed}: {}", failed.advice);
        guest.resume().expect("resumes");
        // The guest's own writes succeed.
        load.goes_on();
    }
    guest.mirror_progress().expect_err("it broke");
    held(Some(&load), || guest.unmirror_disks()).expect("it goes");
    held(Some(&load), || guest.mirror_disks()).expect("mirrors");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    stop_and_compare(&mut guest, &mut images, &disks, Some(&load));
    drop(load);
    Box::new(guest).detach().expect("leaves it");
}

#[test]
fn writes_that_nobody_takes_wait_and_never_freeze_a_stop() {
    let Some((_dir, qemu, disks)) = one_disk(&[]) else { return };
    let mut guest = qemu.attach();
    guest.mirror_disks().expect("mirrors");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    arm(&mut guest);
    stop_and_compare(&mut guest, &mut images, &disks, None);
    // From the next write on every answer waits, for longer than this test.
    guest.bound_disk_log(0, 64 << 20, SOON * 2);
    for _ in 0..3 {
        (0..4).for_each(|at| order(&qemu, &format!(r#"qemu-io a \"aio_write -P 9 {} 4096\""#, at * 4096)));
        let started = Instant::now();
        guest.pause().expect("pauses");
        assert!(started.elapsed() < SOON / 6, "the stop took {:?}", started.elapsed());
        let mut capture = Capture::default();
        guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
        assert_eq!(capture.disk.len(), 4, "none is missing");
        images.apply(&capture.disk);
        images.are(&disks);
        guest.resume().expect("resumes");
    }
    // Leaving does not wait for anybody either.
    order(&qemu, r#"qemu-io a \"aio_write -P 9 0 4096\""#);
    Box::new(guest).detach().expect("leaves it");
    assert_eq!(status(&qemu.second()), "running");
}

#[test]
fn a_pause_in_the_middle_of_the_first_copy_neither_hangs_nor_runs_over() {
    let Some((_dir, qemu, disks)) = one_disk_that_holds(Some(5), &[]) else { return };
    let mut guest = qemu.attach();
    arm(&mut guest);
    // A log that holds a part of the disk alone, and answers that wait longer than this test.
    guest.bound_disk_log(1 << 20, 64 << 20, SOON * 2);
    guest.mirror_disks().expect("mirrors");
    for _ in 0..3 {
        guest.pause().expect("pauses");
        if guest.mirror_progress().expect("a healthy mirror").ready {
            break;
        }
        // It may be complete by now, but what comes of it is not lost then.
        if let Err(failed) = guest.capture(&mut Capture::default(), &mut PauseParts::default()) {
            assert!(failed.message.contains("not complete"), "{failed}");
        } else {
            println!("skipped: the first copy was faster than the test");
            return;
        }
        guest.resume().expect("resumes");
    }
    guest.pause().expect("pauses");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    let mut capture = Capture::default();
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    images.apply(&capture.disk);
    images.are(&disks);
    Box::new(guest).detach().expect("leaves it");
    assert_eq!(status(&qemu.second()), "running");
}

#[test]
fn a_log_that_runs_over_breaks_the_mirror_and_lets_the_guest_go_on() {
    let Some((_dir, qemu, disks)) = one_disk(&[]) else { return };
    let mut guest = qemu.attach();
    guest.mirror_disks().expect("mirrors");
    first_copy(&mut guest, &mut Images::unknown(1));
    arm(&mut guest);
    stop_and_compare(&mut guest, &mut Images(vec![content(&disks[0].0, "raw")], Vec::new()), &disks, None);
    guest.bound_disk_log(64 << 10, 256 << 10, Duration::ZERO);
    let load = Load::start(&qemu, &["a"]);
    wait_for("the end of the log", || guest.mirror_progress().is_err());
    load.goes_on();
    guest.pause().expect("pauses");
    let failed = guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect_err("writes are missing");
    assert!(failed.message.contains("faster"), "{failed}");
    drop(load);
    Box::new(guest).detach().expect("leaves it");
    assert_eq!(status(&qemu.second()), "running");
}

#[test]
fn a_qemu_that_runs_as_another_user_reaches_us() {
    use std::os::unix::fs::PermissionsExt;
    let help = Command::new(QEMU).arg("--help").output().map(|help| String::from_utf8_lossy(&help.stdout).into_owned());
    // QEMU 10 has another name for it.
    let older = help.is_ok_and(|help| help.contains("-runas"));
    let steps_down = if older { ["-runas", "nobody"] } else { ["-run-with", "user=nobody"] };
    let Some((dir, qemu, disks)) = one_disk(&steps_down) else { return };
    // QEMU opens the image anew when a mirror goes, and would end if it could not.
    let refused = attach(&qemu.target(), &AttachOptions::default()).expect_err("it cannot open its image");
    assert!(refused.message.contains("may not open"), "{refused}");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).expect("ours");
    fs::set_permissions(&disks[0].0, fs::Permissions::from_mode(0o666)).expect("ours");
    let mut guest = qemu.attach();
    guest.mirror_disks().expect("mirrors");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    arm(&mut guest);
    stop_and_compare(&mut guest, &mut images, &disks, None);
    let left = Box::new(guest).detach();
    assert!(left.is_ok(), "{left:?}: {}", fs::read_to_string(qemu.log()).unwrap_or_default());
    assert_eq!(status(&qemu.second()), "running");
}

#[test]
fn mirrors_come_and_go_while_writes_are_under_way() {
    let dir = tempfile::Builder::new().prefix("qemu-disks").tempdir().expect("a directory");
    let path = dir.path().join("d0");
    fs::File::create(&path).and_then(|file| file.set_len(1 << 30)).expect("room");
    // Writes that take their time, and memory that is gone when it is freed: who uses it afterwards ends.
    let drive = format!("file={},format=raw,if=virtio,id=a,cache=directsync", path.display());
    let arguments = ["-M", "pc", "-nic", "none", "-qmp", SECOND, "-drive", &drive];
    let Some(qemu) = Qemu::start_with(&[("MALLOC_MMAP_THRESHOLD_", "2048")], &arguments) else { return };
    let mut guest = qemu.attach();
    let write = || {
        for at in 0..12 {
            let line = format!(r#"qemu-io a \"aio_write -P 9 {}M 1M\""#, at * 2);
            order(&qemu, &line);
        }
    };
    for _ in 0..8 {
        write();
        guest.mirror_disks().expect("mirrors");
        while !guest.mirror_progress().expect("a healthy mirror").ready {
            guest.take_writes(&mut Vec::new(), BATCH, Duration::from_millis(5));
        }
        write();
        guest.unmirror_disks().expect("unmirrors");
    }
    Box::new(guest).detach().expect("leaves it");
    assert_eq!(status(&qemu.second()), "running");
}

#[test]
fn what_a_dead_agents_mirror_left_is_removed() {
    let Some((_dir, qemu, disks)) = one_disk(&[]) else { return };
    let mut guest = qemu.attach();
    let load = Load::start(&qemu, &["a"]);
    held(Some(&load), || guest.mirror_disks()).expect("mirrors");
    first_copy(&mut guest, &mut Images::unknown(1));
    drop(guest);
    load.goes_on();
    let refused = attach(&qemu.target(), &AttachOptions::default()).expect_err("something was left");
    assert!(refused.message.contains("understudy-"), "{refused}");
    let removed = held(Some(&load), || remove_leftovers(&qemu.target())).expect("removes them");
    load.goes_on();
    drop(load);
    assert_eq!(status(&qemu.second()), "running");
    assert!(removed.iter().any(|what| what.contains("understudy-nbd")), "{removed:?}");
    let mut guest = qemu.attach();
    guest.mirror_disks().expect("mirrors");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    arm(&mut guest);
    stop_and_compare(&mut guest, &mut images, &disks, None);
    Box::new(guest).detach().expect("leaves it");
}

#[test]
fn the_checklist_says_what_is_mirrored_and_what_cannot_be() {
    let dir = tempfile::tempdir().expect("a directory");
    let names = ["good", "shared", "floppy", "cd"];
    for name in names {
        image(dir.path(), name, "raw");
    }
    let file = |name: &str, rest: &str| format!("file={},format=raw,{rest}", dir.path().join(name).display());
    let drives = [
        file("good", "if=virtio,id=good"),
        file("shared", "if=none,id=shared"),
        file("floppy", "if=floppy,id=floppy"),
        file("cd", "media=cdrom,id=cd"),
    ];
    let mut arguments = vec!["-M", "pc", "-nic", "none", "-device", "virtio-blk-pci,drive=shared,share-rw=on"];
    drives.iter().for_each(|drive| arguments.extend(["-drive", drive]));
    let Some(qemu) = Qemu::start(&arguments) else { return };
    let list = doctor(Some(&qemu.target()));
    let found = |name: &str| list.iter().find(|check| check.name == format!("drive {name}")).expect(name);
    assert_eq!(found("good").level, CheckLevel::Ok);
    assert!(found("good").message.contains("mirrored: 17 MiB"), "{}", found("good").message);
    for (name, words) in [("shared", "share-rw"), ("floppy", "floppy")] {
        assert_eq!(found(name).level, CheckLevel::Refusal, "{name}");
        assert!(found(name).message.contains(words), "{}", found(name).message);
    }
    assert_eq!(found("cd").level, CheckLevel::Warning);
}

/// The first program of a guest that writes to its first disk, or reads it, without end.
const LOAD_INIT: &str = r"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t devtmpfs dev /dev
for module in $($b cat /lib/modules/order); do $b insmod /lib/modules/$module.ko; done
echo READY
n=1
while true; do
  n=$(( (n * 7919 + 13) % 4000 ))
  case $(( n % 5 )) in
    4) $b dd if=/dev/zero of=/dev/vda bs=1M count=8 seek=$(( n % 9 )) conv=notrunc 2>/dev/null; $b sync ;;
    0) $b dd if=/dev/zero of=/dev/vda bs=4k count=16 seek=$n conv=notrunc,fsync 2>/dev/null ;;
    1) $b dd if=/dev/vda of=/dev/null bs=64k count=64 skip=$(( n / 32 )) 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches ;;
    *) $b dd if=/dev/urandom of=/dev/vda bs=512 count=$(( n % 97 + 1 )) seek=$(( n * 8 )) conv=notrunc,fsync 2>/dev/null ;;
  esac
done
";

/// One file as an archive that the kernel unpacks after the image's own.
fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, content) in [(name, 0o100_755, content), ("TRAILER!!!", 0, &b""[..])] {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        fields.iter().for_each(|field| archive.extend(format!("{field:08X}").bytes()));
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// A Linux guest that uses its disk by itself. Memory is compared, too: with `cache=none` reads go straight into it.
fn a_linux_guest(format: &'static str, options: &str) {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let guest_dir = target.join("guest");
    let Ok(mut initrd) = fs::read(guest_dir.join("initrd.img")) else {
        println!("skipped: no guest image; see `cargo xtask setup`");
        return;
    };
    let dir = tempfile::Builder::new().prefix("qemu-disks").tempdir().expect("a directory");
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(archive("load-init", LOAD_INIT.as_bytes()));
    fs::write(dir.path().join("initrd"), initrd).expect("room");
    let Some(path) = image(dir.path(), "d0", format) else { return };
    let drive = format!("file={},format={format},if=virtio,{options}", path.display());
    let kernel = guest_dir.join("vmlinuz").display().to_string();
    let initrd = dir.path().join("initrd").display().to_string();
    let console = dir.path().join("console");
    let serial = format!("file:{}", console.display());
    let line = fs::read_to_string(guest_dir.join("cmdline")).expect("part of the image");
    let line = format!("{} rdinit=/load-init", line.trim());
    let arguments = [
        "-M", "pc", "-nic", "none", "-m", "128", "-kernel", &kernel, "-initrd", &initrd, "-append", &line, "-serial",
        &serial, "-drive", &drive,
    ];
    let Some(qemu) = Qemu::start(&arguments) else { return };
    wait_for("the guest", || fs::read_to_string(&console).is_ok_and(|text| text.contains("READY")));
    let disks = vec![(path, format)];
    let mut guest = qemu.attach();
    guest.mirror_disks().expect("mirrors");
    let mut images = Images::unknown(1);
    first_copy(&mut guest, &mut images);
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    let mut memory = read_all(&mut guest);
    guest.resume().expect("resumes");
    let (mut capture, mut writes, mut longest) = (Capture::default(), 0, Duration::ZERO);
    let started = Instant::now();
    // So long that it has written for sure; each fourth stop is compared.
    while writes < 40 {
        assert!(started.elapsed() < SOON * 2, "the guest writes too little: {writes}");
        for compare in [false, false, false, true] {
            let running = Instant::now();
            wait_for("a bit of running", || running.elapsed() > Duration::from_millis(100));
            let stopping = Instant::now();
            guest.pause().expect("pauses");
            longest = longest.max(stopping.elapsed());
            guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
            images.apply(&capture.disk);
            writes += capture.disk.len();
            for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks_exact(PAGE_SIZE)) {
                let start = usize::try_from(page).expect("small") * PAGE_SIZE;
                memory[start..start + PAGE_SIZE].copy_from_slice(bytes);
            }
            if compare {
                images.are(&disks);
                assert!(memory == read_all(&mut guest), "a page was lost");
            }
            guest.resume().expect("resumes");
        }
    }
    println!("{format} {options}: {writes} writes in {:?}, longest stop {longest:?}", started.elapsed());
    Box::new(guest).detach().expect("leaves it");
}

#[test]
fn a_linux_guests_raw_disk_and_memory_without_cache() {
    a_linux_guest("raw", "cache=none");
}

#[test]
fn a_linux_guests_qcow2_disk_and_memory() {
    a_linux_guest("qcow2", "cache=writeback");
}
