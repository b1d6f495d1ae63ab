//! The saved table: which numbers of which processes refer to which open file descriptions.

use super::context::About;
use super::locks::LockState;
use super::owner::OwnerState;
use super::pipe::PipeState;
use super::{Description, pty, tcp_pair, unix_pair};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use std::collections::HashSet;

/// The largest descriptor number that a kernel can be told to allow.
const LARGEST: u32 = 1 << 30;

/// A descriptor of one process that refers to an open file description.
#[derive(StateNode, Debug, Clone, Copy, PartialEq, Eq)]
#[state(compatible = "outlive,descriptor-v1")]
pub struct Holder {
    /// The process' ID, as it is restored.
    pub process: u32,
    /// The number there.
    pub number: u32,
    /// Whether exec closes it (`FD_CLOEXEC`).
    pub close_on_exec: bool,
}

/// One open file description with the descriptors that refer to it.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,open-description-v1")]
pub struct OpenDescription {
    /// Who holds it, at least one; the first names it in messages.
    #[state(children)]
    pub holders: Vec<Holder>,
    /// Access mode and status flags (`O_…` of x86-64 Linux).
    pub flags: u32,
    /// Who gets its signals, where that was ever set.
    #[state(child)]
    pub owner: Option<OwnerState>,
    /// Advisory locks that were taken through it.
    #[state(children)]
    pub locks: Vec<LockState>,
    /// What it is.
    #[state(child)]
    pub object: Description,
}

impl OpenDescription {
    /// The number under which a process holds it.
    #[must_use]
    pub fn number_in(&self, process: u32) -> Option<u32> {
        let holder = self.holders.iter().find(|h| h.process == process);
        holder.map(|h| h.number)
    }
}

/// All descriptors of a subject.
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
    /// Names processes and threads otherwise: by the IDs under which they are saved.
    pub fn rename(&mut self, name: &dyn Fn(u32) -> u32) {
        for description in &mut self.descriptions {
            for holder in &mut description.holders {
                holder.process = name(holder.process);
            }
            for lock in &mut description.locks {
                lock.process = lock.process.map(name);
                if lock.taken_by != 0 {
                    lock.taken_by = name(lock.taken_by);
                }
            }
            if let Some(owner) = &mut description.owner {
                owner.id = name(owner.id);
            }
            description.object.rename(name);
        }
    }

    /// The paths of all regular files among them.
    pub(crate) fn paths(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.descriptions.iter().filter_map(|d| match &d.object {
            Description::File(file) => Some(file.path.clone()),
            _ => None,
        })
    }

    /// Whether numbers and references make sense. Everything else is checked kind by kind.
    ///
    /// # Errors
    /// [`ProcessError::Image`] says what does not.
    pub fn validate(&self) -> Result<(), ProcessError> {
        let bad = |what: String| Err(ProcessError::Image(what));
        let mut seen = HashSet::new();
        for (index, description) in self.descriptions.iter().enumerate() {
            if description.holders.is_empty() {
                return bad(format!("nobody holds open description {index}"));
            }
            for holder in &description.holders {
                let (process, number) = (holder.process, holder.number);
                if number >= LARGEST {
                    return bad(format!("no descriptor can have the number {number}"));
                }
                if process == 0 || i32::try_from(process).is_err() {
                    return bad(format!("no process can have the ID {process}"));
                }
                if !seen.insert((process, number)) {
                    return bad(format!(
                        "fd {number} of pid {process} refers to two open descriptions"
                    ));
                }
            }
        }
        for pipe in &self.pipes {
            pipe.validate()?;
        }
        pty::validate(self)?;
        tcp_pair::validate(self)?;
        unix_pair::validate(self)
    }

    /// The descriptions with what names each of them; for a table that is valid.
    pub(crate) fn each(&self) -> impl Iterator<Item = (About, &OpenDescription)> {
        self.descriptions
            .iter()
            .enumerate()
            .map(|(index, description)| {
                let first = description.holders.first();
                (
                    About {
                        index,
                        process: first.map_or(0, |holder| holder.process),
                        number: first.map_or(0, |holder| holder.number),
                        flags: description.flags,
                    },
                    description,
                )
            })
    }

    /// The description which a number of a process refers to.
    #[must_use]
    pub fn find(&self, process: u32, number: u32) -> Option<&OpenDescription> {
        let is = |h: &Holder| (h.process, h.number) == (process, number);
        self.descriptions.iter().find(|d| d.holders.iter().any(is))
    }
}
