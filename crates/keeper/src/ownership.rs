//! Whose image it is: only images of one's own are restored.
//!
//! A restored program runs with the rights of whoever restores it, and its image decides what it
//! does; so an image of somebody else would be that somebody with our rights.
//!
//! # Rules
//! - The directory and every file in it belong to the effective user, and nobody else may write in
//!   the directory. Others may read: that is the business of the image's owner.
//! - What was checked is what is read: the directory is held by a descriptor from the check on,
//!   and who may not write in it cannot replace its files.

use crate::KeeperError;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Bits of a mode that let the group or others write.
const WRITABLE: u32 = 0o022;

/// A directory that belongs to the effective user, and nobody else's files in it.
#[derive(Debug)]
pub struct Own {
    fd: OwnedFd,
}

impl Own {
    /// Checks a directory with its files; `None` where there is no directory.
    ///
    /// # Errors
    /// Refused, with the remedy, where something belongs to somebody else or the directory can be
    /// written by others.
    pub fn check(dir: &Path) -> Result<Option<Self>, KeeperError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(dir, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => other.map_err(KeeperError::io(format!("open {}", dir.display())))?,
        };
        let fail = |e: Errno| KeeperError::io(format!("look at {}", dir.display()))(e);
        let own = Self { fd };
        let stat = rustix::fs::fstat(&own.fd).map_err(fail)?;
        belongs(dir, dir, &stat)?;
        if stat.st_mode & WRITABLE != 0 {
            return Err(KeeperError::Refused(format!(
                "{place} can be written by others (mode {:o}), so what it holds may be theirs; \
                 if you trust it: chmod go-w {place}",
                stat.st_mode & 0o7777,
                place = dir.display(),
            )));
        }
        own.check_files(dir)?;
        Ok(Some(own))
    }

    fn check_files(&self, dir: &Path) -> Result<(), KeeperError> {
        let place = || format!("read {}", dir.display());
        for entry in fs::read_dir(self.path()).map_err(KeeperError::io(place()))? {
            let name = entry.map_err(KeeperError::io(place()))?.file_name();
            let path = dir.join(&name);
            let Ok(name) = CString::new(std::os::unix::ffi::OsStringExt::into_vec(name)) else {
                continue;
            };
            match rustix::fs::statat(&self.fd, &name, AtFlags::SYMLINK_NOFOLLOW) {
                // A keeper that is writing replaces its files.
                Err(Errno::NOENT) => {}
                Err(error) => {
                    return Err(KeeperError::io(format!("look at {}", path.display()))(
                        error,
                    ));
                }
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {}
                Ok(stat) => belongs(&path, dir, &stat)?,
            }
        }
        Ok(())
    }

    /// A path to the directory that leads to the one that was checked, whatever its name leads to
    /// meanwhile.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }
}

fn belongs(path: &Path, dir: &Path, stat: &Stat) -> Result<(), KeeperError> {
    let me = rustix::process::geteuid().as_raw();
    let owner = stat.st_uid;
    if owner == me {
        return Ok(());
    }
    Err(KeeperError::Refused(format!(
        "{} belongs to uid {owner}, and you are uid {me}: an image decides what the restored \
         program does with your rights. Restore it as uid {owner}; or, if you trust it, make it \
         yours: chown -R {me} {}",
        path.display(),
        dir.display(),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn directories_of_ones_own_pass_unless_others_may_write_in_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("epochs.1"), b"x").unwrap();
        for good in [0o700, 0o755, 0o500] {
            mode(dir.path(), good);
            let own = Own::check(dir.path()).unwrap().unwrap();
            assert!(own.path().join("epochs.1").exists());
        }
        for bad in [0o770, 0o757, 0o722] {
            mode(dir.path(), bad);
            let error = Own::check(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains("chmod go-w"), "{error}");
        }
        mode(dir.path(), 0o700);
        assert!(Own::check(&dir.path().join("none")).unwrap().is_none());
        assert!(Own::check(&dir.path().join("epochs.1")).unwrap().is_none());
    }

    #[test]
    fn what_belongs_to_another_is_refused_with_the_remedy() {
        let me = rustix::process::geteuid().as_raw();
        let mut stat = rustix::fs::stat("/").unwrap();
        stat.st_uid = me.wrapping_add(1);
        let error = belongs(Path::new("/i/epochs.1"), Path::new("/i"), &stat).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        let remedy = format!("chown -R {me} /i");
        assert!(error.to_string().contains(&remedy), "{error}");
        assert!(error.to_string().starts_with("/i/epochs.1 "), "{error}");
    }
}
