pub mod agent;
pub mod cli;
pub mod control;
pub mod demo;
pub mod metrics;
pub mod pages;
pub mod status;
