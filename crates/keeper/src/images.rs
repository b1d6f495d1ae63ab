//! Epoch stores as the commands use them.
//!
//! [`Image`] reads one, [`Log`] writes one; both are thin, so that the commands do not depend on
//! how the store says things.

use crate::KeeperError;
use crate::epoch::EpochLog;
use crate::ownership::Own;
use outlive_epoch::{
    Acked, Content, EpochFacts, EpochId, EpochReader, EpochWriter, StoreError, VisitError,
};
pub use outlive_epoch_store::Outcome;
use outlive_epoch_store::{Access, Ahead, CommitTimes, Part, Report, Scrubbed, Secret, Store};
pub use outlive_process::holders::Holder;
use outlive_process::holders::Holders;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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
    /// Bytes that packing the pages saved.
    pub saved_bytes: u64,
}

/// Damage that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// File and offset.
    pub place: String,
    /// What is wrong there, and what it held.
    pub what: String,
    /// What becomes of it.
    pub outcome: Outcome,
    /// Whose it is, as far as that can be told.
    pub holders: Vec<Holder>,
    /// The file whose contents it is.
    pub contents_of: Option<String>,
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
    /// Whether something is lost.
    pub lossy: bool,
}

/// Epochs whose trees are asked for names, at most.
const ASKED: usize = 64;

/// How often a store that seems damaged is opened.
const OPEN_TRIES: u32 = 4;

/// A store that is only read.
pub struct Image {
    store: Store,
    dir: PathBuf,
    own: Option<Own>,
}

/// A store that takes epochs.
pub struct Log {
    store: Store,
    dir: PathBuf,
}

impl Image {
    /// Opens the store in `dir`; a keeper may be writing it.
    ///
    /// # Errors
    /// What the store says.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, None)
    }

    /// The same, with the key of one that is encrypted.
    ///
    /// # Errors
    /// What the store says.
    pub fn open_with(dir: &Path, secret: Option<&Secret>) -> Result<Self, StoreError> {
        Ok(Self {
            store: open(dir, secret)?,
            dir: dir.into(),
            own: None,
        })
    }

    /// Opens the store in `dir` to restore from it: it must be the effective user's own.
    ///
    /// # Errors
    /// Refused where it is somebody else's, before anything of it is read; what the store says.
    pub fn open_own(dir: &Path, secret: Option<&Secret>) -> Result<Self, KeeperError> {
        let Some(own) = Own::check(dir)? else {
            return Ok(Self::open_with(dir, secret)?);
        };
        let store = open(&own.path(), secret)
            .map_err(|error| KeeperError::from(error).renamed(&own.path(), dir))?;
        Ok(Self {
            store,
            dir: dir.into(),
            own: Some(own),
        })
    }

    /// A failure of this image, which calls it as the user does.
    #[must_use]
    pub fn explain(&self, error: KeeperError) -> KeeperError {
        match &self.own {
            Some(own) => error.renamed(&own.path(), &self.dir),
            None => error,
        }
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
                saved_bytes: epoch.saved_bytes,
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

    /// The same, for several readers at a time.
    ///
    /// # Errors
    /// As for [`Image::epoch`].
    pub fn epoch_for_all(
        &self,
        epoch: Option<u64>,
    ) -> Result<Arc<dyn EpochReader + Send + Sync>, StoreError> {
        Ok(Arc::new(self.store.epoch(epoch.map(EpochId))?))
    }

    /// Damage that was met while reading, and made up for.
    #[must_use]
    pub fn met(&self) -> Vec<Damage> {
        self.store.met().iter().map(Damage::from).collect()
    }

    /// The store itself.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Opens a store for reading. A keeper may be writing it, so that its parts are seen at different
/// moments: only what is damaged again and again is damaged.
fn open(dir: &Path, secret: Option<&Secret>) -> Result<Store, StoreError> {
    for _ in 1..OPEN_TRIES {
        match Store::open_with(dir, Access::Read, secret.cloned()) {
            Err(StoreError::Damaged { .. }) => std::thread::sleep(Duration::from_millis(1)),
            other => return other,
        }
    }
    Store::open_with(dir, Access::Read, secret.cloned())
}

/// Reads every byte of the store in `dir` and checks it, with the key of one that is encrypted also its authentication
/// tags; `progress` hears the bytes done and all.
///
/// # Errors
/// Only where it cannot be read at all; damage is a finding.
pub fn verify(
    dir: &Path,
    secret: Option<&Secret>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verified, StoreError> {
    let report = outlive_epoch_store::verify_with(dir, secret, progress)?;
    Ok(told(dir, secret, report))
}

/// The same, and what is damaged is written again from its other copy or the parity, where that can
/// be.
///
/// # Errors
/// As for [`verify`]; and where a keeper is writing it.
pub fn repair(
    dir: &Path,
    secret: Option<&Secret>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verified, StoreError> {
    let report = outlive_epoch_store::repair_with(dir, secret, progress)?;
    Ok(told(dir, secret, report))
}

/// A report with the names of those whose pages and trees are damaged.
fn told(dir: &Path, secret: Option<&Secret>, report: Report) -> Verified {
    let mut damages: Vec<Damage> = report.damages.iter().map(Damage::from).collect();
    if report
        .damages
        .iter()
        .any(|damage| is_of_somebody(&damage.part))
    {
        name(dir, secret, &report, &mut damages);
    }
    Verified {
        epochs: report.epochs.len() as u64,
        pages: report.pages,
        bytes: report.bytes,
        damages,
        more: report.more,
        lossy: report.is_lossy(),
    }
}

fn is_of_somebody(part: &Part) -> bool {
    matches!(part, Part::Pages(_) | Part::Tree(_))
}

/// Says of pages and trees whose they are, by the trees of the epoch that stored them.
fn name(dir: &Path, secret: Option<&Secret>, report: &Report, damages: &mut [Damage]) {
    let Ok(store) = Store::open_with(dir, Access::Read, secret.cloned()) else {
        return;
    };
    let mut known = BTreeMap::new();
    for (found, damage) in report.damages.iter().zip(damages) {
        let Some(epoch) = found.epoch.filter(|_| is_of_somebody(&found.part)) else {
            continue;
        };
        if known.len() == ASKED && !known.contains_key(&epoch) {
            continue;
        }
        let holders = known.entry(epoch).or_insert_with(|| {
            let reader = store.epoch(Some(epoch)).ok();
            reader
                .map(|reader| Holders::of(&reader))
                .unwrap_or_default()
        });
        match &found.part {
            Part::Pages(run) => {
                damage.holders = holders.of_pages(*run);
                damage.contents_of = holders.file(*run).map(str::to_owned);
            }
            Part::Tree(group) => damage.holders.extend(holders.of_group(group)),
            _ => {}
        }
    }
}

impl From<&outlive_epoch_store::Damage> for Damage {
    fn from(damage: &outlive_epoch_store::Damage) -> Self {
        Self {
            place: format!("{} at offset {}", damage.file, damage.offset),
            what: damage.to_string(),
            outcome: damage.outcome,
            holders: Vec::new(),
            contents_of: None,
        }
    }
}

impl Log {
    /// Makes a store in a directory that is empty or not there.
    ///
    /// # Errors
    /// What the store says.
    pub fn create(dir: &Path) -> Result<Self, KeeperError> {
        Self::create_with(dir, None)
    }

    /// The same; with a key, all that is written to it is encrypted.
    ///
    /// # Errors
    /// What the store says.
    pub fn create_with(dir: &Path, secret: Option<&Secret>) -> Result<Self, KeeperError> {
        Ok(Self {
            store: Store::create_with(dir, secret.cloned())?,
            dir: dir.into(),
        })
    }

    /// Opens a store to write further epochs.
    ///
    /// # Errors
    /// What the store says.
    pub fn open(dir: &Path, secret: Option<&Secret>) -> Result<Self, KeeperError> {
        Ok(Self {
            store: Store::open_with(dir, Access::Write, secret.cloned())?,
            dir: dir.into(),
        })
    }
}

/// Copies one epoch, whole, as the next one of a log that has none.
///
/// # Errors
/// What either store says; nothing is committed then.
pub fn copy(
    from: &dyn EpochReader,
    facts: EpochFacts,
    mut to: Box<dyn EpochWriter + '_>,
) -> Result<Acked, StoreError> {
    for group in from.groups() {
        if let Some(tree) = from.tree(&group)? {
            to.tree(&group, &tree)?;
        }
    }
    let mut failed = None;
    let walked = from.pages(&mut |run, content| {
        let put = match content {
            Content::Bytes(bytes) => to.put(run, bytes),
            Content::Zero => to.zero(run),
        };
        put.map_err(|error| {
            failed = Some(error);
            VisitError::Visitor("the copy cannot be written".into())
        })
    });
    match (failed, walked) {
        (Some(error), _) | (None, Err(VisitError::Store(error))) => Err(error),
        (None, Err(VisitError::Visitor(error))) => Err(StoreError::Misuse(error.to_string())),
        (None, Ok(())) => to.commit(facts),
    }
}

impl EpochLog for Log {
    fn begin(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        Ok(self.store.begin()?)
    }

    fn begin_event(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        Ok(self.store.begin_event()?)
    }

    fn write_ahead(&mut self, len: u64) -> Result<Ahead, StoreError> {
        self.store.write_ahead(len)
    }

    fn scrub(&mut self) -> Result<Scrubbed, StoreError> {
        self.store.scrub()
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

    fn last_commit(&self) -> CommitTimes {
        self.store.last_commit()
    }

    fn store(&mut self) -> Option<&mut Store> {
        Some(&mut self.store)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.store.free_bytes().or_else(|| {
            let found = rustix::fs::statvfs(&self.dir).ok()?;
            Some(found.f_bavail.saturating_mul(found.f_frsize))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outlive_epoch::{PAGE_SIZE, Run, SpaceId};

    fn pages(image: &Image) -> Vec<(Run, Option<Vec<u8>>)> {
        let mut pages = Vec::new();
        let reader = image.epoch(None).unwrap();
        reader
            .pages(&mut |run, content| {
                let bytes = match content {
                    Content::Bytes(bytes) => Some(bytes.to_vec()),
                    Content::Zero => None,
                };
                pages.push((run, bytes));
                Ok(())
            })
            .unwrap();
        pages.sort_by_key(|(run, _)| *run);
        pages
    }

    #[test]
    fn a_copy_of_the_newest_epoch_holds_what_that_holds() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        let run = |first, count| Run::new(SpaceId(7), first, count).unwrap();
        let facts = EpochFacts {
            taken_at_ns: 5,
            stop_us: 6,
        };
        let mut log = Log::create(&first).unwrap();
        let mut writer = log.begin().unwrap();
        writer.tree("a", b"first").unwrap();
        writer.put(run(0, 2), &[1; 2 * PAGE_SIZE]).unwrap();
        writer.put(run(9, 600), &vec![0; 600 * PAGE_SIZE]).unwrap();
        // More than could be handed over as bytes in a life.
        writer.zero(run(1 << 40, 1 << 50)).unwrap();
        writer.commit(EpochFacts::default()).unwrap();
        let mut writer = log.begin().unwrap();
        writer.tree("a", b"second").unwrap();
        writer.put(run(1, 1), &[2; PAGE_SIZE]).unwrap();
        writer.commit(facts).unwrap();
        drop(log);
        let source = Image::open(&first).unwrap();
        let mut log = Log::create(&second).unwrap();
        let reader = source.epoch(None).unwrap();
        copy(&*reader, facts, log.begin().unwrap()).unwrap();
        drop(log);
        let target = Image::open_own(&second, None).unwrap();
        let copied = target.epoch(None).unwrap();
        assert_eq!(copied.tree("a").unwrap().unwrap(), b"second");
        assert_eq!(copied.runs(), reader.runs());
        let (pages, expected) = (pages(&target), pages(&source));
        let held = |pages: &[(Run, Option<Vec<u8>>)]| {
            pages
                .iter()
                .filter_map(|(_, bytes)| bytes.clone())
                .flatten()
                .collect::<Vec<u8>>()
        };
        assert_eq!(held(&pages), held(&expected));
        assert_eq!(held(&pages)[PAGE_SIZE], 2, "the newer page");
        let summary = &target.epochs()[0];
        assert_eq!((summary.time_ns, summary.stop_us), (5, 6));
    }
}
