//! Where epochs are pushed to: a place of named objects that appear whole or not at all.
//!
//! # Rules
//! - An object never changes: its name holds the hash of its contents. So two hosts that write the
//!   same name write the same bytes, and no host can take anything from another, whether or not the
//!   place knows conditional writes (there are some which accept `If-None-Match` and ignore it).
//! - What is read has a bound, and is compared with the hash in its name by whoever reads it.

use outlive_epoch::StoreError;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A place of objects, which is asked for several of them at once.
pub trait Shelf: Sync {
    /// What errors call it.
    fn place(&self) -> String;

    /// Length of an object; `None` where there is none of that name.
    ///
    /// # Errors
    /// What the place says.
    fn len(&self, name: &str) -> Result<Option<u64>, StoreError>;

    /// Reads an object of at most so many bytes; `None` where there is none of that name.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] for a longer one; what the place says.
    fn get(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// Makes an object, durably and all at once.
    ///
    /// # Errors
    /// What the place says; there is no object then, or a whole one.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError>;

    /// The last parts of the names of all objects below a name.
    ///
    /// # Errors
    /// What the place says.
    fn list(&self, below: &str) -> Result<Vec<String>, StoreError>;
}

/// A shelf that is a directory, which several hosts may have mounted.
#[derive(Debug)]
pub struct DirectoryShelf {
    path: PathBuf,
}

impl DirectoryShelf {
    /// The shelf in a directory, which need not exist.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.into() }
    }

    fn failed(&self, name: &str, source: io::Error) -> StoreError {
        let place = self.path.join(name).display().to_string();
        match source.kind() {
            ErrorKind::StorageFull => StoreError::Full { place, needed: 0 },
            _ => StoreError::Medium { place, source },
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.path.join(name);
        let dir = path.parent().ok_or(ErrorKind::InvalidInput)?;
        make(dir)?;
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut tag = [0; 8];
        let _ = rustix::rand::getrandom(&mut tag, rustix::rand::GetRandomFlags::empty());
        let tag = u64::from_le_bytes(tag);
        // Hosts that share the directory have the same process numbers.
        let part = dir.join(format!(".part-{tag:016x}-{next}"));
        let written = write_new(&part, bytes).and_then(|()| fs::rename(&part, &path));
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written?;
        File::open(dir)?.sync_all()
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes a directory with its parents, durably.
fn make(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

impl Shelf for DirectoryShelf {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn len(&self, name: &str) -> Result<Option<u64>, StoreError> {
        match fs::metadata(self.path.join(name)) {
            Ok(found) => Ok(Some(found.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed(name, error)),
        }
    }

    fn get(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let file = match File::open(self.path.join(name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| self.failed(name, error))?,
        };
        let mut bytes = Vec::new();
        let read = file.take(most.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|error| self.failed(name, error))?;
        if bytes.len() as u64 > most {
            return Err(StoreError::Damaged {
                place: self.path.join(name).display().to_string(),
                what: format!("it is longer than {most} bytes, which no such object is"),
            });
        }
        Ok(Some(bytes))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(name, bytes)
            .map_err(|error| self.failed(name, error))
    }

    fn list(&self, below: &str) -> Result<Vec<String>, StoreError> {
        let entries = match fs::read_dir(self.path.join(below)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| self.failed(below, error))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| self.failed(below, error))?;
            let name = name.file_name().into_string();
            names.extend(name.ok().filter(|name| !name.starts_with('.')));
        }
        Ok(names)
    }
}
