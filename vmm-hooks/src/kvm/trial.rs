//! A machine that is thrown away, in which a guest of a few instructions writes known pages: what this host's KVM really does.
//!
//! Code is tried as the guest's own would run: at CPL 0 for a kernel, at CPL 3 for the pilot.
//!
//! Promise: an answer within the given limit and a few seconds. A vCPU that does not stop by itself is kicked; a thread that even then does not end is
//! left behind, and counts as a failure.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use super::boot::{self, Privilege};
use super::cpuid;
use super::ram::{Ram, add_word};
use super::ring::{LENGTH, Rings};
use crate::layout::{PAGE_SIZE, PageSet};
use crate::sys::kvm::{Kick, Vcpu, Vm};
use crate::sys::memory::SharedMemory;

/// How often a vCPU that takes too long is kicked, a tenth of a second apart.
const KICKS: u32 = 30;

/// What code a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A kernel.
    Kernel,
    /// Nothing but CPL 3.
    User,
}

impl Code {
    fn privilege(self) -> Privilege {
        match self {
            Self::Kernel => Privilege::Kernel,
            Self::User => Privilege::User,
        }
    }
}

/// Where the code is.
const CODE: u64 = 0x1000;
/// The first page that it may write.
pub(super) const FIRST: u64 = 256;

/// Writes `eax` to each page from `rdi` on, `ebp` bytes apart, below `rsi`, and tells a port that it has.
const WRITE: [u8; 12] = [
    0x89, 0x07, // mov [rdi], eax
    0x01, 0xef, // add edi, ebp
    0x39, 0xf7, // cmp edi, esi
    0x72, 0xf8, // jb to the first
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xfe, // jmp to itself
];

/// One machine.
pub(super) struct Trial {
    vm: Arc<Vm>,
    vcpu: Vcpu,
    rings: Option<Rings>,
    privilege: Privilege,
    /// One page after the last.
    end: u64,
}

fn words(error: &dyn std::error::Error) -> String {
    let source = error.source().map_or(String::new(), |source| format!(": {source}"));
    format!("{error}{source}")
}

impl Trial {
    /// A machine whose guest may write so many pages. Its writes are logged.
    pub(super) fn new(kvm: &Kvm, code: Code, with_rings: bool, pages: u64) -> Result<Self, String> {
        let (privilege, end) = (code.privilege(), FIRST + pages);
        let memory = SharedMemory::new("trial", end * PAGE_SIZE as u64).map_err(|error| words(&error))?;
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
            Ok(Self { vm, vcpu, rings, privilege, end })
        };
        make().map_err(|error: crate::sys::kvm::KvmError| words(&error))
    }

    pub(super) fn kick(&self) -> Arc<Kick> {
        self.vcpu.kick()
    }

    pub(super) fn rings(&self) -> Option<&Rings> {
        self.rings.as_ref()
    }

    pub(super) fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    /// Writes `number` to every `apart`th page once; how long the guest took. For the thread that [`in_time`] gives.
    pub(super) fn write(&mut self, number: u32, apart: u64) -> Result<Duration, String> {
        let regs = kvm_regs {
            rip: CODE,
            rflags: self.privilege.flags(),
            rax: number.into(),
            rdi: FIRST * PAGE_SIZE as u64,
            rsi: self.end * PAGE_SIZE as u64,
            rbp: apart * PAGE_SIZE as u64,
            ..Default::default()
        };
        self.vcpu.fd().set_regs(&regs).map_err(|error| format!("a vCPU's registers cannot be set: {error}"))?;
        let (mut full, begun) = (0, Instant::now());
        loop {
            match self.vcpu.fd_mut().run() {
                Ok(VcpuExit::IoOut(..)) => break,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    full += 1;
                    // At most one for each page, if one fit in at a time.
                    if full > self.end {
                        return Err("it says without end that a ring is full".to_owned());
                    }
                    self.rings.as_ref().ok_or("there is no ring")?.full(0).map_err(|error| words(&error))?;
                }
                Ok(exit) => return Err(format!("a vCPU left the guest in a way that was not asked for: {exit:?}")),
                Err(error) if error.errno() == libc::EINTR => return Err("a vCPU did not come to its end".to_owned()),
                Err(error) => return Err(format!("a vCPU cannot be run: {error}")),
            }
        }
        let took = begun.elapsed();
        // Finishes the instruction, so that the next round can begin elsewhere.
        let kick = self.vcpu.kick();
        kick.hold();
        let finished = self.vcpu.fd_mut().run().map(|exit| format!("{exit:?}"));
        kick.clear();
        if !matches!(finished, Err(error) if error.errno() == libc::EINTR) {
            return Err(format!("a vCPU that was kicked did not stand: {finished:?}"));
        }
        Ok(took)
    }

    /// The pages that were found since the last time; they are tracked anew.
    pub(super) fn harvest(&mut self) -> Result<PageSet, String> {
        let mut found = PageSet::empty(self.end);
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

    /// The pages that hold `number`.
    pub(super) fn written(&self, number: u32) -> Result<PageSet, String> {
        let mut written = PageSet::empty(self.end);
        for page in FIRST..self.end {
            let word: u32 = self
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

/// Has a thread of its own do `what` with vCPUs that have these kicks.
pub(super) fn in_time<R: Send + 'static>(
    kicks: &[Arc<Kick>],
    limit: Duration,
    what: impl FnOnce() -> Result<R, String> + Send + 'static,
) -> Result<R, String> {
    let (answer, answers) = channel();
    let theirs = kicks.to_vec();
    let vcpu = move || {
        theirs.iter().for_each(|kick| kick.mine());
        // Whoever waits no longer was told that it takes too long.
        let _ = answer.send(what());
    };
    let started = std::thread::Builder::new().name("trial".to_owned()).spawn(vcpu);
    let thread = started.map_err(|error| format!("no thread can be started: {error}"))?;
    let mut waited = answers.recv_timeout(limit);
    for _ in 0..KICKS {
        if !matches!(waited, Err(RecvTimeoutError::Timeout)) {
            break;
        }
        kicks.iter().for_each(|kick| kick.kick());
        waited = match answers.recv_timeout(Duration::from_millis(100)) {
            Ok(_) => Ok(Err(format!("it took longer than {} s", limit.as_secs()))),
            waited => waited,
        };
    }
    match waited {
        Ok(done) => {
            thread.join().map_err(|_| "it failed".to_owned())?;
            done
        }
        Err(RecvTimeoutError::Timeout) => Err("a vCPU cannot be stopped".to_owned()),
        Err(RecvTimeoutError::Disconnected) => Err("it failed".to_owned()),
    }
}
