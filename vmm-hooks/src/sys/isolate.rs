//! A process that sees no file: a mount namespace of its own, whose root is an empty directory that cannot be written. And one that others do
//! not end by the way.

use std::ffi::CStr;
use std::io;
use std::ptr;

/// Where the empty root is mounted on its way: a directory that is there for whoever was started.
const PLACE: &CStr = c"/proc";

/// Takes every file away from the process, which has one thread; what is open stays open. Needs `CAP_SYS_ADMIN`.
///
/// # Errors
/// If the kernel refuses a step. What was done until then is seen by this process alone.
pub fn empty_root() -> io::Result<()> {
    // SAFETY: touches no memory; of one thread, so that no other one has its view of files changed.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the kernel reads the path, which ends with a zero; the other pointers may be null with these flags.
    check(unsafe { libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), flags, ptr::null()) })?;
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let (kind, most) = (c"tmpfs".as_ptr(), c"size=4k,nr_inodes=2".as_ptr());
    // SAFETY: the kernel reads four strings, each of which ends with a zero.
    check(unsafe { libc::mount(kind, PLACE.as_ptr(), kind, flags, most.cast()) })?;
    // SAFETY: the kernel reads a path that ends with a zero.
    check(unsafe { libc::chdir(PLACE.as_ptr()) })?;
    let here = c".".as_ptr();
    // The old root is put over the new one, and taken away from there (pivot_root(2)).
    // SAFETY: the kernel reads two paths that end with a zero.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, here, here) };
    if pivoted == 0 {
        // SAFETY: the kernel reads a path that ends with a zero.
        check(unsafe { libc::umount2(here, libc::MNT_DETACH) })?;
    } else {
        // The root of an initramfs cannot be moved (pivot_root(2)). Who has no capability does not get out of this one either.
        // SAFETY: the kernel reads a path that ends with a zero.
        check(unsafe { libc::chroot(here) })?;
    }
    // SAFETY: as above.
    check(unsafe { libc::chdir(c"/".as_ptr()) })
}

/// Lets signals pass by that a terminal or a service manager sends to all of a group: who started the process says when it ends.
pub fn ignore_endings() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: changes what a signal does; no handler is installed.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
