//! How we try to break it: simulator and laboratory.

pub mod sim;
