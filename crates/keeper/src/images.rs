//! Epoch stores as the commands use them.
//!
//! [`Image`] reads one, [`Log`] writes one; both are thin, so that the commands do not depend on
//! how the store says things.

use crate::KeeperError;
use crate::epoch::EpochLog;
use outlive_epoch::{EpochId, EpochReader, EpochWriter, StoreError};
use outlive_epoch_store::{Access, Store};
use std::path::{Path, PathBuf};

/// One committed epoch, as listings show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its number.
    pub epoch: u64,
    /// When the program was stopped, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// How long the program was stopped, microseconds.
    pub stop_us: u64,
    /// From the stop until the epoch was durable, microseconds, where that is known.
    pub durable_us: Option<u64>,
    /// Pages stored.
    pub pages: u64,
    /// Bytes written.
    pub bytes_written: u64,
}

/// Damage that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// File and offset.
    pub place: String,
    /// What is wrong there, and what it held.
    pub what: String,
    /// Whether nothing is lost, because another copy is intact.
    pub harmless: bool,
}

/// What a check of every byte found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Number of epochs.
    pub epochs: u64,
    /// Pages checked.
    pub pages: u64,
    /// Bytes checked.
    pub bytes: u64,
    /// What is damaged, as far as it is listed.
    pub damages: Vec<Damage>,
    /// Damages that are not listed.
    pub more: u64,
}

/// A store that is only read.
pub struct Image {
    store: Store,
    dir: PathBuf,
}

/// A store that takes epochs.
pub struct Log {
    store: Store,
}

impl Image {
    /// Opens the store in `dir`; a keeper may be writing it.
    ///
    /// # Errors
    /// What the store says.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            store: Store::open(dir, Access::Read)?,
            dir: dir.into(),
        })
    }

    /// Its epochs, oldest first.
    #[must_use]
    pub fn epochs(&self) -> Vec<Summary> {
        let epochs = self.store.epochs();
        epochs
            .iter()
            .map(|epoch| Summary {
                epoch: epoch.id.0,
                time_ns: epoch.facts.taken_at_ns,
                stop_us: epoch.facts.stop_us,
                durable_us: (epoch.durable_us > 0).then_some(epoch.durable_us),
                pages: epoch.pages,
                bytes_written: epoch.bytes_written,
            })
            .collect()
    }

    /// Reads one epoch, or the newest.
    ///
    /// # Errors
    /// What the store says; where there is no such epoch, which there are.
    pub fn epoch(&self, epoch: Option<u64>) -> Result<Box<dyn EpochReader + '_>, StoreError> {
        Ok(Box::new(self.store.epoch(epoch.map(EpochId))?))
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Reads every byte of the store in `dir` and checks it; `progress` hears the bytes done and all.
///
/// # Errors
/// Only where it cannot be read at all; damage is a finding.
pub fn verify(dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Verified, StoreError> {
    let report = outlive_epoch_store::verify(dir, progress)?;
    let damages = report.damages.iter().map(|damage| Damage {
        place: format!("{} at offset {}", damage.file, damage.offset),
        what: damage.to_string(),
        harmless: damage.harmless,
    });
    Ok(Verified {
        epochs: report.epochs.len() as u64,
        pages: report.pages,
        bytes: report.bytes,
        damages: damages.collect(),
        more: report.more,
    })
}

impl Log {
    /// Makes a store in a directory that is empty or not there.
    ///
    /// # Errors
    /// What the store says.
    pub fn create(dir: &Path) -> Result<Self, KeeperError> {
        Ok(Self {
            store: Store::create(dir)?,
        })
    }

    /// Opens a store to write further epochs.
    ///
    /// # Errors
    /// What the store says.
    pub fn open(dir: &Path) -> Result<Self, KeeperError> {
        Ok(Self {
            store: Store::open(dir, Access::Write)?,
        })
    }
}

impl EpochLog for Log {
    fn begin(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        Ok(self.store.begin()?)
    }

    fn begin_base(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        Ok(self.store.begin_base()?)
    }

    fn newest(&self) -> u64 {
        self.store.newest().map_or(0, |epoch| epoch.0)
    }

    fn log_bytes(&self) -> u64 {
        self.store.log_bytes()
    }

    fn live_bytes(&mut self) -> u64 {
        // A log whose indexes cannot be read is best replaced by a new generation.
        self.store.live_bytes().unwrap_or(0)
    }
}
