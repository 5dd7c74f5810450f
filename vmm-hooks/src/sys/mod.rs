//! System calls that no safe crate offers as they are needed here, wrapped so that callers stay safe code.
//!
//! Every line of unsafe code of the workspace is in this module; each block argues why it is sound.
//!
//! | module | promise |
//! | --- | --- |
//! | [`process`] | a handle on another process that a reused pid cannot fool; reading and writing its memory |
//! | [`memory`] | shared memory in a memfd, without a reference into it |
//! | [`pagemap`] | which pages of another process were written (`PAGEMAP_SCAN`) |
//! | [`inject`] | a userfaultfd in another process, which is unharmed whenever we die |
//! | [`kvm`] | a virtual machine of ours and its memory, a vCPU and its kick |
//! | [`ring`] | a vCPU's ring of dirty pages |
//! | [`copy`] | guest pages copied by two threads |
//! | [`tap`] | a tap interface as a descriptor |
//! | [`fdpass`] | descriptors sent over a Unix socket |
//! | [`isolate`] | a process without files: an empty root |
//! | [`sched`] | a thread that is scheduled before ordinary ones |
#![allow(unsafe_code)]

pub mod copy;
pub mod fdpass;
pub mod inject;
pub mod isolate;
pub mod kvm;
pub mod memory;
pub mod pagemap;
pub mod process;
pub mod ring;
pub mod sched;
pub mod tap;
