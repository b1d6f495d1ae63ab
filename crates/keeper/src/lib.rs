//! Policy and sequencing: what to capture when, and in which order.
//!
//! - [`budget`]: the hold-up budget (its policy is pure).
//! - [`plan`]: when the next epoch is due (pure).
//! - [`epoch`]: the order of one epoch.
//! - [`scrub`]: when what is stored is checked again (pure).
//! - [`retention`]: which epochs stay (pure); [`upkeep`]: keeping the store short.
//! - [`keep`]: the loop that keeps one subject.
//! - [`power`]: what is heard meanwhile, and power events.
//! - [`companion`]: the process that a keeper goes along with.
//! - [`control`]: the conversation with a running keeper.
//! - [`subject`]: the store root, names, and what is known of a subject besides its epochs.
//! - [`arrival`]: subjects that come from elsewhere.
//! - [`places`]: what a subject has elsewhere.
//! - [`ownership`]: whose image it is.
//! - [`table`]: what keepers counted, in a heap that outlives them.
//! - [`stats`], [`procfs`]: figures and facts.
//!
//! Capture and restore themselves, and the layout of epochs on a medium, are other crates'
//! business.

pub mod arrival;
pub mod budget;
pub mod companion;
pub mod control;
pub mod epoch;
mod error;
#[cfg(test)]
mod fake;
pub mod images;
pub mod keep;
pub mod keys;
pub mod ownership;
pub mod places;
pub mod plan;
pub mod power;
pub mod procfs;
pub mod retention;
pub mod scrub;
pub mod stats;
pub mod subject;
pub mod table;
pub mod upkeep;

pub use error::KeeperError;
