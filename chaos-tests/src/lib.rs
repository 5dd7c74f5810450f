//! How we try to break it: simulator and laboratory.

pub mod chaos;
pub mod etcd;
pub mod sim;
