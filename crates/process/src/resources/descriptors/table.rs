//! The saved table: which numbers refer to which open file descriptions.

use super::Description;
use super::context::About;
use super::locks::LockState;
use super::pipe::PipeState;
use crate::ProcessError;
use outlive_state_tree::StateNode;
use std::collections::HashSet;

/// The largest descriptor number that a kernel can be told to allow.
const LARGEST: u32 = 1 << 30;

/// One open file description with the numbers that refer to it.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,open-description-v1")]
pub struct OpenDescription {
    /// Its descriptor numbers, at least one.
    pub numbers: Vec<u32>,
    /// Those of the numbers that are closed by exec.
    pub cloexec: Vec<u32>,
    /// Access mode and status flags (`O_…` of x86-64 Linux).
    pub flags: u32,
    /// Advisory locks that were taken through it.
    #[state(children)]
    pub locks: Vec<LockState>,
    /// What it is.
    #[state(child)]
    pub object: Description,
}

/// All descriptors of a process.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-table-v1")]
pub struct FdTable {
    /// The open file descriptions.
    #[state(children)]
    pub descriptions: Vec<OpenDescription>,
    /// The pipes whose ends are among them.
    #[state(children)]
    pub pipes: Vec<PipeState>,
}

impl FdTable {
    /// Whether numbers and references make sense. Everything else is checked kind by kind.
    ///
    /// # Errors
    /// [`ProcessError::Image`] says what does not.
    pub fn validate(&self) -> Result<(), ProcessError> {
        let bad = |what: String| Err(ProcessError::Image(what));
        let mut seen = HashSet::new();
        for (index, description) in self.descriptions.iter().enumerate() {
            if description.numbers.is_empty() {
                return bad(format!("open description {index} has no number"));
            }
            for &number in &description.numbers {
                if number >= LARGEST {
                    return bad(format!("no descriptor can have the number {number}"));
                }
                if !seen.insert(number) {
                    return bad(format!("fd {number} refers to two open descriptions"));
                }
            }
            if let Some(n) = description
                .cloexec
                .iter()
                .find(|n| !description.numbers.contains(n))
            {
                return bad(format!("fd {n} is closed by exec but not open"));
            }
        }
        for pipe in &self.pipes {
            pipe.validate()?;
        }
        Ok(())
    }

    /// The descriptions with what names each of them; for a table that is valid.
    pub(crate) fn each(&self) -> impl Iterator<Item = (About, &OpenDescription)> {
        self.descriptions
            .iter()
            .enumerate()
            .map(|(index, description)| {
                let number = description.numbers.first().copied().unwrap_or(0);
                (
                    About {
                        index,
                        number,
                        flags: description.flags,
                    },
                    description,
                )
            })
    }

    /// The description which a number refers to.
    #[must_use]
    pub fn find(&self, number: u32) -> Option<&OpenDescription> {
        self.descriptions
            .iter()
            .find(|d| d.numbers.contains(&number))
    }
}
