//! Injection into a real QEMU, where one is installed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{find_existing, injector_dies};
use crate::layout::{Block, Layout, PAGE_SIZE, PageSet};
use crate::sys::inject::victim;
use crate::sys::process::{PidFd, ProcessMemory};
use crate::track::{CompareTracker, PagemapTracker, RangeMap, Tracker};

const MIB: u64 = 1 << 20;
/// An odd size, to be found among the mappings.
const MEMORY: u64 = 68 * MIB;

/// A boot sector that goes on adding one to the first word of each page from 64 KiB to 576 KiB.
const BOOT: [u8; 22] = [
    0xbb, 0x00, 0x10, // again: mov bx, 0x1000
    0x8e, 0xc3, // next: mov es, bx
    0x26, 0xff, 0x06, 0x00, 0x00, // inc word [es:0]
    0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
    0x81, 0xfb, 0x00, 0x90, // cmp bx, 0x9000
    0x72, 0xef, // jb next
    0xeb, 0xea, // jmp again
];
/// The pages that it writes.
const WRITTEN: std::ops::Range<u64> = 0x10..0x90;

/// Epochs harvested from each QEMU.
const EPOCHS: u32 = 20;

/// A QEMU of its own, ended with the value.
struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// `None` if QEMU is not installed.
    fn start(more: &[&str]) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("qmp");
        let disk = directory.path().join("disk");
        let mut sector = [0_u8; 512];
        sector[..BOOT.len()].copy_from_slice(&BOOT);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&disk, sector).expect("a file");
        let spawned = Command::new("qemu-system-x86_64")
            .args(["-M", "pc", "-m", "68", "-display", "none", "-nodefaults", "-accel", "tcg"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(["-drive", &format!("file={},format=raw,if=ide,snapshot=on", disk.display())])
            .args(more)
            .stdin(Stdio::null())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => panic!("QEMU does not start: {error}"),
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    assert!(Instant::now() < deadline, "no QMP socket: {error}");
                    assert_eq!(child.try_wait().expect("it is our child"), None, "QEMU has ended");
                    std::thread::yield_now();
                }
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
        let mut qemu = Self { child, qmp: BufReader::new(stream), _directory: directory };
        qemu.message();
        qemu.execute("qmp_capabilities");
        Some(qemu)
    }

    fn message(&mut self) -> String {
        let mut line = String::new();
        assert!(self.qmp.read_line(&mut line).expect("QEMU answers") > 0, "QEMU closed its monitor");
        line
    }

    fn execute(&mut self, command: &str) {
        writeln!(self.qmp.get_mut(), "{{\"execute\":\"{command}\"}}").expect("QEMU listens");
        loop {
            let message = self.message();
            if message.contains("\"return\"") {
                return;
            }
            assert!(message.contains("\"event\""), "QEMU said {message}");
        }
    }

    fn process(&self) -> PidFd {
        PidFd::open(self.child.id()).expect("it lives")
    }

    /// Where guest memory is mapped.
    fn memory(&self) -> std::ops::Range<u64> {
        let maps = victim::maps(self.child.id()).expect("it lives");
        maps.into_iter().find(|m| m.range.end - m.range.start == MEMORY).expect("guest memory is mapped").range
    }
}

const WAYS: [&[&str]; 5] = [
    &[],
    &["-runas", "nobody"],
    &["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    &["-object", "memory-backend-memfd,id=m,size=68M,share=on", "-machine", "memory-backend=m"],
    &["-object", "memory-backend-memfd,id=m,size=68M,share=off", "-machine", "memory-backend=m"],
];

#[test]
fn tracks_a_real_qemu_and_leaves_it_as_it_was() {
    for way in WAYS {
        if way.contains(&"-runas") && !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can run QEMU as another user");
            continue;
        }
        let Some(mut qemu) = Qemu::start(way) else {
            eprintln!("skipped: no qemu-system-x86_64 here");
            return;
        };
        let process = qemu.process();
        let pages = MEMORY / PAGE_SIZE as u64;
        let layout = Layout::new(vec![Block { name: "pc.ram".to_owned(), pages }]).expect("a good layout");
        let start_of_memory = qemu.memory().start;
        let map = RangeMap::new(&layout, &[start_of_memory]).expect("one block");
        let memory = ProcessMemory::new(process.clone());
        let mut tracker = PagemapTracker::new(process.clone(), map.clone(), false);
        let mut oracle = CompareTracker::new(memory.clone(), map);
        let written_always = {
            let mut set = PageSet::empty(pages);
            set.insert_range(WRITTEN);
            set
        };
        qemu.execute("stop");
        oracle.arm().expect("it can be read");
        let start = Instant::now();
        tracker.arm().expect("arming works");
        let arm = start.elapsed();
        for epoch in 0..EPOCHS {
            let before = words(&memory, start_of_memory);
            qemu.execute("cont");
            let deadline = Instant::now() + Duration::from_secs(60);
            // The guest's own memory tells when it has written each page: a look at the marks while it runs is an estimate.
            while words(&memory, start_of_memory).iter().zip(&before).any(|(now, before)| now == before) {
                assert!(Instant::now() < deadline, "the guest writes pages {WRITTEN:?}");
                tracker.peek(&mut PageSet::empty(pages)).expect("it is armed");
            }
            qemu.execute("stop");
            let (mut dirty, mut changed) = (PageSet::empty(pages), PageSet::empty(pages));
            let mut seen = PageSet::empty(pages);
            tracker.peek(&mut seen).expect("it is armed");
            let start = Instant::now();
            tracker.harvest(&mut dirty).expect("it is armed");
            eprintln!("{way:?}: arm {arm:?}, harvest of {} pages {:?}", dirty.len(), start.elapsed());
            oracle.harvest(&mut changed).expect("it can be read");
            assert!(contains(&seen, &changed), "epoch {epoch}: a changed page was not seen");
            assert!(contains(&dirty, &seen), "epoch {epoch}: a harvest finds what a peek has seen");
            assert!(contains(&changed, &written_always), "epoch {epoch}: the guest wrote {written_always:?}");
            dirty.clear();
            tracker.harvest(&mut dirty).expect("it is armed");
            assert!(dirty.is_empty(), "epoch {epoch}: a stopped guest wrote {dirty:?}");
        }
        qemu.execute("cont");
        tracker.disarm().expect("disarming works");
        assert_eq!(victim::userfaultfds(&process).expect("it lives"), []);
        qemu.execute("query-status");
    }
}

/// The words that the guest counts up in, one a page.
fn words(memory: &ProcessMemory, start: u64) -> Vec<[u8; 2]> {
    let mut bytes = vec![0; usize::try_from(WRITTEN.end - WRITTEN.start).expect("few") * PAGE_SIZE];
    memory.read(start + WRITTEN.start * PAGE_SIZE as u64, &mut bytes).expect("it lives");
    bytes.chunks_exact(PAGE_SIZE).map(|page| [page[0], page[1]]).collect()
}

fn contains(whole: &PageSet, part: &PageSet) -> bool {
    let mut rest = part.clone();
    rest.subtract(whole);
    rest.is_empty()
}

#[test]
fn a_real_qemu_survives_an_injector_killed_at_any_step() {
    let Some(mut qemu) = Qemu::start(&[]) else {
        eprintln!("skipped: no qemu-system-x86_64 here");
        return;
    };
    let process = qemu.process();
    let range = qemu.memory();
    for step in 0..super::MAX_STEPS {
        let died = injector_dies("attach", process.pid(), step, 0, &range);
        qemu.execute("query-status");
        if let Some(left) = find_existing(&process).expect("nothing foreign") {
            super::detach(&process, &left).expect("what was left can be closed");
        }
        assert_eq!(victim::userfaultfds(&process).expect("it lives"), []);
        if !died {
            assert!(step > 15, "an attachment has more steps than {step}");
            qemu.execute("quit");
            assert!(process.wait_exit(Duration::from_secs(30)), "QEMU quits when it is told to");
            return;
        }
    }
    panic!("more than {} steps", super::MAX_STEPS);
}
