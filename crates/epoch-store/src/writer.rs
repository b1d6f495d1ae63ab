//! Writing of one epoch.
//!
//! Pages go to the log as they come; trees, groups, index and trailer follow at the commit. What
//! is not committed lies beyond the end of the log, where nobody looks.

use crate::format::{
    self, BLOCK_LEN, Index, Kind, NAME_MAX, Record, Says, Section, Seed, Trailer, TreePlace,
};
use crate::generation::{Generation, fresh_name};
use crate::store::{CommitTimes, Held, Live, Store};
use outlive_epoch::{
    Acked, EpochFacts, EpochId, EpochWriter, PAGE_SIZE, PageSink, Run, StoreError,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pages that are summed and copied at a time, so that they are copied while still in the cache.
const BATCH: usize = 64;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Writes one epoch of a [`Store`].
pub struct Writer<'a> {
    store: &'a mut Store,
    generation: Generation,
    id: u64,
    /// Whether this begins a new generation.
    base: bool,
    start: u64,
    /// Where the next page goes.
    tail: u64,
    seed: Seed,
    index: Index,
    trees: BTreeMap<String, Tree>,
    began_us: u64,
    /// A page could not be taken: the epoch is incomplete and must not be committed.
    failed: bool,
    published: bool,
}

/// A tree of this epoch.
enum Tree {
    New(Arc<[u8]>),
    Unchanged(Held),
}

impl<'a> Writer<'a> {
    pub(crate) fn new(
        store: &'a mut Store,
        generation: Generation,
        id: u64,
        start: u64,
        base: bool,
    ) -> Self {
        let began_us = store.host.monotonic_us();
        let seed = generation.key.of(Kind::Page, id);
        Self {
            store,
            generation,
            id,
            base,
            start,
            tail: start,
            seed,
            index: Index::default(),
            trees: BTreeMap::new(),
            began_us,
            failed: false,
            published: false,
        }
    }

    /// Begins further on in the log of this generation, before anything was written.
    pub(crate) fn start_at(&mut self, generation: u64, at: u64) {
        let fits = self.generation.number == generation && at >= self.start;
        if fits && !self.base && self.tail == self.start {
            (self.start, self.tail) = (at, at);
        }
    }

    /// Whether this epoch begins a new generation: it must be given every page.
    #[must_use]
    pub fn is_base(&self) -> bool {
        self.base
    }

    /// Stores pages of which none is zero.
    fn store_pages(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let first_at = self.tail;
        let crcs = bytes
            .chunks_exact(PAGE_SIZE)
            .zip((first_at..).step_by(PAGE_SIZE));
        self.index
            .crcs
            .extend(crcs.map(|(page, at)| self.seed.crc(at, page)));
        self.generation
            .medium
            .write(first_at, bytes)
            .map_err(|e| self.generation.failed(e))?;
        self.index.push(run, Says::Data(first_at));
        self.tail += bytes.len() as u64;
        Ok(())
    }

    /// Finds the stretches of zero pages and of others.
    fn put_all(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let mut from = 0;
        while let Some(page) = pages.get(from) {
            let zero = *page == ZERO_PAGE;
            let limit = if zero {
                pages.len()
            } else {
                pages.len().min(from + BATCH)
            };
            let same = |page: &&[u8; PAGE_SIZE]| (**page == ZERO_PAGE) == zero;
            let count = 1 + pages[from + 1..limit].iter().take_while(same).count();
            let part = Run::new(run.space(), run.first() + from as u64, count as u64);
            let part = part.ok_or_else(|| StoreError::Misuse("an empty run".to_owned()))?;
            if zero {
                self.index.push(part, Says::Zero);
            } else {
                self.store_pages(part, pages[from..from + count].as_flattened())?;
            }
            from += count;
        }
        Ok(())
    }

    /// Lays out all that follows the pages; gives it with the trailer and the held trees.
    fn tables(&self, facts: EpochFacts) -> (Vec<u8>, Trailer, BTreeMap<String, Held>) {
        let (key, at) = (self.generation.key, self.tail);
        let (mut out, mut groups, mut held) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (name, tree) in &self.trees {
            let tree = match tree {
                Tree::Unchanged(held) => held.clone(),
                Tree::New(bytes) => {
                    let tree_at = at + out.len() as u64;
                    let crc = key.of(Kind::Tree, self.id).crc(tree_at, bytes);
                    out.extend_from_slice(bytes);
                    let section = Section {
                        at: tree_at,
                        len: bytes.len() as u64,
                        crc,
                    };
                    let place = TreePlace {
                        epoch: self.id,
                        section,
                    };
                    Held {
                        bytes: Arc::clone(bytes),
                        place,
                    }
                }
            };
            format::encode_group(&mut groups, name, &tree.place);
            held.insert(name.clone(), tree);
        }
        let section = |kind, from: usize, bytes: &[u8]| {
            let at = at + from as u64;
            Section {
                at,
                len: bytes.len() as u64,
                crc: key.of(kind, self.id).crc(at, bytes),
            }
        };
        let groups_section = section(Kind::Groups, out.len(), &groups);
        out.append(&mut groups);
        let index_from = out.len();
        self.index.encode(&mut out);
        let index_section = section(Kind::Index, index_from, &out[index_from..]);
        out.resize(out.len().next_multiple_of(BLOCK_LEN as usize), 0);
        let previous = self.previous();
        let trailer_at = at + out.len() as u64;
        let trailer = Trailer {
            epoch: self.id,
            previous_at: previous.map_or(0, |record| record.trailer_at),
            start: self.start,
            groups: groups_section,
            index: index_section,
            entries: self.index.entries.len() as u64,
            facts,
            pages: self.index.crcs.len() as u64,
            // With the commit record and its copy.
            bytes_written: trailer_at + BLOCK_LEN - self.start + 2 * BLOCK_LEN,
            previous_durable_us: previous.map_or(0, |record| record.durable_us),
        };
        out.extend_from_slice(&trailer.encode(key, trailer_at));
        (out, trailer, held)
    }

    /// The commit record of the epoch that this one rests on.
    fn previous(&self) -> Option<Record> {
        self.store
            .current
            .as_ref()
            .filter(|_| !self.base)
            .map(|live| live.record)
    }

    /// Makes everything but the commit record durable.
    fn write_tables(&mut self, facts: EpochFacts) -> Result<(Live, Acked), StoreError> {
        let (tables, trailer, held) = self.tables(facts);
        let (medium, failed) = (&self.generation.medium, |e| self.generation.failed(e));
        let trailer_at = self.tail + tables.len() as u64 - BLOCK_LEN;
        medium.write(self.tail, &tables).map_err(failed)?;
        let current = self
            .store
            .current
            .as_ref()
            .filter(|live| !self.base && !live.sealed);
        if let Some(live) = current {
            // The flush below makes this durable before the other slot is touched.
            live.write_record(format::SEAL_AT).map_err(failed)?;
        }
        medium.flush().map_err(failed)?;
        let chain = vec![(trailer_at, trailer)];
        let record = Record {
            epoch: self.id,
            trailer_at,
            durable_us: 0,
        };
        let mut live = Live::new(self.generation.clone(), record, chain);
        live.trees = Some(held);
        live.in_slot = false;
        live.named = !self.base;
        live.began = (self.began_us, facts.taken_at_ns);
        let Trailer {
            bytes_written,
            pages,
            ..
        } = trailer;
        Ok((
            live,
            Acked {
                epoch: EpochId(self.id),
                bytes_written,
                pages,
            },
        ))
    }
}

impl PageSink for Writer<'_> {
    fn put(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.len() as u64 != run.bytes() {
            let (have, need) = (bytes.len(), run.bytes());
            return Err(StoreError::Misuse(format!(
                "{have} bytes for pages of {need} bytes"
            )));
        }
        let result = self.put_all(run, bytes);
        self.failed |= result.is_err();
        result
    }

    fn absent(&mut self, run: Run) -> Result<(), StoreError> {
        self.index.push(run, Says::Absent);
        Ok(())
    }
}

impl EpochWriter for Writer<'_> {
    fn id(&self) -> EpochId {
        EpochId(self.id)
    }

    fn tree(&mut self, group: &str, fdt: &[u8]) -> Result<(), StoreError> {
        if group.len() > NAME_MAX {
            return Err(StoreError::Misuse(format!(
                "the name of group {group} is too long"
            )));
        }
        if self.trees.contains_key(group) {
            return Err(StoreError::Misuse(format!(
                "group {group} is written twice"
            )));
        }
        let current = self.store.current.as_ref().filter(|_| !self.base);
        let held = current.and_then(|live| live.trees.as_ref()?.get(group));
        let tree = match held.filter(|held| *held.bytes == *fdt) {
            Some(held) => Tree::Unchanged(held.clone()),
            None => Tree::New(fdt.into()),
        };
        self.trees.insert(group.to_owned(), tree);
        Ok(())
    }

    fn commit(mut self: Box<Self>, facts: EpochFacts) -> Result<Acked, StoreError> {
        if self.failed {
            let what = "an epoch of which a page could not be stored cannot be committed";
            return Err(StoreError::Misuse(what.to_owned()));
        }
        let began = self.store.host.monotonic_us();
        let (live, acked) = self.write_tables(facts)?;
        let data_us = self.store.host.monotonic_us().saturating_sub(began);
        self.store.times = CommitTimes {
            data_us,
            record_us: 0,
        };
        // From here on the outcome is open until it is published: nothing is taken back.
        self.published = true;
        self.store.publish(live)?;
        Ok(acked)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if self.base {
            let _ = self.store.dir.remove(&fresh_name(self.generation.number));
        } else {
            self.store.abandoned = true;
        }
    }
}
