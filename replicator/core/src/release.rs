//! The release rule (`docs/protocol.md` P1): which output may leave.
//!
//! Output belongs to the epoch that it was emitted in. Before the first held epoch is captured everything may leave; from then on,
//! output of an epoch may leave once the standby holds that epoch. Whoever owns the VM alone is free again; whoever lost it is silent.

use heartbeat_core::ids::Epoch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mode {
    Open,
    Held { through: Epoch },
    Shut,
}

/// The rule for one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReleaseRule {
    mode: Mode,
}

impl Default for ReleaseRule {
    fn default() -> Self {
        Self::new()
    }
}

impl ReleaseRule {
    /// Everything may leave.
    #[must_use]
    pub fn new() -> Self {
        Self { mode: Mode::Open }
    }

    /// Output emitted after the capture of `epoch` is held from now on. Once held, the first call counts.
    pub fn hold_after(&mut self, epoch: Epoch) {
        if self.mode == Mode::Open {
            self.mode = Mode::Held { through: epoch };
        }
    }

    /// The standby holds all epochs up to `epoch`. Returns up to which epoch output may leave now, if that is news.
    pub fn acknowledged(&mut self, epoch: Epoch) -> Option<Epoch> {
        match &mut self.mode {
            Mode::Held { through } if *through < epoch => {
                *through = epoch;
                Some(epoch)
            }
            _ => None,
        }
    }

    /// This node owns the VM alone: everything may leave.
    pub fn open(&mut self) {
        self.mode = Mode::Open;
    }

    /// Another node may own the VM: nothing may leave.
    pub fn shut(&mut self) {
        self.mode = Mode::Shut;
    }

    /// Whether output is held.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.mode != Mode::Open
    }

    /// Whether output that was emitted in `epoch` may leave.
    #[must_use]
    pub fn may_leave(&self, epoch: Epoch) -> bool {
        match self.mode {
            Mode::Open => true,
            Mode::Held { through } => epoch <= through,
            Mode::Shut => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Hold(u64),
        Acknowledged(u64),
        Open,
        Shut,
    }

    fn steps() -> impl Strategy<Value = alloc::vec::Vec<Step>> {
        let step = prop_oneof![
            2 => (1_u64..40).prop_map(Step::Hold),
            6 => (1_u64..40).prop_map(Step::Acknowledged),
            1 => Just(Step::Open),
            1 => Just(Step::Shut),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// P1: what may leave, said by a model that keeps the whole history.
        #[test]
        fn output_leaves_only_when_held_by_the_standby_or_owned_alone(steps in steps()) {
            let mut rule = ReleaseRule::new();
            // Since the last opening: the first hold, the highest acknowledgement after it, and whether it was shut.
            let (mut hold, mut held_by_standby, mut shut) = (None, 0, false);
            for step in steps {
                match step {
                    Step::Hold(epoch) => {
                        rule.hold_after(Epoch(epoch));
                        if !shut { hold = hold.or(Some(epoch)); }
                    }
                    Step::Acknowledged(epoch) => {
                        let news = rule.acknowledged(Epoch(epoch));
                        let before = held_by_standby.max(hold.unwrap_or(u64::MAX));
                        prop_assert_eq!(news, (!shut && epoch > before).then_some(Epoch(epoch)));
                        if hold.is_some() && !shut { held_by_standby = held_by_standby.max(epoch); }
                    }
                    Step::Open => { rule.open(); (hold, held_by_standby, shut) = (None, 0, false); }
                    Step::Shut => { rule.shut(); shut = true; }
                }
                for epoch in 1..42 {
                    let may = !shut && hold.is_none_or(|hold| epoch <= hold.max(held_by_standby));
                    prop_assert_eq!(rule.may_leave(Epoch(epoch)), may, "epoch {}", epoch);
                }
                prop_assert_eq!(rule.is_holding(), shut || hold.is_some());
            }
        }
    }
}
