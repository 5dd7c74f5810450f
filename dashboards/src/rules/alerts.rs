//! The alerts. Names, thresholds and proofs stand together; what to do about each is in `docs/operations.md`.

mod copies;
mod output;
mod parties;

use super::Alert;

/// All of them, the worst first within each group.
#[must_use]
pub fn all() -> Vec<Alert> {
    [copies::alerts(), output::alerts(), parties::alerts()].into_iter().flatten().collect()
}
