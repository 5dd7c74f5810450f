//! Whole scenarios with nothing simulated: QEMU with a Linux guest and Redis in it, two agents, a witness and the command
//! line, in the laboratory of `understudy demo`. What is judged is what a client sees, what operators read and what is left.
//!
//! Without root, QEMU, `ip` or the guest image (`cargo xtask setup`) each says `skipped: ...` and passes. They run one at
//! a time, also beside those of another process. Those that take long say the same unless `UNDERSTUDY_LONG=1` is set. `UNDERSTUDY_BIN` names the program if it is not the one that was built
//! beside the tests; `UNDERSTUDY_LOG` sets the daemons' log level, whose ends are shown when a scenario fails.

mod again;
mod disks;
mod drill;
mod ends;
mod etcd;
mod fails;
mod fence;
mod half_dead;
mod injected;
mod latch;
mod microvm;
mod monitor;
mod page;
mod pair;
mod paths;
mod pressure;
mod refuses;
mod stage;
mod three;
mod unlucky;
mod watch;
