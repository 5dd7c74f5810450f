//! Whether the seccomp filters of a thread would let a system call pass: the filters themselves are asked.
//!
//! Pure: runs the classic BPF programs that ptrace hands out on the `struct seccomp_data` of a call that is about to be made.
//! A filter may kill the process for a call it does not like, so this is asked before, not after.

/// Instructions of one filter as the kernel has them (`struct sock_filter`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub k: u32,
}

/// Bound on the instructions of one filter (`BPF_MAXINSNS`).
pub(super) const MAX_INSTRUCTIONS: usize = 4096;

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const ACTION: u32 = 0xffff_0000;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const DATA_WORDS: u32 = 16;

/// A system call as a filter sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub number: u64,
    /// Address after its `syscall` instruction.
    pub ip: u64,
    pub arguments: [u64; 6],
}

/// Whether every filter lets the call pass. A filter that cannot be understood does not.
pub(super) fn allows(filters: &[Vec<Instruction>], call: &Call) -> bool {
    let words = data(call);
    filters.iter().all(|filter| run(filter, &words).is_some_and(|value| matches!(value & ACTION, RET_ALLOW | RET_LOG)))
}

/// `struct seccomp_data` as 32-bit words.
fn data(call: &Call) -> [u32; DATA_WORDS as usize] {
    let mut words = [0; DATA_WORDS as usize];
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).expect("masked");
    words[0] = low(call.number);
    words[1] = AUDIT_ARCH_X86_64;
    let wide = std::iter::once(call.ip).chain(call.arguments);
    for (pair, value) in words[2..].chunks_exact_mut(2).zip(wide) {
        pair.copy_from_slice(&[low(value), low(value >> 32)]);
    }
    words
}

/// What a filter returns; `None` if it does what the kernel would not have let in.
fn run(filter: &[Instruction], data: &[u32; DATA_WORDS as usize]) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; 16]);
    let mut at = 0_usize;
    // Jumps go forward only, so this ends.
    while let Some(&Instruction { code, jump_true, jump_false, k }) = filter.get(at) {
        at += 1;
        let cell = usize::try_from(k).ok()?;
        let operand = if code & 0x08 == 0 { k } else { x };
        match code {
            0x20 => a = *data.get(cell / 4).filter(|_| k.is_multiple_of(4))?,
            0x80 => a = DATA_WORDS * 4,
            0x81 => x = DATA_WORDS * 4,
            0x00 => a = k,
            0x01 => x = k,
            0x60 => a = *memory.get(cell)?,
            0x61 => x = *memory.get(cell)?,
            0x02 => *memory.get_mut(cell)? = a,
            0x03 => *memory.get_mut(cell)? = x,
            0x04 | 0x0c => a = a.wrapping_add(operand),
            0x14 | 0x1c => a = a.wrapping_sub(operand),
            0x24 | 0x2c => a = a.wrapping_mul(operand),
            // The kernel ends a filter that divides by zero with 0: kill.
            0x34 | 0x3c => match a.checked_div(operand) {
                Some(quotient) => a = quotient,
                None => return Some(0),
            },
            0x44 | 0x4c => a |= operand,
            0x54 | 0x5c => a &= operand,
            0xa4 | 0xac => a ^= operand,
            0x64 | 0x6c => a = a.wrapping_shl(operand),
            0x74 | 0x7c => a = a.wrapping_shr(operand),
            0x84 => a = a.wrapping_neg(),
            0x05 => at = at.checked_add(cell)?,
            0x15 | 0x1d | 0x25 | 0x2d | 0x35 | 0x3d | 0x45 | 0x4d => {
                let taken = match code & 0xf0 {
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    _ => a & operand != 0,
                };
                at += usize::from(if taken { jump_true } else { jump_false });
            }
            0x06 => return Some(k),
            0x16 => return Some(a),
            0x07 => x = a,
            0x87 => a = x,
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILL: u32 = 0x8000_0000;

    fn i(code: u16, k: u32, jump_true: u8, jump_false: u8) -> Instruction {
        Instruction { code, jump_true, jump_false, k }
    }

    fn call(number: u64, first: u64) -> Call {
        Call { number, ip: 0x7000_0000_1234, arguments: [first, 0, 0, 0, 0, 0] }
    }

    /// Kills for `number` when the first argument is beyond 32 bits or `least` and more; wants 64-bit calls.
    fn filter(number: u32, least: u32) -> Vec<Instruction> {
        vec![
            i(0x20, 4, 0, 0),
            i(0x15, AUDIT_ARCH_X86_64, 1, 0),
            i(0x06, KILL, 0, 0),
            i(0x20, 0, 0, 0),
            i(0x15, number, 0, 4),
            i(0x20, 20, 0, 0),
            i(0x15, 0, 0, 3),
            i(0x20, 16, 0, 0),
            i(0x35, least, 1, 0),
            i(0x06, RET_ALLOW, 0, 0),
            i(0x06, KILL, 0, 0),
        ]
    }

    #[test]
    fn asks_every_filter_about_number_and_arguments() {
        let filters = [filter(323, 10), filter(16, 0)];
        assert!(allows(&filters, &call(323, 9)));
        assert!(!allows(&filters, &call(323, 10)));
        assert!(!allows(&filters, &call(323, 1 << 32)));
        assert!(!allows(&filters, &call(16, 0)));
        assert!(allows(&filters, &call(3, 0)));
        assert!(allows(&[], &call(16, 0)));
    }

    #[test]
    fn an_error_or_a_riddle_is_no_permission() {
        assert!(!allows(&[vec![i(0x06, 0x0005_0001, 0, 0)]], &call(3, 0)), "an errno");
        assert!(!allows(&[vec![i(0x30, 0, 0, 0)]], &call(3, 0)), "an unknown instruction");
        assert!(!allows(&[vec![i(0x00, 0, 0, 0)]], &call(3, 0)), "no end");
        assert!(!allows(&[vec![i(0x05, u32::MAX, 0, 0)]], &call(3, 0)), "a jump out of it");
        assert!(allows(&[vec![i(0x06, RET_LOG, 0, 0)]], &call(3, 0)));
    }
}
