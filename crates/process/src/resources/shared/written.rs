//! Files with a name that the program has open for writing: those that are not too large are kept in
//! the epoch, to be given the same contents again whatever has become of them since.
//!
//! # Rules
//! - A file of which all writers can only append is none of these: it is cut back (`descriptors`).
//! - It is read at the stop, when nobody of the program can be inside `write(2)`, and only where it
//!   may have changed since the stop before: what says so is its [`Stamp`]. While the program runs it
//!   is read ahead only where the epochs hold nothing of it, since a writer sets the time of a file
//!   before the first byte of a `write(2)` that may last.
//! - Each is held open, and so no more of them are kept than a quarter of what this process may open.
//! - Only files of file systems which are known to answer from this machine are read: another one may
//!   wait for somebody else, who may be stopped.

use crate::resources::descriptors::Seen;
use crate::resources::memory::modified_ns;
use outlive_state_tree::StateNode;
use rustix::process::{Resource, getrlimit};
use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

/// A file that is open for writing, whose contents the epoch holds.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,shared-written-file-v1")]
pub struct WrittenFileState {
    /// Its absolute path.
    pub path: Vec<u8>,
    /// Device number of its file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// When it was created, nanoseconds since 1970, where the file system tells.
    pub born: Option<i64>,
    /// When it was last modified, nanoseconds since 1970.
    pub modified: i64,
    /// Its mode, owner and group, with which it is made again.
    pub access: Vec<u32>,
}

impl WrittenFileState {
    /// Describes an open file with this path.
    pub(crate) fn collect(path: &[u8], file: &File) -> std::io::Result<Self> {
        let (seen, _) = Seen::of_fd(file.as_fd())?;
        let meta = file.metadata()?;
        Ok(Self {
            path: path.to_vec(),
            device: seen.device,
            inode: seen.inode,
            born: seen.born,
            modified: seen.modified,
            access: vec![meta.mode() & 0o7777, meta.uid(), meta.gid()],
        })
    }

    /// How it looked.
    pub(crate) fn seen(&self, size: u64) -> Seen {
        Seen {
            device: self.device,
            inode: self.inode,
            born: self.born,
            size,
            modified: self.modified,
        }
    }
}

/// Length and times of a file, by which it is told whether it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) size: u64,
    modified: i64,
    changed: i64,
}

impl Stamp {
    pub(super) fn of(meta: &Metadata) -> Self {
        let seconds = meta.ctime().saturating_mul(1_000_000_000);
        Self {
            size: meta.size(),
            modified: modified_ns(meta),
            changed: seconds.saturating_add(meta.ctime_nsec()),
        }
    }

    /// Whether a later change gives another stamp for certain. Since Linux 6.13 the common file
    /// systems see to that ("multigrain timestamps"), where they keep nanoseconds. Elsewhere a clock
    /// has to tick between them: once in 10 ms, in seconds where the file system keeps no more.
    pub(super) fn is_certain(&self, kept_exactly: bool, now: i64) -> bool {
        const TICK: i64 = 3_000_000_000;
        let has_fraction = |at: i64| at % 1_000_000_000 != 0;
        let exact = kept_exactly && has_fraction(self.modified) && has_fraction(self.changed);
        exact || self.modified.max(self.changed).saturating_add(TICK) < now
    }
}

/// How many are kept.
pub(super) fn most() -> usize {
    static MOST: LazyLock<usize> = LazyLock::new(|| {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        usize::try_from(limit / 4).unwrap_or(usize::MAX)
    });
    *MOST
}

/// What is known of file systems, by `f_type` of `statfs(2)`: whether one keeps exact times, where
/// the kernel does (`FS_MGTIME` in its sources).
const LOCAL: [(i64, bool); 10] = [
    (0xEF53, true),                  // ext4
    (0x5846_5342, true),             // XFS
    (0x9123_683E, true),             // Btrfs
    (0x0102_1994, true),             // tmpfs
    (0x8584_58F6, false),            // ramfs
    (0xF2F5_2010, false),            // F2FS
    (0xCA45_1A4E_u32 as i64, false), // bcachefs
    (0x2FC1_2FC1, false),            // ZFS
    (0x4D44, false),                 // FAT
    (0x794C_7630, false),            // overlayfs
];

/// Whether the file is on a file system of this machine, and then whether that keeps exact times.
pub(super) fn is_local(file: &File) -> Option<bool> {
    static EXACT: LazyLock<bool> = LazyLock::new(|| {
        let release = rustix::system::uname();
        keeps_exact_times(&release.release().to_string_lossy())
    });
    let kind = rustix::fs::fstatfs(file).ok()?.f_type;
    let known = LOCAL.iter().find(|(magic, _)| *magic == kind);
    known.map(|(_, exact)| *exact && *EXACT)
}

fn keeps_exact_times(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|n| n.parse::<u32>().ok());
    let version = (next().unwrap_or(0), next().unwrap_or(0));
    version >= (6, 13)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_certain_once_the_clock_ticked_or_the_times_are_exact() {
        let stamp = |at| Stamp {
            size: 1,
            modified: at,
            changed: at,
        };
        let second = 1_000_000_000;
        assert!(stamp(7).is_certain(true, 8));
        assert!(!stamp(7).is_certain(false, second));
        assert!(stamp(7).is_certain(false, 4 * second));
        assert!(!stamp(second).is_certain(true, 2 * second), "only seconds");
        assert!(stamp(second).is_certain(true, 5 * second));
        let mixed = Stamp {
            changed: 9 * second,
            ..stamp(7)
        };
        assert!(!mixed.is_certain(true, 10 * second));
    }

    #[test]
    fn kernels_with_exact_times() {
        for (release, exact) in [
            ("6.18.5", true),
            ("6.13.0-rc1", true),
            ("7.0", true),
            ("6.12.9-amd64", false),
            ("5.15.0", false),
            ("", false),
        ] {
            assert_eq!(keeps_exact_times(release), exact, "{release}");
        }
    }
}
