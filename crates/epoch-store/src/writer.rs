//! Writing of one epoch.
//!
//! Pages go to the log as they come, or packed together, then encrypted if that is wanted, each full stripe with its
//! parity; trees, groups, index and trailer follow at the commit, then the parity of the last stripe, and all but the pages once more.
//! What is not committed lies beyond the end of the log, where nobody looks.

use crate::cipher::{Cipher, Tag};
use crate::format::{BLOCK_LEN, EpochLock, Kind, NAME_MAX, Record, Section, Seed, Trailer, Twice};
use crate::gather::Gathered;
use crate::generation::{Generation, fresh_name};
use crate::groups::{TreeLock, TreePlace, encode_group};
use crate::index::{Index, Says};
use crate::locked;
use crate::planted::bug;
use crate::store::{CommitTimes, Held, Live, Store};
use crate::stripe::{Layout, Parity, STRIPE, WIDTH};
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
    pub(crate) store: &'a mut Store,
    pub(crate) generation: Generation,
    pub(crate) id: u64,
    /// Whether this begins a new generation.
    base: bool,
    start: u64,
    /// Where the next page goes.
    pub(crate) tail: u64,
    seed: Seed,
    /// The keys of this attempt, if pages are encrypted …
    cipher: Option<Arc<Cipher>>,
    /// … and where that is done.
    scratch: Vec<u8>,
    /// Of the stripe that is being written.
    parity: Parity,
    pub(crate) index: Index,
    /// Pages that wait to be packed.
    pub(crate) gathered: Gathered,
    /// Somebody waits: pages are stored as they are.
    hurried: bool,
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

/// The groups of an epoch, their encoded table, and the bytes of all new trees.
type Laid = (BTreeMap<String, Held>, Vec<u8>, Vec<u8>);

fn not_encrypted() -> StoreError {
    let what = "a table of the epoch is too long to be encrypted, or its place is in use";
    StoreError::Misuse(what.to_owned())
}

/// All that follows the pages.
struct Tables {
    /// Trees, groups, index, padding, trailer.
    bytes: Vec<u8>,
    trailer: Trailer,
    trailer_place: Twice,
    /// Of the last stripe, if that is not full.
    parity: Vec<u8>,
    parity_at: u64,
    copy_at: u64,
    held: BTreeMap<String, Held>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(
        store: &'a mut Store,
        generation: Generation,
        id: u64,
        start: u64,
        base: bool,
    ) -> Result<Self, StoreError> {
        let began_us = store.host.monotonic_us();
        let seed = generation.key.of(Kind::Page, id);
        let cipher = generation.attempt(&*store.dir, &*store.host, id);
        let cipher = cipher.inspect_err(|_| {
            if base {
                let _ = store.dir.remove(&fresh_name(generation.fresh));
            }
        })?;
        Ok(Self {
            store,
            generation,
            id,
            base,
            start,
            tail: start,
            seed,
            cipher,
            scratch: Vec::new(),
            parity: Parity::new(),
            index: Index::default(),
            gathered: Gathered::default(),
            hurried: false,
            trees: BTreeMap::new(),
            began_us,
            failed: false,
            published: false,
        })
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

    /// Whether pages are packed now.
    pub(crate) fn packs(&self) -> bool {
        self.store.packer.is_some() && !self.hurried
    }

    /// Stores pages of which none is zero, as they are.
    pub(crate) fn store_pages(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let mut done = 0;
        while done < run.count() {
            let stored = self.index.crcs.len() as u64;
            let count = (run.count() - done).min(Layout::contiguous(stored));
            let part = Run::new(run.space(), run.first() + done, count);
            let part = part.ok_or_else(|| StoreError::Misuse("an empty run".to_owned()))?;
            let from = done as usize * PAGE_SIZE;
            self.index.push(part, Says::Data(self.tail));
            self.store_blocks(&bytes[from..][..part.bytes() as usize])?;
            done += count;
        }
        Ok(())
    }

    /// Stores blocks that the present stripe has room for, and its parity if it is full then.
    pub(crate) fn store_blocks(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let first_at = self.tail;
        let mut scratch = std::mem::take(&mut self.scratch);
        let bytes = match &self.cipher {
            None => bytes,
            Some(cipher) => {
                scratch.clear();
                scratch.extend_from_slice(bytes);
                for (i, block) in scratch.chunks_exact_mut(PAGE_SIZE).enumerate() {
                    let at = first_at + (i * PAGE_SIZE) as u64;
                    let tag = cipher.encrypt(Kind::Page, at, &[], block);
                    self.index.tags.push(tag.ok_or_else(not_encrypted)?);
                }
                &scratch
            }
        };
        for (i, block) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
            let at = first_at + (i * PAGE_SIZE) as u64;
            self.index.crcs.push(self.seed.crc(at, block));
            self.parity.add(block);
        }
        self.write(first_at, bytes)?;
        self.tail += bytes.len() as u64;
        // Its memory is used again.
        self.scratch = scratch;
        if self.parity.pages() == STRIPE {
            let parity = self.close_stripe(self.tail);
            self.write(self.tail, &parity)?;
            self.tail += parity.len() as u64;
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self.generation.medium.write(at, bytes);
        written.map_err(|e| self.generation.failed(e))
    }

    /// The parity of the stripe whose pages end at the tail, to be written at `at`.
    fn close_stripe(&mut self, at: u64) -> Vec<u8> {
        let pages = self.parity.pages();
        let distance = (at - self.tail) / BLOCK_LEN + pages;
        let parity = self.parity.take(distance);
        let seed = self.generation.key.of(Kind::Parity, self.id);
        for (i, block) in parity.chunks_exact(PAGE_SIZE).enumerate() {
            let crc = seed.crc(at + (i * PAGE_SIZE) as u64, block);
            self.index.parity.push(crc);
        }
        parity
    }

    /// Finds the stretches of zero pages and of others.
    fn put_all(&mut self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let mut from = 0;
        while let Some(page) = pages.get(from) {
            let zero = *page == ZERO_PAGE || (bug("zero by its second byte") && page[1] == 0);
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
                self.say(part, Says::Zero);
            } else {
                self.take_pages(part, pages[from..from + count].as_flattened())?;
            }
            from += count;
        }
        Ok(())
    }

    /// The length of all tables, with the trailer, in bytes.
    fn tables_len(&self) -> u64 {
        let names = self.trees.keys().map(String::as_str);
        let groups = locked::any_groups_len(names, self.cipher.is_some());
        let trees = self.trees.values().map(|tree| match tree {
            Tree::New(bytes) => bytes.len(),
            Tree::Unchanged(_) => 0,
        });
        // The parity of the last stripe has its checksums in the index as well.
        let parity = self.parity.pages().min(WIDTH) as usize;
        let index = locked::index_len(&self.index, self.index.tags.len());
        let all = trees.sum::<usize>() + groups + index + parity * 4;
        (all as u64).next_multiple_of(BLOCK_LEN) + BLOCK_LEN
    }

    /// The groups of this epoch, their encoded table, and the bytes of all new trees; the tables
    /// stand `apart` from their copy.
    fn lay_trees(&self, apart: u64) -> Result<Laid, StoreError> {
        let (key, at) = (self.generation.key, self.tail);
        let (mut out, mut groups, mut held) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (name, tree) in &self.trees {
            let tree = match tree {
                Tree::Unchanged(held) => held.clone(),
                Tree::New(bytes) => {
                    let tree_at = at + out.len() as u64;
                    let from = out.len();
                    out.extend_from_slice(bytes);
                    let lock = match &self.cipher {
                        None => TreeLock::default(),
                        // It has no place of its own, and no tag: the group table says that it is empty.
                        Some(_) if bytes.is_empty() => TreeLock::default(),
                        Some(cipher) => TreeLock {
                            attempt: cipher.attempt(),
                            tag: cipher
                                .encrypt(Kind::Tree, tree_at, &[], &mut out[from..])
                                .ok_or_else(not_encrypted)?,
                        },
                    };
                    let crc = key.of(Kind::Tree, self.id).crc(tree_at, &out[from..]);
                    let section = Section {
                        at: tree_at,
                        len: bytes.len() as u64,
                        crc,
                    };
                    let place = TreePlace {
                        epoch: self.id,
                        section,
                        copy_at: tree_at + apart,
                        lock,
                    };
                    Held {
                        bytes: Arc::clone(bytes),
                        place,
                    }
                }
            };
            if self.cipher.is_none() {
                encode_group(&mut groups, name, &tree.place);
            }
            held.insert(name.clone(), tree);
        }
        if let Some(cipher) = &self.cipher {
            let places = held.iter().map(|(name, held)| (name.as_str(), held.place));
            let table = locked::encode_groups(places, cipher, at + out.len() as u64);
            groups = table.ok_or_else(not_encrypted)?;
        }
        Ok((held, groups, out))
    }

    /// Appends the page index, which gives its tag.
    fn lay_index(&self, out: &mut Vec<u8>) -> Result<Tag, StoreError> {
        let Some(cipher) = &self.cipher else {
            self.index.encode(out);
            return Ok([0; 16]);
        };
        let at = self.tail + out.len() as u64;
        let encoded = locked::encode_index(&self.index, cipher, at);
        let (bytes, tag) = encoded.ok_or_else(not_encrypted)?;
        out.extend_from_slice(&bytes);
        Ok(tag)
    }

    /// Lays out all that follows the pages. The length of the tables decides where the parity of the
    /// last stripe and the copy of the tables stand, and is known before they are.
    fn tables(&mut self, facts: EpochFacts) -> Result<Tables, StoreError> {
        let (key, at) = (self.generation.key, self.tail);
        let len = self.tables_len();
        let blocks = self.index.crcs.len() as u64;
        let saved = self.index.saved();
        let open = self.parity.pages() > 0;
        let parity_at = Layout::place_parity(self.start, blocks, at + len);
        let parity = self.close_stripe(parity_at);
        let parity_end = if open {
            parity_at + parity.len() as u64
        } else {
            at + len
        };
        let apart = (parity_end - at).max(WIDTH * BLOCK_LEN);
        let (held, mut groups, mut out) = self.lay_trees(apart)?;
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
        let index_tag = self.lay_index(&mut out)?;
        let index_section = section(Kind::Index, index_from, &out[index_from..]);
        out.resize((len - BLOCK_LEN) as usize, 0);
        let previous = self.previous();
        let trailer_at = at + out.len() as u64;
        let mut trailer = Trailer {
            epoch: self.id,
            previous: previous.map_or(Twice::NONE, |record| record.trailer),
            copy_at: trailer_at + apart,
            start: self.start,
            parity_at: if open { parity_at } else { 0 },
            groups: groups_section,
            index: index_section,
            entries: self.index.entries.len() as u64,
            facts,
            pages: blocks + saved,
            saved,
            clusters: self.index.clusters.len() as u64,
            // With the copies of the tables, slot and seal, each in both places.
            bytes_written: (at - self.start) + parity.len() as u64 + 2 * len + 4 * BLOCK_LEN,
            previous_durable_us: previous.map_or(0, |record| record.durable_us),
            skipped: match previous {
                Some(record) if !bug("gap not noted") => self.id - 1 - record.epoch,
                _ => 0,
            },
            lock: EpochLock::default(),
        };
        if let Some(cipher) = &self.cipher {
            trailer.lock = EpochLock {
                attempt: cipher.attempt(),
                index: index_tag,
                own: [0; 16],
            };
            let block = trailer.encode(key, trailer_at);
            trailer.lock.own = cipher.record_tag(trailer_at, Trailer::said(&block));
        }
        let block = trailer.encode(key, trailer_at);
        out.extend_from_slice(&block);
        let trailer_place = Twice {
            at: trailer_at,
            copy_at: trailer.copy_at,
            crc: Trailer::crc(&block).unwrap_or_default(),
            tag: trailer.lock.own,
        };
        Ok(Tables {
            bytes: out,
            trailer,
            trailer_place,
            parity,
            parity_at,
            copy_at: at + apart,
            held,
        })
    }

    /// The commit record of the epoch that this one rests on.
    fn previous(&self) -> Option<Record> {
        self.store
            .current
            .as_ref()
            .filter(|_| !self.base || bug("base rests on others"))
            .map(|live| live.record)
    }

    /// Makes everything but the commit record durable.
    fn write_tables(&mut self, facts: EpochFacts) -> Result<(Live, Acked), StoreError> {
        let tables = self.tables(facts)?;
        self.write(self.tail, &tables.bytes)?;
        if !tables.parity.is_empty() {
            self.write(tables.parity_at, &tables.parity)?;
        }
        self.write(tables.copy_at, &tables.bytes)?;
        let Tables {
            trailer,
            trailer_place,
            held,
            ..
        } = tables;
        let chain = vec![(trailer_place.at, trailer)];
        let record = Record {
            epoch: self.id,
            trailer: trailer_place,
            durable_us: 0,
        };
        let mut live = Live::new(self.generation.clone(), record, chain);
        let below = self.store.current.as_mut().filter(|_| !self.base);
        let failed = |e| self.generation.failed(e);
        // The flush below makes the seal durable before the slot is touched.
        if let Some(below) = below {
            below.sealed = false;
            below.write_seal(Some(record)).map_err(failed)?;
        } else {
            live.announce().map_err(failed)?;
        }
        // Also before a file gets its name: if the record's flush fails, nothing but the record is written again.
        if !bug("data not flushed") {
            live.generation.medium.flush().map_err(failed)?;
        }
        live.trees = Some(held);
        live.in_slot = false;
        live.named = !self.base;
        live.began = (self.began_us, facts.taken_at_ns);
        let Trailer {
            bytes_written,
            pages,
            saved,
            ..
        } = trailer;
        Ok((
            live,
            Acked {
                epoch: EpochId(self.id),
                bytes_written,
                pages,
                saved_bytes: saved * PAGE_SIZE as u64,
            },
        ))
    }
}

/// A writer that was put aside, to be gone on with later.
pub(crate) struct Paused {
    generation: Generation,
    id: u64,
    base: bool,
    start: u64,
    tail: u64,
    seed: Seed,
    cipher: Option<Arc<Cipher>>,
    parity: Parity,
    index: Index,
    gathered: Gathered,
    trees: BTreeMap<String, Tree>,
    began_us: u64,
    failed: bool,
}

impl Writer<'_> {
    /// Puts it aside; nothing that was written is taken back.
    pub(crate) fn pause(mut self: Box<Self>) -> Paused {
        self.published = true;
        Paused {
            generation: self.generation.clone(),
            id: self.id,
            base: self.base,
            start: self.start,
            tail: self.tail,
            seed: self.seed,
            cipher: self.cipher.take(),
            parity: std::mem::replace(&mut self.parity, Parity::new()),
            index: std::mem::take(&mut self.index),
            gathered: std::mem::take(&mut self.gathered),
            trees: std::mem::take(&mut self.trees),
            began_us: self.began_us,
            failed: self.failed,
        }
    }
}

impl Paused {
    /// Goes on, in the store that the writer was of.
    pub(crate) fn resume(self, store: &mut Store) -> Box<Writer<'_>> {
        Box::new(Writer {
            store,
            generation: self.generation,
            id: self.id,
            base: self.base,
            start: self.start,
            tail: self.tail,
            seed: self.seed,
            cipher: self.cipher,
            scratch: Vec::new(),
            parity: self.parity,
            index: self.index,
            gathered: self.gathered,
            hurried: false,
            trees: self.trees,
            began_us: self.began_us,
            failed: self.failed,
            published: false,
        })
    }

    /// Makes what was written so far durable, so that less is left to the commit.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        let flushed = self.generation.medium.flush();
        flushed.map_err(|e| self.generation.failed(e))
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
        if self.failed {
            let what = "an epoch of which a page could not be stored takes no more pages";
            return Err(StoreError::Misuse(what.to_owned()));
        }
        let result = self.put_all(run, bytes);
        self.failed |= result.is_err();
        result
    }

    fn absent(&mut self, run: Run) -> Result<(), StoreError> {
        if !bug("absent pages stay") {
            self.say(run, Says::Absent);
        }
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
        let current = self
            .store
            .current
            .as_ref()
            .filter(|_| !self.base || bug("trees of another file"));
        let held = current.and_then(|live| live.trees.as_ref()?.get(group));
        let tree = match held.filter(|held| {
            *held.bytes == *fdt
                || (bug("trees compared by length") && held.bytes.len() == fdt.len())
        }) {
            Some(held) => Tree::Unchanged(held.clone()),
            None => Tree::New(fdt.into()),
        };
        self.trees.insert(group.to_owned(), tree);
        Ok(())
    }

    fn zero(&mut self, run: Run) -> Result<(), StoreError> {
        self.say(run, Says::Zero);
        Ok(())
    }

    fn hurry(&mut self) {
        self.hurried = true;
    }

    fn commit(mut self: Box<Self>, facts: EpochFacts) -> Result<Acked, StoreError> {
        if self.failed && !bug("incomplete epoch committed") {
            let what = "an epoch of which a page could not be stored cannot be committed";
            return Err(StoreError::Misuse(what.to_owned()));
        }
        let began = self.store.host.monotonic_us();
        if !bug("last cluster forgotten") {
            self.settle_gathered()?;
        }
        let (live, acked) = self.write_tables(facts)?;
        let data_us = self.store.host.monotonic_us().saturating_sub(began);
        self.store.times = CommitTimes {
            data_us,
            record_us: 0,
        };
        // From here on the outcome is open until it is published: nothing is taken back.
        self.published = !bug("open commit taken back");
        self.store.publish(live)?;
        self.published = true;
        Ok(acked)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if self.base {
            let _ = self.store.dir.remove(&fresh_name(self.generation.fresh));
        } else {
            self.store.abandoned = !bug("abandoning not noted");
        }
    }
}
