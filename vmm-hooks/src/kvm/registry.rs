//! The twins of one host, by name.
//!
//! Promise: a name is one twin's, until that is removed or its machine is taken.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::machine::refused;
use crate::guest::GuestError;

/// The twins, with the machines of those that were activated. Clones are the same one.
#[derive(Debug)]
pub(super) struct Registry<M>(Arc<Mutex<BTreeMap<String, Option<M>>>>);

impl<M> Clone for Registry<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M> Default for Registry<M> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<M> Registry<M> {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Option<M>>> {
        self.0.lock().expect("nobody panics while it holds the twins")
    }

    /// Adds one, once what it needs was made.
    pub(super) fn add<T>(&self, name: &str, make: impl FnOnce() -> Result<T, GuestError>) -> Result<T, GuestError> {
        let mut twins = self.lock();
        if twins.contains_key(name) {
            return Err(refused(format!("there is a twin called {name} already")));
        }
        let made = make()?;
        twins.insert(name.to_owned(), None);
        Ok(made)
    }

    /// One has this machine now.
    pub(super) fn activated(&self, name: &str, machine: M) {
        self.lock().insert(name.to_owned(), Some(machine));
    }

    /// One is no more.
    pub(super) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// The names, of activated ones too.
    pub(super) fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// The machine of an activated one.
    pub(super) fn machine(&self, name: &str) -> Option<M>
    where
        M: Clone,
    {
        self.lock().get(name).cloned().flatten()
    }

    /// The same, which is its taker's business from now on: its name is free.
    pub(super) fn take(&self, name: &str) -> Option<M> {
        let mut twins = self.lock();
        let machine = twins.get_mut(name)?.take()?;
        twins.remove(name);
        Some(machine)
    }
}
