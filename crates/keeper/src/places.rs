//! What a subject has elsewhere: per place, the hash of what was pushed there or pulled from there.
//!
//! # Rules
//! - A hash is written down before what it names can appear at the place, so that after a crash
//!   between the two it is known again. So there may be one that never appeared.
//! - One command at a time: the file `elsewhere.lock` of the subject is locked. A keeper may run
//!   meanwhile; it does not touch these files.

use crate::KeeperError;
use crate::subject::Subject;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Largest file that is read, bytes.
const LARGEST: u64 = 1 << 20;

/// The record of one subject, for one command.
#[derive(Debug)]
pub struct Places {
    path: PathBuf,
    record: Record,
    _lock: OwnedFd,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    version: u32,
    places: BTreeMap<String, Vec<String>>,
}

impl Places {
    /// Opens the record of a subject.
    ///
    /// # Errors
    /// Refused, where another command has it open; what the operating system says.
    pub fn open(subject: &Subject) -> Result<Self, KeeperError> {
        Self::open_in(subject.dir(), subject.name())
    }

    /// Opens the record in a directory that belongs, or will belong, to the subject of that name.
    ///
    /// # Errors
    /// As for [`Places::open`].
    pub fn open_in(dir: &Path, name: &str) -> Result<Self, KeeperError> {
        let lock = dir.join("elsewhere.lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&lock, flags, Mode::RUSR | Mode::WUSR)
            .map_err(KeeperError::io(format!("open {}", lock.display())))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            KeeperError::Refused(format!(
                "another command is pushing {name}: wait until it is done"
            ))
        })?;
        let path = dir.join("elsewhere.json");
        let mut record = Record {
            version: 1,
            ..Record::default()
        };
        let mut text = Vec::new();
        match File::open(&path).map(|file| file.take(LARGEST).read_to_end(&mut text)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Ok(Ok(_)) => {
                record = serde_json::from_slice(&text).map_err(|error| {
                    let place = path.display();
                    KeeperError::Other(format!("{place} does not make sense: {error}"))
                })?;
            }
            Err(error) | Ok(Err(error)) => {
                return Err(KeeperError::io(format!("read {}", path.display()))(error));
            }
        }
        if record.version > 1 {
            return Err(KeeperError::Refused(format!(
                "{} has version {}; this outlive reads up to 1: use a newer one",
                path.display(),
                record.version
            )));
        }
        Ok(Self {
            path,
            record,
            _lock: file,
        })
    }

    /// The hashes that are known of a place.
    #[must_use]
    pub fn known(&self, place: &str) -> Vec<String> {
        self.record.places.get(place).cloned().unwrap_or_default()
    }

    /// Writes down, durably, that this hash may be at the place from now on, and that what it comes
    /// after is there.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn note(
        &mut self,
        place: &str,
        before: Option<&str>,
        hash: &str,
    ) -> Result<(), KeeperError> {
        let hashes = before.into_iter().chain([hash]).map(str::to_owned);
        let places = &mut self.record.places;
        places.insert(place.to_owned(), hashes.collect());
        self.write()
    }

    /// Writes down, durably, that of all hashes this one is at the place.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn settle(&mut self, place: &str, hash: &str) -> Result<(), KeeperError> {
        let places = &mut self.record.places;
        places.insert(place.to_owned(), vec![hash.to_owned()]);
        self.write()
    }

    fn write(&self) -> Result<(), KeeperError> {
        let new = self.path.with_extension("json.new");
        let write = || -> std::io::Result<()> {
            let text = serde_json::to_vec_pretty(&self.record)?;
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &self.path)?;
            let dir = self.path.parent().unwrap_or(Path::new("."));
            File::open(dir)?.sync_all()
        };
        write().map_err(KeeperError::io(format!("write {}", self.path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_there_is_known_again_and_what_is_there_replaces_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Places::open_in(dir.path(), "a");
        let mut places = open().unwrap();
        assert_eq!(open().unwrap_err().exit_code(), 3);
        places.settle("x", "1").unwrap();
        places.note("x", Some("1"), "2").unwrap();
        drop(places);
        let mut places = open().unwrap();
        assert_eq!(places.known("x"), ["1", "2"]);
        assert!(places.known("y").is_empty());
        places.note("x", Some("1"), "3").unwrap();
        assert_eq!(places.known("x"), ["1", "3"], "2 never appeared");
        places.note("y", None, "4").unwrap();
        assert_eq!(places.known("y"), ["4"]);
        places.settle("x", "3").unwrap();
        drop(places);
        assert_eq!(open().unwrap().known("x"), ["3"]);
        std::fs::write(
            dir.path().join("elsewhere.json"),
            "{\"version\":9,\"places\":{}}",
        )
        .unwrap();
        assert_eq!(open().unwrap_err().exit_code(), 3);
        std::fs::write(dir.path().join("elsewhere.json"), "rubbish").unwrap();
        assert!(open().unwrap_err().to_string().contains("elsewhere.json"));
    }
}
