//! How Understudy touches a virtual machine: one set of traits, several back ends.
//!
//! This crate knows pages, device state, pauses and gates. It knows no peer, no generation and no
//! replication; an epoch is to it a number that tags held output. All unsafe code lives in [`sys`].
//!
//! | module | promise |
//! | --- | --- |
//! | [`layout`] | names every byte of guest memory by one dense page number |
//! | [`disk`] | what a guest's disks are, and what was written to them |
//! | [`guest`] | the traits a back end offers: [`guest::Guest`], [`guest::Gate`], [`guest::Twin`] |
//! | [`nbd`] | takes a guest's disk writes over a socket |
//! | [`track`] | finds dirty pages from outside and never loses one |
//! | [`qemu`] | back end: a running, unmodified QEMU |
//! | [`kvm`] | back end: our own microVM on KVM, in this process |
//! | [`sim`] | back end: a deterministic guest for tests |
//! | `tap` | tap interfaces of twins and microVMs |
//! | [`sys`] | system calls; every line of unsafe code |

pub mod disk;
pub mod guest;
pub mod kvm;
pub mod layout;
pub mod nbd;
pub mod qemu;
pub mod sim;
pub mod sys;
mod tap;
pub mod track;
