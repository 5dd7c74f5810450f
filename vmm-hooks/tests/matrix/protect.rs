//! A stock Debian with Redis under real QEMUs, on two hosts that are network namespaces: a client goes on over the same TCP connection
//! after a SIGKILL of its guest's QEMU, and finds every write that was acknowledged to it.
//!
//! Skipped, with a line that says so, where QEMU, root, the `ip` program or the guest image (`cargo xtask setup`) is missing.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use vmm_hooks::guest::{Capture, Guest, PauseParts, TwinHost, TwinMemory};
use vmm_hooks::layout::PAGE_SIZE;
use vmm_hooks::qemu::{AttachOptions, QemuTwinHost, Target, TwinHostOptions, attach};
use vmm_hooks::sys::process::PidFd;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const IMAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");

/// Bound on every wait for something that must happen.
const SOON: Duration = Duration::from_secs(60);

/// An epoch ends when output waits, or after this.
const EPOCH_MAX: Duration = Duration::from_millis(25);

/// Writes before the kill, and after it.
const WRITES: u64 = 200;

/// Namespaces `a` and `b` with a bridge each, and `c` with the client; removed at the end.
struct Net {
    prefix: String,
}

impl Net {
    fn make() -> Self {
        let net = Self { prefix: format!("qemu-t{}", std::process::id()) };
        for name in ["a", "b", "c"] {
            ip(&format!("netns add {}", net.name(name)));
            ip(&format!("-n {} link set lo up", net.name(name)));
            ip(&format!("-n {} link add br0 type bridge", net.name(name)));
            ip(&format!("-n {} link set br0 up", net.name(name)));
        }
        for host in ["a", "b"] {
            let (host_net, client) = (net.name(host), net.name("c"));
            ip(&format!("-n {host_net} link add up0 type veth peer name to{host} netns {client}"));
            ip(&format!("-n {host_net} link set up0 master br0 up"));
            ip(&format!("-n {client} link set to{host} master br0 up"));
        }
        ip(&format!("-n {} addr add 10.77.3.1/24 dev br0", net.name("c")));
        ip(&format!("-n {} tuntap add dev tap0 mode tap", net.name("a")));
        ip(&format!("-n {} link set tap0 master br0 up", net.name("a")));
        net
    }

    fn name(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// Puts the calling thread, and what it starts, into a namespace.
    fn enter(&self, host: &str) {
        let namespace = fs::File::open(format!("/run/netns/{}", self.name(host))).expect("just made");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in ["a", "b", "c"] {
            let _ = Command::new("ip").args(["netns", "delete", &self.name(name)]).status();
        }
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip runs");
    assert!(status.success(), "ip {arguments}");
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn missing() -> Option<&'static str> {
    if !Path::new(QEMU).exists() {
        return Some("no QEMU");
    }
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    if !Path::new(IMAGE).join("manifest").exists() {
        return Some("no guest image: run `cargo xtask setup`");
    }
    Command::new("ip").arg("-V").stdout(Stdio::null()).status().is_err().then_some("no `ip` program")
}

fn boot(dir: &Path) -> Ended {
    let image = |name: &str| format!("{IMAGE}/{name}");
    let append =
        format!("{} us.ip=10.77.3.2/24", fs::read_to_string(image("cmdline")).expect("the image has one").trim());
    let console = format!("file:{}", dir.join("console").display());
    let qmp = format!("unix:{},server=on,wait=off", dir.join("qmp").display());
    let child = Command::new(QEMU)
        .args([
            "-name", "linux", "-m", "256", "-display", "none", "-serial", &console, "-qmp", &qmp, "-append", &append,
        ])
        .args(["-kernel", &image("vmlinuz"), "-initrd", &image("initrd.img")])
        .args(["-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=net0"])
        .stdin(Stdio::null())
        .spawn()
        .expect("QEMU starts");
    let guest = Ended(child);
    let deadline = Instant::now() + SOON;
    while !fs::read_to_string(dir.join("console")).is_ok_and(|console| console.contains("READY")) {
        assert!(Instant::now() < deadline, "the guest does not boot");
        thread::yield_now();
    }
    guest
}

/// A client of Redis with one connection.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn connect() -> Self {
        let stream = TcpStream::connect("10.77.3.2:6379").expect("Redis listens");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        Self { stream: BufReader::new(stream) }
    }

    fn ask(&mut self, command: &str) -> String {
        self.stream.get_mut().write_all(format!("{command}\r\n").as_bytes()).expect("connected");
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the connection lives");
        if line.starts_with('$') && line.trim() != "$-1" {
            line.clear();
            self.stream.read_line(&mut line).expect("the connection lives");
        }
        line.trim().to_owned()
    }
}

fn percentile(times: &mut [Duration], per_cent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * per_cent / 100]
}

#[test]
fn a_client_of_a_linux_guest_loses_no_acknowledged_write() {
    if let Some(what) = missing() {
        println!("skipped: {what}");
        return;
    }
    let net = Net::make();
    let dir = tempfile::Builder::new().prefix("qemu-linux").tempdir().expect("a directory");
    let acknowledged = AtomicU64::new(0);
    let failed_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (net, acknowledged, failed_over, dir) = (&net, &acknowledged, &failed_over, dir.path());
        let protector = scope.spawn(move || {
            net.enter("a");
            let mut primary = boot(dir);
            let mut guest = attach(&Target::Pid(primary.0.id()), &AttachOptions::default()).expect("it can be attached to");
            println!("tracker {}, {} pages", guest.tracker(), guest.layout().pages());
            let client = scope.spawn(move || {
                net.enter("c");
                let mut client = Client::connect();
                let mut longest = Duration::ZERO;
                let mut number = 0;
                let mut after = 0;
                while after < WRITES {
                    after += u64::from(failed_over.load(Ordering::SeqCst));
                    let asked = Instant::now();
                    assert_eq!(client.ask(&format!("SET key{number} value{number}")), "+OK");
                    longest = longest.max(asked.elapsed());
                    number += 1;
                    acknowledged.store(number, Ordering::SeqCst);
                }
                for key in 0..number {
                    assert_eq!(client.ask(&format!("GET key{key}")), format!("value{key}"));
                }
                println!("{number} acknowledged writes, all there; longest wait {longest:?}");
            });
            let recipe = guest.recipe().clone();
            let layout = guest.layout().clone();
            let mut twin = thread::scope(|scope| {
                let prepared = scope.spawn(|| {
                    net.enter("b");
                    let run_dir = dir.join("b");
                    let host = QemuTwinHost::new(TwinHostOptions { run_dir, ..TwinHostOptions::default() });
                    host.prepare("linux", &recipe, &layout)
                });
                prepared.join().expect("no panic").expect("a twin")
            });
            let memory = twin.memory();
            let apply = |memory: &dyn TwinMemory, capture: &Capture| {
                for (&page, bytes) in capture.pages.iter().zip(capture.bytes.chunks_exact(PAGE_SIZE)) {
                    memory.write(page, 0, bytes);
                }
            };
            let gate = guest.gate();
            guest.pause().expect("pauses");
            guest.arm().expect("arms");
            guest.hold_output(1).expect("holds");
            guest.resume().expect("resumes");
            let mut capture = Capture { pages: (0..layout.pages()).collect(), ..Capture::default() };
            guest.read_pages(&capture.pages.clone(), &mut capture.bytes).expect("readable");
            apply(&*memory, &capture);
            let (mut times, mut stops, mut pages, mut devices) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            let mut epoch = 1;
            let until = acknowledged.load(Ordering::SeqCst) + WRITES;
            while acknowledged.load(Ordering::SeqCst) < until {
                gate.wait_output(Instant::now() + EPOCH_MAX);
                let mut parts = PauseParts::default();
                let started = Instant::now();
                guest.pause().expect("pauses");
                stops.push(started.elapsed());
                gate.seal(epoch + 1);
                guest.capture(&mut capture, &mut parts).expect("captures");
                guest.resume().expect("resumes");
                times.push(started.elapsed());
                pages.push(capture.pages.len());
                devices.push(parts.device);
                apply(&*memory, &capture);
                gate.release(epoch);
                epoch += 1;
                assert_eq!(guest.events(), [], "nothing but us touches it");
            }
            pages.sort_unstable();
            println!(
                "{} epochs: pause p50 {:?} p99 {:?}, stop p50 {:?}, device p50 {:?}, dirty pages p50 {}, device state {} bytes",
                times.len(),
                percentile(&mut times, 50),
                percentile(&mut times, 99),
                percentile(&mut stops, 50),
                percentile(&mut devices, 50),
                pages[pages.len() / 2],
                capture.device.len()
            );
            // The last epoch, after which the twin must hold what the guest held when it stood.
            guest.pause().expect("pauses");
            gate.seal(epoch + 1);
            guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
            apply(&*memory, &capture);
            gate.release(epoch);
            let mut truth = Vec::new();
            guest.read_pages(&(0..layout.pages()).collect::<Vec<_>>(), &mut truth).expect("readable");
            let mut page = vec![0; PAGE_SIZE];
            let lost = (0..).zip(truth.chunks_exact(PAGE_SIZE)).filter(|(number, theirs)| {
                memory.read(*number, &mut page);
                page != *theirs
            });
            assert_eq!(lost.map(|(number, _)| layout.locate(number)).collect::<Vec<_>>(), [], "dirty pages were lost");
            println!("{:?}", twin.rehearse(&capture.device).expect("the state loads"));
            primary.0.kill().expect("ours");
            primary.0.wait().expect("ours");
            println!("{:?}", twin.activate(&capture.device).expect("goes on"));
            failed_over.store(true, Ordering::SeqCst);
            client.join().expect("the client is content");
            let survivor = twin.release().expect("it runs");
            PidFd::open(survivor.pid).expect("it runs").kill_confirmed(SOON).expect("ours");
        });
        protector.join().expect("no panic");
    });
}
