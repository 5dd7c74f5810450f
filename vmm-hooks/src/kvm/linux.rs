//! Putting a Linux kernel into a new machine, and its first vCPU to the kernel's first instruction in long mode.
//!
//! The kernel's 64-bit boot protocol (Documentation/arch/x86/boot.rst): a bzImage or an ELF file, an initramfs, a command line, and a map of
//! memory; the other vCPUs wait until the kernel calls them. Devices are told by ACPI tables (`acpi`).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::acpi;
use super::machine::refused;
use super::ram::Memory;
use super::start::{Image, Kernel};
use crate::guest::GuestError;
use crate::layout::PAGE_SIZE;
use crate::sys::kvm::{KvmError, Vcpu, failed};

/// What a kernel is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinuxOptions {
    /// The kernel: a bzImage, or a vmlinux.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
}

/// Descriptors of the first segments, the kernel's parameters, its first stack, page tables, and its command line.
const GDT: u64 = 0x500;
const PARAMS: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
/// Memory that is the kernel's ends here, and goes on at one megabyte.
const LOW_END: u64 = 0x9_fc00;
const HIGH: u64 = 0x10_0000;
/// Least memory: what a kernel needs to say that it has too little.
const MEMORY_MIN: u64 = 64 << 20;

/// Where a kernel jumps to in real mode that knows no other way to reset its machine: one with a hardware-reduced profile, but no EFI, knows none.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;
/// Writes the reset command to its port, again and again: `mov al, 0xfe; out 0x64, al; jmp` to the start.
const RESET_CODE: [u8; 6] = [0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfa];

const GIGABYTES: u64 = 4;
/// Present and writable; and two megabytes large.
const ENTRY: u64 = 3;
const LARGE: u64 = 0x83;

/// Where a bzImage's 64-bit code begins in what is loaded of it, if it has such.
const ENTRY_64: u64 = 0x200;
const HAS_ENTRY_64: u16 = 1;
const ELF: [u8; 4] = *b"\x7fELF";
const HDRS: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
const UNKNOWN_LOADER: u8 = 0xff;
/// Longest command line of a kernel that does not say it.
const CMDLINE_MAX: u32 = 2047;
/// Highest address of an initramfs for a kernel that does not say it.
const INITRD_MAX: u64 = 0x37ff_ffff;
const RAM: u32 = 1;

const CODE: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const PE_ET_WP_PG: u64 = 0x8001_0033;
const PAE: u64 = 0x20;
const LONG_MODE: u64 = 0x500;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Memory ranges are on, and what is in none is written back.
const WRITE_BACK: u64 = 1 << 11 | 6;

fn fail(path: &Path, error: &dyn std::fmt::Display) -> GuestError {
    refused(format!("{} cannot be started: {error}", path.display()))
        .advise("nothing was started; give a bzImage or vmlinux of x86-64, and what it boots from")
}

/// Whether `path` is a kernel as distributions ship it.
#[must_use]
pub fn is_bzimage(path: &Path) -> bool {
    let read = || -> std::io::Result<[u8; 4]> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(0x202))?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic)?;
        Ok(magic)
    };
    read().is_ok_and(|magic| u32::from_le_bytes(magic) == HDRS)
}

/// Writes all that a kernel is started with. The address of its first instruction.
pub(super) fn load(memory: &Memory, options: &mut Kernel, cpus: u8, devices: &[(u64, u32)]) -> Result<u64, GuestError> {
    let Image { file, path: kernel } = &mut options.image;
    let bytes = memory.last_addr().0 + 1;
    if bytes < MEMORY_MIN {
        return Err(fail(kernel, &format!("it needs at least {MEMORY_MIN} bytes of memory")));
    }
    let (loaded, entry) = load_kernel(memory, file).map_err(|error| fail(kernel, &error))?;
    let mut header = loaded.setup_header.unwrap_or(setup_header {
        header: HDRS,
        boot_flag: BOOT_FLAG,
        cmdline_size: CMDLINE_MAX,
        ..Default::default()
    });
    header.type_of_loader = UNKNOWN_LOADER;
    let most = if header.cmdline_size == 0 { CMDLINE_MAX } else { header.cmdline_size };
    if options.cmdline.len() > most as usize || options.cmdline.contains('\0') {
        return Err(fail(kernel, &format!("its command line has at most {most} bytes, none of them zero")));
    }
    let mut line = options.cmdline.clone().into_bytes();
    line.push(0);
    memory.write_slice(&line, GuestAddress(CMDLINE)).map_err(|error| fail(kernel, &error))?;
    header.cmd_line_ptr = u32::try_from(CMDLINE).expect("low");
    // A compressed kernel unpacks itself to where it prefers to be.
    let (prefers, needs) = (header.pref_address, u64::from(header.init_size));
    let kernel_end = loaded.kernel_end.max(prefers + needs);
    if kernel_end > bytes {
        return Err(fail(kernel, &format!("it needs more than {bytes} bytes of memory")));
    }
    if let Some(initrd) = &mut options.initrd {
        let most = if header.initrd_addr_max == 0 { INITRD_MAX } else { header.initrd_addr_max.into() };
        let (at, length) = load_initrd(memory, initrd, kernel_end, most.min(bytes - 1) + 1)?;
        (header.ramdisk_image, header.ramdisk_size) = (at, length);
    }
    let tables = acpi::write(memory, cpus, devices).map_err(|error| fail(kernel, &error))?;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: tables, ..Default::default() };
    let ranges = [(0, LOW_END), (HIGH, bytes)];
    for (slot, (start, end)) in params.e820_table.iter_mut().zip(ranges) {
        *slot = boot_e820_entry { addr: start, size: end - start, r#type: RAM };
    }
    params.e820_entries = u8::try_from(ranges.len()).expect("two");
    memory.write_obj(params, GuestAddress(PARAMS)).map_err(|error| fail(kernel, &error))?;
    memory.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR)).map_err(|error| fail(kernel, &error))?;
    write_tables(memory).map_err(|error| fail(kernel, &error))?;
    Ok(entry)
}

/// Loads either kind of kernel; where it is entered.
fn load_kernel(memory: &Memory, file: &mut File) -> Result<(KernelLoaderResult, u64), String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(|error| words(&error))?;
    file.rewind().map_err(|error| words(&error))?;
    let high = Some(GuestAddress(HIGH));
    if magic == ELF {
        let loaded = Elf::load(memory, None, file, high).map_err(|error| words(&error))?;
        let entry = loaded.kernel_load.0;
        return Ok((loaded, entry));
    }
    let loaded = BzImage::load(memory, None, file, high).map_err(|error| words(&error))?;
    let flags = loaded.setup_header.map_or(0, |header| header.xloadflags);
    if flags & HAS_ENTRY_64 == 0 {
        return Err("it is no 64-bit kernel".to_owned());
    }
    let entry = loaded.kernel_load.0 + ENTRY_64;
    Ok((loaded, entry))
}

/// Puts the initramfs as high as it may be; where, and its length.
fn load_initrd(memory: &Memory, image: &mut Image, low: u64, high: u64) -> Result<(u32, u32), GuestError> {
    let Image { file, path } = image;
    let length = file.metadata().map_err(|error| fail(path, &error))?.len();
    let at = high.checked_sub(length).map(|at| at / PAGE_SIZE as u64 * PAGE_SIZE as u64).filter(|&at| at >= low);
    let Some(at) = at else { return Err(fail(path, &"it does not fit into the machine's memory beside the kernel")) };
    let size = usize::try_from(length).expect("it fits memory");
    memory.read_exact_volatile_from(GuestAddress(at), file, size).map_err(|error| fail(path, &error))?;
    let narrow = |value: u64| u32::try_from(value).expect("memory of a machine is below four gigabytes");
    Ok((narrow(at), narrow(length)))
}

fn write_tables(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    let word = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address));
    for (index, descriptor) in (0..).zip([0, 0, CODE, DATA]) {
        word(GDT + 8 * index, descriptor)?;
    }
    word(PML4, PDPT | ENTRY)?;
    for gigabyte in 0..GIGABYTES {
        word(PDPT + 8 * gigabyte, (PD + gigabyte * PAGE_SIZE as u64) | ENTRY)?;
    }
    for large in 0..GIGABYTES * 512 {
        word(PD + 8 * large, large << 21 | LARGE)?;
    }
    Ok(())
}

/// Puts vCPU `number` to where it waits to be called, and the first one to `entry`.
pub(super) fn enter(vcpu: &Vcpu, number: u64, entry: u64) -> Result<(), KvmError> {
    let fd = vcpu.fd();
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [msr(MSR_MISC_ENABLE, FAST_STRINGS), msr(MSR_MTRR_DEFAULT, WRITE_BACK)];
    let msrs = Msrs::from_entries(&entries).expect("two fit");
    fd.set_msrs(&msrs).map_err(failed("set a vCPU's model-specific registers"))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).map_err(failed("set a vCPU's floating point registers"))?;
    if number > 0 {
        return Ok(());
    }
    let mut sregs = fd.get_sregs().map_err(failed("read a vCPU's system registers"))?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x18, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 31);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (PE_ET_WP_PG, PML4, sregs.cr4 | PAE);
    sregs.efer |= LONG_MODE;
    fd.set_sregs(&sregs).map_err(failed("set a vCPU's system registers"))?;
    let regs = kvm_regs { rip: entry, rsi: PARAMS, rsp: STACK, rbp: STACK, rflags: 2, ..Default::default() };
    fd.set_regs(&regs).map_err(failed("set a vCPU's registers"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::kvm::ram::Ram;
    use crate::sys::memory::SharedMemory;

    fn options(kernel: PathBuf, initrd: Option<PathBuf>) -> LinuxOptions {
        LinuxOptions { kernel, initrd, cmdline: "console=ttyS0".to_owned() }
    }

    /// The least that a loader takes for a bzImage.
    fn image(flags: u16) -> Vec<u8> {
        let mut bytes = vec![0; 0x1000];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0x1f1, &[1]);
        put(0x202, &HDRS.to_le_bytes());
        put(0x206, &0x20f_u16.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000_u32.to_le_bytes());
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(0x236, &flags.to_le_bytes());
        put(0x258, &0x100_0000_u64.to_le_bytes());
        put(0x260, &0x200_0000_u32.to_le_bytes());
        put(0x400, b"code");
        bytes
    }

    #[test]
    fn a_kernel_is_where_its_protocol_says_and_what_does_not_fit_is_refused_in_words() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, bytes: &[u8]| {
            let path = directory.path().join(name);
            fs::write(&path, bytes).expect("room");
            path
        };
        let shared = SharedMemory::new("linux-test", 64 << 20).expect("sparse");
        let ram = Ram::map(&shared, false).expect("it can be mapped");
        let memory = ram.memory();
        let open = |options: &LinuxOptions| Kernel::open(options).expect("they are there");
        let kernel = file("vmlinuz", &image(HAS_ENTRY_64));
        let initrd = file("initrd", &[7; 5000]);
        let entry = load(memory, &mut open(&options(kernel.clone(), Some(initrd))), 1, &[]).expect("it fits");
        assert_eq!(entry, 0x10_0200);
        let params: boot_params = memory.read_obj(GuestAddress(PARAMS)).expect("inside");
        let (at, length) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((at, length), ((64 << 20) - 8192, 5000));
        let byte: u8 = memory.read_obj(GuestAddress(u64::from(at) + 4999)).expect("inside");
        assert_eq!(byte, 7);
        let code: [u8; 4] = memory.read_obj(GuestAddress(0x10_0000)).expect("inside");
        assert_eq!(&code, b"code");
        let high = params.e820_table[1];
        assert_eq!((params.e820_entries, { high.addr } + { high.size }), (2, 64 << 20));
        assert!(is_bzimage(&kernel));

        let refusal =
            |options: &LinuxOptions| load(memory, &mut open(options), 1, &[]).expect_err("it does not fit").message;
        let large = file("large", &vec![0; 40 << 20]);
        assert!(refusal(&options(kernel.clone(), Some(large))).contains("does not fit"));
        let old = file("old", &image(0));
        assert!(refusal(&options(old, None)).contains("no 64-bit kernel"));
        let text = file("text", b"nothing that boots");
        assert!(!is_bzimage(&text));
        assert!(refusal(&options(text, None)).contains("cannot be started"));
        let long = LinuxOptions { cmdline: "x".repeat(3000), ..options(kernel, None) };
        assert!(refusal(&long).contains("command line"));
    }
}
