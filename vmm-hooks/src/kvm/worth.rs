//! For how many harvests a page that is written is worth being left writable on this host: as many as cost what its next first write would.
//!
//! The first write to a page that is protected costs a way out of the guest and in again: about a microsecond under hardware, twenty were measured on a
//! software KVM. A page that is left writable counts as dirty in each harvest, is copied, and compared by the encoder. So both are measured, in a machine that is
//! thrown away, and what is left writable in vain never costs more than the write that it was to save: the rule of who rents skis, and buys them when he has paid their
//! price in rents (Karlin, Manasse, Rudolph, Sleator: Competitive snoopy caching, 1988).
//!
//! Promise: an answer in any case, the same for the life of the process.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::trial::{Code, FIRST, Trial, in_time};
use crate::layout::PAGE_SIZE;

/// Pages that are written to find it out: few enough for a processor's caches, and for a host that takes long for each.
const PAGES: u64 = 256;
/// How often: what else such a host does makes it slower, never faster.
const ROUNDS: u32 = 4;
/// Longest time that a vCPU may take for all of it. An emulated host takes less than a second.
const LIMIT: Duration = Duration::from_secs(10);
/// What a harvest with a page in vain costs, in copies of it: one in the pause, and one that compares it.
const COPIES: u32 = 2;
/// Most harvests: a page that is not written any more is not to be carried along for long.
const MOST: u8 = 48;
/// If it cannot be found out: as under hardware.
const USUAL: u8 = 4;

/// For how many harvests, for a guest that runs `code`. Blocks; tries it once.
pub(super) fn of_host(kvm: &Kvm, code: Code) -> u8 {
    static TRIED: [OnceLock<u8>; 2] = [OnceLock::new(), OnceLock::new()];
    *TRIED[usize::from(code == Code::User)].get_or_init(|| {
        let found = measure(kvm, code);
        match &found {
            Ok(costs) => tracing::debug!(?code, ?costs, "what dirty pages cost on this host"),
            Err(why) => tracing::warn!(?code, why, "what dirty pages cost on this host was not found out"),
        }
        found.map_or(USUAL, Costs::harvests)
    })
}

/// Of one page.
#[derive(Debug, Clone, Copy)]
struct Costs {
    /// Its first write, beyond what another one takes.
    fault: Duration,
    /// A copy of it.
    copy: Duration,
}

impl Costs {
    fn harvests(self) -> u8 {
        let vain = (self.copy * COPIES).max(Duration::from_nanos(1));
        let harvests = self.fault.as_nanos() / vain.as_nanos();
        u8::try_from(harvests).unwrap_or(MOST).clamp(1, MOST)
    }
}

fn measure(kvm: &Kvm, code: Code) -> Result<Costs, String> {
    let mut trial = Trial::new(kvm, code, false, PAGES)?;
    in_time(&[trial.kick()], LIMIT, move || {
        let pages = u32::try_from(PAGES).expect("few");
        let (mut fault, mut copy) = (Duration::MAX, Duration::MAX);
        let mut bytes = vec![0; usize::try_from(PAGES).expect("few") * PAGE_SIZE];
        // So that they are there.
        trial.write(0, 1)?;
        for round in 1..=ROUNDS {
            let found = trial.harvest()?;
            if (FIRST..FIRST + PAGES).any(|page| !found.contains(page)) {
                return Err("KVM's log lacks pages that were written".to_owned());
            }
            let (first, again) = (trial.write(round, 1)?, trial.write(round, 1)?);
            fault = fault.min(first.saturating_sub(again) / pages);
            let begun = Instant::now();
            let read = trial.ram().memory().read_slice(&mut bytes, GuestAddress(FIRST * PAGE_SIZE as u64));
            read.map_err(|error| error.to_string())?;
            copy = copy.min(begun.elapsed() / pages);
        }
        Ok(Costs { fault, copy })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_left_writable_for_as_long_as_costs_one_first_write() {
        let harvests =
            |fault, copy| Costs { fault: Duration::from_nanos(fault), copy: Duration::from_nanos(copy) }.harvests();
        assert_eq!(harvests(1000, 125), 4);
        assert_eq!(harvests(3000, 125), 12);
        assert_eq!((harvests(21_000, 125), harvests(u64::MAX, 0)), (MOST, MOST));
        assert_eq!((harvests(0, 125), harvests(0, 0)), (1, 1));
    }

    #[test]
    fn this_hosts_costs_are_found_out() {
        let Ok(kvm) = crate::kvm::host() else { return println!("skipped: no /dev/kvm") };
        for code in [Code::User, Code::Kernel] {
            let begun = Instant::now();
            let costs = measure(&kvm, code).expect("this host runs guests");
            println!("{code:?}: {costs:?}, {} harvests; after {:?}", costs.harvests(), begun.elapsed());
            assert!(costs.copy > Duration::ZERO);
            assert!((1..=MOST).contains(&of_host(&kvm, code)));
        }
    }
}
