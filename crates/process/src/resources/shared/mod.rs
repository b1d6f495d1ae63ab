//! Memory that several processes may share, one file a sort, listed in one registry ([`Origin`]).
//!
//! - Anonymous shared memory (`MAP_SHARED | MAP_ANONYMOUS`) is a file of the kernel's own that has
//!   no name. It is made again as a memfd, which differs only in the name that `maps` shows.
//! - System V segments ([`segment`]).
//! - Memory files and deleted files ([`nameless`]), whether they are mapped, open, or both.
//! - Files that are mapped shared and writable. A mapped file is used as memory: stores to it
//!   happen all the time and leave no trace but its contents. So these are kept in the epoch, up to
//!   [`MAX_FILE`], and put back at a restore ([`contents`]), whatever has become of the file since;
//!   it is made again where it is gone.
//! - Files that are open for writing ([`written`]), up to a length that is asked for.
//!
//! # Rules
//! - One object is saved once and made once, by however many mappings and descriptors of whichever
//!   processes it is reached: what is written through one of them is seen through all the others.
//! - An object is read through a descriptor of our own, opened by way of `/proc`.
//!
//! # What is not known
//! Whether a process outside the subject has mapped it too. If so, they share it no more after a
//! restore.

mod contents;
mod nameless;
mod objects;
mod segment;
mod written;

pub use contents::FileContents;
pub use nameless::{DeletedState, MemfdState};
pub use objects::SharedObjects;
pub use segment::SegmentState;
pub use written::WrittenFileState;

use crate::{ProcessError, Refusal};
use outlive_linux::maps::{Mapping, VmFlags};
use outlive_state_tree::StateNode;
use rustix::fs::{MemfdFlags, OFlags, ftruncate, memfd_create};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

/// The name of the memfds that stand for anonymous shared memory in a restored program.
const NAME: &str = "outlive-shared";
/// Spaces of shared memory have this bit, those of processes have not.
const SHARED_SPACE: u32 = 1 << 31;
/// The largest file whose contents are kept, bytes. A larger one that has a name must not have
/// changed; one without is refused.
pub const MAX_FILE: u64 = 256 << 20;

/// All shared memory of a subject.
#[derive(StateNode, Clone, Debug, Default, PartialEq, Eq)]
#[state(compatible = "outlive,shared-memory-v1")]
pub struct SharedState {
    /// The memories.
    #[state(children)]
    pub memories: Vec<SharedMemory>,
}

/// One memory that several processes may share.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,shared-contents-v1")]
pub struct SharedMemory {
    /// The space of its pages, by which areas and descriptors refer to it.
    pub space: u32,
    /// Its length, bytes.
    pub size: u64,
    /// What it is.
    #[state(child)]
    pub origin: Origin,
}

/// What a shared memory is.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Memory without a name.
    Anonymous(AnonymousState),
    /// A file with a name that is mapped.
    MappedFile(MappedFileState),
    /// A file with a name that is open only.
    WrittenFile(WrittenFileState),
    /// A memory file.
    Memfd(MemfdState),
    /// A file whose name is gone.
    Deleted(DeletedState),
    /// A System V segment.
    Segment(SegmentState),
}

/// Anonymous shared memory.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,shared-anonymous-v1")]
pub struct AnonymousState {}

/// A file that is described with the mappings.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,shared-mapped-file-v1")]
pub struct MappedFileState {}

/// The sorts, told by the name that the kernel shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sort {
    /// [`Origin::Anonymous`].
    Anonymous,
    /// [`Origin::MappedFile`], [`Origin::WrittenFile`].
    Named,
    /// [`Origin::Memfd`].
    Memfd,
    /// [`Origin::Deleted`].
    Deleted,
    /// [`Origin::Segment`].
    Segment,
}

impl Sort {
    /// What lies below a mapping or a descriptor; `None` for what is no shared memory, a file with
    /// a name among it.
    #[must_use]
    pub fn of_name(name: &[u8]) -> Option<Self> {
        let known = |prefix: &[u8]| name.starts_with(prefix);
        if name == b"/dev/zero (deleted)" || name == format!("/memfd:{NAME} (deleted)").as_bytes() {
            Some(Self::Anonymous)
        } else if !known(b"/") || !name.ends_with(nameless::DELETED) {
            None
        } else if known(b"/SYSV") {
            Some(Self::Segment)
        } else if known(nameless::MEMFD) {
            Some(Self::Memfd)
        } else if ["/[aio]", "/anon_hugepage", "/secretmem"]
            .iter()
            .any(|start| known(start.as_bytes()))
        {
            None
        } else {
            Some(Self::Deleted)
        }
    }

    /// What lies below a mapping. Private mappings show what lies below until they are written.
    #[must_use]
    pub fn of(m: &Mapping) -> Option<Self> {
        match Self::of_name(&m.name) {
            Some(Self::Anonymous | Self::Segment) if !m.shared => None,
            sort => sort,
        }
    }
}

/// A shared memory that was made again, empty at first.
#[derive(Debug)]
pub struct Memory {
    /// Opened for reading and writing.
    pub file: File,
    /// Opened for reading.
    pub reading: File,
    /// Its length, bytes.
    pub size: u64,
    /// What its seals will say of writing.
    pub writing: Writing,
}

/// What the seals of a memory say of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writing {
    /// Nothing.
    Free,
    /// Only through mappings that were made before.
    OldMappings,
    /// Not at all.
    Forbidden,
}

impl Memory {
    /// What a mapping with these flags is made of.
    #[must_use]
    pub fn mapped(&self, flags: VmFlags) -> &File {
        if flags.has(VmFlags::SHARED) {
            &self.file
        } else {
            &self.reading
        }
    }

    /// Whether a mapping with these flags can only be made once the memory is sealed.
    #[must_use]
    pub fn is_mapped_last(&self, flags: VmFlags) -> bool {
        match self.writing {
            Writing::Free => false,
            Writing::OldMappings => !flags.has(VmFlags::MAY_WRITE),
            Writing::Forbidden => true,
        }
    }
}

/// Shared memories by their spaces.
pub type Memories = HashMap<u32, Memory>;

/// Makes the memories again, empty, but for System V segments, which members make. An image is hostile: spaces are unique, and never those of
/// processes. `refuse` makes the refusal of what cannot be made here.
pub fn recreate(
    state: &SharedState,
    refuse: &dyn Fn(String, &str) -> Refusal,
) -> Result<Memories, ProcessError> {
    let mut made = Memories::new();
    let mut refusals = Vec::new();
    for memory in &state.memories {
        let twice = made.contains_key(&memory.space);
        if memory.space & SHARED_SPACE == 0 || twice || memory.size > i64::MAX as u64 {
            return Err(ProcessError::Image(format!(
                "shared memory {:x} makes no sense",
                memory.space
            )));
        }
        let file = match &memory.origin {
            Origin::MappedFile(_) | Origin::WrittenFile(_) | Origin::Segment(_) => continue,
            Origin::Anonymous(_) => memfd_create(NAME, MemfdFlags::CLOEXEC)
                .map_err(|e| failed("making shared memory", e))?,
            Origin::Memfd(memfd) => memfd.recreate()?,
            Origin::Deleted(deleted) => match deleted.recreate() {
                Ok(file) => file,
                Err(e) => {
                    let what = format!("{} cannot be made again: {e}", deleted.shown());
                    let remedy = "have its directory back, writable and with enough space";
                    refusals.push(refuse(what, remedy));
                    continue;
                }
            },
        };
        ftruncate(&file, memory.size).map_err(|e| failed("sizing shared memory", e))?;
        let writing = match &memory.origin {
            Origin::Memfd(memfd) => memfd.writing(),
            _ => Writing::Free,
        };
        let reading = reopen(&file, OFlags::RDONLY).map_err(|e| failed("opening memory", e))?;
        let memory_made = Memory {
            file: File::from(file),
            reading: File::from(reading),
            size: memory.size,
            writing,
        };
        made.insert(memory.space, memory_made);
    }
    if refusals.is_empty() {
        Ok(made)
    } else {
        Err(ProcessError::Refused(refusals))
    }
}

/// Seals what was sealed, once contents and descriptors are there.
pub fn seal(state: &SharedState, made: &Memories) -> Result<(), ProcessError> {
    for memory in &state.memories {
        if let (Origin::Memfd(memfd), Some(made)) = (&memory.origin, made.get(&memory.space)) {
            memfd.seal(&made.file)?;
        }
    }
    Ok(())
}

/// Opens a file anew, with an open file description of its own.
pub fn reopen(file: &impl AsRawFd, flags: OFlags) -> Result<OwnedFd, rustix::io::Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, rustix::fs::Mode::empty())
}

fn failed(what: &str, e: impl Into<std::io::Error>) -> ProcessError {
    ProcessError::Kernel {
        pid: 0,
        what: what.into(),
        source: e.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_are_told_by_the_name() {
        for (name, sort) in [
            (&b"/dev/zero (deleted)"[..], Some(Sort::Anonymous)),
            (b"/memfd:outlive-shared (deleted)", Some(Sort::Anonymous)),
            (b"/memfd:x (deleted)", Some(Sort::Memfd)),
            (b"/dev/shm/x (deleted)", Some(Sort::Deleted)),
            (b"/dev/shm/x", None),
            (b"/[aio] (deleted)", None),
            (b"/SYSV00000000 (deleted)", Some(Sort::Segment)),
            (b"[heap]", None),
            (b"", None),
        ] {
            assert_eq!(Sort::of_name(name), sort, "{}", name.escape_ascii());
        }
    }

    #[test]
    fn hostile_spaces_are_refused() {
        let one = |space, size| SharedMemory {
            space,
            size,
            origin: Origin::Anonymous(AnonymousState {}),
        };
        let refuse = |_, _: &str| panic!("not a refusal");
        for memories in [
            vec![one(1, 4096)],
            vec![one(SHARED_SPACE, 1), one(SHARED_SPACE, 2)],
            vec![one(SHARED_SPACE, u64::MAX)],
        ] {
            assert!(recreate(&SharedState { memories }, &refuse).is_err());
        }
    }
}
