//! The store: which generation counts, and the life of its epochs.
//!
//! # Invariants
//! - `current` is the newest committed epoch. It changes only in [`Store::settle`], after its
//!   commit record is durable.
//! - The log beyond `current` is free; nothing there is ever looked at.
//! - A commit whose last step failed stays in `unsettled`, and no bytes of it are overwritten,
//!   until that step has been repeated with success.
//! - `older` generations are never written, but to mend them; see [`crate::older`].

use crate::beside::Beside;
use crate::cipher::{Fingerprint, Secret};
use crate::damage::{self, Damage};
use crate::format::{Record, Trailer};
use crate::generation::{Generation, committed_name, fresh_name, number_of};
use crate::groups::TreePlace;
use crate::host::Host;
use crate::map::PageMap;
use crate::older;
use crate::pack::{Codec, Packer};
use crate::planted::bug;
use crate::reader::Reader;
use crate::ready::Ready;
use crate::scrub::Cursor;
use crate::verify::{self, Progress, Report};
use crate::writer::Writer;
use outlive_epoch::{EpochFacts, EpochId, PAGE_SIZE, StoreError};
use outlive_media::{Access, BLOCK, Directory, MediumError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The epochs of one subject.
pub struct Store {
    pub(crate) dir: Arc<dyn Directory>,
    pub(crate) host: Arc<dyn Host>,
    access: Access,
    pub(crate) current: Option<Live>,
    /// Generations before that, oldest first.
    pub(crate) older: Vec<Live>,
    /// Generations that are replaced become older ones, and are not removed.
    pub(crate) keeps_older: bool,
    /// A generation that is being written beside the others.
    pub(crate) beside: Option<Box<Beside>>,
    /// This is the store of such a generation: nothing gets its final name.
    pub(crate) nameless: bool,
    /// How pages are packed that are written from now on.
    pub(crate) packer: Option<Packer>,
    /// The key of what is encrypted.
    pub(crate) secret: Option<Secret>,
    unsettled: Option<Live>,
    pub(crate) times: CommitTimes,
    pub(crate) ready: Option<Ready>,
    pub(crate) scrubbing: Cursor,
    /// An epoch was abandoned: the medium may still have to report an error of its writes.
    pub(crate) abandoned: bool,
    next_number: u64,
}

/// How long the steps of a commit took, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitTimes {
    /// From laying out the tables until pages and tables had been flushed.
    pub data_us: u64,
    /// Writing and flushing the commit record; 0 where more was done (a base gets its name).
    pub record_us: u64,
}

/// A line of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochSummary {
    /// Which epoch.
    pub id: EpochId,
    /// What its writer said of it.
    pub facts: EpochFacts,
    /// Microseconds from the moment in `facts` (where that is plausible, otherwise from
    /// [`Store::begin`]) until the epoch was acknowledged; 0 where not known, as it is for an
    /// epoch that was the newest when its writer died.
    pub durable_us: u64,
    /// Pages whose contents it stored.
    pub pages: u64,
    /// Bytes that packing them saved.
    pub saved_bytes: u64,
    /// Bytes that it wrote to the medium.
    pub bytes_written: u64,
}

/// A tree as the newest epoch has it.
#[derive(Clone)]
pub(crate) struct Held {
    pub bytes: Arc<[u8]>,
    pub place: TreePlace,
}

/// A generation with its epochs.
pub(crate) struct Live {
    pub generation: Generation,
    pub record: Record,
    /// Oldest first, with the places of the trailers; never empty. While unsettled, the last one
    /// only.
    pub chain: Vec<(u64, Trailer)>,
    /// The trees of the newest epoch; `None` until somebody needs them.
    pub trees: Option<BTreeMap<String, Held>>,
    /// The commit record stands in its slot.
    pub in_slot: bool,
    /// The seal says in both places that it is acknowledged, and that nothing may follow.
    pub sealed: bool,
    /// The file has its final name.
    pub named: bool,
    /// It was copied from another one: its records are to stand in all places, and the durable time
    /// of its newest epoch is known.
    pub copied: bool,
    /// All that is wanted of the generation that it replaces is in it.
    pub replaces: bool,
    /// When the commit began, on the host's clocks: microseconds, and (or 0) nanoseconds at
    /// which the subject was stopped.
    pub began: (u64, u64),
    /// The pages of the first so many epochs of the chain.
    map: (PageMap, usize),
}

impl Live {
    pub fn new(generation: Generation, record: Record, chain: Vec<(u64, Trailer)>) -> Self {
        Self {
            generation,
            record,
            chain,
            trees: None,
            in_slot: true,
            sealed: false,
            named: true,
            copied: false,
            replaces: false,
            began: (0, 0),
            map: (PageMap::default(), 0),
        }
    }

    /// The epochs of this generation, oldest first.
    pub fn summaries(&self) -> Vec<EpochSummary> {
        let later = self.chain.iter().skip(1);
        let durable = later.map(|(_, next)| next.previous_durable_us);
        let durable = durable.chain([self.record.durable_us]);
        let summary = |((_, trailer), durable_us): (&(u64, Trailer), u64)| EpochSummary {
            id: EpochId(trailer.epoch),
            facts: trailer.facts,
            durable_us,
            pages: trailer.pages,
            saved_bytes: trailer.saved.saturating_mul(PAGE_SIZE as u64),
            bytes_written: trailer.bytes_written,
        };
        self.chain.iter().zip(durable).map(summary).collect()
    }

    fn load_trees(&mut self) -> Result<(), StoreError> {
        if let (None, Some((at, trailer))) = (&self.trees, self.chain.last()) {
            let mut trees = BTreeMap::new();
            for (name, place) in self.generation.groups(*at, trailer)? {
                let bytes = self.generation.tree(&name, &place)?.into();
                trees.insert(name, Held { bytes, place });
            }
            self.trees = Some(trees);
        }
        Ok(())
    }

    /// The last step of a commit, which can be repeated.
    pub fn publish(&mut self, dir: &dyn Directory) -> Result<(), MediumError> {
        if !self.in_slot {
            self.in_slot = bug("failed record taken for done");
            self.write_slot()?;
            if !bug("record not flushed") {
                self.generation.medium.flush()?;
            }
            self.in_slot = true;
            self.sealed |= self.copied;
        }
        if !self.named {
            let (fresh, named) = (
                fresh_name(self.generation.fresh),
                committed_name(self.generation.number),
            );
            match dir.rename(&fresh, &named) {
                // An attempt that gave an error may have taken effect all the same.
                Err(e)
                    if !bug("repeated rename fails")
                        && e.is_not_found()
                        && dir.list()?.contains(&named) => {}
                other => other?,
            }
            if !bug("rename not synced") {
                dir.sync()?;
            }
            self.named = true;
        }
        Ok(())
    }
}

impl Store {
    pub(crate) fn empty(dir: Arc<dyn Directory>, host: Arc<dyn Host>, access: Access) -> Self {
        Self {
            dir,
            host,
            access,
            current: None,
            older: Vec::new(),
            keeps_older: false,
            beside: None,
            nameless: false,
            packer: None,
            secret: None,
            unsettled: None,
            times: CommitTimes::default(),
            ready: None,
            scrubbing: Cursor::default(),
            abandoned: false,
            next_number: 1,
        }
    }

    /// Packs pages that are written from now on, where that pays; `None`: all are stored as they are. That
    /// is not remembered, and what is there already can be read in any case.
    pub fn pack(&mut self, codec: Option<Codec>) {
        if self.packer.as_ref().map(Packer::codec) != codec {
            self.packer = codec.map(Packer::new);
        }
    }

    /// Bytes that are free where the store is; `None` where the place does not tell.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        self.dir.free_bytes()
    }

    /// Removes files that were never published.
    pub(crate) fn remove_leftovers(&mut self) -> Result<(), MediumError> {
        let newest = self.current.as_ref().map(|live| live.generation.number);
        for name in self.dir.list()? {
            let (old, new) = (number_of(&name, "epochs."), number_of(&name, "new."));
            if let Some(number) = old.or(new)
                && !bug("numbers begin again")
            {
                self.next_number = self.next_number.max(number.saturating_add(1));
            }
            let published = old.is_some_and(|old| Some(old) < newest);
            if (new.is_some() && !bug("unpublished file kept"))
                || (published && bug("older files removed at opening"))
            {
                self.dir.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Begins the next epoch, on top of the newest one; the first epoch of all is a base.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Medium`]; [`StoreError::Damaged`] where the trees of
    /// the newest epoch cannot be read back; [`StoreError::Misuse`] for a store that was opened
    /// for reading.
    pub fn begin(&mut self) -> Result<Box<Writer<'_>>, StoreError> {
        self.prepare()?;
        let Some(live) = &mut self.current else {
            return self.begin_base();
        };
        live.load_trees()?;
        let id = live.record.epoch.checked_add(1).ok_or_else(exhausted)?;
        let (generation, start) = (live.generation.clone(), live.record.log_end());
        Ok(Box::new(Writer::new(self, generation, id, start, false)?))
    }

    /// Begins a *full* epoch in a file of its own: it does not rest on earlier epochs, and its
    /// commit replaces them.
    ///
    /// # Errors
    /// As for [`Store::begin`].
    pub fn begin_base(&mut self) -> Result<Box<Writer<'_>>, StoreError> {
        self.prepare()?;
        let newest = self.current.as_ref().map_or(0, |live| live.record.epoch);
        self.base(newest.checked_add(1).ok_or_else(exhausted)?)
    }

    fn base(&mut self, id: u64) -> Result<Box<Writer<'_>>, StoreError> {
        let number = self.take_number()?;
        self.base_in((number, number), id)
    }

    /// A number that no file had.
    pub(crate) fn take_number(&mut self) -> Result<u64, StoreError> {
        let number = self.next_number;
        self.next_number = number.checked_add(1).ok_or_else(exhausted)?;
        Ok(number)
    }

    /// Begins a base in a generation of this number, in a file that is called by the other one until
    /// it gets its final name.
    pub(crate) fn base_in(
        &mut self,
        numbers: (u64, u64),
        id: u64,
    ) -> Result<Box<Writer<'_>>, StoreError> {
        let secret = self.secret.as_ref();
        let generation = Generation::create(&*self.dir, numbers, id, &*self.host, secret);
        let generation = generation.inspect_err(|_| {
            let _ = self.dir.remove(&fresh_name(numbers.1));
        })?;
        let start = crate::format::LOG_AT;
        Ok(Box::new(Writer::new(self, generation, id, start, true)?))
    }

    /// Begins the first epoch of a store that has none, under the number that it had elsewhere.
    ///
    /// # Errors
    /// As for [`Store::begin`]; [`StoreError::Misuse`] where there is an epoch, or for number 0.
    pub fn begin_first(&mut self, id: EpochId) -> Result<Box<Writer<'_>>, StoreError> {
        self.prepare()?;
        if self.current.is_some() || id.0 == 0 {
            let place = self.dir.place();
            let what = format!("epoch {id} cannot be the first of {place}");
            return Err(StoreError::Misuse(what));
        }
        self.base(id.0)
    }

    /// Begins the next epoch under a number that is not the next one, because those in between are
    /// left out: what it is given is what changed since the newest epoch that is here. The first
    /// epoch of all may have any number.
    ///
    /// # Errors
    /// As for [`Store::begin`]; [`StoreError::Misuse`] for a number that is not after the newest.
    pub fn begin_as(&mut self, id: EpochId) -> Result<Box<Writer<'_>>, StoreError> {
        if self.current.is_none() && self.is_settled() {
            return self.begin_first(id);
        }
        self.prepare()?;
        let place = self.dir.place();
        let newest = self.newest().unwrap_or(EpochId(0));
        let Some(live) = self
            .current
            .as_mut()
            .filter(|_| id > newest && id.0 < u64::MAX)
        else {
            let what = format!("epoch {id} cannot follow epoch {newest} of {place}");
            return Err(StoreError::Misuse(what));
        };
        live.load_trees()?;
        let (generation, start) = (live.generation.clone(), live.record.log_end());
        Ok(Box::new(Writer::new(self, generation, id.0, start, false)?))
    }

    pub(crate) fn prepare(&mut self) -> Result<(), StoreError> {
        if self.access == Access::Read {
            let place = self.dir.place();
            return Err(StoreError::Misuse(format!(
                "{place} was opened for reading only"
            )));
        }
        self.settle()?;
        if let (true, Some(live)) = (self.abandoned && !bug("old error kept"), &self.current) {
            // Collects the error that a write of the abandoned epoch may have left behind. If it
            // is a lasting one, the flush of the next commit reports it again.
            let _ = live.generation.medium.flush();
        }
        self.abandoned = false;
        Ok(())
    }

    /// Takes over an epoch whose data is durable, and publishes it.
    pub(crate) fn publish(&mut self, mut live: Live) -> Result<(), StoreError> {
        live.named |= self.nameless;
        self.unsettled = Some(live);
        let settled = self.settle();
        if bug("open commit forgotten") {
            self.unsettled = None;
        }
        settled
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// Whether no commit is open.
    pub(crate) fn is_settled(&self) -> bool {
        self.unsettled.is_none()
    }

    /// Completes the last step of a commit, if it is open.
    fn settle(&mut self) -> Result<(), StoreError> {
        let Some(live) = &mut self.unsettled else {
            return Ok(());
        };
        let (began, alone) = (self.host.monotonic_us(), live.named);
        if let Some(old) = &self.current
            && old.generation.number != live.generation.number
            && bug("old file removed first")
        {
            let _ = self.dir.remove(&committed_name(old.generation.number));
        }
        live.publish(&*self.dir)
            .map_err(|e| live.generation.failed(e))?;
        let took = self.host.monotonic_us().saturating_sub(began);
        self.times.record_us = if alone { took } else { 0 };
        if !live.copied {
            live.record.durable_us = durable_us(&*self.host, live.began);
        }
        let replaced = std::mem::replace(&mut self.current, self.unsettled.take());
        if let (Some(old), Some(new)) = (replaced, &mut self.current) {
            if old.generation.number == new.generation.number && !bug("chain forgotten") {
                new.map = old.map;
                let last = std::mem::replace(&mut new.chain, old.chain);
                new.chain.extend(last);
            } else if self.keeps_older && !new.replaces && !bug("replaced although it is kept") {
                let secret = self.secret.as_ref();
                self.older.push(older::settled(&*self.dir, old, secret));
            } else {
                // What is in it is not wanted; if this fails, it stays until somebody looks again.
                let _ = self.dir.remove(&committed_name(old.generation.number));
            }
        }
        Ok(())
    }

    /// Reads an epoch; without a number the newest one. The reader stays valid whatever becomes
    /// of the store.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`], [`StoreError::Medium`].
    pub fn epoch(&self, id: Option<EpochId>) -> Result<Reader, StoreError> {
        let (live, position) = self.find(id)?;
        Ok(Reader::new(&live.generation, &live.chain[..=position])?)
    }

    /// The newest committed epoch.
    #[must_use]
    pub fn newest(&self) -> Option<EpochId> {
        self.current.as_ref().map(|live| EpochId(live.record.epoch))
    }

    /// The key that the newest generation is encrypted with, by its fingerprint; `None` where it is not encrypted.
    #[must_use]
    pub fn key(&self) -> Option<Fingerprint> {
        let live = self.current.as_ref()?;
        Some(live.generation.superblock.lock?.fingerprint)
    }

    /// What the newest commit took.
    #[must_use]
    pub fn last_commit(&self) -> CommitTimes {
        self.times
    }

    /// Bytes of the newest generation, without space taken ahead.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.current
            .as_ref()
            .map_or(0, |live| live.record.log_end())
    }

    /// Bytes that the pages of the newest epoch take, as they are stored: about what a new base would write.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] or [`StoreError::Medium`] while reading the page indexes.
    pub fn live_bytes(&mut self) -> Result<u64, StoreError> {
        let Some(live) = &mut self.current else {
            return Ok(0);
        };
        let Live {
            generation,
            chain,
            map: (map, done),
            ..
        } = live;
        for (position, (at, trailer)) in chain.iter().enumerate().skip(*done) {
            map.apply(&generation.index(*at, trailer)?, position);
            *done = position + 1;
        }
        Ok(map.bytes())
    }

    /// Reads and checks everything that is committed.
    ///
    /// # Errors
    /// Only where nothing can be checked at all; damage is in the report.
    pub fn verify(&self, progress: Progress<'_>) -> Result<Report, StoreError> {
        verify::verify_in_with(&*self.dir, self.secret.as_ref(), progress)
    }

    /// Damage that was met and made up for since this store was opened, by it and its readers.
    #[must_use]
    pub fn met(&self) -> Vec<Damage> {
        let lives = self.older.iter().chain(&self.current);
        lives.flat_map(|live| live.generation.met.all()).collect()
    }

    /// Leaves the image in its most robust form (a second copy of the commit record, no space
    /// taken ahead) and says whether that worked; dropping the store does the same silently.
    ///
    /// # Errors
    /// [`StoreError::Medium`]. The committed epochs are durable in any case.
    pub fn close(mut self) -> Result<(), StoreError> {
        self.finish().map_err(damage::medium)
    }

    fn finish(&mut self) -> Result<(), MediumError> {
        self.abandon_beside();
        if self.access == Access::Read || self.unsettled.is_some() {
            return Ok(());
        }
        let Some(live) = &mut self.current else {
            return Ok(());
        };
        let medium = &live.generation.medium;
        let beyond = medium.geometry()?.len > live.record.log_end();
        if beyond {
            let short = u64::from(bug("closed too short"));
            medium.truncate(live.record.log_end() - short * 40 * BLOCK as u64)?;
        }
        if !live.sealed && !bug("closed without a seal") {
            live.write_seal(None)?;
        }
        if beyond || !live.sealed {
            medium.flush()?;
            live.sealed = true;
        }
        Ok(())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let newest = self.newest();
        f.debug_struct("Store")
            .field("dir", &self.dir.place())
            .field("newest", &newest)
            .finish()
    }
}

/// Longest time between stop and acknowledgement that is believed, in nanoseconds: an hour. More
/// says that the wall clock was set.
const PLAUSIBLE_NS: u64 = 3_600_000_000_000;

fn durable_us(host: &dyn Host, (began_us, taken_at_ns): (u64, u64)) -> u64 {
    let since_stop = host
        .realtime_ns()
        .checked_sub(taken_at_ns)
        .filter(|ns| *ns < PLAUSIBLE_NS);
    let since_begin = host.monotonic_us().saturating_sub(began_us);
    since_stop.map_or(since_begin, |ns| ns / 1000)
}

fn exhausted() -> StoreError {
    StoreError::Misuse("the store has used up its numbers".to_owned())
}
