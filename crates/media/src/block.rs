//! A medium that is a whole block device: a disk, a partition, a logical volume.
//!
//! Reads and writes go past the page cache (`O_DIRECT`), by the same thread and buffers as those of a
//! file. A flush is `fdatasync(2)`, which makes the kernel send the device its own flush; what the
//! device does with that, nobody can see from here.
//!
//! # What it refuses
//! - A device that somebody else uses (mounted, part of an array, swap): it is opened with `O_EXCL`.
//! - A device whose smallest write is larger than [`BLOCK`].
//! - To grow.

use crate::{Access, BLOCK, FileMedium, Geometry, Medium, MediumError};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// A block device as a medium.
#[derive(Debug)]
pub struct BlockMedium(FileMedium);

/// Whether a path leads to a block device.
#[must_use]
pub fn is_block_device(path: &Path) -> bool {
    rustix::fs::stat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice)
}

impl BlockMedium {
    /// Opens a device; for writing, nobody else may use it.
    ///
    /// # Errors
    /// [`MediumError::Busy`] with the holder, as far as it is known; [`MediumError::Misuse`] where
    /// it is no block device, or its blocks are too large; [`MediumError::Io`].
    pub fn open(path: &Path, access: Access) -> Result<Self, MediumError> {
        let place = path.display().to_string();
        let fail = |op, e: rustix::io::Errno| MediumError::io(&place, op, 0, 0, e);
        let misuse = |what| MediumError::Misuse {
            place: place.clone(),
            what,
        };
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR | OFlags::EXCL,
        };
        if !is_block_device(path) {
            // What is not there is said by the system, in its own words.
            rustix::fs::stat(path).map_err(|e| fail("open", e))?;
            return Err(misuse("it is no block device"));
        }
        let device = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
        let device = match device {
            Err(rustix::io::Errno::BUSY) => return Err(busy(path, &place)),
            device => device.map_err(|e| fail("open", e))?,
        };
        let (len, unit) = measure(device.as_fd()).map_err(|e| fail("ask for the size of", e))?;
        if unit as usize > BLOCK || !BLOCK.is_multiple_of(unit.max(1) as usize) {
            return Err(misuse("its smallest write is larger than 4096 bytes"));
        }
        let len = len - len % BLOCK as u64;
        FileMedium::of(place, device, flags, access, Some(len)).map(Self)
    }
}

/// Bytes of a device, and of its smallest write.
fn measure(device: BorrowedFd<'_>) -> rustix::io::Result<(u64, u32)> {
    let len = rustix::fs::seek(device, SeekFrom::End(0))?;
    rustix::fs::seek(device, SeekFrom::Start(0))?;
    Ok((len, rustix::fs::ioctl_blksszget(device)?))
}

/// Another writer of ours is named; a file system is not.
fn busy(path: &Path, place: &str) -> MediumError {
    let mut holder = "the system (is it mounted?)".to_owned();
    if let Ok(device) = std::fs::File::open(path)
        && let Err(MediumError::Busy { holder: named, .. }) =
            crate::lock::exclusive(place, device.as_fd())
    {
        holder = named;
    }
    let place = place.to_owned();
    MediumError::Busy { place, holder }
}

impl Medium for BlockMedium {
    fn place(&self) -> String {
        self.0.place()
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        self.0.geometry()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        self.0.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.0.write(offset, bytes)
    }

    fn flush(&self) -> Result<(), MediumError> {
        self.0.flush()
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        self.0.reserve(len)
    }

    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        self.0.truncate(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = BlockMedium::open(file.path(), Access::Write).unwrap_err();
        assert!(error.to_string().contains("no block device"), "{error}");
        let missing = BlockMedium::open(Path::new("/nonexistent"), Access::Read).unwrap_err();
        assert!(missing.is_not_found(), "{missing}");
    }
}
