//! KVM: what its crates leave to unsafe code. A VM with its memory, a vCPU with its kick.
//!
//! Promise: memory that a VM was given stays mapped as long as the VM or one of its vCPUs is there. A kick is never lost: a
//! vCPU that is kicked leaves the guest, or does not enter it, until [`Kick::clear`]; what it had asked of user space is finished
//! first (Documentation/virt/kvm/api.rst, `immediate_exit`).

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_SYNC_X86_VALID_FIELDS, KVMIO, Xsave, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_sync_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::kvm::ram::Ram;

// Private in kvm-ioctls, or not there.
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// The only memory slot.
pub(crate) const SLOT: u32 = 0;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`: reading the log does not protect pages again, clearing does.
const MANUAL_PROTECT: u64 = 1;
/// Bytes of a `kvm_xsave` without extension.
const XSAVE_MIN: usize = 4096;
/// The mapping that holds `immediate_exit`: the first page of a vCPU's.
const RUN_BYTES: usize = 4096;
const IMMEDIATE_EXIT: usize = std::mem::offset_of!(kvm_bindings::kvm_run, immediate_exit);

/// A call of KVM that failed.
#[derive(Debug, thiserror::Error)]
#[error("KVM could not {what}")]
pub struct KvmError {
    /// What was tried.
    pub what: &'static str,
    /// The kernel's reason.
    #[source]
    pub source: io::Error,
}

/// Names a failure of kvm-ioctls.
pub fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// KVM, of a descriptor of `/dev/kvm` that somebody opened.
#[must_use]
pub fn of(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and nobody else's: it was owned. One of something else is refused by the first call.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// A virtual machine and its memory, which begins at address zero.
pub struct Vm {
    // Dropped first.
    fd: VmFd,
    ram: Arc<Ram>,
    logs: AtomicBool,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("ram", &self.ram).finish_non_exhaustive()
    }
}

impl Vm {
    /// A machine with `ram`, whose writes are not logged.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn new(kvm: &Kvm, ram: Arc<Ram>) -> Result<Self, KvmError> {
        let vm = Self::bare(kvm, ram)?;
        // Reading the log leaves it as it is, clearing it protects pages again. In every kernel since 5.2.
        let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = MANUAL_PROTECT;
        vm.fd.enable_cap(&cap).map_err(failed("let dirty pages be protected by hand"))?;
        vm.log(false)?;
        Ok(vm)
    }

    /// The same, whose vCPUs write what they log into rings of `length` entries each ([`super::ring::Ring`]): it has no bitmap.
    ///
    /// # Errors
    /// If KVM refuses, as most that have no rings do.
    pub fn with_rings(kvm: &Kvm, ram: Arc<Ram>, length: usize) -> Result<Self, KvmError> {
        let vm = Self::bare(kvm, ram)?;
        // The second is all that older kernels know; on x86 both are the same.
        let known = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let cap = known.into_iter().find(|&cap| vm.fd.check_extension_raw(cap.into()) > 0);
        let mut cap = kvm_enable_cap { cap: cap.unwrap_or(KVM_CAP_DIRTY_LOG_RING), ..Default::default() };
        cap.args[0] = (length * size_of::<kvm_dirty_gfn>()) as u64;
        vm.fd.enable_cap(&cap).map_err(failed("keep dirty pages in rings"))?;
        vm.log(false)?;
        Ok(vm)
    }

    fn bare(kvm: &Kvm, ram: Arc<Ram>) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(failed("make a virtual machine"))?;
        Ok(Self { fd, ram, logs: AtomicBool::new(false) })
    }

    /// The machine's descriptor. Its memory slots are this type's alone.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Begins or ends logging writes. Beginning finds no page dirty.
    ///
    /// # Errors
    /// If KVM refuses; it is as before then.
    pub fn log(&self, on: bool) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: self.ram.bytes(),
            userspace_addr: self.ram.host_address(),
        };
        // SAFETY: the region is the whole mapping of `ram`, which lives as long as `self`; vCPUs keep `self` alive. The guest may
        // write it at any time, which every other access of `Ram` takes into account.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("give memory to the machine"))?;
        self.logs.store(on, Ordering::SeqCst);
        Ok(())
    }

    /// Whether writes are logged.
    #[must_use]
    pub fn logs(&self) -> bool {
        self.logs.load(Ordering::SeqCst)
    }

    /// Takes harvested entries of all rings back and tracks their pages anew. Linux 6.16 and later look for signals between entries, and break off
    /// without protecting the pages of those that they have gathered (`kvm_dirty_ring_reset`, virt/kvm/dirty_ring.c); so none is delivered meanwhile,
    /// but for those that stop a thread.
    ///
    /// # Errors
    /// If the machine has no rings.
    pub fn reset_rings(&self) -> Result<Taken, KvmError> {
        // SAFETY: takes no argument, and changes nothing but the flags of entries, which are atomics everywhere.
        let reset = || check(unsafe { ioctl(&self.fd, KVM_RESET_DIRTY_RINGS()) }, "take its rings of dirty pages back");
        let (taken, waited) = unsignalled(reset);
        Ok(Taken { entries: usize::try_from(taken?).expect("not negative"), broken_off: waited })
    }

    /// How many words a dirty log has.
    #[must_use]
    pub fn log_words(&self) -> usize {
        usize::try_from(self.ram.pages().div_ceil(64)).expect("lengths are 64 bits wide")
    }

    /// Reads the log into `bits`, which has [`Vm::log_words`] words: one bit a page.
    ///
    /// # Errors
    /// If nothing is logged.
    pub fn dirty(&self, bits: &mut [u64]) -> Result<(), KvmError> {
        assert_eq!(bits.len(), self.log_words(), "a log of another machine");
        let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() };
        let log = kvm_dirty_log { slot: SLOT, padding1: 0, __bindgen_anon_1: bitmap };
        // SAFETY: KVM reads one `kvm_dirty_log` and writes one bit for each page of the slot, rounded up to 64: `log_words`.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DIRTY_LOG(), &log) };
        check(result, "read which pages are dirty").map(drop)
    }

    /// Clears the pages in `bits`, as read by [`Vm::dirty`], and tracks them anew.
    ///
    /// # Errors
    /// If nothing is logged. Some pages may be cleared then.
    pub fn clear_dirty(&self, bits: &[u64]) -> Result<(), KvmError> {
        assert_eq!(bits.len(), self.log_words(), "a log of another machine");
        let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr().cast_mut().cast() };
        let num_pages = u32::try_from(self.ram.pages()).expect("bounded by `Ram`");
        let mut log = kvm_clear_dirty_log { slot: SLOT, num_pages, first_page: 0, __bindgen_anon_1: bitmap };
        // SAFETY: KVM reads one `kvm_clear_dirty_log` and one bit for each page of the slot; it does not write the bitmap.
        let result = unsafe { ioctl_with_mut_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &mut log) };
        check(result, "clear which pages are dirty").map(drop)
    }
}

fn check(result: i32, what: &'static str) -> Result<i32, KvmError> {
    if result < 0 { Err(KvmError { what, source: io::Error::last_os_error() }) } else { Ok(result) }
}

/// What [`Vm::reset_rings`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// How many entries were taken back.
    pub entries: usize,
    /// The pages of the last of them may not be tracked.
    pub broken_off: bool,
}

/// How often this thread has waited for something, or was stopped.
fn waits() -> i64 {
    // SAFETY: any bytes are a `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes one `rusage`.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nvcsw
}

/// Does `call` while no signal is delivered to this thread that can be blocked: they come afterwards. Whether the thread stood meanwhile, as one does that
/// is stopped by one that cannot.
fn unsignalled<R>(call: impl FnOnce() -> R) -> (R, bool) {
    let (all, mut before) = (u64::MAX, 0_u64);
    // Not by the C library, which leaves out those that it uses itself.
    let set = |mask: *const u64, before: *mut u64| {
        // SAFETY: reads one set of 64 signals and writes one, where there is one; the mask is this thread's alone.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, mask, before, size_of::<u64>()) }
    };
    set(&raw const all, &raw mut before);
    let before_it = waits();
    let result = call();
    let waited = waits() != before_it;
    set(&raw const before, std::ptr::null_mut());
    (result, waited)
}

/// One vCPU. Keeps its machine's memory mapped.
pub struct Vcpu {
    // Dropped first.
    fd: VcpuFd,
    kick: Arc<Kick>,
    /// Bytes of its `kvm_xsave`; `None`: the kernel knows no size but the smallest.
    xsave: Option<usize>,
    /// Whether the kernel leaves registers in `kvm_run` each time that it leaves the guest.
    syncs: bool,
    _vm: Arc<Vm>,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("kick", &self.kick).field("xsave", &self.xsave).finish_non_exhaustive()
    }
}

impl Vcpu {
    /// Makes vCPU `index` of `vm`.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn new(vm: &Arc<Vm>, index: u64) -> Result<Self, KvmError> {
        let mut fd = vm.fd.create_vcpu(index).map_err(failed("make a vCPU"))?;
        let size = usize::try_from(vm.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let all = KVM_SYNC_X86_VALID_FIELDS;
        let syncs = u32::try_from(vm.fd.check_extension_int(Cap::SyncRegs)).is_ok_and(|fields| fields & all == all);
        if syncs {
            for register in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
                fd.set_sync_valid_reg(register);
            }
        }
        let kick = Arc::new(Kick::new(&fd)?);
        Ok(Self { fd, kick, xsave: (size > 0).then_some(size.max(XSAVE_MIN)), syncs, _vm: Arc::clone(vm) })
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Its descriptor, to run it.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Registers, system registers and events as they were when it last left the guest, if the kernel says so. For a vCPU that was run, and
    /// whose state was not changed from outside since.
    #[must_use]
    pub fn left_with(&self) -> Option<kvm_sync_regs> {
        self.syncs.then(|| self.fd.sync_regs())
    }

    /// What makes it leave the guest.
    #[must_use]
    pub fn kick(&self) -> Arc<Kick> {
        Arc::clone(&self.kick)
    }

    /// Room for its FPU and vector state.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new_xsave(&self) -> Result<Xsave, KvmError> {
        let words = self.xsave.map_or(0, |bytes| (bytes - XSAVE_MIN).div_ceil(4));
        let source = || io::Error::from(io::ErrorKind::OutOfMemory);
        Xsave::new(words).map_err(|_| KvmError { what: "make room for the vector state", source: source() })
    }

    /// Reads its FPU and vector state into `into`, made by [`Vcpu::new_xsave`].
    ///
    /// # Errors
    /// If KVM refuses, or `into` is too small.
    pub fn read_xsave(&self, into: &mut Xsave) -> Result<(), KvmError> {
        const WHAT: &str = "read a vCPU's vector state";
        self.fits(into, WHAT)?;
        if self.xsave.is_none() {
            let state = self.fd.get_xsave().map_err(failed(WHAT))?;
            // SAFETY: the flexible part is left as it is, and so is its length.
            unsafe { into.as_mut_fam_struct() }.xsave = state;
            return Ok(());
        }
        // SAFETY: `into` has as many bytes as KVM said that it writes, checked above.
        unsafe { self.fd.get_xsave2(into) }.map_err(failed(WHAT))
    }

    /// Loads its FPU and vector state.
    ///
    /// # Errors
    /// If KVM refuses, or `from` is too small.
    pub fn load_xsave(&self, from: &Xsave) -> Result<(), KvmError> {
        const WHAT: &str = "load a vCPU's vector state";
        self.fits(from, WHAT)?;
        if self.xsave.is_none() {
            // SAFETY: KVM reads one `kvm_xsave`: it has no extension.
            return unsafe { self.fd.set_xsave(&from.as_fam_struct_ref().xsave) }.map_err(failed(WHAT));
        }
        // SAFETY: `from` has as many bytes as KVM said that it reads, checked above.
        unsafe { self.fd.set_xsave2(from) }.map_err(failed(WHAT))
    }

    fn fits(&self, xsave: &Xsave, what: &'static str) -> Result<(), KvmError> {
        let words = self.xsave.map_or(0, |bytes| (bytes - XSAVE_MIN).div_ceil(4));
        if xsave.as_slice().len() >= words {
            return Ok(());
        }
        Err(KvmError { what, source: io::Error::from(io::ErrorKind::InvalidInput) })
    }
}

/// The words that [`Vcpu::new_xsave`] makes room for beside the smallest state; for one that was read from a stream.
///
/// # Errors
/// If there is no memory.
pub fn xsave_with(words: &[u32], region: [u32; XSAVE_MIN / 4]) -> Result<Xsave, KvmError> {
    let source = || io::Error::from(io::ErrorKind::OutOfMemory);
    let made = Xsave::new(words.len());
    let mut xsave = made.map_err(|_| KvmError { what: "make room for the vector state", source: source() })?;
    xsave.as_mut_slice().copy_from_slice(words);
    // SAFETY: the flexible part is left as it is, and so is its length.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = region;
    Ok(xsave)
}

/// Makes a vCPU leave the guest, from any thread.
#[derive(Debug)]
pub struct Kick {
    run: NonNull<AtomicU8>,
    /// The thread that runs the vCPU; 0 before there is one.
    thread: AtomicI32,
}

// SAFETY: the mapping belongs to the value; the only byte that is touched through it is touched by atomic accesses.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    fn new(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let handler = *HANDLER.get_or_init(install_handler);
        if let Some(error) = handler {
            return Err(KvmError { what: "kick vCPUs by a signal", source: io::Error::from_raw_os_error(error) });
        }
        // SAFETY: the descriptor stays open as long as `vcpu`, longer than this borrow.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place of the mapping, so no memory of ours changes.
        let run = unsafe { rustix::mm::mmap(std::ptr::null_mut(), RUN_BYTES, protection, MapFlags::SHARED, fd, 0) };
        let run = run.map_err(|source| KvmError { what: "map a vCPU", source: source.into() })?;
        Ok(Self { run: NonNull::new(run.cast()).expect("no mapping is at zero"), thread: AtomicI32::new(0) })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: inside the mapping.
        let byte = unsafe { self.run.add(IMMEDIATE_EXIT) };
        // SAFETY: the mapping lives as long as `self`; the kernel, which reads this byte, is the only other: the methods of kvm-ioctls
        // that write it are not used.
        unsafe { byte.as_ref() }
    }

    /// The calling thread is the one that runs the vCPU.
    pub fn mine(&self) {
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::SeqCst);
    }

    /// Makes the vCPU leave the guest, or not enter it.
    pub fn kick(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: sends a signal whose handler does nothing to a thread of this process; if that has ended, the call fails or
            // another thread of ours is interrupted once.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
        }
    }

    /// For the thread that runs the vCPU: does not let it enter the guest, but finish what its last exit asked for.
    pub fn hold(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Lets the vCPU enter the guest again.
    pub fn clear(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`; no borrow of it is left.
        let result = unsafe { rustix::mm::munmap(self.run.as_ptr().cast(), RUN_BYTES) };
        debug_assert!(result.is_ok(), "a mapping of ours can be unmapped");
    }
}

/// The error number, if the handler could not be installed.
static HANDLER: OnceLock<Option<i32>> = OnceLock::new();

fn signal() -> i32 {
    libc::SIGRTMIN() + 1
}

extern "C" fn nothing(_: i32) {}

fn install_handler() -> Option<i32> {
    // SAFETY: all bytes zero is a `sigaction` with an empty mask and no flags: system calls are interrupted.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
    // SAFETY: reads one `sigaction`; the handler does nothing, so it is safe wherever it interrupts.
    let result = unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
    (result != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
}
