//! Named media inside one medium that has no names: a block device, a mapping, a piece of memory.
//!
//! A table says which blocks belong to which name. It stands in two slots, each in two places:
//! ```text
//! block  0        1        2 .. 31    32       33       34 .. 63   64
//!        +--------+--------+----------+--------+--------+----------+-----------------------------
//!        | slot 0 | slot 1 | (unused) | slot 0 | slot 1 | (unused) | blocks that belong to names
//!        +--------+--------+----------+--------+--------+----------+-----------------------------
//! ```
//! The places are so far apart that no run of damage of up to 64 KiB harms a slot in both.
//!
//! # Invariants
//! - The slot that holds the newest durable table is never written to. A commit writes the other one, in
//!   both places, and flushes; it counts as soon as one of the two is whole. A commit that failed is
//!   repeated in the same slot.
//! - Blocks that belonged to a medium in the durable table are not given to another one before a
//!   table without them is durable, and the last handle of that medium is gone.
//! - What blocks hold that were given to a medium and not written yet means nothing, as on any medium.
//!
//! A table is committed by the flush of any of the media, and by [`Directory::sync`]; a flush without a
//! change of the table is a flush and nothing else. Names may become durable earlier than asked for.
//!
//! # What it refuses
//! To take a medium that holds anything else for its own ([`Volume::open`]), or to make a volume
//! of it ([`Volume::format`], unless told to overwrite it).

mod table;

use crate::{Access, BLOCK, Buffer, Directory, Geometry, Medium, MediumError, check_blocks};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use table::{Entry, Found, Piece, Table};

/// Blocks of one place of both slots, and where each place begins.
const PLACES: [u64; 2] = [0, 32];
/// Blocks that belong to no name.
const RESERVED: u64 = 64;
/// The least and the most space taken ahead of writing, in blocks.
const AHEAD: (u64, u64) = (256, 65536);
/// Bytes at each end in which other owners of a medium leave their marks.
const MARKS: u64 = 1 << 20;

/// A medium with names in it. Clones are handles of the same volume.
#[derive(Clone)]
pub struct Volume(Arc<Inner>);

struct Inner {
    medium: Arc<dyn Medium>,
    access: Access,
    state: Mutex<State>,
}

/// The blocks of a medium, shared by its name and its handles.
#[derive(Debug, Default)]
struct Body {
    identity: u64,
    pieces: RwLock<Vec<Piece>>,
}

struct State {
    uuid: [u8; 16],
    blocks: u64,
    next: u64,
    names: BTreeMap<String, Arc<Body>>,
    /// First blocks and how many of what can be given away.
    unused: BTreeMap<u64, u64>,
    /// Media without a name, and pieces that were cut off (a body of their own).
    gone: Vec<Gone>,
    /// The sequence number of the newest table that was written, durable or not.
    sequence: u64,
    /// The slot of the newest durable table.
    slot: u64,
    /// The names or blocks are not what the durable table says.
    changed: bool,
}

struct Gone {
    body: Arc<Body>,
    /// A table without it is durable.
    durable: bool,
}

/// A panic cannot leave these structures half-changed, so a poisoned lock is as good as any.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Body {
    fn pieces(&self) -> Vec<Piece> {
        self.pieces
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, pieces: Vec<Piece>) {
        *self.pieces.write().unwrap_or_else(PoisonError::into_inner) = pieces;
    }

    fn blocks(&self) -> u64 {
        let pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        pieces.iter().map(|piece| piece.count).sum()
    }
}

/// Where a slot stands in one of its places, in bytes.
fn slot_at(place: u64, slot: u64) -> u64 {
    (place + slot) * BLOCK as u64
}

/// What is found in the slots.
struct Slots {
    /// The newest table, and its slot.
    newest: Option<(Table, u64)>,
    newer: Option<u32>,
    empty: bool,
}

fn read_slots(medium: &dyn Medium) -> Result<Slots, MediumError> {
    let mut slots = Slots {
        newest: None,
        newer: None,
        empty: true,
    };
    let mut buffer = Buffer::new(BLOCK)
        .map_err(|e| MediumError::io(medium.place(), "buffer for reading", 0, 0, e))?;
    for place in PLACES {
        for slot in 0..2 {
            let at = slot_at(place, slot);
            match medium.read(at, &mut buffer) {
                Ok(()) => {}
                // It counts as harmed: the same stands in another place.
                Err(MediumError::Io { .. }) => {
                    slots.empty = false;
                    continue;
                }
                Err(e) => return Err(e),
            }
            let mut block = [0; BLOCK];
            block.copy_from_slice(&buffer[..BLOCK]);
            let found = Table::decode(&block, at, RESERVED);
            slots.empty &= found == Found::Empty;
            match found {
                Found::Table(table) => {
                    let known = slots.newest.as_ref().map_or(0, |(t, _)| t.sequence);
                    if table.sequence > known {
                        slots.newest = Some((table, slot));
                    }
                }
                Found::Newer(version) => slots.newer = Some(version),
                Found::Empty | Found::Foreign => {}
            }
        }
    }
    Ok(slots)
}

/// Whether nobody left a mark at either end of a medium: the first and the last MiB are zeros.
///
/// # Errors
/// What the medium says.
pub fn is_blank(medium: &dyn Medium) -> Result<bool, MediumError> {
    let len = medium.geometry()?.len;
    let marks = MARKS.min(len);
    let mut buffer = Buffer::new(marks as usize)
        .map_err(|e| MediumError::io(medium.place(), "buffer for reading", 0, 0, e))?;
    let last = (len - marks) / BLOCK as u64 * BLOCK as u64;
    for at in [0, last] {
        let end = marks.min(len - at) as usize / BLOCK * BLOCK;
        medium.read(at, &mut buffer[..end])?;
        if buffer[..end].iter().any(|b| *b != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn whole_blocks(medium: &dyn Medium) -> Result<u64, MediumError> {
    let blocks = medium.geometry()?.len / BLOCK as u64;
    if blocks <= RESERVED {
        let needed = (RESERVED + 1) * BLOCK as u64;
        return Err(MediumError::Full {
            place: medium.place(),
            needed,
        });
    }
    Ok(blocks)
}

fn no_volume(medium: &dyn Medium, what: &'static str) -> MediumError {
    MediumError::NoVolume {
        place: medium.place(),
        what,
    }
}

impl Volume {
    /// Makes an empty volume of a medium, with an identity that no other one has. What the medium holds
    /// is lost; where it holds anything, that must be `overwrite`'s wish.
    ///
    /// # Errors
    /// [`MediumError::NoVolume`] where it holds something; [`MediumError::Full`] where it is too
    /// small; what the medium says.
    pub fn format(
        medium: Arc<dyn Medium>,
        uuid: [u8; 16],
        overwrite: bool,
    ) -> Result<Self, MediumError> {
        let blocks = whole_blocks(&*medium)?;
        if !overwrite && !is_blank(&*medium)? {
            return Err(no_volume(&*medium, "it holds something else"));
        }
        // What may be left of an older volume must not look newer than what comes.
        for place in PLACES {
            for slot in 0..2 {
                medium.write(slot_at(place, slot), &[0; BLOCK])?;
            }
        }
        medium.flush()?;
        let names = BTreeMap::new();
        let table = Table {
            uuid,
            sequence: 0,
            blocks,
            next: 1,
            names,
        };
        let volume = Self::with(medium, Access::Write, &table, 1);
        volume.commit()?;
        Ok(volume)
    }

    /// Opens a volume. The caller sees to it that there is one writer only.
    ///
    /// # Errors
    /// [`MediumError::NoVolume`] where it is none, or one of a newer version; what the medium says.
    pub fn open(medium: Arc<dyn Medium>, access: Access) -> Result<Self, MediumError> {
        let blocks = whole_blocks(&*medium)?;
        let slots = read_slots(&*medium)?;
        if slots.newer.is_some() {
            return Err(no_volume(&*medium, "a newer version of Outlive wrote it"));
        }
        let Some((table, slot)) = slots.newest else {
            let what = match slots.empty {
                true => "nothing is on it",
                false => "it holds something else, or both copies of its table are harmed",
            };
            return Err(no_volume(&*medium, what));
        };
        if table.blocks > blocks {
            return Err(no_volume(&*medium, "it is smaller than it was"));
        }
        let volume = Self::with(medium, access, &table, slot);
        if access == Access::Write {
            // If its writer was killed, what was found may not be durable. A table that was found once
            // must be found again: so the other slot gets it too, before anything is built on it.
            volume.0.medium.flush()?;
            volume.commit()?;
        }
        Ok(volume)
    }

    fn with(medium: Arc<dyn Medium>, access: Access, table: &Table, slot: u64) -> Self {
        let mut state = State {
            uuid: table.uuid,
            blocks: table.blocks,
            next: table.next,
            names: BTreeMap::new(),
            unused: table.unused(RESERVED),
            gone: Vec::new(),
            sequence: table.sequence,
            slot,
            changed: true,
        };
        state.take(table);
        Self(Arc::new(Inner {
            medium,
            access,
            state: Mutex::new(state),
        }))
    }

    /// Which volume this is.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        lock(&self.0.state).uuid
    }

    fn writable(&self) -> Result<MutexGuard<'_, State>, MediumError> {
        match self.0.access {
            Access::Write => Ok(lock(&self.0.state)),
            Access::Read => Err(MediumError::Misuse {
                place: self.place(),
                what: "the volume was opened for reading only",
            }),
        }
    }

    /// Reads the table again, where another process may have changed it.
    fn refresh(&self) -> Result<(), MediumError> {
        if self.0.access == Access::Read
            && let Some((table, _)) = read_slots(&*self.0.medium)?.newest
        {
            let mut state = lock(&self.0.state);
            if table.uuid == state.uuid && table.sequence > state.sequence {
                state.sequence = table.sequence;
                state.take(&table);
            }
        }
        Ok(())
    }

    /// Flushes everything, and makes the table durable if it changed.
    fn commit(&self) -> Result<(), MediumError> {
        let medium = &*self.0.medium;
        let mut state = lock(&self.0.state);
        if !state.changed {
            drop(state);
            return medium.flush();
        }
        state.sequence += 1;
        let (table, slot) = (state.table(), 1 - state.slot);
        for place in PLACES {
            let at = slot_at(place, slot);
            let bytes = table.encode(at).ok_or_else(|| full(medium, 0))?;
            medium.write(at, &bytes)?;
        }
        medium.flush()?;
        state.slot = slot;
        state.changed = false;
        state.gone.iter_mut().for_each(|gone| gone.durable = true);
        state.reclaim();
        Ok(())
    }

    fn handle(&self, name: &str, body: &Arc<Body>, access: Access) -> Arc<dyn Medium> {
        Arc::new(VolumeMedium {
            volume: self.clone(),
            name: name.to_owned(),
            body: Arc::clone(body),
            access,
        })
    }
}

fn full(medium: &dyn Medium, blocks: u64) -> MediumError {
    let needed = blocks.saturating_mul(BLOCK as u64);
    MediumError::Full {
        place: medium.place(),
        needed,
    }
}

impl State {
    fn table(&self) -> Table {
        let entry = |(name, body): (&String, &Arc<Body>)| {
            let (identity, pieces) = (body.identity, body.pieces());
            (name.clone(), Entry { identity, pieces })
        };
        Table {
            uuid: self.uuid,
            sequence: self.sequence,
            blocks: self.blocks,
            next: self.next,
            names: self.names.iter().map(entry).collect(),
        }
    }

    /// Has the names of a table; media that were there before keep their handles.
    fn take(&mut self, table: &Table) {
        let known: BTreeMap<u64, Arc<Body>> = std::mem::take(&mut self.names)
            .into_values()
            .map(|body| (body.identity, body))
            .collect();
        for (name, entry) in &table.names {
            let body = known.get(&entry.identity).cloned().unwrap_or_else(|| {
                let identity = entry.identity;
                Arc::new(Body {
                    identity,
                    ..Body::default()
                })
            });
            body.set(entry.pieces.clone());
            self.names.insert(name.clone(), body);
        }
    }

    /// A medium has no name any more.
    fn drop_name(&mut self, body: Option<Arc<Body>>) {
        self.gone.extend(body.map(|body| Gone {
            body,
            durable: false,
        }));
        self.changed = true;
    }

    /// Takes back blocks of media that are gone for good.
    fn reclaim(&mut self) {
        let (over, rest) = std::mem::take(&mut self.gone)
            .into_iter()
            .partition::<Vec<_>, _>(|gone| gone.durable && Arc::strong_count(&gone.body) == 1);
        self.gone = rest;
        for piece in over.iter().flat_map(|gone| gone.body.pieces()) {
            self.give_back(piece);
        }
    }

    fn give_back(&mut self, mut piece: Piece) {
        if let Some((&first, &count)) = self.unused.range(..piece.first).next_back()
            && first + count == piece.first
        {
            self.unused.remove(&first);
            piece = Piece {
                first,
                count: count + piece.count,
            };
        }
        if let Some(count) = self.unused.remove(&piece.end()) {
            piece.count += count;
        }
        self.unused.insert(piece.first, piece.count);
    }

    /// Gives a medium so many more blocks, behind those that it has where that is possible, and in
    /// large pieces otherwise; nothing where there are not enough.
    fn give(&mut self, body: &Body, blocks: u64) -> bool {
        self.reclaim();
        let mut pieces = body.pieces();
        let (had, mut left) = (pieces.len(), blocks);
        let mut unused = self.unused.clone();
        while left > 0 {
            let behind = pieces.last().map(|last| last.end());
            let next = behind.filter(|at| unused.contains_key(at));
            let largest = || unused.iter().max_by_key(|(_, count)| **count);
            let Some(first) = next.or_else(|| largest().map(|(first, _)| *first)) else {
                return false;
            };
            let count = unused.remove(&first).unwrap_or(0);
            let taken = count.min(left);
            if count > taken {
                unused.insert(first + taken, count - taken);
            }
            left -= taken;
            match pieces.last_mut() {
                Some(last) if last.end() == first => last.count += taken,
                _ => pieces.push(Piece {
                    first,
                    count: taken,
                }),
            }
        }
        if !self.table().fits(pieces.len() - had) {
            return false;
        }
        self.unused = unused;
        self.changed = true;
        body.set(pieces);
        true
    }
}

impl Directory for Volume {
    fn place(&self) -> String {
        self.0.medium.place()
    }

    fn list(&self) -> Result<Vec<String>, MediumError> {
        self.refresh()?;
        Ok(lock(&self.0.state).names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Medium>, MediumError> {
        table::check_name(&self.place(), name)?;
        let mut state = self.writable()?;
        if state.names.contains_key(name) {
            let kind = io::ErrorKind::AlreadyExists;
            return Err(MediumError::io(self.named(name), "create", 0, 0, kind));
        }
        let identity = state.next;
        let body = Arc::new(Body {
            identity,
            ..Body::default()
        });
        state.names.insert(name.to_owned(), Arc::clone(&body));
        if !state.table().fits(0) {
            state.names.remove(name);
            return Err(full(&*self.0.medium, 0));
        }
        state.next += 1;
        state.changed = true;
        drop(state);
        Ok(self.handle(name, &body, Access::Write))
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        if access == Access::Write {
            drop(self.writable()?);
        }
        self.refresh()?;
        let body = lock(&self.0.state).names.get(name).cloned();
        let missing = || MediumError::io(self.named(name), "open", 0, 0, io::ErrorKind::NotFound);
        Ok(self.handle(name, &body.ok_or_else(missing)?, access))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), MediumError> {
        table::check_name(&self.place(), to)?;
        let mut state = self.writable()?;
        let Some(body) = state.names.remove(from) else {
            let kind = io::ErrorKind::NotFound;
            return Err(MediumError::io(self.named(from), "rename", 0, 0, kind));
        };
        let replaced = state.names.insert(to.to_owned(), Arc::clone(&body));
        if !state.table().fits(0) {
            state.names.remove(to);
            state.names.insert(from.to_owned(), body);
            state
                .names
                .extend(replaced.map(|replaced| (to.to_owned(), replaced)));
            return Err(full(&*self.0.medium, 0));
        }
        state.changed = true;
        if replaced.is_some() {
            state.drop_name(replaced);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        let mut state = self.writable()?;
        let Some(body) = state.names.remove(name) else {
            let kind = io::ErrorKind::NotFound;
            return Err(MediumError::io(self.named(name), "remove", 0, 0, kind));
        };
        state.drop_name(Some(body));
        Ok(())
    }

    fn sync(&self) -> Result<(), MediumError> {
        drop(self.writable()?);
        self.commit()
    }

    fn free_bytes(&self) -> Option<u64> {
        let mut state = lock(&self.0.state);
        state.reclaim();
        Some(state.unused.values().sum::<u64>() * BLOCK as u64)
    }
}

impl Volume {
    fn named(&self, name: &str) -> String {
        format!("{}:{name}", self.place())
    }
}

/// One medium of a [`Volume`].
struct VolumeMedium {
    volume: Volume,
    name: String,
    body: Arc<Body>,
    access: Access,
}

impl VolumeMedium {
    fn whole(&self) -> &dyn Medium {
        &*self.volume.0.medium
    }

    fn writable(&self) -> Result<MutexGuard<'_, State>, MediumError> {
        match self.access {
            Access::Write => self.volume.writable(),
            Access::Read => Err(MediumError::Misuse {
                place: self.place(),
                what: "the medium was opened for reading only",
            }),
        }
    }

    /// Where a range lies: offsets in the whole medium, and lengths. `None` beyond the end.
    fn places(&self, offset: u64, len: usize) -> Option<Vec<(u64, usize)>> {
        let pieces = self
            .body
            .pieces
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let (mut places, mut begin, mut at) = (Vec::new(), 0u64, offset);
        let end = offset.checked_add(len as u64)?;
        for piece in pieces.iter() {
            let size = piece.count * BLOCK as u64;
            if at < begin + size && at < end {
                let until = end.min(begin + size);
                let start = piece.first * BLOCK as u64 + (at - begin);
                places.push((start, (until - at) as usize));
                at = until;
            }
            begin += size;
        }
        (at == end).then_some(places)
    }

    /// Sees to it that the first `len` bytes can be written; more than that, if `ahead`.
    fn grow(&self, len: u64, ahead: bool) -> Result<(), MediumError> {
        let (wanted, have) = (len.div_ceil(BLOCK as u64), self.body.blocks());
        if wanted <= have {
            return Ok(());
        }
        let mut state = self.writable()?;
        let more = wanted - have;
        let ample = more.saturating_add((wanted / 4).clamp(AHEAD.0, AHEAD.1));
        if ahead && state.give(&self.body, ample) || state.give(&self.body, more) {
            return Ok(());
        }
        Err(full(self.whole(), more))
    }
}

impl Medium for VolumeMedium {
    fn place(&self) -> String {
        self.volume.named(&self.name)
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        self.volume.refresh()?;
        let len = self.body.blocks() * BLOCK as u64;
        Ok(Geometry {
            len,
            block: BLOCK as u32,
        })
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let places = match self.places(offset, into.len()) {
            Some(places) => places,
            None => {
                self.volume.refresh()?;
                let end = offset.saturating_add(into.len() as u64);
                let short = || MediumError::Short {
                    place: self.place(),
                    end,
                };
                self.places(offset, into.len()).ok_or_else(short)?
            }
        };
        let mut rest = into;
        for (at, len) in places {
            let (piece, more) = rest.split_at_mut(len);
            self.whole().read(at, piece)?;
            rest = more;
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        drop(self.writable()?);
        check_blocks(&self.name, offset, bytes.len())?;
        let misuse = |what| MediumError::Misuse {
            place: self.place(),
            what,
        };
        let end = offset.checked_add(bytes.len() as u64);
        self.grow(
            end.ok_or_else(|| misuse("the write ends beyond all media"))?,
            true,
        )?;
        let places = self.places(offset, bytes.len());
        let mut rest = bytes;
        for (at, len) in places.ok_or_else(|| misuse("its blocks are not known"))? {
            let (piece, more) = rest.split_at(len);
            self.whole().write(at, piece)?;
            rest = more;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), MediumError> {
        drop(self.writable()?);
        self.volume.commit()
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        drop(self.writable()?);
        self.grow(len, false)
    }

    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        let wanted = len.div_ceil(BLOCK as u64);
        self.grow(len, false)?;
        let mut state = self.writable()?;
        let (mut kept, mut cut, mut left) = (Vec::new(), Vec::new(), wanted);
        for piece in self.body.pieces() {
            let stays = piece.count.min(left);
            left -= stays;
            let first = piece.first;
            if stays > 0 {
                kept.push(Piece {
                    first,
                    count: stays,
                });
            }
            if piece.count > stays {
                cut.push(Piece {
                    first: first + stays,
                    count: piece.count - stays,
                });
            }
        }
        if !cut.is_empty() {
            self.body.set(kept);
            let body = Body::default();
            body.set(cut);
            state.drop_name(Some(Arc::new(body)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
