//! Coverage-guided fuzzing of everything that reads what others wrote: peers, a store, QEMU, `/proc`.
//!
//! The targets stand beside the code that they are about (`fuzzing` in `heartbeat`, `replicator::pages` and
//! `vmm_hooks::qemu`), and the tests of those crates replay what is kept in `corpus/`. Here they are only joined to
//! libFuzzer: `cargo xtask fuzz` builds the program `fuzz` with coverage and runs it (`docs/testing.md`).

#[cfg(feature = "libfuzzer")]
pub mod targets {
    //! All targets under one roof.

    /// A target's name and its body.
    pub type Target = (&'static str, fn(&[u8]));

    /// Every target of the workspace.
    pub fn all() -> impl Iterator<Item = Target> {
        let (hooks, pages) = (vmm_hooks::qemu::fuzzing::TARGETS, replicator::pages::fuzzing::TARGETS);
        heartbeat::fuzzing::TARGETS.into_iter().chain(hooks).chain(pages)
    }
}
