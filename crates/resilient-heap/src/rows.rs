//! Rows: the buckets and nodes of maps. A block of prefix, key and value, one row after another.
//!
//! Unlike any other value, a row may have padding: a map from `u64` to `u8` shall not be refused. The
//! bytes of the padding are initialized nevertheless, since rows are written field by field and moved as
//! bytes, in memory that always was initialized (see `front`); no row is ever written or copied as a whole.
//!
//! # Safety
//! - Rows are empty, or the one owner of a block, whose first `len` rows are there. It was made here, or
//!   read from a heap whose walk checked that.
//! - Methods for `&mut self` are safe. The unsafe ones change the block's contents, though never its place,
//!   through `&self`: maps use them where they hold the whole map mutably but came down to a block by
//!   shared references (which leaves the lines above it unchanged). Nobody may have a reference into the
//!   block then.
#![allow(unsafe_code)]

use crate::block::{self, Access};
use crate::error::Error;
use crate::persist::{Edge, Of, Persist, Schema};
use crate::transaction::{Brand, Tx};
use alloc::string::String;
use core::marker::PhantomData;
use core::mem::offset_of;

/// A row. The prefix is what a map keeps beside: a hash, or nothing (`[u8; 0]`).
#[repr(C)]
pub struct Row<P, K, V> {
    /// What the map keeps.
    pub prefix: P,
    /// The key.
    pub key: K,
    /// The value.
    pub value: V,
}

// SAFETY: all rules but that about padding, for which see the module; `check` and `edges` are those of the
// fields.
unsafe impl<'h, P: Persist<'h>, K: Persist<'h>, V: Persist<'h>> Persist<'h> for Row<P, K, V> {
    const NAME: &'static str = "Row";
    const POINTERS: bool = P::POINTERS || K::POINTERS || V::POINTERS;
    fn name(out: &mut String) {
        out.push_str("Row<");
        P::name(out);
        out.push_str(", ");
        K::name(out);
        out.push_str(", ");
        V::name(out);
        out.push('>');
    }
    fn describe(schema: &mut Schema) {
        if schema.enter::<Self>() {
            schema.begin::<Self>("row");
            schema.field::<P>("prefix", offset_of!(Self, prefix));
            schema.field::<K>("key", offset_of!(Self, key));
            schema.field::<V>("value", offset_of!(Self, value));
            schema.end();
            P::describe(schema);
            K::describe(schema);
            V::describe(schema);
        }
    }
    unsafe fn check(at: *const u8) -> bool {
        // SAFETY: the caller gives the bytes of the whole row, so those of each field.
        unsafe {
            P::check(at.add(offset_of!(Self, prefix)))
                && K::check(at.add(offset_of!(Self, key)))
                && V::check(at.add(offset_of!(Self, value)))
        }
    }
    fn edges(&self, visit: &mut dyn FnMut(Edge)) {
        self.prefix.edges(visit);
        self.key.edges(visit);
        self.value.edges(visit);
    }
}

/// Writes a row field by field.
///
/// # Safety
/// `to` is aligned, and has the bytes of a row, at which nobody looks.
unsafe fn write<P, K, V>(to: *mut u8, row: (P, K, V)) {
    let to = to.cast::<Row<P, K, V>>();
    // SAFETY: as the caller says.
    unsafe {
        (&raw mut (*to).prefix).write(row.0);
        (&raw mut (*to).key).write(row.1);
        (&raw mut (*to).value).write(row.2);
    }
}

/// Reads a row field by field.
///
/// # Safety
/// A row is at `from`, aligned, and no longer counts from now on.
unsafe fn read<P, K, V>(from: *const u8) -> (P, K, V) {
    let from = from.cast::<Row<P, K, V>>();
    // SAFETY: as the caller says.
    unsafe {
        (
            (&raw const (*from).prefix).read(),
            (&raw const (*from).key).read(),
            (&raw const (*from).value).read(),
        )
    }
}

/// See the module. Eight bytes where they are; empty ones have no block.
#[repr(transparent)]
pub struct Rows<'h, P, K, V> {
    at: u64,
    of: PhantomData<(P, K, V)>,
    brand: Brand<'h>,
}

impl<P, K, V> Default for Rows<'_, P, K, V> {
    fn default() -> Self {
        Self {
            at: 0,
            of: PhantomData,
            brand: PhantomData,
        }
    }
}

fn outside(at: usize) -> Error {
    Error::Invalid {
        what: "a map counts its rows wrongly",
        at,
    }
}

impl<'h, P: Persist<'h>, K: Persist<'h>, V: Persist<'h>> Rows<'h, P, K, V> {
    /// Bytes of a row.
    pub const SIZE: usize = size_of::<Row<P, K, V>>();

    /// Whether there is no block.
    pub fn is_null(&self) -> bool {
        self.at == 0
    }

    /// Place, length and room.
    fn head(&self, access: &impl Access<'h>) -> Result<(usize, usize, usize), Error> {
        if self.at == 0 {
            return Ok((0, 0, 0));
        }
        let at = block::place(self.at)?;
        let head = block::head(access, at)?;
        Ok((at, head.len as usize, head.room as usize))
    }

    /// How many rows there are, and how many there is room for.
    pub fn len(&self, access: &impl Access<'h>) -> Result<(usize, usize), Error> {
        self.head(access).map(|(_, len, room)| (len, room))
    }

    /// All rows.
    pub fn as_slice<'a>(
        &'a self,
        access: &'a impl Access<'h>,
    ) -> Result<&'a [Row<P, K, V>], Error> {
        match self.head(access)? {
            (_, 0, _) => Ok(&[]),
            // SAFETY: these rows are there; `self` is borrowed, so nobody changes them, but for the
            // unsafe methods, whose callers see to that.
            (at, len, _) => unsafe { block::values(access, at, 0, len) },
        }
    }

    /// Where rows lie, to be changed; their pointers are counted anew.
    fn change(&self, tx: &Tx<'h>, at: usize, first: usize, count: usize) -> Result<*mut u8, Error> {
        let (begin, len) = block::span(at, first, count, Self::SIZE)?;
        let to = tx.change(begin, len.max(1))?;
        tx.touch(at, Of::<Row<P, K, V>>::KIND);
        Ok(to)
    }

    /// A new block, with copies of the rows from `first` on, as bytes. The caller sees to it that only
    /// one of both counts.
    fn copy(&self, tx: &Tx<'h>, first: usize, room: usize) -> Result<Self, Error> {
        let (old, len, _) = self.head(tx)?;
        let count = len.checked_sub(first).ok_or(outside(old))?;
        let new = block::allocate::<Row<P, K, V>>(tx, room.max(count))?;
        let rows = Self {
            at: new as u64,
            ..Self::default()
        };
        if count > 0 {
            let (begin, bytes) = block::span(old, first, count, Self::SIZE)?;
            let from = tx.view(begin, bytes)?;
            let to = rows.change(tx, new, 0, count)?;
            // SAFETY: both have these bytes; the new block is apart from the old one.
            unsafe { core::ptr::copy_nonoverlapping(from, to, bytes) };
            block::set_len(tx, new, count, Of::<Row<P, K, V>>::KIND)?;
        }
        Ok(rows)
    }

    /// Makes room for `room` rows in all.
    pub fn reserve(&mut self, tx: &Tx<'h>, room: usize) -> Result<(), Error> {
        if self.head(tx)?.2 < room {
            // The old block loses its one pointer, so that the commit no longer counts its rows.
            *self = self.copy(tx, 0, room)?;
        }
        Ok(())
    }

    /// Puts a row at `index`; those from there on move up.
    pub fn insert(&mut self, tx: &Tx<'h>, index: usize, row: (P, K, V)) -> Result<(), Error> {
        let (len, room) = self.len(tx)?;
        if len >= room {
            self.reserve(tx, (room * 2).max(4))?;
        }
        // SAFETY: `self` is borrowed mutably: nobody has a reference into the block.
        unsafe { self.insert_here(tx, index, row) }
    }

    /// Puts a row at the end.
    pub fn push(&mut self, tx: &Tx<'h>, row: (P, K, V)) -> Result<(), Error> {
        let (len, _) = self.len(tx)?;
        self.insert(tx, len, row)
    }

    /// Takes the row at `index` away; those behind it move down.
    pub fn remove(&mut self, tx: &Tx<'h>, index: usize) -> Result<(P, K, V), Error> {
        // SAFETY: `self` is borrowed mutably: nobody has a reference into the block.
        unsafe { self.remove_here(tx, index) }
    }

    /// Takes the last row away.
    pub fn pop(&mut self, tx: &Tx<'h>) -> Result<(P, K, V), Error> {
        let (at, len, _) = self.head(tx)?;
        self.remove(tx, len.checked_sub(1).ok_or(outside(at))?)
    }

    /// Puts a row in the place of another.
    pub fn replace(
        &mut self,
        tx: &Tx<'h>,
        index: usize,
        row: (P, K, V),
    ) -> Result<(P, K, V), Error> {
        let (at, len, _) = self.head(tx)?;
        if index >= len {
            return Err(outside(at));
        }
        let place = self.change(tx, at, index, 1)?;
        // SAFETY: a row is there, which is read before another is written over it; `self` is borrowed
        // mutably.
        unsafe {
            let old = read(place);
            write(place, row);
            Ok(old)
        }
    }

    /// Takes the rows from `first` on away, into a block with room for `room`.
    pub fn split_off(&mut self, tx: &Tx<'h>, first: usize, room: usize) -> Result<Self, Error> {
        let rows = self.copy(tx, first, room)?;
        let (at, ..) = self.head(tx)?;
        // From here on the copies count, and those that they are copies of do not.
        block::set_len(tx, at, first, Of::<Row<P, K, V>>::KIND)?;
        Ok(rows)
    }

    /// Adds the rows of others, whose block is freed.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the other rows are gone afterwards"
    )]
    pub fn append(&mut self, tx: &Tx<'h>, others: Self) -> Result<(), Error> {
        let (len, _) = self.len(tx)?;
        let (from, more, _) = others.head(tx)?;
        if more == 0 {
            return Ok(());
        }
        self.reserve(tx, len + more)?;
        let at = block::place(self.at)?;
        let (begin, bytes) = block::span(from, 0, more, Self::SIZE)?;
        let from = tx.view(begin, bytes)?;
        let to = self.change(tx, at, len, more)?;
        // SAFETY: both have these bytes, in two blocks with one owner each. `others` is consumed: its
        // block loses its one pointer, so that the commit no longer counts its rows.
        unsafe { core::ptr::copy_nonoverlapping(from, to, bytes) };
        block::set_len(tx, at, len + more, Of::<Row<P, K, V>>::KIND)
    }

    /// Shares the rows out among `N` others. The block is freed.
    pub fn distribute<const N: usize>(
        self,
        tx: &Tx<'h>,
        which: impl Fn(&P) -> usize,
    ) -> Result<[Self; N], Error> {
        let mut parts: [Self; N] = core::array::from_fn(|_| Self::default());
        let (at, len, _) = self.head(tx)?;
        for index in 0..len {
            let (begin, bytes) = block::span(at, index, 1, Self::SIZE)?;
            let from = tx.view(begin, bytes)?;
            // SAFETY: the row is there; `self` is consumed, so that the commit no longer counts it.
            let row: (P, K, V) = unsafe { read(from) };
            let part = parts.get_mut(which(&row.0)).ok_or(outside(at))?;
            part.push(tx, row)?;
        }
        Ok(parts)
    }

    /// As [`Rows::insert`], where there is room.
    ///
    /// # Safety
    /// Nobody has a reference into the block.
    pub unsafe fn insert_here(
        &self,
        tx: &Tx<'h>,
        index: usize,
        row: (P, K, V),
    ) -> Result<(), Error> {
        let (at, len, room) = self.head(tx)?;
        if index > len || len >= room {
            return Err(outside(at));
        }
        let place = self.change(tx, at, index, len - index + 1)?;
        // SAFETY: `change` gave the bytes of the rows from `index` on, and of one more, for which there
        // is room; the caller says that nobody looks at them.
        unsafe {
            core::ptr::copy(place, place.add(Self::SIZE), (len - index) * Self::SIZE);
            write(place, row);
        }
        block::set_len(tx, at, len + 1, Of::<Row<P, K, V>>::KIND)
    }

    /// As [`Rows::remove`].
    ///
    /// # Safety
    /// Nobody has a reference into the block.
    pub unsafe fn remove_here(&self, tx: &Tx<'h>, index: usize) -> Result<(P, K, V), Error> {
        let (at, len, _) = self.head(tx)?;
        if index >= len {
            return Err(outside(at));
        }
        let place = self.change(tx, at, index, len - index)?;
        // SAFETY: `change` gave the bytes of the rows from `index` on; the first is read, and no longer
        // counts once the others moved down; the caller says that nobody looks at them.
        let row = unsafe {
            let row = read(place);
            core::ptr::copy(place.add(Self::SIZE), place, (len - index - 1) * Self::SIZE);
            row
        };
        block::set_len(tx, at, len - 1, Of::<Row<P, K, V>>::KIND)?;
        Ok(row)
    }

    /// Takes the row at `index` away and puts the last one there.
    ///
    /// # Safety
    /// Nobody has a reference into the block.
    pub unsafe fn swap_remove_here(&self, tx: &Tx<'h>, index: usize) -> Result<(P, K, V), Error> {
        let (at, len, _) = self.head(tx)?;
        if index >= len {
            return Err(outside(at));
        }
        let place = self.change(tx, at, index, 1)?;
        let (last, bytes) = block::span(at, len - 1, 1, Self::SIZE)?;
        let last = tx.view(last, bytes)?;
        // SAFETY: both rows are there; the one is read, and its place gets the bytes of the last one,
        // which may be the same; the caller says that nobody looks at them.
        let row = unsafe {
            let row = read(place);
            core::ptr::copy(last, place, bytes);
            row
        };
        block::set_len(tx, at, len - 1, Of::<Row<P, K, V>>::KIND)?;
        Ok(row)
    }

    /// The value at `index`, to be changed.
    ///
    /// # Safety
    /// Nobody has a reference into the block, nor gets one while the result lives.
    #[allow(
        clippy::mut_from_ref,
        reason = "the caller holds the whole map mutably"
    )]
    pub unsafe fn value_here<'a>(&self, tx: &'a Tx<'h>, index: usize) -> Result<&'a mut V, Error> {
        let (at, len, _) = self.head(tx)?;
        if index >= len {
            return Err(outside(at));
        }
        let (begin, _) = block::span(at, index, 1, Self::SIZE)?;
        let to = tx.change(begin + offset_of!(Row<P, K, V>, value), size_of::<V>())?;
        tx.touch(at, Of::<Row<P, K, V>>::KIND);
        // SAFETY: `change` gave the bytes of a value, aligned, and it is there; the caller says that it is
        // referred to by nobody else.
        Ok(unsafe { &mut *to.cast::<V>() })
    }
}

// SAFETY: eight bytes, any of which are a value; `edges` shows the pointer; see the module.
unsafe impl<'h, P: Persist<'h>, K: Persist<'h>, V: Persist<'h>> Persist<'h> for Rows<'h, P, K, V> {
    const NAME: &'static str = "Rows";
    const POINTERS: bool = true;
    fn name(out: &mut String) {
        out.push_str("Rows<");
        P::name(out);
        out.push_str(", ");
        K::name(out);
        out.push_str(", ");
        V::name(out);
        out.push('>');
    }
    fn describe(schema: &mut Schema) {
        Row::<P, K, V>::describe(schema);
    }
    unsafe fn check(_: *const u8) -> bool {
        true
    }
    fn edges(&self, visit: &mut dyn FnMut(Edge)) {
        if self.at != 0 {
            visit(Edge {
                at: self.at,
                shared: false,
                single: false,
                kind: Of::<Row<P, K, V>>::KIND,
            });
        }
    }
}
