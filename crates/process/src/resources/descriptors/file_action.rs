//! Giving a file its size and its time of the epoch again: the only changes that a restore makes to
//! a file which existed before.
//!
//! # Rules
//! - A tail goes to a new file, never into one that is there: restoring an epoch twice keeps both.
//!
//! # Order
//! What is cut off is copied to `PATH.outlive-cut.EPOCH` and made durable first, then the file is
//! truncated, then its time is set, then the copy gets its name, `PATH.outlive-tail.EPOCH`. A crash
//! at any point leaves either the grown file (and perhaps a copy of its tail), or the cut file beside
//! the copy, whose first name tells the next restore that the cut was ours.

use super::file::look_up;
use super::probe::{failed, show};
use crate::ProcessError;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT, renameat_with};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};

/// What must be done to one file.
#[derive(Debug)]
pub struct FileAction {
    /// Its path.
    pub path: Vec<u8>,
    /// The file, for reading and writing.
    pub file: OwnedFd,
    /// Its size at the epoch.
    pub size: u64,
    /// By how many bytes it is longer now; 0 where only its time is another one.
    pub grown_by: u64,
    /// When it was last modified before the epoch, nanoseconds since 1970.
    pub modified: i64,
    /// The epoch.
    pub epoch: u64,
}

/// Where the cut-off tail of a file goes.
fn tail_name(path: &[u8], epoch: u64) -> Vec<u8> {
    [path, format!(".outlive-tail.{epoch}").as_bytes()].concat()
}

/// Where it is until the cut is complete.
pub(crate) fn cut_name(path: &[u8], epoch: u64) -> Vec<u8> {
    [path, format!(".outlive-cut.{epoch}").as_bytes()].concat()
}

impl FileAction {
    /// Does it, and says what was done.
    pub(crate) fn apply(&self, pid: u32) -> Result<String, ProcessError> {
        let path = show(&self.path);
        let wrap = |what: &str| {
            let what = format!("{what} {path}");
            move |errno| failed(pid, what, errno)
        };
        let cut = cut_name(&self.path, self.epoch);
        let tail = tail_name(&self.path, self.epoch);
        if self.grown_by > 0 {
            // Of a cut that was interrupted, after which the file grew again.
            set_aside(&cut, &tail).map_err(wrap("keep the tail of"))?;
            self.copy_tail(&cut).map_err(wrap("keep the tail of"))?;
            rustix::fs::ftruncate(&self.file, self.size).map_err(wrap("truncate"))?;
        }
        set_time(&self.file, self.modified).map_err(wrap("set the time of"))?;
        let tail = set_aside(&cut, &tail).map_err(wrap("keep the tail of"))?;
        Ok(match (tail, self.grown_by) {
            (Some(tail), 1..) => format!(
                "{path} had grown by {} bytes since the epoch: cut back, the tail is in {}",
                self.grown_by,
                show(&tail)
            ),
            (Some(tail), 0) => format!(
                "{path} had been cut back by a restore that was interrupted: its tail is in {}",
                show(&tail)
            ),
            (None, _) => format!(
                "{path} has its contents of the epoch and had a later time of modification: set back"
            ),
        })
    }

    /// Copies what is cut off to a new file with this name.
    fn copy_tail(&self, name: &[u8]) -> Result<(), Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let out = rustix::fs::open(name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = self.size;
        loop {
            match rustix::io::pread(&self.file, &mut buffer, at) {
                Ok(0) => break,
                Ok(n) => {
                    let mut rest = &buffer[..n];
                    while !rest.is_empty() {
                        match rustix::io::write(&out, rest) {
                            Ok(written) => rest = &rest[written..],
                            Err(Errno::INTR) => {}
                            Err(errno) => return Err(errno),
                        }
                    }
                    at += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        rustix::fs::fsync(&out)?;
        sync_directory_of(name)
    }
}

/// Sets the time of the last change, nanoseconds since 1970, and makes the file durable.
pub(crate) fn set_time(file: impl AsFd, modified: i64) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: modified.div_euclid(1_000_000_000),
            tv_nsec: modified.rem_euclid(1_000_000_000),
        },
    };
    rustix::fs::futimens(&file, &times)?;
    rustix::fs::fsync(&file)
}

/// How many files of one name may lie side by side.
const ASIDE: u32 = 10_000;

/// Gives a file another name, or that name and a number where that is taken; returns which. `None`
/// where there is no such file.
pub(crate) fn set_aside(from: &[u8], to: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    let mut candidate = to.to_vec();
    for number in 1..ASIDE {
        match rename_new(from, &candidate) {
            Ok(()) => {
                sync_directory_of(&candidate)?;
                return Ok(Some(candidate));
            }
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        candidate = [to, format!(".{number}").as_bytes()].concat();
    }
    Err(Errno::EXIST)
}

/// Renames without replacing anything.
pub(crate) fn rename_new(from: &[u8], to: &[u8]) -> Result<(), Errno> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that cannot promise it.
        Err(Errno::INVAL | Errno::NOSYS) => match look_up(to) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => rustix::fs::rename(from, to),
            Err(errno) => Err(errno),
        },
        done => done,
    }
}

pub(crate) fn sync_directory_of(path: &[u8]) -> Result<(), Errno> {
    let end = path.iter().rposition(|&b| b == b'/').unwrap_or(0);
    let directory = if end == 0 { b"/" } else { &path[..end] };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    match rustix::fs::fsync(&directory) {
        Err(Errno::INVAL) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn the_tail_is_kept_aside_and_the_time_set_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, b"before|after").unwrap();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let action = FileAction {
            path: path.as_os_str().as_encoded_bytes().to_vec(),
            file: file.into(),
            size: 7,
            grown_by: 5,
            modified: 1_700_000_000_123_456_789,
            epoch: 4,
        };
        let said = action.apply(1).unwrap();
        assert!(
            said.contains("5 bytes") && said.contains("log.outlive-tail.4"),
            "{said}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"before|");
        let stat = std::fs::metadata(&path).unwrap();
        assert_eq!(
            (stat.mtime(), stat.mtime_nsec()),
            (1_700_000_000, 123_456_789)
        );
        let tail = dir.path().join("log.outlive-tail.4");
        assert_eq!(std::fs::read(&tail).unwrap(), b"after");
        assert_eq!(
            std::fs::metadata(&tail).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_cut_that_was_interrupted_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, b"before|").unwrap();
        std::fs::write(dir.path().join("log.outlive-cut.4"), b"after").unwrap();
        let open = || {
            std::fs::OpenOptions::new()
                .write(true)
                .read(true)
                .open(&path)
        };
        let mut action = FileAction {
            path: path.as_os_str().as_encoded_bytes().to_vec(),
            file: open().unwrap().into(),
            size: 7,
            grown_by: 0,
            modified: 0,
            epoch: 4,
        };
        let tail = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        assert!(action.apply(1).unwrap().contains("log.outlive-tail.4"));
        assert_eq!(tail("log.outlive-tail.4"), b"after");
        std::fs::rename(
            dir.path().join("log.outlive-tail.4"),
            dir.path().join("log.outlive-cut.4"),
        )
        .unwrap();
        std::fs::write(&path, b"before|again").unwrap();
        action.grown_by = 5;
        assert!(action.apply(1).unwrap().contains("log.outlive-tail.4.1"));
        assert_eq!(tail("log.outlive-tail.4"), b"after");
        assert_eq!(tail("log.outlive-tail.4.1"), b"again");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_tail_never_goes_into_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("log"), dir.path().join("victim"));
        std::fs::write(&path, b"before|after").unwrap();
        std::fs::write(&victim, b"untouched").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("log.outlive-tail.4")).unwrap();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let action = FileAction {
            path: path.as_os_str().as_encoded_bytes().to_vec(),
            file: file.into(),
            size: 7,
            grown_by: 5,
            modified: 0,
            epoch: 4,
        };
        assert!(action.apply(1).unwrap().contains("log.outlive-tail.4.1"));
        assert_eq!(std::fs::read(&victim).unwrap(), b"untouched");
        let tail = dir.path().join("log.outlive-tail.4.1");
        assert_eq!(std::fs::read(tail).unwrap(), b"after");
    }
}
