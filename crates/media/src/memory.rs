//! A medium that is memory of the kernel's (`memfd_create(2)`): it outlives the process that made it as
//! long as somebody holds its descriptor, and no power cut.
//!
//! It is as long as it was made, for ever, like a device; names in it are a
//! [`Volume`](crate::Volume)'s business.

use crate::{Access, BLOCK, FileMedium, Geometry, Medium, MediumError};
use rustix::fs::{FileType, MemfdFlags, OFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Memory as a medium.
#[derive(Debug)]
pub struct MemoryMedium {
    medium: FileMedium,
    memory: OwnedFd,
}

impl MemoryMedium {
    /// New memory of so many bytes, all zeros, in whole blocks.
    ///
    /// # Errors
    /// What `memfd_create(2)` and `ftruncate(2)` say.
    pub fn new(name: &str, len: u64) -> Result<Self, MediumError> {
        let fail = |op, e: rustix::io::Errno| MediumError::io(name, op, 0, len, e);
        let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
            .map_err(|e| fail("memfd_create", e))?;
        let len = len - len % BLOCK as u64;
        rustix::fs::ftruncate(&memory, len).map_err(|e| fail("set the length", e))?;
        Self::from_fd(name, memory, Access::Write)
    }

    /// Memory, or any other file, that somebody made before, by its descriptor. For writing, nobody
    /// else may have it so.
    ///
    /// # Errors
    /// [`MediumError::Busy`] with the holder; [`MediumError::Misuse`] where it is no file.
    pub fn from_fd(name: &str, memory: OwnedFd, access: Access) -> Result<Self, MediumError> {
        let fail = |op, e: rustix::io::Errno| MediumError::io(name, op, 0, 0, e);
        let stat = rustix::fs::fstat(&memory).map_err(|e| fail("stat", e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let (place, what) = (name.to_owned(), "it is neither memory nor a file");
            return Err(MediumError::Misuse { place, what });
        }
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
        };
        let ours = memory.try_clone();
        let ours = ours.map_err(|e| MediumError::io(name, "duplicate", 0, 0, e))?;
        let len = len - len % BLOCK as u64;
        let medium = FileMedium::of(name.to_owned(), ours, flags, access, Some(len))?;
        Ok(Self { medium, memory })
    }
}

impl AsFd for MemoryMedium {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl Medium for MemoryMedium {
    fn place(&self) -> String {
        self.medium.place()
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        self.medium.geometry()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        self.medium.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.medium.write(offset, bytes)
    }

    fn flush(&self) -> Result<(), MediumError> {
        self.medium.flush()
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        self.medium.reserve(len)
    }

    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        self.medium.truncate(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Directory, Volume};
    use std::sync::Arc;

    #[test]
    fn memory_keeps_named_media_for_whoever_has_its_descriptor() {
        let memory = MemoryMedium::new("a test", 4 << 20).unwrap();
        let held = memory.as_fd().try_clone_to_owned().unwrap();
        let dir = Volume::format(Arc::new(memory), [1; 16], false).unwrap();
        let medium = dir.create("a").unwrap();
        medium.write(0, &[5; 2 * BLOCK]).unwrap();
        dir.sync().unwrap();
        assert!(medium.reserve(5 << 20).is_err());
        drop((dir, medium));
        let memory = MemoryMedium::from_fd("the same", held, Access::Read).unwrap();
        let dir = Volume::open(Arc::new(memory), Access::Read).unwrap();
        let mut back = vec![0; 2 * BLOCK];
        let medium = dir.open("a", Access::Read).unwrap();
        medium.read(0, &mut back).unwrap();
        assert_eq!(back, [5; 2 * BLOCK]);
    }

    #[test]
    fn a_pipe_is_no_medium() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let error = MemoryMedium::from_fd("pipe", reader.into(), Access::Write).unwrap_err();
        assert!(matches!(error, MediumError::Misuse { .. }), "{error}");
    }
}
