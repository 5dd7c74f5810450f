//! What a protection does, in numbers: one observation per committed epoch, and statistics over the recent ones.
//!
//! [`EpochStats`] keeps a ring of the last [`WINDOW`] epochs and totals since it was made. Adding is cheap; percentiles are
//! computed when asked for. [`render`] makes text for people of a status.

mod epochs;
pub mod render;

pub use epochs::{EpochObservation, EpochStats, WINDOW};
