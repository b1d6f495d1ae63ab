//! Measuring the medium of a store, and the file in which the figures are kept.
//!
//! # Rules
//! - A measurement takes at most [`LONGEST`]: small writes to space that was written before, each
//!   with its flush; and large ones. It works in a file of its own in the store's directory, which is
//!   removed again.
//! - The figures are kept in `medium.json` in the store's root (0600). What is read from it is only
//!   believed within bounds; figures that are older than a day, or of another boot, count as none.

use super::model::{Figures, MIB, Model};
use crate::KeeperError;
use crate::keep::now_ns;
use crate::procfs;
use outlive_linux::thread::Urgent;
use outlive_media::{BLOCK, FileMedium, Medium, MediumError};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest time that a measurement takes.
pub const LONGEST: Duration = Duration::from_millis(900);
/// Small writes with a flush, at most.
const FLUSHES: u64 = 400;
/// Bytes of a large write.
const LARGE: u64 = 16 * MIB;
/// Large writes, at most.
const LARGES: u64 = 6;
/// Copying a MiB out of a program, nanoseconds: what a measurement of the medium cannot tell.
const COPY: u64 = 300_000;
/// Samples of each sort that are believed in a file.
const MOST: usize = 4096;
/// How long figures of an earlier keeper are believed, nanoseconds.
const FRESH: u64 = 86_400_000_000_000;
/// Bytes of the file that are read.
const LARGEST: u64 = 1 << 20;
/// The version of the file.
const VERSION: u32 = 1;
const NAME: &str = "medium.json";

/// What was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Format of the file.
    pub version: u32,
    /// When, nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// During which boot.
    pub boot: String,
    /// Small writes with their flush, nanoseconds.
    pub flush_ns: Vec<u64>,
    /// Copying and writing of a MiB, nanoseconds.
    pub mib_ns: Vec<u64>,
}

impl Measured {
    fn now(flush_ns: Vec<u64>, mib_ns: Vec<u64>) -> Self {
        Self {
            version: VERSION,
            at_ns: now_ns(),
            boot: procfs::boot_id(),
            flush_ns,
            mib_ns,
        }
    }

    /// What a model learned of the medium.
    #[must_use]
    pub fn of(model: &Model) -> Self {
        let (flush_ns, mib_ns) = model.medium();
        Self::now(flush_ns, mib_ns)
    }

    /// A model that knows this medium, and assumes the rest for a program with so many resident
    /// pages.
    #[must_use]
    pub fn model(&self, resident_pages: u64) -> Model {
        let mut model = Model::new(assumed(resident_pages));
        model.calibrate(&self.flush_ns, &self.mib_ns);
        model
    }
}

/// What is assumed of a program that was never stopped.
fn assumed(resident_pages: u64) -> Figures {
    Figures {
        scan_ns: 1_000_000 + resident_pages.saturating_mul(2),
        ..Figures::default()
    }
}

/// Measures the medium below `dir`, which is made where it is missing, and keeps the figures there.
///
/// # Errors
/// What the medium says.
pub fn measure(dir: &Path) -> Result<Measured, KeeperError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(KeeperError::io(format!("create {}", dir.display())))?;
    let path = dir.join(format!(".measuring-{}", std::process::id()));
    let _ = fs::remove_file(&path);
    let measured = measure_in(&path);
    let _ = fs::remove_file(&path);
    let wrap = |e: MediumError| KeeperError::Other(format!("the medium cannot be measured: {e}"));
    let measured = measured.map_err(wrap)?;
    save(dir, &measured)?;
    Ok(measured)
}

fn measure_in(path: &Path) -> Result<Measured, MediumError> {
    // As commits are made.
    let _urgent = Urgent::begin();
    let began = Instant::now();
    let ns = |since: Instant| u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let medium = FileMedium::create(path)?;
    medium.reserve(LARGE)?;
    let bytes = vec![0x5a; usize::try_from(LARGE).unwrap_or(BLOCK)];
    let (mut flush_ns, mut mib_ns) = (Vec::new(), Vec::new());
    // The first time initialises the space and the buffers, and counts for nothing.
    for n in 0..LARGES {
        let start = Instant::now();
        medium.write(0, &bytes)?;
        medium.flush()?;
        if n > 0 {
            mib_ns.push(ns(start) / (LARGE / MIB) + COPY);
        }
        if n > 0 && began.elapsed() > LONGEST / 2 {
            break;
        }
    }
    for n in 0..FLUSHES {
        let start = Instant::now();
        medium.write(n * BLOCK as u64, &bytes[..BLOCK])?;
        medium.flush()?;
        flush_ns.push(ns(start));
        if began.elapsed() > LONGEST {
            break;
        }
    }
    Ok(Measured::now(flush_ns, mib_ns))
}

/// Keeps figures in the store's root.
///
/// # Errors
/// What the operating system says.
pub fn save(dir: &Path, measured: &Measured) -> Result<(), KeeperError> {
    let (path, new) = (
        dir.join(NAME),
        dir.join(format!(".{NAME}-{}", std::process::id())),
    );
    let wrap = |e: std::io::Error| KeeperError::io(format!("write {}", new.display()))(e);
    let text = serde_json::to_vec(measured).map_err(|e| wrap(e.into()))?;
    let _ = fs::remove_file(&new);
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|error| {
            let _ = fs::remove_file(&new);
            wrap(error)
        })
}

/// The figures that an earlier measurement, or keeper, left.
#[must_use]
pub fn load(dir: &Path) -> Option<Measured> {
    let mut text = Vec::new();
    let file = fs::File::open(dir.join(NAME)).ok()?;
    file.take(LARGEST).read_to_end(&mut text).ok()?;
    let found: Measured = serde_json::from_slice(&text).ok()?;
    let known = found.version == VERSION && found.boot == procfs::boot_id();
    let fresh = now_ns()
        .checked_sub(found.at_ns)
        .is_some_and(|age| age < FRESH);
    let sane = |list: &[u64]| !list.is_empty() && list.len() <= MOST;
    (known && fresh && sane(&found.flush_ns) && sane(&found.mib_ns)).then_some(found)
}

/// Measures, and adds what was known before.
///
/// # Errors
/// As [`measure`].
pub fn refresh(dir: &Path) -> Result<Measured, KeeperError> {
    let before = load(dir);
    let mut measured = measure(dir)?;
    if let Some(before) = before {
        measured.flush_ns.extend(before.flush_ns);
        measured.mib_ns.extend(before.mib_ns);
        measured.flush_ns.truncate(MOST);
        measured.mib_ns.truncate(MOST);
        save(dir, &measured)?;
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_medium_is_measured_within_its_time_and_nothing_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("store");
        let measured = measure(&dir).unwrap();
        assert!(!measured.flush_ns.is_empty() && !measured.mib_ns.is_empty());
        assert!(measured.flush_ns.iter().all(|ns| *ns > 0));
        assert_eq!(load(&dir), Some(measured.clone()));
        let names: Vec<_> = fs::read_dir(&dir).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        let figures = measured.model(0).figures();
        assert!(figures.flush_ns >= *measured.flush_ns.iter().min().unwrap());
        assert!(figures.floor() < u64::MAX);
        let again = refresh(&dir).unwrap();
        assert!(again.flush_ns.len() > measured.flush_ns.len());
    }

    #[test]
    fn rubbish_and_old_figures_count_as_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()), None);
        let good = Measured::now(vec![1], vec![2]);
        save(dir.path(), &good).unwrap();
        assert_eq!(load(dir.path()), Some(good.clone()));
        for bad in [
            Measured {
                version: 2,
                ..good.clone()
            },
            Measured {
                boot: "another".into(),
                ..good.clone()
            },
            Measured {
                at_ns: 0,
                ..good.clone()
            },
            Measured {
                at_ns: u64::MAX,
                ..good.clone()
            },
            Measured {
                flush_ns: vec![],
                ..good.clone()
            },
            Measured {
                mib_ns: vec![7; MOST + 1],
                ..good
            },
        ] {
            save(dir.path(), &bad).unwrap();
            assert_eq!(load(dir.path()), None, "{bad:?}");
        }
        fs::write(dir.path().join(NAME), "{\"version\":").unwrap();
        assert_eq!(load(dir.path()), None);
    }
}
