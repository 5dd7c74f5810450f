//! Tests of the whole store: on a model of a file system that crashes and fails ([`crash`], [`order`]), on this host's
//! ([`host`]), and in processes that are killed on it ([`kill`]).

mod crash;
mod driver;
mod host;
mod kill;
mod model;
mod order;
