//! What the program wrote to files that it has not open any more, and names that it changed beside
//! files that it has open.
//!
//! An epoch that counts has to find the program's earlier writes again after a power cut, whoever
//! closed the files. Nobody keeps a list of them, but the kernel counts for each process, with the
//! children that it reaped, the bytes of files that it made dirty (`write_bytes` in `/proc/PID/io`).
//!
//! # Rules
//! - As long as no more became dirty since the last look than files that are known have still to
//!   bring to the medium (`cachestat`), there is nothing else. Otherwise every file system that the
//!   program could have written to is flushed as a whole (`syncfs(2)`).
//! - Counts are read before the flush and count from then on only if it succeeds; a process that
//!   cannot be asked, or that is not there any more, makes the answer *something*.
//! - A directory in which a file is open for writing is flushed when its names changed: a journal that
//!   was removed must not come back.
//!
//! # What it does not see
//! - Names that change in directories where no file is open for writing, while nothing is written.
//! - Writes that are hidden by writes of others to the same files that are known.

use crate::ProcessError;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// How far apart two changes may be to have the same time.
const COARSE: Duration = Duration::from_millis(50);

/// What is known to be durable; shared by all epochs of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Closed(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// Per process: bytes that it had made dirty, all of which are durable.
    counts: BTreeMap<u32, u64>,
    /// Counts of a look that found something, to be taken when it is flushed.
    found: Option<BTreeMap<u32, u64>>,
    /// Directories that were flushed: the time of their last change.
    directories: BTreeMap<PathBuf, SystemTime>,
}

impl Closed {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether these processes wrote more than `known` bytes since the last look, which are in
    /// files that are flushed anyway; `None` where nobody tells how many.
    pub fn look(&self, pids: impl Iterator<Item = u32>, known: Option<u64>) {
        let now: Option<BTreeMap<u32, u64>> = pids.map(|pid| Some((pid, count(pid)?))).collect();
        let mut state = self.known();
        let explained = match (&now, known) {
            (Some(now), Some(bytes)) => explained(&state.counts, now, bytes),
            _ => false,
        };
        if explained && state.found.is_none() {
            state.counts = now.unwrap_or_default();
        } else {
            state.found = Some(now.unwrap_or_default());
        }
    }

    /// Flushes all file systems of the program if the look found something.
    pub fn sync(&self, root: u32) -> Result<(), ProcessError> {
        let Some(found) = self.known().found.clone() else {
            return Ok(());
        };
        for (place, shown) in file_systems(root)? {
            rustix::fs::syncfs(&place).map_err(|errno| ProcessError::Kernel {
                pid: root,
                what: format!("flushing the file system at {shown}"),
                source: errno.into(),
            })?;
        }
        let mut state = self.known();
        state.counts = found;
        state.found = None;
        Ok(())
    }

    /// Flushes the directories of these files whose names changed since they were flushed.
    pub fn sync_names<'a>(
        &self,
        pid: u32,
        files: impl Iterator<Item = &'a OwnedFd>,
    ) -> Result<(), ProcessError> {
        let directories: BTreeSet<PathBuf> = files.filter_map(directory_of).collect();
        self.known()
            .directories
            .retain(|path, _| directories.contains(path));
        for path in directories {
            // Gone, or in another mount namespace: then nothing can be said of its names.
            let Ok(directory) = File::open(&path) else {
                continue;
            };
            let changed = directory.metadata().and_then(|found| found.modified()).ok();
            if changed.is_some() && self.known().directories.get(&path) == changed.as_ref() {
                continue;
            }
            match rustix::fs::fsync(&directory) {
                Ok(()) | Err(Errno::INVAL | Errno::ROFS) => {}
                Err(errno) => {
                    return Err(ProcessError::Kernel {
                        pid,
                        what: format!("writing back {}", path.display()),
                        source: errno.into(),
                    });
                }
            }
            // A change right after this one may have the same time.
            let settled = |time: &SystemTime| time.elapsed().is_ok_and(|age| age > COARSE);
            if let Some(changed) = changed.filter(settled) {
                self.known().directories.insert(path, changed);
            }
        }
        Ok(())
    }
}

/// Whether each of the processes was there before, or began since, and all of them together made no
/// more dirty than so many bytes.
fn explained(before: &BTreeMap<u32, u64>, now: &BTreeMap<u32, u64>, bytes: u64) -> bool {
    let gone = before.keys().any(|pid| !now.contains_key(pid));
    let grown = now.iter().map(|(pid, count)| {
        let had = before.get(pid).copied().unwrap_or(0);
        // Less than before: another process with the number of one that ended.
        count.checked_sub(had).unwrap_or(u64::MAX)
    });
    !gone && grown.fold(0, u64::saturating_add) <= bytes
}

/// Bytes of files that a process made dirty so far.
fn count(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let of = |line: &str| line.strip_prefix("write_bytes: ")?.trim().parse().ok();
    text.lines().find_map(of)
}

fn directory_of(file: &OwnedFd) -> Option<PathBuf> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    link.parent()
        .filter(|path| path.is_absolute())
        .map(Path::to_owned)
}

/// A file system of the program, and how it is called.
type FileSystem = (OwnedFd, String);

/// The file systems with a medium on which the program could have written, as far as they can be opened.
fn file_systems(root: u32) -> Result<Vec<FileSystem>, ProcessError> {
    let read = |path: &str| {
        let mut text = Vec::new();
        let read = File::open(path).and_then(|mut file| file.read_to_end(&mut text));
        read.map(|_| text).map_err(|source| ProcessError::Kernel {
            pid: root,
            what: format!("reading {path}"),
            source,
        })
    };
    // It may have ended meanwhile; what it saw is what we see, as far as anybody can tell then.
    let place =
        Some(format!("/proc/{root}")).filter(|place| Path::new(place).join("root/.").exists());
    let place = place.unwrap_or_else(|| "/proc/self".into());
    let (mounts, kinds) = (
        read(&format!("{place}/mountinfo"))?,
        read("/proc/filesystems")?,
    );
    let mut found = Vec::new();
    for mount in written(&mounts, &kinds) {
        let mut path = format!("{place}/root").into_bytes();
        path.extend_from_slice(&mount);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(place) = rustix::fs::open(OsStr::from_bytes(&path), flags, Mode::empty()) {
            found.push((place, String::from_utf8_lossy(&mount).into_owned()));
        }
    }
    Ok(found)
}

/// Where file systems with a medium are mounted for writing, each once.
fn written(mounts: &[u8], kinds: &[u8]) -> Vec<Vec<u8>> {
    let kinds = String::from_utf8_lossy(kinds);
    let with_medium: BTreeSet<&str> = kinds
        .lines()
        .filter_map(|line| line.strip_prefix('\t'))
        .chain(["overlay", "zfs", "bcachefs"])
        .collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for line in mounts.split(|byte| *byte == b'\n') {
        let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let Some(dash) = words.iter().position(|word| *word == b"-") else {
            continue;
        };
        let (Some(device), Some(place), Some(options), Some(kind)) = (
            words.get(2),
            words.get(4),
            words.get(5),
            words.get(dash + 1),
        ) else {
            continue;
        };
        let kind = String::from_utf8_lossy(kind);
        let writable = options
            .split(|byte| *byte == b',')
            .any(|option| option == b"rw");
        if writable && with_medium.contains(&*kind) && seen.insert(device.to_vec()) {
            found.push(unescaped(place));
        }
    }
    found
}

/// A path as it is, of one in which some bytes are written as `\` and three octal digits.
fn unescaped(path: &[u8]) -> Vec<u8> {
    let (mut plain, mut rest) = (Vec::with_capacity(path.len()), path);
    while let Some((&first, more)) = rest.split_first() {
        let digits = more.get(..3).filter(|_| first == b'\\');
        let number = digits.and_then(|d| std::str::from_utf8(d).ok());
        match number.and_then(|number| u8::from_str_radix(number, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &more[3..];
            }
            None => {
                plain.push(first);
                rest = more;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn file_systems_that_can_be_written_to_count_once() {
        let kinds = b"nodev\tproc\nnodev\ttmpfs\n\text4\n\txfs\nnodev\toverlay\n";
        let mounts = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/a rw\n\
            23 22 0:5 / /proc rw - proc proc rw\n\
            24 22 0:6 / /tmp rw - tmpfs tmpfs rw\n\
            25 22 8:2 / /my\\040disk rw,noatime - xfs /dev/b rw\n\
            26 22 8:1 /x /bound rw - ext4 /dev/a rw\n\
            27 22 8:3 / /seen ro - ext4 /dev/c rw\n\
            28 22 0:9 / /over rw - overlay overlay rw\n\
            nonsense\n";
        let found = written(mounts, kinds);
        assert_eq!(found, [&b"/"[..], b"/my disk", b"/over"]);
        assert_eq!(unescaped(br"a\134b\9\12"), br"a\b\9\12");
    }

    #[test]
    fn what_is_not_explained_is_something() {
        let counts = |list: &[(u32, u64)]| list.iter().copied().collect::<BTreeMap<_, _>>();
        let before = counts(&[(1, 100), (2, 0)]);
        let cases = [
            (counts(&[(1, 100), (2, 0)]), 0, true),
            (counts(&[(1, 150), (2, 50)]), 100, true),
            (counts(&[(1, 150), (2, 51)]), 100, false),
            (counts(&[(1, 100), (2, 0), (3, 7)]), 7, true),
            (counts(&[(1, 100), (2, 0), (3, 8)]), 7, false),
            (counts(&[(1, 100)]), 7, false),
            (counts(&[(1, 90), (2, 0)]), 7, false),
        ];
        for (now, bytes, wanted) in cases {
            assert_eq!(explained(&before, &now, bytes), wanted, "{now:?} {bytes}");
        }
    }

    #[test]
    fn a_file_that_is_closed_is_found_and_flushed() {
        let us = std::process::id();
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let closed = Closed::default();
        let found = || closed.known().found.is_some();
        closed.look([us].into_iter(), Some(u64::MAX / 2));
        assert!(!found());
        std::fs::write(dir.path().join("closed"), vec![7; 1 << 20]).unwrap();
        closed.look([us].into_iter(), Some(0));
        assert!(found(), "{:?}", closed.known());
        closed.look([us].into_iter(), Some(u64::MAX / 2));
        assert!(found(), "what is owed stays owed");
        closed.sync(us).unwrap();
        assert!(!found());
    }

    #[test]
    fn a_directory_is_flushed_until_its_names_have_settled() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut file = File::create(dir.path().join("a")).unwrap();
        file.write_all(b"a").unwrap();
        let file: OwnedFd = file.into();
        let closed = Closed::default();
        let sync = || {
            closed.sync_names(1, [&file].into_iter()).unwrap();
            closed.known().directories.len()
        };
        assert_eq!(sync(), 0, "it may change at the same time");
        std::thread::sleep(COARSE * 2);
        assert_eq!(sync(), 1);
        std::fs::remove_file(dir.path().join("a")).unwrap();
        assert_eq!(directory_of(&file).unwrap(), dir.path());
        closed.sync_names(1, [].into_iter()).unwrap();
        assert_eq!(closed.known().directories.len(), 0);
    }
}
