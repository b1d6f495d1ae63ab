//! Files without a name: memory files (`memfd_create`), and files that were deleted while they were
//! open or mapped.
//!
//! A deleted file is made again in the directory where it was, under its old name if that is free,
//! and deleted again at once.
//!
//! # What it refuses
//! Those on huge pages, deleted files of more than [`MAX_FILE`](super::MAX_FILE) bytes, deleted
//! files that have another name left, and those whose directory is gone or is another one.
//!
//! # What is lost
//! The time of the last change, and extended attributes.

use super::{Writing, failed, reopen};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::fs::{
    Gid, MemfdFlags, Mode, OFlags, SealFlags, Uid, fchmod, fchown, fcntl_add_seals,
    fcntl_get_seals, memfd_create,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How the link of a memory file begins.
pub const MEMFD: &[u8] = b"/memfd:";
/// How the link of a file without a name ends.
pub const DELETED: &[u8] = b" (deleted)";
/// The longest name of a memory file, bytes.
const LONGEST_NAME: usize = 249;
/// Blocks of at least so many bytes are huge pages.
const HUGE: u64 = 1 << 21;

/// A memory file.
#[derive(StateNode, Debug, Clone, PartialEq, Eq)]
#[state(compatible = "outlive,shared-memfd-v1")]
pub struct MemfdState {
    /// Its name, which is for people only.
    pub title: Vec<u8>,
    /// Its mode, owner and group.
    pub access: Vec<u32>,
    /// Its seals (`F_SEAL_…`).
    pub seals: u32,
}

/// A deleted file.
#[derive(StateNode, Debug, Clone, PartialEq, Eq)]
#[state(compatible = "outlive,shared-deleted-v1")]
pub struct DeletedState {
    /// The path under which it was known.
    pub path: Vec<u8>,
    /// Its mode, owner and group.
    pub access: Vec<u32>,
}

fn access(meta: &Metadata) -> Vec<u32> {
    vec![meta.mode() & 0o7777, meta.uid(), meta.gid()]
}

fn set_access(file: &OwnedFd, access: &[u32]) -> Result<(), Errno> {
    if let [mode, owner, group] = *access {
        // Without the right to give files away it stays ours.
        let _ = fchown(file, Some(Uid::from_raw(owner)), Some(Gid::from_raw(group)));
        fchmod(file, Mode::from_raw_mode(mode & 0o7777))?;
    }
    Ok(())
}

/// Why a file without a name cannot be saved.
pub fn judge(name: &[u8], meta: &Metadata) -> Result<(), &'static str> {
    if !meta.is_file() || meta.blksize() >= HUGE {
        return Err("memory of a special kind");
    }
    if name.starts_with(MEMFD) || name.starts_with(b"/SYSV") {
        return Ok(());
    }
    if meta.nlink() != 0 {
        return Err("a deleted file that has another name left");
    }
    if meta.size() > super::MAX_FILE {
        return Err("a deleted file of more than 256 MiB");
    }
    let directory = path_of(name).parent().map(std::fs::metadata);
    match directory {
        Some(Ok(directory)) if directory.dev() == meta.dev() => Ok(()),
        _ => Err("a deleted file whose directory is gone"),
    }
}

fn path_of(name: &[u8]) -> &Path {
    let path = name.strip_suffix(DELETED).unwrap_or(name);
    Path::new(OsStr::from_bytes(path))
}

impl MemfdState {
    /// Describes a memory file.
    pub fn collect(name: &[u8], file: &File) -> std::io::Result<Self> {
        let title = name.strip_prefix(MEMFD).unwrap_or(name);
        Ok(Self {
            title: title.strip_suffix(DELETED).unwrap_or(title).to_vec(),
            access: access(&file.metadata()?),
            seals: fcntl_get_seals(file)?.bits(),
        })
    }

    /// What its seals say of writing.
    #[must_use]
    pub fn writing(&self) -> Writing {
        let seals = SealFlags::from_bits_retain(self.seals);
        if seals.contains(SealFlags::WRITE) {
            Writing::Forbidden
        } else if seals.contains(SealFlags::FUTURE_WRITE) {
            Writing::OldMappings
        } else {
            Writing::Free
        }
    }

    /// Makes it, empty and not sealed yet.
    pub fn recreate(&self) -> Result<OwnedFd, ProcessError> {
        if self.title.len() > LONGEST_NAME || self.title.contains(&0) {
            let what = "a memory file has an impossible name";
            return Err(ProcessError::Image(what.into()));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create(&self.title[..], flags).map_err(|e| failed("making a memfd", e))?;
        set_access(&file, &self.access).map_err(|e| failed("setting the mode of a memfd", e))?;
        Ok(file)
    }

    /// Seals it as it was.
    pub fn seal(&self, file: &File) -> Result<(), ProcessError> {
        let seals = SealFlags::from_bits_retain(self.seals);
        if seals.is_empty() {
            return Ok(());
        }
        fcntl_add_seals(file, seals).map_err(|e| failed("sealing a memfd", e))
    }
}

impl DeletedState {
    /// Describes a deleted file.
    pub fn collect(name: &[u8], file: &File) -> std::io::Result<Self> {
        Ok(Self {
            path: path_of(name).as_os_str().as_bytes().to_vec(),
            access: access(&file.metadata()?),
        })
    }

    /// Its name, for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        format!("the deleted file {}", String::from_utf8_lossy(&self.path))
    }

    /// Makes it again, empty and deleted.
    pub fn recreate(&self) -> Result<OwnedFd, Errno> {
        let path = Path::new(OsStr::from_bytes(&self.path));
        if !path.is_absolute() || self.path.contains(&0) {
            return Err(Errno::INVAL);
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = match rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Ok(file) => {
                rustix::fs::unlink(path)?;
                file
            }
            // Somebody has the name now: it does without.
            Err(Errno::EXIST | Errno::ISDIR) => {
                let directory = path.parent().ok_or(Errno::INVAL)?;
                rustix::fs::open(directory, flags | OFlags::TMPFILE, mode)?
            }
            Err(e) => return Err(e),
        };
        set_access(&file, &self.access)?;
        // The mode may forbid even its owner to open it.
        drop(reopen(&file, OFlags::RDONLY)?);
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    fn link(fd: &impl AsRawFd) -> Vec<u8> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        link.unwrap().as_os_str().as_bytes().to_vec()
    }

    #[test]
    fn a_deleted_file_is_deleted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let file = File::create_new(&path).unwrap();
        assert!(judge(&link(&file), &file.metadata().unwrap()).is_err());
        std::fs::remove_file(&path).unwrap();
        let name = link(&file);
        judge(&name, &file.metadata().unwrap()).unwrap();
        let state = DeletedState::collect(&name, &file).unwrap();
        let again = File::from(state.recreate().unwrap());
        assert_eq!(link(&again), name);
        assert_eq!(
            again.metadata().unwrap().mode(),
            file.metadata().unwrap().mode()
        );
        // The name is somebody else's now.
        File::create_new(&path).unwrap().write_all(b"mine").unwrap();
        let other = File::from(state.recreate().unwrap());
        assert_eq!(other.metadata().unwrap().nlink(), 0);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        drop(dir);
        assert!(state.recreate().is_err());
        assert!(judge(&name, &file.metadata().unwrap()).is_err());
    }

    #[test]
    fn hostile_names_are_refused() {
        for title in [vec![b'x'; LONGEST_NAME + 1], b"a\0b".to_vec()] {
            let state = MemfdState {
                title,
                access: vec![],
                seals: 0,
            };
            assert!(matches!(state.recreate(), Err(ProcessError::Image(_))));
        }
        for path in [&b"relative"[..], b"/tmp/a\0b", b""] {
            let state = DeletedState {
                path: path.to_vec(),
                access: vec![],
            };
            assert!(state.recreate().is_err());
        }
    }
}
