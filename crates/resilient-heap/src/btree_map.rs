//! [`PBTreeMap`]: values by key, in the order of the keys.
//!
//! A B-tree. A node has a block of rows in order and, if it is no leaf, a vector of one node more: those
//! before, between and behind its rows. All leaves are equally deep; a node but the root is at least half
//! full. A change touches one leaf, or once in a while the nodes above it, however many values there are.
//!
//! # Rules
//! - A walk down is bounded by [`DEPTH`], which no tree that was made here reaches: a forged one is
//!   refused and not followed. Counts of rows and nodes that contradict each other are refused, too.
//! - Whoever changes a map and fails spoils the transaction (`Tx::spoil`): it may have come half-way.
//!
//! # Safety
//! Leaves are changed in place where the whole map is borrowed mutably: nobody has a reference into it.
#![allow(unsafe_code)]

use crate::block::Access;
use crate::error::Error;
use crate::key::Key;
use crate::persist::Persist;
use crate::rows::{Row, Rows};
use crate::transaction::Tx;
use crate::vector::PVec;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::ops::{Bound, RangeBounds, RangeFull};
use resilient_heap_derive::Persist;

/// A tree of this depth would have at least 2^40 values.
const DEPTH: usize = 40;

type NodeRows<'h, K, V> = Rows<'h, [u8; 0], K, V>;
type NodeRow<K, V> = Row<[u8; 0], K, V>;

/// Values by key, in the order of the keys.
///
/// It takes 24 bytes where it is, and grows without limit. A key is looked up by what [`Key::Query`] says: a
/// `PBTreeMap<PString, u64>` by `&str`.
///
/// If a method that changes the map fails, the transaction cannot be committed any more; one within it
/// (see [`Transaction::nested`](crate::Transaction::nested)) confines that.
#[derive(Persist)]
#[persist(crate)]
#[repr(C)]
pub struct PBTreeMap<'h, K, V> {
    len: u64,
    root: Node<'h, K, V>,
}

#[derive(Persist)]
#[persist(crate)]
#[repr(C)]
struct Node<'h, K, V> {
    rows: NodeRows<'h, K, V>,
    below: PVec<'h, Node<'h, K, V>>,
}

impl<K, V> Default for Node<'_, K, V> {
    fn default() -> Self {
        Self {
            rows: Rows::default(),
            below: PVec::new(),
        }
    }
}

impl<K, V> Default for PBTreeMap<'_, K, V> {
    fn default() -> Self {
        Self::new()
    }
}

fn wrong() -> Error {
    Error::Invalid {
        what: "a tree is built wrongly",
        at: 0,
    }
}

impl<K, V> PBTreeMap<'_, K, V> {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self {
            len: 0,
            root: Node::default(),
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

/// Where a key is among rows, or where it belongs.
fn search<'h, K: Key<'h>, V: Persist<'h>>(
    access: &impl Access<'h>,
    rows: &[NodeRow<K, V>],
    query: &K::Query,
) -> Result<Result<usize, usize>, Error> {
    let (mut first, mut end) = (0, rows.len());
    while first < end {
        let middle = first + (end - first) / 2;
        match rows[middle].key.query(access)?.cmp(query) {
            Ordering::Less => first = middle + 1,
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Greater => end = middle,
        }
    }
    Ok(Err(first))
}

impl<'h, K: Key<'h>, V: Persist<'h>> PBTreeMap<'h, K, V> {
    /// The rows where a key is, or the leaf where it belongs; and its place there.
    #[allow(clippy::type_complexity, reason = "rows, and a place among them")]
    fn find<'a>(
        &'a self,
        access: &'a impl Access<'h>,
        query: &K::Query,
    ) -> Result<(&'a Node<'h, K, V>, Result<usize, usize>), Error> {
        let mut node = &self.root;
        for _ in 0..DEPTH {
            match search(access, node.rows.as_slice(access)?, query)? {
                Err(i) if !node.below.is_null() => {
                    node = node.below.get(access, i)?.ok_or_else(wrong)?;
                }
                found => return Ok((node, found)),
            }
        }
        Err(wrong())
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
        match self.find(access, key)? {
            (node, Ok(i)) => Ok(node.rows.as_slice(access)?.get(i).map(|row| &row.value)),
            (_, Err(_)) => Ok(None),
        }
    }

    /// Whether a key is there.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn contains_key(&self, access: &impl Access<'h>, key: &K::Query) -> Result<bool, Error> {
        Ok(self.find(access, key)?.1.is_ok())
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
        match self.find(tx, key)? {
            // SAFETY: see the module; the result borrows the whole map mutably.
            (node, Ok(i)) => Ok(Some(unsafe { node.rows.value_here(tx, i)? })),
            (_, Err(_)) => Ok(None),
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
        let (node, found) = self.find(tx, key.query(tx)?)?;
        match found {
            Ok(i) => {
                // SAFETY: see the module.
                let place = unsafe { node.rows.value_here(tx, i)? };
                return Ok(Some(core::mem::replace(place, value)));
            }
            Err(i) => {
                let (len, room) = node.rows.len(tx)?;
                if len < room.min(Node::<K, V>::MOST) {
                    // SAFETY: see the module.
                    unsafe { node.rows.insert_here(tx, i, ([], key, value))? };
                } else {
                    self.root.insert(tx, key, value)?;
                }
            }
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
        if self.find(tx, key.query(tx)?)?.1.is_err() {
            let value = make(tx)?;
            let done = self.root.insert(tx, key, value);
            let (rows, i) = tx.spoil(done)?;
            self.len = self.len.saturating_add(1);
            // SAFETY: see the module; the result borrows the whole map mutably.
            return unsafe { rows.value_here(tx, i) };
        }
        let (node, found) = self.find(tx, key.query(tx)?)?;
        let i = found.map_err(|_| wrong())?;
        // SAFETY: see the module; the result borrows the whole map mutably.
        unsafe { node.rows.value_here(tx, i) }
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
        let (node, found) = self.find(tx, key)?;
        let Ok(i) = found else {
            return Ok(None);
        };
        let (len, _) = node.rows.len(tx)?;
        let (_, _, value) = if node.below.is_null() && len > Node::<K, V>::LEAST {
            // SAFETY: see the module.
            unsafe { node.rows.remove_here(tx, i)? }
        } else {
            let row = self.root.remove(tx, key, 0)?;
            self.root.lower(tx)?;
            row
        };
        self.len = self.len.saturating_sub(1);
        Ok(Some(value))
    }

    /// Takes the first key and its value away.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn pop_first(&mut self, tx: &Tx<'h>) -> Result<Option<(K, V)>, Error> {
        let done = self.pop(tx, true);
        tx.spoil(done)
    }

    /// Takes the last key and its value away.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn pop_last(&mut self, tx: &Tx<'h>) -> Result<Option<(K, V)>, Error> {
        let done = self.pop(tx, false);
        tx.spoil(done)
    }

    fn pop(&mut self, tx: &Tx<'h>, first: bool) -> Result<Option<(K, V)>, Error> {
        if self.root.rows.len(tx)?.0 == 0 {
            return Ok(None);
        }
        let (_, key, value) = self.root.pop(tx, first, 0)?;
        self.root.lower(tx)?;
        self.len = self.len.saturating_sub(1);
        Ok(Some((key, value)))
    }

    /// The first key and its value.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn first<'a>(
        &'a self,
        access: &'a impl Access<'h>,
    ) -> Result<Option<(&'a K, &'a V)>, Error> {
        self.iter(access).next().transpose()
    }

    /// The last key and its value.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn last<'a>(
        &'a self,
        access: &'a impl Access<'h>,
    ) -> Result<Option<(&'a K, &'a V)>, Error> {
        let mut node = &self.root;
        for _ in 0..DEPTH {
            let below = node.below.as_slice(access)?;
            match below.last() {
                Some(last) => node = last,
                None => {
                    let row = node.rows.as_slice(access)?.last();
                    return Ok(row.map(|row| (&row.key, &row.value)));
                }
            }
        }
        Err(wrong())
    }

    /// All keys and values, in order. An error ends it.
    pub fn iter<'a, A: Access<'h>>(
        &'a self,
        access: &'a A,
    ) -> TreeIter<'a, 'h, K, V, A, RangeFull> {
        self.range(access, ..)
    }

    /// The keys within a range and their values, in order. An error ends it.
    pub fn range<'a, A: Access<'h>, R: RangeBounds<K::Query>>(
        &'a self,
        access: &'a A,
        range: R,
    ) -> TreeIter<'a, 'h, K, V, A, R> {
        TreeIter {
            access,
            root: Some(&self.root),
            range,
            path: Vec::new(),
        }
    }
}

impl<'h, K: Key<'h>, V: Persist<'h>> Node<'h, K, V> {
    /// The most rows of a node: an odd number, so that a full one is cut into equal halves.
    const MOST: usize = {
        let fit = 1024 / NodeRows::<'h, K, V>::SIZE;
        if fit < 3 {
            3
        } else if fit > 15 {
            15
        } else {
            (fit - 1) | 1
        }
    };

    /// The least rows of a node that is not the root.
    const LEAST: usize = Self::MOST / 2;

    fn below<'a>(&'a mut self, tx: &'a Tx<'h>, i: usize) -> Result<&'a mut Self, Error> {
        self.below.get_mut(tx, i)?.ok_or_else(wrong)
    }

    /// Adds a row whose key is not there. Full nodes on the way down are cut first, so that there is room
    /// for a row from below.
    /// Returns where it is now.
    fn insert<'a>(
        &'a mut self,
        tx: &'a Tx<'h>,
        key: K,
        value: V,
    ) -> Result<(&'a NodeRows<'h, K, V>, usize), Error> {
        if self.rows.len(tx)?.0 >= Self::MOST {
            let old = core::mem::take(self);
            self.rows.reserve(tx, Self::MOST)?;
            self.below.reserve(tx, Self::MOST + 1)?;
            self.below.push(tx, old)?;
            self.cut(tx, 0)?;
        }
        let mut node = self;
        for _ in 0..DEPTH {
            let mut i = node.place_of(tx, &key)?;
            if node.below.is_null() {
                node.rows.reserve(tx, Self::MOST)?;
                node.rows.insert(tx, i, ([], key, value))?;
                return Ok((&node.rows, i));
            }
            if node.below(tx, i)?.rows.len(tx)?.0 >= Self::MOST {
                node.cut(tx, i)?;
                i = node.place_of(tx, &key)?;
            }
            node = node.below(tx, i)?;
        }
        Err(wrong())
    }

    /// Where a key that is not here belongs.
    fn place_of(&self, tx: &Tx<'h>, key: &K) -> Result<usize, Error> {
        match search(tx, self.rows.as_slice(tx)?, key.query(tx)?)? {
            Err(i) => Ok(i),
            Ok(_) => Err(wrong()),
        }
    }

    /// Makes two of the full node below at `i`; the row in the middle comes up between them.
    fn cut(&mut self, tx: &Tx<'h>, i: usize) -> Result<(), Error> {
        let left = self.below(tx, i)?;
        let middle = left.rows.len(tx)?.0 / 2;
        let rows = left.rows.split_off(tx, middle + 1, Self::MOST)?;
        let row = left.rows.pop(tx)?;
        let below = if left.below.is_null() {
            PVec::new()
        } else {
            left.below.split_off(tx, middle + 1, Self::MOST + 1)?
        };
        self.rows.insert(tx, i, row)?;
        self.below.insert(tx, i + 1, Self { rows, below })
    }

    /// Takes a row away whose key is there.
    fn remove(
        &mut self,
        tx: &Tx<'h>,
        key: &K::Query,
        depth: usize,
    ) -> Result<([u8; 0], K, V), Error> {
        if depth > DEPTH {
            return Err(wrong());
        }
        let found = search(tx, self.rows.as_slice(tx)?, key)?;
        let leaf = self.below.is_null();
        match found {
            Ok(i) if leaf => self.rows.remove(tx, i),
            Err(_) if leaf => Err(wrong()),
            Ok(i) => {
                let last = self.below(tx, i)?.pop(tx, false, depth + 1)?;
                let row = self.rows.replace(tx, i, last)?;
                self.fill(tx, i)?;
                Ok(row)
            }
            Err(i) => {
                let row = self.below(tx, i)?.remove(tx, key, depth + 1)?;
                self.fill(tx, i)?;
                Ok(row)
            }
        }
    }

    /// Takes the first or the last row away.
    fn pop(&mut self, tx: &Tx<'h>, first: bool, depth: usize) -> Result<([u8; 0], K, V), Error> {
        if depth > DEPTH {
            return Err(wrong());
        }
        if self.below.is_null() {
            return if first {
                self.rows.remove(tx, 0)
            } else {
                self.rows.pop(tx)
            };
        }
        let i = if first { 0 } else { self.rows.len(tx)?.0 };
        let row = self.below(tx, i)?.pop(tx, first, depth + 1)?;
        self.fill(tx, i)?;
        Ok(row)
    }

    /// Sees to it that the node below at `i`, which lost a row, has enough: from a neighbour that can
    /// spare one, or by making one of both.
    fn fill(&mut self, tx: &Tx<'h>, i: usize) -> Result<(), Error> {
        if self.below(tx, i)?.rows.len(tx)?.0 >= Self::LEAST {
            return Ok(());
        }
        let rows = self.rows.len(tx)?.0;
        if i > 0 && self.below(tx, i - 1)?.rows.len(tx)?.0 > Self::LEAST {
            let left = self.below(tx, i - 1)?;
            let row = left.rows.pop(tx)?;
            let node = left.below.pop(tx)?;
            let row = self.rows.replace(tx, i - 1, row)?;
            let own = self.below(tx, i)?;
            own.rows.insert(tx, 0, row)?;
            return own.adopt(tx, node, 0);
        }
        if i < rows && self.below(tx, i + 1)?.rows.len(tx)?.0 > Self::LEAST {
            let right = self.below(tx, i + 1)?;
            let row = right.rows.remove(tx, 0)?;
            let node = right.below.remove(tx, 0)?;
            let row = self.rows.replace(tx, i, row)?;
            let own = self.below(tx, i)?;
            own.rows.push(tx, row)?;
            let end = own.below.len(tx)?;
            return own.adopt(tx, node, end);
        }
        let first = if i > 0 { i - 1 } else { i };
        let row = self.rows.remove(tx, first)?;
        let right = self.below.remove(tx, first + 1)?.ok_or_else(wrong)?;
        let left = self.below(tx, first)?;
        left.rows.push(tx, row)?;
        left.rows.append(tx, right.rows)?;
        if left.below.is_null() != right.below.is_null() {
            return Err(wrong());
        }
        left.below.append(tx, right.below)
    }

    /// Takes a node from a neighbour, if this is no leaf.
    fn adopt(&mut self, tx: &Tx<'h>, node: Option<Self>, i: usize) -> Result<(), Error> {
        match node {
            Some(node) if !self.below.is_null() => self.below.insert(tx, i, node),
            None if self.below.is_null() => Ok(()),
            _ => Err(wrong()),
        }
    }

    /// A root without rows gives way to its only node, or to none.
    fn lower(&mut self, tx: &Tx<'h>) -> Result<(), Error> {
        if self.rows.len(tx)?.0 == 0 {
            *self = self.below.pop(tx)?.unwrap_or_default();
        }
        Ok(())
    }
}

/// A node on the way to the next row.
struct Step<'a, 'h, K, V> {
    rows: &'a [NodeRow<K, V>],
    below: &'a [Node<'h, K, V>],
    /// The row that is next.
    next: usize,
}

/// Keys and values of a [`PBTreeMap`].
pub struct TreeIter<'a, 'h, K, V, A, R> {
    access: &'a A,
    /// Until the first row is asked for.
    root: Option<&'a Node<'h, K, V>>,
    range: R,
    path: Vec<Step<'a, 'h, K, V>>,
}

impl<'a, 'h, K: Key<'h>, V: Persist<'h>, A: Access<'h>, R: RangeBounds<K::Query>>
    TreeIter<'a, 'h, K, V, A, R>
{
    /// Goes down to the first row of a node; `bounded` where that is not the first of all its rows, but
    /// the first within the range.
    fn down(&mut self, mut node: &'a Node<'h, K, V>, bounded: bool) -> Result<(), Error> {
        loop {
            let rows = node.rows.as_slice(self.access)?;
            let below = node.below.as_slice(self.access)?;
            let fits = below.is_empty() || below.len() == rows.len() + 1;
            if !fits || self.path.len() > DEPTH {
                return Err(wrong());
            }
            let next = match self.range.start_bound() {
                Bound::Included(from) if bounded => {
                    search(self.access, rows, from)?.unwrap_or_else(|i| i)
                }
                Bound::Excluded(from) if bounded => {
                    search(self.access, rows, from)?.map_or_else(|i| i, |i| i + 1)
                }
                _ => 0,
            };
            self.path.push(Step { rows, below, next });
            match below.get(next) {
                Some(first) => node = first,
                None => return Ok(()),
            }
        }
    }

    fn advance(&mut self) -> Result<Option<(&'a K, &'a V)>, Error> {
        if let Some(root) = self.root.take() {
            self.down(root, true)?;
        }
        while let Some(step) = self.path.last_mut() {
            let Some(row) = step.rows.get(step.next) else {
                self.path.pop();
                continue;
            };
            step.next += 1;
            if let Some(below) = step.below.get(step.next) {
                self.down(below, false)?;
            }
            let key = row.key.query(self.access)?;
            let inside = match self.range.end_bound() {
                Bound::Included(to) => key <= to,
                Bound::Excluded(to) => key < to,
                Bound::Unbounded => true,
            };
            return if inside {
                Ok(Some((&row.key, &row.value)))
            } else {
                Ok(None)
            };
        }
        Ok(None)
    }
}

impl<'a, 'h, K: Key<'h>, V: Persist<'h>, A: Access<'h>, R: RangeBounds<K::Query>> Iterator
    for TreeIter<'a, 'h, K, V, A, R>
{
    type Item = Result<(&'a K, &'a V), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.advance().transpose();
        if !matches!(found, Some(Ok(_))) {
            self.path.clear();
        }
        found
    }
}
