//! Checking of a whole image.
//!
//! Everything that an epoch consists of is read and compared with its checksum: both copies of all
//! tables, pages and their parity, also pages that later epochs have replaced, because earlier epochs
//! can still be restored. Not looked at is what belongs to no epoch: space between the parts of an
//! epoch, and space taken ahead.
//!
//! Several threads take stripes from a list, so that a fast medium is kept busy; what they find is
//! gathered, and mended if that was asked for, by the one that called.

use crate::cipher::Secret;
use crate::damage::{Damage, Outcome, Part, Trouble};
use crate::format::{BLOCK_LEN, LOG_AT, Record, Trailer, Twice};
use crate::generation::Generation;
use crate::head::Head;
use crate::index::Index;
use crate::older;
use crate::opening::open_newest;
use crate::stored::{Loaded, Places, State, Stored};
use crate::tables::{self, Fix, Found};
use outlive_epoch::{EpochId, StoreError};
use outlive_media::{Access, Buffer, Directory};
use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{OnceLock, mpsc};

/// Told how many bytes are checked, and of how many.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Damages that a report lists; more are only counted.
const LISTED: usize = 10_000;
/// Pages for which another thread pays.
const WORTH_A_THREAD: usize = 4096;
/// Threads that read, at most.
const READERS: usize = 4;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The epochs that were found, oldest first.
    pub epochs: Vec<EpochId>,
    /// Blocks of pages that were checked.
    pub pages: u64,
    /// Bytes of pages, trees and tables that were checked.
    pub bytes: u64,
    /// What is damaged, in the order in which it was found; at most 10,000.
    pub damages: Vec<Damage>,
    /// How many damages there are that are not listed.
    pub more: u64,
    /// How many of those are lost.
    pub more_lost: u64,
}

impl Report {
    /// Whether every byte that counts is as it was written.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }

    /// Whether something is lost that an epoch needs.
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        let lost = |damage: &Damage| damage.outcome == Outcome::Lost;
        self.more_lost > 0 || self.damages.iter().any(lost)
    }

    /// Whether something is damaged that could be written again.
    #[must_use]
    pub fn is_repairable(&self) -> bool {
        let harmed = |damage: &Damage| damage.outcome == Outcome::Repairable;
        self.damages.iter().any(harmed)
    }

    /// Adds what was found in another generation.
    pub(crate) fn merge(&mut self, other: Self) {
        self.epochs.extend(other.epochs);
        self.epochs.sort_unstable();
        self.epochs.dedup();
        self.pages += other.pages;
        self.bytes += other.bytes;
        other
            .damages
            .into_iter()
            .for_each(|damage| self.add(damage));
        self.more += other.more;
        self.more_lost += other.more_lost;
    }

    pub(crate) fn add(&mut self, damage: Damage) {
        if self.damages.len() < LISTED {
            self.damages.push(damage);
        } else {
            self.more += 1;
            self.more_lost += u64::from(damage.outcome == Outcome::Lost);
        }
    }
}

/// Checks all generations in any directory.
///
/// # Errors
/// [`StoreError::Missing`], [`StoreError::Newer`], [`StoreError::Medium`]: nothing can be checked.
pub fn verify_in(dir: &dyn Directory, progress: Progress<'_>) -> Result<Report, StoreError> {
    verify_in_with(dir, None, progress)
}

/// [`verify_in`], with the key of an encrypted image: besides the checksums, which need none, the authentication
/// tags are checked.
///
/// # Errors
/// As for [`verify_in`]; [`StoreError::Locked`] for another key than that of the image.
pub fn verify_in_with(
    dir: &dyn Directory,
    secret: Option<&Secret>,
    progress: Progress<'_>,
) -> Result<Report, StoreError> {
    match open_newest(dir, Access::Read, secret) {
        Ok(Some((generation, head))) => {
            let mut report = Walk::new(&generation, progress, None).all(&head);
            for older in older::numbers(dir, generation.number)? {
                report.merge(match Generation::open(dir, older, Access::Read, secret) {
                    Ok((older, head)) => Walk::new(&older, progress, None).all(&head),
                    Err(error) => older::unreadable(dir, older, error),
                });
            }
            Ok(report)
        }
        Ok(None) => {
            let what = "no committed epoch is here".to_owned();
            let place = dir.place();
            Err(StoreError::Missing { place, what })
        }
        Err(Trouble::Damage(damage)) => Ok(Report {
            damages: vec![*damage],
            ..Report::default()
        }),
        Err(Trouble::Store(error)) => Err(error),
    }
}

/// Takes the blocks that would make damage good; says whether they were written.
pub(crate) type Mender<'a> = &'a mut dyn FnMut(&[Fix]) -> bool;

/// A walk over all epochs of a file.
pub(crate) struct Walk<'a> {
    generation: &'a Generation,
    report: Report,
    /// What is listed, whatever becomes of it.
    listed: HashSet<(u64, Option<EpochId>, Part, String)>,
    progress: Progress<'a>,
    mender: Option<Mender<'a>>,
    done: u64,
    total: u64,
}

/// An epoch whose pages are to be checked.
pub(crate) struct Pages {
    index: Index,
    pub stored: Stored,
    /// Made when the first damage is found.
    places: OnceLock<Places>,
}

impl Pages {
    /// Of an epoch whose index can be read.
    pub fn of(generation: &Generation, at: u64, trailer: &Trailer) -> Result<Self, Trouble> {
        let index = generation.index(at, trailer)?;
        let layout = trailer.layout();
        let layout = layout.ok_or_else(|| {
            let what = "it is not in order";
            generation.damaged(at, Some(trailer.epoch), Part::Trailer, what)
        })?;
        let stored = Stored::new(generation, trailer, layout, index.clone());
        let places = OnceLock::new();
        Ok(Self {
            index,
            stored,
            places,
        })
    }

    /// Checks one stripe; `spare` is memory that is used for it, and given back.
    pub fn examine(
        &self,
        generation: &Generation,
        stripe: u64,
        spare: &mut Option<Buffer>,
    ) -> Result<Found, StoreError> {
        let medium = &*generation.medium;
        let loaded = self.stored.load(medium, stripe, spare.take())?;
        let places = || self.places.get_or_init(|| Places::of(&self.index));
        let mut found = Found {
            damages: loaded.damages(generation, self.stored.epoch, &places),
            fixes: fixes(&loaded),
        };
        let contents = loaded.unpack(generation, &self.stored, &places);
        found.damages.extend(contents);
        *spare = Some(loaded.into_buffer());
        Ok(found)
    }
}

fn fixes(loaded: &Loaded) -> Vec<Fix> {
    let mended = (0..)
        .zip(&loaded.states)
        .filter(|(_, s)| **s == State::Mended);
    mended
        .map(|(block, _)| Fix {
            at: loaded.stripe.block_at(block),
            bytes: loaded.block(block).to_vec(),
        })
        .collect()
}

/// What a thread found in one stripe.
struct Checked {
    pages: u64,
    bytes: u64,
    found: Found,
}

impl<'a> Walk<'a> {
    pub fn new(
        generation: &'a Generation,
        progress: Progress<'a>,
        mender: Option<Mender<'a>>,
    ) -> Self {
        Self {
            generation,
            report: Report::default(),
            listed: HashSet::new(),
            progress,
            mender,
            done: 0,
            total: 0,
        }
    }

    /// Checks everything that is committed.
    pub fn all(mut self, head: &Head) -> Report {
        let header = head.harmless.iter().chain(&head.doubt).cloned();
        header.for_each(|damage| self.list(damage));
        let chain = self.chain(&head.record);
        self.total = head.record.log_end() - LOG_AT;
        let mut pages = Vec::new();
        for (at, trailer) in chain.iter().rev() {
            self.report.epochs.push(EpochId(trailer.epoch));
            self.tables(*at, trailer);
            match Pages::of(self.generation, *at, trailer) {
                Ok(of_epoch) => pages.push(of_epoch),
                // The index is listed as lost already.
                Err(Trouble::Damage(_)) if self.report.is_lossy() => {}
                Err(trouble) => self.trouble(trouble, trailer.index.at, Part::Index),
            }
        }
        self.pages(&pages);
        (self.progress)(self.total, self.total);
        self.report
    }

    fn trouble(&mut self, trouble: Trouble, at: u64, part: Part) {
        let damage = match trouble {
            Trouble::Damage(damage) => *damage,
            Trouble::Store(error) => self.generation.damaged(at, None, part, &error.to_string()),
        };
        self.list(damage);
    }

    /// Takes damage into the report, once.
    fn list(&mut self, damage: Damage) {
        let Damage { offset, epoch, .. } = damage;
        let key = (offset, epoch, damage.part.clone(), damage.what.clone());
        if self.listed.contains(&key) {
            return;
        }
        if self.listed.len() < LISTED {
            self.listed.insert(key);
        }
        self.report.add(damage);
    }

    /// Lists what was found, and has it mended.
    fn take(&mut self, found: Found) {
        let mended = match &mut self.mender {
            Some(mender) if !found.fixes.is_empty() => mender(&found.fixes),
            _ => false,
        };
        for damage in found.damages {
            let fixed = found.fixes.iter().any(|fix| fix.at == damage.offset);
            let repaired = mended && fixed && damage.outcome == Outcome::Repairable;
            let outcome = if repaired {
                Outcome::Repaired
            } else {
                damage.outcome
            };
            self.list(damage.with(outcome));
        }
    }

    fn at(&mut self, bytes: u64) {
        self.report.bytes += bytes;
        self.done += bytes;
        (self.progress)(self.done.min(self.total), self.total);
    }

    /// Follows the trailers from the newest to the oldest. One that is lost hides those before it,
    /// unless the header leads around it.
    fn chain(&mut self, newest: &Record) -> Vec<(u64, Trailer)> {
        let mut chain = Vec::new();
        let mut next = Some((newest.trailer, newest.epoch));
        while let Some((twice, epoch)) = next {
            next = match self.generation.trailer(twice, epoch) {
                Ok(trailer) => {
                    chain.push((twice.at, trailer));
                    let before = trailer.previous_epoch();
                    before.map(|before| (trailer.previous, before))
                }
                Err(trouble) => {
                    self.trouble(trouble, twice.at, Part::Trailer);
                    self.before(epoch).filter(|(other, _)| other.at < twice.at)
                }
            };
        }
        chain
    }

    /// Where the header says that an epoch before this one ends.
    fn before(&self, epoch: u64) -> Option<(Twice, u64)> {
        let record = self.generation.record_before(epoch)?;
        (record.epoch >= self.generation.superblock.first_epoch)
            .then_some((record.trailer, record.epoch))
    }

    fn tables(&mut self, at: u64, trailer: &Trailer) {
        match tables::examine(self.generation, at, trailer) {
            Err(trouble) => self.trouble(trouble, at, Part::Trailer),
            Ok(found) => self.take(found),
        }
        self.at(2 * (at + BLOCK_LEN - trailer.tables_at()));
    }

    /// Checks the pages of all epochs, with several threads.
    fn pages(&mut self, epochs: &[Pages]) {
        let stripes = |pages: &Pages| pages.stored.layout.stripes();
        let list: Vec<(&Pages, u64)> = epochs
            .iter()
            .flat_map(|pages| (0..stripes(pages)).map(move |stripe| (pages, stripe)))
            .collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pages: usize = epochs.iter().map(|of| of.stored.crcs.len()).sum();
        let threads = threads.min(1 + pages / WORTH_A_THREAD);
        let (next, generation) = (AtomicUsize::new(0), self.generation);
        std::thread::scope(|scope| {
            let (sender, results) = mpsc::sync_channel(2 * READERS);
            for _ in 0..threads.clamp(1, READERS).min(list.len()) {
                let (sender, next, list) = (sender.clone(), &next, &list);
                scope.spawn(move || {
                    let mut spare = None;
                    while let Some((pages, stripe)) = list.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let found = pages.examine(generation, *stripe, &mut spare);
                        let stripe = pages.stored.layout.stripe(*stripe);
                        let checked = found.map(|found| Checked {
                            pages: stripe.pages,
                            bytes: stripe.blocks() * BLOCK_LEN,
                            found,
                        });
                        if sender.send((stripe.at, checked)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for (at, checked) in results {
                match checked {
                    Err(error) => self.trouble(error.into(), at, Part::Parity),
                    Ok(checked) => {
                        self.report.pages += checked.pages;
                        self.take(checked.found);
                        self.at(checked.bytes);
                    }
                }
            }
        });
        // The threads come back in no order.
        self.report
            .damages
            .sort_by_key(|damage| (damage.offset >= LOG_AT, damage.offset));
    }
}
