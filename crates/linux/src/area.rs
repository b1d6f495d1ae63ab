//! Private anonymous memory of this process that is a mapping of its own.
//!
//! Loads of measurements and tests need mappings of exact sizes, which an allocator does not give:
//! it keeps, splits and joins them as it likes.
//!
//! # Rules
//! - Behind each area lies one page that nobody may touch, so that the kernel does not join areas.
//!
//! # Safety
//! An [`Area`] owns its mapping alone: the address comes from a mapping that was just made with the
//! kernel choosing the place, it is never handed out but as a borrow of the area, and it is unmapped
//! once, when the area is dropped.
#![allow(unsafe_code)]

use crate::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::ptr::NonNull;

/// Bytes of the page behind an area, and the unit of its length.
const PAGE: usize = 4096;

/// A private anonymous mapping, readable and writable; zero at first.
#[derive(Debug)]
pub struct Area {
    base: NonNull<u8>,
    len: usize,
}

impl Area {
    /// Maps `len` bytes, rounded up to whole pages and at least one.
    ///
    /// # Errors
    /// What `mmap(2)` says; `EOVERFLOW` for a length that is no length.
    pub fn new(len: usize) -> Result<Self, Errno> {
        let len = len
            .max(1)
            .checked_next_multiple_of(PAGE)
            .ok_or(Errno::OVERFLOW)?;
        let all = len.checked_add(PAGE).ok_or(Errno::OVERFLOW)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at a place that the kernel chooses; no memory of ours is touched.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::empty(), flags)? };
        let base = NonNull::new(at.cast()).ok_or(Errno::FAULT)?;
        let area = Self { base, len };
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: these bytes are the first of the mapping that was just made.
        unsafe { mprotect(at, len, access)? };
        Ok(area)
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `new` mapped so many bytes there, readable and writable; they are ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Length, bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an area has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: `new` mapped so many bytes there, and no borrow of them is left.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len + PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_mappings_of_their_own() {
        let mut areas: Vec<Area> = (1..20).map(|n| Area::new(n * 5000).unwrap()).collect();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for area in &mut areas {
            let first = area.base.as_ptr() as usize;
            let line = format!("{first:x}-{:x} rw-p", first + area.len());
            assert!(maps.contains(&line), "{line}\n{maps}");
            assert_eq!(area.len() % PAGE, 0);
            assert!(area.bytes().iter().all(|b| *b == 0));
            area.bytes().fill(7);
        }
        let lens: usize = areas.iter().map(Area::len).sum();
        assert!(lens >= 5000 * 190);
    }

    #[test]
    fn a_length_that_is_none_is_an_error() {
        assert_eq!(Area::new(usize::MAX).unwrap_err(), Errno::OVERFLOW);
        assert!(Area::new(1 << 60).is_err());
        assert_eq!(Area::new(0).unwrap().len(), PAGE);
    }
}
