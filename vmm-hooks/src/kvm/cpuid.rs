//! What a guest is told of its processor, and whether another host can keep it.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::sys::kvm::{KvmError, failed};

/// One entry of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    /// The leaf.
    pub function: u32,
    /// Its subleaf.
    pub index: u32,
    /// KVM's flags of it.
    pub flags: u32,
    /// eax, ebx, ecx, edx.
    pub registers: [u32; 4],
}

/// A register whose bits are features: leaf, subleaf, register, names from bit 0 on; an empty name is a bit that is no feature.
type Features = (u32, u32, usize, [&'static str; 32]);

/// Leaf 1: ecx, ecx, edx.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SEVERAL: u32 = 1 << 28;
/// Leaf 0x80000001, ecx: leaf 0x8000001e is there.
const TOPOLOGY: u32 = 1 << 22;

const FEATURES: [Features; 5] = [
    (
        1,
        0,
        2,
        [
            "sse3",
            "pclmulqdq",
            "",
            "",
            "",
            "vmx",
            "",
            "",
            "",
            "ssse3",
            "",
            "",
            "fma",
            "cx16",
            "",
            "",
            "",
            "pcid",
            "",
            "sse4.1",
            "sse4.2",
            "x2apic",
            "movbe",
            "popcnt",
            "tsc-deadline",
            "aes",
            "xsave",
            "",
            "avx",
            "f16c",
            "rdrand",
            "",
        ],
    ),
    (
        1,
        0,
        3,
        [
            "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "sep", "mtrr", "pge", "mca",
            "cmov", "pat", "pse36", "", "clflush", "", "", "", "mmx", "fxsr", "sse", "sse2", "", "", "", "", "",
        ],
    ),
    (
        7,
        0,
        1,
        [
            "fsgsbase",
            "tsc-adjust",
            "",
            "bmi1",
            "hle",
            "avx2",
            "",
            "smep",
            "bmi2",
            "erms",
            "invpcid",
            "rtm",
            "",
            "",
            "mpx",
            "",
            "avx512f",
            "avx512dq",
            "rdseed",
            "adx",
            "smap",
            "avx512ifma",
            "",
            "clflushopt",
            "clwb",
            "",
            "avx512pf",
            "avx512er",
            "avx512cd",
            "sha-ni",
            "avx512bw",
            "avx512vl",
        ],
    ),
    (
        7,
        0,
        2,
        [
            "",
            "avx512vbmi",
            "umip",
            "pku",
            "",
            "waitpkg",
            "avx512vbmi2",
            "shstk",
            "gfni",
            "vaes",
            "vpclmulqdq",
            "avx512vnni",
            "avx512bitalg",
            "",
            "avx512-vpopcntdq",
            "",
            "la57",
            "",
            "",
            "",
            "",
            "",
            "rdpid",
            "",
            "",
            "cldemote",
            "",
            "movdiri",
            "movdir64b",
            "",
            "",
            "",
        ],
    ),
    (
        0x8000_0001,
        0,
        3,
        [
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "syscall",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "nx",
            "",
            "mmxext",
            "",
            "",
            "fxsr-opt",
            "1gb-pages",
            "rdtscp",
            "",
            "long-mode",
            "3dnowext",
            "3dnow",
        ],
    ),
];

/// What this host can offer.
pub(super) fn supported(kvm: &Kvm) -> Result<Vec<Leaf>, KvmError> {
    let table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("say what processor it offers"))?;
    let leaf = |entry: &kvm_cpuid_entry2| Leaf {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    };
    Ok(table.as_slice().iter().map(leaf).collect())
}

/// What this host can promise a guest, with what KVM itself adds to the processor.
pub(super) fn offered(kvm: &Kvm) -> Result<Vec<Leaf>, KvmError> {
    let mut leaves = supported(kvm)?;
    // Listed by no kernel before 6.14: it is KVM's own, with its local APIC.
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        features(&mut leaves, |_, _, ecx, _| *ecx |= TSC_DEADLINE);
    }
    Ok(leaves)
}

/// What a kernel on `cpus` vCPUs is told: that it is under a hypervisor, and that they are the cores of one package.
pub(super) fn for_kernel(kvm: &Kvm, cpus: u8) -> Result<Vec<Leaf>, KvmError> {
    let mut leaves = offered(kvm)?;
    as_package(&mut leaves, cpus);
    Ok(leaves)
}

fn features(leaves: &mut [Leaf], with: impl Fn(&mut u32, &mut u32, &mut u32, &mut u32)) {
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
        let [eax, ebx, ecx, edx] = &mut leaf.registers;
        with(eax, ebx, ecx, edx);
    }
}

fn as_package(leaves: &mut Vec<Leaf>, cpus: u8) {
    let many = cpus > 1;
    features(leaves, |_, ebx, ecx, edx| {
        *ecx |= HYPERVISOR;
        *ebx = *ebx & !0x00ff_0000 | u32::from(cpus) << 16;
        *edx = if many { *edx | SEVERAL } else { *edx & !SEVERAL };
    });
    // What they say of the host's own package is not so here; a kernel does without.
    leaves.retain(|leaf| !matches!(leaf.function, 0xb | 0x1f | 0x8000_001e | 0x8000_0026));
    let cores = u32::from(cpus) - 1;
    for leaf in leaves {
        let [eax, _, ecx, _] = &mut leaf.registers;
        match leaf.function {
            // Cores of the package; every core has caches of its own.
            4 if *eax & 0x1f != 0 => *eax = *eax & 0x3fff | cores.min(63) << 26,
            // The same elsewhere: cores, and the bits of an APIC number that tell them apart.
            0x8000_0001 => *ecx &= !TOPOLOGY,
            0x8000_0008 => *ecx = cores | (u32::BITS - cores.leading_zeros()) << 12,
            _ => {}
        }
    }
}

/// The table as KVM takes it, for vCPU `number`. `None`: it has too many entries.
pub(super) fn table(leaves: &[Leaf], number: u32) -> Option<CpuId> {
    let entry = |leaf: &Leaf| {
        let [eax, mut ebx, ecx, mut edx] = leaf.registers;
        match leaf.function {
            // The initial APIC number.
            1 => ebx = ebx & 0x00ff_ffff | number << 24,
            0xb | 0x1f => edx = number,
            _ => {}
        }
        let (function, index, flags) = (leaf.function, leaf.index, leaf.flags);
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    };
    CpuId::from_entries(&leaves.iter().map(entry).collect::<Vec<_>>()).ok()
}

/// The features that a guest with `wanted` was promised and a host with `offered` does not have.
pub(super) fn missing(wanted: &[Leaf], offered: &[Leaf]) -> Vec<&'static str> {
    let register = |leaves: &[Leaf], &(function, index, register, _): &Features| {
        let leaf = leaves.iter().find(|leaf| leaf.function == function && leaf.index == index);
        leaf.map_or(0, |leaf| leaf.registers[register])
    };
    let mut names = Vec::new();
    for features in &FEATURES {
        let lacking = register(wanted, features) & !register(offered, features);
        let named = features.3.iter().enumerate().filter(|(bit, name)| lacking & 1 << bit != 0 && !name.is_empty());
        names.extend(named.map(|(_, &name)| name));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_that_the_other_host_lacks_is_named() {
        let leaf = |function, registers| Leaf { function, index: 0, flags: 0, registers };
        let wanted = [leaf(1, [0, 0, 1 << 28 | 1 << 31, 1 << 25]), leaf(7, [0, 1 << 5 | 1 << 16, 0, 0])];
        assert_eq!(missing(&wanted, &wanted), Vec::<&str>::new());
        let older = [leaf(1, [0, 0, 0, 1 << 25]), leaf(7, [0, 1 << 5, 0, 0])];
        assert_eq!(missing(&wanted, &older), ["avx", "avx512f"]);
        assert_eq!(missing(&wanted, &[]), ["avx", "sse", "avx2", "avx512f"]);
    }

    #[test]
    fn a_kernel_finds_as_many_cores_as_it_has_and_nothing_of_the_hosts_own() {
        let leaf = |function, registers| Leaf { function, index: 0, flags: 0, registers };
        let host = [
            leaf(1, [0, 16 << 16 | 7, 1 << 25, 1]),
            leaf(4, [1 | 15 << 26 | 31 << 14, 0, 0, 0]),
            leaf(0xb, [1, 16, 0, 9]),
            leaf(0x8000_0001, [0, 0, TOPOLOGY | 1, 0]),
            leaf(0x8000_0008, [0, 0, 15 | 4 << 12, 0]),
            leaf(0x8000_001e, [9, 9, 9, 9]),
        ];
        let told = |cpus| {
            let mut leaves = host.to_vec();
            as_package(&mut leaves, cpus);
            leaves
        };
        let two = [
            leaf(1, [0, 2 << 16 | 7, 1 << 25 | HYPERVISOR, 1 | SEVERAL]),
            leaf(4, [1 | 1 << 26, 0, 0, 0]),
            leaf(0x8000_0001, [0, 0, 1, 0]),
            leaf(0x8000_0008, [0, 0, 1 | 1 << 12, 0]),
        ];
        assert_eq!(told(2), two);
        let one = told(1);
        assert_eq!(one[0].registers, [0, 1 << 16 | 7, 1 << 25 | HYPERVISOR, 1]);
        assert_eq!(one[3].registers[2], 0);
        assert_eq!(told(5)[3].registers[2], 4 | 3 << 12);
    }
}
