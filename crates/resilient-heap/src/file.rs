//! A heap in a file: mapped where it is, made durable with `msync(2)`.
//!
//! # Rules
//! - The file is locked with `flock(2)`: for one writer, or for readers.
//! - Address space for the largest size is taken at once, so that a growing file never moves. File space
//!   is taken before it is used, so that a full disk is an error and not a signal.
//! - A fence writes back the pages that were flushed since the last one. Between fences the kernel may
//!   write back whatever it likes, which is what the heap expects of any memory.
//! - Whoever cuts the file while it is mapped ends this process with `SIGBUS`: do not.
//!
//! # Safety
//! Calls of `mmap`, `msync` and `munmap`, on ranges within the address space that [`FileMemory`] took and
//! keeps until it is dropped.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::layout::PAGE;
use crate::memory::{Memory, Volatile};
use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, fallocate, flock, fstat, open};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, mmap_anonymous, msync, munmap};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::vec::Vec;

/// The most bytes of a heap in a file where nothing else is said.
const CAPACITY: usize = 64 << 30;

/// A file as memory.
#[derive(Debug)]
pub struct FileMemory {
    file: OwnedFd,
    base: NonNull<u8>,
    capacity: usize,
    len: AtomicUsize,
    /// Pages flushed since the last fence: first and one past the last.
    flushed: Mutex<Vec<(usize, usize)>>,
}

// SAFETY: the pointer is to a mapping that this object owns; `store` writes, and its caller excludes all
// others.
unsafe impl Send for FileMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for FileMemory {}

fn error(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Memory {
        what,
        code: errno.raw_os_error(),
    }
}

impl FileMemory {
    /// Opens a file, or makes it with mode 0600; it can grow up to 64 GiB.
    ///
    /// # Errors
    /// [`Error::Memory`]; where another process has it open, its code is that of `EWOULDBLOCK`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::with_capacity(path, CAPACITY)
    }

    /// As [`FileMemory::open`], for a file of up to `capacity` bytes: address space, no memory.
    ///
    /// # Errors
    /// See [`FileMemory::open`].
    pub fn with_capacity(path: impl AsRef<Path>, capacity: usize) -> Result<Self, Error> {
        let path = path.as_ref();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = open(path, flags, Mode::RUSR | Mode::WUSR).map_err(error("open"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(error("lock"))?;
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())
            .and_then(rustix::fs::fsync)
            .map_err(error("fsync of the directory"))?;
        let found = len_of(&file)?;
        let capacity = capacity.max(found).max(PAGE).next_multiple_of(PAGE);
        // SAFETY: a new mapping where the kernel likes it.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(core::ptr::null_mut(), capacity, ProtFlags::empty(), flags)
        };
        let base = base.map_err(error("mmap of address space"))?;
        let memory = Self {
            file,
            base: NonNull::new(base.cast()).ok_or(Error::Full { wanted: capacity })?,
            capacity,
            len: AtomicUsize::new(0),
            flushed: Mutex::new(Vec::new()),
        };
        memory.map(found / PAGE * PAGE)?;
        Ok(memory)
    }

    /// A copy of a file's bytes, for looking at a heap without touching it; shares the lock with other
    /// readers.
    ///
    /// # Errors
    /// See [`FileMemory::open`].
    pub fn copy(path: impl AsRef<Path>) -> Result<Volatile, Error> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = open(path.as_ref(), flags, Mode::empty()).map_err(error("open"))?;
        flock(&file, FlockOperation::NonBlockingLockShared).map_err(error("lock"))?;
        let len = len_of(&file)? / PAGE * PAGE;
        let copy = Volatile::new(len)?;
        copy.grow(len)?;
        let mut buffer = [0; PAGE];
        for at in (0..len).step_by(PAGE) {
            let mut done = 0;
            while done < PAGE {
                let rest = &mut buffer[done..];
                match rustix::io::pread(&file, rest, (at + done) as u64).map_err(error("read"))? {
                    0 => break,
                    n => done += n,
                }
            }
            // SAFETY: below `len`, to which the copy was grown; nobody has a reference to it.
            unsafe { copy.store(at, &buffer) };
        }
        Ok(copy)
    }

    /// Maps the file up to `len`.
    fn map(&self, len: usize) -> Result<(), Error> {
        let before = self.len();
        if len <= before {
            return Ok(());
        }
        // SAFETY: the range lies in the address space that `with_capacity` took, and beyond what is
        // mapped to the file already: nobody looks there.
        let mapped = unsafe {
            let at = self.base.as_ptr().add(before).cast::<c_void>();
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            mmap(at, len - before, prot, flags, &self.file, before as u64)
        };
        mapped.map_err(error("mmap"))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn take_flushed(&self) -> Vec<(usize, usize)> {
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pages = core::mem::take(&mut *flushed);
        drop(flushed);
        pages.sort_unstable();
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for (first, end) in pages {
            match merged.last_mut() {
                Some(last) if first <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((first, end)),
            }
        }
        merged
    }
}

fn len_of(file: &OwnedFd) -> Result<usize, Error> {
    let len = fstat(file).map_err(error("stat"))?.st_size;
    usize::try_from(len).map_err(|_| Error::Full { wanted: usize::MAX })
}

// SAFETY: the mapping has `capacity` bytes of address space, of which `len` are the file's, and stays
// until `drop`; it is aligned to a page. The lock keeps other heaps out.
unsafe impl Memory for FileMemory {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    fn grow(&self, len: usize) -> Result<(), Error> {
        let len = len.next_multiple_of(PAGE);
        if len <= self.len() {
            return Ok(());
        }
        if len > self.capacity {
            return Err(Error::Full { wanted: len });
        }
        let full = |errno| match errno {
            Errno::NOSPC | Errno::DQUOT => Error::Full { wanted: len },
            other => error("fallocate")(other),
        };
        let before = self.len() as u64;
        fallocate(
            &self.file,
            FallocateFlags::empty(),
            before,
            len as u64 - before,
        )
        .map_err(full)?;
        rustix::fs::fsync(&self.file).map_err(error("fsync"))?;
        self.map(len)
    }

    fn flush(&self, at: usize, len: usize) {
        let pages = (at / PAGE, (at + len).div_ceil(PAGE));
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if flushed.last() != Some(&pages) {
            flushed.push(pages);
        }
    }

    fn fence(&self) -> Result<(), Error> {
        for (first, end) in self.take_flushed() {
            let end = (end * PAGE).min(self.len());
            let begin = (first * PAGE).min(end);
            // SAFETY: the range is mapped to the file: it ends at `len`.
            let done = unsafe {
                let at = self.base.as_ptr().add(begin).cast::<c_void>();
                msync(at, end - begin, MsyncFlags::SYNC)
            };
            done.map_err(error("msync"))?;
        }
        Ok(())
    }
}

impl Drop for FileMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the address space that was taken; nobody can have a pointer into it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.capacity) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_what_was_stored_and_lets_one_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heap");
        {
            let memory = FileMemory::open(&path).unwrap();
            memory.grow(PAGE).unwrap();
            memory.grow(3 * PAGE).unwrap();
            // SAFETY: three pages are there, and nobody refers to them.
            unsafe { memory.store(PAGE - 2, b"data") };
            memory.flush(PAGE - 2, 4);
            memory.fence().unwrap();
            let second = FileMemory::open(&path).unwrap_err();
            assert!(matches!(second, Error::Memory { what: "lock", .. }));
        }
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 3 * PAGE);
        assert_eq!(&bytes[PAGE - 2..PAGE + 2], b"data");
        let memory = FileMemory::with_capacity(&path, 0).unwrap();
        assert_eq!(memory.len(), 3 * PAGE);
        assert!(matches!(memory.grow(4 * PAGE), Err(Error::Full { .. })));
        assert_eq!(FileMemory::copy(&path).unwrap_err(), second_lock());
    }

    fn second_lock() -> Error {
        error("lock")(Errno::WOULDBLOCK)
    }
}
