//! One row from its boot to the end of its survivor.

use std::net::{SocketAddr, SocketAddrV6};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmm_hooks::guest::{Capture, Guest, GuestError, PauseParts, Recipe, Twin, TwinHost, TwinMemory};
use vmm_hooks::layout::{Layout, PAGE_SIZE};
use vmm_hooks::qemu::{AttachOptions, QemuGuest, QemuTwinHost, Target, TwinHostOptions, attach};
use vmm_hooks::sys::process::PidFd;

use crate::client::{Client, Progress};
use crate::machine::{LINK_LOCAL, Machine, NOBODY, SOON, cards, directory, missing, status};
use crate::net::Net;
use crate::{Row, Starter, When};

/// What asks for rows that take long.
const LONG: &str = "UNDERSTUDY_LONG";

/// An epoch ends when output waits, or after this.
const EPOCH_MAX: Duration = Duration::from_millis(25);

/// Writes of each client before the kill, and after it.
const WRITES: u64 = 100;

/// The client's neighbours are forgotten every so many epochs.
const FORGET_EVERY: u64 = 20;

/// Pages that are read at once.
const CHUNK: usize = 4096;

/// Numbers the rows of this process, so that their namespaces do not meet.
static ROWS: AtomicUsize = AtomicUsize::new(0);

/// Plays a row, or says why not.
pub(crate) fn play(row: &Row) {
    if let Some(what) = missing() {
        println!("skipped: {}: {what}", row.name);
        return;
    }
    if row.when == When::Long && std::env::var_os(LONG).is_none() {
        println!("skipped: {}: takes long, set {LONG}=1", row.name);
        return;
    }
    let starter = (row.starter == Starter::Nobody).then_some("nobody");
    let net = Net::make(ROWS.fetch_add(1, Ordering::SeqCst), cards(row), starter);
    // What enters a namespace must not be a thread that is used again.
    let played = thread::scope(|scope| scope.spawn(|| protect(row, &net)).join());
    assert!(played.is_ok(), "{}: see above", row.name);
}

fn protect(row: &Row, net: &Net) {
    let dir = directory();
    net.enter("a");
    let mut primary = Machine::boot(row, dir.path());
    let target = Target::QmpSocket(dir.path().join("qmp"));
    let attached = || attach(&target, &AttachOptions::default()).expect("it can be attached to");
    let found = primary.appearance();
    visit(attached());
    assert_eq!(primary.appearance(), found, "left is not found");

    let mut addresses: Vec<SocketAddr> =
        ["10.77.3.2:6379", "10.77.4.2:6379"][..cards(row)].iter().map(|to| to.parse().expect("an address")).collect();
    let scope = net.scope();
    addresses.push(SocketAddrV6::new(LINK_LOCAL.parse().expect("an address"), 6379, 0, scope).into());
    let progress: Vec<Progress> = addresses.iter().map(|_| Progress::default()).collect();
    thread::scope(|scope| {
        let clients: Vec<Client<'_>> = addresses
            .iter()
            .zip(&progress)
            .map(|(&address, progress)| Client::start(scope, net, address, progress))
            .collect();
        // Whatever panics here, the clients must not be waited for.
        let _stop = StopAll(&progress);
        let mut guest = attached();
        let mut twin = prepare(net, dir.path(), guest.recipe(), guest.layout()).expect("a twin");
        let mut protection = Protection { net, guest: &mut guest, memory: twin.memory(), epoch: 1 };
        protection.begin();
        protection.until_written(&clients, &progress);
        let device = protection.last_epoch();
        println!("{}: {:?}", row.name, twin.rehearse(&device).expect("the state loads"));
        primary.kill();
        println!("{}: {:?}", row.name, twin.activate(&device).expect("goes on"));
        net.forget_neighbours();
        wait_written(&clients, &progress);
        progress.iter().for_each(Progress::enough);
        clients.into_iter().for_each(Client::end);
        check_survivor(row, net, twin);
    });
}

/// Lets the clients end.
struct StopAll<'a>(&'a [Progress]);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(Progress::enough);
    }
}

/// Attaches with everything that there is, and leaves again.
fn visit(mut guest: QemuGuest) {
    println!("tracker {}, {} pages", guest.tracker(), guest.layout().pages());
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.hold_output(1).expect("holds");
    guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect("captures");
    guest.resume().expect("resumes");
    Box::new(guest).detach().expect("leaves it");
}

/// A twin on host `b`.
fn prepare(net: &Net, dir: &Path, recipe: &Recipe, layout: &Layout) -> Result<Box<dyn Twin>, GuestError> {
    let run_dir = dir.join("b");
    thread::scope(|scope| {
        let prepared = scope.spawn(|| {
            net.enter("b");
            QemuTwinHost::new(TwinHostOptions { run_dir, ..TwinHostOptions::default() }).prepare(
                "mx",
                recipe,
                layout,
                &[],
            )
        });
        prepared.join().expect("no panic")
    })
}

/// A guest whose epochs go to a twin's memory.
struct Protection<'a> {
    net: &'a Net,
    guest: &'a mut QemuGuest,
    memory: Arc<dyn TwinMemory>,
    epoch: u64,
}

impl Protection<'_> {
    /// Starts tracking, sends all memory while it runs, and holds its output from the first epoch on.
    fn begin(&mut self) {
        self.guest.pause().expect("pauses");
        self.guest.arm().expect("arms");
        self.guest.resume().expect("resumes");
        let mut bytes = Vec::new();
        for pages in chunks(self.memory.pages()) {
            self.guest.read_pages(&pages, &mut bytes).expect("readable");
            for (&page, bytes) in pages.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
                if bytes == [0; PAGE_SIZE] {
                    self.memory.zero(page);
                } else {
                    self.memory.write(page, 0, bytes);
                }
            }
        }
        self.guest.pause().expect("pauses");
        self.guest.hold_output(self.epoch).expect("holds");
        self.capture();
        self.guest.resume().expect("resumes");
        self.release();
    }

    /// One epoch, up to its capture; the guest stands.
    fn capture(&mut self) -> Vec<u8> {
        self.guest.pause().expect("pauses");
        self.guest.gate().seal(self.epoch + 1);
        let mut capture = Capture::default();
        self.guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
        for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks_exact(PAGE_SIZE)) {
            self.memory.write(page, 0, bytes);
        }
        capture.device
    }

    /// Releases the epoch that was captured.
    fn release(&mut self) {
        self.guest.gate().release(self.epoch);
        self.epoch += 1;
    }

    /// Epochs until every client has written enough, with a neighbour table that is emptied meanwhile.
    fn until_written(&mut self, clients: &[Client<'_>], progress: &[Progress]) {
        let wanted: Vec<u64> = progress.iter().map(|progress| progress.acknowledged() + WRITES).collect();
        let deadline = Instant::now() + SOON;
        while progress.iter().zip(&wanted).any(|(progress, wanted)| progress.acknowledged() < *wanted) {
            clients.iter().for_each(Client::check);
            assert!(Instant::now() < deadline, "the clients do not go on: {progress:?}, wanted {wanted:?}");
            self.guest.gate().wait_output(Instant::now() + EPOCH_MAX);
            self.capture();
            self.guest.resume().expect("resumes");
            self.release();
            assert_eq!(self.guest.events(), [], "nothing but us touches it");
            if self.epoch.is_multiple_of(FORGET_EVERY) {
                self.net.forget_neighbours();
            }
        }
        assert!(self.epoch > FORGET_EVERY, "the neighbours were never forgotten");
        let held = self.guest.gate().held();
        assert!(held.released > 0 && held.dropped == 0, "{held:?}");
    }

    /// The last epoch, after which the twin must hold what the guest held when it stood.
    fn last_epoch(&mut self) -> Vec<u8> {
        let device = self.capture();
        self.release();
        let (mut truth, mut page) = (Vec::new(), vec![0; PAGE_SIZE]);
        let mut lost = Vec::new();
        for pages in chunks(self.memory.pages()) {
            self.guest.read_pages(&pages, &mut truth).expect("readable");
            lost.extend(pages.iter().zip(truth.chunks_exact(PAGE_SIZE)).filter_map(|(&number, theirs)| {
                self.memory.read(number, &mut page);
                (page != *theirs).then(|| self.guest.layout().locate(number))
            }));
        }
        assert_eq!(lost, [], "dirty pages were lost");
        device
    }
}

fn chunks(pages: u64) -> impl Iterator<Item = Vec<u64>> {
    (0..pages).step_by(CHUNK).map(move |start| (start..pages.min(start + CHUNK as u64)).collect())
}

fn wait_written(clients: &[Client<'_>], progress: &[Progress]) {
    let wanted: Vec<u64> = progress.iter().map(|progress| progress.acknowledged() + WRITES).collect();
    let deadline = Instant::now() + SOON;
    while progress.iter().zip(&wanted).any(|(progress, wanted)| progress.acknowledged() < *wanted) {
        clients.iter().for_each(Client::check);
        assert!(Instant::now() < deadline, "the clients do not go on: {progress:?}, wanted {wanted:?}");
        thread::yield_now();
    }
}

/// Ended whatever happens.
struct Ended(PidFd);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill_confirmed(SOON);
    }
}

/// The survivor has no more rights than its primary had, can be protected in its turn, and leaves nothing when it is gone.
fn check_survivor(row: &Row, net: &Net, twin: Box<dyn Twin>) {
    let survivor = twin.release().expect("it runs");
    let process = Ended(PidFd::open(survivor.pid).expect("it runs"));
    let process = &process.0;
    let unprivileged = row.starter == Starter::Nobody || row.arguments.contains("-runas");
    assert_eq!(process.uid().expect("it runs"), if unprivileged { NOBODY } else { 0 }, "its user");
    let target = Target::QmpSocket(survivor.control.clone().into());
    thread::scope(|scope| {
        let visited = scope.spawn(|| {
            net.enter("b");
            visit(attach(&target, &AttachOptions::default()).expect("a survivor can be protected again"));
        });
        visited.join().expect("no panic");
    });
    assert_eq!(status(survivor.control.as_ref()), "running");
}
