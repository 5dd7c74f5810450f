//! Whether a guest has nothing to do: all of its vCPU threads sleep, and have slept since the look before.
//!
//! Seen from outside, in `/proc`, alike under KVM and TCG: a vCPU that halts sleeps in the kernel. It is a hint for pacing
//! and no more: a thread may also sleep for a lock, and an interrupt may be on its way.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};

/// A guest of more vCPUs is never held to be idle: looking would cost too much.
const VCPUS_MAX: usize = 16;

/// The kernel's description of a thread is shorter.
const STATUS_MAX: usize = 4096;

/// The vCPU threads of one QEMU.
#[derive(Debug, Default)]
pub(super) struct Vcpus {
    threads: Vec<Thread>,
}

#[derive(Debug)]
struct Thread {
    status: File,
    /// How often it had gone to sleep when it was last seen asleep.
    slept: Option<u64>,
}

impl Vcpus {
    /// Asks QEMU which threads they are. A guest whose threads cannot be looked at is never idle.
    pub(super) fn find(qmp: &mut Qmp, pid: u32) -> Result<Self, QmpError> {
        let listed = qmp.execute("query-cpus-fast", json!({}))?;
        let mut ids: Vec<u64> =
            listed.as_array().into_iter().flatten().filter_map(|cpu| cpu.get("thread-id")?.as_u64()).collect();
        // Without threads of their own several vCPUs share one.
        ids.sort_unstable();
        ids.dedup();
        if ids.len() > VCPUS_MAX || listed.as_array().is_none_or(|listed| listed.iter().any(Value::is_null)) {
            return Ok(Self::default());
        }
        let open = |id: &u64| File::open(format!("/proc/{pid}/task/{id}/status"));
        let opened: Result<Vec<File>, _> = ids.iter().map(open).collect();
        let threads = opened.unwrap_or_default().into_iter().map(|status| Thread { status, slept: None }).collect();
        Ok(Self { threads })
    }

    /// Whether each of them sleeps now and has not been awake since the last look.
    pub(super) fn idle(&mut self) -> bool {
        let mut idle = !self.threads.is_empty();
        for thread in &mut self.threads {
            // Each is looked at, also when another is awake: the next look compares with this one.
            idle &= thread.still_asleep();
        }
        idle
    }
}

impl Thread {
    fn still_asleep(&mut self) -> bool {
        let mut text = [0; STATUS_MAX];
        let seen = self.status.read_at(&mut text, 0).ok().and_then(|length| asleep(&text[..length]));
        let before = std::mem::replace(&mut self.slept, seen);
        seen.is_some() && seen == before
    }
}

/// How often the thread of this `status` has gone to sleep, if it sleeps.
fn asleep(status: &[u8]) -> Option<u64> {
    let field = |name: &[u8]| {
        let line = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(name))?;
        std::str::from_utf8(line).ok().map(str::trim)
    };
    field(b"State:")?.starts_with('S').then_some(())?;
    field(b"voluntary_ctxt_switches:")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::{Duration, Instant};

    #[test]
    fn only_a_sleeping_thread_counts() {
        let status = |state: &str| format!("Name:\tqemu\nState:\t{state}\nThreads:\t3\nvoluntary_ctxt_switches:\t42\n");
        assert_eq!(asleep(status("S (sleeping)").as_bytes()), Some(42));
        assert_eq!(asleep(status("R (running)").as_bytes()), None);
        assert_eq!(asleep(b"State:\tS (sleeping)\n"), None);
        assert_eq!(asleep(b""), None);
    }

    #[test]
    fn a_thread_that_woke_between_two_looks_was_not_idle() {
        let (tell_id, id) = channel();
        let (wake, woken) = channel::<()>();
        let (answer, answered) = channel();
        let sleeper = thread::spawn(move || {
            tell_id.send(std::fs::read_link("/proc/thread-self").expect("a thread")).expect("waited for");
            while woken.recv().is_ok() {
                answer.send(()).expect("waited for");
            }
        });
        let path = std::path::Path::new("/proc").join(id.recv().expect("told")).join("status");
        let thread = Thread { status: File::open(path).expect("there"), slept: None };
        let mut vcpus = Vcpus { threads: vec![thread] };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !vcpus.idle() {
            assert!(Instant::now() < deadline, "a thread that waits is idle");
            thread::yield_now();
        }
        wake.send(()).expect("it waits");
        answered.recv().expect("it answers");
        assert!(!vcpus.idle(), "it was awake since");
        drop(wake);
        sleeper.join().expect("no panic");
        assert!(!vcpus.idle(), "a thread that has ended is not idle");
        assert!(!Vcpus::default().idle());
    }
}
