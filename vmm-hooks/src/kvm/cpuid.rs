//! What a guest is told of its processor, and whether another host can keep it.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
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
}
