//! Whether a host's KVM keeps its rings whole: tried before they are relied on, in two machines that are thrown away.
//!
//! A KVM that emulates a guest's instructions was seen to write over entries: one `KVM_RUN` pushed 16,384 of them into a ring of 4,096 without stopping
//! at a full one, and stopped the vCPU at a full ring for ever afterwards. So the same code writes known pages in both machines, more of them than a
//! ring has room for, and what the ring found must be what the bitmap found and what was written, also for pages that were given back.
//! Code is tried as the guest's own would run: at CPL 0 for a kernel, at CPL 3 for the pilot.
//!
//! Promise: an answer within [`LIMIT`] and a few seconds, the same for the life of the process. A vCPU that does not stop by itself is kicked; a thread that
//! even then does not end is left behind, and counts as a failure.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use super::{LENGTH, Rings};
use crate::kvm::boot::{self, Privilege};
use crate::kvm::cpuid;
use crate::kvm::ram::{Ram, add_word};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::kvm::{Kick, Vcpu, Vm};
use crate::sys::memory::SharedMemory;

/// Longest time that a vCPU may take for all rounds. An emulated host takes a second or two.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How often a vCPU that takes longer is kicked, a tenth of a second apart.
const KICKS: u32 = 30;

/// What code a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A kernel.
    Kernel,
    /// Nothing but CPL 3.
    User,
}

/// Whether the rings of this host's KVM can be relied on for a guest that runs `code`. Blocks; tries it once.
///
/// # Errors
/// Why not, in words.
pub fn of_host(kvm: &Kvm, code: Code) -> Result<(), String> {
    static TRIED: [OnceLock<Result<(), String>>; 2] = [OnceLock::new(), OnceLock::new()];
    let tried = &TRIED[usize::from(code == Code::User)];
    tried.get_or_init(|| run(kvm, code, &ROUNDS, LIMIT)).clone()
}

/// Where the code is.
const CODE: u64 = 0x1000;
/// The first page that it may write.
const FIRST: u64 = 256;
/// One page after the last: three rings full.
const END: u64 = FIRST + 3 * LENGTH as u64;

/// Writes `eax` to each page from `rdi` on, `ebp` bytes apart, below `rsi`, and tells a port that it has.
const WRITE: [u8; 12] = [
    0x89, 0x07, // mov [rdi], eax
    0x01, 0xef, // add edi, ebp
    0x39, 0xf7, // cmp edi, esi
    0x72, 0xf8, // jb to the first
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xfe, // jmp to itself
];

/// Distances in pages: each page once, then every third, then all of them again.
const ROUNDS: [u64; 3] = [1, 3, 1];

/// One machine.
struct Trial {
    vm: Arc<Vm>,
    vcpu: Vcpu,
    rings: Option<Rings>,
    privilege: Privilege,
}

fn words(error: &dyn std::error::Error) -> String {
    let source = error.source().map_or(String::new(), |source| format!(": {source}"));
    format!("{error}{source}")
}

impl Trial {
    fn new(kvm: &Kvm, privilege: Privilege, with_rings: bool) -> Result<Self, String> {
        let bytes = END * PAGE_SIZE as u64;
        let memory = SharedMemory::new("ring-check", bytes).map_err(|error| words(&error))?;
        let ram = Arc::new(Ram::map(&memory, false).map_err(|error| words(&error))?);
        boot::tables(ram.memory()).map_err(|error| error.to_string())?;
        ram.memory().write_slice(&WRITE, GuestAddress(CODE)).map_err(|error| error.to_string())?;
        let make = || {
            let vm = if with_rings { Vm::with_rings(kvm, ram, LENGTH) } else { Vm::new(kvm, ram) };
            let vm = Arc::new(vm?);
            let vcpu = Vcpu::new(&vm, 0)?;
            if let Some(table) = cpuid::table(&cpuid::supported(kvm)?, 0) {
                vcpu.fd().set_cpuid2(&table).map_err(crate::sys::kvm::failed("set what a vCPU's processor is"))?;
            }
            boot::enter(&vcpu, 0, CODE, privilege)?;
            let rings = with_rings.then(|| Rings::new(&vm, [&vcpu])).transpose()?;
            vm.log(true)?;
            Ok(Self { vm, vcpu, rings, privilege })
        };
        make().map_err(|error: crate::sys::kvm::KvmError| words(&error))
    }

    /// Writes every `apart`th page once; which were found.
    fn round(&mut self, number: u32, apart: u64) -> Result<PageSet, String> {
        let regs = kvm_regs {
            rip: CODE,
            rflags: self.privilege.flags(),
            rax: number.into(),
            rdi: FIRST * PAGE_SIZE as u64,
            rsi: END * PAGE_SIZE as u64,
            rbp: apart * PAGE_SIZE as u64,
            ..Default::default()
        };
        self.vcpu.fd().set_regs(&regs).map_err(|error| format!("a vCPU's registers cannot be set: {error}"))?;
        let mut full = 0;
        loop {
            match self.vcpu.fd_mut().run() {
                Ok(VcpuExit::IoOut(..)) => break,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    full += 1;
                    // At most one for each page, if one fit in at a time.
                    if full > END {
                        return Err("it says without end that a ring is full".to_owned());
                    }
                    self.rings.as_ref().ok_or("there is no ring")?.full(0).map_err(|error| words(&error))?;
                }
                Ok(exit) => return Err(format!("a vCPU left the guest in a way that was not asked for: {exit:?}")),
                Err(error) if error.errno() == libc::EINTR => return Err("a vCPU did not come to its end".to_owned()),
                Err(error) => return Err(format!("a vCPU cannot be run: {error}")),
            }
        }
        // Finishes the instruction, so that the next round can begin elsewhere.
        let kick = self.vcpu.kick();
        kick.hold();
        let finished = self.vcpu.fd_mut().run().map(|exit| format!("{exit:?}"));
        kick.clear();
        if !matches!(finished, Err(error) if error.errno() == libc::EINTR) {
            return Err(format!("a vCPU that was kicked did not stand: {finished:?}"));
        }
        let mut found = PageSet::empty(END);
        match &self.rings {
            Some(rings) => rings.harvest(&mut found, true).map_err(|error| words(&error))?,
            None => {
                let mut bits = vec![0; self.vm.log_words()];
                let harvested = self.vm.dirty(&mut bits).and_then(|()| self.vm.clear_dirty(&bits));
                harvested.map_err(|error| words(&error))?;
                bits.iter().enumerate().for_each(|(index, &word)| add_word(&mut found, index, word));
            }
        }
        Ok(found)
    }

    /// The pages that hold what this round wrote.
    fn written(&self, number: u32) -> Result<PageSet, String> {
        let mut written = PageSet::empty(END);
        for page in FIRST..END {
            let word: u32 = self
                .vm
                .ram()
                .memory()
                .read_obj(GuestAddress(page * PAGE_SIZE as u64))
                .map_err(|error| error.to_string())?;
            if word == number {
                written.insert(page);
            }
        }
        Ok(written)
    }
}

/// What is in the first set and not in the second.
fn beyond(first: &PageSet, second: &PageSet) -> u64 {
    let mut rest = first.clone();
    rest.subtract(second);
    rest.len()
}

/// All rounds in both machines.
fn compare(ring: &mut Trial, bitmap: &mut Trial, rounds: &[u64]) -> Result<(), String> {
    ring.vcpu.kick().mine();
    bitmap.vcpu.kick().mine();
    for (number, &apart) in (1..).zip(rounds) {
        let by_ring = ring.round(number, apart)?;
        let by_bitmap = bitmap.round(number, apart)?;
        let expected = (END - FIRST).div_ceil(apart);
        for (trial, found, which) in [(&*ring, &by_ring, "ring"), (&*bitmap, &by_bitmap, "bitmap")] {
            let written = trial.written(number)?;
            if written.len() != expected {
                return Err(format!("{} pages were to be written, and {} were", expected, written.len()));
            }
            let missing = beyond(&written, found);
            if missing > 0 {
                return Err(format!("the {which} missed {missing} of {expected} pages that were written"));
            }
        }
        let (missed, more) = (beyond(&by_bitmap, &by_ring), beyond(&by_ring, &by_bitmap));
        if missed > 0 || more > 0 {
            return Err(format!("the ring missed {missed} pages that the bitmap has, and has {more} that it has not"));
        }
    }
    // More was written than fits.
    if ring.rings.as_ref().is_none_or(|rings| rings.filled() == 0) {
        return Err("a ring that must have been full was never said to be".to_owned());
    }
    Ok(())
}

/// Tries it, with a vCPU's thread of its own.
fn run(kvm: &Kvm, code: Code, rounds: &'static [u64], limit: Duration) -> Result<(), String> {
    let privilege = match code {
        Code::Kernel => Privilege::Kernel,
        Code::User => Privilege::User,
    };
    let mut ring = Trial::new(kvm, privilege, true)?;
    let mut bitmap = Trial::new(kvm, privilege, false)?;
    let kicks = [ring.vcpu.kick(), bitmap.vcpu.kick()];
    let (answer, answers) = channel();
    let vcpu = move || {
        let compared = compare(&mut ring, &mut bitmap, rounds);
        // Whoever waits no longer was told that it takes too long.
        let _ = answer.send(compared);
    };
    let started = std::thread::Builder::new().name("ring-check".to_owned()).spawn(vcpu);
    let thread = started.map_err(|error| format!("no thread can be started: {error}"))?;
    let mut waited = answers.recv_timeout(limit);
    for _ in 0..KICKS {
        if waited != Err(RecvTimeoutError::Timeout) {
            break;
        }
        kicks.iter().for_each(|kick: &Arc<Kick>| kick.kick());
        waited = match answers.recv_timeout(Duration::from_millis(100)) {
            Ok(_) => Ok(Err(format!("it took longer than {} s", limit.as_secs()))),
            waited => waited,
        };
    }
    match waited {
        Ok(compared) => {
            thread.join().map_err(|_| "it failed".to_owned())?;
            compared
        }
        Err(RecvTimeoutError::Timeout) => Err("a vCPU cannot be stopped".to_owned()),
        Err(RecvTimeoutError::Disconnected) => Err("it failed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rings_of_this_host_are_whole_or_are_refused_with_a_reason() {
        let Ok(kvm) = crate::kvm::host() else {
            println!("skipped: no /dev/kvm");
            return;
        };
        for code in [Code::User, Code::Kernel] {
            let begun = std::time::Instant::now();
            let tried = of_host(&kvm, code);
            println!("{code:?}: {tried:?} after {:?}", begun.elapsed());
            assert_eq!(of_host(&kvm, code), tried);
            assert!(tried.err().is_none_or(|why| !why.is_empty() && !why.contains("failed")));
        }
    }

    #[test]
    fn a_vcpu_that_does_not_end_is_kicked() {
        // Distance zero: it writes its first page for ever.
        let Ok(kvm) = crate::kvm::host() else {
            println!("skipped: no /dev/kvm");
            return;
        };
        let why = run(&kvm, Code::User, &[0], Duration::from_millis(50)).expect_err("it never ends");
        assert!(why.contains("took longer"), "{why}");
    }
}
