//! The chaos suite's faults do what they say: measured by datagrams and writes, without a VM.

use std::io::Write as _;
use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use chaos_tests::chaos::clock::Clocks;
use chaos_tests::chaos::field::set_deaf;
use chaos_tests::chaos::memory::{self, Felt, Group, Memory};
use chaos_tests::chaos::relay::{Relay, Weather};
use chaos_tests::chaos::space;
use chaos_tests::chaos::storage::Storage;
use replicator::demo::lab::{Host, Lab, WITNESS};
use replicator::demo::wait::until;
use rustix::process::{Pid, Signal, kill_process};

use crate::stage::play;

/// Datagrams that are sent in one measurement.
const SENT: u32 = 400;
/// Bytes of each.
const BYTES: usize = 1000;
/// When nothing came for so long, nothing more comes.
const SILENCE: Duration = Duration::from_secs(1);

/// What came of numbered datagrams: number, damaged or not, and when after it was sent.
type Came = Vec<(u32, bool, Duration)>;

/// Bytes of datagrams that only find out whether any gets through, and do not count.
const PROBE: usize = 20;
/// Bound on that. A link that was plugged in a second time within a second is left down by the kernel until that is over.
const PLUGGED: Duration = Duration::from_secs(10);

/// Bound on an agent's look at its clock.
const ASKED: Duration = Duration::from_secs(30);

/// Sends numbered datagrams from one namespace to an address in another.
fn send(from: &str, to: &str, address: &'static str) -> Result<Came> {
    send_when(from, to, address, false)
}

/// The same; `through`: once the first of others has got through.
fn send_when(from: &str, to: &str, address: &'static str, through: bool) -> Result<Came> {
    let (tell, told) = mpsc::channel();
    let begun = Instant::now();
    let seen = Arc::new(AtomicBool::new(!through));
    let sees = Arc::clone(&seen);
    let receive = move |socket: UdpSocket| {
        let mut came = Came::new();
        let mut buffer = [0; 2 * BYTES];
        while let Ok(length) = socket.recv(&mut buffer) {
            if !sees.swap(true, Ordering::SeqCst) && socket.set_read_timeout(Some(SILENCE)).is_err() {
                break;
            }
            if length == PROBE {
                continue;
            }
            let number = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]);
            let at = Duration::from_nanos(u64::from_be_bytes(buffer[4..12].try_into().unwrap_or_default()));
            let whole = length == BYTES && buffer[12..length].iter().all(|&byte| byte == 0x55);
            came.push((number, !whole, begun.elapsed().saturating_sub(at)));
        }
        let _ = tell.send(came);
    };
    let open = move || {
        let socket = UdpSocket::bind((address, 9999))?;
        socket.set_read_timeout(Some(if through { PLUGGED } else { SILENCE }))?;
        Ok(socket)
    };
    let receiver = space::spawn(to, open, receive)?;
    let open = move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((address, 9999))?;
        Ok(socket)
    };
    let send = move |socket: UdpSocket| {
        while !seen.load(Ordering::SeqCst) && begun.elapsed() < PLUGGED {
            let _ = socket.send(&[0; PROBE]);
            std::thread::sleep(Duration::from_millis(5));
        }
        for number in 0..SENT {
            let mut bytes = [0x55; BYTES];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            let at = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            bytes[4..12].copy_from_slice(&at.to_be_bytes());
            let _ = socket.send(&bytes);
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let _ = space::spawn(from, open, send)?.join();
    let _ = receiver.join();
    told.recv().context("the receiver died")
}

/// What comes from host A to the witness, and back, in some weather on the link of host A.
fn in_weather(lab: &Lab, weather: Weather) -> Result<(Came, u64)> {
    let (a, w, s) = (lab.namespace("a"), lab.namespace("w"), lab.namespace("s"));
    let relay = Relay::start(&a, &s, "to-a", weather, 7)?;
    let came = send_when(&a, &w, WITNESS, true)?;
    let (_, hit) = relay.counts();
    Ok((came, hit))
}

fn in_order(came: &Came) -> bool {
    came.is_sorted_by_key(|(number, ..)| *number)
}

#[test]
fn weather_hits_what_it_says_and_is_over_with_its_relay() {
    play("weather on a link", async |stage| {
        let lab = &stage.lab;
        let all = usize::try_from(SENT)?;
        let fair = Weather::default();
        let (came, hit) = in_weather(lab, fair)?;
        ensure!(came.len() == all && hit == 0 && in_order(&came), "fair weather: {} came, {hit} hit", came.len());
        let (came, hit) = in_weather(lab, Weather { lose: 250, ..fair })?;
        ensure!((all / 2..all * 9 / 10).contains(&came.len()) && hit > 0, "loss: {} came", came.len());
        let (came, _) = in_weather(lab, Weather { double: 250, ..fair })?;
        ensure!((all * 11 / 10..all * 3 / 2).contains(&came.len()), "doubling: {} came", came.len());
        let (came, _) = in_weather(lab, Weather { overtake: 250, ..fair })?;
        ensure!(came.len() == all && !in_order(&came), "overtaking: {} came", came.len());
        let (came, _) = in_weather(lab, Weather { damage: 250, ..fair })?;
        let damaged = came.iter().filter(|(_, damaged, _)| *damaged).count();
        ensure!(came.len() == all && damaged > all / 10, "damage: {damaged} of {} are damaged", came.len());
        let delay = Duration::from_millis(40);
        let (came, _) = in_weather(lab, Weather { delay, ..fair })?;
        ensure!(came.len() == all && came.iter().all(|(.., late)| *late >= delay), "delay: {came:?}");
        let (came, _) = in_weather(lab, Weather { rate: Some(200_000), ..fair })?;
        // 400 kB and more at 200 kB a second, sent in less than half of that.
        let latest = came.iter().map(|(.., late)| *late).max().unwrap_or_default();
        ensure!(latest >= Duration::from_millis(500), "a narrow link: the last came after {latest:?}");
        let came = send_when(&lab.namespace("a"), &lab.namespace("w"), WITNESS, true)?;
        ensure!(came.len() == all && in_order(&came), "the cable is back: {} came", came.len());
        Ok(())
    });
}

#[test]
fn who_is_deaf_on_one_side_is_heard_on_the_other() {
    play("one-way partition", async |stage| {
        let (a, b) = (stage.lab.namespace("a"), stage.lab.namespace("b"));
        let all = usize::try_from(SENT)?;
        set_deaf(&a, "br0", Host::B.address(), true)?;
        let came = send(&a, &b, Host::B.address())?;
        ensure!(came.is_empty(), "{} came through", came.len());
        let came = send(&b, &a, Host::A.address())?;
        ensure!(came.len() == all, "the other way: {} came", came.len());
        set_deaf(&a, "br0", Host::B.address(), false)?;
        let came = send(&a, &b, Host::B.address())?;
        ensure!(came.len() == all, "afterwards: {} came", came.len());
        Ok(())
    });
}

#[test]
fn a_disk_is_full_or_hangs_for_its_own_host_alone() {
    play("full and hanging disks", async |stage| {
        let storage = Storage::make(&stage.lab)?;
        let write = |host: Host| -> std::io::Result<()> {
            let mut file = std::fs::File::create(stage.lab.state_dir(host).join("probe"))?;
            file.write_all(&[1; 1 << 16])?;
            file.sync_all()
        };
        let filler = storage.fill(Host::B)?;
        let refused = write(Host::B).expect_err("it is full");
        ensure!(refused.kind() == std::io::ErrorKind::StorageFull, "{refused}");
        write(Host::A)?;
        drop(filler);
        write(Host::B)?;

        let frozen = storage.freeze(Host::B)?;
        write(Host::A)?;
        let (tell, told) = mpsc::channel();
        let probe = stage.lab.state_dir(Host::B).join("probe");
        std::thread::spawn(move || tell.send(std::fs::write(probe, [2; 1 << 16])));
        ensure!(told.recv_timeout(SILENCE).is_err(), "a disk that hangs took a write");
        frozen.thaw()?;
        told.recv()?.context("the write that waited")
    });
}

#[test]
fn a_disk_breaks_for_its_own_host_alone_and_is_whole_again() {
    play("broken disks", async |stage| {
        let storage = Storage::make(&stage.lab)?;
        let kept = stage.lab.state_dir(Host::B).join("kept");
        let mut file = std::fs::File::create(&kept)?;
        file.write_all(b"what was there")?;
        file.sync_all()?;
        drop(file);
        let losing = storage.lose_writes(Host::B)?;
        ensure!(storage.takes_writes(Host::A)?);
        losing.end()?;
        // If its own journal could not be written it stays read-only.
        if !storage.takes_writes(Host::B)? {
            storage.repair(Host::B).await?;
        }

        storage.abort(Host::B)?;
        let refused = std::fs::write(&kept, "something else").expect_err("it is read-only");
        ensure!(refused.kind() == std::io::ErrorKind::ReadOnlyFilesystem, "{refused}");
        ensure!(storage.takes_writes(Host::A)?);
        storage.repair(Host::B).await?;
        ensure!(std::fs::read_to_string(&kept)? == "what was there");
        Ok(())
    });
}

#[test]
fn a_clock_jumps_for_its_own_daemon_alone() {
    play("clocks that jump", async |stage| {
        let clocks = Clocks::make(&mut stage.lab)?;
        stage.lab.start_witness().await?;
        stage.lab.start_agent(Host::A).await?;
        clocks.set("a", Duration::from_secs(1_000_000), true)?;
        stage.lab.pair_witness(Host::A).await.context("with a clock that is off")?;
        let read = until("the clock to be read", ASKED, async || {
            let reads = clocks.reads("a")?;
            Ok(if reads > 0 { Ok(reads) } else { Err("it was not".to_owned()) })
        });
        ensure!(read.await? > 0 && clocks.reads("w")? == 0, "the witness has a clock of its own");
        Ok(())
    });
}

/// What a process needs that overwrites all of its memory again and again, in bytes.
const HOG: u64 = 128 << 20;
/// Bound on its having it, and on its being killed.
const HOGGED: Duration = Duration::from_secs(60);

/// Starts that process in a group, and kills it when it is let go.
struct Hog(Child);

impl Hog {
    fn start(group: &Group) -> Result<Self> {
        let words = format!("echo $$ > {} && exec dd if=/dev/zero of=/dev/null bs={HOG}", group.processes().display());
        let mut command = Command::new("sh");
        command.args(["-c", &words]).stdin(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).context("no process")?;
        kill_process(pid, signal).context("it has ended")
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_host_short_of_memory_gives_it_back_and_who_cannot_is_killed() {
    play("short of memory", async |stage| {
        if let Some(why) = memory::missing(stage.lab.dir()) {
            println!("skipped: short of memory: {why}");
            return Ok(());
        }
        let memory = Memory::make(&mut stage.lab)?;
        stage.lab.start_agent(Host::A).await?;
        let agent = stage.lab.agent_pid(Host::A)?.to_string();
        let (a, b) = (memory.of(Host::A), memory.of(Host::B));
        let members = std::fs::read_to_string(a.processes())?;
        ensure!(members.lines().any(|pid| pid == agent), "the agent is not in its host's group: {members}");

        let swap = memory.swap()?;
        let hog = Hog::start(a)?;
        let has_it = until("the process to have its memory", HOGGED, async || {
            let has = a.has()?;
            Ok(if has >= HOG { Ok(has) } else { Err(format!("{has} bytes")) })
        });
        let had = has_it.await?;
        // It would have back at once what goes.
        hog.signal(Signal::STOP)?;
        let limit = a.limit(had / 2)?;
        let now = a.has()?;
        ensure!(now <= limit && limit < had, "{had} bytes, limited to {limit}, are {now}");
        hog.signal(Signal::CONT)?;
        let felt = until("the limit to be felt", HOGGED, async || {
            let (felt, swapped) = (a.felt()?, a.swapped()?);
            Ok(if felt.met > 100 && swapped > HOG / 4 { Ok(felt) } else { Err(format!("{felt:?}, {swapped} in swap")) })
        });
        ensure!(felt.await?.killed == 0, "there was swap");
        ensure!(b.felt()? == Felt { met: 0, killed: 0 }, "the other host has memory of its own");
        drop(hog);
        a.lift()?;
        drop(swap);
        if std::fs::read_to_string("/proc/swaps")?.lines().count() > 1 {
            println!("skipped: who is killed: this machine has swap of its own");
            return Ok(());
        }

        a.limit(a.has()? + HOG / 2)?;
        let mut hog = Hog::start(a)?;
        let ended = until("the process to be killed", HOGGED, async || {
            Ok(hog.0.try_wait()?.ok_or_else(|| "it runs".to_owned()))
        });
        ensure!(ended.await?.signal() == Some(9) && a.felt()?.killed == 1, "{:?}", a.felt());
        stage.lab.check(&[Host::A]).context("the agent is smaller")
    });
}
