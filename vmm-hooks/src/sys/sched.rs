//! Scheduling: a thread that runs before ordinary ones, memory that stays resident.
//!
//! Both are best effort: a heartbeat on a busy host is late without them, never wrong.

use std::io;

/// What cannot wait until an ordinary thread has used up its time: the lowest real-time priorities, above every ordinary thread and below every other
/// real-time one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Urgency {
    /// A guest stands until it is done.
    Pause = 1,
    /// Others take this host for dead if it is late.
    Heartbeat = 2,
}

/// Gives the calling thread a real-time priority (round robin). Threads that it starts do not inherit it.
///
/// # Errors
/// If this process may not; the thread goes on as it was.
pub fn realtime(urgency: Urgency) -> io::Result<()> {
    // The calling thread.
    set(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, urgency as libc::c_int)
}

/// Gives the first thread of a process, by its number, a real-time priority, or takes it away again (`None`).
///
/// # Errors
/// If there is no such process, or this one may not; it goes on as it was.
pub fn realtime_of(process: u32, urgency: Option<Urgency>) -> io::Result<()> {
    let thread = libc::pid_t::try_from(process).ok().filter(|&thread| thread > 0);
    let thread = thread.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    match urgency {
        Some(urgency) => set(thread, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, urgency as libc::c_int),
        // Without privileges the flag cannot be taken away again.
        None => set(thread, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, 0),
    }
}

fn set(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let wanted = libc::sched_param { sched_priority: priority };
    // SAFETY: `sched_setscheduler` reads one `sched_param` through the pointer, which points to `wanted`, alive and
    // initialised for the whole call.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &raw const wanted) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Keeps the memory of this process resident, what it maps later included.
///
/// # Errors
/// If this process may not lock so much.
pub fn lock_memory() -> io::Result<()> {
    use rustix::mm::MlockAllFlags as Flags;
    // On fault: untouched reserves (stacks, arenas) are not filled in.
    Ok(rustix::mm::mlockall(Flags::CURRENT | Flags::FUTURE | Flags::ONFAULT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_becomes_one_and_is_none_again() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().expect("it is there");
        let policy = || {
            // SAFETY: asks about a process that was not waited for; touches no memory.
            unsafe { libc::sched_getscheduler(libc::pid_t::try_from(child.id()).expect("small")) }
        };
        let before = policy();
        match realtime_of(child.id(), Some(Urgency::Pause)) {
            Ok(()) => {
                assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, libc::SCHED_RR);
                realtime_of(child.id(), None).expect("it is less than it has");
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM)),
        }
        assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, before);
        realtime_of(0, None).expect_err("nobody has that number");
        child.kill().and_then(|()| child.wait()).expect("it ends");
    }

    #[test]
    fn the_calling_thread_alone_becomes_a_real_time_one() {
        let policy = || {
            // SAFETY: asks about the calling thread; touches no memory.
            unsafe { libc::sched_getscheduler(0) }
        };
        let before = policy();
        let thread = std::thread::spawn(move || match realtime(Urgency::Pause) {
            Ok(()) => assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, libc::SCHED_RR),
            // Not root: the thread goes on as it was.
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM));
                assert_eq!(policy(), before);
            }
        });
        thread.join().expect("it does not panic");
        assert_eq!(policy(), before);
    }
}
