//! [`PFile`]: an open file that a restart opens again.
//!
//! # Rules
//! - A file is known by device, inode and time of birth, and found by its absolute path. What is at the path
//!   is opened again only if it is that very file: one that was put in its place is refused, and so is one that
//!   was moved away. (Where a file system knows no time of birth, a new file with the inode of the old one
//!   cannot be told from it.)
//! - Regular files only: nothing else can be opened again without an effect of its own.
//! - Path and flags come from the heap: of the flags only those are used that are kept here, and never such
//!   as make, cut or replace a file.
//!
//! What it does not do: nothing keeps the contents as they were. Data that shall appear in a file exactly
//! once is for [`POutput`](crate::POutput).

use crate::block::Access;
use crate::error::Error;
use crate::file::FileMemory;
use crate::transaction::Tx;
use crate::vector::PVec;
use alloc::string::{String, ToString};
use resilient_heap_derive::Persist;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The flags of an open file that it is opened with again.
fn kept() -> OFlags {
    OFlags::ACCMODE
        | OFlags::APPEND
        | OFlags::NONBLOCK
        | OFlags::DSYNC
        | OFlags::SYNC
        | OFlags::DIRECT
        | OFlags::NOATIME
}

/// Which file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Persist)]
#[persist(crate)]
#[repr(C)]
struct Identity {
    device: u64,
    inode: u64,
    born: i64,
    born_nanoseconds: u64,
}

/// An open file, by its identity, with offset and flags.
#[derive(Persist)]
#[persist(crate)]
#[repr(C)]
pub struct PFile<'h> {
    path: PVec<'h, u8>,
    identity: Identity,
    offset: u64,
    flags: u64,
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

pub(crate) fn failed(path: &Path, what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::File {
        path: shown(path),
        what,
        code: errno.raw_os_error(),
    }
}

pub(crate) fn refused(path: &Path, why: &'static str) -> Error {
    Error::Replaced {
        path: shown(path),
        why,
    }
}

/// What is at a path from a folder, without following a link at its end.
fn identify(folder: impl AsFd, name: &Path, path: &Path) -> Result<Identity, Error> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = rustix::fs::statx(folder, name, flags, wanted).map_err(failed(path, "stat"))?;
    if FileType::from_raw_mode(found.stx_mode.into()) != FileType::RegularFile {
        return Err(refused(path, "it is no regular file"));
    }
    let born = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    let major = u64::from(found.stx_dev_major);
    Ok(Identity {
        device: major << 32 | u64::from(found.stx_dev_minor),
        inode: found.stx_ino,
        born: if born { found.stx_btime.tv_sec } else { 0 },
        born_nanoseconds: if born {
            found.stx_btime.tv_nsec.into()
        } else {
            0
        },
    })
}

impl Identity {
    fn of_path(path: &Path) -> Result<Self, Error> {
        identify(CWD, path, path)
    }

    fn of_file(file: impl AsFd, path: &Path) -> Result<Self, Error> {
        identify(file, Path::new(""), path)
    }

    fn expect(&self, found: Self, path: &Path) -> Result<(), Error> {
        if *self == found {
            return Ok(());
        }
        Err(refused(path, "another file is there now"))
    }
}

impl<'h> PFile<'h> {
    /// Keeps an open file, which must be what is at `path`. That it is there is made durable.
    ///
    /// # Errors
    /// [`Error::Replaced`]: it is no regular file, or another one is at the path. [`Error::File`]; those of
    /// the heap.
    pub fn new(tx: &Tx<'h>, path: impl AsRef<Path>, file: &File) -> Result<Self, Error> {
        let path = std::path::absolute(path.as_ref()).map_err(|_| {
            refused(
                path.as_ref(),
                "its path is empty, or nobody knows the working directory",
            )
        })?;
        let identity = Identity::of_file(file, &path)?;
        identity.expect(Identity::of_path(&path)?, &path)?;
        rustix::fs::fsync(file).map_err(failed(&path, "fsync"))?;
        FileMemory::sync_folder(&path)?;
        let mut bytes = PVec::new();
        bytes.extend_from_slice(tx, path.as_os_str().as_bytes())?;
        let mut kept = Self {
            path: bytes,
            identity,
            offset: 0,
            flags: 0,
        };
        kept.record(tx, file)?;
        Ok(kept)
    }

    /// Takes offset and flags from the open file.
    ///
    /// # Errors
    /// [`Error::Replaced`] if this is another file; [`Error::File`].
    pub fn record(&mut self, tx: &Tx<'h>, file: &File) -> Result<(), Error> {
        let path = self.path(tx)?;
        self.identity
            .expect(Identity::of_file(file, &path)?, &path)?;
        let flags = rustix::fs::fcntl_getfl(file).map_err(failed(&path, "fcntl"))?;
        self.offset = rustix::fs::tell(file).map_err(failed(&path, "lseek"))?;
        self.flags = (flags & kept()).bits().into();
        Ok(())
    }

    /// Where the file is.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn path(&self, access: &impl Access<'h>) -> Result<PathBuf, Error> {
        let bytes = self.path.as_slice(access)?;
        Ok(PathBuf::from(OsStr::from_bytes(bytes)))
    }

    /// The offset that was recorded.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Another offset to go on at.
    pub fn set_offset(&mut self, offset: u64) {
        self.offset = offset;
    }

    /// Opens the file again, at the offset and with the flags that were recorded.
    ///
    /// # Errors
    /// [`Error::Replaced`] if the file at the path is another one; [`Error::File`] if there is none or it
    /// cannot be opened; [`Error::Lost`].
    pub fn reopen(&self, access: &impl Access<'h>) -> Result<File, Error> {
        let path = self.path(access)?;
        // Before anything is opened: a device or a pipe in its place may not even be touched.
        self.identity.expect(Identity::of_path(&path)?, &path)?;
        let flags = OFlags::from_bits_retain(self.flags as u32) & kept();
        let more = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file: OwnedFd =
            rustix::fs::open(&path, flags | more, Mode::empty()).map_err(failed(&path, "open"))?;
        // And again, in case it was replaced meanwhile.
        self.identity
            .expect(Identity::of_file(&file, &path)?, &path)?;
        rustix::fs::fcntl_setfl(&file, flags).map_err(failed(&path, "fcntl"))?;
        rustix::fs::seek(&file, SeekFrom::Start(self.offset)).map_err(failed(&path, "lseek"))?;
        Ok(File::from(file))
    }
}
