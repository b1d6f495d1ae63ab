//! [`PBox`]: a value of its own in the heap.
//!
//! # Safety
//! A `PBox` is made by [`PBox::new`] or read from a heap whose walk checked it: it is the one owner of a
//! block with one value. Blocks are freed by commits only, when no value holds the pointer.
#![allow(unsafe_code)]

use crate::block::{self, Access};
use crate::error::Error;
use crate::persist::{Edge, Of, Persist, Schema};
use crate::transaction::{Brand, Tx};
use alloc::string::String;
use core::marker::PhantomData;
use core::num::NonZeroU64;

/// A value of its own in the heap; its owner says which. `Option<PBox<T>>` takes no more room.
///
/// Dropping one, or writing over it, frees the value at the commit.
#[repr(transparent)]
#[must_use = "a value that nothing in the heap holds is freed at the commit"]
pub struct PBox<'h, T> {
    at: NonZeroU64,
    of: PhantomData<T>,
    brand: Brand<'h>,
}

/// A new block with one value.
pub(crate) fn single<'h, T: Persist<'h>>(tx: &Tx<'h>, value: T) -> Result<NonZeroU64, Error> {
    let at = block::allocate::<T>(tx, 1)?;
    // SAFETY: the block is new and has room for one.
    unsafe { block::put(tx, at, 0, value)? };
    block::set_len(tx, at, 1, Of::<T>::KIND)?;
    NonZeroU64::new(at as u64).ok_or(Error::NotAHeap)
}

impl<'h, T: Persist<'h>> PBox<'h, T> {
    /// Puts a value into the heap.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`]
    pub fn new(tx: &Tx<'h>, value: T) -> Result<Self, Error> {
        Ok(Self {
            at: single(tx, value)?,
            of: PhantomData,
            brand: PhantomData,
        })
    }

    /// The value.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn get<'a>(&'a self, access: &'a impl Access<'h>) -> Result<&'a T, Error> {
        // SAFETY: see the module; `self` is borrowed, so nobody changes the value.
        match unsafe { block::values(access, block::place(self.at.get())?, 0, 1)? } {
            [value] => Ok(value),
            _ => Err(Error::NotAHeap),
        }
    }

    /// The value, to be changed.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn get_mut<'a>(&'a mut self, tx: &'a Tx<'h>) -> Result<&'a mut T, Error> {
        // SAFETY: see the module; `self` is the one owner, borrowed mutably.
        match unsafe { block::values_mut(tx, block::place(self.at.get())?, 0, 1)? } {
            [value] => Ok(value),
            _ => Err(Error::NotAHeap),
        }
    }

    /// Takes the value out of its block, which is freed at the commit.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn into_inner(self, tx: &Tx<'h>) -> Result<T, Error> {
        // SAFETY: see the module. The block stays as it is; its one pointer is consumed, so the
        // commit finds it dead and no longer counts what the value points to on its behalf.
        unsafe { block::take(tx, block::place(self.at.get())?, 0) }
    }
}

// SAFETY: eight bytes that are not all zero; `edges` shows the pointer; see the module.
unsafe impl<'h, T: Persist<'h>> Persist<'h> for PBox<'h, T> {
    const NAME: &'static str = "PBox";
    const POINTERS: bool = true;
    fn name(out: &mut String) {
        out.push_str("PBox<");
        T::name(out);
        out.push('>');
    }
    fn describe(schema: &mut Schema) {
        if schema.enter::<Self>() {
            T::describe(schema);
        }
    }
    unsafe fn check(at: *const u8) -> bool {
        // SAFETY: the caller gives eight initialized bytes.
        unsafe { at.cast::<u64>().read_unaligned() != 0 }
    }
    fn edges(&self, visit: &mut dyn FnMut(Edge)) {
        visit(Edge {
            at: self.at.get(),
            shared: false,
            single: true,
            kind: Of::<T>::KIND,
        });
    }
}

// SAFETY: guaranteed to be as `PBox` is, with zero for `None`.
unsafe impl<'h, T: Persist<'h>> Persist<'h> for Option<PBox<'h, T>> {
    const NAME: &'static str = "Option<PBox>";
    const POINTERS: bool = true;
    fn name(out: &mut String) {
        out.push_str("Option<");
        PBox::<T>::name(out);
        out.push('>');
    }
    fn describe(schema: &mut Schema) {
        PBox::<T>::describe(schema);
    }
    unsafe fn check(_: *const u8) -> bool {
        true
    }
    fn edges(&self, visit: &mut dyn FnMut(Edge)) {
        if let Some(pointer) = self {
            pointer.edges(visit);
        }
    }
}
