//! What a pool does not do, and what to do instead.

/// A wish that is understood and not granted. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not so many pages are free.
    #[error("{wanted} bytes were asked for and {free} are free{}: release or page out something, or ask for less",
        if *.limited { " below the limit" } else { "" })]
    NoRoom {
        /// Bytes that were asked for.
        wanted: u64,
        /// Bytes that are free, below the limit if there is one.
        free: u64,
        /// Whether an address limit was asked for.
        limited: bool,
    },
    /// The owner would have more than it may.
    #[error(
        "{owner} may have {quota} bytes and has {promised}; {wanted} more are beyond its quota: give it a larger one, or release something of it"
    )]
    Quota {
        /// Who.
        owner: String,
        /// Its quota in bytes.
        quota: u64,
        /// What it was promised, in bytes.
        promised: u64,
        /// Bytes that were asked for.
        wanted: u64,
    },
    /// No such owner.
    #[error("there is no owner {0:?} in this pool; `outlive pool status` lists them")]
    NoOwner(String),
    /// No such extent.
    #[error("there is no such extent {0} in this pool; `outlive pool status` lists them")]
    NoExtent(u64),
    /// The contents are in use.
    #[error("the contents of {0} are in use by process {1}: stop it first")]
    Running(String, u32),
    /// The contents are in the owner's file.
    #[error("the contents of {0} are in its file: page them in first")]
    PagedOut(String),
    /// The contents are in the pool.
    #[error("the contents of {0} are in the pool already")]
    InPool(String),
    /// Nobody said where the contents go.
    #[error("{0} has no file to be paged out to: give one with --file")]
    NoFile(String),
    /// A range beyond the end of an extent.
    #[error("extent {extent} ends at byte {bytes}")]
    Beyond {
        /// Which.
        extent: u64,
        /// Its size in bytes.
        bytes: u64,
    },
    /// So many rows of the tables that no transaction could move them: the pool is too fragmented, or the
    /// owner has too many extents.
    #[error(
        "{owner} would be in more than {most} pieces, where an extent counts as {} beside its own: release or page out something, or ask for less",
        crate::ledger::EXTENT_ROWS
    )]
    Pieces {
        /// Who.
        owner: String,
        /// How many there may be in this pool.
        most: usize,
    },
    /// A file that is somebody else's.
    #[error(
        "{file} is, or is written by way of, where the contents of {owner} go: give another one with --file"
    )]
    FileTaken {
        /// Which.
        file: String,
        /// Whose.
        owner: String,
    },
    /// A file that paging out would replace, and that it did not write.
    #[error(
        "{file} is there already and has no contents that this pool wrote for {owner}: move it away"
    )]
    InTheWay {
        /// Which.
        file: String,
        /// For whom.
        owner: String,
    },
    /// No size of an extent.
    #[error("an extent has one page at least, and all of an owner's together fit into 63 bits")]
    Size,
    /// No name of an owner.
    #[error("{0:?} is no name of an owner: letters, digits and - _ . : @, 64 bytes at most")]
    Name(String),
    /// The medium is too small for what was asked for.
    #[error("a pool of {len} bytes has no page to give away: it takes {least} bytes at least")]
    TooSmall {
        /// Bytes of the medium.
        len: u64,
        /// The least that a pool of this shape takes.
        least: u64,
    },
    /// There is a pool already, or something else.
    #[error(
        "{0} has a pool already, or something else that is not zeros, which would be lost; --force makes a new one all the same"
    )]
    Taken(String),
}
