//! The memory that survives, as the heap wants it; and rays that hit it.
//!
//! A ray flips a bit *between* the moment that a commit is durable in the log and the moment that it is
//! written home: in the middle of an update.
//!
//! # Safety
//! [`Survivor`] hands everything through to [`Mapped`]; a ray is what memory does to itself, within it.
#![allow(unsafe_code)]

use crate::processor::map_durable;
use alloc::string::{String, ToString};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};
use resilient_heap::Error;
use resilient_heap::memory::{Mapped, Memory};

/// The bit that the next fence flips, counted from the beginning of the memory, and one; 0 for none.
static RAY: AtomicUsize = AtomicUsize::new(0);

/// The next fence flips this bit.
pub fn shoot(byte: usize, bit: usize) {
    RAY.store(byte * 8 + bit % 8 + 1, Ordering::Relaxed);
}

/// Memory that survives a reset.
pub struct Survivor(Mapped);

impl Survivor {
    /// Maps it.
    ///
    /// # Errors
    /// Where it cannot be mapped.
    pub fn map(at: u64, len: u64) -> Result<Self, String> {
        let base = NonNull::new(map_durable(at, len)?).ok_or("no place")?;
        // SAFETY: it was just mapped, for ever, as long as the firmware says it is; the kernel uses it
        // for the heap alone.
        let mapped = unsafe { Mapped::new(base, len as usize) };
        Ok(Self(mapped.map_err(|error| error.to_string())?))
    }

    /// Where it begins.
    pub fn begin(&self) -> usize {
        self.0.base().as_ptr().addr()
    }
}

// SAFETY: as of `Mapped`; what a ray changes, flipping memory could have changed, too.
unsafe impl Memory for Survivor {
    fn base(&self) -> NonNull<u8> {
        self.0.base()
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn grow(&self, len: usize) -> Result<(), Error> {
        self.0.grow(len)
    }

    fn flush(&self, at: usize, len: usize) {
        self.0.flush(at, len);
    }

    fn fence(&self) -> Result<(), Error> {
        self.0.fence()?;
        let ray = RAY.swap(0, Ordering::Relaxed);
        if let Some(bit) = ray.checked_sub(1)
            && bit / 8 < self.len()
        {
            // SAFETY: inside, as was just checked. Nobody has a reference to it: a commit is under way.
            unsafe {
                let at = self.base().as_ptr().add(bit / 8);
                at.write_volatile(at.read_volatile() ^ 1 << (bit % 8));
            }
        }
        Ok(())
    }
}
