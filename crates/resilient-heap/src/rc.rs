//! [`PRc`]: a value in the heap that several others share, and that no longer changes.
//!
//! Since it never changes, what it points to is older than itself: pointers never run in a circle, and
//! counting them frees everything. The count is brought up to date by commits (see `count`).
//!
//! # Safety
//! A `PRc` is made by [`PRc::new`], by [`PRc::share`], or read from a heap whose walk checked it: it leads
//! to a block with one value, to which nobody has a reference for changing.
#![allow(unsafe_code)]

use crate::block::{self, Access};
use crate::boxed::single;
use crate::error::Error;
use crate::persist::{Edge, Of, Persist, Schema};
use crate::transaction::{Brand, Tx};
use alloc::string::String;
use core::marker::PhantomData;
use core::num::NonZeroU64;

/// A shared value in the heap. `Option<PRc<T>>` takes no more room.
///
/// The value is freed at the commit that takes its last pointer away.
#[repr(transparent)]
#[must_use = "a value that nothing in the heap holds is freed at the commit"]
pub struct PRc<'h, T> {
    at: NonZeroU64,
    of: PhantomData<T>,
    brand: Brand<'h>,
}

impl<'h, T: Persist<'h>> PRc<'h, T> {
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
        // SAFETY: see the module; nobody ever changes the value.
        match unsafe { block::values(access, block::place(self.at.get())?, 0, 1)? } {
            [value] => Ok(value),
            _ => Err(Error::NotAHeap),
        }
    }

    /// Another pointer to the same value.
    #[allow(
        clippy::should_implement_trait,
        reason = "pointers are made within a transaction only"
    )]
    pub fn share(&self, _: &Tx<'h>) -> Self {
        Self {
            at: self.at,
            of: PhantomData,
            brand: PhantomData,
        }
    }

    /// Whether both lead to the same value.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self.at == other.at
    }

    /// How many values of the heap held pointers to this one when the transaction began.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn count(&self, access: &impl Access<'h>) -> Result<u32, Error> {
        Ok(block::head(access, block::place(self.at.get())?)?.refs)
    }
}

// SAFETY: eight bytes that are not all zero; `edges` shows the pointer; see the module.
unsafe impl<'h, T: Persist<'h>> Persist<'h> for PRc<'h, T> {
    const NAME: &'static str = "PRc";
    const POINTERS: bool = true;
    fn name(out: &mut String) {
        out.push_str("PRc<");
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
            shared: true,
            single: true,
            kind: Of::<T>::KIND,
        });
    }
}

// SAFETY: guaranteed to be as `PRc` is, with zero for `None`.
unsafe impl<'h, T: Persist<'h>> Persist<'h> for Option<PRc<'h, T>> {
    const NAME: &'static str = "Option<PRc>";
    const POINTERS: bool = true;
    fn name(out: &mut String) {
        out.push_str("Option<");
        PRc::<T>::name(out);
        out.push('>');
    }
    fn describe(schema: &mut Schema) {
        PRc::<T>::describe(schema);
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
