//! What is copied: epochs, pages, held output; and the program `understudy` that an operator runs.
//!
//! | module | promise |
//! | --- | --- |
//! | [`agent`] | one per host: joins the pure cores to guests, network, store and operators |
//! | [`pages`] | turns captured epochs into bytes and back; trusts nothing that comes in |
//! | [`disk`] | a standby's copy of disks: always at a whole epoch, whatever happens to its host |
//! | [`control`], [`cli`], [`status`] | what operators ask and see |
//! | [`metrics`] | what Prometheus sees |
//! | [`demo`] | two hosts on one machine, and what is measured on them |

pub mod agent;
pub mod cli;
pub mod control;
pub mod demo;
pub mod disk;
pub mod metrics;
pub mod pages;
pub mod status;
