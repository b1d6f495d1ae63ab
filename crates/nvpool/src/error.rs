//! What can go wrong with a pool.

use crate::refused::Refused;
use outlive_media::MediumError;

/// An error of a pool.
///
/// # Who is to blame
/// The caller: `Refused`, `NoPool`. The medium: `Medium`, `Damaged`, `Tables`, `Unknown`. The owner's file: `File`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not granted; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The medium answered with an error.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// There is no pool.
    #[error("{place} has no pool: {what}")]
    NoPool {
        /// Which medium.
        place: String,
        /// Why not.
        what: &'static str,
    },
    /// What holds the pool together is damaged beyond repair. Nothing was changed.
    #[error("the pool on {place} is damaged beyond repair: {what}")]
    Damaged {
        /// Which medium.
        place: String,
        /// What is damaged.
        what: String,
    },
    /// The heap that holds the tables refused something.
    #[error("the tables of the pool: {0}")]
    Tables(resilient_heap::Error),
    /// An earlier change or flush failed: nobody knows which of them count. Nothing was changed since.
    #[error(
        "the pool on {place}: an earlier change or flush failed, and what is durable is not known: open the pool again"
    )]
    Unknown {
        /// Which medium.
        place: String,
    },
    /// An owner's file is not what the pool left there. Nothing was changed.
    #[error("{place}: {what}")]
    File {
        /// Which file.
        place: String,
        /// What is wrong with it.
        what: String,
    },
}
