//! [`PVec`]: values one after another, in one block.
//!
//! # Safety
//! A `PVec` is empty, or the one owner of a block, whose first `len` values are there. It is made here, or
//! read from a heap whose walk checked that.
#![allow(unsafe_code)]

use crate::block::{self, Access};
use crate::error::Error;
use crate::persist::{Edge, Of, Persist, Schema};
use crate::transaction::{Brand, Tx};
use alloc::string::String;
use core::marker::PhantomData;

/// A vector in the heap. It takes eight bytes where it is; an empty one has no block.
///
/// All its values lie in one piece, which is no larger than a zone.
#[repr(transparent)]
pub struct PVec<'h, T> {
    at: u64,
    of: PhantomData<T>,
    brand: Brand<'h>,
}

impl<T> Default for PVec<'_, T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> PVec<'_, T> {
    /// An empty vector.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            at: 0,
            of: PhantomData,
            brand: PhantomData,
        }
    }
}

impl<'h, T: Persist<'h>> PVec<'h, T> {
    /// Whether there is no block.
    pub(crate) fn is_null(&self) -> bool {
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

    /// How many values there are.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn len(&self, access: &impl Access<'h>) -> Result<usize, Error> {
        Ok(self.head(access)?.1)
    }

    /// Whether there are none.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn is_empty(&self, access: &impl Access<'h>) -> Result<bool, Error> {
        Ok(self.len(access)? == 0)
    }

    /// All values.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn as_slice<'a>(&'a self, access: &'a impl Access<'h>) -> Result<&'a [T], Error> {
        match self.head(access)? {
            (_, 0, _) => Ok(&[]),
            // SAFETY: these values are there; `self` is borrowed, so nobody changes them.
            (at, len, _) => unsafe { block::values(access, at, 0, len) },
        }
    }

    /// All values, to be changed.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn as_mut_slice<'a>(&'a mut self, tx: &'a Tx<'h>) -> Result<&'a mut [T], Error> {
        match self.head(tx)? {
            (_, 0, _) => Ok(&mut []),
            // SAFETY: these values are there; `self` is the one owner, borrowed mutably.
            (at, len, _) => unsafe { block::values_mut(tx, at, 0, len) },
        }
    }

    /// The value at `index`.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn get<'a>(
        &'a self,
        access: &'a impl Access<'h>,
        index: usize,
    ) -> Result<Option<&'a T>, Error> {
        let (at, len, _) = self.head(access)?;
        if index >= len {
            return Ok(None);
        }
        // SAFETY: the value is there; `self` is borrowed, so nobody changes it.
        Ok(unsafe { block::values(access, at, index, 1)? }.first())
    }

    /// The value at `index`, to be changed.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn get_mut<'a>(
        &'a mut self,
        tx: &'a Tx<'h>,
        index: usize,
    ) -> Result<Option<&'a mut T>, Error> {
        let (at, len, _) = self.head(tx)?;
        if index >= len {
            return Ok(None);
        }
        // SAFETY: the value is there; `self` is the one owner, borrowed mutably.
        Ok(unsafe { block::values_mut(tx, at, index, 1)? }.first_mut())
    }

    /// Makes room for `room` values in all.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn reserve(&mut self, tx: &Tx<'h>, room: usize) -> Result<(), Error> {
        let (old, len, before) = self.head(tx)?;
        if room <= before {
            return Ok(());
        }
        let new = block::allocate::<T>(tx, room)?;
        for index in 0..len {
            // SAFETY: the value is there, and the new block has room for it. The old block loses its one
            // pointer below, so that the commit no longer counts its values.
            unsafe { block::put(tx, new, index, block::take::<T>(tx, old, index)?)? };
        }
        block::set_len(tx, new, len, Of::<T>::KIND)?;
        self.at = new as u64;
        Ok(())
    }

    /// Adds a value at the end.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn push(&mut self, tx: &Tx<'h>, value: T) -> Result<(), Error> {
        let (_, len, room) = self.head(tx)?;
        if len == room {
            self.reserve(tx, (room * 2).max(4))?;
        }
        let at = block::place(self.at)?;
        // SAFETY: there is room, and no value is there.
        unsafe { block::put(tx, at, len, value)? };
        block::set_len(tx, at, len + 1, Of::<T>::KIND)
    }

    /// Takes the last value away.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn pop(&mut self, tx: &Tx<'h>) -> Result<Option<T>, Error> {
        let (at, len, _) = self.head(tx)?;
        let Some(last) = len.checked_sub(1) else {
            return Ok(None);
        };
        // SAFETY: the value is there, and no longer counted from the next line on.
        let value = unsafe { block::take(tx, at, last)? };
        block::set_len(tx, at, last, Of::<T>::KIND)?;
        Ok(Some(value))
    }

    /// Takes the value at `index` away and puts the last one there.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn swap_remove(&mut self, tx: &Tx<'h>, index: usize) -> Result<Option<T>, Error> {
        let len = self.len(tx)?;
        if index >= len {
            return Ok(None);
        }
        self.as_mut_slice_of(tx, index, len)?;
        self.pop(tx)
    }

    /// Swaps the value at `index` with the last one.
    fn as_mut_slice_of(&mut self, tx: &Tx<'h>, index: usize, len: usize) -> Result<(), Error> {
        if index + 1 < len {
            let (at, ..) = self.head(tx)?;
            // SAFETY: both values are there, and each is put where the other was: each is counted once.
            unsafe {
                let (one, last) = (block::take(tx, at, index)?, block::take(tx, at, len - 1)?);
                block::put::<T>(tx, at, index, last)?;
                block::put::<T>(tx, at, len - 1, one)?;
            }
        }
        Ok(())
    }

    /// Puts a value at `index`; those from there on move up. Beyond the end it is added there.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn insert(&mut self, tx: &Tx<'h>, index: usize, value: T) -> Result<(), Error> {
        self.push(tx, value)?;
        let values = self.as_mut_slice(tx)?;
        if let Some(tail) = values.get_mut(index..) {
            tail.rotate_right(1);
        }
        Ok(())
    }

    /// Takes the value at `index` away; those behind it move down.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn remove(&mut self, tx: &Tx<'h>, index: usize) -> Result<Option<T>, Error> {
        match self.as_mut_slice(tx)?.get_mut(index..) {
            Some(tail) if !tail.is_empty() => {
                tail.rotate_left(1);
                self.pop(tx)
            }
            _ => Ok(None),
        }
    }

    /// Takes all values from `len` on away.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn truncate(&mut self, tx: &Tx<'h>, len: usize) -> Result<(), Error> {
        let (at, before, _) = self.head(tx)?;
        if len < before {
            block::set_len(tx, at, len, Of::<T>::KIND)?;
        }
        Ok(())
    }

    /// Takes the values from `first` on away, into a vector with room for `room` at least.
    pub(crate) fn split_off(
        &mut self,
        tx: &Tx<'h>,
        first: usize,
        room: usize,
    ) -> Result<Self, Error> {
        let (at, len, _) = self.head(tx)?;
        let count = len.checked_sub(first).ok_or(Error::Invalid {
            what: "a vector is shorter than it should be",
            at,
        })?;
        let mut other = Self::new();
        other.reserve(tx, room.max(count))?;
        for index in first..len {
            // SAFETY: the value is there; it no longer counts here from the end of this function on.
            other.push(tx, unsafe { block::take(tx, at, index)? })?;
        }
        self.truncate(tx, first)?;
        Ok(other)
    }

    /// Adds the values of another vector, whose block is freed.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the other is gone afterwards"
    )]
    pub(crate) fn append(&mut self, tx: &Tx<'h>, other: Self) -> Result<(), Error> {
        let (at, len, _) = other.head(tx)?;
        for index in 0..len {
            // SAFETY: the value is there. `other` is consumed: its block loses its one pointer, so that
            // the commit no longer counts its values.
            self.push(tx, unsafe { block::take(tx, at, index)? })?;
        }
        Ok(())
    }

    /// Adds copies of values at the end.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn extend_from_slice(&mut self, tx: &Tx<'h>, values: &[T]) -> Result<(), Error>
    where
        T: Copy,
    {
        let (_, len, room) = self.head(tx)?;
        let wanted = len.saturating_add(values.len());
        if wanted > room {
            self.reserve(tx, wanted.max(room * 2))?;
        }
        if values.is_empty() {
            return Ok(());
        }
        let at = block::place(self.at)?;
        for (i, value) in values.iter().enumerate() {
            // SAFETY: there is room, and no value is there.
            unsafe { block::put(tx, at, len + i, *value)? };
        }
        block::set_len(tx, at, wanted, Of::<T>::KIND)
    }
}

// SAFETY: eight bytes, any of which are a value; `edges` shows the pointer; see the module.
unsafe impl<'h, T: Persist<'h>> Persist<'h> for PVec<'h, T> {
    const NAME: &'static str = "PVec";
    const POINTERS: bool = true;
    fn name(out: &mut String) {
        out.push_str("PVec<");
        T::name(out);
        out.push('>');
    }
    fn describe(schema: &mut Schema) {
        if schema.enter::<Self>() {
            T::describe(schema);
        }
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
                kind: Of::<T>::KIND,
            });
        }
    }
}
