//! A process for each microVM: the machine, its devices, its gate and its disk log are in a process of their own, and whoever protects it is to it what
//! the protector of a QEMU is.
//!
//! Promises:
//! - Guest memory, the pages that were found dirty and the device state lie in memory that both processes map; a capture is one message each way, and
//!   one more lets the guest run. With few dirty pages the process copies them, if it may, and lets the guest run before it answers.
//! - A page that was found stays found until the protector has taken it: an answer that is lost, or comes too late, loses no page. Disk writes of a lost
//!   answer are gone, so the mirror counts as broken from then on.
//! - Output that is held is heard only by a message that releases it. A protector that dies sends none: the gate of a protected machine is shut
//!   then, and the process ends with its protector, whatever the reason (`PR_SET_PDEATHSIG`, and its closed socket).
//! - Its end is SIGKILL by a pidfd, confirmed.
//! - It opens nothing: `/dev/kvm`, tap, images and what it boots are opened by whoever starts it, and passed on. It has no capability, no file and no
//!   privilege to gain, and asks the kernel for nothing but what is in `confine`.
//!
//! | module | promise |
//! | --- | --- |
//! | `wire` | the messages |
//! | `link` | one message a packet, with descriptors; an answer to its question |
//! | `board` | the memory that both processes have |
//! | `spawn` | starting one, from a thread that does not end |
//! | [`child`] | the process itself |
//! | `gate` | its gate, as its protector has it |
//! | [`guest`] | its handle, and it as a [`crate::guest::Guest`] |
//! | `beside` | the two threads of a pause on one processor |
//! | `capture` | what it has captured, as its protector takes it |
//! | [`twin`] | a standby's twins, each in a process that waits |

mod beside;
pub(super) mod board;
mod capture;
pub mod child;
mod gate;
pub mod guest;
mod link;
mod spawn;
pub mod twin;
mod wire;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use wire::fuzzing;

pub use guest::{Microvm, ProcessGuest, attach};
pub use spawn::Program;
pub use twin::ProcessTwinHost;
