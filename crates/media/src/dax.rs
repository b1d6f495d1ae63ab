//! A medium that is a mapping of memory which keeps its bytes: a file on a file system that is mounted
//! with `-o dax`, or a character device of `/dev/dax`.
//!
//! With `MAP_SYNC` the kernel promises that whatever reached the memory itself is found again, with all
//! that the file system has to know of it. So a write stores past the caches (non-temporal stores, which every
//! x86-64 processor has, and which pass the caches by without `clwb`), and a flush is a fence. Where
//! the kernel gives no such mapping, [`DaxMedium::is_direct`] says so, and a flush is `msync(2)`.
//!
//! A file must have all of its space: a store into a hole of a full file system would end this process.
//!
//! It is as long as it was found, for ever; names in it are a [`Volume`](crate::Volume)'s business.
//!
//! # Safety
//! The mapping is made by `open` and removed by `drop`, and every access is checked against its length
//! first. Nobody in this process accesses it but through this value, whose lock keeps writers away from
//! everybody else; other processes may change its bytes at any time, so no reference to them is ever made:
//! they are read and written by volatile and non-temporal accesses of whole words. Whoever
//! shortens the file behind it gets this process a SIGBUS, which is not unsafe; the lock of its
//! writers keeps other media away.
#![allow(unsafe_code)]

use crate::{Access, BLOCK, Geometry, Medium, MediumError, check_blocks, lock};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{self, MapFlags, MsyncFlags, ProtFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{PoisonError, RwLock};

/// Bytes of a word.
const WORD: usize = size_of::<u64>();

/// A mapping as a medium.
#[derive(Debug)]
pub struct DaxMedium {
    place: String,
    at: NonNull<u64>,
    len: usize,
    direct: bool,
    access: Access,
    /// Held for writing by who writes.
    turn: RwLock<()>,
    /// Has the lock of the only writer.
    _file: OwnedFd,
}

// SAFETY: the mapping is owned by this value and has no ties to a thread.
unsafe impl Send for DaxMedium {}
// SAFETY: `turn` keeps writers apart from everybody else.
unsafe impl Sync for DaxMedium {}

impl DaxMedium {
    /// Maps a file or device; for writing, nobody else may have it so.
    ///
    /// # Errors
    /// [`MediumError::Busy`] with the holder; [`MediumError::Misuse`] where it has no whole block;
    /// [`MediumError::Io`].
    pub fn open(path: &Path, access: Access) -> Result<Self, MediumError> {
        let place = path.display().to_string();
        let fail = |op, e: Errno| MediumError::io(&place, op, 0, 0, e);
        let (flags, rights) = match access {
            Access::Read => (OFlags::RDONLY, ProtFlags::READ),
            Access::Write => (OFlags::RDWR, ProtFlags::READ | ProtFlags::WRITE),
        };
        let file = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| fail("open", e))?;
        if access == Access::Write {
            lock::exclusive(&place, file.as_fd())?;
        }
        let end = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| fail("measure", e))?;
        let len = usize::try_from(end).unwrap_or(usize::MAX) / BLOCK * BLOCK;
        if len == 0 || len > isize::MAX as usize {
            let what = "there is no whole block to map";
            return Err(MediumError::Misuse { place, what });
        }
        let stat = rustix::fs::fstat(&file).map_err(|e| fail("stat", e))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let has = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        if regular && access == Access::Write && has < len as u64 {
            let what = "the file has holes: give it all of its space first (`fallocate`)";
            return Err(MediumError::Misuse { place, what });
        }
        let map = |flags| {
            // SAFETY: a null hint without MAP_FIXED makes the kernel choose unused addresses, so no
            // existing memory changes.
            unsafe { mm::mmap(std::ptr::null_mut(), len, rights, flags, &file, 0) }
        };
        // Elsewhere nothing here stores past the caches.
        let direct = match cfg!(target_arch = "x86_64") {
            true => map(MapFlags::SHARED_VALIDATE | MapFlags::SYNC),
            false => Err(Errno::OPNOTSUPP),
        };
        let (direct, at) = match direct {
            Ok(at) => (true, at),
            Err(Errno::OPNOTSUPP | Errno::INVAL) => {
                (false, map(MapFlags::SHARED).map_err(|e| fail("map", e))?)
            }
            Err(e) => return Err(fail("map", e)),
        };
        let at = NonNull::new(at.cast()).ok_or_else(|| fail("map", Errno::NOMEM))?;
        Ok(Self {
            place,
            at,
            len,
            direct,
            access,
            turn: RwLock::new(()),
            _file: file,
        })
    }

    /// Whether writes reach the memory without the page cache between; otherwise a flush is an `msync(2)`.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The first byte of a range, as a number of bytes from the beginning; `None` beyond the end.
    fn within(&self, offset: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        offset
            .checked_add(len)
            .filter(|end| *end <= self.len)
            .map(|_| offset)
    }

    fn writable(&self) -> Result<(), MediumError> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => Err(MediumError::Misuse {
                place: self.place.clone(),
                what: "the medium was opened for reading only",
            }),
        }
    }
}

impl Medium for DaxMedium {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        Ok(Geometry {
            len: self.len as u64,
            block: BLOCK as u32,
        })
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let end = offset.saturating_add(into.len() as u64);
        let short = || MediumError::Short {
            place: self.place.clone(),
            end,
        };
        let mut at = self.within(offset, into.len()).ok_or_else(short)?;
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        let mut rest = into;
        while !rest.is_empty() {
            // SAFETY: `at` is below the end of the checked range, so its word lies in the mapping, whose
            // length is made of whole words.
            let word = unsafe { self.at.add(at / WORD).read_volatile() }.to_ne_bytes();
            let skipped = at % WORD;
            let count = (WORD - skipped).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[skipped..skipped + count]);
            (rest, at) = (later, at + count);
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.writable()?;
        check_blocks(&self.place, offset, bytes.len())?;
        let full = || MediumError::Full {
            place: self.place.clone(),
            needed: bytes.len() as u64,
        };
        let at = self.within(offset, bytes.len()).ok_or_else(full)?;
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let (words, _) = bytes.as_chunks::<WORD>();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: the range was checked, and begins at a whole block.
            let to = unsafe { self.at.add(at / WORD + i) };
            store(to, u64::from_ne_bytes(*word));
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), MediumError> {
        self.writable()?;
        fence();
        if self.direct {
            return Ok(());
        }
        // SAFETY: the mapping of this value, as a whole; nothing in it changes.
        unsafe { mm::msync(self.at.as_ptr().cast(), self.len, MsyncFlags::SYNC) }
            .map_err(|e| MediumError::io(&self.place, "msync", 0, 0, e))
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        self.writable()?;
        match len <= self.len as u64 {
            true => Ok(()),
            false => Err(MediumError::Full {
                place: self.place.clone(),
                needed: len - self.len as u64,
            }),
        }
    }

    fn truncate(&self, _: u64) -> Result<(), MediumError> {
        self.writable()
    }
}

impl Drop for DaxMedium {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `open` made, to which there are no references.
        let _ = unsafe { mm::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// Stores a word past the caches. `to` lies in a mapping that can be written.
#[cfg(target_arch = "x86_64")]
fn store(to: NonNull<u64>, word: u64) {
    // SAFETY: the callers pass a word of the mapping, aligned as such.
    unsafe { std::arch::x86_64::_mm_stream_si64(to.as_ptr().cast(), word.cast_signed()) }
}

/// The same where nothing is known of the processor: the mapping is no direct one there.
#[cfg(not(target_arch = "x86_64"))]
fn store(to: NonNull<u64>, word: u64) {
    // SAFETY: the callers pass a word of the mapping, aligned as such.
    unsafe { to.write_volatile(word) }
}

/// All stores before it are done before what comes after it.
#[cfg(target_arch = "x86_64")]
fn fence() {
    // SAFETY: every x86-64 processor has this instruction.
    #[allow(unused_unsafe, reason = "newer compilers know that it is safe")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fence() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Directory, Volume};
    use std::sync::Arc;

    fn file(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let none = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(file.as_file(), none, 0, len).unwrap();
        file
    }

    #[test]
    fn bytes_are_kept_at_every_offset_and_length() {
        let file = file(8 * BLOCK as u64 + 5);
        let medium = DaxMedium::open(file.path(), Access::Write).unwrap();
        assert_eq!(medium.geometry().unwrap().len, 8 * BLOCK as u64);
        let bytes: Vec<u8> = (0..3 * BLOCK).map(|i| (i * 7 / 3) as u8).collect();
        medium.write(2 * BLOCK as u64, &bytes).unwrap();
        medium.flush().unwrap();
        for from in 0..17 {
            for len in [0, 1, 7, 8, 9, 100, BLOCK] {
                let mut back = vec![0; len];
                medium.read((2 * BLOCK + from) as u64, &mut back).unwrap();
                assert_eq!(back, bytes[from..from + len], "{from} {len}");
            }
        }
        let end = medium.read(8 * BLOCK as u64 - 1, &mut [0; 2]);
        assert!(matches!(end, Err(MediumError::Short { .. })));
        let full = medium.write(7 * BLOCK as u64, &[0; 2 * BLOCK]);
        assert!(matches!(full, Err(MediumError::Full { .. })));
        assert!(medium.read(u64::MAX, &mut [0]).is_err());
        let second = DaxMedium::open(file.path(), Access::Write);
        assert!(matches!(second, Err(MediumError::Busy { .. })));
        let reader = DaxMedium::open(file.path(), Access::Read).unwrap();
        let mut back = vec![0; BLOCK];
        reader.read(3 * BLOCK as u64, &mut back).unwrap();
        assert_eq!(back, bytes[BLOCK..2 * BLOCK]);
        assert!(reader.write(0, &back).is_err() && reader.flush().is_err());
    }

    #[test]
    fn a_volume_lies_in_a_mapping() {
        let file = file(4 << 20);
        let medium = Arc::new(DaxMedium::open(file.path(), Access::Write).unwrap());
        let dir = Volume::format(medium, [2; 16], false).unwrap();
        dir.create("a").unwrap().write(0, &[9; BLOCK]).unwrap();
        dir.sync().unwrap();
        drop(dir);
        let medium = Arc::new(DaxMedium::open(file.path(), Access::Write).unwrap());
        let dir = Volume::open(medium, Access::Write).unwrap();
        let mut back = vec![0; BLOCK];
        dir.open("a", Access::Read)
            .unwrap()
            .read(0, &mut back)
            .unwrap();
        assert_eq!(back, [9; BLOCK]);
        let small = self::file(100);
        assert!(DaxMedium::open(small.path(), Access::Read).is_err());
        small.as_file().set_len(1 << 20).unwrap();
        let holes = DaxMedium::open(small.path(), Access::Write).unwrap_err();
        assert!(holes.to_string().contains("holes"), "{holes}");
    }
}
