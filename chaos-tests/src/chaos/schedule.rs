//! Which fault when: drawn from a seed, without replacement until each kind was drawn, so that none is forgotten for long; of a
//! kind's faults each before one comes again.

use std::collections::BTreeMap;

use crate::chaos::fault::Fault;
use crate::chaos::setting::Setting;
use crate::sim::rng::Rng;

/// Things of which each is drawn before one comes again.
#[derive(Debug, Clone)]
struct Bag<T> {
    all: Vec<T>,
    left: Vec<T>,
}

impl<T: Clone> Bag<T> {
    fn draw(&mut self, rng: &mut Rng) -> T {
        if self.left.is_empty() {
            self.left.clone_from(&self.all);
        }
        self.left.swap_remove(rng.index(self.left.len()))
    }
}

/// The faults of a run, without end.
#[derive(Debug, Clone)]
pub struct Schedule {
    rng: Rng,
    kinds: Bag<&'static str>,
    faults: BTreeMap<&'static str, Bag<Fault>>,
}

impl Schedule {
    /// The schedule of a seed, over these faults. The same seed gives the same order.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn new(seed: u64, from: &[Fault]) -> Self {
        assert!(!from.is_empty(), "there are faults to draw from");
        let mut faults: BTreeMap<&'static str, Bag<Fault>> = BTreeMap::new();
        for &fault in from {
            faults.entry(fault.kind()).or_insert_with(|| Bag { all: Vec::new(), left: Vec::new() }).all.push(fault);
        }
        let kinds = Bag { all: faults.keys().copied().collect(), left: Vec::new() };
        Self { rng: Rng::new(seed), kinds, faults }
    }

    /// The next fault.
    pub fn draw(&mut self) -> Fault {
        let kind = self.kinds.draw(&mut self.rng);
        self.faults.get_mut(kind).expect("it has faults").draw(&mut self.rng)
    }
}

/// The faults of a run, by the settings that they are played in: drawn by [`Schedule`] from all, and of the settings that play one,
/// one is drawn. The faults are such as one of them plays.
#[must_use]
pub fn deal(seed: u64, rounds: u64, faults: &[Fault], settings: &[Setting]) -> Vec<(Setting, Vec<Fault>)> {
    let mut dealt: Vec<(Setting, Vec<Fault>)> = settings.iter().map(|&setting| (setting, Vec::new())).collect();
    let mut schedule = Schedule::new(seed, faults);
    let mut rng = Rng::new(seed.rotate_left(16));
    for _ in 0..rounds {
        let fault = schedule.draw();
        let mut play: Vec<_> = dealt.iter_mut().filter(|(setting, _)| setting.plays(fault)).collect();
        if !play.is_empty() {
            let at = rng.index(play.len());
            play[at].1.push(fault);
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_an_order_and_a_hundred_rounds_have_each_kind_at_least_three_times() {
        let draw = |seed| {
            let mut schedule = Schedule::new(seed, &Fault::ALL);
            (0..100).map(|_| schedule.draw()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let drawn = draw(7);
        for fault in Fault::ALL {
            let of_kind = || drawn.iter().filter(|drawn| drawn.kind() == fault.kind());
            assert!(of_kind().count() >= 3, "{}", fault.kind());
            let of_its_kind = Fault::ALL.iter().filter(|other| other.kind() == fault.kind()).count();
            if of_its_kind <= 3 {
                assert!(of_kind().any(|drawn| *drawn == fault), "{}", fault.name());
            }
        }
    }

    #[test]
    fn each_fault_is_dealt_to_a_setting_that_plays_it_and_none_is_lost() {
        for seed in 0..20 {
            let dealt = deal(seed, 100, &Fault::ALL, &Setting::MIX);
            assert_eq!(dealt, deal(seed, 100, &Fault::ALL, &Setting::MIX));
            assert_eq!(dealt.iter().map(|(_, faults)| faults.len()).sum::<usize>(), 100);
            for (setting, faults) in &dealt {
                assert!(faults.len() > 10, "{setting} has {}", faults.len());
                assert!(faults.iter().all(|fault| setting.plays(*fault)), "{setting}: {faults:?}");
            }
            for fault in Fault::ALL {
                let drawn = dealt.iter().flat_map(|(_, faults)| faults).filter(|drawn| drawn.kind() == fault.kind());
                assert!(drawn.count() >= 3, "{}", fault.kind());
            }
        }
        for fault in Fault::ALL {
            assert!(Setting::MIX.iter().any(|setting| setting.plays(fault)), "{}", fault.name());
        }
    }

    #[test]
    fn every_fault_has_a_name_of_its_own() {
        let mut names: Vec<String> = Fault::ALL.into_iter().map(Fault::name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Fault::ALL.len());
    }
}
