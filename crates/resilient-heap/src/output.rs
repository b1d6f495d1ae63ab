//! [`POutput`]: data that appears in a file exactly once, whatever crashes.
//!
//! A transaction *stages* what it puts out: the bytes lie in the heap, and are committed or taken back with
//! everything else. [`Heap::deliver`] brings what is durable there into the file:
//! 1. the heap is synced: what is delivered can no longer be taken back;
//! 2. the bytes are written at the offset that the heap has for them, and the file is made durable;
//! 3. a transaction moves the offset behind them and stages nothing.
//!
//! # Why exactly once
//! After a crash one delivers again, with what the heap holds then:
//! - before 1: the staged bytes may be gone with their transaction; none of them is in the file.
//! - in 1 to 3, with any part of the bytes in the file, in any order, or the file as long as it will be but
//!   without the bytes: the heap has the same bytes for the same offset, and writes them there again.
//! - after 3, durable or not: either nothing is left to do, or the same bytes are written once more to where
//!   they are.
//!
//! Bytes are never written behind others that are not durable, for 2 ends before 3 begins; and those that
//! later transactions stage are written only after they are durable (1 of the next delivery), with which
//! the offset of 3 is durable, too. `tests/output.rs` goes through the crashes of the heap's memory and of the
//! file together.
//!
//! # What it refuses
//! - A file that is shorter than what was delivered, or longer than that and what is staged: somebody else cut
//!   it or wrote to it. Nobody else may.
//! - Anything that cannot be written at an offset, like a pipe: what it took it cannot give back.

use crate::block::Access;
use crate::descriptor::{PFile, failed, refused};
use crate::error::Error;
use crate::heap::Heap;
use crate::persist::Family;
use crate::transaction::Tx;
use crate::vector::PVec;
use resilient_heap_derive::Persist;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::vec::Vec;

/// What output can be delivered to: bytes at offsets that survive.
pub trait Sink {
    /// How many bytes there are.
    ///
    /// # Errors
    /// Those of the file.
    fn size(&self) -> io::Result<u64>;

    /// Writes all bytes at an offset.
    ///
    /// # Errors
    /// Those of the file; any part may have been written.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// Those of the file; any part may be durable.
    fn sync(&self) -> io::Result<()>;
}

impl Sink for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// See the module.
#[derive(Persist)]
#[persist(crate)]
#[repr(C)]
pub struct POutput<'h> {
    /// Its offset is where the staged bytes begin.
    file: PFile<'h>,
    staged: PVec<'h, u8>,
}

/// What is to be delivered.
struct Staged {
    path: PathBuf,
    at: u64,
    bytes: Vec<u8>,
}

impl<'h> POutput<'h> {
    /// Opens a file, or makes it; output begins at its end. What is in it is made durable.
    ///
    /// # Errors
    /// [`Error::Replaced`]: it is no regular file. [`Error::File`]; those of the heap.
    pub fn new(tx: &Tx<'h>, path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let there = path.symlink_metadata();
        if there.is_ok_and(|there| !there.is_file()) {
            return Err(refused(path, "it is no regular file"));
        }
        let mut options = File::options();
        let opened = options.write(true).create(true).truncate(false).open(path);
        let file = opened.map_err(|error| error_of(path, "open", &error))?;
        let mut kept = PFile::new(tx, path, &file)?;
        kept.set_offset(
            file.size()
                .map_err(|error| error_of(path, "stat", &error))?,
        );
        Ok(Self {
            file: kept,
            staged: PVec::new(),
        })
    }

    /// Stages bytes behind those before. They reach the file with a delivery after this transaction.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn append(&mut self, tx: &Tx<'h>, bytes: &[u8]) -> Result<(), Error> {
        self.staged.extend_from_slice(tx, bytes)
    }

    /// How many bytes wait for their delivery.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn staged(&self, access: &impl Access<'h>) -> Result<usize, Error> {
        self.staged.len(access)
    }

    /// Up to which offset the file has all that it shall have.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.file.offset()
    }

    /// Opens the file again, to deliver to.
    ///
    /// # Errors
    /// See [`PFile::reopen`].
    pub fn reopen(&self, access: &impl Access<'h>) -> Result<File, Error> {
        self.file.reopen(access)
    }

    fn show(&self, access: &impl Access<'h>) -> Result<Staged, Error> {
        Ok(Staged {
            path: self.file.path(access)?,
            at: self.file.offset(),
            bytes: self.staged.as_slice(access)?.to_vec(),
        })
    }

    fn settle(&mut self, tx: &Tx<'h>, end: u64) -> Result<(), Error> {
        self.file.set_offset(end);
        self.staged.truncate(tx, 0)
    }
}

fn error_of(path: &Path, what: &'static str, error: &io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    failed(path, what)(errno)
}

impl Staged {
    /// Brings the bytes into the file, durably; where they end.
    fn put(&self, sink: &impl Sink) -> Result<u64, Error> {
        let failed = |what| move |error: io::Error| error_of(&self.path, what, &error);
        let refused = |why| refused(&self.path, why);
        let end = self.at.checked_add(self.bytes.len() as u64);
        let end = end.ok_or_else(|| refused("its offset is beyond all files"))?;
        let found = sink.size().map_err(failed("stat"))?;
        if found < self.at {
            return Err(refused("it is shorter than what was put into it"));
        }
        if found > end {
            return Err(refused("somebody else wrote to it: it is too long"));
        }
        if !self.bytes.is_empty() {
            sink.write_at(&self.bytes, self.at)
                .map_err(failed("write"))?;
            sink.sync().map_err(failed("fdatasync"))?;
        }
        Ok(end)
    }
}

impl<R: Family> Heap<R> {
    /// Brings what an output has staged into its file ([`POutput::reopen`]), exactly once; how many bytes.
    /// To be called after opening, and as often as output shall appear. The staged bytes are durable
    /// before; that they were delivered is so as soon as any other transaction.
    ///
    /// # Errors
    /// [`Error::Replaced`]: the file is not as it was left. [`Error::File`]: it does not take the bytes; they
    /// stay staged. Those of [`Heap::write`].
    pub fn deliver(
        &mut self,
        sink: &impl Sink,
        pick: impl for<'h, 'a> Fn(&'a mut R::At<'h>, &'a Tx<'h>) -> Result<&'a mut POutput<'h>, Error>,
    ) -> Result<u64, Error> {
        self.sync()?;
        let staged = self.write(|root, tx| pick(root, tx)?.show(tx))?;
        let end = staged.put(sink)?;
        if !staged.bytes.is_empty() {
            self.write(|root, tx| pick(root, tx)?.settle(tx, end))?;
        }
        Ok(end - staged.at)
    }
}
