//! A generation that is written beside the others, from epochs that the store holds already.
//!
//! *Flattening* makes a new base of the newest epoch, carries over what is committed meanwhile, and
//! takes the place of the newest generation. *Thinning* writes a generation again with some of its epochs
//! only. Both are done in pieces, by whoever has the time, while epochs keep coming.
//!
//! # Rules
//! - The file is called `new.<n>` until all of it is durable: cut short at any moment, it never was.
//! - What is carried over has the number and the times that it had. Epochs between two that are carried
//!   are left out; the later one says all that changed since the one before.
//! - The newest generation is left only when all of its committed epochs that are wanted, and the newest
//!   in any case, are in the new one: so the newest epoch stays the newest, whichever file is found.
//! - What is carried is read as by any reader: checked, and made up for. What is lost ends it, and
//!   nothing was changed.

use crate::damage::{self, Trouble};
use crate::format::BLOCK_LEN;
use crate::generation::fresh_name;
use crate::host::Host;
use crate::index::Says;
use crate::map::PageMap;
use crate::older;
use crate::pack::Packer;
use crate::planted::bug;
use crate::reader::Reader;
use crate::store::{Live, Store};
use crate::stored::Stored;
use crate::writer::{Paused, Writer};
use outlive_epoch::{
    Content, EpochId, EpochReader, EpochWriter, Order, PAGE_SIZE, PageSink, Run, StoreError,
    VisitError,
};
use outlive_media::{Access, Directory};
use std::collections::VecDeque;
use std::sync::Arc;

/// Indexes that are read at a time, at most.
const INDEXES: usize = 64;
/// Rounds of catching up, each with what was committed during the one before; what is left then is
/// taken over at the switch.
const ROUNDS: u32 = 8;
/// So little is left to the switch without another round, bytes of pages.
const REST: u64 = 4 << 20;
/// Bytes that are written between two flushes, so that a commit finds little to wait for.
const UNFLUSHED: u64 = 16 << 20;

/// What a piece of work came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Worked {
    /// Bytes that were written.
    pub written: u64,
    /// All is done but the last step: [`Store::switch`].
    pub ready: bool,
}

/// A generation that is being written.
pub(crate) struct Beside {
    /// A store whose newest generation it is.
    side: Store,
    /// Its number, and the one in its name until it is done.
    numbers: (u64, u64),
    /// The generation that is copied.
    source: u64,
    /// It is that of the newest epochs, and the new one goes on from there.
    newest: bool,
    /// All that is wanted of it is in the new one.
    replaces: bool,
    /// Epochs that are still to be carried, but for those that are committed meanwhile.
    wanted: VecDeque<u64>,
    /// The last one that was carried.
    carried: Option<u64>,
    rounds: u32,
    unflushed: u64,
    part: Option<Part>,
}

/// The epoch that is being carried.
struct Part {
    /// Positions in the chain of its source: what is read, from the first one that is not in the new
    /// generation yet to the epoch itself.
    chain: std::ops::RangeInclusive<usize>,
    /// The indexes so far: pages, checksums, and what was declared absent.
    map: PageMap,
    stored: Vec<Stored>,
    absent: Vec<Run>,
    copying: Option<Copying>,
}

struct Copying {
    reader: Reader,
    /// Pages that are still to be copied.
    left: VecDeque<Run>,
    paused: Paused,
}

impl Store {
    /// Begins to make a new base of the newest epoch. What is committed meanwhile is carried over as
    /// well. [`Store::work`] does it, in pieces; at most one such work is under way.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] where there is no epoch, or the store was opened for reading.
    pub fn begin_flattening(&mut self) -> Result<(), StoreError> {
        self.prepare()?;
        let (live, _) = self.find(None)?;
        let source = live.generation.number;
        self.begin_beside(source, VecDeque::new(), false)
    }

    /// Begins to write a generation again with these of its epochs only, in ascending order; of the
    /// newest generation the newest epoch stays in any case.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] where there is no such generation, or it has no such epochs.
    pub fn begin_thinning(&mut self, number: u64, wanted: &[EpochId]) -> Result<(), StoreError> {
        self.prepare()?;
        let live = self.generation(number)?;
        let all = wanted.iter().all(|id| position(live, id.0).is_some());
        let ascends = wanted.windows(2).all(|pair| pair[0] < pair[1]);
        let newest = self.is_newest(number);
        if !all || !ascends || (wanted.is_empty() && !newest) {
            let what = format!("{} does not have these epochs", live.generation.place);
            return Err(StoreError::Misuse(what));
        }
        self.begin_beside(number, wanted.iter().map(|id| id.0).collect(), true)
    }

    fn begin_beside(
        &mut self,
        source: u64,
        wanted: VecDeque<u64>,
        replaces: bool,
    ) -> Result<(), StoreError> {
        self.abandon_beside();
        let fresh = self.take_number()?;
        let newest = self.is_newest(source);
        let numbers = (if newest { fresh } else { source }, fresh);
        let mut side = Self::nameless(Arc::clone(&self.dir), Arc::clone(&self.host));
        side.secret = self.secret.clone();
        side.pack(self.packer.as_ref().map(Packer::codec));
        self.beside = Some(Box::new(Beside {
            side,
            numbers,
            source,
            newest,
            replaces,
            wanted,
            carried: None,
            rounds: 0,
            unflushed: 0,
            part: None,
        }));
        Ok(())
    }

    fn nameless(dir: Arc<dyn Directory>, host: Arc<dyn Host>) -> Self {
        let mut side = Self::empty(dir, host, Access::Write);
        side.nameless = true;
        side
    }

    /// Whether a generation is being written beside the others.
    #[must_use]
    pub fn is_working(&self) -> bool {
        self.beside.is_some()
    }

    /// Gives up what was being written.
    pub fn abandon_beside(&mut self) {
        if let Some(mut beside) = self.beside.take() {
            beside.side.current = None;
            drop(beside.part.take());
            // If this fails, the next opening removes it.
            let _ = self.dir.remove(&fresh_name(beside.numbers.1));
        }
    }

    /// Does a piece of the work: copies about `limit` bytes, or what comes between.
    ///
    /// # Errors
    /// What reading or writing says; the work is given up then, and everything else is as it was.
    /// [`StoreError::Damaged`]: an epoch that was to be carried cannot be read.
    pub fn work(&mut self, limit: u64) -> Result<Worked, StoreError> {
        self.prepare()?;
        self.work_on(limit, false)
    }

    /// Takes over what is left, and puts the new generation in the place of the one that it was made
    /// from. To be called between two epochs.
    ///
    /// # Errors
    /// As for [`Store::work`]. Where the last step failed it is open which of the two files is found:
    /// both hold the newest epoch.
    pub fn switch(&mut self) -> Result<(), StoreError> {
        self.prepare()?;
        let last = !bug("switched before all is carried");
        while self.beside.is_some() && !self.work_on(u64::MAX, last)?.ready {}
        let Some(mut beside) = self.beside.take() else {
            return Ok(());
        };
        let Some(mut live) = beside.side.current.take() else {
            return Err(StoreError::Misuse("nothing was carried over".to_owned()));
        };
        (live.copied, live.in_slot, live.named) = (true, false, false);
        live.replaces = beside.replaces;
        if beside.newest {
            return self.publish(live);
        }
        let published = live.publish(&*self.dir);
        let failed = published.map_err(|e| live.generation.failed(e)).err();
        let there = match &failed {
            None => Some(older::settled(&*self.dir, live, self.secret.as_ref())),
            Some(_) => {
                drop(live);
                let _ = self.dir.remove(&fresh_name(beside.numbers.1));
                // Whichever of the two is there.
                older::open_one(&*self.dir, beside.source, self.secret.as_ref())
            }
        };
        let same = |old: &&mut Live| old.generation.number == beside.source;
        if let (Some(there), Some(old)) = (there, self.older.iter_mut().find(same)) {
            *old = there;
        }
        failed.map_or(Ok(()), Err)
    }

    fn generation(&self, number: u64) -> Result<&Live, StoreError> {
        let mut lives = self.older.iter().chain(&self.current);
        let found = lives.find(|live| live.generation.number == number);
        found.ok_or_else(|| {
            let what = format!("{} has no generation {number}", self.dir.place());
            StoreError::Misuse(what)
        })
    }

    fn is_newest(&self, number: u64) -> bool {
        let newest = self.current.as_ref().map(|live| live.generation.number);
        newest == Some(number)
    }

    fn work_on(&mut self, limit: u64, last: bool) -> Result<Worked, StoreError> {
        let Some(mut beside) = self.beside.take() else {
            return Ok(Worked::default());
        };
        let source = self.generation(beside.source);
        let still = beside.newest == self.is_newest(beside.source);
        let done = match source {
            Ok(live) if still => beside.work(live, limit, last),
            Ok(_) => Err(StoreError::Misuse("another base took its place".to_owned())),
            Err(error) => Err(error),
        };
        self.beside = Some(beside);
        if done.is_err() {
            self.abandon_beside();
        }
        done
    }
}

fn position(live: &Live, epoch: u64) -> Option<usize> {
    live.chain
        .binary_search_by_key(&epoch, |(_, t)| t.epoch)
        .ok()
}

impl Beside {
    fn work(&mut self, source: &Live, limit: u64, last: bool) -> Result<Worked, StoreError> {
        if self.part.is_none() {
            let Some(to) = self.next(source, last) else {
                return Ok(Worked {
                    ready: true,
                    ..Worked::default()
                });
            };
            let from = self.carried.and_then(|epoch| position(source, epoch));
            self.part = Some(Part {
                chain: from.map_or(0, |from| from + 1)..=to,
                map: PageMap::default(),
                stored: Vec::new(),
                absent: Vec::new(),
                copying: None,
            });
        }
        let Some(mut part) = self.part.take() else {
            return Ok(Worked::default());
        };
        let mut worked = Worked::default();
        match part.copying.take() {
            None if part.stored.len() < part.chain.clone().count() => part.open_some(source)?,
            None => self.begin(&mut part, source)?,
            Some(copying) if copying.left.is_empty() => {
                self.commit(&part, copying, source)?;
                return Ok(worked);
            }
            Some(copying) => {
                let (copying, written) = self.copy(copying, limit)?;
                worked.written = written;
                part.copying = Some(copying);
            }
        }
        self.part = Some(part);
        Ok(worked)
    }

    /// The position of the epoch to be carried next; `None` where all is done, or the rest is left to
    /// the switch.
    fn next(&mut self, source: &Live, last: bool) -> Option<usize> {
        if let Some(epoch) = self.wanted.pop_front() {
            return position(source, epoch);
        }
        let newest = source.record.epoch;
        if !self.newest || self.carried == Some(newest) {
            return None;
        }
        let carried = self.carried.unwrap_or(0);
        let behind = source
            .chain
            .iter()
            .rev()
            .take_while(|(_, t)| t.epoch > carried);
        let rest: u64 = behind
            .map(|(_, t)| t.blocks().unwrap_or(0) * BLOCK_LEN)
            .sum();
        let enough = carried > 0 && (rest <= REST || self.rounds >= ROUNDS);
        if enough && !last {
            return None;
        }
        self.rounds += 1;
        Some(source.chain.len() - 1)
    }

    /// Begins the epoch in the new generation, with all that is no page with contents.
    fn begin(&mut self, part: &mut Part, source: &Live) -> Result<(), StoreError> {
        let (at, trailer) = &source.chain[*part.chain.end()];
        let groups = source.generation.groups(*at, trailer)?;
        let map = std::mem::take(&mut part.map);
        let stored = std::mem::take(&mut part.stored);
        let reader = Reader::of(&source.generation, trailer.epoch, groups, map, stored);
        let mut writer = match self.carried {
            None => self.side.base_in(self.numbers, trailer.epoch)?,
            Some(_) => self.side.begin_as(EpochId(trailer.epoch))?,
        };
        if self.carried.is_some() && !bug("what is gone is not carried") {
            for run in part.absent.drain(..) {
                writer.absent(run)?;
            }
        }
        let (left, zero) = reader.parts();
        zero.into_iter().try_for_each(|run| writer.zero(run))?;
        part.copying = Some(Copying {
            reader,
            left: left.into(),
            paused: writer.pause(),
        });
        Ok(())
    }

    /// Copies pages of about `limit` bytes.
    fn copy(&mut self, copying: Copying, limit: u64) -> Result<(Copying, u64), StoreError> {
        let Copying {
            reader,
            mut left,
            paused,
        } = copying;
        let wanted = take(&mut left, (limit / BLOCK_LEN).max(1));
        let mut writer = paused.resume(&mut self.side);
        let written = copy_pages(&reader, &wanted, &mut writer)?;
        let paused = writer.pause();
        self.unflushed += written;
        if self.unflushed >= UNFLUSHED {
            paused.flush()?;
            self.unflushed = 0;
        }
        let copying = Copying {
            reader,
            left,
            paused,
        };
        Ok((copying, written))
    }

    fn commit(&mut self, part: &Part, copying: Copying, source: &Live) -> Result<(), StoreError> {
        let Copying { reader, paused, .. } = copying;
        let mut writer = paused.resume(&mut self.side);
        for group in reader.groups() {
            if let Some(tree) = reader.tree(&group)? {
                writer.tree(&group, &tree)?;
            }
        }
        let at = *part.chain.end();
        let (_, trailer) = &source.chain[at];
        writer.commit(trailer.facts)?;
        let later = source.chain.get(at + 1);
        let durable = later.map_or(source.record.durable_us, |(_, t)| t.previous_durable_us);
        if let Some(live) = self
            .side
            .current
            .as_mut()
            .filter(|_| !bug("durable time of the copy"))
        {
            live.record.durable_us = durable;
        }
        self.carried = Some(trailer.epoch);
        self.unflushed = 0;
        Ok(())
    }
}

impl Part {
    /// Reads some of the indexes.
    fn open_some(&mut self, source: &Live) -> Result<(), Trouble> {
        for at in self.chain.clone().skip(self.stored.len()).take(INDEXES) {
            let (trailer_at, trailer) = &source.chain[at];
            let generation = &source.generation;
            let index = generation.index(*trailer_at, trailer)?;
            let gone = index.entries.iter().filter(|e| e.says == Says::Absent);
            self.absent.extend(gone.map(|e| e.run));
            self.map.apply(&index, self.stored.len());
            let layout = trailer.layout().ok_or_else(|| {
                let (epoch, part) = (Some(trailer.epoch), damage::Part::Trailer);
                generation.damaged(*trailer_at, epoch, part, "it is not in order")
            })?;
            let stored = Stored::new(generation, trailer, layout, index);
            self.stored.push(stored);
        }
        Ok(())
    }
}

/// Takes runs of about so many pages off the front.
fn take(left: &mut VecDeque<Run>, mut pages: u64) -> Vec<Run> {
    let mut taken = Vec::new();
    while pages > 0
        && let Some(run) = left.pop_front()
    {
        let count = run.count().min(pages);
        let rest = Run::new(run.space(), run.first() + count, run.count() - count);
        taken.extend(Run::new(run.space(), run.first(), count));
        if let Some(rest) = rest {
            left.push_front(rest);
        }
        pages -= count;
    }
    taken
}

fn copy_pages(reader: &Reader, wanted: &[Run], writer: &mut Writer<'_>) -> Result<u64, StoreError> {
    let (mut written, mut failed) = (0, None);
    let walked = reader.pages_in(wanted, Order::Fastest, &mut |run, content| {
        let put = match content {
            Content::Zero => writer.zero(run),
            Content::Bytes(bytes) => writer.put(run, bytes),
        };
        written += run.count() * PAGE_SIZE as u64;
        put.map_err(|error| {
            failed = Some(error);
            VisitError::Visitor("the copy cannot be written".into())
        })
    });
    match (failed, walked) {
        (Some(error), _) | (None, Err(VisitError::Store(error))) => Err(error),
        (None, Err(VisitError::Visitor(error))) => Err(StoreError::Misuse(error.to_string())),
        (None, Ok(())) => Ok(written),
    }
}
