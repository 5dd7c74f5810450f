//! The machine matrix: a stock Debian with Redis on every kind of QEMU that can be protected, one line for each.
//!
//! Each row boots on one of two hosts that are network namespaces, is attached to and left again (which must leave it as it was found),
//! is protected (what was captured must be all of its memory), and loses its QEMU to a SIGKILL. Clients on each of its cards and over
//! IPv6 go on over the same TCP connections and find every write that was acknowledged to them; their neighbour tables are
//! emptied again and again, so that ARP and neighbour discovery go through the gate and reach the twin.
//!
//! Skipped, with a line that says so, where QEMU, root, the `ip` program or the guest image (`cargo xtask setup`) is missing. A row
//! that is marked `Long` runs only with `UNDERSTUDY_LONG=1`, as under `cargo xtask test --all`.

mod client;
mod machine;
mod net;
mod protect;

/// When a row is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// In every `cargo test`.
    Always,
    /// Only when what takes long was asked for.
    Long,
}

/// Who starts QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Starter {
    Root,
    /// The user `nobody`.
    Nobody,
}

/// One machine. In its arguments `PCI0`, `PCI1` and `MMIO0` stand for a card with its tap, `DIR` for a directory that is its own.
#[derive(Debug)]
struct Row {
    name: &'static str,
    when: When,
    starter: Starter,
    arguments: &'static str,
}

macro_rules! matrix {
    ($($name:ident: $when:ident, $starter:ident, $arguments:literal;)*) => { $(
        #[test]
        fn $name() {
            protect::play(&Row {
                name: stringify!($name), when: When::$when, starter: Starter::$starter, arguments: $arguments,
            });
        }
    )* };
}

matrix! {
    pc_with_vga: Always, Root, "-M pc -m 256 -vga std PCI0";
    q35_two_cpus_two_cards_shared_memfd: Always, Root,
        "-M q35,memory-backend=m0 -smp 2 -m 256 -object memory-backend-memfd,id=m0,size=256M,share=on PCI0 PCI1";
    microvm: Always, Root, "-M microvm -m 256 MMIO0";
    pc_split_below_4g_private_memfd_runas_sandbox: Always, Root,
        "-M pc,max-ram-below-4g=128M,memory-backend=m0 -m 256 -object memory-backend-memfd,id=m0,size=256M,share=off \
         -runas nobody -sandbox on,obsolete=deny,spawn=deny,resourcecontrol=deny PCI0";
    q35_started_by_another_user: Long, Nobody, "-M q35 -m 256 PCI0";
    q35_sandbox_that_denies_all_by_another_user: Long, Nobody,
        "-M q35 -m 256 -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny PCI0";
    microvm_two_cpus_shared_memfd: Long, Root,
        "-M microvm,memory-backend=m0 -smp 2 -m 256 -object memory-backend-memfd,id=m0,size=256M,share=on MMIO0";
    microvm_with_all_its_old_parts: Long, Root, "-M microvm,pit=on,pic=on,rtc=on,isa-serial=on -m 256 MMIO0";
    pc_shared_file: Long, Root,
        "-M pc,memory-backend=m0 -m 256 -object memory-backend-file,id=m0,size=256M,mem-path=DIR/ram,share=on PCI0";
    q35_private_file: Long, Root,
        "-M q35,memory-backend=m0 -m 256 -object memory-backend-file,id=m0,size=256M,mem-path=DIR/ram,share=off PCI0";
    pc_two_memory_nodes: Long, Root,
        "-M pc -smp 2 -m 256 -object memory-backend-ram,id=m0,size=128M -object memory-backend-memfd,id=m1,size=128M \
         -numa node,memdev=m0,cpus=0 -numa node,memdev=m1,cpus=1 PCI0";
    pc_of_an_older_version: Long, Root, "-M pc-i440fx-5.2 -m 256 -vga cirrus PCI0";
    q35_with_many_devices: Long, Root,
        "-M q35 -smp 2 -m 256 -device virtio-rng-pci -device virtio-serial-pci -device qemu-xhci -device usb-tablet \
         -device pcie-root-port,id=port0 -device virtio-vga -vga none PCI0";
    pc_2_gib: Long, Root, "-M pc -smp 2 -m 2048 PCI0";
    q35_2_gib_shared_memfd: Long, Root,
        "-M q35,memory-backend=m0 -m 2048 -object memory-backend-memfd,id=m0,size=2G,share=on PCI0";
    pc_5_gib_above_4g: Long, Root, "-M pc -m 5120 PCI0";
    q35_5_gib_above_4g: Long, Root, "-M q35 -m 5120 PCI0";
}
