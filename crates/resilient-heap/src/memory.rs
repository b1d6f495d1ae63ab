//! The memory that a heap lies in: bytes that can be read in place, and that survive.
//!
//! # Safety
//! [`Memory`] is an unsafe trait: the heap reads through the pointer that it gives. [`Volatile`]
//! implements it with memory that it owns and never moves, [`Mapped`] with memory of which its maker
//! says the same.
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

/// Persistent memory that is mapped already: what kernels and firmware have. Its lines are made durable by
/// instructions of the processor. x86-64 only, so far.
#[derive(Debug)]
pub struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

impl Mapped {
    /// The memory at `base`, all of it; zeros, or what a heap left there.
    ///
    /// # Errors
    /// [`Error::Memory`]: this processor cannot make lines durable, or `base` is not aligned to 4096 bytes.
    ///
    /// # Safety
    /// `len` bytes at `base` are readable and writable until the value is dropped, and nobody else writes
    /// to them.
    pub unsafe fn new(base: NonNull<u8>, len: usize) -> Result<Self, Error> {
        let refused = |what| Err(Error::Memory { what, code: 0 });
        if !crate::flush::offered() {
            return refused("this processor cannot make lines durable");
        }
        if !base.as_ptr().addr().is_multiple_of(PAGE) {
            return refused("persistent memory begins at a page");
        }
        Ok(Self { base, len })
    }
}

// SAFETY: `new`'s caller says that the bytes stay and that nobody else writes to them; the alignment was
// checked there; the length never changes, and no method but `store` writes.
unsafe impl Memory for Mapped {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn grow(&self, len: usize) -> Result<(), Error> {
        if len > self.len {
            return Err(Error::Full { wanted: len });
        }
        Ok(())
    }

    fn flush(&self, at: usize, len: usize) {
        if len > 0 && at.checked_add(len).is_some_and(|end| end <= self.len) {
            // SAFETY: the range was found to be inside, and is mapped.
            unsafe { crate::flush::flush(self.base.as_ptr().wrapping_add(at), len) };
        }
    }

    fn fence(&self) -> Result<(), Error> {
        crate::flush::fence();
        Ok(())
    }
}

// SAFETY: nothing but `store` writes through the pointer, and its caller excludes all others.
unsafe impl Send for Mapped {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapped {}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Heap;

    /// A heap in memory that somebody else has mapped goes on after it was only dropped, and begins at a
    /// page only.
    #[test]
    fn mapped_memory_keeps_a_heap() {
        let owner = Volatile::new(8 << 20).unwrap();
        let open = |base: NonNull<u8>| {
            // SAFETY: `owner` has as many bytes, and uses none of them.
            let memory = unsafe { Mapped::new(base, 8 << 20) }?;
            Heap::<u64>::open(memory, |_| Ok(0))
        };
        for turn in 1..4 {
            let mut heap = open(owner.base()).unwrap();
            assert_eq!(heap.opened().created, turn == 1);
            heap.write(|count, _| {
                *count += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(heap.read(|count, _| Ok(*count)), Ok(turn));
        }
        // SAFETY: still within the owner's bytes; nothing is ever read or written there.
        let askew = unsafe { Mapped::new(owner.base().add(64), 4096) };
        assert!(matches!(askew, Err(Error::Memory { .. })));
    }
}
