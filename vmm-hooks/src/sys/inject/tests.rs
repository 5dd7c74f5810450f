//! Injection against a busy process of our own, with the injector killed at every step.

mod qemu;
mod workers;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;
use crate::layout::{Block, Layout, PAGE_SIZE, PageSet};
use crate::sys::pagemap::ScanError;
use crate::track::{PagemapTracker, RangeMap, TrackError, Tracker};

const ROLE: &str = "UNDERSTUDY_TEST_ROLE";
const TARGET: &str = "UNDERSTUDY_TEST_TARGET";

/// Bound on the steps of one attachment.
const MAX_STEPS: u32 = 1000;

fn helper(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["sys::inject::tests::helper_process", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// What the other tests start this program again for.
#[test]
#[ignore = "only the other tests start it, as another process"]
fn helper_process() {
    match std::env::var(ROLE).expect("a role").as_str() {
        "victim" => workers::live(),
        "injector" => inject_and_die(),
        other => panic!("no role {other}"),
    }
}

/// Attaches or detaches, and kills itself at the step that it was told.
fn inject_and_die() {
    let target = std::env::var(TARGET).expect("a target");
    let words: Vec<&str> = target.split_whitespace().collect();
    let number = |index: usize| words[index].parse::<u32>().expect("a number");
    let (pid, die_at) = (number(1), number(2));
    let only = Some(number(3)).filter(|&tid| tid != 0);
    let address = |index: usize| u64::from_str_radix(words[index], 16).expect("an address");
    let mut steps = 0;
    let mut observer = move |_: &'static str| {
        if steps == die_at {
            nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).expect("it is ours");
        }
        steps += 1;
    };
    let process = PidFd::open(pid).expect("the target lives");
    match words[0] {
        "attach" => {
            let range = address(4)..address(5);
            attach_observed(&process, std::slice::from_ref(&range), only, &mut observer).expect("attaching works");
        }
        "detach" => {
            let injected = find_existing(&process).expect("nothing foreign").expect("it is attached");
            detach_observed(&process, &injected, only, &mut observer).expect("detaching works");
        }
        other => panic!("no task {other}"),
    }
}

/// Runs an injector that dies at step `die_at`; whether it did (else it came to its end).
pub(super) fn injector_dies(task: &str, pid: u32, die_at: u32, only: u32, range: &Range<u64>) -> bool {
    let target = format!("{task} {pid} {die_at} {only} {:x} {:x}", range.start, range.end);
    let output = helper("injector").env(TARGET, target).output().expect("it starts");
    if output.status.signal() == Some(libc::SIGKILL) {
        return true;
    }
    assert!(output.status.success(), "the injector failed: {}", String::from_utf8_lossy(&output.stdout));
    false
}

struct Victim {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Thread ids by name, arenas by name.
    threads: HashMap<String, u32>,
    arenas: HashMap<String, u64>,
}

impl Victim {
    fn start() -> Self {
        let mut child = helper("victim").spawn().expect("it starts");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut victim = Self { child, stdin, stdout, threads: HashMap::new(), arenas: HashMap::new() };
        loop {
            let line = victim.line();
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [.., "thread", name, tid] => {
                    victim.threads.insert(name.to_owned(), tid.parse().expect("a number"));
                }
                ["arena", name, start] => {
                    victim.arenas.insert(name.to_owned(), u64::from_str_radix(start, 16).expect("an address"));
                }
                ["ready"] => return victim,
                _ => {}
            }
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let count = self.stdout.read_line(&mut line).expect("text");
        assert!(count > 0, "the victim has ended: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("the victim listens");
        assert_eq!(self.line(), "done");
    }

    fn process(&self) -> PidFd {
        PidFd::open(self.child.id()).expect("the victim lives")
    }

    fn arena(&self, name: &str) -> Range<u64> {
        let start = self.arenas[name];
        start..start + (workers::ARENA_PAGES * PAGE_SIZE) as u64
    }

    /// Ends it; it tells whether anything was wrong.
    fn end(mut self) {
        self.tell("check");
        self.tell("exit");
        let status = self.child.wait().expect("it is our child");
        assert!(status.success(), "the victim ended with {status}");
    }
}

fn userfaultfds(process: &PidFd) -> usize {
    victim::userfaultfds(process).expect("it lives").len()
}

/// Kills the injector at every step of `task` in thread `role`, on a victim that is attached before if `attached`.
fn dies_everywhere(victim: &mut Victim, role: &str, task: &str, attached: bool) -> u32 {
    let process = victim.process();
    let range = victim.arena("anonymous");
    let only = victim.threads[role];
    for step in 0..MAX_STEPS {
        if attached {
            attach(&process, std::slice::from_ref(&range)).expect("attaching works");
        }
        let died = injector_dies(task, process.pid(), step, only, &range);
        victim.tell("check");
        assert!(userfaultfds(&process) <= 1, "at most one is left");
        assert_eq!(victim::tracer(process.pid()), None);
        if let Some(left) = find_existing(&process).expect("nothing foreign") {
            detach(&process, &left).expect("what was left can be closed");
        }
        assert_eq!(userfaultfds(&process), 0);
        if !died {
            return step;
        }
    }
    panic!("more than {MAX_STEPS} steps");
}

#[test]
fn a_victim_survives_an_injector_killed_at_any_step() {
    // In a read, and without any wait.
    survives_in_roles(["main", "registers"]);
}

#[test]
fn a_victim_that_waits_survives_an_injector_killed_at_any_step() {
    // In ppoll, and for a futex.
    survives_in_roles(["ppoll", "even"]);
}

fn survives_in_roles(roles: [&str; 2]) {
    let mut victim = Victim::start();
    for role in roles {
        let steps = dies_everywhere(&mut victim, role, "attach", false);
        assert!(steps > 15, "an attachment has more steps than {steps}");
    }
    victim.end();
}

#[test]
fn a_victim_survives_a_detaching_injector_killed_at_any_step() {
    let mut victim = Victim::start();
    for role in ["main", "registers"] {
        let steps = dies_everywhere(&mut victim, role, "detach", true);
        assert!(steps > 5, "a detachment has more steps than {steps}");
    }
    victim.end();
}

#[test]
fn attaching_many_times_leaves_nothing() {
    let victim = Victim::start();
    let process = victim.process();
    let range = victim.arena("anonymous");
    let mut roles: Vec<u32> = victim.threads.values().copied().collect();
    roles.sort_unstable();
    for _ in 0..10 {
        for &tid in &roles {
            match attach_observed(&process, std::slice::from_ref(&range), Some(tid), &mut |_| {}) {
                Ok(injected) => {
                    assert!(!injected.reused);
                    let again = attach(&process, std::slice::from_ref(&range)).expect("taking over works");
                    assert_eq!(again, Injected { fd: injected.fd, reused: true });
                    detach_observed(&process, &injected, None, &mut |_| {}).expect("detaching works");
                }
                // A thread that sleeps with a limit nearly all the time.
                Err(InjectError::NoThread { reasons, .. }) => {
                    assert!(reasons.is_subset(&BTreeSet::from([Unsuitable::RestartBlock])), "{reasons:?}");
                }
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    assert_eq!(userfaultfds(&process), 0);
    victim.end();
}

#[test]
fn refuses_what_it_cannot_do_safely() {
    let mut victim = Victim::start();
    let process = victim.process();
    let unmapped = 0x1000..0x2000;
    let refused = attach(&process, std::slice::from_ref(&unmapped)).expect_err("nothing is mapped there");
    assert!(matches!(refused, InjectError::Refused { .. }), "{refused:?}");
    assert_eq!(userfaultfds(&process), 0, "what was made was closed again");

    let tracee = tracee::Tracee::seize(process.pid()).expect("it may be traced");
    let traced = attach(&process, &[]).expect_err("it is traced");
    assert!(matches!(traced, InjectError::Traced { .. }), "{traced:?}");
    tracee.interrupt().expect("it lives");
    chain::stop(&tracee, process.pid(), &mut |_| {}).expect("it stops");
    tracee.detach(0).expect("it stands");

    let pid = nix::unistd::Pid::from_raw(i32::try_from(process.pid()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("it lives");
    let path = format!("/proc/{}/status", process.pid());
    while victim::status(&path, "State").is_some_and(|state| !state.starts_with('T')) {
        std::thread::yield_now();
    }
    let stopped = attach(&process, &[]).expect_err("it is stopped");
    assert!(matches!(stopped, InjectError::Stopped { .. }), "{stopped:?}");
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("it lives");
    assert_eq!(userfaultfds(&process), 0);

    let no_thread = attach_observed(&process, &[], Some(u32::MAX >> 2), &mut |_| {}).expect_err("there is none");
    let ended = BTreeSet::from([Unsuitable::Ended]);
    assert!(matches!(&no_thread, InjectError::NoThread { reasons, .. } if *reasons == ended), "{no_thread:?}");

    victim.tell("userfaultfd");
    let foreign = attach(&process, &[]).expect_err("it has one of its own");
    assert!(matches!(foreign, InjectError::ForeignUserfaultfd { .. }), "{foreign:?}");
    assert_eq!(userfaultfds(&process), 1, "which is left alone");
    victim.end();

    let gone = attach(&process, &[]).expect_err("it has ended");
    assert!(matches!(gone, InjectError::Process(ProcessError::Gone { .. } | ProcessError::Os { .. })), "{gone:?}");
}

#[test]
fn tracks_writes_of_the_program_and_of_the_kernel_in_its_name() {
    kernel_supports().expect("Linux 6.7 or newer");
    assert!(crate::sys::pagemap::supported(), "Linux 6.7 or newer");
    let mut victim = Victim::start();
    let process = victim.process();
    let pages = workers::ARENA_PAGES as u64;
    let block = |name: &str| Block { name: name.to_owned(), pages };
    let layout = Layout::new(vec![block("anonymous"), block("shared")]).expect("a good layout");
    let addresses = ["anonymous", "shared"].map(|name| victim.arena(name).start);
    let map = RangeMap::new(&layout, &addresses).expect("no overlap");
    let mut tracker = PagemapTracker::new(process.clone(), map, false);
    victim.tell("touch anonymous 1");
    victim.tell("touch shared 2");
    tracker.arm().expect("arming works");
    let harvest = |tracker: &mut PagemapTracker| {
        let (mut seen, mut dirty) = (PageSet::empty(2 * pages), PageSet::empty(2 * pages));
        tracker.peek(&mut seen).expect("it is armed");
        tracker.harvest(&mut dirty).expect("it is armed");
        assert_eq!(seen, dirty, "a peek sees what the harvest finds");
        dirty.iter().collect::<Vec<_>>()
    };
    assert!(harvest(&mut tracker).is_empty(), "what was written before the arming is not dirty");
    // Pages that were there and pages never touched before, by the program and by the kernel.
    for command in ["touch anonymous 1", "touch anonymous 5", "kernel anonymous 9", "touch shared 2", "kernel shared 7"]
    {
        victim.tell(command);
    }
    assert_eq!(harvest(&mut tracker), [1, 5, 9, pages + 2, pages + 7]);
    assert!(harvest(&mut tracker).is_empty());
    victim.tell("kernel anonymous 1");
    victim.tell("kernel shared 2");
    victim.tell("look anonymous 5");
    assert_eq!(harvest(&mut tracker), [1, pages + 2]);
    // Reading it from here dirties nothing.
    let memory = super::super::process::ProcessMemory::new(process.clone());
    let mut bytes = vec![0; PAGE_SIZE];
    memory.read(addresses[0] + 9 * PAGE_SIZE as u64, &mut bytes).expect("it is mapped");
    assert!(harvest(&mut tracker).is_empty());
    tracker.disarm().expect("disarming works");
    assert_eq!(userfaultfds(&process), 0);
    // A process that is gone is an error, not a clean harvest.
    tracker.arm().expect("arming works again");
    victim.end();
    let gone = tracker.harvest(&mut PageSet::empty(2 * pages));
    assert!(matches!(gone, Err(TrackError::Scan(ScanError::Gone { .. }))), "{gone:?}");
    tracker.disarm().expect("nothing is left in what is gone");
}
