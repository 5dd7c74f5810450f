//! The machine without an operating system: entry, ports, memory by address, panic, and the symbols that the compiler expects.
//!
//! Every line of unsafe code of the pilot is here. Memory is mapped one to one; the addresses come from [`crate::abi`], and
//! each is used by what its comment there says, so the accesses do not touch memory that Rust owns.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::ptr::NonNull;

use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::{BufferDirection, PhysAddr};

use crate::abi;

// Each vCPU begins here at CPL 3, in 64-bit mode, with its number in rdi. 256 KiB of stack for each of CPUS_MAX.
global_asm!(
    r#"
.section .text.boot,"ax"
.global pilot_start
pilot_start:
    lea rax, [rdi + 1]
    shl rax, 18
    lea rsp, [rip + stacks]
    add rsp, rax
    xor ebp, ebp
    call pilot_main
1:  jmp 1b
.section .bss.stacks,"aw",@nobits
.balign 4096
stacks: .skip 8 * 262144
"#
);

#[unsafe(no_mangle)]
extern "C" fn pilot_main(cpu: u64) -> ! {
    if cpu == 0 {
        // SAFETY: the heap's memory is used by nothing else, and this is the only call, by the only vCPU that allocates.
        unsafe { HEAP.lock().init(abi::HEAP as *mut u8, abi::HEAP_BYTES as usize) };
        crate::first(param(abi::param::CPUS));
    }
    crate::other(cpu)
}

#[global_allocator]
static HEAP: linked_list_allocator::LockedHeap = linked_list_allocator::LockedHeap::empty();

/// Writes 32 bits to a port.
pub fn out(port: u16, value: u32) {
    // SAFETY: ports of the microVM change no memory of ours but what it is told of by virtio queues.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

fn out8(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Reads 32 bits from a port.
pub fn inp(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) }
    value
}

/// Nanoseconds that the machine has run.
pub fn clock() -> u64 {
    let low = inp(abi::port::CLOCK);
    u64::from(inp(abi::port::CLOCK_HIGH)) << 32 | u64::from(low)
}

/// Word `index` of the parameters.
pub fn param(index: u64) -> u64 {
    load(abi::PARAMS + index * 8)
}

/// Reads the word at `address`.
pub fn load(address: u64) -> u64 {
    // SAFETY: see the module's header; aligned by the layout of `abi`.
    unsafe { (address as *const u64).read_volatile() }
}

/// Writes the word at `address`.
pub fn store(address: u64, value: u64) {
    // SAFETY: see the module's header; aligned by the layout of `abi`.
    unsafe { (address as *mut u64).write_volatile(value) }
}

/// Fills the page that begins at `address`, which is not one of ours.
pub fn fill(address: u64, byte: u8) {
    assert!(address >= abi::FREE && address.is_multiple_of(4096), "the page at {address:#x} is not free");
    // SAFETY: free memory, see above; nobody holds a reference into it.
    unsafe { (address as *mut u8).write_bytes(byte, 4096) }
}

/// The transport of the virtio device at `address`.
pub fn virtio(address: u64) -> MmioTransport<'static> {
    let header = NonNull::new(address as *mut VirtIOHeader).expect("no device at zero");
    // SAFETY: the microVM has a device there for as long as it runs, and each is asked for once.
    unsafe { MmioTransport::new(header, abi::MMIO_STRIDE as usize) }.expect("a virtio device")
}

/// Memory that devices use.
pub struct Hal;

// SAFETY: memory of the allocator, page-aligned, zeroed, mapped one to one, and not used by others until it is given back.
unsafe impl virtio_drivers::Hal for Hal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let layout = core::alloc::Layout::from_size_align(pages * 4096, 4096).expect("small");
        // SAFETY: of more than no byte.
        let memory = NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout) }).expect("the heap is large enough");
        (memory.as_ptr() as u64, memory)
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        let layout = core::alloc::Layout::from_size_align(pages * 4096, 4096).expect("small");
        // SAFETY: the caller had it from `dma_alloc` with this length.
        unsafe { alloc::alloc::dealloc(memory.as_ptr(), layout) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("no device at zero")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// The serial port.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out8(abi::port::SERIAL, byte));
        Ok(())
    }
}

/// Ends the machine.
pub fn exit(code: u32) -> ! {
    loop {
        out(abi::port::EXIT, code);
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    let _ = writeln!(Serial, "pilot: {info}");
    exit(1)
}

// The host target's compiler library does not export these.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise: both are so long and do not overlap.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: the caller's promise; copying upwards never overtakes itself.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller's promise; copied downwards, from the last byte on.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(bytes).sub(1) => _, inout("rsi") from.add(bytes).sub(1) => _, inout("rcx") bytes => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") bytes => _, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    for index in 0..bytes {
        // SAFETY: the caller's promise; volatile, so that this is not compiled to a call of itself.
        let (one, other) = unsafe { (one.add(index).read_volatile(), other.add(index).read_volatile()) };
        if one != other {
            return i32::from(one) - i32::from(other);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(one, other, bytes) }
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(2)
}
