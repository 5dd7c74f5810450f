//! What becomes of the VMs that an operator asked to change hands, for whoever follows that.
//!
//! Promise: an end that was reached once is told also when this host has forgotten the VM meanwhile, stands by for it again, or
//! protects it again: who looks now and then misses nothing. The last change of each VM is kept for as long as the agent lives.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::view::{Awaited, View};
use crate::control::api::VmStatus;
use crate::control::change::Change;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Changes {
    asked: Mutex<BTreeMap<String, Arc<View>>>,
    number: AtomicU64,
}

impl Changes {
    /// `change` is asked for of the VM that is `view` here now. To be called before it is, for it may have ended before that call has.
    pub(super) fn begin(&self, name: &str, view: &Arc<View>, change: Change) -> Begun {
        let number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        let awaited = view.await_change(Awaited { number, change: Some(change), ended: None });
        let before = self.lock().insert(name.to_owned(), Arc::clone(view));
        Begun { number, view: Arc::clone(view), awaited, before }
    }

    /// It was refused: what was asked for before is told of as ever, unless something else has been asked for since.
    pub(super) fn refused(&self, name: &str, begun: Begun) {
        let Begun { number, view, awaited, before } = begun;
        let mut asked = self.lock();
        if view.give_up_change(number, awaited) && asked.get(name).is_some_and(|known| Arc::ptr_eq(known, &view)) {
            match before {
                Some(before) => asked.insert(name.to_owned(), before),
                None => asked.remove(name),
            };
        }
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

/// A change that was begun, and what it takes the place of.
#[derive(Debug)]
pub(super) struct Begun {
    number: u64,
    view: Arc<View>,
    awaited: Awaited,
    before: Option<Arc<View>>,
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
    fn what_is_refused_takes_nothing_away_from_what_was_accepted() {
        use ProtectionState as State;
        let host = Host::new();
        let view = host.view(Role::Primary, State::Protected);
        host.changes.begin("web-1", &view, Change::HandOver);
        let other = host.changes.begin("web-1", &view, Change::GoOn);
        host.changes.refused("web-1", other);
        view.set_state(State::Fenced, "host-b runs it");
        assert_eq!(host.at(None), Some((Role::Primary, State::Fenced)));
        let standby = host.view(Role::Standby, State::Pairing);
        let other = host.changes.begin("web-1", &standby, Change::HandOver);
        host.changes.refused("web-1", other);
        assert_eq!(host.at(Some(&standby)), Some((Role::Primary, State::Fenced)));
        let late = host.changes.begin("web-1", &standby, Change::GoOn);
        host.changes.begin("web-1", &standby, Change::HandOver);
        host.changes.refused("web-1", late);
        standby.set(|status| status.role = Role::Survivor);
        standby.set_state(State::Unprotected, "");
        assert_eq!(host.at(None), Some((Role::Survivor, State::Unprotected)), "what was accepted meanwhile");
        let never = host.changes.begin("web-2", &standby, Change::HandOver);
        host.changes.refused("web-2", never);
        assert_eq!(host.changes.status("web-2", None), None);
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
