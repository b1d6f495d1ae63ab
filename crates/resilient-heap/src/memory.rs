//! The memory that a heap lies in: bytes that can be read in place, and that survive.
//!
//! # Safety
//! [`Memory`] is an unsafe trait: the heap reads through the pointer that it gives. [`Volatile`]
//! implements it with memory that it owns and never moves.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::layout::PAGE;
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Memory that survives: stores become durable after a flush of their lines and a later fence.
///
/// # Safety
/// - `base` points to `len` bytes that stay readable and writable at the same place until the memory is
///   dropped; it is aligned to 4096 bytes. `len` never shrinks.
/// - Nobody else writes to these bytes.
/// - After `store` returned, the bytes at `base` are what was stored.
pub unsafe trait Memory: Send + Sync {
    /// The first byte.
    fn base(&self) -> NonNull<u8>;

    /// How many bytes there are now.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes it at least `len` bytes long. New bytes are zero. Durable when this returns.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Memory`].
    fn grow(&self, len: usize) -> Result<(), Error>;

    /// Stores bytes.
    ///
    /// # Safety
    /// `at + bytes.len()` is at most `len()`, and nobody holds a reference to these bytes.
    unsafe fn store(&self, at: usize, bytes: &[u8]) {
        // SAFETY: the caller says that the range is inside and that nobody refers to it; the trait's
        // contract makes it writable.
        unsafe {
            let to = self.base().as_ptr().add(at);
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Begins to make the lines of a range durable.
    fn flush(&self, at: usize, len: usize);

    /// Returns when all that was flushed before is durable.
    ///
    /// # Errors
    /// [`Error::Memory`]: nobody knows what is durable.
    fn fence(&self) -> Result<(), Error>;
}

/// Ordinary memory, for tests and for heaps whose whole process is kept by other means.
#[derive(Debug)]
pub struct Volatile {
    base: NonNull<u8>,
    capacity: usize,
    len: AtomicUsize,
}

impl Volatile {
    /// Memory that can grow up to `capacity` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// [`Error::Full`]
    pub fn new(capacity: usize) -> Result<Self, Error> {
        let full = Error::Full { wanted: capacity };
        let layout = Self::layout(capacity).ok_or(full.clone())?;
        // SAFETY: `layout` never gives a size of zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(full)?;
        Ok(Self {
            base,
            capacity: layout.size(),
            len: AtomicUsize::new(0),
        })
    }

    fn layout(capacity: usize) -> Option<Layout> {
        let size = capacity.max(1).checked_next_multiple_of(PAGE)?;
        Layout::from_size_align(size, PAGE).ok()
    }
}

// SAFETY: the allocation has `capacity` bytes, is aligned to a page, and is freed by `drop` only; `len`
// is at most `capacity`, and no method but `store` writes.
unsafe impl Memory for Volatile {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    fn grow(&self, len: usize) -> Result<(), Error> {
        if len > self.capacity {
            return Err(Error::Full { wanted: len });
        }
        self.len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    fn flush(&self, _: usize, _: usize) {}

    fn fence(&self) -> Result<(), Error> {
        Ok(())
    }
}

// SAFETY: nothing but `store` writes through the pointer, and its caller excludes all others.
unsafe impl Send for Volatile {}
// SAFETY: as for `Send`.
unsafe impl Sync for Volatile {}

impl Drop for Volatile {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.capacity) {
            // SAFETY: allocated by `new` with this layout (the capacity is a multiple of a page).
            unsafe { dealloc(self.base.as_ptr(), layout) };
        }
    }
}
