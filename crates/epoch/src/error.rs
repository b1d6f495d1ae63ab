//! What can go wrong between a subject and its store, and who is to blame.

use std::io;

/// A failure of the store or of its medium.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The medium answered with an error.
    #[error("{place}: {source}")]
    Medium {
        /// The path and, where it helps, the offset and the operation.
        place: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The medium is full. Earlier epochs are kept; the subject is unharmed.
    #[error(
        "{place}: no space left for {needed} bytes; earlier epochs are kept. Free space or choose another --store"
    )]
    Full {
        /// The path.
        place: String,
        /// Bytes that could not be placed.
        needed: u64,
    },
    /// What was read is not what was written.
    #[error("{place} is damaged: {what}")]
    Damaged {
        /// The path and the offset of the damage.
        place: String,
        /// What is wrong there, and what it held.
        what: String,
    },
    /// The image was written by a newer version.
    #[error(
        "{place} has format version {found}; this version of outlive reads up to {supported}: use a newer outlive"
    )]
    Newer {
        /// The path.
        place: String,
        /// The version found.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// It is encrypted and the key is missing or another one; or a key was given, and nothing is encrypted with it.
    #[error("{place} {what}")]
    Locked {
        /// The path.
        place: String,
        /// What is missing or does not fit; keys by their fingerprints.
        what: String,
    },
    /// There is no image here, or it holds no committed epoch, or not the one asked for.
    #[error("{place}: {what}")]
    Missing {
        /// The path.
        place: String,
        /// What was looked for.
        what: String,
    },
    /// Somebody else is writing to this store.
    #[error("{place} is in use by {holder}")]
    Busy {
        /// The path.
        place: String,
        /// Who holds it, as far as is known.
        holder: String,
    },
    /// The caller broke a rule of the seam (a group written twice, a length that does not fit).
    #[error("misuse of the epoch store: {0}")]
    Misuse(String),
}
