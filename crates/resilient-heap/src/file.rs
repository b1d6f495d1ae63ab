//! A heap in a file: mapped where it is, made durable by the kernel or by the processor ([`Flush`]).
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

/// How a file becomes durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    /// The kernel writes back the pages that changed (`msync(2)`, or `fdatasync(2)` where they do not lie
    /// together): right for every file.
    #[default]
    Kernel,
    /// Lines are flushed by instructions of the processor, without any system call: right only where the
    /// mapping itself is persistent memory. On a file system with DAX the file is mapped with `MAP_SYNC`;
    /// elsewhere the caller vouches for it (memory that survives by other means, measurements on
    /// `tmpfs`). x86-64 only.
    Processor,
}

/// A file as memory.
#[derive(Debug)]
pub struct FileMemory {
    file: OwnedFd,
    base: NonNull<u8>,
    capacity: usize,
    len: AtomicUsize,
    /// What is stored stays in this process.
    private: bool,
    flush: Flush,
    /// Pages flushed since the last fence: first and one past the last.
    flushed: Mutex<Vec<(usize, usize)>>,
}

// SAFETY: the pointer is to a mapping that this object owns; `store` writes, and its caller excludes all
// others.
unsafe impl Send for FileMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for FileMemory {}

pub(crate) fn error(what: &'static str) -> impl Fn(Errno) -> Error {
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
        Self::with_flush(path, capacity, Flush::Kernel)
    }

    /// As [`FileMemory::with_capacity`], and made durable in another way.
    ///
    /// # Errors
    /// See [`FileMemory::open`]; [`Error::Memory`] where the processor has no such instructions.
    pub fn with_flush(
        path: impl AsRef<Path>,
        capacity: usize,
        flush: Flush,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        if flush == Flush::Processor && !crate::flush::offered() {
            return Err(error("flush of lines by the processor")(Errno::NOSYS));
        }
        let file = locked(path)?;
        Self::sync_folder(path)?;
        Self::over(file, capacity, false, flush)
    }

    /// Makes the name of a file durable.
    pub(crate) fn sync_folder(path: &Path) -> Result<(), Error> {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())
            .and_then(rustix::fs::fsync)
            .map_err(error("fsync of the directory"))
    }

    /// The same file, as it is now, in memory of its own: what is stored there does not reach the file.
    /// It cannot grow.
    pub(crate) fn private(&self) -> Result<Self, Error> {
        let file = rustix::io::fcntl_dupfd_cloexec(&self.file, 0).map_err(error("dup"))?;
        Self::over(file, 0, true, Flush::Kernel)
    }

    /// Takes owner and mode of another file.
    pub(crate) fn take_over(&self, other: &Self) -> Result<(), Error> {
        let (from, to) = (fstat(&other.file), fstat(&self.file));
        let (from, to) = (from.map_err(error("stat"))?, to.map_err(error("stat"))?);
        if (from.st_uid, from.st_gid) != (to.st_uid, to.st_gid) {
            let owner = rustix::fs::Uid::from_raw(from.st_uid);
            let group = rustix::fs::Gid::from_raw(from.st_gid);
            rustix::fs::fchown(&self.file, Some(owner), Some(group)).map_err(error("chown"))?;
        }
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(from.st_mode)).map_err(error("chmod"))
    }

    fn over(file: OwnedFd, capacity: usize, private: bool, flush: Flush) -> Result<Self, Error> {
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
            private,
            flush,
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
        read_whole(&file, len, len)
    }

    /// Maps the file up to `len`.
    fn map(&self, len: usize) -> Result<(), Error> {
        let before = self.len();
        if len <= before {
            return Ok(());
        }
        let map = |sharing: MapFlags| {
            // SAFETY: the range lies in the address space that `over` took, and beyond what is mapped to
            // the file already: nobody looks there.
            unsafe {
                let at = self.base.as_ptr().add(before).cast::<c_void>();
                let prot = ProtFlags::READ | ProtFlags::WRITE;
                let flags = sharing | MapFlags::FIXED;
                mmap(at, len - before, prot, flags, &self.file, before as u64)
            }
        };
        let mapped = match (self.private, self.flush) {
            (true, _) => map(MapFlags::PRIVATE),
            (false, Flush::Kernel) => map(MapFlags::SHARED),
            (false, Flush::Processor) => match map(MapFlags::SHARED_VALIDATE | MapFlags::SYNC) {
                Err(Errno::OPNOTSUPP | Errno::INVAL) => map(MapFlags::SHARED),
                mapped => mapped,
            },
        };
        mapped.map_err(error("mmap"))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn take_flushed(&self) -> Vec<(usize, usize)> {
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = core::mem::take(&mut *flushed);
        drop(flushed);
        merged(pages)
    }
}

/// The same pages in order, each once: first and one past the last.
pub(crate) fn merged(mut pages: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
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

/// The first `len` bytes of a file, which are whole pages, in memory that can grow up to `capacity`.
pub(crate) fn read_whole(file: &OwnedFd, len: usize, capacity: usize) -> Result<Volatile, Error> {
    let copy = Volatile::new(capacity.max(len))?;
    copy.grow(len)?;
    let mut buffer = [0; PAGE];
    for at in (0..len).step_by(PAGE) {
        let mut done = 0;
        while done < PAGE {
            let rest = &mut buffer[done..];
            match rustix::io::pread(file, rest, (at + done) as u64).map_err(error("read"))? {
                0 => break,
                n => done += n,
            }
        }
        // SAFETY: below `len`, to which the copy was grown; nobody has a reference to it.
        unsafe { copy.store(at, &buffer) };
    }
    Ok(copy)
}

/// Opens a file, or makes it, and locks it. A file that lost its name meanwhile (an upgrade put another
/// one in its place) is not the one that was wanted.
pub(crate) fn locked(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        let file = open(path, flags, Mode::RUSR | Mode::WUSR).map_err(error("open"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(error("lock"))?;
        let own = fstat(&file).map_err(error("stat"))?;
        match rustix::fs::lstat(path) {
            Ok(named) if (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino) => {
                return Ok(file);
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(error("stat")(errno)),
        }
    }
}

pub(crate) fn len_of(file: &OwnedFd) -> Result<usize, Error> {
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
        if len > self.capacity || self.private {
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
        if self.flush == Flush::Processor {
            let len = len.min(self.len().saturating_sub(at));
            // SAFETY: the range ends at `len`, up to which the file is mapped.
            unsafe { crate::flush::flush(self.base.as_ptr().wrapping_add(at), len) };
            return;
        }
        let pages = (at / PAGE, (at + len).div_ceil(PAGE));
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if flushed.last() != Some(&pages) {
            flushed.push(pages);
        }
    }

    fn fence(&self) -> Result<(), Error> {
        if self.flush == Flush::Processor {
            crate::flush::fence();
            return Ok(());
        }
        let flushed = self.take_flushed();
        if self.private {
            return Ok(());
        }
        if flushed.len() > 1 {
            // One wait for all of them; what was not flushed may become durable at any time.
            return rustix::fs::fdatasync(&self.file).map_err(error("fdatasync"));
        }
        for (first, end) in flushed {
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

    #[test]
    fn what_the_processor_flushes_is_in_the_file_and_what_is_private_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heap");
        let memory = FileMemory::with_flush(&path, 4 * PAGE, Flush::Processor).unwrap();
        memory.grow(2 * PAGE).unwrap();
        // SAFETY: two pages are there, and nobody refers to them.
        unsafe { memory.store(PAGE - 2, b"data") };
        memory.flush(PAGE - 2, 4);
        memory.fence().unwrap();
        let private = memory.private().unwrap();
        // SAFETY: as before.
        unsafe { private.store(PAGE - 2, b"gone") };
        private.flush(PAGE - 2, 4);
        private.fence().unwrap();
        assert!(private.grow(3 * PAGE).is_err());
        drop(private);
        // The lock stays with the file that it was asked for.
        assert_eq!(FileMemory::open(&path).unwrap_err(), second_lock());
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[PAGE - 2..PAGE + 2], b"data");
    }

    fn second_lock() -> Error {
        error("lock")(Errno::WOULDBLOCK)
    }
}
