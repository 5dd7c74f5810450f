//! What the threads of a microVM may ask the kernel for, once they run: what a running guest needs, and nothing else.
//!
//! A guest that broke out of a device would be in a vCPU's thread, or in the one that receives frames. Promises: such a thread opens
//! nothing, starts nothing, connects to nothing, maps nothing that can be executed, and has no capability; of KVM it may ask to run the guest,
//! to move an interrupt line and to empty dirty rings. What it may not is answered with `EPERM` and not done. It stays a thread of its process, whose
//! memory and open files it can reach. The process of a microVM is therefore confined as a whole before it makes its machine ([`confine_process`]): the same,
//! and what a machine is made of: threads, KVM's other questions, messages.
//!
//! Sources: Documentation/userspace-api/seccomp_filter.rst, and capabilities(7): both belong to a thread, not to its process.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use rustix::process::{Gid, Signal, Uid, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::guest::{GuestError, GuestErrorKind};

/// Calls with any argument: the guest's disks and wire, waiting, memory, the clock, and the end of a thread.
const CALLS: [libc::c_long; 39] = [
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_getcpu,
    libc::SYS_getrusage,
    libc::SYS_sched_getaffinity,
    libc::SYS_exit,
];

/// `KVM_RUN`, `KVM_IRQ_LINE` and, by a vCPU whose ring is full, `KVM_RESET_DIRTY_RINGS` of linux/kvm.h.
const IOCTLS: [u64; 3] = [0xae80, 0x4008_ae61, 0xaec7];

/// What the process of a machine needs beside [`CALLS`]: messages, threads, anonymous memory, the states of what is open, and its end.
const PROCESS_CALLS: [libc::c_long; 23] = [
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_eventfd2,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    // Answered by `no_clone3` first.
    libc::SYS_clone3,
    libc::SYS_set_tid_address,
    libc::SYS_seccomp,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_rt_sigaction,
    libc::SYS_exit_group,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_getppid,
    libc::SYS_readlink,
    libc::SYS_uname,
    libc::SYS_sysinfo,
];

/// All of KVM's: the type of its numbers.
const KVM_TYPE: u64 = 0xae00;
const TYPE: u64 = 0xff00;
/// Of `fcntl`: a copy of a descriptor, its flags, the file's flags to look at, seals. Not to set: those of a file are shared with the protector, and would make
/// it wait; nor signals to whoever has the same user.
const FCNTLS: [libc::c_int; 6] =
    [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_ADD_SEALS, libc::F_GET_SEALS];
/// Of `prctl`: the names of threads and memory, to give up more, and what the kernel told it of itself at its start (`PR_GET_AUXV`, which a library may ask for at
/// any time: the size of a page, for one). Not whether it ends with its protector.
const PRCTLS: [libc::c_int; 5] =
    [libc::PR_SET_NAME, libc::PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS, libc::PR_SET_SECCOMP, GET_AUXV];
const GET_AUXV: libc::c_int = 0x4155_5856;

/// Nobody, and no group.
const NOBODY: u32 = 65534;

/// Made once: the filter depends on nothing but the process.
static FILTER: LazyLock<Result<BpfProgram, String>> = LazyLock::new(|| filter().map_err(|error| error.to_string()));

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let word = |argument, test, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, test, value);
    let asks = IOCTLS.into_iter().map(|ask| SeccompRule::new(vec![word(1, SeccompCmpOp::Eq, ask)?]));
    allow(CALLS.into_iter(), asks.collect::<Result<_, _>>()?, Vec::new())
}

fn process_filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let word = |argument, test, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, test, value);
    let asks = SeccompRule::new(vec![word(1, SeccompCmpOp::MaskedEq(TYPE), KVM_TYPE)?])?;
    let one_of = |argument, values: &[libc::c_int]| {
        let value = |&value: &libc::c_int| u64::try_from(value).expect("a small number");
        let rules = values.iter().map(|each| SeccompRule::new(vec![word(argument, SeccompCmpOp::Eq, value(each))?]));
        rules.collect::<Result<Vec<_>, seccompiler::BackendError>>()
    };
    // Limits are its own: another process of the same user would be ended by them.
    let some = [
        (libc::SYS_fcntl, one_of(1, &FCNTLS)?),
        (libc::SYS_prctl, one_of(0, &PRCTLS)?),
        (libc::SYS_prlimit64, one_of(0, &[0])?),
    ];
    let thread = u64::try_from(libc::CLONE_THREAD).expect("a flag");
    let threads = SeccompRule::new(vec![word(0, SeccompCmpOp::MaskedEq(thread), thread)?])?;
    let calls = CALLS.into_iter().chain(PROCESS_CALLS);
    allow(calls, vec![asks], some.into_iter().chain([(libc::SYS_clone, vec![threads])]).collect())
}

/// The flags of `clone3` are in memory, where no filter looks: the C library is told that there is no such call, and takes `clone`.
fn no_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let calls = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let none = SeccompAction::Errno(u32::try_from(libc::ENOSYS).expect("an error's number"));
    SeccompFilter::new(calls, SeccompAction::Allow, none, TargetArch::x86_64)?.try_into()
}

/// Allows `calls` with any argument, `asks` of `ioctl`, `more`, signals within the process, and memory that holds data.
fn allow(
    calls: impl Iterator<Item = libc::c_long>,
    asks: Vec<SeccompRule>,
    more: Vec<(libc::c_long, Vec<SeccompRule>)>,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let word = |argument, test, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, test, value);
    let mut calls: BTreeMap<_, _> = calls.map(|call| (call, Vec::new())).chain(more).collect();
    calls.insert(libc::SYS_ioctl, asks);
    // One vCPU kicks the others of its machine, and nobody else.
    let own = u64::from(rustix::process::getpid().as_raw_nonzero().get().unsigned_abs());
    calls.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![word(0, SeccompCmpOp::Eq, own)?])?]);
    // What the allocator maps and grows is data.
    let executable = u64::try_from(libc::PROT_EXEC).expect("a flag");
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let data = word(2, SeccompCmpOp::MaskedEq(executable), 0)?;
        calls.insert(call, vec![SeccompRule::new(vec![data])?]);
    }
    let refused = SeccompAction::Errno(u32::try_from(libc::EPERM).expect("an error's number"));
    SeccompFilter::new(calls, refused, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Confines the thread that calls it, for good.
///
/// # Errors
/// If this kernel has no seccomp filters, or does not let this thread have one. Nothing may run in it then.
pub(super) fn confine() -> Result<(), GuestError> {
    let failed = |why: &dyn std::fmt::Display| {
        GuestError::new(GuestErrorKind::Failed, format!("a thread of the microVM cannot be confined: {why}"))
            .advise("nothing was started; the host's kernel must have seccomp filters (CONFIG_SECCOMP_FILTER)")
    };
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(|error| failed(&error))?;
    let filter = FILTER.as_ref().map_err(|error| failed(error))?;
    seccompiler::apply_filter(filter).map_err(|error| failed(&error))
}

/// Confines this process, which has one thread, for good: those that it starts inherit all of it. What could not be had of that which not every
/// host lets a process have, in words.
///
/// # Errors
/// As for [`confine`].
pub(super) fn confine_process() -> Result<Vec<String>, GuestError> {
    let failed = |why: &dyn std::fmt::Display| {
        GuestError::new(GuestErrorKind::Failed, format!("the microVM's process cannot be confined: {why}"))
            .advise("nothing was started; the host's kernel must have seccomp filters (CONFIG_SECCOMP_FILTER)")
    };
    let mut missing = Vec::new();
    if let Err(error) = crate::sys::isolate::empty_root() {
        missing.push(format!("an empty root: {error}"));
    }
    if rustix::process::geteuid().is_root() {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        let left = set_thread_groups(&[])
            .and_then(|()| set_thread_res_gid(group, group, group))
            .and_then(|()| set_thread_res_uid(user, user, user));
        if let Err(error) = left {
            missing.push(format!("a user without rights: {error}"));
        }
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(|error| failed(&error))?;
    // After the user: a change of that takes it away again. Who started this process lives until its end.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| failed(&error))?;
    for filter in [process_filter(), no_clone3()] {
        let filter = filter.map_err(|error| failed(&error))?;
        seccompiler::apply_filter(&filter).map_err(|error| failed(&error))?;
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::FileExt;
    use std::process::Command;
    use std::sync::{Arc, mpsc};

    use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};

    /// In a thread of its own, which keeps what is done to it.
    fn confined<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(move || {
            confine().expect("this kernel has seccomp filters");
            act()
        });
        thread.join().expect("it does not panic")
    }

    #[test]
    fn what_a_guest_needs_is_done() {
        let mut file = tempfile::tempfile().expect("room");
        let (told, hear) = mpsc::channel();
        confined(move || {
            file.write_all(&[7; 4096]).and_then(|()| file.sync_data()).expect("a disk");
            file.read_exact_at(&mut [0; 512], 512).expect("a disk");
            // Large enough to be mapped, and given back.
            let large = vec![1_u8; 64 << 20];
            told.send(large.iter().map(|&byte| u64::from(byte)).sum::<u64>())
        })
        .expect("somebody hears");
        assert_eq!(hear.recv(), Ok(64 << 20));
    }

    #[test]
    fn nothing_is_opened_started_connected_to_or_made_executable() {
        let denied = |error: &std::io::Error| error.raw_os_error() == Some(libc::EPERM);
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let (opened, started, connected, mapped, given) = confined(move || {
            let mapped = MmapRegionBuilder::<()>::new(4096).with_mmap_prot(libc::PROT_READ | libc::PROT_EXEC).build();
            (
                File::open("/proc/self/mem").map(drop),
                Command::new("/bin/true").status().map(drop),
                TcpStream::connect(address).map(drop),
                mapped.map(drop),
                set_capabilities(
                    None,
                    CapabilitySets {
                        effective: CapabilitySet::SYS_ADMIN,
                        permitted: CapabilitySet::SYS_ADMIN,
                        inheritable: CapabilitySet::empty(),
                    },
                ),
            )
        });
        for (what, result) in [("open", opened), ("start", started), ("connect", connected)] {
            assert!(denied(&result.expect_err(what)), "{what}");
        }
        let refused = mapped.expect_err("it may not");
        assert!(matches!(&refused, MmapRegionError::Mmap(error) if denied(error)), "{refused}");
        assert_eq!(given, Err(rustix::io::Errno::PERM));
        // Others of the process are as they were.
        let mut text = String::new();
        File::open("/proc/self/status").and_then(|mut file| file.read_to_string(&mut text)).expect("ours");
    }

    #[test]
    fn the_process_reaches_no_other_one_and_no_flags_that_others_share() {
        use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
        use rustix::process::{Pid, Resource, getrlimit, prlimit};

        let mut other = Command::new("/bin/sleep").arg("1000").spawn().expect("it is there");
        let pid = Pid::from_child(&other);
        let file = tempfile::tempfile().expect("room");
        let filtered = std::thread::spawn(move || {
            for filter in [process_filter(), no_clone3()] {
                seccompiler::apply_filter(&filter.expect("it is right")).expect("this kernel has seccomp filters");
            }
            rustix::thread::set_name(c"filtered").expect("its own name");
            file.try_clone().and_then(|copy| copy.sync_data()).expect("a copy of what it has");
            let limits = getrlimit(Resource::Nofile);
            let flags = fcntl_getfl(&file).expect("to look is nothing");
            [
                prlimit(Some(pid), Resource::Nofile, limits).map(drop),
                fcntl_setfl(&file, flags | OFlags::NONBLOCK),
                rustix::io::ioctl_fionbio(&file, true),
                set_parent_process_death_signal(None),
            ]
        });
        let ended = filtered.join();
        other.kill().and_then(|()| other.wait()).expect("it ends");
        let refused = ended.expect("it does not panic");
        assert_eq!(refused, [Err(rustix::io::Errno::PERM); 4]);
    }

    #[test]
    fn of_kvm_it_may_only_run_the_guest() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else { return println!("skipped: no /dev/kvm") };
        let kvm = Arc::new(kvm);
        let vm = confined({
            let kvm = Arc::clone(&kvm);
            move || kvm.create_vm().map(drop)
        });
        assert_eq!(vm.expect_err("it may not").errno(), libc::EPERM);
        kvm.create_vm().expect("others may");
    }
}
