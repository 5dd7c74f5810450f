//! Whether a host's KVM keeps its rings whole: tried before they are relied on, in two machines that are thrown away.
//!
//! A KVM that emulates a guest's instructions was seen to write over entries: one `KVM_RUN` pushed 16,384 of them into a ring of 4,096 without stopping
//! at a full one, and stopped the vCPU at a full ring for ever afterwards. So the same code writes known pages in both machines, more of them than a
//! ring has room for, and what the ring found must be what the bitmap found and what was written, also for pages that were given back.
//!
//! Promise: an answer within [`LIMIT`] and a few seconds, the same for the life of the process.

use std::sync::OnceLock;
use std::time::Duration;

use kvm_ioctls::Kvm;

use super::LENGTH;
pub use crate::kvm::trial::Code;
use crate::kvm::trial::{Trial, in_time};
use crate::layout::PageSet;

/// Longest time that a vCPU may take for all rounds. An emulated host takes a second or two.
pub const LIMIT: Duration = Duration::from_secs(20);
/// Pages that are written: three rings full.
const PAGES: u64 = 3 * LENGTH as u64;

/// Whether the rings of this host's KVM can be relied on for a guest that runs `code`. Blocks; tries it once.
///
/// # Errors
/// Why not, in words.
pub fn of_host(kvm: &Kvm, code: Code) -> Result<(), String> {
    static TRIED: [OnceLock<Result<(), String>>; 2] = [OnceLock::new(), OnceLock::new()];
    let tried = &TRIED[usize::from(code == Code::User)];
    tried.get_or_init(|| run(kvm, code, &ROUNDS, LIMIT)).clone()
}

/// Distances in pages: each page once, then every third, then all of them again.
const ROUNDS: [u64; 3] = [1, 3, 1];

/// What is in the first set and not in the second.
fn beyond(first: &PageSet, second: &PageSet) -> u64 {
    let mut rest = first.clone();
    rest.subtract(second);
    rest.len()
}

/// All rounds in both machines.
fn compare(ring: &mut Trial, bitmap: &mut Trial, rounds: &[u64]) -> Result<(), String> {
    for (number, &apart) in (1..).zip(rounds) {
        ring.write(number, apart)?;
        let by_ring = ring.harvest()?;
        bitmap.write(number, apart)?;
        let by_bitmap = bitmap.harvest()?;
        let expected = PAGES.div_ceil(apart);
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
    if ring.rings().is_none_or(|rings| rings.filled() == 0) {
        return Err("a ring that must have been full was never said to be".to_owned());
    }
    Ok(())
}

/// Tries it, with a vCPU's thread of its own.
fn run(kvm: &Kvm, code: Code, rounds: &'static [u64], limit: Duration) -> Result<(), String> {
    let mut ring = Trial::new(kvm, code, true, PAGES)?;
    let mut bitmap = Trial::new(kvm, code, false, PAGES)?;
    in_time(&[ring.kick(), bitmap.kick()], limit, move || compare(&mut ring, &mut bitmap, rounds))
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
