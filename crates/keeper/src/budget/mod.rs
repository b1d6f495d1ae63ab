//! The hold-up budget: what is not on the medium yet must fit into the time that is left when the
//! mains fails.
//!
//! - [`model`]: how long an event takes, from what was measured (pure).
//! - [`pacing`]: when the next epoch must be taken, and whether the program is held meanwhile; what
//!   is counted as a violation (pure).
//! - [`keeping`]: what a keeper knows of its budget (pure).
//! - [`calibration`]: measuring the medium, and where the figures are kept.
//! - [`strict`]: the bound that is handed to synchronous write protection (pure).
//! - [`wear`]: bytes written a day, and their cap (pure).
//!
//! Two modes. *Predicted*: pages are found after they were written; the budget holds as long as the
//! program goes on as it did, and each time that it did not is counted. *Strict*: writes are
//! protected before they happen, so that what is not durable is known and bounded; what comes up beyond
//! the bound, because nobody could hold it, is a violation when it is seen.

pub mod calibration;
pub mod keeping;
pub mod model;
pub mod pacing;
#[cfg(test)]
mod scale;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod simulation_tests;
pub mod strict;
pub mod wear;
