//! Keeps the two threads of a pause, the protector's and the first one of the process, on one processor while they take turns.
//!
//! Linux wakes a real-time thread on another processor if a real-time thread of at least its priority runs where it ran last (`select_task_rq_rt`), which
//! takes an interrupt there: some 30 us in a virtual machine. On one processor taking turns costs a change of threads.
//!
//! Promises: best effort, and nothing else changes by it. The process is kept only where it might run when this began, and its protector's thread only
//! while it waits for an answer. Who has confined the process otherwise in between is overruled when its protector's thread moves.

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity, sched_yield};

/// The first thread of a process, and where it is.
#[derive(Debug)]
pub(super) struct Beside {
    process: Pid,
    /// Where it may run.
    may: CpuSet,
    /// Where it is kept.
    kept: Option<usize>,
}

impl Beside {
    /// `None`: the kernel does not say where it may run.
    pub(super) fn new(process: u32) -> Option<Self> {
        let process = i32::try_from(process).ok().and_then(Pid::from_raw)?;
        Some(Self { process, may: sched_getaffinity(Some(process)).ok()?, kept: None })
    }

    /// Keeps both threads on the processor that this one runs on, until what is returned is dropped; the other one beyond that. `lives`: whether the process
    /// has its number still.
    pub(super) fn take_turns(&mut self, lives: impl FnOnce() -> bool) -> Option<Stays> {
        let before = sched_getaffinity(None).ok()?;
        let here = sched_getcpu();
        if !self.may.is_set(here) {
            return None;
        }
        let mut one = CpuSet::new();
        one.set(here);
        sched_setaffinity(None, &one).ok()?;
        let stays = Stays { before };
        // Between the two lines above this one may have been moved away: then it is elsewhere once.
        if self.kept != Some(here) && lives() && sched_setaffinity(Some(self.process), &one).is_ok() {
            self.kept = Some(here);
        }
        Some(stays)
    }

    /// Lets the other one run wherever it might at first. Not of a process that has been waited for.
    pub(super) fn part(&mut self) {
        if self.kept.take().is_some() {
            // It fails if it ends.
            let _ = sched_setaffinity(Some(self.process), &self.may);
        }
    }
}

/// This thread stays where it is. For this thread alone.
#[derive(Debug)]
pub(super) struct Stays {
    before: CpuSet,
}

impl Stays {
    /// Lets the other one run, if it has something to do, before this one goes on.
    pub(super) fn give_way(self) {
        sched_yield();
    }
}

impl Drop for Stays {
    fn drop(&mut self) {
        // Fails if none of these processors is left to it: then the kernel has moved it.
        let _ = sched_setaffinity(None, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_on_one_processor_and_afterwards_where_they_may() {
        // A thread of its own: where a test runs is nobody else's business.
        let tested = std::thread::spawn(|| {
            let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().expect("it is there");
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let (mine, theirs) = (sched_getaffinity(None).expect("ours"), sched_getaffinity(pid).expect("it is there"));
            let mut beside = Beside::new(child.id()).expect("it is there");
            drop(beside.take_turns(|| false).expect("this one stays"));
            assert_eq!(sched_getaffinity(pid), Ok(theirs), "nobody knows whose number that is");
            let stays = beside.take_turns(|| true).expect("it may run where we do");
            let mut here = CpuSet::new();
            here.set(sched_getcpu());
            assert_eq!(sched_getaffinity(None), Ok(here));
            assert_eq!(sched_getaffinity(pid), Ok(here));
            drop(stays);
            assert_eq!(sched_getaffinity(None), Ok(mine));
            assert_eq!(sched_getaffinity(pid), Ok(here), "it waits there for the next turn");
            beside.part();
            assert_eq!(sched_getaffinity(pid), Ok(theirs));
            // Somebody else has confined it to where we are not.
            beside.may = CpuSet::new();
            assert!(beside.take_turns(|| true).is_none());
            assert_eq!((sched_getaffinity(None), sched_getaffinity(pid)), (Ok(mine), Ok(theirs)));
            child.kill().and_then(|()| child.wait()).expect("it ends");
        });
        tested.join().expect("it does not panic");
    }
}
