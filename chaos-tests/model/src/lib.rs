//! A model checker over the real cores: every order of events of two nodes and a witness, or of two nodes alone, within bounds.
//!
//! Nothing of the protocol is written again here. A state holds the cores themselves (`Primary`, `Standby`, `Restart`, `Witness`); an action hands one
//! input to one of them and does what it says, as the product's agent does. What differs from the simulator (`chaos-tests/src/sim`):
//! there is no chance and no scheduler. Whatever can happen next is an action, and `stateright` tries each of them in each
//! reachable state. A message that is lost is one that is never delivered; late and reordered ones follow by themselves.
//!
//! What is checked stands in [`check`], outside of the code under test; what may happen how often in [`scenario`]; deliberate
//! mistakes, each of which must be found, in [`wiring`]. Bounds and figures: `docs/testing.md`.

pub mod check;
mod driver;
pub mod explore;
pub mod scenario;
mod store;
pub mod trouble;
pub mod wiring;
pub mod world;

#[cfg(test)]
mod tests;
