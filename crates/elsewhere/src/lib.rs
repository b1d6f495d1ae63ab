//! Epochs on their way to other places.
//!
//! - [`export`] and [`import`]: the epochs of a subject as one stream of bytes, which may be a file
//!   or a pipe.
//! - [`push`] and [`pull`]: single epochs, in pieces that are named by their hashes, to and from a
//!   [`Shelf`] that many hosts use.
//!
//! `docs/elsewhere.md` draws the bytes of both.
//!
//! # Rules
//! - Whatever comes from elsewhere is hostile until checked. What does not pass its checks is
//!   [`StoreError::Damaged`] with its place in the stream; nothing is allocated in advance for what a
//!   stream only claims.
//! - Where a stream is damaged, nothing of it may stay: the caller imports into a directory that
//!   counts for nothing until the import is done.
//!
//! # What it does not do
//! It knows nothing of processes, and nothing of subjects: what is known of a subject besides its
//! epochs is a piece of bytes to it. It encrypts nothing and compresses nothing.
//!
//! [`StoreError::Damaged`]: outlive_epoch::StoreError::Damaged

mod export;
mod frame;
mod import;
mod manifest;
#[cfg(feature = "objects")]
mod objects;
mod publication;
mod pull;
mod push;
mod shelf;
#[cfg(test)]
mod shelf_tests;
#[cfg(test)]
mod stream_tests;
mod together;
mod url;

pub use export::{Which, export};
pub use frame::{LARGEST_ABOUT, VERSION};
pub use import::import;
pub use manifest::Hash;
pub use publication::{Error, Publication, published};
pub use pull::{Pulled, Wanted, pull};
pub use push::{Load, Pushed, push};
pub use shelf::{DirectoryShelf, Shelf};
pub use url::{Opened, open};

/// What went over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Numbers of the first and the last epoch.
    pub epochs: Option<(u64, u64)>,
    /// Pages with contents, counted in each epoch that has them.
    pub pages: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

impl Passed {
    fn epoch(&mut self, id: u64) {
        let first = self.epochs.map_or(id, |(first, _)| first);
        self.epochs = Some((first, id));
    }
}
