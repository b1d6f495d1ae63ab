//! Damage: what was read is not what was written.

use outlive_epoch::{EpochId, Run, StoreError};
use outlive_media::MediumError;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Which part of an image is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// One of the two superblocks, or both.
    Superblock,
    /// A commit record.
    CommitRecord,
    /// The record that ends an epoch.
    Trailer,
    /// The list of the groups of an epoch.
    Groups,
    /// The state tree of this group.
    Tree(String),
    /// The page index of an epoch.
    Index,
    /// These pages.
    Pages(Run),
    /// A block with pages; which ones is not known without the key.
    Block,
    /// A parity block of an epoch.
    Parity,
    /// A part of an epoch that holds nothing.
    Padding,
    /// The end of the file.
    End,
}

/// What becomes of damaged bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Another copy or the parity makes up for them: readers do not notice.
    Repairable,
    /// They were written again.
    Repaired,
    /// They are lost, but nobody needs them: the same epoch holds newer ones.
    Unneeded,
    /// They are lost.
    Lost,
}

impl Outcome {
    /// One word for machines.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Repairable => "repairable",
            Self::Repaired => "repaired",
            Self::Unneeded => "unneeded",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock => write!(f, "superblock"),
            Self::CommitRecord => write!(f, "commit record"),
            Self::Trailer => write!(f, "trailer"),
            Self::Groups => write!(f, "list of groups"),
            Self::Tree(group) => write!(f, "state tree of group {group}"),
            Self::Index => write!(f, "page index"),
            Self::Pages(run) => {
                let (space, address, pages) = (run.space().0, run.address(), run.count());
                write!(
                    f,
                    "{pages} page(s) of space {space} at address {address:#x}"
                )
            }
            Self::Block => write!(f, "a block of encrypted pages"),
            Self::Parity => write!(f, "parity"),
            Self::Padding => write!(f, "padding"),
            Self::End => write!(f, "end of the file"),
        }
    }
}

/// One damaged place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub file: String,
    /// The offset in it, in bytes.
    pub offset: u64,
    /// The epoch that stored what is damaged, where it is known.
    pub epoch: Option<EpochId>,
    /// What is damaged.
    pub part: Part,
    /// In which way.
    pub what: String,
    /// What becomes of it.
    pub outcome: Outcome,
}

impl Damage {
    /// The same, with another outcome.
    pub(crate) fn with(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }
}

/// Damage that readers met and that was made up for; shared by all who read a file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Met(Arc<Mutex<Vec<Damage>>>);

/// Damages that are kept.
const KEPT: usize = 1000;

impl Met {
    pub fn note(&self, damage: Damage) {
        let mut met = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if met.len() < KEPT && !met.contains(&damage) {
            met.push(damage);
        }
    }

    pub fn all(&self) -> Vec<Damage> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.part)?;
        if let Some(epoch) = self.epoch {
            write!(f, " of epoch {epoch}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// Why something could not be read.
#[derive(Debug)]
pub(crate) enum Trouble {
    Damage(Box<Damage>),
    Store(StoreError),
}

impl From<Damage> for Trouble {
    fn from(damage: Damage) -> Self {
        Self::Damage(Box::new(damage))
    }
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Trouble> for StoreError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Damage(damage) => Self::Damaged {
                place: format!("{} at offset {}", damage.file, damage.offset),
                what: damage.to_string(),
            },
            Trouble::Store(error) => error,
        }
    }
}

/// Says in the words of the seam what happened to a medium.
pub(crate) fn medium(error: MediumError) -> StoreError {
    match error {
        MediumError::Io {
            place,
            op,
            offset,
            source,
        } => StoreError::Medium {
            place: format!("{place}: {op} at offset {offset}"),
            source,
        },
        MediumError::Full { place, needed } => StoreError::Full { place, needed },
        MediumError::Busy { place, holder } => StoreError::Busy { place, holder },
        MediumError::Short { place, end } => StoreError::Damaged {
            place,
            what: format!("the file ends before offset {end}"),
        },
        MediumError::NoVolume { place, what } => {
            StoreError::Misuse(format!("{place} is no volume of Outlive's: {what}"))
        }
        MediumError::Misuse { place, what } => StoreError::Misuse(format!("{place}: {what}")),
    }
}
