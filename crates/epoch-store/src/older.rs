//! Earlier generations: files whose epochs can be read although a newer base took their place.
//!
//! # Rules
//! - The newest generation alone counts for what the newest epoch is. An older one is history: where it
//!   cannot be opened, the store is opened without it, and a check names the damage.
//! - An older generation is never written, but by a repair or where scrubbing mends it; it is replaced as a whole by one that
//!   leaves epochs out ([`crate::beside`]), or removed.
//! - An epoch may stand in two generations, with the same contents: the newer one is read.

use crate::cipher::Secret;
use crate::damage::{self, Part, Trouble};
use crate::generation::{Generation, OpenError, committed_name, number_of};
use crate::index::Says;
use crate::reader::Reader;
use crate::store::{EpochSummary, Live, Store};
use crate::verify::Report;
use outlive_epoch::{EpochId, EpochReader, Run, StoreError};
use outlive_media::{Access, Directory};
use std::collections::BTreeMap;

/// A file of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerationSummary {
    /// Which one; a higher number is newer.
    pub number: u64,
    /// Bytes of the file, without space taken ahead.
    pub bytes: u64,
    /// Whether it is the newest one, which epochs are added to.
    pub newest: bool,
    /// Its epochs, oldest first.
    pub epochs: Vec<EpochSummary>,
}

/// What an epoch says besides the one that is listed before it. To be laid over that: first what is
/// absent, then the pages.
#[derive(Debug)]
pub struct Increment {
    /// The pages, and all trees.
    pub reader: Reader,
    /// Runs of which nothing is left, unless the reader has it.
    pub absent: Vec<Run>,
    /// The reader has all pages, and where a tree was stored says nothing about when it changed.
    pub whole: bool,
}

/// The numbers of the generations before this one that are there now.
pub(crate) fn numbers(dir: &dyn Directory, newest: u64) -> Result<Vec<u64>, StoreError> {
    let names = dir.list().map_err(damage::medium)?;
    let numbers = names.iter().filter_map(|name| number_of(name, "epochs."));
    let mut older: Vec<u64> = numbers.filter(|number| *number < newest).collect();
    older.sort_unstable();
    Ok(older)
}

/// What a check says of one that cannot be opened.
pub(crate) fn unreadable(dir: &dyn Directory, number: u64, error: OpenError) -> Report {
    let place = format!("{}/{}", dir.place(), committed_name(number));
    let damage = match error {
        // It was removed meanwhile.
        OpenError::Medium(error) if error.is_not_found() => return Report::default(),
        OpenError::Trouble(Trouble::Damage(damage)) => *damage,
        OpenError::Medium(error) => at_begin(&place, &damage::medium(error)),
        OpenError::Trouble(Trouble::Store(error)) => at_begin(&place, &error),
    };
    Report {
        damages: vec![damage],
        ..Report::default()
    }
}

/// What a check says of one whose medium gave an error.
pub(crate) fn at_begin(place: &str, error: &StoreError) -> damage::Damage {
    damage::Damage {
        file: place.to_owned(),
        offset: 0,
        epoch: None,
        part: Part::Superblock,
        what: error.to_string(),
        outcome: damage::Outcome::Lost,
    }
}

/// Opens those that can be opened, to be read.
pub(crate) fn open(
    dir: &dyn Directory,
    newest: u64,
    secret: Option<&Secret>,
) -> Result<Vec<Live>, StoreError> {
    let numbers = numbers(dir, newest)?;
    Ok(numbers
        .into_iter()
        .filter_map(|n| open_one(dir, n, secret))
        .collect())
}

pub(crate) fn open_one(dir: &dyn Directory, number: u64, secret: Option<&Secret>) -> Option<Live> {
    let (generation, head) = Generation::open(dir, number, Access::Read, secret).ok()?;
    let chain = generation.chain(&head.record).ok()?;
    Some(Live::new(generation, head.record, chain))
}

/// One that was replaced or written just now: what it took ahead is given back, and it is opened to be
/// read only, if that works.
pub(crate) fn settled(dir: &dyn Directory, old: Live, secret: Option<&Secret>) -> Live {
    // Where this fails, it takes more space than it needs to.
    let _ = old.generation.medium.truncate(old.record.log_end());
    let Some(mut live) = open_one(dir, old.generation.number, secret) else {
        return old;
    };
    // Its last seal may not have been written.
    live.record.durable_us = old.record.durable_us;
    live
}

impl Store {
    /// Whether generations that are replaced from now on stay, as older ones. That is not
    /// remembered: whoever opens the store for writing says so, or removes what is not wanted.
    pub fn keep_older(&mut self, on: bool) {
        self.keeps_older = on;
    }

    /// All files, oldest first.
    #[must_use]
    pub fn generations(&self) -> Vec<GenerationSummary> {
        let newest = self.current.as_ref().map(|live| live.generation.number);
        let summary = |live: &Live| GenerationSummary {
            number: live.generation.number,
            bytes: live.record.log_end(),
            newest: newest == Some(live.generation.number),
            epochs: live.summaries(),
        };
        self.older
            .iter()
            .chain(&self.current)
            .map(summary)
            .collect()
    }

    /// Removes an older generation with all epochs that no other one has; gives the bytes of it.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] where it is not an older one; [`StoreError::Medium`].
    pub fn remove_generation(&mut self, number: u64) -> Result<u64, StoreError> {
        self.prepare()?;
        let found = self
            .older
            .iter()
            .position(|l| l.generation.number == number);
        let Some(position) = found else {
            let what = format!("{number} is no older generation of {}", self.dir.place());
            return Err(StoreError::Misuse(what));
        };
        let removed = self.dir.remove(&committed_name(number));
        match removed {
            Err(e) if !e.is_not_found() => return Err(damage::medium(e)),
            _ => {}
        }
        Ok(self.older.remove(position).record.log_end())
    }

    /// The epochs that can be read, oldest first.
    #[must_use]
    pub fn epochs(&self) -> Vec<EpochSummary> {
        let lives = self.older.iter().chain(&self.current);
        let all = lives.flat_map(|live| live.summaries());
        let all: BTreeMap<EpochId, EpochSummary> = all.map(|epoch| (epoch.id, epoch)).collect();
        all.into_values().collect()
    }

    /// Reads what one epoch says besides the one that is listed before it.
    ///
    /// # Errors
    /// As for [`Store::epoch`].
    pub fn increment(&self, id: EpochId) -> Result<Increment, StoreError> {
        let before = |live: &Live| {
            let later = live.chain.partition_point(|(_, t)| t.epoch < id.0);
            Some(EpochId(live.chain.get(later.checked_sub(1)?)?.1.epoch))
        };
        let before = self.lives().filter_map(before).max();
        let Some(before) = before else {
            return Ok(Increment {
                reader: self.epoch(Some(id))?,
                absent: Vec::new(),
                whole: true,
            });
        };
        let follows = |live: &Live| {
            let at = live.chain.binary_search_by_key(&id.0, |(_, t)| t.epoch);
            let at = at.ok()?;
            (live.chain.get(at.checked_sub(1)?)?.1.epoch == before.0).then_some(at)
        };
        let found = self.lives().find_map(|live| Some((live, follows(live)?)));
        let Some((live, at)) = found else {
            return Ok(Increment {
                reader: self.epoch(Some(id))?,
                absent: self.epoch(Some(before))?.runs(),
                whole: true,
            });
        };
        let link = &live.chain[at];
        let reader = Reader::new(&live.generation, std::slice::from_ref(link))?;
        let entries = live.generation.index(link.0, &link.1)?.entries;
        let gone = entries.iter().filter(|entry| entry.says == Says::Absent);
        Ok(Increment {
            reader,
            absent: gone.map(|entry| entry.run).collect(),
            whole: false,
        })
    }

    /// Newest first.
    fn lives(&self) -> impl Iterator<Item = &Live> {
        self.current.iter().chain(self.older.iter().rev())
    }

    /// Where an epoch stands; without a number the newest one.
    pub(crate) fn find(&self, id: Option<EpochId>) -> Result<(&Live, usize), StoreError> {
        let missing = |what: String| StoreError::Missing {
            place: self.dir.place(),
            what,
        };
        let live = self.current.as_ref();
        let live = live.ok_or_else(|| missing("no committed epoch is here".to_owned()))?;
        let wanted = id.map_or(live.record.epoch, |id| id.0);
        let found = self.lives().find_map(|live| {
            let found = live.chain.binary_search_by_key(&wanted, |(_, t)| t.epoch);
            Some((live, found.ok()?))
        });
        found.ok_or_else(|| {
            let listed: Vec<u64> = self.epochs().iter().map(|epoch| epoch.id.0).collect();
            let below = listed.iter().rfind(|id| **id < wanted);
            let above = listed.iter().find(|id| **id > wanted);
            missing(match (below, above, listed.first(), listed.last()) {
                (Some(below), Some(above), ..) => format!(
                    "there is no epoch {wanted} any more; the next ones are {below} and {above}"
                ),
                (.., Some(first), Some(last)) => {
                    format!("there is no epoch {wanted}, only {first} to {last}")
                }
                _ => format!("there is no epoch {wanted}"),
            })
        })
    }
}
