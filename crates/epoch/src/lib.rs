//! The seams of Outlive: value types and traits that the floors above and below agree on.
//!
//! An *epoch* is one consistent, committed snapshot of a subject: a set of state trees (one root
//! and one per group of resources) and the contents of pages. Capture (`process`, later `vm` and
//! the heap) writes an epoch through [`EpochWriter`]; restore reads it through [`EpochReader`].
//! Neither knows how a store lays bytes out, and the store knows nothing of processes.
//!
//! # Rules
//! - Everything here is pure: no system call, no allocation policy, no clock.
//! - What an [`EpochReader`] hands out has passed its checksum, but is still *hostile*: the bytes
//!   of a tree must be parsed by a reader that trusts nothing.
//! - Later writes to a page win over earlier ones inside one epoch (pages staged while the program
//!   runs are superseded by those taken at the stop), and over all earlier epochs.

mod error;
mod page;

pub use error::StoreError;
pub use page::{PAGE_SIZE, Run, SpaceId};

use std::fmt;

/// Names one committed epoch of a subject; the first is 1 and each commit adds one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpochId(pub u64);

impl fmt::Display for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The receipt of a commit: the epoch survives a power cut from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    /// Which epoch was committed.
    pub epoch: EpochId,
    /// Bytes that this epoch wrote to the medium, with its index and commit record.
    pub bytes_written: u64,
    /// Pages whose contents this epoch stored (zero and absent pages not counted).
    pub pages: u64,
    /// Bytes that packing these pages saved.
    pub saved_bytes: u64,
}

/// Facts about an epoch that listings show without parsing its trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct EpochFacts {
    /// When the subject was stopped, nanoseconds since the Unix epoch (CLOCK_REALTIME).
    pub taken_at_ns: u64,
    /// From the first thread frozen to the last one resumed, microseconds; 0 where not known.
    pub stop_us: u64,
}

/// Takes the contents of pages.
pub trait PageSink {
    /// Stores `run.count` pages; `bytes.len()` is `run.count * PAGE_SIZE`.
    ///
    /// Pages that are all zero may be handed over as they are: the sink finds them and stores no
    /// bytes for them.
    fn put(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError>;

    /// States that these pages hold no contents of their own any more: they read as what lies
    /// below the mapping (zeros, or the file of a private file mapping).
    fn absent(&mut self, run: Run) -> Result<(), StoreError>;
}

/// Writes one epoch. Dropping a writer without [`EpochWriter::commit`] abandons the epoch: the
/// store goes on as if it had never been begun.
pub trait EpochWriter: PageSink {
    /// The number that this epoch will have.
    fn id(&self) -> EpochId;

    /// Stores the state tree of one group; a group that is byte for byte what the previous
    /// epoch holds is recorded by reference. Each group is written at most once an epoch, and an
    /// epoch holds exactly the groups that were written to it.
    fn tree(&mut self, group: &str, fdt: &[u8]) -> Result<(), StoreError>;

    /// States that these pages are zero, however many they are: that costs the same for each run.
    fn zero(&mut self, run: Run) -> Result<(), StoreError>;

    /// From now on somebody waits for this epoch: nothing is done any more only to save space.
    fn hurry(&mut self) {}

    /// Makes the epoch durable and publishes it. When this returns `Ok`, it survives a power cut.
    fn commit(self: Box<Self>, facts: EpochFacts) -> Result<Acked, StoreError>;
}

/// What an epoch says of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// The bytes of every page in the run.
    Bytes(&'a [u8]),
    /// All pages of the run are zero (and hide what lies below the mapping).
    Zero,
}

/// In which order pages are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the medium delivers them fastest.
    Fastest,
    /// What was written last comes first, by and large: it is likely to be used again.
    LatestFirst,
}

/// Reads one committed epoch, checked.
pub trait EpochReader {
    /// Which epoch this is.
    fn id(&self) -> EpochId;

    /// The names of the groups of this epoch, sorted.
    fn groups(&self) -> Vec<String>;

    /// The state tree of a group, as it was written; `None` where the epoch has no such group.
    fn tree(&self, group: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// The page runs that the epoch holds, in the order of [`SpaceId`] and page index, without
    /// their contents. Pages that are in no run are absent.
    fn runs(&self) -> Vec<Run>;

    /// Hands out every page of the wanted runs (which do not overlap) that the epoch holds exactly
    /// once, in this order. The visitor's error ends the walk.
    fn pages_in(
        &self,
        wanted: &[Run],
        order: Order,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError>;

    /// The same with all pages of the wanted spaces, as fast as it goes.
    fn pages_of(
        &self,
        wanted: &dyn Fn(SpaceId) -> bool,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError> {
        let mut runs = self.runs();
        runs.retain(|run| wanted(run.space()));
        self.pages_in(&runs, Order::Fastest, visit)
    }

    /// The same, of all spaces.
    fn pages(
        &self,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError> {
        self.pages_of(&|_| true, visit)
    }
}

impl<T: EpochReader + ?Sized> EpochReader for std::sync::Arc<T> {
    fn id(&self) -> EpochId {
        (**self).id()
    }

    fn groups(&self) -> Vec<String> {
        (**self).groups()
    }

    fn tree(&self, group: &str) -> Result<Option<Vec<u8>>, StoreError> {
        (**self).tree(group)
    }

    fn runs(&self) -> Vec<Run> {
        (**self).runs()
    }

    fn pages_in(
        &self,
        wanted: &[Run],
        order: Order,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError> {
        (**self).pages_in(wanted, order, visit)
    }
}

/// Why a walk over pages ended early: the store failed, or the visitor did.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// The store could not deliver the pages.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The visitor could not take them.
    #[error(transparent)]
    Visitor(Box<dyn std::error::Error + Send + Sync>),
}
