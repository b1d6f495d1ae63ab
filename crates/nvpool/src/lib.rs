//! One pool of memory that survives, divided safely among many owners.
//!
//! A [`Pool`] lies on any medium: a file, a block device, a mapping, memory. It gives out *extents* of whole
//! pages to *owners*, and an extent is a medium again ([`ExtentMedium`]). `docs/nvram.md` tells how it lies
//! there, byte by byte, what is promised, and which test shows it.
//!
//! - `run`, `buddy`, `ledger` (pure): pages, what is free, and what is given out: quotas, limits, thin
//!   extents. A change is planned here before it is made.
//! - `shape`, `journal`, `tables`: the superblock, pages that reach the medium all or none, and the resilient
//!   heap that holds the ledger's rows.
//! - `pool`, `extent`, `paging`: the way in; contents of owners that do not run, in files.
//! - `picture` (pure): who has what, as text and as SVG.
//! - `devices`: which NVRAM a host has. Parsers over directories that are given.
//!
//! # What it refuses
//! More than a quota or the pool has; to give up what is in use; a medium whose tables are inconsistent.

mod buddy;
pub mod devices;
mod error;
mod extent;
mod journal;
mod ledger;
mod paging;
pub mod picture;
mod pool;
mod refused;
mod run;
mod shape;
mod tables;

pub use buddy::{Buddy, MAX_ORDER};
pub use error::Error;
pub use extent::ExtentMedium;
pub use ledger::{
    Change, EXTENT_ROWS, Extent, Holder, Ledger, MAX_PIECES, Owner, Piece, Plan, Request, Rows,
    State,
};
pub use pool::{Pool, Verified};
pub use refused::Refused;
pub use run::{PAGE, Pages, Run};
pub use shape::Shape;
