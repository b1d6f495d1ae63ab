//! A heap in a small file that is not mapped: it is read when it is opened, and written by `write(2)`.
//!
//! For whoever must not be ended by the file: under a mapping, a file that somebody cuts, a sector that cannot
//! be read or a disk without room for a hole are a `SIGBUS`. Here they are errors. The price is that all of the
//! file is in memory.
//!
//! # Rules
//! - The file is locked with `flock(2)`: for one writer, or for readers.
//! - A fence writes the pages that were flushed since the last one, and waits until they are durable. Of what
//!   was not flushed, what lies in other pages never reaches the file, which the heap expects of any memory.
//! - After a write or a fence that failed, nothing is written any more: what was to be durable before it is not.
//! - A file longer than the caller allows is refused before anything of it is read.
//!
//! # Safety
//! [`Memory`](crate::memory::Memory) is implemented by [`Volatile`] within, which owns the bytes. A fence looks at
//! them as a slice, within their length.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::file::{FileMemory, error, len_of, locked, merged, read_whole};
use crate::layout::PAGE;
use crate::memory::{Memory, Volatile};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};
use rustix::fs::{
    FileType, FlockOperation, Mode, OFlags, fdatasync, flock, fstat, fsync, ftruncate, open,
};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::vec::Vec;

/// A file as memory, without a mapping.
#[derive(Debug)]
pub struct WrittenFile {
    file: OwnedFd,
    memory: Volatile,
    capacity: usize,
    /// Pages flushed since the last fence: first and one past the last.
    flushed: Mutex<Vec<(usize, usize)>>,
    /// A write or a fence failed.
    failed: AtomicBool,
}

impl WrittenFile {
    /// Opens a file, or makes it with mode 0600; it can grow up to `capacity` bytes, which are taken at
    /// once.
    ///
    /// # Errors
    /// [`Error::Memory`]; where another process has it open, its code is that of `EWOULDBLOCK`.
    /// [`Error::NotAHeap`]: it is no regular file. [`Error::Full`]: it is longer.
    pub fn open(path: impl AsRef<Path>, capacity: usize) -> Result<Self, Error> {
        let path = path.as_ref();
        let file = locked(path)?;
        regular(&file)?;
        FileMemory::sync_folder(path)?;
        let capacity = capacity.max(1).next_multiple_of(PAGE);
        let len = bounded(&file, capacity)?;
        Ok(Self {
            memory: read_whole(&file, len, capacity)?,
            file,
            capacity,
            flushed: Mutex::new(Vec::new()),
            failed: AtomicBool::new(false),
        })
    }

    /// A copy of a regular file of at most `most` bytes, for looking at a heap without touching it; shares the
    /// lock with other readers.
    ///
    /// # Errors
    /// See [`WrittenFile::open`].
    pub fn copy(path: impl AsRef<Path>, most: usize) -> Result<Volatile, Error> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = open(path.as_ref(), flags, Mode::empty()).map_err(error("open"))?;
        regular(&file)?;
        flock(&file, FlockOperation::NonBlockingLockShared).map_err(error("lock"))?;
        let len = bounded(&file, most)?;
        read_whole(&file, len, len)
    }

    /// Writes what was flushed, and waits for it if asked to.
    fn settle(&self, wait: bool) -> Result<(), Error> {
        if self.failed.load(Ordering::Acquire) {
            return Err(error("fence after one that failed")(Errno::IO));
        }
        let done = self.write_flushed().and_then(|any| {
            if any && wait {
                fdatasync(&self.file).map_err(error("fdatasync"))?;
            }
            Ok(())
        });
        if done.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        done
    }

    /// Whether there was anything.
    fn write_flushed(&self) -> Result<bool, Error> {
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = core::mem::take(&mut *flushed);
        drop(flushed);
        let any = !pages.is_empty();
        for (first, end) in merged(pages) {
            self.write(first * PAGE, (end * PAGE).min(self.len()))?;
        }
        Ok(any)
    }

    fn write(&self, begin: usize, end: usize) -> Result<(), Error> {
        let mut begin = begin.min(end);
        while begin < end {
            // SAFETY: `end` is at most the length of the memory. Whoever writes to it is the one who calls
            // the fence.
            let rest = unsafe {
                let at = self.memory.base().as_ptr().add(begin);
                core::slice::from_raw_parts(at, end - begin)
            };
            match rustix::io::pwrite(&self.file, rest, begin as u64).map_err(error("write"))? {
                0 => return Err(Error::Full { wanted: end }),
                n => begin += n,
            }
        }
        Ok(())
    }
}

fn regular(file: &OwnedFd) -> Result<(), Error> {
    let kind = FileType::from_raw_mode(fstat(file).map_err(error("stat"))?.st_mode);
    match kind {
        FileType::RegularFile => Ok(()),
        _ => Err(Error::NotAHeap),
    }
}

/// The whole pages of a file, bytes.
fn bounded(file: &OwnedFd, most: usize) -> Result<usize, Error> {
    let len = len_of(file)?;
    if len > most {
        return Err(Error::Full { wanted: len });
    }
    Ok(len / PAGE * PAGE)
}

// SAFETY: all that is said of the bytes is said of those of `Volatile`, to which every call goes; the
// lock keeps other heaps out of the file.
unsafe impl Memory for WrittenFile {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn grow(&self, len: usize) -> Result<(), Error> {
        let len = len.next_multiple_of(PAGE);
        let before = self.len();
        if len <= before {
            return Ok(());
        }
        if len > self.capacity {
            return Err(Error::Full { wanted: len });
        }
        // What is beyond the last whole page is nobody's, and new bytes are zero.
        for wanted in [before, len] {
            ftruncate(&self.file, wanted as u64).map_err(error("truncate"))?;
        }
        fsync(&self.file).map_err(error("fsync"))?;
        self.memory.grow(len)
    }

    fn flush(&self, at: usize, len: usize) {
        let pages = (at / PAGE, (at + len).div_ceil(PAGE));
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if flushed.last() != Some(&pages) {
            flushed.push(pages);
        }
    }

    fn fence(&self) -> Result<(), Error> {
        self.settle(true)
    }
}

impl Drop for WrittenFile {
    fn drop(&mut self) {
        // What nobody waited for; without it the next opening recovers, as after a crash.
        let _ = self.settle(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Heap, Options};
    use std::fs;

    const MOST: usize = 1 << 20;

    fn count(memory: impl Memory + 'static) -> Result<Heap<u64>, Error> {
        let options = Options::default().zone_pages(16).log_pages(4);
        options.open::<u64>(memory, |_| Ok(0))
    }

    #[test]
    fn each_commit_is_in_the_file_and_lets_one_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heap");
        for turn in 1..4 {
            let mut heap = count(WrittenFile::open(&path, MOST).unwrap()).unwrap();
            assert_eq!(heap.opened().created, turn == 1);
            heap.write(|n, _| {
                *n += 1;
                Ok(())
            })
            .unwrap();
            // What a process leaves that is killed now.
            let left = dir.path().join("left");
            fs::copy(&path, &left).unwrap();
            let copy = count(WrittenFile::copy(&left, MOST).unwrap()).unwrap();
            assert_eq!(copy.read(|n, _| Ok(*n)), Ok(turn));
            let second = WrittenFile::open(&path, MOST).unwrap_err();
            assert!(matches!(second, Error::Memory { what: "lock", .. }));
        }
        let heap = count(FileMemory::open(&path).unwrap()).unwrap();
        assert_eq!(heap.read(|n, _| Ok(*n)), Ok(3), "mapped, it is the same");
    }

    #[test]
    fn what_was_not_flushed_is_not_in_the_file_and_new_bytes_are_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heap");
        fs::write(&path, [7u8; 100]).unwrap();
        let memory = WrittenFile::open(&path, 2 * PAGE).unwrap();
        assert_eq!(memory.len(), 0);
        memory.grow(2 * PAGE).unwrap();
        // SAFETY: two pages are there, and nobody refers to them.
        unsafe {
            memory.store(5, b"kept");
            memory.store(PAGE + 5, b"lost");
        }
        memory.flush(5, 4);
        memory.fence().unwrap();
        let mut wanted = [0; 2 * PAGE];
        wanted[5..9].copy_from_slice(b"kept");
        assert_eq!(fs::read(&path).unwrap(), wanted);
        assert!(matches!(memory.grow(3 * PAGE), Err(Error::Full { .. })));
    }

    #[test]
    fn after_a_write_that_failed_nothing_more_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heap");
        let mut memory = WrittenFile::open(&path, MOST).unwrap();
        memory.grow(PAGE).unwrap();
        let good = core::mem::replace(&mut memory.file, fs::File::open(&path).unwrap().into());
        memory.flush(0, 4);
        let failed = memory.fence().unwrap_err();
        assert!(matches!(failed, Error::Memory { what: "write", .. }));
        memory.file = good;
        // SAFETY: a page is there, and nobody refers to it.
        unsafe { memory.store(0, b"late") };
        memory.flush(0, 4);
        assert!(memory.fence().is_err());
        drop(memory);
        assert_eq!(fs::read(&path).unwrap(), [0; PAGE]);
    }

    #[test]
    fn a_file_that_is_cut_or_too_long_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heap");
        let mut heap = count(WrittenFile::open(&path, MOST).unwrap()).unwrap();
        fs::write(&path, b"").unwrap();
        // Under a mapping, this would be the end of the process.
        let _ = heap.write(|n, _| {
            *n += 1;
            Ok(())
        });
        drop(heap);
        fs::write(&path, [1u8; 3 * PAGE]).unwrap();
        let opened = WrittenFile::open(&path, 2 * PAGE).unwrap_err();
        assert_eq!(opened, Error::Full { wanted: 3 * PAGE });
        let copied = WrittenFile::copy(&path, 2 * PAGE).unwrap_err();
        assert_eq!(copied, Error::Full { wanted: 3 * PAGE });
        let folder = WrittenFile::copy(dir.path(), MOST).unwrap_err();
        assert_eq!(folder, Error::NotAHeap);
    }
}
