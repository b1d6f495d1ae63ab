//! Media: where bytes survive.
//!
//! A [`Medium`] is a growing array of bytes that keeps what was flushed through a power cut; a
//! [`Directory`] is a set of named media. [`FileMedium`] and [`FileDirectory`] keep them in files;
//! [`BlockMedium`] is a whole block device, [`MemoryMedium`] memory of the kernel's,
//! [`DaxMedium`] a mapping of memory that keeps its bytes;
//! a [`Volume`] keeps them inside one medium that has no names. [`SimDisk`] keeps them in memory and loses, tears or trashes what was not flushed, as a test
//! chooses. [`LineMemory`] simulates memory that keeps its bytes, behind caches that do not.
//!
//! # Rules
//! - A write is durable only after a later [`Medium::flush`] returned `Ok`. Until then any subset
//!   of the sectors of any subset of the unflushed writes may reach the medium, in any order, and
//!   a sector that was being written may hold anything.
//! - A write may be carried out later: its error is reported by this write, a later one, or at
//!   the latest by the next flush, which clears it. A flush that failed promises nothing about
//!   any write since the last good flush.
//! - Reads see all earlier writes of the same handle.
//! - A name is durable only after [`Directory::sync`].
//! - Offsets and lengths of writes are multiples of [`BLOCK`].

mod block;
mod buffer;
mod dax;
mod directory;
mod file;
mod lines;
mod lock;
mod memory;
mod sim;
mod volume;

pub use block::{BlockMedium, is_block_device};
pub use buffer::Buffer;
pub use dax::DaxMedium;
pub use directory::FileDirectory;
pub use file::FileMedium;
pub use lines::{Crashes, LINE, LineMemory};
pub use memory::MemoryMedium;
pub use sim::{Cut, Fate, Fault, Lie, Op, Pending, SimDirectory, SimDisk, SimMedium, power_off};
pub use volume::{Volume, is_blank};

use std::io;
use std::sync::Arc;

/// The unit of writes, in bytes.
pub const BLOCK: usize = 4096;

/// The unit that a medium is trusted to write whole or not at all, in bytes. Nothing here relies
/// on a larger one.
pub const SECTOR: usize = 512;

/// The size of one large transfer, in bytes.
pub const TRANSFER: usize = 4 << 20;

/// What a medium offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes that can be read, from offset 0. May contain space that was only preallocated.
    pub len: u64,
    /// The unit of writes, in bytes.
    pub block: u32,
}

/// Whether a medium is opened to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reads; others may write at the same time.
    Read,
    /// Reads and writes; nobody else writes at the same time.
    Write,
}

/// Where bytes survive. See the crate's rules for what a write and a flush promise.
pub trait Medium: Send + Sync {
    /// How this medium is called in messages.
    fn place(&self) -> String;

    /// The present size.
    fn geometry(&self) -> Result<Geometry, MediumError>;

    /// Fills `into` from `offset` on. Reading beyond the end is [`MediumError::Short`].
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError>;

    /// Writes `bytes` at `offset`; the medium grows as needed. Both are multiples of [`BLOCK`].
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError>;

    /// Makes all earlier writes durable.
    fn flush(&self) -> Result<(), MediumError>;

    /// Takes space for the first `len` bytes ahead of their being written.
    fn reserve(&self, len: u64) -> Result<(), MediumError>;

    /// Cuts the medium to `len` bytes, giving back what lies behind. Durable after a flush.
    fn truncate(&self, len: u64) -> Result<(), MediumError>;
}

/// A set of named media.
pub trait Directory: Send + Sync {
    /// How this directory is called in messages.
    fn place(&self) -> String;

    /// All names in it, in no order.
    fn list(&self) -> Result<Vec<String>, MediumError>;

    /// Makes a new, empty medium, readable by its owner only; fails where the name is taken.
    fn create(&self, name: &str) -> Result<Arc<dyn Medium>, MediumError>;

    /// Opens a medium.
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError>;

    /// Gives a medium another name, atomically, replacing what had that name.
    fn rename(&self, from: &str, to: &str) -> Result<(), MediumError>;

    /// Removes a medium. Handles that are open stay usable.
    fn remove(&self, name: &str) -> Result<(), MediumError>;

    /// Makes all earlier creations, renames and removals durable.
    fn sync(&self) -> Result<(), MediumError>;

    /// Bytes that media here can still be given; `None` where nobody tells.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

/// What can go wrong with a medium.
#[derive(Debug, thiserror::Error)]
pub enum MediumError {
    /// The operating system answered with an error.
    #[error("{place}: {op} at offset {offset}: {source}")]
    Io {
        /// Which medium.
        place: String,
        /// What was tried.
        op: &'static str,
        /// At which byte; 0 where the operation has no offset.
        offset: u64,
        /// The answer.
        source: io::Error,
    },
    /// There is no space left.
    #[error("{place}: no space left for {needed} bytes")]
    Full {
        /// Which medium.
        place: String,
        /// Bytes that could not be placed.
        needed: u64,
    },
    /// Somebody else has it open for writing.
    #[error("{place} is in use by {holder}")]
    Busy {
        /// Which medium.
        place: String,
        /// Who, as far as is known.
        holder: String,
    },
    /// The read goes beyond the end.
    #[error("{place} ends before offset {end}")]
    Short {
        /// Which medium.
        place: String,
        /// One past the last byte that was wanted.
        end: u64,
    },
    /// What is to hold named media holds something else, or nothing.
    #[error("{place} is no volume of Outlive's: {what}")]
    NoVolume {
        /// Which medium.
        place: String,
        /// What is there instead.
        what: &'static str,
    },
    /// The caller broke a rule of this crate (an unaligned write, a write to a read-only handle).
    #[error("{place}: {what}")]
    Misuse {
        /// Which medium.
        place: String,
        /// Which rule.
        what: &'static str,
    },
}

impl MediumError {
    /// Wraps an error of the operating system, telling apart a full medium.
    pub(crate) fn io(
        place: impl Into<String>,
        op: &'static str,
        offset: u64,
        needed: u64,
        source: impl Into<io::Error>,
    ) -> Self {
        let (place, source) = (place.into(), source.into());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { place, needed }
            }
            _ => Self::Io {
                place,
                op,
                offset,
                source,
            },
        }
    }

    /// Whether this says that a name does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Refuses a write that is not made of whole blocks.
pub(crate) fn check_blocks(place: &str, offset: u64, len: usize) -> Result<(), MediumError> {
    if offset.is_multiple_of(BLOCK as u64) && len.is_multiple_of(BLOCK) {
        return Ok(());
    }
    let what = "a write must start at, and consist of, whole blocks of 4096 bytes";
    Err(MediumError::Misuse {
        place: place.to_owned(),
        what,
    })
}
