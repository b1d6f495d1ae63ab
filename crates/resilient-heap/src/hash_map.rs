//! [`PHashMap`]: values by key, found by hash.
//!
//! A tree of *slots*: a slot has a bucket of rows, or below it 16 slots among which four more bits of the
//! hash decide. A bucket that is full becomes 16; slots that are all empty become none. So a change
//! touches one bucket (or, once in a while, 17), however many values there are: neither the log nor the
//! size of a zone limits a map, and no transaction pays for moving all of it.
//!
//! # Rules
//! - Rows carry the whole hash, so that other keys of a bucket are looked at only where it is equal.
//! - Whoever changes a map and fails spoils the transaction (`Tx::spoil`): it may have come half-way.
//!
//! # Safety
//! Buckets are changed in place where the whole map is borrowed mutably: nobody has a reference into it.
#![allow(unsafe_code)]

use crate::block::Access;
use crate::error::Error;
use crate::key::{Hashed, Key, hash};
use crate::persist::Persist;
use crate::rows::{Row, Rows};
use crate::transaction::Tx;
use crate::vector::PVec;
use alloc::vec::Vec;
use resilient_heap_derive::Persist;

/// Slots below a slot.
const FAN: usize = 16;

/// Bits of the hash that choose one of them.
const BITS: u32 = FAN.ilog2();

/// Levels: after them, all bits of the hash are used.
const DEPTH: u32 = 64 / BITS;

/// Values by key, in no order.
///
/// It takes 24 bytes where it is, and grows without limit. A key is looked up by what [`Key::Query`] says: a
/// `PHashMap<PString, u64>` by `&str`.
///
/// If a method that changes the map fails, the transaction cannot be committed any more; one within it
/// (see [`Transaction::nested`](crate::Transaction::nested)) confines that.
#[derive(Persist)]
#[persist(crate)]
#[repr(C)]
pub struct PHashMap<'h, K, V> {
    len: u64,
    root: Slot<'h, K, V>,
}

#[derive(Persist)]
#[persist(crate)]
#[repr(C)]
struct Slot<'h, K, V> {
    rows: Rows<'h, u64, K, V>,
    below: PVec<'h, Slot<'h, K, V>>,
}

impl<K, V> Default for Slot<'_, K, V> {
    fn default() -> Self {
        Self {
            rows: Rows::default(),
            below: PVec::new(),
        }
    }
}

impl<K, V> Default for PHashMap<'_, K, V> {
    fn default() -> Self {
        Self::new()
    }
}

fn wrong() -> Error {
    Error::Invalid {
        what: "a hash map is built wrongly",
        at: 0,
    }
}

/// Which slot a hash belongs to, at a depth.
fn index(hash: u64, depth: u32) -> Result<usize, Error> {
    if depth < DEPTH {
        Ok((hash >> (depth * BITS)) as usize % FAN)
    } else {
        Err(wrong())
    }
}

impl<K, V> PHashMap<'_, K, V> {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self {
            len: 0,
            root: Slot::default(),
        }
    }

    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes all values away.
    pub fn clear(&mut self, _: &Tx<'_>) {
        *self = Self::new();
    }
}

impl<'h, K: Persist<'h>, V: Persist<'h>> PHashMap<'h, K, V> {
    /// The most rows of a bucket, as long as the hashes in it differ.
    const BUCKET: usize = {
        let fit = 1024 / Rows::<'h, u64, K, V>::SIZE;
        if fit < 2 {
            2
        } else if fit > 16 {
            16
        } else {
            fit
        }
    };

    /// All keys and values. Where some are lost, there is an error in their place, and the others follow.
    pub fn iter<'a, A: Access<'h>>(&'a self, access: &'a A) -> HashIter<'a, 'h, K, V, A> {
        HashIter {
            access,
            slots: Vec::from([core::slice::from_ref(&self.root).iter()]),
            rows: [].iter(),
        }
    }
}

impl<'h, K: Key<'h>, V: Persist<'h>> PHashMap<'h, K, V>
where
    K::Query: Hashed,
{
    /// The bucket that a hash belongs to.
    fn bucket<'a>(
        &'a self,
        access: &'a impl Access<'h>,
        hash: u64,
    ) -> Result<&'a Rows<'h, u64, K, V>, Error> {
        let mut slot = &self.root;
        let mut depth = 0;
        while !slot.below.is_null() {
            let next = slot.below.get(access, index(hash, depth)?)?;
            slot = next.ok_or_else(wrong)?;
            depth += 1;
        }
        Ok(&slot.rows)
    }

    /// The bucket of a key, and its row there.
    #[allow(
        clippy::type_complexity,
        reason = "two things that are borrowed for as long"
    )]
    fn find<'a>(
        &'a self,
        access: &'a impl Access<'h>,
        hash: u64,
        query: &K::Query,
    ) -> Result<(&'a Rows<'h, u64, K, V>, Option<(usize, &'a Row<u64, K, V>)>), Error> {
        let rows = self.bucket(access, hash)?;
        for (i, row) in rows.as_slice(access)?.iter().enumerate() {
            if row.prefix == hash && row.key.query(access)? == query {
                return Ok((rows, Some((i, row))));
            }
        }
        Ok((rows, None))
    }

    /// The value of a key.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn get<'a>(
        &'a self,
        access: &'a impl Access<'h>,
        key: &K::Query,
    ) -> Result<Option<&'a V>, Error> {
        let (_, found) = self.find(access, hash(access.heap_id(), key), key)?;
        Ok(found.map(|(_, row)| &row.value))
    }

    /// Whether a key is there.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn contains_key(&self, access: &impl Access<'h>, key: &K::Query) -> Result<bool, Error> {
        Ok(self.get(access, key)?.is_some())
    }

    /// The value of a key, to be changed.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn get_mut<'a>(
        &'a mut self,
        tx: &'a Tx<'h>,
        key: &K::Query,
    ) -> Result<Option<&'a mut V>, Error> {
        match self.find(tx, hash(tx.heap_id(), key), key)? {
            // SAFETY: see the module; the result borrows the whole map mutably.
            (rows, Some((i, _))) => Ok(Some(unsafe { rows.value_here(tx, i)? })),
            (_, None) => Ok(None),
        }
    }

    /// Puts a value under a key. Where there was one already, the key stays and the old value is returned.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn insert(&mut self, tx: &Tx<'h>, key: K, value: V) -> Result<Option<V>, Error> {
        let done = self.try_insert(tx, key, value);
        tx.spoil(done)
    }

    fn try_insert(&mut self, tx: &Tx<'h>, key: K, value: V) -> Result<Option<V>, Error> {
        let query = key.query(tx)?;
        let hash = hash(tx.heap_id(), query);
        let (rows, found) = self.find(tx, hash, query)?;
        if let Some((i, _)) = found {
            // SAFETY: see the module.
            let place = unsafe { rows.value_here(tx, i)? };
            return Ok(Some(core::mem::replace(place, value)));
        }
        let (len, room) = rows.len(tx)?;
        if len < room {
            // SAFETY: see the module.
            unsafe { rows.insert_here(tx, len, (hash, key, value))? };
        } else {
            self.root.insert(tx, (hash, key, value), Self::BUCKET)?;
        }
        self.len = self.len.saturating_add(1);
        Ok(None)
    }

    /// The value of a key, to be changed; where there is none, `make` makes it.
    ///
    /// # Errors
    /// Those of `make`; [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`].
    pub fn get_or_insert_with<'a>(
        &'a mut self,
        tx: &'a Tx<'h>,
        key: K,
        make: impl FnOnce(&Tx<'h>) -> Result<V, Error>,
    ) -> Result<&'a mut V, Error> {
        let query = key.query(tx)?;
        let hash = hash(tx.heap_id(), query);
        if self.find(tx, hash, query)?.1.is_none() {
            let value = make(tx)?;
            self.insert(tx, key, value)?;
            let rows = self.bucket(tx, hash)?;
            let (len, _) = rows.len(tx)?;
            // It was put at the end of its bucket.
            // SAFETY: see the module; the result borrows the whole map mutably.
            return unsafe { rows.value_here(tx, len.wrapping_sub(1)) };
        }
        let (rows, found) = self.find(tx, hash, query)?;
        let (i, _) = found.ok_or_else(wrong)?;
        // SAFETY: as before.
        unsafe { rows.value_here(tx, i) }
    }

    /// Takes a key and its value away.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn remove(&mut self, tx: &Tx<'h>, key: &K::Query) -> Result<Option<V>, Error> {
        let done = self.try_remove(tx, key);
        tx.spoil(done)
    }

    fn try_remove(&mut self, tx: &Tx<'h>, key: &K::Query) -> Result<Option<V>, Error> {
        let hash = hash(tx.heap_id(), key);
        let (rows, found) = self.find(tx, hash, key)?;
        let Some((i, _)) = found else {
            return Ok(None);
        };
        let (_, _, value) = if rows.len(tx)?.0 > 1 {
            // SAFETY: see the module.
            unsafe { rows.swap_remove_here(tx, i)? }
        } else {
            self.root.prune(tx, hash, 0)?
        };
        self.len = self.len.saturating_sub(1);
        Ok(Some(value))
    }
}

impl<'h, K: Persist<'h>, V: Persist<'h>> Slot<'h, K, V> {
    /// Adds a row whose key is not there.
    fn insert(&mut self, tx: &Tx<'h>, row: (u64, K, V), bucket: usize) -> Result<(), Error> {
        let mut slot = self;
        let mut depth = 0;
        loop {
            if slot.below.is_null() {
                let (len, _) = slot.rows.len(tx)?;
                if len < bucket || depth >= DEPTH {
                    return slot.push(tx, row, bucket);
                }
                slot.split(tx, depth)?;
            }
            let next = slot.below.get_mut(tx, index(row.0, depth)?)?;
            slot = next.ok_or_else(wrong)?;
            depth += 1;
        }
    }

    /// Adds a row to this bucket.
    fn push(&mut self, tx: &Tx<'h>, row: (u64, K, V), bucket: usize) -> Result<(), Error> {
        let (len, room) = self.rows.len(tx)?;
        if len == room {
            // By twos, up to a full bucket.
            let more = (room * 2).max(4.min(bucket));
            let more = if room < bucket {
                more.min(bucket)
            } else {
                more
            };
            self.rows.reserve(tx, more)?;
        }
        self.rows.push(tx, row)
    }

    /// Makes 16 buckets of one.
    fn split(&mut self, tx: &Tx<'h>, depth: u32) -> Result<(), Error> {
        let rows = core::mem::take(&mut self.rows);
        let parts: [_; FAN] =
            rows.distribute(tx, |hash| index(*hash, depth).unwrap_or(usize::MAX))?;
        let mut below = PVec::new();
        below.reserve(tx, FAN)?;
        for rows in parts {
            let below_it = PVec::new();
            below.push(
                tx,
                Slot {
                    rows,
                    below: below_it,
                },
            )?;
        }
        self.below = below;
        Ok(())
    }

    /// Takes the only row of a bucket away, and slots that are empty then.
    fn prune(&mut self, tx: &Tx<'h>, hash: u64, depth: u32) -> Result<(u64, K, V), Error> {
        if self.below.is_null() {
            let row = self.rows.pop(tx)?;
            self.rows = Rows::default();
            return Ok(row);
        }
        // `index` ends what goes too deep.
        let next = self.below.get_mut(tx, index(hash, depth)?)?;
        let row = next.ok_or_else(wrong)?.prune(tx, hash, depth + 1)?;
        let empty = |slot: &Self| slot.rows.is_null() && slot.below.is_null();
        if self.below.as_slice(tx)?.iter().all(empty) {
            self.below = PVec::new();
        }
        Ok(row)
    }
}

/// Keys and values of a [`PHashMap`].
pub struct HashIter<'a, 'h, K, V, A> {
    access: &'a A,
    slots: Vec<core::slice::Iter<'a, Slot<'h, K, V>>>,
    rows: core::slice::Iter<'a, Row<u64, K, V>>,
}

impl<'a, 'h, K: Persist<'h>, V: Persist<'h>, A: Access<'h>> Iterator for HashIter<'a, 'h, K, V, A> {
    type Item = Result<(&'a K, &'a V), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.next() {
                return Some(Ok((&row.key, &row.value)));
            }
            let Some(slot) = self.slots.last_mut()?.next() else {
                self.slots.pop();
                continue;
            };
            let found = if slot.below.is_null() {
                slot.rows
                    .as_slice(self.access)
                    .map(|rows| self.rows = rows.iter())
            } else if self.slots.len() > DEPTH as usize {
                Err(wrong())
            } else {
                let below = slot.below.as_slice(self.access);
                below.map(|below| self.slots.push(below.iter()))
            };
            if let Err(error) = found {
                return Some(Err(error));
            }
        }
    }
}
