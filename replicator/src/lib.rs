pub mod control;
pub mod metrics;
pub mod status;
