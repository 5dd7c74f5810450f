//! The chaos suite: real agents, a real witness and a real VM in the laboratory, a seeded schedule of faults, a workload that
//! writes through the VM's network all the time, and checkers that know nothing of epochs or acknowledgements.
//!
//! One laboratory of each setting ([`setting`]) lives through many rounds. A round is: a fault, until it is over; waiting until the VM is protected again;
//! judging. What is judged, in each round:
//!
//! - the history of all reads and writes is linearizable, and nothing acknowledged is lost ([`linear`], [`counter`]);
//! - no connection of a client broke, unless the fault itself ends the guest's Redis;
//! - never two copies are heard: the guest's frames come from one host at a time, and change hosts no more often than copies
//!   were activated ([`sniffer`]);
//! - the VM is protected again within a bound, and its clients are answered;
//! - nothing is left: processes, interfaces, directories, descriptors ([`leaks`]).
//!
//! At the end both hosts lose power, and the disks are judged by themselves ([`power`]).

pub mod capture;
pub mod clock;
pub mod counter;
pub mod engine;
pub mod fault;
pub mod field;
mod guest;
mod inject;
mod leak;
pub mod leaks;
pub mod linear;
pub mod memory;
pub mod monitor;
pub mod page;
mod power;
pub mod relay;
pub mod report;
pub mod schedule;
pub mod setting;
pub mod sniffer;
pub mod space;
pub mod storage;
mod store;
pub mod workload;
