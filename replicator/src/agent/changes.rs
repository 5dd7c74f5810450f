//! What becomes of the VMs that an operator asked to change hands, for whoever follows that.
//!
//! Promise: an end that was reached once is told also when this host has forgotten the VM meanwhile, stands by for it again, or
//! protects it again: who looks now and then misses nothing. The last change of each VM is kept for as long as the agent lives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::view::View;
use crate::control::api::VmStatus;
use crate::control::change::Change;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Changes {
    asked: Mutex<BTreeMap<String, Arc<View>>>,
}

impl Changes {
    /// `change` is asked for of the VM that is `view` here now.
    pub(super) fn begin(&self, name: &str, view: &Arc<View>, change: Change) {
        view.await_change(change);
        self.lock().insert(name.to_owned(), Arc::clone(view));
    }

    /// How far the change is: as the VM was when it ended, else as it is in the view that this host has of it `now`.
    pub(super) fn status(&self, name: &str, now: Option<&Arc<View>>) -> Option<VmStatus> {
        let ended = self.lock().get(name).and_then(|view| view.changed());
        ended.or_else(|| now.map(|view| view.status()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<View>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::events::{EventLog, Writer};
    use crate::control::api::{ProtectionState, Role};
    use crate::metrics::Metrics;
    use heartbeat_core::ids::VmId;

    struct Host {
        dir: tempfile::TempDir,
        writer: Writer,
        changes: Changes,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            Self { dir, writer: Writer::start().expect("a thread"), changes: Changes::default() }
        }

        fn view(&self, role: Role, state: ProtectionState) -> Arc<View> {
            let log = EventLog::new(&self.writer, self.dir.path(), "web-1");
            let view = View::new("web-1", VmId([1; 16]), role, Metrics::new().vm("web-1"), log);
            view.set_state(state, "");
            Arc::new(view)
        }

        fn at(&self, now: Option<&Arc<View>>) -> Option<(Role, ProtectionState)> {
            self.changes.status("web-1", now).map(|status| (status.role, status.state))
        }
    }

    #[test]
    fn a_vm_that_was_handed_over_and_forgotten_was_handed_over() {
        use ProtectionState as State;
        let host = Host::new();
        let view = host.view(Role::Primary, State::Protected);
        host.changes.begin("web-1", &view, Change::HandOver);
        assert_eq!(host.at(Some(&view)), Some((Role::Primary, State::Protected)));
        view.set_state(State::FailingOver, "");
        assert_eq!(host.at(Some(&view)), Some((Role::Primary, State::FailingOver)));
        view.set_state(State::Fenced, "host-b runs it");
        assert_eq!(host.at(None), Some((Role::Primary, State::Fenced)), "forgotten");
        let standby = host.view(Role::Standby, State::Pairing);
        assert_eq!(host.at(Some(&standby)), Some((Role::Primary, State::Fenced)), "it stands by again");
    }

    #[test]
    fn a_survivor_that_is_protected_again_is_one() {
        use ProtectionState as State;
        for (change, role) in [(Change::HandOver, Role::Survivor), (Change::GoOn, Role::Primary)] {
            let host = Host::new();
            let view = host.view(Role::Standby, State::FailingOver);
            host.changes.begin("web-1", &view, change);
            view.set(|status| status.role = role);
            view.set_state(State::Degraded, "alone");
            view.begin(Role::Primary, "host-b", Vec::new());
            view.set_state(State::Pairing, "");
            assert_eq!(host.at(Some(&view)), Some((role, State::Degraded)), "{change:?}");
        }
    }

    #[test]
    fn what_did_not_end_is_told_as_it_is_now() {
        use ProtectionState as State;
        let host = Host::new();
        let view = host.view(Role::Primary, State::Protected);
        assert_eq!(host.at(Some(&view)), Some((Role::Primary, State::Protected)), "nothing was asked");
        host.changes.begin("web-1", &view, Change::HandOver);
        view.set_state(State::FailingOver, "");
        assert_eq!(host.at(None), None, "the VM is gone, and what it was last is no end");
        view.set_state(State::Degraded, "host-b is silent");
        assert_eq!(host.at(Some(&view)), Some((Role::Primary, State::Degraded)));
    }

    #[test]
    fn the_end_of_an_earlier_change_is_not_that_of_the_next() {
        use ProtectionState as State;
        let host = Host::new();
        let view = host.view(Role::Standby, State::FailingOver);
        host.changes.begin("web-1", &view, Change::HandOver);
        view.set(|status| status.role = Role::Survivor);
        view.set_state(State::Unprotected, "");
        view.begin(Role::Primary, "host-b", Vec::new());
        view.set_state(State::Protected, "");
        host.changes.begin("web-1", &view, Change::HandOver);
        assert_eq!(host.at(Some(&view)), Some((Role::Primary, State::Protected)));
    }
}
