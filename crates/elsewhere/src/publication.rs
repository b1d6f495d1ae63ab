//! Which epochs of a subject are on a shelf, and which came after which.
//!
//! ```text
//! chunks/HH/HASH                          pages and trees, by the BLAKE3 hash of their bytes
//! subjects/NAME/EPOCH.HASH.BEFORE         an epoch: the description with this hash, which was
//!                                         pushed after the one with the hash BEFORE (zeros: none)
//! ```
//!
//! # Rules
//! - An epoch is there when its description is; that is written last, and in one step.
//! - A *head* is an epoch after which none was pushed. Several of them say that hosts went different
//!   ways: nothing of either is lost, and nobody chooses for the user.

use crate::manifest::Hash;
use crate::shelf::Shelf;
use outlive_epoch::StoreError;
use std::fmt;

/// Why something could not be pushed or pulled.
#[derive(Debug)]
pub enum Error {
    /// The store, or the shelf, failed.
    Store(StoreError),
    /// It is not granted; the text names the remedy.
    Refused(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::Refused(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// An epoch on a shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publication {
    /// Its number.
    pub epoch: u64,
    /// The hash of its description.
    pub hash: Hash,
    /// The one after which it was pushed.
    pub before: Option<Hash>,
}

impl Publication {
    /// What it is called among those of its subject.
    pub(crate) fn name(&self) -> String {
        let Self {
            epoch,
            hash,
            before,
        } = self;
        format!("{epoch:020}.{hash}.{}", before.unwrap_or_default())
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let (epoch, hash) = (parts.next()?.parse().ok()?, Hash::parse(parts.next()?)?);
        let before = Hash::parse(parts.next()?)?;
        let publication = Self {
            epoch,
            hash,
            before: Some(before).filter(|before| *before != Hash::default()),
        };
        (publication.name() == name).then_some(publication)
    }
}

pub(crate) fn place_of(subject: &str) -> String {
    format!("subjects/{subject}")
}

pub(crate) fn chunk_name(hash: Hash) -> String {
    let text = hash.to_string();
    format!("chunks/{}/{text}", &text[..2])
}

/// All epochs of a subject on a shelf, oldest first; what is there besides is none of ours.
///
/// # Errors
/// What the shelf says.
pub fn published(shelf: &dyn Shelf, subject: &str) -> Result<Vec<Publication>, StoreError> {
    let names = shelf.list(&place_of(subject))?;
    let parsed = names.iter().filter_map(|name| Publication::parse(name));
    let mut all: Vec<Publication> = parsed.collect();
    all.sort_by_key(|one| (one.epoch, one.hash));
    Ok(all)
}

/// Those after which none was pushed.
pub(crate) fn heads(all: &[Publication]) -> Vec<Publication> {
    let is_head = |one: &&Publication| all.iter().all(|other| other.before != Some(one.hash));
    all.iter().filter(is_head).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_others_are_none() {
        let one = Publication {
            epoch: 7,
            hash: Hash::of(b"a"),
            before: Some(Hash::of(b"b")),
        };
        let first = Publication {
            before: None,
            ..one
        };
        for publication in [one, first] {
            assert_eq!(Publication::parse(&publication.name()), Some(publication));
        }
        let name = one.name();
        for bad in [
            "",
            "7",
            &name[1..],
            &format!("{name}.x"),
            &format!("+{}", &name[1..]),
            &name.to_uppercase(),
        ] {
            assert_eq!(Publication::parse(bad), None, "{bad}");
        }
        assert_eq!(
            heads(&[one, first]),
            [one, first],
            "neither knows the other"
        );
        let next = Publication {
            epoch: 8,
            hash: Hash::of(b"c"),
            before: Some(one.hash),
        };
        assert_eq!(heads(&[one, next]), [next]);
    }
}
