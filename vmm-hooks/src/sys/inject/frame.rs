//! The bytes that let a thread restore itself: one signal frame with its floating point state, as the kernel lays it.
//!
//! Pure: builds bytes, touches no process. The layout is the kernel's `struct rt_sigframe` for x86-64
//! (`arch/x86/include/asm/sigframe.h`, `include/uapi/asm/sigcontext.h`) and, for the floating point state, what
//! `Documentation/arch/x86/xstate.rst` and `struct _fpx_sw_bytes` say.

use std::arch::x86_64::__cpuid_count;

/// Bytes below the stack pointer that belong to the running function (System V ABI).
pub(super) const RED_ZONE: u64 = 128;

/// Bytes set aside for the argument of an ioctl.
pub(super) const ARGUMENT_BYTES: u64 = 128;

/// `sizeof(struct rt_sigframe)`: return address, `ucontext` (304), `siginfo` (128).
const FRAME_BYTES: usize = 8 + 304 + 128;

/// Offsets within the frame.
const UC: usize = 8;
const MCONTEXT: usize = UC + 40;
const SIGMASK: usize = UC + 296;

/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const UC_FLAGS: u64 = 1 | 2 | 4;

/// An alternate signal stack mode that does not exist: the kernel then leaves the thread's alternate stack as it is
/// (`restore_altstack` ignores every error but a bad address, and the mode is checked before anything is changed).
const KEEP_ALTERNATE_STACK: u32 = 0x7;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;

/// Offsets within the XSAVE image.
const SW_BYTES: usize = 464;
const XSTATE_BV: usize = 512;
const XSAVE_MIN: usize = 576;

/// Components that are enabled for a task on first use only: AMX.
const DYNAMIC: u64 = (1 << 17) | (1 << 18);

/// Where a thread goes on, and with what.
#[derive(Debug, Clone)]
pub(super) struct Resume {
    /// All general registers as they are to be.
    pub regs: libc::user_regs_struct,
    /// Its signal mask.
    pub sigmask: u64,
    /// Its floating point state with both magic numbers, 64-byte aligned when it is laid.
    pub fp: Vec<u8>,
}

/// Where the parts lie: frame, argument and floating point state, from low to high addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub frame: u64,
    pub argument: u64,
    pub fp: u64,
    /// First address after everything.
    pub end: u64,
}

/// Places the parts below the red zone of a stack whose pointer is `rsp`. `None` if that is no stack.
pub(super) fn place(rsp: u64, fp_bytes: usize) -> Option<Place> {
    let end = rsp.checked_sub(RED_ZONE)?;
    let fp = end.checked_sub(fp_bytes as u64)? & !63;
    let argument = fp.checked_sub(ARGUMENT_BYTES)?;
    let frame = argument.checked_sub(FRAME_BYTES as u64)? & !15;
    Some(Place { frame, argument, fp, end })
}

fn put(bytes: &mut [u8], offset: usize, value: u64) {
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

fn put_half(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// The bytes from `place.frame` to the end of the floating point state. `restorer` is where the frame's consumer begins: code
/// that calls `rt_sigreturn`.
pub(super) fn build(place: Place, restorer: u64, resume: &Resume) -> Vec<u8> {
    let offset = |address: u64| usize::try_from(address - place.frame).expect("a few kilobytes");
    let mut bytes = vec![0; offset(place.fp) + resume.fp.len()];
    put(&mut bytes, 0, restorer);
    put(&mut bytes, UC, UC_FLAGS);
    put_half(&mut bytes, UC + 24, KEEP_ALTERNATE_STACK);
    let r = &resume.regs;
    let registers = [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp,
        r.rip, r.eflags,
    ];
    for (index, value) in registers.into_iter().enumerate() {
        put(&mut bytes, MCONTEXT + index * 8, value);
    }
    // cs, gs, fs, ss as 16 bits each; gs and fs are not restored by the kernel and hold zero in its own frames.
    put(&mut bytes, MCONTEXT + 144, (r.cs & 0xffff) | (r.ss & 0xffff) << 48);
    put(&mut bytes, MCONTEXT + 184, place.fp);
    put(&mut bytes, SIGMASK, resume.sigmask);
    bytes[offset(place.fp)..].copy_from_slice(&resume.fp);
    bytes
}

/// Turns the XSAVE image that ptrace gives (`NT_X86_XSTATE`) into the one of a signal frame. `None` if it is too short to be one.
///
/// The kernel restores extended state only if it finds the second magic number where it expects the end of the thread's state:
/// at `xstate_size` or at the thread's own size, by version. That size is without the dynamic components until the
/// thread has used them, and cannot be asked for; so the number is laid at both places.
pub(super) fn fp_image(ptrace: &[u8]) -> Option<Vec<u8>> {
    if ptrace.len() < XSAVE_MIN {
        return None;
    }
    let word = |offset: usize| u64::from_le_bytes(ptrace[offset..offset + 8].try_into().expect("eight bytes"));
    let supported = word(SW_BYTES);
    let in_use = word(XSTATE_BV);
    let features = (supported & !DYNAMIC) | in_use;
    let (size, whole) = (xsave_bytes(features), xsave_bytes(features | supported));
    if ptrace.len() < whole {
        return None;
    }
    let mut image = vec![0; whole + 4];
    image[..whole].copy_from_slice(&ptrace[..whole]);
    image[SW_BYTES..SW_BYTES + 48].fill(0);
    put_half(&mut image, SW_BYTES, FP_XSTATE_MAGIC1);
    put_half(&mut image, SW_BYTES + 4, u32::try_from(size + 4).ok()?);
    put(&mut image, SW_BYTES + 8, features);
    put_half(&mut image, SW_BYTES + 16, u32::try_from(size).ok()?);
    put_half(&mut image, size, FP_XSTATE_MAGIC2);
    put_half(&mut image, whole, FP_XSTATE_MAGIC2);
    Some(image)
}

/// Bytes of a standard-format XSAVE image that holds `features`.
fn xsave_bytes(features: u64) -> usize {
    let ends = (2..63).filter(|i| features & (1 << i) != 0).map(|i| {
        let leaf = __cpuid_count(0xd, i);
        leaf.eax as usize + leaf.ebx as usize
    });
    ends.max().unwrap_or(0).max(XSAVE_MIN)
}
